"""An environment of given spaces in which nothing happens."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import spaces


class Blank(gym.Env[Any, Any]):
    """An environment of given spaces in which nothing happens."""

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, **_: Any) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}
