"""Pick the wrapper that fits an environment's kind."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from robustrl.attacks.base import Attack
from robustrl.envs import single, vector
from robustrl.noise import Noise
from robustrl.threat import ThreatModel

if TYPE_CHECKING:
    from robustrl.envs.recipe import EnvRecipe


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
    from robustrl.envs.chain import check_order
    from robustrl.envs.sb3 import NoiseObservation as SB3NoiseObservation

    kind = _host(env, single.NoiseObservation, vector.NoiseObservation, SB3NoiseObservation)
    wrapped = kind(env, noise, seed)
    check_order(wrapped)
    return wrapped


def add_attack(env: Any, attack: Attack, threat: ThreatModel, **options: Any) -> Any:
    """Wrap an environment of any kind in its `AttackObservation` (`VecAttack` for SB3).

    Args:
        env: a `gymnasium.Env`, a `gymnasium.vector.VectorEnv` or an SB3 `VecEnv`, without noise and frame stack.
        attack: the attacker.
        threat: its budget.
        options: of `robustrl.envs.AttackObservation`, e.g. `victim=`.
    Raises:
        TypeError: for anything else.
        ChainError: if noise, a frame stack or another attack is inside.
    """
    from robustrl.envs.sb3 import VecAttack

    return _host(env, single.AttackObservation, vector.AttackObservation, VecAttack)(env, attack, threat, **options)


def _host(env: Any, alone: Any, vectorised: Any, sb3: Any) -> Any:
    """Which of three wrappers fits."""
    from stable_baselines3.common.vec_env import VecEnv

    for kind, host in ((VecEnv, sb3), (VectorEnv, vectorised), (gym.Env, alone)):
        if isinstance(env, kind):
            return host
    raise TypeError(f"env must be a gymnasium Env or VectorEnv or an SB3 VecEnv, got {type(env).__name__}")


def attack_host(env: Any) -> Any:
    """The `AttackObservation` or `VecAttack` of a chain.

    Raises:
        ValueError: if there is none.
    """
    from robustrl.envs.chain import layers_of

    host = next((layer.env for layer in layers_of(env, partly=True) if layer.role == "attack"), None)
    if host is None:
        raise ValueError("env has no attack in its chain: wrap it with add_attack, or pass attack= and threat= to make_vec_env")
    return host


def as_learner_sees(recipe: EnvRecipe, model: Any) -> EnvRecipe:
    """A recipe with the VecNormalize of a learner's chain as it is now, on the side of attack and noise where it is there.

    Args:
        recipe: where the learner acts.
        model: SB3 model; the recipe is returned as it is if it normalises no observations.
    """
    from robustrl.envs.chain import layers_of
    from robustrl.policy import Normalization

    live = model.get_vec_normalize_env()
    if live is None or not live.norm_obs:
        return recipe
    layers = layers_of(model.get_env(), partly=True)
    place = next((i for i, layer in enumerate(layers) if layer.env is live), 0)
    outside = any(layer.role in ("attack", "noise") for layer in layers[:place])
    return replace(recipe, normalization=Normalization.of(live), normalize="after_noise" if outside else "before_noise")


def set_victim(env: Any, model: Any) -> None:
    """Tell the attack in a chain who acts on what it delivers: a model that may still learn, or a `PolicyView`.

    Args:
        env: the outermost wrapper.
        model: who acts.
    Raises:
        ValueError: if there is no attack in the chain, or it cannot serve the model.
        TypeError: for a model with a memory, if the attack asks it what it would do.
        ChainError: if an off-policy learner would store clean observations, or frames are stacked otherwise than the attack was told.
    """
    attack_host(env).core.attach(model, env)
