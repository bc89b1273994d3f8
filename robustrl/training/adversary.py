"""Train the attackers that learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from robustrl.attacks import LearnedAttack
from robustrl.envs.adversary import AdversaryVecEnv
from robustrl.files import write_atomically
from robustrl.policy.loading import load_model
from robustrl.rollouts.executor import one_thread
from robustrl.threat import ThreatModel
from robustrl.training.train import save_model


def train_adversary(
    model: Any,
    env: Any,
    threat: ThreatModel,
    command: Any = None,
    *,
    timesteps: int = 300_000,
    n_envs: int = 8,
    path: Path | None = None,
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
        path: where the adversary is kept, with a JSON of what it was trained against; one that is there is not trained again.
        seed: of weights, environments and noise.
        hyperparameters: of PPO, in place of n_steps=256, batch_size=64 and SB3's defaults.
    Raises:
        ValueError: if `path` holds the adversary of something else.
    """
    game = AdversaryVecEnv(env, model, threat, command, n_envs, seed=seed)
    about = {**game.describe(), "timesteps": timesteps, "seed": seed, "n_envs": n_envs, "hyperparameters": hyperparameters}
    about = json.loads(json.dumps(about, default=str))
    if path is not None and path.exists():
        if not path.with_suffix(".json").exists() or json.loads(path.with_suffix(".json").read_text()) != about:
            raise ValueError(
                f"{path} is the adversary of another victim, environment or budget, or was trained in another way: delete it"
            )
        return game.attack(load_model(path, algo="ppo", device="cpu"))
    arguments = {"n_steps": 256, "batch_size": 64, "device": "cpu", "seed": seed, **hyperparameters}
    with one_thread():
        learner = PPO("MlpPolicy", VecNormalize(game, norm_obs=False), **arguments).learn(timesteps)
    if path is not None:
        write_atomically(path.with_suffix(".json"), json.dumps(about, indent=1).encode())
        save_model(learner, path)
    return game.attack(learner)
