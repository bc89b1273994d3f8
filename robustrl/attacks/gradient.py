"""Projected gradient ascent on any objective, for discrete and continuous actions, vectors and pictures."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import check_threat, rows_per_block, samples
from robustrl.attacks.geometry import ascent, deliver, moved, per_row, project, random_direction, unblocked
from robustrl.attacks.objectives import ActionDeviation, Objective
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_count, check_positive
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class GradientAttack(Attack):
    """Projected gradient ascent (PGD) within what the budget allows at a step, for norms 1, 2 and inf.

    It averages over `draws` noise samples (expectation over transformation), which together with the random starts are
    shared by all episodes and iterations of a step. The best iterate counts, not the last; where none is better for the
    attacker than the true frame, nothing is spent.

    Args:
        objective: what to increase; default the largest change of the action.
        allocation: when to spend an episode's budget.
        steps: gradient steps.
        step_size: length of a step in the threat's norm, observation units; default 2.5 * radius / steps.
        restarts: random starts, of which the best counts: the first is one step from the true frame, others are far.
        draws: noise samples that stand for the unknown noise (1 without noise).
        random_start: begin beside the true frame instead of at it.

    Source: Madry et al. (ICLR 2018), arXiv:1706.06083; expectation over transformation: Athalye et al. (ICML 2018),
    arXiv:1707.07397.
    """

    objective: Objective = field(default_factory=ActionDeviation)
    _: KW_ONLY
    allocation: Allocation = field(default_factory=Uniform)
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    draws: int = 8
    random_start: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(f"objective must be an objective such as attacks.ActionDeviation(), got {self.objective!r}")
        check_allocation("allocation", self.allocation)
        for name in ("steps", "restarts", "draws"):
            check_count(name, getattr(self, name))
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        if not isinstance(self.random_start, bool):
            raise TypeError(f"random_start must be True or False, got {self.random_start!r}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts must be 1 without random_start, got {self.restarts}: all would be the same")

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        check_threat(type(self).__name__, policy, threat, noise)
        self.objective.check(policy)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with_budget = torch.nonzero(context.allowance > 0).flatten()
        if not len(with_budget):
            return frames
        noise = samples(context.noise, (self.draws, *frames.shape[1:]), context.generator, frames.dtype, frames.device)
        starts = [torch.zeros_like(context.attackable)]
        if self.random_start:
            starts = [random_direction(context.attackable, context.norm, context.generator) for _ in range(self.restarts)]
        result = frames.clone()
        for rows in torch.split(with_budget, rows_per_block(context, len(noise))):
            result[rows] = self._climb(frames[rows], context.select(rows), noise, starts)
        return result

    def _climb(self, x: Tensor, context: AttackContext, noise: Tensor, starts: list[Tensor]) -> Tensor:
        """Perturb the frames of one block of episodes."""
        gain, pixels, norm = self.objective.against(context, noise), context.pixels, context.norm
        radius = torch.minimum(self.allocation.radius(context), context.allowance)
        step = 2.5 * radius / self.steps if self.step_size is None else torch.full_like(radius, self.step_size)
        with torch.no_grad():
            clean = gain(x)
        best, found = clean, x
        for number, start in enumerate(starts):
            reach = radius if number else torch.minimum(step, radius)
            point = moved(x, per_row(reach, x) * start, pixels)
            for left in range(self.steps, -1, -1):
                point.requires_grad_(left > 0)
                with torch.set_grad_enabled(left > 0):
                    value = gain(point)
                better = per_row(value > best, x).bool()
                best, found = torch.where(value > best, value, best).detach(), torch.where(better, point, found).detach()
                if left:
                    (gradient,) = torch.autograd.grad(value.sum(), point)
                    point = point.detach()
                    uphill = ascent(unblocked(gradient * context.attackable, point, pixels), norm)
                    point = moved(x, project(point - x + per_row(step, x) * uphill, radius, norm), pixels)
        pays = self.allocation.pays(best - clean)
        return torch.where(per_row(pays, x).bool(), deliver(x, found - x, radius, norm, pixels), x)
