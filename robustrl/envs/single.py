"""Wrappers for one `gymnasium.Env`."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsFloat

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from robustrl.envs.core import NoiseCore
from robustrl.noise import Noise


class NoiseObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Add smoothing noise to every observation, once per arriving frame.

    The observation space becomes an unbounded float32 Box (or a Dict of them: the noise is that of their joint vector). The noise has a generator of its own: the environment's is
    never consumed, so the dynamics are those of the clean environment. Put frame stacks outside, attacks inside.

    Args:
        env: environment with a Box observation space of a floating dtype, or a Dict of them.
        noise: mechanism, e.g. `robustrl.Gaussian(0.2)`.
        seed: seed of the noise until the first `reset(seed=...)`.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> env = rrl.envs.NoiseObservation(gym.make("CartPole-v1"), rrl.Gaussian(0.2))
        >>> observation, info = env.reset(seed=1)
        >>> observation.dtype
        dtype('float32')
    """

    chain_role: ClassVar[str] = "noise"

    def __init__(self, env: gym.Env[Any, Any], noise: Noise, seed: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, noise=noise, seed=seed)
        gym.Wrapper.__init__(self, env)
        self.core = NoiseCore(noise, env.observation_space, seed)
        self.noise = noise
        self.observation_space = self.core.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.core.seed(seed)
        return self.core.one(observation), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.core.one(observation), reward, terminated, truncated, info


class RewardProbe(gym.Wrapper[Any, Any, Any, Any]):
    """Adds up the rewards of the environment inside reward-changing wrappers, so that returns are the true ones.

    A wrapper outside may step the environment several times per action, or not at all.
    """

    chain_role: ClassVar[str] = "monitor"
    _earned: float = 0.0

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._earned += float(reward)
        return observation, reward, terminated, truncated, info

    def take(self) -> float:
        """The rewards since the last call."""
        earned, self._earned = self._earned, 0.0
        return earned
