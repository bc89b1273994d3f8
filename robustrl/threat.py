"""What an attacker may do: the threat model, and the ledger that holds it to its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import BudgetExceededError, check_choice, check_count, check_real

Units = Literal["raw", "normalized", "unit01", "uint8"]

RELATIVE_SLACK, EXHAUSTED_SLACK = 1e-9, 1e-12
"""What float64 rounding of an honest perturbation's norm may cost, relative to the step's allowance and to the limits of
the threat model; anything above is over budget."""


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
        mask: attackable entries: one boolean per entry of a (flattened) frame, or one per entry of its last axis; None
            for all.

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
        object.__setattr__(self, "norm", check_choice("norm", self.norm, (0, 1, 2, math.inf)))
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
            if mask.dtype != bool or mask.ndim != 1 or not mask.any():
                raise ValueError(
                    f"mask must be one-dimensional and boolean with at least one attackable entry, got {self.mask}; "
                    "flatten the mask of a whole frame"
                )
            object.__setattr__(self, "mask", tuple(mask.tolist()))

    def attackable(self, frame_shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which entries of a frame the attacker may change; boolean, shape `frame_shape`.

        Raises:
            ValueError: if the mask does not fit frames of that shape.
        """
        if self.mask is None:
            return np.ones(frame_shape, dtype=bool)
        mask = np.array(self.mask)
        if mask.size == math.prod(frame_shape):
            return mask.reshape(frame_shape)
        if not frame_shape or mask.size != frame_shape[-1]:
            raise ValueError(f"mask of {mask.size} entries does not fit frames of shape {frame_shape}")
        return np.broadcast_to(mask, frame_shape)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ThreatModel:
        """Inverse of `to_dict`.

        Raises:
            ValueError: if it is no threat model.
        """
        fields = dict(data)
        try:
            norm, mask = fields.pop("norm"), fields.pop("mask")
            return cls(math.inf if norm == "inf" else norm, mask=None if mask is None else tuple(mask), **fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a threat model: {error}") from None

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
        self._limit = min(limit for limit in (threat.step, threat.episode) if limit is not None)

    @property
    def spent(self) -> NDArray[np.float64]:
        """Budget used so far in this episode, in the norm's own units (norm inf: the largest step); shape (n_slots,)."""
        return np.sqrt(self._spent) if self.threat.norm == 2 else self._spent.copy()

    @property
    def remaining(self) -> NDArray[np.float64]:
        """Episode budget left; inf where there is no episode limit. Shape (n_slots,)."""
        limit = self.threat.episode
        if limit is None or limit == math.inf:
            return np.full(self._spent.shape, math.inf)
        if self.threat.norm == 2:
            return np.sqrt(np.maximum(limit * limit - self._spent, 0.0))
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
            slots: ledger rows, shape (n,), each at most once; default all.
        Returns:
            the norm charged per row, float64, shape (n,).
        Raises:
            BudgetExceededError: if a row exceeds its allowance by more than float64 rounding; nothing is booked then.
            ValueError: if a delivered frame is not finite or touches a masked entry.
        """
        rows = np.arange(self._spent.size) if slots is None else np.arange(self._spent.size)[slots]
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"slots must name each row at most once, got {slots}")
        before, after = np.asarray(clean, dtype=np.float64), np.asarray(delivered, dtype=np.float64)
        if before.shape != after.shape or before.shape[:1] != rows.shape:
            raise ValueError(
                f"clean and delivered must both have shape ({len(rows)}, *frame), got {before.shape} and {after.shape}"
            )
        delta = after - before
        if not np.isfinite(delta).all():
            raise ValueError("delivered frames must be finite: an attack returned NaN or inf")
        if self.threat.mask is not None and np.any(delta[:, ~self.threat.attackable(delta.shape[1:])] != 0):
            raise ValueError("delivered frames differ in entries that the threat model's mask protects")
        norms = _row_norms(delta.reshape(len(rows), math.prod(delta.shape[1:])), self.threat.norm)
        allowed = self.allowance[rows]
        within = norms <= allowed * (1 + RELATIVE_SLACK) + EXHAUSTED_SLACK * self._limit  # False for NaN as well
        if not within.all():
            worst = int(np.argmax(np.where(within, -math.inf, norms - allowed)))
            raise BudgetExceededError(
                f"delivered perturbation of l{self.threat.norm:g} norm {norms[worst]:.9g} in slot {rows[worst]} "
                f"exceeds the allowance {allowed[worst]:.9g}"
            )
        match self.threat.norm:
            case 0:
                self._spent[rows] += norms > 0
            case 1:
                self._spent[rows] += norms
            case 2:
                self._spent[rows] += norms**2
            case _:
                self._spent[rows] = np.maximum(self._spent[rows], norms)
        return norms

    def reset(self, slots: NDArray[np.int64] | None = None) -> None:
        """Start new episodes in the given rows (default all)."""
        self._spent[slice(None) if slots is None else slots] = 0.0


def _row_norms(delta: NDArray[np.float64], norm: float) -> NDArray[np.float64]:
    norms: Any = np.count_nonzero(delta, axis=1) if norm == 0 else np.linalg.norm(delta, ord=norm, axis=1)
    return np.asarray(norms, dtype=np.float64)
