"""Bounds of networks: never left, exact where they should be, in float32 and with gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustrl.networks.bounds import Ball, Interval, ball_bounds, interval_bounds, propagate


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1])


def cnn(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )


def sample(n: int, shape: tuple[int, ...], norm: float, generator: torch.Generator) -> Tensor:
    """Points of the unit ball, half of them on its surface or in its corners."""
    e = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    if norm == math.inf:
        e[: n // 2] = e[: n // 2].sign()
    e = e / torch.linalg.vector_norm(e.flatten(1), ord=norm, dim=1).reshape(-1, *(1,) * len(shape))
    e[n // 2 :] *= torch.rand(n - n // 2, generator=generator).reshape(-1, *(1,) * len(shape))
    return e


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize(
    ("network", "shape"),
    [(mlp(5, 16, 16, 3), (5,)), (mlp(5, 16, 16, 3, activation=nn.Tanh), (5,)), (cnn(), (2, 7, 7))],
    ids=["relu", "tanh", "cnn"],
)
def test_a_hundred_thousand_points_of_a_ball_never_leave_the_bounds(
    network: nn.Module, shape: tuple[int, ...], norm: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    centre, radius = torch.randn(1, *shape, generator=generator), 0.3
    low, high = ball_bounds(network, centre, radius, norm)
    n = 100_000 if len(shape) == 1 else 20_000
    with torch.no_grad():
        points = (centre.double() + radius * (1 - 1e-7) * sample(n, shape, norm, generator)).float()
        found = network(points)
    assert (found >= low).all()
    assert (found <= high).all()
    assert (high - low).max() < 20


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_one_linear_layer_is_exact_by_the_dual_norm(norm: float) -> None:
    layer, x, radius = mlp(6, 4), torch.randn(3, 6), torch.tensor([0.1, 0.5, 2.0])
    mask = torch.tensor([True, True, False, True, True, True])
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    reach = radius[:, None] * torch.linalg.vector_norm(layer[0].weight * mask, ord=dual, dim=1)
    low, high = ball_bounds(layer, x, radius, norm, mask)
    torch.testing.assert_close(low, layer(x) - reach, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(high, layer(x) + reach, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_one_convolution_is_exact_in_its_interior(norm: float) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 6, 6)
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    reach = 0.2 * torch.linalg.vector_norm(layer.weight.flatten(1), ord=dual, dim=1)[None, :, None, None]
    low, high = ball_bounds(layer, x, 0.2, norm)
    torch.testing.assert_close(high - low, (2 * reach).expand_as(low), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high + low, 2 * layer(x), rtol=1e-4, atol=1e-4)


def test_the_padding_of_a_convolution_can_not_be_attacked() -> None:
    layer, x = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.zeros(1, 1, 3, 3)
    _, high = ball_bounds(layer, x, 1.0, 2)
    corner = torch.linalg.vector_norm(layer.weight[0, 0, 1:, 1:])  # the kernel's part inside the picture
    assert high[0, 0, 0, 0].item() == pytest.approx(corner.item(), rel=1e-4)


def test_every_row_and_entry_has_a_radius_of_its_own() -> None:
    layer, x = mlp(3, 2), torch.randn(4, 3)
    radii = torch.rand(4, 3)
    low, high = interval_bounds(layer, x - radii, x + radii)
    reach = radii @ layer[0].weight.abs().T
    torch.testing.assert_close(high, layer(x) + reach, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low, layer(x) - reach, rtol=1e-5, atol=1e-5)


def test_an_ascent_is_below_the_true_maximum_which_is_below_the_bound() -> None:
    """One ReLU layer and two inputs: the maximum over the square is at a vertex of the pieces, found on a fine grid."""
    network, x = mlp(2, 8, 1, seed=3), torch.tensor([[0.3, -0.2]])
    axis = torch.linspace(-0.5, 0.5, 401)
    grid = x + torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        best = network(grid).max()
    delta = torch.zeros_like(x)
    for _ in range(20):
        point = (x + delta).requires_grad_()
        (slope,) = torch.autograd.grad(network(point).sum(), point)
        delta = (delta + 0.1 * slope.sign()).clamp(-0.5, 0.5)
    _, high = ball_bounds(network, x, 0.5)
    assert network(x + delta).item() <= best + 1e-6 <= high.item() + 1e-6
    assert high.item() < best + 1


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_against_cancellation_in_float32(seed: int) -> None:
    """Terms of 1e6 that cancel: the sum is near zero, and its rounding far above any multiple of it."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(512, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, 512, generator=generator) * 1e3)
        layer.weight[:, 256:] = -layer.weight[:, :256]
    x = torch.rand(1, 256, generator=generator).repeat(1, 2) * 1e3
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    low, high = ball_bounds(layer, x, 0.0)
    for order in (torch.arange(512), torch.randperm(512, generator=generator)):  # another order of summation
        found = torch.zeros(1, 4)
        for i in order:
            found = found + x[:, i : i + 1] * layer.weight[:, i]
        found = found + layer.bias
        assert (low <= found).all() and (found <= high).all()  # noqa: PT018
    assert (low <= exact).all() and (exact <= high).all()  # noqa: PT018


@pytest.mark.parametrize("part", [0.6, 0.4])
def test_bounds_hold_where_every_addition_rounds_the_same_way(part: float) -> None:
    """1, and 1023 terms of 0.6 (0.4) units in its last place: added one by one each counts as a whole unit (as nothing)."""
    layer = nn.Linear(1024, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.full((1, 1024), part * 2.0**-23)
    x[0, 0] = 1.0
    found = torch.ones(())
    for term in x[0, 1:]:
        found = found + term
    assert found.item() == pytest.approx(1 + (1023 * 2.0**-23 if part > 0.5 else 0.0), rel=1e-9)
    low, high = ball_bounds(layer, x, 0.0)
    assert low.item() <= found.item() <= high.item()


def test_differences_of_outputs_are_exact_for_one_layer_and_hold_for_many() -> None:
    layer, x = mlp(5, 3), torch.randn(2, 5)
    weight = layer[0].weight
    ball = Ball(x, torch.full((2,), 0.3), math.inf, torch.ones(1, 5))
    apart = propagate(layer, ball).differences()
    for a, b in itertools.product(range(3), range(3)):
        centre, reach = (layer(x)[:, b] - layer(x)[:, a]), 0.3 * (weight[b] - weight[a]).abs().sum()
        torch.testing.assert_close(apart.high[:, a, b], centre + reach, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(apart.low[:, a, b], centre - reach, rtol=1e-4, atol=1e-4)
    deep = mlp(5, 16, 3, seed=1)
    apart = propagate(deep, ball).differences()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = deep(x + 0.3 * (2 * torch.rand(2, 5, generator=generator) - 1))
        found = scores[:, None, :] - scores[:, :, None]
        assert (found <= apart.high).all() and (found >= apart.low).all()  # noqa: PT018
    box = propagate(deep, ball).box()
    assert (apart.high <= box.high[:, None, :] - box.low[:, :, None] + 1e-4).all()


def test_differences_cover_the_rounding_of_outputs_that_are_far_larger() -> None:
    layer, x = mlp(64, 2), torch.randn(500, 64) * 100
    with torch.no_grad():
        layer[0].weight[1] = layer[0].weight[0] * (1 + 1e-6)
        layer[0].bias.fill_(1e4)
    ball = Ball(x, torch.zeros(500), math.inf, torch.ones(1, 64))
    apart, scores = propagate(layer, ball).differences(), layer(x)
    found = scores[:, 1] - scores[:, 0]
    assert (apart.low[:, 0, 1] <= found).all()
    assert (found <= apart.high[:, 0, 1]).all()


def test_differences_of_a_box_are_those_of_its_ends() -> None:
    box = Interval(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
    apart = box.differences()
    torch.testing.assert_close(apart.high, torch.tensor([[[0.0, 5.0], [-1.0, 0.0]]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(apart.low, torch.tensor([[[0.0, 1.0], [-5.0, 0.0]]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_bounds_have_the_gradient_of_finite_differences(norm: float) -> None:
    network = mlp(3, 6, 2).double()
    x = torch.randn(2, 3, dtype=torch.float64)

    def width() -> Tensor:
        low, high = ball_bounds(network, x, 0.2, norm)
        return (high.square() - low).sum()

    weight = network[0].weight
    (slope,) = torch.autograd.grad(width(), weight)
    for index in itertools.product(range(6), range(3)):
        step = torch.zeros_like(weight)
        step[index] = 1e-6
        with torch.no_grad():
            weight += step
            up = width()
            weight -= 2 * step
            down = width()
            weight += step
        assert float(slope[index]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-5)


def test_weights_of_zero_have_a_finite_gradient() -> None:
    network = mlp(3, 4, 2)
    nn.init.zeros_(network[0].weight)
    _, high = ball_bounds(network, torch.randn(2, 3), 0.1, 2)
    high.sum().backward()
    assert torch.isfinite(network[0].weight.grad).all()


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "named"), [(nn.GELU(), "GELU"), (nn.Sequential(nn.Softmax(-1)), "Softmax"), (Doubled(nn.ReLU()), "Doubled")]
)
def test_unknown_layers_are_named_and_subclasses_are_unknown(layer: nn.Module, named: str) -> None:
    with pytest.raises(ValueError, match=f"layer must be one whose bounds are known .* got {named}"):
        ball_bounds(layer, torch.zeros(1, 2), 0.1)


def test_bad_boxes_and_balls_are_refused() -> None:
    x = torch.zeros(2, 3)
    for low, high in ((x, x - 1), (x, x[:1]), (x, x + math.inf), (x, torch.full_like(x, math.nan))):
        with pytest.raises(ValueError, match="low and high must be finite"):
            interval_bounds(nn.ReLU(), low, high)
    for radius in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="radius must be >= 0 and finite"):
            ball_bounds(nn.ReLU(), x, radius)
    with pytest.raises(ValueError, match="norm must be one of 1, 2, inf, got 3"):
        ball_bounds(nn.ReLU(), x, 0.1, 3)
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        ball_bounds(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 1, 4, 4), 0.1)


def test_a_ball_is_in_its_box_where_its_centre_and_radius_cancel() -> None:
    """centre - radius * scale is about zero: its rounding is not relative to it."""
    radius, scale = torch.rand(1000) + 0.5, torch.rand(1, 5) + 0.5
    ball = Ball((radius[:, None] * scale).clone(), radius, math.inf, scale)
    ends = ball.centre.double() - radius.double()[:, None] * scale.double()
    assert (ball.box().low.double() <= ends).all()


def test_tanh_is_bounded_by_its_ends() -> None:
    x = torch.linspace(-4, 4, 2001)[:, None]
    low, high = ball_bounds(nn.Tanh(), x, 0.25)
    np.testing.assert_allclose(high[:, 0], np.tanh(x[:, 0].double().numpy() + 0.25), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(low[:, 0], np.tanh(x[:, 0].double().numpy() - 0.25), rtol=1e-5, atol=1e-5)
