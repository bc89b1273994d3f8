"""Wrappers for Stable-Baselines3's `VecEnv`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from robustrl.envs.core import NoiseCore
from robustrl.errors import check_choice, check_count
from robustrl.noise import Noise
from robustrl.policy import Padding, fold_frames, push_frame, start_stack


class NoiseObservation(VecEnvWrapper):
    """The SB3 twin of `robustrl.envs.NoiseObservation`; see there.

    Terminal observations (`info["terminal_observation"]`, from which learners bootstrap) get noise of their own.
    """

    chain_role: ClassVar[str] = "noise"

    def __init__(self, venv: VecEnv, noise: Noise, seed: int | None = None) -> None:
        self.core = NoiseCore(noise, venv.observation_space, seed)
        self.noise = noise
        self._next_seed: int | None = None
        super().__init__(venv, observation_space=self.core.space)

    def seed(self, seed: int | None = None) -> Any:
        """Seed environments and noise from the next reset on, as SB3 does; running episodes never see noise twice."""
        self._next_seed = seed
        return self.venv.seed(seed)

    def reset(self) -> NDArray[np.float32]:
        if self._next_seed is not None:
            self.core.seed(self._next_seed)
            self._next_seed = None
        return self.core(np.asarray(self.venv.reset()))

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        noisy = self.core(np.asarray(frames))
        for i in np.flatnonzero(dones):
            if "terminal_observation" in infos[i]:
                infos[i]["terminal_observation"] = self.core(np.asarray(infos[i]["terminal_observation"])[None])[0]
        return noisy, rewards, dones, infos


class FrameStack(VecEnvWrapper):
    """Stack the last frames along the last axis, oldest first.

    Like SB3's `VecFrameStack`, except that an episode starts with copies of its first frame ("reset" padding, as in
    Gymnasium); with "zero" padding it starts with zeros, as in SB3.

    Args:
        venv: vector environment with a Box observation space.
        n_frames: frames in one observation.
        padding: "reset" or "zero".
    """

    chain_role: ClassVar[str] = "frame_stack"

    def __init__(self, venv: VecEnv, n_frames: int, padding: Padding = "reset") -> None:
        space = venv.observation_space
        if not isinstance(space, spaces.Box) or not space.shape:
            raise TypeError(f"frame stacking needs a Box observation space with at least one axis, got {space}")
        self.n_frames = check_count("n_frames", n_frames)
        self.padding: Padding = check_choice("padding", padding, ("reset", "zero"))
        low, high = (np.concatenate([bound] * n_frames, axis=-1) for bound in (space.low, space.high))
        stacked = spaces.Box(low, high, dtype=space.dtype)
        super().__init__(venv, observation_space=stacked)
        self._shape: tuple[int, ...] = stacked.shape
        self._stack = np.zeros((self.num_envs, n_frames, *space.shape), dtype=space.dtype)

    def reset(self) -> NDArray[Any]:
        self._stack = start_stack(np.asarray(self.venv.reset()), self.n_frames, self.padding)
        return fold_frames(self._stack, self._shape)

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        frames = np.asarray(frames)
        ended = np.flatnonzero(dones)
        for i in ended:
            if "terminal_observation" in infos[i]:
                last = push_frame(self._stack[i : i + 1], np.asarray(infos[i]["terminal_observation"])[None])
                infos[i]["terminal_observation"] = fold_frames(last, self._shape)[0]
        self._stack = push_frame(self._stack, frames)
        if ended.size:
            self._stack[ended] = start_stack(frames[ended], self.n_frames, self.padding)
        return fold_frames(self._stack, self._shape), rewards, dones, infos
