"""Attacks that look at nothing: the first row of every table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.geometry import per_row
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_choice
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

Distribution = Literal["uniform", "corner", "gaussian", "salt-and-pepper"]


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Random perturbations within the budget, independent between episodes; the policy is not looked at.

    Args:
        distribution: "uniform": evenly over the ball; "corner": random signs, as large as allowed; "gaussian": normal entries whose root
            mean square fills the radius, projected into the ball; "salt-and-pepper": random entries at random ends of their range
            (norm 0, and the only kind there beside "uniform").
        allocation: when to spend an episode's budget.
    """

    needs_policy: ClassVar[bool] = False

    distribution: Distribution = "uniform"
    allocation: Allocation = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, ("uniform", "corner", "gaussian", "salt-and-pepper"))
        check_allocation("allocation", self.allocation)

    def check(self, policy: PolicyView | None, threat: ThreatModel, noise: Noise | None) -> None:
        del noise
        if self.distribution != "uniform" and (self.distribution == "salt-and-pepper") != (threat.norm == 0):
            raise ValueError(f"distribution {self.distribution!r} does not fit threat.norm = {threat.norm:g}")
        if math.isinf(min(limit for limit in (threat.step, threat.episode) if limit is not None)):
            raise ValueError(f"RandomNoise needs a finite budget, got step={threat.step}, episode={threat.episode}")
        self.allocation.check(policy)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        uniforms = context.uniforms(context.attackable.numel() + 1)
        ball = Ball.around(frames, context, self.allocation.radius(context))
        delivered = ball.deliver(self._chosen(ball, uniforms))
        return torch.where(per_row(ball.radius > 0, frames).bool(), delivered, frames)

    def _chosen(self, ball: Ball, uniforms: Tensor) -> Tensor:
        if self.distribution == "uniform":
            return ball.sample(uniforms)
        shape, dtype = (-1, *ball.attackable.shape), ball.centre.dtype
        centred = ((2 * uniforms[:, 1:] - 1).reshape(shape) * ball.attackable).to(dtype)
        if self.distribution == "salt-and-pepper":
            return ball.push(centred, ball.radius)
        entries = (
            centred.sign()
            if self.distribution == "corner"
            else torch.special.ndtri(uniforms[:, 1:]).reshape(shape) * ball.attackable
        )
        length = ball.attackable.sum().double() ** (0.0 if ball.norm == math.inf else -1 / ball.norm)
        delta = entries * per_row(ball.radius * length, entries)
        return ball.project((delta if ball.scale is None else delta * ball.scale).to(dtype))
