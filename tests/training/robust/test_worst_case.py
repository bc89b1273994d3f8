"""WocaR's critic: what it learns on a problem whose answer is known, and what it does to PPO's advantages."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO

from robustrl.networks.bounds import ball_bounds
from robustrl.training.robust import SAPPO, WorstCaseCritic

QUICK: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.state_dict().values()])


class TwoSteps(gym.Env[Any, Any]):
    """A reward of 0, then one of 1 for action 0 and -1 for action 1; two states."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.second = False
        return np.array([1, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        if self.second:
            return np.array([0, 0], np.float32), 1.0 - 2.0 * int(action), True, False, {}
        self.second = True
        return np.array([0, 1], np.float32), 0.0, False, False, {}


def trained(epsilon: float) -> WorstCaseCritic:
    critic = WorstCaseCritic(epsilon, weight=0.0, epochs=30, learning_rate=1e-2, tau=0.2, batch_size=64)
    model = PPO(
        "MlpPolicy", TwoSteps(), gamma=0.5, learning_rate=1e-9, n_steps=256, batch_size=256, n_epochs=1, seed=0, device="cpu"
    )
    with torch.no_grad():  # prefers action 0 clearly, in both states
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(torch.tensor([2.0, 0.0]))
        model.policy.action_net.weight[0] = 0.1
    model.learn(1024, callback=critic)
    return critic


@pytest.mark.parametrize(("epsilon", "following"), [(0.0, 1.0), (100.0, -1.0)])
def test_the_critic_learns_the_return_under_the_worst_action_that_is_possible(epsilon: float, following: float) -> None:
    """gamma * Q of the second state's best action without an attacker, of its worst one where all are possible."""
    critic = trained(epsilon)
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        values = critic._critic(states)
    np.testing.assert_allclose(values[1], [1.0, -1.0], atol=0.15)
    np.testing.assert_allclose(values[0], [0.5 * following] * 2, atol=0.15)


class Looking(WorstCaseCritic):
    """Remembers advantages before and after."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.seen: list[Any] = []

    def _on_rollout_end(self) -> None:
        before = self.model.rollout_buffer.advantages.copy()
        super()._on_rollout_end()
        self.seen.append((before, self.model.rollout_buffer.advantages - before))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_advantages_get_the_critics_standardised_values_with_a_weight_that_grows(env: str) -> None:
    critic = Looking(0.1, weight=0.8, epochs=1)
    model = PPO("MlpPolicy", env, **QUICK)
    model.learn(128, callback=critic)
    for (before, added), weight in zip(critic.seen, (0.4, 0.8), strict=True):
        assert added.std() == pytest.approx(weight * before.std(), rel=1e-2)
        assert added.mean() == pytest.approx(0, abs=1e-3 * float(before.std()))
    assert math.isfinite(model.logger.name_to_value["train/worst_case_loss"])


@pytest.mark.parametrize("kind", [PPO, SAPPO])
def test_a_weight_of_zero_changes_no_weights_and_draws_nothing(kind: Any) -> None:
    for env in ("CartPole-v1", "Pendulum-v1"):
        alone = kind("MlpPolicy", env, **QUICK).learn(192)
        beside = kind("MlpPolicy", env, **QUICK).learn(192, callback=WorstCaseCritic(0.1, weight=0.0))
        assert torch.equal(weights(alone), weights(beside))


def test_the_worst_action_in_a_box_is_found_inside_the_action_space() -> None:
    """Against a grid over the box of means, which is as wide as the action space here."""
    critic = WorstCaseCritic(0.05, epochs=1)
    model = PPO("MlpPolicy", "Pendulum-v1", **QUICK).learn(64, callback=critic)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(300)
    observations = torch.randn(16, 3)
    low, high = (end[:, :1].clamp(-2, 2) for end in ball_bounds(critic._policy, observations, 0.05))
    assert (high - low).mean() > 1
    with torch.no_grad():
        grid = [critic._values(critic._target, observations, low + part * (high - low)) for part in torch.linspace(0, 1, 41)]
    lowest, highest = torch.stack(grid).amin(0), torch.stack(grid).amax(0)
    worst = critic._worst(observations)
    assert ((worst - lowest).abs() <= 0.1 * (highest - lowest) + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"weight": -1.0}, "weight must be >= 0"),
        ({"tau": 2.0}, "tau at most 1"),
        ({"hidden": (0,)}, "hidden"),
        ({"search": 0}, "search"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WorstCaseCritic(**{"epsilon": 0.1, **options})


def test_other_learners_are_refused() -> None:
    with pytest.raises(TypeError, match="WorstCaseCritic belongs to PPO or SAPPO, got DQN"):
        DQN("MlpPolicy", "CartPole-v1", device="cpu").learn(10, callback=WorstCaseCritic(0.1))
