"""What the training is for: a policy that loses less to an attacker than one trained without the term, at equal steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

import robustrl as rrl
from robustrl.attacks import GradientAttack, Margin
from robustrl.training.robust import SAPPO


@pytest.mark.slow
def test_sa_ppo_loses_less_to_an_attacker_than_ppo_on_cartpole() -> None:
    """Three seeds, 40 000 steps each, attacked at 0.1 and 0.2 (trained for 0.15). The clean return pays for it."""
    attacked: dict[float, list[list[float]]] = {0.0: [], 0.3: []}
    lost: dict[float, list[list[float]]] = {0.0: [], 0.3: []}
    for seed in range(3):
        for kappa in (0.0, 0.3):
            env = rrl.make_vec_env("CartPole-v1", 8, seed=seed)
            model = SAPPO("MlpPolicy", env, epsilon=0.15, kappa=kappa, loss="ibp", seed=seed, **rrl.presets.cartpole.ppo)
            model.learn(40_000)
            threats = [rrl.ThreatModel(norm=math.inf, step=step) for step in (0.1, 0.2)]
            reports = [
                rrl.attack_policy(model, "CartPole-v1", GradientAttack(Margin()), threat, 40, max_episode_steps=200)
                for threat in threats
            ]
            attacked[kappa].append([float(report.returns.mean()) for report in reports])
            lost[kappa].append([float(report.clean.mean() - report.returns.mean()) for report in reports])
    plain, robust = (np.mean(lost[kappa], axis=0) for kappa in (0.0, 0.3))
    assert (robust < plain).all(), (lost, attacked)
    assert np.mean(attacked[0.3]) > np.mean(attacked[0.0]), attacked
