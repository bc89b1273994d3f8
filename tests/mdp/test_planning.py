"""Robust planning: water filling against linear programs, backups against naive loops, plans against exact values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog
from worlds import islands, random_world

from robustrl.mdp import Beliefs, Outcomes, TabularMDP, evaluate, optimise, water_fill


def programmed(utilities: np.ndarray, p: np.ndarray, radius: float, support: np.ndarray, sign: int) -> float:
    """The best mean in an l1 ball as a linear program in q and t >= |q - p|."""
    k = len(p)
    one, zero = np.eye(k), np.zeros((1, k))
    rows = np.block([[one, -one], [-one, -one], [zero, np.ones((1, k))]])
    found = linprog(
        np.concatenate([-sign * utilities, np.zeros(k)]), rows, np.concatenate([p, -p, [radius]]),
        np.concatenate([np.ones((1, k)), zero], axis=1), [1.0],
        bounds=[(0, 1 if allowed else 0) for allowed in support] + [(0, None)] * k,
    )  # fmt: skip
    return float(-sign * found.fun)


def ball(rng: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Utilities with ties, a centre with zeros, a radius that is often 0 or 2, forbidden slots."""
    support = rng.random(k) < 0.7
    support[rng.integers(k)] = True
    p = np.where(support & (rng.random(k) < 0.8), rng.random(k), 0)
    p[support.argmax()] += 0.1
    utilities = rng.normal(size=k).round(int(rng.integers(0, 3)))
    return utilities, p / p.sum(), float(rng.choice([0.0, 2.0, rng.random() * 2, rng.random() * 0.3])), support


@pytest.mark.parametrize("optimistic", [True, False])
def test_water_filling_solves_the_linear_program(optimistic: bool) -> None:
    rng = np.random.default_rng(3 + optimistic)
    for _ in range(300):
        utilities, p, radius, support = ball(rng, int(rng.integers(1, 7)))
        q = water_fill(utilities, p, radius, support, optimistic)
        best = programmed(utilities, p, radius, support, 1 if optimistic else -1)
        assert q @ utilities == pytest.approx(best, abs=1e-9)
        assert q.sum() == pytest.approx(1, abs=1e-12)
        assert (q >= 0).all()
        assert not q[~support].any()
        assert np.abs(q - p).sum() <= radius + 1e-12


def test_a_ball_of_radius_0_is_its_centre_and_of_radius_2_everything() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        utilities, p, _, support = ball(rng, 5)
        assert (water_fill(utilities, p, 0.0, support) == p).all()
        for radius in (2.0, 3.0):
            q = water_fill(utilities, np.zeros(5), radius, support)  # no estimate is needed
            assert sorted(q) == [0, 0, 0, 0, 1]
            assert utilities[q == 1] == utilities[support].max()


def test_balls_are_filled_row_by_row() -> None:
    rng = np.random.default_rng(1)
    utilities, p, radius, support = (np.array(rows) for rows in zip(*(ball(rng, 4) for _ in range(6)), strict=True))
    found = water_fill(utilities.reshape(2, 3, 4), p.reshape(2, 3, 4), radius.reshape(2, 3), support.reshape(2, 3, 4))
    for i, row in enumerate(found.reshape(6, 4)):
        assert (row == water_fill(utilities[i], p[i], radius[i], support[i])).all()
    assert (water_fill(utilities, p, 0.5, support)[2] == water_fill(utilities[2], p[2], 0.5, support[2])).all()


@pytest.mark.parametrize(
    ("p", "radius", "support", "message"),
    [
        ([0.5, 0.5], -0.1, [True, True], "radius must be >= 0, got -0.1"),
        ([0.5, 0.5], np.nan, [True, True], "radius must be >= 0, got nan"),
        ([0.5, 0.5], 0.1, [False, False], "support must hold a slot"),
        ([0.5, 0.5], 0.1, [True, False], "estimates must have no mass outside the support"),
        ([0.5, 0.5], 2.0, [True, False], "estimates must have no mass outside the support"),
        ([0.5, 0.6], 0.1, [True, True], "estimates must be probabilities that sum to 1"),
        ([-0.5, 1.5], 0.1, [True, True], "estimates must be probabilities"),
        ([np.nan, 1.0], 0.1, [True, True], "estimates must be probabilities"),
    ],
)
def test_balls_that_are_none_are_refused(p: list[float], radius: float, support: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        water_fill([1.0, 2.0], p, radius, support)


def problem(seed: int, radii: np.ndarray | float | None = None) -> tuple[TabularMDP, Beliefs, np.ndarray]:
    """A random world, beliefs that hold the truth, and allowed pairs."""
    rng = np.random.default_rng(seed + 99)
    mdp, outcomes = random_world(seed)
    estimates = np.where(outcomes.candidates, mdp.probabilities, 0)
    if radii is None:
        radii = rng.choice([0.0, 2.0, 0.1, 0.7], size=outcomes.valid.shape)
    allowed = outcomes.valid & (rng.random(outcomes.valid.shape) < 0.9)
    return mdp, Beliefs(outcomes, estimates, np.broadcast_to(radii, outcomes.valid.shape), outcomes.candidates), allowed


def naive(
    beliefs: Beliefs,
    values: np.ndarray,
    allowed: np.ndarray,
    optimistic: bool,
    paid: np.ndarray | None,
    restart: bool,
    gamma: float,
) -> np.ndarray:
    """One backup, pair by pair and slot by slot."""
    known, found = beliefs.outcomes, np.full(allowed.shape, -np.inf)
    again = float(np.asarray(known.start) @ values) if restart else 0.0
    for s, a in np.argwhere(allowed):
        worth = np.zeros(known.n_slots)
        for k in np.flatnonzero(beliefs.support[s, a]):
            ahead = values[known.successors[s, a, k]]
            if known.terminal[s, a, k]:
                ahead = 0.0 if known.dangerous[s, a, k] else again
            worth[k] = gamma * ahead + (known.rewards[s, a, k] if paid is None else 0)
        law = water_fill(worth, beliefs.estimates[s, a], beliefs.radii[s, a], beliefs.support[s, a], optimistic)
        found[s, a] = law @ worth + (0 if paid is None else paid[s, a])
    return found


@pytest.mark.parametrize("optimistic", [True, False])
@pytest.mark.parametrize(("override", "restart", "gamma"), [(False, False, None), (True, True, 0.8), (False, True, 0.6)])
def test_plans_are_fixed_points_of_the_naive_backup(
    optimistic: bool, override: bool, restart: bool, gamma: float | None
) -> None:
    """The operator contracts, so its fixed point is unique: whatever finds it is right."""
    for seed in range(40):
        _, beliefs, allowed = problem(seed)
        paid = np.random.default_rng(seed).normal(size=allowed.shape).round(1) if override else None
        plan = optimise(
            beliefs, allowed=allowed, optimistic=optimistic, rewards=paid, restart=restart, gamma=gamma, tolerance=1e-10
        )
        discount = gamma or 0.9
        expected = naive(beliefs, plan.values, allowed, optimistic, paid, restart, discount)
        np.testing.assert_allclose(plan.action_values, expected, atol=1e-9)
        acting = allowed.any(1)
        np.testing.assert_allclose(plan.values[acting], expected[acting].max(1), atol=1e-9)
        worst = paid[allowed].min(initial=0) if paid is not None else beliefs.outcomes.rewards[beliefs.support].min(initial=0)
        np.testing.assert_allclose(plan.values[~acting], min(0, worst) / (1 - discount))
        assert plan.error <= 1e-10
        assert (plan.policy == np.where(acting, plan.action_values.argmax(1), -1)).all()


def test_the_error_bounds_the_distance_to_the_fixed_point() -> None:
    for seed in range(30):
        for optimistic in (True, False):
            _, beliefs, allowed = problem(seed)
            exact = optimise(beliefs, allowed=allowed, optimistic=optimistic, tolerance=1e-12)
            rough = optimise(beliefs, allowed=allowed, optimistic=optimistic, tolerance=0.5)
            assert np.abs(rough.values - exact.values).max() <= rough.error + 1e-12
            assert rough.error <= 0.5
            assert rough.sweeps <= exact.sweeps


def test_certainty_gives_the_exact_optimum_and_exact_values_of_policies() -> None:
    for seed in range(20):
        mdp, beliefs, _ = problem(seed, 0.0)
        if not beliefs.outcomes.valid.all():
            continue
        values, policy = mdp.solve()
        for optimistic in (True, False):
            np.testing.assert_allclose(
                optimise(beliefs, allowed=np.ones((5, 2), dtype=bool), optimistic=optimistic, tolerance=1e-10).values,
                values,
                atol=1e-9,
            )
            np.testing.assert_allclose(evaluate(beliefs, policy, optimistic, tolerance=1e-10).values, values, atol=1e-9)
            other = 1 - policy
            np.testing.assert_allclose(
                evaluate(beliefs, other, optimistic, tolerance=1e-10).values, mdp.evaluate(other), atol=1e-9
            )


def test_total_ignorance_is_the_best_and_worst_of_all_deterministic_laws() -> None:
    """Radius 2: every slot of every pair may be certain; by brute force over all choices of one slot per pair."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        successors, terminal = rng.integers(3, size=(3, 1, 2)), rng.random((3, 1, 2)) < 0.3
        outcomes = Outcomes(
            successors.astype(np.int32), np.ones((3, 1, 2), dtype=bool), rng.normal(size=(3, 1, 2)), np.zeros((3, 1, 2), dtype=bool),
            terminal, 0.9,
        )  # fmt: skip
        beliefs = Beliefs(outcomes, np.zeros((3, 1, 2)), np.full((3, 1), 2.0), outcomes.candidates)
        everything = []
        for slots in itertools.product(range(2), repeat=3):
            law = np.eye(2)[list(slots)][:, None, :]
            everything.append(TabularMDP(successors, law, outcomes.rewards, terminal, 0.9).evaluate(np.zeros(3, dtype=int)))
        policy = np.zeros(3, dtype=int)
        np.testing.assert_allclose(evaluate(beliefs, policy, True, tolerance=1e-10).values, np.max(everything, 0), atol=1e-9)
        np.testing.assert_allclose(evaluate(beliefs, policy, False, tolerance=1e-10).values, np.min(everything, 0), atol=1e-9)


def test_values_are_ordered_and_move_apart_as_the_radius_grows() -> None:
    for seed in range(12):
        mdp, _, allowed = problem(seed)
        above, below = -np.inf, np.inf
        for radius in (0.0, 0.05, 0.3, 1.0, 2.0):
            beliefs = problem(seed, radius)[1]
            high, low = (optimise(beliefs, allowed=allowed, optimistic=way, tolerance=1e-10).values for way in (True, False))
            assert (high >= above - 1e-9).all()
            assert (low <= below + 1e-9).all()
            assert (high >= low - 1e-9).all()
            above, below = high, low
        policy = optimise(beliefs, allowed=allowed).policy
        if allowed.any(1).all():
            bounds = [evaluate(problem(seed, 0.3)[1], policy, way, tolerance=1e-10).values for way in (False, True)]
            truth = mdp.evaluate(policy)  # the truth is in the ball
            assert (bounds[0] <= truth + 1e-9).all()
            assert (bounds[1] >= truth - 1e-9).all()


def test_the_kernel_is_the_law_that_the_values_are_made_of() -> None:
    for seed in range(30):
        for optimistic in (True, False):
            _, beliefs, allowed = problem(seed)
            plan = optimise(beliefs, allowed=allowed, optimistic=optimistic, tolerance=1e-11)
            law = plan.kernel(plan.policy)
            known = beliefs.outcomes
            for s, a in enumerate(plan.policy):
                if a < 0:
                    assert not law[s].any()
                    continue
                ahead = np.where(known.terminal[s, a], 0, plan.values[known.successors[s, a]])
                assert law[s] @ (known.rewards[s, a] + 0.9 * ahead) == pytest.approx(plan.values[s], abs=1e-9)
                assert not law[s][~beliefs.support[s, a]].any()
                if beliefs.radii[s, a] == 0:
                    assert (law[s] == beliefs.estimates[s, a]).all()  # no outcome appears or vanishes by rounding


def test_plans_may_be_continued_and_begin_anywhere() -> None:
    mdp, outcomes, home = islands()
    estimates = np.where(outcomes.candidates, mdp.probabilities, 0)
    beliefs = Beliefs(outcomes, estimates, np.where(home, 0.2, 2.0), outcomes.candidates)
    cold = optimise(beliefs, allowed=outcomes.valid)
    warm = optimise(beliefs, allowed=outcomes.valid, initial=cold.values)
    assert warm.sweeps == 1
    far = optimise(beliefs, allowed=outcomes.valid, initial=np.random.default_rng(0).normal(size=outcomes.n_states) * 100)
    np.testing.assert_allclose(far.values, cold.values, atol=2e-6)
    again = optimise(beliefs, allowed=outcomes.valid, initial=cold.values)
    assert (again.action_values == warm.action_values).all()  # what was planned with is not changed by planning


def test_an_end_that_leads_to_the_start_makes_its_reward_worth_repeating() -> None:
    """One state, one action, pays 1 and ends: worth 1, or 1 / (1 - gamma) with restarts; a dangerous end is the end."""
    everywhere = np.ones((1, 1, 1), dtype=bool)
    for dangerous, expected in ((False, 10.0), (True, 1.0)):
        outcomes = Outcomes(
            np.zeros((1, 1, 1), dtype=np.int32), everywhere, np.ones((1, 1, 1)), everywhere & dangerous, everywhere, 0.9
        )
        beliefs = Beliefs(outcomes, np.ones((1, 1, 1)), np.zeros((1, 1)), everywhere)
        assert optimise(beliefs, allowed=everywhere[0]).values == pytest.approx([1.0])
        assert optimise(beliefs, allowed=everywhere[0], restart=True).values == pytest.approx([expected], abs=1e-5)


def test_a_restart_leads_to_all_first_states_in_proportion() -> None:
    """Both states end at once; state 0 pays 1, state 1 pays 3: the mean first state pays 2.5 for ever after."""
    ends = np.ones((2, 1, 1), dtype=bool)
    rewards = np.array([1.0, 3.0]).reshape(2, 1, 1)
    outcomes = Outcomes(np.zeros((2, 1, 1), dtype=np.int32), ends, rewards, ~ends, ends, 0.9, np.array([0.25, 0.75]))
    beliefs = Beliefs(outcomes, np.ones((2, 1, 1)), np.zeros((2, 1)), ends)
    found = optimise(beliefs, allowed=ends[..., 0], restart=True, tolerance=1e-10).values
    assert found == pytest.approx([1 + 9 * 2.5, 3 + 9 * 2.5])


def test_planning_ends_where_rounding_hides_the_tolerance() -> None:
    """Values near 1e11 are known to 1e-5 at best."""
    mdp, _, _ = problem(5, 0.0)
    outcomes = Outcomes(
        mdp.successors.astype(np.int32), mdp.probabilities > 0, mdp.rewards * 1e9 + 3e9, np.zeros(mdp.rewards.shape, dtype=bool),
        np.zeros(mdp.rewards.shape, dtype=bool), 0.99,
    )  # fmt: skip
    beliefs = Beliefs(outcomes, mdp.probabilities, np.full((5, 2), 0.1), outcomes.candidates)
    plan = optimise(beliefs, allowed=np.ones((5, 2), dtype=bool))
    assert np.abs(plan.values).max() > 1e11
    assert plan.error < 1e-10 * np.abs(plan.values).max()


def test_utilities_are_numbers() -> None:
    with pytest.raises(ValueError, match="utilities must be finite"):
        water_fill([1.0, np.nan], [0.5, 0.5], 0.1, [True, True])


def test_no_action_is_invented_where_none_is_allowed() -> None:
    mdp, beliefs, _ = problem(3, 0.0)
    nothing = np.zeros((5, 2), dtype=bool)
    plan = optimise(beliefs, allowed=nothing)
    assert (plan.policy == -1).all()
    assert np.isneginf(plan.action_values).all()
    assert plan.values == pytest.approx(np.full(5, 10 * min(0.0, mdp.rewards[beliefs.support].min())))
    assert not plan.kernel(plan.policy).any()


def test_nonsense_is_refused() -> None:
    _, beliefs, allowed = problem(0, 0.0)
    known, ones = beliefs.outcomes, np.ones((5, 2))
    calls: dict[str, Any] = {
        "allowed must be boolean": lambda: optimise(beliefs, allowed=ones),
        r"gamma must be in \(0, 1\), got 1": lambda: optimise(beliefs, allowed=allowed, gamma=1.0),
        "gamma must be a finite real number": lambda: optimise(beliefs, allowed=allowed, gamma=float("nan")),
        "tolerance must be a finite number > 0": lambda: optimise(beliefs, allowed=allowed, tolerance=0),
        r"rewards must have shape \(5, 2\)": lambda: optimise(beliefs, allowed=allowed, rewards=np.ones(5)),
        r"initial must have shape \(5,\)": lambda: optimise(beliefs, allowed=allowed, initial=np.ones(4)),
        "initial must be finite": lambda: optimise(beliefs, allowed=allowed, initial=np.full(5, np.nan)),
        "policy must be an action 0 to 1 per state": lambda: evaluate(beliefs, np.full(5, 2)),
        "estimates and radii must have shapes": lambda: Beliefs(known, beliefs.estimates, np.zeros(5), beliefs.support),
        "support must be boolean": lambda: Beliefs(known, beliefs.estimates, ones * 0, ones),
        "estimates must be probabilities that sum to 1": lambda: Beliefs(known, beliefs.estimates * 0, ones, beliefs.support),
        "radius must be >= 0": lambda: Beliefs(known, beliefs.estimates, -ones, beliefs.support),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    without = beliefs.support & (np.arange(5) != 2)[:, None, None]
    partial = Beliefs(known, np.where(without, beliefs.estimates, 0), ones * 0, without)
    with pytest.raises(ValueError, match="allowed must hold pairs with a support"):
        optimise(partial, allowed=known.valid)
    with pytest.raises(ValueError, match="policy must choose pairs that exist, state 2 has no action 0"):
        evaluate(partial, np.where(np.arange(5) == 2, 0, -1))
