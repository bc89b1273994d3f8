"""Wrappers for `gymnasium.vector.VectorEnv`, under every autoreset mode."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from robustrl.envs.core import NoiseCore
from robustrl.envs.joint import join, split
from robustrl.noise import Noise


class NoiseObservation(VectorWrapper):
    """The vector twin of `robustrl.envs.NoiseObservation`; see there.

    Works with NEXT_STEP, SAME_STEP (final observations in `info["final_obs"]` get noise of their own) and DISABLED
    autoreset (a masked reset leaves the other environments' observations as they were, since noising a frame twice would
    show it to the policy twice, and a seed given with it restarts no noise, since other episodes go on with it).
    """

    chain_role: ClassVar[str] = "noise"

    def __init__(self, env: VectorEnv[Any, Any, Any], noise: Noise, seed: int | None = None) -> None:
        super().__init__(env)
        self.core = NoiseCore(noise, env.single_observation_space, seed)
        self.noise = noise
        self.single_observation_space = self.core.space
        self.observation_space = batch_space(self.core.space, self.num_envs)
        self._last: NDArray[np.float32] | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        mask = None if options is None else options.get("reset_mask")
        frames, info = self.env.reset(seed=cast(Any, seed), options=options)
        first = seed[0] if isinstance(seed, list) else seed
        if first is not None and (mask is None or np.all(mask)):
            self.core.seed(first)  # never while episodes are running: they would meet noise they have seen before
        noisy = self.core(frames)
        if mask is not None and self._last is not None:
            joint = join(noisy, self.core.space)
            noisy = split(np.where(np.reshape(mask, (-1,) + (1,) * (joint.ndim - 1)), joint, self._last), self.core.space)
        self._last = join(noisy, self.core.space).copy()
        return noisy, info

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        noisy = self.core(frames)
        self._last = join(noisy, self.core.space).copy()
        if "final_obs" in info:
            final = np.array(info["final_obs"], dtype=object)
            for i in np.flatnonzero(info["_final_obs"]):
                final[i] = self.core.one(info["final_obs"][i])
            info["final_obs"] = final
        return noisy, rewards, terminated, truncated, info
