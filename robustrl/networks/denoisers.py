"""Denoisers: networks from noisy observations to clean ones; until they are trained they change nothing.

Nothing that is proven depends on them: whatever happens after the noise is part of the smoothed function.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from robustrl.errors import check_count, check_finite_array, check_positive
from robustrl.files import write_atomically

FORMAT = 1
UNFIT = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, IndexError),
    *(MemoryError, pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What a damaged or contradictory file can end in."""


class Denoiser(nn.Module, ABC):
    """newest frames + sigma * residual(standardised observation, log sigma), with a residual that starts as zero.

    Args:
        shape: of one noisy observation, frame stack included.
        sigma: standard deviation of the noise, in the observation's units; see `at`.
        mean: of clean observations, broadcast to `shape`.
        std: their standard deviation, the same; noise and data together are scaled to variance 1.
        keep: entries along the axis of the frame stack that the policy takes, its newest frames; default all. The others are history
            that helps to denoise them.

    Raises:
        ValueError: if a number is out of range or a shape does not fit.
    """

    axis = -1
    """Along which frames are stacked."""
    sigma: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, shape: Sequence[int], sigma: float, mean: ArrayLike = 0.0, std: ArrayLike = 1.0, *, keep: int | None = None
    ) -> None:
        super().__init__()
        self.shape = tuple(check_count("shape", size) for size in shape)
        if not self.shape:
            raise ValueError("shape must have at least one axis")
        self.keep = self.shape[self.axis] if keep is None else check_count("keep", keep)
        if self.keep > self.shape[self.axis]:
            raise ValueError(f"keep must be at most {self.shape[self.axis]}, got {keep}")
        self.register_buffer("sigma", torch.tensor(check_positive("sigma", sigma)))
        for name, value in (("mean", mean), ("std", std)):
            array = check_finite_array(name, value)
            try:
                full = np.broadcast_to(array, self.shape)
            except ValueError:
                raise ValueError(f"{name} must fit observations of shape {self.shape}, got shape {array.shape}") from None
            if name == "std" and np.any(full < 0):
                raise ValueError(f"std must be >= 0, got {full.min()}")
            self.register_buffer(name, torch.tensor(full, dtype=torch.float32))

    def n_frames(self, of_policy: int) -> int:
        """Frames in one noisy observation, for a policy that takes so many."""
        return of_policy * self.shape[self.axis] // self.keep

    def newest(self, observation: Tensor) -> Tensor:
        """What the policy takes of observations (n, *shape)."""
        axis = self.axis % len(self.shape) + 1
        return observation.narrow(axis, observation.shape[axis] - self.keep, self.keep)

    def at(self, sigma: float) -> Self:
        """This denoiser for another noise level; it shares the weights."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers) | {"sigma": torch.full_like(self.sigma, check_positive("sigma", sigma))}
        return other

    def forward(self, observation: Tensor) -> Tensor:
        """The policy's observations, denoised, of noisy ones (n, *shape)."""
        scaled = (observation - self.mean) / (self.std.square() + self.sigma.square()).sqrt()
        newest = self.newest(observation)
        return newest + self.sigma * self.residual(scaled, self.sigma.log()).reshape(newest.shape)

    @abstractmethod
    def residual(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        """Minus the predicted noise in units of sigma."""

    def settings(self) -> dict[str, Any]:
        """What the constructor needs beside the state, plain data."""
        return {"shape": list(self.shape), "keep": self.keep}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings, atomically, for `load_denoiser`."""
        buffer = io.BytesIO()
        kind, state = type(self).__name__, self.state_dict()
        torch.save({"format": FORMAT, "kind": kind, "settings": self.settings(), "state": state}, buffer)
        write_atomically(path, buffer.getvalue())


class ResidualMLP(Denoiser):
    """A denoiser of vectors: linear layers with ReLU between them; the last one starts as zero.

    Args:
        shape, sigma, mean, std, keep: see `Denoiser`; longer shapes are flattened.
        hidden: widths of the hidden layers; () for a linear denoiser.
        seed: of the weights.
    """

    def __init__(
        self,
        shape: Sequence[int],
        sigma: float,
        mean: ArrayLike = 0.0,
        std: ArrayLike = 1.0,
        *,
        keep: int | None = None,
        hidden: Sequence[int] = (256, 256),
        seed: int = 0,
    ) -> None:
        super().__init__(shape, sigma, mean, std, keep=keep)
        self.hidden = tuple(check_count("hidden", width) for width in hidden)
        size = math.prod(self.shape)
        widths = (size + 1, *self.hidden, size // self.shape[-1] * self.keep)
        layers: list[nn.Module] = []
        with _seeded(seed):
            for inputs, outputs in itertools.pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])
        _zero(layers[-2])

    def residual(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        inputs = torch.cat((scaled.flatten(1), log_sigma.expand(len(scaled), 1)), dim=1)
        return self.network(inputs)  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"hidden": list(self.hidden)}


class DnCNN(Denoiser):
    """A denoiser of pictures and frame stacks: 3 x 3 convolutions, with batch normalisation between them; the last starts as zero.

    Args:
        shape: (channels, height, width); a frame stack's frames are channels.
        sigma, mean, std, keep: see `Denoiser`.
        depth: number of convolutions, at least 2.
        width: channels between them.
        channels_last: the shape is (height, width, channels).
        seed: of the weights.
    Source: Zhang et al., "Beyond a Gaussian Denoiser" (IEEE TIP 2017), arXiv:1608.03981; depth 17 and width 64 are theirs and those of
        Salman et al., arXiv:2003.01908. The noise level is one more input channel.
    """

    def __init__(
        self,
        shape: Sequence[int],
        sigma: float,
        mean: ArrayLike = 0.0,
        std: ArrayLike = 1.0,
        *,
        keep: int | None = None,
        depth: int = 17,
        width: int = 64,
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        if len(shape) != 3:
            raise ValueError(f"shape must be (channels, height, width), got {tuple(shape)}")
        self.axis = -1 if channels_last else 0
        super().__init__(shape, sigma, mean, std, keep=keep)
        self.depth, self.width = check_count("depth", depth, least=2), check_count("width", width)
        channels = self.shape[self.axis]
        with _seeded(seed):
            layers: list[nn.Module] = [nn.Conv2d(channels + 1, width, 3, padding=1), nn.ReLU()]
            for _ in range(depth - 2):
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=1e-4), nn.ReLU()]
            layers.append(nn.Conv2d(width, self.keep, 3, padding=1, bias=False))
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.orthogonal_(layer.weight)
        _zero(layers[-1])
        self.network = nn.Sequential(*layers)

    def residual(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        pictures = scaled.movedim(-1, 1) if self.axis == -1 else scaled
        level = log_sigma.expand(len(pictures), 1, *pictures.shape[2:])
        found: Tensor = self.network(torch.cat((pictures, level), dim=1))
        return found.movedim(1, -1) if self.axis == -1 else found

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"depth": self.depth, "width": self.width, "channels_last": self.axis == -1}


def denoiser_for(observations: Tensor, sigma: float, output: Sequence[int] | None = None, **settings: Any) -> Denoiser:
    """A fresh denoiser for data: `DnCNN` for pictures (three axes), `ResidualMLP` for everything else.

    Args:
        observations: clean ones, (n, *shape), whose statistics it keeps; one mean and deviation for all of a picture's pixels.
        sigma: standard deviation of the noise.
        output: shape of the policy's observations, where they hold fewer frames; default the same.
        settings: of the class.
    """
    values, shape = observations.double(), tuple(observations.shape[1:])
    output = shape if output is None else output
    if len(shape) != 3:
        means, stds = (part.cpu().numpy() for part in (values.mean(0), values.std(0, correction=0)))
        return ResidualMLP(shape, sigma, means, stds, keep=output[-1], **settings)
    last = shape[-1] < min(shape[:-1])
    mean, std = float(values.mean()), float(values.std(correction=0))
    return DnCNN(shape, sigma, mean, std, keep=output[-1 if last else 0], channels_last=last, **settings)


def load_denoiser(path: str | os.PathLike[str]) -> Denoiser:
    """Read what `Denoiser.save` wrote; no code stored in the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no denoiser.
    """
    kinds: dict[str, type[Denoiser]] = {"ResidualMLP": ResidualMLP, "DnCNN": DnCNN}
    if not Path(path).exists():
        raise FileNotFoundError(f"no denoiser file {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip")
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if stored["format"] != FORMAT:
            raise ValueError("unknown format")
        denoiser = kinds[stored["kind"]](sigma=1.0, **stored["settings"])
        denoiser.load_state_dict(stored["state"])
        if not all(torch.isfinite(tensor).all() for tensor in denoiser.state_dict().values()) or denoiser.sigma <= 0:
            raise ValueError("weights that are NaN or inf, or a sigma <= 0")
    except UNFIT as error:
        raise ValueError(f"{path} is not a denoiser file ({error})") from None
    return denoiser.eval()


class _seeded:
    """torch's global generator with a seed of ours inside, as it was outside."""

    def __init__(self, seed: int) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._seed = check_count("seed", seed, least=0)

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *reason: Any) -> None:
        self._fork.__exit__(*reason)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
