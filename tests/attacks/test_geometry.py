"""Geometry: steepest directions, nearest points, ranges of pictures, and deliveries that the ledger accepts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from robustrl.attacks.geometry import (
    NORMS,
    ascent,
    deliver,
    farthest,
    moved,
    per_row,
    project,
    project_l2,
    random_direction,
    row_norms,
    unblocked,
    unit,
    within,
)
from robustrl.threat import Ledger, ThreatModel

DTYPES = (torch.float32, torch.float64)


def rows(n: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, *shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms_are_those_of_float64(dtype: torch.dtype) -> None:
    x = rows(7, 3, 5, dtype=dtype, scale=1e25)  # squares overflow single precision
    expected = np.linalg.norm(x.double().numpy().reshape(7, -1), axis=1)
    assert row_norms(x).dtype == torch.float64
    np.testing.assert_allclose(row_norms(x).numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-42, 1e30])
def test_unit_rows_have_length_one_and_the_gradients_direction(scale: float) -> None:
    """1e-42 is a subnormal single, whose inverse no single can hold."""
    gradient = torch.tensor([[3.0, 0.0, 4.0], [0.0, -1.0, 0.0]]) * scale
    expected = torch.tensor([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]])
    assert torch.allclose(unit(gradient), expected, rtol=0, atol=1e-2 if scale == 1e-42 else 1e-6)


def test_rows_without_a_usable_gradient_are_zero() -> None:
    gradient = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    assert unit(gradient).tolist() == [[0, 0], [0, 0], [0, 0], pytest.approx([0.6, 0.8])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_shrinks_long_rows_and_leaves_short_ones_alone(dtype: torch.dtype) -> None:
    delta, radius = rows(200, 6, dtype=dtype), torch.linspace(0, 4, 200, dtype=torch.float64)
    projected = project_l2(delta, radius)
    short = row_norms(delta) <= radius
    assert 0 < int(short.sum()) < 200
    assert torch.equal(projected[short], delta[short])
    torch.testing.assert_close(row_norms(projected)[~short], radius[~short], rtol=1e-6, atol=0)
    cosines = (unit(projected) * unit(delta)).sum(1)[radius > 0]
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
    assert torch.equal(projected[0], torch.zeros_like(projected[0]))


DUAL = {1: math.inf, 2: 2, math.inf: 1}
each_norm = pytest.mark.parametrize("norm", NORMS)


@each_norm
def test_the_steepest_direction_attains_the_dual_norm(norm: float) -> None:
    """sup of g . d over ||d||_p <= 1 is ||g||_dual."""
    gradient = rows(300, 2, 7, dtype=torch.float64)
    direction = ascent(gradient, norm)
    torch.testing.assert_close(row_norms(direction, norm), torch.ones(300, dtype=torch.float64))
    slope = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, torch.linalg.vector_norm(gradient.flatten(1), DUAL[norm], dim=1))


def test_an_l1_step_on_a_picture_moves_the_hundredth_part_with_the_largest_gradient() -> None:
    gradient = rows(3, 20, 20)
    direction = ascent(gradient, 1).flatten(1)
    for g, d in zip(gradient.flatten(1), direction, strict=True):
        largest = g.abs().argsort(descending=True)[:4]
        expected = torch.zeros(400)
        expected[largest] = g[largest].sign() / 4
        assert torch.equal(d, expected)


@each_norm
def test_no_direction_without_a_usable_gradient(norm: float) -> None:
    gradient = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [3.0, 0.0]])
    assert ascent(gradient, norm).tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]


def nearest_in_the_l1_ball(point: np.ndarray, radius: float) -> np.ndarray:
    """The soft threshold that meets the ball, by bisection."""
    if np.abs(point).sum() <= radius:
        return point
    low, high = 0.0, np.abs(point).max()
    for _ in range(100):
        middle = (low + high) / 2
        if np.maximum(np.abs(point) - middle, 0).sum() > radius:
            low = middle
        else:
            high = middle
    return np.sign(point) * np.maximum(np.abs(point) - high, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_l1_projection_is_the_nearest_point_of_the_ball(dtype: torch.dtype) -> None:
    delta, radius = rows(300, 3, 3, dtype=dtype), torch.linspace(0, 12, 300, dtype=torch.float64)
    projected = project(delta, radius, 1)
    inside = row_norms(delta, 1) <= radius
    assert 0 < int(inside.sum()) < 300
    assert torch.equal(projected[inside], delta[inside])
    for got, point, size in zip(projected, delta, radius, strict=True):
        expected = nearest_in_the_l1_ball(point.double().numpy().ravel(), float(size))
        np.testing.assert_allclose(got.double().numpy().ravel(), expected, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_the_linf_projection_clamps_every_entry() -> None:
    delta, radius = rows(50, 6, dtype=torch.float64), torch.linspace(0, 3, 50, dtype=torch.float64)
    expected = np.clip(delta.numpy(), -radius.numpy()[:, None], radius.numpy()[:, None])
    np.testing.assert_array_equal(project(delta, radius, math.inf).numpy(), expected)


@each_norm
def test_random_directions_fill_the_attackable_entries_of_the_ball(norm: float) -> None:
    attackable = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([random_direction(attackable, norm, generator) for _ in range(4000)])
    assert not points[:, 0, 1].any()
    entries = points.flatten(1)[:, [0, 2, 3]].double()
    norms = torch.linalg.vector_norm(entries, norm, dim=1)
    if norm == math.inf:
        assert float(norms.max()) < 1
        second_moment = 1 / 3  # of a uniform entry
    else:
        torch.testing.assert_close(norms, torch.ones(4000, dtype=torch.float64), rtol=1e-6, atol=0)
        second_moment = 1 / 3 if norm == 2 else 1 / 6  # a third of the norm; for l1 E x^2 = 2 / (n (n + 1))
    np.testing.assert_allclose(entries.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(entries.square().mean(0), second_moment, rtol=0.1)


def test_pictures_stay_in_their_range_and_no_change_grows_or_turns() -> None:
    frames = torch.tensor([[0.0, 0.5, 1.0, 1.5, -0.5]])  # the last two are outside already
    delta = torch.tensor([[-0.2, 0.6, 0.1, 0.3, 0.2]])
    torch.testing.assert_close(moved(frames, delta, (0.0, 1.0)), torch.tensor([[0, 1, 1, 1.5, -0.3]]))
    torch.testing.assert_close(within(frames, delta, (0.0, 1.0)), torch.tensor([[0, 0.5, 0, 0, 0.2]]))
    assert within(frames, delta, None) is delta


@each_norm
@pytest.mark.parametrize("pixels", [None, (0.0, 1.0)], ids=["vectors", "pictures"])
def test_the_farthest_point_maximises_a_linear_function_over_ball_and_range(
    norm: float, pixels: tuple[float, float] | None
) -> None:
    """Against linear programs (norms 1 and inf) and, without a range, the dual norm."""
    frames, gradient = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)).double(), rows(8, 6, dtype=torch.float64)
    gradient[:, 2] = 0.0
    radius = torch.linspace(0, 1.7, 8, dtype=torch.float64)
    delta = farthest(gradient, frames, radius, norm, pixels)
    assert bool((row_norms(delta, norm) <= radius * (1 + 1e-12)).all())
    for x, g, d, r in zip(frames.numpy(), gradient.numpy(), delta.numpy(), radius.tolist(), strict=True):
        if pixels is not None:
            assert (x + d).min() >= -1e-12
            assert (x + d).max() <= 1 + 1e-12
        bounds = [(-np.inf, np.inf)] * 6 if pixels is None else list(zip(-x, 1 - x, strict=True))
        if norm == math.inf:
            best = -linprog(-g, bounds=[(max(low, -r), min(high, r)) for low, high in bounds]).fun
        elif norm == 1:
            split = [(0, high) for _, high in bounds] + [(0, -low) for low, _ in bounds]
            best = -linprog(np.concatenate((-g, g)), A_ub=np.ones((1, 12)), b_ub=[r], bounds=split).fun
        elif pixels is None:
            best = r * np.linalg.norm(g)
        else:
            continue
        assert g @ d == pytest.approx(best, abs=1e-9)


def test_no_farthest_point_without_a_usable_gradient() -> None:
    gradient, frames = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]]), torch.full((3, 2), 0.5)
    for norm in NORMS:
        assert not farthest(gradient, frames, torch.ones(3, dtype=torch.float64), norm, (0.0, 1.0)).any()


def test_a_gradient_against_the_end_of_the_range_is_blocked() -> None:
    frames, gradient = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]]), torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    assert unblocked(gradient, frames, (0.0, 1.0)).tolist() == [[1, 0, 0, -1, 1]]
    assert unblocked(gradient, frames, None) is gradient


@each_norm
@pytest.mark.parametrize("pixels", [(0.0, 1.0), (0.1, 0.7), (0.0, 255.0)])
def test_delivered_pictures_are_in_range_and_within_budget_to_the_last_bit(norm: float, pixels: tuple[float, float]) -> None:
    low, high = (float(torch.tensor(end)) for end in pixels)
    frames = torch.rand(500, 6, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    frames = frames.clamp(low, high)
    radius = torch.logspace(-3, 1, 500, dtype=torch.float64) * high
    delta = ascent(rows(500, 6, seed=1), norm) * per_row(radius, frames) * 1.0000001
    delivered = deliver(frames, delta, radius, norm, (low, high))
    assert bool((row_norms(delivered.double() - frames.double(), norm) <= radius).all())
    assert float(delivered.min()) >= low
    assert float(delivered.max()) <= high
    assert bool((delivered == high).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@each_norm
def test_every_delivery_passes_the_ledger(dtype: torch.dtype, size: float, norm: float) -> None:
    """Observations of any size, perturbations at the very edge of the budget, rounding included."""
    n = 3000
    frames = rows(n, 4, dtype=dtype, scale=size, seed=1)
    radius = torch.logspace(-9, 1, n, dtype=torch.float64)
    for stretch in (1.0, 1 + 1e-7, 2.0):
        delta = ascent(rows(n, 4, dtype=dtype, seed=2), norm) * per_row(radius * stretch, frames)
        delivered = deliver(frames, delta, radius, norm)
        assert delivered.dtype == frames.dtype
        for i in range(0, n, 50):
            Ledger(ThreatModel(norm=norm, step=float(radius[i])), 1).charge(
                frames[i : i + 1].numpy(), delivered[i : i + 1].numpy()
            )
        assert bool((row_norms(delivered.double() - frames.double(), norm) <= radius).all())


def test_a_delivery_uses_what_it_may_where_the_precision_allows() -> None:
    frames, radius = rows(500, 4), torch.full((500,), 0.1, dtype=torch.float64)
    norms = row_norms(deliver(frames, unit(rows(500, 4, seed=3)) * 0.1, radius).double() - frames.double())
    assert float(norms.min()) > 0.0999


@each_norm
def test_a_small_budget_on_large_observations_is_not_given_up(norm: float) -> None:
    """Single precision resolves 2e-6 at 30: no shrink by a millionth helps a perturbation of .1 that rounding lengthened."""
    frames, radius = rows(3000, 4, scale=15), torch.full((3000,), 0.1, dtype=torch.float64)
    norms = row_norms(deliver(frames, ascent(rows(3000, 4, seed=3), norm) * 0.1, radius, norm).double() - frames.double(), norm)
    assert float(norms.max()) <= 0.1
    assert float(norms.min()) > 0.099


def test_a_budget_below_the_precision_is_not_spent() -> None:
    frames = torch.full((1, 4), 1e6)
    assert torch.equal(deliver(frames, torch.full((1, 4), 0.04), torch.tensor([1e-3], dtype=torch.float64)), frames)
