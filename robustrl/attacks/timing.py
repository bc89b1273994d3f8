"""When to spend an episode's budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustrl.attacks.base import AttackContext, Described
from robustrl.errors import check_count, check_positive


class Allocation(Described, ABC):
    """What one step may cost, and whether what it gains is worth that."""

    @abstractmethod
    def radius(self, context: AttackContext) -> Tensor:
        """Most that the perturbations of this step may measure, float64 (n,); the threat model's allowance holds on top."""

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

    remaining / sqrt(steps left) for norm 2, remaining / steps left for norm 1, the radius of a step for norm inf.
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

    def radius(self, context: AttackContext) -> Tensor:
        return self.allocation.radius(context)

    def pays(self, gain: Tensor) -> Tensor:
        return (gain >= self.least_gain) & self.allocation.pays(gain)


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
            share = left
    return torch.minimum(share, context.allowance)
