"""Mechanisms whose whole proof is a bound on the probability that the policy ever notices the attack."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from robustrl.errors import check_budget, check_positive, check_probability, check_real
from robustrl.noise.base import Floats, Frames, Generator, Noise, shrunk
from robustrl.noise.draws import check_frames, like, namespace, rounded, uniform


class TotalVariation(Noise):
    """Mechanisms whose whole proof is a bound on the probability that attacked and clean runs ever differ."""

    @abstractmethod
    def shift(self, budget: ArrayLike) -> Floats:
        """Largest probability, in [0, 1], that an attacker within `budget` is noticed by the policy at all."""

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.maximum(check_probability("p", p) - self.shift(budget), 0.0)

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.minimum(check_probability("p", p) + self.shift(budget), 1.0)

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.where(check_probability("p", p) > self.shift(budget), 1.0, 0.0)


class TotalVariationL1(TotalVariation):
    """The l1 members: P(runs ever differ) <= sum_t ||e_t||_1 / (2 lam), by maximal coupling step after step."""

    lam: float
    norm: ClassVar[float] = 1

    def shift(self, budget: ArrayLike) -> Floats:
        return np.minimum(check_budget("budget", budget) / (2 * self.lam), 1.0)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        return max(0.0, self.lam * (p_lower - rival))

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return l1_covering_budgets(norm, step, episode, horizon, n_features)


class IndependentL1(TotalVariationL1):
    """The l1 members that treat every entry on its own, with noise of its own.

    An attack e is noticed with probability at most 1 - prod_i (1 - |e_i| / (2 lam)), which in norm inf is larger by far than
    what follows from the l1 radius: R_inf = 2 lam (1 - (1 - (p_lower - p_upper) / 2)^(1/d)), exact for uniform noise.
    """

    def _converted(self, radius: float, norm: float, dimension: int) -> float:
        if norm != math.inf:
            return super()._converted(radius, norm, dimension)
        noticed = radius / (2 * self.lam)  # (p_lower - p_upper) / 2
        return shrunk(-2 * self.lam * math.expm1(math.log1p(-noticed) / dimension))


@dataclass(frozen=True)
class Uniform(IndependentL1):
    """Independent uniform noise on [-lam, lam], fresh at every step; l1 budgets.

    Args:
        lam: half width in observation units.

    Source: Yang et al. (ICML 2020), arXiv:2002.08118, for one input; the adaptive episode bound follows from a
    maximal coupling of every step (docs: policy smoothing).
    """

    lam: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_positive("lam", self.lam))

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        noise = uniform(x, generator)
        noise *= 2 * self.lam
        noise -= self.lam
        noise += x
        return rounded(noise, x)


@dataclass(frozen=True)
class Splitting(IndependentL1):
    """Splitting noise (SSN) with a fresh split per coordinate and step; l1 budgets.

    Every coordinate is replaced by the midpoint of the cell it falls in, for cells of width 2 lam cut at a random
    offset s in [0, 2 lam): at most one bit about it survives. Values are clipped to [low, high] first, which only
    brings two inputs closer.

    Args:
        lam: half the cell width, in observation units.
        low: lower end of the observation range.
        high: upper end of the observation range.
        fresh: must stay True: a split that is used twice can be read off the past observations, and then no bound holds.

    Source: Levine, Feizi (ICML 2021), arXiv:2103.10834; the adaptive episode bound needs the fresh splits.
    """

    lam: float
    low: float = 0.0
    high: float = 1.0
    fresh: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_positive("lam", self.lam))
        object.__setattr__(self, "low", check_real("low", self.low))
        object.__setattr__(self, "high", check_real("high", self.high))
        if self.high <= self.low:
            raise ValueError(f"high must be > low, got low={self.low}, high={self.high}")
        if self.fresh is not True:
            raise ValueError("fresh must be True: past observations reveal a reused split, so no certificate holds for it")

    def split(self, x: Frames, s: Frames) -> Frames:
        """The splitting map for offsets `s` in [0, 2 lam), shape of `x`; computed in the precision of the offsets."""
        xp, width = namespace(x), 2 * self.lam
        # Widened first: x - low in single precision has the resolution of low, which an attacker near 0 gets for nothing.
        wide = x.astype(s.dtype) if isinstance(x, np.ndarray) else x.to(s.dtype)
        cell = xp.ceil((xp.clip(wide, self.low, self.high) - self.low - s) / width)
        top = xp.clip(width * cell + s + self.low, self.low, self.high)
        bottom = xp.clip(width * (cell - 1) + s + self.low, self.low, self.high)
        return rounded((top + bottom) / 2, x)

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        offsets: Frames = uniform(x, generator) * (2 * self.lam)
        return self.split(x, offsets)


@dataclass(frozen=True)
class Ablation(TotalVariation):
    """Each arriving frame is shown with probability `keep`, else replaced by `fill`; budgets count altered frames.

    Args:
        keep: probability that a frame reaches the policy, drawn afresh for every frame.
        fill: the null token, one value for the whole frame.

    P(an altered frame is ever shown) <= 1 - (1 - keep)^B for an attacker who may alter B frames.

    Source: Levine, Feizi (AAAI 2020), arXiv:1911.09272, for one input; the frame version is elementary (docs).
    """

    keep: float
    fill: float = 0.0
    norm: ClassVar[float] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_real("keep", self.keep, allowed="a probability in (0, 1)"))
        object.__setattr__(self, "fill", check_real("fill", self.fill))
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be a probability in (0, 1), got {self.keep}")

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        first = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]
        shown: Frames = namespace(x).where(uniform(first, generator) < self.keep, x, like(self.fill, x))
        return shown

    def shift(self, budget: ArrayLike) -> Floats:
        frames = np.ceil(check_budget("budget", budget) - 1e-9)  # 28.999999999999996 frames are meant to be 29
        return -np.expm1(frames * math.log1p(-self.keep))

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        if p_lower <= rival:
            return 0.0
        frames = math.floor(math.log1p(-(p_lower - rival) / 2) / math.log1p(-self.keep)) + 1
        while frames > 0 and 2 * self.shift(frames) * (1 + 1e-12) >= p_lower - rival:  # a tie would let the rival win
            frames -= 1
        return float(frames)

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return [float(horizon)] if norm != 0 or episode is None else [float(horizon), episode]


def l1_covering_budgets(norm: float, step: float | None, episode: float | None, horizon: int, n_features: int) -> list[float]:
    """Every threat in l1 terms: per step ||e||_1 <= factor ||e||_p, and the steps add up."""
    bounds: list[float] = []
    if norm == 0:
        return bounds
    factor = {1: 1.0, 2: math.sqrt(n_features), math.inf: float(n_features)}[norm]
    if step is not None:
        bounds.append(horizon * factor * step)
    if episode is not None and norm != math.inf:
        bounds.append(episode * factor * (1.0 if norm == 1 else math.sqrt(horizon)))
    return bounds
