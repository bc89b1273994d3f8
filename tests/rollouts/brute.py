"""Small environments with state in every corner, and the worst of all their action sequences by brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from torch import nn

from robustrl.policy import PolicyView

STATES, ACTIONS, FEATURES = 5, 3, 2


class Maze(gym.Env[Any, Any]):
    """A random finite process: observations, moves and rewards from a table; `noisy` moves and rewards draw from the generator.

    Some states end the episode. The last observation is repeated in states that look alike: the policy cannot tell them apart.
    """

    def __init__(self, table: int, *, noisy: bool = False) -> None:
        rng = np.random.default_rng(table)
        self.observation_space = spaces.Box(-10, 10, (FEATURES,), np.float32)
        self.action_space = spaces.Discrete(ACTIONS)
        self._looks = rng.normal(size=(STATES, FEATURES)).astype(np.float32)
        self._looks[-1] = self._looks[-2]
        self._moves = rng.integers(STATES, size=(STATES, ACTIONS))
        self._pays = rng.integers(-2, 4, size=(STATES, ACTIONS)) / 2
        self._ends = rng.random((STATES, ACTIONS)) < 0.1
        self._noisy = noisy

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._state = int(self.np_random.integers(STATES))
        return self._looks[self._state], {}

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        place = self._state, int(action)
        reward, self._state = float(self._pays[place]), int(self._moves[place])
        if self._noisy and action == 1:  # one action draws, the others do not: generators run apart
            reward -= float(self.np_random.integers(3)) / 4
            self._state = int(self.np_random.integers(STATES))
        return self._looks[self._state], reward, bool(self._ends[place]), False, {}


class Streak(gym.Wrapper[Any, Any, Any, Any], EzPickle):
    """Takes a reward away for the same action three times in a row: state that no observation shows, in a class that pickles anew."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        EzPickle.__init__(self, env)
        gym.Wrapper.__init__(self, env)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self.streak: list[int] = []
        return super().reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self.streak = [*self.streak, int(action)][-3:]
        ends = len(self.streak) == 3 and len(set(self.streak)) == 1
        return observation, reward, terminated or ends, truncated, info


def linear(seed: int, features: int = FEATURES, actions: int = ACTIONS, n_frames: int = 1) -> PolicyView:
    """Random linear scores."""
    layer = nn.Linear(features * n_frames, actions)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 4)
    return PolicyView.from_torch(layer, kind="q", observation_shape=(features * n_frames,), n_frames=n_frames)


def exact_costs(policy: PolicyView, observation: NDArray[Any]) -> NDArray[np.float64]:
    """The distance of an observation to the region where linear scores favour each action: a lower bound of it per pair of actions."""
    weights, biases = (part.detach().numpy().astype(np.float64) for part in (policy.actor.weight, policy.actor.bias))
    scores = weights @ observation.astype(np.float64).ravel() + biases
    costs = np.zeros(len(scores))
    for a, b in itertools.permutations(range(len(scores)), 2):
        costs[a] = max(costs[a], (scores[b] - scores[a]) / np.linalg.norm(weights[a] - weights[b]))
    return costs


def all_paths(
    make: Any, seed: int, horizon: int, policy: PolicyView, k: int = 1, padding: str = "reset"
) -> list[tuple[float, NDArray[np.float64]]]:
    """Return and costs of the actions, for every action sequence played from the start."""
    found: dict[tuple[int, ...], tuple[float, NDArray[np.float64]]] = {}
    for sequence in itertools.product(range(policy.n_actions), repeat=horizon):
        env = make()
        frame = env.reset(seed=seed)[0]
        frames = [frame if padding == "reset" else 0 * frame] * (k - 1) + [frame]
        total, costs, taken = 0.0, [], []
        for action in sequence:
            costs.append(exact_costs(policy, np.concatenate(frames))[action])
            frame, reward, terminated, truncated, _ = env.step(action)
            frames = [*frames[1:], frame]
            total += float(reward)
            taken.append(action)
            if terminated or truncated:
                break
        found[tuple(taken)] = total, np.array(costs)
    return list(found.values())


def worst(paths: list[tuple[float, NDArray[np.float64]]], budget: float, per: str, weight: Any) -> float:
    """The least return of all paths that a budget allows; `weight(t)` of the squared cost at step t."""
    best = math.inf
    for total, costs in paths:
        weights = np.array([weight(t) for t in range(len(costs))])
        needed = float(np.sqrt(weights * costs**2).max()) if per == "step" else math.sqrt(float((weights * costs**2).sum()))
        if needed <= budget * (1 + 2e-6) + 1e-9:
            best = min(best, total)
    return best
