"""The contract of a noise mechanism."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_budget, check_choice, check_count

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Frames = TypeVar("Frames", NDArray[Any], "torch.Tensor")
"""A batch of frames, shape (n, *frame), as a numpy array or a torch tensor of a floating dtype."""

Generator = Any
"""A `numpy.random.Generator` for numpy frames, a `torch.Generator` on the frames' device for tensors; or a list of them, one
per frame of the batch, which then draws as if it were alone."""


OUTWARD = 1e-12
"""Relative rounding of every number that comes out of a special function or a chain of operations: against the certificate."""


def shrunk(radius: float) -> float:
    """A radius rounded down by `OUTWARD`."""
    return radius * (1 - OUTWARD)


class Noise(ABC):
    """A noise mechanism: how frames are perturbed, and what is proven about it."""

    norm: ClassVar[float]
    """Norm of the budget: 0 (altered whole frames), 1 or 2."""
    scopes: ClassVar[frozenset[str]] = frozenset({"input", "step", "episode"})
    """What the proof covers; `require` refuses everything else."""
    fp_model: ClassVar[Literal["real", "exact"]] = "real"
    """The arithmetic of the proof: "real" numbers, or "exact" for the floating-point program that runs."""

    @abstractmethod
    def perturb(self, x: Frames, generator: Generator) -> Frames:
        """Return a noisy copy of a batch of frames.

        Args:
            x: frames, shape (n, *frame), floating dtype; numpy array or torch tensor.
            generator: `numpy.random.Generator` or `torch.Generator`, matching `x`, or a list of one per frame; advanced.
        Returns:
            same type, shape, dtype and device as `x`. The sum is formed in the precision of the draws and rounded once.
        Raises:
            ValueError: if `x` has an integer dtype (noise on integers is rounded and wraps around) or is not a batch.
            TypeError: if `x` is neither an array nor a tensor, or `generator` is not of its library.
        """

    @abstractmethod
    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """Smallest probability of an event under any adaptive attacker within `budget`.

        Args:
            p: clean probability of the event, in [0, 1]; any shape.
            budget: episode total in the mechanism's norm, observation units; broadcast against `p`. May be inf.
        Returns:
            float64 array of the broadcast shape.
        Raises:
            ValueError: if a probability is outside [0, 1] or a budget is negative or NaN.
        """

    @abstractmethod
    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """Largest probability of an event under any adaptive attacker; accurate for tiny `p`. See `lower`."""

    @abstractmethod
    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """A subgradient of the convex map p -> lower(p, budget), for p in [0, 1). See `lower`."""

    @abstractmethod
    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        """Budget below which lower(p_lower) stays above upper(p_upper), 0 if none.

        Attacks of norm strictly less than the radius cannot change the winner; in norm 0, attacks on that many frames.

        Args:
            p_lower: lower bound on the winning class's probability.
            p_upper: upper bound on every other class's; default 1 - p_lower, which makes the threshold 1/2.
        Returns:
            radius in the mechanism's norm.
        Raises:
            ValueError: if a probability is outside [0, 1].
        """

    def radius_in(self, norm: float, p_lower: float, p_upper: float | None = None, *, dimension: int) -> float:
        """`radius` of one input in any norm for which there is a proof.

        By default from the mechanism's own norm q: ||e||_q <= d^max(0, 1/q - 1/p) ||e||_p. Rounded down (by 1e-12 of it).

        Args:
            norm: 0, 1, 2 or inf.
            p_lower: see `radius`.
            p_upper: see `radius`.
            dimension: entries of the input, frame stack included.
        Raises:
            ValueError: if there is no proof for that norm, or a number is out of range.
        """
        check_choice("norm", norm, (0, 1, 2, math.inf))
        check_count("dimension", dimension)
        return self._converted(self.radius(p_lower, p_upper), norm, dimension)

    def _converted(self, radius: float, norm: float, dimension: int) -> float:
        """A radius of the mechanism's own norm in another one; see `radius_in`."""
        if norm == self.norm:
            return radius
        if 0 in (norm, self.norm):
            kind = type(self).__name__
            raise ValueError(
                f"{kind} has no radius in norm {norm}: a few entries can change without limit"
                if norm == 0
                else f"{kind} has no radius in norm {norm}: its own norm 0 counts altered entries, however little they change"
            )
        return shrunk(radius / dimension ** max(0.0, 1 / self.norm - 1 / norm))

    def _crossing(self, p_lower: float, p_upper: float, high: float) -> float:
        """Largest budget in [0, high], by bisection from below, at which lower(p_lower) >= upper(p_upper)."""
        low = 0.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.lower(p_lower, middle) >= self.upper(p_upper, middle) else (low, middle)
        return low

    def covering_budget(
        self, norm: float, *, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> float:
        """An episode budget in this mechanism's norm that covers every attacker of a threat model.

        Args:
            norm: the threat's norm, one of 0, 1, 2, inf.
            step: per-step radius in that norm, or None.
            episode: whole-episode budget in that norm, or None (norm inf has no episode budget).
            horizon: most steps an episode can have.
            n_features: entries of one frame.
        Raises:
            ValueError: if the mechanism has no bound for that norm, or a number is negative or NaN.
        """
        check_choice("norm", norm, (0, 1, 2, math.inf))
        check_count("horizon", horizon)
        check_count("n_features", n_features)
        step = None if step is None else float(check_budget("step", step))
        episode = None if episode is None else float(check_budget("episode", episode))
        bounds = self._covering_budgets(norm, step, episode, horizon, n_features)
        if not bounds:
            raise ValueError(f"{type(self).__name__} has no certificate for this threat: norm {norm} with the budgets given")
        return min(bounds)

    @abstractmethod
    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        """Every bound that applies; see `covering_budget`."""

    @property
    def protected(self) -> tuple[bool, ...] | None:
        """Which features, along the last axis of a frame, carry noise; None for all. Attacks on others are not covered."""
        return None

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the mechanism's certificates do not cover, in words."""
        return ()

    @property
    def scale(self) -> str:
        """The parameters in words, for titles."""
        values = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self._fields().items())
        return f"{type(self).__name__}({', '.join(values)})"

    def require(self, scope: str) -> None:
        """Raise ValueError unless the mechanism has a proof for `scope`."""
        if scope not in self.scopes:
            raise ValueError(f"{type(self).__name__} has no proof for scope {scope!r}; it covers {sorted(self.scopes)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a certificate or a run file; `noise_from_dict` is the inverse."""
        return {"kind": type(self).__name__, **self._fields()}

    def _fields(self) -> dict[str, Any]:
        return asdict(cast(Any, self))
