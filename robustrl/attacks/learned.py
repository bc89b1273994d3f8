"""Attackers that learned what to do: SA-RL, which chooses the perturbation, and PA-AD, which chooses where to push the action.

An adversary is an ordinary policy: `robustrl.envs.AdversaryEnv` is the environment that any SB3 algorithm trains it in, here it attacks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext, Described
from robustrl.attacks.expectation import answers
from robustrl.attacks.geometry import per_row, row_norms
from robustrl.attacks.gradient import GradientAttack
from robustrl.attacks.objectives import Gain, Objective
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_count, check_positive
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


class Command(Described, ABC):
    """What an adversary decides at a step, and how that becomes a perturbation."""

    @abstractmethod
    def space(self, policy: PolicyView) -> spaces.Box | spaces.Discrete:
        """The adversary's actions."""

    @abstractmethod
    def follow(self, frames: Tensor, context: AttackContext, radius: Tensor) -> Tensor:
        """Frames within `radius` (n,) of `frames` (n, *frame) that carry out `context.command`."""

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        """Raise ValueError if there is no such command for this policy, threat or noise."""
        del policy, noise
        if threat.norm not in (1, 2, math.inf):
            raise ValueError(f"learned attackers need norm 1, 2 or inf, got {threat.norm}")


@dataclass(frozen=True)
class Perturbation(Command):
    """SA-RL: the adversary's action is the perturbation, in units of the radius.

    Norm inf: every entry by its own; norms 2 and 1: scaled back onto the ball where it is outside.

    Source: Zhang, Chen, Boning, Hsieh, "Robust reinforcement learning on state observations with learned optimal adversary"
        (ICLR 2021), arXiv:2101.08452.
    """

    def space(self, policy: PolicyView) -> spaces.Box:
        return spaces.Box(-1, 1, (math.prod(policy.frame_shape),), np.float32)

    def follow(self, frames: Tensor, context: AttackContext, radius: Tensor) -> Tensor:
        assert context.command is not None
        ball = Ball.around(frames, context, radius)
        unit = context.command.to(frames.dtype).clamp(-1, 1).reshape(frames.shape) * context.attackable
        if ball.norm != math.inf:
            unit = unit / per_row(row_norms(unit, ball.norm).clamp_min(1.0), unit)
        delta = per_row(ball.radius, unit) * unit
        delivered = ball.deliver(delta if ball.scale is None else (delta * ball.scale).to(delta.dtype))
        return torch.where(per_row(ball.radius > 0, frames).bool(), delivered, frames)


@dataclass(frozen=True)
class Push(Objective):
    """Move what the policy does far, and in the direction of the command: |D| + weight * cos(D, command).

    D is the change of the mean action (in half ranges of its space), or of the action probabilities.
    """

    weight: float = 1.0

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        assert context.command is not None
        direction = context.command.double()
        direction = direction / row_norms(direction).clamp_min(1e-12)[:, None]
        with torch.no_grad():
            clean = _behaviour(context.clean_stack[:, -1], context, noise)

        def gain(x: Tensor) -> Tensor:
            change = _behaviour(x, context, noise) - clean
            length = change.square().sum(1).clamp_min(1e-24).sqrt()
            # at the true frame the length has no gradient, and the second term's is exactly that of <D, command>
            return length + self.weight * (change * direction).sum(1) / length.clamp_min(1e-6)

        return gain


def _behaviour(x: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
    """Action probabilities, or mean actions in half ranges of their space, (n, size) float64, averaged over the noise draws."""
    policy = context.policy
    if policy.discrete:
        return answers(AttackContext.scores, x, context, noise).double().softmax(-1).mean(1)
    space = policy.action_space
    assert isinstance(space, spaces.Box)
    half = torch.from_numpy((space.high - space.low).reshape(-1) / 2).to(x.device).double()
    half = torch.where(torch.isfinite(half), half, 1.0)
    return (
        answers(lambda part, y: part.policy.mean_action(part.observation(y), part.memory), x, context, noise).double().mean(1)
        / half
    )


@dataclass(frozen=True)
class ActionDirection(Command):
    """PA-AD: the adversary chooses a direction for the policy's behaviour, gradients find the perturbation that pushes it there.

    Continuous actions: a direction of the mean action, a number per entry. Discrete actions: a direction of the action probabilities, n - 1
    numbers (the last entry makes the sum zero).

    Args:
        steps: of the solver. One step is FGSM: the largest move along the first-order change.
        weight: of the direction against the distance.

    Source: Sun, Zheng, Liang, Huang, "Who is the strongest enemy? Towards optimal and efficient evasion attacks in deep RL" (ICLR 2022),
        arXiv:2106.05087. The perturbation ascends the objective; the authors' MuJoCo code descends it.
    """

    steps: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_positive("weight", self.weight)

    def space(self, policy: PolicyView) -> spaces.Box:
        space = policy.action_space
        size = policy.n_actions - 1 if policy.discrete else math.prod(space.shape or ())
        return spaces.Box(-1, 1, (size,), np.float32)

    def follow(self, frames: Tensor, context: AttackContext, radius: Tensor) -> Tensor:
        assert context.command is not None
        command = context.command.clamp(-1, 1)
        if context.policy.discrete:
            command = torch.cat((command, -command.sum(1, keepdim=True)), dim=1)
        return _climb(Push(self.weight), frames, replace(context, command=command), radius, self.steps)


@dataclass(frozen=True)
class TargetAction(Command):
    """PA-AD against greedy discrete policies: the adversary names the action that it wants, gradients look for a frame that gets it.

    Source: see `ActionDirection`.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        super().check(policy, threat, noise)
        if not policy.discrete:
            raise ValueError(
                f"TargetAction needs discrete actions, the policy acts in {policy.action_space}: use ActionDirection"
            )

    def space(self, policy: PolicyView) -> spaces.Discrete:
        return spaces.Discrete(policy.n_actions)

    def follow(self, frames: Tensor, context: AttackContext, radius: Tensor) -> Tensor:
        return _climb(Wanted(), frames, context, radius, self.steps)


@dataclass(frozen=True)
class Wanted(Objective):
    """The mean score of the commanded action, less that of the best other one."""

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        assert context.command is not None
        wanted = context.command.long().reshape(-1, 1)

        def gain(x: Tensor) -> Tensor:
            scores = answers(AttackContext.scores, x, context, noise).double().mean(1)
            return scores.gather(1, wanted).squeeze(1) - scores.scatter(1, wanted, -math.inf).amax(1)

        return gain


@dataclass(frozen=True)
class _Within(Allocation):
    """Radii that have been decided already."""

    def radius(self, context: AttackContext) -> Tensor:
        return context.allowance


def _climb(objective: Objective, frames: Tensor, context: AttackContext, radius: Tensor, steps: int) -> Tensor:
    solver = GradientAttack(objective, allocation=_Within(), steps=steps, random_start=False)
    return solver.perturb(frames, replace(context, allowance=radius))


@dataclass(frozen=True)
class CommandedAttack(Attack):
    """What training and using an adversary share: its view of the situation, and what its commands do.

    Args:
        command: what the adversary decides.
        episode: the whole episode's budget of the threat model, or None: with one, the adversary also sees what is left of budget and
            time.
        allocation: what a step may cost.
        chooses_when: the adversary also chooses which part of that to spend, by one more number.
    """

    command: Command = field(default_factory=Perturbation)
    _: KW_ONLY
    episode: float | None = None
    allocation: Allocation = field(default_factory=Uniform)
    chooses_when: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.command, Command):
            raise TypeError(f"command must be a command such as attacks.Perturbation(), got {self.command!r}")
        check_allocation("allocation", self.allocation)

    @property
    def asks(self) -> bool:
        return not isinstance(self.command, Perturbation)

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        if threat.episode != self.episode:
            raise ValueError(
                f"episode must be the threat's {threat.episode}, got {self.episode}: the adversary sees what is left of it"
            )
        self.command.check(policy, threat, noise)
        if self.chooses_when and isinstance(self.command.space(policy), spaces.Discrete):
            raise ValueError("chooses_when needs a command of numbers, a target action is none")

    def observation_space(self, policy: PolicyView, n_frames: int) -> spaces.Box:
        """What the adversary sees: true frames, and what is left of budget and time with an episode budget."""
        size = n_frames * math.prod(policy.frame_shape) + 2 * (self.episode is not None)
        return spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def action_space(self, policy: PolicyView) -> spaces.Box | spaces.Discrete:
        """What the adversary decides."""
        space = self.command.space(policy)
        if isinstance(space, spaces.Box) and self.chooses_when:
            return spaces.Box(-1, 1, (space.shape[0] + 1,), np.float32)
        return space

    def situation(self, context: AttackContext) -> Tensor:
        """Observations of the adversary, (n, size) float32."""
        seen = context.clean_stack.flatten(1).float()
        if self.episode is None:
            return seen
        left = (
            torch.zeros_like(context.allowance) if context.remaining is None else context.remaining / max(self.episode, 1e-12)
        )
        time = context.steps_left / (context.step + context.steps_left)
        return torch.cat((seen, left[:, None].float(), time[:, None].float()), dim=1)

    @abstractmethod
    def decide(self, context: AttackContext) -> Tensor:
        """The adversary's actions, (n, size) or (n,)."""

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        actions = self.decide(context)
        radius = torch.minimum(self.allocation.radius(context), context.allowance)
        if self.chooses_when:
            radius = radius * ((actions[:, -1].double().clamp(-1, 1) + 1) / 2)
            actions = actions[:, :-1]
        return self.command.follow(frames, replace(context, command=actions), radius)


@dataclass(frozen=True)
class LearnedAttack(CommandedAttack):
    """A trained adversary; see `robustrl.envs.AdversaryEnv`.

    Args:
        adversary: SB3 model or `PolicyView` that was trained in an `AdversaryEnv`; its mean action is used.
        command, episode, allocation, chooses_when: as in its training.
    """

    adversary: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adversary", PolicyView.of(self.adversary))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "adversary": self.adversary.fingerprint()}

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        super().check(policy, threat, noise)
        mine, needed = self.adversary.action_space, self.action_space(policy)
        if type(mine) is not type(needed) or mine.shape != needed.shape:
            raise ValueError(f"adversary acts in {mine}, but {type(self.command).__name__} against this policy needs {needed}")

    def decide(self, context: AttackContext) -> Tensor:
        view = self.adversary.eval()  # where it is: its weights may be a learner's
        with torch.no_grad():
            scores = view.scores(self.situation(context).to(view.device))
            return view.rule.choose(scores, None).to(context.clean_stack.device)  # type: ignore[no-any-return]
