"""Planning with an l1 ball of transition probabilities around an estimate: the best, or the worst, that may be true.

One Bellman backup of a pair is  max (or min) of q . u  over distributions q on its support with |q - p|_1 <= radius, where u is what
its slots are worth: reward plus discounted value of the successor. The solution moves radius / 2 of mass from the worst slots to the
best one ("water filling"; Strehl and Littman, JCSS 2008, MBIE).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from robustrl.errors import as_floats, check_finite_array, check_positive, check_real
from robustrl.mdp.model import ROUNDING, Floats
from robustrl.mdp.outcomes import Flags, Outcomes

Integers = NDArray[np.int64]
PLAIN_SWEEPS = 20
"""Sweeps with fixed actions and probabilities between two in which both are chosen anew: these cost little."""


def water_fill(utilities: ArrayLike, p: ArrayLike, radius: ArrayLike, support: ArrayLike, optimistic: bool = True) -> Floats:
    """The distribution with the largest (or smallest) mean in an l1 ball.

    Args:
        utilities: of the slots, (..., K).
        p: centre of the ball, (..., K); no mass outside `support` and, for a radius below 2, sum 1.
        radius: in l1, (...); 2 and more is any distribution.
        support: slots that may have mass, bool (..., K); at least one per row.
        optimistic: largest mean rather than smallest.

    Returns:
        (..., K). Of equally good slots the last takes the mass.
    """
    allowed = np.asarray(support, dtype=bool)
    worth = np.where(allowed, as_floats("utilities", utilities) * (1 if optimistic else -1), -np.inf)
    centre, half = as_floats("p", p), as_floats("radius", radius) / 2
    _check_ball(centre, 2 * half, allowed)
    return _best_law(worth, centre, np.broadcast_to(half, centre.shape[:-1]), allowed)


def _best_law(utilities: Floats, p: Floats, half: Floats, support: Flags) -> Floats:
    """`water_fill` for utilities that are -inf outside the support, and half the radius."""
    anything = (half >= 1)[..., None]
    one_slot = np.arange(p.shape[-1]) == support.argmax(-1)[..., None]
    filled, order = _filled(utilities, np.where(anything, one_slot, p), np.where(anything[..., 0], np.inf, half))
    law = np.empty_like(filled)
    np.put_along_axis(law, order, filled, -1)
    return law


def _filled(utilities: Floats, p: Floats, half: Floats) -> tuple[Floats, Integers]:
    """The best distribution in order of utility, and that order, both (..., K); all slots may have mass."""
    order = np.argsort(utilities, axis=-1, kind="stable")
    q = np.take_along_axis(p, order, -1)
    taken = np.clip(half[..., None] - (np.cumsum(q, -1) - q), 0, q)
    q -= taken
    q[..., -1] += taken.sum(-1)
    return q, order


def _check_ball(p: Floats, radius: Floats, support: Flags) -> None:
    if not (radius >= 0).all():
        raise ValueError(f"radius must be >= 0, got {radius[~(radius >= 0)].flat[0]}")
    if not support.any(-1).all():
        raise ValueError("support must hold a slot of every pair")
    if not (np.where(support, 0, p) == 0).all():
        raise ValueError("estimates must have no mass outside the support")
    ball = np.broadcast_to(radius, p.shape[:-1]) < 2
    if not ((p[ball] >= 0).all() and (np.abs(p[ball].sum(-1) - 1) <= ROUNDING).all()):  # NaN too
        raise ValueError("estimates must be probabilities that sum to 1 where the radius is below 2")


@dataclass(frozen=True)
class _Rows:
    """Pairs whose supports have one size and which are backed up in one way; d slots each."""

    pairs: Integers  # flat numbers (n,)
    to: Integers  # nodes that slots lead to (n, d)
    rewards: Floats  # (n, d)
    p: Floats  # (n, d)
    half: Floats | None  # half the radius (n,); None: no freedom
    free: bool  # any distribution

    def backed_up(self, utilities: Floats, sign: int) -> Floats:
        if self.free:
            best: Floats = utilities.max(1) if sign > 0 else utilities.min(1)
            return best
        law = self.p
        if self.half is not None:
            law, order = _filled(sign * utilities, law, self.half)
            utilities = np.take_along_axis(utilities, order, 1)
        mean: Floats = np.einsum("nk,nk->n", law, utilities)
        return mean

    def kept(self, allowed: Flags) -> _Rows:
        keep = allowed[self.pairs]
        if keep.all():
            return self
        half = None if self.half is None else self.half[keep]
        return _Rows(self.pairs[keep], self.to[keep], self.rewards[keep], self.p[keep], half, self.free)


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What is believed of the transition probabilities of an MDP: an l1 ball for every pair, packed for planning.

    Args:
        outcomes: what is known beforehand.
        estimates: centres (S, A, K); probabilities where the radius is below 2, without mass outside `support`.
        radii: l1 radii (S, A); 0 is certainty, 2 and more ignorance.
        support: slots that may have mass, bool (S, A, K). A pair without any cannot be planned with.

    Raises:
        ValueError: if a shape, a radius or an estimate is wrong.
    """

    outcomes: Outcomes
    estimates: Floats
    radii: Floats
    support: Flags

    def __post_init__(self) -> None:
        shape = self.outcomes.candidates.shape
        support = self.outcomes.slots("support", self.support)
        estimates, radii = check_finite_array("estimates", self.estimates), as_floats("radii", self.radii)
        if estimates.shape != shape or radii.shape != shape[:2]:
            raise ValueError(
                f"estimates and radii must have shapes {shape} and {shape[:2]}, got {estimates.shape}, {radii.shape}"
            )
        exists = support.any(-1)
        _check_ball(estimates[exists], radii[exists], support[exists])
        for name, value in (("support", support), ("estimates", estimates), ("radii", radii)):
            object.__setattr__(self, name, value)

    @cached_property
    def exists(self) -> Flags:
        """Pairs that can be planned with, (S, A)."""
        return np.asarray(self.support.any(-1))

    @cached_property
    def to(self) -> Integers:
        """Where slots lead, (S, A, K): a state, S for a safe end of the episode, S + 1 for a dangerous one."""
        known = self.outcomes
        return np.where(known.terminal, known.n_states + known.dangerous, known.successors).astype(np.int64)

    @cached_property
    def worst_return(self) -> float:
        """A lower bound of what any state is worth, times (1 - gamma)."""
        return float(min(0.0, self.outcomes.rewards[self.support].min(initial=0.0)))

    @cached_property
    def rows(self) -> list[_Rows]:
        """The pairs, grouped by how they are backed up and by the size of their support."""
        flat = self.support.reshape(-1, self.outcomes.n_slots)
        degree, radius = flat.sum(1), self.radii.ravel()
        # One slot leaves no freedom, whatever the radius; its only distribution is 1.
        way = np.where(degree == 1, 3, np.where(radius >= 2, 2, np.where(radius > 0, 1, 0)))
        return list(self._grouped(flat, degree, way))

    def kept(self, allowed: Flags) -> list[_Rows]:
        """The rows of these pairs."""
        parts = (group.kept(allowed.ravel()) for group in self.rows)
        return [part for part in parts if len(part.pairs)]

    def _grouped(self, flat: Flags, degree: Integers, way: Integers) -> Iterator[_Rows]:
        slots = np.argsort(~flat, axis=1, kind="stable")
        to = self.to.reshape(flat.shape)
        rewards, p = self.outcomes.rewards.reshape(flat.shape), self.estimates.reshape(flat.shape)
        for d, how in np.unique(np.stack([degree, way], axis=1)[degree > 0], axis=0):
            pairs = np.flatnonzero((degree == d) & (way == how))
            where = (pairs[:, None], slots[pairs, :d])
            half = self.radii.ravel()[pairs] / 2 if how == 1 else None
            yield _Rows(pairs, to[where], rewards[where], p[where], half, bool(how >= 2))


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is maximised: beliefs, and how returns are counted."""

    beliefs: Beliefs
    paid: Floats | None  # per pair, instead of what the slots pay (S, A)
    optimistic: bool
    restart: bool
    gamma: float

    def worth(self, values: Floats) -> Floats:
        """Discounted values of the nodes (S + 2,): states, safe end, dangerous end."""
        again = float(np.asarray(self.beliefs.outcomes.start) @ values) if self.restart else 0.0
        return self.gamma * np.concatenate([values, [again, 0.0]])

    def backed_up(self, rows: list[_Rows], worth: Floats) -> Floats:
        """Action values (S, A) of the pairs in `rows`; -inf for others."""
        found = np.full(self.beliefs.radii.shape, -np.inf)
        for group in rows:
            utilities = worth[group.to]
            if self.paid is None:
                utilities += group.rewards
            found.reshape(-1)[group.pairs] = group.backed_up(utilities, 1 if self.optimistic else -1)
        return found if self.paid is None else found + self.paid

    def kernel(self, chosen: Integers, worth: Floats) -> Floats:
        """The best (or worst) slot probabilities of the chosen actions (S, K)."""
        beliefs, acting = self.beliefs, np.flatnonzero(chosen >= 0)
        at = (acting, chosen[acting])
        utilities = worth[beliefs.to[at]] + (beliefs.outcomes.rewards[at] if self.paid is None else 0.0)
        support, sign = beliefs.support[at], 1 if self.optimistic else -1
        found = np.zeros((len(chosen), support.shape[1]))
        found[acting] = _best_law(
            np.where(support, sign * utilities, -np.inf), beliefs.estimates[at], beliefs.radii[at] / 2, support
        )
        return found

    def followed(self, policy: Integers, worth: Floats, values: Floats) -> Floats:
        """Values after some sweeps with fixed actions and the probabilities that are best (or worst) now."""
        known, acting = self.beliefs.outcomes, np.flatnonzero(policy >= 0)
        at, law = (acting, policy[acting]), self.kernel(policy, worth)[acting]
        gained = np.einsum("nk,nk->n", law, known.rewards[at]) if self.paid is None else self.paid[at]
        row, slot = np.nonzero(law)
        moves = csr_array((law[row, slot], (row, self.beliefs.to[at][row, slot])), shape=(len(acting), len(worth)))
        values = values.copy()
        for _ in range(PLAIN_SWEEPS):
            values[acting] = gained + moves @ self.worth(values)
        return values


@dataclass(frozen=True, eq=False)
class Plan:
    """What a robust planning problem is worth.

    Attributes:
        values: of states, (S,), within `error` of the fixed point; states without an allowed pair have the lower bound of all values.
        action_values: (S, A), -inf where not allowed.
        error: bound on |values - fixed point|.
        sweeps: number of backups of all allowed pairs.
    """

    problem: _Problem
    values: Floats
    action_values: Floats
    error: float
    sweeps: int
    _worth: Floats

    @cached_property
    def policy(self) -> Integers:
        """The best action of every state (S,), the lowest of equals; -1 where none is allowed."""
        return np.where(np.isneginf(self.action_values).all(1), -1, self.action_values.argmax(1))

    def kernel(self, policy: ArrayLike) -> Floats:
        """The optimistic (or pessimistic) slot probabilities of the chosen actions, (S, K); 0 where the action is -1."""
        return self.problem.kernel(_actions(self.problem.beliefs, policy), self._worth)


def _actions(beliefs: Beliefs, policy: ArrayLike) -> Integers:
    chosen, (n_states, n_actions) = np.asarray(policy), beliefs.radii.shape
    if chosen.shape != (n_states,) or chosen.dtype.kind not in "iu" or chosen.min() < -1 or chosen.max() >= n_actions:
        raise ValueError(
            f"policy must be an action 0 to {n_actions - 1} per state ({n_states},), or -1 for none, got {policy!r}"
        )
    acting = np.flatnonzero(chosen >= 0)
    if not beliefs.exists[acting, chosen[acting]].all():
        state = acting[~beliefs.exists[acting, chosen[acting]]][0]
        raise ValueError(f"policy must choose pairs that exist, state {state} has no action {chosen[state]}")
    return chosen.astype(np.int64)


def optimise(
    beliefs: Beliefs,
    *,
    allowed: ArrayLike,
    optimistic: bool = True,
    rewards: ArrayLike | None = None,
    restart: bool = False,
    gamma: float | None = None,
    initial: ArrayLike | None = None,
    tolerance: float = 1e-6,
) -> Plan:
    """The best policy under the best (or worst) probabilities that are believed possible, by modified policy iteration.

    Args:
        allowed: pairs that may be chosen, bool (S, A).
        optimistic: choose the best probabilities rather than the worst.
        rewards: pay this per pair (S, A) instead of what the slots pay.
        restart: let a safe end of the episode lead to the start, instead of to nothing.
        gamma: discount in (0, 1), default that of the outcomes.
        initial: values (S,) to begin with.
        tolerance: of the values.

    Raises:
        ValueError: if an argument is out of range or a pair is allowed that does not exist.
    """
    known = beliefs.outcomes
    choice = known.pairs("allowed", allowed)
    if (choice & ~beliefs.exists).any():
        raise ValueError("allowed must hold pairs with a support")
    discount = known.gamma if gamma is None else check_real("gamma", gamma)
    if not 0 < discount < 1:
        raise ValueError(f"gamma must be in (0, 1), got {gamma}")
    paid = None if rewards is None else _shaped("rewards", rewards, choice.shape)
    floor = beliefs.worst_return if paid is None else min(0.0, float(paid[choice].min(initial=0.0)))
    stop = check_positive("tolerance", tolerance) * (1 - discount) / discount

    acting = choice.any(1)
    values = np.zeros(known.n_states) if initial is None else _shaped("initial", initial, (known.n_states,)).copy()
    values[~acting] = floor / (1 - discount)
    one_each, sweeps = bool((choice.sum(1) <= 1).all()), 0
    problem = _Problem(beliefs, paid, optimistic, restart, discount)
    rows = beliefs.kept(choice)
    while True:
        worth = problem.worth(values)
        action_values = problem.backed_up(rows, worth)
        sweeps += 1
        improved = np.where(acting, action_values.max(1), values)
        change = float(np.abs(improved - values).max())
        if change <= stop:
            return Plan(problem, improved, action_values, discount * change / (1 - discount), sweeps, worth)
        policy = np.where(acting, action_values.argmax(1), -1)
        if optimistic or one_each:
            values = problem.followed(policy, worth, improved)
        else:  # against an adversary, holding actions and probabilities both may cycle: hold the actions only
            values, few = improved, beliefs.kept(policy[:, None] == np.arange(choice.shape[1]))
            for _ in range(PLAIN_SWEEPS):
                values = np.where(acting, problem.backed_up(few, problem.worth(values)).max(1), values)


def evaluate(
    beliefs: Beliefs,
    policy: ArrayLike,
    optimistic: bool = False,
    *,
    rewards: ArrayLike | None = None,
    restart: bool = False,
    gamma: float | None = None,
    initial: ArrayLike | None = None,
    tolerance: float = 1e-6,
) -> Plan:
    """What a policy is worth under the worst (or best) probabilities that are believed possible.

    Args:
        policy: an action per state (S,), -1 for none.

    The rest as in `optimise`.
    """
    chosen = _actions(beliefs, policy)
    allowed = chosen[:, None] == np.arange(beliefs.radii.shape[1])
    return optimise(
        beliefs, allowed=allowed, optimistic=optimistic, rewards=rewards, restart=restart, gamma=gamma, initial=initial,
        tolerance=tolerance,
    )  # fmt: skip


def _shaped(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Floats:
    given = check_finite_array(name, value)
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {given.shape}")
    return given
