"""Noise as an attack: its distribution, its independence between episodes, and that it looks at nothing."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from attacks.victims import context, frames_of, linear
from robustrl.attacks import PreferenceThreshold, RandomNoise
from robustrl.attacks.attacker import Attacker
from robustrl.threat import ThreatModel


def deltas(kind: Any, norm: float, *, n: int = 4000, radius: float = 0.5, **more: Any) -> torch.Tensor:
    x = torch.zeros(n, 4, dtype=torch.float64)
    return RandomNoise(kind).perturb(x, context(linear(), x, radius, norm=norm, **more))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_uniform_noise_fills_the_ball_evenly(norm: float) -> None:
    """P(||delta|| <= r) = (r / radius)^n."""
    radii = torch.linalg.vector_norm(deltas("uniform", norm), norm, dim=1).numpy() / 0.5
    assert kstest(radii, lambda r: np.clip(r, 0, 1) ** 4).pvalue > 1e-3


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_corners_are_at_the_radius_with_signs_that_are_fair_and_independent(norm: float) -> None:
    delta = deltas("corner", norm)
    torch.testing.assert_close(torch.linalg.vector_norm(delta, norm, dim=1), torch.full((4000,), 0.5, dtype=torch.float64))
    corners = np.bincount(((delta > 0).numpy() @ [1, 2, 4, 8]), minlength=16)
    assert corners.min() > 180  # of 250 +- 16


def test_gaussian_noise_is_normal_as_far_as_the_ball_allows() -> None:
    entries = deltas("gaussian", math.inf).flatten().numpy() / 0.5
    assert np.abs(entries).max() <= 1
    inner = np.abs(entries) < 1
    assert inner.mean() == pytest.approx(0.6827, abs=0.015)
    assert np.mean(np.abs(entries) < 0.5) == pytest.approx(0.3829, abs=0.015)
    lengths = deltas("gaussian", 2).norm(dim=1).numpy()
    assert lengths.max() <= 0.5
    assert np.mean(lengths > 0.4999) == pytest.approx(0.4060, abs=0.03)  # P(chi2_4 > 4)


def test_salt_and_pepper_puts_entries_at_both_ends() -> None:
    x = 0.3 * frames_of(2000).clamp(-1, 1)
    attack = RandomNoise("salt-and-pepper")
    delivered = attack.perturb(x, context(linear(), x, 2, norm=0, pixels=(-1.0, 1.0)))
    changed = delivered != x
    assert bool((changed.sum(1) == 2).all())
    torch.testing.assert_close(delivered[changed].abs(), torch.ones(4000), rtol=1e-6, atol=0)
    assert float(delivered[changed].mean()) == pytest.approx(0, abs=0.06)
    assert changed.double().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.06)


@pytest.mark.parametrize("norm", [0, 1, 2, math.inf])
def test_episodes_and_steps_get_independent_noise_that_depends_on_the_slot_alone(norm: float) -> None:
    threat = ThreatModel(norm, step=1.0)
    frames = torch.zeros(300, 4)

    def attacker() -> Attacker:
        stream = torch.Generator().manual_seed(7)
        return Attacker(RandomNoise(), threat, None, 300, pixels=(-1.0, 1.0), generator=stream)

    everyone, few = attacker(), attacker()
    some = np.array([5, 2, 250])
    rounds = [everyone.deliver(frames) for _ in range(2)]
    for delivered in rounds:
        assert torch.equal(few.deliver(frames[:3], some), delivered[some])
        assert len(delivered.unique(dim=0)) == 300
    for one, other in ((rounds[0], rounds[1]), (rounds[0][:-1], rounds[0][1:])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.12


def test_the_numbers_of_some_episodes_are_theirs() -> None:
    """Also where no slots are named, and uniform in (0, 1)."""
    for slots in (None, torch.tensor([4, 9, 2, 7])):
        everyone, few = (context(linear(), frames_of(4), 1.0, slots=slots) for _ in range(2))
        numbers, rows = everyone.uniforms(5), torch.tensor([2, 0])
        assert torch.equal(few.select(rows).uniforms(5), numbers[rows])
    numbers = context(linear(), frames_of(2000), 1.0).uniforms(7)
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert kstest((numbers[:, 1:] - numbers[:, :-1]).remainder(1).flatten().numpy(), "uniform").pvalue > 1e-3
    assert len(numbers.unique()) == 14_000


def test_it_looks_at_no_policy() -> None:
    threat = ThreatModel(2, step=0.1)
    attacker = Attacker(RandomNoise(), threat, None, 3)
    assert bool((attacker.deliver(frames_of(3)) != frames_of(3)).any())
    with pytest.raises(ValueError, match="PreferenceThreshold looks at the policy"):
        Attacker(RandomNoise(allocation=PreferenceThreshold(0.5)), threat, None, 3)


@pytest.mark.parametrize(
    ("attack", "threat", "message"),
    [
        (RandomNoise("corner"), ThreatModel(0, step=2), "distribution 'corner' does not fit threat.norm = 0"),
        (RandomNoise("salt-and-pepper"), ThreatModel(2, step=2), "distribution 'salt-and-pepper' does not fit threat.norm = 2"),
        (RandomNoise(), ThreatModel(2, step=math.inf), "RandomNoise needs a finite budget"),
    ],
)
def test_threats_that_it_cannot_serve_are_refused(attack: RandomNoise, threat: ThreatModel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.check(None, threat, None)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="distribution must be one of 'uniform'"):
        RandomNoise(cast(Any, "pink"))
