"""The exact worst case in finite MDPs: what no attacker of observations can go below.

At every step the victim sees a state x that can be confused with the true state s, and acts by policy(. | x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_count
from robustrl.mdp import Floats, TabularMDP, improved


@dataclass(frozen=True, eq=False)
class TabularAttack:
    """An optimal attacker without a budget.

    Attributes:
        values: of the victim under attack, (S,).
        shown: the state that the victim sees instead of each, (S,).
    """

    values: Floats
    shown: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BudgetedTabularAttack:
    """An optimal attacker of episodes of a given length, within a budget for all of it.

    Attributes:
        values: of the victim at step t in state s with b left, (H + 1, S, budget + 1); the last step's are 0.
        shown: the state that it sees then, (H, S, budget + 1).
    """

    values: Floats
    shown: NDArray[np.int64]


def worst_case(mdp: TabularMDP, policy: ArrayLike, neighbours: ArrayLike) -> TabularAttack:
    """The optimal stationary attacker: min over x in N(s) of what the victim's actions at x are worth in s.

    Nothing is gained by remembering the past, because the victim does not.

    Args:
        mdp: with gamma < 1.
        policy: of the victim, probabilities (S, A) or an action per state (S,).
        neighbours: whether x can be shown for s, boolean (S, S), rows s; every state can be shown as itself.
    Raises:
        ValueError: for arguments that are none of these.
    Source: Zhang et al. (NeurIPS 2020), arXiv:2003.08938, section 3; exact by policy iteration on the attacker's MDP.
    """
    victim, allowed = mdp.policy(policy), _neighbours(mdp, np.asarray(neighbours))
    if mdp.gamma == 1:
        raise ValueError("mdp.gamma must be < 1 for a stationary attacker, got 1")

    def look_ahead(values: Floats) -> Floats:
        return np.where(allowed, -(mdp.action_values(-values) @ victim.T), -np.inf)

    values, shown = improved(look_ahead, lambda shown: -mdp.evaluate(victim[shown]), np.arange(mdp.n_states))
    return TabularAttack(-values, shown)


def worst_case_within(mdp: TabularMDP, policy: ArrayLike, costs: ArrayLike, budget: int, horizon: int) -> BudgetedTabularAttack:
    """The optimal attacker with an episode budget, by backward induction over (step, state, budget left).

    W_t(s, b) = min over x with c(s, x) <= b of sum_a policy(a | x) E[reward + gamma W_{t+1}(s', b - c(s, x))].

    Args:
        mdp: gamma = 1 for plain returns.
        policy: of the victim, probabilities (S, A) or an action per state (S,).
        costs: of showing x for s, integers (S, S), rows s, 0 on the diagonal; negative where x cannot be shown.
        budget: what an episode may cost, an integer.
        horizon: steps of an episode.
    Raises:
        ValueError: for arguments that are none of these.
    """
    victim, price = mdp.policy(policy), np.asarray(costs)
    check_count("budget", budget, least=0)
    check_count("horizon", horizon)
    if price.dtype.kind not in "iu" or price.shape != (mdp.n_states, mdp.n_states) or np.diag(price).any():
        raise ValueError(
            f"costs must be integers of shape {(mdp.n_states,) * 2} with 0 on the diagonal, got {price.dtype} {price.shape}"
        )
    values = np.zeros((horizon + 1, mdp.n_states, budget + 1))
    shown = np.zeros((horizon, mdp.n_states, budget + 1), dtype=np.int64)
    payable = [int(c) for c in np.unique(price) if 0 <= c <= budget]
    for t in range(horizon - 1, -1, -1):
        seen = np.einsum(
            "xa,sab->sxb", victim, mdp.action_values(values[t + 1])
        )  # in state s, if x is seen and b is left afterwards
        worth = np.full(seen.shape, np.inf)
        for c in payable:
            worth[:, :, c:] = np.where((price == c)[:, :, None], seen[:, :, : budget + 1 - c], worth[:, :, c:])
        shown[t], values[t] = worth.argmin(1), worth.min(1)
    return BudgetedTabularAttack(values, shown)


def _neighbours(mdp: TabularMDP, neighbours: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if neighbours.dtype != bool or neighbours.shape != (mdp.n_states, mdp.n_states) or not np.diag(neighbours).all():
        raise ValueError(
            f"neighbours must be boolean of shape {(mdp.n_states,) * 2} and True on the diagonal, got {neighbours.dtype} "
            f"{neighbours.shape}"
        )
    return neighbours
