"""Counts and what they prove: pools, supports, laws, and contradictions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import binom

from agents.ase.small import STAYS, World, hidden_danger, late_proof, random_world, world
from robustrl.agents.ase.knowledge import Knowledge
from robustrl.certify.transitions import l1_radius, support_samples
from robustrl.mdp import Analogy, ModelViolation


def knowledge(of: World, **more: object) -> Knowledge:
    return Knowledge(of.outcomes, of.analogy, of.tau, 0.025, 0.025, **more)  # type: ignore[arg-type]


def feed(found: Knowledge, of: World, n: int, seed: int = 0, pairs: list[tuple[int, int]] | None = None) -> None:
    rng = np.random.default_rng(seed)
    choices = [tuple(pair) for pair in np.argwhere(of.outcomes.valid)] if pairs is None else pairs
    for _ in range(n):
        s, a = choices[rng.integers(len(choices))]
        found.record(int(s), int(a), int(rng.choice(of.outcomes.n_slots, p=of.truth.probabilities[s, a])))


def test_pools_count_the_draws_of_all_analogues_and_no_others() -> None:
    of = random_world(3)
    found = knowledge(of)
    feed(found, of, 300)
    for pair in np.flatnonzero(of.outcomes.valid.ravel()):
        expected = found.visits[found.analogy.members(int(pair))].sum(0)
        assert found.counts[pair].tolist() == expected.tolist()
        assert found.totals[pair] == expected.sum()


def test_classes_read_one_pool() -> None:
    of = random_world(3)
    label = np.where(of.truth.probabilities[..., 2] > 0, 1, 0)
    of.analogy = Analogy.classes(label)
    found = knowledge(of)
    assert found.n_pools == 2
    feed(found, of, 100)
    visits = found.visits.reshape(*label.shape, -1)
    laws = found.beliefs().estimates
    for kind in (0, 1):
        share = visits[label == kind].sum(0) / visits[label == kind].sum()
        np.testing.assert_allclose(
            laws[(label == kind) & of.outcomes.valid], np.broadcast_to(share, laws[(label == kind) & of.outcomes.valid].shape)
        )


def test_a_pair_is_known_at_the_last_draw_that_the_proof_needs_and_not_before() -> None:
    of = late_proof()
    found = knowledge(of)
    assert found.n_support == support_samples(of.tau, 0.025, found.n_pools)
    for i in range(found.n_support):
        assert not found.known_pairs.any()
        learnt = found.record(1, 1, i % 2)
    assert found.known_pairs[1, 1]
    assert found.known_pairs[0, 2]  # its analogue
    assert not found.known_pairs[0, 1]
    assert sorted(learnt.tolist()) == [2, 4]
    assert found.possible[0, 2].tolist() == [True, True]


def test_what_a_known_pair_has_not_shown_is_impossible_from_then_on_and_a_contradiction_later() -> None:
    of = late_proof()
    found = knowledge(of)
    for _ in range(found.n_support):
        found.record(1, 1, 0)
    assert found.possible[1, 1].tolist() == [True, False]
    before = found.counts.copy()
    with pytest.raises(ModelViolation, match="tau = 0.3"):
        found.record(1, 1, 1)
    with pytest.raises(ModelViolation, match="analogy is false"):
        found.record(0, 2, 1)
    assert (found.counts == before).all()


def test_what_was_contradicted_once_is_never_proven_again() -> None:
    """Also where the contradiction is raised: whoever catches it must not go on as if nothing had happened."""
    of = late_proof()
    for choice in ("raise", "retract"):
        found = knowledge(of, on_violation=choice)
        for _ in range(found.n_support):
            found.record(1, 1, 0)
        assert found.proven
        assert not found.contradicted
        with contextlib.suppress(ModelViolation):
            found.record(1, 1, 1)
        assert found.contradicted
        assert not found.proven


def test_analogues_closer_than_twice_tau_are_used_and_others_refused() -> None:
    """At an l1 distance of 2 tau an outcome may exist at one pair only."""
    law = {(0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")], (1, 0): [(0, 1.0, 0.0, ""), (1, 0.0, 0.0, "")]}
    far = world(2, law, [(0, 0), (1, 0)], [((0, 0), (1, 0))], tau=0.3, l1=0.6)
    near = world(2, law, [(0, 0), (1, 0)], [((0, 0), (1, 0))], tau=0.3, l1=0.59)
    for of, size in ((far, 1), (near, 2)):
        assert len(knowledge(of).analogy.members(0)) == size


def test_distances_of_analogues_widen_the_radius_by_their_share_of_the_draws() -> None:
    law = {(0, 0): [(1, 0.6, 0.0, ""), (0, 0.4, 0.0, "")], (1, 0): [(0, 0.5, 0.0, ""), (1, 0.5, 0.0, "")]}
    of = world(2, law, [(0, 0), (1, 0)], [((0, 0), (1, 0))], l1=0.2)
    found = knowledge(of)
    for i in range(60):
        found.record(0, 0, i % 2)
    for i in range(20):
        found.record(1, 0, i % 2)
    plain = l1_radius(80, 2, 0.025 / found.n_pools)
    assert found.beliefs().radii[0, 0] == pytest.approx(plain + 0.2 * 20 / 80)
    assert found.beliefs().radii[1, 0] == pytest.approx(plain + 0.2 * 60 / 80)
    best = knowledge(of, sharing="best")
    for i in range(60):
        best.record(0, 0, i % 2)
    assert best.beliefs().radii[1, 0] == pytest.approx(l1_radius(60, 2, 0.025 / 2) + 0.2)
    for i in range(20):
        best.record(1, 0, i % 2)
    assert best.beliefs().radii[1, 0] == pytest.approx(min(l1_radius(60, 2, 0.025 / 2) + 0.2, l1_radius(20, 2, 0.025 / 2)))


def test_the_best_analogue_alone_makes_a_pair_known() -> None:
    of = late_proof()
    best = knowledge(of, sharing="best")
    for i in range(best.n_support - 1):
        best.record(1, 1, i % 2)
        best.record(1, 0, i % 2)
    assert not best.known_pairs.any()
    best.record(1, 1, 0)
    assert np.argwhere(best.known_pairs).tolist() == [[0, 2], [1, 1]]
    np.testing.assert_allclose(best.beliefs().estimates[0, 2], best.visits[4] / best.visits[4].sum())


def test_draws_that_make_a_pair_known_are_in_the_evidence() -> None:
    """Fewer draws that bound the law better, the pair's own for one, must not hide them."""
    law = {(0, 0): [(1, 0.6, 0.0, ""), (0, 0.4, 0.0, "")], (1, 0): [(0, 0.5, 0.0, ""), (1, 0.5, 0.0, "")]}
    of = world(2, law, [(0, 0), (1, 0)], [((0, 0), (1, 0))], l1=0.5)
    found = knowledge(of, sharing="best")
    feed(found, of, found.n_support, pairs=[(0, 0)])
    assert found.known_pairs.all()
    for i in range(3 * found.n_support):
        shown = found.evidence(of.safe_set, np.zeros(2, dtype=int)).counts
        assert (shown.sum(-1) >= found.n_support).all()
        assert ((shown > 0) == found.possible).all()
        assert found.record(1, 0, i % 2).size == 0  # it was known before
    assert shown[1, 0].tolist() != shown[0, 0].tolist()  # its own in the end


def test_an_analogue_that_misses_what_another_has_shown_is_a_contradiction() -> None:
    """Before it is thought to know it all, and after somebody else did."""
    of = late_proof()  # (0, 2) and (1, 1) are alike
    for first in (True, False):
        strict, lenient = (knowledge(of, sharing="best", on_violation=choice) for choice in ("raise", "retract"))
        for found in (strict, lenient):
            if first:
                found.record(0, 2, 1)
            else:
                feed(found, of, found.n_support, pairs=[(0, 2)])
                assert found.known_pairs[1, 1]
                assert found.possible[1, 1].all()
            for _ in range(found.n_support - 1):
                found.record(1, 1, 0)
        with pytest.raises(ModelViolation, match=r"state 1, action 1 missed an outcome .* state 0, action 2, .* it was seen"):
            strict.record(1, 1, 0)
        lenient.record(1, 1, 0)
        assert not lenient.known_pairs[0, 2]
        assert lenient.contradicted


def test_slots_are_aligned_where_analogues_order_them_differently() -> None:
    law = {(0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")], (1, 0): [(0, 0.3, 0.0, ""), (1, 0.7, 0.0, "")]}
    of = world(2, law, [(0, 0), (1, 0)], [])
    of.analogy = Analogy.from_functions(lambda *_: 0.0, of.outcomes, lambda s, a, t, b: [0, 1] if s == t else [1, 0])
    for sharing in ("pool", "best"):
        found = knowledge(of, sharing=sharing)
        for _ in range(10):
            found.record(0, 0, 0)
        assert found.beliefs().estimates[1, 0].tolist() == [0.0, 1.0]
        for _ in range(10 * found.n_support):
            found.record(0, 0, 0)
        assert found.possible[1, 0].tolist() == [False, True]


@pytest.mark.parametrize("sharing", ["pool", "best"])
def test_the_truth_lies_within_the_radii(sharing: str) -> None:
    """All pairs at once, looked at after every 10 draws: at most delta_p of the runs may fail, 99.9 % bound."""
    runs, left = 60, 0
    for seed in range(runs):
        of = random_world(seed % 10)
        found = Knowledge(of.outcomes, of.analogy, of.tau, 0.05, 0.1, sharing=sharing)  # type: ignore[arg-type]
        failed = False
        for i in range(15):
            feed(found, of, 10, seed=1000 * seed + i)
            believed = found.beliefs()
            off = np.abs(believed.estimates - of.truth.probabilities).sum(-1)
            failed |= bool((off > believed.radii + 1e-12)[of.outcomes.valid].any())
        left += failed
    assert left <= binom.ppf(0.999, runs, 0.1)


def test_radii_without_a_proof_wait_until_a_pair_is_known() -> None:
    of = late_proof()
    found = knowledge(of, confidence="heuristic", beta=0.3)
    for i in range(found.n_support):
        assert found.beliefs().radii[0, 0] > 0.3 / np.sqrt(max(i, 1))
        found.record(0, 0, i % 2)
    assert found.beliefs().radii[0, 0] == pytest.approx(0.3 / np.sqrt(found.n_support))


@pytest.mark.parametrize("sharing", ["pool", "best"])
def test_a_draw_that_an_analogue_cannot_show_is_a_contradiction(sharing: str) -> None:
    """A wall: the analogue has no such outcome."""
    of = world(
        2, {(0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")], (1, 0): [(0, 1.0, 0.0, "")]}, [(0, 0), (1, 0)], [((0, 0), (1, 0))]
    )
    found = knowledge(of, sharing=sharing)
    with pytest.raises(ModelViolation, match="declared impossible"):
        found.record(0, 0, 1)
    lenient = knowledge(of, on_violation="retract", sharing=sharing)
    lenient.record(0, 0, 1)
    assert not lenient.proven
    assert lenient.visits[0].tolist() == [0, 1]
    for _ in range(3 * lenient.n_support):
        lenient.record(0, 0, 0)
    assert lenient.known_pairs.tolist() == [[True], [False]]
    assert lenient.beliefs().radii[1, 0] == 0  # a single outcome is certain


def test_pairs_that_were_contradicted_learn_from_their_own_draws_and_prove_nothing() -> None:
    """Three of a class, of which one has an outcome more: the others' draws say nothing of it, nor do its own of them."""
    laws = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.4, 0.4, 0.2]]
    of = world(3, {(s, 0): [((s + k) % 3, p, 0.0, "") for k, p in enumerate(laws[s])] for s in range(3)}, [(0, 0)], [], tau=0.2)
    candidates = of.outcomes.candidates.copy()
    candidates[:2, :, 2] = False
    of.outcomes = dataclasses.replace(of.outcomes, candidates=candidates)
    of.analogy = Analogy.classes([[0], [0], [0]])
    found = knowledge(of, on_violation="retract")
    feed(found, of, 10 * found.n_support)
    assert found.contradicted
    assert not found.known_pairs.any()
    np.testing.assert_allclose(found.beliefs().estimates[:, 0], found.visits / found.visits.sum(1, keepdims=True))
    np.testing.assert_allclose(found.beliefs().radii[:, 0], l1_radius(found.visits.sum(1), [2, 2, 3], 0.025))
    assert not found.evidence(of.safe_set, np.zeros(3, dtype=int)).counts.any()


def test_analogues_that_can_never_be_taken_exclude_nothing() -> None:
    """State 2, which only stays, is never entered: whatever is said of it, the others' draws are no contradiction."""
    moves = {**STAYS, (2, 0): [(2, 1.0, 0.0, "")]}
    of = world(3, moves, [(0, 0), (1, 0)], [])
    for analogy in (Analogy.classes([[0], [0], [0]]), Analogy.box((1, 3), 1, 2)):
        of.analogy = analogy
        found = knowledge(of)
        feed(found, of, found.n_support, pairs=[(0, 0), (1, 0)])
        assert found.proven
        for _ in range(found.n_support):  # the promise is broken: nothing is proven there, n_pools does not count it
            found.record(2, 0, 0)
        assert found.known_pairs.ravel().tolist() == [True, True, False]
        assert found.beliefs().radii[:, 0].tolist() == [*[l1_radius(found.n_support, 2, 0.025 / found.n_pools)] * 2, 0.0]
    of.analogy = Analogy.classes([[0], [0], [1]])
    candidates = of.outcomes.candidates.copy()
    candidates[0, 0, 0] = candidates[1, 0, 1] = False
    of.outcomes = dataclasses.replace(of.outcomes, candidates=candidates, start=np.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r"analogy must relate pairs that may have a common outcome, state 0, action 0"):
        knowledge(of)


@pytest.mark.parametrize(
    ("argument", "value"), [("sharing", "all"), ("confidence", "none"), ("on_violation", "ignore"), ("n_support", 0)]
)
def test_unknown_choices_are_refused(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        knowledge(late_proof(), **{argument: value})


def test_fewer_draws_than_the_proof_needs_miss_dangers() -> None:
    """The chance to overlook a slot of probability tau in N draws is (1 - tau)^N: with the proof's N it stays below delta."""
    of = hidden_danger(0.1)
    proof = knowledge(of).proof_draws
    for n, rare in ((proof, True), (max(1, proof // 3), False)):
        overlooked = 0
        for seed in range(400):
            found = knowledge(of, n_support=n)
            feed(found, of, n, 10_000 + seed, pairs=[(0, 0)])
            overlooked += bool(found.known_pairs[0, 1] and not found.possible[0, 1, 1])
        if rare:
            assert overlooked <= binom.ppf(0.999, 400, 0.025)
        else:
            assert overlooked > binom.ppf(0.999, 400, 0.025)
        assert knowledge(of, n_support=n).proven == rare


def test_draws_do_not_depend_on_their_order() -> None:
    of = random_world(5)
    draws = [(int(s), int(a), int(k)) for s, a, k in np.argwhere(of.truth.probabilities > 0) if of.outcomes.valid[s, a]]
    first, second = knowledge(of), knowledge(of)
    for one, other in itertools.zip_longest(draws * 3, draws[::-1] * 3):
        first.record(*one)
        second.record(*other)
    assert (first.counts == second.counts).all()
