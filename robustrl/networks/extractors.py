"""Feature extractors for Stable-Baselines3 whose features move no further than the observation does, in l2.

With `net_arch=[]` a policy of theirs is an extractor and one linear layer, without any surgery on the policy. Their state is their
parameters, no buffers: saving, loading, optimisers and the averaging of target networks see all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from robustrl.errors import check_choice, check_count
from robustrl.networks.activations import FAMILIES, RELUS, Activation, from_text
from robustrl.networks.skew_orthogonal import Householder, MaxMin, OrthogonalLinear, SkewOrthogonalConv2d

PAIRS: dict[str, Callable[[int], nn.Module]] = {"maxmin": lambda channels: MaxMin(), "householder": Householder}
"""Activations that keep distances, of pairs of channels."""
LARGEST_INPUT = 4096
"""Entries of an observation that a `LipschitzMLP` takes: its first layer is the exponential of a matrix of that size squared."""


class _Bounded(Protocol):
    def lipschitz(self) -> float: ...


class Contraction(nn.Module):
    """An activation over its largest slope: it moves nothing further apart.

    Args:
        curve: the activation.
    """

    def __init__(self, curve: Activation) -> None:
        super().__init__()
        self.curve, self.slope = curve, curve.lipschitz()

    def lipschitz(self) -> float:
        """1, unless somebody changed the slope."""
        return self.curve.lipschitz() / self.slope

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.curve(inputs)) / self.slope

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


def between(text: str) -> Callable[[int], nn.Module]:
    """A recipe for what goes between layers, from the number of channels.

    Args:
        text: "maxmin" or "householder", which keep distances; or a name of `robustrl.networks.activation`, which is divided by its
            largest slope, with its beta (slope of "leaky_relu") after a colon if not the default: "swish", "swish:4".
    Raises:
        ValueError: for an unknown name or a bad setting.
    """
    name = text.partition(":")[0]
    check_choice("activation", name, (*PAIRS, *FAMILIES, *RELUS))
    if name in PAIRS:
        check_choice("activation", text, tuple(PAIRS))
        return PAIRS[name]
    curve = from_text(text)
    return lambda channels: Contraction(curve())


class LipschitzExtractor(BaseFeaturesExtractor):
    """A chain of layers with known Lipschitz constants, flat at the end.

    Args:
        observation_space: what it is for.
        layers: modules with a method `lipschitz()`.
        features_dim: number of features.
    """

    def __init__(self, observation_space: gym.Space[Any], layers: Sequence[nn.Module], features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        self.layers = nn.ModuleList(layers)

    def forward(self, observations: Tensor) -> Tensor:
        """(n, *shape) -> (n, features_dim)."""
        features = observations
        for layer in self.layers:
            features = layer(features)
        return features.flatten(1)

    def lipschitz(self) -> float:
        """Lipschitz constant of the features, l2 to l2, in what the network is given: an upper bound, 1 up to rounding.

        Units are those after Stable-Baselines3's preprocessing: bytes of pictures over 255.

        Raises:
            ValueError: if a weight is not finite.
        """
        return math.prod(cast(_Bounded, layer).lipschitz() for layer in self.layers)


class LipschitzMLP(LipschitzExtractor):
    """Orthogonal linear layers with activations between and after them; observations are flattened.

    Use: `policy_kwargs=dict(features_extractor_class=rrl.LipschitzMLP, net_arch=[])`; with PPO and A2C also
    `share_features_extractor=False`, or the critic's loss shapes the features, and a larger learning rate than for plain networks.

    Args:
        observation_space: any that Stable-Baselines3 flattens, of at most 4096 entries.
        widths: of the layers, even; widening layers keep distances, narrowing ones keep gradients.
        activation: see `between`; those of pairs keep norms.
    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, observation_space: gym.Space[Any], widths: Sequence[int] = (64, 64), *, activation: str = "maxmin"
    ) -> None:
        act = between(activation)
        sizes, layers = [get_flattened_obs_dim(observation_space)], list[nn.Module]()
        if sizes[0] > LARGEST_INPUT:
            raise ValueError(
                f"observation_space must have at most {LARGEST_INPUT} entries, got {sizes[0]}: take LipschitzCNN for pictures, or fewer "
                "pixels"
            )
        for width in _even("widths", widths):
            layers += [OrthogonalLinear(sizes[-1], width), act(width)]
            sizes.append(width)
        super().__init__(observation_space, layers, sizes[-1])

    def forward(self, observations: Tensor) -> Tensor:
        """(n, *shape) -> (n, features_dim)."""
        return super().forward(observations.flatten(1))


class LipschitzCNN(LipschitzExtractor):
    """Skew orthogonal convolutions with activations between and after them, flat at the end.

    Use: `policy_kwargs=dict(features_extractor_class=rrl.LipschitzCNN, net_arch=[])`.

    Args:
        observation_space: pictures, channels first, as policies see them (Stable-Baselines3 transposes channels-last environments).
        channels: of the layers, even. Where channels[i] <= channels[i - 1] * strides[i]^2 gradients keep their norm.
        strides: of the layers.
        kernel_size: odd; of the pictures after the stride.
        activation: see `between`; those of pairs keep norms.
        padding_mode, terms, max_norm, normalizer, checkpoint: see `SkewOrthogonalConv2d`.
    Raises:
        ValueError: if an argument is out of range or the space is no Box of three axes.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        channels: Sequence[int] = (16, 16, 32),
        strides: Sequence[int] = (4, 2, 2),
        *,
        kernel_size: int = 3,
        activation: str = "maxmin",
        padding_mode: str = "zeros",
        terms: int = 8,
        max_norm: float | None = None,
        normalizer: str = "symbol",
        checkpoint: bool = False,
    ) -> None:
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
            raise ValueError(f"observation_space must be a Box of (channels, height, width), got {observation_space}")
        act = between(activation)
        inputs, height, width = observation_space.shape
        if len(channels) != len(strides):
            raise ValueError(f"strides must have one entry per entry of channels, got {len(strides)} for {len(channels)}")
        layers: list[nn.Module] = []
        for outputs, stride in zip(_even("channels", channels), strides, strict=True):
            convolution = SkewOrthogonalConv2d(
                *(inputs, outputs, kernel_size, stride),
                padding_mode=padding_mode,
                terms=terms,
                max_norm=max_norm,
                normalizer=normalizer,
                checkpoint=checkpoint,
            )
            layers += [convolution, act(outputs)]
            inputs, height, width = outputs, -(-height // stride), -(-width // stride)
        super().__init__(observation_space, layers, inputs * height * width)


def _even(name: str, sizes: Sequence[int]) -> list[int]:
    if not sizes or any(check_count(name, size) % 2 for size in sizes):
        raise ValueError(f"{name} must be one or more even numbers (activations work on pairs), got {tuple(sizes)}")
    return list(sizes)
