"""Observations of integers: float perturbations turned into whole steps that never cost more than they did.

Casting instead would round towards minus infinity: a perturbation of -0.01 grey levels in every pixel would become one of -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustrl.attacks.geometry import row_norms
from robustrl.threat import RELATIVE_SLACK

Quantise = Callable[[Tensor, Tensor], Tensor]
"""(true frames, attacked frames) -> delivered frames, in whole steps from the true ones."""


def rounded(frames: Tensor, attacked: Tensor) -> Tensor:
    """Every step rounded towards zero: no norm can grow; (n, *frame) of the dtype of `frames`.

    A step counts as whole if it is short of that by no more than the ledger forgives.
    """
    delta = attacked.double() - frames.double()
    whole = (delta.abs() * (1 + RELATIVE_SLACK / 2)).floor()
    return (frames.double() + delta.sign() * whole).to(frames.dtype)


def greedy(norm: float, scale: Tensor | None = None) -> Quantise:
    """Whole steps that spend what rounding leaves over.

    Entries take one step more, away from the true frame, in the order of what rounding has cut off, as long as the whole
    perturbation costs no more than the one that it stands for (norm inf: as long as no entry moves farther than its largest entry;
    norm 0: for free).

    Args:
        norm: of the threat model: 0, 1, 2 or inf.
        scale: of the threat model, (*frame).
    """

    def quantise(frames: Tensor, attacked: Tensor) -> Tensor:
        return spend(
            frames, attacked, row_norms(_measured(attacked.double() - frames.double(), scale), norm), norm, scale=scale
        )

    return quantise


def spend(
    frames: Tensor,
    attacked: Tensor,
    radius: Tensor,
    norm: float,
    *,
    scale: Tensor | None = None,
    gradient: Tensor | None = None,
    low: float = 0,
    high: float = 255,
) -> Tensor:
    """Whole steps within `radius`: rounded ones first, then one more at a time where most is to be had for it.

    Args:
        frames: true frames of whole numbers, (n, *frame).
        attacked: what they should become, float (n, *frame).
        radius: what the perturbation may cost, float64 (n,).
        norm: 0, 1, 2 or inf.
        scale: of the threat model, (*frame).
        gradient: of what the attacker wants; entries are moved along it in the order of its size, in turns, until nothing fits.
            Default: each entry once at most, in the order of what rounding has cut off.
        low: end of the range of an entry.
        high: other end.
    Returns:
        delivered frames, of the dtype of `frames`.
    """
    x, proposed = frames.double().flatten(1), (attacked.double() - frames.double()).flatten(1)
    steps = (rounded(frames, attacked).double() - frames.double()).flatten(1)
    weight = torch.ones_like(x[0]) if scale is None else 1 / scale.double().flatten()
    promise = proposed.abs() - steps.abs() if gradient is None else gradient.double().flatten(1).abs()
    towards = (proposed if gradient is None else gradient.double().flatten(1)).sign()
    open_ = (promise > 0) & (steps * towards >= 0)
    limit = radius.double()[:, None]
    for _ in range(1 if gradient is None else int(high - low)):
        before = steps
        steps = _one_more(x, steps, towards, promise, open_, limit, norm, weight, (low, high))
        if torch.equal(before, steps):
            break
    return (x + steps).reshape(frames.shape).to(frames.dtype)


def _one_more(
    x: Tensor,
    steps: Tensor,
    towards: Tensor,
    promise: Tensor,
    open_: Tensor,
    limit: Tensor,
    norm: float,
    weight: Tensor,
    ends: tuple[float, float],
) -> Tensor:
    """One step more for the entries that can have it, the most promising first; all (n, entries)."""
    longer = steps + towards
    possible = open_ & (x + longer >= ends[0]) & (x + longer <= ends[1])
    if norm == math.inf:
        return torch.where(possible & (longer.abs() * weight <= limit), longer, steps)
    now, limit = _powers(steps, norm, weight), limit**norm if norm else limit
    price, spent = _powers(longer, norm, weight) - now, now.sum(1, keepdim=True)
    order = promise.argsort(dim=1, descending=True, stable=True)
    # Skipping what does not fit: everything before it has been bought, and what is left only falls.
    while True:
        possible = possible & (price <= limit - spent)
        queue = torch.where(possible, price, 0.0).gather(1, order).cumsum(1)
        bought = torch.zeros_like(possible).scatter(1, order, queue <= limit - spent) & possible
        if not bought.any():
            return steps
        steps = torch.where(bought, longer, steps)
        possible, spent = possible & ~bought, _powers(steps, norm, weight).sum(1, keepdim=True)


def _powers(steps: Tensor, norm: float, weight: Tensor) -> Tensor:
    return (steps != 0).double() if norm == 0 else (steps.abs() * weight) ** norm


def _measured(delta: Tensor, scale: Tensor | None) -> Tensor:
    return delta if scale is None else delta / scale
