"""Mechanisms whose noise is that of an input as a whole, of a known number of entries: certificates of one input only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, betaincinv

from robustrl.errors import check_budget, check_count, check_positive, check_probability, check_real
from robustrl.noise.base import OUTWARD, Floats, Frames, Generator, shrunk
from robustrl.noise.draws import check_frames, like, namespace, rounded, standard_normal, uniform
from robustrl.noise.total_variation import TotalVariation


class WholeInput(TotalVariation):
    """Members know the number of entries of one input; they have no proof for episodes of several inputs."""

    dimension: int
    scopes: ClassVar[frozenset[str]] = frozenset({"input", "step"})

    def _check_dimension(self, dimension: int) -> None:
        if dimension != self.dimension:
            raise ValueError(f"dimension must be the {self.dimension} entries of {self.scale}, got {dimension}")

    def _check_input(self, x: Frames, generator: Generator) -> None:
        check_frames(x, generator)
        self._check_dimension(math.prod(x.shape[1:]))

    def _converted(self, radius: float, norm: float, dimension: int) -> float:
        self._check_dimension(dimension)
        return super()._converted(radius, norm, dimension)

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return []


@dataclass(frozen=True)
class UniformBall(WholeInput):
    """Noise uniform in the l2 ball of radius lam around an input; l2 budgets.

    Args:
        lam: radius of the ball, in observation units.
        dimension: entries of one input, frame stack included.

    Two balls at distance r share the fraction 1 - I_{(r / 2 lam)^2}(1/2, (d + 1)/2) of their volume (two caps; I is the
    regularised incomplete beta function), which is the whole trade-off. Rounded outwards by 1e-12 of it.

    Source: Yang et al. (ICML 2020), arXiv:2002.08118.
    """

    lam: float
    dimension: int
    norm: ClassVar[float] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_positive("lam", self.lam))
        object.__setattr__(self, "dimension", check_count("dimension", self.dimension))

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        self._check_input(x, generator)
        xp, entries = namespace(x), tuple(range(1, x.ndim))
        direction = standard_normal(x, generator)
        length = xp.sqrt((direction**2).sum(entries, keepdims=True))
        first = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]
        distance = self.lam * uniform(first, generator) ** (1 / self.dimension)
        # clipped: a direction of zeros is possible in floating point
        return rounded(x + direction * (distance / xp.clip(length, np.finfo(np.float32).tiny, None)), x)

    def shift(self, budget: ArrayLike) -> Floats:
        half = np.minimum(check_budget("budget", budget) / (2 * self.lam), 1.0)
        return np.minimum(betainc(0.5, (self.dimension + 1) / 2, half**2) * (1 + OUTWARD), 1.0)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        if p_lower <= rival:
            return 0.0
        half = math.sqrt(betaincinv(0.5, (self.dimension + 1) / 2, (p_lower - rival) / 2))
        return shrunk(2 * self.lam * half)


@dataclass(frozen=True)
class EntryAblation(WholeInput):
    """Exactly `keep` of an input's entries, chosen at random, are shown; the others become `fill`.

    Budgets count altered entries (l0), however much they change. An alteration of r of d entries is noticed with
    probability 1 - C(d - r, k) / C(d, k).

    Args:
        keep: entries shown, k.
        dimension: entries of one input, d; frame stack and colours included.
        fill: what the others become.

    Source: Levine, Feizi (AAAI 2020), arXiv:1911.09272.
    """

    keep: int
    dimension: int
    fill: float = 0.0
    norm: ClassVar[float] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimension", check_count("dimension", self.dimension))
        object.__setattr__(self, "keep", check_count("keep", self.keep))
        object.__setattr__(self, "fill", check_real("fill", self.fill))
        if self.keep >= self.dimension:
            raise ValueError(f"keep must be < dimension, the {self.dimension} entries of one input, got {self.keep}")

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        self._check_input(x, generator)
        permutation = uniform(x, generator).reshape(len(x), self.dimension).argsort(-1).reshape(x.shape)
        shown: Frames = namespace(x).where(permutation < self.keep, x, like(self.fill, x))
        return shown

    def shift(self, budget: ArrayLike) -> Floats:
        altered = np.ceil(check_budget("budget", budget) - 1e-9)  # 28.999999999999996 entries are meant to be 29
        hidden = np.log1p(-self.keep / np.arange(self.dimension, self.keep, -1.0))
        noticed = np.append(0.0, -np.expm1(np.cumsum(hidden)))
        outward = 1 + 2 * self.dimension * np.finfo(float).eps  # what a sum of so many terms of one sign can lose
        noticed = np.append(np.minimum(noticed * outward, 1.0), 1.0)
        return noticed[np.minimum(altered, len(noticed) - 1).astype(np.int64)]

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        """Decided in exact arithmetic: the largest r with 1 - C(d - r, k) / C(d, k) < (p_lower - p_upper) / 2."""
        winner = Fraction(float(check_probability("p_lower", p_lower)))
        rival = 1 - winner if p_upper is None else Fraction(float(check_probability("p_upper", p_upper)))
        if winner <= rival:
            return 0.0
        hidden = (1 - (winner - rival) / 2) * math.comb(self.dimension, self.keep)
        low, high = 0, self.dimension  # invariant: `low` altered entries are certified, `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if math.comb(self.dimension - middle, self.keep) > hidden else (low, middle)
        return float(low)
