"""What has been learnt of a finite MDP: draws, shared between analogues, and what they prove."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustrl.certify.safe_set import Evidence
from robustrl.certify.transitions import CONFIDENCES, l1_radius, support_samples
from robustrl.errors import check_choice, check_count
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.outcomes import ModelViolation, Outcomes
from robustrl.mdp.planning import Beliefs

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Sharing = Literal["pool", "best"]
SHARINGS = ("pool", "best")
LOOKS = 2
NOTHING: Integers = np.zeros(0, dtype=np.int64)


class _Reach(NamedTuple):
    """Whom the draws of a pair concern."""

    pools: Integers
    """Read by analogues: a draw that they exclude is a contradiction."""
    first: Integers
    """Number of a pool's first slot."""
    slots: Integers | None
    """Slot of each pool that answers a slot of the pair, (pools, K); None: the same one."""
    counting: slice | Integers
    """Which of the pools count the draws."""
    l1: Floats | None


class Knowledge:
    """Counts of outcomes, the outcomes that a pair is proven to have, and how far its law may be from the counted one.

    A pool collects draws for the pairs that read it. At its `n_support`-th draw it becomes known: with probability at least
    1 - delta_s, every slot that a known pair can fire has been seen by then, of all pools at once.

    Args:
        outcomes: what is possible at all.
        analogy: whose draws may stand for whose, restricted to what `tau` allows.
        tau: lower bound of every positive slot probability, in (0, 1].
        delta_s: failure probability of the proven supports.
        delta_p: failure probability of the radii.
        sharing: "pool": a pair learns from all draws of its analogues; "best": from the one analogue that knows most.
        confidence: radius of the laws, see `l1_radius`; "heuristic" is used for known pairs only, and proves nothing of values.
        beta: of the heuristic.
        n_support: draws that make a pool known; default as many as the proof needs.
        on_violation: "raise", or "retract": pools that are contradicted never become known again.

    Attributes:
        contradicted: whether a draw has ever shown what was proven, or declared, not to happen.

    Raises:
        ValueError: if an argument is out of range or does not fit.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        analogy: Analogy,
        tau: float,
        delta_s: float,
        delta_p: float,
        *,
        sharing: Sharing = "pool",
        confidence: str = "laplace",
        beta: float = 0.5,
        n_support: int | None = None,
        on_violation: str = "raise",
    ) -> None:
        self.outcomes, self.tau, self.delta_s, self.delta_p, self.beta = outcomes, tau, delta_s, delta_p, beta
        self.sharing: Sharing = check_choice("sharing", sharing, SHARINGS)
        self.confidence: str = check_choice("confidence", confidence, CONFIDENCES)
        self.on_violation: str = check_choice("on_violation", on_violation, ("raise", "retract"))
        self.analogy = analogy.on(outcomes).usable(tau)
        pairs, n_slots = outcomes.valid.size, outcomes.n_slots
        # With "best" every pair is a pool of its own, and analogues are looked up instead of fed.
        self.pool_of = self.analogy.pool_of.astype(np.int64) if sharing == "pool" else np.arange(pairs)
        self.n_pools = self.analogy.n_pools(outcomes) if sharing == "pool" else max(1, int(outcomes.nonterminal.sum()))
        self.proof_draws = support_samples(tau, delta_s, self.n_pools)
        self.n_support = self.proof_draws if n_support is None else check_count("n_support", n_support)
        self.visits = np.zeros((pairs, n_slots), dtype=np.int64)
        self.counts = np.zeros((pairs, n_slots), dtype=np.int64)
        self.totals = np.zeros(pairs, dtype=np.int64)
        self.transfer = np.zeros(pairs)
        self.known = np.zeros(pairs, dtype=bool)
        self.barred = np.zeros(pairs, dtype=bool)
        self.contradicted = False
        # What a pool may show: until it is known what all its readers may, then what it has shown.
        self.support = np.ones((pairs, n_slots), dtype=bool)
        candidates, valid = outcomes.candidates.reshape(pairs, n_slots), outcomes.valid.ravel()
        np.logical_and.at(self.support, self.pool_of[valid], candidates[valid])
        if (apart := outcomes.valid & ~self.possible.any(-1)).any():
            state, action = np.argwhere(apart)[0]
            raise ValueError(
                f"analogy must relate pairs that may have a common outcome, state {state}, action {action} shares none"
            )
        self._reaches: dict[int, _Reach] = {}

    @property
    def proven(self) -> bool:
        """Whether what is known of supports is known with the stated confidence."""
        return self.n_support >= self.proof_draws and not self.contradicted

    @property
    def known_pairs(self) -> Flags:
        """Pairs whose outcomes are known, (S, A)."""
        found: Flags = self.known[self.pool_of].reshape(self.outcomes.valid.shape) & self.outcomes.nonterminal
        return found

    @property
    def possible(self) -> Flags:
        """Slots that a pair may fire, (S, A, K): those seen of a known pair, every candidate of another."""
        return self.support[self.pool_of].reshape(self.outcomes.candidates.shape) & self.outcomes.candidates

    def next_look(self) -> Integers:
        """How many draws of a pool make it worth to plan again: those at hand and half as many."""
        return self.totals + np.maximum(self.totals // LOOKS, 1)

    def analogues(self, pair: int) -> Integers:
        """Pairs whose draws teach about this one, and the other way round; itself among them."""
        return self.analogy.members(int(self.analogy.pool_of[pair]))

    def record(self, state: int, action: int, slot: int) -> Integers:
        """Add a draw.

        Returns:
            The pools that became known by it.
        Raises:
            ModelViolation: if a pool was proven, or declared, not to show it.
        """
        pair = state * self.outcomes.n_actions + action
        reach = self._reaches.get(pair)
        if reach is None:
            reach = self._reaches[pair] = self._reach(pair)
        pools, first, slots, counting, l1 = reach
        cells = first + (slot if slots is None else slots[:, slot])
        fits = self.support.reshape(-1).take(cells)
        if not fits.all():
            excluding = pools[~fits]
            why = f"{self.n_support} draws had excluded it" if self.known[excluding[0]] else "it was declared impossible"
            self._contradicted(excluding, pair, f"fired slot {slot}", why)
            return self.record(state, action, slot)
        self.visits[pair, slot] += 1
        pools = pools[counting]
        self.counts.reshape(-1)[cells[counting]] += 1
        self.totals[pools] = totals = self.totals[pools] + 1
        if l1 is not None:
            self.transfer[pools] += l1
        full = totals == self.n_support  # looked at once, so the proof pays for one look
        return self._freeze(pools[full]) if full.any() else NOTHING

    def _reach(self, pair: int) -> _Reach:
        own = self.pool_of[pair]
        pools = self.analogy.feeds(pair) if self.sharing == "pool" else self.analogues(pair)
        pools = pools[~self.barred[pools] | (pools == own)]
        slots = None
        if getattr(self.analogy, "slots", None) is not None:
            slots = np.array([[self.analogy.align(pair, int(q), k) for k in range(self.outcomes.n_slots)] for q in pools])
        if self.sharing == "best":
            return _Reach(pools, pools * self.outcomes.n_slots, slots, np.flatnonzero(pools == own), None)
        l1 = None
        if len(pools) > 1:  # distances are symmetric, so they can be read off the pair's own pool
            l1 = self.analogy.distances(int(own))[np.searchsorted(self.analogy.members(int(own)), pools)]
        return _Reach(pools, pools * self.outcomes.n_slots, slots, slice(None), l1 if l1 is not None and l1.any() else None)

    def _freeze(self, full: Integers) -> Integers:
        if self.sharing == "pool":
            fresh = full[~self.barred[full] & ~self.known[full]]
            self.known[fresh] = True
            self.support[fresh] = self.counts[fresh] > 0
            return fresh
        learnt = []
        for source in full.tolist():
            readers = self.analogues(source)
            for pair in readers[~self.barred[readers]].tolist():
                analogues = self.analogues(pair)
                seen = self.analogy.aligned(int(self.analogy.pool_of[pair]), self.counts[analogues]) > 0
                support = seen[np.searchsorted(analogues, source)]
                if (support != seen.any(0)).any():
                    self._contradicted(np.array([pair]), source, f"missed an outcome in {self.n_support} draws", "it was seen")
                elif not self.known[pair]:
                    self.known[pair], self.support[pair] = True, support
                    learnt.append(pair)
        return np.array(learnt, dtype=np.int64)

    def _contradicted(self, pools: Integers, pair: int, fact: str, claim: str) -> None:
        """What a pair has shown is not what some pools were said to show."""
        self.contradicted = True
        if self.on_violation == "raise":
            state, action = divmod(pair, self.outcomes.n_actions)
            reader = divmod(int(np.flatnonzero(self.pool_of == pools[0])[0]), self.outcomes.n_actions)
            raise ModelViolation(
                f"state {state}, action {action} {fact}, but of state {reader[0]}, action {reader[1]}, which is said to behave alike, "
                f"{claim}: the analogy is false, or a positive probability is below tau = {self.tau}"
            )
        self.known[pools], self.barred[pools] = False, True
        self.support[pools] = True  # what is possible is read through the candidates of each pair
        self._reaches.clear()

    def beliefs(self, *, certain: bool = False, among: Flags | None = None) -> Beliefs:
        """The laws that the draws allow.

        Args:
            certain: take the counted law of every known pair for the true one.
            among: pairs to plan with, (S, A); default all that exist.
        """
        shape = self.outcomes.candidates.shape
        pairs = np.flatnonzero(self.outcomes.valid if among is None else among)
        counts, extra = self._draws(pairs)
        draws, pools = counts.sum(1), self.pool_of[pairs]
        laws = counts / np.maximum(draws, 1)[:, None]
        possible = self.support[pools] & self.outcomes.candidates.reshape(-1, shape[2])[pairs]
        n_possible, known = possible.sum(1), self.known[pools]
        radius = self._radii(draws, n_possible, extra, known)
        if certain:
            radius[known] = 0.0
        sure = n_possible == 1
        laws[sure], radius[sure] = possible[sure], 0.0
        estimates, radii, support = np.zeros(shape), np.zeros(shape[:2]), np.zeros(shape, dtype=bool)
        estimates.reshape(-1, shape[2])[pairs], support.reshape(-1, shape[2])[pairs] = laws, possible
        radii.reshape(-1)[pairs] = radius
        return Beliefs(self.outcomes, estimates, radii, support)

    def evidence(self, safe_set: Flags, policy: Integers) -> Evidence:
        """What was declared and drawn, for a certificate of the safe set that grew from `safe_set`, and of a policy.

        Draws of pools that were contradicted prove nothing and are left out.
        """
        shape = self.outcomes.candidates.shape
        counts, extra = self._draws(np.arange(safe_set.size))
        counts[self.barred[self.pool_of]] = 0
        return Evidence(
            self.outcomes, safe_set, counts.reshape(shape), extra.reshape(shape[:2]), self.pool_of.reshape(shape[:2]), policy
        )

    def _radii(self, draws: Integers, n_possible: Integers, extra: Floats, known: Flags) -> Floats:
        failure = self.delta_p / self.n_pools
        if self.confidence != "heuristic":
            return np.minimum(l1_radius(draws, n_possible, failure, self.confidence) + extra, 2.0)
        guessed = l1_radius(draws, n_possible, failure, "heuristic", beta=self.beta)
        return np.minimum(np.where(known, guessed, l1_radius(draws, n_possible, failure)) + extra, 2.0)

    def _draws(self, pairs: Integers) -> tuple[Integers, Floats]:
        """Draws that stand for n pairs (n, K), and l1 distances that analogues may add (n,).

        A pair whose pool was contradicted has only its own ones left.
        """
        pools = self.pool_of[pairs]
        if self.sharing == "pool":
            counts, extra = self.counts[pools], self.transfer[pools] / np.maximum(self.totals[pools], 1)
        else:
            readers, sources, l1, starts = self._links
            n_possible = np.maximum(self.possible.reshape(self.counts.shape).sum(1), 1)
            radii = self._radii(self.totals[sources], n_possible[readers], l1, self.known[readers])
            radii = radii - 1e-12 * (readers == sources)  # a tie goes to a pair's own draws
            # What makes a pair known must be there for everybody to see: draws that are as many as the proof takes.
            radii[self.known[readers] & (self.totals[sources] < self.n_support)] = np.inf
            order = np.lexsort((radii, readers))[starts[pairs]]
            counts, extra = self.counts[sources[order]], l1[order]
            if (slots := getattr(self.analogy, "slots", None)) is not None:
                counts = np.take_along_axis(counts, slots[order], 1)
        if self.barred.any():
            lost = self.barred[pools]
            own = self.visits[pairs] * self.outcomes.candidates.reshape(self.visits.shape)[pairs]
            counts, extra = np.where(lost[:, None], own, counts), np.where(lost, 0.0, extra)
        return counts, extra

    @cached_property
    def _links(self) -> tuple[Integers, Integers, Floats, Integers]:
        """All claims: reader, source, distance, sorted by reader; and where each reader's begin."""
        pools = self.analogy.pool_of.tolist()
        members = [self.analogy.members(pool) for pool in pools]
        sizes = np.array([len(found) for found in members])
        readers = np.repeat(np.arange(len(pools)), sizes)
        l1 = np.concatenate([self.analogy.distances(pool) for pool in pools])
        return readers, np.concatenate(members).astype(np.int64), l1, np.concatenate([[0], np.cumsum(sizes)[:-1]])
