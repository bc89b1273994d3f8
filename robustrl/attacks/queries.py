"""Attacks that only ask: no gradient of the victim is ever taken, so that it may be anything that answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import check_threat, rows_per_block, samples
from robustrl.attacks.geometry import per_row
from robustrl.attacks.gradient import GradientAttack
from robustrl.attacks.objectives import Gain, Margin, Objective, check_objective
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_choice, check_count, check_positive
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

HALVINGS = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)
"""When the Square attack halves its share of entries, as shares of all queries."""


@dataclass(frozen=True)
class Square(Attack):
    """Random search over corners of the ball: change a few entries at once, keep what makes the objective rise.

    Norm inf: entries are at +- radius; pictures start from vertical stripes and change squares, vectors start from a random corner and
    change random entries. Norms 2 and 1: entries get random values and the whole is stretched to the radius, a simplification of the
    published attack. The candidates of a step are shared by all episodes.

    Args:
        objective: what to increase; `Flips()` for a victim that tells no more than its actions.
        allocation: when to spend an episode's budget.
        queries: candidates per step.
        share: of the entries that a candidate changes at first; it is halved eight times.
        draws: noise samples that stand for the unknown noise (1 without noise).

    Source: Andriushchenko et al. (ECCV 2020), arXiv:1912.00049.
    """

    objective: Objective = field(default_factory=Margin)
    _: KW_ONLY
    allocation: Allocation = field(default_factory=Uniform)
    queries: int = 100
    share: float = 0.8
    draws: int = 8

    def __post_init__(self) -> None:
        check_objective(self.objective, "Margin()")
        check_allocation("allocation", self.allocation)
        check_count("queries", self.queries)
        check_count("draws", self.draws)
        if check_positive("share", self.share) > 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        check_threat("Square", policy, threat, noise)
        self.objective.check(policy)
        self.allocation.check(policy)

    def answers_per_step(self, noise: Noise | None) -> int:
        """Answers of the victim that one step of one episode takes: two about the true frame, one per candidate.

        For objectives that ask once about the true frame, as all but `LowValue`, and `ActionDeviation` of continuous actions, do.
        """
        return (self.queries + 2) * (1 if noise is None else self.draws)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with_budget = torch.nonzero(context.allowance > 0).flatten()
        if not len(with_budget):
            return frames
        noise = samples(context.noise, (self.draws, *frames.shape[1:]), context.generator, frames.dtype, frames.device)
        seed = int(torch.randint(2**62, (1,), generator=context.generator, device=context.generator.device))
        result = frames.clone()
        for rows in torch.split(with_budget, rows_per_block(context, len(noise))):
            generator = torch.Generator(frames.device).manual_seed(seed)
            with torch.no_grad():
                result[rows] = self._search(frames[rows], context.select(rows), noise, generator)
        return result

    def _search(self, x: Tensor, context: AttackContext, noise: Tensor, generator: torch.Generator) -> Tensor:
        gain, ball = self.objective.against(context, noise), Ball.around(x, context, self.allocation.radius(context))
        clean = gain(x)
        best, delta = clean, torch.zeros_like(x)
        current = self._start(ball, generator)
        for query in range(self.queries):
            candidate = current if query == 0 else self._changed(ball, delta, query, generator)
            value = gain(ball.moved(candidate))
            better = value > best if query else torch.ones_like(value > best)
            best, delta = torch.where(better, value, best), torch.where(per_row(better, x).bool(), candidate, delta)
        pays = self.allocation.pays(best - clean)
        return torch.where(per_row(pays, x).bool(), ball.deliver(ball.within(delta)), x)

    def _start(self, ball: Ball, generator: torch.Generator) -> Tensor:
        if ball.norm != math.inf:
            return ball.push(ball.boundary(generator), ball.radius)
        shape = tuple(ball.attackable.shape)
        if len(shape) > 1:  # the same sign down every column
            shape = (*shape[:-3], *(1 if axis == _height(shape) else size for axis, size in enumerate(shape)))
        return self._corner(ball, _signs(shape, generator, ball) * ball.attackable)

    def _changed(self, ball: Ball, delta: Tensor, query: int, generator: torch.Generator) -> Tensor:
        """Perturbations that differ from `delta` in a few entries."""
        share = self.share / 2 ** sum(query > self.queries * when for when in HALVINGS)
        where = _window(ball.attackable, share, generator)
        if ball.norm == math.inf:
            shape = tuple(ball.attackable.shape)
            if len(shape) > 1:  # one sign per channel
                shape = tuple(1 if axis in (_height(shape), _height(shape) + 1) else size for axis, size in enumerate(shape))
            corner = self._corner(ball, _signs(shape, generator, ball) * ball.attackable)
            return torch.where(where, corner, delta)
        size = math.sqrt(share)
        fresh = ball.boundary(generator) * where
        fresh = fresh / ball.norms(fresh[None]).clamp_min(1e-300).to(fresh.dtype)
        mixed = delta + per_row(size * ball.radius, delta) * fresh
        stretch = ball.radius / ball.norms(mixed).clamp_min(1e-300)
        return mixed * per_row(stretch, mixed)

    @staticmethod
    def _corner(ball: Ball, signs: Tensor) -> Tensor:
        corner = signs * per_row(ball.radius, ball.centre)
        return corner if ball.scale is None else corner * ball.scale.to(corner.dtype)


def _height(shape: tuple[int, ...]) -> int:
    """Which axis of a picture runs down: the channels are the smaller one of the first and the last axis."""
    return 0 if len(shape) == 2 or shape[-1] < shape[0] else 1


def _signs(shape: tuple[int, ...], generator: torch.Generator, ball: Ball) -> Tensor:
    return (torch.rand(shape, generator=generator, device=ball.attackable.device) - 0.5).sign().to(ball.centre.dtype)


def _window(attackable: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """About a share of the entries, one at least: a random square of a picture, random entries of a vector; boolean (*frame)."""
    shape, device = attackable.shape, attackable.device
    place = torch.rand(2, generator=generator, device=device)
    if len(shape) == 1:
        order = torch.rand(shape, generator=generator, device=device) + (attackable == 0)
        count = (share * attackable.sum()).round().clamp_min(1)
        return order.argsort().argsort() < count
    down = _height(shape)
    inside = torch.ones((), dtype=torch.bool, device=device)
    for axis, at in zip((down, down + 1), place, strict=True):
        side = min(max(1, round(math.sqrt(share * shape[down] * shape[down + 1]))), shape[axis])
        first = (at * (shape[axis] - side + 1)).floor()
        index = torch.arange(shape[axis], device=device)
        along = (index >= first) & (index < first + side)
        inside = inside & along.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return inside.expand(shape)


@dataclass(frozen=True)
class NES(GradientAttack):
    """Projected ascent along gradients that are estimated from pairs of answers beside the point.

    The estimate is the mean of (J(x + s u) - J(x - s u)) u / (2 s) over random directions u, shared by all episodes of a step.

    Args:
        pairs: of answers per gradient.
        width: s as a share of the radius.
        directions: "gaussian" (natural evolution strategies) or "signs" (SPSA).
        objective, allocation, steps, step_size, restarts, draws, random_start: see `GradientAttack`. `Flips()` as an objective has no
            slope until some noise draws flip: give it a wide `width` or noise.

    Source: Ilyas et al. (ICML 2018), arXiv:1804.08598; Uesato et al. (ICML 2018), arXiv:1802.05666.
    """

    objective: Objective = field(default_factory=Margin)
    steps: int = 4
    pairs: int = 25
    width: float = 0.1
    directions: Literal["gaussian", "signs"] = "gaussian"

    needs_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("pairs", self.pairs)
        check_positive("width", self.width)
        check_choice("directions", self.directions, ("gaussian", "signs"))

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        super().check(policy, threat, noise)
        if threat.norm == 0:
            raise ValueError("NES needs small steps; threat.norm must be 1, 2 or inf, got 0")

    def answers_per_step(self, noise: Noise | None) -> int:
        """Answers that one step of one episode takes: two about the true frame, two per pair, one per iterate; see `Square`."""
        return (2 + self.restarts * (self.steps * (2 * self.pairs + 1) + 1)) * (1 if noise is None else self.draws)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        with torch.no_grad():
            return super().perturb(frames, context)

    def _probes(self, context: AttackContext) -> Sequence[Tensor | None]:
        shape = (self.steps, self.pairs, *context.attackable.shape)
        probes = torch.randn(shape, generator=context.generator, device=context.attackable.device) * context.attackable
        return [None, *(probes.sign() if self.directions == "signs" else probes)]

    def _slope(self, ball: Ball, gain: Gain, point: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if probe is None:
            return gain(point), None
        width = per_row(self.width * ball.radius.clamp_min(1e-300), point)
        gradient = torch.zeros_like(point)
        for direction in probe.to(point.dtype):
            aside = width * direction if ball.scale is None else width * direction * ball.scale.to(point.dtype)
            change = gain(ball.moved(point - ball.centre + aside)) - gain(ball.moved(point - ball.centre - aside))
            gradient = gradient + per_row(change, point) * direction
        return gain(point), gradient if ball.scale is None else gradient / ball.scale.to(point.dtype)


@dataclass(frozen=True)
class Transfer(Attack):
    """An attack on an imitation of the victim (snooping): it needs nothing of the victim while it runs.

    Args:
        surrogate: a differentiable imitation; `robustrl.snoop` learns one from the victim's episodes.
        attack: what attacks it.

    Source: Papernot et al. (AsiaCCS 2017), arXiv:1602.02697; the snooping attack of Inkawhich, Chen, Li (AAMAS 2020),
    arXiv:1905.11832.
    """

    needs_policy: ClassVar[bool] = False

    surrogate: PolicyView
    attack: Attack

    def __post_init__(self) -> None:
        if not isinstance(self.surrogate, PolicyView):
            raise TypeError(f"surrogate must be a PolicyView, got {type(self.surrogate).__name__}")
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be a robustrl attack such as attacks.GradientAttack(), got {self.attack!r}")

    def check(self, policy: PolicyView | None, threat: ThreatModel, noise: Noise | None) -> None:
        shapes: Any = [(view.frame_shape, view.n_frames) for view in (policy, self.surrogate) if view is not None]
        if shapes[0] != shapes[-1]:
            raise ValueError(f"surrogate must take what the policy takes: {shapes[0]} (frame, frames), got {shapes[-1]}")
        self.attack.check(self.surrogate, threat, noise)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        memory = self.surrogate.memory(len(frames))
        with torch.enable_grad():
            return self.attack.perturb(frames, replace(context, policy=self.surrogate, memory=memory))
