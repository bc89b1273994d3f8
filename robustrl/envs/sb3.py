"""Wrappers for Stable-Baselines3's `VecEnv`."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from robustrl.attacks.base import Attack
from robustrl.envs.attack_core import AttackCore
from robustrl.envs.chain import layers_of
from robustrl.envs.core import NoiseCore
from robustrl.envs.joint import as_batch, first_row, float_space, join, joint_box, split
from robustrl.errors import check_choice, check_count
from robustrl.noise import Noise
from robustrl.policy import Normalization, Padding, PolicyView, fold_frames, push_frame, stacked_shape, start_stack
from robustrl.threat import ThreatModel


def _row(observations: Any, slot: int) -> Any:
    """The batch of one environment."""
    if isinstance(observations, dict):
        return {key: part[slot : slot + 1] for key, part in observations.items()}
    return observations[slot : slot + 1]


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

    def reset(self) -> Any:
        if self._next_seed is not None:
            self.core.seed(self._next_seed)
            self._next_seed = None
        return self.core(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        noisy = self.core(frames)
        for i in np.flatnonzero(dones):
            if "terminal_observation" in infos[i]:
                infos[i]["terminal_observation"] = self.core.one(infos[i]["terminal_observation"])
        return noisy, rewards, dones, infos


class VecAttack(VecEnvWrapper):
    """The SB3 twin of `robustrl.envs.AttackObservation`; see there.

    Terminal observations, from which learners bootstrap, are attacked with what is left of their episode's budget. Adversarial
    training is learning behind it:

        venv = VecAttack(venv, GradientAttack(), ThreatModel(norm=inf, step=0.1))
        model = PPO("MlpPolicy", venv)
        set_victim(venv, model)     # of robustrl.envs; it also checks what an off-policy learner would store
        model.learn(100_000)
    """

    chain_role: ClassVar[str] = "attack"

    def __init__(self, venv: VecEnv, attack: Attack, threat: ThreatModel, *, seed: int | None = None, **options: Any) -> None:
        self.core = AttackCore(venv, venv.observation_space, venv.num_envs, attack, threat, seed=seed, **options)
        self._next_seed: int | None = None
        super().__init__(venv, observation_space=self.core.space)

    @property
    def victim(self) -> PolicyView | None:
        """Who acts on the observations."""
        return self.core.victim

    @victim.setter
    def victim(self, model: Any) -> None:
        self.core.attach(model, getattr(model, "env", None) or self)

    def seed(self, seed: int | None = None) -> Any:
        """Seed environments and attacker from the next reset on, as SB3 does."""
        self._next_seed = seed
        return self.venv.seed(seed)

    def reset(self) -> Any:
        if self.victim is None and any(hasattr(layer.env, "get_original_obs") for layer in layers_of(self.venv, partly=True)):
            warnings.warn(
                "a VecNormalize inside the attack: off-policy learners would store clean observations; set_victim(env, model) checks",
                stacklevel=2,
            )
        frames = self.venv.reset()
        if self._next_seed is not None:
            self.core.seed(self._next_seed)
            self._next_seed = None
        self.core.reset()
        delivered = self.core(frames)
        self.reset_infos = [{**info, **self._info(i, frames)} for i, info in enumerate(self.venv.reset_infos)]
        return delivered

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        ended = np.flatnonzero(dones)
        for slot in ended.tolist():
            if "terminal_observation" in infos[slot]:
                last = infos[slot]["terminal_observation"]
                infos[slot]["terminal_observation"] = self.core.one(last, slot)
                infos[slot]["terminal_attack"] = self.core.info(slot)["attack"]
        if ended.size:
            self.core.reset(ended)
        delivered = self.core(frames)
        for i, info in enumerate(infos):
            info.update(self._info(i, frames))
        return delivered, rewards, dones, infos

    def _info(self, slot: int, frames: Any) -> dict[str, Any]:
        return self.core.info(slot, first_row(_row(frames, slot)) if self.core.record_clean else None)


class NormalizeObservation(VecEnvWrapper):
    """A frozen normalisation; the same numbers as an SB3 VecNormalize with `training=False`.

    Unlike around a VecNormalize, off-policy learners store what comes out of the whole chain.

    Args:
        venv: vector environment with a Box observation space, or a Dict of them.
        normalization: the statistics, of the space's shape (or its joint vector's).
    """

    chain_role: ClassVar[str] = "normalize"

    def __init__(self, venv: VecEnv, normalization: Normalization) -> None:
        shape = joint_box(venv.observation_space).shape
        if normalization.mean.shape != shape:
            raise ValueError(f"normalization has statistics of shape {normalization.mean.shape}, but observations have {shape}")
        self.normalization = normalization
        super().__init__(venv, observation_space=float_space(venv.observation_space, normalization.clip))

    def _normalized(self, observations: Any) -> Any:
        return split(self.normalization(join(observations, self.observation_space)), self.observation_space)

    def reset(self) -> Any:
        return self._normalized(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        frames, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            if "terminal_observation" in infos[i]:
                last = infos[i]["terminal_observation"]
                infos[i]["terminal_observation"] = first_row(self._normalized(as_batch(last)))
        return self._normalized(frames), rewards, dones, infos


class FrameStack(VecEnvWrapper):
    """Stack the last frames, oldest first: along the last axis, or pictures (height, width) into channels of one image.

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
        shape, copies = stacked_shape(space.shape, n_frames), (1, n_frames, *space.shape)
        low, high = (fold_frames(np.broadcast_to(bound, copies), shape)[0] for bound in (space.low, space.high))
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
