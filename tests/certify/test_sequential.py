"""Sequential decisions: right at any stopping time, and quick."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from robustrl.certify.sequential import log_wealth, threshold
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform


@pytest.mark.parametrize(("k", "n", "p0"), [(0, 0, 0.3), (3, 5, 0.5), (40, 50, 0.7), (2, 60, 0.8), (60, 60, 0.9)])
def test_wealth_is_the_mixture_of_likelihood_ratios(k: int, n: int, p0: float) -> None:
    def ratio(q: float) -> float:
        return math.exp(stats.binom.logpmf(k, n, q) - stats.binom.logpmf(k, n, p0))

    above, below = log_wealth(k, n, p0)
    assert math.exp(above) == pytest.approx(integrate.quad(ratio, p0, 1)[0] / (1 - p0), rel=1e-6)
    assert math.exp(below) == pytest.approx(integrate.quad(ratio, 0, p0)[0] / p0, rel=1e-6)


@pytest.mark.parametrize("p0", [0.2, 0.7, 0.95])
def test_wealth_is_a_martingale_under_its_hypothesis(p0: float) -> None:
    """One more trial changes neither bettor's expectation, whatever was seen."""
    k, n = np.meshgrid(np.arange(30), np.arange(30))
    k, n = k[k <= n], n[k <= n]
    for now, hit, miss in zip(log_wealth(k, n, p0), log_wealth(k + 1, n + 1, p0), log_wealth(k, n + 1, p0), strict=True):
        assert p0 * np.exp(hit) + (1 - p0) * np.exp(miss) == pytest.approx(np.exp(now), rel=1e-9)


@pytest.mark.parametrize("p0", [0.6, 0.9])
def test_a_true_hypothesis_is_rejected_at_any_time_with_at_most_its_level(p0: float) -> None:
    runs, alpha = 500, 0.05
    n = np.arange(1, 1501)
    hits = (np.random.default_rng(0).random((runs, n.size)) < p0).cumsum(axis=1)
    for wealth in log_wealth(hits, n, p0):
        rejected = float((wealth.max(axis=1) >= math.log(1 / alpha)).mean())
        assert rejected <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
        assert rejected >= 0.004  # not vacuous


@pytest.mark.parametrize("noise", [Gaussian(0.5), Uniform(0.3), Splitting(0.4), Laplace(0.2)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_threshold_is_where_the_radius_is_reached(noise: Noise, share: float) -> None:
    radius = share * noise.radius(0.99)
    p0 = threshold(noise, radius)
    assert noise.radius(p0) == pytest.approx(radius, rel=1e-6)
    assert noise.radius(p0) >= radius * (1 - 1e-9)
    assert noise.radius(p0 - 1e-6) < radius


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_must_be_positive_and_finite(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be"):
        threshold(Gaussian(0.5), radius)


def test_a_radius_beyond_the_mechanism_is_refused() -> None:
    with pytest.raises(ValueError, match="radius must be one that"):
        threshold(Uniform(0.3), 0.31)
    with pytest.raises(ValueError, match="radius must be one that"):
        threshold(Ablation(0.3), 40)


@pytest.mark.parametrize(
    ("k", "n", "p0"), [(5, 4, 0.5), (-1, 4, 0.5), (1.5, 4, 0.5), (1, 4, 0.0), (1, 4, 1.0), (1, 4, math.nan)]
)
def test_impossible_counts_and_thresholds_are_refused(k: float, n: float, p0: float) -> None:
    with pytest.raises(ValueError, match="must"):
        log_wealth(k, n, p0)
