"""Inner attacks of robust training: what a batch is changed by before a network learns from it.

They are made for training, not for measuring: `NFGSM` leaves the ball on purpose. Attacks on agents are in `robustrl.attacks`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from robustrl.attacks.geometry import ascent, per_row, project, unblocked, within
from robustrl.errors import check_choice, check_count, check_positive, check_real

Bounds = tuple[Any, Any] | None
"""The range (low, high) of inputs: numbers, or tensors or arrays (*shape); None for no range."""
RowLosses = Callable[[Tensor], Tensor]
"""From inputs (n, *shape) to the losses (n,) that an attack climbs."""
NORMS = {"inf": math.inf, "2": 2.0, math.inf: math.inf, 2: 2.0}


def check_norm(norm: Any) -> float:
    """Return 2.0 or inf."""
    return NORMS[check_choice("norm", norm, tuple(NORMS))]


@dataclass(frozen=True)
class Region:
    """Where an attack may go: x + delta with ||delta / scale||_norm <= epsilon, in the range of inputs.

    Attributes:
        epsilon: radius, >= 0.
        norm: 2 or inf.
        bounds: range of inputs. It comes last: what would leave it is cut off, also where that shortens the perturbation.
        scale: units per entry, (*shape) or what broadcasts to it: 0 for one that cannot change; None for ones.
    """

    epsilon: float
    norm: float
    bounds: tuple[Tensor, Tensor] | None
    scale: Tensor | None

    @classmethod
    def of(cls, epsilon: float, norm: float | str = "inf", bounds: Bounds = None, mask: Tensor | None = None) -> Self:
        """Of what a caller gives; see `InnerAttack.perturb`.

        Raises:
            ValueError: if an argument is out of range.
        """
        if check_real("epsilon", epsilon) < 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon}")
        if bounds is not None:
            low, high = (torch.as_tensor(end, dtype=torch.float32) for end in bounds)  # arrays, as those of a Box, too
            if not bool((low <= high).all()):
                raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
            bounds = low, high
        if mask is not None and not (bool((mask >= 0).all()) and bool(mask.any()) and bool(mask.isfinite().all())):
            raise ValueError("mask must hold booleans or finite numbers >= 0, and not only zeros")
        return cls(float(epsilon), check_norm(norm), bounds, None if mask is None else mask.float())

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        bounds = None if self.bounds is None else (self.bounds[0].to(device), self.bounds[1].to(device))
        return replace(self, bounds=bounds, scale=None if self.scale is None else self.scale.to(device))

    def random(self, x: Tensor, reach: float, generator: torch.Generator | None) -> Tensor:
        """Points of a ball `reach` times as large: evenly in norm inf, in norm 2 at even distances in random directions."""
        radius = reach * self.epsilon
        if self.norm == math.inf:
            points = torch.empty_like(x).uniform_(-radius, radius, generator=generator)
        else:
            points = torch.empty_like(x).normal_(generator=generator) * (1.0 if self.scale is None else self.scale > 0)
            distances = torch.empty(len(x), device=x.device).uniform_(0, radius, generator=generator)
            points = ascent(points, 2) * per_row(distances, x)
        return self.in_range(x, self._scaled(points))

    def stepped(self, loss_of: RowLosses, x: Tensor, delta: Tensor, length: float) -> Tensor:
        """A step of `length` times epsilon in the direction in which losses rise most; wherever it leads."""
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            # Only with respect to the input: weights keep the gradients that they have.
            (gradient,) = torch.autograd.grad(loss_of(point).sum(), point)
        if self.norm == 2:
            gradient = unblocked(gradient, point.detach(), self.bounds)  # the budget is for entries that can move
        return delta + length * self.epsilon * self._scaled(ascent(self._scaled(gradient), self.norm))

    def inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """Back into the ball, then into the range."""
        if self.scale is not None:
            delta = delta / self.scale.where(self.scale > 0, 1.0)
        if self.norm == math.inf:
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            delta = project(delta, delta.new_full((len(delta),), self.epsilon), self.norm)
        return self.in_range(x, self._scaled(delta))

    def in_range(self, x: Tensor, delta: Tensor) -> Tensor:
        """What arrives of a perturbation."""
        return within(x, delta, self.bounds)

    def _scaled(self, e: Tensor) -> Tensor:
        return e if self.scale is None else e * self.scale


@dataclass(frozen=True)
class InnerAttack(ABC):
    """How inputs are changed before a network learns from them."""

    def perturb(
        self,
        loss_of: RowLosses,
        x: Tensor,
        epsilon: float,
        norm: float | str = "inf",
        bounds: Bounds = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturbations (n, *shape) that raise losses.

        Args:
            loss_of: from inputs to losses, row by row. Nothing but the gradient of its argument is computed.
            x: inputs (n, *shape), float.
            epsilon: radius, >= 0.
            norm: 2 or "inf", of a whole input.
            bounds: range of inputs, applied last.
            mask: entries that may change, boolean; or their units, floats >= 0, by which perturbations are divided before they
                are measured.
            generator: of random starts, on the device of `x`.
        Raises:
            ValueError: if an argument is out of range.
        """
        return self.within(Region.of(epsilon, norm, bounds, mask).to(x.device), loss_of, x.detach(), generator)

    @abstractmethod
    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """`perturb` of inputs without gradients."""

    def scaled(self, factor: float) -> Self:
        """With steps `factor` times as long, as a guard asks for; the same for attacks without."""
        return self


@dataclass(frozen=True)
class NoAttack(InnerAttack):
    """Plain training."""

    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.zeros_like(x)


class _Steps(InnerAttack, ABC):
    """Attacks with a length of step `alpha`, times epsilon."""

    alpha: float

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)

    def scaled(self, factor: float) -> Self:
        return replace(self, alpha=self.alpha * factor)  # type: ignore[call-arg]  # every subclass is a dataclass with it


@dataclass(frozen=True)
class FGSMRS(_Steps):
    """One step from a random point of the ball, and back into it.

    Args:
        alpha: length of the step, times epsilon. Long ones invite catastrophic overfitting.
    Source: Wong, Rice, Kolter (ICLR 2020), arXiv:2001.03994.
    """

    alpha: float = 1.25

    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return region.inside(x, region.stepped(loss_of, x, region.random(x, 1, generator), self.alpha))


@dataclass(frozen=True)
class NFGSM(_Steps):
    """One step from a point of a larger ball, not brought back: perturbations of up to (k + alpha) * epsilon.

    They are good to learn from, not to measure with, and say nothing of the threat model.

    Args:
        k: radius of the random start, times epsilon.
        alpha: length of the step, times epsilon.
    Source: de Jorge et al. (NeurIPS 2022), arXiv:2202.01181.
    """

    k: float = 2.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("k", self.k)

    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return region.in_range(x, region.stepped(loss_of, x, region.random(x, self.k, generator), self.alpha))


@dataclass(frozen=True)
class PGD(_Steps):
    """Projected gradient ascent from random points of the ball; the last point counts, of several restarts the worst of theirs.

    Args:
        steps: gradient steps.
        alpha: length of a step, times epsilon.
        restarts: random starts.
    Source: Madry et al. (ICLR 2018), arXiv:1706.06083.
    """

    steps: int = 10
    alpha: float = 0.25
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)

    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        best = self._climb(region, loss_of, x, generator)
        for _ in range(self.restarts - 1):
            other = self._climb(region, loss_of, x, generator)
            with torch.no_grad():
                better = loss_of(x + other) > loss_of(x + best)
            best = torch.where(per_row(better, x).bool(), other, best)
        return best

    def _climb(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        delta = region.random(x, 1, generator)
        for _ in range(self.steps):
            delta = region.inside(x, region.stepped(loss_of, x, delta, self.alpha))
        return delta


ATTACKS: dict[str, Callable[[], InnerAttack]] = {"none": NoAttack, "fgsm-rs": FGSMRS, "n-fgsm": NFGSM, "pgd": PGD}


def check_attack(attack: str | InnerAttack) -> InnerAttack:
    """Return an inner attack, of its name or itself."""
    return attack if isinstance(attack, InnerAttack) else ATTACKS[check_choice("attack", attack, tuple(ATTACKS))]()
