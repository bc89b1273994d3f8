"""How a radius grows during training: functions of SB3's `progress_remaining`, 1 at the start and 0 at the end, to [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from robustrl.errors import check_real


@dataclass(frozen=True)
class Schedule(ABC):
    """0 until a share `start` of training is over, 1 from `end` on.

    Raises:
        ValueError: unless 0 <= start <= end <= 1.
    """

    start: float = 0.0
    end: float = 0.75

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_real(name, getattr(self, name))
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start <= end <= 1, got {self.start} and {self.end}")

    def __call__(self, progress_remaining: float) -> float:
        """The factor of the radius."""
        done = 1 - progress_remaining
        if done >= self.end:
            return 1.0
        return 0.0 if done <= self.start else self.rise((done - self.start) / (self.end - self.start))

    @abstractmethod
    def rise(self, part: float) -> float:
        """From 0 at 0 to 1 at 1."""


class Linear(Schedule):
    """A straight line."""

    def rise(self, part: float) -> float:
        return part


class Smoothed(Schedule):
    """A quartic curve for the first quarter, and its tangent from there: the value and the slope have no jump.

    Source: `SmoothedScheduler` of Xu et al. (NeurIPS 2020), arXiv:2002.12920, with which Zhang et al. (arXiv:2003.08938) train SA-DQN.
    """

    def rise(self, part: float) -> float:
        # a * part^4 up to m and a * m^4 + 4 a m^3 (part - m) after it, with 1 at 1.
        m = 0.25
        a = 1 / (m**4 + 4 * m**3 * (1 - m))
        return float(a * part**4 if part <= m else a * (m**4 + 4 * m**3 * (part - m)))


@dataclass(frozen=True)
class Constant(Schedule):
    """The whole radius from the start."""

    end: float = 0.0

    def rise(self, part: float) -> float:
        return 1.0


SCHEDULES: Mapping[str, Schedule] = {"linear": Linear(), "smoothed": Smoothed(), "constant": Constant()}
"""By name, as they are by default."""
