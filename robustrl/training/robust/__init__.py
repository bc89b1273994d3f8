"""SB3 algorithms that are trained against attackers of the observations."""

from robustrl.training.robust.algorithms import SADQN, SAPPO
from robustrl.training.robust.atla import ATLA
from robustrl.training.robust.evaluation import RobustEvalCallback
from robustrl.training.robust.fast import Fast
from robustrl.training.robust.metrics import estimate_certified_actions, estimate_greedy_worst_case
from robustrl.training.robust.neighbourhood import IBP, Ascent, Neighbourhood, Solver
from robustrl.training.robust.regularizers import (
    Consistency,
    Margin,
    Minibatch,
    Overlap,
    Regularizer,
    StateAdversarial,
    WorstSurrogate,
)
from robustrl.training.robust.schedules import Constant, Linear, Schedule, Smoothed
from robustrl.training.robust.worst_case import WorstCaseCritic

__all__ = [
    "ATLA",
    "IBP",
    "SADQN",
    "SAPPO",
    "Ascent",
    "Consistency",
    "Constant",
    "Fast",
    "Linear",
    "Margin",
    "Minibatch",
    "Neighbourhood",
    "Overlap",
    "Regularizer",
    "RobustEvalCallback",
    "Schedule",
    "Smoothed",
    "Solver",
    "StateAdversarial",
    "WorstCaseCritic",
    "WorstSurrogate",
    "estimate_certified_actions",
    "estimate_greedy_worst_case",
]
