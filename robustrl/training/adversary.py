"""Train the attackers that learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustrl.attacks import LearnedAttack
from robustrl.envs.adversary import AdversaryVecEnv
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
        path: where the adversary is kept; one that is there is not trained again.
        seed: of weights, environments and noise.
        hyperparameters: of PPO, in place of n_steps=256, batch_size=64 and SB3's defaults.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize

    game = AdversaryVecEnv(env, model, threat, command, n_envs, seed=seed)
    if path is None or not path.exists():
        arguments = {"n_steps": 256, "batch_size": 64, "device": "cpu", "seed": seed, **hyperparameters}
        with one_thread():
            learner = PPO("MlpPolicy", VecNormalize(game, norm_obs=False), **arguments).learn(timesteps)
        if path is None:
            return game.attack(learner)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(learner, path)
    return game.attack(load_model(path, algo="ppo", device="cpu"))
