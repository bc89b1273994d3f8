"""Finite MDPs: exact values against brute force, simulation-free closed forms and Gymnasium's tables."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from robustrl.mdp import TabularMDP


def random_mdp(seed: int, n_states: int = 5, n_actions: int = 2, gamma: float = 0.9) -> TabularMDP:
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(n_states) * 0.5, (n_states, n_actions))
    return TabularMDP.dense(transitions, rng.normal(size=(n_states, n_actions)), gamma, rng.dirichlet(np.ones(n_states)))


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_the_best_of_all_deterministic_policies(seed: int) -> None:
    mdp = random_mdp(seed)
    values, policy = mdp.solve()
    everyone = np.array([mdp.evaluate(np.array(actions)) for actions in itertools.product(range(2), repeat=5)])
    np.testing.assert_allclose(values, everyone.max(0), atol=1e-12)
    np.testing.assert_allclose(mdp.evaluate(policy), values, atol=1e-12)
    np.testing.assert_allclose(mdp.action_values(values).max(1), values, atol=1e-12)  # Bellman
    assert mdp.value(values) == pytest.approx(float(np.asarray(mdp.start) @ values))


@pytest.mark.parametrize("seed", range(3))
def test_the_value_of_a_random_policy_is_the_limit_of_its_own_iteration(seed: int) -> None:
    mdp = random_mdp(seed, gamma=0.7)
    policy = np.random.default_rng(seed).dirichlet(np.ones(2), 5)
    values = np.zeros(5)
    for _ in range(200):
        values = (policy * mdp.action_values(values)).sum(1)
    np.testing.assert_allclose(mdp.evaluate(policy), values, atol=1e-12)


def test_slots_keep_rewards_of_the_same_successor_apart_and_ended_episodes_earn_nothing() -> None:
    """A loop that pays 1 and goes on with probability 1/2, pays 3 and ends with 1/4, pays 5 and goes on with 1/4: by hand."""
    mdp = TabularMDP(
        np.zeros((1, 1, 3), dtype=np.int64), np.array([[[0.5, 0.25, 0.25]]]), np.array([[[1.0, 3.0, 5.0]]]),
        np.array([[[False, True, False]]]), gamma=1.0,
    )  # fmt: skip
    assert mdp.evaluate(np.array([0])) == pytest.approx([(0.5 + 0.75 + 1.25) / 0.25])
    assert mdp.mean_rewards.tolist() == [[2.5]]
    discounted = TabularMDP(mdp.successors, mdp.probabilities, mdp.rewards, mdp.terminal, gamma=0.8)
    assert discounted.evaluate(np.array([0])) == pytest.approx([2.5 / (1 - 0.8 * 0.75)])
    assert discounted.following.tolist() == [[pytest.approx([0.4, 0.0, 0.2])]]
    several = discounted.action_values(np.array([[1.0, 10.0]]))
    assert several.tolist() == [[pytest.approx([2.5 + 0.6, 2.5 + 6.0])]]


def test_dense_rewards_may_depend_on_the_next_state() -> None:
    transitions = np.array([[[0.25, 0.75]], [[0.0, 1.0]]])
    mdp = TabularMDP.dense(transitions, np.array([[[4.0, 8.0]], [[0.0, 0.0]]]), 0.5)
    assert mdp.mean_rewards.tolist() == [[7.0], [0.0]]
    assert mdp.evaluate(np.array([0, 0])) == pytest.approx([7 / (1 - 0.125), 0.0])


def simulate(env: Any, policy: np.ndarray, episodes: int, gamma: float) -> np.ndarray:
    returns = np.zeros(episodes)
    for i in range(episodes):
        state, _ = env.reset(seed=i)
        discount, ended = 1.0, False
        while not ended:
            state, reward, ended, truncated, _ = env.step(int(policy[state]))
            returns[i] += discount * reward
            discount *= gamma
            ended = ended or truncated
    return returns


def test_gymnasium_tables_give_the_values_that_playing_gives() -> None:
    env = gym.make("FrozenLake-v1")
    mdp = TabularMDP.from_gymnasium(env, gamma=0.95)
    assert (mdp.n_states, mdp.n_actions) == (16, 4)
    values, policy = mdp.solve()
    returns = simulate(env, policy, 1500, 0.95)
    assert mdp.value(values) == pytest.approx(returns.mean(), abs=4 * returns.std() / np.sqrt(1500))
    cliff = TabularMDP.from_gymnasium(gym.make("CliffWalking-v1"), gamma=0.99)
    assert cliff.value(cliff.solve()[0]) == pytest.approx(-sum(0.99**t for t in range(13)))  # 13 steps along the cliff
    with pytest.raises(ValueError, match="env must have a table P of transitions, CartPoleEnv has none"):
        TabularMDP.from_gymnasium(gym.make("CartPole-v1"))


def test_an_episode_that_might_never_end_has_no_undiscounted_value() -> None:
    forever = TabularMDP.dense(np.ones((1, 1, 1)), np.ones((1, 1)), 1.0)
    for call in (lambda: forever.evaluate(np.array([0])), forever.solve):
        with pytest.raises(ValueError, match="gamma must be < 1"):
            call()


GOOD: dict[str, Any] = {
    "successors": np.zeros((2, 1, 2), dtype=np.int64), "probabilities": np.full((2, 1, 2), 0.5), "rewards": np.zeros((2, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.full((2, 1, 2), 0.6)}, "probabilities of every state and action must sum to 1, got 1.2"),
        ({"probabilities": np.array([[[1.5, -0.5]]] * 2)}, r"probabilities must lie in \[0, 1\]"),
        ({"probabilities": np.full((2, 1, 3), 1 / 3)}, r"must have one shape \(S, A, K\)"),
        ({"rewards": np.full((2, 1, 2), np.nan)}, "rewards must be finite"),
        ({"successors": np.full((2, 1, 2), 2)}, "successors must be states 0 to 1, got 2 to 2"),
        ({"successors": np.full((2, 1, 2), -1)}, "successors must be states 0 to 1, got -1"),
        ({"successors": np.zeros((2, 1, 2))}, "successors must be states"),
        ({"terminal": np.zeros((2, 1, 2))}, "terminal must be boolean"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\]"),
        ({"gamma": 1.1}, r"gamma must be in \(0, 1\]"),
        ({"start": np.array([0.5, 0.6])}, "start must sum to 1"),
        ({"start": np.array([1.0])}, r"start must have shape \(2,\)"),
    ],
)
def test_bad_models_are_refused(change: dict[str, Any], message: str) -> None:
    TabularMDP(**GOOD)
    with pytest.raises(ValueError, match=message):
        TabularMDP(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (np.array([0, 2, 0, 0, 0]), "policy must name actions 0 to 1, got 0 to 2"),
        (np.full((5, 2), 0.6), "policy must sum to 1"),
        (np.full((4, 2), 0.5), r"policy must have shape \(5, 2\)"),
        (np.full(5, 0.5), "policy must have shape"),
    ],
)
def test_bad_policies_are_refused(policy: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_mdp(0).evaluate(policy)


@pytest.mark.parametrize(
    ("transitions", "rewards", "message"),
    [
        (np.ones((2, 1, 1)), np.zeros((2, 1)), r"transitions must have shape \(S, A, S\)"),
        (np.full((2, 1, 2), 0.5), np.zeros((2, 2)), r"rewards must have shape \(2, 1\) or \(2, 1, 2\)"),
    ],
)
def test_bad_tables_are_refused(transitions: np.ndarray, rewards: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularMDP.dense(transitions, rewards)
