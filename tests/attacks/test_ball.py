"""The ball of a threat model: norm 0, units per coordinate, masks and ranges, against closed forms and brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kstest

from attacks.victims import WEIGHTS, context, frames_of, linear
from robustrl.attacks import Ball, GradientAttack, Greedy, Margin
from robustrl.attacks.geometry import NORMS, unit_ball
from robustrl.threat import Ledger, ThreatModel

DUAL = {1: math.inf, 2: 2, math.inf: 1}
SCALE = torch.tensor([0.5, 2.0, 4.0, 1.0], dtype=torch.float64)
each_norm = pytest.mark.parametrize("norm", NORMS)
every_norm = pytest.mark.parametrize("norm", [0, *NORMS])


def ball(
    n: int = 50, radius: Any = 1.0, norm: float = 2, *, mask: Any = (1, 1, 1, 1), dtype: Any = torch.float64, **more: Any
) -> Ball:
    centre = 0.3 * frames_of(n).to(dtype)
    radii = torch.as_tensor(radius, dtype=torch.float64).expand(n).clone()
    return Ball(centre, radii, norm, torch.tensor(mask, dtype=torch.float32), **more)


@each_norm
@pytest.mark.parametrize("scale", [None, SCALE], ids=["ones", "scale"])
def test_the_steepest_direction_attains_the_dual_norm_of_the_scaled_gradient(norm: float, scale: torch.Tensor | None) -> None:
    """sup of g . d over ||d / s||_p <= 1 is ||g s||_dual; masked entries do not count."""
    there = ball(norm=norm, scale=scale, mask=(1, 1, 0, 1))
    gradient = frames_of(50, seed=2).double()
    direction = there.ascent(gradient, there.centre)
    torch.testing.assert_close(there.norms(direction), torch.ones(50, dtype=torch.float64))
    sizes = (gradient * (1.0 if scale is None else scale))[:, [0, 1, 3]]
    torch.testing.assert_close((gradient * direction).sum(1), torch.linalg.vector_norm(sizes, DUAL[norm], dim=1))


@each_norm
@pytest.mark.parametrize("scaled", [False, True])
def test_the_margin_of_a_linear_rule_drops_by_the_dual_norm_in_units_per_coordinate(norm: float, scaled: bool) -> None:
    """The largest drop of w . x over ||d / s||_p <= e is e ||w s||_dual; every delivery passes the ledger."""
    scale = SCALE if scaled else None
    x = 10 * frames_of(60)
    x = x[(x.double() @ WEIGHTS).abs() > 30][:20]
    attack = GradientAttack(Margin(), allocation=Greedy(), random_start=False)
    delivered = attack.perturb(x, context(linear(), x, 0.7, norm=norm, scale=scale))
    drop = (x.double() @ WEIGHTS + 0.1).abs() - (delivered.double() @ WEIGHTS + 0.1).abs()
    largest = 0.7 * float(torch.linalg.vector_norm(WEIGHTS * (1.0 if scale is None else scale), DUAL[norm]))
    torch.testing.assert_close(drop, torch.full_like(drop, largest), rtol=1e-4, atol=1e-4)
    threat = ThreatModel(norm, step=0.7, scale=None if scale is None else tuple(scale.tolist()))
    Ledger(threat, len(x)).charge(x.numpy(), delivered.numpy())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 10])
def test_norm_0_moves_the_k_entries_with_the_most_to_gain_to_their_ends(k: int, steps: int) -> None:
    """The sum of the k largest |w_i| times the room; with ranges per entry."""
    low, high = torch.tensor([-1.0, -0.5, 0.0, -3.0]), torch.tensor([1.0, 2.0, 0.25, -1.0])
    x = low + (high - low) * torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    attack = GradientAttack(Margin(), allocation=Greedy(), random_start=False, steps=steps)
    delivered = attack.perturb(x, context(linear(), x, k, norm=0, pixels=(low, high)))
    margin = x.double() @ WEIGHTS + 0.1
    down = -margin.sign()[:, None] * WEIGHTS
    room = torch.where(down > 0, high - x.double(), x.double() - low)
    largest = (down.abs() * room).topk(k, dim=1).values.sum(1)
    drop = margin.abs() - margin.sign() * (delivered.double() @ WEIGHTS + 0.1)
    torch.testing.assert_close(drop, largest, rtol=1e-5, atol=1e-5)
    assert bool(((delivered == x) | (delivered == low) | (delivered == high)).all())
    assert bool(((delivered != x).sum(1) <= k).all())


def test_norm_0_finds_the_best_entries_of_a_curved_function() -> None:
    """Brute force over all pairs of entries at all ends."""
    weights = frames_of(1, 6, seed=5)[0]

    def value(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).sum(1) + 0.3 * (x[:, :3] * x[:, 3:]).sum(1)

    centre = 0.2 * frames_of(20, 6)
    there = Ball(centre, torch.full((20,), 2.0, dtype=torch.float64), 0, torch.ones(6), pixels=(-1.0, 1.0))
    point, best = centre, value(centre)
    for _ in range(6):
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(point).sum(), point)
        point = there.climb(point.detach(), gradient, torch.ones(20))
        best = torch.maximum(best, value(point))
    brute = torch.full((20,), -math.inf)
    for i, j in itertools.combinations(range(6), 2):
        for ends in itertools.product((-1.0, 1.0), repeat=2):
            changed = centre.clone()
            changed[:, [i, j]] = torch.tensor(ends)
            brute = torch.maximum(brute, value(changed))
    assert bool((best <= brute + 1e-6).all())
    assert float((best - value(centre)).sum() / (brute - value(centre)).sum()) > 0.95


def test_norm_0_needs_a_range_and_a_whole_number_of_entries() -> None:
    with pytest.raises(ValueError, match="norm 0 moves entries to the ends of their range"):
        ball(norm=0)
    there = ball(norm=0, radius=2.9, pixels=(-2.0, 2.0))
    assert bool(((there.farthest(frames_of(50).double()) != 0).sum(1) == 2).all())
    assert bool(((ball(norm=0, radius=math.inf, pixels=(-2.0, 2.0)).farthest(frames_of(50).double()) != 0).sum(1) == 4).all())


def test_the_norm_0_projection_keeps_what_gains_most() -> None:
    delta = torch.tensor([[3.0, -1.0, 0.0, 2.0]]).double()
    there = Ball(torch.zeros(1, 4).double(), torch.tensor([2.0]), 0, torch.ones(4), pixels=(-9.0, 9.0))
    assert there.project(delta).tolist() == [[3, 0, 0, 2]]
    assert there.project(delta, torch.tensor([[0.1, -5.0, 9.0, 1.0]]).double()).tolist() == [[0, -1, 0, 2]]
    assert there.project(delta, torch.full((1, 4), math.nan).double()).count_nonzero() <= 2


@each_norm
def test_the_scaled_projection_is_the_nearest_point_of_the_scaled_ball(norm: float) -> None:
    """Against a convex solver, in the distance of delta / scale."""
    delta = frames_of(6, seed=4).double() * SCALE
    there = ball(6, 0.8, norm, scale=SCALE)
    projected = there.project(delta)
    assert bool((there.norms(projected) <= 0.8 * (1 + 1e-12)).all())
    for got, point in zip((projected / SCALE).numpy(), (delta / SCALE).numpy(), strict=True):
        limit = {"type": "ineq", "fun": lambda u: 0.8 - np.linalg.norm(u, norm)}
        found = minimize(lambda u, point=point: ((u - point) ** 2).sum(), got * 0.9, constraints=[limit], tol=1e-12)
        assert ((got - point) ** 2).sum() <= found.fun + 1e-5


@each_norm
@pytest.mark.parametrize("pixels", [None, (-0.4, 0.5)], ids=["free", "range"])
def test_the_farthest_point_of_a_scaled_ball_maximises_a_linear_function(norm: float, pixels: Any) -> None:
    """Against random points of the ball, and the dual norm without a range."""
    there = ball(20, 0.6, norm, scale=SCALE, pixels=pixels)
    centre = there.centre if pixels is None else there.centre.clamp(*pixels)
    there = Ball(centre, there.radius, norm, there.attackable, SCALE, pixels)
    gradient = frames_of(20, seed=3).double()
    far = there.farthest(gradient)
    assert bool((there.norms(far) <= 0.6 * (1 + 1e-9)).all())
    value = (gradient * far).sum(1)
    if pixels is None:
        torch.testing.assert_close(value, 0.6 * torch.linalg.vector_norm(gradient * SCALE, DUAL[norm], dim=1))
    for seed in range(300 if norm != 2 or pixels is None else 0):
        uniforms = torch.rand(20, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert bool(((gradient * there.sample(uniforms)).sum(1) <= value + 1e-9).all())


@each_norm
def test_samples_are_uniform_in_the_ball(norm: float) -> None:
    """The radius has the distribution (r / e)^n over the n attackable entries; coordinates are uncorrelated and centred."""
    n = 20_000
    uniforms = torch.rand(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = unit_ball(uniforms, torch.tensor([1.0, 1.0, 0.0, 1.0]), norm)
    assert not points[:, 2].any()
    radii = torch.linalg.vector_norm(points, norm, dim=1).numpy()
    assert kstest(radii, lambda r: np.clip(r, 0, 1) ** 3).pvalue > 1e-3
    entries = points[:, [0, 1, 3]].numpy()
    np.testing.assert_allclose(entries.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(entries.T), np.eye(3), atol=0.03)
    signs = (entries > 0) @ [1, 2, 4]
    np.testing.assert_allclose(np.bincount(signs) / n, 1 / 8, atol=0.015)


@every_norm
@pytest.mark.parametrize("scale", [None, SCALE], ids=["ones", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_and_boundary_points_pass_the_ledger(norm: float, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
    there = ball(200, 2.0 if norm == 0 else 0.4, norm, mask=(1, 0, 1, 1), dtype=dtype, scale=scale, pixels=(-1.0, 1.0))
    there = replace(there, centre=there.centre.clamp(-1, 1))
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel(norm, step=2.0 if norm == 0 else 0.4, mask=(True, False, True, True))
    threat = threat if scale is None else ThreatModel(norm, step=threat.step, mask=threat.mask, scale=tuple(scale.tolist()))
    if norm:
        direction = there.boundary(torch.Generator().manual_seed(1)).to(dtype)
        assert (0.1 if norm == math.inf else 1 - 1e-6) < float(there.norms(direction[None])) <= 1 + 1e-6
    for delta in (
        there.sample(torch.rand(200, 5, generator=generator, dtype=torch.float64)),
        there.push(there.boundary(generator), there.radius),
    ):
        assert delta.dtype == dtype
        delivered = there.deliver(delta)
        assert delivered.dtype == dtype
        charged = Ledger(threat, 200).charge(there.centre.numpy(), delivered.numpy())
        assert charged.mean() > (1.9 if norm == 0 else 0.15)
        assert float(delivered[:, [0, 2, 3]].abs().max()) <= 1


def test_a_ball_of_some_rows_is_theirs() -> None:
    there = ball(10, torch.arange(10.0), math.inf, scale=SCALE, pixels=(-1.0, 1.0))
    some = there.select(torch.tensor([7, 2]))
    assert some.radius.tolist() == [7, 2]
    assert torch.equal(some.centre, there.centre[[7, 2]])
    assert (some.norm, some.scale, some.pixels) == (there.norm, there.scale, there.pixels)


def test_the_ball_is_what_the_allowance_leaves_of_a_radius() -> None:
    x = frames_of(3)
    situation = context(
        linear(), x, torch.tensor([0.5, 1.0, 2.0]), norm=1, pixels=(torch.zeros(4).double(), torch.ones(4).double())
    )
    assert Ball.around(x, situation, torch.tensor([1.0, 0.25, 9.0])).radius.tolist() == [0.5, 0.25, 2.0]
    around = Ball.around(x, situation)
    assert around.norm == 1
    assert around.pixels is not None
    assert all(isinstance(end, torch.Tensor) and end.dtype == torch.float32 for end in around.pixels)


@each_norm
def test_entries_at_the_end_of_their_own_range_take_no_step(norm: float) -> None:
    low, high = torch.tensor([-1.0, -1.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, math.inf, 1.0])
    there = Ball(torch.zeros(1, 4), torch.tensor([1.0]).double(), norm, torch.ones(4), pixels=(low, high))
    direction = there.ascent(torch.tensor([[0.5, 3.0, 0.25, -2.0]]), there.centre)
    assert direction[0, 1] == direction[0, 3] == 0
    assert direction[0, 0] > 0
    assert float(there.moved(torch.full((1, 4), 5.0))[0, 2]) == 5
