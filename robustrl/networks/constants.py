"""Networks as chains of layers whose Lipschitz constants from l2 to l2 are known; everything else is refused by name.

A layer is known by its exact class: a subclass may compute anything, and so may a layer with hooks or another `forward`. A module of
another class with a method `lipschitz()` is taken at its word, and marked.

Constants are upper bounds in float64. That of a convolution is the sum over the filter's taps of the norm of each tap's matrix: a tap
shifts the picture, which no stride, dilation or zero padding makes longer.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor, nn

from robustrl.errors import check_real, refuse_altered
from robustrl.networks.activations import FAMILIES, LeakyReLU, SmoothActivation
from robustrl.networks.extractors import Contraction, LipschitzCNN, LipschitzExtractor, LipschitzMLP
from robustrl.networks.skew_orthogonal import Householder, MaxMin, OrthogonalLinear, SkewOrthogonalConv2d

UP = 1 + 1e-11
"""Rounds a norm up by more than float64 can err."""
TINY = sys.float_info.min
"""What is positive is at least this: it must not underflow to 0, which says that nothing can be moved."""
ROUNDING = 1e-12
"""Of a layer in float64, relative to the numbers that it adds up."""


@dataclass(frozen=True)
class Link:
    """One layer.

    Attributes:
        function: what it computes of (n, *inputs).
        lipschitz: how much further apart, in l2, outputs can be than inputs.
        trusted: the classes of layers whose constants are their own claims.
        inside: size per entry of numbers that cancel inside the layer.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float
    trusted: tuple[str, ...] = ()
    inside: float = 0.0

    def through(self, inputs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs in float64, and how far rounding may have moved them, if it has moved the inputs by `error` in l2, (n,)."""
        outputs = self.function(inputs).double()
        if len(outputs) != len(inputs):
            raise ValueError(f"the network must give a row per observation, got {len(outputs)} for {len(inputs)}")
        within = self.inside * math.sqrt(outputs[0].numel())
        return outputs, self.lipschitz * error + ROUNDING * (self.lipschitz * lengths(inputs) + lengths(outputs) + within)


def lengths(rows: Tensor) -> Tensor:
    """l2 norms of (n, *shape), (n,)."""
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return norms


def chain(layer: nn.Module) -> list[Link]:
    """A network as a chain of known layers, in the order in which they compute.

    Raises:
        TypeError: naming a layer that has no known constant.
        ValueError: if a constant is not finite.
    """
    name = type(layer).__name__
    refuse_altered(layer)
    if type(layer) in known.registry:
        links = known(layer)
    elif callable(claim := getattr(type(layer), "lipschitz", None)):
        links = [Link(layer, claim(layer), trusted=(name,))]
    else:
        raise TypeError(
            f"no Lipschitz constant is known of layer {name}; give it a method lipschitz() if you have a proof of one"
        )
    for link in links:
        if check_real(f"Lipschitz constant of {name}", link.lipschitz) < 0:
            raise ValueError(f"Lipschitz constant of {name} must be >= 0, got {link.lipschitz}")
    return links


def constant(links: Iterable[Link]) -> float:
    """The constant of a chain."""
    factors = [link.lipschitz for link in links]
    return functools.reduce(lambda product, factor: max(product * factor, TINY), factors, 1.0) if all(factors) else 0.0


def claims(links: Iterable[Link]) -> tuple[str, ...]:
    """Classes of layers in a chain whose constants are their own claims, in order."""
    return tuple(sorted({name for link in links for name in link.trusted}))


@functools.singledispatch
def known(layer: nn.Module) -> list[Link]:
    """Links by class of layer; `known.register` adds one. Call `chain`."""
    raise NotImplementedError(type(layer).__name__)


SLOPES: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.ReLU: lambda layer: 1.0,
    nn.ReLU6: lambda layer: 1.0,
    nn.Hardtanh: lambda layer: 1.0,
    nn.Tanh: lambda layer: 1.0,
    nn.Softsign: lambda layer: 1.0,
    nn.Sigmoid: lambda layer: 0.25,
    nn.LeakyReLU: lambda layer: max(1.0, abs(layer.negative_slope)),
    nn.ELU: lambda layer: max(1.0, abs(layer.alpha)),
    nn.SiLU: lambda layer: FAMILIES["swish"].slopes[1],
    nn.Mish: lambda layer: FAMILIES["mish"].slopes[1],
}
"""Largest slopes of torch's functions of single entries."""


def _by_slope(layer: nn.Module) -> list[Link]:
    return [Link(layer, SLOPES[type(layer)](layer))]


def _by_itself(layer: Any) -> list[Link]:
    return [Link(layer, layer.lipschitz())]


for _kind in SLOPES:
    known.register(_kind, _by_slope)
for _kind in (MaxMin, Householder, OrthogonalLinear, SkewOrthogonalConv2d, LeakyReLU):
    known.register(_kind, _by_itself)


@known.register
def _(layer: SmoothActivation) -> list[Link]:
    return [Link(layer, layer.lipschitz(), inside=1 / layer.beta)]


@known.register
def _(layer: Contraction) -> list[Link]:
    return [*chain(layer.curve), Link(lambda inputs: inputs / layer.slope, UP / abs(layer.slope))]


@known.register
def _(layer: nn.Flatten) -> list[Link]:
    if layer.start_dim < 1:
        raise TypeError(f"Flatten: start_dim must be >= 1, got {layer.start_dim}: observations must stay apart")
    return [Link(layer, 1.0)]


@known.register
def _(layer: nn.Identity) -> list[Link]:
    return []


@known.register
def _(layer: nn.Sequential) -> list[Link]:
    return [link for part in layer for link in chain(part)]


@known.register
def _(layer: nn.GELU) -> list[Link]:
    if layer.approximate != "none":
        raise TypeError("GELU: approximate must be 'none'; no Lipschitz constant is known of its approximation")
    return [Link(layer, FAMILIES["gelu"].slopes[1])]


@known.register
def _(layer: nn.Linear) -> list[Link]:
    return [Link(layer, _norm(layer.weight[None]))]


@known.register(nn.Conv1d)
@known.register(nn.Conv2d)
def _(layer: nn.Conv1d | nn.Conv2d) -> list[Link]:
    if layer.padding_mode != "zeros":
        raise TypeError(f"{type(layer).__name__}: padding_mode must be 'zeros', got {layer.padding_mode!r}")
    weight = layer.weight.flatten(2)
    taps = weight.reshape(layer.groups, -1, *weight.shape[1:]).movedim(-1, 0)

    def apart(inputs: Tensor) -> Tensor:
        if inputs.ndim != layer.weight.ndim:  # torch would take rows for channels
            raise ValueError(f"inputs of {type(layer).__name__} must have {layer.weight.ndim} axes, got {tuple(inputs.shape)}")
        outputs: Tensor = layer(inputs)
        return outputs

    return [Link(apart, sum(_norm(tap) for tap in taps))]


def _norm(blocks: Tensor) -> float:
    """Norm of a matrix of diagonal blocks (blocks, rows, columns)."""
    if not bool(blocks.isfinite().all()):
        raise ValueError("weights must be finite, got NaN or inf")
    norm = float(torch.linalg.matrix_norm(blocks.detach().double(), 2).max()) * UP
    return max(norm, TINY) if bool(blocks.any()) else 0.0


@known.register
def _(layer: nn.MaxPool2d) -> list[Link]:
    if layer.return_indices or not _apart(layer) or set(_pair(layer.dilation)) != {1}:
        raise TypeError("MaxPool2d: windows must not overlap (stride >= kernel_size, dilation 1), and indices not be returned")
    return [Link(layer, 1.0)]


@known.register
def _(layer: nn.AvgPool2d) -> list[Link]:
    if layer.divisor_override is not None or not _apart(layer):
        raise TypeError("AvgPool2d: windows must not overlap (stride >= kernel_size), with divisor_override left out")
    return [Link(layer, 1.0)]


def _apart(layer: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    return all(step >= size for step, size in zip(_pair(layer.stride), _pair(layer.kernel_size), strict=True))


def _pair(sizes: Any) -> tuple[int, ...]:
    return tuple(sizes) if isinstance(sizes, tuple | list) else (sizes, sizes)


@known.register
def _(layer: LipschitzMLP) -> list[Link]:
    return [*chain(nn.Flatten()), *(link for part in layer.layers for link in chain(part))]


@known.register(LipschitzExtractor)
@known.register(LipschitzCNN)
def _(layer: LipschitzExtractor) -> list[Link]:
    return [*(link for part in layer.layers for link in chain(part)), *chain(nn.Flatten())]


@known.register
def _(layer: FlattenExtractor) -> list[Link]:
    return chain(layer.flatten)


@known.register
def _(layer: NatureCNN) -> list[Link]:
    return [*chain(layer.cnn), *chain(layer.linear)]
