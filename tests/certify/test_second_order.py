from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq, linprog, minimize_scalar
from scipy.sparse import csr_matrix, identity, vstack
from scipy.sparse import hstack as sparse_hstack
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from robustrl.certify import second_order
from robustrl.certify.confidence import clopper_pearson_lower, failure_upper
from robustrl.certify.methods import METHODS
from robustrl.certify.second_order import (
    NoisePairs,
    SplitMeans,
    certify_dipole,
    certify_second_order,
    dipole_radius,
    pairs_gradient_bound,
    second_order_radius,
    split_mean_bound,
)
from robustrl.noise import Gaussian, Laplace

Classifier = Callable[[np.ndarray], np.ndarray]


def phi(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def z(p: float) -> float:
    return float(ndtri(p))


# --- radii from exactly known probabilities ---------------------------------------------------------------------------

# solved with 40 digits and by linear programs on a grid; the last column is the slab's lighter tail
SECOND_ORDER = [(0.6, 0.2, 0.38170479, 0.084799727), (0.75, 0.1, 0.93667803, 0.081861634), (0.75, 0, 1.12139103, 0.125)]
SECOND_ORDER += [(0.9, 0.1, 1.40487003, 0.020071737), (0.9, 0.05, 1.51186869, 0.034856911), (0.9, 0, 1.64359101, 0.05)]
SECOND_ORDER += [(0.99, 0.02, 2.37278933, 0.0011728368), (0.99, 0.01, 2.46060801, None), (0.999, 0.001, 3.21520286, None)]
SECOND_ORDER += [(0.95, 0.5, 1.64485363, None)]
DIPOLE = [(0.8, 0.1, 1.28155157), (0.8, 0.05, 1.27263410), (0.5, 0.25, 0.67448975), (0.5, 0.2, 0.60869743)]
DIPOLE += [(0.3, 0.3, 0.27890423), (0.9, 0.02, 1.64386500), (0.6, 0, 0.68054353), (0.0, 0.5, 0)]
DIPOLE += [(0.89476, 0.0472581, 1.61971212), (0.538457, 0.197413, 0.69863818), (0.685067, 0.140473, 0.99572096)]


@pytest.mark.parametrize(("p", "gradient", "radius", "tail"), SECOND_ORDER)
def test_second_order_radius_matches_the_table(p: float, gradient: float, radius: float, tail: float | None) -> None:
    assert second_order_radius(p, gradient) == pytest.approx(radius, abs=6e-9)
    if tail is not None:  # the slab with these tails has this gradient, and is undecided at this radius
        a, b = tail, 1 - p - tail
        assert phi(z(b)) - phi(z(a)) == pytest.approx(gradient, abs=1e-8)
        assert ndtr(-z(b) - radius) - ndtr(z(a) - radius) == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize(("both", "one", "radius"), DIPOLE)
def test_dipole_radius_matches_the_table(both: float, one: float, radius: float) -> None:
    assert dipole_radius(both, one) == pytest.approx(radius, abs=6e-9)


@pytest.mark.parametrize(
    ("p", "gain"), [(0.55, 3.826), (0.6, 2.686), (0.75, 1.663), (0.9, 1.2825), (0.99, 1.107), (0.999, 1.065)]
)
def test_gain_over_cohen_where_the_gradient_vanishes(p: float, gain: float) -> None:
    assert second_order_radius(p, 0) / z(p) == pytest.approx(gain, rel=5e-4)


def high_precision_radius(q: float, gradient: float) -> mpmath.mpf:
    """The slab's radius in 60 digits, by bisection over its tail and over the radius."""
    with mpmath.workdps(60):
        q, gradient = mpmath.mpf(q), mpmath.mpf(gradient)

        def quantile(t: mpmath.mpf) -> mpmath.mpf:
            return mpmath.findroot(lambda u: mpmath.log(mpmath.ncdf(u)) - mpmath.log(t), float(ndtri(float(t))))

        def largest(holds: Callable[[mpmath.mpf], bool], low: mpmath.mpf, high: mpmath.mpf) -> mpmath.mpf:
            for _ in range(110):
                middle = (low + high) / 2
                low, high = (middle, high) if holds(middle) else (low, middle)
            return low

        a = largest(lambda a: mpmath.npdf(quantile(q - a)) - mpmath.npdf(quantile(a)) >= gradient, mpmath.mpf(0), q / 2)
        left, right = quantile(a), -quantile(q - a)
        return largest(lambda r: mpmath.ncdf(left - r) + mpmath.ncdf(r - right) <= 0.5, mpmath.mpf(0), right)


@pytest.mark.parametrize(
    ("q", "share"), [(0.4999, 0.3), (0.4, 0.001), (0.25, 0.9), (1e-3, 0.5), (1e-6, 0.02), (1e-12, 0.5), (1e-12, 0.999)]
)
def test_second_order_radius_keeps_its_digits_and_errs_downwards(q: float, share: float) -> None:
    gradient = share * phi(z(q))
    short = high_precision_radius(q, gradient) - second_order_radius(1 - q, gradient, failure=q)
    assert 0 <= short < 1e-12


@pytest.mark.parametrize(("both", "one"), [(0.3, 0.3), (0.9, 0.02), (0.6, 0.0), (0.999, 1e-4), (1 - 2.0**-40, 2.0**-43)])
def test_dipole_radius_keeps_its_digits_and_errs_downwards(both: float, one: float) -> None:
    radius = dipole_radius(both, one)
    with mpmath.workdps(50):
        # the tails are solved in doubles and polished: edges u with Phi(u) = t
        def quantile(t: mpmath.mpf) -> mpmath.mpf:
            return mpmath.findroot(lambda u: mpmath.log(mpmath.ncdf(u)) - mpmath.log(t), z(float(t)))

        edge = -quantile((1 - mpmath.mpf(both)) / 2)

        def probability(r: mpmath.mpf) -> mpmath.mpf:
            far = mpmath.ncdf(quantile(mpmath.mpf(one)) - r) if one else 0
            return far + mpmath.ncdf(edge - r) - mpmath.ncdf(-edge - r)

        assert probability(mpmath.mpf(radius)) >= 0.5 > probability(mpmath.mpf(radius) + mpmath.mpf("2e-12"))


@pytest.mark.parametrize("q", [0.4999999, 0.3, 1e-2, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("excess", [1.0, 1.0001, 3.0, math.inf])
def test_the_largest_gradient_gives_cohens_radius(q: float, excess: float) -> None:
    radius = second_order_radius(1 - q, excess * phi(z(q)), failure=q)
    assert radius <= -z(q)
    assert radius == pytest.approx(-z(q), rel=2e-14)


def test_second_order_is_never_below_cohen_and_monotone() -> None:
    failures = np.concatenate([0.5 - np.geomspace(1e-12, 0.1, 12), np.geomspace(0.39, 1e-12, 14)])
    shares = np.linspace(0, 1.2, 13)
    radii = np.array([[second_order_radius(1 - q, s * phi(z(q)), failure=q) for s in shares] for q in failures])
    assert np.all(radii >= -ndtri(failures)[:, None] * (1 - 2e-14))
    assert np.all(np.diff(radii, axis=1) <= 1e-13)
    for gradient in (0.0, 0.03, 0.2):
        assert np.all(np.diff([second_order_radius(1 - q, gradient, failure=q) for q in failures]) >= -1e-13)


def test_dipole_is_never_below_cohen_and_monotone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        both = rng.random()
        one = rng.random() * (1 - both) / 2
        radius = dipole_radius(both, one)
        assert radius >= max(z(both + one), 0) - 1e-12
        assert radius <= dipole_radius(both + (1 - both - 2 * one) / 2, one) + 1e-13
        assert radius <= dipole_radius(both, one + (1 - both - 2 * one) / 4) + 1e-13
        assert radius >= dipole_radius(both / 2, one) - 1e-13


@pytest.mark.parametrize("p", [0.51, 0.7, 0.9, 0.9999])
def test_half_space_pairs_give_exactly_cohen(p: float) -> None:
    # Z < z(p) for both members of a pair iff |Z| < z(p), so S = 2p - 1, N = 1 - p, S + 2N = 1
    assert dipole_radius(2 * p - 1, 1 - p) == pytest.approx(z(p), abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.3, 0.0])
def test_no_majority_no_radius(p: float) -> None:
    assert second_order_radius(p, 0.0) == 0
    for a_hair in (-1e-12, 0.0, 1e-12):  # two roundings of the same limit, on either side of 1/2
        assert second_order_radius(0.5 + a_hair, 0.0, failure=0.5 + 2e-12) == 0
        assert second_order_radius(0.5, 0.0, failure=0.5 + a_hair) == 0
    assert dipole_radius(p, 0.0) == 0
    assert dipole_radius(p / 2, p / 2) == 0


def test_certainty_is_robust_everywhere() -> None:
    assert second_order_radius(1.0, 0.0) == dipole_radius(1.0, 0.0) == math.inf


# --- linear programs: the worst classifier by brute force -------------------------------------------------------------

CELLS = np.concatenate([[-np.inf], np.linspace(-7, 9, 4001), [np.inf]])


def density(u: np.ndarray) -> np.ndarray:
    return np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("seed", range(6))
def test_no_classifier_of_the_linear_program_beats_the_second_order_radius(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.52, 0.99)
    gradient = phi(z(p)) * rng.uniform(0.05, 1.1)
    radius = second_order_radius(p, gradient)
    clean, first_moment = np.diff(ndtr(CELLS)), -np.diff(density(CELLS))
    constraints = {"A_ub": [-clean, -first_moment], "b_ub": [-p, gradient], "bounds": (0, 1), "method": "highs"}
    worst = linprog(np.diff(ndtr(CELLS - radius)), **constraints).fun  # masses of cells are exact: a true classifier
    assert 0.5 - 1e-7 < worst < 0.5 + 1e-5
    assert linprog(np.diff(ndtr(CELLS - 0.6 * radius)), **constraints).fun > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_no_classifier_of_the_linear_program_beats_the_dipole_radius(seed: int) -> None:
    rng = np.random.default_rng(seed)
    both = rng.uniform(0.3, 0.95)
    one = rng.uniform(max(0.0, 0.52 - both), (1 - both) / 2)
    radius = dipole_radius(both, one)
    edges = np.concatenate([np.linspace(0, 9, 4001), [np.inf]])
    pair = 2 * np.diff(ndtr(edges))
    right, left = np.diff(ndtr(edges - radius)), np.diff(ndtr(edges + radius))  # masses of a cell and of its mirror image
    none = np.zeros_like(pair)
    # per cell: both members are c, only the right one, only the left one
    cost = np.concatenate([right + left, right, left])
    evidence = csr_matrix(np.stack([np.concatenate([-pair, none, none]), np.concatenate([none, -pair, -pair])]))
    shares = sparse_hstack([identity(len(pair))] * 3)
    b_ub = np.concatenate([[-both, -2 * one], np.ones(len(pair))])
    worst = linprog(cost, vstack([evidence, shares]), b_ub, bounds=(0, None), method="highs").fun
    assert 0.5 - 1e-7 < worst < 0.5 + 1e-5


# --- classifiers with closed forms, attacked --------------------------------------------------------------------------


def flip_distance(probability: Callable[[float], float], limit: float = 12.0) -> float:
    """Smallest |shift| at which a probability falls to 1/2, by scanning and root finding on both sides."""
    found = [limit]
    for sign in (1, -1):
        grid = np.linspace(0, limit, 2401)
        below = np.flatnonzero(np.array([probability(sign * s) for s in grid]) <= 0.5)
        if below.size:
            found.append(
                brentq(lambda s, sign=sign: probability(sign * s) - 0.5, grid[below[0] - 1], grid[below[0]], xtol=1e-14)
            )
    return min(found)


@pytest.mark.parametrize("seed", range(10))
def test_attacks_on_intervals_never_cross_either_radius_and_reach_the_second_order_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = -rng.uniform(0.4, 2.5), rng.uniform(0.9, 2.5)

    def inside(shift: float) -> float:
        return float(ndtr(b - shift) - ndtr(a - shift))

    p, gradient, flip = inside(0), abs(phi(a) - phi(b)), flip_distance(inside)
    assert p > 0.5
    near = min(-a, b)
    both = 2 * float(ndtr(near)) - 1
    assert flip - 1e-10 < second_order_radius(p, gradient) <= flip + 1e-12  # an interval is the worst case
    assert dipole_radius(both, p - both) <= flip + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_attacks_on_the_outside_of_intervals_never_cross_either_radius(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.1, 1.5) * rng.choice([-1, 1])
    b = a + rng.uniform(0.2, 1.2)

    def outside(shift: float) -> float:
        return float(ndtr(a - shift) + ndtr(shift - b))

    p, gradient, flip = outside(0), abs(phi(a) - phi(b)), flip_distance(outside)
    assert p > 0.5
    # both members outside: neither Z nor -Z in (a, b); the two intervals overlap if a < 0 < b
    overlap = 2 * float(ndtr(min(-a, b))) - 1 if a < 0 < b else 0.0
    both = 1 - 2 * (1 - p) + overlap
    assert second_order_radius(p, gradient) <= flip + 1e-12
    assert dipole_radius(both, p - both) <= flip + 1e-12


@pytest.mark.parametrize(("t1", "t2"), [(1.0, 1.0), (0.7, 2.0), (2.5, 1.2), (0.6, 3.0)])
def test_attacks_on_a_quadrant_never_cross_either_radius(t1: float, t2: float) -> None:
    # class c where u1 < t1 and u2 < t2: the complement of a union of two half-spaces
    p = float(ndtr(t1) * ndtr(t2))
    gradient = math.hypot(phi(t1) * float(ndtr(t2)), phi(t2) * float(ndtr(t1)))
    both = (2 * float(ndtr(t1)) - 1) * (2 * float(ndtr(t2)) - 1)
    angles = np.linspace(0, 2 * math.pi, 3601)
    for radius in (second_order_radius(p, gradient), dipole_radius(both, p - both)):
        assert radius > z(p)
        worst = np.min(ndtr(t1 - radius * np.cos(angles)) * ndtr(t2 - radius * np.sin(angles)))
        assert worst > 0.5


# --- gradient bounds --------------------------------------------------------------------------------------------------


def slab(u: np.ndarray) -> np.ndarray:
    return np.abs(u[..., 0]) < -z(0.05)  # p = .9, G = 0


def half_space(u: np.ndarray) -> np.ndarray:
    return u[..., 0] < z(0.9)  # p = .9, ||G|| = phi(z(.9)) = .1755


def skewed(u: np.ndarray) -> np.ndarray:
    return (u[..., 0] > -1.0) & (u[..., 0] < 2.0)  # ||G|| = phi(1) - phi(2) = .188


NORMS = [(slab, 0.0), (half_space, phi(z(0.9))), (skewed, phi(1.0) - phi(2.0))]


def split_means(f: Classifier, n1: int, n2: int, d: int, rng: np.random.Generator) -> tuple[SplitMeans, np.ndarray]:
    noise = rng.standard_normal((n1 + n2, d))
    sign = f(noise) - 0.5
    sums = np.stack([sign[:n1] @ noise[:n1], sign[n1:] @ noise[n1:]])
    return SplitMeans.from_sums(sums, n1, n2), sums[0] / n1


def pair_mean(f: Classifier, n_pairs: int, d: int, rng: np.random.Generator) -> float:
    first, second = rng.standard_normal((2, n_pairs, d))
    return float(np.mean((f(first) & f(second)) * np.sum(first * second, axis=1)))


@pytest.mark.parametrize(("f", "norm"), NORMS)
@pytest.mark.parametrize(("d", "n1", "n2"), [(5, 1000, 1000), (100, 600, 1400)])
def test_split_mean_bound_covers_the_gradient_and_is_not_vacuous(f: Classifier, norm: float, d: int, n1: int, n2: int) -> None:
    rng, alpha, runs = np.random.default_rng(1), 0.1, 150
    bounds = np.array([split_means(f, n1, n2, d, rng)[0].gradient_upper(alpha) for _ in range(runs)])
    assert binomtest(int(np.sum(bounds < norm)), runs, alpha, "greater").pvalue > 1e-4
    deviation = math.sqrt(math.log(2 / alpha) / (2 * min(n1, n2)))
    noise_norm = norm + math.sqrt(d / n2) / 2
    assert np.median(bounds) < norm + 2 * deviation + math.sqrt(noise_norm * deviation)


@pytest.mark.parametrize(("f", "norm"), NORMS)
def test_pairs_bound_covers_the_gradient_within_twice_its_slack(f: Classifier, norm: float) -> None:
    rng, alpha, runs, n_pairs, d = np.random.default_rng(2), 0.1, 150, 2000, 5
    bounds = np.array([NoisePairs(pair_mean(f, n_pairs, d, rng), n_pairs, d).gradient_upper(alpha) for _ in range(runs)])
    assert binomtest(int(np.sum(bounds < norm)), runs, alpha, "greater").pvalue > 1e-4
    assert np.median(bounds) < math.sqrt(norm**2 + 2 * 4 * math.sqrt(d * math.log(1 / alpha) / n_pairs))


def test_split_means_are_useful_where_pairs_are_vacuous() -> None:
    # 3072 features, 1e5 samples, alpha' = .0005: a slab's signs do not depend on the other features, so that the means of
    # those are exactly normal, and the means of the slab's own feature nearly
    rng, d, half = np.random.default_rng(9), 3072, 50_000
    means = rng.standard_normal((200, 2, d)) / (2 * math.sqrt(half))
    splits = [SplitMeans.from_sums(half * m, half, half).gradient_upper(0.0005) for m in means]
    split = float(np.median(splits))
    assert split == pytest.approx(0.0385, abs=1e-3)
    assert 0.025 < min(splits) < max(splits) < 0.055
    assert pairs_gradient_bound(0.0, 50_000, 3072, 0.0005) ** 2 == pytest.approx(2.733, abs=1e-3)
    assert second_order_radius(0.9, split) > 1.15 * z(0.9)
    assert second_order_radius(0.9, math.sqrt(2.733)) == pytest.approx(z(0.9), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 50, 10**6])
@pytest.mark.parametrize("n", [20, 10_000, 10**8])
@pytest.mark.parametrize("norm", [0.0, 0.1, 0.39])
def test_split_means_beat_pairs_on_typical_evidence_from_as_many_samples(d: int, n: int, norm: float) -> None:
    split = split_mean_bound(norm**2, math.sqrt(norm**2 + d / (2 * n)), n // 2, n // 2, 0.001)
    assert norm < split < pairs_gradient_bound(norm**2, n // 2, d, 0.001)


@pytest.mark.parametrize(("f", "edges"), [(skewed, (-1.0, 2.0)), (half_space, (-np.inf, z(0.9)))])
def test_means_estimate_the_gradient_of_the_closed_form_probability(f: Classifier, edges: tuple[float, float]) -> None:
    def probability(shift: float) -> float:
        return float(ndtr(edges[1] - shift) - ndtr(edges[0] - shift))

    difference = (probability(1e-5) - probability(-1e-5)) / 2e-5
    n = 200_000
    evidence, mean = split_means(f, n, n, 2, np.random.default_rng(3))
    assert mean == pytest.approx([difference, 0], abs=5 * 0.5 / math.sqrt(n))
    assert evidence.inner == pytest.approx(difference**2, abs=5 * abs(difference) / math.sqrt(2 * n))
    assert evidence.norm2 == pytest.approx(abs(difference), abs=5 * 0.5 / math.sqrt(n))
    assert pair_mean(f, n, 2, np.random.default_rng(4)) == pytest.approx(difference**2, abs=5 * math.sqrt(2 / n))


def test_a_symmetric_classifier_has_no_gradient_and_no_one_sided_pairs() -> None:
    noise = np.random.default_rng(5).standard_normal((20_000, 3))
    plus, minus = slab(noise), slab(-noise)
    assert np.sum(plus != minus) == 0
    bound = certify_dipole(int(np.sum(plus & minus)), 0, len(noise), 0.01)
    assert bound.one_lower == 0
    assert bound.radius > z(bound.p_lower)


def exact_log_mgf(rate: float, cut: float) -> float:
    """log E exp(rate (X - E X)), X = s |Z| / 2, s = 1 beyond the cut and -1 below, in closed form."""
    up = math.exp(rate**2 / 8) * 2 * (ndtr(rate / 2 - cut))
    down = math.exp(rate**2 / 8) * 2 * (ndtr(cut + rate / 2) - ndtr(rate / 2))
    return math.log(up + down) - rate * (2 * phi(cut) - phi(0))


# specification: sub-Gaussian proxies 2 / l^2 psi(l) of the worst event, from scans
PROXIES = [(0.01, 0.250461), (0.03, 0.251387), (0.1, 0.254653), (0.3, 0.264217), (1, 0.299740), (2, 0.350030), (4, 0.401376)]


@pytest.mark.parametrize(("rate", "proxy"), PROXIES)
def test_log_mgf_bound_is_above_every_event_and_close_to_the_worst(rate: float, proxy: float) -> None:
    bound = float(second_order._log_mgf(np.array([rate]))[0]) * 2 / rate**2
    assert proxy - 1e-6 < bound < proxy * 1.004
    rng = np.random.default_rng(6)
    u = np.linspace(-12, 12, 6001)
    weights = np.diff(ndtr((u[1:] + u[:-1]) / 2), prepend=0, append=1)
    for _ in range(300):  # random unions of intervals, and random randomised events
        signs = np.where(np.searchsorted(np.sort(rng.normal(0, 2, rng.integers(1, 6))), u) % 2, 1.0, -1.0)
        chance = rng.random() ** 3
        mgf = weights @ (np.cosh(rate * u / 2) + (1 - chance) * signs * np.sinh(rate * u / 2))
        value = 2 / rate**2 * (math.log(mgf) - rate * (1 - chance) * (weights @ (signs * u)) / 2)
        assert value <= bound + 1e-5


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1, 0.3, 1, 2, 4])
def test_log_mgf_bound_is_a_bound_on_the_worst_family_and_nearly_attained(rate: float) -> None:
    worst = max(exact_log_mgf(rate, cut) for cut in np.linspace(0.5, 4, 1401))
    assert worst <= float(second_order._log_mgf(np.array([rate]))[0]) <= worst * 1.004


@pytest.mark.parametrize("rate", [1e-4, 0.001, 0.04, 1.0, 6.0, 20.0])
def test_log_mgf_bound_errs_upwards(rate: float) -> None:
    cut = math.sqrt(2 * math.log(2)) + rate / 5
    with mpmath.workdps(50):
        level = mpmath.sinh(mpmath.mpf(rate) * cut / 2) / (mpmath.mpf(rate) * cut / 2)
        bracket = mpmath.quad(
            lambda u: 2 * mpmath.npdf(u) * abs(mpmath.sinh(rate * u / 2) / level - rate * u / 2),
            [0, cut, cut + 4, 2 * rate + 20],
        )
        exact = mpmath.log(level) - 1 + mpmath.exp(mpmath.mpf(rate) ** 2 / 8) / level + bracket
        excess = second_order._log_mgf(np.array([rate]))[0] - exact  # `_deviation` adds another 1e-14, relative
        assert -5e-15 * max(exact - 1, 0) <= excess < 2e-14 * max(exact, 1)


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (7, 0.01), (200, 0.05), (50_000, 0.00025), (10**8, 1e-6)])
def test_deviation_is_chernoffs_bound_and_close_to_its_best(n: int, alpha: float) -> None:
    deviation = second_order._deviation(n, alpha)

    def chernoff(log_rate: float) -> float:
        rate = math.exp(log_rate)
        psi = max(exact_log_mgf(rate, cut) for cut in np.linspace(1.1, 1.3 + 0.4 * rate, 201))
        return (psi + math.log(1 / alpha) / n) / rate

    center = math.log(math.sqrt(8 * math.log(1 / alpha) / n))
    best = minimize_scalar(chernoff, bounds=(center - 1, center + 0.3), method="bounded").fun
    assert best * (1 - 1e-5) <= deviation <= best * 1.01
    assert deviation >= math.sqrt(math.log(1 / alpha) / (2 * n))  # never below the variance of a fair sign times Z
    if n >= 785 * math.log(1 / alpha):
        assert deviation <= math.sqrt(2 * 0.2547 * math.log(1 / alpha) / n)  # specification


@pytest.mark.parametrize(("n", "alpha"), [(3, 0.1), (20, 0.02)])
def test_deviation_holds_for_the_worst_event(n: int, alpha: float) -> None:
    u = np.random.default_rng(7).standard_normal((100_000, n))
    mean = np.mean(np.where(np.abs(u) > 1.3, -0.5, 0.5) * np.abs(u), axis=1)  # heavy on the low side
    expectation = 0.5 * (2 * phi(0) - 4 * phi(1.3))
    rate = float(np.mean(mean < expectation - second_order._deviation(n, alpha)))
    assert alpha / 30 < rate < alpha


@pytest.mark.parametrize(("inner", "norm2", "expected"), [(0.03, 0.2, 0.18308877), (0.0, 0.5, 0.07254700)])
def test_split_mean_bound_solves_its_quadratic(
    inner: float, norm2: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the table's T uses the proxy .2547; ours is a little smaller
    ours = split_mean_bound(inner, norm2, 50_000, 50_000, 0.0005)
    assert 0.99 * expected < ours <= expected
    monkeypatch.setattr(second_order, "_deviation", lambda n, alpha: math.sqrt(2 * 0.2547 * math.log(1 / alpha) / n))
    assert split_mean_bound(inner, norm2, 50_000, 50_000, 0.0005) == pytest.approx(expected, abs=6e-9)


def test_split_mean_bound_uses_each_batch_where_the_proof_does() -> None:
    t1, t2 = second_order._deviation(400, 0.01), second_order._deviation(9000, 0.01)
    bound = split_mean_bound(0.02, 0.3, 400, 9000, 0.02)
    assert bound**2 - t2 * bound == pytest.approx(0.02 + 0.3 * t1, rel=1e-10)
    # evidence that no gradient explains: the bound falls to the vertex of the parabola
    assert split_mean_bound(-5.0, 0.3, 400, 9000, 0.02) == pytest.approx(t2 / 2, rel=1e-10)


def test_sums_over_batches_become_means() -> None:
    evidence = SplitMeans.from_sums([[1.0, 2.0], [6.0, 8.0]], 2, 5)
    assert (evidence.inner, evidence.norm2, evidence.n1, evidence.n2) == (pytest.approx(0.5 * 1.2 + 1.0 * 1.6), 2.0, 2, 5)
    with pytest.raises(ValueError, match="n2 must"):
        SplitMeans.from_sums([[1.0, 2.0], [6.0, 8.0]], 2, 0)


def test_pairs_bound_matches_the_paper() -> None:
    # 49 features, 1e8 samples, alpha' = .0005: t = .010917057780; few pairs: 4 sqrt(2) L / n_pairs
    assert pairs_gradient_bound(0.0, 5 * 10**7, 49, 0.0005) ** 2 == pytest.approx(0.010917057780, abs=1e-12)
    assert pairs_gradient_bound(0.3, 5, 2, math.exp(-7)) ** 2 == pytest.approx(0.3 + 4 * math.sqrt(2) * 7 / 5, rel=1e-12)
    assert pairs_gradient_bound(0.3, 7, 2, math.exp(-7)) ** 2 == pytest.approx(0.3 + 4 * math.sqrt(2), rel=1e-12)
    assert pairs_gradient_bound(0.3, 9, 2, math.exp(-7)) ** 2 == pytest.approx(0.3 + 4 * math.sqrt(2 * 7 / 9), rel=1e-12)
    assert pairs_gradient_bound(-1.0, 10**8, 2, 0.01) == 0


# --- certificates from samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [SplitMeans(0.001, 0.03, 50_000, 50_000), NoisePairs(0.0, 10**8, 2)])
def test_second_order_certificate_spends_alpha_once(gradient: SplitMeans | NoisePairs) -> None:
    alpha = 0.002
    bound = certify_second_order(80_000, 100_000, gradient, alpha)
    assert bound.p_lower == clopper_pearson_lower(80_000, 100_000, alpha / 2)
    assert bound.gradient_upper == gradient.gradient_upper(alpha / 2)
    failure = float(failure_upper(80_000, 100_000, alpha / 2))
    assert bound.radius == second_order_radius(1 - failure, bound.gradient_upper, failure=failure)
    assert bound.radius > z(bound.p_lower)
    assert not bound.abstained


def test_second_order_certificate_keeps_the_digits_of_tiny_failure_probabilities() -> None:
    n = 10**9
    bound = certify_second_order(n, n, SplitMeans(1.0, 1.0, 1, 1), 0.001)
    failure = -math.expm1(math.log(0.0005) / n)
    assert bound.radius == pytest.approx(-z(failure), rel=1e-12)


def test_counting_both_kinds_of_one_sided_pairs_is_sharper() -> None:
    bound = certify_dipole(44_958, 5042, 50_000, 0.001)
    assert bound.one_lower == pytest.approx(0.048229690, abs=6e-10)
    assert clopper_pearson_lower(2521, 50_000, 0.0005) == pytest.approx(0.047258062, abs=6e-10)
    assert bound.both_lower == clopper_pearson_lower(44_958, 50_000, 0.0005)
    assert bound.p_lower == bound.both_lower + bound.one_lower
    assert bound.radius == dipole_radius(bound.both_lower, bound.one_lower) > 1.6
    assert not bound.abstained


def test_certificates_of_a_slab_beat_cohen_and_never_cross_the_true_flip_distance() -> None:
    rng, n, alpha = np.random.default_rng(8), 20_000, 0.05
    flip = flip_distance(lambda s: float(ndtr(-z(0.05) - s) - ndtr(z(0.05) - s)))  # 1.6436
    second, dipole, cohen = [], [], []
    for _ in range(20):
        noise = rng.standard_normal((n, 2))
        sign = slab(noise) - 0.5
        sums = np.stack([sign[: n // 2] @ noise[: n // 2], sign[n // 2 :] @ noise[n // 2 :]])
        count = int(np.sum(sign > 0))
        second.append(certify_second_order(count, n, SplitMeans.from_sums(sums, n // 2, n // 2), alpha).radius)
        dipole.append(certify_dipole(int(np.sum(sign[: n // 2] > 0)), 0, n // 2, alpha).radius)
        cohen.append(z(float(clopper_pearson_lower(count, n, alpha))))
    assert np.sum(np.array(second) > flip) <= 4
    assert np.sum(np.array(dipole) > flip) <= 4
    assert np.median(second) > 1.1 * np.median(cohen)
    assert np.median(dipole) > 1.2 * np.median(cohen)


def test_abstention() -> None:
    bound = certify_second_order(50_100, 100_000, SplitMeans(0.0, 0.0, 10**6, 10**6), 0.001)
    assert bound.p_lower < 0.5
    assert bound.abstained
    assert bound.radius == 0
    assert certify_dipole(400, 210, 1000, 0.001).abstained
    assert certify_dipole(400, 210, 1000, 0.001).radius == 0


def test_verdicts_are_recomputed_from_plain_evidence() -> None:
    common = {"selection": [3, 90, 7], "count": 99_000, "n": 100_000}
    split, pairs = SplitMeans(0.0006, 0.03, 50_000, 50_000), NoisePairs(0.001, 50_000, 2)
    for method, gradient, stated in (
        ("second-order", split, asdict(split) | {"norm1": 0.03}),
        ("second-order-pairs", pairs, asdict(pairs)),
    ):
        bound = certify_second_order(99_000, 100_000, gradient, 0.01)
        found = METHODS[method].verdict(common | {"gradient": stated}, Gaussian(0.5), 0.01, 2)
        assert (found.prediction, found.radius) == (1, 0.5 * bound.radius)
        assert METHODS[method].verdict(common | {"gradient": stated, "count": 40_000}, Gaussian(0.5), 0.01, 2).prediction == -1
    dipole = {"selection": [0, 5, 95], "both": 800, "exactly_one": 100, "n_pairs": 1000}
    bound = certify_dipole(800, 100, 1000, 0.01)
    found = METHODS["dipole"].verdict(dipole, Gaussian((0.5, 0.25, 0.0)), 0.01, 2)
    assert (found.prediction, found.radius) == (2, 0.25 * bound.radius)
    for noise in (Laplace(0.5), Gaussian(0.0)):
        with pytest.raises(ValueError, match="noise must be Gaussian"):
            METHODS["dipole"].verdict(dipole, noise, 0.01, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: second_order_radius(math.nan, 0.1), "p_lower must"),
        (lambda: second_order_radius(1.1, 0.1), "p_lower must"),
        (lambda: second_order_radius(-0.1, 0.1), "p_lower must"),
        (lambda: second_order_radius(0.9, -0.1), "gradient_upper must"),
        (lambda: second_order_radius(0.9, math.nan), "gradient_upper must"),
        (lambda: second_order_radius(0.9, 0.1, failure=0.2), "failure must"),
        (lambda: second_order_radius(0.9, 0.1, failure=math.nan), "failure must"),
        (lambda: dipole_radius(math.nan, 0.1), "s_lower must"),
        (lambda: dipole_radius(0.5, math.nan), "n_lower must"),
        (lambda: dipole_radius(0.5, -0.1), "n_lower must"),
        (lambda: dipole_radius(0.5, 0.3), "at most 1"),
        (lambda: split_mean_bound(math.nan, 1, 5, 5, 0.1), "inner must"),
        (lambda: split_mean_bound(math.inf, 1, 5, 5, 0.1), "inner must"),
        (lambda: split_mean_bound(0, -1, 5, 5, 0.1), "norm2 must"),
        (lambda: split_mean_bound(0, math.inf, 5, 5, 0.1), "norm2 must"),
        (lambda: split_mean_bound(0, 1, 0, 5, 0.1), "n1 must"),
        (lambda: split_mean_bound(0, 1, 5, 0, 0.1), "n2 must"),
        (lambda: split_mean_bound(0, 1, 5, 5, 0.6), "alpha must"),
        (lambda: pairs_gradient_bound(math.nan, 5, 5, 0.1), "mean_inner must"),
        (lambda: pairs_gradient_bound(0, 0, 5, 0.1), "n_pairs must"),
        (lambda: pairs_gradient_bound(0, 5, 0, 0.1), "n_features must"),
        (lambda: pairs_gradient_bound(0, 5, 5, 0.0), "alpha must"),
        (lambda: SplitMeans.from_sums([[0.0, math.nan], [0.0, 1.0]], 5, 5), "sums must"),
        (lambda: certify_second_order(11, 10, SplitMeans(0, 1, 5, 5), 0.1), "k must"),
        (lambda: certify_second_order(5, 0, SplitMeans(0, 1, 5, 5), 0.1), "n must"),
        (lambda: certify_second_order(5, 10, SplitMeans(0, 1, 5, 5), 1.5), "alpha must"),
        (lambda: certify_dipole(6, 5, 10, 0.1), "at most n_pairs"),
        (lambda: certify_dipole(-1, 5, 10, 0.1), "both must"),
        (lambda: certify_dipole(1, -5, 10, 0.1), "exactly_one must"),
        (lambda: certify_dipole(1, 5, 0, 0.1), "n_pairs must"),
        (lambda: certify_dipole(1, 5, 10, math.nan), "alpha must"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
