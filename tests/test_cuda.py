"""The same code on a GPU: same law, same guarantees; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

import robustrl as rrl
from robustrl.attacks import MinimalFlip, SmoothedPGD
from robustrl.rollouts.collect import collect, make_job

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RECIPE = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=rrl.Gaussian(0.2))


def balancing_policy(device: str) -> rrl.policy.PolicyView:
    """A linear rule that balances CartPole."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [0.5, 1, 10, 3]]))
        layer.bias.zero_()
    return rrl.policy.PolicyView.from_torch(layer.to(device), kind="logits", observation_shape=(4,))


def test_a_gpu_run_repeats_itself_and_follows_the_cpu_law() -> None:
    job = make_job(balancing_policy("cuda"), RECIPE, chunk_size=500)
    first, second = collect(job, 1_000), collect(job, 1_000)
    assert np.array_equal(first.returns, second.returns)
    on_cpu = collect(make_job(balancing_policy("cpu"), RECIPE, chunk_size=500), 1_000)
    assert ks_2samp(first.returns, on_cpu.returns).pvalue > 1e-4


@pytest.mark.parametrize("attack", [SmoothedPGD(draws=16), MinimalFlip(draws=16)])
def test_attacks_on_a_gpu_stay_within_budget(attack: rrl.attacks.Attack) -> None:
    threat = rrl.ThreatModel(norm=2, episode=0.4)
    job = make_job(balancing_policy("cuda"), RECIPE, attack=attack, threat=threat)
    assert collect(job, 20).spent.max() <= 0.4 * (1 + 1e-9)
