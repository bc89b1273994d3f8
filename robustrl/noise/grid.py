"""Observations on a grid: exact integers in, exact integers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robustrl.errors import check_count, check_real
from robustrl.noise.base import Frames
from robustrl.noise.draws import like, namespace

TOLERANCE = 1e-3
"""Of a grid step, by which an observation may miss its grid point: single precision's rounding, and no more."""
MOST = 2**24
"""Most grid steps, so that 32-bit integers hold four times their number."""

Bound = float | tuple[float, ...]


class Grid:
    """The points low + i (high - low) / quantisation, i = 0 .. quantisation, in every entry.

    Args:
        quantisation: number of steps q, at most 2^24.
        low: lowest value: one number, or one per feature (broadcast along the last axis).
        high: highest value, likewise.
    Raises:
        ValueError: if a bound is not finite, high <= low somewhere, or q is out of range.
    """

    def __init__(self, quantisation: int, low: Bound | Sequence[float], high: Bound | Sequence[float]) -> None:
        self.quantisation = check_count("quantisation", quantisation)
        if quantisation > MOST:
            raise ValueError(f"quantisation must be <= {MOST}, got {quantisation}")
        self.low, self.high = _bound("low", low), _bound("high", high)
        self._low, self._high = np.asarray(self.low), np.asarray(self.high)
        if self._low.shape != self._high.shape and self._low.size > 1 < self._high.size:
            raise ValueError(f"high must have as many entries as low, got {self._high.size} and {self._low.size}")
        if np.any(self._high <= self._low):
            raise ValueError(f"high must be > low, got low={self.low}, high={self.high}")
        self.step = float(np.min((self._high - self._low) / quantisation))
        """The smallest step, in observation units."""

    def indices(self, x: Frames) -> Frames:
        """Grid indices, int32, of an array or tensor of any numeric dtype.

        Raises:
            ValueError: if an entry is NaN, outside [low, high], or farther than `TOLERANCE` of a step from the grid.
        """
        exact = self._position(x)
        found = namespace(exact).clip(exact, 0, self.quantisation).round()
        if not bool((abs(exact - found) <= TOLERANCE).all()):  # written so that NaN fails
            raise ValueError(
                f"observations must lie on the grid of {self.quantisation} steps between {self.low} and {self.high} "
                "(robustrl.envs.QuantiseObservation puts them there); got others, or NaN"
            )
        indices: Frames = _as_int32(found)
        return indices

    def nearest(self, x: Frames) -> Frames:
        """Grid indices, int32, of the points nearest to `x`, which is clipped to [low, high] first.

        Raises:
            ValueError: if an entry is NaN.
        """
        exact = self._position(x)
        if bool((exact != exact).any()):
            raise ValueError("observations must be numbers, got NaN")
        indices: Frames = _as_int32(namespace(exact).clip(exact, 0, self.quantisation).round())
        return indices

    def _position(self, x: Frames) -> Any:
        wide = _wide(x)
        low, high = like(self._low, wide), like(self._high, wide)
        return (wide - low) * (self.quantisation / (high - low))

    def values(self, indices: Any, parts: int = 1) -> Any:
        """Observations of indices that count `parts`-ths of a step, in double precision; any integers."""
        wide = _wide(indices)
        low, high = like(self._low, wide), like(self._high, wide)
        return low + wide * ((high - low) / (parts * self.quantisation))


def _bound(name: str, value: Any) -> Bound:
    if np.ndim(value) == 0:
        return check_real(name, value)
    entries = tuple(check_real(name, entry) for entry in np.asarray(value).tolist())
    if not entries:
        raise ValueError(f"{name} must have at least one entry, got none")
    return entries


def _wide(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.astype(np.float64)
    import torch

    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # Apple's GPUs have no doubles


def _as_int32(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.astype(np.int32)
    import torch

    return x.to(torch.int32)
