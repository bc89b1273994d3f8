"""Train the attackers that learn."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from robustrl.attacks import LearnedAttack
from robustrl.envs.adversary import AdversaryVecEnv
from robustrl.errors import ChunkError
from robustrl.files import write_atomically
from robustrl.policy.loading import load_model
from robustrl.rollouts.executor import one_thread
from robustrl.threat import ThreatModel
from robustrl.training.train import save_model


@contextmanager
def untouched_generators() -> Iterator[None]:
    """The global generators of torch, numpy and Python afterwards as they were: SB3 seeds them when it makes a model."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def train_adversary(
    model: Any,
    env: Any,
    threat: ThreatModel,
    command: Any = None,
    *,
    timesteps: int = 300_000,
    n_envs: int = 8,
    path: str | os.PathLike[str] | None = None,
    deterministic: bool = True,
    seed: int = 0,
    **hyperparameters: Any,
) -> LearnedAttack:
    """A learned attack: an adversary that PPO trains against a policy.

    Args:
        model: the victim.
        env: anything `EnvRecipe.of` takes.
        threat: the budget.
        command: what the adversary decides; see `robustrl.envs.AdversaryEnv`.
        timesteps: of training.
        n_envs: victims side by side.
        path: file (.zip) where the adversary is kept, with a JSON of what it was trained against; one that is there is not trained again.
        deterministic: the victim acts greedily, or samples.
        seed: of weights, environments and noise.
        hyperparameters: of PPO, in place of n_steps=256, batch_size=64 and SB3's defaults.
    Raises:
        ChunkError: if `path` holds the adversary of something else.
    """
    file = None if path is None else Path(path)
    game = AdversaryVecEnv(env, model, threat, command, n_envs, deterministic=deterministic, seed=seed)
    about = {**game.describe(), "timesteps": timesteps, "seed": seed, "n_envs": n_envs, "hyperparameters": hyperparameters}
    about = json.loads(json.dumps(about, default=str))
    if file is not None and file.exists():
        if not file.with_suffix(".json").exists() or json.loads(file.with_suffix(".json").read_text()) != about:
            raise ChunkError(
                f"{file} is the adversary of another victim, environment or budget, or was trained in another way: delete it"
            )
        return game.attack(load_model(file, algo="ppo", device="cpu"))
    arguments = {"n_steps": 256, "batch_size": 64, "device": "cpu", "seed": seed, **hyperparameters}
    scaled = VecNormalize(game, norm_obs=False, gamma=hyperparameters.get("gamma", 0.99))
    with one_thread(), untouched_generators():
        learner = PPO("MlpPolicy", scaled, **arguments).learn(timesteps)
    game.close()
    if file is not None:
        write_atomically(file.with_suffix(".json"), json.dumps(about, indent=1).encode())
        save_model(learner, file)
    return game.attack(learner)
