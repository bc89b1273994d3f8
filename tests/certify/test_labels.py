"""Label flips: radii, laws and votes against closed forms and enumeration of all noise and all flips."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from robustrl.certify.labels import (
    MARGIN,
    Contest,
    LabelVote,
    RidgeWeights,
    _critical_log_failures,
    chernoff_log_failure,
    exact_label_radius,
    exact_log_failure,
    kl_radius,
    label_flip_certificate,
)

RADII = [  # failure probability, q, K, radius of the paper, Neyman-Pearson radius
    (0.1, 0.3, 2, 1, 1),  # two flips: a tie, 0.09 * 0.49 / 0.09 + 0.01 = 1/2
    (0.0999999, 0.3, 2, 1, 2),
    (0.01, 0.3, 2, 4, 7),
    (0.001, 0.3, 2, 8, 14),
    (1e-6, 0.3, 2, 18, 33),
    (1e-12, 0.3, 2, 38, 73),
    (0.01, 0.1, 2, 0, 1),
    (1e-6, 0.1, 2, 3, 5),
    (0.01, 0.45, 2, 80, 135),
    (0.001, 0.45, 2, 137, 238),
    (0.01, 0.3, 10, 0, 1),
    (1e-6, 0.3, 10, 3, 5),
    (math.exp(-728.917330), 0.1, 2, 206, 412),
    (math.exp(-114.787341), 0.3, 2, 167, 327),
    (math.exp(-6.443791), 0.45, 2, 126, 216),
]


def worst_failure(failure: float, flips: int, q: float, n_classes: int) -> float:
    """Neyman-Pearson by definition: all outcomes of the flipped labels, sorted by likelihood ratio, filled up to `failure`."""
    moved = q / (n_classes - 1)
    clean = np.array([1.0])
    for _ in range(flips):  # law of #(old label) - #(new label), by convolution
        clean = np.convolve(clean, [moved, q - moved, 1 - q])
    poisoned = clean[::-1]  # the roles of the two labels are swapped
    total = 0.0
    for before, after in sorted(zip(clean, poisoned, strict=True), key=lambda pair: pair[0] / pair[1] if pair[1] else math.inf):
        share = min(1.0, failure / before) if before else 0.0
        total, failure = total + share * after, failure - share * before
    return total


def all_labels(n: int, n_classes: int) -> NDArray[np.int64]:
    return np.array(list(itertools.product(range(n_classes), repeat=n)))


def probabilities(noisy: NDArray[np.int64], labels: NDArray[np.int64], q: float, n_classes: int) -> NDArray[np.float64]:
    """Probability of every noisy labelling."""
    changed = (noisy != labels).sum(1)
    return np.asarray((1 - q) ** (len(labels) - changed) * (q / (n_classes - 1)) ** changed)


def flipped(labels: NDArray[np.int64], n_classes: int, most: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Every labelling with up to `most` other labels."""
    for size in range(1, most + 1):
        for where in itertools.combinations(range(len(labels)), size):
            for shift in itertools.product(range(1, n_classes), repeat=size):
                other = labels.copy()
                other[list(where)] = (other[list(where)] + shift) % n_classes
                yield size, other


def ridge_problem(rng: np.random.Generator, n: int, n_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Votes (1, n) on a random query and labels that depend on the features."""
    features = np.hstack([rng.normal(size=(n, 2)), np.ones((n, 1))])
    labels = (features @ rng.normal(size=(3, n_classes)) + rng.normal(size=n_classes)).argmax(1)
    return RidgeWeights(features, ridge=2.0)(np.array([[*(0.5 * rng.normal(size=2)), 1.0]])), labels


# Radii from a probability


@pytest.mark.parametrize(("failure", "q", "n_classes", "kl", "exact"), RADII)
def test_radii_are_those_of_the_reference_table(failure: float, q: float, n_classes: int, kl: int, exact: int) -> None:
    assert kl_radius(math.log(failure), q, n_classes) == kl
    assert exact_label_radius(math.log(failure), q, n_classes) == exact


@pytest.mark.parametrize(
    ("failure", "q", "n_classes", "p"),
    [
        (0.01, 0.3, 2, (0.97666667, 0.94555556, 0.87296296, 0.74955556, 0.73576296)),
        (0.001, 0.3, 10, (0.979, 0.559, 0.26344444)),
    ],
)
def test_the_oracle_of_these_tests_gives_the_staircase_of_the_table(
    failure: float, q: float, n_classes: int, p: tuple[float, ...]
) -> None:
    worst = [1 - worst_failure(failure, r, q, n_classes) for r in range(1, len(p) + 1)]
    assert worst == pytest.approx(p, abs=5e-9)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_the_exact_radius_is_the_largest_with_a_majority_in_the_worst_case(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    for q in (0.05, 0.3, 0.45):
        for failure in 10.0 ** rng.uniform(-9, -0.4, size=12):
            radius = int(exact_label_radius(math.log(failure), q, n_classes))
            assert radius == 0 or worst_failure(failure, radius, q, n_classes) < 0.5 - 0.9 * MARGIN
            assert worst_failure(failure, radius + 1, q, n_classes) > 0.5 - 1.1 * MARGIN


def test_a_poisoned_vote_of_exactly_one_half_is_not_certified() -> None:
    tie = 0.5 * 0.3 / 0.7  # one flip multiplies it by 0.7 / 0.3
    assert worst_failure(tie, 1, 0.3, 2) == pytest.approx(0.5)
    assert exact_label_radius(math.log(tie), 0.3) == 0
    assert exact_label_radius(math.log(tie * (1 - 1e-9)), 0.3) == 0  # within the margin
    assert exact_label_radius(math.log(tie * (1 - 1e-8)), 0.3) == 1
    table = _critical_log_failures(0.3, 2, 64)
    assert np.array_equal(exact_label_radius(table, 0.3), np.searchsorted(-table, -table))  # strictly smaller ones alone
    assert exact_label_radius(math.log(0.5), 0.3) == kl_radius(math.log(0.5), 0.3) == 0


@pytest.mark.parametrize("flips", [1, 2, 5, 30])
def test_the_paper_s_radius_is_strictly_below_its_bound(flips: int) -> None:
    divergence = 0.4 * math.log(0.7 / 0.3)
    product = math.exp(-2 * flips * divergence) / 4  # of p and 1 - p, where the bound is the integer `flips`
    failure = 2 * product / (1 + math.sqrt(1 - 4 * product))
    assert kl_radius(math.log(failure), 0.3) == flips - 1
    assert kl_radius(math.log(failure * (1 - 1e-6)), 0.3) == flips


@pytest.mark.parametrize(("q", "n_classes"), [(0.01, 2), (0.3, 2), (0.49, 2), (0.2, 3), (0.6, 3), (0.8, 10)])
def test_radii_fall_with_the_failure_probability_and_the_exact_one_is_the_larger(q: float, n_classes: int) -> None:
    log_failure = -np.geomspace(1e-3, 700, 60).reshape(6, 10)
    kl = np.minimum(kl_radius(log_failure, q, n_classes), 3000)
    exact = exact_label_radius(log_failure, q, n_classes, most=3000)
    assert kl.shape == exact.shape == (6, 10)
    assert kl.dtype == exact.dtype == np.int64
    for radii in (kl.ravel(), exact.ravel()):
        assert np.all(np.diff(radii) >= 0)
        assert np.all(radii[log_failure.ravel() > math.log(0.5)] == 0)
    assert np.all(exact >= kl)
    assert exact.max() > 0


def test_radii_go_on_where_probabilities_have_underflowed() -> None:
    deep = np.array([-500.0, -1000.0, -2000.0])
    assert np.all(np.diff(kl_radius(deep, 0.3)) > 100)
    radii = exact_label_radius(deep, 0.3)
    assert np.all(np.diff(radii) > 100)
    assert np.all(radii < 2.05 * kl_radius(deep, 0.3))
    # For q = 0.3 all labels flipped at once cost log(7 / 3) each, up to a deviation of their number by its square root.
    assert radii[-1] == pytest.approx(2000 / (0.4 * math.log(7 / 3)), rel=0.04)
    assert exact_label_radius(-2000.0, 0.3, most=50) == 50


@pytest.mark.parametrize("rule", [kl_radius, exact_label_radius])
@pytest.mark.parametrize("q", [0.0, -0.1, 0.5, 0.7, math.nan, math.inf])
def test_a_flip_probability_without_information_or_noise_is_refused(rule: Any, q: float) -> None:
    with pytest.raises(ValueError, match="q must be"):
        rule(-3.0, q)


@pytest.mark.parametrize("rule", [kl_radius, exact_label_radius])
def test_radii_refuse_what_is_no_log_probability(rule: Any) -> None:
    for value in (0.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match="log_failure"):
            rule(value, 0.3)
    with pytest.raises(TypeError, match="n_classes"):
        rule(-3.0, 0.3, 2.5)
    with pytest.raises(ValueError, match="n_classes"):
        rule(-3.0, 0.3, 1)
    assert rule(-3.0, 0.6, 3) >= 0


# The law of a contest


def test_chernoff_bounds_are_those_of_the_reference_table() -> None:
    sizes = np.array([0.3, 0.25, 0.2, 0.15, 0.1, 0.05])
    contest = LabelVote([1, 1, 1, 0, 1, 0], 2, 0.2).contest(sizes, 1, 0)
    bound = chernoff_log_failure(contest, 1 - sizes.sum())  # alpha.y' < 1/2 with labels 0 and 1
    assert bound == pytest.approx(-0.557922626, abs=1e-9)
    noisy = all_labels(6, 2)
    p = probabilities(noisy, np.array([1, 1, 1, 0, 1, 0]), 0.2, 2)[noisy @ sizes >= 0.5 - 1e-12].sum()
    assert p == pytest.approx(0.891136, abs=1e-9)
    assert math.log1p(-p) < bound
    labels = np.repeat([1, 0], [1800, 200])
    for q, expected in ((0.1, -728.917330), (0.3, -114.787341), (0.45, -6.443791)):
        contest = LabelVote(labels, 2, q).contest(np.full(2000, 1 / 2000), 1, 0)
        assert chernoff_log_failure(contest) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("n", "q"), [(300, 0.3), (1000, 0.01), (2000, 1e-4), (2000, 0.49)])
def test_chernoff_for_equal_votes_is_the_divergence_of_coins(n: int, q: float) -> None:
    contest = LabelVote(np.ones(n), 2, q).contest(np.full((3, n), 7), [1, 1, 1], 0)
    expected = n * (math.log(2) + (math.log(q) + math.log1p(-q)) / 2)
    assert chernoff_log_failure(contest) == pytest.approx(expected, rel=1e-9)
    assert np.all(chernoff_log_failure(contest) >= expected)


def test_the_exact_law_for_equal_votes_is_binomial_down_to_1e_270() -> None:
    for n, q in ((301, 0.3), (100, 0.002), (200, 0.002), (1000, 0.49)):
        contest = LabelVote(np.ones(n), 2, q).contest(np.full(n, 3), 1, 0)
        expected = binom.logsf(math.ceil(n / 2) - 1, n, q)
        assert exact_log_failure(contest) == pytest.approx(expected, rel=1e-10, abs=1.1e-9)
        assert exact_log_failure(contest) >= expected
    assert expected < 0
    assert exact_log_failure(LabelVote(np.ones(2000), 2, 0.01).contest(np.ones(2000, int), 1, 0)) == 0.0  # underflow: no bound


@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_the_exact_law_is_that_of_enumeration_and_chernoff_never_below_it(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    n, informative = 6, 0
    noisy = all_labels(n, n_classes)
    for _ in range(40):
        labels, weights, q = rng.integers(n_classes, size=n), rng.integers(-9, 10, size=n), rng.uniform(0.02, 0.45)
        labels[:3], weights[:3] = 0, np.abs(weights[:3])
        score = ((noisy == 0) * 1 - (noisy == 1)) @ weights
        truth = probabilities(noisy, labels, q, n_classes)[score <= 0].sum()
        contest = LabelVote(labels, n_classes, q).contest(weights, 0, 1)
        assert contest.lose + contest.win + contest.draw == pytest.approx(np.ones(n))
        assert exact_log_failure(contest) == pytest.approx(math.log(truth), abs=1.1e-9)
        assert exact_log_failure(contest) >= math.log(truth)
        assert chernoff_log_failure(contest) >= math.log(truth)
        informative += chernoff_log_failure(contest) < math.log(0.5)
    assert informative > 3


def test_chernoff_is_at_its_minimum_over_t() -> None:
    rng = np.random.default_rng(5)
    labels, weights = rng.integers(3, size=50), rng.integers(-9, 10, size=(20, 50))
    contest = LabelVote(labels, 3, 0.2).contest(weights, np.zeros(20, int), np.ones(20, int))
    t = np.geomspace(1e-4, 3, 4000)[:, None]
    for row, bound in enumerate(chernoff_log_failure(contest)):
        size, lose, win, draw = (part[row] for part in contest)
        grid = np.log(lose * np.exp(t * size) + win * np.exp(-t * size) + draw).sum(1).min()
        assert bound == pytest.approx(min(grid, 0.0), abs=1e-4)
        assert bound == pytest.approx(float(chernoff_log_failure(Contest(size, lose, win, draw))), abs=1e-9)


def test_a_score_that_cannot_be_that_small_has_no_probability() -> None:
    contest = LabelVote(np.ones(5), 2, 0.2).contest(np.ones(5), 1, 0)
    assert chernoff_log_failure(contest, -5.001) < -20
    assert chernoff_log_failure(contest, -5.0) == pytest.approx(5 * math.log(0.2))
    assert chernoff_log_failure(contest, 3.0) == 0


def test_no_votes_give_no_bound() -> None:
    contest = LabelVote([0, 1, 1], 2, 0.2).contest(np.zeros(3, dtype=np.int64), 1, 0)
    assert chernoff_log_failure(contest) == 0
    assert exact_log_failure(contest) == 0


# Votes: everything enumerated


@pytest.mark.parametrize("q", [0.1, 0.3])
def test_no_flips_within_a_certified_radius_change_a_binary_prediction(q: float) -> None:
    rng, noisy = np.random.default_rng(round(100 * q)), all_labels(10, 2)
    changes, certified = 0, 0
    for _ in range(10):
        weights, labels = ridge_problem(rng, 10, 2)
        votes = (2 * noisy - 1) @ weights[0]
        vote = LabelVote(labels, 2, q)
        results = {method: vote.certify(weights, method) for method in ("kl", "neyman-pearson", "exact")}
        prediction = int(results["exact"].prediction[0])

        def majority(y: NDArray[np.int64], votes: NDArray[np.int64] = votes) -> NDArray[np.float64]:
            p = probabilities(noisy, y, q, 2)
            return np.array([p[votes < 0].sum(), p[votes > 0].sum()])

        p = majority(labels)
        if p.max() > 0.5:
            assert prediction == p.argmax()
        truth = 3
        for size, other in flipped(labels, 2, 3):
            executed = int(LabelVote(other, 2, q).predict(weights)[0])
            p = majority(other)
            if p.max() > 0.5 + 1e-8:
                assert executed == p.argmax()
            changes += executed != prediction
            if executed != prediction or p[prediction] <= 0.5:
                truth = min(truth, size - 1)
            for result in results.values():
                assert size > result.radius[0] or executed == result.prediction[0]
        certified += int(results["exact"].radius[0])
        if majority(labels)[prediction] > 0.5:
            assert min(results["exact"].radius[0], 3) == truth
        assert results["kl"].radius <= results["neyman-pearson"].radius <= results["exact"].radius
        assert results["neyman-pearson"].log_failure <= results["kl"].log_failure
    assert changes > 100
    assert certified > 5


@pytest.mark.parametrize("q", [0.0, 0.05, 0.2])
def test_no_flips_within_a_certified_radius_change_a_prediction_among_three(q: float) -> None:
    rng = np.random.default_rng(round(100 * q) + 1)
    changes, certified = 0, 0
    for _ in range(9):
        weights, labels = ridge_problem(rng, 9, 3)
        result = LabelVote(labels, 3, q).certify(weights)
        (prediction,), (radius,) = result.prediction, result.radius
        truth = 2
        for size, other in flipped(labels, 3, 2):
            executed = LabelVote(other, 3, q).predict(weights)[0]
            changes += executed != prediction
            truth = min(truth, size - 1 if executed != prediction else truth)
            assert size > radius or executed == prediction
        certified += min(radius, 2)
        if q == 0:
            assert min(radius, 2) == truth
    assert changes > 100
    assert certified > 3


@pytest.mark.parametrize("q", [0.0, 0.25])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_an_attacker_who_flips_the_largest_votes_stays_outside_the_radius(q: float, n_classes: int) -> None:
    rng = np.random.default_rng(7)
    labels = rng.integers(n_classes, size=60)
    labels[:35] = 1
    for weights in rng.integers(-3, 12, size=(6, 1, 60)):
        result = LabelVote(labels, n_classes, q).certify(weights)
        (winner,), (radius,) = result.prediction, result.radius
        needed = 60
        for rival in set(range(n_classes)) - {winner}:
            gain = weights[0] * ((labels == winner) * 1 - (labels == rival)) + np.abs(weights[0])
            other = labels.copy()
            for flips, i in enumerate(np.argsort(-gain, kind="stable"), start=1):
                other[i] = rival if weights[0, i] > 0 else winner
                if LabelVote(other, n_classes, q).predict(weights)[0] != winner:
                    needed = min(needed, flips)
                    break
        assert radius < needed
        if q == 0 or n_classes == 2:
            assert needed - 1 - (q > 0) <= radius  # with noise one more flip may lead to a tie
        assert radius > 0


def test_the_majority_over_noise_may_differ_from_the_plain_vote() -> None:
    weights = np.array([[-5, 1, 1, 1, 1, 1, 1]])  # one large vote for class 0 against six for class 1
    assert LabelVote(np.ones(7), 2).predict(weights) == 1
    assert LabelVote(np.ones(7), 2, 0.4).predict(weights) == 0
    noisy = all_labels(7, 2)
    p = probabilities(noisy, np.ones(7, dtype=np.int64), 0.4, 2)
    assert p[(2 * noisy - 1) @ weights[0] < 0].sum() > 0.5


def test_the_class_that_beats_every_other_one_wins_over_the_one_with_most_votes() -> None:
    weights = np.array([[-5, 1, 1, 1, 1, 1, 1]])
    vote = LabelVote(np.ones(7), 3, 0.5)
    noisy = all_labels(7, 3)
    p = probabilities(noisy, np.ones(7, dtype=np.int64), 0.5, 3)
    votes = np.stack([(noisy == k) @ weights[0] for k in range(3)], axis=1)
    beats = np.array([[p[votes[:, a] > votes[:, b]].sum() for b in range(3)] for a in range(3)])
    winners = [a for a in range(3) if all(beats[a, b] > 0.5 for b in range(3) if b != a)]
    assert LabelVote(np.ones(7), 3).predict(weights) == 1
    result = vote.certify(weights)
    if winners:
        assert result.prediction[0] == winners[0]
    else:
        assert result.abstained[0]
        assert result.prediction[0] == 1


@pytest.mark.parametrize(("close", "far"), [(1, 2), (2, 1)])
def test_the_hardest_contest_counts(close: int, far: int) -> None:
    vote, weights = LabelVote(np.repeat([0, close, far], [60, 25, 2]), 3, 0.2), np.ones((1, 87), dtype=np.int64)
    result = vote.certify(weights, "kl")
    bounds = [float(chernoff_log_failure(vote.contest(weights[0], 0, rival))) for rival in (close, far)]
    assert result.prediction == 0
    assert result.log_failure == pytest.approx(bounds[0])
    assert bounds[0] > bounds[1] + 1


def test_ties_are_predicted_but_not_certified() -> None:
    for vote in (LabelVote([0, 1], 2, 0.3), LabelVote([0, 1, 2], 3, 0.3)):
        result = vote.certify(np.ones((1, len(vote))))
        assert (result.prediction[0], result.radius[0], result.abstained[0], result.log_failure[0]) == (0, 0, True, 0.0)
    result = LabelVote([0, 1, 1, 0, 0], 2).certify(np.ones((1, 5)))
    assert (result.prediction[0], result.radius[0], result.abstained[0]) == (0, 0, False)
    assert LabelVote([0, 0, 1, 1, 0, 0], 2).certify(np.ones((1, 6))).radius == 1  # a tie of 3 and 3 is still class 0
    assert LabelVote([1, 1, 0, 0, 1, 1], 2).certify(np.ones((1, 6))).radius == 0


def test_the_large_examples_of_the_table_are_certified_from_their_exact_laws() -> None:
    labels, weights = np.repeat([1, 0], [1800, 200]), np.ones((1, 2000))
    for q, kl, exact in ((0.1, 206, 412), (0.3, 167, 337), (0.45, 126, 317)):  # 412 by Chernoff: the law underflows
        vote = LabelVote(labels, 2, q)
        assert vote.certify(weights, "kl").radius == kl
        assert vote.certify(weights, "neyman-pearson").radius == exact
        worst = int(vote.certify(weights).radius[0])
        for flips in (worst, worst + 1):
            kept = 1800 - flips
            law = binom.pmf(np.arange(kept + 1), kept, 1 - q)
            assert (law @ binom.sf(1000 - np.arange(kept + 1), 2000 - kept, q) > 0.5) == (flips == worst)
    assert LabelVote(labels, 2).certify(weights).radius == 799


def test_queries_do_not_influence_each_other() -> None:
    rng = np.random.default_rng(3)
    weights, vote = rng.integers(-4, 5, size=(70, 40)), LabelVote(rng.integers(3, size=40), 3, 0.2)
    together = vote.certify(weights)
    assert np.array_equal(together.prediction, vote.predict(weights))
    for i in (0, 31, 32, 69):
        alone = vote.certify(weights[i : i + 1])
        assert (alone.prediction[0], alone.radius[0]) == (together.prediction[i], together.radius[i])
    assert len(set(together.prediction)) == 3


@pytest.mark.parametrize(("q", "method"), [(0.0, None), (0.2, None), (0.2, "neyman-pearson"), (0.2, "kl")])
def test_a_certificate_is_recomputed_from_plain_integers(q: float, method: Any) -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 9, size=(1, 40))
    vote = LabelVote((rng.random(40) < 0.9) * 1, 2, q)
    result = vote.certify(weights, method)
    evidence = json.loads(json.dumps(vote.evidence(weights[0], method)))
    assert label_flip_certificate(evidence) == (1, result.radius[0], False)
    assert result.radius[0] > 0
    evidence["labels"] = [1 - label for label in evidence["labels"]]
    assert label_flip_certificate(evidence)[0] == 0
    tied = LabelVote([0, 1], 2, 0.3).evidence([1, 1])
    assert label_flip_certificate(tied, None, 0.0) == (0, 0.0, True)
    del evidence["q"]
    with pytest.raises(ValueError, match="'q'"):
        label_flip_certificate(evidence)


def test_votes_refuse_bad_input() -> None:
    vote = LabelVote([0, 1, 1], 2, 0.2)
    for labels in ([0, 2], [-1, 0], [0.5, 1], [math.nan, 0]):
        with pytest.raises(ValueError, match="labels"):
            LabelVote(labels, 2)
    for weights in ([[1, 2]], [[1, 2, 0.5]], [[1, 2, math.inf]], [1, 2, 3], [[1, 2, 2**40]]):
        with pytest.raises(ValueError, match="weights"):
            vote.predict(weights)
    with pytest.raises(ValueError, match="at most 1e\\+07"):
        vote.predict([[1, 2, 10**7]])
    with pytest.raises(ValueError, match="at most 400,000"):
        LabelVote(np.zeros(400_001), 2, 0.2)
    for q in (0.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="q must be"):
            LabelVote([0, 1], 2, q)
    with pytest.raises(ValueError, match="method"):
        vote.certify([[1, 2, 3]], "cohen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two classes or q = 0"):
        LabelVote([0, 1, 2], 3, 0.2).certify([[1, 2, 3]], "exact")
    with pytest.raises(ValueError, match="q > 0"):
        LabelVote([0, 1], 2).certify([[1, 2]], "kl")


# The weights of ridge regression


def test_the_vote_is_one_hot_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    features, queries, labels = rng.normal(size=(80, 6)), rng.normal(size=(50, 6)), rng.integers(4, size=80)
    coefficients = np.linalg.solve(features.T @ features + 0.7 * np.eye(6), features.T @ np.eye(4)[labels])
    weights = RidgeWeights(features, ridge=0.7, levels=2**25)(queries)
    assert np.array_equal(LabelVote(labels, 4).predict(weights), (queries @ coefficients).argmax(1))
    alpha = queries @ np.linalg.solve(features.T @ features + 0.7 * np.eye(6), features.T)
    assert weights / 2**25 == pytest.approx(alpha / np.abs(alpha).max(1, keepdims=True), abs=1e-7)
    coarse = RidgeWeights(features, ridge=0.7, levels=15)(queries)
    assert np.all(np.abs(coarse).max(1) == 15)
    assert np.abs(coarse / 15 - weights / 2**25).max() <= 0.5 / 15 + 1e-6


def test_a_row_of_weights_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    weigh, queries = RidgeWeights(rng.normal(size=(333, 57)), levels=2**50), rng.normal(size=(100, 57))
    together, order = weigh(queries), rng.permutation(100)
    assert np.array_equal(weigh(queries[order]), together[order])
    assert np.array_equal(np.concatenate([weigh(query[None]) for query in queries]), together)


def test_weights_of_a_query_without_features_are_zero() -> None:
    weights = RidgeWeights(np.eye(3))(np.zeros((1, 3)))
    assert np.array_equal(weights, np.zeros((1, 3)))
    assert LabelVote([1, 1, 1], 2, 0.1).certify(weights).abstained[0]


def test_ridge_weights_refuse_bad_input() -> None:
    features = np.eye(3)
    with pytest.raises(ValueError, match="ridge"):
        RidgeWeights(features, ridge=0.0)
    with pytest.raises(ValueError, match="positive definite"):
        RidgeWeights(np.ones((3, 3)), ridge=1e-300)
    with pytest.raises(ValueError, match="features"):
        RidgeWeights(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="levels"):
        RidgeWeights(features, levels=0)
    for queries in (np.ones((1, 2)), np.ones(3), np.full((1, 3), np.inf)):
        with pytest.raises(ValueError, match="queries"):
            RidgeWeights(features)(queries)
