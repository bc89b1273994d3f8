"""Small policies and environments whose answers are known without training; shared by the tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from robustrl.policy import PolicyView

BALANCE = (0.05, 0.1, 1.0, 0.3)
"""Pushing towards the sign of theta + 0.3 theta' + 0.1 x' + 0.05 x balances CartPole."""


class LinearRule(nn.Module):
    """Two actions with scores +-(w . x + b) / 2, summed entry by entry in float64: no batch size changes its bits."""

    def __init__(self, weights: Any, bias: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64))
        self.register_buffer("bias", torch.tensor(float(bias), dtype=torch.float64))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        terms = (observation.double() * self.weights).unbind(-1)
        half = (sum(terms[1:], terms[0]) + self.bias) / 2
        return torch.stack((-half, half), dim=-1)


def balancer(n_frames: int = 1, gain: float = 10.0) -> PolicyView:
    """The balancing rule on the mean of the stacked frames."""
    return PolicyView.from_torch(
        LinearRule(gain * np.tile(BALANCE, n_frames) / n_frames),
        kind="logits",
        observation_shape=(4 * n_frames,),
        n_frames=n_frames,
    )


def network_balancer(hidden: int = 64, *, seed: int = 0) -> PolicyView:
    """A two-layer tanh network that computes the balancing rule: ordinary float32 matrix products."""
    generator = torch.Generator().manual_seed(seed)
    first, second = nn.Linear(4, hidden), nn.Linear(hidden, 2)
    mix = torch.rand(hidden, generator=generator) + 0.5
    with torch.no_grad():
        first.weight.copy_(torch.outer(mix, torch.tensor(BALANCE)))
        first.bias.zero_()
        second.weight.copy_(torch.stack((-mix, mix)))
        second.bias.zero_()
    return PolicyView.from_torch(nn.Sequential(first, nn.Tanh(), second), kind="logits", observation_shape=(4,))


class Steps(gym.Env[Any, Any]):
    """Pays t at its t-th step, or 1 if `flat`; ends after `length` steps, or with probability `rate` at each.

    Its observation is the number of steps taken, four times over.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int | None = None, *, rate: float | None = None, flat: bool = False) -> None:
        self.length, self.rate, self.flat = length, rate, flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        self.last = self.length if self.rate is None else int(self.np_random.geometric(self.rate))
        return np.zeros(4, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        reward = 1.0 if self.flat else float(self.t)
        return np.full(4, self.t, dtype=np.float32), reward, self.t == self.last, False, {}


class Threshold(gym.Env[Any, Any]):
    """The observation is always 0; after `length` steps the last action is the reward.

    With a policy on `length` stacked frames that acts 1 when its view of them passes a test, the return is whether the
    perturbations and the noise, and nothing else, passed the test.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.t = 0  # nothing here is random: no generator to seed
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        ended = self.t == self.length
        return np.zeros(1, dtype=np.float32), float(action) if ended else 0.0, ended, False, {}


class Pixels(gym.Env[Any, Any]):
    """Random grey pictures of bytes, large enough for SB3's convolutions; pays 1 a step, never ends."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8), 1.0, False, False, {}


class NothingToDo:
    """An executor that stands for the claim that every chunk is there already."""

    def __init__(self, n_workers: int) -> None:
        del n_workers

    def run(self, function: Any, tasks: Any) -> Any:
        assert not tasks
        return iter(())
