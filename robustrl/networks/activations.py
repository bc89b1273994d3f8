"""Activations of known curvature: families of smooth ones, each with one setting, and ReLUs to compare with.

f_beta(x) = f(beta x) / beta has the slopes of f and beta times its curvature, the largest size of f''. Less curvature makes losses
smoother in the input, so that attacks in one step stay accurate; too little leaves a nearly linear network. Neither end is best: treat
it as a setting.

Source: Singla, Singla, Jacobs, Feizi (ICCV 2021), arXiv:2102.07861. The secant curvature, one figure for smooth and kinked functions,
and the bounded parametrisation of a learned beta are ours.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustrl.errors import check_choice, check_positive, check_real

SECANT_STEP = 0.1


@dataclass(frozen=True)
class Family:
    """f_1 of a family, with its exact figures, rounded outwards.

    Attributes:
        function: of tensors, entry by entry; 0 at 0 but for the sigmoid.
        curvature: the largest size of f'', or its limit.
        slopes: inf and sup of f'.
    """

    function: Callable[[Tensor], Tensor]
    curvature: float
    slopes: tuple[float, float]


FAMILIES = {
    "swish": Family(functional.silu, 0.5, (-0.09983932012887, 1.09983932012887)),
    "softplus": Family(lambda x: functional.softplus(x, threshold=40.0) - math.log(2), 0.25, (0.0, 1.0)),
    "gelu": Family(functional.gelu, math.sqrt(2 / math.pi), (-0.12890414518516, 1.12890414518516)),
    "mish": Family(functional.mish, 0.644204637236973, (-0.112526122389463, 1.08849816125173)),
    "celu": Family(functional.celu, 1.0, (0.0, 1.0)),
    "squareplus": Family(lambda x: (x + (x.square() + 4).sqrt()) / 2 - 1, 0.25, (0.0, 1.0)),
    "smooth_relu": Family(lambda x: x.relu() - x.relu().log1p(), 1.0, (0.0, 1.0)),
    "bent_identity": Family(lambda x: ((x.square() + 1).sqrt() - 1) / 2 + x, 0.5, (0.5, 1.5)),
    "tanh": Family(torch.tanh, 4 / (3 * math.sqrt(3)), (0.0, 1.0)),
    "sigmoid": Family(torch.sigmoid, 1 / (6 * math.sqrt(3)), (0.0, 0.25)),
    "softsign": Family(functional.softsign, 2.0, (0.0, 1.0)),
    "logcosh": Family(lambda x: functional.softplus(2 * x, threshold=40.0) - x - math.log(2), 1.0, (-1.0, 1.0)),
    "lisht": Family(lambda x: x * x.tanh(), 2.0, (-1.19967864025774, 1.19967864025774)),
}
"""By name. `softplus` and `squareplus` are shifted to pass through 0; `smooth_relu` is x - log(1 + x) above 0 and 0 below; `celu` with
alpha = 1 / beta; `swish` with beta = 1 is SiLU."""
RELUS = ("relu", "leaky_relu")


class Activation(nn.Module, ABC):
    """A function of single entries that tells how steep and how curved it is."""

    @abstractmethod
    def curvature(self) -> float:
        """The largest size of the second derivative; inf with a kink."""

    @abstractmethod
    def slopes(self) -> tuple[float, float]:
        """inf and sup of f'."""

    @abstractmethod
    def secant_curvature(self, h: float = SECANT_STEP) -> float:
        """Largest difference of the slopes at x + h and x - h, over 2h: the curvature of f averaged over x +- h; finite with kinks too.

        Args:
            h: half the distance, in units of the input, > 0. Compare functions at one h; as h falls it becomes `curvature()`.
        """

    def lipschitz(self) -> float:
        """The largest size of the slope."""
        return max(map(abs, self.slopes()))


class SmoothActivation(Activation):
    """f(beta x) / beta for a family's f.

    Args:
        name: of a family in `FAMILIES`.
        beta: sharpness, > 0.
        learnable: train beta, within `beta_range` by a logistic curve in its logarithm. Leave it out of weight decay.
        beta_range: smallest and largest learned beta; `beta` must lie between.
    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, name: str, beta: float = 1.0, *, learnable: bool = False, beta_range: tuple[float, float] = (0.05, 50.0)
    ) -> None:
        super().__init__()
        self.name: str = check_choice("name", name, tuple(FAMILIES))
        self._beta = check_positive("beta", beta)
        self._low, self._high = (check_positive("beta_range", end) for end in beta_range)
        self.position: nn.Parameter | None = None
        if learnable:
            if not self._low < self._beta < self._high:
                raise ValueError(f"beta must lie inside beta_range {beta_range}, got {beta}")
            share = math.log(self._beta / self._low) / math.log(self._high / self._low)
            self.position = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    @property
    def beta(self) -> float:
        """The sharpness in use."""
        with torch.no_grad():
            return float(self._sharpness())

    def _sharpness(self) -> Tensor | float:
        if self.position is None:
            return self._beta
        return self._low * (self._high / self._low) ** self.position.sigmoid()

    def curvature(self) -> float:
        return self.beta * FAMILIES[self.name].curvature

    def slopes(self) -> tuple[float, float]:
        return FAMILIES[self.name].slopes

    def secant_curvature(self, h: float = SECANT_STEP) -> float:
        """See the base class; the largest value on a grid that is refined once."""
        step = self.beta * check_positive("h", h)

        def rise(at: Tensor) -> Tensor:
            return (self._slope(at + step) - self._slope(at - step)).abs()

        reach = 12 + step  # all families bend next to 0
        grid = torch.linspace(-reach, reach, 2**16 + 1, dtype=torch.float64)
        centre = grid[rise(grid).argmax()]
        fine = centre + (grid[1] - grid[0]) * torch.linspace(-1, 1, 2**12 + 1, dtype=torch.float64)
        return float(rise(fine).max()) / (2 * h)

    def _slope(self, at: Tensor) -> Tensor:
        with torch.enable_grad():
            at = at.requires_grad_()
            (slope,) = torch.autograd.grad(FAMILIES[self.name].function(at).sum(), at)
        return slope

    def forward(self, inputs: Tensor) -> Tensor:
        beta = self._sharpness()
        return FAMILIES[self.name].function(beta * inputs) / beta

    def extra_repr(self) -> str:
        return f"{self.name!r}, beta={self.beta:.6g}" + (", learnable=True" if self.position is not None else "")


class LeakyReLU(Activation):
    """max(x, slope x), a kink of 1 - slope at 0.

    Args:
        slope: below 0, in [0, 1]; 0 is ReLU, 1 the identity.
    Raises:
        ValueError: if it is not in [0, 1].
    """

    def __init__(self, slope: float = 0.2) -> None:
        super().__init__()
        self.slope = check_real("slope", slope, allowed="a number in [0, 1]")
        if not 0 <= self.slope <= 1:
            raise ValueError(f"slope must be a number in [0, 1], got {slope}")

    def curvature(self) -> float:
        return math.inf if self.slope < 1 else 0.0

    def slopes(self) -> tuple[float, float]:
        return self.slope, 1.0

    def secant_curvature(self, h: float = SECANT_STEP) -> float:
        return (1 - self.slope) / (2 * check_positive("h", h))

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.leaky_relu(inputs, self.slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope:.6g}"


def activation(
    name: str, *, beta: float | None = None, slope: float | None = None, learnable: bool = False
) -> Callable[[], Activation]:
    """A recipe for an activation that can be pickled: `policy_kwargs=dict(activation_fn=activation("swish", beta=4))`.

    Args:
        name: of `FAMILIES`, "relu" or "leaky_relu".
        beta: sharpness of the smooth ones, > 0; default 1.
        slope: of "leaky_relu" below 0; default 0.2.
        learnable: whether training moves beta.
    Returns:
        a function without arguments, as Stable-Baselines3's `activation_fn`; every call makes a new module.
    Raises:
        ValueError: if an argument is out of range or none of this activation's.
    """
    check_choice("name", name, (*FAMILIES, *RELUS))
    if slope is not None and name != "leaky_relu":
        raise ValueError(f"slope is a setting of 'leaky_relu', got {slope} for {name!r}")
    if name in RELUS and (beta is not None or learnable):
        raise ValueError(
            f"beta and learnable must be left out for {name!r}: f(beta x) / beta is the same function for every beta"
        )
    recipe: Callable[[], Activation]
    if name == "relu":
        recipe = functools.partial(LeakyReLU, 0.0)
    elif name == "leaky_relu":
        recipe = functools.partial(LeakyReLU, 0.2 if slope is None else slope)
    else:
        recipe = functools.partial(SmoothActivation, name, 1.0 if beta is None else beta, learnable=learnable)
    recipe()  # refuses what is out of range here, not when a policy is built
    return recipe


def from_text(text: str) -> Callable[[], Activation]:
    """`activation` of "swish", "swish:4" (beta) or "leaky_relu:0.1" (slope).

    Raises:
        ValueError: for an unknown name, or a setting that it does not have.
    """
    name, colon, setting = text.partition(":")
    check_choice("activation", name, (*FAMILIES, *RELUS))
    try:
        value = float(setting) if colon else None
    except ValueError:
        raise ValueError(f"activation must be NAME or NAME:NUMBER, got {text!r}") from None
    return activation(name, slope=value) if name == "leaky_relu" else activation(name, beta=value)


def from_curvature(curvature: float, name: str = "swish", *, learnable: bool = False) -> Callable[[], Activation]:
    """`activation` by its curvature: exact for smooth ones, secant at h = 0.1 for "leaky_relu".

    Args:
        curvature: > 0; for "leaky_relu" at most 5.
        name: of `FAMILIES`, or "leaky_relu".
        learnable: whether training moves beta from there.
    Raises:
        ValueError: if there is none of that curvature.
    """
    check_choice("name", name, (*FAMILIES, "leaky_relu"))
    curvature = check_positive("curvature", curvature)
    if name != "leaky_relu":
        return activation(name, beta=curvature / FAMILIES[name].curvature, learnable=learnable)
    largest = 1 / (2 * SECANT_STEP)
    if curvature > largest:
        raise ValueError(f"curvature of 'leaky_relu' must be at most {largest:g}, that of ReLU, got {curvature}")
    return activation(name, slope=1 - curvature / largest, learnable=learnable)
