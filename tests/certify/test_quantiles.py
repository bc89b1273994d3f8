"""Ranks of order statistics: right for every law, sharp enough to be used, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from robustrl.certify.quantiles import attacked_median_ranks
from robustrl.noise import Gaussian, Laplace, Noise, Uniform


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_without_attack_and_with_many_votes_the_ranks_are_those_of_the_sign_test(n: int, alpha: float) -> None:
    low, high = attacked_median_ranks(n, 10**9 + 1, Gaussian(1.0), 0.0, alpha)
    assert low is not None
    assert high == n + 1 - low
    assert binom.cdf(low - 1, n, 0.5) <= alpha / 4 * (1 + 1e-2)
    assert binom.cdf(low + 1, n, 0.5) > alpha / 4


@pytest.mark.parametrize("votes", [1, 3, 11, 101])
def test_the_middle_of_a_finite_vote_lies_where_the_binomial_says(votes: int) -> None:
    """With endless clean samples the rank is the quantile that at most alpha/4 of the middle votes fall below."""
    n, alpha = 10**7, 0.1
    low, _ = attacked_median_ranks(n, votes, Gaussian(1.0), 0.0, alpha)
    assert low is not None
    assert binom.sf((votes - 1) // 2, votes, low / n) == pytest.approx(alpha / 4, rel=0.05)


def test_a_large_budget_or_few_samples_bound_nothing() -> None:
    assert attacked_median_ranks(100, 101, Gaussian(1.0), 6.0, 0.01) == (None, None)
    assert attacked_median_ranks(3, 101, Gaussian(1.0), 0.0, 0.01) == (None, None)
    assert attacked_median_ranks(1000, 101, Uniform(0.5), 0.9, 0.01) == (None, None)


@pytest.mark.parametrize("noise", [Gaussian(0.5), Uniform(0.8), Laplace(0.4)])
def test_ranks_only_move_outwards_with_the_budget(noise: Noise) -> None:
    found = [attacked_median_ranks(5000, 501, noise, budget, 0.01) for budget in (0.0, 0.05, 0.1, 0.2)]
    lows, highs = ([getattr(ranks, name) for ranks in found] for name in ("low", "high"))
    assert lows == sorted(lows, reverse=True)
    assert highs == sorted(highs)
    assert all(low + high == 5001 for low, high in zip(lows, highs, strict=True))


@pytest.mark.parametrize("budget", [0.0, 0.3])
@pytest.mark.parametrize("votes", [11, 201])
def test_the_worst_attack_on_a_line_stays_between_the_ranks_as_often_as_stated(budget: float, votes: int) -> None:
    """The output is the noisy input itself, shifted by the whole budget: the attack that the proof has in mind."""
    runs, n, alpha = 4000, 400, 0.2
    generator = np.random.default_rng(0)
    low, high = attacked_median_ranks(n, votes, Gaussian(1.0), budget, alpha)
    assert low is not None
    assert high is not None
    clean = np.sort(generator.normal(size=(runs, n)), axis=1)
    acted = np.median(generator.normal(loc=-budget, size=(runs, votes)), axis=1)
    missed = np.mean(acted < clean[:, low - 1])
    assert missed <= alpha / 2
    # The bound's two steps rarely fail together: far from its level, but neither is it infinitely far.
    assert np.quantile(acted - clean[:, low - 1], 0.02) < 0.6 * (norm.ppf(0.98) * 1.25 / votes**0.5 + 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 11, 0.0, 0.1), "n must be"),
        ((100, 10, 0.0, 0.1), "votes must be odd"),
        ((100, 0, 0.0, 0.1), "votes must be"),
        ((100, 11, -1.0, 0.1), "budget must be"),
        ((100, 11, float("nan"), 0.1), "budget must be"),
        ((100, 11, 0.0, 0.0), "alpha must be"),
    ],
)
def test_bad_numbers_are_refused(arguments: tuple[int, int, float, float], message: str) -> None:
    n, votes, budget, alpha = arguments
    with pytest.raises(ValueError, match=message):
        attacked_median_ranks(n, votes, Gaussian(1.0), budget, alpha)
