"""What an attacker may do: the threat model, and the ledger that holds it to its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import BudgetExceededError, check_choice, check_count, check_real

Units = Literal["raw", "normalized", "unit01", "uint8"]

RELATIVE_SLACK, ABSOLUTE_SLACK = 1e-9, 1e-12
"""What float64 rounding of an honest perturbation's norm may cost; anything above is over budget."""


@dataclass(frozen=True)
class ThreatModel:
    """A norm-bounded observation attacker; attackers, certificates and robust training share this object.

    At every step the attacker sees everything up to and including the true observation (past noise, actions and the
    policy's weights too), but not the noise of this step, and delivers a perturbed observation.

    Args:
        norm: 0, 1, 2 or inf.
        step: radius per step, ||e_t||_p <= step (norm 0: changed entries of one frame); None for no such limit.
        episode: budget of a whole episode, in every single run: sqrt(sum ||e_t||_2^2) for norm 2, sum ||e_t||_1 for
            norm 1, the number of altered frames for norm 0. Norm inf has no episode budget.
        units: "raw" observation units (the default), "normalized" (after a frozen VecNormalize), "unit01" pixels in
            [0, 1], or "uint8" grey levels. Certificates and attacks refuse to mix them.
        mask: attackable entries of a frame, broadcast to its shape; None for all.

    Raises:
        ValueError: for an unknown norm, a negative or NaN radius, a threat without any limit, or an empty mask.

    Examples:
        >>> ThreatModel(norm=2, episode=0.6)
        ThreatModel(norm=2, step=None, episode=0.6, units='raw', mask=None)
    """

    norm: float
    step: float | None = None
    episode: float | None = None
    units: Units = "raw"
    mask: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, (0, 1, 2, math.inf))
        check_choice("units", self.units, ("raw", "normalized", "unit01", "uint8"))
        for name in ("step", "episode"):
            value = getattr(self, name)
            if value is not None:
                number = check_real(name, value, allowed="a number >= 0", infinite=True)
                if number < 0:
                    raise ValueError(f"{name} must be a number >= 0, got {value}")
                object.__setattr__(self, name, number)
        if self.step is None and self.episode is None:
            raise ValueError("a threat model needs step= or episode=, got neither: nothing holds against an unlimited attacker")
        if self.norm == math.inf and self.episode is not None:
            raise ValueError("episode must be None for norm inf, which limits single steps only; use step=")
        if self.mask is not None:
            mask = np.asarray(self.mask)
            if mask.dtype != bool or not mask.any():
                raise ValueError(f"mask must be boolean with at least one attackable entry, got {self.mask}")
            object.__setattr__(self, "mask", tuple(bool(m) for m in mask.ravel()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a certificate or report."""
        norm = "inf" if self.norm == math.inf else self.norm
        return {"norm": norm, "step": self.step, "episode": self.episode, "units": self.units, "mask": self.mask}


class Ledger:
    """Budgets of `n_slots` episodes, in float64, one row each; it charges the perturbation that was delivered.

    Args:
        threat: the limits.
        n_slots: number of episodes kept side by side.
    """

    def __init__(self, threat: ThreatModel, n_slots: int) -> None:
        self.threat = threat
        self._spent = np.zeros(check_count("n_slots", n_slots), dtype=np.float64)

    @property
    def spent(self) -> NDArray[np.float64]:
        """Budget used so far in this episode, in the norm's own units; shape (n_slots,)."""
        return np.sqrt(self._spent) if self.threat.norm == 2 else self._spent.copy()

    @property
    def remaining(self) -> NDArray[np.float64]:
        """Episode budget left; inf where there is no episode limit. Shape (n_slots,)."""
        limit = self.threat.episode
        if limit is None:
            return np.full(self._spent.shape, math.inf)
        if self.threat.norm == 2:
            return np.sqrt(np.maximum(limit**2 - self._spent, 0.0))
        return np.maximum(limit - self._spent, 0.0)

    @property
    def allowance(self) -> NDArray[np.float64]:
        """Largest norm that this step's perturbation may have; shape (n_slots,). Norm 0: changed entries."""
        step = math.inf if self.threat.step is None else self.threat.step
        if self.threat.norm == 0:
            return np.where(self.remaining >= 1, step, 0.0)
        return np.minimum(step, self.remaining)

    def charge(self, clean: ArrayLike, delivered: ArrayLike, slots: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Measure and book what was really delivered.

        Args:
            clean: true frames, shape (n, *frame).
            delivered: attacked frames as the agent receives them, before its noise; same shape.
            slots: ledger rows, shape (n,); default all.
        Returns:
            the norm charged per row, float64, shape (n,).
        Raises:
            BudgetExceededError: if a row exceeds its allowance by more than float64 rounding; nothing is booked then.
            ValueError: if a delivered frame is not finite or touches a masked entry.
        """
        rows = np.arange(self._spent.size) if slots is None else slots
        delta = (np.asarray(delivered, dtype=np.float64) - np.asarray(clean, dtype=np.float64)).reshape(len(rows), -1)
        if not np.isfinite(delta).all():
            raise ValueError("delivered frames must be finite: an attack returned NaN or inf")
        if self.threat.mask is not None:
            mask = np.resize(np.asarray(self.threat.mask), delta.shape[1])
            if np.any(delta[:, ~mask] != 0):
                raise ValueError("the attack changed entries that the threat model's mask protects")
        norms = _row_norms(delta, self.threat.norm)
        allowed = self.allowance[rows]
        over = norms > allowed * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK
        if over.any():
            worst = int(np.argmax(norms - allowed))
            raise BudgetExceededError(
                f"delivered perturbation of l{self.threat.norm:g} norm {norms[worst]:.9g} in slot {rows[worst]} "
                f"exceeds the allowance {allowed[worst]:.9g}"
            )
        cost = {0: (norms > 0).astype(np.float64), 2: norms**2}.get(self.threat.norm, norms)
        self._spent[rows] += cost
        return norms

    def reset(self, slots: NDArray[np.int64] | None = None) -> None:
        """Start new episodes in the given rows (default all)."""
        self._spent[slice(None) if slots is None else slots] = 0.0


def _row_norms(delta: NDArray[np.float64], norm: float) -> NDArray[np.float64]:
    if norm == 0:
        return np.count_nonzero(delta, axis=1).astype(np.float64)
    return np.asarray(np.linalg.norm(delta, ord=norm, axis=1), dtype=np.float64)
