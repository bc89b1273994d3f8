"""The evidence that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from return_laws import Law, cartpole_counts, discrete
from scipy.stats import beta


@pytest.fixture(scope="session")
def cartpole() -> Callable[[float], np.ndarray]:
    """The 10,000 returns behind the counts, in an order fixed by seed 1."""

    def returns(sigma: float) -> np.ndarray:
        counts = cartpole_counts(sigma)
        values = np.repeat(np.arange(1, 201), counts[:-1] - counts[1:])
        return np.random.default_rng(1).permutation(values.astype(float))

    return returns


@pytest.fixture(scope="session")
def laws() -> dict[str, Law]:
    def from_counts(sigma: float) -> Law:
        counts = cartpole_counts(sigma)
        return discrete(0, 200, list(range(1, 201)), (counts[:-1] - counts[1:]) / 10_000)

    def blend(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        which, spread = rng.random(shape), rng.uniform(0, 200, shape)
        return np.where(which < 0.5, 50.0, np.where(which < 0.8, 200.0, spread))

    return {
        "nasty": discrete(0, 200, [0, 200], [1 / 500, 499 / 500]),
        "mostly zero": discrete(0, 200, [0, 200], [0.97, 0.03]),
        "ties": discrete(0, 200, [10, 60, 110, 190], [0.1, 0.2, 0.3, 0.4]),
        "heavy atoms": Law(0, 200, blend, (50.0, 200.0), lambda t: 0.5 * (t >= 50) + 0.3 * (t >= 200) + 0.2 * t / 200),
        "continuous": Law(0, 200, lambda rng, shape: 200 * rng.beta(2, 1, shape), (), lambda t: beta.cdf(t / 200, 2, 1)),
        "signed": discrete(-5, 1, [-5, -1, 1], [0.2, 0.7, 0.1]),
        "cartpole 0.2": from_counts(0.2),
        "cartpole 0.4": from_counts(0.4),
    }


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20_240_229)
