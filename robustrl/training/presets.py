"""Hyper-parameters that are known to work, as plain SB3 arguments.

`presets.cartpole.env` goes into `make_vec_env`, `presets.cartpole.ppo` into `stable_baselines3.PPO`; so does every other
preset: nothing of ours is in between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from robustrl.envs.recipe import find_spec
from robustrl.policy.loading import ACTING_AS


class _Frozen(Mapping[str, Any]):
    """Keyword arguments that stay as they are: SB3 writes into the `policy_kwargs` that it is given."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return copy.deepcopy(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class Preset:
    """Settings for one family of environments.

    Attributes:
        env: keyword arguments for `robustrl.make_vec_env`.
        ppo, a2c, dqn, sac, td3, ddpg, recurrent_ppo: keyword arguments for the SB3 algorithm of that name.
        sa_ppo, sa_dqn: what `SAPPO` and `SADQN` take beside those of ppo and dqn; see `arguments`.
        normalize: whether training needs normalised observations.
        timesteps: environment steps that suffice.
    """

    env: Mapping[str, Any] = field(default_factory=_Frozen)
    ppo: Mapping[str, Any] = field(default_factory=_Frozen)
    a2c: Mapping[str, Any] = field(default_factory=_Frozen)
    dqn: Mapping[str, Any] = field(default_factory=_Frozen)
    sac: Mapping[str, Any] = field(default_factory=_Frozen)
    td3: Mapping[str, Any] = field(default_factory=_Frozen)
    ddpg: Mapping[str, Any] = field(default_factory=_Frozen)
    recurrent_ppo: Mapping[str, Any] = field(default_factory=_Frozen)
    sa_ppo: Mapping[str, Any] = field(default_factory=_Frozen)
    sa_dqn: Mapping[str, Any] = field(default_factory=_Frozen)
    normalize: bool = False
    timesteps: int = 200_000

    def arguments(self, algo: str) -> dict[str, Any]:
        """Keyword arguments of an algorithm; those of sa_ppo and sa_dqn come on top of ppo's and dqn's."""
        base = ACTING_AS.get(algo)
        return {**(getattr(self, base) if base else {}), **getattr(self, algo)}


cartpole = Preset(
    env=_Frozen(n_envs=16),
    ppo=_Frozen(
        n_steps=128, batch_size=512, learning_rate=1e-3, n_epochs=10, policy_kwargs={"net_arch": [64, 64]}, device="cpu"
    ),
    a2c=_Frozen(n_steps=16, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, device="cpu"),
    dqn=_Frozen(
        learning_rate=1e-3,
        buffer_size=100_000,
        learning_starts=1_000,
        batch_size=256,
        train_freq=(16, "step"),
        gradient_steps=32,
        target_update_interval=160,
        exploration_fraction=0.16,
        exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
        device="cpu",
    ),
    sa_ppo=_Frozen(epsilon=0.1, kappa=0.1),
    sa_dqn=_Frozen(epsilon=0.1, kappa=0.1),
)
"""CartPole under Gaussian noise; PPO reaches 195 of 200 at sigma 0.2 in 200k steps."""


mountain_car_continuous = Preset(
    env=_Frozen(n_envs=1),
    ppo=_Frozen(
        n_steps=8,
        batch_size=8,
        n_epochs=10,
        gamma=0.9999,
        gae_lambda=0.9,
        learning_rate=7.77e-05,
        ent_coef=0.00429,
        clip_range=0.1,
        max_grad_norm=5,
        vf_coef=0.19,
        use_sde=True,
        policy_kwargs={"log_std_init": -3.29, "ortho_init": False},
        device="cpu",
    ),
    normalize=True,
    timesteps=20_000,
)
"""MountainCarContinuous-v0 with state-dependent exploration (gSDE)."""

mujoco = Preset(
    env=_Frozen(n_envs=4),
    ppo=_Frozen(
        n_steps=512,
        batch_size=64,
        n_epochs=10,
        gamma=0.99,
        gae_lambda=0.95,
        learning_rate=3e-4,
        clip_range=0.2,
        ent_coef=0.0,
        policy_kwargs={"net_arch": [64, 64]},
        device="cpu",
    ),
    sa_ppo=_Frozen(epsilon=0.075, kappa=0.1),
    normalize=True,
    timesteps=1_000_000,
)
"""MuJoCo's walkers and pendulums, PPO on normalised observations; epsilon, in normalised units, and kappa are SA-PPO's for Hopper."""

atari = Preset(
    env=_Frozen(n_envs=8),
    ppo=_Frozen(n_steps=128, batch_size=256, n_epochs=4, learning_rate=2.5e-4, clip_range=0.1, ent_coef=0.01, vf_coef=0.5),
    dqn=_Frozen(
        learning_rate=1e-4,
        buffer_size=10_000,
        learning_starts=1_000,
        batch_size=32,
        train_freq=4,
        target_update_interval=1_000,
        exploration_fraction=0.1,
        exploration_final_eps=0.01,
    ),
    timesteps=10_000_000,
)
"""Atari in float pixels; the replay buffer holds float32 pictures, 226 kB per transition of four."""


def preset_for(env_id: str | None) -> Preset:
    """The preset for an environment id; an empty one (SB3's defaults) where there is none."""
    try:
        spec = None if env_id is None else find_spec(env_id)
    except ValueError:
        spec = None
    if spec is None:
        return Preset()
    entry = spec.entry_point if isinstance(spec.entry_point, str) else ""
    if entry.startswith("gymnasium.envs.mujoco."):
        return mujoco
    if entry.startswith("robustrl.envs.atari:"):
        return atari
    return {"CartPole": cartpole, "MountainCarContinuous": mountain_car_continuous}.get(spec.name, Preset())
