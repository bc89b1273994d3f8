"""Skew orthogonal layers: exact constants, closed forms, and nothing stale."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from torch import Tensor, nn

from robustrl.networks import Householder, MaxMin, OrthogonalLinear, SkewOrthogonalConv2d
from robustrl.networks.skew_orthogonal import (
    LARGEST_NORM,
    norm_bound,
    reshaped_norm_bound,
    skew_exponential,
    skew_filter,
    symbol,
    taylor_singular_values,
)

PADDINGS = ("zeros", "circular")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def matrix(function: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """A linear (or affine) function of pictures as a dense matrix."""
    size = math.prod(shape)
    with torch.no_grad():
        images = function(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
        return (images - function(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T


def convolution(filters: Tensor, padding_mode: str, size: int = 8) -> Tensor:
    """The dense matrix A: two Taylor terms less the identity."""
    exact = matrix(lambda x: skew_exponential(x, filters, 1, padding_mode), len(filters), size, size)
    return exact - torch.eye(len(exact), dtype=torch.float64)


def random_filter(channels: int = 4, kernel_size: int = 3) -> Tensor:
    return skew_filter(torch.randn(channels, channels, kernel_size, kernel_size, dtype=torch.float64))


def layer_of(weight: Tensor, **settings: object) -> SkewOrthogonalConv2d:
    channels, _, kernel_size, _ = weight.shape
    layer = SkewOrthogonalConv2d(channels, channels, kernel_size, bias=False, **settings).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(weight / layer.scale)
    return layer


def norm(of: Tensor) -> float:
    return float(torch.linalg.matrix_norm(of, 2))


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_skew_part_of_a_filter_is_a_skew_symmetric_matrix(padding_mode: str, kernel_size: int) -> None:
    dense = convolution(random_filter(3, kernel_size), padding_mode, 6)
    assert norm(dense) > 1
    assert torch.equal(dense, -dense.T)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_with_many_terms_the_exponential_is_orthogonal(padding_mode: str) -> None:
    filters = random_filter()
    filters *= 2.1 / norm(convolution(filters, padding_mode))
    exponential = matrix(lambda x: skew_exponential(x, filters, 16, padding_mode), 4, 8, 8)
    torch.testing.assert_close(exponential.T @ exponential, torch.eye(256, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("terms", [4, 5, 8, 12])
def test_the_error_of_the_truncation_is_that_of_as_many_terms_and_no_other(terms: int, padding_mode: str) -> None:
    """||S_K - exp|| <= R^(K+1) / (K+1)!, and close to it: a truncation that is too good has other terms than it says."""
    filters = random_filter()
    dense = convolution(filters, padding_mode)
    filters, dense = filters * 2.1 / norm(dense), dense * 2.1 / norm(dense)
    truncated = matrix(lambda x: skew_exponential(x, filters, terms, padding_mode), 4, 8, 8)
    error, bound = norm(truncated - torch.linalg.matrix_exp(dense)), 2.1 ** (terms + 1) / math.factorial(terms + 1)
    assert 0.5 * bound <= error <= bound


@pytest.mark.parametrize("terms", [3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("radius", [0.5, 1.7, 2.1, 3.0, 3.6])
def test_singular_values_of_the_truncation_are_those_of_a_fine_grid(terms: int, radius: float) -> None:
    theta = np.linspace(0, radius, 20_001)
    curve = abs(sum((1j * theta) ** j / math.factorial(j) for j in range(terms + 1)))
    low, high = taylor_singular_values(terms, radius)
    assert low == pytest.approx(curve.min(), abs=1e-7)
    assert high == pytest.approx(curve.max(), abs=1e-7)
    assert low <= curve.min() + 1e-14
    assert high >= curve.max() - 1e-14


def test_singular_values_of_the_truncation_have_their_closed_forms() -> None:
    """|P_1|^2 = 1 + t^2 and |P_3|^2 = 1 - t^4/12 + t^6/36, smallest at t^2 = 2: 1 - 1/9."""
    assert taylor_singular_values(1, 2.0) == (1.0, pytest.approx(math.sqrt(5), rel=1e-15))
    assert taylor_singular_values(3, 1.7) == (pytest.approx(math.sqrt(8 / 9), rel=1e-14), 1.0)
    with pytest.raises(ValueError, match="norm must be"):
        taylor_singular_values(4, math.nan)


@pytest.mark.parametrize(("terms", "largest"), [(4, 2 * math.sqrt(2)), (8, 3.395140220574925), (12, 3.379377314157125)])
def test_the_layer_never_expands_up_to_the_largest_norm_and_beyond_it_would(terms: int, largest: float) -> None:
    assert 0 < largest - LARGEST_NORM[terms] < 1e-3
    assert taylor_singular_values(terms, LARGEST_NORM[terms])[1] == 1.0
    assert taylor_singular_values(terms, largest + 1e-3)[1] > 1.0
    with pytest.raises(ValueError, match="max_norm must be at most"):
        SkewOrthogonalConv2d(2, 2, terms=terms, max_norm=LARGEST_NORM[terms] + 1e-3)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize(
    ("terms", "low", "high"), [(4, 0.6822, 1.0), (5, 0.9798, 1.00474), (8, 0.99796, 1.0), (12, 0.9999977, 1.0)]
)
def test_singular_values_of_a_layer_reach_the_table_and_no_further(
    terms: int, low: float, high: float, padding_mode: str
) -> None:
    filters = random_filter()
    filters *= 2.1 / norm(convolution(filters, padding_mode))
    values = torch.linalg.svdvals(matrix(lambda x: skew_exponential(x, filters, terms, padding_mode), 4, 8, 8))
    assert float(values.min()) == pytest.approx(low, abs=6e-5)
    assert float(values.max()) == pytest.approx(high, abs=6e-6)
    assert (values.max() <= 1 + 1e-12) == (terms != 5)


WAVE = torch.tensor([[0.0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0]], dtype=torch.float64)[None, None]


def test_a_wrapped_difference_answers_an_impulse_with_bessel_functions() -> None:
    """The generating function exp(a (z - 1/z)) = sum J_m(2a) z^m, at 2a = 1."""
    layer, impulse = layer_of(WAVE, padding_mode="circular", terms=12), torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    impulse[0, 0, 5, 20] = 1
    with torch.no_grad():
        answer = layer(impulse)[0, 0]
    orders = np.arange(-8, 9)
    np.testing.assert_allclose(answer[5, 20 + orders].numpy(), scipy.special.jv(-orders, 1.0), atol=1e-9)
    assert float(answer.abs().sum(1).count_nonzero()) == 1


def test_a_padded_difference_answers_an_impulse_with_a_tridiagonal_exponential() -> None:
    layer, impulse = layer_of(WAVE, terms=12), torch.zeros(5, 1, 5, 5, dtype=torch.float64)
    impulse[range(5), 0, 2, range(5)] = 1
    with torch.no_grad():
        operator = layer(impulse)[:, 0, 2].T.numpy()
    exact = scipy.linalg.expm(np.diag([0.5] * 4, 1) - np.diag([0.5] * 4, -1))
    np.testing.assert_allclose(operator, exact, atol=1e-9)
    np.testing.assert_allclose(operator[0], [0.88010117, 0.45961393, 0.11738022, 0.0198116, 0.00251861], atol=1e-8)
    np.testing.assert_allclose(operator[:, 0], [0.88010117, -0.45961393, 0.11738022, -0.0198116, 0.00251861], atol=1e-8)


def test_two_channels_of_one_pixel_are_rotated_by_the_angle() -> None:
    angle = 1.3
    layer = layer_of(torch.tensor([[0.0, -angle], [angle, 0]], dtype=torch.float64)[:, :, None, None], terms=12)
    rotation = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    torch.testing.assert_close(
        matrix(layer, 2, 1, 1), torch.tensor(rotation, dtype=torch.float64), atol=angle**13 / math.factorial(13), rtol=0
    )


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_bound_of_the_norm_holds_for_every_picture_and_is_nearly_reached(kernel_size: int) -> None:
    axis = torch.arange(384, dtype=torch.float64) * (2 * math.pi / 384)
    between = 0
    for _ in range(20):
        filters = random_filter(2, kernel_size)
        bound = float(norm_bound(filters))
        norms = torch.linalg.eigvalsh(1j * symbol(filters, axis, axis[:193])).abs().amax(-1)
        on_grid = norms[::24, ::24] if kernel_size == 3 else norms[::12, ::12]
        between += float(norms.max()) > float(on_grid.max()) * (1 + 1e-6)
        assert norms.max() <= bound * (1 + 1e-12) <= 1.04 * norms.max() * (1 + 1e-12)
        for padding_mode in PADDINGS:
            assert norm(convolution(filters, padding_mode, 5)) <= bound * (1 + 1e-12)
    assert between >= 15 or kernel_size == 1


@pytest.mark.parametrize("reach", [1, 2])
def test_the_bound_of_the_norm_is_reached_by_waves_between_the_frequencies(reach: int) -> None:
    """cos(d (omega_1 - phi)) cos(d (omega_2 - phi)), off the diagonal and with i as a real rotation: its norm is 1 at phi, in the middle
    of four points of the grid, and cos^2(pi / 16) at those."""
    phi = math.pi / (16 * reach)
    weight = torch.zeros(4, 4, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    for a in (-reach, reach):
        for b in (-reach, reach):
            sine, cosine = math.sin((a + b) * phi), math.cos((a + b) * phi)
            weight[:2, 2:, a + reach, b + reach] = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64) / 2
    filters, middle = skew_filter(weight), torch.tensor([phi], dtype=torch.float64)
    assert norm(symbol(filters, middle, middle)[0, 0]) == pytest.approx(1, rel=1e-12)
    assert float(norm_bound(filters)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_bound_by_reshapes_is_the_least_of_four_and_above_the_norm_of_every_picture(kernel_size: int) -> None:
    orders = ((0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 2, 3), (2, 3, 0, 1))
    for channels in (2, 5, 16):
        filters = random_filter(channels, kernel_size)
        rows = (channels * kernel_size, channels * kernel_size, channels, channels * kernel_size**2)
        norms = [norm(filters.permute(order).reshape(size, -1)) for order, size in zip(orders, rows, strict=True)]
        bound = float(reshaped_norm_bound(filters))
        assert bound == pytest.approx(kernel_size * min(norms), rel=1e-12)
        assert float(norm_bound(filters)) <= 1.04 * bound
        for padding_mode in PADDINGS:
            assert norm(convolution(filters, padding_mode, 5)) <= bound * (1 + 1e-12)


def test_the_tight_bound_is_far_below_that_by_reshapes() -> None:
    filters = random_filter(16)
    assert float(norm_bound(filters)) < float(reshaped_norm_bound(filters)) / 1.3


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("terms", [4, 8, 12])
def test_with_the_cheap_bound_the_layer_turns_as_much_and_never_expands(terms: int, padding_mode: str) -> None:
    layer = SkewOrthogonalConv2d(4, 4, terms=terms, normalizer="reshapes", padding_mode=padding_mode).double()
    operator = layer.operator().detach()
    assert layer.max_norm == LARGEST_NORM[terms]
    assert float(reshaped_norm_bound(operator)) == pytest.approx(LARGEST_NORM[terms], rel=1e-12)
    assert norm(convolution(operator, padding_mode)) > 1.5
    assert layer.lipschitz() == 1.0
    assert torch.linalg.svdvals(matrix(layer, 4, 8, 8)).max() <= 1 + 1e-12


def test_a_filter_whose_cheap_bound_is_exact_still_has_the_constant_one() -> None:
    """The same skew matrix at all pixels, whose waves add up in the mean picture; the bound of the symbol is 4 % above that."""
    layer = SkewOrthogonalConv2d(2, 2, normalizer="reshapes").double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 9], [-9, 0]])[:, :, None, None])
    assert float(norm_bound(layer.operator().detach())) > 1.03 * LARGEST_NORM[8]
    assert norm(layer.operator().detach().sum((2, 3))) == pytest.approx(LARGEST_NORM[8], rel=1e-12)
    assert torch.linalg.svdvals(matrix(layer, 2, 6, 6)).max() <= layer.lipschitz() + 1e-12 <= 1 + 1e-11


def test_a_filter_within_the_norm_is_left_alone_and_a_larger_one_scaled_to_it() -> None:
    filters = random_filter()
    bound = float(norm_bound(filters))
    for factor, expected in ((1.9 / bound, 1.9), (7.0 / bound, 2.1)):
        layer = layer_of(filters * factor)
        assert float(norm_bound(layer.operator().detach())) == pytest.approx(expected, rel=1e-12)
    zero = layer_of(torch.zeros(2, 2, 3, 3, dtype=torch.float64))
    picture = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(zero(picture), picture)
    assert zero.lipschitz() == 1.0


@pytest.mark.parametrize("normalizer", ["symbol", "reshapes"])
def test_gradients_of_the_scale_are_those_of_finite_differences(normalizer: str) -> None:
    layer = SkewOrthogonalConv2d(2, 2, normalizer=normalizer, bias=False).double()
    assert torch.autograd.gradcheck(layer._operator_of, (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "size"),
    [(4, 4, 1, 6), (3, 16, 2, 8), (4, 8, 2, 8), (2, 6, 1, 5), (6, 2, 1, 5), (1, 4, 3, 7)],
)
def test_strides_and_channels_keep_norms_one_way_and_never_expand(
    inputs: int, outputs: int, stride: int, size: int, padding_mode: str
) -> None:
    layer = SkewOrthogonalConv2d(inputs, outputs, stride=stride, padding_mode=padding_mode, terms=12).double()
    small = -(-size // stride)
    jacobian = matrix(layer, inputs, size, size)
    assert jacobian.shape == (outputs * small**2, inputs * size**2)
    values = torch.linalg.svdvals(jacobian)
    assert values.max() <= layer.lipschitz() + 1e-12
    assert layer.lipschitz() == 1.0
    if size % stride == 0:  # rows that were filled up are only an orthogonal projection of such a layer
        assert values.min() >= taylor_singular_values(12, 2.1)[0] - 1e-12  # of the fewer of rows and columns: all are kept


def test_a_stride_reads_the_blocks_that_pixel_unshuffle_does() -> None:
    layer = SkewOrthogonalConv2d(1, 4, stride=2, bias=False)
    nn.init.zeros_(layer.weight)
    picture = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(layer(picture)[0, :, 0, 0], torch.tensor([0.0, 1, 4, 5]))


def test_the_lipschitz_constant_is_that_of_the_filter_in_use_and_not_of_the_argument() -> None:
    class Wrong(SkewOrthogonalConv2d):
        def _operator_of(self, weight: Tensor) -> Tensor:
            return 1.9 * super()._operator_of(weight)

    layer = Wrong(4, 4).double()
    values = torch.linalg.svdvals(matrix(layer, 4, 12, 12))
    assert values.max() > 1.01
    assert values.max() <= layer.lipschitz() <= taylor_singular_values(8, 1.9 * 2.1)[1] * (1 + 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (5, 5), (8, 6)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_frozen_circular_layer_computes_the_same_by_fourier(size: tuple[int, int], kernel_size: int) -> None:
    layer = SkewOrthogonalConv2d(3, 4, kernel_size, padding_mode="circular", terms=4).double()
    pictures = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    iterated = layer(pictures)
    (slope,) = torch.autograd.grad(iterated.square().sum(), pictures)
    layer.requires_grad_(False)
    assert layer._by_spectrum(torch.zeros(1, 4, *size))
    frozen = layer(pictures)
    torch.testing.assert_close(frozen, iterated, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(frozen.square().sum(), pictures)[0], slope, atol=1e-12, rtol=0)
    with torch.no_grad():
        layer.weight.add_(0.1)
        other = layer_of(layer.weight * layer.scale, padding_mode="circular", terms=4)
        other.bias = layer.bias
        folded = nn.functional.pad(pictures, (0, 0, 0, 0, 0, 1))
        torch.testing.assert_close(layer(pictures), other(folded), atol=1e-12, rtol=0)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: SkewOrthogonalConv2d(3, 4),
    "circular": lambda: SkewOrthogonalConv2d(3, 4, padding_mode="circular"),
    "linear": lambda: OrthogonalLinear(3, 4),
}


def inputs_for(name: str) -> Tensor:
    return torch.randn(5, 3) if name == "linear" else torch.randn(5, 3, 6, 6)


def _optimise(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(layer.parameters(), 0.1).step()


def _rewrite(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)  # as polyak averaging does, past the version counter


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({name: value * 0.5 for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("change", [_optimise, _rewrite, _load])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_changed_in_any_way_are_seen(name: str, frozen: bool, change: Callable[[nn.Module], None]) -> None:
    layer, inputs = LAYERS[name]().eval().requires_grad_(not frozen), inputs_for(name)
    with torch.no_grad():
        before = layer(inputs)
        assert torch.equal(layer(inputs), before)
        change(layer)
        fresh = LAYERS[name]().requires_grad_(not frozen)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(inputs), fresh(inputs))
        assert not torch.allclose(layer(inputs), before)


@pytest.mark.parametrize(("name", "value"), [("scale", 0.1), ("max_norm", 0.3), ("normalizer", "reshapes"), ("terms", 12)])
def test_settings_that_changed_are_seen(name: str, value: object) -> None:
    layer = SkewOrthogonalConv2d(2, 2, padding_mode="circular").requires_grad_(False)
    layer.weight.mul_(3)
    layer(torch.randn(1, 2, 5, 5))
    setattr(layer, name, value)
    x = torch.randn(1, 2, 5, 5)
    found = layer(x)
    layer._kept = None
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_training_and_evaluation_compute_the_same(name: str) -> None:
    layer, inputs = LAYERS[name](), inputs_for(name)
    trained = layer.train()(inputs)
    with torch.no_grad():
        assert torch.equal(layer.eval()(inputs), trained)
    assert not list(layer.buffers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_have_gradients_in_either_mode_unless_they_are_frozen(name: str, training: bool) -> None:
    layer, inputs = LAYERS[name]().train(training), inputs_for(name).requires_grad_()
    with torch.no_grad():
        layer(inputs)
    layer(inputs).square().sum().backward()
    gradient = next(layer.parameters()).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    layer.zero_grad()
    layer.requires_grad_(False)(inputs).square().sum().backward()
    assert next(layer.parameters()).grad is None
    assert inputs.grad is not None


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles_answer_bit_for_bit_the_same_and_carry_weights_alone(name: str) -> None:
    layer, inputs = LAYERS[name]().requires_grad_(False), inputs_for(name)
    answer = layer(inputs)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert other._kept is None
        assert torch.equal(other(inputs), answer)
        assert other.lipschitz() == layer.lipschitz()  # type: ignore[operator]


@pytest.mark.parametrize("name", LAYERS)
def test_what_inference_mode_kept_serves_gradients_of_the_input(name: str) -> None:
    layer, inputs = LAYERS[name]().requires_grad_(False), inputs_for(name).requires_grad_()
    with torch.inference_mode():
        layer(inputs)
    layer(inputs).square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_does_not_reach_inside(name: str) -> None:
    layer, inputs = LAYERS[name](), inputs_for(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(inputs)
    assert torch.equal(inside, layer(inputs))
    torch.testing.assert_close(inside.double(), layer.double()(inputs.double()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["within the norm", "scaled to it"])
def test_gradients_are_those_of_the_whole_operator(padding_mode: str, scale: float) -> None:
    layer = SkewOrthogonalConv2d(1, 2, stride=2, padding_mode=padding_mode, terms=4).double()

    def forward(pictures: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, pictures)

    pictures = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = (2 * scale * torch.randn(4, 4, 3, 3, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (pictures, weight, bias))


def test_checkpointing_stores_fewer_pictures_and_changes_no_gradient() -> None:
    layer, pictures = SkewOrthogonalConv2d(3, 4), torch.randn(2, 3, 6, 6)
    kept: list[list[int]] = []
    gradients = []
    for layer.checkpoint in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = layer(pictures).square().sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        gradients.append(gradient)
        kept.append([size for size in sizes if size == 2 * 4 * 6 * 6])
    assert torch.equal(*gradients)
    assert len(kept[0]) >= layer.terms
    assert len(kept[1]) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"padding_mode": "reflect"}, "padding_mode must be one of 'zeros', 'circular'"),
        ({"padding_mode": "replicate"}, "padding_mode must be one of"),
        ({"terms": 5}, "terms must be one of 4, 8, 12"),
        ({"max_norm": math.nan}, "max_norm must be"),
        ({"stride": 0}, "stride must be"),
    ],
)
def test_what_is_not_orthogonal_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkewOrthogonalConv2d(2, 2, **arguments)  # type: ignore[arg-type]


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must be of shape \(n, 3, height, width\), got \(1, 2, 4, 4\)"):
        SkewOrthogonalConv2d(3, 4)(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="at least 2 pixels"):
        SkewOrthogonalConv2d(1, 1, 5, padding_mode="circular")(torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_not_finite_have_no_constant(name: str) -> None:
    layer = LAYERS[name]()
    with torch.no_grad():
        next(layer.parameters()).view(-1)[1] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        layer.lipschitz()  # type: ignore[operator]


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (4, 64), (7, 7)])
def test_a_linear_layer_is_a_block_of_the_exponential_of_a_skew_matrix(inputs: int, outputs: int) -> None:
    layer = OrthogonalLinear(inputs, outputs).double()
    weight = layer.weight.detach().numpy() / math.sqrt(max(inputs, outputs))
    dense = matrix(layer, inputs)
    np.testing.assert_allclose(dense, scipy.linalg.expm(weight - weight.T)[:outputs, :inputs], atol=1e-12)
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-12, rtol=0)
    assert values.max() <= layer.lipschitz() <= 1 + 1e-11
    assert layer.float().lipschitz() == pytest.approx(1.0, abs=1e-5)


def test_the_constant_of_a_linear_layer_counts_the_rounding_of_its_exponential() -> None:
    layer = OrthogonalLinear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1e5)
        exact = float(torch.linalg.matrix_norm(layer(torch.eye(16)).double(), 2))
    assert abs(exact - 1) > 1e-4
    assert layer.lipschitz() == pytest.approx(exact, rel=1e-9)


def test_gradients_of_a_linear_layer_are_those_of_the_exponential() -> None:
    layer = OrthogonalLinear(3, 2).double()

    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, inputs)

    inputs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (inputs, torch.randn(3, 3, dtype=torch.float64, requires_grad=True)))


def householder(angle: float, channels: int = 2) -> Householder:
    layer = Householder(channels).double()
    nn.init.constant_(layer.angle, angle)
    return layer


def test_maxmin_sorts_pairs_of_the_two_halves() -> None:
    assert torch.equal(MaxMin()(torch.tensor([[1.0, -2, 3, -5]])), torch.tensor([[3.0, -2, 1, -5]]))


def test_householder_starts_as_maxmin_with_the_halves_swapped() -> None:
    inputs = torch.randn(100, 6, 2, 2)
    swapped = torch.cat(MaxMin()(inputs).chunk(2, 1)[::-1], 1)
    torch.testing.assert_close(Householder(6)(inputs), swapped, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [0.3, 1.2, math.pi / 2, 2.8])
def test_householder_reflects_one_side_of_the_line_onto_the_other(angle: float) -> None:
    layer, inputs = householder(angle), torch.randn(2000, 2, dtype=torch.float64)
    normal = torch.tensor([math.sin(angle / 2), -math.cos(angle / 2)], dtype=torch.float64)
    above = (inputs @ normal).clamp_min(0)
    expected = inputs - 2 * above[:, None] * normal
    with torch.no_grad():
        outputs = layer(inputs)
    torch.testing.assert_close(outputs, expected, atol=1e-12, rtol=0)
    assert 0.3 < (above > 0).double().mean() < 0.7


@pytest.mark.parametrize("layer", [MaxMin(), householder(0.3, 4), householder(2.8, 4)])
def test_activations_have_orthogonal_jacobians_and_no_jumps(layer: nn.Module) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None])[0]))(x)
    torch.testing.assert_close(jacobian.mT @ jacobian, torch.eye(4, dtype=torch.float64).expand(50, 4, 4), atol=1e-12, rtol=0)
    a = torch.randn(100_000, 4, dtype=torch.float64)
    b = a + torch.randn_like(a) * 10.0 ** torch.empty(len(a), 1, dtype=torch.float64).uniform_(-8, 1)
    with torch.no_grad():
        ratio = (layer(a) - layer(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert ratio.max() <= 1 + 1e-6
    assert layer.lipschitz() == 1.0  # type: ignore[operator]


def test_odd_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="even number of channels"):
        MaxMin()(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="channels must be even"):
        Householder(3)
