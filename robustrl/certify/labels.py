"""Label flips: a prediction that stays the same however up to r training labels are changed.

A classifier that is linear in its labels is a vote: example i casts `weights[i]` for its own label. `RidgeWeights` computes the
votes of ridge regression on fixed features and never sees a label; `LabelVote` decides by them and certifies the decision. The
votes are integers, so that laws of the vote under label noise are sums over a lattice, and everybody recomputes the same number.

Source: Rosenfeld, Winston, Ravikumar, Kolter (ICML 2020), arXiv:2002.03018, for smoothing, the Chernoff bound and `kl_radius`.
The exact laws, `exact_label_radius` and the worst flips are derived in docs/methods/label_flips.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve

from robustrl.errors import check_choice, check_count, check_finite_array, check_positive, check_real

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Method = Literal["exact", "neyman-pearson", "kl"]

MARGIN = 1e-9
"""By how much a certified vote must stay away from 1/2, and how far logarithms of probabilities are rounded outwards. The laws are
sums of positive terms with a relative error below 1e-15 per label, so that a poisoned vote is also *computed* on the right side."""

HALF, WON = math.log(0.5), math.log(0.5 - MARGIN)
MOST_LABELS = 400_000
"""Under label noise; more of them, at 1e-15 each, would use up `MARGIN`."""

MOST_POINTS = 10**7
"""Largest sum of absolute weights of one query under label noise: its law has as many points."""

BLOCK = 32
"""Queries whose Chernoff bounds are computed together."""


# Radii from a probability ------------------------------------------------------------------------------------------------------


def kl_radius(log_failure: ArrayLike, q: float, n_classes: int = 2) -> Ints:
    """Label flips that a smoothed vote survives by the Kullback-Leibler bound of the paper.

    The largest integer strictly below  -log(4 p (1 - p)) / (2 D),  with p = 1 - exp(log_failure) and D the divergence that one
    changed label makes,  (1 - K q / (K - 1)) log((1 - q) (K - 1) / q).

    Args:
        log_failure: log of an upper bound for the probability that the class loses, <= 0; any shape. Accurate however small.
        q: probability that a label is replaced by another one, in (0, (K - 1) / K).
        n_classes: K.
    Returns:
        int64 array of the same shape; 0 where p <= 1/2.
    Raises:
        ValueError: if an argument is out of range, or `log_failure` is infinite or NaN.
    """
    keep, moved = _label_law(q, n_classes, noiseless=False)
    log_failure = _check_log_failure(log_failure)
    bound = -(math.log(4) + log_failure + np.log1p(-np.minimum(np.exp(log_failure), 0.5))) / 2  # <= 0 where p <= 1/2
    radius = bound / ((keep - moved) * math.log(keep / moved)) * (1 - MARGIN)  # strictly below the bound
    return np.floor(np.maximum(radius, 0)).astype(np.int64)


def exact_label_radius(log_failure: ArrayLike, q: float, n_classes: int = 2, *, most: int = 10_000) -> Ints:
    """Label flips that a smoothed vote survives, by the Neyman-Pearson lemma: the largest radius the probability alone allows.

    Args:
        log_failure, q, n_classes: see `kl_radius`.
        most: larger radii are not looked for (time and memory grow with their square and their number).
    Returns:
        int64 array of the same shape: the largest r such that after any r flips the class still wins with a probability of at
        least 1/2 + `MARGIN`; 0 where there is none.
    Raises:
        ValueError: see `kl_radius`.
    """
    _label_law(q, n_classes, noiseless=False)
    log_failure, most = _check_log_failure(log_failure), check_count("most", most)
    size = min(64, most)
    while (table := _critical_log_failures(float(q), int(n_classes), size))[-1] > log_failure.min() and size < most:
        size = min(2 * size, most)
    return np.searchsorted(-table, -log_failure, side="left").astype(np.int64)


@lru_cache(maxsize=64)
def _critical_log_failures(q: float, n_classes: int, size: int) -> Floats:
    """Entry r - 1: log of the clean failure probability that r flips can just raise to 1/2; decreasing, rounded down.

    Among r flipped labels let m = #(still the old one) - #(the new one). Flipping mirrors its law, and the likelihood ratio is a
    power of m; so the worst event of poisoned probability 1/2 is "m is small", and its clean probability is what we need.
    """
    keep, moved = _label_law(q, n_classes)
    stay, odds, half = q - moved, keep / moved, 0.5 - MARGIN
    powers = odds ** np.arange(-min(2 * size, math.ceil(40 / math.log(odds))), 0.0)  # what is left out lowers the result
    table, law = np.empty(size), np.ones(1)  # of m after the flips, from -r upwards
    for r in range(1, size + 1):
        longer = np.zeros(2 * r + 1)
        longer[:-2] = keep * law
        longer[1:-1] += stay * law
        longer[2:] += moved * law
        law = longer
        mass = np.cumsum(law)
        c = int(np.searchsorted(mass, half))  # the event is {m < c - r} and a part of {m = c - r}
        near = min(c, len(powers))
        below = law[c - near : c] @ powers[len(powers) - near :]
        table[r - 1] = (c - r) * math.log(odds) + math.log(below + half - (mass[c - 1] if c else 0.0))
    return table


# The law of a contest ----------------------------------------------------------------------------------------------------------


class Contest(NamedTuple):
    """Class A against class B under label noise: S = sum of independent terms, each `size`, -`size` or 0. A wins if S > 0.

    Attributes:
        size: what a label is worth, >= 0; shape (..., n).
        lose: probability of -size, same shape.
        win: probability of +size.
        draw: probability of 0.
    """

    size: NDArray[Any]
    lose: Floats
    win: Floats
    draw: Floats


def chernoff_log_failure(contest: Contest, threshold: float = 0.0) -> Floats:
    """Upper bound for log P(S <= threshold): min over t >= 0 of  t * threshold + sum_i log E exp(-t S_i).

    Every t gives a bound, so Newton's method need not have converged for it to hold; rounded up by 1e-14 per label and exponent.

    Args:
        contest: terms, shape (..., n); a batch of contests is solved at once.
        threshold: in the units of `size`.
    Returns:
        float64 array (...): <= 0, accurate however small the probability.
    """
    size = np.asarray(contest.size, dtype=np.float64)
    gap = contest.win - contest.lose
    excess = (size * gap).sum(-1) - threshold
    variance = (size**2 * (contest.win + contest.lose - gap**2)).sum(-1)
    best = np.zeros(excess.shape)
    t = np.where(excess > 0, excess / np.where(variance > 0, variance, 1.0), 0.0)
    low, high = np.zeros(t.shape), np.full(t.shape, math.inf)
    for _ in range(60):
        x = t[..., None] * size
        shrink = np.exp(-x)
        lose, win = contest.lose, contest.win * shrink**2  # relative to exp(x)
        total = lose + contest.draw * shrink + win
        with np.errstate(divide="ignore"):
            value = t * threshold + (x + np.log(total) + 1e-14 * (1 + x)).sum(-1)
        best = np.where(t > 0, np.fmin(best, value), best)
        tilted = (lose - win) / total
        slope = threshold + (size * tilted).sum(-1)
        curvature = (size**2 * ((lose + win) / total - tilted**2)).sum(-1)
        low, high = np.where(slope < 0, t, low), np.where(slope >= 0, t, high)
        with np.errstate(over="ignore"):
            newton = t - slope / np.maximum(curvature, math.ulp(0))
        inside = (newton > low) & (newton < high)
        previous, t = t, np.where(inside, newton, np.where(np.isinf(high), 2 * t, (low + high) / 2))
        if np.all(np.abs(t - previous) <= 1e-7 * previous):
            break
    return best


def exact_log_failure(contest: Contest) -> float:
    """Log P(S <= 0) for integer sizes, by convolution over the lattice; rounded up by `MARGIN`.

    Only products and sums of positive numbers: the relative error is below 1e-15 per label. Probabilities below 1e-280, where
    numbers underflow, give 0.0 (no bound); the Chernoff bound serves there.

    Args:
        contest: one contest, shape (n,), with integer sizes.
    Returns:
        the logarithm; time and memory grow with n * sum(size) and sum(size).
    """
    step = 2 if np.any(contest.draw > 0) else 1  # without draws every second point of the lattice stays empty
    law = np.ones(1)  # of sum (S_i + size_i) * step / 2
    terms = np.flatnonzero(contest.size)
    for i in terms[np.argsort(contest.size[terms], kind="stable")]:  # small ones first: the lattice grows late
        size, length = int(contest.size[i]), len(law)
        longer = np.zeros(length + step * size)
        longer[:length] = contest.lose[i] * law
        longer[step * size :] += contest.win[i] * law
        if step == 2:
            longer[size : size + length] += contest.draw[i] * law
        law = longer
    failure = float(law[: step * int(np.sum(contest.size)) // 2 + 1].sum())
    return min(math.log(failure) + MARGIN, 0.0) if failure > 1e-280 else 0.0


# The vote ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlipCertificates:
    """What `LabelVote.certify` proves, one entry per query.

    Attributes:
        prediction: executed classes, shape (Q,).
        radius: labels that may be flipped without any change of the prediction, shape (Q,).
        abstained: where nothing is proven: no class won all its contests, or only by a hair; radius 0; shape (Q,).
        log_failure: log of an upper bound for the probability that the class loses its hardest contest, shape (Q,); -inf
            without noise.
    """

    prediction: Ints
    radius: Ints
    abstained: NDArray[np.bool_]
    log_failure: Floats


class LabelVote:
    """Labelled examples vote on queries: each casts an integer weight for its own label, or for the label that noise makes of it.

    With q = 0 the class with most votes wins. With q > 0 every label is replaced by another one, uniformly, with probability q,
    and the class wins that beats every other one with a probability above 1/2 over the noise (for two classes: the majority of
    the paper's smoothed classifier). That probability is computed, never sampled; where no class wins, the class with most
    votes of the labels as they are is predicted. So a prediction is always a deterministic function of the labels.

    Args:
        labels: integers in [0, n_classes), shape (n,).
        n_classes: K >= 2.
        q: probability that a label is replaced, 0 or in (0, (K - 1) / K).

    Examples:
        >>> vote = LabelVote([1, 1, 1, 1, 0], n_classes=2)
        >>> result = vote.certify([[1, 1, 1, 1, 1]])
        >>> int(result.prediction[0]), int(result.radius[0])
        (1, 1)
    """

    def __init__(self, labels: ArrayLike, n_classes: int, q: float = 0.0) -> None:
        self.n_classes = check_count("n_classes", n_classes, least=2)
        self.keep, self.moved = _label_law(q, n_classes)
        self.q = float(q)
        self.labels = _integers("labels", labels, ndim=1)
        if self.q > 0 and len(self) > MOST_LABELS:
            raise ValueError(f"labels must be at most {MOST_LABELS:,} under label noise, got {len(self):,}")
        if self.labels.min() < 0 or self.labels.max() >= n_classes:
            raise ValueError(f"labels must lie in [0, {n_classes}), got {self.labels.min()} to {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.labels)

    def predict(self, weights: ArrayLike) -> Ints:
        """Winning classes.

        Args:
            weights: integers, shape (Q, n), computed without any label.
        Returns:
            classes, shape (Q,).
        Raises:
            ValueError: if the shape is wrong or a weight is no integer.
        """
        return self._winners(self._weights(weights))[0]

    def certify(self, weights: ArrayLike, method: Method | None = None) -> FlipCertificates:
        """Winning classes, and how many flipped labels cannot change them.

        Args:
            weights: see `predict`.
            method: "exact": the largest radius there is, from the worst flips (two classes, or q = 0). "neyman-pearson": the
                largest that the winning probability allows. "kl": the paper's. Default: "exact" where it exists.
        Raises:
            ValueError: see `predict`; or if the method does not fit q and the number of classes.
        """
        weights = self._weights(weights)
        method = self._method(method)
        winners, log_failure = self._winners(weights, tight=method == "neyman-pearson")
        if method == "exact":
            worst = self._worst_count if self.q == 0 else self._worst_law
            radius, won = np.array([worst(*pair) for pair in zip(weights, winners, strict=True)], dtype=np.int64).T
        else:
            won = log_failure < WON
            radius = exact_label_radius(log_failure, self.q, self.n_classes, most=len(self))
            if method == "kl":  # never the larger one, but for q within 1e-9 of its limit, where it has no margin left
                radius = np.minimum(radius, kl_radius(log_failure, self.q, self.n_classes))
        return FlipCertificates(winners, radius, won == 0, log_failure)

    def evidence(self, weights: ArrayLike, method: Method | None = None) -> dict[str, Any]:
        """Plain data of one query, weights (n,), from which `label_flip_certificate` recomputes its certificate."""
        (row,) = self._weights(np.asarray(weights)[None])
        return {
            "weights": row.tolist(),
            "labels": self.labels.tolist(),
            "n_classes": self.n_classes,
            "q": self.q,
            "method": self._method(method),
        }

    def contest(self, weights: ArrayLike, winner: ArrayLike, rival: ArrayLike) -> Contest:
        """The law of votes(winner) - votes(rival), per query; `winner` and `rival` are classes, shape (Q,) or ()."""
        weights = np.asarray(weights)
        good, bad = self.labels == np.asarray(winner)[..., None], self.labels == np.asarray(rival)[..., None]
        p_good, p_bad = np.where(good, self.keep, self.moved), np.where(bad, self.keep, self.moved)
        up = weights > 0
        draw = np.where(good | bad, self.q - self.moved, 1 - 2 * self.moved)
        return Contest(np.abs(weights), np.where(up, p_bad, p_good), np.where(up, p_good, p_bad), draw)

    def __repr__(self) -> str:
        return f"LabelVote(n={len(self)}, n_classes={self.n_classes}, q={self.q})"

    def _method(self, method: Method | None) -> Method:
        exact = self.q == 0 or self.n_classes == 2
        method = check_choice("method", method or ("exact" if exact else "neyman-pearson"), ("exact", "neyman-pearson", "kl"))
        if method == "exact" and not exact:
            raise ValueError(f"method 'exact' needs two classes or q = 0, got {self}")
        if method != "exact" and self.q == 0:
            raise ValueError(f"method {method!r} needs label noise, q > 0, got {self}")
        return cast(Method, method)

    def _weights(self, weights: ArrayLike) -> Ints:
        array = _integers("weights", weights, ndim=2)
        if array.shape[1] != len(self):
            raise ValueError(f"weights must have shape (Q, {len(self)}), got {array.shape}")
        if self.q > 0 and np.abs(array).sum(1).max() > MOST_POINTS:
            raise ValueError(f"weights must sum to at most {MOST_POINTS:g} per query, got {np.abs(array).sum(1).max()}")
        return array

    def _winners(self, weights: Ints, *, tight: bool = False) -> tuple[Ints, Floats]:
        """Winners, and log-failures of their hardest contests: from Chernoff in batches, exact where it must be (or `tight`)."""
        votes = np.stack([weights @ (self.labels == k).astype(np.int64) for k in range(self.n_classes)], axis=1)
        winners, hardest = votes.argmax(1), np.full(len(weights), -math.inf)
        if self.q == 0:
            return winners, hardest
        for start in range(0, len(weights), BLOCK):
            rows = slice(start, start + BLOCK)
            for shift in range(1, self.n_classes):
                rivals = (winners[rows] + shift) % self.n_classes
                bound = chernoff_log_failure(self.contest(weights[rows], winners[rows], rivals))
                hardest[rows] = np.maximum(hardest[rows], bound)
        for i in np.flatnonzero((hardest >= HALF) | tight):
            winners[i], hardest[i] = self._knockout(weights[i], int(winners[i]))
        return winners, hardest

    def _knockout(self, weights: Ints, first: int) -> tuple[int, float]:
        """A class that beats every other one survives any order of contests; if there is none, `first` is predicted."""
        champion = first
        for rival in range(self.n_classes):
            if rival != champion and self._failure(weights, champion, rival) >= HALF > self._failure(weights, rival, champion):
                champion = rival
        hardest = max(self._failure(weights, champion, rival) for rival in range(self.n_classes) if rival != champion)
        return (champion, hardest) if hardest < HALF else (first, 0.0)

    def _failure(self, weights: Ints, winner: int, rival: int) -> float:
        contest = self.contest(weights, winner, rival)
        return min(float(chernoff_log_failure(contest)), exact_log_failure(contest))

    def _worst_count(self, weights: Ints, winner: int) -> tuple[int, bool]:
        """Without noise: against each rival flip where most is gained; a tie goes to the lower class, as in `argmax`."""
        radius = len(self)
        for rival in range(self.n_classes):
            if rival != winner:
                cast = weights * ((self.labels == winner) * 1 - (self.labels == rival))
                gains = np.sort(cast + np.abs(weights))[::-1]
                radius = min(radius, int(np.sum(cast.sum() + (winner < rival) > np.cumsum(gains))))
        return radius, True

    def _worst_law(self, weights: Ints, winner: int) -> tuple[int, bool]:
        """Two classes with noise: flipping the largest votes for the winner is the worst; bisection over how many."""
        contest = self.contest(weights, winner, 1 - winner)
        cast = np.where(contest.win > contest.lose, contest.size, -contest.size)
        order = np.argsort(-cast, kind="stable")
        low, high = -1, int(np.sum(cast > 0))  # the last number leaves no vote for the winner
        while high - low > 1:
            flips = (low + high) // 2
            lose, win = contest.lose.copy(), contest.win.copy()
            turned = order[:flips]
            lose[turned], win[turned] = win[turned], lose[turned]
            low, high = (flips, high) if _wins(contest._replace(lose=lose, win=win)) else (low, flips)
        return max(low, 0), low >= 0


def label_flip_certificate(evidence: Mapping[str, Any], noise: object = None, alpha: float = 0.0) -> tuple[int, float, bool]:
    """Prediction, radius and abstention of one query, recomputed from integers alone.

    Args:
        evidence: "weights" and "labels", lists of n integers; "n_classes", "q" and "method" of `LabelVote`.
        noise, alpha: not used: the label noise is q, and nothing is sampled.
    Raises:
        ValueError: if the evidence is incomplete or impossible.
    """
    missing = {"weights", "labels", "n_classes", "q", "method"} - set(evidence)
    if missing:
        raise ValueError(f"evidence of a label-flip certificate must hold {sorted(missing)}, got {sorted(evidence)}")
    vote = LabelVote(evidence["labels"], evidence["n_classes"], evidence["q"])
    result = vote.certify([evidence["weights"]], evidence["method"])
    return int(result.prediction[0]), float(result.radius[0]), bool(result.abstained[0])


class RidgeWeights:
    """The votes of ridge regression on fixed features: alpha(x) = X (X'X + ridge I)^-1 x, rounded to integers.

    It never sees a label, and neither may whatever made the features or chose `ridge`: otherwise a flip changes the weights too
    and no certificate holds. One-hot regressions by argmax are exactly `LabelVote` with these weights.

    Args:
        features: X, shape (n, d).
        ridge: strength of the penalty, > 0; chosen beforehand or from X alone.
        levels: largest weight after rounding. A matter of accuracy, not of soundness: the rounded rule is the one that predicts.
    """

    def __init__(self, features: ArrayLike, *, ridge: float = 1.0, levels: int = 15) -> None:
        self.features = check_finite_array("features", features, ndim=2)
        self.ridge, self.levels = check_positive("ridge", ridge), check_count("levels", levels)
        gram = self.features.T @ self.features + self.ridge * np.eye(self.features.shape[1])
        try:
            self._projector = np.ascontiguousarray(cho_solve(cho_factor(gram, lower=True), self.features.T).T)
        except np.linalg.LinAlgError:
            raise ValueError(f"ridge must be large enough for X'X + ridge I to be positive definite, got {ridge}") from None

    def __call__(self, queries: ArrayLike) -> Ints:
        """Weights of the n examples for each query.

        Args:
            queries: features, shape (Q, d).
        Returns:
            int64 array (Q, n) with absolute values up to `levels`. A row depends on its query alone, not on its batch.
        Raises:
            ValueError: if the shape is wrong or a feature is not finite.
        """
        queries = check_finite_array("queries", queries, ndim=2)
        if queries.shape[1] != self.features.shape[1]:
            raise ValueError(f"queries must have shape (Q, {self.features.shape[1]}), got {queries.shape}")
        weights = np.empty((len(queries), len(self.features)), dtype=np.int64)
        for row, query in zip(weights, queries, strict=True):  # one product for all would round a row as its place in the batch
            alpha = self._projector @ query
            largest = np.abs(alpha).max()
            row[:] = np.rint(self.levels * (alpha / (largest if largest > 0 else 1.0)))
        return weights


# Helpers -----------------------------------------------------------------------------------------------------------------------


def _wins(contest: Contest) -> bool:
    """Whether P(S > 0) >= 1/2 + MARGIN for sure; the exact law only where Chernoff leaves it open."""
    if chernoff_log_failure(contest) < WON:
        return True
    if chernoff_log_failure(contest._replace(lose=contest.win, win=contest.lose)) < HALF:
        return False
    return exact_log_failure(contest) < WON


def _label_law(q: float, n_classes: int, *, noiseless: bool = True) -> tuple[float, float]:
    """Probabilities that a label is kept, and that it becomes one given other class."""
    others = check_count("n_classes", n_classes, least=2) - 1
    q = check_real("q", q)
    if not 0 <= q < others / (others + 1) or (q == 0 and not noiseless) or not q / others < 1 - q:
        allowed = f"a flip probability in {'[' if noiseless else '('}0, {others}/{others + 1})"
        raise ValueError(f"q must be {allowed} for {others + 1} classes, got {q}")
    return 1 - q, q / others


def _check_log_failure(log_failure: ArrayLike) -> Floats:
    array = check_finite_array("log_failure", log_failure)
    if array.max() > 0:
        raise ValueError(f"log_failure must be <= 0, got {array.max()}")
    return array


def _integers(name: str, value: ArrayLike, *, ndim: int) -> Ints:
    array = check_finite_array(name, value, ndim=ndim)
    bad = (array != np.rint(array)) | (np.abs(array) > 2**31)
    if bad.any():
        raise ValueError(f"{name} must hold integers of at most 2^31, got {array[bad].flat[0]}")
    return array.astype(np.int64)
