"""The tangent and betting certificate of a worst-case mean, valid at any stopping time.

Write g for the mechanism's `lower(., B)`, convex in the probability, and S(t) = P(J > t). For any c(t) in [0, 1),

    W = a + int_a^inf g(S(t)) dt  >=  E[Y],    Y = K + int_a^J g'(c(t)) dt,    K = a + int_a^T [g(c) - c g'(c)] dt,

with equality at c = S. So the worst case is bounded by an ordinary mean, and c may be *predictable*: built from
earlier episodes. Against the hypothesis W = m one wagers a fraction lam of the capital on every Y,

    C_k(m) = prod_{i <= k} (1 + lam_i(m) (Y_i - m)),    lam_i(m) = min(lam0_i, 0.9 / (m - K_i)),

with lam0_i predictable and free of m. Under W = m this is a nonnegative supermartingale, so it ever reaches 1/alpha
with probability at most alpha (Ville). Every m whose capital has done so is rejected; capital falls with m, so the
rejected ones form an interval, and its upper end is the bound.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from robustrl.noise import Noise

Floats = NDArray[np.float64]

CELLS = 512
"""Most threshold cells."""
CAUTION = 0.3
"""Quantile of the posterior of S that the tangent is taken at: at its centre, slopes near S = 1 explode."""
PRIOR_EPISODES = 3.0
"""Weight of the prior survival curve, a straight line from 1 to 1/2, and of the prior variance."""
BET_LIMIT = 0.9
"""Largest share of the capital that one episode can lose."""


def betting_lower_bounds(
    returns: Floats,
    noise: Noise,
    budgets: Floats,
    *,
    alpha: float,
    return_low: float,
    return_high: float | None,
    n_planned: int,
    ceiling: Floats,
) -> Floats:
    """Lower confidence bounds of the worst-case mean return, one statement per budget.

    Tangents and wagers change at block ends that are fixed beforehand and see earlier blocks only. Each bound holds at
    every stopping time at once, with confidence 1 - alpha for its budget, as long as `n_planned` does not depend on
    the returns.

    Args:
        returns: episode returns in run order, shape (n,).
        noise: the mechanism.
        budgets: finite episode budgets, shape (K,).
        alpha: failure probability of each bound.
        return_low: a sure lower bound of the return.
        return_high: a sure upper bound, or None; then a warm-up, on which nothing is wagered, chooses the thresholds.
        n_planned: the number of episodes that the wagers are tuned to, >= n.
        ceiling: where to stop searching, shape (K,): what the caller would cut the bound to anyway.
    Returns:
        float64 array of shape (K,); the rejected side of each search, at least `return_low`.
    Source: Waudby-Smith, Ramdas (JRSS B 2024), arXiv:2010.09686, for the mean by betting; the tangent is ours.
    """
    n = returns.size
    if return_high is None:
        warm_up = min(n, max(10, min(n_planned // 20, 500)))
        knots = _learned_knots(returns[:warm_up], return_low)
    else:
        warm_up = 0
        knots = fixed_knots(return_low, return_high)
    if n == warm_up or knots.size == 1:
        return np.full(budgets.size, return_low)

    weights, past = _histograms(returns, warm_up, knots)
    seen = past.sum(axis=1, keepdims=True)
    tangent = _tangent_points(past, seen, knots, n_planned)
    bounds = [
        _lower_bound(noise, budget, alpha, knots, tangent, weights, past, seen, n_planned, top)
        for budget, top in zip(budgets, ceiling, strict=True)
    ]
    return np.array(bounds)


def fixed_knots(return_low: float, return_high: float) -> Floats:
    """Thresholds that depend on no episode: 512 even cells, or whole fractions of 1 if both ends are integers."""
    span = return_high - return_low
    if span == 0:
        return np.array([return_low])
    cells = CELLS
    if return_low == math.floor(return_low) and return_high == math.floor(return_high) and span <= CELLS:
        cells = int(span) * max(1, CELLS // 4 // int(span))
    return np.linspace(return_low, return_high, cells + 1)


def _learned_knots(sample: Floats, return_low: float) -> Floats:
    """Thresholds from the warm-up: its own values, and eight cells above it up to as far again as its upper half."""
    values = np.unique(sample)
    if values.size > CELLS - 10:
        values = np.unique(np.quantile(values, np.linspace(0, 1, CELLS - 10)))
    top, reach = values[-1], values[-1] - np.median(sample)
    above = top + reach * np.arange(1, 9) / 8 if reach > 0 else np.empty(0)
    return np.unique(np.concatenate([[return_low], values, above]))


def block_ends(start: int, n: int) -> NDArray[np.int64]:
    """Ends of the blocks of episodes start..n: ten episodes each up to 100, then 100 or two per cent, if that is more."""
    ends, end = [], start
    while end < n:
        end += 10 if end < 100 else max(100, end // 50)
        ends.append(min(end, n))
    return np.array(ends, dtype=np.int64)


def _histograms(returns: Floats, warm_up: int, knots: Floats) -> tuple[Floats, Floats]:
    """Episodes per (block, knot), and the same summed over everything before each block.

    An episode between two knots counts partly at each. Y is linear there and the logarithm of the capital concave, so
    the split can only lower the capital: exact at the knots, safe elsewhere.
    """
    cell = np.clip(np.searchsorted(knots, returns, side="right") - 1, 0, knots.size - 2)
    share = np.clip((returns - knots[cell]) / (knots[cell + 1] - knots[cell]), 0.0, 1.0)
    ends = block_ends(warm_up, returns.size)
    block = np.concatenate(
        [np.zeros(warm_up, dtype=np.int64), 1 + np.repeat(np.arange(ends.size), np.diff(ends, prepend=warm_up))]
    )
    shape = (ends.size + 1, knots.size)
    place = block * knots.size + cell
    table: Floats = np.zeros(shape)
    table += np.bincount(place, 1 - share, minlength=table.size).reshape(shape)
    table += np.bincount(place + 1, share, minlength=table.size).reshape(shape)
    past: Floats = np.cumsum(table, axis=0)[:-1]
    return table[1:], past


def _tangent_points(past: Floats, seen: Floats, knots: Floats, n_planned: int) -> Floats:
    """Cautious estimates of S on every cell before every block; shape (blocks, cells), all below 1."""
    alive = np.cumsum(past[:, :0:-1], axis=1)[:, ::-1]
    prior = 1 - 0.5 * (knots[:-1] - knots[0]) / (knots[-1] - knots[0])
    survival = np.clip((alive + PRIOR_EPISODES * prior) / (seen + PRIOR_EPISODES), 0.0, 1.0)
    effective = np.minimum(n_planned, np.maximum(4 * seen, 50))
    points: Floats = betaincinv(effective * survival, effective * (1 - survival) + 1, CAUTION)
    return np.clip(points, 0.0, 1 - 1e-9)  # keeps every slope below 1e9, and so ten digits of Y


def _lower_bound(
    noise: Noise,
    budget: float,
    alpha: float,
    knots: Floats,
    tangent: Floats,
    weights: Floats,
    past: Floats,
    seen: Floats,
    n_planned: int,
    ceiling: float,
) -> float:
    widths = np.diff(knots)
    slopes = noise.slope(tangent, budget)
    heights = np.where(tangent <= 0.5, noise.lower(tangent, budget), 1 - noise.upper(1 - tangent, budget))
    floor = knots[0] + (heights - tangent * slopes) @ widths
    gain = np.concatenate([np.zeros((tangent.shape[0], 1)), np.cumsum(slopes * widths, axis=1)], axis=1)

    # The wager that is best for a normal law of the planned length; the prior is a quarter of the squared range.
    episodes = np.maximum(seen[:, 0], 1)
    mean = (past * gain).sum(axis=1) / episodes
    variance = np.maximum((past * gain**2).sum(axis=1) / episodes - mean**2, 0.0)
    variance = (seen[:, 0] * variance + PRIOR_EPISODES * gain[:, -1] ** 2 / 4) / (seen[:, 0] + PRIOR_EPISODES)
    with np.errstate(divide="ignore"):
        wager = np.where(variance > 0, np.sqrt(2 * math.log(1 / alpha) / (n_planned * variance)), 0.0)

    rows, columns = np.nonzero(weights)
    starts = np.searchsorted(rows, np.arange(weights.shape[0]))
    count, outcome = weights[rows, columns], floor[rows] + gain[rows, columns]

    def rejected(m: float) -> bool:
        lam = np.minimum(wager, BET_LIMIT / (m - floor))
        growth = np.add.reduceat(count * np.log1p(lam[rows] * (outcome - m)), starts)
        return bool(np.cumsum(growth).max() >= math.log(1 / alpha))

    # m <= K is rejected outright. A tangent lies below g(0) = 0, so K <= a up to rounding, and a is where to start.
    low, high = max(float(knots[0]), float(floor.max())), ceiling
    if high <= low:
        return low
    if rejected(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if rejected(middle):
            low = middle
        else:
            high = middle
    return low
