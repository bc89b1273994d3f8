"""Estimates of robustness by bounds: closed forms for linear policies, and what they promise at radius zero."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from torch import nn

import robustrl as rrl
from robustrl.policy import PolicyView
from robustrl.rollouts.engines import make_engine
from robustrl.seeding import chunk_seeds
from robustrl.training.robust import Neighbourhood, estimate_certified_actions, estimate_greedy_worst_case
from robustrl.training.robust.metrics import possible_actions


def linear() -> PolicyView:
    """Three actions; the margin between the first two is x[0] - x[1] and the third never is the best."""
    network = nn.Linear(2, 3)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        network.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))
    return PolicyView.from_torch(network, kind="q", observation_shape=(2,))


def around(radius: float) -> Neighbourhood:
    return Neighbourhood(math.inf, radius, torch.ones(2))


def test_an_action_is_certified_where_its_margin_is_larger_than_twice_the_radius() -> None:
    x = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.3], [0.0, 0.1]])
    for radius, share in ((0.01, 1.0), (0.1, 0.75), (0.2, 0.5), (0.3, 0.25), (0.6, 0.0)):
        assert estimate_certified_actions(linear(), x, around(radius)) == share
    possible = possible_actions(linear(), x, around(0.2))
    assert possible.tolist() == [[True, False, False], [True, False, False], [True, True, False], [True, True, False]]


def test_the_estimate_needs_discrete_actions_and_observations() -> None:
    with pytest.raises(ValueError, match="observations must hold at least one"):
        estimate_certified_actions(linear(), torch.zeros(0, 2), around(0.1))
    space = spaces.Box(-1, 1, (3,), np.float32)
    continuous = PolicyView.from_torch(nn.Linear(2, 3), kind="deterministic", observation_shape=(2,), action_space=space)
    with pytest.raises(ValueError, match="policy must have discrete actions"):
        estimate_certified_actions(continuous, torch.zeros(1, 2), around(0.1))


def balancing() -> PolicyView:
    """A linear CartPole controller that holds the pole for a whole episode."""
    network = nn.Linear(4, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 2.0, 1.0]]))
        network.bias.zero_()
    return PolicyView.from_torch(network, kind="logits", observation_shape=(4,))


def estimate(policy: Any, step: float, **options: Any) -> Any:
    env = rrl.EnvRecipe.of("CartPole-v1", max_episode_steps=60)
    return estimate_greedy_worst_case(policy, env, rrl.ThreatModel(norm=math.inf, step=step), 6, **options)


def test_the_greedy_worst_case_is_the_clean_return_at_radius_zero_and_falls_with_the_radius() -> None:
    clean, near, far = (estimate(balancing(), step).mean() for step in (0.0, 0.02, 1.0))
    assert clean == 60
    assert clean >= near > far
    assert far < 15  # every action is possible: always the worse one


def test_every_episode_gets_its_own_return() -> None:
    """Always to the right, without an attacker: each as Gymnasium plays it from the same seed."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 1.0]))
    found = estimate(PolicyView.from_torch(layer, kind="logits", observation_shape=(4,)), 0.0, seed=3, engine="list")
    expected = []
    _, seeds = make_engine(rrl.EnvRecipe.of("CartPole-v1"), "list").start(6, chunk_seeds(3, 0).environment)
    for seed in seeds:
        env = gym.make("CartPole-v1")
        env.reset(seed=int(seed))
        steps = 1
        while not env.step(1)[2]:
            steps += 1
        expected.append(steps)
    assert len(set(expected)) > 1
    assert found.tolist() == expected


def test_episodes_are_those_of_their_seed() -> None:
    first, again, other = (estimate(balancing(), 0.3, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (6,)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_models_of_sb3_are_taken_with_their_frame_stack() -> None:
    env = rrl.EnvRecipe.of("CartPole-v1", max_episode_steps=30, frame_stack=2)
    model = PPO("MlpPolicy", rrl.make_vec_env(env, 1), seed=0, device="cpu", n_steps=8)
    threat = rrl.ThreatModel(norm=math.inf, step=0.05)
    assert estimate_greedy_worst_case(model, env, threat, 2).shape == (2,)
    with pytest.raises(ValueError, match="threat must be of norm inf for a policy that stacks 2 frames"):
        estimate_greedy_worst_case(model, env, rrl.ThreatModel(norm=2, step=0.05), 2)


def test_noise_and_budgets_of_whole_episodes_are_refused() -> None:
    noisy = rrl.EnvRecipe.of("CartPole-v1", noise=rrl.Gaussian(0.1))
    model = DQN("MlpPolicy", rrl.make_vec_env("CartPole-v1", 1), device="cpu", buffer_size=10)
    with pytest.raises(ValueError, match="env must have no noise"):
        estimate_greedy_worst_case(model, noisy, rrl.ThreatModel(norm=2, step=0.1))
    with pytest.raises(ValueError, match="epsilon must be a radius per step"):
        estimate_greedy_worst_case(model, "CartPole-v1", rrl.ThreatModel(norm=2, episode=0.1))
