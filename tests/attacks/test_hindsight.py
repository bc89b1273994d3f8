"""Hindsight diagnostics: brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from robustrl.attacks import knapsack_oracle


@pytest.mark.parametrize("seed", range(15))
def test_the_oracle_is_the_best_of_all_subsets_and_at_least_the_greedy_choice(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 13))
    gains, costs = generator.normal(size=n), generator.exponential(size=n) * (generator.random(n) > 0.1)
    if seed % 3 == 0:
        costs = np.round(costs, 1)  # ties
    budget = float(costs.sum() * generator.random())
    subsets = np.array(list(itertools.product((False, True), repeat=n)))
    best = float(np.max((subsets @ gains)[subsets @ costs <= budget]))
    value, chosen = knapsack_oracle(gains, costs, budget)
    assert value == pytest.approx(best, abs=1e-12)
    assert gains[chosen].sum() == pytest.approx(value, abs=1e-12)
    assert costs[chosen].sum() <= budget * (1 + 1e-12)
    left, greedy = budget, 0.0
    for i in np.argsort(-gains / np.maximum(costs, 1e-12)):
        if gains[i] > 0 and costs[i] <= left:
            left, greedy = left - costs[i], greedy + gains[i]
    assert value >= greedy - 1e-12


def test_an_episode_of_500_steps_is_solved_and_more_budget_never_hurts() -> None:
    generator = np.random.default_rng(0)
    gains, costs = generator.random(500), generator.random(500) ** 2
    values = [knapsack_oracle(gains, costs, budget)[0] for budget in (0.0, 0.1, 1.0, 5.0, math.inf)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(gains.sum())


@pytest.mark.parametrize(
    ("gains", "costs", "budget", "message"),
    [
        ([1.0], [1.0, 2.0], 1.0, "gains and costs must be as many, got 1 and 2"),
        ([1.0], [-1.0], 1.0, "costs must be >= 0"),
        ([math.nan], [1.0], 1.0, "gains must be finite"),
        ([1.0], [1.0], math.nan, "budget must be >= 0"),
        ([], [], 1.0, "gains must not be empty"),
    ],
)
def test_bad_numbers_are_refused(gains: Any, costs: Any, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knapsack_oracle(gains, costs, budget)
