"""Exact adversaries of tables: brute force over all adversaries, budgets, and that nothing else goes below them."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from mdp.test_model import random_mdp

from robustrl.attacks.tabular import worst_case, worst_case_within
from robustrl.mdp import TabularMDP


def neighbours_of(seed: int, n: int = 5) -> np.ndarray:
    return (np.random.default_rng(100 + seed).random((n, n)) < 0.4) | np.eye(n, dtype=bool)


def victim_of(seed: int, mdp: TabularMDP) -> np.ndarray:
    return np.random.default_rng(200 + seed).dirichlet(np.ones(mdp.n_actions) * 0.5, mdp.n_states)


@pytest.mark.parametrize("seed", range(8))
def test_the_stationary_attacker_is_the_worst_of_all_of_them(seed: int) -> None:
    mdp = random_mdp(seed)
    policy, allowed = victim_of(seed, mdp), neighbours_of(seed)
    found = worst_case(mdp, policy, allowed)
    everyone = [
        mdp.evaluate(policy[list(shown)]) for shown in itertools.product(*(np.flatnonzero(row).tolist() for row in allowed))
    ]
    np.testing.assert_allclose(found.values, np.min(everyone, axis=0), atol=1e-12)
    np.testing.assert_allclose(mdp.evaluate(policy[found.shown]), found.values, atol=1e-12)
    assert allowed[np.arange(5), found.shown].all()
    assert (found.values <= mdp.evaluate(policy) + 1e-12).all()


def test_without_neighbours_nothing_happens_and_more_of_them_never_help() -> None:
    mdp = random_mdp(3)
    policy = victim_of(3, mdp)
    np.testing.assert_allclose(worst_case(mdp, policy, np.eye(5, dtype=bool)).values, mdp.evaluate(policy), atol=1e-12)
    few, more = neighbours_of(3), neighbours_of(3) | neighbours_of(4)
    assert (worst_case(mdp, policy, more).values <= worst_case(mdp, policy, few).values + 1e-12).all()


def recursive(mdp: TabularMDP, policy: np.ndarray, costs: np.ndarray, horizon: int) -> Any:
    """The same by plain recursion, outcome by outcome."""
    terminal = np.asarray(mdp.terminal)

    @cache
    def worth(t: int, s: int, left: int) -> float:
        if t == horizon:
            return 0.0
        options = []
        for x in range(mdp.n_states):
            if not 0 <= costs[s, x] <= left:
                continue
            total = 0.0
            for a, k in itertools.product(range(mdp.n_actions), range(mdp.rewards.shape[2])):
                later = (
                    0.0
                    if terminal[s, a, k]
                    else mdp.gamma * worth(t + 1, int(mdp.successors[s, a, k]), left - int(costs[s, x]))
                )
                total += policy[x, a] * mdp.probabilities[s, a, k] * (mdp.rewards[s, a, k] + later)
            options.append(total)
        return min(options)

    return worth


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_budgeted_attacker_is_the_recursion_itself(seed: int, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (4, 2, 3)
    mdp = TabularMDP(
        rng.integers(0, 4, shape), rng.dirichlet(np.ones(3), shape[:2]), rng.normal(size=shape), rng.random(shape) < 0.2, gamma
    )
    policy, costs = victim_of(seed, mdp), rng.integers(-1, 3, (4, 4))
    np.fill_diagonal(costs, 0)
    found, worth = worst_case_within(mdp, policy, costs, 4, 5), recursive(mdp, policy, costs, 5)
    for t, s, left in itertools.product(range(6), range(4), range(5)):
        assert found.values[t, s, left] == pytest.approx(worth(t, s, left), abs=1e-12)
    paid = costs[np.arange(4)[None, :, None], found.shown]
    assert ((paid >= 0) & (paid <= np.arange(5))).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_worth_of_a_budget_is_monotone_from_no_attack_to_no_budget(seed: int) -> None:
    """W(b) falls; b = 0 is the clean policy, b = H all that neighbours allow; long episodes reach the stationary attacker."""
    mdp = random_mdp(seed, gamma=0.5)
    policy, allowed = victim_of(seed, mdp), neighbours_of(seed)
    costs = np.where(allowed, 1, -1)
    np.fill_diagonal(costs, 0)
    horizon = 40
    found = worst_case_within(mdp, policy, costs, horizon, horizon).values[0]
    assert (np.diff(found, axis=1) <= 1e-12).all()
    assert (found[:, 0] > found[:, 5] + 1e-3).any()
    np.testing.assert_allclose(found[:, 0], mdp.evaluate(policy), atol=1e-10)
    np.testing.assert_allclose(found[:, -1], worst_case(mdp, policy, allowed).values, atol=1e-10)


def test_a_deterministic_victim_may_be_given_as_actions() -> None:
    mdp = random_mdp(0)
    _, best = mdp.solve()
    one, other = worst_case(mdp, best, neighbours_of(0)), worst_case(mdp, np.eye(2)[best], neighbours_of(0))
    np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mdp, pi: worst_case(mdp, pi, np.ones((5, 4), dtype=bool)), r"neighbours must be boolean of shape \(5, 5\)"),
        (lambda mdp, pi: worst_case(mdp, pi, np.ones((5, 5))), "neighbours must be boolean"),
        (lambda mdp, pi: worst_case(mdp, pi, np.zeros((5, 5), dtype=bool)), "True on the diagonal"),
        (lambda mdp, pi: worst_case(random_mdp(0, gamma=1.0), pi, np.eye(5, dtype=bool)), "mdp.gamma must be < 1"),
        (lambda mdp, pi: worst_case(mdp, pi[:, :1], np.eye(5, dtype=bool)), "policy must"),
        (lambda mdp, pi: worst_case_within(mdp, pi, np.ones((5, 5), dtype=int), 1, 1), "costs must be integers"),
        (lambda mdp, pi: worst_case_within(mdp, pi, np.zeros((5, 5)), 1, 1), "costs must be integers"),
        (lambda mdp, pi: worst_case_within(mdp, pi, np.zeros((5, 5), dtype=int), -1, 1), "budget must be an integer >= 0"),
        (lambda mdp, pi: worst_case_within(mdp, pi, np.zeros((5, 5), dtype=int), 1, 0), "horizon must be an integer >= 1"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    mdp = random_mdp(0)
    with pytest.raises(ValueError, match=message):
        call(mdp, victim_of(0, mdp))
