"""When training has been at its best, and when it has collapsed: decisions from figures of a hold-out, without networks.

Robust overfitting: Rice, Wong, Kolter (ICML 2020), arXiv:2002.11569: robust accuracy falls long before clean accuracy does, so weights
are chosen by it. Catastrophic overfitting: Wong, Rice, Kolter (ICLR 2020), arXiv:2001.03994: a network learns to mislead an attack of
one step and loses all robustness against several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from robustrl.errors import check_count, check_positive, check_real


@dataclass
class EarlyStopping:
    """Remembers the first of the best values, and says when there was none for long.

    Args:
        patience: values without a better one after which to stop, >= 1; None to go on to the end, as the paper does.
    """

    patience: int | None = None
    best: float = field(default=-math.inf, init=False)
    best_index: int = field(default=-1, init=False)
    _seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_count("patience", self.patience)

    def update(self, value: float) -> bool:
        """Take the next value; whether it is better than all before. Equal ones are not.

        Raises:
            ValueError: for NaN.
        """
        better = check_real("value", value, infinite=True) > self.best
        if better:
            self.best, self.best_index = value, self._seen
        self._seen += 1
        return better

    @property
    def finished(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self._seen - 1 - self.best_index >= self.patience


@dataclass(frozen=True)
class CollapseGuard:
    """Recognises catastrophic overfitting by any of three signs.

    Args:
        drop: of robust accuracy below its best so far, > 0.
        gap: of accuracy under PGD below that under FGSM, > 0.
        cosine: least mean cosine between loss gradients at inputs and at random points beside them.
        factor: of the attack's steps after a collapse, in (0, 1).
        most: collapses after which training ends.

    Fast adversarial training's own guard compares with the epoch before, on one batch: it misses slow collapses and stops at noise.
    """

    drop: float = 0.15
    gap: float = 0.25
    cosine: float = 0.2
    factor: float = 0.8
    most: int = 10

    def __post_init__(self) -> None:
        for name in ("drop", "gap", "factor"):
            check_positive(name, getattr(self, name))
        check_real("cosine", self.cosine)
        check_count("most", self.most)
        if self.factor >= 1:
            raise ValueError(f"factor must be in (0, 1), got {self.factor}")

    def collapsed(self, best: float, pgd: float, fgsm: float, cosine: float) -> bool:
        """Whether an evaluation shows a collapse.

        Args:
            best: highest accuracy under PGD so far; -inf before the first.
            pgd, fgsm: accuracies under attacks of many steps and of one.
            cosine: see the class; NaN if no gradient was other than zero, which is no sign.
        """
        return pgd < best - self.drop or fgsm - pgd > self.gap or cosine < self.cosine
