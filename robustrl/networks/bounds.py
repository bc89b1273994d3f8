"""Interval bound propagation: what a network can answer anywhere in a box or a ball of inputs; batched, differentiable.

Every layer maps a `Region`, which holds all inputs of a row, to one that holds all outputs. Sums are padded by a bound of their
rounding in any order of summation, and of the network's own, so that the bounds hold for what the network computes in float32
(not in TF32).

Sources: Gowal et al., arXiv:1810.12715 (intervals; differences of two outputs folded into the last layer); Hoelder's inequality
(dual norms at the first layer); Higham, Accuracy and Stability of Numerical Algorithms, section 3.1 (sums).
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

from robustrl.errors import check_choice

UNIT_ROUNDOFF = 2.0**-24
ELEMENTWISE_SLACK = 1e-6
"""Relative padding of functions of single entries, which torch computes to a few units in the last place."""

Sum = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A linear layer as a function of inputs, weights and biases."""


class Region(ABC):
    """A set of inputs for every row."""

    centre: Tensor

    @property
    @abstractmethod
    def size(self) -> Tensor:
        """Largest absolute value of every entry, (n, *shape)."""

    @abstractmethod
    def box(self) -> Interval:
        """The smallest known box around it."""

    @abstractmethod
    def spread(self, of: Sum, weight: Tensor, bias: Tensor | None, slack: float) -> Tensor:
        """How far the image under a linear layer reaches from that of the centre, plus `slack` times its largest terms."""

    @abstractmethod
    def reshaped(self, function: Callable[[Tensor], Tensor]) -> Region:
        """The same with its entries in another order or shape."""

    @abstractmethod
    def scaled(self, factor: float) -> Region:
        """The image under x * factor, with a factor > 0."""

    def differences(self) -> Interval:
        """Bounds (n, k, k) of x[:, b] - x[:, a] at [:, a, b], for regions (n, k) of outputs."""
        box = self.box()
        apart = Interval(box.low[:, None, :] - box.high[:, :, None], box.high[:, None, :] - box.low[:, :, None])
        return _same_is_zero(apart.padded())


@dataclass(frozen=True)
class Interval(Region):
    """All x with low <= x <= high; (n, *shape) each."""

    low: Tensor
    high: Tensor

    @property
    def centre(self) -> Tensor:  # type: ignore[override]
        return (self.low + self.high) / 2

    @property
    def size(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    def box(self) -> Interval:
        return self

    def spread(self, of: Sum, weight: Tensor, bias: Tensor | None, slack: float) -> Tensor:
        reach = (self.high - self.low) / 2
        return of(reach + slack * self.size, weight.abs(), None if bias is None else slack * bias.abs())

    def reshaped(self, function: Callable[[Tensor], Tensor]) -> Interval:
        return Interval(function(self.low), function(self.high))

    def scaled(self, factor: float) -> Interval:
        return self.monotone(lambda end: end * factor).padded()

    def monotone(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """The image under a function of single entries that never falls; exact where the function is."""
        return Interval(function(self.low), function(self.high))

    def padded(self) -> Interval:
        """A little wider, relative to every entry."""
        return Interval(
            self.low - ELEMENTWISE_SLACK * self.low.abs(),
            self.high + ELEMENTWISE_SLACK * self.high.abs(),
        )


@dataclass(frozen=True)
class Ball(Region):
    """All centre + scale * e with ||e||_norm <= radius.

    Attributes:
        centre: (n, *shape).
        radius: (n,).
        norm: 1, 2 or inf.
        scale: >= 0, (1, *shape); 0 where nothing can change.
    """

    centre: Tensor
    radius: Tensor
    norm: float
    scale: Tensor

    @property
    def _reach(self) -> Tensor:
        return self._per_row(self.radius) * self.scale

    @property
    def size(self) -> Tensor:
        return self.centre.abs() + self._reach

    def _per_row(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (self.centre.ndim - 1))

    def box(self) -> Interval:
        reach = self._reach + ELEMENTWISE_SLACK * self.size
        return Interval(self.centre - reach, self.centre + reach)

    def spread(self, of: Sum, weight: Tensor, bias: Tensor | None, slack: float) -> Tensor:
        rounding = of(slack * self.size, weight.abs(), None if bias is None else slack * bias.abs())
        match self.norm:
            case 2:
                # Weights that are all zero have no slope of their length.
                longest = of(self.scale.square(), weight.square(), None).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
            case 1 if weight.ndim == 2:
                longest = (weight.abs() * self.scale).amax(1)[None]
            case 1:
                longest = (weight.abs().flatten(1).amax(1) * self.scale.max()).reshape(1, -1, 1, 1)
            case _:
                return rounding + of(self._reach, weight.abs(), None)
        return rounding + self.radius.reshape(-1, *(1,) * (longest.ndim - 1)) * longest

    def reshaped(self, function: Callable[[Tensor], Tensor]) -> Ball:
        return Ball(function(self.centre), self.radius, self.norm, function(self.scale))

    def scaled(self, factor: float) -> Ball:
        return Ball(self.centre * factor, self.radius, self.norm, self.scale * factor)


@dataclass(frozen=True)
class Image(Region):
    """The image of a region under a linear layer, not yet put into a box: differences of its entries are known better."""

    source: Region
    layer: nn.Linear

    @property
    def centre(self) -> Tensor:  # type: ignore[override]
        return self.box().centre

    @property
    def size(self) -> Tensor:
        return self.box().size

    def box(self) -> Interval:
        return image(self.source, functional.linear, self.layer.weight, self.layer.bias)

    def spread(self, of: Sum, weight: Tensor, bias: Tensor | None, slack: float) -> Tensor:
        return self.box().spread(of, weight, bias, slack)

    def reshaped(self, function: Callable[[Tensor], Tensor]) -> Interval:
        return self.box().reshaped(function)

    def scaled(self, factor: float) -> Interval:
        return self.box().scaled(factor)

    def differences(self) -> Interval:
        weight, bias = self.layer.weight, self.layer.bias
        k = len(weight)
        apart = (weight[None] - weight[:, None]).flatten(0, 1)
        shift = None if bias is None else (bias[None] - bias[:, None]).flatten()
        centre = functional.linear(self.source.centre, apart, shift)
        reach = self.source.spread(functional.linear, apart, None, 0.0)
        size = functional.linear(self.source.size, weight.abs(), None if bias is None else bias.abs())
        rounding = _slack(weight) * (size[:, None, :] + size[:, :, None])  # of the outputs, which may be far larger
        centre, reach = centre.reshape(-1, k, k), reach.reshape(-1, k, k) + rounding
        return _same_is_zero(Interval(centre - reach, centre + reach))


def _same_is_zero(apart: Interval) -> Interval:
    same = torch.eye(apart.low.shape[-1], dtype=torch.bool, device=apart.low.device)
    return Interval(apart.low.masked_fill(same, 0.0), apart.high.masked_fill(same, 0.0))


def _slack(weight: Tensor) -> float:
    """Rounding relative to the sum of a layer's absolute terms: its own, that of the bound's centre and of its radius."""
    return 3 * (weight[0].numel() + 8) * UNIT_ROUNDOFF


def image(region: Region, of: Sum, weight: Tensor, bias: Tensor | None) -> Interval:
    """The box around the image under a linear layer."""
    centre, reach = of(region.centre, weight, bias), region.spread(of, weight, bias, _slack(weight))
    return Interval(centre - reach, centre + reach)


def propagate(layer: nn.Module, region: Region) -> Region:
    """A region that holds every output of a layer or network.

    Raises:
        ValueError: for layers of other classes than those that are registered, their subclasses included.
    """
    if type(layer) not in handlers.registry:
        names = {kind.__name__ for kind in handlers.registry if kind is not object}
        known = ", ".join(sorted(name for name in names if not name.startswith("_")))
        raise ValueError(f"layer must be one whose bounds are known ({known}), got {type(layer).__name__}")
    return handlers(layer, region)


@functools.singledispatch
def handlers(layer: nn.Module, region: Region) -> Region:
    """Bounds by class of layer; `handlers.register` adds one. Call `propagate`."""
    raise NotImplementedError(type(layer).__name__)


@handlers.register
def _(layer: nn.Linear, region: Region) -> Region:
    return Image(region, layer)


@handlers.register
def _(layer: nn.Conv2d, region: Region) -> Region:
    if layer.padding_mode != "zeros":
        raise ValueError(f"Conv2d: padding_mode must be 'zeros', got {layer.padding_mode!r}")

    def convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return image(region, convolution, layer.weight, layer.bias)


@handlers.register
def _(layer: nn.Sequential, region: Region) -> Region:
    for part in layer:
        region = propagate(part, region)
    return region


@handlers.register
def _(layer: nn.Flatten, region: Region) -> Region:
    return region.reshaped(layer)


@handlers.register
def _(layer: nn.Identity, region: Region) -> Region:
    return region


@handlers.register
def _(layer: nn.ReLU, region: Region) -> Region:
    return region.box().monotone(torch.relu)


@handlers.register
def _(layer: nn.Tanh, region: Region) -> Region:
    return region.box().monotone(torch.tanh).padded()


def interval_bounds(module: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of everything that a network computes from inputs between `low` and `high`.

    Args:
        module: torch module of known layers (or, with `robustrl.training.robust` imported, a `PolicyView`).
        low, high: inputs (n, *shape), with their own radius for every row and entry.
    Returns:
        lower and upper bounds of the outputs, (n, *outputs); differentiable.
    Raises:
        ValueError: for layers without known bounds, or `low` that is not everywhere <= `high` and finite.
    """
    if low.shape != high.shape or not bool((low <= high).all() & low.isfinite().all() & high.isfinite().all()):
        raise ValueError("low and high must be finite and of one shape, low <= high")
    box = propagate(module, Interval(low, high)).box()
    return box.low, box.high


def ball_bounds(
    module: nn.Module, inputs: Tensor, radius: Tensor | float, norm: float = math.inf, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`interval_bounds` for balls, with the dual norm at the first linear layer.

    Args:
        module: see there.
        inputs: centres, (n, *shape).
        radius: one, or one per row (n,).
        norm: 1, 2 or inf.
        mask: entries that may change, boolean (*shape); default all.
    Raises:
        ValueError: for layers without known bounds, or a bad norm, radius or input.
    """
    radii = torch.as_tensor(radius, dtype=inputs.dtype, device=inputs.device).expand(len(inputs))
    if not bool((radii >= 0).all() & radii.isfinite().all() & inputs.isfinite().all()):
        raise ValueError("radius must be >= 0 and finite, and so must be inputs")
    scale = torch.ones_like(inputs[0]) if mask is None else mask.to(inputs)
    box = propagate(module, Ball(inputs, radii, check_choice("norm", norm, (1, 2, math.inf)), scale[None])).box()
    return box.low, box.high
