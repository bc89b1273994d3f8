"""Layers with Lipschitz constant 1 in l2 that keep the norm of what passes them: skew orthogonal convolutions and what goes between.

A convolution by a filter W with W[o, i, d] = -W[i, o, -d] is a skew-symmetric matrix A, with zeros or wrapped around at the border
alike; exp(A) is orthogonal. The layer computes the Taylor polynomial S_K(A) of degree K, whose singular values are the sizes of
P_K(i theta) at the eigenvalues i theta of A, P_K the polynomial in one variable. For K divisible by four none of them is above 1 while
the norm of A is at most R_K: no error term is needed.

Every operator is a function of the layer's parameters alone. There are no buffers and no power iterations that go stale, training and
evaluation compute the same, and what is kept between calls without gradients is made anew when a weight has changed in any way.

Statements are about real arithmetic on the layer's weights; float32 adds its rounding (not TF32 or bfloat16, where the constant can
exceed 1 by a percent; autocast is off inside).

Sources: Singla, Feizi, "Skew Orthogonal Convolutions" (ICML 2021), arXiv:2105.11417; Anil, Lucas, Grosse (ICML 2019), arXiv:1811.05381
(MaxMin); Singla, Singla, Feizi (ICLR 2022), arXiv:2108.04062 (Householder activations). The constants of the truncation and the bound
of the norm are ours; `docs/methods/lipschitz_networks.md` has the proofs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from robustrl.errors import check_choice, check_count, check_positive

LARGEST_NORM = {4: 2.828, 8: 3.395, 12: 3.379}
"""R_K by number of Taylor terms: up to this norm no singular value of the layer is above 1; rounded down."""
GRID = 16
"""Frequencies per axis and pixel that a filter reaches; the norm between them is at most 1.04 times as large."""
SPECTRAL_ENTRIES = 2**23
"""Complex numbers in a kept spectrum, at most: 64 MiB."""
_ROUNDING = 1 + 1e-12


def taylor_singular_values(terms: int, norm: float) -> tuple[float, float]:
    """Smallest and largest singular value of S_K(A) over all skew-symmetric A with ||A||_2 <= norm; both are attained.

    Args:
        terms: K >= 1, the degree of the Taylor polynomial.
        norm: R > 0.
    Returns:
        min and max of the size of P_K(i theta) over 0 <= theta <= R.
    Raises:
        ValueError: if either is out of range.
    """
    terms, norm = check_count("terms", terms), check_positive("norm", norm)
    # |P|^2 - 1 in t = theta^2: exact coefficients, because the lower ones cancel.
    coefficients = [
        sum(
            Fraction((-1) ** abs(m - j), math.factorial(j) * math.factorial(2 * m - j))
            for j in range(2 * m + 1)
            if max(j, 2 * m - j) <= terms
        )
        for m in range(1, terms + 1)
    ]
    excess = np.polynomial.Polynomial([0.0, *(float(c * Fraction(norm) ** (2 * m)) for m, c in enumerate(coefficients, 1))])
    turns = excess.deriv().roots()
    # Roots with a small imaginary part may be double ones that rounding split; further points can only be on the curve.
    points = np.clip(np.concatenate(([0.0, 1.0], turns.real)), 0.0, 1.0)
    squares = 1 + excess(points)
    return math.sqrt(max(0.0, squares.min())), math.sqrt(squares.max())


def skew_filter(weight: Tensor) -> Tensor:
    """The skew-symmetric part (c, c, k, k) of a filter: minus itself under a swap of channels and a flip of both axes."""
    return (weight - weight.transpose(0, 1).flip(2, 3)) / 2


def symbol(filters: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The matrices that a convolution is at every frequency, sum_d W_d exp(i <omega, d>).

    Args:
        filters: (c, c, k, k), k odd.
        rows, columns: frequencies of both axes, in radians per pixel.
    Returns:
        complex (rows, columns, c, c); skew-Hermitian if the filter is skew-symmetric.
    """
    reach = filters.shape[-1] // 2
    offsets = torch.arange(-reach, reach + 1, dtype=filters.dtype, device=filters.device)
    down, across = (
        torch.polar(torch.ones_like(angle), angle) for angle in (torch.outer(axis, offsets) for axis in (rows, columns))
    )
    return torch.einsum("oiab,ya,xb->yxoi", filters.to(down.dtype), down, across)


def norm_bound(filters: Tensor) -> Tensor:
    """Upper bound of ||A||_2 of a skew-symmetric convolution, for pictures of any size, padded with zeros or wrapped around.

    The largest norm of the symbol over a grid of frequencies, times what it can rise between them: sin and cos of degree d = k // 2
    per axis fall by no more than cos(pi d / N) from a maximum to the nearest of N points (M. Riesz), once per axis.

    Args:
        filters: skew-symmetric, (c, c, k, k).
    Returns:
        a number, differentiable; at most 1.04 times the norm.
    Raises:
        RuntimeError: if an entry is not finite.
    """
    reach = filters.shape[-1] // 2
    n = max(1, GRID * reach)
    rows = torch.arange(n, dtype=filters.dtype, device=filters.device) * (2 * math.pi / n)
    columns = rows[: n // 2 + 1]  # the others are complex conjugates
    with torch.no_grad():
        at = int(torch.linalg.eigvalsh(1j * symbol(filters, rows, columns)).abs().amax(-1).argmax())
    row, column = divmod(at, len(columns))
    # With vectors, so that the last bits are the same with and without a gradient.
    largest = torch.linalg.eigh(1j * symbol(filters, rows[row, None], columns[column, None])).eigenvalues.abs().max()
    return torch.div(largest, math.cos(math.pi * reach / n) ** 2)


def reshaped_norm_bound(filters: Tensor) -> Tensor:
    """Another bound of the same norm, many times cheaper for many channels and about 1.6 times as large for random filters.

    k times the lesser of the spectral norms of two reshapes of the filter, (c, k * k * c) and (k * c, k * c); the other two of the four
    that the original takes are their transposes.

    Args:
        filters: skew-symmetric, (c, c, k, k).
    Returns:
        a number, differentiable.
    Raises:
        RuntimeError: if an entry is not finite.
    Source: Singla, Feizi, "Fantastic Four" (ICLR 2021), arXiv:1911.10258.
    """
    c, _, k, _ = filters.shape
    norms = []
    for matrix in (filters.reshape(c, -1), filters.transpose(1, 2).reshape(c * k, c * k)):
        with torch.no_grad():
            vector = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
        norms.append(torch.linalg.vector_norm(vector @ matrix))
    return k * torch.minimum(*norms)


def skew_exponential(inputs: Tensor, filters: Tensor, terms: int, padding_mode: str = "zeros") -> Tensor:
    """S_K(A) x = sum_{j <= K} A^j x / j!, for a convolution A.

    Args:
        inputs: (n, c, height, width).
        filters: (c, c, k, k), k odd.
        terms: K.
        padding_mode: "zeros" or "circular".
    """
    reach = filters.shape[-1] // 2
    result = inputs
    for term in range(terms, 0, -1):
        if padding_mode == "circular":
            image = functional.conv2d(functional.pad(result, (reach,) * 4, mode="circular"), filters)
        else:
            image = functional.conv2d(result, filters, padding=reach)
        result = torch.add(inputs, image, alpha=1 / term)
    return result


NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {"symbol": norm_bound, "reshapes": reshaped_norm_bound}


@dataclass
class _Kept:
    """An operator, the weight and the settings that it was made from; spectra by size of the picture."""

    weight: Tensor
    settings: tuple[Any, ...]
    operator: Tensor
    spectra: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def is_of(self, weight: Tensor, settings: tuple[Any, ...]) -> bool:
        # By value: SB3's target networks are written through `.data`, which no version counter notices.
        kept = self.weight
        same = kept.device == weight.device and kept.dtype == weight.dtype and self.settings == settings
        return same and torch.equal(kept, weight)


class OrthogonalLayer(nn.Module, ABC):
    """A layer whose operator is a function of its free `weight`, kept between calls that need no gradient of the weight."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, size: tuple[int, ...], outputs: int, bias: bool) -> None:
        super().__init__()
        # Entries of size 1, scaled where they are used: optimisers with steps of one size per entry then turn wide and narrow
        # layers alike, as slowly as a plain layer after this one learns to scale up its outputs.
        self.weight = nn.Parameter(torch.randn(size))
        self.scale = 1 / math.sqrt(size[0])
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-1, 1) / math.sqrt(outputs)) if bias else None
        self._kept: _Kept | None = None

    @abstractmethod
    def _operator_of(self, weight: Tensor) -> Tensor: ...

    def _settings(self) -> tuple[Any, ...]:
        """What else the operator and its spectra are made from."""
        return (self.scale,)

    @abstractmethod
    def lipschitz(self) -> float:
        """Lipschitz constant from l2 to l2 of the operator in use, in float64; an upper bound.

        Raises:
            ValueError: if a weight is not finite.
        """

    def operator(self) -> Tensor:
        """The filter or matrix in use."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self._operator_of(self.weight)
        return self._keep().operator

    def _keep(self) -> _Kept:
        if self._kept is None or not self._kept.is_of(self.weight, self._settings()):
            with torch.inference_mode(False), torch.no_grad():  # what is kept may later be part of a gradient of the input
                weight = self.weight.detach().clone()
                self._kept = _Kept(weight, self._settings(), self._operator_of(weight))
        return self._kept

    def _finite_operator(self) -> Tensor:
        if not (bool(self.weight.isfinite().all()) and bool((operator := self._keep().operator).isfinite().all())):
            raise ValueError(
                f"weight of {type(self).__name__} must be finite and not huge, got a largest entry of {self.weight.abs().max()}"
            )
        return operator.double()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


class SkewOrthogonalConv2d(OrthogonalLayer):
    """S_K(A) x + b: A the convolution by the skew part of `weight` / sqrt(channels), scaled down to norm R if larger.

    A stride first moves blocks of pixels to channels; missing channels are zeros, superfluous ones are dropped. With no more outputs
    than inputs (in_channels * stride^2) gradients keep their norm going back, otherwise the signal does going forward, up to
    `taylor_singular_values(terms, max_norm)`. A frozen layer (`requires_grad_(False)`) with circular padding works in the frequency
    domain, several times as fast, gradients of its inputs included.

    Args:
        in_channels, out_channels: of the pictures (n, channels, height, width).
        kernel_size: odd.
        stride: of both axes; heights and widths are filled up with zeros to multiples of it.
        padding_mode: "zeros", or "circular" for pictures that continue at the other side; others are not skew-symmetric.
        bias: add one number per channel.
        terms: K, 4, 8 or 12.
        max_norm: R, at most `LARGEST_NORM[terms]`. From pi on every rotation can be reached. Default 2.1, or the most with "reshapes".
        normalizer: how the norm is bounded at every change of the weights: "symbol", tight (`norm_bound`), or "reshapes", cheap for many
            channels (`reshaped_norm_bound`); what is loose there is made up for by the larger R.
        checkpoint: recompute the K intermediate pictures in the backward pass instead of storing them.
    Raises:
        ValueError: if an argument is out of range.
    Source: Singla, Feizi (ICML 2021), arXiv:2105.11417.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding_mode: str = "zeros",
        bias: bool = True,
        terms: int = 8,
        max_norm: float | None = None,
        normalizer: str = "symbol",
        checkpoint: bool = False,
    ) -> None:
        self.in_channels, self.out_channels = check_count("in_channels", in_channels), check_count("out_channels", out_channels)
        self.kernel_size, self.stride = check_count("kernel_size", kernel_size), check_count("stride", stride)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}: an even filter has no centre to be skew about")
        self.padding_mode: str = check_choice("padding_mode", padding_mode, ("zeros", "circular"))
        self.terms: int = check_choice("terms", terms, tuple(LARGEST_NORM))
        self.normalizer: str = check_choice("normalizer", normalizer, tuple(NORMALIZERS))
        default = 2.1 if normalizer == "symbol" else LARGEST_NORM[self.terms]
        self.max_norm = default if max_norm is None else check_positive("max_norm", max_norm)
        if self.max_norm > LARGEST_NORM[self.terms]:
            raise ValueError(f"max_norm must be at most {LARGEST_NORM[self.terms]} for terms={self.terms}, got {max_norm}")
        self.checkpoint = checkpoint
        channels = max(self.in_channels * self.stride**2, self.out_channels)
        super().__init__((channels, channels, self.kernel_size, self.kernel_size), self.out_channels, bias)

    def _settings(self) -> tuple[Any, ...]:
        return self.scale, self.max_norm, self.normalizer, self.terms

    def _operator_of(self, weight: Tensor) -> Tensor:
        filters = skew_filter(weight) * self.scale
        return filters * (self.max_norm / NORMALIZERS[self.normalizer](filters).clamp_min(self.max_norm))

    def lipschitz(self) -> float:
        """See the base class; 1.0 exactly unless rounding brought the norm above R."""
        operator = self._finite_operator()
        norm = min(float(bound(operator)) for bound in NORMALIZERS.values()) * _ROUNDING
        return taylor_singular_values(self.terms, norm)[1] if norm > 0 else 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, in_channels, height, width) -> (n, out_channels, ceil(height / stride), ceil(width / stride))."""
        if inputs.ndim != 4 or inputs.shape[1] != self.in_channels:
            raise ValueError(f"inputs must be of shape (n, {self.in_channels}, height, width), got {tuple(inputs.shape)}")
        with torch.autocast(inputs.device.type, enabled=False):
            images = self._folded(inputs.to(self.weight.dtype))
            size = (images.shape[2], images.shape[3])
            if self.padding_mode == "circular" and min(size) < self.kernel_size // 2:
                raise ValueError(
                    f"inputs must have at least {self.kernel_size // 2} pixels per axis after the stride, got {size}"
                )
            if self._by_spectrum(images):
                outputs = _apply_spectrum(images, self._spectrum(size))
            elif self.checkpoint and torch.is_grad_enabled():
                arguments = (images, self.operator(), self.terms, self.padding_mode)
                outputs = recomputed(skew_exponential, *arguments, use_reentrant=False)
            else:
                outputs = skew_exponential(images, self.operator(), self.terms, self.padding_mode)
            outputs = outputs[:, : self.out_channels]
            return outputs if self.bias is None else outputs + self.bias[:, None, None]

    def _folded(self, images: Tensor) -> Tensor:
        if self.stride > 1:
            height, width = images.shape[2:]
            images = functional.pad(images, (0, -width % self.stride, 0, -height % self.stride))
            images = functional.pixel_unshuffle(images, self.stride)
        return functional.pad(images, (0, 0, 0, 0, 0, len(self.weight) - images.shape[1]))

    def _by_spectrum(self, images: Tensor) -> bool:
        channels, height, width = images.shape[1:]
        small = height * (width // 2 + 1) * channels**2 <= SPECTRAL_ENTRIES
        # Not whenever gradients are off: a spectrum costs many forward passes, and weights in training change every few.
        return self.padding_mode == "circular" and not self.weight.requires_grad and small

    def _spectrum(self, size: tuple[int, int]) -> Tensor:
        """S_K at the frequencies of pictures of one size, (frequencies, c, c)."""
        kept = self._keep()
        if size not in kept.spectra:
            with torch.inference_mode(False), torch.no_grad():
                exact = kept.operator.double()
                rows, columns = (torch.arange(n, dtype=exact.dtype, device=exact.device) * (2 * math.pi / n) for n in size)
                factors = symbol(exact, rows, columns[: size[1] // 2 + 1]).flatten(0, 1)
                one = torch.eye(len(exact), dtype=factors.dtype, device=exact.device)
                result = one
                for term in range(self.terms, 0, -1):
                    result = one + factors @ result / term
                kept.spectra[size] = result.to(kept.operator.dtype.to_complex())
        return kept.spectra[size]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding_mode={self.padding_mode!r}, terms={self.terms}, max_norm={self.max_norm}, "
            f"normalizer={self.normalizer!r}"
        )


def _apply_spectrum(images: Tensor, spectrum: Tensor) -> Tensor:
    waves = torch.fft.rfft2(images)
    turned = spectrum @ waves.permute(2, 3, 1, 0).flatten(0, 1)
    outputs: Tensor = torch.fft.irfft2(turned.unflatten(0, waves.shape[2:]).permute(3, 2, 0, 1), s=images.shape[2:])
    return outputs


class OrthogonalLinear(OrthogonalLayer):
    """Q x + b: Q a block of exp((W - W^T) / sqrt(size)), so with orthonormal rows or columns, whichever are fewer.

    Args:
        in_features, out_features: sizes; the cost is that of the exponential of a square matrix of the larger one.
        bias: add a vector.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        self.in_features, self.out_features = check_count("in_features", in_features), check_count("out_features", out_features)
        size = max(self.in_features, self.out_features)
        super().__init__((size, size), self.out_features, bias)

    def _operator_of(self, weight: Tensor) -> Tensor:
        whole: Tensor = torch.linalg.matrix_exp((weight - weight.T) * self.scale)
        return whole[: self.out_features, : self.in_features].contiguous()

    def lipschitz(self) -> float:
        """See the base class; 1 up to the rounding of the exponential."""
        return float(torch.linalg.matrix_norm(self._finite_operator(), 2)) * _ROUNDING

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, in_features) -> (n, out_features)."""
        with torch.autocast(inputs.device.type, enabled=False):
            return functional.linear(inputs.to(self.weight.dtype), self.operator(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _halves(inputs: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.ndim < 2 or inputs.shape[1] % 2:
        raise ValueError(f"inputs must have an even number of channels in axis 1, got shape {tuple(inputs.shape)}")
    first, second = inputs.chunk(2, 1)
    return first, second


class MaxMin(nn.Module):
    """Larger and smaller of every pair of channels, the pairs made of the two halves of axis 1; a reflection or the identity."""

    def lipschitz(self) -> float:
        return 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = _halves(inputs)
        return torch.cat((torch.maximum(first, second), torch.minimum(first, second)), 1)


class Householder(nn.Module):
    """Reflects the pairs of channels on one side of a line through 0 onto the other; one learned angle per pair.

    At the first angle, pi / 2, it is `MaxMin` with the halves swapped. Leave the angles out of weight decay.

    Args:
        channels: in axis 1 of the inputs, even.
    Raises:
        ValueError: if there is an odd number of channels.
    Source: Singla, Singla, Feizi (ICLR 2022), arXiv:2108.04062.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if check_count("channels", channels) % 2:
            raise ValueError(f"channels must be even, got {channels}")
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def lipschitz(self) -> float:
        return 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        x, y = _halves(inputs)
        angle = self.angle.reshape(-1, *(1,) * (inputs.ndim - 2))
        beyond = x * (angle / 2).sin() > y * (angle / 2).cos()
        sine, cosine = angle.sin(), angle.cos()
        return torch.cat((torch.where(beyond, x * cosine + y * sine, x), torch.where(beyond, x * sine - y * cosine, y)), 1)
