"""What an attacker may do: the threat model, and the ledger that holds it to its budget."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import BudgetExceededError, check_choice, check_count, check_finite_array, check_real

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
        norm: 0, 1, 2 or inf ("inf" will do).
        step: radius per step, ||e_t||_p <= step (norm 0: changed entries of one frame); None for no such limit.
        episode: budget of a whole episode, in every single run: sqrt(sum ||e_t||_2^2) for norm 2, sum ||e_t||_1 for
            norm 1, the number of altered frames for norm 0. Norm inf has no episode budget.
        units: "raw" observation units (the default), "normalized" (after a frozen VecNormalize), "unit01" pixels in
            [0, 1], or "uint8" grey levels. Certificates and attacks refuse to mix them.
        mask: attackable entries: one boolean per entry of a (flattened) frame, or one per entry of its last axis; None
            for all.
        scale: units per coordinate, positive, one per entry as in `mask`: every norm is that of e_t / scale; None for ones.

    Raises:
        ValueError: for an unknown norm, a negative or NaN radius, a threat without any limit, an empty mask, or a scale that is
            not positive and finite.

    Examples:
        >>> ThreatModel(norm=2, episode=0.6)
        ThreatModel(norm=2, step=None, episode=0.6, units='raw', mask=None, scale=None)
    """

    norm: float
    step: float | None = None
    episode: float | None = None
    units: Units = "raw"
    mask: tuple[bool, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given: object = self.norm
        norm = math.inf if isinstance(given, str) and given == "inf" else given
        object.__setattr__(self, "norm", check_choice("norm", norm, (0, 1, 2, math.inf)))
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
        if self.scale is not None:
            scale = check_finite_array("scale", self.scale, ndim=1)
            if not np.all(scale > 0):
                raise ValueError(f"scale must be > 0 everywhere, got {scale.min()}")
            object.__setattr__(self, "scale", tuple(scale.tolist()))

    @classmethod
    def from_unit01(cls, epsilon: float, *, norm: float = math.inf, mask: tuple[bool, ...] | None = None) -> ThreatModel:
        """A radius per step that is stated for pixels in [0, 1], in grey levels (units="uint8").

        Norm inf: what is within 0.01 of a whole grey level is meant to be one; a warning says so where that changes the number,
        as for 0.00392, which stands for 1/255.
        """
        level = 255 * check_real("epsilon", epsilon, allowed="a number >= 0")
        if norm == math.inf and 0 < abs(level - round(level)) <= 1e-2:
            if abs(level - round(level)) > 1e-9 * level:
                warnings.warn(f"epsilon = {epsilon} is read as {round(level)}/255, a whole grey level", stacklevel=2)
            level = float(round(level))
        return cls(norm, step=level, units="uint8", mask=mask)

    def in_whole_levels(self) -> ThreatModel:
        """This threat for observations of integers, whose entries can only move by whole steps.

        Norm inf: the radius is rounded down, with a warning where that changes it. Other norms stay as they are. A budget for less
        than one step is warned of.
        """
        least = min(limit for limit in (self.step, self.episode) if limit is not None)
        if self.scale is None and 0 < least < 1 - RELATIVE_SLACK:
            warnings.warn(
                f"a budget of {least:g} in norm {self.norm:g} is less than one whole level: nothing is attacked "
                "(observations of integers, delivery='round' or 'greedy')",
                stacklevel=2,
            )
            return replace(self, step=0.0) if self.norm == math.inf else self
        if self.norm != math.inf or self.step is None or self.step == math.inf or self.scale is not None:
            return self
        whole = float(math.floor(self.step * (1 + RELATIVE_SLACK)))
        if whole < self.step * (1 - RELATIVE_SLACK):
            warnings.warn(f"step = {self.step:g} of norm inf means {whole:g} for observations of integers", stacklevel=2)
        return replace(self, step=whole)

    def attackable(self, frame_shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which entries of a frame the attacker may change; boolean, shape `frame_shape`.

        Raises:
            ValueError: if the mask does not fit frames of that shape.
        """
        return np.ones(frame_shape, dtype=bool) if self.mask is None else _fitted("mask", np.array(self.mask), frame_shape)

    def scales(self, frame_shape: tuple[int, ...]) -> NDArray[np.float64] | None:
        """What the entries of a frame are divided by before they are measured, shape `frame_shape`; None for nothing.

        Raises:
            ValueError: if the scale does not fit frames of that shape.
        """
        return None if self.scale is None else _fitted("scale", np.array(self.scale), frame_shape)

    def covering(self) -> ThreatModel:
        """The smallest threat model without a scale that allows all that this one does: certificates are about those.

        Raises:
            ValueError: if mask and scale do not fit together.
        """
        if self.scale is None:
            return self
        scale = np.array(self.scale)
        if self.mask is not None:
            whole = max(len(self.mask), scale.size)
            if whole % len(self.mask) or whole % scale.size:
                raise ValueError(f"mask of {len(self.mask)} entries does not fit a scale of {scale.size}")
            scale = np.resize(scale, whole)[np.resize(self.mask, whole)]
        return self.times(float(scale.max()), scale=None)

    def times(self, factor: float, **changes: Any) -> ThreatModel:
        """The same with radii `factor` times as large (norm 0 counts entries and has none), and other changed fields."""
        if self.norm != 0:
            changes |= {
                name: limit * factor for name, limit in (("step", self.step), ("episode", self.episode)) if limit is not None
            }
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ThreatModel:
        """Inverse of `to_dict`.

        Raises:
            ValueError: if it is no threat model.
        """
        fields = dict(data)
        try:
            fields |= {"mask": None if fields["mask"] is None else tuple(fields["mask"])}
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a threat model: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a certificate or report; without a scale, what it was before there were any."""
        norm = "inf" if self.norm == math.inf else self.norm
        found = {"norm": norm, "step": self.step, "episode": self.episode, "units": self.units, "mask": self.mask}
        return found if self.scale is None else found | {"scale": self.scale}


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
        scale = self.threat.scales(delta.shape[1:])
        measured = delta if scale is None else delta / scale
        norms = _row_norms(measured.reshape(len(rows), math.prod(delta.shape[1:])), self.threat.norm)
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

    def go_on(self, before: Ledger) -> None:
        """Take over what the running episodes of a ledger of as many slots and the same norm have spent."""
        if before.threat.norm != self.threat.norm or before._spent.shape != self._spent.shape:
            raise ValueError(f"a ledger of {before.threat} and {before._spent.size} slots cannot go on as one of {self.threat}")
        self._spent = before._spent

    def reset(self, slots: NDArray[np.int64] | None = None) -> None:
        """Start new episodes in the given rows (default all)."""
        self._spent[slice(None) if slots is None else slots] = 0.0


def _fitted(name: str, values: NDArray[Any], frame_shape: tuple[int, ...]) -> NDArray[Any]:
    """One value per entry of a frame, from as many or from one per entry of its last axis."""
    if values.size == math.prod(frame_shape):
        return values.reshape(frame_shape)
    if not frame_shape or values.size != frame_shape[-1]:
        raise ValueError(f"{name} of {values.size} entries does not fit frames of shape {frame_shape}")
    return np.broadcast_to(values, frame_shape)


def _row_norms(delta: NDArray[np.float64], norm: float) -> NDArray[np.float64]:
    norms: Any = np.count_nonzero(delta, axis=1) if norm == 0 else np.linalg.norm(delta, ord=norm, axis=1)
    return np.asarray(norms, dtype=np.float64)
