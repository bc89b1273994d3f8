"""Allocations spend what they say, when they say it, and never more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import LinearRule, Steps

from attacks.victims import actor, context, cost, frames_of, linear, play
from robustrl.attacks import (
    Allocation,
    AttackContext,
    GradientAttack,
    Greedy,
    LowValue,
    Margin,
    Spread,
    StrategicallyTimed,
    Uniform,
)
from robustrl.envs.recipe import EnvRecipe
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import run_chunk
from robustrl.rollouts.collect import make_job
from robustrl.threat import ThreatModel

HORIZON, BUDGET = 12, 0.7


def spent(allocation: Allocation, threat: ThreatModel, horizon: int = HORIZON, **more: Any) -> np.ndarray:
    attack = GradientAttack(Margin(), allocation=allocation, random_start=False, steps=3, draws=1)
    return play(attack, linear(), threat, horizon, **more)


def total(charged: np.ndarray, norm: float) -> np.ndarray:
    return np.linalg.norm(charged, norm, axis=0)


@pytest.mark.parametrize("norm", [1, 2])
def test_uniform_spends_exactly_the_budget_at_the_same_rate_at_every_step(norm: int) -> None:
    charged = spent(Uniform(), ThreatModel(norm=norm, episode=BUDGET))
    np.testing.assert_allclose(charged, BUDGET / HORIZON ** (1 / norm), rtol=1e-4)
    np.testing.assert_allclose(total(charged, norm), BUDGET, rtol=1e-5)
    assert (total(charged, norm) <= BUDGET * (1 + 1e-12)).all()


@pytest.mark.parametrize("norm", [1, 2])
def test_spread_spends_the_budget_over_its_steps_and_then_nothing(norm: int) -> None:
    charged = spent(Spread(4), ThreatModel(norm=norm, episode=BUDGET))
    np.testing.assert_allclose(charged[:4], BUDGET / 4 ** (1 / norm), rtol=1e-4)
    assert charged[4:].max() < 3e-3 * BUDGET  # rounding's crumbs
    assert (total(charged, norm) <= BUDGET * (1 + 1e-12)).all()


def test_spread_over_more_steps_than_there_are_is_uniform() -> None:
    threat = ThreatModel(norm=2, episode=BUDGET)
    assert np.array_equal(spent(Spread(100), threat), spent(Uniform(), threat))


@pytest.mark.parametrize("norm", [1, 2])
def test_greedy_spends_everything_at_once(norm: int) -> None:
    charged = spent(Greedy(), ThreatModel(norm=norm, episode=BUDGET))
    np.testing.assert_allclose(charged[0], BUDGET, rtol=1e-5)
    assert charged[1:].max() < 3e-3 * BUDGET  # rounding's crumbs


@pytest.mark.parametrize("allocation", [Greedy(), Uniform(), Spread(3)])
def test_a_radius_per_step_is_used_in_full_where_there_is_no_episode_budget(allocation: Allocation) -> None:
    for norm in (1, 2, math.inf):
        np.testing.assert_allclose(spent(allocation, ThreatModel(norm=norm, step=0.3)), 0.3, rtol=1e-5)


def test_the_radius_of_a_step_holds_on_top_and_what_it_saves_is_spent_later() -> None:
    """Spread over 2 steps wants B / sqrt(2) = .495 each, and may have .3: after that .3 per step until B^2 is gone."""
    charged = spent(Spread(2), ThreatModel(norm=2, step=0.3, episode=BUDGET))
    last = math.sqrt(BUDGET**2 - 5 * 0.3**2)
    np.testing.assert_allclose(charged[:6].T, [[0.3] * 5 + [last]] * 5, rtol=1e-3)
    assert charged[6:].max() < 3e-3
    greedy = spent(Greedy(), ThreatModel(norm=2, step=0.3, episode=BUDGET))
    np.testing.assert_allclose(greedy[:6].T, [[0.3] * 5 + [last]] * 5, rtol=1e-3)


def test_what_an_early_end_of_attacks_saves_goes_to_the_later_steps() -> None:
    """At steps where nothing can be gained nothing is spent; the others share the whole budget."""
    policy = actor([[1.0, 0.0]], q_critic=_CriticSometimes())

    def frames(t: int) -> torch.Tensor:
        return torch.tensor([[1.0, float(t % 3 == 0)]]).expand(5, 2).clone()

    attack = GradientAttack(LowValue(), random_start=False, steps=3, draws=1)
    charged = play(attack, policy, ThreatModel(norm=2, episode=BUDGET), HORIZON, frames=frames)
    attacked = np.arange(HORIZON) % 3 == 0
    assert (charged[attacked] > 0.1).all()
    assert not charged[~attacked].any()
    left, expected = BUDGET**2, []
    for t in np.arange(HORIZON)[attacked]:
        expected.append(left / (HORIZON - t))
        left -= expected[-1]
    np.testing.assert_allclose(charged[attacked].T ** 2, [expected] * 5, rtol=1e-3)


class _CriticSometimes(torch.nn.Module):
    """Q(s, a) = a * s[1]: actions matter where the second entry is 1."""

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return action[:, 0] * observation[:, 1]


def test_strategic_timing_attacks_where_the_gain_suffices_and_only_there() -> None:
    """On a linear rule the gain is radius * ||w||, whatever the frame; scaled frames of a quadratic rule differ."""
    policy, x = PolicyView.from_torch(_Bowl(), kind="q", observation_shape=(4,)), frames_of(40)
    plain = GradientAttack(Margin(), allocation=Greedy(), random_start=False, draws=1)
    delivered = plain.perturb(x, context(policy, x, 0.3))
    gains = policy.scores(delivered)[:, 1] - policy.scores(x)[:, 1]
    least = float(gains.double().median())
    timed = GradientAttack(Margin(), allocation=StrategicallyTimed(least), random_start=False, draws=1)
    chosen = timed.perturb(x, context(policy, x, 0.3))
    for i in range(40):
        assert torch.equal(chosen[i], delivered[i] if float(gains[i]) >= least else x[i])
    early = context(policy, x, 0.3, steps_left=9)
    assert torch.equal(StrategicallyTimed(1.0, Spread(3)).radius(early), Spread(3).radius(early))
    assert StrategicallyTimed(0.1, _Never()).pays(torch.ones(3)).tolist() == [False] * 3


class _Double(Allocation):
    def radius(self, context: AttackContext) -> torch.Tensor:
        return 2 * context.allowance


def test_an_allocation_that_asks_for_too_much_gets_the_allowance() -> None:
    charged = spent(_Double(), ThreatModel(norm=2, step=0.2, episode=BUDGET))
    np.testing.assert_allclose(charged[:12].max(1)[:10], 0.2, rtol=1e-4)


def test_every_episode_shares_out_its_own_remainder() -> None:
    """Some have nothing left, and drop out of the batch."""
    x, left = frames_of(6), torch.tensor([0.0, 0.4, 0.0, 0.8, 1.2, 0.0], dtype=torch.float64)
    situation = context(linear(), x, left.clamp(max=0.5), steps_left=4, step=3, remaining=left)
    for allocation, steps in ((Uniform(), 4), (Spread(5), 2)):
        attack = GradientAttack(Margin(), allocation=allocation, random_start=False, draws=1)
        charged = cost(x, attack.perturb(x, situation))
        torch.testing.assert_close(charged, (left / math.sqrt(steps)).clamp(max=0.5), rtol=1e-4, atol=0)


class _Never(Greedy):
    def pays(self, gain: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gain, dtype=torch.bool)


class _Bowl(torch.nn.Module):
    """Action 0 is worth 100 everywhere, action 1 the squared distance from the origin."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        distance = observation.square().sum(1)
        return torch.stack((torch.full_like(distance, 100.0), distance), dim=1)


@pytest.mark.parametrize(
    ("allocation", "threat", "length", "expected"),
    [
        (Uniform(), ThreatModel(norm=2, episode=BUDGET), 12, BUDGET),
        (Uniform(), ThreatModel(norm=1, episode=BUDGET), 12, BUDGET),
        (Uniform(), ThreatModel(norm=2, episode=BUDGET), 5, BUDGET * math.sqrt(5 / 12)),  # ends before its horizon
        (Spread(8), ThreatModel(norm=2, episode=BUDGET), 5, BUDGET * math.sqrt(5 / 8)),
        (Spread(4), ThreatModel(norm=2, episode=BUDGET), 5, BUDGET),
        (Uniform(), ThreatModel(norm=2, step=0.1), 12, 0.1 * math.sqrt(12)),
        (Spread(3), ThreatModel(norm=1, step=0.1, episode=BUDGET), 12, BUDGET),
        (Uniform(), ThreatModel(norm=math.inf, step=0.1), 12, 0.1),
    ],
)
def test_real_episodes_spend_what_the_allocation_says(
    allocation: Allocation, threat: ThreatModel, length: int, expected: float
) -> None:
    rule = PolicyView.from_torch(LinearRule([1.0, 2.0, -1.0, 0.5], 0.1), kind="q", observation_shape=(4,))
    recipe = EnvRecipe(factory=lambda: Steps(length), max_episode_steps=12)
    attack = GradientAttack(Margin(), allocation=allocation, steps=3, draws=1, random_start=False)
    episodes = run_chunk(make_job(rule, recipe, chunk_size=5, attack=attack, threat=threat), 0, 5)
    assert (episodes.lengths == length).all()
    np.testing.assert_allclose(episodes.spent, expected, rtol=1e-4)
    assert (episodes.spent <= expected * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Spread(0), ValueError, "n_steps must be an integer >= 1, got 0"),
        (lambda: Spread(2.5), TypeError, "n_steps must be an integer"),
        (lambda: StrategicallyTimed(0.0), ValueError, "least_gain must be a finite number > 0"),
        (lambda: StrategicallyTimed(math.nan), ValueError, "least_gain must be"),
        (lambda: StrategicallyTimed(0.1, 3), TypeError, r"allocation must be an allocation such as attacks.Uniform\(\), got 3"),
        (lambda: StrategicallyTimed(0.1, Greedy), TypeError, "allocation must be an allocation"),
    ],
)  # fmt: skip
def test_bad_allocations_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
