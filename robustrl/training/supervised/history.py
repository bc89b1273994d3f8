"""What training tells of itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from robustrl.networks.activations import Activation
from robustrl.training.supervised.attacks import InnerAttack
from robustrl.training.supervised.weights import Weights


@dataclass(frozen=True)
class Evaluation:
    """Figures of a hold-out during training; accuracies in [0, 1].

    Attributes:
        epoch: passes over the examples so far.
        loss: mean of the batches since the last evaluation, as trained on.
        clean, pgd, fgsm: accuracy as they are, under PGD, and under FGSM-RS.
        cos: mean cosine between loss gradients at inputs and beside them; NaN if all are zero.
        alpha: length of the attack's steps, times epsilon; NaN without.
        lr: learning rate.
        collapsed: whether this was a catastrophic overfitting, and training went back to the best weights.
    """

    epoch: float
    loss: float
    clean: float
    pgd: float
    fgsm: float
    cos: float
    alpha: float
    lr: float
    collapsed: bool = False

    @property
    def gap(self) -> float:
        """By how much accuracy under one step of attack flatters."""
        return self.fgsm - self.pgd


@dataclass(frozen=True, eq=False)
class RobustFit:
    """What training found.

    Attributes:
        history: evaluations in order; empty without a hold-out.
        best: weights of the first evaluation with the highest accuracy under PGD. That accuracy chose them: it is optimistic.
        last: weights at the end, averaged ones if `ema` was set, as `best` is.
        best_epoch: when `best` were there; NaN without a hold-out, where they are `last`.
        epsilon, norm: of the threat.
        attack: as it was at the end: the guard may have shortened its steps.
    """

    history: tuple[Evaluation, ...]
    best: Weights
    last: Weights
    best_epoch: float
    epsilon: float
    norm: float
    attack: InnerAttack

    def __repr__(self) -> str:
        row = next((row for row in self.history if row.epoch == self.best_epoch), None)
        figures = "" if row is None else f", best at epoch {row.epoch:g}: clean {row.clean:.3f}, pgd {row.pgd:.3f}"
        return f"<{type(self).__name__}: {len(self.history)} evaluations{figures}>"

    @property
    def rollbacks(self) -> int:
        """How often the guard went back."""
        return sum(row.collapsed for row in self.history)


def curvatures(module: nn.Module) -> dict[str, float]:
    """Largest second derivatives of a module's activations by name; those with kinks are left out."""
    found = {name: layer.curvature() for name, layer in module.named_modules() if isinstance(layer, Activation)}
    return {name: kappa for name, kappa in found.items() if math.isfinite(kappa)}


class Scalars:
    """Writes evaluations to TensorBoard: robust/{clean,pgd,fgsm,gap,cos,alpha,lr,kappa}, and kappa/<layer>."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, row: Evaluation, module: nn.Module, step: int) -> None:
        """Add a row; figures that are not finite are left out."""
        if self._writer is None:
            return
        kappas = curvatures(module)
        figures = {f"robust/{name}": getattr(row, name) for name in ("clean", "pgd", "fgsm", "gap", "cos", "alpha", "lr")}
        figures |= {"robust/kappa": max(kappas.values(), default=math.nan)} | {f"kappa/{n}": k for n, k in kappas.items()}
        for name, value in figures.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)


@contextmanager
def scalars(folder: str | os.PathLike[str] | None) -> Iterator[Scalars]:
    """To a folder; nowhere for None."""
    if folder is None:
        yield Scalars(None)
        return
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(os.fspath(folder))
    try:
        yield Scalars(writer)
    finally:
        writer.close()
