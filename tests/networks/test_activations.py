"""Activations: what they say of their curvature and slopes is what they have."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath
import pytest
import torch
from torch import Tensor, nn

from robustrl.networks import Activation, LeakyReLU, SmoothActivation, activation, from_curvature
from robustrl.networks.activations import FAMILIES

KINKED_SECOND = {"celu", "smooth_relu", "softsign"}
"""Their second derivative jumps at 0."""
BETAS = (0.25, 1.0, 4.0)


def derivatives(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return first.detach(), second


def fine(beta: float) -> Tensor:
    """Points next to 0 and far out, on both sides, never 0 itself."""
    return (torch.arange(-400_000, 400_000, dtype=torch.float64) + 0.5) * (5e-5 / beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", FAMILIES)
def test_curvature_and_slopes_are_those_of_the_derivatives(name: str, beta: float) -> None:
    layer = SmoothActivation(name, beta)
    first, second = derivatives(layer, fine(beta))
    assert float(second.abs().max()) == pytest.approx(layer.curvature(), rel=1e-4 if name in KINKED_SECOND else 1e-6)
    low, high = layer.slopes()
    # Some slopes are limits at infinity: reached to 1 / 20 by the slowest.
    slow = 0.05 if name in {"softsign", "smooth_relu", "squareplus", "bent_identity"} else 1e-7
    assert float(first.min()) == pytest.approx(low, abs=slow)
    assert float(first.max()) == pytest.approx(high, abs=slow)
    assert low - 1e-15 <= first.min()
    assert first.max() <= high + 1e-15
    assert layer.lipschitz() == max(-low, high)


def test_figures_are_those_of_forty_digits() -> None:
    with mpmath.workdps(40):
        functions = {
            "swish": (lambda x: x / (1 + mpmath.exp(-x)), 2.4, 0),
            "gelu": (lambda x: x * mpmath.ncdf(x), 1.4, 0),
            "mish": (lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))), 1.5, -0.09),
            "lisht": (lambda x: x * mpmath.tanh(x), 1.2, 0),
            "tanh": (mpmath.tanh, None, 0.66),
            "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), None, 1.3),
        }
        for name, (function, steepest, bent) in functions.items():
            if steepest is not None:
                turn = mpmath.findroot(lambda x, f=function: mpmath.diff(f, x, 2), steepest)
                slope = mpmath.diff(function, turn)
                assert slope <= FAMILIES[name].slopes[1] <= slope + 1e-13, name
            if bent:
                bent = mpmath.findroot(lambda x, f=function: mpmath.diff(f, x, 3), bent)
            assert float(abs(mpmath.diff(function, bent, 2))) == pytest.approx(FAMILIES[name].curvature, rel=1e-13), name
        turn = mpmath.findroot(lambda x: mpmath.diff(functions["mish"][0], x, 2), -2.3)
        least = mpmath.diff(functions["mish"][0], turn)
        assert least - 1e-13 <= FAMILIES["mish"].slopes[0] <= least
    for name in ("swish", "gelu"):  # f'(x) + f'(-x) = 1
        assert sum(FAMILIES[name].slopes) == pytest.approx(1, abs=1e-15)


def test_the_published_curvatures_of_softplus_and_swish() -> None:
    betas = (0.25, 0.5, 1, 2, 4, 8, 10, 16, 20)
    assert [SmoothActivation("softplus", b).curvature() for b in betas] == [0.0625, 0.125, 0.25, 0.5, 1, 2, 2.5, 4, 5]
    assert [SmoothActivation("swish", b).curvature() for b in betas] == [0.125, 0.25, 0.5, 1, 2, 4, 5, 8, 10]


@pytest.mark.parametrize("h", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("beta", [0.5, 1.0, 8.0])
def test_secant_curvatures_have_their_closed_forms(beta: float, h: float) -> None:
    """Of softplus the slopes are logistic, of tanh 1 - tanh^2 (largest rise between two points found by calculus)."""
    softplus = math.tanh(beta * h / 2) / (2 * h)
    assert SmoothActivation("softplus", beta).secant_curvature(h) == pytest.approx(softplus, rel=1e-7)
    x = torch.linspace(0, 6, 600_001, dtype=torch.float64) + max(0.0, beta * h - 3)
    tanh = float((torch.tanh(x - beta * h) ** 2 - torch.tanh(x + beta * h) ** 2).abs().max()) / (2 * h)
    assert SmoothActivation("tanh", beta).secant_curvature(h) == pytest.approx(tanh, rel=1e-7)
    for slope in (0.0, 0.2, 0.75):
        assert LeakyReLU(slope).secant_curvature(h) == (1 - slope) / (2 * h)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_secant_curvature_becomes_the_curvature_from_below(name: str) -> None:
    layer = SmoothActivation(name, 2.0)
    wide, narrow = layer.secant_curvature(0.5), layer.secant_curvature(1e-5)
    assert wide < narrow <= layer.curvature() * (1 + 1e-6)
    # Second derivatives that change sign at 0 in a jump are averaged there; beside it they are not.
    assert narrow == pytest.approx(layer.curvature(), rel=1e-3)


def test_relu_has_a_kink_whatever_beta_would_be() -> None:
    relu, leaky = activation("relu")(), activation("leaky_relu", slope=0.1)()
    assert relu.curvature() == leaky.curvature() == math.inf
    assert (relu.slopes(), leaky.slopes(), relu.lipschitz()) == ((0.0, 1.0), (0.1, 1.0), 1.0)
    assert relu.secant_curvature() == 5.0
    assert torch.equal(leaky(torch.tensor([-2.0, 3.0])), torch.tensor([-0.2, 3.0]))
    assert LeakyReLU(1.0).curvature() == 0.0


@pytest.mark.parametrize("beta", [0.25, 1.0, 20.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_jumps_and_all_but_the_sigmoid_pass_through_zero(name: str, beta: float) -> None:
    layer = SmoothActivation(name, beta)
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    steps = layer(x).diff().abs()
    assert steps.max() <= layer.lipschitz() * 1e-4 * (1 + 1e-4)
    assert float(layer(torch.zeros(1, dtype=torch.float64))) == pytest.approx(
        0.5 / beta if name == "sigmoid" else 0.0, abs=1e-15
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_can_be_differentiated_again(name: str) -> None:
    x = torch.tensor([-3.0, -1.1, -0.2, 0.3, 1.4, 2.5], dtype=torch.float64, requires_grad=True)
    layer = SmoothActivation(name, 1.7, learnable=True).double()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_swish_is_the_formula() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(SmoothActivation("swish", 3.0)(x), x * torch.sigmoid(3 * x))
    torch.testing.assert_close(SmoothActivation("celu", 2.0)(x), nn.CELU(0.5)(x))
    torch.testing.assert_close(SmoothActivation("softplus", 3.0)(x), nn.Softplus(3)(x) - math.log(2) / 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("curvature", [0.3, 2.0])
def test_from_curvature_makes_that_curvature(name: str, curvature: float) -> None:
    assert from_curvature(curvature, name)().curvature() == pytest.approx(curvature, rel=1e-14)
    assert from_curvature(curvature, "leaky_relu")().secant_curvature() == pytest.approx(curvature, rel=1e-14)


def test_from_curvature_is_swish_unless_told_otherwise() -> None:
    layer = from_curvature(0.5)()
    assert isinstance(layer, SmoothActivation)
    assert (layer.name, layer.beta) == ("swish", 1.0)


def test_a_recipe_makes_new_modules_and_travels() -> None:
    recipe = activation("swish", beta=4.0, learnable=True)
    first, second = recipe(), pickle.loads(pickle.dumps(recipe))()
    x = torch.randn(8)
    assert first is not second
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    for name in FAMILIES:
        layer = pickle.loads(pickle.dumps(activation(name)()))
        assert isinstance(layer, Activation)
        assert layer.curvature() == FAMILIES[name].curvature


def test_a_learned_beta_starts_where_told_follows_the_loss_and_stays_in_range() -> None:
    layer = SmoothActivation("swish", 4.0, learnable=True, beta_range=(0.5, 8.0))
    assert layer.beta == pytest.approx(4.0, rel=1e-6)
    assert layer.curvature() == pytest.approx(2.0, rel=1e-6)
    x = torch.linspace(-3, 3, 50)
    for sign, end in ((1.0, 8.0), (-1.0, 0.5)):
        optimiser = torch.optim.Adam(layer.parameters(), 0.5)
        for _ in range(60):
            optimiser.zero_grad()
            (sign * (layer(x) - x.relu()).square().mean()).backward()
            optimiser.step()
        assert 0.5 <= layer.beta <= 8.0
        assert layer.beta == pytest.approx(end, rel=0.1)
    other = SmoothActivation("swish", 4.0, learnable=True, beta_range=(0.5, 8.0))
    other.load_state_dict(layer.state_dict())
    assert other.beta == layer.beta
    assert not list(SmoothActivation("swish", 4.0).parameters())


def test_sb3_trains_saves_and_loads_them(tmp_path: object) -> None:
    from stable_baselines3 import PPO

    recipe = activation("swish", beta=4.0, learnable=True)
    kwargs = {"activation_fn": recipe, "net_arch": [8, 8]}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, policy_kwargs=kwargs, seed=0, device="cpu")
    betas = [m.beta for m in model.policy.modules() if isinstance(m, SmoothActivation)]
    assert betas == pytest.approx([4.0] * 4, rel=1e-6)
    model.learn(128)
    learned = [m.beta for m in model.policy.modules() if isinstance(m, SmoothActivation)]
    assert all(a != b for a, b in zip(betas, learned, strict=True))
    model.save(f"{tmp_path}/model")
    loaded = PPO.load(f"{tmp_path}/model", device="cpu")
    assert [m.beta for m in loaded.policy.modules() if isinstance(m, SmoothActivation)] == learned
    states = torch.randn(16, 4)
    assert torch.equal(loaded.policy(states, deterministic=True)[2], model.policy(states, deterministic=True)[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activation("sine"), "name must be one of 'swish'"),
        (lambda: activation("swish", beta=0.0), "beta must be a finite number > 0, got 0.0"),
        (lambda: activation("swish", beta=math.nan), "beta must be"),
        (lambda: activation("swish", slope=0.1), "slope is a setting of 'leaky_relu'"),
        (lambda: activation("relu", beta=2.0), "beta and learnable must be left out for 'relu'"),
        (lambda: activation("leaky_relu", learnable=True), "beta and learnable must be left out"),
        (lambda: activation("leaky_relu", slope=1.5), r"slope must be a number in \[0, 1\]"),
        (lambda: activation("swish", beta=99.0, learnable=True), "beta must lie inside beta_range"),
        (lambda: from_curvature(-1.0), "curvature must be"),
        (lambda: from_curvature(5.1, "leaky_relu"), "curvature of 'leaky_relu' must be at most 5"),
        (lambda: from_curvature(5.0, "relu"), "name must be one of"),
        (lambda: SmoothActivation("swish").secant_curvature(0.0), "h must be"),
        (lambda: LeakyReLU().secant_curvature(math.nan), "h must be"),
    ],
)
def test_bad_settings_are_refused_at_once(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["softplus", "logcosh"])
def test_no_threshold_makes_a_jump_that_double_precision_sees(name: str) -> None:
    """torch's own softplus becomes the identity at 20, where it is 2e-9 above it."""
    module = activation(name)()
    for threshold in (10.0, 20.0, 40.0):
        below = torch.tensor([threshold, math.nextafter(threshold, math.inf)], dtype=torch.float64)
        assert abs(float(module(below).diff())) <= 1e-14
