"""Sets of pairs of state and action that an agent never leaves, meets no danger in, and can always come home in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

from robustrl.errors import check_choice
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.model import ROUNDING, TabularMDP
from robustrl.mdp.outcomes import Flags, Outcomes

Integers = NDArray[np.int64]


class Leak(NamedTuple):
    """Why a pair cannot belong to a safe set; a start state without any safe action has action None."""

    state: int
    action: int | None
    why: str

    def __str__(self) -> str:
        return f"state {self.state}" + ("" if self.action is None else f", action {self.action}") + f": {self.why}"


class AnalogyCheck(NamedTuple):
    """How far the truth is beyond a claim: the largest (true l1 distance - claimed distance), and whose it is.

    `pair` and `analogue` are (state, action), None where nothing is claimed. Exact classes are compared with the first of
    their pairs that may be taken.
    """

    worst_excess: float
    pair: tuple[int, int] | None
    analogue: tuple[int, int] | None

    @property
    def holds(self) -> bool:
        """Whether every claim is true, up to rounding."""
        return self.worst_excess <= ROUNDING


def expand(outcomes: Outcomes, safe: ArrayLike, known: ArrayLike, possible: ArrayLike, sure: ArrayLike | None = None) -> Flags:
    """The largest extension of a safe set by known pairs that is provably safe too.

    It is danger-free and closed, every state of it is reached from the safe set inside it, and from every state the safe set or a safe
    end of the episode is reached inside it with positive probability, hence almost surely.

    Args:
        safe: proven set of pairs, bool (S, A); taken as it is.
        known: pairs whose possible outcomes are known, bool (S, A).
        possible: slots that may fire, at least all that do, bool (S, A, K).
        sure: slots that do fire, at most those, bool (S, A, K): what reaching and returning may count on; default `possible`.

    Returns:
        bool (S, A), a superset of `safe`: never smaller for more knowledge.

    Source: greatest fixed point (closed) around least ones (reach, return), an almost-sure Buechi computation; Roderick, Nagarajan,
    Kolter (AISTATS 2021), arXiv:2007.03574, for the idea of extending a safe set by analogues.
    """
    safe, known = outcomes.pairs("safe", safe), outcomes.pairs("known", known)
    may = outcomes.slots("possible", possible)
    does = may if sure is None else outcomes.slots("sure", sure) & may
    new = known & ~safe & ~(may & outcomes.dangerous).any(-1)
    home = np.append(safe.any(1), True)
    pairs, certain = _Pairs.of(outcomes, new, may), _Pairs.of(outcomes, new, does)

    def survivors(alive: Flags) -> Flags:
        reached = alive & certain.reached(alive, home)[pairs.state]
        return pairs.closed(certain.returning(reached, home), home)

    alive = np.ones(len(pairs.state), dtype=bool)
    while (left := survivors(alive)).sum() < alive.sum():
        alive = left
    return safe | pairs.mask(safe.shape, alive)


def closed_subset(outcomes: Outcomes, pairs: ArrayLike, support: ArrayLike) -> Flags:
    """The largest part of a set of pairs that is danger-free, closed, and leads back to a start or a safe end from everywhere.

    Args:
        pairs: bool (S, A).
        support: slots that may fire, bool (S, A, K).

    Returns:
        bool (S, A); empty if some start state would own no pair of it.
    """
    given, support = outcomes.pairs("pairs", pairs), outcomes.slots("support", support)
    found = _closed_parts(outcomes, given, support)[1]
    return found if (found.any(1) | (np.asarray(outcomes.start) == 0)).all() else np.zeros_like(found)


def _closed_parts(outcomes: Outcomes, pairs: Flags, support: Flags) -> tuple[Flags, Flags]:
    """The largest closed, danger-free part, and the largest part of it that leads back."""
    inside = _Pairs.of(outcomes, pairs & ~(support & outcomes.dangerous).any(-1), support)
    nowhere = np.arange(inside.n_nodes) == outcomes.n_states
    targets = nowhere | np.append(np.asarray(outcomes.start) > 0, False)
    closed = alive = inside.closed(np.ones(len(inside.state), dtype=bool), nowhere)
    while (left := inside.closed(inside.returning(alive, targets), nowhere)).sum() < alive.sum():
        alive = left
    return inside.mask(pairs.shape, closed), inside.mask(pairs.shape, alive)


@dataclass(frozen=True)
class _Pairs:
    """Some pairs as a graph: pair i stands at a state and may lead to others; node S is a safe end of the episode."""

    ids: Integers  # flat numbers of the pairs (n,)
    state: Integers  # where they are taken (n,)
    source: Integers  # the pair i of an edge (edges,)
    to: Integers  # where an edge leads (edges,)
    n_nodes: int

    @classmethod
    def of(cls, outcomes: Outcomes, pairs: Flags, support: Flags) -> _Pairs:
        ids = np.flatnonzero(pairs)
        source, slot = np.nonzero(support.reshape(-1, outcomes.n_slots)[ids])
        state, action = np.divmod(ids, outcomes.n_actions)
        fires = (state[source], action[source], slot)
        to = np.where(outcomes.terminal[fires], outcomes.n_states, outcomes.successors[fires])
        return cls(ids, state, source, to, outcomes.n_states + 1)

    def mask(self, shape: tuple[int, ...], alive: Flags) -> Flags:
        """The pairs that are alive, bool (S, A)."""
        found = np.zeros(shape, dtype=bool)
        found.reshape(-1)[self.ids[alive]] = True
        return found

    def reached(self, alive: Flags, sources: Flags) -> Flags:
        """Nodes reached from `sources` by pairs that are alive."""
        kept = alive[self.source]
        return _reachable(self.state[self.source[kept]], self.to[kept], sources)

    def returning(self, alive: Flags, targets: Flags) -> Flags:
        """Which pairs are alive and lead towards `targets`."""
        kept = alive[self.source]
        source, to = self.source[kept], self.to[kept]
        leading = np.zeros(len(self.state), dtype=bool)
        leading[source[_reachable(to, self.state[source], targets)[to]]] = True
        return leading

    def closed(self, alive: Flags, home: Flags) -> Flags:
        """The largest part of the living pairs that leads only to nodes of `home` and to states that own a pair of it."""
        alive = alive.copy()
        owned = np.bincount(self.state[alive], minlength=self.n_nodes)
        shape = (self.n_nodes, len(self.state))
        leading_to = csr_array((np.ones(len(self.to), dtype=bool), (self.to, self.source)), shape=shape)
        dead = np.flatnonzero((owned == 0) & ~home)
        while dead.size:
            lost = np.unique(leading_to[dead].indices)
            lost = lost[alive[lost]]
            alive[lost] = False
            np.subtract.at(owned, self.state[lost], 1)
            dead = np.unique(self.state[lost])
            dead = dead[(owned[dead] == 0) & ~home[dead]]
        return alive


def _reachable(start: Integers, end: Integers, sources: Flags) -> Flags:
    """Nodes of a graph with edges start -> end that are reached from a set of nodes, bool (n,)."""
    n, first = len(sources), np.flatnonzero(sources)
    rows, columns = np.append(start, np.full(len(first), n)), np.append(end, first)
    graph = csr_array((np.ones(len(rows)), (rows, columns)), shape=(n + 1, n + 1))
    found = np.zeros(n + 1, dtype=bool)
    found[breadth_first_order(graph, n, return_predecessors=False)] = True
    return found[:-1]


def leaks(outcomes: Outcomes, pairs: ArrayLike, support: ArrayLike) -> list[Leak]:
    """Why pairs of a set are not in its `closed_subset`, and which start states are left without an action."""
    given, support = outcomes.pairs("pairs", pairs), outcomes.slots("support", support)
    closed, kept = _closed_parts(outcomes, given, support)
    stranded = np.flatnonzero((np.asarray(outcomes.start) > 0) & ~kept.any(1))
    found = [Leak(int(state), None, "an episode may start here, but no pair of the set is safe here") for state in stranded]
    for s, a in np.argwhere(given & ~kept):
        fires = np.flatnonzero(support[s, a])
        danger = fires[outcomes.dangerous[s, a, fires]]
        to = outcomes.successors[s, a, fires[~outcomes.terminal[s, a, fires]]]
        lost = to[~kept[to].any(1)]
        if not fires.size:
            why = "no outcome is possible"
        elif danger.size:
            why = f"may be dangerous: leads to state {outcomes.successors[s, a, danger[0]]}"
        elif closed[s, a]:
            why = "no way back to a start or a safe end of the episode"
        elif (outside := lost[~given[lost].any(1)]).size:
            why = f"may lead to state {outside[0]}, which owns no pair of the set"
        else:
            why = f"may lead to state {lost[0]}, where no pair of the set is safe"
        found.append(Leak(int(s), int(a), why))
    return found


def validate_safe_set(mdp: TabularMDP, outcomes: Outcomes, pairs: ArrayLike, on_invalid: str = "shrink") -> Flags:
    """A declared safe set, checked against the truth: danger-free, closed, with a way back, and containing the start.

    Args:
        mdp: the truth, slot for slot.
        pairs: bool (S, A).
        on_invalid: "shrink" to the largest part that is safe, with a warning that names the first leaks, or "raise".

    Raises:
        ValueError: naming the first leaks, if the set is not safe and "raise" was asked for, or if no part that contains the start is.
    """
    check_choice("on_invalid", on_invalid, ("shrink", "raise"))
    support = _true_support(mdp, outcomes)
    given = outcomes.pairs("pairs", pairs)
    found = closed_subset(outcomes, given, support)
    if (found == given).all() and given.any():
        return given
    reasons = leaks(outcomes, given, support)
    summary = "; ".join(map(str, reasons[:3])) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    if on_invalid == "raise" or not found.any():
        raise ValueError(f"the safe set must be danger-free, closed, with a way back, and contain the start, but {summary}")
    warnings.warn(f"the safe set leaks and was shrunk from {given.sum()} pairs to {found.sum()}: {summary}", stacklevel=2)
    return found


def safe_oracle(mdp: TabularMDP, outcomes: Outcomes, safe: ArrayLike) -> Flags:
    """The largest safe extension (S, A) of a safe set under the true MDP: what nobody can learn to exceed."""
    return expand(outcomes, safe, outcomes.valid, _true_support(mdp, outcomes))


def learnable_oracle(mdp: TabularMDP, outcomes: Outcomes, safe: ArrayLike, analogy: Analogy, tau: float) -> Flags:
    """What of it (S, A) can be learnt from inside: pairs become known through analogues, less than 2 `tau` away, that the safe set
    leads to from the start."""
    support, analogy = _true_support(mdp, outcomes), analogy.on(outcomes).usable(tau)
    found, taught = outcomes.pairs("safe", safe), np.zeros(outcomes.valid.size, dtype=bool)
    start, visited = np.append(np.asarray(outcomes.start) > 0, False), np.zeros_like(found)
    while True:
        inside = _Pairs.of(outcomes, found, support)
        met = found & inside.reached(np.ones(len(inside.state), dtype=bool), start)[:-1, None]
        for pair in np.flatnonzero(met & ~visited):
            taught[analogy.feeds(int(pair))] = True
        visited = met
        known = taught[analogy.pool_of].reshape(found.shape) & outcomes.valid
        larger = expand(outcomes, found, known, support)
        if (larger == found).all():
            return found
        found = larger


def validate_analogy(mdp: TabularMDP, outcomes: Outcomes, analogy: Analogy) -> AnalogyCheck:
    """Compare what an analogy claims with the true MDP, over the pairs that an agent may come to take."""
    _true_support(mdp, outcomes)
    p = mdp.probabilities.reshape(-1, outcomes.n_slots)
    worst: tuple[float, tuple[int, int] | None, tuple[int, int] | None] = (0.0, None, None)
    for one, other, claimed, slots in analogy.on(outcomes).related():
        matter = np.flatnonzero(one != other)
        if not matter.size:
            continue
        one, other, claimed = one[matter], other[matter], claimed[matter]
        there = p[other] if slots is None else np.take_along_axis(p[other], slots[matter], 1)
        excess = np.abs(p[one] - there).sum(1) - claimed
        i = int(excess.argmax())
        if worst[1] is None or excess[i] > worst[0]:
            pair, analogue = (divmod(int(ids[i]), outcomes.n_actions) for ids in (one, other))
            worst = (float(excess[i]), pair, analogue)
    return AnalogyCheck(*worst)


def _true_support(mdp: TabularMDP, outcomes: Outcomes) -> Flags:
    """The slots that do fire (S, A, K), after a check that the MDP and what is declared of it agree slot by slot."""
    if mdp.rewards.shape != outcomes.rewards.shape:
        raise ValueError(f"mdp must have the slots of outcomes, {outcomes.rewards.shape}, got {mdp.rewards.shape}")
    fires: Flags = mdp.probabilities > 0
    wrong = ~outcomes.candidates | (mdp.successors != outcomes.successors)
    wrong |= (mdp.rewards != outcomes.rewards) | (mdp.terminal != outcomes.terminal)
    # A pair that is declared not to exist may have any probabilities.
    if (wrong := wrong & fires & outcomes.valid[..., None]).any():
        state, action, slot = np.argwhere(wrong)[0]
        raise ValueError(
            f"mdp must agree with outcomes, slot {slot} of state {state}, action {action} is another one or no candidate"
        )
    return fires & outcomes.valid[..., None]
