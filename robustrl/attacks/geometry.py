"""Staying inside the ball, in the precision that the ledger charges in."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norms(delta: Tensor) -> Tensor:
    """l2 norm of every row, float64; (n, *frame) -> (n,)."""
    norms: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), dim=1)
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


def project_l2(delta: Tensor, radius: Tensor) -> Tensor:
    """Shrink the rows that are longer than `radius` (n,) onto the ball."""
    norms = row_norms(delta)
    return delta * per_row(torch.where(norms > radius, radius / norms.clamp_min(1e-300), 1.0), delta)


def deliver(frames: Tensor, delta: Tensor, radius: Tensor) -> Tensor:
    """frames + delta, shrunk until the *delivered* perturbation, after rounding, is within `radius` (n,).

    Rounding frames + delta to the frames' dtype can lengthen the perturbation; what still does not fit after a few
    shrinks (a budget below the dtype's resolution) is not spent at all.
    """
    delivered = frames + delta
    for _ in range(4):
        norms = row_norms(delivered.double() - frames.double())
        over = norms > radius
        if not over.any():
            return delivered
        shrink = torch.where(over, radius / norms.clamp_min(1e-300) * (1 - 1e-6), 1.0)
        delta = delta * per_row(shrink, delta)
        delivered = torch.where(per_row(over, frames).bool(), frames + delta, delivered)
    over = row_norms(delivered.double() - frames.double()) > radius
    return torch.where(per_row(over, frames).bool(), frames, delivered)
