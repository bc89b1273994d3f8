"""Laws of the return with their exact worst cases, written without the package's own trade-off functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform

COUNTS = Path(__file__).parents[1] / "data" / "cartpole_return_counts.csv"


def g(noise: Noise, survival: np.ndarray, budget: float) -> np.ndarray:
    """The table of specification 2.2 and 2.8, straight from the page."""
    s = np.asarray(survival, dtype=float)
    if isinstance(noise, Gaussian):
        return norm.cdf(norm.ppf(s) - budget / noise.sigma)
    if isinstance(noise, Uniform | Splitting):
        return np.maximum(s - budget / (2 * noise.lam), 0)
    if isinstance(noise, Laplace):
        return np.maximum(s * np.exp(-budget / noise.b), 1 - (1 - s) * np.exp(budget / noise.b))
    assert isinstance(noise, Ablation)
    return np.maximum(s - 1 + (1 - noise.keep) ** np.ceil(budget), 0)


@dataclass(frozen=True)
class Law:
    """A law of the return: its sure bounds, a sampler, its atoms and its distribution function."""

    low: float
    high: float
    sample: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    atoms: tuple[float, ...]
    cdf: Callable[[np.ndarray], np.ndarray]

    def worst_mean(self, noise: Noise, budget: float) -> float:
        """low + int g(S(t)) dt by the midpoint rule between the atoms: exact for discrete laws."""
        edges = np.unique(np.concatenate([np.linspace(self.low, self.high, 4001), self.atoms]))
        middles = (edges[1:] + edges[:-1]) / 2
        return float(self.low + np.diff(edges) @ g(noise, 1 - self.cdf(middles), budget))


def discrete(low: float, high: float, values: list[float], probabilities: list[float] | np.ndarray) -> Law:
    x, p = np.asarray(values, dtype=float), np.asarray(probabilities, dtype=float)
    total = np.concatenate([[0.0], np.cumsum(p)])
    total[-1] = 1.0
    return Law(
        low,
        high,
        lambda rng, shape: rng.choice(x, shape, p=p),
        tuple(values),
        lambda t: total[np.searchsorted(x, t, side="right")],
    )


def cartpole_counts(sigma: float) -> np.ndarray:
    """Episodes out of 10,000 with return > t, t = 0, 1, ..., 199 and 0 at 200."""
    table = np.loadtxt(COUNTS, delimiter=",", skiprows=2)
    counts = table[:, {0.2: 1, 0.4: 2}[sigma]].astype(int)
    return np.append(counts[:200], 0)
