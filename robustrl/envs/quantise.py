"""Observations on a grid, for mechanisms whose certificates are about grids: one wrapper for three hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from robustrl.noise.grid import Grid

Bounds = float | Sequence[float] | NDArray[Any] | None


class QuantiseCore:
    """Clips observations to [low, high] and rounds them to the nearest of `quantisation` + 1 values, in their own dtype.

    Args:
        space: of one environment: a Box of a floating dtype.
        quantisation: number of steps of the grid.
        low: lowest value: a number, or one per feature (along the last axis); default the space's.
        high: highest value, likewise.
    Raises:
        TypeError: for other spaces.
        ValueError: if there are no bounds: the space's are infinite, or differ along other axes than the last.
    """

    def __init__(self, space: spaces.Space[Any], quantisation: int, low: Bounds = None, high: Bounds = None) -> None:
        if not isinstance(space, spaces.Box) or space.dtype is None or space.dtype.kind != "f":
            raise TypeError(
                f"quantisation needs a Box observation space of floats, got {space}: integers are on a grid already"
            )
        bounds = [_bound("low", low, space.low), _bound("high", high, space.high)]
        self.grid = Grid(quantisation, *bounds)
        low, high = (np.broadcast_to(bound, space.shape).astype(space.dtype) for bound in bounds)
        self.space = spaces.Box(low, high, dtype=space.dtype.type)

    def __call__(self, frames: Any) -> NDArray[Any]:
        """Frames of any batch shape, on the grid."""
        points: NDArray[Any] = self.grid.values(self.grid.nearest(np.asarray(frames)))
        inside: NDArray[Any] = np.clip(points.astype(self.space.dtype), self.space.low, self.space.high)
        return inside


def _bound(name: str, given: Bounds, own: NDArray[Any]) -> Any:
    if given is not None:
        return given if np.ndim(given) == 0 else tuple(np.asarray(given).tolist())
    rows = own.reshape(-1, own.shape[-1])
    if not np.isfinite(own).all() or not (rows == rows[0]).all():
        raise ValueError(f"{name} must be given for this observation space, whose own is {own}")
    return float(rows[0, 0]) if (rows == rows[0, 0]).all() else tuple(rows[0].tolist())


class QuantiseObservation(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Put the observations of a `gymnasium.Env` on a grid; arguments as in `QuantiseCore`.

    Attacks belong outside of it: a certificate on the grid covers attackers who perturb quantised observations. An attack
    inside, before the rounding, is not covered: each entry's own rounding cell comes on top of its budget.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> env = rrl.envs.quantise.QuantiseObservation(gym.make("Acrobot-v1"), 255)
    """

    chain_role: ClassVar[str] = "normalize"

    def __init__(self, env: gym.Env[Any, Any], quantisation: int, low: Bounds = None, high: Bounds = None) -> None:
        RecordConstructorArgs.__init__(self, quantisation=quantisation, low=low, high=high)
        gym.ObservationWrapper.__init__(self, env)
        self.core = QuantiseCore(env.observation_space, quantisation, low, high)
        self.observation_space = self.core.space

    def observation(self, observation: Any) -> NDArray[Any]:
        return self.core(observation)


class VectorQuantiseObservation(VectorWrapper):
    """`QuantiseObservation` for a `gymnasium.vector.VectorEnv`, under every autoreset mode."""

    chain_role: ClassVar[str] = "normalize"

    def __init__(self, env: VectorEnv[Any, Any, Any], quantisation: int, low: Bounds = None, high: Bounds = None) -> None:
        super().__init__(env)
        self.core = QuantiseCore(env.single_observation_space, quantisation, low, high)
        self.single_observation_space = self.core.space
        self.observation_space = batch_space(self.core.space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        frames, info = self.env.reset(seed=seed, options=options)
        return self.core(frames), info

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            final = np.array(info["final_obs"], dtype=object)
            for i in np.flatnonzero(info["_final_obs"]):
                final[i] = self.core(info["final_obs"][i])
            info["final_obs"] = final
        return self.core(frames), rewards, terminated, truncated, info


class VecQuantiseObservation(VecEnvWrapper):
    """`QuantiseObservation` for an SB3 `VecEnv`."""

    chain_role: ClassVar[str] = "normalize"

    def __init__(self, venv: VecEnv, quantisation: int, low: Bounds = None, high: Bounds = None) -> None:
        self.core = QuantiseCore(venv.observation_space, quantisation, low, high)
        super().__init__(venv, observation_space=self.core.space)

    def reset(self) -> NDArray[Any]:
        return self.core(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            if "terminal_observation" in infos[i]:
                infos[i]["terminal_observation"] = self.core(infos[i]["terminal_observation"])
        return self.core(frames), rewards, dones, infos
