"""From the law of the clean return to the law under the worst attacker."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.noise import Noise

Floats = NDArray[np.float64]


def worst_case_survival(noise: Noise, failure: ArrayLike, budget: float) -> Floats:
    """Smallest probability under attack of an event whose clean probability is at least 1 - `failure`.

    Args:
        noise: the mechanism whose trade-off function applies.
        failure: upper bounds on the clean failure probability, in [0, 1]; any shape. Small ones keep all their digits.
        budget: episode budget, >= 0; may be inf.
    Returns:
        float64 array of the shape of `failure`.
    """
    f = np.asarray(failure, dtype=np.float64)
    rare = f <= 0.5  # from 1/2 on, 1 - f is exact and the success probability is the small side
    return np.where(rare, 1 - noise.upper(np.where(rare, f, 0.0), budget), noise.lower(np.where(rare, 1.0, 1 - f), budget))


def worst_case_mean(noise: Noise, budgets: Floats, edges: Floats, failure: Floats) -> Floats:
    """Smallest mean return under attack, a + int_a^b P_adv(J > t) dt, from a step function.

    Every threshold is worst-cased on its own; for one mechanism a single attack is the worst for all of them, so
    nothing is lost.

    Args:
        noise: the mechanism.
        budgets: episode budgets, shape (K,).
        edges: a = edges[0] <= ... <= edges[m], shape (m + 1,).
        failure: upper bounds on P(J < edges[j + 1]), shape (m,); P(J > t) is taken to be 0 from edges[m] on.
    Returns:
        float64 array of shape (K,), never below `edges[0]`.
    """
    widths = np.diff(edges)
    return np.array([edges[0] + max(0.0, float(widths @ worst_case_survival(noise, failure, budget))) for budget in budgets])
