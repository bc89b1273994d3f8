"""How a perturbation is chosen: an objective, the geometry of a norm, a solver, and when to spend the budget."""

from collections.abc import Callable
from functools import partial

from robustrl.attacks.ball import Ball
from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.enchanting import Enchanting
from robustrl.attacks.gradient import FGSM, GradientAttack, LangevinAttack, MomentumAttack
from robustrl.attacks.hindsight import knapsack_oracle
from robustrl.attacks.learned import ActionDirection, Command, LearnedAttack, Perturbation, TargetAction
from robustrl.attacks.objectives import (
    ActionDeviation,
    CrossEntropy,
    Flips,
    LowValue,
    Margin,
    MinProbability,
    Objective,
    Targeted,
    Weighted,
)
from robustrl.attacks.pattanaik import Pattanaik
from robustrl.attacks.queries import NES, Square, Transfer
from robustrl.attacks.random_noise import RandomNoise
from robustrl.attacks.smoothed import FlipAttack, MinimalFlip, SmoothedPGD
from robustrl.attacks.timing import (
    Allocation,
    Geometric,
    Greedy,
    PreferenceThreshold,
    QGapThreshold,
    Spread,
    StrategicallyTimed,
    Uniform,
)

ATTACKS: dict[str, Callable[..., Attack]] = {
    "pgd": SmoothedPGD,
    "flip": MinimalFlip,
    "mad": partial(GradientAttack, ActionDeviation()),
    "critic": partial(GradientAttack, LowValue()),
    "margin": partial(GradientAttack, Margin()),
    "ce": partial(GradientAttack, CrossEntropy()),
    "votes": partial(GradientAttack, MinProbability()),
    "targeted": partial(GradientAttack, Targeted()),
    "fgsm": FGSM,
    "fgsm_rs": partial(FGSM, random_start=True),
    "mi_fgsm": partial(MomentumAttack, Margin()),
    "momentum": partial(MomentumAttack, Margin(), momentum=0.5, look_ahead=True),
    "sgld": partial(LangevinAttack, ActionDeviation()),
    "pattanaik": Pattanaik,
    "square": Square,
    "decision": partial(Square, Flips()),
    "nes": NES,
    "spsa": partial(NES, directions="signs"),
    "random": RandomNoise,
    "corner": partial(RandomNoise, "corner"),
    "gaussian": partial(RandomNoise, "gaussian"),
    "salt_and_pepper": partial(RandomNoise, "salt-and-pepper"),
}
"""Attacks by the names of the command line; each takes the keyword arguments of its class."""

__all__ = [
    "ATTACKS",
    "FGSM",
    "NES",
    "ActionDeviation",
    "ActionDirection",
    "Allocation",
    "Attack",
    "AttackContext",
    "Ball",
    "Command",
    "CrossEntropy",
    "Enchanting",
    "FlipAttack",
    "Flips",
    "Geometric",
    "GradientAttack",
    "Greedy",
    "LangevinAttack",
    "LearnedAttack",
    "LowValue",
    "Margin",
    "MinProbability",
    "MinimalFlip",
    "MomentumAttack",
    "Objective",
    "Pattanaik",
    "Perturbation",
    "PreferenceThreshold",
    "QGapThreshold",
    "RandomNoise",
    "SmoothedPGD",
    "Spread",
    "Square",
    "StrategicallyTimed",
    "TargetAction",
    "Targeted",
    "Transfer",
    "Uniform",
    "Weighted",
    "knapsack_oracle",
]
