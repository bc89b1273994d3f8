"""Noise mechanisms: closed forms, the geometry of the trade-off functions, and what `perturb` really draws."""

from __future__ import annotations

import json
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from robustrl.noise import (
    MECHANISMS,
    Ablation,
    DeterministicSplitting,
    EntryAblation,
    Gaussian,
    Laplace,
    Noise,
    QuantisedGaussian,
    Splitting,
    Uniform,
    UniformBall,
    noise_from_dict,
)

GAUSSIAN, UNEVEN = Gaussian(0.5), Gaussian((0.5, 0.0, 2.0))
UNIFORM, SPLITTING, LAPLACE, ABLATION = Uniform(0.5), Splitting(0.5), Laplace(0.5), Ablation(0.25)
GRIDDED = DeterministicSplitting(21, 20)  # on the grid of 0.05, as are all the values below
BALL, ENTRIES, INTEGERS = UniformBall(0.5, 3), EntryAblation(1, 3), QuantisedGaussian(0.5, 20)
EPISODES: list[Noise] = [GAUSSIAN, UNEVEN, UNIFORM, SPLITTING, LAPLACE, ABLATION, GRIDDED]
ALL: list[Noise] = [*EPISODES, BALL, ENTRIES, INTEGERS]
COUNTING = (Ablation, EntryAblation)
each_mechanism = pytest.mark.parametrize("noise", ALL, ids=lambda noise: noise.scale)

BUDGETS = np.array([0.0, 1e-6, 0.1, 0.3, 0.5, 0.9, 1.0, 2.0, 3.7, 20.0, math.inf])
P = np.concatenate(([0.0, 1e-300, 1e-20, 1e-9], np.linspace(0.001, 0.999, 401), [1 - 1e-9, 1.0]))


# ---------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("p", "mu", "worst"),
    [(0.9, 1, 0.610856), (0.99, 2, 0.627919), (0.7, 0.5, 0.509733), (0.9, 0.5, 0.78276092), (0.99, 1, 0.90763775)],
)
def test_gaussian_worst_case_is_the_neyman_pearson_value(p: float, mu: float, worst: float) -> None:
    """Phi(Phi^-1(p) - mu), tight for adaptive attackers (Kumar, Levine, Feizi 2022)."""
    assert Gaussian(0.2).lower(p, 0.2 * mu) == pytest.approx(worst, abs=6e-7)


def test_gaussian_trade_off_agrees_with_forty_digits() -> None:
    mpmath.mp.dps = 40
    noise = Gaussian(1.0)
    for p in (1e-20, 1e-6, 0.02, 0.3, 0.5, 0.9, 0.99999):
        z = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)
        for mu in (0.1, 1.0, 5.0):
            assert float(noise.lower(p, mu)) == pytest.approx(float(mpmath.ncdf(z - mu)), rel=1e-11)
            assert float(noise.upper(p, mu)) == pytest.approx(float(mpmath.ncdf(z + mu)), rel=1e-11)


def test_failure_probabilities_far_in_the_tail_keep_their_digits() -> None:
    """f = 1e-20 at mu = 5 may rise to 1.0115e-5; through the success side it would come back as 0."""
    assert float(Gaussian(0.2).upper(1e-20, 1.0)) == pytest.approx(1.0115e-5, rel=1e-4)
    assert float(1 - Gaussian(0.2).lower(1 - 1e-20, 1.0)) == 0.0


@pytest.mark.parametrize(
    ("p", "radius"),
    [
        (0.933254300797, 1.500475024),
        (0.867464018026, 1.114483162),
        (0.999309463003, 3.198577515),
        (0.747898840667, 0.6678923379),
        (0.50010895174, 2.731015e-4),
        (0.5, 0.0),
        (0.499998948489, 0.0),
        (0.0, 0.0),
    ],
)
def test_gaussian_radius_is_that_of_randomized_smoothing(p: float, radius: float) -> None:
    """R = sigma Phi^-1(p) (Cohen, Rosenfeld, Kolter 2019); abstains at p <= 1/2."""
    assert Gaussian(1.0).radius(p) == pytest.approx(radius, abs=1e-8)
    assert Gaussian(0.25).radius(p) == pytest.approx(radius / 4, abs=1e-8)


@pytest.mark.parametrize(
    ("p_lower", "p_upper", "radius"),
    [(0.7, 0.2, 0.68301087), (0.6, 0.1, 0.76744933), (0.45, 0.3, 0.19936958), (0.99, 0.005, 2.45108859), (0.3, 0.4, 0.0)],
)
def test_gaussian_two_sided_radius(p_lower: float, p_upper: float, radius: float) -> None:
    """sigma / 2 (Phi^-1(p_lower) - Phi^-1(p_upper)) (Cohen, Rosenfeld, Kolter 2019, theorem 1)."""
    assert Gaussian(1.0).radius(p_lower, p_upper) == pytest.approx(radius, abs=1e-8)


@pytest.mark.parametrize(
    ("p", "radius"), [(0.6, 0.22314355), (0.75, 0.69314718), (0.9, 1.60943791), (0.99, 3.91202301), (0.5, 0)]
)
def test_laplace_radius(p: float, radius: float) -> None:
    """-b ln(2 (1 - p)) (Teng et al. 2020)."""
    assert Laplace(1.0).radius(p) == pytest.approx(radius, abs=1e-8)


@pytest.mark.parametrize("noise", [Uniform(1.0), Splitting(1.0)], ids=lambda noise: noise.scale)
def test_l1_radius_is_two_lam_times_the_excess_over_one_half(noise: Noise) -> None:
    """2 lam (p - 1/2) (Yang et al. 2020; Levine, Feizi 2021), two-sided lam (p_A - p_B)."""
    assert noise.radius(0.9) == pytest.approx(0.8)
    assert noise.radius(0.7, 0.2) == pytest.approx(0.5)
    assert noise.radius(0.4) == noise.radius(0.2, 0.3) == 0.0


def test_l1_worst_case_is_a_total_variation_shift() -> None:
    assert float(Uniform(0.5).lower(0.9, 0.3)) == pytest.approx(0.6)
    assert float(Splitting(0.5).lower(0.2, 0.3)) == 0.0
    assert float(Uniform(0.5).upper(0.9, 0.3)) == 1.0


def test_laplace_worst_case_is_pure_differential_privacy() -> None:
    """max(p e^-eps, 1 - (1 - p) e^eps) at eps = B / b (Dwork, Roth 2014, composition)."""
    assert float(Laplace(2.0).lower(0.9, 2.0)) == pytest.approx(1 - 0.1 * math.e)
    assert float(Laplace(2.0).lower(0.3, 2.0)) == pytest.approx(0.3 / math.e)
    assert float(Laplace(2.0).upper(1e-30, 2.0)) == pytest.approx(1e-30 * math.e)


@pytest.mark.parametrize(("keep", "frames"), [(0.25, 0), (0.25, 1), (0.25, 3), (0.9, 2), (1e-3, 500)])
def test_ablation_worst_case_counts_whole_frames(keep: float, frames: int) -> None:
    """P(an altered frame is ever shown) <= 1 - (1 - keep)^r; a fraction of a frame counts as a whole one."""
    shown = 1 - (1 - keep) ** frames
    assert float(Ablation(keep).lower(1.0, frames)) == pytest.approx(1 - shown, rel=1e-12)
    one_more = 1 - (1 - keep) ** (frames + 1)
    assert float(Ablation(keep).lower(0.9, frames + 0.001)) == pytest.approx(max(0.9 - one_more, 0), abs=1e-12)


def test_ablation_radius_leaves_no_tie() -> None:
    """At p = 3/4 and keep = 1/4 one altered frame can bring the winner down to exactly 1/2: not certified."""
    assert Ablation(0.25).radius(0.75) == 0.0
    assert Ablation(0.25).radius(0.75 + 1e-9) == 1.0
    assert Ablation(0.01).radius(0.99) == math.floor(math.log(0.51) / math.log(0.99))
    assert Ablation(0.25).radius(0.4, 0.4) == 0.0
    assert Ablation(0.25).radius(1.0, 0.0) == 2.0  # 2 (1 - .75^2) = .875 < 1 < 2 (1 - .75^3)


@pytest.mark.parametrize(
    ("x", "s", "lam", "shown"),
    [
        (0.3, 0.5, 1, 0.25),
        (0.7, 0.5, 1, 0.75),
        (0.7, 1.5, 1, 0.5),
        (0.0, 0.2, 0.15, 0.1),
        (0.5, 0.2, 0.15, 0.35),
        (1.0, 0.2, 0.15, 0.9),
        (0.95, 0.1, 0.15, 0.85),
    ],
)
def test_splitting_map(x: float, s: float, lam: float, shown: float) -> None:
    """Midpoint of the cell that x falls in (Levine, Feizi 2021)."""
    noise, x_, s_ = Splitting(lam), np.array([[x]]), np.array([[s]])
    assert noise.split(x_, s_).item() == pytest.approx(shown, abs=1e-12)
    assert noise.split(torch.tensor(x_), torch.tensor(s_)).item() == pytest.approx(shown, abs=1e-12)
    moved = Splitting(lam * 4, low=-1, high=3)  # another range is the same map, rescaled
    assert moved.split(4 * x_ - 1, 4 * s_).item() == pytest.approx(4 * shown - 1, abs=1e-12)


def test_splitting_with_wide_cells_shows_one_comparison() -> None:
    """For lam >= 1/2 the map is (1[x > s] + min(s, 1)) / 2."""
    generator = np.random.default_rng(0)
    x, s = generator.random((1, 5000)), generator.random((1, 5000)) * 1.6
    assert_allclose(Splitting(0.8).split(x, s), ((x > s) + np.minimum(s, 1)) / 2, atol=1e-12)


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.3])
@pytest.mark.parametrize(("x", "other"), [(0.3, 0.45), (0.0, 0.07), (0.95, 1.0), (0.2, 0.2)])
def test_splitting_shows_a_difference_for_at_most_its_length_of_all_offsets(lam: float, x: float, other: float) -> None:
    """P(the shown values differ) <= |x - x'| / (2 lam): the lemma that the l1 certificate rests on."""
    s = (np.arange(100_000) + 0.5)[:, None] / 100_000 * 2 * lam
    noise = Splitting(lam)
    differ = np.mean(noise.split(np.full_like(s, x), s) != noise.split(np.full_like(s, other), s))
    assert differ <= abs(x - other) / (2 * lam) + 2e-5


def test_values_outside_the_range_of_splitting_are_brought_back_to_it() -> None:
    s = np.linspace(0, 0.99, 50)[:, None]
    noise = Splitting(0.5)
    assert_array_equal(noise.split(np.full_like(s, 7.0), s), noise.split(np.full_like(s, 1.0), s))


# ------------------------------------------------------------------------------------ geometry of lower and upper


@each_mechanism
def test_upper_is_the_mirror_image_of_lower(noise: Noise) -> None:
    p, budgets = np.concatenate(([0.0, 1.0], np.linspace(0.001, 0.999, 401)))[:, None], BUDGETS[None]
    assert_allclose(noise.upper(p, budgets), 1 - noise.lower(1 - p, budgets), atol=2e-12)


@each_mechanism
def test_lower_is_below_p_and_upper_above_it_and_both_are_probabilities(noise: Noise) -> None:
    p, budgets = P[:, None], BUDGETS[None]
    low, high = noise.lower(p, budgets), noise.upper(p, budgets)
    assert low.dtype == high.dtype == np.float64
    assert low.shape == high.shape == (len(P), len(BUDGETS))
    assert np.all((low >= 0) & (low <= p + 1e-15))
    assert np.all((high <= 1) & (high >= p - 1e-15))


@each_mechanism
def test_a_larger_budget_never_helps_and_a_larger_probability_never_hurts(noise: Noise) -> None:
    low, high = noise.lower(P[:, None], BUDGETS[None]), noise.upper(P[:, None], BUDGETS[None])
    assert np.all(np.diff(low, axis=1) <= 1e-15)
    assert np.all(np.diff(high, axis=1) >= -1e-15)
    assert np.all(np.diff(low, axis=0) >= -1e-15)
    assert np.all(np.diff(high, axis=0) >= -1e-15)


@each_mechanism
def test_no_budget_changes_nothing_and_an_unlimited_one_decides_everything(noise: Noise) -> None:
    assert_allclose(noise.lower(P, 0.0), P, rtol=0, atol=1e-15)
    assert_allclose(noise.upper(P, 0.0), P, rtol=0, atol=1e-15)
    assert_array_equal(noise.lower(P, math.inf), np.zeros_like(P))
    assert_array_equal(noise.upper(P, math.inf), np.ones_like(P))


def test_a_gaussian_certificate_without_attack_is_the_probability_bit_for_bit() -> None:
    assert_array_equal(GAUSSIAN.lower(P, 0.0), P)


@each_mechanism
def test_lower_is_convex(noise: Noise) -> None:
    grid = np.linspace(0, 1, 2001)
    for budget in BUDGETS[:-1]:
        assert np.diff(noise.lower(grid, budget), n=2).min() >= -1e-12


@each_mechanism
def test_slope_is_a_subgradient_everywhere(noise: Noise) -> None:
    """lower(q) >= lower(p) + slope(p) (q - p): what the tangent certificates rest on."""
    p = np.concatenate(([0.0, 1e-9, 1e-4], np.linspace(0.005, 0.995, 199), [0.9999, 1 - 1e-9]))
    q = np.linspace(0, 1, 301)
    for budget in BUDGETS:
        slope = noise.slope(p, budget)
        assert np.all(np.isfinite(slope) & (slope >= 0))
        line = noise.lower(p, budget)[:, None] + slope[:, None] * (q[None] - p[:, None])
        assert np.all(line <= noise.lower(q, budget)[None] + 1e-12 * (1 + slope[:, None]))


@pytest.mark.parametrize(
    "noise",
    [Gaussian(0.3), UNEVEN, Uniform(2.0), Splitting(0.1), Laplace(0.7), GRIDDED, BALL, UniformBall(2.0, 3072), INTEGERS],
    ids=lambda noise: noise.scale,
)
@pytest.mark.parametrize("p", [0.500001, 0.6, 0.9, 0.99, 0.9999999])
def test_radius_is_where_the_worst_case_crosses_one_half(noise: Noise, p: float) -> None:
    radius = noise.radius(p)
    assert float(noise.lower(p, radius * (1 - 1e-9))) >= 0.5
    assert float(noise.lower(p, radius * (1 + 1e-6))) < 0.5
    assert float(noise.lower(p, radius)) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.6])
@pytest.mark.parametrize("p", [0.51, 0.75, 0.9, 0.99, 1.0])
def test_ablation_radius_is_the_last_number_of_frames_above_one_half(keep: float, p: float) -> None:
    noise = Ablation(keep)
    radius = noise.radius(p)
    assert radius == int(radius)
    assert float(noise.lower(p, radius)) > 0.5
    assert float(noise.lower(p, radius + 1)) <= 0.5


@each_mechanism
@pytest.mark.parametrize(("p_lower", "p_upper"), [(0.7, 0.2), (0.45, 0.3), (0.99, 0.005), (0.6, 0.1)])
def test_two_sided_radius_is_where_winner_and_rival_meet(noise: Noise, p_lower: float, p_upper: float) -> None:
    radius = noise.radius(p_lower, p_upper)
    after = radius + 1 if isinstance(noise, COUNTING) else radius * (1 + 1e-6)
    before = radius if isinstance(noise, COUNTING) else radius * (1 - 1e-9)
    assert float(noise.lower(p_lower, before)) >= float(noise.upper(p_upper, before))
    assert float(noise.lower(p_lower, after)) <= float(noise.upper(p_upper, after))


@each_mechanism
def test_two_sided_radius_with_the_complement_is_the_one_sided_one(noise: Noise) -> None:
    for p in (0.55, 0.9, 0.999):
        assert noise.radius(p, 1 - p) == pytest.approx(noise.radius(p), rel=1e-9)


@each_mechanism
def test_equal_or_reversed_classes_have_radius_zero(noise: Noise) -> None:
    for pair in ((0.0, 0.0), (0.3, 0.3), (0.2, 0.6), (1.0, 1.0), (0.0, 1.0)):
        assert noise.radius(*pair) == 0.0
    assert noise.radius(0.5) == noise.radius(0.0) == 0.0


def test_certain_events_have_the_largest_radius_of_their_mechanism() -> None:
    assert Gaussian(0.2).radius(1.0) == Laplace(0.2).radius(1.0) == math.inf
    assert Uniform(0.2).radius(1.0) == pytest.approx(0.2)
    assert Gaussian(0.2).radius(1.0, 0.0) == math.inf


def test_only_the_smallest_attackable_sigma_counts_for_an_l2_budget() -> None:
    assert Gaussian((0.5, 0.2, 3.0)).smallest == 0.2
    assert Gaussian((0.5, 0.0, 3.0)).smallest == 0.5
    assert float(Gaussian((0.5, 0.2, 3.0)).lower(0.9, 0.2)) == pytest.approx(0.610856, abs=1e-6)
    assert float(Gaussian(np.array([0.5, 0.2])).mu(0.4)) == pytest.approx(2.0)


def test_without_noise_only_budget_zero_has_a_certificate() -> None:
    undefended = Gaussian(0.0)
    assert_array_equal(undefended.lower([0.2, 1.0], 0.0), [0.2, 1.0])
    assert undefended.radius(0.9) == undefended.radius(1.0) == 0.0
    for call in (undefended.lower, undefended.upper, undefended.slope):
        with pytest.raises(ValueError, match="sigma must be > 0 for budgets > 0"):
            call(0.5, [0.0, 1e-12])


# ------------------------------------------------------------------------------------------------ covering budgets

HORIZON, FEATURES, STEP, EPISODE = 7, 6, 0.3, 0.5


@pytest.mark.parametrize(
    ("noise", "norm", "step", "episode", "budget"),
    [
        (Gaussian(0.2), 2, None, EPISODE, EPISODE),
        (Gaussian(0.2), 2, STEP, None, STEP * math.sqrt(HORIZON)),
        (Gaussian(0.2), 2, STEP, EPISODE, EPISODE),
        (Gaussian(0.2), 2, STEP / 10, EPISODE, STEP / 10 * math.sqrt(HORIZON)),
        (Gaussian(0.2), 1, None, EPISODE, EPISODE),
        (Gaussian(0.2), 1, STEP, None, STEP * math.sqrt(HORIZON)),
        (Gaussian(0.2), math.inf, STEP, None, STEP * math.sqrt(HORIZON * FEATURES)),
        # mu = eps sqrt(H sum 1 / sigma_i^2) with sigma = (.2, .4, -), twice: smallest sigma times mu
        (Gaussian((0.2, 0.4, 0.0)), math.inf, STEP, None, 0.2 * STEP * math.sqrt(HORIZON * 2 * (1 / 0.04 + 1 / 0.16))),
        (Gaussian(0.0), math.inf, STEP, None, STEP * math.sqrt(HORIZON * FEATURES)),
        (Uniform(0.2), 1, None, EPISODE, EPISODE),
        (Uniform(0.2), 1, STEP, None, HORIZON * STEP),
        (Uniform(0.2), 2, STEP, None, HORIZON * STEP * math.sqrt(FEATURES)),
        (Uniform(0.2), 2, None, EPISODE, EPISODE * math.sqrt(FEATURES * HORIZON)),
        (Laplace(0.2), math.inf, STEP, None, HORIZON * STEP * FEATURES),
        (Splitting(0.2), 2, STEP, EPISODE, EPISODE * math.sqrt(FEATURES * HORIZON)),
        (Ablation(0.2), 0, None, 3, 3),
        (Ablation(0.2), 0, None, 30, HORIZON),
        (Ablation(0.2), 0, 2, None, HORIZON),
        (Ablation(0.2), math.inf, STEP, None, HORIZON),
        (Ablation(0.2), 2, None, EPISODE, HORIZON),
    ],
)
def test_covering_budget_formulae(noise: Noise, norm: float, step: float | None, episode: float | None, budget: float) -> None:
    covering = noise.covering_budget(norm, step=step, episode=episode, horizon=HORIZON, n_features=FEATURES)
    assert covering == pytest.approx(budget, rel=1e-12)


@pytest.mark.parametrize(
    ("noise", "norm"), [(Gaussian(0.2), 0), (Uniform(0.2), 0), (Laplace(0.2), 0), (Splitting(0.2), 0)], ids=lambda v: str(v)
)
def test_threats_without_a_proof_are_refused(noise: Noise, norm: float) -> None:
    with pytest.raises(ValueError, match="has no certificate for this threat: norm 0"):
        noise.covering_budget(norm, step=1.0, episode=3.0, horizon=HORIZON, n_features=FEATURES)


def _norm(e: np.ndarray, norm: float) -> float:
    return float(np.count_nonzero(e)) if norm == 0 else float(np.linalg.norm(e, ord=norm))


def _threatening_episode(generator: np.random.Generator, norm: float, step: float | None, episode: float | None) -> np.ndarray:
    """Perturbations (horizon, features) at the edge of a threat model: random, spread evenly, or in a single spot."""
    kind = generator.integers(4)
    e = generator.standard_normal((HORIZON, FEATURES))
    if kind == 1:
        e = np.sign(e)
    elif kind == 2:
        e = e * (generator.random((HORIZON, 1)) < 0.4)
    elif kind == 3:
        e = np.where(np.arange(FEATURES) == generator.integers(FEATURES), e, 0)
    if norm == 0:
        assert episode is not None
        altered = generator.permutation(HORIZON)[: int(episode)]
        return np.where(np.isin(np.arange(HORIZON), altered)[:, None], e, 0)
    if step is not None:
        e = np.stack([row * (step / _norm(row, norm)) if _norm(row, norm) > 0 else row for row in e])
    if episode is not None:
        total = math.sqrt(sum(_norm(row, 2) ** 2 for row in e)) if norm == 2 else sum(_norm(row, norm) for row in e)
        if total > 0 and (step is None or total > episode):
            e = e * (episode / total)
    return e


@pytest.mark.parametrize(
    ("norm", "step", "episode"),
    [
        (1, STEP, None),
        (1, None, EPISODE),
        (1, STEP, EPISODE),
        (2, STEP, None),
        (2, None, EPISODE),
        (2, STEP, EPISODE),
        (math.inf, STEP, None),
    ],
)
def test_no_attacker_within_the_threat_spends_more_than_the_covering_budget(
    norm: float, step: float | None, episode: float | None
) -> None:
    generator = np.random.default_rng(1)
    threat: dict[str, Any] = {"step": step, "episode": episode, "horizon": HORIZON, "n_features": FEATURES}
    uneven = Gaussian((0.2, 0.4, 0.0))
    scale = np.tile([1.0, 0.5, 0.0], FEATURES // 3)  # smallest / sigma_i on what can be attacked, in the Mahalanobis norm
    worst = np.zeros(3)
    for _ in range(2000):
        e = _threatening_episode(generator, norm, step, episode)
        worst = np.maximum(worst, [np.linalg.norm(e), np.linalg.norm(e * scale), np.abs(e).sum()])
    limits = np.array([noise.covering_budget(norm, **threat) for noise in (Gaussian(0.2), uneven, Uniform(0.2))])
    assert np.all(worst <= limits * (1 + 1e-12))
    if norm == math.inf:  # all corners at every step: each of the three bounds is attained
        assert_allclose(worst, limits, rtol=1e-9)


def test_ablation_budget_covers_every_number_of_altered_frames() -> None:
    generator = np.random.default_rng(2)
    for _ in range(200):
        e = _threatening_episode(generator, 0, None, 3)
        limit = Ablation(0.2).covering_budget(0, step=None, episode=3, horizon=HORIZON, n_features=FEATURES)
        assert np.count_nonzero(np.any(e != 0, axis=1)) <= limit


# ------------------------------------------------------------------------------------------------------- perturb

SHAPE = (20_000, 3)


def _draw(
    noise: Noise, library: str, value: float = 0.3, dtype: str = "float32", shape: tuple[int, ...] = SHAPE, seed: int = 0
) -> Any:
    if library == "numpy":
        return noise.perturb(np.full(shape, value, dtype=dtype), np.random.default_rng(seed))
    x = torch.full(shape, value, dtype=getattr(torch, dtype))
    return noise.perturb(x, torch.Generator().manual_seed(seed))


both_libraries = pytest.mark.parametrize("library", ["numpy", "torch"])


@both_libraries
@pytest.mark.parametrize(
    ("noise", "law"),
    [
        (Gaussian(0.7), stats.norm(0.3, 0.7)),
        (Uniform(0.7), stats.uniform(0.3 - 0.7, 1.4)),
        (Laplace(0.7), stats.laplace(0.3, 0.7)),
    ],
    ids=["gaussian", "uniform", "laplace"],
)
def test_additive_noise_has_its_law_and_is_independent_in_every_direction(noise: Noise, law: Any, library: str) -> None:
    y = np.asarray(_draw(noise, library), dtype=np.float64)
    assert stats.kstest(y.ravel(), law.cdf).pvalue > 1e-3
    n = y.size
    assert abs(y.mean() - law.mean()) < 4 * law.std() / math.sqrt(n)
    assert y.std() == pytest.approx(law.std(), rel=0.02)
    centred = (y - law.mean()) / law.std()
    assert abs(np.mean(centred[1:] * centred[:-1])) < 4 / math.sqrt(n)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.mean(centred[:, i] * centred[:, j])) < 4 / math.sqrt(len(y))


@both_libraries
def test_splitting_draws_its_offsets_uniformly_and_apart_for_every_coordinate(library: str) -> None:
    y = np.asarray(_draw(Splitting(0.5), library), dtype=np.float64)
    s = np.where(y >= 0.5, 2 * y - 1, 2 * y)  # lam = 1/2: y = (1[x > s] + s) / 2
    s = np.where((y >= 0.5) & (s > 0.3 + 1e-6), 1.0 - 1e-9, s)
    assert stats.kstest(s.ravel(), stats.uniform(0, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(s[:, 0], s[:, 1])[0, 1]) < 4 / math.sqrt(len(s))
    assert abs(np.corrcoef(s[1:, 0], s[:-1, 0])[0, 1]) < 4 / math.sqrt(len(s))


@both_libraries
def test_ablation_shows_or_drops_whole_frames(library: str) -> None:
    y = np.asarray(_draw(Ablation(0.3, fill=-1.0), library, shape=(20_000, 2, 2)), dtype=np.float64)
    shown = np.isclose(y, 0.3)
    assert np.all(shown | (y == -1.0))
    assert np.all(shown.all(axis=(1, 2)) == shown.any(axis=(1, 2)))
    assert shown[:, 0, 0].mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20_000))


@both_libraries
def test_per_feature_sigma_runs_along_the_last_axis_and_leaves_zeros_alone(library: str) -> None:
    y = np.asarray(_draw(Gaussian((0.5, 0.0, 2.0)), library, shape=(10_000, 2, 3)), dtype=np.float64)
    assert np.all(y[..., 1] == np.float32(0.3))
    assert_allclose(y.std(axis=(0, 1))[[0, 2]], [0.5, 2.0], rtol=0.03)


@pytest.mark.parametrize(
    "noise",
    [
        *(GAUSSIAN, Gaussian(0.0), UNIFORM, SPLITTING, LAPLACE, Ablation(0.5), GRIDDED, INTEGERS),
        *(UniformBall(0.5, 6), EntryAblation(2, 6)),
    ],
    ids=lambda noise: noise.scale,
)
@pytest.mark.parametrize(
    ("library", "dtype"),
    [("numpy", d) for d in ("float16", "float32", "float64")]
    + [("torch", d) for d in ("bfloat16", "float16", "float32", "float64")],
)
def test_frames_keep_shape_and_dtype_and_are_not_written_to(noise: Noise, library: str, dtype: str) -> None:
    x: Any = (
        np.full((5, 2, 3), 0.25, dtype=dtype)
        if library == "numpy"
        else torch.full((5, 2, 3), 0.25, dtype=getattr(torch, dtype))
    )
    generator: Any = np.random.default_rng(0) if library == "numpy" else torch.Generator().manual_seed(0)
    y = noise.perturb(x, generator)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert bool((x == 0.25).all())
    assert y is not x
    y[:] = 7
    assert bool((x == 0.25).all())


@both_libraries
@each_mechanism
def test_with_a_generator_per_frame_each_frame_draws_as_if_it_were_alone(noise: Noise, library: str) -> None:
    def generator(seed: int) -> Any:
        return np.random.default_rng(seed) if library == "numpy" else torch.Generator().manual_seed(seed)

    x: Any = np.full((3, 3), 0.3) if library == "numpy" else torch.full((3, 3), 0.3)
    together = np.asarray(noise.perturb(x, [generator(seed) for seed in (4, 5, 4)]))
    alone = [np.asarray(noise.perturb(x[:1], generator(seed)))[0] for seed in (4, 5, 4)]
    assert_array_equal(together, alone)


@both_libraries
@each_mechanism
def test_draws_repeat_under_a_seed_advance_the_generator_and_take_no_rows_at_all(noise: Noise, library: str) -> None:
    first, again = (np.asarray(_draw(noise, library, shape=(50, 3))) for _ in range(2))
    assert_array_equal(first, again)
    assert not np.array_equal(first, np.asarray(_draw(noise, library, shape=(50, 3), seed=1)))
    x: Any = np.full((50, 3), 0.3) if library == "numpy" else torch.full((50, 3), 0.3)
    generator: Any = np.random.default_rng(0) if library == "numpy" else torch.Generator().manual_seed(0)
    assert not np.array_equal(np.asarray(noise.perturb(x, generator)), np.asarray(noise.perturb(x, generator)))
    assert noise.perturb(x[:0], generator).shape == (0, 3)


@both_libraries
@pytest.mark.parametrize("noise", [Uniform(0.5), Splitting(0.5), Laplace(0.5)], ids=lambda noise: noise.scale)
def test_l1_noise_is_finer_than_single_precision(noise: Noise, library: str) -> None:
    """A grid of 2^-24 would let an attacker step across its points, in many entries, for next to nothing."""
    y = np.asarray(_draw(noise, library, value=0.0, shape=(200_000, 1)), dtype=np.float64).ravel()
    if isinstance(noise, Laplace):
        y = np.expm1(-np.abs(y) / 0.5)  # back to the uniform draw, whose grid would show near 0
    small = y[(np.abs(y) > 0) & (np.abs(y) < 2.0**-6)] * 2.0**25
    assert small.size > 1000
    assert np.mean(np.abs(small - np.round(small)) > 1e-3) > 0.8


def test_gaussian_noise_on_arrays_has_tails_beyond_single_precision_uniforms() -> None:
    y = Gaussian(1.0).perturb(np.zeros((2_000_000, 1), dtype=np.float64), np.random.default_rng(3))
    assert np.mean(np.abs(y) > 4.5) == pytest.approx(2 * stats.norm.sf(4.5), rel=0.8)
    assert len(np.unique(y)) == y.size


# ------------------------------------------------------------------------------------------- plain data, caveats


@each_mechanism
def test_mechanisms_survive_a_round_trip_through_json(noise: Noise) -> None:
    assert noise_from_dict(json.loads(json.dumps(noise.to_dict()))) == noise
    assert noise.to_dict()["kind"] in MECHANISMS
    assert type(noise).__name__ in noise.scale
    assert hash(noise) == hash(noise_from_dict(noise.to_dict()))


@each_mechanism
def test_mechanisms_cannot_be_changed_afterwards(noise: Noise) -> None:
    name = next(iter(noise.to_dict().keys() - {"kind"}))
    with pytest.raises(AttributeError):
        setattr(noise, name, 1.0)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "Pink", "sigma": 1.0},
        {"kind": "Gaussian"},
        {"kind": "Gaussian", "sigma": 1.0, "extra": 1},
        {"kind": "Uniform", "lam": -1},
    ],
)
def test_unknown_or_wrong_plain_data_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"noise|lam"):
        noise_from_dict(data)


def test_features_without_noise_are_named_in_the_caveats() -> None:
    assert UNEVEN.caveats == ("attacks on features [1], which carry no noise",)
    assert GAUSSIAN.caveats == ()


@each_mechanism
def test_a_mechanism_refuses_scopes_it_has_no_proof_for(noise: Noise) -> None:
    noise.require("step")
    with pytest.raises(ValueError, match="no proof for scope 'training-labels'"):
        noise.require("training-labels")
    if noise in EPISODES:
        noise.require("episode")
    else:
        with pytest.raises(ValueError, match="no proof for scope 'episode'"):
            noise.require("episode")
        with pytest.raises(ValueError, match="has no certificate for this threat"):
            noise.covering_budget(noise.norm, step=0.1, episode=3.0, horizon=5, n_features=3)


# ---------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("build", "name", "kind"),
    [
        (lambda: Gaussian(-0.1), "sigma", ValueError),
        (lambda: Gaussian(math.nan), "sigma", ValueError),
        (lambda: Gaussian(math.inf), "sigma", ValueError),
        (lambda: Gaussian("0.2"), "sigma", TypeError),  # type: ignore[arg-type]
        (lambda: Gaussian(True), "sigma", TypeError),
        (lambda: Gaussian(None), "sigma", TypeError),  # type: ignore[arg-type]
        (lambda: Gaussian([0.1, -0.1]), "sigma", ValueError),
        (lambda: Gaussian([0.1, math.nan]), "sigma", ValueError),
        (lambda: Gaussian([0.0, 0.0]), "sigma", ValueError),
        (lambda: Gaussian([]), "sigma", ValueError),
        (lambda: Gaussian([[0.1, 0.2]]), "sigma", TypeError),  # type: ignore[list-item]
        (lambda: Uniform(0.0), "lam", ValueError),
        (lambda: Uniform(math.inf), "lam", ValueError),
        (lambda: Uniform(False), "lam", TypeError),
        (lambda: Laplace(-1.0), "b", ValueError),
        (lambda: Laplace(math.nan), "b", ValueError),
        (lambda: Splitting(0.0), "lam", ValueError),
        (lambda: Splitting(0.5, low=1.0, high=1.0), "high", ValueError),
        (lambda: Splitting(0.5, low=-math.inf), "low", ValueError),
        (lambda: Splitting(0.5, fresh=False), "fresh", ValueError),
        (lambda: Splitting(0.5, fresh=1), "fresh", ValueError),  # type: ignore[arg-type]
        (lambda: Ablation(0.0), "keep", ValueError),
        (lambda: Ablation(1.0), "keep", ValueError),
        (lambda: Ablation(math.nan), "keep", ValueError),
        (lambda: Ablation(0.5, fill=math.nan), "fill", ValueError),
        (lambda: UniformBall(0.0, 3), "lam", ValueError),
        (lambda: UniformBall(1.0, 0), "dimension", ValueError),
        (lambda: UniformBall(1.0, 2.5), "dimension", TypeError),  # type: ignore[arg-type]
        (lambda: EntryAblation(0, 3), "keep", ValueError),
        (lambda: EntryAblation(3, 3), "keep", ValueError),
        (lambda: EntryAblation(1, 3, fill=math.inf), "fill", ValueError),
        (lambda: QuantisedGaussian(0.0), "sigma", ValueError),
        (lambda: QuantisedGaussian(1.0, 5000), "sigma", ValueError),
        (lambda: QuantisedGaussian(math.nan), "sigma", ValueError),
        (lambda: QuantisedGaussian(0.1, 0), "quantisation", ValueError),
        (lambda: QuantisedGaussian(0.1, low=1.0), "high", ValueError),
        (lambda: QuantisedGaussian(0.1, low=(0.0, 0.0)), "low", TypeError),  # type: ignore[arg-type]
        (lambda: DeterministicSplitting(1), "levels", ValueError),
        (lambda: DeterministicSplitting(2**24 + 1), "levels", ValueError),
        (lambda: DeterministicSplitting(5, 2**24 + 1), "quantisation", ValueError),
        (lambda: DeterministicSplitting(5, 4.0), "quantisation", TypeError),  # type: ignore[arg-type]
        (lambda: DeterministicSplitting(5, low=math.nan), "low", ValueError),
        (lambda: DeterministicSplitting(5, low=()), "low", ValueError),
        (lambda: DeterministicSplitting(5, low=(0.0, 0.0), high=(1.0, 0.0)), "high", ValueError),
        (lambda: DeterministicSplitting(5, low=(0.0, 0.0), high=(1.0, 1.0, 1.0)), "high", ValueError),
        (lambda: DeterministicSplitting(5, seed=-1), "seed", ValueError),
    ],
)
def test_bad_parameters_are_refused_by_name(build: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"\b{name} must"):
        build()


@each_mechanism
@pytest.mark.parametrize("method", ["lower", "upper", "slope"])
@pytest.mark.parametrize(
    ("p", "budget", "name"),
    [
        (-0.1, 0.0, "p"),
        (1.1, 0.0, "p"),
        (math.nan, 0.0, "p"),
        (0.5, -1e-9, "budget"),
        (0.5, math.nan, "budget"),
        ([0.5, math.nan], 1.0, "p"),
    ],
)
def test_bad_probabilities_and_budgets_never_come_back_as_numbers(
    noise: Noise, method: str, p: Any, budget: float, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        getattr(noise, method)(p, budget)


@each_mechanism
@pytest.mark.parametrize(
    ("arguments", "name"),
    [((1.5,), "p_lower"), ((math.nan,), "p_lower"), ((0.5, -0.1), "p_upper"), ((0.5, math.nan), "p_upper")],
)
def test_bad_class_probabilities_are_refused(noise: Noise, arguments: tuple[float, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        noise.radius(*arguments)


@each_mechanism
@pytest.mark.parametrize(
    ("change", "name", "kind"),
    [
        ({"norm": 3}, "norm", ValueError),
        ({"norm": math.nan}, "norm", ValueError),
        ({"norm": True}, "norm", ValueError),
        ({"step": -0.1}, "step", ValueError),
        ({"step": math.nan}, "step", ValueError),
        ({"step": 1.0, "episode": math.nan}, "episode", ValueError),
        ({"horizon": 0}, "horizon", ValueError),
        ({"horizon": 2.5}, "horizon", TypeError),
        ({"n_features": 0}, "n_features", ValueError),
    ],
)
def test_bad_threats_are_refused_by_every_mechanism(
    noise: Noise, change: dict[str, Any], name: str, kind: type[Exception]
) -> None:
    threat = {"norm": 1, "step": 0.1, "episode": None, "horizon": 5, "n_features": 6, **change}
    with pytest.raises(kind, match=f"^{name} must"):
        noise.covering_budget(**threat)


def test_per_feature_sigma_refuses_frames_of_another_width() -> None:
    with pytest.raises(ValueError, match="sigma has 3 entries, but the frames' last axis has 4"):
        UNEVEN.perturb(np.zeros((2, 4)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="n_features must be a multiple of the 3 entries of sigma"):
        UNEVEN.covering_budget(math.inf, step=0.1, episode=None, horizon=5, n_features=4)


@each_mechanism
@pytest.mark.parametrize(
    ("x", "generator", "kind", "message"),
    [
        (np.zeros((2, 3), dtype=np.uint8), np.random.default_rng(0), ValueError, "floating dtype, got uint8"),
        (np.zeros((2, 3), dtype=np.int64), np.random.default_rng(0), ValueError, "floating dtype"),
        (np.zeros((2, 3), dtype=bool), np.random.default_rng(0), ValueError, "floating dtype"),
        (np.zeros((2, 3), dtype=object), np.random.default_rng(0), ValueError, "floating dtype"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.Generator(), ValueError, "floating dtype"),
        (np.zeros(3), np.random.default_rng(0), ValueError, "batch of frames"),
        (torch.zeros(3), torch.Generator(), ValueError, "batch of frames"),
        ([[0.0, 1.0, 2.0]], np.random.default_rng(0), TypeError, "numpy array or torch tensor, got list"),
        (np.zeros((2, 3)), torch.Generator(), TypeError, "generator must be of the frames' library"),
        (np.zeros((2, 3)), None, TypeError, "generator must be"),
        (torch.zeros(2, 3), np.random.default_rng(0), TypeError, "generator must be"),
        (torch.zeros(2, 3), None, TypeError, "generator must be"),
        (torch.zeros(2, 3), [torch.Generator(), None], TypeError, "generator must be of the frames' library"),
        (torch.zeros(2, 3), [torch.Generator()], ValueError, "a list of one per frame; got 1 for 2 frames"),
        (np.zeros((2, 3)), [np.random.default_rng(0)] * 3, ValueError, "a list of one per frame; got 3 for 2 frames"),
    ],
)
def test_frames_that_cannot_carry_noise_are_refused(
    noise: Noise, x: Any, generator: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        noise.perturb(x, generator)


def test_splitting_hides_a_step_near_zero_however_large_the_range() -> None:
    """One float32 step of x near 0 must not become one step of `low`, 8000 times larger."""
    noise, x = Splitting(0.001, low=-10.0, high=10.0), np.float32(0.0010008811)
    frames = [np.full((300, 2000), v, np.float32) for v in (x, np.nextafter(x, np.float32(1)))]
    clean, attacked = (noise.perturb(frame, np.random.default_rng(1)).astype(float) for frame in frames)
    assert np.mean(np.any(clean != attacked, axis=1)) < 0.05


def test_a_budget_of_frames_is_never_rounded_down() -> None:
    noise = Ablation(0.05)
    assert noise.lower(1.0, 0.29 * 100) == noise.lower(1.0, 29)
    assert noise.lower(1.0, 28.5) == noise.lower(1.0, 29)
