"""Adaptive attacks on smoothed policies with discrete actions and a whole-episode budget.

At every step the attacker asks whether some perturbation within its *remaining* budget makes the smoothed policy prefer a
worse action, and if so pays for the smallest one it finds. It averages the policy over `draws` noise samples, shared by
all episodes, actions and iterations of a step, because the noise that the frame will really get is unknown to it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import answers, check_threat, rows_per_block, samples
from robustrl.attacks.geometry import per_row, row_norms
from robustrl.errors import check_count, check_positive, check_real
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class _Pairs:
    """(episode, target action) pairs that are being tried: `rows` and `targets`, both (m,)."""

    rows: Tensor
    targets: Tensor

    def select(self, keep: Tensor) -> _Pairs:
        return _Pairs(self.rows[keep], self.targets[keep])


@dataclass(frozen=True)
class FlipAttack(Attack):
    """What the two attacks share: which actions are worth reaching, and which of those reached is delivered.

    Args:
        draws: noise samples that stand for the unknown noise (1 without noise).
        threshold: only actions whose clean score is at least this much below the best action's are worth paying for.
    """

    draws: int = 128
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        if check_real("threshold", self.threshold) < 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        name = type(self).__name__
        check_threat(name, policy, threat, noise)
        if not policy.discrete:
            raise ValueError(f"{name} flips discrete actions, the policy acts in {policy.action_space}: use GradientAttack")

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with_budget = torch.nonzero(context.allowance > 0).flatten()
        if not len(with_budget):
            return frames
        x, part = frames[with_budget], context.select(with_budget)
        noise = samples(part.noise, (self.draws, *frames.shape[1:]), part.generator, frames.dtype, x.device)
        scores = self._clean_scores(part)
        best = scores.amax(1, keepdim=True)
        worthwhile = scores + self.threshold <= best
        worthwhile &= torch.arange(scores.shape[1], device=x.device) != scores.argmax(1, keepdim=True)
        rows, targets = torch.nonzero(worthwhile, as_tuple=True)
        if not len(rows):
            return frames
        pairs = _Pairs(rows, targets)
        blocks = torch.split(torch.arange(len(rows), device=x.device), rows_per_block(part, len(noise)))
        found = [self.search(x, pairs.select(some), part, noise) for some in blocks]
        deltas, reached = (torch.cat(kind) for kind in zip(*found, strict=True))

        cost = torch.where(reached, scores[rows, targets].double(), math.inf)
        lowest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device).scatter_reduce(0, rows, cost, "amin")
        chosen = torch.nonzero(reached & (cost == lowest[rows])).flatten()
        delta = torch.zeros_like(x)
        delta[rows[chosen]] = deltas[chosen]
        result = frames.clone()
        delivered = Ball.around(x, part).deliver(delta)
        result[with_budget] = torch.where(per_row(row_norms(delta) > 0, x).bool(), delivered, x)
        return result

    @abstractmethod
    def search(self, x: Tensor, pairs: _Pairs, context: AttackContext, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Try to reach each pair's target.

        Args:
            x: true frames (n, *frame).
            pairs: what to try.
            context: the context of the same n episodes.
            noise: shared noise samples (draws, *frame).
        Returns:
            perturbations (m, *frame), float, and whether they reach the target (m,).
        """

    def _clean_scores(self, context: AttackContext) -> Tensor:
        """Mean scores over noisy copies of the whole clean stack, (n, n_actions)."""
        stack, policy = context.clean_stack, context.policy
        noise = samples(context.noise, (self.draws, *stack.shape[1:]), context.generator, stack.dtype, stack.device)
        with torch.no_grad():
            return answers(
                lambda part, noisy: policy.scores(policy.fold(noisy).float(), part.memory), stack, context, noise
            ).mean(1)

    def _draw_scores(self, x: Tensor, rows: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
        """Scores of every noise draw when the newest frames are `x` (m, *frame): (m, draws, n_actions)."""
        return answers(AttackContext.scores, x, context.select(rows), noise)


@dataclass(frozen=True)
class SmoothedPGD(FlipAttack):
    """The policy-smoothing paper's attack: short steps along the gradient until the mean score's argmax is the target.

    Args:
        step_size: length of a gradient step in the threat's norm, observation units.
        multiplier: at most floor(multiplier * remaining budget / step_size) steps.
        draws, threshold: see `FlipAttack`.

    Source: Kumar, Levine, Feizi (ICLR 2022), arXiv:2106.11420, attack on smoothed agents. Two departures: success is
    tested after the last step too, and a search that has stopped moving is given up (it would stay there).
    """

    step_size: float = 0.01
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("step_size", self.step_size)
        check_positive("multiplier", self.multiplier)

    def search(self, x: Tensor, pairs: _Pairs, context: AttackContext, noise: Tensor) -> tuple[Tensor, Tensor]:
        balls = Ball.around(x, context).select(pairs.rows)
        limit = torch.floor(self.multiplier * balls.radius / self.step_size)
        delta = torch.zeros_like(x[pairs.rows])
        reached = torch.zeros(len(delta), dtype=torch.bool, device=x.device)
        trying = torch.arange(len(delta), device=x.device)
        step = 0
        while len(trying):
            some = pairs.select(trying)
            point = (x[some.rows] + delta[trying]).requires_grad_(True)
            scores = self._draw_scores(point, some.rows, context, noise).mean(1)
            success = scores.argmax(1) == some.targets
            reached[trying[success]] = True
            go_on = ~success & (step < limit[trying])
            if not go_on.any():
                break
            loss = torch.nn.functional.cross_entropy(scores, some.targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            ball = balls.select(trying)
            moved = ball.within(ball.project(delta[trying] + self.step_size * ball.ascent(-gradient, point)))
            go_on &= ball.norms(moved - delta[trying]) > 1e-4 * self.step_size
            delta[trying[go_on]] = moved[go_on]
            trying, step = trying[go_on], step + 1
        return delta, reached


@dataclass(frozen=True)
class MinimalFlip(FlipAttack):
    """Find the direction at full budget, then pay only for the smallest multiple of it that still flips the action.

    Args:
        confidence: share of the noise draws that must choose the target for it to count as reached.
        steps: gradient steps that turn the direction, each at the full remaining radius.
        bisections: halvings of the length.
        draws, threshold: see `FlipAttack`.

    Cheaper than `SmoothedPGD` (a handful of evaluations instead of hundreds) and it overpays by less than one step.
    """

    confidence: float = 0.5
    steps: int = 3
    bisections: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("bisections", self.bisections)
        if not 0 < check_real("confidence", self.confidence) < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")

    def search(self, x: Tensor, pairs: _Pairs, context: AttackContext, noise: Tensor) -> tuple[Tensor, Tensor]:
        balls, full = Ball.around(x, context).select(pairs.rows), torch.zeros_like(x[pairs.rows])
        reached = torch.zeros(len(full), dtype=torch.bool, device=x.device)
        trying = torch.arange(len(full), device=x.device)
        for step in range(self.steps + 1):
            some = pairs.select(trying)
            point = (x[some.rows] + full[trying]).requires_grad_(True)
            scores = self._draw_scores(point, some.rows, context, noise)
            won = self._won(scores.detach(), some.targets)
            reached[trying[won]] = True
            lost = ~won
            if step == self.steps or not lost.any():
                break
            target = scores.gather(2, some.targets[:, None, None].expand(-1, scores.shape[1], 1)).squeeze(2)
            others = scores.scatter(2, some.targets[:, None, None].expand(-1, scores.shape[1], 1), -math.inf).amax(2)
            (gradient,) = torch.autograd.grad((target - others).sum(), point)
            moved = balls.select(trying).farthest(gradient)
            lost &= row_norms(moved) > 0
            full[trying[lost]] = moved[lost]
            trying = trying[lost]
            if not len(trying):
                break
        low, high = torch.zeros(len(full), device=x.device), torch.ones(len(full), device=x.device)
        hits = torch.nonzero(reached).flatten()
        some = pairs.select(hits)
        for _ in range(self.bisections if len(hits) else 0):
            middle = (low[hits] + high[hits]) / 2
            with torch.no_grad():
                scores = self._draw_scores(x[some.rows] + full[hits] * per_row(middle, x), some.rows, context, noise)
            won = self._won(scores, some.targets)
            high[hits] = torch.where(won, middle, high[hits])
            low[hits] = torch.where(won, low[hits], middle)
        return full * per_row(high, full), reached

    def _won(self, scores: Tensor, targets: Tensor) -> Tensor:
        votes = (scores.argmax(2) == targets[:, None]).double().mean(1)
        return votes >= self.confidence
