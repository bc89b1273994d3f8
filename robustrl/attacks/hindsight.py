"""Diagnostics with hindsight: what no attacker could know while an episode runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_budget, check_finite_array


def knapsack_oracle(gains: ArrayLike, costs: ArrayLike, budget: float) -> tuple[float, NDArray[np.bool_]]:
    """The best choice of steps to attack, had all of a clean episode's gains and costs been known beforehand.

    A diagnostic, not an attack: the states would change once the first step is attacked, and nobody knows the later ones.

    Args:
        gains: what attacking each step gains, such as Q(s, a*) - Q(s, target); (T,).
        costs: what it costs in the currency that adds up: squared norms for norm 2, norms for norm 1, ones for norm 0; (T,).
        budget: in the same currency: the squared budget for norm 2.
    Returns:
        the largest total gain within the budget, and which steps it attacks, (T,).
    Raises:
        ValueError: for numbers that are not finite, negative costs, or different lengths.

    Exact: it keeps every choice that is not both dearer and worse than another one, whose number is moderate unless gains and costs
    are made up to be hard. Source: Nemhauser, Ullmann, Management Science 15 (1969).
    """
    gain, cost = check_finite_array("gains", gains, ndim=1), check_finite_array("costs", costs, ndim=1)
    if gain.shape != cost.shape:
        raise ValueError(f"gains and costs must be as many, got {gain.size} and {cost.size}")
    if np.any(cost < 0):
        raise ValueError(f"costs must be >= 0, got {cost.min()}")
    left = float(check_budget("budget", budget))
    spent, worth, history = np.zeros(1), np.zeros(1), []
    for g, c in zip(gain, cost, strict=True):
        both = np.concatenate((spent, spent + c)), np.concatenate((worth, worth + g))
        order = np.lexsort((-both[1], both[0]))
        order = order[both[0][order] <= left]
        best_before = np.maximum.accumulate(np.concatenate(([-np.inf], both[1][order][:-1])))
        kept = order[both[1][order] > best_before]
        history.append((kept >= len(spent), kept % len(spent)))
        spent, worth = both[0][kept], both[1][kept]
    at = int(worth.argmax())
    total, chosen = float(worth[at]), np.zeros(gain.size, dtype=bool)
    for step in range(gain.size - 1, -1, -1):
        taken, came_from = history[step]
        chosen[step], at = taken[at], int(came_from[at])
    return total, chosen
