"""Certificates that know more than the class probability: its gradient (second-order smoothing), or pairs (dipole).

One input, Gaussian noise, l2 attacks. With Z standard normal noise in units of sigma and A the event that the base
predicts class c, p = P(A) alone gives the radius z(p) of Cohen, Rosenfeld, Kolter (ICML 2019), attained by a half-space.

* Second order: a half-space has the gradient G = E[1_A Z] of norm phi(z(p)), the largest possible. With an upper bound of
  ||G|| the worst case is a slab, whose radius is larger.
* Dipole: noise in pairs (Z, -Z); how often both give c (S) and only the first does (N) pins another worst case.

Radii are in units of sigma, the smallest one where features have their own (Z is then the noise over its own sigma), and
hold for one perturbation fixed before the noise is drawn. Nothing here is proven for attackers who adapt over the steps
of an episode. Proofs: docs/methods/second_order.md.
Source: Levine, Kumar, Goldstein, Feizi, "Tight Second-Order Certificates for Randomized Smoothing", arXiv:2010.10549; the
split-mean bound and the dipole's count of one-sided pairs are derived in the docs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from robustrl.certify.confidence import clopper_pearson_lower, failure_upper
from robustrl.errors import check_alpha, check_budget, check_count, check_finite_array, check_probability, check_real

SLACK = 1e-14
"""Probability given away where a radius is solved for, several times what rounding can do.

Radii lose about 1e-13 by it; up to 1e-12 at p = .5001 and 4e-10 at p = 1/2 + 1e-9, where they hang on the last digits of p.
"""


@dataclass(frozen=True)
class SecondOrderBound:
    """What the second-order method certifies; `radius` in units of sigma, 0 without a certificate.

    Args:
        radius: the prediction is constant on the open l2 ball of this radius.
        p_lower: lower confidence limit of the class's probability; the method abstains unless it exceeds 1/2.
        gradient_upper: upper confidence limit of ||G||.
    """

    radius: float
    p_lower: float
    gradient_upper: float

    @property
    def abstained(self) -> bool:
        return self.p_lower <= 0.5


@dataclass(frozen=True)
class DipoleBound:
    """What the dipole method certifies; see `SecondOrderBound`.

    Args:
        radius: in units of sigma.
        both_lower: lower confidence limit of S, the probability that both noises of a pair give the class.
        one_lower: lower confidence limit of N, the probability that the first of a pair does and the second does not.
    """

    radius: float
    both_lower: float
    one_lower: float

    @property
    def p_lower(self) -> float:
        """Lower confidence limit of the class's probability, S + N."""
        return self.both_lower + self.one_lower

    @property
    def abstained(self) -> bool:
        return self.p_lower <= 0.5


@dataclass(frozen=True)
class SplitMeans:
    """Evidence on the gradient from two independent batches of independent noises; see `split_mean_bound`."""

    inner: float
    norm2: float
    n1: int
    n2: int

    @classmethod
    def from_sums(cls, sums: ArrayLike, n1: int, n2: int) -> SplitMeans:
        """From the sums of (1_A - 1/2) Z over either batch, shape (2, n_features)."""
        n1, n2 = check_count("n1", n1), check_count("n2", n2)
        first, second = check_finite_array("sums", sums, ndim=2)
        return cls(float(first @ second) / (n1 * n2), float(np.linalg.norm(second)) / n2, n1, n2)

    def gradient_upper(self, alpha: float) -> float:
        return split_mean_bound(self.inner, self.norm2, self.n1, self.n2, alpha)


@dataclass(frozen=True)
class NoisePairs:
    """Evidence on the gradient from pairs of independent noises; see `pairs_gradient_bound`."""

    mean_inner: float
    n_pairs: int
    n_features: int

    def gradient_upper(self, alpha: float) -> float:
        return pairs_gradient_bound(self.mean_inner, self.n_pairs, self.n_features, alpha)


def certify_second_order(count: int, n: int, gradient: SplitMeans | NoisePairs, alpha: float) -> SecondOrderBound:
    """Second-order certificate from samples: alpha/2 for the probability, alpha/2 for the gradient.

    The class must be fixed before these samples are drawn (from a batch of its own). The gradient may come from the same
    samples as the count.

    Args:
        count: samples, of `n`, that gave the class.
        n: independent samples.
        gradient: evidence on the gradient of the same class's probability.
        alpha: failure probability of the whole statement, in (0, 0.5].
    Raises:
        ValueError: if a count or alpha is out of range.
    """
    alpha = check_alpha(alpha)
    p_lower = float(clopper_pearson_lower(count, n, alpha / 2))
    failure = float(failure_upper(count, n, alpha / 2))
    gradient_upper = gradient.gradient_upper(alpha / 2)
    return SecondOrderBound(second_order_radius(p_lower, gradient_upper, failure=failure), p_lower, gradient_upper)


def certify_dipole(both: int, exactly_one: int, n_pairs: int, alpha: float) -> DipoleBound:
    """Dipole certificate from pairs (x + noise, x - noise): alpha/2 for each of the two probabilities.

    P(exactly one of a pair gives the class) = 2 N by symmetry, and counting both kinds of one-sided pairs is sharper than
    counting the first kind. The class must be fixed before these pairs are drawn.

    Args:
        both: pairs whose two members gave the class.
        exactly_one: pairs of which exactly one member did.
        n_pairs: independent pairs.
        alpha: failure probability of the whole statement, in (0, 0.5].
    Raises:
        ValueError: if the counts do not fit into n_pairs, or alpha is out of range.
    """
    alpha = check_alpha(alpha)
    n_pairs, both, exactly_one = (
        check_count("n_pairs", n_pairs),
        check_count("both", both, least=0),
        check_count("exactly_one", exactly_one, least=0),
    )
    if both + exactly_one > n_pairs:
        raise ValueError(f"both + exactly_one must be at most n_pairs = {n_pairs}, got {both} + {exactly_one}")
    both_lower = float(clopper_pearson_lower(both, n_pairs, alpha / 2))
    one_lower = float(clopper_pearson_lower(exactly_one, n_pairs, alpha / 2)) / 2
    return DipoleBound(dipole_radius(both_lower, one_lower), both_lower, one_lower)


def second_order_radius(p_lower: float, gradient_upper: float, *, failure: float | None = None) -> float:
    """Radius, over sigma, within which a class keeps probability above 1/2, from its probability and gradient.

    The worst classifier is the slab {z(a) < u < -z(b)}, a + b = 1 - p, phi(z(b)) - phi(z(a)) = g. At g >= phi(z(p)) it is a
    half-space and the radius is Cohen's z(p): larger gradients need no clipping.

    Args:
        p_lower: lower bound of p, in [0, 1].
        gradient_upper: upper bound of ||G|| = sigma ||grad p||, >= 0 (inf: nothing known).
        failure: upper bound of 1 - p, for more digits than 1 - p_lower has.
    Returns:
        the radius, rounded down (`SLACK`), never below z(p) but for that; 0 if p_lower <= 1/2, inf if p = 1.
    Raises:
        ValueError: if a number is NaN or out of range, or p_lower and failure contradict each other.
    """
    p_lower = _probability("p_lower", p_lower)
    gradient = float(check_budget("gradient_upper", check_real("gradient_upper", gradient_upper, infinite=True)))
    q = 1 - p_lower if failure is None else _probability("failure", failure)
    if abs(p_lower + q - 1) > 1e-11:
        raise ValueError(f"failure must be 1 - p_lower = {1 - p_lower}, got {failure}")
    if p_lower <= 0.5 or q >= 0.5:
        return 0.0
    if q == 0:
        return math.inf

    def gradient_of_slab(a: float) -> float:
        return _density(float(ndtri(q - a))) - _density(float(ndtri(a)))

    margin = 10 * SLACK * gradient_of_slab(0.0)
    a = _largest(lambda a: gradient_of_slab(a) >= gradient + margin, 0.0, q / 2)
    left, right = float(ndtri(a)), -float(ndtri(q - a))
    half_space = -float(ndtri(q)) * (1 - SLACK)
    return _largest(lambda r: bool(ndtr(left - r) + ndtr(r - right) <= 0.5 - SLACK), half_space, max(half_space, right))


def dipole_radius(s_lower: float, n_lower: float) -> float:
    """Radius, over sigma, within which a class keeps probability above 1/2, from what pairs (Z, -Z) give.

    The worst case has both members near the origin, abs(u) < z((1+S)/2), and one-sided pairs far out on the side that the
    perturbation leaves, u < z(N). Never below Cohen's z(S + N), and equal to it if S + 2N = 1.

    Args:
        s_lower: lower bound of S = P(both give the class).
        n_lower: lower bound of N = P(the first gives it, the second does not).
    Returns:
        the radius, rounded down (`SLACK`); 0 if S + N <= 1/2 or S = 0, inf if S = 1.
    Raises:
        ValueError: if a number is NaN or outside [0, 1], or S + 2N > 1.
    """
    s, n = _probability("s_lower", s_lower), _probability("n_lower", n_lower)
    if s + 2 * n > 1 + 1e-12:
        raise ValueError(f"s_lower + 2 * n_lower must be at most 1 (three disjoint events), got {s} + 2 * {n}")
    if s == 1:
        return math.inf
    edge, tail = -float(ndtri((1 - s) / 2)), float(ndtri(n))

    def failure(r: float) -> float:
        return float(ndtr(r - edge) + ndtr(-edge - r) - ndtr(tail - r))

    return _largest(lambda r: failure(r) <= 0.5 - SLACK, 0.0, edge)


def split_mean_bound(inner: float, norm2: float, n1: int, n2: int, alpha: float) -> float:
    """Upper confidence limit of ||G||, G = E[1_A Z], from the means of two independent batches.

    m1 and m2 are the means of (1_A - 1/2) Z over n1 and n2 independent draws of the noise Z; both are unbiased for G. Which
    batch is m1 must be fixed beforehand: the smaller of the two orders' bounds is not a bound at `alpha`.

    Args:
        inner: <m1, m2>.
        norm2: ||m2||_2.
        n1: draws in m1.
        n2: draws in m2.
        alpha: failure probability of the limit, in (0, 0.5].
    Returns:
        the limit, not clipped: `second_order_radius` takes a gradient above the largest possible one as no information.
    Raises:
        ValueError: if a number is not finite, norm2 < 0, a size is < 1 or alpha is out of range.
    Source: derived in docs/methods/second_order.md.
    """
    inner, norm2 = check_real("inner", inner), float(check_budget("norm2", check_real("norm2", norm2)))
    alpha = check_alpha(alpha)
    t1, t2 = _deviation(check_count("n1", n1), alpha / 2), _deviation(check_count("n2", n2), alpha / 2)
    return (t2 + math.sqrt(max(t2**2 + 4 * (inner + norm2 * t1), 0.0))) / 2 * (1 + SLACK)


def pairs_gradient_bound(mean_inner: float, n_pairs: int, n_features: int, alpha: float) -> float:
    """Upper confidence limit of ||G||, G = E[1_A Z], from pairs of independent noises: the paper's estimator.

    Args:
        mean_inner: mean over pairs of 1{both give the class} <Z, Z'>, unbiased for ||G||^2; may be negative.
        n_pairs: independent pairs.
        n_features: entries of Z.
        alpha: failure probability of the limit, in (0, 0.5].
    Returns:
        the limit, not clipped; see `split_mean_bound`, which is sharper from as many samples.
    Raises:
        ValueError: if a number is not finite, a size is < 1 or alpha is out of range.
    Source: arXiv:2010.10549, in units of sigma.
    """
    mean_inner, n_features = check_real("mean_inner", mean_inner), check_count("n_features", n_features)
    rate = -math.log(check_alpha(alpha)) / check_count("n_pairs", n_pairs)
    deviation = 4 * math.sqrt(n_features * rate) if n_features >= 2 * rate else 4 * math.sqrt(2) * rate
    return math.sqrt(max(mean_inner + deviation, 0.0)) * (1 + SLACK)


def _deviation(n: int, alpha: float) -> float:
    """T with P(mean of n copies of (1_A - 1/2) <Z, w> < its expectation - T) <= alpha, for every A and unit vector w.

    Chernoff: T = (psi(l) + ln(1/alpha) / n) / l for any fixed l > 0, with any bound psi of the centred variable's log-MGF.
    """
    rate = -math.log(alpha) / n
    rates = np.minimum(math.sqrt(8 * rate) * np.linspace(0.75, 1, 26), 20.0)
    return float(np.min((_log_mgf(rates) + rate) / rates)) * (1 + SLACK)


def _log_mgf(rate: np.ndarray) -> np.ndarray:
    """Upper bound of log E exp(l (X - E X)) over all A, X = (1_A - 1/2) <Z, w>, at l = `rate`: a dual of the worst case.

    The bound holds for every cut; the worst A is nearly {abs(u) > cut and u > 0, or abs(u) < cut and u < 0} with this one.
    """
    cut = math.sqrt(2 * math.log(2)) + rate / 5
    level = np.sinh(rate * cut / 2) / (rate * cut / 2)
    mean = np.exp(rate**2 / 8)

    def beyond(t: np.ndarray | float) -> np.ndarray:
        """E of [sinh(l Z / 2) / level - l Z / 2] on Z > t."""
        sinh = mean / 2 * (ndtr(rate / 2 - t) - ndtr(-rate / 2 - t))
        return np.asarray(sinh / level - rate / 2 * np.exp(-np.square(t) / 2) / math.sqrt(2 * math.pi))

    return np.asarray(np.log(level) - 1 + mean / level + 4 * beyond(cut) - 2 * beyond(0.0) + SLACK)


def _largest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Bisection for where `holds` turns false between `low` and `high`, from below; `low` is taken to hold."""
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _probability(name: str, value: float) -> float:
    return float(check_probability(name, check_real(name, value)))
