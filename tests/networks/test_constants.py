"""Constants of layers: no Jacobian is larger, and what is not known is refused."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustrl.networks import (
    Householder,
    LipschitzCNN,
    LipschitzMLP,
    MaxMin,
    OrthogonalLinear,
    SkewOrthogonalConv2d,
    activation,
)
from robustrl.networks.activations import FAMILIES, LeakyReLU
from robustrl.networks.constants import Link, chain, claims, constant
from robustrl.networks.extractors import Contraction

PICTURES = gym.spaces.Box(0, 1, (2, 6, 6), np.float32)


def louder(layer: nn.Conv2d) -> nn.Conv2d:
    """Its first outputs are ten times as large."""
    layer.weight.data[:3] *= 10
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "rows of a picture": (lambda: nn.Linear(5, 3), (4, 5)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    "stride": (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 6, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=2, padding="same"), (2, 6, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2), (4, 5, 5)),
    "groups of different sizes": (lambda: louder(nn.Conv2d(4, 6, 3, groups=2)), (4, 5, 5)),
    "in time": (lambda: nn.Conv1d(4, 2, 4, groups=2, stride=2), (4, 9)),
    "max pooling": (lambda: nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True), (2, 6, 5)),
    "average pooling": (lambda: nn.AvgPool2d(2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6, 5)),
    "maxmin": (MaxMin, (6,)),
    "householder": (lambda: Householder(6), (6,)),
    "orthogonal": (lambda: OrthogonalLinear(4, 6), (4,)),
    "skew orthogonal": (lambda: SkewOrthogonalConv2d(2, 4, stride=2), (2, 5, 5)),
    "mlp": (lambda: LipschitzMLP(PICTURES, (6, 4), activation="swish:4"), (2, 6, 6)),
    "cnn": (lambda: LipschitzCNN(PICTURES, (4,), (2,), activation="gelu"), (2, 6, 6)),
    "flatten": (lambda: FlattenExtractor(PICTURES), (2, 6, 6)),
    "identity": (nn.Identity, (3,)),
    "leaky": (lambda: nn.LeakyReLU(-3.0), (5,)),
    "elu": (lambda: nn.ELU(2.5), (5,)),
    **{
        kind.__name__: (kind, (5,))
        for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.Sigmoid, nn.SiLU, nn.Mish)
    },
    "gelu": (nn.GELU, (5,)),
    **{f"our {name}": (activation(name, beta=3.0), (5,)) for name in FAMILIES},
    "our leaky": (activation("leaky_relu"), (5,)),
    "all of them": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.SiLU()), (2, 6, 6)),
}


def norm_of_jacobian(module: nn.Module, at: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x[None]).flatten(), at)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, at.numel()), 2))


@pytest.mark.parametrize("name", LAYERS)
def test_no_jacobian_is_larger_than_the_constant(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make().double()
    upper = constant(chain(module))
    found = [norm_of_jacobian(module, 2 * torch.randn(shape, dtype=torch.float64)) for _ in range(8)]
    assert max(found) <= upper * (1 + 1e-12)
    assert max(found) > 0.05 * upper


@pytest.mark.parametrize("name", LAYERS)
def test_no_two_outputs_are_further_apart_than_the_constant_says(name: str) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    module = make().double()
    first, second = 3 * torch.randn(2, 500, *shape, dtype=torch.float64)
    second[:250] = first[:250] + 1e-3 * second[:250]
    with torch.no_grad():
        moved = (module(first) - module(second)).flatten(1).norm(dim=1)
    assert bool((moved <= constant(chain(module)) * (first - second).flatten(1).norm(dim=1) * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", LAYERS)
def test_a_chain_computes_what_the_network_does(name: str) -> None:
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    module, x = make(), torch.randn(3, *shape)
    found = x
    with torch.no_grad():
        for link in chain(module):
            found = link.function(found)
        torch.testing.assert_close(found, module(x), rtol=0, atol=0)


def test_slopes_are_those_of_the_functions() -> None:
    """Largest differences over a grid: no constant is given away either."""
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)[:, None]
    for kind in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.Softsign):
        y = kind()(x)
        steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
        assert steepest == pytest.approx(constant(chain(kind())), rel=1e-3)


def test_atari_networks_of_stable_baselines3_are_known() -> None:
    network = NatureCNN(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    assert len(chain(network)) == 9
    assert 1 < constant(chain(network)) < 1e4


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Claims(nn.Module):
    def __init__(self, claim: float) -> None:
        super().__init__()
        self.claim = claim

    def lipschitz(self) -> float:
        return self.claim

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def hooked() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def hooked_before() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    return layer


def with_method(layer: nn.Module, name: str) -> nn.Module:
    setattr(layer, name, lambda *inputs: 1e-6)
    return layer


def contraction(curve: nn.Module) -> Contraction:
    layer = Contraction(LeakyReLU(0.5))
    layer.curve = curve  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LayerNorm(3), "no Lipschitz constant is known of layer LayerNorm"),
        (lambda: nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.Dropout, "Dropout"),
        (lambda: nn.LSTM(3, 3), "LSTM"),
        (lambda: nn.Softmax(-1), "Softmax"),
        (lambda: Twice(3, 3), "Twice"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "ParametrizedLinear"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2))), "BatchNorm2d"),
        (hooked, "Linear has hooks"),
        (hooked_before, "Linear has hooks"),
        (patched, "Linear has forward of its own"),
        (lambda: with_method(nn.Conv2d(1, 1, 1), "_conv_forward"), "Conv2d has _conv_forward of its own"),
        (lambda: with_method(MaxMin(), "lipschitz"), "MaxMin has lipschitz of its own"),
        (lambda: with_method(nn.LayerNorm(3), "lipschitz"), "no Lipschitz constant is known of layer LayerNorm"),
        (lambda: contraction(hooked()), "Linear has hooks"),
        (lambda: contraction(nn.Softplus()), "no Lipschitz constant is known of layer Softplus"),
        (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), "Linear has hooks"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), "RecursiveScriptModule"),
        (lambda: nn.Flatten(0), "start_dim must be >= 1"),
        (lambda: nn.GELU(approximate="tanh"), "approximate must be 'none'"),
        (lambda: nn.MaxPool2d(3, stride=2), "windows must not overlap"),
        (lambda: nn.MaxPool2d((2, 3), stride=(2, 2)), "windows must not overlap"),
        (lambda: nn.MaxPool2d([1, 9], stride=[2, 1]), "windows must not overlap"),
        (lambda: nn.AvgPool2d([1, 3], stride=[2, 1], padding=[0, 1]), "windows must not overlap"),
        (lambda: nn.MaxPool2d(2, dilation=2), "windows must not overlap"),
        (lambda: nn.AvgPool2d(3, stride=2), "windows must not overlap"),
        (lambda: nn.AvgPool2d(2, divisor_override=1), "divisor_override"),
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode must be 'zeros'"),
    ],
)
def test_layers_without_a_known_constant_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        chain(make().eval())


def test_a_claim_is_taken_and_marked() -> None:
    layer = Claims(3.0)
    assert chain(nn.Sequential(nn.ReLU(), layer))[1] == Link(layer, 3.0, trusted=("Claims",))


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), -1.0])
def test_a_claim_must_be_a_constant(claim: float) -> None:
    with pytest.raises(ValueError, match="Lipschitz constant of Claims"):
        chain(Claims(claim))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: nn.Conv2d(1, 1, 3), lambda: OrthogonalLinear(3, 3)])
def test_broken_weights_have_no_constant(make: Callable[[], nn.Module], value: float) -> None:
    layer = make()
    with torch.no_grad():
        layer.weight.view(-1)[1] = value  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="must be finite"):
        chain(layer)


def test_a_claim_inside_a_contraction_is_marked() -> None:
    assert claims(chain(contraction(Claims(3.0)))) == ("Claims",)


def test_hooks_on_every_module_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        with pytest.raises(TypeError, match="ReLU has hooks"):
            chain(nn.ReLU())
    finally:
        handle.remove()


def test_settings_in_lists_are_those_in_tuples() -> None:
    assert constant(chain(nn.MaxPool2d([3, 3], stride=[4, 3]))) == 1  # type: ignore[arg-type]


def test_products_of_constants_do_not_underflow() -> None:
    """(1e-170)^2 1e300 is 1e-40, though the first product alone is below all floats."""
    links = [Link(nn.Identity(), factor) for factor in (1e-170, 1e-170, 1e300)]
    assert 1e-40 <= constant(links) < 1
    assert constant([*links, Link(nn.Identity(), 0.0)]) == 0
    tiny = nn.Linear(2, 2).double()
    tiny.weight.data.fill_(5e-324)
    assert constant(chain(tiny)) > 0


def test_rows_are_never_taken_for_channels() -> None:
    """torch's convolutions take an input without a batch for one picture."""
    for layer, x in ((nn.Conv2d(3, 3, 1), torch.ones(3, 2, 2)), (nn.Conv1d(3, 3, 1), torch.ones(3, 2))):
        with pytest.raises(ValueError, match="must have . axes"):
            chain(layer)[0].function(x)


@pytest.mark.parametrize("name", ["softplus", "squareplus", "logcosh", "bent_identity", "swish", "sigmoid"])
@pytest.mark.parametrize("beta", [1e-12, 1e-4, 1.0])
def test_rounding_in_float64_is_within_what_is_said(name: str, beta: float) -> None:
    """Against forms of f(beta x) / beta in which nothing cancels: the numbers that cancel in ours are about 1 / beta."""
    layer = activation(name, beta=beta)().double()
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    z = beta * x
    exact = {
        "softplus": z / 2 + (z / 4).sinh().square().mul(2).log1p(),
        "squareplus": z / 2 + z.square() / 4 / (1 + (z.square() / 4 + 1).sqrt()),
        "logcosh": (z / 2).sinh().square().mul(2).log1p(),
        "bent_identity": z + z.square() / 2 / (1 + (z.square() + 1).sqrt()),
        "swish": z / (1 + (-z).exp()),
        "sigmoid": 1 / (1 + (-z).exp()),
    }[name] / beta
    (link,) = chain(layer)
    found, error = link.through(x, torch.zeros(len(x), dtype=torch.float64))
    assert bool(((found - exact).abs()[:, 0] <= error).all())
    assert float(error.max()) <= 1e-11 / min(beta, 1)
