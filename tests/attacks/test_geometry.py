"""Geometry: directions of length one, and deliveries that the ledger accepts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robustrl.attacks.geometry import deliver, per_row, project_l2, row_norms, unit
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_every_delivery_passes_the_ledger(dtype: torch.dtype, size: float) -> None:
    """Observations of any size, perturbations at the very edge of the budget, rounding included."""
    n = 3000
    frames = rows(n, 4, dtype=dtype, scale=size, seed=1)
    radius = torch.logspace(-9, 1, n, dtype=torch.float64)
    for stretch in (1.0, 1 + 1e-7, 2.0):
        delta = unit(rows(n, 4, dtype=dtype, seed=2)) * per_row(radius * stretch, frames)
        delivered = deliver(frames, delta, radius)
        assert delivered.dtype == frames.dtype
        for i in range(0, n, 50):
            Ledger(ThreatModel(norm=2, episode=float(radius[i])), 1).charge(
                frames[i : i + 1].numpy(), delivered[i : i + 1].numpy()
            )
        assert bool((row_norms(delivered.double() - frames.double()) <= radius).all())


def test_a_delivery_uses_what_it_may_where_the_precision_allows() -> None:
    frames, radius = rows(500, 4), torch.full((500,), 0.1, dtype=torch.float64)
    norms = row_norms(deliver(frames, unit(rows(500, 4, seed=3)) * 0.1, radius).double() - frames.double())
    assert float(norms.min()) > 0.0999


def test_a_budget_below_the_precision_is_not_spent() -> None:
    frames = torch.full((1, 4), 1e6)
    assert torch.equal(deliver(frames, torch.full((1, 4), 0.04), torch.tensor([1e-3], dtype=torch.float64)), frames)
