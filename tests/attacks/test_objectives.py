"""Objectives against their definitions, written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

from attacks.victims import LinearQ, Matrix, actor, context, frames_of, linear
from robustrl.attacks import (
    ActionDeviation,
    CrossEntropy,
    Flips,
    LowValue,
    Margin,
    MinProbability,
    Objective,
    Targeted,
    Weighted,
)
from robustrl.attacks.objectives import GreedyValue, TowardsWorst
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.training.robust import Consistency

BOX = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))
NOISE = Gaussian(0.3).perturb(torch.zeros(6, 4), torch.Generator().manual_seed(0))
ONE_ZERO = torch.zeros(1, 4)


def network(n_scores: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, n_scores)).double()


class Double(nn.Module):
    """A float64 network behind the float32 door."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *observation: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat(observation, dim=1).double())


def policy(kind: str, n_scores: int, **more: object) -> PolicyView:
    space = None if kind in ("logits", "q") else BOX
    return PolicyView.from_torch(Double(network(n_scores)), kind=kind, observation_shape=(4,), action_space=space, **more)


def gain(objective: Objective, view: PolicyView, x: torch.Tensor, noise: torch.Tensor = ONE_ZERO) -> torch.Tensor:
    """What the objective gives for `x` when the true frames are others."""
    clean = frames_of(len(x))
    return objective.against(context(view, clean, 1.0), noise)(x)


def scores_under(view: PolicyView, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return torch.stack([view.scores(x + draw) for draw in noise])


X = frames_of(20, seed=1)
CLEAN = frames_of(20)
each_noise = pytest.mark.parametrize("noise", [ONE_ZERO, NOISE], ids=["no noise", "six draws"])


@each_noise
def test_deviation_of_a_gaussian_policy_is_its_divergence(noise: torch.Tensor) -> None:
    """KL(N(m, s^2) || N(m', s^2)) summed over the actions; with noise, of the mean over the draws."""
    weights, std = frames_of(2, 4, seed=5).double(), (0.5, 2.0)
    view = actor(weights, std=std)
    before, after = ((x + noise.mean(0)).double() @ weights.T for x in (CLEAN, X))
    expected = kl_divergence(Normal(before, torch.tensor(std)), Normal(after, torch.tensor(std))).sum(1)
    torch.testing.assert_close(gain(ActionDeviation(), view, X, noise), expected, rtol=1e-5, atol=1e-6)


@each_noise
def test_deviation_of_a_deterministic_policy_is_the_squared_distance(noise: torch.Tensor) -> None:
    view = policy("deterministic", 2)
    before, after = (scores_under(view, x, noise).mean(0) for x in (CLEAN, X))
    expected = (before - after).square().sum(1) / 2
    torch.testing.assert_close(gain(ActionDeviation(), view, X, noise), expected, rtol=1e-9, atol=0)


def test_deviation_of_a_squashed_policy_is_that_of_its_greedy_actions_in_standard_deviations() -> None:
    view = policy("squashed", 4)
    (before, log_std), (after, _) = (view.scores(x).chunk(2, -1) for x in (CLEAN, X))
    expected = ((before.tanh() - after.tanh()) / log_std.exp()).square().sum(1) / 2  # half the range cancels
    torch.testing.assert_close(gain(ActionDeviation(), view, X), expected, rtol=1e-5, atol=1e-9)


@each_noise
def test_deviation_of_a_categorical_policy_is_the_divergence_of_its_mixtures(noise: torch.Tensor) -> None:
    view = policy("logits", 3)
    before, after = (scores_under(view, x, noise).softmax(-1).mean(0) for x in (CLEAN, X))
    expected = kl_divergence(Categorical(before), Categorical(after))
    torch.testing.assert_close(gain(ActionDeviation(), view, X, noise), expected, rtol=1e-9, atol=1e-12)


class Affine(nn.Module):
    """a * Q + b."""

    def __init__(self, inner: nn.Module, scale: float, offset: float) -> None:
        super().__init__()
        self.inner, self.scale, self.offset = inner, scale, offset

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.scale * self.inner(observation) + self.offset


def test_action_values_count_in_units_of_their_spread() -> None:
    view = policy("q", 3)
    q, attacked = view.scores(CLEAN), view.scores(X)
    scale = q.std(-1, unbiased=False, keepdim=True)
    expected = kl_divergence(Categorical(logits=q / scale), Categorical(logits=attacked / scale))
    torch.testing.assert_close(gain(ActionDeviation(), view, X), expected, rtol=1e-9, atol=1e-12)
    large = PolicyView.from_torch(Affine(view.actor, 1e4, 3e5), kind="q", observation_shape=(4,))
    torch.testing.assert_close(gain(ActionDeviation(), large, X), expected, rtol=1e-6, atol=1e-9)
    equal = PolicyView.from_torch(Affine(view.actor, 0.0, 1.0), kind="q", observation_shape=(4,))
    assert not gain(ActionDeviation(), equal, X).any()


@each_noise
def test_low_value_of_action_values_is_their_softmax_mean_at_the_true_state(noise: torch.Tensor) -> None:
    view = policy("q", 3)
    q = scores_under(view, CLEAN, noise).mean(0)
    chances = (scores_under(view, X, noise) / q.std(-1, unbiased=False, keepdim=True)).softmax(-1).mean(0)
    torch.testing.assert_close(gain(LowValue(), view, X, noise), -(chances * q).sum(-1), rtol=1e-9, atol=0)


@each_noise
def test_low_value_of_an_action_critic_is_q_of_the_true_state_and_the_attacked_action(noise: torch.Tensor) -> None:
    critic = Double(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    view = policy("deterministic", 2, q_critic=critic)
    expected = -torch.stack([critic(CLEAN, view.mean_action(X + draw)).squeeze(1) for draw in noise]).mean(0)
    torch.testing.assert_close(gain(LowValue(), view, X, noise), expected, rtol=1e-9, atol=0)


@each_noise
def test_low_value_of_a_state_critic_is_the_value_of_what_is_seen(noise: torch.Tensor) -> None:
    critic = Double(network(1, seed=3))
    view = policy("gaussian", 4, critic=critic)
    expected = -torch.stack([critic(X + draw).squeeze(1) for draw in noise]).mean(0)
    torch.testing.assert_close(gain(LowValue(), view, X, noise), expected, rtol=1e-9, atol=0)


@each_noise
@pytest.mark.parametrize("kind", ["logits", "q"])
def test_the_margin_is_the_best_others_less_the_best_clean_actions_mean_score(kind: str, noise: torch.Tensor) -> None:
    view = policy(kind, 3)
    best = scores_under(view, CLEAN, noise).mean(0).argmax(1)
    scores = scores_under(view, X, noise).mean(0).detach()
    others = [max(float(s) for a, s in enumerate(row) if a != b) for row, b in zip(scores, best, strict=True)]
    expected = torch.tensor(others, dtype=torch.float64) - scores[torch.arange(20), best]
    torch.testing.assert_close(gain(Margin(), view, X, noise), expected, rtol=1e-9, atol=1e-12)


def test_the_clean_situation_is_the_true_past_and_the_attacked_one_what_the_agent_saw() -> None:
    """Two frames of two entries, the action is their weighted sum; the past was pushed by `push`."""
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    critic = LinearQ([2.0], [1.0, 1.0, 1.0, 1.0])
    view = actor(weights, n_frames=2, q_critic=critic)
    past, x, push, delta = (frames_of(9, 2, seed=i) for i in range(4))
    situation = context(view, x, 1.0, seen=past[:, None])
    attacked = replace(situation, seen_stack=torch.stack((past + push, x), dim=1))
    noise = torch.zeros(1, 2)
    shift = (torch.cat((push, delta), 1).double() @ weights.T).squeeze(1)
    deviation = ActionDeviation().against(attacked, noise)(x + delta)
    torch.testing.assert_close(deviation, shift.square() / 2, rtol=1e-5, atol=1e-6)
    seen = torch.cat((past + push, x + delta), 1).double()
    expected = -(2 * (seen @ weights.T).squeeze(1) + torch.cat((past, x), 1).double().sum(1))
    torch.testing.assert_close(LowValue().against(attacked, noise)(x + delta), expected, rtol=1e-5, atol=1e-5)


class Recalls(nn.Module):
    """Scores that are the memory times the observation's first entry."""

    def forward(self, observation: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return observation[:, :1] * memory, memory + 1


def test_a_recurrent_policys_memory_counts() -> None:
    view = PolicyView(Recalls(), kind="logits", observation_shape=(4,), memory_shape=(2,))
    memory = frames_of(20, 2, seed=7)
    situation = context(view, CLEAN, 1.0, memory=memory)
    best = (CLEAN[:, :1] * memory).argmax(1)
    after = X[:, :1] * memory
    expected = after.gather(1, 1 - best[:, None]) - after.gather(1, best[:, None])
    torch.testing.assert_close(Margin().against(situation, ONE_ZERO)(X), expected.squeeze(1).double())


def recurrent(kind: str, **more: object) -> PolicyView:
    return PolicyView(Recalls(), kind=kind, observation_shape=(4,), memory_shape=(2,), **more)


@pytest.mark.parametrize(
    ("objective", "view", "message"),
    [
        (Margin(), actor(np.eye(2)), r"Margin compares discrete actions, the policy acts in Box.*: use ActionDeviation"),
        (Margin(), policy("gaussian", 4), "Margin compares discrete actions"),
        (Margin(), policy("q", 1), "Margin needs a policy with at least 2 actions, got 1"),
        (LowValue(), actor(np.eye(2)), "LowValue needs a critic, which this policy of kind 'deterministic' has not: use ActionDev"),
        (LowValue(), policy("gaussian", 4), "LowValue needs a critic, which this policy of kind 'gaussian' has not"),
        (LowValue(), policy("logits", 3), "LowValue needs a critic, which this policy of kind 'logits' has not"),
        (LowValue(), recurrent("logits"), "LowValue needs a critic"),
        (LowValue(), recurrent("logits", critic=network(1)), "LowValue needs a critic"),
    ],
)  # fmt: skip
def test_objectives_without_a_meaning_for_a_policy_are_refused(objective: Objective, view: PolicyView, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective.check(view)


@pytest.mark.parametrize(
    ("objective", "view"),
    [
        (Margin(), linear()),
        (LowValue(), linear()),
        (LowValue(), recurrent("q")),
        (LowValue(), policy("logits", 3, critic=network(1))),
        (LowValue(), actor(np.eye(2), q_critic=LinearQ([1.0, 1.0], [0.0, 0.0]))),
        (ActionDeviation(), policy("gaussian", 4)),
        (ActionDeviation(), recurrent("logits")),
        (ActionDeviation(), actor(np.eye(2))),
    ],
)
def test_objectives_take_every_policy_that_has_what_they_need(objective: Objective, view: PolicyView) -> None:
    objective.check(view)


def test_deviation_at_the_true_frame_is_zero_with_a_zero_gradient() -> None:
    for view in (policy("deterministic", 2), policy("gaussian", 4), policy("squashed", 4), actor(np.eye(4), std=(1.0,) * 4)):
        x = CLEAN.clone().requires_grad_(True)
        value = ActionDeviation().against(context(view, CLEAN, 1.0), NOISE)(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert not value.any()
        assert not gradient.any()


def test_divergences_of_nearly_equal_policies_are_not_lost_to_rounding() -> None:
    """Scores that differ by 1e-5 have a divergence of 1e-11, which no single next to 1 resolves."""
    view = PolicyView.from_torch(Matrix(1e-5 * np.eye(4)), kind="logits", observation_shape=(4,))
    before, after = (Categorical(logits=view.scores(x)) for x in (CLEAN, X))
    expected = kl_divergence(before, after)
    assert float(expected.max()) < 1e-9
    torch.testing.assert_close(gain(ActionDeviation(), view, X), expected, rtol=1e-3, atol=0)


def test_unlikely_actions_make_no_infinite_divergence() -> None:
    view = PolicyView.from_torch(Matrix(1e4 * np.eye(4)), kind="logits", observation_shape=(4,))
    value = gain(ActionDeviation(), view, X)
    assert bool(torch.isfinite(value).all())
    assert float(value.max()) > 1e3
    assert math.isfinite(float(gain(ActionDeviation(), view, CLEAN).abs().max()))


def q_policy() -> PolicyView:
    return policy("q", 3)


def by_hand(view: PolicyView, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Logits (n, draws, actions): action values in units of their spread on the clean frames."""
    scores = scores_under(view, x, noise).transpose(0, 1)
    if view.kind == "q":
        scores = scores / scores_under(view, CLEAN, noise).mean(0).std(-1, unbiased=False)[:, None, None]
    return scores


each_kind = pytest.mark.parametrize("kind", ["logits", "q"])


@each_noise
@each_kind
def test_cross_entropy_is_that_of_the_clean_action_averaged_over_draws(kind: str, noise: torch.Tensor) -> None:
    view = policy(kind, 3)
    best = scores_under(view, CLEAN, noise).mean(0).argmax(-1)
    logits = by_hand(view, X, noise)
    expected = torch.stack([nn.functional.cross_entropy(logits[:, j], best, reduction="none") for j in range(len(noise))]).mean(
        0
    )
    torch.testing.assert_close(gain(CrossEntropy(), view, X, noise), expected)


@each_noise
@each_kind
def test_min_probability_is_the_logarithm_of_the_mean_share_of_votes(kind: str, noise: torch.Tensor) -> None:
    """-log mean_j softmax(z_j)[a*]: the form of SmoothAdv."""
    view = policy(kind, 3)
    best = scores_under(view, CLEAN, noise).mean(0).argmax(-1, keepdim=True)
    expected = -by_hand(view, X, noise).softmax(-1).mean(1).gather(1, best).squeeze(1).log()
    torch.testing.assert_close(gain(MinProbability(), view, X, noise), expected)


def test_min_probability_of_a_gaussian_policy_is_its_log_density_up_to_a_constant() -> None:
    view = policy("gaussian", 4)
    mean, log_std = view.scores(CLEAN).chunk(2, dim=-1)[0], view.scores(X).chunk(2, dim=-1)[1]
    density = Normal(view.scores(X).chunk(2, dim=-1)[0], log_std.exp()).log_prob(mean).sum(-1)
    torch.testing.assert_close(gain(MinProbability(), view, X), -density - math.log(2 * math.pi))


@each_noise
def test_a_saturated_critic_still_has_a_cross_entropy_with_a_slope(noise: torch.Tensor) -> None:
    """Action values in the thousands are one-hot under a softmax; in units of their spread they are not."""
    view = q_policy()
    huge = PolicyView.from_torch(Scaled(view.actor, 1e5), kind="q", observation_shape=(4,))
    for objective in (CrossEntropy(), MinProbability(), TowardsWorst()):
        torch.testing.assert_close(gain(objective, huge, X, noise), gain(objective, view, X, noise), rtol=1e-4, atol=1e-6)


class Scaled(nn.Module):
    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.factor * self.network(observation)


CRITIC = Double(network(3, seed=9))


@each_noise
@pytest.mark.parametrize("critic", [None, CRITIC], ids=["own", "outside"])
@each_kind
def test_targeted_is_the_lead_of_the_action_that_is_worst_in_the_true_state(
    kind: str, critic: nn.Module | None, noise: torch.Tensor
) -> None:
    view = policy(kind, 3)
    values = scores_under(view, CLEAN, noise).mean(0) if critic is None else critic(CLEAN)
    worst = values.argmin(-1)
    scores = scores_under(view, X, noise).mean(0)
    others = torch.stack([row[torch.arange(3) != int(w)].max() for row, w in zip(scores, worst, strict=True)])
    expected = scores[torch.arange(20), worst] - others
    torch.testing.assert_close(gain(Targeted(critic), view, X, noise), expected)
    towards = by_hand(view, X, noise).log_softmax(-1).mean(1)[torch.arange(20), worst]
    torch.testing.assert_close(gain(TowardsWorst(critic), view, X, noise), towards)


@each_noise
@each_kind
def test_a_critic_from_outside_values_actions_in_the_true_state(kind: str, noise: torch.Tensor) -> None:
    view = policy(kind, 3)
    values = CRITIC(CLEAN)
    expected = -(by_hand(view, X, noise).softmax(-1).mean(1) * values).sum(-1)
    torch.testing.assert_close(gain(LowValue(CRITIC), view, X, noise), expected)
    votes = scores_under(view, X, noise).argmax(-1).T
    torch.testing.assert_close(gain(GreedyValue(CRITIC), view, X, noise), -values.gather(1, votes).mean(1))


def test_a_critic_of_continuous_actions_from_outside_replaces_the_victims_own() -> None:
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    own, outside = LinearQ([5.0, 5.0], torch.zeros(4)), LinearQ(g, torch.ones(4))
    view = actor(frames_of(2, 4, seed=3), q_critic=own)
    expected = -(view.mean_action(X) @ g + CLEAN.double().sum(1))
    torch.testing.assert_close(gain(LowValue(outside), view, X), expected)
    LowValue(outside).check(actor(frames_of(2, 4)))
    with pytest.raises(TypeError, match="critic must be a torch.nn.Module or None, got str"):
        LowValue("rs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"critic must give values \(n, 3\), it gives \(20, 1\)"):
        gain(LowValue(Matrix([[1.0] * 4])), q_policy(), X)


def test_reports_tell_a_critic_from_outside_by_its_weights() -> None:
    assert LowValue().to_dict() == {"kind": "LowValue"}
    texts = [LowValue(Double(network(3, seed=seed))).to_dict()["critic"] for seed in (9, 9, 8)]
    assert texts[0] == texts[1] != texts[2]


@each_noise
def test_flips_counts_the_draws_whose_action_is_not_the_usual_one(noise: torch.Tensor) -> None:
    view = q_policy()
    usual = torch.stack([row.bincount(minlength=3).argmax() for row in scores_under(view, CLEAN, noise).argmax(-1).T])
    expected = (scores_under(view, X, noise).argmax(-1) != usual).double().mean(0)
    torch.testing.assert_close(gain(Flips(), view, X, noise), expected)
    assert float(gain(Flips(), view, CLEAN, noise).max()) <= 2 / 3  # of 3 actions one has a third of the votes
    continuous = actor(frames_of(2, 4, seed=3))
    moved = (continuous.mean_action(X) - continuous.mean_action(CLEAN)).norm(dim=1).float()
    torch.testing.assert_close(gain(Flips(), continuous, X), moved, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_is_robust_sarsa_with_a_deviation() -> None:
    rho, view = 0.3, q_policy()
    both = Weighted(((1 - rho, LowValue(CRITIC)), (rho, ActionDeviation())))
    expected = (1 - rho) * gain(LowValue(CRITIC), view, X) + rho * gain(ActionDeviation(), view, X)
    torch.testing.assert_close(gain(both, view, X), expected)
    described = both.to_dict()["terms"]
    assert described[1] == [rho, {"kind": "ActionDeviation"}]
    with pytest.raises(ValueError, match="LowValue needs a critic"):
        Weighted(((1.0, LowValue()),)).check(actor(frames_of(2, 4)))


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ((), ValueError, r"terms must be pairs \(weight, objective\), got none"),
        (((0.0, Margin()),), ValueError, "weight must be a finite number > 0"),
        (((1.0, "mad"),), TypeError, "terms must be pairs"),
        (((1.0, Consistency(Gaussian(0.1))),), TypeError, r"robustrl\.attacks.* of type robustrl\.training\.robust"),
        (((1.0, Flips()),), ValueError, "terms must have gradients"),
    ],
)
def test_bad_sums_are_refused(terms: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Weighted(terms)


@pytest.mark.parametrize("objective", [CrossEntropy(), Targeted(), TowardsWorst()], ids=lambda o: type(o).__name__)
def test_objectives_about_discrete_actions_say_so(objective: Objective) -> None:
    with pytest.raises(ValueError, match=f"{type(objective).__name__} is about discrete actions"):
        objective.check(actor(frames_of(2, 4)))
    objective.check(linear())
