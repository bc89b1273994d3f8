"""Laplace noise: l1 budgets by differential privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from robustrl.errors import check_budget, check_positive, check_probability
from robustrl.noise.base import Floats, Frames, Generator, Noise
from robustrl.noise.draws import check_frames, namespace, rounded, uniform
from robustrl.noise.total_variation import l1_covering_budgets


@dataclass(frozen=True)
class Laplace(Noise):
    """Independent Laplace noise of scale b, fresh at every step; l1 budgets.

    Args:
        b: scale (mean absolute deviation) in observation units.

    The episode bound is adaptive composition of pure differential privacy with epsilon = B / b.

    Source: Lecuyer et al. (S&P 2019) and Teng et al. (2020) for one input; composition by Dwork, Roth (2014).
    """

    b: float
    norm: ClassVar[float] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "b", check_positive("b", self.b))

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        xp = namespace(x)
        u = uniform(x, generator) - 0.5
        return rounded(x - self.b * xp.sign(u) * xp.log(xp.clip(1 - 2 * xp.abs(u), np.finfo(np.float32).tiny, None)), x)

    def _epsilon(self, budget: ArrayLike) -> Floats:
        return check_budget("budget", budget) / self.b

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore", invalid="ignore"):
            high = 1 - np.where(p == 1, 0.0, (1 - p) * np.exp(epsilon))
        return np.where(np.isinf(epsilon), 0.0, np.maximum(p * np.exp(-epsilon), high))

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore", invalid="ignore"):
            small = np.where(p == 0, 0.0, p * np.exp(epsilon))
        return np.where(np.isinf(epsilon), 1.0, np.minimum(small, p - (1 - p) * np.expm1(-epsilon)))

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore"):
            steep = np.exp(epsilon)
        slope = np.where(p < 1 / (1 + np.exp(-epsilon)), np.exp(-epsilon), steep)
        return np.where(np.isinf(epsilon), 0.0, slope)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        if p_upper is None:
            if p_lower <= 0.5:
                return 0.0
            return math.inf if p_lower == 1 else -self.b * math.log(2 * (1 - p_lower))
        p_upper = float(check_probability("p_upper", p_upper))
        if p_lower <= p_upper:
            return 0.0
        return self._crossing(p_lower, p_upper, 1e3 * self.b)

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return l1_covering_budgets(norm, step, episode, horizon, n_features)
