"""What every grid world declares of itself is true, and playing it is drawing from the MDP that it declares as the truth."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import chisquare
from stable_baselines3.common.env_checker import check_env as check_sb3_env

from robustrl.envs.grid import LavaIslands, TabularEnv, TextGrid, maps
from robustrl.mdp import TabularMDP
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.outcomes import Outcomes
from robustrl.mdp.safe_sets import learnable_oracle, validate_analogy, validate_safe_set
from robustrl.registration import GRID_WORLDS

LAVA, PLATFORMER, TEXT = (f"robustrl/{name}-v0" for name in ("LavaIslands", "DiscretePlatformer", "TextGrid"))

WORLDS: list[tuple[str, dict[str, Any]]] = [
    (LAVA, {"map": "two_islands"}),
    (LAVA, {"map": "river"}),
    (LAVA, {"map": "river", "slip": 0.0}),
    (LAVA, {"map": "five_islands"}),
    (PLATFORMER, {"level": "cliffs"}),
    (TEXT, {"map": "rooms"}),
    (TEXT, {"map": "small_rooms"}),
    (TEXT, {"map": "small_rooms", "slide": 1.0}),
    (LAVA, {"map": "archipelago"}),
]

worlds = pytest.mark.parametrize(("env_id", "kwargs"), WORLDS, ids=lambda value: str(value).replace("robustrl/", ""))


def make(env_id: str, kwargs: dict[str, Any], **more: Any) -> TabularEnv:
    env = gym.make(env_id, **kwargs, **more).unwrapped
    assert isinstance(env, TabularEnv)
    return env


def support(env: TabularEnv) -> np.ndarray:
    return (env.mdp.probabilities > 0) & env.outcomes.valid[..., None]


def test_every_shipped_map_is_tested() -> None:
    assert {name for _, kwargs in WORLDS for key, name in kwargs.items() if key in ("map", "level")} == set(maps.names())


@pytest.mark.parametrize("env_id", GRID_WORLDS)
def test_registered_ids_play_their_shipped_map_and_stop_at_their_horizon(env_id: str) -> None:
    env = gym.make(env_id)
    env.reset(seed=0)
    stays = int(np.flatnonzero(env.unwrapped.safe_set[env.unwrapped.state])[0])  # type: ignore[attr-defined]
    for i in range(1, 501):
        state, _, terminated, truncated, _ = env.step(stays)
        assert (terminated, truncated) == (False, i == 500)
        stays = int(np.flatnonzero(env.unwrapped.safe_set[state])[0])  # type: ignore[attr-defined]


@worlds
def test_checkers_of_gymnasium_and_sb3_are_silent(env_id: str, kwargs: dict[str, Any]) -> None:
    env = make(env_id, kwargs, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=kwargs.get("map") == "archipelago")
        check_sb3_env(env, warn=True, skip_render_check=False)


@worlds
def test_truth_lies_within_what_is_declared(env_id: str, kwargs: dict[str, Any]) -> None:
    env = make(env_id, kwargs)
    fires, outcomes = support(env), env.outcomes
    assert not (fires & ~outcomes.candidates).any()
    for name in ("successors", "rewards", "terminal"):
        np.testing.assert_array_equal(getattr(env.mdp, name)[fires], getattr(outcomes, name)[fires])
    assert env.tau == env.mdp.probabilities[fires].min()
    assert (outcomes.dangerous <= outcomes.terminal).all()
    np.testing.assert_array_equal(outcomes.dangerous, outcomes.candidates & (outcomes.rewards == -1))
    assert validate_analogy(env.mdp, outcomes, env.analogy).holds
    np.testing.assert_array_equal(
        validate_safe_set(env.mdp, outcomes, env.safe_set, on_invalid="raise"), env.safe_set
    )  # raises where it leaks


@worlds
def test_safe_set_is_never_left_and_every_start_is_in_it(env_id: str, kwargs: dict[str, Any]) -> None:
    env = make(env_id, kwargs)
    home = set(np.flatnonzero(env.safe_set.any(1)).tolist())
    assert set(np.flatnonzero(env.mdp.start)) <= home  # type: ignore[arg-type]
    for state, action, slot in np.argwhere(support(env) & env.safe_set[..., None]).tolist():
        where = state, action, slot
        assert not env.outcomes.dangerous[where]
        assert env.outcomes.terminal[where] or int(env.outcomes.successors[where]) in home


@worlds
def test_analogues_have_the_same_slots_and_probabilities(env_id: str, kwargs: dict[str, Any]) -> None:
    env = make(env_id, kwargs)
    rows = env.mdp.probabilities.reshape(-1, env.outcomes.n_slots)
    exists = env.outcomes.valid.ravel()
    analogy = env.analogy.on(env.outcomes)
    pairs = np.flatnonzero(exists)
    pairs = np.random.default_rng(0).choice(pairs, min(600, pairs.size), replace=False)
    compared = 0
    for pair in pairs.tolist():
        members = analogy.members(int(analogy.pool_of[pair]))
        members = members[exists[members]]
        assert pair in members
        assert (rows[members] == rows[pair]).all()
        compared += len(members) - 1
    assert compared > len(pairs)


@worlds
def test_goal_can_be_learnt_with_the_analogy_and_not_without(env_id: str, kwargs: dict[str, Any]) -> None:
    env = make(env_id, kwargs)
    wins = (support(env) & (env.outcomes.rewards == 1)).any(-1)
    learnt = learnable_oracle(env.mdp, env.outcomes, env.safe_set, env.analogy, env.tau)
    assert (wins & learnt).any()
    assert not (wins & learnable_oracle(env.mdp, env.outcomes, env.safe_set, Analogy.none(), env.tau)).any()


@worlds
def test_frequencies_of_steps_are_the_probabilities_of_the_truth(env_id: str, kwargs: dict[str, Any]) -> None:
    env, n = make(env_id, kwargs), 3000
    env.reset(seed=5)
    widest = int(support(env).sum(-1).max())
    for state, action in np.argwhere(support(env).sum(-1) == widest)[:: max(1, env.outcomes.valid.sum() // 4)].tolist():
        counts = np.zeros(env.outcomes.n_slots)
        for _ in range(n):
            env.state = state
            after, reward, terminated, truncated, info = env.step(action)
            slot = env.outcomes.slot(state, action, after, reward, terminated)
            assert info == {"cost": int(env.outcomes.dangerous[state, action, slot])}
            assert not truncated
            counts[slot] += 1
        p = env.mdp.probabilities[state, action]
        assert counts[p == 0].sum() == 0
        if widest > 1:
            assert chisquare(counts[p > 0], n * p[p > 0] / p.sum()).pvalue > 1e-4


def test_equal_seeds_play_equal_episodes_and_others_do_not() -> None:
    def play(seed: int) -> list[int]:
        env = LavaIslands()
        state, _ = env.reset(seed=seed)
        return [state, *(env.step(0)[0] for _ in range(12))]

    assert play(3) == play(3)
    assert len({tuple(play(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("drawn", [0.0, np.nextafter(1.0, 0.0)])
def test_extreme_draws_fire_slots_that_may_fire(drawn: float) -> None:
    class Extreme:
        def random(self) -> float:
            return drawn

    env = LavaIslands("river")
    env.np_random = Extreme()  # type: ignore[assignment]
    for state, action in np.argwhere(env.outcomes.valid).tolist():
        env.state = state
        end = env.step(action)[0]
        assert end in env.mdp.successors[state, action, env.mdp.probabilities[state, action] > 0]


def test_starts_are_drawn_evenly() -> None:
    env = TextGrid("wwwww\nwasgw\nwsssw\nwssaw\nwwwww")
    first, _ = env.reset(seed=0)
    drawn = [first, *(env.reset()[0] for _ in range(999))]
    states, counts = np.unique(drawn, return_counts=True)
    assert states.tolist() == [4 * 6 + 1, 4 * 18 + 1]
    assert chisquare(counts).pvalue > 1e-4


def test_cost_is_paid_by_lava_alone() -> None:
    env = LavaIslands("sasl-\nsasl-\ngssl-", slip=0.0)
    env.reset(seed=0)
    env.state = 2
    assert env.step(1) == (3, -1.0, True, False, {"cost": 1})
    env.state = 5
    assert env.step(2) == (10, 1.0, True, False, {"cost": 0})


def test_pairs_of_the_start_region_that_may_leave_it_are_not_declared_safe() -> None:
    env = TextGrid("wwwwww\nwasslw\nwwwwww")
    at_the_edge = 4 * 9 + 1  # beside the lava, looking at it
    assert env.safe_set[at_the_edge].tolist() == [True, True, False]
    assert env.safe_set.sum() == 3 * 3 * 4 - 1


def small_world(**change: Any) -> TabularEnv:
    """Two states; action 0 stays, action 1 goes to state 1, which ends the episode."""
    successors = np.array([[[0], [1]], [[1], [1]]])
    p, rewards = np.ones((2, 2, 1)), np.zeros((2, 2, 1))
    terminal = np.array([[[False], [True]], [[True], [True]]])
    candidates = np.array([[[True], [True]], [[False], [False]]])
    given = {"candidates": candidates, "declared": successors, "safe": candidates[..., 0], "render_mode": None} | change
    outcomes = Outcomes(given["declared"], given["candidates"], rewards, np.zeros_like(terminal), terminal, 0.9)
    mdp = TabularMDP(successors, p, rewards, terminal, 0.9)
    tiles = np.array([["floor", "goal"]])
    return TabularEnv(mdp, outcomes, given["safe"], Analogy.none(), tiles, np.arange(2), render_mode=given["render_mode"])


def test_any_tabular_mdp_becomes_an_environment() -> None:
    env = small_world(render_mode="ansi")
    check_env(env, skip_render_check=True)
    assert env.safe_set.tolist() == [[True, True], [False, False]]
    assert (env.tau, env.grid_shape, env.render()) == (1.0, (1, 2), "@G")
    env.reset()
    assert env.step(1) == (1, 0.0, True, False, {"cost": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"declared": np.array([[[1], [1]], [[1], [1]]])}, "outcomes must have every slot of mdp"),
        ({"safe": np.zeros((2, 2), dtype=bool)}, "safe_set must hold pairs that no step leaves"),
        ({"safe": np.ones((2, 2), dtype=bool)}, "safe_set must hold pairs that exist"),
        ({"render_mode": "human"}, "render_mode must be one of None, 'ansi', 'rgb_array'"),
    ],
)
def test_contradictory_worlds_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_world(**change)


def test_an_outcome_that_was_not_declared_is_refused() -> None:
    env = LavaIslands("river")
    state, action, slot = np.argwhere(env.mdp.probabilities > 0)[0]
    candidates = env.outcomes.candidates.copy()
    candidates[state, action, slot] = False
    declared = dataclasses.replace(env.outcomes, candidates=candidates)
    with pytest.raises(ValueError, match="outcomes must have every slot of mdp with a positive probability as a candidate"):
        TabularEnv(env.mdp, declared, env.safe_set, env.analogy, env.tiles, env.cells)


@pytest.mark.parametrize("action", [8, -1, 1.5, None])
def test_actions_that_do_not_exist_are_refused(action: Any) -> None:
    env = LavaIslands()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must be an integer from 0 to 7, got"):
        env.step(action)
