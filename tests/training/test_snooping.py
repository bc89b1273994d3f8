"""Snooping: what was seen of a policy is enough to attack it."""

from __future__ import annotations

import math

import pytest
import torch
from sb3_contrib import RecurrentPPO
from torch import nn
from toys import LinearRule

import robustrl as rrl
from robustrl.attacks import GradientAttack, RandomNoise
from robustrl.envs import EnvRecipe
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel
from robustrl.training.snooping import snoop

CARTPOLE = EnvRecipe.of("CartPole-v1", noise=rrl.Gaussian(0.05), max_episode_steps=100)
WEIGHTS = torch.tensor([0.3, 0.5, 2.0, 1.0], dtype=torch.float64)


class Sealed(nn.Module):
    """The balancing rule without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = LinearRule(WEIGHTS)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.rule(observation)


def test_a_policy_without_gradients_is_hurt_through_its_imitation() -> None:
    sealed = PolicyView.from_torch(Sealed(), kind="logits", observation_shape=(4,))
    attack = snoop(sealed, CARTPOLE, observations=4_000, updates=1_000)
    assert isinstance(attack.attack, GradientAttack)
    imitation, frames = attack.surrogate, torch.randn(1_000, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    same = sealed.scores(frames).argmax(1) == imitation.scores(frames).argmax(1)
    assert same.double().mean() > 0.9
    threat = ThreatModel(norm=math.inf, step=0.25)
    clean = EnvRecipe.of("CartPole-v1", max_episode_steps=100)
    report = rrl.attack_policy(sealed, clean, attack, threat, 10)
    aimless = rrl.attack_policy(sealed, clean, RandomNoise("corner"), threat, 10)
    assert report.clean_mean == 100
    assert report.mean < 0.9 * aimless.mean


def test_policies_with_a_memory_are_refused() -> None:
    with pytest.raises(TypeError, match="no memory"):
        snoop(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu"), CARTPOLE)
