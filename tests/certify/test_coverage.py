"""A certificate may exceed the true worst case with probability alpha, whatever the law of the return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from return_laws import Law, g
from scipy.stats import binom

from robustrl.certify.betting import betting_lower_bounds
from robustrl.certify.returns import METHODS, certify_quantile, certify_return, certify_success
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform

NAMES = ("nasty", "mostly zero", "ties", "heavy atoms", "continuous", "signed", "cartpole 0.2", "cartpole 0.4")
OTHERS: list[Noise] = [Uniform(0.5), Splitting(1.0), Laplace(1.0), Ablation(0.1)]
BUDGETS = np.array([0.0, 0.2, 0.4, 0.8])
SLACK = 1e-7
"""Of the truth itself: the midpoint rule on 4000 cells."""


def allowed(repetitions: int, alpha: float) -> int:
    """A valid method has more violations once in a thousand tests."""
    return int(binom.ppf(0.999, repetitions, alpha))


def violations(law: Law, noise: Noise, budgets: np.ndarray, n: int, repetitions: int, seed: int, **options: Any) -> int:
    """How many of the curves exceed the truth anywhere."""
    rng, span = np.random.default_rng(seed), law.high - law.low
    truth = np.array([law.worst_mean(noise, budget) for budget in budgets])
    high = law.high if options.pop("known_high", True) else None
    count = 0
    for _ in range(repetitions):
        sample = law.sample(rng, (n,))
        certificate = certify_return(sample, noise, budgets, return_low=law.low, return_high=high, **options)
        count += bool(np.any(certificate.values > truth + SLACK * span))
    return count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_certified_curve_is_below_the_truth_often_enough(laws: dict[str, Law], method: str, name: str) -> None:
    repetitions = 60 if method in ("betting", "hybrid") else 120
    assert violations(laws[name], Gaussian(0.4), BUDGETS, 500, repetitions, 1, method=method) <= allowed(repetitions, 0.05)


@pytest.mark.parametrize("name", ["ties", "mostly zero", "signed"])
@pytest.mark.parametrize("noise", OTHERS, ids=lambda noise: noise.scale)
def test_certified_curve_is_below_the_truth_for_the_other_norms(laws: dict[str, Law], noise: Noise, name: str) -> None:
    budgets = np.array([0.0, 1.0, 2.0]) if noise.norm == 0 else BUDGETS
    for method in ("band", "betting", "hybrid"):
        assert violations(laws[name], noise, budgets, 200, 40, 2, method=method, alpha=0.1) <= allowed(40, 0.1)


@pytest.mark.parametrize("name", ["continuous", "heavy atoms", "nasty"])
@pytest.mark.parametrize("method", ["betting", "hybrid"])
def test_learned_thresholds_keep_the_confidence(laws: dict[str, Law], method: str, name: str) -> None:
    assert violations(laws[name], Gaussian(0.4), BUDGETS, 300, 60, 3, method=method, known_high=False, alpha=0.2) <= allowed(
        60, 0.2
    )


@pytest.mark.parametrize("name", ["ties", "continuous", "mostly zero"])
@pytest.mark.parametrize("budget", [0.0, 0.4])
def test_single_budget_betting_keeps_a_loose_alpha(laws: dict[str, Law], name: str, budget: float) -> None:
    single = np.array([budget])
    assert violations(laws[name], Gaussian(0.4), single, 150, 100, 4, method="betting", alpha=0.3) <= allowed(100, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_certified_curve_is_below_the_truth_often_enough_for_many_runs(laws: dict[str, Law], method: str, name: str) -> None:
    noise = Gaussian(0.2 if name == "cartpole 0.2" else 0.4)
    for n, alpha in [(500, 0.05), (40, 0.2)]:
        assert violations(laws[name], noise, BUDGETS, n, 300, 5, method=method, alpha=alpha) <= allowed(300, alpha)


@pytest.mark.slow
@pytest.mark.parametrize("noise", OTHERS, ids=lambda noise: noise.scale)
def test_other_norms_for_many_runs(laws: dict[str, Law], noise: Noise) -> None:
    budgets = np.array([0.0, 1.0, 2.0]) if noise.norm == 0 else BUDGETS
    for name in ("nasty", "heavy atoms", "continuous", "signed"):
        for method in METHODS:
            assert violations(laws[name], noise, budgets, 200, 60, 6, method=method, alpha=0.1) <= allowed(60, 0.1)


@pytest.mark.parametrize("noise", [Gaussian(0.4), *OTHERS], ids=lambda noise: noise.scale)
@pytest.mark.parametrize("n", [1, 12, 150])
def test_success_coverage_is_exact_by_enumeration(noise: Noise, n: int) -> None:
    counts = np.arange(n + 1)
    budgets = np.array([0.0, 1.0, 2.0]) if noise.norm == 0 else BUDGETS
    values = np.array([certify_success(int(k), n, noise, budgets, alpha=0.05).values for k in counts])
    for p in (0.02, 0.3, 0.5, 0.9, 0.99, 0.999):
        truth = np.array([float(g(noise, np.array(p), b)) for b in budgets])
        assert binom.pmf(counts, n, p) @ np.any(values > truth + 1e-12, axis=1) <= 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [Gaussian(0.4), Uniform(2.0), Ablation(0.1)], ids=lambda noise: noise.scale)
def test_quantile_is_below_the_truth_often_enough(laws: dict[str, Law], noise: Noise, name: str) -> None:
    law, rng, q = laws[name], np.random.default_rng(7), 0.6
    grid = np.unique(np.concatenate([np.linspace(law.low, law.high, 100_001), law.atoms]))
    budgets = np.array([0.0, 1.0, 2.0]) if noise.norm == 0 else BUDGETS
    levels = np.array([float(g(noise, np.array(q), b)) for b in budgets])
    truth = grid[np.searchsorted(law.cdf(grid) + 1e-12, levels)]
    for simultaneous, repetitions in [(True, 100), (False, 100)]:
        runs = [
            certify_quantile(law.sample(rng, (300,)), q, noise, budgets, simultaneous=simultaneous).values
            for _ in range(repetitions)
        ]
        above = np.array(runs) > truth
        rates = above.any(axis=1).sum() if simultaneous else above.sum(axis=0).max()
        assert rates <= allowed(repetitions, 0.05) + (0 if simultaneous else 2)  # the maximum of several counts


@pytest.mark.parametrize("name", ["ties", "continuous", "mostly zero", "signed"])
def test_betting_may_be_stopped_at_the_most_favourable_time(laws: dict[str, Law], name: str) -> None:
    law, noise, rng = laws[name], Gaussian(0.4), np.random.default_rng(8)
    budgets, planned, count = np.array([0.0, 0.3]), 400, 0
    truth = np.array([law.worst_mean(noise, budget) for budget in budgets])
    for run in range(80):
        sample = law.sample(rng, (planned,))
        # with no ceiling, the bound of the whole run is the best of all stopping times (at block ends)
        best = betting_lower_bounds(
            sample,
            noise,
            budgets,
            alpha=0.1,
            return_low=law.low,
            return_high=law.high,
            n_planned=planned,
            ceiling=np.full(2, law.high),
        )
        if run < 4:
            for stop in [1, 7, *range(40, 400, 45)]:
                certificate = certify_return(
                    sample[:stop],
                    noise,
                    budgets,
                    method="betting",
                    alpha=0.2,
                    return_low=law.low,
                    return_high=law.high,
                    n_planned=planned,
                )
                assert certificate.anytime
                if stop in (40, 100, 200, 300):
                    assert np.all(certificate.values <= np.maximum.accumulate(best[::-1])[::-1] + 1e-9)
        count += bool(np.any(best > truth + SLACK * (law.high - law.low)))
    assert count <= allowed(80, 0.2)


def test_stopping_at_every_single_episode_keeps_the_confidence(laws: dict[str, Law]) -> None:
    law, noise, rng = laws["ties"], Gaussian(0.4), np.random.default_rng(9)
    truth, runs, count = law.worst_mean(noise, 0.3), 10, 0
    for _ in range(runs):
        sample = law.sample(rng, (40,))
        options: dict[str, Any] = {"method": "betting", "alpha": 0.2, "return_low": 0, "return_high": 200, "n_planned": 40}
        curve = [certify_return(sample[:stop], noise, 0.3, **options).values[0] for stop in range(1, 41)]
        count += max(curve) > truth
    assert count <= allowed(runs, 0.2)


@pytest.mark.parametrize(
    ("method", "distance"), [("paper", 0.06), ("dkw", 0.09), ("band", 0.05), ("betting", 0.035), ("hybrid", 0.04)]
)
@pytest.mark.parametrize("name", ["ties", "heavy atoms", "continuous", "signed", "cartpole 0.4"])
def test_certificates_are_not_vacuous(laws: dict[str, Law], name: str, method: str, distance: float) -> None:
    """At mu <= 1 and 2000 episodes, within a few per cent of the range from the truth."""
    law, noise, rng = laws[name], Gaussian(0.4), np.random.default_rng(10)
    budgets = np.array([0.0, 0.2, 0.4])
    truth = np.array([law.worst_mean(noise, budget) for budget in budgets])
    curves = [
        certify_return(law.sample(rng, (2000,)), noise, budgets, method=method, return_low=law.low, return_high=law.high).values
        for _ in range(4)
    ]
    assert np.all(np.mean(curves, axis=0) > truth - distance * (law.high - law.low))


def test_rare_failures_need_the_band(laws: dict[str, Law]) -> None:
    """At mu = 2 a failure of 1 in 500 decides; betting alone would lose a third of what the hybrid keeps."""
    law, rng = laws["nasty"], np.random.default_rng(11)
    sample = law.sample(rng, (10_000,))
    hybrid, betting = (
        certify_return(sample, Gaussian(0.4), 1.0, method=method, return_low=0, return_high=200).values[0]
        for method in ("hybrid", "betting")
    )
    truth = law.worst_mean(Gaussian(0.4), 1.0)
    assert betting < hybrid < truth
    assert hybrid > 0.8 * truth
