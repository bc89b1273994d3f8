"""Gaussian noise: l2 budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from robustrl.errors import check_budget, check_probability, check_real
from robustrl.noise.base import Floats, Frames, Generator, Noise, shrunk
from robustrl.noise.draws import check_frames, like, rounded, standard_normal


@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent Gaussian noise, fresh at every step.

    Args:
        sigma: standard deviation in observation units: one number, or one per feature (broadcast along the last axis).
            A zero in a per-feature sigma means that the attacker cannot touch that feature. A plain sigma of 0 is the
            undefended agent: it certifies at budget 0 only.

    The episode bound is the adaptive Neyman-Pearson bound Phi(Phi^-1(p) - mu), mu = B / sigma, exact for the law of
    the return; with per-feature sigma, mu = B / min sigma over the attackable features.

    Source: Kumar, Levine, Feizi, "Policy Smoothing for Provably Robust Reinforcement Learning" (ICLR 2022),
    arXiv:2106.11420, theorem on adaptive adversaries; Cohen, Rosenfeld, Kolter (ICML 2019) for one input.
    """

    sigma: float | tuple[float, ...]
    norm: ClassVar[float] = 2

    def __init__(self, sigma: float | Sequence[float] | NDArray[Any]) -> None:
        value: float | tuple[float, ...]
        if np.ndim(sigma) == 0:
            value = check_real("sigma", sigma, allowed="a finite number >= 0")
            low = value
        else:
            value = tuple(check_real("sigma", s, allowed="a finite number >= 0") for s in np.asarray(sigma).tolist())
            if not value or not any(value):
                raise ValueError(f"sigma must have at least one positive entry, got {value}")
            low = min(value)
        if low < 0:
            raise ValueError(f"sigma must be >= 0, got {sigma}")
        object.__setattr__(self, "sigma", value)

    @property
    def smallest(self) -> float:
        """Smallest sigma over the attackable features: the one an l2 attacker aims at."""
        return min(s for s in self.sigma if s > 0) if isinstance(self.sigma, tuple) else self.sigma

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        if isinstance(self.sigma, tuple) and x.shape[-1] != len(self.sigma):
            raise ValueError(f"sigma has {len(self.sigma)} entries, but the frames' last axis has {x.shape[-1]}")
        if self.sigma == 0.0:
            return x + 0
        noise = standard_normal(x, generator)
        noise *= self.sigma if isinstance(self.sigma, float) else like(self.sigma, noise)
        noise += x
        return rounded(noise, x)

    def mu(self, budget: ArrayLike) -> Floats:
        """The Gaussian-DP parameter B / sigma of an episode budget B."""
        b = check_budget("budget", budget)
        if self.smallest == 0:
            if np.any(b > 0):
                raise ValueError(
                    f"sigma must be > 0 for budgets > 0: without noise only budget 0 has a certificate, got {b.max()}"
                )
            return np.zeros_like(b)
        return b / self.smallest

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return self._shifted(p, -self.mu(budget))

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return self._shifted(p, self.mu(budget))

    def _shifted(self, p: ArrayLike, shift: Floats) -> Floats:
        p = check_probability("p", p)
        finite = np.where(np.isinf(shift), 0.0, shift)  # even a certain event falls to an unlimited attacker
        return np.where(np.isinf(shift), shift > 0, np.where(shift == 0, p, ndtr(ndtri(p) + finite)))

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        mu = self.mu(budget)
        p = check_probability("p", p)
        finite = np.where(np.isinf(mu), 0.0, mu)
        with np.errstate(invalid="ignore", over="ignore"):
            slope = np.exp(finite * ndtri(p) - finite**2 / 2)
        return np.where(np.isinf(mu), 0.0, np.where(finite == 0, 1.0, slope))

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        if p_upper is None:
            return 0.0 if p_lower <= 0.5 or self.smallest == 0 else self.smallest * float(ndtri(p_lower))
        p_upper = float(check_probability("p_upper", p_upper))
        return 0.0 if p_lower <= p_upper else self.smallest / 2 * float(ndtri(p_lower) - ndtri(p_upper))

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        bounds = []
        if norm in (1, 2):  # ||e||_2 <= ||e||_1, step by step and over the episode
            bounds += [step * math.sqrt(horizon)] if step is not None else []
            bounds += [episode] if episode is not None else []
        elif norm == math.inf and step is not None:
            bounds.append(step * math.sqrt(horizon * self._effective_features(n_features)))
        return bounds

    def _converted(self, radius: float, norm: float, dimension: int) -> float:
        if norm == math.inf:
            return shrunk(radius / math.sqrt(self._effective_features(dimension)))
        return super()._converted(radius, norm, dimension)

    def _effective_features(self, n_features: int) -> float:
        """Sum of (smallest / sigma_i)^2 over the attackable entries of a frame: their number if all sigmas are equal."""
        if isinstance(self.sigma, float):
            return float(n_features)
        copies, rest = divmod(n_features, len(self.sigma))
        if rest:
            raise ValueError(f"n_features must be a multiple of the {len(self.sigma)} entries of sigma, got {n_features}")
        return copies * math.fsum((self.smallest / s) ** 2 for s in self.sigma if s > 0)

    @property
    def protected(self) -> tuple[bool, ...] | None:
        return tuple(s > 0 for s in self.sigma) if isinstance(self.sigma, tuple) else None

    @property
    def caveats(self) -> tuple[str, ...]:
        bare = [i for i, noisy in enumerate(self.protected or ()) if not noisy]
        return (f"attacks on features {bare}, which carry no noise",) if bare else ()
