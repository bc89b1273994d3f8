"""The attacks on smoothed policies: least cost on linear rules, never over budget, nothing spent for nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import balancer, network_balancer

from attacks.victims import BIAS, WEIGHTS, actor, context, cost, frames_of, linear
from robustrl.attacks import Attack, AttackContext, FlipAttack, MinimalFlip, SmoothedPGD
from robustrl.envs.recipe import EnvRecipe
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.policy import Padding, PolicyView
from robustrl.rollouts.chunk import run_chunk
from robustrl.rollouts.collect import make_job
from robustrl.threat import ThreatModel

ATTACKS = [SmoothedPGD(draws=8), MinimalFlip(draws=8)]
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=["pgd", "flip"])


def margins(frames: torch.Tensor, weights: torch.Tensor = WEIGHTS) -> torch.Tensor:
    return frames.double() @ weights + BIAS


def test_pgd_flips_a_linear_rule_within_one_step_of_the_least_norm() -> None:
    """The least l2 norm that flips the sign of w . x + b is |w . x + b| / ||w||."""
    x, step = frames_of(300), 0.01
    least = margins(x).abs() / WEIGHTS.norm()
    attack = SmoothedPGD(draws=1, step_size=step)
    delivered = attack.perturb(x, context(linear(), x, 10.0))
    assert bool((margins(delivered).sign() != margins(x).sign()).all())
    spent = cost(x, delivered)
    assert bool((spent >= least - 1e-6).all())
    assert bool((spent <= least + step + 1e-5).all())


@pytest.mark.parametrize(("norm", "dual"), [(1, math.inf), (math.inf, 1)])
def test_flips_under_other_norms_cost_what_the_dual_norm_says(norm: float, dual: float) -> None:
    """The least p-norm that flips the sign of w . x + b is |w . x + b| / ||w||_dual."""
    x, step = frames_of(200), 0.02
    least = margins(x).abs() / torch.linalg.vector_norm(WEIGHTS, dual)
    for attack, excess in ((SmoothedPGD(draws=1, step_size=step), step), (MinimalFlip(draws=1, bisections=14), 8 / 2**14)):
        situation = context(linear(), x, 8.0, norm=norm)
        delivered = attack.perturb(x, situation)
        attack.check(situation.policy, ThreatModel(norm=norm, step=8.0), None)
        assert bool((margins(delivered).sign() != margins(x).sign()).all())
        spent = cost(x, delivered, norm)
        assert bool((spent >= least - 1e-6).all())
        assert bool((spent <= least + excess + 1e-5).all())


def test_minimal_flip_finds_the_least_norm_up_to_its_bisection() -> None:
    x, budget, bisections = frames_of(300), 4.0, 12
    least = margins(x).abs() / WEIGHTS.norm()
    within = least < budget
    delivered = MinimalFlip(draws=1, bisections=bisections).perturb(x, context(linear(), x, budget))
    spent = cost(x, delivered)
    assert bool((margins(delivered).sign() != margins(x).sign())[within].all())
    assert bool((spent[within] <= least[within] + budget / 2**bisections + 1e-5).all())
    assert bool((spent[within] >= least[within] - 1e-6).all())


@pytest.mark.parametrize(
    "noise", [Gaussian(0.3), Uniform(0.4), Laplace(0.2), Gaussian((0.1, 0.2, 0.3, 0.4))], ids=lambda n: n.scale
)
def test_pgd_flips_the_mean_over_its_noise_draws_at_the_least_norm(noise: Noise) -> None:
    """The mean of a linear rule over draws is the rule at the mean draw."""
    x, step, attack = frames_of(100), 0.02, SmoothedPGD(draws=16, step_size=0.02)
    mean = noise.perturb(torch.zeros(16, 4), torch.Generator().manual_seed(0)).mean(0)
    clean, offset = margins(x).sign(), margins(x + mean)
    delivered = attack.perturb(x, context(linear(), x, 10.0, noise=noise))
    spent = cost(x, delivered)
    least = torch.where(offset.sign() == clean, offset.abs() / WEIGHTS.norm(), 0.0)
    decided = margins(x).abs() > 1.0  # beyond doubt which action the attacker takes for the clean one
    assert bool(decided.sum() > 50)
    assert bool((spent >= least - 1e-6)[decided].all())
    assert bool((spent <= least + step + 1e-4)[decided].all())


@each_attack
def test_entries_under_the_mask_are_left_alone_and_the_rest_pays(attack: FlipAttack) -> None:
    x, mask = frames_of(100), (True, False, True, False)
    least = margins(x).abs() / (WEIGHTS * torch.tensor(mask)).norm()
    delivered = replace(attack, draws=1).perturb(x, context(linear(), x, 8.0, mask=mask))
    assert torch.equal(delivered[:, 1::2], x[:, 1::2])
    flipped = margins(delivered).sign() != margins(x).sign()
    assert torch.equal(flipped, least < 8.0)
    assert bool((cost(x, delivered)[flipped] <= least[flipped] + 0.02).all())


def test_minimal_flip_wins_the_stated_share_of_draws() -> None:
    """The closed form: the share-quantile of the noise along w."""
    x, noise = frames_of(50), Gaussian(0.3)
    draws = noise.perturb(torch.zeros(101, 4), torch.Generator().manual_seed(0)).double() @ WEIGHTS
    for confidence in (0.2, 0.5, 0.9):
        attack = MinimalFlip(draws=101, confidence=confidence, bisections=14)
        delivered = attack.perturb(x, context(linear(), x, 20.0, noise=noise))
        before, after = margins(x), margins(delivered)
        for i in torch.nonzero(before.abs() > 3).flatten():
            flipped = (after[i] + draws).sign() != before[i].sign()
            assert float(flipped.double().mean()) >= confidence
            votes = torch.sort((before[i] + draws) * before[i].sign()).values  # to be brought below zero, cheapest first
            least = max(float(votes[math.ceil(101 * confidence) - 1]), 0.0) / float(WEIGHTS.norm())
            assert float(cost(x, delivered)[i]) == pytest.approx(least, abs=20 / 2**13)


@each_attack
def test_nothing_is_spent_when_the_budget_does_not_reach_a_flip(attack: FlipAttack) -> None:
    x = frames_of(200)
    least = margins(x).abs() / WEIGHTS.norm()
    budget = 0.95 * least - 0.001
    delivered = replace(attack, draws=1).perturb(x, context(linear(), x, budget.clamp_min(0.0)))
    assert torch.equal(delivered, x)


@each_attack
@pytest.mark.parametrize(("norm", "dual"), [(1, math.inf), (math.inf, 1)])
def test_under_other_norms_too_a_flip_is_paid_for_exactly_where_the_budget_reaches(
    attack: FlipAttack, norm: float, dual: float
) -> None:
    x, attack = frames_of(200), replace(attack, draws=1)
    least = margins(x).abs() / torch.linalg.vector_norm(WEIGHTS, dual)
    short = (0.95 * least - 0.001).clamp_min(0.0)
    assert torch.equal(attack.perturb(x, context(linear(), x, short, norm=norm)), x)
    delivered = attack.perturb(x, context(linear(), x, 1.05 * least + 0.02, norm=norm))
    assert bool((margins(delivered).sign() != margins(x).sign()).all())


@each_attack
def test_without_budget_frames_come_back_bit_for_bit(attack: FlipAttack) -> None:
    x = frames_of(10)
    assert attack.perturb(x, context(linear(), x, 0.0, noise=Gaussian(0.2))) is x
    mixed = torch.tensor([0.0, 5.0] * 5)
    delivered = attack.perturb(x, context(linear(), x, mixed, noise=Gaussian(0.2)))
    assert torch.equal(delivered[::2], x[::2])
    assert not torch.equal(delivered[1::2], x[1::2])


@each_attack
@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deliveries_stay_within_the_allowance_to_the_last_bit(attack: FlipAttack, dtype: torch.dtype, norm: float) -> None:
    policy, x = network_balancer(16), (0.3 * frames_of(100)).to(dtype)
    budgets = torch.logspace(-4, 1, 100, dtype=torch.float64)
    delivered = attack.perturb(x, context(policy, x, budgets, noise=Gaussian(0.2), norm=norm))
    assert delivered.dtype == dtype
    assert delivered.shape == x.shape
    assert bool((cost(x, delivered, norm) <= budgets).all())
    assert bool((cost(x, delivered) > 0).any())


class Flat(nn.Module):
    """Scores that ignore the observation, up to a term that underflows."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        dead = torch.relu(-observation.square().sum(1, keepdim=True) - 1) + 0 * observation.sum(1, keepdim=True)
        return torch.cat((dead + 1, dead), dim=1)


@each_attack
def test_a_policy_without_gradient_is_left_alone(attack: FlipAttack) -> None:
    policy = PolicyView.from_torch(Flat(), kind="logits", observation_shape=(4,))
    x = frames_of(20)
    assert torch.equal(attack.perturb(x, context(policy, x, 3.0, noise=Gaussian(0.2))), x)


class Kinked(nn.Module):
    """sqrt at 0 has an infinite gradient."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(observation.abs().sum(1, keepdim=True))
        return torch.cat((1 + 0 * root, root), dim=1)


@each_attack
def test_a_gradient_that_is_not_finite_delivers_no_nan(attack: FlipAttack) -> None:
    policy = PolicyView.from_torch(Kinked(), kind="logits", observation_shape=(4,))
    x = torch.zeros(5, 4)
    assert bool(torch.isfinite(attack.perturb(x, context(policy, x, 3.0))).all())


class Bowls(nn.Module):
    """Action 0 wins at the origin; actions 1 and 2 win beyond x = 1 and beyond y = 1; 2 is the worse one."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x, y = observation[:, 0], observation[:, 1]
        return torch.stack((torch.ones_like(x), x - 0.2 * (1 - x), y - 0.5 * (1 - y)), dim=1)


@each_attack
def test_of_the_reachable_actions_the_one_with_the_lowest_score_is_taken(attack: FlipAttack) -> None:
    policy = PolicyView.from_torch(Bowls(), kind="q", observation_shape=(2,))
    x = torch.zeros(3, 2)
    attack = replace(attack, draws=1)
    for budget, action in ((2.0, 2), (0.9, 0)):
        delivered = attack.perturb(x, context(policy, x, budget))
        assert policy.scores(delivered).argmax(1).tolist() == [action] * 3
    nearer = torch.tensor([[0.8, 0.0]])  # now action 1 is in reach and action 2 is not
    delivered = attack.perturb(nearer, context(policy, nearer, 0.5))
    assert policy.scores(delivered).argmax(1).tolist() == [1]


@each_attack
def test_actions_that_are_hardly_worse_are_not_worth_paying_for(attack: FlipAttack) -> None:
    policy, x = PolicyView.from_torch(Bowls(), kind="q", observation_shape=(2,)), torch.zeros(2, 2)
    scores = policy.scores(x)[0].tolist()  # 1, -0.2, -0.5
    picky = replace(attack, draws=1, threshold=1.3)
    assert policy.scores(picky.perturb(x, context(policy, x, 2.0))).argmax(1).tolist() == [2, 2]
    hopeless = replace(attack, draws=1, threshold=scores[0] - scores[2] + 0.01)
    assert torch.equal(hopeless.perturb(x, context(policy, x, 2.0)), x)


@each_attack
def test_the_past_that_the_agent_saw_counts_and_not_the_true_past(attack: FlipAttack) -> None:
    """Two frames, the rule adds their entries: how far the newest must move depends on what was seen before."""
    weights = torch.ones(4, dtype=torch.float64)
    policy = linear(weights, n_frames=2)  # two frames of two entries
    x, attack = torch.full((1, 2), 0.5), replace(attack, draws=1)
    past = torch.tensor([[[0.3, 0.3]]])
    honest = context(policy, x, 5.0, seen=past)
    noisy = replace(honest, seen_stack=torch.cat((past + 1.0, x[:, None]), dim=1))
    costs = [float(cost(x, attack.perturb(x, c))) for c in (honest, noisy)]
    expected = [(1.6 + BIAS) / math.sqrt(2), (3.6 + BIAS) / math.sqrt(2)]
    assert costs == pytest.approx(expected, abs=0.02)


@each_attack
@pytest.mark.parametrize(("padding", "copies"), [("reset", 3), ("zero", 1)])
def test_the_first_frame_of_an_episode_moves_all_its_copies(attack: FlipAttack, padding: Padding, copies: int) -> None:
    policy = linear(torch.ones(6, dtype=torch.float64), n_frames=3)
    x = torch.full((1, 2), 0.5)
    spent = cost(x, replace(attack, draws=1).perturb(x, context(policy, x, 5.0, padding=padding)))
    assert float(spent) == pytest.approx((copies * 1.0 + BIAS) / (copies * math.sqrt(2)), abs=0.02)


@each_attack
def test_episodes_side_by_side_are_attacked_as_if_alone(attack: FlipAttack) -> None:
    """The noise of a step is shared, so that the attack on one episode does not depend on the others."""
    policy, x, budgets = network_balancer(32), 0.2 * frames_of(24), torch.linspace(0, 1, 24, dtype=torch.float64)
    everyone = context(policy, x, budgets, noise=Gaussian(0.2))
    together = attack.perturb(x, everyone)
    for i in range(1, 24):
        alone = context(policy, x[i : i + 1], budgets[i : i + 1], noise=Gaussian(0.2))
        torch.testing.assert_close(together[i : i + 1], attack.perturb(x[i : i + 1], alone), rtol=0, atol=1e-5)
        assert torch.equal(alone.generator.get_state(), everyone.generator.get_state())  # in later steps too


@each_attack
def test_an_attack_is_a_function_of_its_stream(attack: FlipAttack) -> None:
    policy, x = network_balancer(32), 0.2 * frames_of(50)
    one, again, other = (attack.perturb(x, context(policy, x, 0.5, noise=Gaussian(0.2), seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@each_attack
def test_frames_handed_in_are_not_written_to(attack: FlipAttack) -> None:
    x = frames_of(10)
    before, situation = x.clone(), context(linear(), x, 5.0)
    stacks = situation.clean_stack.clone(), situation.seen_stack.clone()
    attack.perturb(x, situation)
    assert torch.equal(x, before)
    assert torch.equal(situation.clean_stack, stacks[0])
    assert torch.equal(situation.seen_stack, stacks[1])


@each_attack
def test_the_budget_is_spent_over_the_whole_episode_and_hurts(attack: FlipAttack) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1), max_episode_steps=100)
    clean = run_chunk(make_job(balancer(), recipe, chunk_size=20), 0, 20)
    means = [clean.returns.mean()]
    for budget in (0.3, 0.9):
        threat = ThreatModel(norm=2, episode=budget)
        episodes = run_chunk(make_job(balancer(), recipe, chunk_size=20, attack=attack, threat=threat), 0, 20)
        assert episodes.spent.max() <= budget * (1 + 1e-9)
        assert episodes.spent.mean() > 0.5 * budget
        means.append(episodes.returns.mean())
    assert means[2] < means[1] <= means[0]
    assert means[2] < 0.7 * means[0]


def test_a_per_step_radius_is_kept_to_as_well() -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1), max_episode_steps=50)
    threat = ThreatModel(norm=2, step=0.05, episode=0.2)
    episodes = run_chunk(make_job(balancer(), recipe, chunk_size=10, attack=MinimalFlip(draws=8), threat=threat), 0, 10)
    assert 0 < episodes.spent.max() <= 0.2 * (1 + 1e-9)


def test_an_undefended_policy_can_be_attacked_too() -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", max_episode_steps=100)
    clean = run_chunk(make_job(balancer(), recipe, chunk_size=10), 0, 10).returns.mean()
    threat = ThreatModel(norm=2, episode=1.0)
    for attack in ATTACKS:
        attacked = run_chunk(make_job(balancer(), recipe, chunk_size=10, attack=attack, threat=threat), 0, 10)
        assert attacked.returns.mean() < clean


@each_attack
@pytest.mark.parametrize(
    ("threat", "message"),
    [
        (ThreatModel(norm=0, episode=2), r"threat\.norm must be 1, 2 or inf, got 0"),
        (ThreatModel(norm=2, episode=0.5, units="unit01"), "in raw units; got units='unit01'"),
        (ThreatModel(norm=2, episode=0.5, mask=(True, False, False)), "mask of 3 entries does not fit"),
        (ThreatModel(norm=2, episode=math.inf), "needs a finite budget"),
        (ThreatModel(norm=2, step=math.inf), "needs a finite budget"),
    ],
)
def test_threats_that_an_attack_cannot_serve_are_refused(attack: FlipAttack, threat: ThreatModel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.check(balancer(), threat, Gaussian(0.2))
    attack.check(balancer(), ThreatModel(norm=2, step=0.1, episode=math.inf), Gaussian(0.2))


@each_attack
def test_continuous_actions_are_refused_with_a_way_out(attack: FlipAttack) -> None:
    with pytest.raises(ValueError, match=r"flips discrete actions, the policy acts in Box\(.*: use GradientAttack"):
        attack.check(actor(np.eye(2)), ThreatModel(norm=2, episode=1.0), None)


@each_attack
@pytest.mark.parametrize("noise", [Ablation(0.5), Splitting(0.5, 0.0, 1.0)])
def test_noise_that_is_not_additive_is_refused(attack: FlipAttack, noise: Noise) -> None:
    with pytest.raises(ValueError, match="needs additive noise"):
        attack.check(balancer(), ThreatModel(norm=2, episode=1.0), noise)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (SmoothedPGD, {"draws": 0}, ValueError, "draws must be an integer >= 1"),
        (SmoothedPGD, {"step_size": 0.0}, ValueError, "step_size must be a finite number > 0"),
        (SmoothedPGD, {"multiplier": math.nan}, ValueError, "multiplier must be"),
        (SmoothedPGD, {"threshold": -0.1}, ValueError, "threshold must be >= 0"),
        (MinimalFlip, {"threshold": math.inf}, ValueError, "threshold must be"),
        (MinimalFlip, {"steps": 0}, ValueError, "steps must be an integer >= 1"),
        (MinimalFlip, {"bisections": 1.5}, TypeError, "bisections must be an integer"),
        (MinimalFlip, {"confidence": 1.0}, ValueError, r"confidence must be in \(0, 1\)"),
        (MinimalFlip, {"confidence": "half"}, TypeError, "confidence must be"),
    ],
)
def test_bad_settings_are_refused(
    kind: type[FlipAttack], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**settings)


def test_reports_name_an_attack_and_its_settings() -> None:
    assert SmoothedPGD(draws=4).to_dict() == {
        "kind": "SmoothedPGD", "draws": 4, "threshold": 0.0, "step_size": 0.01, "multiplier": 2.0,
    }  # fmt: skip

    class Own(Attack):
        def __init__(self) -> None:
            self.strength, self.where = 3, np.zeros(1)

        def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
            return frames

    assert Own().to_dict() == {"kind": "Own", "strength": 3, "where": "array([0.])"}
