"""The exact equal-local-level (ELL) band: upper limits of P(J < x_(i)), for all order statistics at once.

For independent returns x_(1) <= ... <= x_(n) of any law (ties and atoms included), P(J < x_(i)) lies below the i-th
order statistic U_(i) of n uniforms, jointly in i. The band bounds every U_(i) at the same local level gamma,
u_i = BetaInv(1 - gamma; i, n - i + 1), with gamma as large as P(some U_(i) > u_i) <= alpha allows. Unlike DKW it is
tight in the tail of rare failures, which is what an attacker magnifies.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainccinv, gammaln

from robustrl.certify.confidence import OUTWARD
from robustrl.errors import check_alpha, check_count, check_real

Floats = NDArray[np.float64]

EXACT_UP_TO = 1000
"""Up to this sample size gamma is computed when needed (a fraction of a second); beyond, it is looked up."""
RANKS = 256
"""Order statistics that share alpha where no exact level is known."""
TABLE = Path(__file__).with_name("ell_levels.npz")


def ell_crossing_probability(n: int, gamma: float) -> float:
    """P(U_(i) > u_i for some i) for n uniforms and the local level `gamma`, computed exactly.

    With N a Poisson process of rate n, conditioned on N(1) = n, no crossing means N(u_i) >= i for all i. Whatever the
    finite windows cut off is counted as a crossing, so the result can only be too large.

    Args:
        n: sample size, >= 1.
        gamma: local level, in (0, 1).
    Raises:
        ValueError: if either is out of range.
    Source: Noe (Annals of Mathematical Statistics 1972) for the recursion; Khmaladze, Shinjikashvili (2001) and
    Moscovich, Nadler (2017) for the Poisson form.
    """
    n = check_count("n", n)
    gamma = check_real("gamma", gamma, allowed="a level in (0, 1)")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be a level in (0, 1), got {gamma}")
    i = np.arange(1, n + 1, dtype=np.float64)
    u = np.minimum(betainccinv(i, n - i + 1, gamma), 1.0)
    rates = n * np.diff(u, prepend=0.0)
    # A binomial count is above `tops` with probability below 1e-18: nine standard deviations and a margin for the
    # Poisson-like ends.
    tops = np.minimum(np.ceil(n * u + 9 * np.sqrt(n * u * (1 - u)) + 25), n).astype(np.int64)
    sizes = np.ceil(rates + 9 * np.sqrt(rates) + 15).astype(np.int64)
    arrivals = np.arange(int(sizes.max()), dtype=np.float64)
    factorials, logs = gammaln(arrivals + 1), np.log(np.maximum(rates, 1e-300))
    counts = np.ones(1)  # P(N = step), P(N = step + 1), ... and no crossing so far
    for step, size in enumerate(sizes):
        kernel = np.exp(arrivals[:size] * logs[step] - rates[step] - factorials[:size])
        counts = np.convolve(counts, kernel)[1 : tops[step] - step + 1]
    stay = counts[0] * math.exp(n * (u[-1] - 1) - (n * math.log(n) - n - math.lgamma(n + 1)))
    return min(max(1.0 - float(stay), 0.0), 1.0)


def solve_level(n: int, alpha: float) -> float:
    """The level gamma by root finding on the exact crossing probability, rounded down to six digits."""
    if n == 1 or alpha < 1e-8:  # so small a crossing probability has lost its digits; the union bound has not
        return alpha / n
    target = math.log(alpha)
    low, high = math.log(alpha / n), target
    root = brentq(lambda g: math.log(max(ell_crossing_probability(n, math.exp(g)), 1e-300)) - target, low, high, xtol=1e-6)
    unit = 10.0 ** (math.floor(root / math.log(10)) - 5)
    gamma = math.floor(math.exp(root) / unit) * unit
    while ell_crossing_probability(n, gamma) > alpha:
        gamma -= unit
    return gamma


@cache
def ell_level(n: int, alpha: float) -> float:
    """The largest known level gamma for which the band of `n` order statistics fails with probability <= `alpha`.

    Exact up to n = 1000; then from a table of exact values, at the next larger n and the next smaller alpha (gamma
    falls with both). Always rounded down.

    Args:
        n: sample size, >= 1.
        alpha: failure probability of the whole band, in (0, 0.5].
    Returns:
        gamma; 0 if the table ends before `n` or `alpha`, where `band_failure_bounds` shares alpha out instead.
    Raises:
        ValueError: if either is out of range.
    """
    n, alpha = check_count("n", n), check_alpha(alpha)
    if n <= EXACT_UP_TO:
        return solve_level(n, alpha)
    sizes, alphas, gammas = _table()
    row, column = bisect_left(sizes, n), next((j for j, level in enumerate(alphas) if level <= alpha), len(alphas))
    return float(gammas[row, column]) if row < len(sizes) and column < len(alphas) else 0.0


@lru_cache(maxsize=8)
def band_failure_bounds(n: int, alpha: float) -> Floats:
    """Upper limits u_1 <= ... <= u_n with P(J < x_(i)) <= u_i for all i at once, with confidence 1 - alpha.

    The exact band where its level is known, else Bonferroni over at most 256 order statistics, chosen by n alone,
    each of which also serves the ranks below it down to the next one.

    Args:
        n: sample size, >= 1.
        alpha: failure probability of the whole band, in (0, 0.5].
    Returns:
        float64 array of shape (n,), read-only; computed once per (n, alpha).
    Raises:
        ValueError: if either is out of range.
    """
    gamma = ell_level(n, alpha)
    if gamma > 0:
        ranks = np.arange(1, n + 1)
        bounds = _beta_upper(ranks, n, gamma)
    else:
        ranks = bonferroni_ranks(n)
        limits = np.append(_beta_upper(ranks, n, alpha / ranks.size), 1.0)
        bounds = limits[np.searchsorted(ranks, np.arange(1, n + 1))]
    bounds.flags.writeable = False
    return bounds


def bonferroni_ranks(n: int) -> NDArray[np.int64]:
    """At most 256 ranks of 1..n: geometric where failures are rare, even elsewhere."""
    tail = np.geomspace(1, max(n / 16, 1), RANKS * 5 // 8)
    bulk = np.linspace(max(n / 16, 1), n, RANKS * 3 // 8)
    return np.unique(np.rint(np.concatenate([tail, bulk])).astype(np.int64))


def _beta_upper(ranks: NDArray[np.int64], n: int, level: float) -> Floats:
    i = ranks.astype(np.float64)
    bounds: Floats = np.minimum(betainccinv(i, n - i + 1, level) * (1 + OUTWARD), 1.0)
    return bounds


@cache
def _table() -> tuple[list[int], list[float], Floats]:
    with np.load(TABLE, allow_pickle=False) as table:
        return table["n"].tolist(), table["alpha"].tolist(), table["gamma"]
