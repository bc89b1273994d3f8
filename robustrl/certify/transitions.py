"""What draws from an unknown transition prove: which outcomes it has, and how far its law is from the empirical one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_choice, check_count, check_finite_array, check_positive, check_real

Floats = NDArray[np.float64]
CONFIDENCES = ("laplace", "weissman", "heuristic")


def support_samples(tau: float, delta: float, n_pools: int) -> int:
    """Draws after which every outcome of every pool has been seen, with probability at least 1 - delta.

    An outcome of probability at least tau stays unseen in N draws with probability (1 - tau)^N, and a pool has at most 1 / tau of
    them:  N = ln(n_pools / (tau delta)) / -ln(1 - tau).  Each pool is tested once, at its N-th draw, so nothing is paid for time.

    Args:
        tau: smallest positive probability of any outcome, in (0, 1]. Larger than the truth, it voids the statement.
        delta: failure probability of all pools together, in (0, 1).
        n_pools: number of pools that are tested.
    Returns:
        The number of draws, at least 1.
    Raises:
        ValueError: if a number is out of range.
    Source: union bound over the missing mass.
    """
    if not 0 < check_real("tau", tau) <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}")
    delta, n_pools = _failure(delta), check_count("n_pools", n_pools)
    if tau == 1:
        return 1
    return max(1, math.ceil(math.log(n_pools / (tau * delta)) / -math.log1p(-tau)))


def l1_radius(n: ArrayLike, k: ArrayLike, delta: float, method: str = "laplace", *, beta: float = 0.5) -> Floats:
    """How far, in l1, the law of n draws over k outcomes may be from their empirical law.

    - "laplace": with probability at least 1 - delta for all n at once, so that it may be looked at after every draw:
      sqrt(2 (1 + 1/n) ln((2^k - 2) sqrt(n + 1) / delta) / n).
    - "weissman": sqrt(2 ln((2^k - 2) / delta) / n), with probability at least 1 - delta for one n that was fixed beforehand. It is
      no proof for a learner, who stops when it likes what it sees.
    - "heuristic": beta / sqrt(n), no proof at all.

    Args:
        n: draws, >= 0; with 0 draws the radius is 2.
        k: outcomes that are possible, >= 1; with a single one the radius is 0. Broadcast against `n`.
        delta: failure probability, in (0, 1).
        method: see above.
        beta: of the heuristic.
    Returns:
        Radii in [0, 2], float64, of the broadcast shape.
    Raises:
        ValueError: if a number is out of range.
    Source: the mixture supermartingale of a 1/2-sub-Gaussian sum, for each of the 2^k - 2 events whose deviation is half the l1
        distance; Weissman et al. (HPL-2003-97), theorem 2.1.
    """
    draws, outcomes, delta = check_finite_array("n", n), check_finite_array("k", k), _failure(delta)
    check_choice("method", method, CONFIDENCES)
    if draws.min() < 0 or outcomes.min() < 1:
        raise ValueError(f"n must be >= 0 and k >= 1, got n = {draws.min():g}, k = {outcomes.min():g}")
    some = np.maximum(draws, 1)
    if method == "heuristic":
        radius = np.broadcast_arrays(check_positive("beta", beta) / np.sqrt(some), outcomes)[0]
    else:
        several = np.maximum(outcomes, 2)
        log_events = several * math.log(2) + np.log1p(-np.exp2(1 - several)) - math.log(delta)
        if method == "laplace":
            radius = np.sqrt(2 * (1 + 1 / some) * (log_events + 0.5 * np.log1p(some)) / some)
        else:
            radius = np.sqrt(2 * log_events / some)
    found: Floats = np.where(outcomes == 1, 0.0, np.where(draws == 0, 2.0, np.minimum(radius, 2.0)))
    return found


def _failure(delta: float) -> float:
    if not 0 < check_real("delta", delta) < 1:
        raise ValueError(f"delta must be a failure probability in (0, 1), got {delta}")
    return float(delta)
