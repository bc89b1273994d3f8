"""Order statistics: where quantiles of a law lie, and where an attacker can move them."""

from __future__ import annotations

from typing import NamedTuple

from scipy.special import betaincinv
from scipy.stats import beta

from robustrl.errors import check_alpha, check_count
from robustrl.noise import Noise

OUTWARD = 1e-12


class Ranks(NamedTuple):
    """Order statistics, counted from 1, of n clean samples; None where no finite sample bounds that side."""

    low: int | None
    high: int | None


def attacked_median_ranks(n: int, votes: int, noise: Noise, budget: float, alpha: float) -> Ranks:
    """Order statistics of `n` clean samples between which the attacked agent's action lies.

    The action is the middle one of `votes` noisy outputs on the attacked input, in one dimension; `n` other noisy outputs on the
    clean input are the evidence. Four steps, alpha/4 each: the middle of the votes lies between two quantiles of the attacked law,
    p- and p+ (a uniform order statistic is beta distributed); an attacker within the budget moves no quantile past the clean law's
    quantiles at lower(p-) and upper(p+); and these lie between two order statistics of the clean samples.

    Args:
        n: clean samples.
        votes: noisy outputs that the agent takes the middle one of; odd.
        noise: the mechanism.
        budget: of the attack on this input, in the mechanism's norm.
        alpha: failure probability of both sides together, over samples and votes.
    Raises:
        ValueError: for bad numbers.
    Source: Chiang et al., "Detection as Regression: Certified Object Detection by Median Smoothing" (NeurIPS 2020),
        arXiv:2007.03730, for the smoothed median; the finite vote is the proof above.
    """
    share = check_alpha(alpha) / 4
    check_count("n", n)
    if check_count("votes", votes) % 2 == 0:
        raise ValueError(f"votes must be odd, got {votes}")
    middle = (votes + 1) // 2
    p_low = float(betaincinv(middle, middle, share)) * (1 - OUTWARD)
    # Symmetric: the middle one lies above the quantile 1 - p_low with the same probability.
    q_low = float(noise.lower(p_low, budget)) * (1 - OUTWARD)
    q_high = float(noise.upper(1 - p_low, budget))
    return Ranks(_rank_below(n, q_low, share), _mirrored(_rank_below(n, (1 - q_high) * (1 - OUTWARD), share), n))


def _rank_below(n: int, q: float, alpha: float) -> int | None:
    """Largest k with P(the k-th of n samples lies above the q-quantile) <= alpha; the k-th uniform is Beta(k, n - k + 1)."""
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if beta.sf(q, middle, n - middle + 1) <= alpha else (low, middle - 1)
    return low or None


def _mirrored(rank: int | None, n: int) -> int | None:
    return None if rank is None else n + 1 - rank
