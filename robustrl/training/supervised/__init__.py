"""Robust training of a network on examples, not on rewards."""

from robustrl.training.supervised.attacks import FGSMRS, NFGSM, PGD, InnerAttack, NoAttack, Region
from robustrl.training.supervised.evaluation import RobustReport, evaluate
from robustrl.training.supervised.examples import Examples
from robustrl.training.supervised.guard import CollapseGuard, EarlyStopping
from robustrl.training.supervised.history import Evaluation, RobustFit
from robustrl.training.supervised.losses import TRADES, Cloning, CrossEntropy, Distillation, Loss
from robustrl.training.supervised.trainer import RobustTrainer

__all__ = [
    "FGSMRS",
    "NFGSM",
    "PGD",
    "TRADES",
    "Cloning",
    "CollapseGuard",
    "CrossEntropy",
    "Distillation",
    "EarlyStopping",
    "Evaluation",
    "Examples",
    "InnerAttack",
    "Loss",
    "NoAttack",
    "Region",
    "RobustFit",
    "RobustReport",
    "RobustTrainer",
    "evaluate",
]
