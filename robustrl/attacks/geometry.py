"""Directions, balls and ranges: staying inside them in the precision that the ledger charges in.

Norms are 1, 2 and inf, of whole rows; what needs more than a norm (a scale, a mask, norm 0) is in `ball`. Steepest ascent and projections: Duchi, Shalev-Shwartz, Singer, Chandra (ICML 2008)
for the l1 ball; the others are elementary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMS = (1, 2, math.inf)
SPREAD_L1 = 0.01
"""Share of the entries that an l1 step moves. The steepest direction moves one, but a picture's entry has nowhere to go."""

Pixels = tuple[float, float] | tuple[Tensor, Tensor] | None
"""The range (low, high) that delivered entries stay in: numbers for a picture, tensors (*frame) for a Box; None for no range."""


def row_norms(delta: Tensor, norm: float = 2) -> Tensor:
    """Norm of every row, float64; (n, *frame) -> (n,)."""
    norms: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), ord=norm, dim=1)
    return norms


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (n,) so that it broadcasts against (n, *frame), in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def unit(gradient: Tensor) -> Tensor:
    """Rows scaled to l2 norm 1; a row without gradient, or with one that is not finite, is zero."""
    norms = row_norms(gradient)
    scaled = gradient.double() / per_row(norms.clamp_min(1e-300), gradient.double())  # float32 cannot hold 1 / 1e-39
    usable = (norms > 0) & torch.isfinite(norms)
    return torch.where(per_row(usable, gradient).bool(), scaled.to(gradient.dtype), torch.zeros_like(gradient))


def ascent(gradient: Tensor, norm: float = 2) -> Tensor:
    """Directions of norm at most 1 in which rows of a function rise most; zero where there is no (finite) gradient.

    Norm inf: the signs. Norm 1: evenly over the largest `SPREAD_L1` of the entries, one at least.
    """
    if norm == 2:
        return unit(gradient)
    flat = usable(gradient).flatten(1)
    direction = flat.sign()
    if norm == 1:
        moved = math.ceil(SPREAD_L1 * flat.shape[1])
        largest = flat.abs().topk(moved, dim=1).indices
        direction = torch.zeros_like(flat).scatter(1, largest, direction.gather(1, largest) / moved)
    return direction.reshape(gradient.shape)


def usable(gradient: Tensor) -> Tensor:
    """The gradient; zero in rows where it is not finite everywhere."""
    flat = gradient.flatten(1)
    return torch.where(torch.isfinite(flat).all(1, keepdim=True), flat, 0.0).reshape(gradient.shape)


def project_l2(delta: Tensor, radius: Tensor) -> Tensor:
    """Shrink the rows that are longer than `radius` (n,) onto the ball."""
    norms = row_norms(delta)
    return delta * per_row(torch.where(norms > radius, radius / norms.clamp_min(1e-300), 1.0), delta)


def project(delta: Tensor, radius: Tensor, norm: float = 2) -> Tensor:
    """The nearest points, in l2, of the balls of `radius` (n,)."""
    if norm == 2:
        return project_l2(delta, radius)
    if norm == math.inf:
        edge = per_row(radius, delta)
        return torch.minimum(torch.maximum(delta, -edge), edge)
    sizes = delta.double().flatten(1).abs()
    ordered = sizes.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - radius[:, None]) / torch.arange(1, sizes.shape[1] + 1, device=delta.device)
    last = (ordered > excess).sum(1, keepdim=True).clamp_min(1) - 1
    shrunk = (sizes - excess.gather(1, last).clamp_min(0.0)).clamp_min(0.0)
    return delta.sign() * shrunk.reshape(delta.shape).to(delta.dtype)


def unit_ball(uniforms: Tensor, attackable: Tensor, norm: float) -> Tensor:
    """Points spread evenly over the unit ball of the attackable entries, from numbers in (0, 1).

    Norms 2 and 1: Gaussian or Laplace entries, normalised, at a distance whose n-th power is uniform (norm 1: by one exponential
    number more than entries, which does the same).

    Args:
        uniforms: float64 (n, entries + 1).
        attackable: 1 or 0, (*frame).
        norm: 1, 2 or inf.
    Returns:
        float64 (n, *frame).
    """
    which = attackable.flatten().double()
    centred, last = 2 * uniforms[:, 1:] - 1, uniforms[:, :1]
    entries: Tensor
    match norm:
        case 2:
            entries = torch.special.ndtri(uniforms[:, 1:]) * which
            entries = entries * (last ** (1 / which.sum()) / torch.linalg.vector_norm(entries, dim=1, keepdim=True))
        case 1:
            sizes = -torch.log1p(-centred.abs()) * which
            entries = centred.sign() * sizes / (sizes.sum(1, keepdim=True) - last.log())
        case _:
            entries = centred * which
    return entries.reshape(-1, *attackable.shape)


def random_direction(attackable: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """A random point of the unit sphere of the attackable entries (*frame); for norm inf a point of the cube.

    Norms 2 and 1: Gaussian or Laplace entries, normalised, which makes the point uniform.
    """
    entries = torch.randn(attackable.shape, generator=generator, device=attackable.device) * attackable
    match norm:
        case 2:
            return unit(entries[None])[0]
        case 1:
            entries = entries.sign() * torch.empty_like(entries).exponential_(generator=generator)
            return entries / entries.abs().sum()
        case _:
            cube: Tensor = torch.special.erf(entries / math.sqrt(2))  # uniform in (-1, 1)
            return cube


def moved(frames: Tensor, delta: Tensor, pixels: Pixels = None) -> Tensor:
    """frames + delta; pictures stay in their range, and what was outside goes no farther. No entry's change grows or turns."""
    if pixels is None:
        return frames + delta
    low, high = pixels
    return torch.maximum(torch.minimum(frames + delta, frames.clamp(min=high)), frames.clamp(max=low))


def within(frames: Tensor, delta: Tensor, pixels: Pixels) -> Tensor:
    """What is left of a perturbation of pictures in their range."""
    return delta if pixels is None else moved(frames, delta, pixels) - frames


def unblocked(gradient: Tensor, frames: Tensor, pixels: Pixels) -> Tensor:
    """The gradient at `frames`, without entries that have reached the end of their range."""
    if pixels is None:
        return gradient
    low, high = pixels
    return gradient.masked_fill(((frames >= high) & (gradient > 0)) | ((frames <= low) & (gradient < 0)), 0.0)


def farthest(gradient: Tensor, frames: Tensor, radius: Tensor, norm: float, pixels: Pixels) -> Tensor:
    """Perturbations of norm `radius` (n,) at most that follow a gradient as far as possible, pictures in their range.

    The maximum of a linear function, but for norm 2 at the ends of the range, where the rest of the budget is left. Norm 1
    takes the entries with the largest gradient to the end of their range, one after the other.
    """
    if norm != 1:
        direction = ascent(unblocked(gradient, frames, pixels), norm)
        return within(frames, direction * per_row(radius, direction), pixels)
    flat, x, budget = usable(gradient).flatten(1).double(), frames.flatten(1).double(), radius[:, None]
    room = budget.expand(x.shape)
    if pixels is not None:
        low, high = pixels
        room = torch.minimum(torch.where(flat > 0, high - x, x - low).clamp_min(0.0), budget)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)
    sizes = (room * (flat != 0)).gather(1, order)
    sizes = torch.minimum(sizes, (budget - sizes.cumsum(1) + sizes).clamp_min(0.0))
    steps = torch.zeros_like(flat).scatter(1, order, sizes) * flat.sign()
    return steps.reshape(gradient.shape).to(gradient.dtype)


def deliver(
    frames: Tensor, delta: Tensor, radius: Tensor, norm: float = 2, pixels: Pixels = None, scale: Tensor | None = None
) -> Tensor:
    """frames + delta, shrunk until the *delivered* perturbation, after rounding, is within `radius` (n,) and `pixels`.

    Rounding frames + delta to the frames' dtype can lengthen the perturbation; what still does not fit after shrinks that
    grow by and by (a budget below the dtype's resolution) is not spent at all. A `scale` (*frame) is what is divided by first.
    """

    def norms_of(delivered: Tensor) -> Tensor:
        change = delivered.double() - frames.double()
        return row_norms(change if scale is None else change / scale, norm)

    delivered = moved(frames, delta, pixels)
    for excess in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        norms = norms_of(delivered)
        over = norms > radius
        if not over.any():
            return delivered
        shrink = torch.where(over, radius / norms.clamp_min(1e-300) * (1 - excess), 1.0)
        delta = delta * per_row(shrink, delta)
        delivered = torch.where(per_row(over, frames).bool(), moved(frames, delta, pixels), delivered)
    over = norms_of(delivered) > radius
    return torch.where(per_row(over, frames).bool(), frames, delivered)
