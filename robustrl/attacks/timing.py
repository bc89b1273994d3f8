"""When to spend an episode's budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from gymnasium import spaces
from torch import Tensor

from robustrl.attacks.base import AttackContext, Described
from robustrl.errors import check_count, check_positive, check_real
from robustrl.policy import PolicyView
from robustrl.policy.actions import ContinuousRule


class Allocation(Described, ABC):
    """What one step may cost, and whether what it gains is worth that."""

    @abstractmethod
    def radius(self, context: AttackContext) -> Tensor:
        """Most that the perturbations of this step may measure, float64 (n,); the threat model's allowance holds on top."""

    def check(self, policy: PolicyView | None) -> None:
        """Raise ValueError if it has no meaning for this policy (None: for an attack that looks at none)."""
        del policy

    def pays(self, gain: Tensor) -> Tensor:
        """Which rows to attack, given what the objective gains (n,); the others are left alone and save their budget."""
        return gain > 0


@dataclass(frozen=True)
class Greedy(Allocation):
    """All that is left, at once."""

    def radius(self, context: AttackContext) -> Tensor:
        return context.allowance


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same at every step up to the horizon; what a step leaves over goes to the later ones.

    remaining / sqrt(steps left) for norm 2, remaining / steps left for norm 1, the radius of a step for norms inf and 0.
    """

    def radius(self, context: AttackContext) -> Tensor:
        return _share(context, context.steps_left)


@dataclass(frozen=True)
class Spread(Allocation):
    """The same at each of the first steps, then what is left: for episodes that end long before their horizon.

    Args:
        n_steps: how many steps share the budget.
    """

    n_steps: int

    def __post_init__(self) -> None:
        check_count("n_steps", self.n_steps)

    def radius(self, context: AttackContext) -> Tensor:
        return _share(context, torch.minimum(context.steps_left, (self.n_steps - context.step).clamp_min(1)))


@dataclass(frozen=True)
class StrategicallyTimed(Allocation):
    """Attack only where the objective gains enough.

    Args:
        least_gain: what the objective must gain, in its own units.
        allocation: what those steps may cost.

    Source: the idea of Lin et al. (IJCAI 2017), arXiv:1703.06748, who look at how much the policy prefers its best action
    instead of at what the attack would really gain.
    """

    least_gain: float
    allocation: Allocation = field(default_factory=Greedy)

    def __post_init__(self) -> None:
        check_positive("least_gain", self.least_gain)
        check_allocation("allocation", self.allocation)

    def check(self, policy: PolicyView | None) -> None:
        self.allocation.check(policy)

    def radius(self, context: AttackContext) -> Tensor:
        return self.allocation.radius(context)

    def pays(self, gain: Tensor) -> Tensor:
        return (gain >= self.least_gain) & self.allocation.pays(gain)


@dataclass(frozen=True)
class Geometric(Allocation):
    """Always the same share of what is left (norm inf: of the radius of a step; norm 0: all entries).

    Args:
        share: in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        if check_positive("share", self.share) > 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def radius(self, context: AttackContext) -> Tensor:
        if context.norm == 0:
            return context.allowance
        left = context.allowance if context.remaining is None else context.remaining
        return self.share * torch.where(torch.isinf(left), context.allowance, left)


@dataclass(frozen=True)
class PreferenceThreshold(Allocation):
    """Attack only where the policy cares which action it takes: the strategically-timed attack.

    Discrete actions: the probability of the likeliest action less that of the unlikeliest on the true observation; action values are
    logits (temperature 1). Continuous actions: the largest singular value of the greedy action's derivative, in standard deviations
    of the policy: how far a small perturbation moves it.

    Args:
        least: 0 attacks always; above 1 no step with discrete actions is attacked.
        allocation: what those steps may cost.

    Source: Lin et al. (IJCAI 2017), arXiv:1703.06748.
    """

    least: float
    allocation: Allocation = field(default_factory=Greedy)

    def __post_init__(self) -> None:
        _check_least("least", self.least)
        check_allocation("allocation", self.allocation)

    @classmethod
    def calibrated(cls, context: AttackContext, rate: float, allocation: Allocation | None = None) -> PreferenceThreshold:
        """The threshold at which a share `rate` of these steps would be attacked.

        Args:
            context: steps of clean episodes, as many as there are.
            rate: in (0, 1].
            allocation: what those steps may cost; default all that is left.
        """
        if not 0 < check_real("rate", rate) <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        found = preference(context).sort().values
        return cls(float(found[len(found) - math.ceil(rate * len(found))]), Greedy() if allocation is None else allocation)

    def check(self, policy: PolicyView | None) -> None:
        if policy is None:
            raise ValueError("PreferenceThreshold looks at the policy: this attack was given none")
        self.allocation.check(policy)

    def radius(self, context: AttackContext) -> Tensor:
        return torch.where(preference(context) >= self.least, self.allocation.radius(context), 0.0)

    def pays(self, gain: Tensor) -> Tensor:
        return self.allocation.pays(gain)


@dataclass(frozen=True)
class QGapThreshold(Allocation):
    """Attack only where the best action is worth at least `gap` more than the worst, on the true observation.

    Args:
        gap: in units of the action values.
        allocation: what those steps may cost.
    """

    gap: float
    allocation: Allocation = field(default_factory=Greedy)

    def __post_init__(self) -> None:
        _check_least("gap", self.gap)
        check_allocation("allocation", self.allocation)

    def check(self, policy: PolicyView | None) -> None:
        if policy is None or policy.kind != "q":
            raise ValueError(
                f"QGapThreshold compares action values, got {'no policy' if policy is None else f'a policy of kind {policy.kind!r}'}"
            )
        self.allocation.check(policy)

    def radius(self, context: AttackContext) -> Tensor:
        values = _clean_scores(context)
        gap = values.amax(-1) - values.amin(-1)
        return torch.where(gap >= self.gap, self.allocation.radius(context), 0.0)

    def pays(self, gain: Tensor) -> Tensor:
        return self.allocation.pays(gain)


def preference(context: AttackContext) -> Tensor:
    """How much the policy cares what it does on the true observations, float64 (n,); see `PreferenceThreshold`."""
    policy = context.policy
    if policy.discrete:
        shares = _clean_scores(context).softmax(-1)
        return shares.amax(-1) - shares.amin(-1)
    observation = policy.fold(context.clean_stack).float().requires_grad_(True)
    with torch.enable_grad():
        scores = policy.scores(observation, context.memory)
        means = policy.rule.mean(scores) if isinstance(policy.rule, ContinuousRule) else scores
        rows = [torch.autograd.grad(column.sum(), observation, retain_graph=True)[0] for column in means.unbind(1)]
    derivative = torch.stack([row.flatten(1) for row in rows], dim=1)
    unit: Any = standard_deviation(policy, scores.detach())
    derivative = derivative / (unit if isinstance(unit, float) else unit[:, :, None])
    sizes: Tensor = torch.linalg.matrix_norm(derivative.double(), 2)
    return sizes


def standard_deviation(policy: PolicyView, scores: Tensor) -> Tensor | float:
    """Of the actions (n, size), in the environment's units and before any squashing; 1 for a policy that has none."""
    if policy.kind == "deterministic":
        return 1.0
    deviation = scores.chunk(2, dim=-1)[1].exp()
    if policy.kind == "squashed":
        space = cast(spaces.Box, policy.action_space)
        deviation = deviation * torch.from_numpy((space.high - space.low).reshape(-1) / 2).to(deviation)
    return deviation


def _clean_scores(context: AttackContext) -> Tensor:
    with torch.no_grad():
        return context.policy.scores(context.policy.fold(context.clean_stack).float(), context.memory).double()


def _check_least(name: str, value: float) -> None:
    if check_real(name, value) < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_allocation(name: str, value: object) -> Allocation:
    """Return an allocation as it is.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, Allocation):
        raise TypeError(f"{name} must be an allocation such as attacks.Uniform(), got {value!r}")
    return value


def _share(context: AttackContext, steps: Tensor) -> Tensor:
    left = context.allowance if context.remaining is None else context.remaining
    match context.norm:
        case 2:
            share = left / steps.double().sqrt()
        case 1:
            share = left / steps
        case _:
            share = context.allowance  # norm inf has no episode budget, that of norm 0 counts frames
    return torch.minimum(share, context.allowance)
