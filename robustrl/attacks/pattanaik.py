"""Random lengths along the direction of the worst action, judged by the action value of what the victim then does."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import check_threat, rows_per_block, samples
from robustrl.attacks.geometry import NORMS, per_row
from robustrl.attacks.objectives import GreedyValue, LowValue, TowardsWorst
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_count
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class Pattanaik(Attack):
    """Try random multiples of one gradient, and deliver the one whose action is worth least in the true state.

    The gradient lowers the cross-entropy between the policy and the action of least value (continuous actions: the critic's value of
    the action). The candidates lie along the steepest direction at random shares of the radius, drawn from Beta(2, 2) and shared by
    all episodes of a step.

    Args:
        critic: action values from outside; see `LowValue`. Default the victim's own: action values, or a critic of actions.
        allocation: when to spend an episode's budget.
        candidates: how many lengths are tried.
        draws: noise samples that stand for the unknown noise (1 without noise).

    Source: Pattanaik et al. (AAMAS 2018), arXiv:1712.03632.
    """

    critic: nn.Module | None = None
    _: KW_ONLY
    allocation: Allocation = field(default_factory=Uniform)
    candidates: int = 100
    draws: int = 8

    def __post_init__(self) -> None:
        LowValue(self.critic)
        check_allocation("allocation", self.allocation)
        check_count("candidates", self.candidates)
        check_count("draws", self.draws)

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        check_threat("Pattanaik", policy, threat, noise, norms=(0, *NORMS))
        if self.critic is None and policy.kind != "q" and policy.q_critic is None:
            raise ValueError(f"Pattanaik needs action values, which this policy of kind {policy.kind!r} has not: pass critic=")
        self.allocation.check(policy)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with_budget = torch.nonzero(context.allowance > 0).flatten()
        if not len(with_budget):
            return frames
        noise = samples(context.noise, (self.draws, *frames.shape[1:]), context.generator, frames.dtype, frames.device)
        uniforms = torch.rand(self.candidates, 3, generator=context.generator, device=frames.device, dtype=torch.float64)
        lengths = uniforms.median(1).values  # the middle one of three uniform numbers has the distribution Beta(2, 2)
        result = frames.clone()
        for rows in torch.split(with_budget, rows_per_block(context, len(noise))):
            result[rows] = self._search(frames[rows], context.select(rows), noise, lengths)
        return result

    def _search(self, x: Tensor, context: AttackContext, noise: Tensor, lengths: Tensor) -> Tensor:
        ball = Ball.around(x, context, self.allocation.radius(context))
        aim = TowardsWorst(self.critic) if context.policy.discrete else LowValue(self.critic)
        point = x.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(aim.against(context, noise)(point).sum(), point)
        direction = ball.ascent(gradient, x)
        with torch.no_grad():
            gain = GreedyValue(self.critic).against(context, noise)
            clean = gain(x)
            best, found = clean, x
            for length in lengths:
                candidate = ball.moved(
                    ball.push(direction, (ball.radius * length).ceil() if ball.norm == 0 else ball.radius * length)
                )
                value = gain(candidate)
                better = value > best
                best, found = torch.where(better, value, best), torch.where(per_row(better, x).bool(), candidate, found)
        pays = self.allocation.pays(best - clean)
        return torch.where(per_row(pays, x).bool(), ball.deliver(found - x), x)
