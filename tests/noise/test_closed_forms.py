"""Radii in closed form, in every norm, against identities and enumerations that do not share their formulae."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.special import betaincinv

from robustrl.noise import (
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
)

INF = math.inf


# ------------------------------------------------------------------------------------------------- other norms


@pytest.mark.parametrize(("p", "radius"), [(0.9, 3.325411e-4), (0.99, 4.383273e-4)])
@pytest.mark.parametrize("noise", [Uniform(1.0), Splitting(1.0)], ids=lambda noise: noise.scale)
def test_linf_radius_of_independent_uniform_noise(noise: Noise, p: float, radius: float) -> None:
    """2 lam (1 - (3/2 - p)^(1/d)) at d = 3072 (Yang et al. 2020)."""
    assert noise.radius_in(INF, p, dimension=3072) == pytest.approx(radius, rel=2e-7)


@pytest.mark.parametrize(("p_lower", "p_upper"), [(0.9, None), (0.55, None), (0.7, 0.2), (0.4, 0.3), (1.0, 0.0), (1.0, None)])
@pytest.mark.parametrize("d", [1, 2, 5, 100])
def test_linf_radius_is_where_the_overlap_of_two_cubes_loses_half_the_gap(
    p_lower: float, p_upper: float | None, d: int
) -> None:
    noise, gap = Uniform(0.7), p_lower - (1 - p_lower if p_upper is None else p_upper)
    radius = noise.radius_in(INF, p_lower, p_upper, dimension=d)
    assert 1 - (1 - radius / 1.4) ** d == pytest.approx(gap / 2, rel=1e-9)
    assert radius >= noise.radius(p_lower, p_upper) / d * (1 - 1e-11)


def test_independent_splits_notice_an_linf_attack_no_more_often_than_the_cubes_overlap_says() -> None:
    """All pairs of offsets of two entries: the shown pair differs on at most 1 - prod (1 - |e_i| / 2 lam) of them."""
    noise, n = Splitting(0.4), 400
    s = (np.arange(n) + 0.5) / n * 0.8
    offsets = np.stack([part.ravel() for part in np.meshgrid(s, s)], axis=1)
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, e = generator.random(2), generator.uniform(-0.1, 0.1, 2)
        other = np.clip(x + e, 0, 1)
        shown = [noise.split(np.broadcast_to(point, offsets.shape), offsets) for point in (x, other)]
        differ = np.mean(np.any(shown[0] != shown[1], axis=1))
        assert differ <= 1 - np.prod(1 - np.abs(other - x) / 0.8) + 3 / n


def test_common_offsets_have_no_product_radius() -> None:
    """One offset for all entries: an attack on many entries is noticed by the sum, so the l1 radius is all there is."""
    noise = DeterministicSplitting(51, 100)
    assert noise.radius_in(INF, 0.9, dimension=10) == pytest.approx(noise.radius(0.9) / 10)
    assert Splitting(noise.lam).radius_in(INF, 0.9, dimension=10) > noise.radius(0.9) / 10 * 1.1


@pytest.mark.parametrize(
    ("noise", "norm", "factor"),
    [
        (Gaussian(0.5), 1, 1.0),
        (Gaussian(0.5), 2, 1.0),
        (Gaussian(0.5), INF, math.sqrt(12)),
        (Gaussian((0.2, 0.4, 0.0)), INF, math.sqrt(4 * (1 + 0.25))),
        (Gaussian((0.2, 0.4, 0.0)), 1, 1.0),
        (QuantisedGaussian(0.25), INF, math.sqrt(12)),
        (Laplace(0.5), 2, math.sqrt(12)),
        (Laplace(0.5), INF, 12.0),
        (Uniform(0.5), 2, math.sqrt(12)),
        (UniformBall(0.5, 12), 1, 1.0),
        (UniformBall(0.5, 12), INF, math.sqrt(12)),
        (DeterministicSplitting(9), 2, math.sqrt(12)),
    ],
)
def test_radii_in_other_norms_are_those_of_the_largest_ball_inside(noise: Noise, norm: float, factor: float) -> None:
    own, other = noise.radius(0.9), noise.radius_in(norm, 0.9, dimension=12)
    assert other == pytest.approx(own / factor, rel=1e-11)
    assert other <= own / factor
    assert noise.radius_in(noise.norm, 0.9, dimension=12) == own


@pytest.mark.parametrize("noise", [Gaussian(0.5), Laplace(0.5), UniformBall(0.5, 6), DeterministicSplitting(9)], ids=str)
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_no_attack_of_the_converted_radius_leaves_the_ball_of_the_own_norm(noise: Noise, norm: float) -> None:
    generator = np.random.default_rng(1)
    radius, own = noise.radius_in(norm, 0.8, dimension=6), noise.radius(0.8)
    worst = 0.0
    for e in [*generator.standard_normal((300, 6)), *np.sign(generator.standard_normal((50, 6))), *np.eye(6)]:
        worst = max(worst, float(np.linalg.norm(radius * e / np.linalg.norm(e, norm), noise.norm)))
    assert worst <= own * (1 + 1e-14)
    assert worst == pytest.approx(own, rel=1e-9)  # the conversion is the best there is


@pytest.mark.parametrize("noise", [Ablation(0.2), EntryAblation(2, 6)], ids=str)
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_a_number_of_altered_entries_says_nothing_about_other_norms(noise: Noise, norm: float) -> None:
    with pytest.raises(ValueError, match="no radius in norm .*counts altered entries"):
        noise.radius_in(norm, 0.9, dimension=6)
    assert noise.radius_in(0, 0.9, dimension=6) == noise.radius(0.9)


@pytest.mark.parametrize("noise", [Gaussian(0.2), Laplace(0.2), Uniform(0.2), Splitting(0.2), UniformBall(0.2, 6)], ids=str)
def test_additive_noise_has_no_l0_radius(noise: Noise) -> None:
    with pytest.raises(ValueError, match="no radius in norm 0: a few entries can change without limit"):
        noise.radius_in(0, 0.9, dimension=6)


@pytest.mark.parametrize(
    ("norm", "p", "dimension", "name"),
    [(3, 0.9, 6, "norm"), (math.nan, 0.9, 6, "norm"), (2, 1.1, 6, "p_lower"), (2, 0.9, 0, "dimension")],
)
def test_bad_arguments_of_a_converted_radius_are_refused(norm: float, p: float, dimension: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        Gaussian(0.2).radius_in(norm, p, dimension=dimension)


@pytest.mark.parametrize("noise", [UniformBall(0.2, 6), EntryAblation(2, 6)], ids=str)
def test_mechanisms_of_whole_inputs_refuse_other_dimensions(noise: Noise) -> None:
    with pytest.raises(ValueError, match="dimension must be the 6 entries"):
        noise.radius_in(noise.norm, 0.9, dimension=7)
    with pytest.raises(ValueError, match="dimension must be the 6 entries"):
        noise.perturb(np.zeros((2, 7)), np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------- l2 balls


@pytest.mark.parametrize(("d", "p", "radius"), [(5, 0.8, 0.32571328), (3072, 0.9, 0.01892071)])
def test_ball_radius_vectors(d: int, p: float, radius: float) -> None:
    assert UniformBall(1.0, d).radius(p) == pytest.approx(radius, abs=6e-9)


@pytest.mark.parametrize("d", [1, 2, 5, 40, 3072])
@pytest.mark.parametrize("p", [0.501, 0.8, 0.99])
def test_ball_radius_has_the_published_form(d: int, p: float) -> None:
    """lam (2 - 4 BetaInv(3/4 - p/2; (d+1)/2, (d+1)/2)) (Yang et al. 2020): the symmetric beta instead of the half one."""
    published = 0.3 * (2 - 4 * betaincinv((d + 1) / 2, (d + 1) / 2, 0.75 - p / 2))
    assert UniformBall(0.3, d).radius(p) == pytest.approx(published, rel=1e-8)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("distance", [0.01, 0.5, 1.3, 1.99])
def test_balls_overlap_in_two_caps(d: int, distance: float) -> None:
    """Volume of the caps by quadrature of their slices."""

    def slice_(t: mpmath.mpf) -> mpmath.mpf:
        return (1 - t**2) ** (mpmath.mpf(d - 1) / 2)

    overlap = mpmath.quad(slice_, [distance / 2, 1]) / mpmath.quad(slice_, [0, 1])
    assert float(UniformBall(1.0, d).shift(distance)) == pytest.approx(float(1 - overlap), rel=1e-9)
    assert float(UniformBall(0.1, d).lower(0.9, distance / 10)) == pytest.approx(max(0.9 - float(1 - overlap), 0), abs=1e-9)


def test_ball_radius_in_one_dimension_is_that_of_uniform_noise() -> None:
    assert UniformBall(0.7, 1).radius(0.8) == pytest.approx(Uniform(0.7).radius(0.8), rel=1e-9)
    assert UniformBall(0.7, 1).radius(0.6, 0.3) == pytest.approx(Uniform(0.7).radius(0.6, 0.3), rel=1e-9)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4)])
def test_ball_noise_is_uniform_in_the_ball(library: str, shape: tuple[int, ...]) -> None:
    n, d = 20_000, math.prod(shape)
    noise = UniformBall(0.6, d)
    if library == "numpy":
        y = noise.perturb(np.full((n, *shape), 0.3), np.random.default_rng(0))
    else:
        y = noise.perturb(torch.full((n, *shape), 0.3, dtype=torch.float64), torch.Generator().manual_seed(0)).numpy()
    e = (y - 0.3).reshape(n, d)
    length = np.linalg.norm(e, axis=1)
    assert length.max() <= 0.6 * (1 + 1e-6)
    assert stats.kstest((length / 0.6) ** d, "uniform").pvalue > 1e-3
    assert np.abs(e.mean(axis=0)).max() < 4 * 0.6 / math.sqrt(n)
    assert_allclose(np.cov(e.T).reshape(d, d), np.eye(d) * 0.36 / (d + 2), atol=0.01)
    if d > 1:  # one coordinate of a uniform direction: (1 + u) / 2 ~ Beta((d - 1) / 2, (d - 1) / 2)
        u = (1 + e[:, 0] / length) / 2
        assert stats.kstest(u, stats.beta((d - 1) / 2, (d - 1) / 2).cdf).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------ entries


@pytest.mark.parametrize(("d", "k", "p", "radius"), [(784, 45, 0.9, 8), (784, 45, 0.99, 11), (1024, 75, 0.95, 7)])
def test_entry_ablation_radius_vectors(d: int, k: int, p: float, radius: int) -> None:
    assert EntryAblation(k, d).radius(p) == radius


@pytest.mark.parametrize(("d", "k"), [(5, 2), (6, 1), (7, 6), (8, 4)])
def test_an_alteration_is_noticed_as_often_as_enumeration_says(d: int, k: int) -> None:
    noise, subsets = EntryAblation(k, d), list(itertools.combinations(range(d), k))
    for r in range(d + 1):
        noticed = np.mean([any(i < r for i in subset) for subset in subsets])
        assert float(noise.shift(r)) == pytest.approx(noticed, abs=1e-12)
        assert float(noise.shift(r)) >= noticed * (1 - 1e-15)
    assert float(noise.shift(1.5)) == float(noise.shift(2))
    assert float(noise.shift(0.29 * 100 / 29)) == float(noise.shift(1))


def test_entry_ablation_shift_of_many_entries_is_the_hypergeometric_one_rounded_up() -> None:
    mpmath.mp.dps = 50
    noise = EntryAblation(1000, 28_224)
    for r in (1, 7, 40, 1000):
        hidden = mpmath.mpf(math.comb(28_224 - r, 1000)) / math.comb(28_224, 1000)
        assert 0 <= float((float(noise.shift(r)) - (1 - hidden)) / (1 - hidden)) < 1e-10


@pytest.mark.parametrize(("d", "k"), [(4, 1), (9, 3), (784, 45)])
@pytest.mark.parametrize(
    ("p_lower", "p_upper"), [(0.75, None), (0.75 + 1e-15, None), (0.9, None), (1.0, None), (0.6, 0.1), (1.0, 0.0)]
)
def test_entry_ablation_radius_is_the_last_number_that_leaves_no_tie(
    d: int, k: int, p_lower: float, p_upper: float | None
) -> None:
    """At d = 4, k = 1, p = 3/4 one altered entry brings the winner down to exactly 1/2: not certified."""
    noise = EntryAblation(k, d)
    radius, gap = int(noise.radius(p_lower, p_upper)), p_lower - (1 - p_lower if p_upper is None else p_upper)
    certified = [2 * (math.comb(d, k) - math.comb(d - r, k)) < gap * math.comb(d, k) for r in range(d + 1)]
    assert radius == max(r for r in range(d + 1) if certified[r])
    if (d, k, p_lower, p_upper) == (4, 1, 0.75, None):
        assert radius == 0
    if (d, k, p_lower) == (4, 1, 0.75 + 1e-15):
        assert radius == 1


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_entry_ablation_shows_every_set_of_entries_equally_often(library: str) -> None:
    noise, n = EntryAblation(2, 5, fill=-1.0), 20_000
    if library == "numpy":
        y = noise.perturb(np.full((n, 5), 0.3), np.random.default_rng(0))
    else:
        y = noise.perturb(torch.full((n, 5), 0.3, dtype=torch.float64), torch.Generator().manual_seed(0)).numpy()
    assert set(np.unique(y)) == {-1.0, 0.3}
    shown = y == 0.3
    assert_array_equal(shown.sum(axis=1), np.full(n, 2))
    counts = np.unique(shown @ (2 ** np.arange(5)), return_counts=True)[1]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-3
