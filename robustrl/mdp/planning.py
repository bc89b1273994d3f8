"""Planning with an l1 ball of transition probabilities around an estimate: the best, or the worst, that may be true.

One Bellman backup of a pair is  max (or min) of q . u  over distributions q on its support with |q - p|_1 <= radius, where u is what
its slots are worth: reward plus discounted value of the successor. The solution moves radius / 2 of mass from the worst slots to the
best one ("water filling"; Strehl and Littman, JCSS 2008, MBIE).
"""

from __future__ import annotations

import math
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
MAX_PLAIN_SWEEPS = 1000
RELATIVE_ROUNDING = 64 * float(np.finfo(np.float64).eps)
"""Changes of values below this share of the largest one are not progress."""


def water_fill(utilities: ArrayLike, p: ArrayLike, radius: ArrayLike, support: ArrayLike, optimistic: bool = True) -> Floats:
    """The distribution with the largest (or smallest) mean in an l1 ball.

    Args:
        utilities: of the slots, (..., K).
        p: centre of the ball, (..., K); no mass outside `support` and, for a radius below 2, sum 1.
        radius: in l1, (...); 2 and more is any distribution.
        support: slots that may have mass, bool (..., K); at least one per row.
        optimistic: largest mean rather than smallest.

    Returns:
        (..., K). Of equally good slots the first takes the mass.
    """
    allowed = np.asarray(support, dtype=bool)
    worth = np.where(allowed, check_finite_array("utilities", utilities) * (1 if optimistic else -1), -np.inf)
    centre, half = as_floats("p", p), np.broadcast_to(as_floats("radius", radius) / 2, worth.shape[:-1])
    _check_ball(centre, 2 * half, allowed)
    law = np.where((half >= 1)[..., None], _one_hot(worth), _filled(worth, centre, half))
    return np.asarray(law, dtype=np.float64)


def _one_hot(utilities: Floats) -> Flags:
    return np.asarray(np.arange(utilities.shape[-1]) == utilities.argmax(-1)[..., None])


def _filled(utilities: Floats, p: Floats, half: Floats, heavy: int | None = None) -> Floats:
    """Up to `half` (...) of mass moved from the worst slots to the best; only the first `heavy` slots (..., K) have any."""
    order = np.argsort(utilities[..., :heavy], axis=-1, kind="stable")
    q = np.take_along_axis(p[..., :heavy], order, -1)
    taken = np.clip(half[..., None] - (np.cumsum(q, -1) - q), 0, q)
    law, best = p.copy(), utilities.argmax(-1)[..., None]
    np.put_along_axis(law[..., :heavy], order, q - taken, -1)
    np.put_along_axis(law, best, np.take_along_axis(law, best, -1) + taken.sum(-1, keepdims=True), -1)
    return law


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
    """Pairs whose supports have one size d and which are backed up in one way."""

    pairs: Integers  # flat numbers (n,)
    slots: Integers  # the support (n, d)
    to: Integers  # nodes that these lead to (n, d)
    rewards: Floats  # (n, d)
    p: Floats  # (n, d)
    half: Floats  # half the radius (n,): 0 for all, at least 1 for all, or in between

    @cached_property
    def heavy(self) -> int:
        """The most slots that have mass in any row."""
        return int((self.p > 0).sum(1).max())

    def best(self, utilities: Floats, sign: int) -> Floats:
        """Largest (sign 1) or smallest (-1) means in the balls (n,), of utilities (n, d)."""
        if self.half[0] >= 1:
            return np.asarray(utilities.max(1) if sign > 0 else utilities.min(1))
        return np.asarray(np.einsum("nk,nk->n", self.law(utilities, sign), utilities))

    def law(self, utilities: Floats, sign: int) -> Floats:
        """The distributions that have these means (n, d)."""
        if self.half[0] >= 1:
            return _one_hot(sign * utilities).astype(np.float64)
        return _filled(sign * utilities, self.p, self.half, self.heavy) if self.half[0] else self.p

    def kept(self, allowed: Flags) -> _Rows:
        """The rows of some pairs, bool (S A,)."""
        keep = allowed[self.pairs]
        if keep.all():
            return self
        pairs, slots, to = self.pairs[keep], self.slots[keep], self.to[keep]
        return _Rows(pairs, slots, to, self.rewards[keep], self.p[keep], self.half[keep])


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
    def worst_reward(self) -> float:
        """The smallest reward that is believed possible, or 0 if that is smaller: an episode may end."""
        return float(min(0.0, self.outcomes.rewards[self.support].min(initial=0.0)))

    @cached_property
    def rows(self) -> list[_Rows]:
        """The pairs, grouped by how they are backed up and by the size of their support."""
        n_slots, known = self.outcomes.n_slots, self.outcomes
        support, to = self.support.reshape(-1, n_slots), known.nodes.reshape(-1, n_slots)
        rewards, p = known.rewards.reshape(-1, n_slots), self.estimates.reshape(-1, n_slots)
        degree = support.sum(1)
        half = self.radii.ravel() / 2
        kind = 3 * degree + (half > 0) + (half >= 1)
        found = []
        for each in np.unique(kind[degree > 0]):
            pairs = np.flatnonzero(kind == each)
            slots = np.nonzero(support[pairs])[1].reshape(len(pairs), -1)
            if 0 < half[pairs[0]] < 1:  # only slots with mass are sorted in a sweep: they come first
                falling = np.argsort(-p[pairs[:, None], slots], axis=1, kind="stable")
                slots = np.take_along_axis(slots, falling, 1)
            at = (pairs[:, None], slots)
            found.append(_Rows(pairs, slots, to[at].astype(np.int64), rewards[at], p[at], half[pairs]))
        return found

    def kept(self, allowed: Flags) -> list[_Rows]:
        """The rows of some pairs, bool (S, A)."""
        parts = (group.kept(allowed.ravel()) for group in self.rows)
        return [part for part in parts if len(part.pairs)]

    def chosen(self, policy: Integers) -> list[_Rows]:
        """The rows of an action per state (S,), or -1."""
        return self.kept(policy[:, None] == np.arange(self.radii.shape[1]))


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is maximised: beliefs, and how returns are counted."""

    beliefs: Beliefs
    paid: Floats | None  # per pair, instead of what the slots pay (S, A)
    optimistic: bool
    restart: bool
    gamma: float

    @property
    def plain_sweeps(self) -> range:
        """Cheap sweeps with fixed choices between two in which all are made anew: about as many as rewards matter."""
        return range(min(math.ceil(1 / (1 - self.gamma)), MAX_PLAIN_SWEEPS))

    @property
    def sign(self) -> int:
        """1 for the best probabilities, -1 for the worst."""
        return 1 if self.optimistic else -1

    def worth(self, values: Floats) -> Floats:
        """Discounted values of the nodes (S + 2,): states, safe end, dangerous end."""
        again = float(np.asarray(self.beliefs.outcomes.start) @ values) if self.restart else 0.0
        return self.gamma * np.concatenate([values, [again, 0.0]])

    def utilities(self, group: _Rows, worth: Floats) -> Floats:
        """What the slots of rows are worth (n, d)."""
        return worth[group.to] + group.rewards if self.paid is None else worth[group.to]

    def backed_up(self, rows: list[_Rows], worth: Floats) -> Floats:
        """Action values (S, A) of the pairs in `rows`; -inf for others."""
        found = np.full(self.beliefs.radii.shape, -np.inf)
        for group in rows:
            found.reshape(-1)[group.pairs] = group.best(self.utilities(group, worth), self.sign)
        return found if self.paid is None else found + self.paid

    def laws(self, policy: Integers, worth: Floats) -> Iterator[tuple[_Rows, Integers, Floats]]:
        """The chosen rows, their states, and the best (or worst) slot probabilities."""
        for group in self.beliefs.chosen(policy):
            yield group, group.pairs // self.beliefs.radii.shape[1], group.law(self.utilities(group, worth), self.sign)

    def followed(self, policy: Integers, worth: Floats, values: Floats) -> Floats:
        """Values after some sweeps with fixed actions and the probabilities that are best (or worst) now."""
        gained, entries = np.zeros(len(values)), []
        for group, state, law in self.laws(policy, worth):
            gained[state] = self.paid.ravel()[group.pairs] if self.paid is not None else (law * group.rewards).sum(1)
            row, slot = np.nonzero(law)
            entries.append((law[row, slot], state[row], group.to[row, slot]))
        mass, start, end = map(np.concatenate, zip(*entries, strict=True))
        moves = csr_array((mass, (start, end)), shape=(len(values), len(worth)))
        for _ in self.plain_sweeps:
            values = np.where(policy >= 0, gained + moves @ self.worth(values), values)
        return values


@dataclass(frozen=True, eq=False)
class Plan:
    """What a robust planning problem is worth.

    Attributes:
        values: of states, (S,), within `error` of the fixed point; states without an allowed pair have the lower bound of all values.
        action_values: (S, A), -inf where not allowed.
        error: bound on the distance between values and fixed point.
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
        beliefs = self.problem.beliefs
        found = np.zeros((len(self.values), beliefs.outcomes.n_slots))
        for group, state, law in self.problem.laws(_actions(beliefs, policy), self._worth):
            found[state[:, None], group.slots] = law
        return found


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
        tolerance: of the values, as far as their rounding permits; `error` says what was reached.

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
    floor = beliefs.worst_reward if paid is None else min(0.0, float(paid[choice].min(initial=0.0)))
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
        if change <= max(stop, RELATIVE_ROUNDING * float(np.abs(improved).max())):
            return Plan(problem, improved, action_values, discount * change / (1 - discount), sweeps, worth)
        policy = np.where(acting, action_values.argmax(1), -1)
        if optimistic or one_each:
            values = problem.followed(policy, worth, improved)
        else:  # against an adversary, holding actions and probabilities both may cycle: hold the actions only
            values, few = improved, beliefs.chosen(policy)
            for _ in problem.plain_sweeps:
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
