from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.special import betainccinv

from robustrl.certify import band
from robustrl.certify.band import band_failure_bounds, bonferroni_ranks, ell_crossing_probability, ell_level
from robustrl.certify.betting import block_ends
from robustrl.certify.confidence import clopper_pearson_lower, clopper_pearson_upper, dkw_epsilon, failure_upper

CASES = [(1, 1, 0.05), (1, 10, 0.5), (5, 10, 0.05), (9999, 10_000, 0.05 / 200), (10_000, 10_000, 0.05 / 200), (1, 10_000, 1e-9)]
CASES += [(999_999, 1_000_000, 0.001), (1_000_000, 1_000_000, 0.05), (314, 1_000_000, 0.025), (500_000, 1_000_000, 1e-6)]


def lower_tail(k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """P(Bin(n, p) <= k), term by term downwards from k, in 50 digits."""
    log_term = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
    term = mpmath.exp(log_term + k * mpmath.log(p) + (n - k) * mpmath.log(1 - p))
    total, j = mpmath.mpf(0), k
    while j >= 0 and term > 1e-40:
        total += term
        term *= j * (1 - p) / ((n - j + 1) * p)
        j -= 1
    return total


@pytest.mark.parametrize(("k", "n", "alpha"), CASES)
def test_lower_limit_solves_the_binomial_tail_equation_to_50_digits_and_errs_downwards(k: int, n: int, alpha: float) -> None:
    with mpmath.workdps(50):
        limit = mpmath.mpf(float(clopper_pearson_lower(k, n, alpha)))
        higher = limit + max(min(limit, 1 - limit) * mpmath.mpf("1e-7"), mpmath.mpf("1e-15"))
        # P(Bin(n, p) >= k) = P(Bin(n, 1 - p) <= n - k)
        assert lower_tail(n - k, n, 1 - limit) <= alpha < lower_tail(n - k, n, 1 - higher)


@pytest.mark.parametrize(("k", "n", "alpha"), CASES)
def test_failure_limit_keeps_its_digits_and_errs_upwards(k: int, n: int, alpha: float) -> None:
    with mpmath.workdps(50):
        limit = mpmath.mpf(float(failure_upper(k, n, alpha)))
        lower = limit - max(min(limit, 1 - limit) * mpmath.mpf("1e-7"), mpmath.mpf("1e-15"))
        assert lower_tail(n - k, n, limit) <= alpha < lower_tail(n - k, n, lower)


@pytest.mark.parametrize(("k", "expected"), [(10_000, 0.99917094), (8882, 0.87685399), (2714, 0.25606925)])
def test_lower_limit_matches_the_published_code(k: int, expected: float) -> None:
    # specification 3.2: statsmodels proportion_confint(k, 10000, 2 * .05 / 200, "beta")[0]
    assert clopper_pearson_lower(k, 10_000, 0.05 / 200) == pytest.approx(expected, abs=5e-9)
    assert 1 - failure_upper(k, 10_000, 0.05 / 200) == pytest.approx(expected, abs=5e-9)


def test_limits_at_the_ends_and_their_closed_forms() -> None:
    assert clopper_pearson_lower(0, 7, 0.05) == 0
    assert clopper_pearson_upper(7, 7, 0.05) == 1
    assert clopper_pearson_lower(7, 7, 0.05) == pytest.approx(0.05 ** (1 / 7), rel=1e-11)
    assert clopper_pearson_upper(0, 7, 0.05) == pytest.approx(-math.expm1(math.log(0.05) / 7), rel=1e-11)
    assert failure_upper(10**6, 10**6, 0.05) == pytest.approx(-math.expm1(math.log(0.05) / 10**6), rel=1e-11)


def test_limits_broadcast_and_are_ordered() -> None:
    k = np.arange(11)
    lower, upper = clopper_pearson_lower(k, 10, 0.1), clopper_pearson_upper(k, 10, 0.1)
    assert lower.shape == (11,)
    assert np.all(lower < k / 10 + (k == 0))
    assert np.all(np.diff(lower) > 0)
    assert np.allclose(upper, 1 - lower[::-1])


@pytest.mark.parametrize(
    ("k", "n", "alpha", "match"),
    [
        (-1, 5, 0.05, "k must"),
        (6, 5, 0.05, "k must"),
        (1.5, 5, 0.05, "k must"),
        (math.nan, 5, 0.05, "k must"),
        (0, 0, 0.05, "n must"),
        (1, 2.5, 0.05, "n must"),
        (1, math.inf, 0.05, "n must"),
        (1, 5, 0.0, "alpha must"),
        (1, 5, 0.51, "alpha must"),
        (1, 5, math.nan, "alpha must"),
    ],
)
def test_limits_refuse_bad_counts(k: float, n: float, alpha: float, match: str) -> None:
    for limit in (clopper_pearson_lower, clopper_pearson_upper):
        with pytest.raises(ValueError, match=match):
            limit(k, n, alpha)


def test_dkw_is_one_sided_massart() -> None:
    assert dkw_epsilon(1000, 0.05) == pytest.approx(0.0387, abs=5e-5)  # specification 2.7
    with pytest.raises(ValueError, match="alpha"):
        dkw_epsilon(10, 0.6)
    with pytest.raises(ValueError, match="n must"):
        dkw_epsilon(0, 0.05)


def test_ell_level_of_one_return_is_alpha() -> None:
    assert ell_level(1, 0.05) == 0.05
    assert ell_crossing_probability(1, 0.05) == pytest.approx(0.05, abs=1e-13)


@pytest.mark.parametrize("gamma", [0.3, 0.0271599, 0.0051834, 1e-6])
def test_ell_crossing_of_two_returns_matches_the_closed_form(gamma: float) -> None:
    u1, u2 = 1 - math.sqrt(gamma), math.sqrt(1 - gamma)
    stay = 2 * (u1 * u2 - u1**2 / 2)  # specification 2.5
    assert ell_crossing_probability(2, gamma) == pytest.approx(1 - stay, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "alpha", "gamma"),
    [
        (2, 0.05, 0.0271599),
        (2, 0.01, 0.0051834),
        (10, 0.05, 0.0079433),
        (10, 0.01, 0.0013674),
        (100, 0.05, 0.0024609),
        (100, 0.01, 0.00038695),
        (1000, 0.05, 0.0012169),
        (1000, 0.01, 0.00018516),
        (10_000, 0.05, 0.0007637),
    ],
)
def test_ell_level_matches_the_specified_table(n: int, alpha: float, gamma: float) -> None:
    assert ell_level(n, alpha) == pytest.approx(gamma, rel=1e-4)


@pytest.mark.parametrize(
    ("n", "alpha"), [(3, 0.5), (57, 0.05), (1000, 0.025), (999, 1e-4), (1001, 0.05), (2345, 0.03), (10_000, 0.025)]
)
def test_ell_level_never_lets_more_than_alpha_through(n: int, alpha: float) -> None:
    assert ell_crossing_probability(n, ell_level(n, alpha)) <= alpha


def test_ell_level_by_monte_carlo(rng: np.random.Generator) -> None:
    uniforms = np.sort(rng.random((20_000, 100)), axis=1)
    crossed = np.mean(np.any(uniforms > band_failure_bounds(100, 0.05), axis=1))
    assert abs(crossed - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 20_000)


def test_ell_level_lookup_takes_the_next_larger_sample_and_the_next_smaller_alpha() -> None:
    assert ell_level(9_000, 0.05) == ell_level(10_000, 0.05)
    assert ell_level(10_000, 0.049) == ell_level(10_000, 0.025)
    assert ell_level(10_000, 0.5) == ell_level(10_000, 0.25)
    assert ell_level(10**7, 0.05) == 0
    assert ell_level(20_000, 1e-9) == 0


def test_ell_levels_fall_with_the_sample_size_and_with_alpha() -> None:
    sizes, alphas, gammas = band._table()
    assert sizes == sorted(sizes)
    assert alphas == sorted(alphas, reverse=True)
    assert np.all(np.diff(gammas, axis=0) < 0)
    assert np.all(np.diff(gammas, axis=1) < 0)
    assert ell_level(1000, 0.05) == pytest.approx(gammas[sizes.index(1000), alphas.index(0.05)], rel=1e-5)


@pytest.mark.slow
def test_shipped_levels_are_exact() -> None:
    sizes, alphas, gammas = band._table()
    for row, n in enumerate(sizes):
        if n <= 20_000:
            for column in range(0, len(alphas), 4):
                assert 0.9999 * alphas[column] <= ell_crossing_probability(n, gammas[row, column]) <= alphas[column]


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (300, 0.01), (5_000, 0.05), (150_000, 0.05), (3_000, 1e-6)])
def test_failure_bounds_rise_and_cover_the_ranks(n: int, alpha: float) -> None:
    bounds = band_failure_bounds(n, alpha)
    assert bounds.shape == (n,)
    assert np.all(np.diff(bounds) >= 0)
    assert np.all(bounds >= np.arange(1, n + 1) / (n + 1))
    assert bounds[-1] <= 1
    assert not bounds.flags.writeable


def test_bonferroni_fallback_uses_the_next_larger_chosen_rank() -> None:
    n, ranks = 400_000, bonferroni_ranks(400_000)
    bounds = band_failure_bounds(n, 0.05)
    assert ranks.size <= 256
    assert ranks[0] == 1
    assert ranks[-1] == n
    for i in (1, 2, 30, 31, 777, 12_345, 399_999, 400_000):
        j = int(ranks[np.searchsorted(ranks, i)])
        assert bounds[i - 1] == pytest.approx(betainccinv(j, n - j + 1, 0.05 / ranks.size), rel=1e-9)


def test_bonferroni_fallback_covers_by_monte_carlo(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band, "ell_level", lambda n, alpha: 0.0)
    bounds = band.band_failure_bounds.__wrapped__(1000, 0.05)
    crossed = np.any(np.sort(rng.random((4000, 1000)), axis=1) > bounds, axis=1).mean()
    assert crossed <= 0.05


@pytest.mark.parametrize(("n", "alpha"), [(0, 0.05), (-3, 0.05), (10, 0.0), (10, 0.7), (10, math.nan)])
def test_band_refuses_bad_arguments(n: int, alpha: float) -> None:
    for function in (ell_level, band_failure_bounds):
        with pytest.raises(ValueError):
            function(n, alpha)


@pytest.mark.parametrize("gamma", [0.0, 1.0, math.nan])
def test_crossing_refuses_bad_levels(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        ell_crossing_probability(10, gamma)


def test_blocks_are_fixed_beforehand() -> None:
    ends = block_ends(0, 100_000)
    assert ends[:12].tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 300]
    assert ends[-1] == 100_000
    assert ends.size < 250
    for n in (5, 137, 6_000):
        shorter = block_ends(0, n)
        assert shorter[-1] == n
        assert np.array_equal(shorter[:-1], ends[: shorter.size - 1])
