"""Keeping what is best against the worst attacker."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

import robustrl as rrl
from robustrl.attacks import GradientAttack, Margin, RandomNoise
from robustrl.envs import EnvRecipe, make_vec_env
from robustrl.envs.hosts import as_learner_sees
from robustrl.policy import Normalization
from robustrl.threat import ThreatModel
from robustrl.training.robust import RobustEvalCallback

CARTPOLE, THREAT = EnvRecipe.of("CartPole-v1", max_episode_steps=100), ThreatModel(norm=math.inf, step=0.1)
SMALL = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "device": "cpu"}


def test_the_weights_kept_are_those_with_the_best_worst_case(tmp_path: Path) -> None:
    suite = {"margin": (GradientAttack(Margin()), THREAT), "noise": (RandomNoise(), THREAT)}
    callback = RobustEvalCallback(CARTPOLE, suite, every=256, episodes=5, best=tmp_path, seed=3)
    model = PPO("MlpPolicy", make_vec_env(CARTPOLE, 4, seed=0), n_steps=64, learning_rate=3e-3, seed=0, device="cpu")
    model.learn(1_024, callback=callback)
    assert [steps for steps, _ in callback.history] == list(range(256, 1_025, 256))
    worst = [min(means.values()) for _, means in callback.history]
    assert all(set(means) == {"clean", "margin", "noise"} for _, means in callback.history)
    assert callback.best_worst_case == max(worst)
    kept = json.loads((tmp_path / "best.json").read_text())
    assert kept["timesteps"] == callback.history[int(np.argmax(worst))][0]
    again = rrl.attack_policy(PPO.load(tmp_path / "model.zip", device="cpu"), CARTPOLE, *suite["margin"], 5, seed=3)
    assert again.mean == callback.history[int(np.argmax(worst))][1]["margin"]


def test_an_evaluation_does_not_disturb_the_learner() -> None:
    def weights(callback: RobustEvalCallback | None) -> torch.Tensor:
        model = PPO("MlpPolicy", make_vec_env(CARTPOLE, 2, seed=0), seed=0, **SMALL)
        model.learn(256, callback=callback)
        return torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])

    suite = {"margin": (GradientAttack(Margin(), restarts=2), THREAT)}
    assert torch.equal(weights(None), weights(RobustEvalCallback(CARTPOLE, suite, every=128, episodes=2)))
    with pytest.raises(ValueError, match="'clean'"):
        RobustEvalCallback(CARTPOLE, {"clean": suite["margin"]})


def test_a_learned_normalisation_gives_the_units_and_is_kept_with_the_weights(tmp_path: Path) -> None:
    venv = VecNormalize(make_vec_env(CARTPOLE, 2, seed=0))
    model = PPO("MlpPolicy", venv, seed=0, **SMALL)
    model.learn(128)
    raw, normalized = (ThreatModel(norm=math.inf, step=0.1, units=units) for units in ("raw", "normalized"))
    suite = {"raw": (GradientAttack(Margin()), raw), "normalized": (GradientAttack(Margin()), normalized)}
    callback = RobustEvalCallback(CARTPOLE, suite, episodes=20, best=tmp_path)
    callback.init_callback(model)
    means, recipe = callback.evaluate(), as_learner_sees(CARTPOLE, model)
    for name, (attack, threat) in suite.items():
        assert means[name] == rrl.attack_policy(model, recipe, attack, threat, 20, seed=0).mean
    assert means["raw"] != means["normalized"]
    kept = Normalization.load(tmp_path / "normalization.npz")
    assert np.array_equal(kept.mean, venv.obs_rms.mean)


def test_a_normalisation_of_rewards_alone_changes_nothing_that_is_seen() -> None:
    model = PPO("MlpPolicy", VecNormalize(make_vec_env(CARTPOLE, 2, seed=0), norm_obs=False), seed=0, **SMALL)
    assert as_learner_sees(CARTPOLE, model) is CARTPOLE
