"""Pick the wrapper that fits an environment's kind."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from robustrl.envs import single, vector
from robustrl.noise import Noise


def add_noise(env: Any, noise: Noise, seed: int | None = None) -> Any:
    """Wrap an environment of any kind in its `NoiseObservation`.

    Args:
        env: a `gymnasium.Env`, a `gymnasium.vector.VectorEnv` or an SB3 `VecEnv`.
        noise: the mechanism.
        seed: seed of the noise.
    Raises:
        TypeError: for anything else.
        ChainError: if the wrapped chain would break the proof (see `check_chain`).
    """
    from stable_baselines3.common.vec_env import VecEnv

    from robustrl.envs.chain import check_order
    from robustrl.envs.sb3 import NoiseObservation as SB3NoiseObservation

    wrapped: Any
    if isinstance(env, VecEnv):
        wrapped = SB3NoiseObservation(env, noise, seed)
    elif isinstance(env, VectorEnv):
        wrapped = vector.NoiseObservation(env, noise, seed)
    elif isinstance(env, gym.Env):
        wrapped = single.NoiseObservation(env, noise, seed)
    else:
        raise TypeError(f"env must be a gymnasium Env or VectorEnv or an SB3 VecEnv, got {type(env).__name__}")
    check_order(wrapped)
    return wrapped
