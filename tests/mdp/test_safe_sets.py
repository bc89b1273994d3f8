"""Safe sets against exhaustive search over all sets, on random MDPs; oracles against published values and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from worlds import islands, nearby, random_world

from robustrl.mdp import (
    Analogy,
    Beliefs,
    Outcomes,
    TabularMDP,
    Unsafe,
    closed_subset,
    expand,
    leaks,
    learnable_oracle,
    optimise,
    safe_oracle,
    validate_analogy,
    validate_safe_set,
)

Pair = tuple[int, int]


class Graph:
    """Sets of states as bits of an integer: bit s is state s, bit S a safe end of the episode."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes, self.ended = outcomes, 1 << outcomes.n_states

    def ends(self, pair: Pair, support: np.ndarray) -> int:
        """Where a pair may lead."""
        known, found = self.outcomes, 0
        for k in np.flatnonzero(support[pair]):
            found |= self.ended if known.terminal[pair][k] else 1 << int(known.successors[pair][k])
        return found

    def harmless(self, pairs: np.ndarray, support: np.ndarray) -> list[Pair]:
        """Pairs with an outcome and without a dangerous one: all others belong to no safe set."""
        return [
            pair
            for pair in sorted(as_set(pairs))
            if support[pair].any() and not (support[pair] & self.outcomes.dangerous[pair]).any()
        ]

    def union_of(
        self, pairs: list[Pair], possible: np.ndarray, sure: np.ndarray, home: int, sources: int | None, targets: int
    ) -> set[Pair]:
        """The union of all sets of pairs that satisfy the definition, by trying every one.

        All possible outcomes are in states of the set or `home`; its states are reached from `sources` (unless None) and its pairs lead to
        `targets`, by sure outcomes of the set.
        """
        may, does = ({pair: self.ends(pair, support) for pair in pairs} for support in (possible, sure))
        best: set[Pair] = set()
        for some in itertools.chain.from_iterable(itertools.combinations(pairs, n) for n in range(1, len(pairs) + 1)):
            states = home | self.ended
            for s, _ in some:
                states |= 1 << s
            if any(may[pair] & ~states for pair in some) or best.issuperset(some):
                continue
            reached, back = sources or 0, targets | self.ended
            for _ in range(len(some) + 1):
                for pair in some:
                    reached |= does[pair] if reached >> pair[0] & 1 else 0
                    back |= 1 << pair[0] if does[pair] & back else 0
            if all(does[pair] & back and (sources is None or reached >> pair[0] & 1) for pair in some):
                best.update(some)
        return best


def as_set(pairs: np.ndarray) -> set[Pair]:
    return {(int(s), int(a)) for s, a in np.argwhere(pairs)}


def bits(states: np.ndarray) -> int:
    return sum(1 << int(s) for s in np.flatnonzero(states))


def question(seed: int) -> tuple[Outcomes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A world with a safe set that is closed, pairs that are known, and what is possible and sure there."""
    rng = np.random.default_rng(seed + 10_000)
    mdp, outcomes = random_world(seed)
    support = (mdp.probabilities > 0) & outcomes.valid[..., None]
    safe = closed_subset(outcomes, outcomes.valid & (rng.random(outcomes.valid.shape) < 0.7), support)
    known = outcomes.valid & (rng.random(outcomes.valid.shape) < 0.9)
    possible = support | (outcomes.candidates & (rng.random(support.shape) < 0.1))
    sure = support & (rng.random(support.shape) < 0.8) if seed % 2 else possible
    return outcomes, safe, known, possible, sure


def test_the_extension_is_the_union_of_all_sets_that_extend_the_safe_set() -> None:
    """Exhaustive search on 300 random MDPs of 5 states and 2 actions, half of them with possible other than sure."""
    grew = differed = 0
    for seed in range(300):
        outcomes, safe, known, possible, sure = question(seed)
        if not safe.any():
            safe[0] = outcomes.valid[0]  # its outcomes need not be closed: the safe set is taken as it is
        graph, home = Graph(outcomes), bits(safe.any(1))
        best = graph.union_of(graph.harmless(known & ~safe, possible), possible, sure, home, home, home)
        found = expand(outcomes, safe, known, possible, sure)
        assert as_set(found) == as_set(safe) | best, seed
        grew += bool(best)
        differed += (found != expand(outcomes, safe, known, possible)).any()
        if possible is sure:
            assert (found == expand(outcomes, safe, known, possible, None)).all()
    assert grew > 100
    assert differed > 10


def test_the_closed_part_is_the_union_of_all_closed_sets_with_a_way_back() -> None:
    kept = lost = 0
    for seed in range(200):
        mdp, outcomes = random_world(seed)
        support = (mdp.probabilities > 0) & outcomes.valid[..., None]
        given = outcomes.valid & (np.random.default_rng(seed).random(outcomes.valid.shape) < 0.9)
        graph = Graph(outcomes)
        best = graph.union_of(graph.harmless(given, support), support, support, 0, None, 1)
        best = best if any(s == 0 for s, _ in best) else set()
        assert as_set(closed_subset(outcomes, given, support)) == best, seed
        kept, lost = kept + bool(best), lost + (len(best) < given.sum())
    assert kept > 50
    assert lost > 50


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_more_knowledge_never_shrinks_the_set_and_asking_twice_adds_nothing(seed: int) -> None:
    outcomes, safe, known, possible, _ = question(seed)
    found = expand(outcomes, safe, known, possible)
    assert (found >= safe).all()
    assert (expand(outcomes, found, known, possible) == found).all()
    less = known & (np.random.default_rng(seed).random(known.shape) < 0.5)
    assert (expand(outcomes, safe, less, possible) <= found).all()
    assert (expand(outcomes, expand(outcomes, safe, less, possible), known, possible) == found).all()


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_names_of_states_and_actions_do_not_matter(seed: int) -> None:
    outcomes, safe, known, possible, sure = question(seed + 1)
    rng = np.random.default_rng(seed)
    states, actions = rng.permutation(5), rng.permutation(2)
    renamed = np.argsort(states)

    def moved(array: np.ndarray) -> np.ndarray:
        return array[states][:, actions]

    other = Outcomes(
        renamed[moved(outcomes.successors)], *map(moved, (outcomes.candidates, outcomes.rewards, outcomes.dangerous, outcomes.terminal)),
        outcomes.gamma, np.asarray(outcomes.start)[states],
    )  # fmt: skip
    found = expand(other, *map(moved, (safe, known, possible, sure)))
    assert (found == moved(expand(outcomes, safe, known, possible, sure))).all()


def line(terminal_end: bool, danger: int | None = None, n: int = 4) -> tuple[TabularMDP, Outcomes]:
    """States 0 to n - 1; action 0 goes left (stays at 0), action 1 right with 1/2, else stays; the last state only stays.

    With `terminal_end`, entering the last state ends the episode.
    """
    successors = np.zeros((n, 2, 2), dtype=np.int64)
    p = np.zeros((n, 2, 2))
    for s in range(n - 1):
        successors[s, 0, 0], successors[s, 1] = max(s - 1, 0), (s + 1, s)
        p[s, 0, 0], p[s, 1] = 1, 0.5
    successors[n - 1, :, 0], p[n - 1, :, 0] = n - 1, 1
    terminal = (successors == n - 1) & (p > 0) & terminal_end
    mdp = TabularMDP(successors, p, np.zeros((n, 2, 2)), terminal, 0.9)
    return mdp, mdp.outcomes(None if danger is None else Unsafe.states([danger]))


def test_a_place_without_return_is_not_safe_unless_the_episode_ends_there() -> None:
    for ends in (False, True):
        mdp, outcomes = line(ends)
        home = np.array([[True, False]] + 3 * [[False, False]])
        found = safe_oracle(mdp, outcomes, home)
        assert found.tolist() == [[True, True], [True, True], [True, ends], [False, False]]


def test_a_danger_that_ends_the_episode_is_no_way_out() -> None:
    mdp, outcomes = line(True, danger=3)
    home = np.array([[True, False]] + 3 * [[False, False]])
    assert safe_oracle(mdp, outcomes, home).tolist() == [[True, True], [True, True], [True, False], [False, False]]


def test_a_return_that_was_only_seen_elsewhere_is_not_believed() -> None:
    """The way back from state 1 is possible but not sure: trap of analogues at a distance."""
    mdp, outcomes = line(False, n=3)
    home = np.array([[True, False], [False, False], [False, False]])
    possible = mdp.probabilities > 0
    sure = possible.copy()
    assert expand(outcomes, home, outcomes.valid, possible, sure)[1].tolist() == [True, False]
    sure[1, 0] = False
    assert not expand(outcomes, home, outcomes.valid, possible, sure)[1].any()


def test_a_known_pair_without_a_possible_outcome_proves_nothing() -> None:
    mdp, outcomes = line(False, n=3)
    home = np.array([[True, True], [False, False], [False, False]])
    possible = (mdp.probabilities > 0) & (np.arange(3) != 1)[:, None, None]
    assert (expand(outcomes, home, outcomes.valid, possible) == home).all()


TOYS = [  # closed danger-free pairs, states, value inside, value without the constraint: from the tables of gymnasium 1.4.0
    ("FrozenLake-v1", {"map_name": "4x4"}, 4, 4, 0.0, 0.180472),
    ("FrozenLake-v1", {"map_name": "8x8"}, 57, 27, 0.028441, 0.048250),
    ("CliffWalking-v1", {}, 149, 47, -9.733158, -9.733158),
    ("CliffWalkingSlippery-v1", {}, 115, 37, -18.756831, -18.756831),
]


@pytest.mark.parametrize(("name", "options", "n_pairs", "n_states", "inside", "free"), TOYS)
def test_toy_text_has_the_known_safe_sets_and_values(
    name: str, options: dict[str, Any], n_pairs: int, n_states: int, inside: float, free: float
) -> None:
    unsafe = Unsafe.when(lambda s, a, t, r, end: end and r == 0) if "Lake" in name else Unsafe.reward_below(-50)
    mdp = TabularMDP.from_gymnasium(gym.make(name, **options), 0.95)
    outcomes = mdp.outcomes(unsafe)
    safe = closed_subset(outcomes, outcomes.valid, mdp.probabilities > 0)
    assert (safe.sum(), safe.any(1).sum()) == (n_pairs, n_states)
    exact = Beliefs(outcomes, mdp.probabilities, np.zeros(safe.shape), outcomes.candidates)
    assert mdp.value(optimise(exact, allowed=safe, tolerance=1e-9).values) == pytest.approx(inside, abs=6e-7)
    assert mdp.value(mdp.solve()[0]) == pytest.approx(free, abs=6e-7)
    if name == "FrozenLake-v1":
        assert mdp.smallest_probability == pytest.approx(1 / 3)


def test_taxi_stays_legal_without_loss() -> None:
    """Illegal pick-ups and drop-offs cost 10 and are never useful: the constraint costs nothing, by brute force of both optima."""
    mdp = TabularMDP.from_gymnasium(gym.make("Taxi-v4"), 0.95)
    outcomes = mdp.outcomes(Unsafe.reward_below(-5))
    safe = closed_subset(outcomes, outcomes.valid, mdp.probabilities > 0)
    assert mdp.rewards.shape == (500, 6, 1)
    exact = Beliefs(outcomes, mdp.probabilities, np.zeros(safe.shape), outcomes.candidates)
    plan = optimise(exact, allowed=safe, tolerance=1e-9)
    assert mdp.value(plan.values) == pytest.approx(mdp.value(mdp.solve()[0]), abs=1e-6)
    assert not outcomes.dangerous[safe].any()
    # Legal pairs: 4 moves everywhere, a pick-up or drop-off at right places; moves alone lead nowhere dangerous but need an end.
    assert safe[:, :4].sum() == 2000


def test_two_islands_have_the_known_sets_and_optimum() -> None:
    mdp, outcomes, home = islands()
    assert home.sum() == 204
    best, learnable = safe_oracle(mdp, outcomes, home), learnable_oracle(mdp, outcomes, home, nearby(), 0.3)
    assert best.sum() == 490
    assert (best == learnable).all()
    exact = Beliefs(outcomes, np.where(outcomes.candidates, mdp.probabilities, 0), np.zeros(best.shape), outcomes.candidates)
    # The reference pays the goal one step after it is entered, hence one discount more.
    assert 0.9 * mdp.value(optimise(exact, allowed=best, tolerance=1e-9).values) == pytest.approx(0.412067, abs=6e-7)
    assert validate_analogy(mdp, outcomes, nearby()).holds
    assert nearby().n_pools(outcomes) == 872  # what 31 draws per pool at tau = 0.3 cover


def test_without_analogues_nothing_beyond_the_safe_set_is_learnable() -> None:
    mdp, outcomes, home = islands()
    assert (learnable_oracle(mdp, outcomes, home, Analogy.none(), 0.3) == home).all()


def test_what_is_learnt_opens_what_can_be_learnt_next() -> None:
    """Analogues in a chain: state 1's action 1 teaches state 2's, which teaches state 3's."""
    mdp, outcomes = line(False, n=6)
    home = np.array([[True, True]] + 5 * [[False, False]])
    home[1, 0] = True
    every = Analogy.classes(np.where(np.arange(6)[:, None] == 5, 9, [[0, 1]]) * np.ones((6, 1), dtype=int))
    assert learnable_oracle(mdp, outcomes, home, every, 0.5)[:4].all()
    near = Analogy.box((1, 6), 2, 1)
    assert (learnable_oracle(mdp, outcomes, home, near, 0.5) == safe_oracle(mdp, outcomes, home)).all()


def test_only_pairs_that_the_safe_set_leads_to_teach() -> None:
    """State 3 belongs to the first safe set, but nothing leads there: its draws, which would teach (1, 1), are never made."""
    to = np.array([[[0, 1]] * 2, [[0, 1], [2, 1]], [[2, 2]] * 2, [[0, 0]] * 2])
    p = np.array([0.7, 0.3]) * np.ones((4, 2, 1))
    p[1, 1], p[3, 1] = [0.4, 0.6], [0.4, 0.6]
    rewards, none = np.arange(2) * np.ones((4, 2, 1)), np.zeros((4, 2, 2), dtype=bool)
    ends = none.copy()
    ends[2] = True
    mdp, outcomes = TabularMDP(to, p, rewards, ends, 0.9), Outcomes(to.astype(np.int32), ~none, rewards, none, ends, 0.9)
    home = np.array([[True, True], [True, False], [False, False], [True, True]])
    alike = Analogy.classes([[0, 0], [0, 1], [0, 0], [0, 1]])
    everything = safe_oracle(mdp, outcomes, home)
    assert everything.all()
    assert (learnable_oracle(mdp, outcomes, home, alike, 0.3) == home).all()
    entered = to.copy()
    entered[0, 1, 1] = 3
    mdp = TabularMDP(entered, p, rewards, ends, 0.9)
    outcomes = Outcomes(entered.astype(np.int32), ~none, rewards, none, ends, 0.9)
    assert learnable_oracle(mdp, outcomes, home, alike, 0.3).all()


def test_only_analogues_closer_than_twice_the_smallest_probability_teach() -> None:
    mdp, outcomes = line(False, n=6)
    home = np.zeros((6, 2), dtype=bool)
    home[0], home[1, 0] = True, True
    apart = Analogy.from_functions(lambda s, a, s2, a2: (0.0 if s == s2 else 0.6) if a == a2 else None, outcomes)
    assert learnable_oracle(mdp, outcomes, home, apart, 0.31).sum() == safe_oracle(mdp, outcomes, home).sum() > home.sum()
    assert (learnable_oracle(mdp, outcomes, home, apart, 0.3) == home).all()


def test_a_declared_square_with_a_corner_that_has_no_safe_action_is_shrunk_or_refused() -> None:
    mdp, outcomes, _ = islands()
    declared = outcomes.valid.copy()
    with pytest.raises(
        ValueError, match=r"danger-free, closed.* but state \d+, action \d: may be dangerous: leads to state \d+"
    ):
        validate_safe_set(mdp, outcomes, declared, on_invalid="raise")
    with pytest.warns(UserWarning, match=rf"shrunk from {declared.sum()} pairs to \d+: state .*; and \d+ more"):
        found = validate_safe_set(mdp, outcomes, declared)
    assert (found == closed_subset(outcomes, declared, mdp.probabilities > 0)).all()
    assert (validate_safe_set(mdp, outcomes, found, on_invalid="raise") == found).all()


def test_a_set_that_cannot_contain_the_start_is_refused_either_way() -> None:
    mdp, outcomes = line(False)
    for pairs in (np.zeros((4, 2), dtype=bool), np.array([[False, False], [True, False], [True, True], [False, False]])):
        for on_invalid in ("shrink", "raise"):
            with pytest.raises(ValueError, match="state 0: an episode may start here, but no pair of the set is safe here"):
                validate_safe_set(mdp, outcomes, pairs, on_invalid)
    with pytest.raises(ValueError, match="on_invalid must be one of 'shrink', 'raise'"):
        validate_safe_set(mdp, outcomes, outcomes.valid, "ignore")


def test_every_pair_that_is_lost_has_a_reason() -> None:
    mdp, outcomes = line(False, danger=2, n=5)
    found = {(leak.state, leak.action): leak.why for leak in leaks(outcomes, outcomes.valid, mdp.probabilities > 0)}
    assert found == {
        (1, 1): "may be dangerous: leads to state 2",
        (2, 1): "may be dangerous: leads to state 2",
        (3, 0): "may be dangerous: leads to state 2",
        (3, 1): "no way back to a start or a safe end of the episode",
        (4, 0): "no way back to a start or a safe end of the episode",
        (4, 1): "no way back to a start or a safe end of the episode",
    }
    some = outcomes.valid & (np.arange(5) < 2)[:, None]
    mdp, outcomes = line(False, n=5)
    assert [str(leak) for leak in leaks(outcomes, some, mdp.probabilities > 0)] == [
        "state 1, action 1: may lead to state 2, which owns no pair of the set"
    ]
    some[2, 1] = True
    assert "state 1, action 1: may lead to state 2, where no pair of the set is safe" in map(
        str, leaks(outcomes, some, mdp.probabilities > 0)
    )
    assert (
        str(leaks(outcomes, outcomes.valid, np.zeros((5, 2, 2), dtype=bool))[-1]) == "state 4, action 1: no outcome is possible"
    )


def test_every_reason_is_about_a_pair_outside_the_closed_part() -> None:
    for seed in range(50):
        mdp, outcomes = random_world(seed)
        support = (mdp.probabilities > 0) & outcomes.valid[..., None]
        found = leaks(outcomes, outcomes.valid, support)
        kept = closed_subset(outcomes, outcomes.valid, support)
        stranded = [leak for leak in found if leak.action is None]
        assert bool(stranded) == (not kept.any())
        if not stranded:
            assert {(leak.state, leak.action) for leak in found} == as_set(outcomes.valid & ~kept)


def test_a_false_analogy_is_found_with_the_pair_that_is_worst() -> None:
    """Near a wall a move stays: a box without terrain claims what is false there."""
    mdp, outcomes = line(False, n=6)
    slots = np.zeros((6, 2, 3))  # displacement -1, 0, 1
    slots[:, 0, 0], slots[0, 0] = 1, [0, 1, 0]
    slots[:, 1] = [0, 0.5, 0.5]
    slots[5] = [[1, 0, 0], [0, 1, 0]]
    successors = np.clip(np.arange(6)[:, None, None] + np.arange(-1, 2), 0, 5) * np.ones((1, 2, 1), dtype=int)
    mdp = TabularMDP(successors, slots, np.zeros((6, 2, 3)), gamma=0.9)
    outcomes = mdp.outcomes()
    found = validate_analogy(mdp, outcomes, Analogy.box((1, 6), 2, 2))
    assert (found.worst_excess, found.pair, found.analogue) == (2.0, (0, 0), (1, 0))
    assert not found.holds
    honest = Analogy.box((1, 6), 2, 2, terrain=np.array([1, 0, 0, 0, 0, 2]))
    assert validate_analogy(mdp, outcomes, honest).holds
    by_action = np.array([[1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1]])
    assert validate_analogy(mdp, outcomes, Analogy.box((1, 6), 2, 5, terrain=by_action)).holds
    assert validate_analogy(mdp, outcomes, Analogy.none()) == (0.0, None, None)
    assert validate_analogy(mdp, outcomes, Analogy.classes(np.arange(12).reshape(6, 2) % 2)).worst_excess == 2.0


def test_a_class_whose_first_pair_is_never_taken_is_checked_all_the_same() -> None:
    """State 0 is never entered; the two others share a class, and their probabilities are 1.6 apart."""
    to = np.array([[[1, 2]], [[1, 2]], [[2, 1]]])
    p = np.array([[[0.5, 0.5]], [[0.9, 0.1]], [[0.1, 0.9]]])
    start = np.array([0.0, 1.0, 0.0])
    mdp = TabularMDP(to, p, np.zeros((3, 1, 2)), gamma=0.9, start=start)
    none = np.zeros((3, 1, 2), dtype=bool)
    outcomes = Outcomes(to.astype(np.int32), ~none, np.zeros((3, 1, 2)), none, none, 0.9, start)
    found = validate_analogy(mdp, outcomes, Analogy.classes([[0], [0], [0]]))
    assert found.worst_excess == pytest.approx(1.6)
    assert (found.pair, found.analogue) == ((2, 0), (1, 0))
    assert validate_analogy(mdp, outcomes, Analogy.classes([[0], [1], [0]])).pair is None


def test_the_excess_is_what_a_brute_force_over_all_related_pairs_finds() -> None:
    for seed in range(20):
        mdp, outcomes = random_world(seed)
        rng = np.random.default_rng(seed)
        claims = rng.random((10, 10)).round(2) * (1 - np.eye(10))
        claims = np.triu(claims) + np.triu(claims).T
        made = rng.random((10, 10)) < 0.6
        made = np.triu(made) | np.triu(made).T
        shuffled = rng.permutation(3)
        analogy = Analogy.from_functions(
            lambda s, a, s2, a2, c=claims, m=made: c[2 * s + a, 2 * s2 + a2] if m[2 * s + a, 2 * s2 + a2] else None,
            outcomes,
            lambda s, a, s2, a2, k=shuffled: np.arange(3) if (s, a) == (s2, a2) else k if (s, a) < (s2, a2) else np.argsort(k),
        )
        taken = as_set(outcomes.nonterminal)
        worst = max(
            (
                np.abs(mdp.probabilities[x] - mdp.probabilities[y][shuffled]).sum() - claims[2 * x[0] + x[1], 2 * y[0] + y[1]]
                for x, y in itertools.combinations(sorted(taken), 2)
                if made[2 * x[0] + x[1], 2 * y[0] + y[1]]
            ),
            default=0.0,
        )
        assert validate_analogy(mdp, outcomes, analogy).worst_excess == pytest.approx(worst, abs=1e-12)


def test_claims_that_are_too_modest_leave_a_margin() -> None:
    mdp, outcomes = line(False, n=4)
    modest = Analogy.from_functions(lambda s, a, s2, a2: None if a != a2 else 0.0 if s == s2 else 1.0 if a else 0.5, outcomes)
    assert (
        validate_analogy(mdp, outcomes, modest).worst_excess == 0.0
    )  # state 3 only stays: action 1 is 1 away from that of others, as claimed
    wider = Analogy.from_functions(lambda s, a, s2, a2: None if a != a2 else 0.0 if s == s2 else 1.5 if a else 0.5, outcomes)
    assert validate_analogy(mdp, outcomes, wider).worst_excess == -0.5
    assert validate_analogy(mdp, outcomes, wider).holds


def test_the_worst_claim_may_be_far_or_near() -> None:
    """Three cells whose only action works with probability 1, 0.8, 0.2: distances 0.4 and 1.2 next door, 1.6 two cells away."""
    for works, worst, pair in (([1.0, 0.8, 0.2], 1.6, (0, 2)), ([1.0, 0.0, 1.0], 2.0, (0, 1))):
        p = np.array([[[w, 1 - w]] for w in works])
        to = (np.arange(3)[:, None, None] + np.array([1, 0])) % 3
        mdp = TabularMDP(to, p, np.zeros((3, 1, 2)), gamma=0.9, start=np.full(3, 1 / 3))
        everything = np.ones((3, 1, 2), dtype=bool)
        outcomes = Outcomes(to, everything, np.zeros((3, 1, 2)), ~everything, ~everything, 0.9, np.full(3, 1 / 3))
        found = validate_analogy(mdp, outcomes, Analogy.box((1, 3), 1, 2))
        assert found.worst_excess == pytest.approx(worst)
        assert ((found.pair or (0,))[0], (found.analogue or (0,))[0]) == pair


def test_a_model_that_contradicts_what_is_declared_is_refused() -> None:
    mdp, outcomes = line(False)
    other = TabularMDP(mdp.successors, mdp.probabilities, mdp.rewards + 1, mdp.terminal, 0.9)
    with pytest.raises(ValueError, match="mdp must agree with outcomes, slot 0 of state 0, action 0 is another one"):
        safe_oracle(other, outcomes, outcomes.valid)
    with pytest.raises(ValueError, match=r"mdp must have the slots of outcomes, \(4, 2, 2\), got \(5, 2, 2\)"):
        safe_oracle(line(False, n=5)[0], outcomes, outcomes.valid)


def test_sets_of_wrong_shape_or_of_pairs_that_do_not_exist_are_refused() -> None:
    mdp, outcomes = line(True)
    possible = (mdp.probabilities > 0) & outcomes.valid[..., None]
    for name, arguments in {
        "safe": (np.ones((4, 2)), outcomes.valid, possible),
        "known": (outcomes.valid, np.ones((4, 2), dtype=bool), possible),
        "possible": (outcomes.valid, outcomes.valid, outcomes.valid),
        "sure": (outcomes.valid, outcomes.valid, possible, np.ones((4, 2, 2), dtype=bool)),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must"):
            expand(outcomes, *arguments)
