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
    FGSM,
    ActionDeviation,
    Allocation,
    Attack,
    AttackContext,
    Geometric,
    GradientAttack,
    Greedy,
    LowValue,
    Margin,
    MinProbability,
    PreferenceThreshold,
    QGapThreshold,
    RandomNoise,
    Spread,
    Square,
    StrategicallyTimed,
    Uniform,
)
from robustrl.attacks.timing import preference
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


@pytest.mark.parametrize("norm", [1, 2])
def test_geometric_always_spends_the_same_share_of_what_is_left(norm: int) -> None:
    """Left after t steps: B (1 - share)^t for norm 1, B (1 - share^2)^(t / 2) for norm 2."""
    charged = spent(Geometric(0.5), ThreatModel(norm=norm, episode=BUDGET))
    left = BUDGET * (1 - 0.5**norm) ** (np.arange(HORIZON) / norm)
    np.testing.assert_allclose(charged[:8], 0.5 * left[:8, None].repeat(5, axis=1), rtol=1e-3)


def test_without_an_episode_budget_a_share_is_one_of_the_radius() -> None:
    np.testing.assert_allclose(spent(Geometric(0.5), ThreatModel(norm=math.inf, step=0.2)), 0.1, rtol=1e-4)
    np.testing.assert_allclose(spent(Geometric(1.0), ThreatModel(norm=2, step=0.2)), 0.2, rtol=1e-4)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 1.5"):
        Geometric(1.5)


@pytest.mark.parametrize("allocation", [Uniform(), Spread(3), Greedy(), Geometric(0.3)], ids=lambda a: type(a).__name__)
def test_episodes_of_norm_0_count_frames_and_frames_count_entries(allocation: Allocation) -> None:
    """With 2 frames left and 3 entries of each, a step may change 3 entries, not 2 or 3 / sqrt(steps left)."""
    x = frames_of(4)
    left = torch.tensor([2.0, 1.0, 7.0, 2.0], dtype=torch.float64)
    there = context(linear(), x, 3.0, norm=0, remaining=left, steps_left=9, pixels=(-9.0, 9.0))
    delivered = GradientAttack(Margin(), allocation=allocation).perturb(x, there)
    assert ((delivered != x).sum(1) == 3).all()


def wide(kind: str, n_actions: int = 3) -> PolicyView:
    torch.manual_seed(0)
    return PolicyView.from_torch(torch.nn.Linear(4, n_actions), kind=kind, observation_shape=(4,))  # type: ignore[arg-type]


TIMED: list[Any] = [
    lambda when: GradientAttack(MinProbability(), allocation=when, draws=2),
    lambda when: FGSM(allocation=when),
    lambda when: Square(allocation=when, queries=10),
    lambda when: RandomNoise(allocation=when),
]


@pytest.mark.parametrize("make", TIMED)
@pytest.mark.parametrize("kind", ["logits", "q"])
def test_a_preference_of_0_is_always_and_above_1_never_bit_for_bit(make: Any, kind: str) -> None:
    view, x = wide(kind), 3 * frames_of(50)
    x[0, 0] = -0.0

    def delivered(attack: Attack) -> torch.Tensor:
        return attack.perturb(x, context(view, x, 0.5)).view(torch.int32)

    always, never = delivered(make(PreferenceThreshold(0.0))), delivered(make(PreferenceThreshold(1.0 + 1e-9)))
    assert torch.equal(always, delivered(make(Greedy())))
    assert torch.equal(never, x.view(torch.int32))
    assert not torch.equal(always, never)


@pytest.mark.parametrize("kind", ["logits", "q"])
def test_only_steps_are_attacked_whose_preference_reaches_the_threshold(kind: str) -> None:
    """max softmax - min softmax, at temperature 1 for action values too."""
    view, x = wide(kind), 3 * frames_of(200)
    shares = view.scores(x).softmax(-1)
    gap = (shares.amax(-1) - shares.amin(-1)).detach()
    delivered = FGSM(allocation=PreferenceThreshold(0.6)).perturb(x, context(view, x, 0.5))
    assert torch.equal((delivered != x).any(1), gap >= 0.6)
    assert 20 < int((gap >= 0.6).sum()) < 180


def test_the_preference_of_a_continuous_policy_is_the_largest_singular_value_of_its_derivative() -> None:
    weights = frames_of(2, 4, seed=3).double()
    x = frames_of(5)
    for std in ((), (0.5, 2.0)):
        view = actor(weights, std=std)
        scaled = weights / torch.tensor(std or (1.0, 1.0))[:, None]
        largest = float(torch.linalg.matrix_norm(scaled, 2))
        found = preference(context(view, x, 1.0))
        torch.testing.assert_close(found, torch.full((5,), largest, dtype=torch.float64), rtol=1e-6, atol=0)
        for least, attacked in ((largest * 0.999, True), (largest * 1.001, False)):
            attack = GradientAttack(ActionDeviation(), allocation=PreferenceThreshold(least))
            assert bool((attack.perturb(x, context(view, x, 0.5)) != x).any()) is attacked
    with torch.no_grad():
        assert preference(context(actor(weights), x, 1.0)).shape == (5,)


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.8, 1.0])
def test_a_calibrated_threshold_attacks_the_share_that_was_asked_for(rate: float) -> None:
    """On fresh steps within the binomial interval of 4 standard deviations; on the steps themselves exactly."""
    view, old, fresh = wide("logits"), 3 * frames_of(2000), 3 * frames_of(2000, seed=1)
    allocation = PreferenceThreshold.calibrated(context(view, old, 1.0), rate, Uniform())
    assert allocation.allocation == Uniform()
    shares = [float((preference(context(view, x, 1.0)) >= allocation.least).double().mean()) for x in (old, fresh)]
    assert shares[0] == pytest.approx(rate, abs=1 / 2000)
    assert shares[1] == pytest.approx(rate, abs=4 * math.sqrt(2 * max(rate * (1 - rate), 1e-3) / 2000))
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 0"):
        PreferenceThreshold.calibrated(context(view, old, 1.0), 0)


def test_the_gap_of_action_values_decides_where_it_should() -> None:
    view, x = wide("q"), 3 * frames_of(200)
    values = view.scores(x).detach()
    gap = values.amax(-1) - values.amin(-1)
    least = float(gap.median())
    delivered = FGSM(allocation=QGapThreshold(least)).perturb(x, context(view, x, 0.5))
    assert torch.equal((delivered != x).any(1), gap >= least)
    with pytest.raises(ValueError, match="QGapThreshold compares action values, got a policy of kind 'logits'"):
        FGSM(allocation=QGapThreshold(1.0)).check(wide("logits"), ThreatModel(2, step=1.0), None)
    with pytest.raises(ValueError, match="got no policy"):
        RandomNoise(allocation=StrategicallyTimed(1.0, QGapThreshold(1.0))).check(None, ThreatModel(2, step=1.0), None)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PreferenceThreshold(-0.1), ValueError, "least must be >= 0, got -0.1"),
        (lambda: PreferenceThreshold(math.nan), ValueError, "least must be"),
        (lambda: PreferenceThreshold(0.5, "greedy"), TypeError, "allocation must be an allocation"),  # type: ignore[arg-type]
        (lambda: QGapThreshold(-1.0), ValueError, "gap must be >= 0"),
        (lambda: QGapThreshold(1.0, Greedy), TypeError, "allocation must be an allocation"),  # type: ignore[arg-type]
        (lambda: Geometric(0.0), ValueError, "share must be"),
    ],
)
def test_bad_thresholds_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_threshold_of_0_attacks_a_policy_that_does_not_care_at_all() -> None:
    """Equal scores: preference and gap are exactly 0, and thresholds are reached by what equals them."""
    view = PolicyView.from_torch(LinearRule(torch.zeros(4)), kind="q", observation_shape=(4,))
    x = frames_of(5)
    for always in (PreferenceThreshold(0.0), QGapThreshold(0.0)):
        assert bool((RandomNoise(allocation=always).perturb(x, context(view, x, 0.5)) != x).any(1).all())
    for never in (PreferenceThreshold(1e-9), QGapThreshold(1e-9)):
        assert torch.equal(RandomNoise(allocation=never).perturb(x, context(view, x, 0.5)), x)
