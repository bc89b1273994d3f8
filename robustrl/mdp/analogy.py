"""Which pairs of state and action behave alike, so that what one shows teaches about the other.

Two pairs are within l1 distance D if  sum_k |T(x, k) - T(y, k)| <= D  over their outcome slots k. A *pool* collects the draws that
may stand for a pair. Pairs are flat numbers  x = state * A + action  here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_count, check_real
from robustrl.mdp.model import ROUNDING
from robustrl.mdp.outcomes import Flags, Outcomes

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Relation = tuple[Integers, Integers, Floats, Integers | None]
"""Pairs x (n,), analogues y (n,), distances (n,), and slots of y that answer those of x (n, K), or None: the same ones."""


@dataclass(frozen=True, eq=False)
class Analogy:
    """Claims that pairs behave alike; build one with a class method and fit it to an MDP with `on`.

    A pair's draws are added to the pools `feeds(x)`; what is known about x is read from `pool_of[x]`, which counts the draws of
    `members(pool)`.
    """

    n_pairs: int
    _cache: dict[int, Integers] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def none(cls) -> Analogy:
        """No two pairs are alike."""
        return cls(0)

    @classmethod
    def classes(cls, class_id: ArrayLike) -> Analogy:
        """Pairs of one class, int (S, A), have the same slot probabilities."""
        given = np.asarray(class_id)
        if given.ndim != 2 or given.dtype.kind not in "iu":
            raise ValueError(f"class_id must be integers of shape (S, A), got {given.dtype} of shape {given.shape}")
        return _Classes(given.size, np.unique(given.ravel(), return_inverse=True)[1])

    @classmethod
    def box(cls, shape: tuple[int, int], n_actions: int, radius: int, terrain: ArrayLike | None = None) -> Analogy:
        """On a grid (height, width), states row by row: the same action at most `radius` columns and rows away is the same.

        `terrain`, int (S,) or (S, A), restricts it to equal numbers: it must tell apart what the map makes different, as cells
        near a wall. Not transitive: what is known spreads in waves.
        """
        height, width = (check_count("shape", side) for side in shape)
        size, actions = height * width, check_count("n_actions", n_actions)
        ground = np.zeros(size, dtype=np.int64) if terrain is None else np.asarray(terrain)
        if ground.shape not in ((size,), (size, actions)) or ground.dtype.kind not in "iu":
            raise ValueError(
                f"terrain must be integers of shape ({size},) or ({size}, {actions}), got {ground.dtype} {ground.shape}"
            )
        ground = np.broadcast_to(ground.reshape(height, width, -1), (height, width, actions))
        return _Box(size * actions, ground, check_count("radius", radius, least=0))

    @classmethod
    def sparse(cls, distances: Any, permutation: ArrayLike | None = None) -> Analogy:
        """From l1 distances, a sparse symmetric matrix over pairs (S A, S A): an entry is a claim, also an explicit 0.

        Args:
            distances: entries in [0, 2]; the diagonal is 0.
            permutation: int (entries, K) in the order of the entries: `permutation[e, k]` is the slot of the column's pair that
                answers slot k of the row's pair; default the same slot.

        Raises:
            ValueError: naming the first entry that is out of range or differs from its mirror image.
        """
        given = distances.tocoo() if hasattr(distances, "tocoo") else None
        if given is None or len(given.shape) != 2 or given.shape[0] != given.shape[1]:
            raise ValueError(f"distances must be a square sparse matrix (S A, S A), got {type(distances).__name__}")
        slots = None if permutation is None else np.asarray(permutation)
        return _sparse(given.shape[0], given.row, given.col, given.data, slots)

    @classmethod
    def from_tv(cls, distances: Any, permutation: ArrayLike | None = None) -> Analogy:
        """As `sparse`, from total variation distances, which are half the l1 ones."""
        doubled = distances.copy()
        doubled.data = 2 * doubled.data
        return cls.sparse(doubled, permutation)

    @classmethod
    def from_functions(
        cls,
        distance: Callable[[int, int, int, int], float | None],
        outcomes: Outcomes,
        alignment: Callable[[int, int, int, int], ArrayLike] | None = None,
    ) -> Analogy:
        """From distance(s, a, s2, a2), None where nothing is claimed; asked once for each two pairs that exist.

        `alignment(s, a, s2, a2)` are the slots (K,) of (s2, a2) that answer the slots of (s, a).
        """
        pairs = [(int(s), int(a)) for s, a in np.argwhere(outcomes.valid)]
        asked = ((one, other, distance(*one, *other)) for one in pairs for other in pairs)
        claims = [(one, other, found) for one, other, found in asked if found is not None]
        rows = np.array([s * outcomes.n_actions + a for (s, a), _, _ in claims])
        columns = np.array([s * outcomes.n_actions + a for _, (s, a), _ in claims])
        slots = None if alignment is None else np.array([alignment(*one, *other) for one, other, _ in claims])
        return _sparse(outcomes.valid.size, rows, columns, np.array([found for *_, found in claims]), slots)

    def on(self, outcomes: Outcomes) -> Analogy:
        """This analogy for the pairs of `outcomes`. Nothing is claimed of those that can never be taken: they have no draws to share.

        Raises:
            ValueError: if it was made for another number of pairs.
        """
        if type(self) is Analogy:
            return replace(self, n_pairs=outcomes.valid.size)
        if self.n_pairs != outcomes.valid.size:
            raise ValueError(f"analogy must relate {outcomes.valid.size} pairs of state and action, got {self.n_pairs}")
        return self._among(outcomes.nonterminal.ravel())

    def _among(self, taken: Flags) -> Analogy:
        """The claims about some pairs (S A,)."""
        return self

    @cached_property
    def pool_of(self) -> NDArray[np.int32]:
        """The pool that a pair reads, (S A,)."""
        if not self.n_pairs:
            raise ValueError("analogy must be fitted to an MDP first: analogy.on(outcomes)")
        return np.arange(self.n_pairs, dtype=np.int32)

    def n_pools(self, outcomes: Outcomes) -> int:
        """Number of pools that a pair which may be taken reads: what a union bound must cover."""
        return int(np.unique(self.pool_of[outcomes.nonterminal.ravel()]).size)

    def feeds(self, pair: int) -> Integers:
        """Pools that a draw of the pair is added to."""
        return self.members(pair)  # distances are symmetric

    def members(self, pool: int) -> Integers:
        """Pairs whose draws the pool counts."""
        if pool not in self._cache:
            self._cache[pool] = self._members(pool)
        return self._cache[pool]

    def _members(self, pool: int) -> Integers:
        return np.array([pool])

    def distances(self, pool: int) -> Floats:
        """l1 distances between the members of the pool and the pairs that read it, parallel to `members`."""
        return np.zeros(len(self.members(pool)))

    def usable(self, tau: float, max_distance: float = 2.0) -> Analogy:
        """The part from which supports can be learnt when positive probabilities are at least `tau`: distances below 2 tau, with
        a margin for rounding.

        Two aligned distributions closer than that, each of whose positive probabilities is at least tau, have one support: a slot that only
        one of them has moves l1 mass tau, and as both sum to 1 another tau comes back elsewhere.
        """
        if not 0 < check_real("tau", tau) <= 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}")
        if not 0 <= check_real("max_distance", max_distance) <= 2:
            raise ValueError(f"max_distance must be in [0, 2], got {max_distance}")
        return self._within(2 * tau - ROUNDING, max_distance)

    def _within(self, below: float, at_most: float) -> Analogy:
        return self

    def align(self, pair: int, pool: int, slot: int) -> int:
        """The pool's slot that a draw of the pair's slot counts for."""
        return slot

    def aligned(self, pool: int, counts: Integers) -> Integers:
        """Counts (members, K) of the pool's members, each in the order of the pool's own slots."""
        return counts

    def related(self) -> Iterator[Relation]:
        """Every claim, in batches; exact ones that follow from others by transitivity may be left out."""
        yield from ()


@dataclass(frozen=True, eq=False)
class _Classes(Analogy):
    label: Integers

    @cached_property
    def pool_of(self) -> NDArray[np.int32]:
        return self.label.astype(np.int32)

    def _among(self, taken: Flags) -> Analogy:
        return replace(self, label=_apart(self.label, taken))

    @cached_property
    def _by_class(self) -> Integers:
        return np.argsort(self.label, kind="stable")

    @cached_property
    def _starts(self) -> Integers:
        return np.append(0, np.cumsum(np.bincount(self.label)))

    def feeds(self, pair: int) -> Integers:
        return self.label[pair : pair + 1]

    def _members(self, pool: int) -> Integers:
        return self._by_class[self._starts[pool] : self._starts[pool + 1]]

    def related(self) -> Iterator[Relation]:
        yield np.arange(self.n_pairs), self._by_class[self._starts[self.label]], np.zeros(self.n_pairs), None


@dataclass(frozen=True, eq=False)
class _Box(Analogy):
    terrain: Integers  # (height, width, A)
    radius: int

    def _among(self, taken: Flags) -> Analogy:
        return replace(self, terrain=_apart(self.terrain, taken.reshape(self.terrain.shape)))

    @cached_property
    def _ids(self) -> Integers:
        return np.arange(self.n_pairs).reshape(self.terrain.shape)

    def _members(self, pool: int) -> Integers:
        y, x, action = np.unravel_index(pool, self.terrain.shape)
        near = (
            slice(max(y - self.radius, 0), y + self.radius + 1),
            slice(max(x - self.radius, 0), x + self.radius + 1),
            action,
        )
        found: Integers = self._ids[near][self.terrain[near] == self.terrain[y, x, action]]
        return found

    def related(self) -> Iterator[Relation]:
        height, width, _ = self.terrain.shape
        for down in range(min(self.radius, height - 1) + 1):
            for right in range(-self.radius if down else 1, self.radius + 1):
                columns = slice(max(-right, 0), width - max(right, 0)), slice(max(right, 0), width + min(right, 0))
                one, other = (slice(0, height - down), columns[0]), (slice(down, height), columns[1])
                same = self.terrain[one] == self.terrain[other]
                yield self._ids[one][same], self._ids[other][same], np.zeros(int(same.sum())), None


@dataclass(frozen=True, eq=False)
class _Sparse(Analogy):
    starts: Integers  # the entries of row x are starts[x] to starts[x + 1], sorted by column
    columns: Integers
    l1: Floats
    slots: Integers | None

    def _entries(self, pair: int) -> slice:
        return slice(int(self.starts[pair]), int(self.starts[pair + 1]))

    def _members(self, pool: int) -> Integers:
        return self.columns[self._entries(pool)]

    def distances(self, pool: int) -> Floats:
        return self.l1[self._entries(pool)]

    def _among(self, taken: Flags) -> Analogy:
        return self._kept((self._rows == self.columns) | (taken[self._rows] & taken[self.columns]))

    def _within(self, below: float, at_most: float) -> Analogy:
        return self._kept(((self.l1 < below) | (self.l1 == 0)) & (self.l1 <= at_most))

    def _kept(self, keep: Flags) -> Analogy:
        rows, slots = self._rows[keep], None if self.slots is None else self.slots[keep]
        starts = np.searchsorted(rows, np.arange(self.n_pairs + 1))
        return replace(self, starts=starts, columns=self.columns[keep], l1=self.l1[keep], slots=slots)

    def align(self, pair: int, pool: int, slot: int) -> int:
        if self.slots is None:
            return slot
        entries = self._entries(pair)
        return int(self.slots[entries.start + np.searchsorted(self.columns[entries], pool), slot])

    def aligned(self, pool: int, counts: Integers) -> Integers:
        return counts if self.slots is None else np.take_along_axis(counts, self.slots[self._entries(pool)], 1)

    @cached_property
    def _rows(self) -> Integers:
        return np.repeat(np.arange(self.n_pairs), np.diff(self.starts))

    def related(self) -> Iterator[Relation]:
        yield self._rows, self.columns, self.l1, self.slots


def _apart(label: Integers, taken: Flags) -> Integers:
    """Numbers 0, 1, ... of the labels, after every pair that is not taken has got one of its own."""
    alone = int(label.max()) + 1 + np.arange(label.size).reshape(label.shape)
    return np.unique(np.where(taken, label, alone), return_inverse=True)[1].reshape(label.shape)


def _sparse(n: int, rows: Any, columns: Any, l1: Any, slots: NDArray[Any] | None) -> _Sparse:
    rows, columns, l1 = rows.astype(np.int64), columns.astype(np.int64), l1.astype(np.float64)
    missing = np.setdiff1d(np.arange(n), rows[rows == columns])
    if slots is not None:
        if slots.ndim != 2 or len(slots) != len(rows) or (np.sort(slots, 1) != np.arange(slots.shape[1])).any():
            raise ValueError(
                f"permutation must hold a permutation of the slots for each of {len(rows)} entries, got {slots.shape}"
            )
        slots = np.concatenate([slots, np.broadcast_to(np.arange(slots.shape[1]), (len(missing), slots.shape[1]))])
    rows, columns, l1 = (np.concatenate(parts) for parts in ((rows, missing), (columns, missing), (l1, np.zeros(len(missing)))))
    order, mirrored = np.lexsort((columns, rows)), np.lexsort((rows, columns))

    def refuse(entry: int, problem: str) -> ValueError:
        return ValueError(f"distances {problem}, got {l1[entry]} between pairs {rows[entry]} and {columns[entry]}")

    keys = rows[order] * n + columns[order]
    for bad, problem in (
        (order[~((l1[order] >= 0) & (l1[order] <= 2))], "must lie in [0, 2]"),  # NaN too
        (order[(rows == columns)[order] & (l1[order] != 0)], "must be 0 on the diagonal"),
        (order[1:][np.diff(keys) == 0], "must name two pairs once"),
        (order[keys != columns[mirrored] * n + rows[mirrored]], "must be symmetric"),
        (order[l1[order] != l1[mirrored]], "must be symmetric"),
    ):
        if len(bad):
            raise refuse(int(bad[0]), problem)
    if slots is not None:
        there, back = slots[order], slots[mirrored]
        wrong = (np.take_along_axis(back, there, 1) != np.arange(slots.shape[1])).any(1)
        wrong |= (rows == columns)[order] & (there != np.arange(slots.shape[1])).any(1)
        if wrong.any():
            entry = int(order[wrong][0])
            raise ValueError(
                f"permutation must be undone by that of the mirrored entry (and do nothing on the diagonal), "
                f"it is not between pairs {rows[entry]} and {columns[entry]}"
            )
        slots = there
    starts = np.searchsorted(rows[order], np.arange(n + 1))
    return _Sparse(n, starts, columns[order], l1[order], slots)
