"""How a perturbation is chosen: an objective, the geometry of a norm, a solver, and when to spend the budget."""

from collections.abc import Callable
from functools import partial

from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.gradient import GradientAttack
from robustrl.attacks.objectives import ActionDeviation, LowValue, Margin, Objective
from robustrl.attacks.smoothed import FlipAttack, MinimalFlip, SmoothedPGD
from robustrl.attacks.timing import Allocation, Greedy, Spread, StrategicallyTimed, Uniform

ATTACKS: dict[str, Callable[..., Attack]] = {
    "pgd": SmoothedPGD,
    "flip": MinimalFlip,
    "mad": partial(GradientAttack, ActionDeviation()),
    "critic": partial(GradientAttack, LowValue()),
    "margin": partial(GradientAttack, Margin()),
}
"""Attacks by the names of the command line; each takes the keyword arguments of its class."""

__all__ = [
    "ATTACKS",
    "ActionDeviation",
    "Allocation",
    "Attack",
    "AttackContext",
    "FlipAttack",
    "GradientAttack",
    "Greedy",
    "LowValue",
    "Margin",
    "MinimalFlip",
    "Objective",
    "SmoothedPGD",
    "Spread",
    "StrategicallyTimed",
    "Uniform",
]
