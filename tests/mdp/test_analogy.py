"""Analogies: what a draw feeds, what a pool counts, and that each form says the same in its own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import coo_array, csr_array
from worlds import islands, random_world

from robustrl.mdp import Analogy, Outcomes


def world(n_states: int, n_actions: int, n_slots: int = 1) -> Outcomes:
    """Every state leads to the next one or back to the first."""
    shape = (n_states, n_actions, n_slots)
    successors = (
        (np.arange(n_states)[:, None, None] + np.arange(1, n_slots + 1)) % n_states * np.ones((1, n_actions, 1), dtype=int)
    )
    none = np.zeros(shape, dtype=bool)
    return Outcomes(successors.astype(np.int32), ~none, np.zeros(shape), none, none)


def matrix(entries: dict[tuple[int, int], float], n: int) -> csr_array:
    rows, columns = zip(*entries, strict=True)
    return csr_array((list(entries.values()), (rows, columns)), shape=(n, n))


EXAMPLE = matrix({(0, 1): 0.2, (1, 0): 0.2, (1, 2): 0.0, (2, 1): 0.0, (2, 2): 0.0, (4, 5): 0.6, (5, 4): 0.6}, 6)
FORMS = [
    Analogy.none().on(world(3, 2)),
    Analogy.classes([[0, 1], [0, 2], [5, 1]]),
    Analogy.box((1, 3), 2, 1),
    Analogy.box((2, 3), 1, 2),
    Analogy.box((3, 2), 1, 1, terrain=np.array([0, 1, 1, 0, 0, 1])),
    Analogy.box((3, 1), 2, 1, terrain=np.array([0, 0, 1])),
    Analogy.sparse(EXAMPLE),
    Analogy.sparse(EXAMPLE).usable(0.2),
]


@pytest.mark.parametrize("analogy", FORMS)
def test_a_pool_counts_exactly_the_pairs_that_feed_it_and_each_pair_feeds_the_pool_it_reads(analogy: Analogy) -> None:
    pools = np.unique(analogy.pool_of)
    assert analogy.pool_of.shape == (6,)
    assert analogy.pool_of.dtype == np.int32
    for pool in pools:
        feeding = [x for x in range(6) if pool in analogy.feeds(x)]
        assert analogy.members(int(pool)).tolist() == feeding
        assert len(analogy.distances(int(pool))) == len(feeding)
    for x in range(6):
        own = int(analogy.pool_of[x])
        assert own in analogy.feeds(x)
        assert analogy.distances(own)[analogy.members(own).tolist().index(x)] == 0
        assert analogy.align(x, own, 1) == 1


@pytest.mark.parametrize("analogy", FORMS)
def test_the_claims_are_those_of_the_pools(analogy: Analogy) -> None:
    """As undirected pairs; classes may leave out what follows from the rest."""
    claimed = {
        (min(x, y), max(x, y)): d for one, other, l1, _ in analogy.related() for x, y, d in zip(one, other, l1, strict=True)
    }
    expected = {
        (min(x, int(y)), max(x, int(y))): d
        for x in range(6)
        for y, d in zip(analogy.members(int(analogy.pool_of[x])), analogy.distances(int(analogy.pool_of[x])), strict=True)
    }
    assert {(x, y): d for (x, y), d in claimed.items() if x != y} == {(x, y): d for (x, y), d in expected.items() if x != y}


def test_classes_are_pools_whatever_their_names() -> None:
    analogy = Analogy.classes(np.array([[7, -3], [7, 100], [-3, 7]]))
    assert analogy.pool_of.tolist() == [1, 0, 1, 2, 0, 1]
    assert analogy.members(1).tolist() == [0, 2, 5]
    assert analogy.n_pools(world(3, 2)) == 3


def test_a_box_holds_the_same_action_on_the_same_terrain_near_by() -> None:
    ground = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1])  # 3 rows of 4 columns
    analogy = Analogy.box((3, 4), 2, 1, terrain=ground)
    for x in range(24):
        y0, x0, a0 = x // 8, x // 2 % 4, x % 2
        expected = [
            8 * y + 2 * c + a0
            for y in range(3) for c in range(4)
            if abs(y - y0) <= 1 and abs(c - x0) <= 1 and ground[4 * y + c] == ground[4 * y0 + x0]
        ]  # fmt: skip
        assert analogy.members(x).tolist() == expected
        assert a0 == x % 2


@pytest.mark.parametrize("analogy", FORMS)
def test_nothing_is_claimed_of_pairs_that_can_never_be_taken(analogy: Analogy) -> None:
    """State 1 of three is never entered: its pairs stand alone, all other claims stay."""
    to = np.array([0, 1, 0])[:, None, None] * np.ones((1, 2, 2), dtype=int)
    to[0, :, 1] = 2
    none = np.zeros((3, 2, 2), dtype=bool)
    outcomes = Outcomes(to, ~none, np.arange(2) * np.ones((3, 2, 1)), none, none)
    if analogy is FORMS[3] or analogy is FORMS[4]:  # six states of one action: the second half hangs on the first
        to = np.array([0, 1, 0, 4, 0, 0])[:, None, None] * np.ones((1, 1, 2), dtype=int)
        to[0, :, 1], to[2, :, 1], to[4, :, 1] = 2, 4, 5
        none = np.zeros((6, 1, 2), dtype=bool)
        outcomes = Outcomes(to, ~none, np.arange(2) * np.ones((6, 1, 1)), none, none)
    taken = outcomes.nonterminal.ravel()
    assert not taken.all()

    def claims(of: Analogy) -> set[tuple[int, int]]:
        return {(x, int(y)) for x in range(6) for y in of.members(int(of.pool_of[x]))}

    fitted = analogy.on(outcomes)
    assert claims(fitted) == {(x, y) for x, y in claims(analogy) if x == y or (taken[x] and taken[y])}
    assert claims(fitted.on(outcomes)) == claims(fitted)
    assert fitted.n_pools(outcomes) == np.unique(analogy.pool_of[taken]).size


def test_unions_cover_only_pools_that_somebody_may_read() -> None:
    """Pairs that do not exist or are never come to need no proof."""
    mdp, outcomes, _ = islands()
    floor = 109  # cells that are neither lava nor goal
    assert Analogy.none().on(outcomes).n_pools(outcomes) == 8 * floor
    kinds = np.where(outcomes.valid, np.arange(8), 99)
    assert Analogy.classes(kinds).n_pools(outcomes) == 8
    assert mdp.n_states * 8 > 8 * floor


def test_only_distances_below_twice_tau_are_usable() -> None:
    analogy = Analogy.sparse(EXAMPLE)
    assert analogy.usable(0.3).members(4).tolist() == [4]  # 0.6 is not below 0.6
    assert analogy.usable(0.31).members(4).tolist() == [4, 5]
    assert analogy.usable(0.31).distances(4).tolist() == [0.0, 0.6]
    assert analogy.usable(0.31, max_distance=0.2).members(4).tolist() == [4]
    assert analogy.usable(0.31, max_distance=0.2).members(1).tolist() == [0, 1, 2]  # at most is allowed to be equal
    assert analogy.usable(0.01).members(1).tolist() == [1, 2]  # exact ones always are
    assert analogy.usable(1e-12).members(1).tolist() == [1, 2]
    rounded = Analogy.sparse(matrix({(0, 1): 2 * 0.1 - 1e-12, (1, 0): 2 * 0.1 - 1e-12}, 2))
    assert rounded.usable(0.1).members(0).tolist() == [0]  # too close to 2 tau to tell on which side the truth is
    for exact in FORMS[:6]:
        assert exact.usable(0.01).members(0).tolist() == exact.members(0).tolist()


def test_closer_than_twice_tau_means_one_support() -> None:
    """The reason for the rule: two rows of probabilities at least tau with different supports are 2 tau apart, by random search."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rows = []
        for _ in range(2):
            support = rng.permutation(4)[: rng.integers(1, 4)]
            rows.append(np.zeros(4))
            rows[-1][support] = 0.2 + (1 - 0.2 * len(support)) * rng.dirichlet(np.ones(len(support)))
        if ((rows[0] > 0) != (rows[1] > 0)).any():
            assert np.abs(rows[0] - rows[1]).sum() >= 0.4 - 1e-12


def test_total_variation_is_half_of_l1() -> None:
    halved = EXAMPLE.copy()
    halved.data = halved.data / 2
    analogy = Analogy.from_tv(halved)
    assert analogy.distances(4).tolist() == [0.0, 0.6]
    assert halved.data.max() == 0.3  # what was given is left alone


def test_functions_are_asked_about_pairs_that_exist_and_give_the_same_as_a_matrix() -> None:
    _, outcomes = random_world(3)
    exists = set(map(tuple, np.argwhere(outcomes.valid).tolist()))
    assert len(exists) < 10

    def distance(s: int, a: int, s2: int, a2: int) -> float | None:
        assert {(s, a), (s2, a2)} <= exists
        return None if a != a2 else 0.1 * abs(s - s2)

    analogy = Analogy.from_functions(distance, outcomes)
    for s, a in exists:
        members = sorted(2 * s2 + a2 for s2, a2 in exists if a2 == a)
        assert analogy.members(2 * s + a).tolist() == members
        np.testing.assert_allclose(analogy.distances(2 * s + a), [0.1 * abs(s - x // 2) for x in members])
    everything = matrix({(2 * s + a, 2 * t + b): 0.1 * abs(s - t) for s, a in exists for t, b in exists if a == b}, 10)
    for x in range(10):
        assert Analogy.sparse(everything).members(x).tolist() == analogy.members(x).tolist()
    nobody = Analogy.from_functions(lambda *_: None, outcomes)
    assert [nobody.members(x).tolist() for x in range(10)] == [[x] for x in range(10)]


def test_a_draw_counts_for_the_slot_that_answers_it() -> None:
    """Pair 1's slots are pair 0's turned by one: slot k of 0 is slot k + 1 of 1."""
    turn = np.array([1, 2, 0])
    entries = {(1, 0): 0.0, (0, 1): 0.0}
    analogy = Analogy.sparse(matrix(entries, 4).tocoo(), permutation=np.stack([turn, np.argsort(turn)]))
    assert [analogy.align(0, 1, k) for k in range(3)] == [1, 2, 0]
    assert [analogy.align(1, 0, k) for k in range(3)] == [2, 0, 1]
    assert [analogy.align(3, 3, k) for k in range(3)] == [0, 1, 2]
    assert analogy.aligned(0, np.array([[1, 2, 3], [5, 6, 7]])).tolist() == [[1, 2, 3], [6, 7, 5]]
    assert Analogy.classes([[0], [0]]).aligned(0, np.array([[1, 2, 3], [5, 6, 7]])).tolist() == [[1, 2, 3], [5, 6, 7]]
    outcomes = world(4, 1, 3)
    same = Analogy.from_functions(
        lambda s, _, s2, __: 0.0 if {s, s2} <= {0, 1} else None,
        outcomes,
        lambda s, _, s2, __: np.roll(np.arange(3), s - s2),
    )
    assert [same.align(0, 1, k) for k in range(3)] == [1, 2, 0]
    assert [same.usable(0.1).align(1, 0, k) for k in range(3)] == [2, 0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Analogy.sparse(matrix({(0, 1): 0.2, (1, 0): 0.3}, 2)), "must be symmetric, got 0.2 between pairs 0 and 1"),
        (lambda: Analogy.sparse(matrix({(0, 1): 0.2}, 2)), "must be symmetric, got .* between pairs"),
        (lambda: Analogy.sparse(matrix({(0, 1): 2.1, (1, 0): 2.1}, 2)), r"must lie in \[0, 2\], got 2.1 between pairs 0 and 1"),
        (lambda: Analogy.sparse(matrix({(0, 1): -0.1, (1, 0): -0.1}, 2)), r"must lie in \[0, 2\], got -0.1"),
        (lambda: Analogy.sparse(matrix({(0, 1): np.nan, (1, 0): np.nan}, 2)), r"must lie in \[0, 2\], got nan"),
        (lambda: Analogy.sparse(matrix({(1, 1): 0.5}, 2)), "must be 0 on the diagonal, got 0.5 between pairs 1 and 1"),
        (lambda: Analogy.sparse(csr_array((2, 3))), "distances must be a square sparse matrix"),
        (lambda: Analogy.sparse(np.zeros((2, 2))), "distances must be a square sparse matrix .*, got ndarray"),
        (lambda: Analogy.sparse(EXAMPLE, np.zeros((7, 3), dtype=int)), "permutation must hold a permutation of the slots"),
        (lambda: Analogy.sparse(EXAMPLE, np.arange(3)[None]), "permutation must hold a permutation of the slots for each of 7 entries"),
        (lambda: Analogy.sparse(EXAMPLE, np.tile([1, 2, 0], (7, 1))), "permutation must be undone by that of the mirrored entry"),
        (lambda: Analogy.sparse(matrix({(0, 0): 0.0}, 1), np.array([[1, 0]])), "do nothing on the diagonal.*between pairs 0 and 0"),
        (lambda: Analogy.classes([0, 1]), "class_id must be integers of shape"),
        (lambda: Analogy.classes([[0.5]]), "class_id must be integers"),
        (lambda: Analogy.box((2, 2), 1, 1, terrain=np.zeros(3, dtype=int)), r"terrain must be integers of shape \(4,\) or \(4, 1\)"),
        (lambda: Analogy.box((2, 2), 1, 1, terrain=np.zeros(4)), "terrain must be integers"),
        (lambda: Analogy.box((0, 2), 1, 1), "shape must be an integer >= 1"),
        (lambda: Analogy.box((2, 2), 1, -1), "radius must be an integer >= 0"),
        (lambda: Analogy.none().pool_of, r"analogy must be fitted to an MDP first: analogy.on\(outcomes\)"),
        (lambda: Analogy.box((2, 2), 1, 1).on(world(3, 1)), "analogy must relate 3 pairs of state and action, got 4"),
        (lambda: FORMS[0].usable(0.0), r"tau must be in \(0, 1\], got 0.0"),
        (lambda: FORMS[0].usable(1.5), r"tau must be in \(0, 1\], got 1.5"),
        (lambda: FORMS[0].usable(0.1, 3), r"max_distance must be in \[0, 2\], got 3"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_entry_that_is_named_twice_is_refused() -> None:
    twice = coo_array((np.zeros(4), (np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))), shape=(2, 2))
    with pytest.raises(ValueError, match="must name two pairs once, got 0.0 between pairs 0 and 1"):
        Analogy.sparse(twice)


def test_two_maps_of_one_size_share_nothing() -> None:
    one = Analogy.box((2, 2), 1, 1)
    other = Analogy.box((2, 2), 1, 1, terrain=np.arange(4))
    assert one.members(0).tolist() == [0, 1, 2, 3]
    assert other.members(0).tolist() == [0]


def test_slots_stay_with_their_claims_when_others_are_dropped() -> None:
    turn = np.array([1, 2, 0])
    swap = np.array([1, 0, 2])
    entries = {(0, 1): 1.0, (1, 0): 1.0, (0, 2): 0.0, (2, 0): 0.0}
    slots = np.stack([swap, swap, turn, np.argsort(turn)])
    coo = coo_array((list(entries.values()), tuple(zip(*entries, strict=True))), shape=(3, 3))
    analogy = Analogy.sparse(coo, slots)
    for some in (analogy, analogy.usable(0.3)):
        assert [some.align(0, 2, k) for k in range(3)] == [1, 2, 0]
        assert [some.align(2, 0, k) for k in range(3)] == [2, 0, 1]
    assert analogy.align(0, 1, 0) == 1
