"""The chain validator: which wrapper sits where, and whether the proof survives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorObservationWrapper, VectorRewardWrapper, VectorWrapper

from robustrl.errors import ChainError
from robustrl.noise import Noise

ROLES: dict[str, str] = {
    # qualified names instead of classes: inspecting a chain must not import every optional wrapper
    "gymnasium.wrappers.stateful_observation.FrameStackObservation": "frame_stack",
    "stable_baselines3.common.vec_env.vec_frame_stack.VecFrameStack": "frame_stack",
    "stable_baselines3.common.monitor.Monitor": "monitor",
    "stable_baselines3.common.vec_env.vec_monitor.VecMonitor": "monitor",
    "gymnasium.wrappers.common.RecordEpisodeStatistics": "monitor",
    "gymnasium.wrappers.vector.common.RecordEpisodeStatistics": "monitor",
    "gymnasium.wrappers.transform_reward.TransformReward": "reward",
    "gymnasium.wrappers.transform_reward.ClipReward": "reward",
    "gymnasium.wrappers.stateful_reward.NormalizeReward": "reward",
    "gymnasium.wrappers.vector.stateful_reward.NormalizeReward": "reward",
    "stable_baselines3.common.atari_wrappers.ClipRewardEnv": "reward",
    "stable_baselines3.common.atari_wrappers.EpisodicLifeEnv": "reward",
    "stable_baselines3.common.vec_env.vec_normalize.VecNormalize": "normalize",
    "gymnasium.wrappers.stateful_observation.NormalizeObservation": "normalize",
    "gymnasium.wrappers.vector.stateful_observation.NormalizeObservation": "normalize",
}

RESHAPING = (
    gym.wrappers.FlattenObservation,
    gym.wrappers.ReshapeObservation,
    gym.wrappers.vector.FlattenObservation,
    gym.wrappers.vector.ReshapeObservation,
)
"""Observation wrappers that keep every distance."""


@dataclass(frozen=True)
class Layer:
    """One wrapper (or the environment itself) of a chain."""

    env: Any
    name: str
    role: str

    @property
    def space(self) -> gym.Space[Any]:
        """Observation space of a single environment at this layer."""
        space: gym.Space[Any] = getattr(self.env, "single_observation_space", None) or self.env.observation_space
        return space

    @property
    def changes_observations(self) -> bool:
        """Whether the layer is known to compute new observations, so that budgets outside it have other units."""
        if self.role == "normalize":
            return bool(getattr(self.env, "norm_obs", True))
        return isinstance(self.env, gym.ObservationWrapper | VectorObservationWrapper) and type(self.env) not in RESHAPING

    @property
    def ends_with_a_life(self) -> bool:
        """Whether the layer ends an episode when a life is lost, as learners like it."""
        return type(self.env).__name__ == "EpisodicLifeEnv" or getattr(self.env, "terminal_on_life_loss", False) is True

    @property
    def changes_rewards(self) -> bool:
        """Whether the layer is known to change rewards or what counts as an episode."""
        if self.role == "normalize":
            return bool(getattr(self.env, "norm_reward", False))
        return self.role == "reward" or getattr(self.env, "terminal_on_life_loss", False) is True


@dataclass(frozen=True)
class Chain:
    """A wrapper chain that passed `check_chain`, from the environment outwards."""

    layers: tuple[str, ...]
    noise: Noise | None
    horizon: int

    def __str__(self) -> str:
        return " -> ".join(self.layers) + f"  (noise: {self.noise}, horizon: {self.horizon})"


def layers_of(env: Any, *, partly: bool = False) -> list[Layer]:
    """The layers of a chain, innermost first, through SB3 vector environments, Gymnasium vector environments and wrappers.

    Args:
        env: the outermost one.
        partly: stop at environments in other processes instead of refusing them.
    Raises:
        ChainError: if an environment runs in another process and cannot be inspected.
        TypeError: if `env` is none of these.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

    found: list[Layer] = []
    while True:
        kind = type(env)
        found.append(Layer(env, kind.__name__, _role(env)))
        inside = getattr(env, "envs", None)
        if isinstance(env, VecEnvWrapper):
            env = env.venv
        elif isinstance(env, gym.Wrapper | VectorWrapper):
            env = env.env
        elif isinstance(env, DummyVecEnv) or (isinstance(env, VectorEnv) and inside):
            chains = [layers_of(member) for member in inside or ()]
            odd = next((i for i, chain in enumerate(chains) if _names(chain) != _names(chains[0])), None)
            if odd is not None:
                raise ChainError(
                    f"environment {odd} of {kind.__name__} has other wrappers than environment 0: "
                    f"{' -> '.join(_names(chains[odd]))} instead of {' -> '.join(_names(chains[0]))}"
                )
            return chains[0] + found[::-1]
        elif partly and (isinstance(env, VecEnv) or "Async" in kind.__name__):
            return found[::-1]
        elif isinstance(env, VecEnv) or "Async" in kind.__name__:
            raise ChainError(
                f"{kind.__name__} runs its environments in other processes, where the chain cannot be inspected; "
                "build it with robustrl.make_vec_env, or use DummyVecEnv / SyncVectorEnv"
            )
        elif isinstance(env, gym.Env | VectorEnv):
            return found[::-1]
        else:
            raise TypeError(f"env must be a gymnasium Env or VectorEnv or an SB3 VecEnv, got {kind.__name__}")


def _role(env: Any) -> str:
    declared = getattr(type(env), "chain_role", None)
    if declared is not None:
        return str(declared)
    for ancestor in type(env).__mro__:
        if role := ROLES.get(f"{ancestor.__module__}.{ancestor.__qualname__}"):
            return role
    if isinstance(env, VectorEnv) and not isinstance(env, VectorWrapper) and (getattr(env, "stack_num", None) or 1) > 1:
        return "frame_stack"  # vectorised emulators that stack frames themselves
    return "reward" if isinstance(env, gym.RewardWrapper | VectorRewardWrapper) else "other"


def _names(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def check_order(env: Any, *, off_policy: bool = False) -> list[Layer]:
    """Raise ChainError if the order of wrappers breaks the proof; the part of `check_chain` that needs no horizon."""
    layers = layers_of(env)
    index = _index(layers)
    rewards = [i for i, layer in enumerate(layers) if layer.changes_rewards]
    text = " -> ".join(_names(layers))
    if off_policy:
        check_replay(env)
    if len(index["noise"]) > 1:
        raise ChainError(f"two noise wrappers in {text}: the certificate would not know which to count; keep one")
    for i in index["normalize"]:
        wrapper = layers[i].env
        if getattr(wrapper, "training", False) or getattr(wrapper, "update_running_mean", False):
            raise ChainError(
                f"{layers[i].name} still updates its statistics, which leak clean observations: freeze it "
                "(training=False, update_running_mean=False)"
            )
    if rewards and index["monitor"] and min(rewards) < max(index["monitor"]):
        raise ChainError(
            f"{layers[min(rewards)].name} changes rewards inside the return monitor in {text}: "
            "the certified return would not be the environment's; put the monitor nearer to the environment"
        )
    if not index["noise"]:
        return layers
    noise = index["noise"][0]
    if index["frame_stack"] and min(index["frame_stack"]) < noise:
        raise ChainError(
            f"noise after frame stacking in {text}: each frame would be shown several times through fresh noise; "
            "the right order is environment -> attack -> noise -> frame stack"
        )
    if any(attack > noise for attack in index["attack"]):
        raise ChainError(
            f"attack outside the noise in {text}: the attacker would see the noise it is not allowed to see; "
            "the right order is environment -> attack -> noise -> frame stack"
        )
    first = min(index["attack"], default=noise - 1)
    for layer in layers[first:noise]:
        parts = layer.space.values() if isinstance(layer.space, gym.spaces.Dict) else (layer.space,)
        odd = [part.dtype for part in parts if part.dtype is None or not np.issubdtype(part.dtype, np.floating)]
        if layer.role != "attack" and index["attack"] and layer.changes_observations:
            raise ChainError(
                f"{layer.name} computes new observations between the attack and the noise in {text}: the attack's "
                "budget would not be the one that reaches the noise; put it inside the attack or outside the noise"
            )
        if odd:
            raise ChainError(
                f"{layer.name} has an integer observation space ({odd[0]}) between the attack and the noise in {text}: "
                "rounding there can enlarge an attack without limit; convert to float before the attack point"
            )
    return layers


def _index(layers: list[Layer]) -> dict[str, list[int]]:
    roles = ("noise", "attack", "frame_stack", "monitor", "normalize")
    return {role: [i for i, layer in enumerate(layers) if layer.role == role] for role in roles}


def check_replay(env: Any) -> None:
    """Raise ChainError if SB3's off-policy learners would store clean observations.

    They keep `get_original_obs()` of any VecNormalize in the chain, wherever it sits.
    """
    layers = layers_of(env, partly=True)
    index = _index(layers)
    normalizers = [i for i in index["normalize"] if hasattr(layers[i].env, "get_original_obs")]  # those of rewards too
    for i in normalizers:
        outside = [layers[j].name for j in index["noise"] + index["attack"] + index["frame_stack"] if j > i]
        if outside:
            raise ChainError(
                f"{outside[0]} outside {layers[i].name} with an off-policy learner: its replay buffer would get the observations "
                f"as they were inside {layers[i].name}, clean; put {layers[i].name} outermost, or use make_vec_env(normalization=...)"
            )


def check_chain(env: Any, *, off_policy: bool = False) -> Chain:
    """Inspect a wrapper chain and raise on everything that breaks the proof of an episode certificate.

    Args:
        env: a `gymnasium.Env`, a `gymnasium.vector.VectorEnv` or an SB3 `VecEnv`.
        off_policy: also check what a DQN, SAC, TD3 or DDPG learner would store in its replay buffer.
    Returns:
        the chain: layer names from the environment outwards, noise mechanism, horizon.
    Raises:
        ChainError: noise after the frame stack, an attack outside the noise, a normaliser that still learns, an integer
            space between attack and noise, a reward-changing wrapper inside the return monitor, no finite horizon, two
            noises, or environments in other processes.

    Examples:
        >>> import robustrl as rrl
        >>> print(rrl.check_chain(rrl.make_vec_env("CartPole-v1", noise=rrl.Gaussian(0.2), max_episode_steps=200)))
        CartPoleEnv -> PassiveEnvChecker -> OrderEnforcing -> TimeLimit -> Monitor -> DummyVecEnv -> NoiseObservation  (noise: Gaussian(sigma=0.2), horizon: 200)
    """
    layers = check_order(env, off_policy=off_policy)
    horizon = find_horizon(layers)
    if horizon is None:
        raise ChainError(
            "the environment has no finite horizon: wrap it in gymnasium.wrappers.TimeLimit or pass max_episode_steps="
        )
    noise = next((layer.env.noise for layer in layers if layer.role == "noise"), None)
    return Chain(tuple(layer.name for layer in layers), noise, horizon)


def find_horizon(layers: list[Layer]) -> int | None:
    """Most steps an episode can have: the tightest time limit of the chain, or None."""
    limits = [
        getattr(layer.env, "_max_episode_steps", None) for layer in layers if isinstance(layer.env, gym.wrappers.TimeLimit)
    ]
    limits += [
        getattr(layer.env, "max_episode_steps", None)
        for layer in layers
        if isinstance(layer.env, VectorEnv) and not hasattr(layer.env, "env")
    ]
    return min((int(limit) for limit in limits if limit is not None), default=None)
