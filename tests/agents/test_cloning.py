"""BehaviourCloning: SB3's `predict`, features blind to labels, and certificates that hold for retrained agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from robustrl.agents.cloning import BehaviourCloning, FourierFeatures
from robustrl.certify.labels import label_flip_certificate

BOX = spaces.Box(-10, 10, (4,), np.float64)


def demonstrations(n: int = 400, n_actions: int = 2, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(n, 4)).astype(np.float32)
    return observations, (observations @ np.eye(4, n_actions)).argmax(1)


def cloned(n_actions: int = 2, **options: Any) -> BehaviourCloning:
    return BehaviourCloning(BOX, spaces.Discrete(n_actions), **options).learn(*demonstrations(n_actions=n_actions))


@pytest.mark.parametrize(("n_actions", "q"), [(2, 0.0), (4, 0.0), (2, 0.2), (3, 0.1)])
def test_it_imitates(n_actions: int, q: float) -> None:
    observations, actions = demonstrations(120, n_actions, seed=1)
    assert np.mean(cloned(n_actions, q=q).predict(observations)[0] == actions) > 0.9


def test_it_plays_cartpole_in_evaluate_policy() -> None:
    env, rng = gym.make("CartPole-v1"), np.random.default_rng(0)
    observations = rng.uniform(-1, 1, size=(1000, 4)) * [1.0, 1.0, 0.2, 2.0]
    expert = (observations @ [0.1, 0.3, 3.0, 1.0] > 0) * 1
    agent = BehaviourCloning(env.observation_space, env.action_space).learn(observations, expert)
    mean, _ = evaluate_policy(agent, make_vec_env("CartPole-v1", 4, seed=0), 8)  # type: ignore[arg-type]
    assert mean > 300
    action, state = agent.predict(env.reset(seed=0)[0], None, None, True)
    assert env.action_space.contains(action)
    assert state is None


@pytest.mark.parametrize(
    ("n_actions", "q", "method"), [(2, 0.0, None), (4, 0.0, None), (2, 0.2, None), (3, 0.1, None), (2, 0.2, "kl")]
)
def test_agents_retrained_on_poisoned_labels_act_the_same_within_the_radius(n_actions: int, q: float, method: Any) -> None:
    observations, actions = demonstrations(n_actions=n_actions)
    states = demonstrations(40, seed=2)[0]
    agent, rng = cloned(n_actions, q=q), np.random.default_rng(3)
    result = agent.certify(states, method)
    weights = agent._ballot(states)[1]
    changes = 0
    for i, (action, radius) in enumerate(zip(result.prediction, result.radius, strict=True)):
        order = np.argsort(-weights[i] * (2 * (actions == action) - 1), kind="stable")
        rival = int(rng.choice(np.setdiff1d(np.arange(n_actions), action)))
        for flips in {int(radius), min(4 * int(radius) + 8, 400)}:
            poisoned = actions.copy()
            for k in order[:flips]:  # the largest votes for the action, and for others if they are negative
                poisoned[k] = rival if weights[i, k] > 0 else action
            again = BehaviourCloning(BOX, spaces.Discrete(n_actions), q=q).learn(observations, poisoned)
            executed = again.predict(states[i])[0]
            changes += executed != action
            assert flips > radius or executed == action
        assert agent.predict(states[i])[0] == action
    assert changes > 10
    assert np.median(result.radius) >= 1


def test_an_episode_is_certified_by_its_weakest_step() -> None:
    agent, states = cloned(), demonstrations(50, seed=4)[0]
    radii = agent.radius(states)
    assert radii.shape == (50,)
    assert agent.certify_trajectory(states) == radii.min()
    assert agent.certify_trajectory(states[radii > 3]) == radii[radii > 3].min() > 3
    assert agent.radius(states[7]) == radii[7]
    assert np.shape(agent.radius(states[7])) == ()
    assert agent.certify_trajectory(states[7]) == radii[7]


def test_what_votes_is_blind_to_the_labels() -> None:
    observations, actions = demonstrations()
    one = BehaviourCloning(BOX, spaces.Discrete(2)).learn(observations, actions)
    other = BehaviourCloning(BOX, spaces.Discrete(2)).learn(observations, np.random.default_rng(0).permutation(actions))
    states = demonstrations(70, seed=5)[0]
    assert np.array_equal(one._ballot(states)[1], other._ballot(states)[1])
    assert one._weights is not None
    assert other._weights is not None
    assert one._weights.ridge == other._weights.ridge
    assert not np.array_equal(one.predict(states)[0], other.predict(states)[0])


def test_one_state_or_a_batch_of_them_gives_the_same_votes() -> None:
    agent, states = cloned(levels=2**50), demonstrations(45, seed=6)[0]
    together = agent._ballot(states)[1]
    for i in range(45):
        assert np.array_equal(agent._ballot(states[i])[1], together[i : i + 1])


def test_features_of_the_user_s_own_may_be_a_function_or_a_network() -> None:
    observations, actions = demonstrations()
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.ReLU())
    for features in (lambda x: np.hstack([x, np.ones((len(x), 1))]), network):
        agent = BehaviourCloning(BOX, spaces.Discrete(2), features=features).learn(observations, actions)
        states, expected = demonstrations(100, seed=7)
        assert np.mean(agent.predict(states)[0] == expected) > 0.85
        assert np.array_equal(agent.predict(states)[0], agent.predict(states)[0])  # no dropout
    with pytest.raises(ValueError, match="features\\(observations\\)"):
        BehaviourCloning(BOX, spaces.Discrete(2), features=lambda x: x * np.nan).learn(observations, actions)


def test_actions_may_start_anywhere_and_observations_have_any_shape() -> None:
    space, actions = spaces.Box(0, 255, (3, 2, 2), np.uint8), spaces.Discrete(3, start=5)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, size=(200, 3, 2, 2), dtype=np.uint8), rng.integers(5, 8, size=200)
    agent = BehaviourCloning(space, actions, length_scale=0.5, ridge=0.01).learn(images, labels)
    assert np.mean(agent.predict(images)[0] == labels) > 0.9
    assert set(agent.certify(images).prediction) == {5, 6, 7}


def test_fourier_features_are_a_kernel_of_standardised_observations() -> None:
    observations = np.random.default_rng(0).normal(size=(300, 3)) * [1, 10, 0] + 5
    features = FourierFeatures.of(observations, 20_000, length_scale=1.5, seed=1)
    x, y = features(observations[:2])
    distance = (observations[0] - observations[1]) / [*observations.std(0)[:2], 1]
    assert x @ y == pytest.approx(np.exp(-(distance @ distance) / (2 * 3 * 1.5**2)), abs=0.02)
    assert x @ x == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("q", [0.0, 0.2])
def test_a_saved_agent_is_the_same_agent(tmp_path: Path, q: float) -> None:
    agent, states = cloned(3, q=q), demonstrations(50, seed=8)[0]
    agent.save(tmp_path / "agent.npz")
    again = BehaviourCloning.load(tmp_path / "agent.npz")
    assert np.array_equal(again._ballot(states)[1], agent._ballot(states)[1])
    assert np.array_equal(again.radius(states), agent.radius(states))
    assert (again.q, again.ridge, again.levels) == (agent.q, agent.ridge, agent.levels)
    assert again.observation_space == agent.observation_space
    assert again.action_space == agent.action_space
    assert [path.name for path in tmp_path.iterdir()] == ["agent.npz"]


def test_features_of_the_user_s_own_are_asked_for_again(tmp_path: Path) -> None:
    agent = cloned(features=lambda x: np.asarray(x))
    agent.save(tmp_path / "agent.npz")
    with pytest.raises(ValueError, match="pass features="):
        BehaviourCloning.load(tmp_path / "agent.npz")
    states = demonstrations(50, seed=8)[0]
    again = BehaviourCloning.load(tmp_path / "agent.npz", features=lambda x: np.asarray(x))
    assert np.array_equal(again.radius(states), agent.radius(states))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.npz"
    with pytest.raises(FileNotFoundError):
        BehaviourCloning.load(path)
    cloned().save(path)
    data = dict(np.load(path))
    for changes in (
        {"format": 2},
        {"labels": data["labels"][:-1]},
        {"labels": data["labels"] + 1},
        {"features": data["features"] * np.nan},
        {"q": 0.7},
        {"actions": np.array([object()], dtype=object)},
    ):
        np.savez(path, **{**data, **changes})
        with pytest.raises(ValueError, match="agent.npz cannot be loaded"):
            BehaviourCloning.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="agent.npz cannot be loaded"):
        BehaviourCloning.load(path)


def test_a_certificate_is_recomputed_from_its_evidence() -> None:
    agent, state = cloned(), demonstrations(1, seed=9)[0][0]
    evidence = json.loads(json.dumps(agent.evidence(state)))
    assert label_flip_certificate(evidence) == (agent.predict(state)[0], agent.radius(state), False)
    with pytest.raises(ValueError, match="single"):
        agent.evidence(np.zeros((2, 4)))


def test_bad_input_is_refused() -> None:
    observations, actions = demonstrations()
    with pytest.raises(TypeError, match="action_space"):
        BehaviourCloning(BOX, BOX)
    with pytest.raises(TypeError, match="observation_space"):
        BehaviourCloning(spaces.Dict({"a": BOX}), spaces.Discrete(2))
    with pytest.raises(TypeError, match="features"):
        BehaviourCloning(BOX, spaces.Discrete(2), features=3)  # type: ignore[arg-type]
    for name, value in {"q": 0.5, "ridge": 0.0, "levels": 0, "n_features": 0, "length_scale": -1.0, "seed": -1}.items():
        with pytest.raises(ValueError, match=name):
            BehaviourCloning(BOX, spaces.Discrete(2), **{name: value})  # type: ignore[arg-type]
    agent = BehaviourCloning(BOX, spaces.Discrete(2))
    with pytest.raises(RuntimeError, match="learn"):
        agent.predict(observations)
    for bad in (actions[:-1], actions + 1, actions + 0.5, actions * np.nan):
        with pytest.raises(ValueError, match="actions"):
            agent.learn(observations, bad)
    for bad in (observations[:, :3], observations * np.nan, observations[0]):
        with pytest.raises(ValueError, match="observations"):
            agent.learn(bad, actions)
    agent.learn(observations, actions)
    for bad in (observations[0, :3], observations[:, :2], np.full(4, np.nan), 0.0):
        with pytest.raises(ValueError, match="observations"):
            agent.predict(bad)
