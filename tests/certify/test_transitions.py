"""Supports and l1 radii: the cited table, exact inclusion-exclusion, and coverage under optional stopping."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from robustrl.certify.transitions import l1_radius, support_samples


@pytest.mark.parametrize(("tau", "draws"), [(0.05, 261), (0.1, 121), (0.3, 33), (1.0, 1)])
def test_the_draws_for_1600_pools_are_those_of_the_derivation(tau: float, draws: int) -> None:
    assert support_samples(tau, 0.05, 1600) == draws


def missed(law: list[float], draws: int) -> float:
    """The probability that some outcome is not among the draws, by inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(law) + 1):
        for absent in itertools.combinations(law, size):
            total -= (-1) ** size * (1 - sum(absent)) ** draws if sum(absent) < 1 - 1e-12 else 0.0
    return total


def test_inclusion_and_exclusion_agrees_with_the_cited_values() -> None:
    assert missed([0.3, 0.4, 0.3], 26) == pytest.approx(1.894e-4, rel=1e-3)
    assert missed([0.5, 0.5], 7) == pytest.approx(0.015625)


@pytest.mark.parametrize("law", [[0.3, 0.4, 0.3], [0.1] * 10, [0.05] * 20, [0.5, 0.5], [0.1, 0.9], [0.25, 0.25, 0.25, 0.25]])
@pytest.mark.parametrize("delta", [0.3, 0.01])
def test_no_law_hides_an_outcome_more_often_than_allowed(law: list[float], delta: float) -> None:
    """One pool, laws whose smallest probability is tau: the union bound is nearly used up, a third of the draws breaks it."""
    draws = support_samples(min(law), delta, 1)
    if len(law) < 12:
        assert missed(law, draws) <= delta
    assert sum((1 - p) ** draws for p in law) <= delta  # an upper bound of the exact value
    if len(law) == round(1 / min(law)) and len(law) < 12:
        assert missed(law, max(1, draws // 3)) > delta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.05, 1), "tau"), ((1.1, 0.05, 1), "tau"), ((math.nan, 0.05, 1), "tau"), ((0.1, 0, 1), "delta"),
     ((0.1, 1, 1), "delta"), ((0.1, 0.05, 0), "n_pools")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(arguments: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support_samples(*arguments)


def crossings(law: list[float], method: str, delta: float, *, steps: int, repetitions: int, seed: int) -> int:
    """How many runs ever leave the radius: the l1 distance is looked at after every draw."""
    rng = np.random.default_rng(seed)
    k, left = len(law), 0
    n = np.arange(1, steps + 1)
    radius = l1_radius(n, k, delta, method)
    for _ in range(repetitions):
        drawn = rng.choice(k, size=steps, p=law)
        distance = sum(np.abs(np.cumsum(drawn == slot) / n - p) for slot, p in enumerate(law))
        left += bool((distance > radius).any())
    return left


@pytest.mark.parametrize("law", [[0.5, 0.5], [0.3, 0.4, 0.3], [0.05, 0.95], [0.25] * 4])
def test_the_laplace_radius_holds_at_all_times_at_once(law: list[float]) -> None:
    delta, repetitions = 0.1, 300
    left = crossings(law, "laplace", delta, steps=3000, repetitions=repetitions, seed=1)
    assert left <= binom.ppf(0.999, repetitions, delta)


def test_the_same_test_rejects_a_radius_for_a_fixed_number_of_draws() -> None:
    """Weissman's radius for two outcomes fails in about 15 % of the runs at 5 %, when it is looked at for 20,000 draws."""
    delta, repetitions = 0.05, 400
    allowed = binom.ppf(0.999, repetitions, delta)
    assert crossings([0.5, 0.5], "weissman", delta, steps=20_000, repetitions=repetitions, seed=2) > allowed
    assert crossings([0.5, 0.5], "laplace", delta, steps=20_000, repetitions=repetitions, seed=2) <= allowed


def test_radii_agree_with_the_cited_values() -> None:
    assert l1_radius(300, 3, 0.05, "weissman") == pytest.approx(0.179, abs=5e-4)
    assert l1_radius(300, 3, 0.05) == pytest.approx(0.226, abs=5e-4)
    assert l1_radius(300, 25, 0.05) == pytest.approx(0.394, abs=5e-4)
    assert l1_radius(25, 3, 0.05, "heuristic", beta=0.5) == pytest.approx(0.1)
    by_hand = math.sqrt(2 * (1 + 1 / 40) * math.log((2**4 - 2) * math.sqrt(41) / 0.01) / 40)
    assert l1_radius(40, 4, 0.01) == pytest.approx(by_hand, rel=1e-12)


def test_radii_are_vectorised_and_end_at_what_is_certain() -> None:
    radii = l1_radius(np.array([0, 1, 10, 10_000]), np.array([[1], [3]]), 0.05)
    assert radii.shape == (2, 4)
    assert radii[0].tolist() == [0.0] * 4
    assert radii[1, :2].tolist() == [2.0, 2.0]
    assert 0 < radii[1, 3] < radii[1, 2] <= 2
    assert np.isfinite(l1_radius(10, 5000, 0.05))  # 2^5000 overflows


@pytest.mark.parametrize(
    ("n", "k", "method"), [(-1, 2, "laplace"), (1, 0, "laplace"), (math.nan, 2, "laplace"), (1, 2, "hoeffding")]
)
def test_radii_refuse_what_is_out_of_range(n: float, k: int, method: str) -> None:
    with pytest.raises(ValueError):
        l1_radius(n, k, 0.05, method)
