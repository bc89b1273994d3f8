"""What is gathered: true observations of whole episodes, whoever tampers with what the agent sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import Steps, balancer

from robustrl.attacks import GradientAttack, Margin
from robustrl.envs.recipe import EnvRecipe
from robustrl.threat import ThreatModel
from robustrl.training.gathering import SLOTS, Stacks, gather

CARTPOLE = EnvRecipe.of("CartPole-v1", max_episode_steps=60)


class Marked(Steps):
    """`Steps` whose observations also carry a number of the episode's own."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**options)
        self.mark = self.np_random.random()
        return np.float32([0, self.mark, 0, 0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        frame, *rest = super().step(action)
        frame[1] = self.mark
        return frame, *rest


def test_episodes_are_told_apart_where_some_end_early() -> None:
    """In `Steps` the observation is the number of steps taken: an episode of length n has 0, 1, ..., n - 1, once each."""
    recipe = EnvRecipe(factory=lambda: Marked(rate=0.2, flat=True), max_episode_steps=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
        stacks = gather(balancer(), recipe, 500, 0)
    lengths = set()
    for episode in stacks.episodes.unique()[:-SLOTS]:  # the last chunk may be cut
        steps = stacks.frames[stacks.episodes == episode][:, 0, 0].tolist()
        assert steps == list(range(len(steps)))
        assert len(stacks.frames[stacks.episodes == episode][:, 0, 1].unique()) == 1
        lengths.add(len(steps))
    assert len(lengths) > 3


def test_joined_rollouts_have_episodes_of_their_own() -> None:
    parts = [gather(balancer(), CARTPOLE, 200, seed) for seed in (0, 1)]
    joined = Stacks.joined(parts)
    assert len(joined) == 400
    ours, theirs = joined.episodes[:200], joined.episodes[200:]
    assert not torch.isin(ours, theirs).any()
    assert torch.equal(joined.frames[200:], parts[1].frames)


def test_an_attacker_leads_the_agent_astray_and_the_true_observations_are_kept() -> None:
    attack, threat = GradientAttack(Margin()), ThreatModel(norm=math.inf, step=0.15)
    clean, misled = gather(balancer(), CARTPOLE, 800, 3), gather(balancer(), CARTPOLE, 800, 3, attack=attack, threat=threat)
    assert misled.frames[:, 0, 2].abs().mean() > 2 * clean.frames[:, 0, 2].abs().mean()
    first = [part.frames[:, 0] for part in (clean, misled)]
    starts = [rows[(rows.abs() <= 0.05).all(1)] for rows in first]
    assert all(len(rows) for rows in starts)  # CartPole starts within 0.05: attacked frames would be outside
    assert np.isfinite(misled.frames.numpy()).all()
