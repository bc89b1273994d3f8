"""Wrappers for `gymnasium.vector.VectorEnv`, under every autoreset mode."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from robustrl.attacks.base import Attack
from robustrl.envs.attack_core import AttackCore
from robustrl.envs.core import NoiseCore
from robustrl.envs.joint import join, split
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


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


class AttackObservation(VectorWrapper):
    """The vector twin of `robustrl.envs.AttackObservation`; see there.

    Works with NEXT_STEP, SAME_STEP (final observations in `info["final_obs"]` are attacked with what is left of their episode's budget)
    and DISABLED autoreset (a masked reset leaves the other environments' observations and budgets as they were).
    `info["attack"]` holds an array per key, as all infos of vector environments do.
    """

    chain_role: ClassVar[str] = "attack"

    def __init__(
        self, env: VectorEnv[Any, Any, Any], attack: Attack, threat: ThreatModel, *, seed: int | None = None, **options: Any
    ) -> None:
        super().__init__(env)
        self.core = AttackCore(env, env.single_observation_space, self.num_envs, attack, threat, seed=seed, **options)
        self.single_observation_space = self.core.space
        self.observation_space = batch_space(self.core.space, self.num_envs)
        self._last: NDArray[Any] | None = None
        self._done = np.zeros(self.num_envs, dtype=bool)

    @property
    def victim(self) -> PolicyView | None:
        """Who acts on the observations."""
        return self.core.victim

    @victim.setter
    def victim(self, model: Any) -> None:
        self.core.attach(model, self)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        mask = None if options is None else options.get("reset_mask")
        frames, info = self.env.reset(seed=cast(Any, seed), options=options)
        starting = np.ones(self.num_envs, dtype=bool) if mask is None or self._last is None else np.asarray(mask, dtype=bool)
        first = seed[0] if isinstance(seed, list) else seed
        if first is not None and starting.all():
            self.core.seed(first)
        slots = np.flatnonzero(starting)
        self.core.reset(slots)
        self._done[slots] = False
        delivered = self._deliver(frames, slots)
        return delivered, info | self._infos(frames)

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        done = terminated | truncated
        if "final_obs" in info:
            final = np.array(info["final_obs"], dtype=object)
            for i in np.flatnonzero(info["_final_obs"]):
                final[i] = self.core.one(info["final_obs"][i], int(i))
            info["final_obs"] = final
        mode = self.metadata.get("autoreset_mode")
        starting = np.flatnonzero(done if mode == AutoresetMode.SAME_STEP else self._done & (mode == AutoresetMode.NEXT_STEP))
        if starting.size:
            self.core.reset(starting)
        self._done = done
        delivered = self._deliver(frames, np.arange(self.num_envs))
        return delivered, rewards, terminated, truncated, info | self._infos(frames)

    def _deliver(self, frames: Any, slots: NDArray[np.int64]) -> Any:
        """Attack some environments' frames; the others' stay as they were last delivered."""
        joint = join(frames, self.core.inner)[slots]
        delivered = join(self.core(split(joint, self.core.inner), slots), self.core.space)
        if self._last is None or len(slots) == self.num_envs:
            self._last = delivered.copy()
        else:
            self._last[slots] = delivered
        return split(self._last.copy(), self.core.space)

    def _infos(self, frames: Any) -> dict[str, Any]:
        every = np.ones(self.num_envs, dtype=bool)
        found = {key: value.copy() for key, value in self.core.infos().items()}
        infos: dict[str, Any] = {"attack": found | {f"_{key}": every for key in found}, "_attack": every}
        return infos | ({"clean_obs": frames, "_clean_obs": every} if self.core.record_clean else {})
