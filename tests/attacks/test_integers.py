"""Integer observations: no delivery costs more than the float perturbation that it stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from robustrl.attacks.integers import greedy, rounded, spend

NORMS = (0, 1, 2, math.inf)
each_norm = pytest.mark.parametrize("norm", NORMS)
each_kind = pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])


def pictures(n: int, *, seed: int = 0, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Whole grey levels, many of them at the ends."""
    levels = torch.randint(-60, 316, (n, 1, 5, 5), generator=torch.Generator().manual_seed(seed))
    return levels.clamp(0, 255).to(dtype)


def attacked(frames: torch.Tensor, size: float, *, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    return (frames.float() + size * noise).clamp(0, 255)


def cost(delta: torch.Tensor, norm: float) -> torch.Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), norm, dim=1)


@each_norm
@each_kind
@pytest.mark.parametrize("size", [0.01, 0.7, 3.0, 40.0])
@pytest.mark.parametrize("mode", ["round", "greedy"])
def test_no_norm_grows_and_levels_are_whole_and_in_range(norm: float, dtype: torch.dtype, size: float, mode: str) -> None:
    frames = pictures(300, dtype=dtype)
    wanted = attacked(frames, size)
    delivered = rounded(frames, wanted) if mode == "round" else greedy(norm)(frames, wanted)
    assert delivered.dtype == dtype
    delta, proposed = delivered.double() - frames.double(), wanted.double() - frames.double()
    assert bool((delta == delta.round()).all())
    assert bool((delivered.double() >= 0).all())
    assert bool((delivered.double() <= 255).all())
    for other in NORMS if mode == "round" else (norm,):
        assert bool((cost(delta, other) <= cost(proposed, other) * (1 + 1e-9)).all())
    assert bool((delta * proposed >= 0).all())  # no entry turns


@each_kind
def test_a_cast_would_multiply_a_small_budget_and_rounding_spends_nothing(dtype: torch.dtype) -> None:
    """Flooring -0.01 grey levels gives -1 everywhere."""
    frames = pictures(5, dtype=dtype).clamp(100, 200)
    wanted = frames.float() - 0.01
    assert cost(wanted.floor() - frames.float(), 2).min() == 5
    for mode in (rounded, greedy(2), greedy(math.inf)):
        assert torch.equal(mode(frames, wanted), frames)


def test_whole_steps_are_kept_although_float64_falls_short_of_them() -> None:
    frames = torch.full((1, 4), 100.0)
    wanted = frames.double() + torch.tensor([[3.0 - 1e-10, -2.0 + 1e-10, 3.0, 0.0]], dtype=torch.float64)
    assert (rounded(frames, wanted) - frames).tolist() == [[3, -2, 3, 0]]
    short = frames.double() + torch.tensor([[3.0 - 1e-7, 1.0, 0.0, 0.0]], dtype=torch.float64)  # 3 would cost more
    assert (rounded(frames, short) - frames).tolist() == [[2, 1, 0, 0]]


@each_norm
def test_greedy_spends_at_least_what_rounding_does(norm: float) -> None:
    frames = pictures(200).clamp(50, 200)
    wanted = attacked(frames, 1.5)
    plain, more = (mode(frames, wanted).double() - frames.double() for mode in (rounded, greedy(norm)))
    assert bool((more.abs() >= plain.abs()).all())
    assert bool((more.abs() <= plain.abs() + 1).all())
    if norm == math.inf:
        largest = (wanted.double() - frames.double()).flatten(1).abs().amax(1).floor()
        touched = (wanted.double() != frames.double()).flatten(1)
        expected = torch.minimum((plain.abs() + 1).flatten(1), largest[:, None].maximum(plain.flatten(1).abs()))
        assert torch.equal(more.abs().flatten(1)[touched], expected[touched])
    elif norm:
        spent, allowed = cost(more, norm) ** norm, cost(wanted.double() - frames.double(), norm) ** norm
        # What is left buys no other entry that rounding has cut.
        price = torch.where(more.abs() == plain.abs(), (plain.abs() + 1) ** norm - plain.abs() ** norm, math.inf)
        assert bool((spent + price.flatten(1).amin(1) > allowed - 1e-9).all())
    else:
        assert bool(((more != 0) == ((wanted.double() - frames.double()) != 0)).all())


def test_the_l2_price_of_one_more_level_is_2k_plus_1() -> None:
    """k^2 -> (k + 1)^2; the entry that rounding cut most comes first, and what does not fit is skipped."""
    frames = torch.full((1, 3), 100.0)
    wanted = frames + torch.tensor([[2.9, 1.6, 0.5]])  # squares: 8.41 + 2.56 + 0.25 = 11.22, rounded 4 + 1 + 0 = 5
    assert (greedy(2)(frames, wanted) - frames).tolist() == [[3, 1, 1]]  # + 5 = 10, + 3 > 11.22, + 1 = 11
    assert (greedy(1)(frames, wanted) - frames).tolist() == [[3, 2, 0]]  # 5.0: 2 + 1 + 0, then one each
    assert (greedy(math.inf)(frames, wanted) - frames).tolist() == [[2, 2, 1]]
    assert (greedy(0)(frames, wanted) - frames).tolist() == [[3, 2, 1]]


def test_a_gradient_spends_the_radius_from_the_steepest_entry_on() -> None:
    """Norm inf: the best of all whole perturbations of 3 entries; norms 1 and 2: nothing more fits."""
    gradient, frames = torch.tensor([[3.0, -1.0, 0.4]]), torch.full((1, 3), 100.0)
    side = torch.arange(-6.0, 7.0)
    grid = torch.cartesian_prod(side, side, side)

    def delta(norm: float, radius: float) -> torch.Tensor:
        found = spend(frames, frames, torch.tensor([radius]), norm, gradient=gradient) - frames
        assert cost(found, norm) <= radius
        return found[0]

    inside = grid[torch.linalg.vector_norm(grid, math.inf, dim=1) <= 2.7]
    assert float(delta(math.inf, 2.7) @ gradient[0]) == pytest.approx(float((inside @ gradient[0]).max()))
    assert delta(1, 5.0).tolist() == [2, -2, 1]
    assert delta(2, 4.3).tolist() == [3, -2, 2]  # 17 of 18.49: from [2, -2, 2] on, 5 fits once
    assert delta(0, 2.0).tolist()[2] == 0
    back = spend(frames, frames + torch.tensor([[-2.0, 0.0, 0.0]]), torch.tensor([3.0]), math.inf, gradient=gradient) - frames
    assert back.tolist() == [[-2, -3, 3]]  # no entry that the attack has moved is moved back


def test_the_range_ends_every_step() -> None:
    frames = torch.tensor([[255, 0, 254, 1]], dtype=torch.uint8)
    gradient = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    delivered = spend(frames, frames.float(), torch.tensor([20.0]), math.inf, gradient=gradient)
    assert delivered.tolist() == [[255, 0, 255, 0]]


@each_norm
def test_rows_do_not_depend_on_each_other(norm: float) -> None:
    frames = pictures(30)
    wanted = attacked(frames, 2.0)
    together = greedy(norm)(frames, wanted)
    for i in range(30):
        assert torch.equal(greedy(norm)(frames[i : i + 1], wanted[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_units_per_coordinate_count(norm: float) -> None:
    scale: Any = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    frames, noise = torch.full((200, 3), 100.0), torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 2
    delta = greedy(norm, scale)(frames, frames + noise) - frames
    stated = np.linalg.norm((noise / scale).numpy(), norm, axis=1)
    assert (np.linalg.norm((delta / scale).numpy(), norm, axis=1) <= stated * (1 + 1e-6)).all()
    assert bool((delta.abs() > (noise.abs()).floor()).any())
