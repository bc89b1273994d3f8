"""What may be delivered instead of some frames: one object for norms, radii, units, masks and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustrl.attacks import geometry
from robustrl.attacks.base import AttackContext
from robustrl.attacks.geometry import Pixels, moved, per_row, row_norms, unblocked, within


@dataclass(frozen=True)
class Ball:
    """All frames within ||(x - centre) / scale||_p <= radius, in the range of the entries, equal to the centre under the mask.

    Norm 0 has no steepest direction of its own: the entries that promise most go to the end of their range that helps.

    Attributes:
        centre: true frames (n, *frame).
        radius: float64 (n,); for norm 0 a number of entries.
        norm: 0, 1, 2 or inf.
        attackable: 1 for entries that may change, else 0; (*frame).
        scale: unit of every entry, float64 (*frame), or None for ones.
        pixels: the range of the entries; norm 0 needs a finite one.

    Raises:
        ValueError: for norm 0 without a range.
    """

    centre: Tensor
    radius: Tensor
    norm: float
    attackable: Tensor
    scale: Tensor | None = None
    pixels: Pixels = None

    def __post_init__(self) -> None:
        if self.norm == 0 and self.pixels is None:
            raise ValueError("norm 0 moves entries to the ends of their range: these observations must have one (pixels)")

    @classmethod
    def around(cls, centre: Tensor, context: AttackContext, radius: Tensor | None = None) -> Ball:
        """What the threat model allows at this step, or the part of it within a `radius` (n,)."""
        allowance = context.allowance if radius is None else torch.minimum(radius, context.allowance)
        pixels = context.pixels
        if pixels is not None and isinstance(pixels[0], Tensor):
            pixels = pixels[0].to(centre), torch.as_tensor(pixels[1]).to(centre)
        return cls(centre, allowance, context.norm, context.attackable, context.scale, pixels)

    def select(self, rows: Tensor) -> Ball:
        """The balls of some rows."""
        return Ball(self.centre[rows], self.radius[rows], self.norm, self.attackable, self.scale, self.pixels)

    def norms(self, delta: Tensor) -> Tensor:
        """What perturbations (n, *frame) cost, float64 (n,)."""
        return row_norms(self._measured(delta), self.norm)

    def ascent(self, gradient: Tensor, point: Tensor) -> Tensor:
        """Directions of norm at most 1 in which a function with this gradient at `point` rises most, (n, *frame).

        Entries at the end of their range take no more of it. Norm 0: the gradient itself, which `push` and `climb` rank.
        """
        gradient = unblocked(gradient * self.attackable, point, self.pixels)
        if self.norm == 0:
            return geometry.usable(gradient)
        if self.scale is None:
            return geometry.ascent(gradient, self.norm)
        scale = self.scale.to(gradient.dtype)
        return geometry.ascent(gradient * scale, self.norm) * scale

    def push(self, direction: Tensor, length: Tensor) -> Tensor:
        """The perturbations of norm `length` (n,) at most along a direction of norm 1 (norm 0: a gradient), in range."""
        if self.norm != 0:
            return within(self.centre, direction * per_row(length, self.centre), self.pixels)
        ends = self._ends(direction)
        promise = (direction * (ends - self.centre)).flatten(1).broadcast_to(len(self.centre), -1)
        return torch.where(self._largest(promise, length), ends - self.centre, 0.0)

    def climb(self, point: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
        """One step of norm `length` (n,) along a gradient at `point`, back into the ball and the range; (n, *frame)."""
        uphill = self.ascent(gradient, point)
        if self.norm != 0:
            return moved(self.centre, self.project(point - self.centre + per_row(length, point) * uphill), self.pixels)
        ends = self._ends(uphill)
        chosen = self._largest((uphill * (ends - point)).flatten(1), length.ceil())
        point = torch.where(chosen, ends, point)
        return torch.where(self._kept(point - self.centre, gradient), point, self.centre)

    def project(self, delta: Tensor, gradient: Tensor | None = None) -> Tensor:
        """The nearest perturbations within the radius, in the l2 distance of delta / scale.

        Norm 0 keeps the entries that gain most along `gradient`, or else the largest ones.
        """
        if self.norm == 0:
            return torch.where(self._kept(delta, delta if gradient is None else gradient), delta, 0.0)
        projected = geometry.project(self._measured(delta), self.radius, self.norm)
        return projected if self.scale is None else (projected * self.scale).to(delta.dtype)

    def within(self, delta: Tensor) -> Tensor:
        """What is left of perturbations in the range of the entries."""
        return within(self.centre, delta, self.pixels)

    def moved(self, delta: Tensor) -> Tensor:
        """centre + delta, in the range of the entries."""
        return moved(self.centre, delta, self.pixels)

    def farthest(self, gradient: Tensor) -> Tensor:
        """The perturbations that follow a gradient (n, *frame) as far as ball and range allow; see `geometry.farthest`."""
        gradient = gradient * self.attackable
        if self.norm == 0:
            return self.push(geometry.usable(gradient), self.radius)
        if self.scale is None:
            return geometry.farthest(gradient, self.centre, self.radius, self.norm, self.pixels)
        pixels = None if self.pixels is None else (self.pixels[0] / self.scale, self.pixels[1] / self.scale)
        steps = geometry.farthest(gradient * self.scale, self.centre / self.scale, self.radius, self.norm, pixels)
        return self.within((steps * self.scale).to(gradient.dtype))

    def boundary(self, generator: torch.Generator) -> Tensor:
        """A random direction for `push`, the same for all rows, (*frame); norm inf: evenly from the cube."""
        if self.norm == 0:
            return torch.randn(self.attackable.shape, generator=generator, device=self.attackable.device) * self.attackable
        direction = geometry.random_direction(self.attackable, self.norm, generator)
        return direction if self.scale is None else direction * self.scale.to(direction.dtype)

    def sample(self, uniforms: Tensor) -> Tensor:
        """Perturbations spread evenly over the ball, cut off at the range; from numbers in (0, 1), (n, entries + 1).

        Norm 0: as many random entries as allowed, evenly from their range.
        """
        if self.norm != 0:
            points = geometry.unit_ball(uniforms, self.attackable, self.norm)
            points = points if self.scale is None else points * self.scale
            return self.push(points.to(self.centre.dtype), self.radius)
        assert self.pixels is not None
        order, place = uniforms[:, 1:], (uniforms[:, 1:] * 65536).frac()  # the leading bits rank, the others place
        low, high = self.pixels
        value = low + (high - low) * place.reshape(self.centre.shape).to(self.centre.dtype)
        delta = (value - self.centre) * self.attackable
        return torch.where(self._largest(order * self.attackable.flatten(), self.radius), delta, 0.0)

    def deliver(self, delta: Tensor) -> Tensor:
        """Frames that the ledger accepts: see `geometry.deliver`."""
        return geometry.deliver(self.centre, delta, self.radius, self.norm, self.pixels, self.scale)

    def _measured(self, delta: Tensor) -> Tensor:
        return delta if self.scale is None else delta / self.scale

    def _ends(self, direction: Tensor) -> Tensor:
        assert self.pixels is not None
        low, high = self.pixels
        return torch.where(direction > 0, high, low).to(self.centre)

    def _kept(self, delta: Tensor, gradient: Tensor) -> Tensor:
        changed = (delta != 0).flatten(1)
        return self._largest((geometry.usable(gradient) * delta).flatten(1), self.radius, among=changed)

    def _largest(self, values: Tensor, count: Tensor, among: Tensor | None = None) -> Tensor:
        """Where the `count` (n,) largest of the rows of values (n, entries) are, as booleans (n, *frame)."""
        among = values > 0 if among is None else among
        ranks = values.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return ((ranks < count.floor()[:, None]) & among).reshape(self.centre.shape)
