"""Attacks against certificates, through the real rollouts: never below the bound, and all the way down to it.

In `Threshold` the observation is always 0, so that a policy on all its frames sees nothing but perturbations and noise.
With the test "sum of the frames / sqrt(T) < tau" the return has clean mean p = Phi(tau / sigma), and an even allocation
attains the bound Phi(Phi^-1(p) - B / sigma); with the test "first frame < tau" a single burst attains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from torch import nn
from toys import LinearRule, Threshold, balancer

from attacks.victims import LinearQ, Matrix, Push
from robustrl.api import attack_policy, certify_policy
from robustrl.attacks import (
    ActionDeviation,
    Attack,
    AttackContext,
    GradientAttack,
    Greedy,
    LowValue,
    Margin,
    MinimalFlip,
    SmoothedPGD,
    Uniform,
)
from robustrl.certify.confidence import clopper_pearson_upper
from robustrl.certify.episode import EpisodeCertificate
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import BudgetExceededError, CertificateViolationError
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.rollouts.collect import collect, make_job
from robustrl.seeding import chunk_seeds, torch_generator
from robustrl.threat import ThreatModel

LENGTH, SIGMA, TAU, BUDGET = 10, 0.5, 0.6, 0.7
CLEAN = float(ndtr(TAU / SIGMA))
BOUND = float(ndtr(ndtri(CLEAN) - BUDGET / SIGMA))  # .4207
THREAT = ThreatModel(norm=2, episode=BUDGET)
RECIPE = EnvRecipe(factory=lambda: Threshold(LENGTH), max_episode_steps=LENGTH, noise=Gaussian(SIGMA), frame_stack=LENGTH)


def on_the_sum() -> PolicyView:
    weights = -np.ones(LENGTH) / math.sqrt(LENGTH)
    return PolicyView.from_torch(LinearRule(weights, TAU), kind="q", observation_shape=(LENGTH,), n_frames=LENGTH)


def on_the_first_frame() -> PolicyView:
    weights = -np.eye(LENGTH)[0]
    return PolicyView.from_torch(LinearRule(weights, TAU), kind="q", observation_shape=(LENGTH,), n_frames=LENGTH)


class Within(nn.Module):
    """Acts 1 if the first frame is within (-width, width)."""

    width = 2 * SIGMA

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        margin = self.width - observation[:, :1].abs()
        return torch.cat((-margin, margin), dim=1)


def on_both_sides() -> PolicyView:
    return PolicyView.from_torch(Within(), kind="q", observation_shape=(LENGTH,), n_frames=LENGTH)


@dataclass(frozen=True)
class Evenly(Attack):
    """The same push at every step."""

    budget: float

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return frames + self.budget / math.sqrt(LENGTH)


class AtStep(Attack):
    """Everything at one step."""

    def __init__(self, when: int) -> None:
        self.when, self.step = when, -1

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        self.step = int(context.step[0])
        return frames + context.allowance.to(frames.dtype)[:, None] * (1 - 1e-6) * (self.step == self.when)


class Gambler(Attack):
    """Reads the past noise: saves while the sum runs against it, spends the more the closer the test is to failing."""

    def __init__(self) -> None:
        self.step = -1

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        self.step = int(context.step[0])
        past = context.seen_stack[:, max(LENGTH - 1 - self.step, 0) : -1, 0].sum(1) / math.sqrt(LENGTH)
        chance = torch.special.ndtr((past - TAU) / SIGMA / math.sqrt(1 - self.step / LENGTH))
        share = (chance * 2).clamp(0, 1) if self.step < LENGTH - 1 else torch.ones_like(past)
        return frames + (context.allowance * (1 - 1e-6) * share.double()).to(frames.dtype)[:, None]


def mean_under(
    policy: PolicyView, attack: Attack | None, n: int = 12_000, seed: int = 0, recipe: EnvRecipe = RECIPE
) -> tuple[float, float]:
    """Mean return and a 99.99% upper limit of it."""
    job = make_job(policy, recipe, seed=seed, chunk_size=4000, attack=attack, threat=None if attack is None else THREAT)
    wins = int(collect(job, n).returns.sum())
    return wins / n, float(clopper_pearson_upper(wins, n, 1e-4))


def test_clean_means_are_the_closed_form() -> None:
    for policy, expected in (
        (on_the_sum(), CLEAN),
        (on_the_first_frame(), CLEAN),
        (on_both_sides(), 1 - 2 * ndtr(-Within.width / SIGMA)),
    ):
        assert mean_under(policy, None)[0] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 12_000))


@pytest.mark.parametrize(
    ("policy", "attack"),
    [(on_the_sum(), Evenly(BUDGET)), (on_the_first_frame(), AtStep(0))],
    ids=["even on the sum", "burst at first"],
)
def test_the_right_allocation_attains_the_bound_and_does_not_cross_it(policy: PolicyView, attack: Attack) -> None:
    mean, upper = mean_under(policy, attack)
    assert CLEAN - mean >= 0.95 * (CLEAN - BOUND)
    assert upper >= BOUND


@pytest.mark.parametrize("policy", [on_the_sum(), on_the_first_frame()], ids=["sum", "first"])
@pytest.mark.parametrize(
    "attack", [Evenly(BUDGET), AtStep(0), AtStep(LENGTH - 1), Gambler(), SmoothedPGD(draws=4, step_size=0.1), MinimalFlip(draws=4, bisections=5)],
    ids=["evenly", "first", "last", "gambler", "pgd", "flip"],
)  # fmt: skip
def test_no_attacker_crosses_the_bound(policy: PolicyView, attack: Attack) -> None:
    assert mean_under(policy, attack, n=4_000)[1] >= BOUND


PUSHED = replace(RECIPE, factory=lambda: Push(LENGTH))


def pushed(weights: np.ndarray) -> PolicyView:
    """The same two tests with a number for an action: it is positive where the discrete rule acts 1; Q(s, a) = a."""
    return PolicyView.from_torch(
        Offset(Matrix(weights[None]), TAU),
        kind="deterministic",
        observation_shape=(LENGTH,),
        n_frames=LENGTH,
        q_critic=LinearQ([1.0], np.zeros(LENGTH)),
        action_space=Push.action_space,
    )


class Offset(nn.Module):
    """A network's output plus a constant."""

    def __init__(self, inner: nn.Module, offset: float) -> None:
        super().__init__()
        self.inner, self.offset = inner, offset

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.inner(observation) + self.offset


def gradient(objective: Any, allocation: Any, steps: int = 2) -> GradientAttack:
    return GradientAttack(objective, allocation=allocation, steps=steps, draws=2)


SUM, FIRST = -np.ones(LENGTH) / math.sqrt(LENGTH), -np.eye(LENGTH)[0]
DISCRETE, CONTINUOUS = (on_the_sum(), on_the_first_frame(), RECIPE), (pushed(SUM), pushed(FIRST), PUSHED)


def test_the_continuous_version_is_the_same_problem() -> None:
    for policy in CONTINUOUS[:2]:
        mean, _ = mean_under(policy, None, recipe=PUSHED)
        assert mean == pytest.approx(CLEAN, abs=4 * math.sqrt(CLEAN * (1 - CLEAN) / 12_000))


@pytest.mark.parametrize(("version", "objective"), [(DISCRETE, Margin()), (DISCRETE, LowValue()), (CONTINUOUS, LowValue())])
def test_gradients_with_the_right_allocation_attain_the_bound_and_do_not_cross_it(version: Any, objective: Any) -> None:
    on_sum, on_first, recipe = version
    for policy, allocation in ((on_sum, Uniform()), (on_first, Greedy())):
        mean, upper = mean_under(policy, gradient(objective, allocation), recipe=recipe)
        assert CLEAN - mean >= 0.95 * (CLEAN - BOUND)
        assert upper >= BOUND


@pytest.mark.parametrize("objective", [Margin(), LowValue(), ActionDeviation()], ids=lambda objective: type(objective).__name__)
@pytest.mark.parametrize("allocation", [Greedy(), Uniform()], ids=lambda allocation: type(allocation).__name__)
def test_no_gradient_crosses_the_bound_whenever_it_spends(objective: Any, allocation: Any) -> None:
    for policies in (DISCRETE, CONTINUOUS):
        if policies is CONTINUOUS and isinstance(objective, Margin):
            continue
        for policy in policies[:2]:
            attack = gradient(objective, allocation, steps=3)
            assert mean_under(policy, attack, n=4_000, recipe=policies[2])[1] >= BOUND


def test_one_burst_on_the_sum_is_worth_what_its_closed_form_says() -> None:
    """All the budget at one step moves the sum by B / sqrt(T) only."""
    expected = float(ndtr((TAU - BUDGET / math.sqrt(LENGTH)) / SIGMA))  # .7753
    mean, _ = mean_under(on_the_sum(), AtStep(3))
    assert mean == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 12_000))


class Clairvoyant(Attack):
    """Knows the seed, and with it the noise that the first frame is about to get: no attacker of the theorem."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chunk = seed, -1

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        if not context.first_step.all():
            return frames
        self.chunk += 1
        assert context.noise is not None
        coming = context.noise.perturb(torch.zeros_like(frames), torch_generator(chunk_seeds(self.seed, self.chunk).noise))
        return frames + coming.sign() * context.allowance.to(frames.dtype)[:, None] * (1 - 1e-6)


class Outward(Attack):
    """Pushes the first frame away from 0, to the side on which it already is; an honest one always finds it at 0."""

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        if not context.first_step.all():
            return frames
        side = torch.where(frames >= 0, 1.0, -1.0)
        return frames + side * context.allowance.to(frames.dtype)[:, None] * (1 - 1e-6)


@pytest.fixture(scope="module")
def two_sided() -> EpisodeCertificate:
    return certify_policy(
        on_both_sides(), RECIPE, [0.0, 0.5], 8_000, method="paper", return_low=0, return_high=1, chunk_size=4000, seed=1
    )


def test_an_attacker_that_sees_the_coming_noise_is_caught_crossing_the_certificate(two_sided: EpisodeCertificate) -> None:
    """P(|n| < 2 sigma) = .954 may fall to .755 at B = sigma; with foresight it falls to 2 Phi(1) - 1 = .683."""
    threat, settings = ThreatModel(norm=2, episode=0.5), {"certificate": two_sided, "return_high": 1.0, "chunk_size": 2000}
    with pytest.raises(CertificateViolationError, match="the attack Clairvoyant with budget 0.5"):
        attack_policy(on_both_sides(), RECIPE, Clairvoyant(seed=2), threat, 4_000, seed=2, **settings)
    honest = attack_policy(on_both_sides(), RECIPE, Outward(), threat, 4_000, seed=2, **settings)
    one_sided = float(ndtr(1) - ndtr(-3))  # a push to one side
    assert honest.mean == pytest.approx(one_sided, abs=4 * math.sqrt(one_sided * (1 - one_sided) / 4_000))


class OnAverage(Attack):
    """Spends four times the squared budget in a quarter of the episodes."""

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        lucky = torch.rand(len(frames), 1, generator=context.generator) < 0.25
        return frames + 2 * context.allowance.to(frames.dtype)[:, None] * lucky * context.first_step[:, None]


def test_a_budget_kept_on_average_only_is_refused() -> None:
    with pytest.raises(BudgetExceededError):
        mean_under(on_the_first_frame(), OnAverage(), n=100)


BUDGETS = [0.0, 0.1, 0.2, 0.4, 0.8]


@pytest.fixture(scope="module", params=[1, 3], ids=["one frame", "three frames"])
def cartpole(request: pytest.FixtureRequest) -> tuple[PolicyView, EnvRecipe, EpisodeCertificate]:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.2), max_episode_steps=100, frame_stack=request.param)
    policy = balancer(request.param)
    return policy, recipe, certify_policy(policy, recipe, BUDGETS, 2_000)


@pytest.mark.parametrize(
    "attack", [SmoothedPGD(draws=8, step_size=0.05), MinimalFlip(draws=8, bisections=6)], ids=["pgd", "flip"]
)
def test_no_attack_on_cartpole_gets_below_the_certificate(cartpole: Any, attack: Attack) -> None:
    policy, recipe, certificate = cartpole
    means = []
    for budget in (0.1, 0.4, 0.8):
        report = attack_policy(
            policy, recipe, attack, ThreatModel(norm=2, episode=budget), 60, certificate=certificate, chunk_size=60
        )
        assert report.certified == certificate.values[BUDGETS.index(budget)]
        assert report.upper >= report.mean
        assert report.upper >= report.certified
        assert report.spent.max() <= budget * (1 + 1e-9)
        means.append(report.mean)
    assert means[2] < 0.8 * means[0]  # the attack is no straw man
    assert means[2] > certificate.values[-1]


def test_a_certificate_that_is_too_high_is_caught(cartpole: Any) -> None:
    policy, recipe, certificate = cartpole
    forged = replace(certificate, values=np.full(len(BUDGETS), 99.0))
    with pytest.raises(CertificateViolationError, match=r"below the certified 99: the certificate, the attack's accounting"):
        attack_policy(
            policy,
            recipe,
            MinimalFlip(draws=8, bisections=6),
            ThreatModel(norm=2, episode=0.8),
            60,
            certificate=forged,
            chunk_size=60,
        )
