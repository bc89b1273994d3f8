"""Bounds for what `PolicyView` puts around networks, and the view that training has of an SB3 model.

It is here since `robustrl.networks` and `robustrl.policy` do not know each other. Layers of single entries are applied to both ends as
they are, without padding: all their operations are monotone in floating point too.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor

from robustrl.networks.bounds import Interval, Region, handlers, propagate
from robustrl.policy import PolicyView
from robustrl.policy.sb3 import _MeanAndStd, _Network, _SquashedHead, _Unscale, networks_of
from robustrl.policy.view import _ChannelsFirst, _Normalized


def view_of(model: Any) -> PolicyView:
    """A model's policy on the observations that its learner stores, which may be normalised already."""
    parts = networks_of(model)
    return PolicyView(
        parts.actor,
        kind=parts.kind,
        observation_shape=parts.observation_shape,
        critic=parts.critic,
        action_space=parts.action_space,
        samples=parts.samples,
    )


@handlers.register
def _(layer: PolicyView, region: Region) -> Region:
    if layer.memory_shape is not None:
        raise ValueError("policy must have no memory: no bounds are known for recurrent policies")
    return propagate(layer.actor, region)


@handlers.register
def _(layer: _Network, region: Region) -> Region:
    entry = layer._entries[0]
    if entry.key is not None:
        raise ValueError("policy must take arrays: no bounds are known for policies of dictionaries")
    if entry.unit != entry.divide:
        region = region.scaled(255.0 if entry.unit else 1 / 255)
    return propagate(layer.heads, propagate(layer.extractor, region))


@handlers.register
def _(layer: FlattenExtractor, region: Region) -> Region:
    return propagate(layer.flatten, region)


@handlers.register
def _(layer: NatureCNN, region: Region) -> Region:
    return propagate(layer.linear, propagate(layer.cnn, region))


@handlers.register
def _(layer: _MeanAndStd, region: Region) -> Region:
    mean = propagate(layer.mean, region).box()
    log_std = layer.log_std.expand_as(mean.low)
    return Interval(torch.cat((mean.low, log_std), dim=-1), torch.cat((mean.high, log_std), dim=-1))


@handlers.register
def _(layer: _SquashedHead, region: Region) -> Region:
    mean, log_std = (propagate(part, region).box() for part in (layer.mean, layer.log_std))
    log_std = log_std.monotone(lambda end: end.clamp(*layer.limits))
    return Interval(torch.cat((mean.low, log_std.low), dim=-1), torch.cat((mean.high, log_std.high), dim=-1))


@handlers.register
def _(layer: _Unscale, region: Region) -> Region:
    return region.box().monotone(layer)


@handlers.register
def _(layer: _Normalized, region: Region) -> Region:
    def normalized(end: Tensor) -> Tensor:
        return torch.clamp((end.double() - layer.mean) / layer.scale, -layer.clip, layer.clip).float()

    return propagate(layer.network, region.box().monotone(normalized))


@handlers.register
def _(layer: _ChannelsFirst, region: Region) -> Region:
    return propagate(layer.network, region.reshaped(lambda images: images.movedim(-1, 1)))
