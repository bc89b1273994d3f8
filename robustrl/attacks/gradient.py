"""Projected gradient ascent on any objective, for discrete and continuous actions, vectors and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import check_threat, rows_per_block, samples
from robustrl.attacks.geometry import NORMS, per_row, usable
from robustrl.attacks.objectives import ActionDeviation, Gain, Margin, Objective, check_objective
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_count, check_positive, check_real
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class GradientAttack(Attack):
    """Projected gradient ascent (PGD) within what the budget allows at a step, for norms 0, 1, 2 and inf.

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

    needs_gradients: ClassVar[bool] = True
    """Whether it differentiates the objective."""

    def __post_init__(self) -> None:
        check_objective(self.objective, "ActionDeviation()")
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
        check_threat(type(self).__name__, policy, threat, noise, norms=(0, *NORMS))
        if self.needs_gradients and not self.objective.differentiable:
            raise ValueError(f"{type(self.objective).__name__} has no gradient: use a query attack such as attacks.Square")
        self.objective.check(policy)
        self.allocation.check(policy)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with_budget = torch.nonzero(context.allowance > 0).flatten()
        if not len(with_budget):
            return frames
        noise = samples(context.noise, (self.draws, *frames.shape[1:]), context.generator, frames.dtype, frames.device)
        starts = [torch.zeros_like(context.attackable)]
        if self.random_start:
            boundary = Ball.around(frames, context).boundary
            starts = [boundary(context.generator) for _ in range(self.restarts)]
        probes = self._probes(context)
        result = frames.clone()
        for rows in torch.split(with_budget, rows_per_block(context, len(noise))):
            result[rows] = self._climb(frames[rows], context.select(rows), noise, starts, probes)
        return result

    def _climb(
        self, x: Tensor, context: AttackContext, noise: Tensor, starts: list[Tensor], probes: Sequence[Tensor | None]
    ) -> Tensor:
        """Perturb the frames of one block of episodes."""
        gain, ball = self.objective.against(context, noise), Ball.around(x, context, self.allocation.radius(context))
        radius, step = ball.radius, self._step_length(ball.radius)
        with torch.no_grad():
            clean = gain(x)
        best, found = clean, x
        for number, start in enumerate(starts):
            reach = radius if number else torch.minimum(step, radius)
            point, trend = ball.moved(ball.push(start, reach)), torch.zeros_like(x)
            for left in range(self.steps, -1, -1):
                point = self._look_ahead(ball, point, trend, step) if left else point
                value, gradient = self._slope(ball, gain, point, probes[left])
                better = per_row(value > best, x).bool()
                best, found = torch.where(value > best, value, best), torch.where(better, point, found)
                if gradient is not None:
                    trend = self._trend(trend, gradient)
                    point = ball.climb(point, trend, step)
        pays = self.allocation.pays(best - clean)
        return torch.where(per_row(pays, x).bool(), ball.deliver(found - x), x)

    def _step_length(self, radius: Tensor) -> Tensor:
        return 2.5 * radius / self.steps if self.step_size is None else torch.full_like(radius, self.step_size)

    def _probes(self, context: AttackContext) -> Sequence[Tensor | None]:
        """What every gradient needs of the attacker's random stream, by the number of steps that are left; None for no gradient."""
        del context
        return [None, *(torch.empty(0),) * self.steps]

    def _slope(self, ball: Ball, gain: Gain, point: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gain at a point (n,), and its gradient unless the last step is done."""
        del ball
        point = point.detach().requires_grad_(probe is not None)
        with torch.set_grad_enabled(probe is not None):
            value = gain(point)
        return value.detach(), None if probe is None else torch.autograd.grad(value.sum(), point)[0]

    def _look_ahead(self, ball: Ball, point: Tensor, trend: Tensor, step: Tensor) -> Tensor:
        """Where the gradient is taken; within the ball, because it counts as an iterate."""
        del ball, trend, step
        return point

    def _trend(self, trend: Tensor, gradient: Tensor) -> Tensor:
        """What is followed: the newest gradient, or more of them."""
        del trend
        return gradient


@dataclass(frozen=True)
class FGSM(GradientAttack):
    """The fast gradient (sign) method: one step of full length from the true frame.

    With `random_start` from a random point of the ball instead, by 1.25 times its radius (FGSM-RS).

    Source: Goodfellow et al. (ICLR 2015), arXiv:1412.6572; Wong, Rice, Kolter (ICLR 2020), arXiv:2001.03994.
    """

    objective: Objective = field(default_factory=Margin)
    steps: int = field(default=1, init=False)
    step_size: None = field(default=None, init=False)
    restarts: int = field(default=1, init=False)
    random_start: bool = False

    def _step_length(self, radius: Tensor) -> Tensor:
        return 1.25 * radius


@dataclass(frozen=True)
class MomentumAttack(GradientAttack):
    """Projected ascent along a decaying sum of gradients, each of l1 norm 1 row by row.

    Args:
        momentum: what is left of the sum at every step: 1 is MI-FGSM; PA-AD's attacks look ahead with 0.5.
        look_ahead: take gradients where the momentum leads (Nesterov).

    Steps are radius / steps long by default. Source: Dong et al. (CVPR 2018), arXiv:1710.06081; Lin et al. (ICLR 2020),
    arXiv:1908.06281; Sun et al. (ICLR 2022), arXiv:2106.05087.
    """

    momentum: float = 1.0
    look_ahead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_real("momentum", self.momentum) < 0:
            raise ValueError(f"momentum must be >= 0, got {self.momentum}")

    def _step_length(self, radius: Tensor) -> Tensor:
        return radius / self.steps if self.step_size is None else super()._step_length(radius)

    def _look_ahead(self, ball: Ball, point: Tensor, trend: Tensor, step: Tensor) -> Tensor:
        return ball.climb(point, trend, self.momentum * step) if self.look_ahead else point

    def _trend(self, trend: Tensor, gradient: Tensor) -> Tensor:
        flat = usable(gradient).flatten(1).double()
        return self.momentum * trend + (flat / flat.abs().sum(1, keepdim=True).clamp_min(1e-300)).to(trend.dtype).view_as(trend)


@dataclass(frozen=True)
class LangevinAttack(GradientAttack):
    """Stochastic gradient Langevin dynamics: every gradient gets Gaussian noise of size sqrt(2 h) / (i + 2) at step i.

    Steps are h = radius / steps long by default. Source: the SGLD evaluation of SA-PPO, Zhang et al. (NeurIPS 2020),
    arXiv:2003.08938.
    """

    def _step_length(self, radius: Tensor) -> Tensor:
        return radius / self.steps if self.step_size is None else super()._step_length(radius)

    def _probes(self, context: AttackContext) -> Sequence[Tensor | None]:
        shape, device = (self.steps, *context.attackable.shape), context.attackable.device
        noise = torch.randn(shape, generator=context.generator, device=device)
        return [None, *(noise[left - 1] / (self.steps - left + 2) for left in range(1, self.steps + 1))]

    def _slope(self, ball: Ball, gain: Gain, point: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
        value, gradient = super()._slope(ball, gain, point, probe)
        if gradient is None or probe is None:
            return value, None
        size = (2 * self._step_length(ball.radius)).sqrt()
        return value, usable(gradient) + per_row(size, gradient) * probe
