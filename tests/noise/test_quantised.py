"""Integer Gaussian noise: the law that is drawn, and that the certificate is about the program."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy import stats

from robustrl.noise import DeterministicSplitting, Gaussian, Noise, QuantisedGaussian, Uniform, quantised
from robustrl.noise.grid import Grid

SMALL = QuantisedGaussian(0.3, 5, low=-1.0, high=1.5)  # steps of 0.5: sigma is 0.6 of one


def law(noise: QuantisedGaussian) -> tuple[np.ndarray, np.ndarray]:
    """Values of the integer noise and their exact probabilities under uniform 60-bit integers."""
    table = [0, *noise.thresholds().tolist(), 2**60]
    most = len(table) // 2 - 1
    return np.arange(-most, most + 1), np.diff(np.array(table, dtype=object)) / 2**60


@pytest.mark.parametrize(
    "noise", [SMALL, QuantisedGaussian(0.25), QuantisedGaussian(0.02, 255), QuantisedGaussian(30.0, 255, 0, 255)], ids=str
)
def test_thresholds_are_those_of_the_normal_law_to_half_a_unit(noise: QuantisedGaussian) -> None:
    mpmath.mp.dps = 40
    table = noise.thresholds()
    most = len(table) // 2
    assert most == noise.quantisation + noise.margin
    assert np.all(np.diff(table) >= 0)
    deviation = mpmath.mpf(noise.sigma) * noise.quantisation / (mpmath.mpf(noise.high) - mpmath.mpf(noise.low))
    error = mpmath.mpf(0)
    for t, j in zip(table.tolist(), range(-most + 1, most + 1), strict=True):
        miss = abs(mpmath.mpf(t) - 2**60 * mpmath.ncdf((j - mpmath.mpf("0.5")) / deviation))
        assert miss <= mpmath.mpf("0.5") + mpmath.mpf(10) ** -15
        error += miss
    assert float(2**20 * error / 2**60) <= noise.slack  # the total variation of 2^20 draws


def test_slack_is_a_billionth() -> None:
    assert QuantisedGaussian(0.25).slack == pytest.approx(2**20 * (255 + 383) * 2.0**-60, rel=1e-8)
    assert QuantisedGaussian(0.25).slack < 6e-10


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("noise", [SMALL, QuantisedGaussian(0.25)], ids=str)
def test_noise_is_a_rounded_gaussian_in_whole_steps(noise: QuantisedGaussian, library: str) -> None:
    n, middle = 200_000, noise.quantisation // 2
    value = noise.low + middle * noise.grid.step
    if library == "numpy":
        y = noise.perturb(np.full((n, 1), value), np.random.default_rng(0))
    else:
        y = noise.perturb(torch.full((n, 1), value, dtype=torch.float64), torch.Generator().manual_seed(0)).numpy()
    steps = (y.ravel() - value) / noise.grid.step
    assert np.abs(steps - np.round(steps)).max() < 1e-9
    steps, deviation = np.round(steps).astype(int), noise.sigma / noise.grid.step
    cells, counts = np.unique(steps, return_counts=True)
    expected = n * (stats.norm.cdf((cells + 0.5) / deviation) - stats.norm.cdf((cells - 0.5) / deviation))
    often = expected > 10
    assert np.sum((counts - expected)[often] ** 2 / expected[often]) < stats.chi2(often.sum()).ppf(0.999)
    assert steps.std() == pytest.approx(math.sqrt(deviation**2 + 1 / 12), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_noise_of_a_shifted_input_is_shifted_noise_bit_for_bit(dtype: str) -> None:
    """What floating-point addition does not do, and the proof needs."""
    noise = QuantisedGaussian(0.1)
    first, second = (np.full((1000, 3), k / 255, dtype) for k in (100, 101))
    y, z = (np.rint(noise.perturb(x, np.random.default_rng(0)).astype(float) * 255).astype(int) for x in (first, second))
    assert_array_equal(y + 1, z)
    levels = np.unique(noise.perturb(first, np.random.default_rng(0)))
    assert np.isin(levels, Grid(255, 0, 1).values(np.arange(-500, 800)).astype(dtype)).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_integers_become_noise_by_the_thresholds_they_reach_and_saturate_six_sigma_out(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = QuantisedGaussian(0.5, 4, 0, 4)  # sigma is half a step
    assert noise.margin == 3
    table = noise.thresholds().tolist()

    def shown(drawn: int) -> list[float]:
        x: Any = np.arange(5.0)[None] if library == "numpy" else torch.arange(5.0)[None]
        all_equal = np.full((1, 5), drawn) if library == "numpy" else torch.full((1, 5), drawn)
        monkeypatch.setattr(quantised, "integers", lambda x, generator: all_equal)
        return noise.perturb(x, np.random.default_rng(0) if library == "numpy" else torch.Generator())[0].tolist()

    # 60 bits end at 8.8 sigma, here 4 steps
    assert shown(0) == [-3, -3, -2, -1, 0]
    assert shown(2**60 - 1) == [4, 5, 6, 7, 7]
    middle = len(table) // 2
    assert shown(table[middle]) == [1, 2, 3, 4, 5]
    assert shown(table[middle] - 1) == shown(table[middle - 1]) == [0, 1, 2, 3, 4]
    assert shown(table[middle - 1] - 1) == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("noise", [SMALL, QuantisedGaussian(0.4, 8)], ids=str)
def test_no_event_of_one_entry_escapes_the_certificate(noise: QuantisedGaussian) -> None:
    """All half-lines and intervals of shown values, all pairs of inputs, in the exact law of the program."""
    values, probabilities = law(noise)
    q, margin = noise.quantisation, noise.margin
    shown = {}
    for i in range(q + 1):
        mass = np.zeros(q + 2 * margin + 1)
        np.add.at(mass, np.clip(i + values, -margin, q + margin) + margin, probabilities.astype(float))
        shown[i] = np.append(0.0, np.cumsum(mass))
    tightest = math.inf
    for i in range(q + 1):
        for j in range(q + 1):
            clean, attacked = (np.clip(shown[k][:, None] - shown[k][None], 0, 1) for k in (i, j))
            room = attacked - noise.lower(clean, abs(i - j) * noise.grid.step)
            assert room.min() >= -1e-13
            if i != j:
                tightest = min(tightest, float(room[(clean > 0.3) & (clean < 0.9)].min()))
    assert tightest < 1e-6  # half-lines attain it up to the slack


def test_radius_is_the_gaussian_one_less_the_slack() -> None:
    noise = QuantisedGaussian(0.25)
    for p in ((0.9,), (0.55,), (0.7, 0.2), (0.45, 0.3)):
        exact, real = noise.radius(*p), Gaussian(0.25).radius(*p)
        assert real - 1e-8 < exact < real
    assert noise.radius(0.5 + noise.slack) == 0.0
    assert 1.2 < noise.radius(1.0) < math.inf


def test_arithmetic_models_are_declared() -> None:
    assert QuantisedGaussian(0.25).fp_model == DeterministicSplitting(9).fp_model == "exact"
    assert Gaussian(0.25).fp_model == Uniform(0.25).fp_model == "real"


@pytest.mark.parametrize("noise", [QuantisedGaussian(0.25, 20), DeterministicSplitting(7, 20)], ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("value", [0.51, 0.05002 * 1.001, -0.05, 1.05, math.nan, math.inf])
def test_inputs_off_the_grid_are_refused(noise: Noise, library: str, value: float) -> None:
    x = np.full((2, 3), 0.5)
    x[1, 2] = value
    with pytest.raises(ValueError, match="observations must lie on the grid of 20 steps between 0"):
        if library == "numpy":
            noise.perturb(x, np.random.default_rng(0))
        else:
            noise.perturb(torch.from_numpy(x), torch.Generator())


def test_inputs_with_more_entries_than_the_slack_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1048576 entries"):
        QuantisedGaussian(0.25).perturb(np.zeros((1, 2**20 + 1), np.float16), np.random.default_rng(0))


def test_grids_read_single_precision_bytes_and_features_of_their_own_range() -> None:
    every = np.arange(256)
    assert_array_equal(Grid(255, 0.0, 1.0).indices((every / 255).astype(np.float32)), every)
    assert_array_equal(Grid(255, 0.0, 255.0).indices(every.astype(np.uint8)), every)
    assert_array_equal(Grid(255, 0.0, 255.0).indices(torch.arange(256, dtype=torch.uint8)).numpy(), every)
    uneven = Grid(4, (-1.0, 0.0), (1.0, 8.0))
    assert uneven.step == 0.5
    points = uneven.values(np.stack([np.arange(5)] * 2, axis=1))
    assert_array_equal(points[:, 0], [-1, -0.5, 0, 0.5, 1])
    assert_array_equal(points[:, 1], [0, 2, 4, 6, 8])
    assert_array_equal(uneven.indices(points), np.stack([np.arange(5)] * 2, axis=1))
    assert_array_equal(uneven.nearest(np.array([[-9.0, 0.9], [0.3, math.inf]])), [[0, 0], [3, 4]])
    with pytest.raises(ValueError, match="must be numbers, got NaN"):
        uneven.nearest(np.array([[math.nan, 0.0]]))
