"""Weights in training: kept, averaged, moved against, and how fast they learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustrl.networks.activations import Activation
from robustrl.networks.skew_orthogonal import Householder

Weights = dict[str, Tensor]
"""A module's parameters and buffers by name."""


def copied(module: nn.Module) -> Weights:
    """The weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Average:
    """Exponential moving average of a module's weights; buffers that are not floats are the newest.

    Early on it forgets faster, min(decay, (1 + t) / (10 + t)) at step t, or the first weights would stay in it for long.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.weights, self.decay, self.steps = copied(module), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the weights as they are now."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor, 1 - decay)
            else:
                self.weights[name].copy_(tensor)

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """The module has the average inside, and its own weights again afterwards."""
        own = copied(module)
        module.load_state_dict(self.weights)
        try:
            yield
        finally:
            module.load_state_dict(own)


@dataclass(frozen=True)
class Snapshot:
    """All that training goes on from, bit by bit: weights, buffers, the optimiser's state, the moving average."""

    weights: Weights
    optimizer: dict[str, Any]
    average: Average | None

    @classmethod
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> Snapshot:
        """As they are now."""
        # An optimiser's state_dict shares its tensors, which it goes on writing to.
        return cls(copied(module), copy.deepcopy(optimizer.state_dict()), copy.deepcopy(average))

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Average | None:
        """Back to that, as often as wanted; the moving average to go on with."""
        module.load_state_dict(self.weights)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        return copy.deepcopy(self.average)

    @property
    def result(self) -> Weights:
        """The averaged weights, if there are any."""
        return self.weights if self.average is None else self.average.weights


@contextmanager
def adversarial_weights(module: nn.Module, gradients: Sequence[Tensor | None], size: float) -> Iterator[None]:
    """Inside, every matrix or filter W is W + size * ||W|| * g / ||g||, a step that raises the loss; afterwards it is W again.

    Args:
        module: whose parameters need gradients.
        gradients: of the loss, one per parameter that needs one; None for a parameter without a part in it.
        size: gamma, relative to the weights.
    Source: Wu, Xia, Wang (NeurIPS 2020), arXiv:2004.05884.
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    moved = [
        (parameter, parameter.detach().clone(), gradient)
        for parameter, gradient in zip(learned, gradients, strict=True)
        if gradient is not None and parameter.ndim > 1
    ]
    try:
        with torch.no_grad():
            for parameter, own, gradient in moved:
                parameter.add_(gradient * (size * own.norm() / gradient.norm().clamp_min(1e-12)))
        yield
    finally:
        with torch.no_grad():
            for parameter, own, _ in moved:
                parameter.copy_(own)


def optimizer_for(module: nn.Module, name: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam or SGD with momentum 0.9; the shapes of activations do not decay, which would pull them to where they mean little.

    Raises:
        ValueError: if there is nothing to learn.
    """
    shapes = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, Activation | Householder)
        for parameter in layer.parameters()
    }
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not learned:
        raise ValueError("module must have parameters that need gradients, got none")
    groups = [
        {"params": [p for p in learned if id(p) not in shapes], "weight_decay": weight_decay},
        {"params": [p for p in learned if id(p) in shapes], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.Adam(groups, learning_rate) if name == "adam" else torch.optim.SGD(groups, learning_rate, momentum=0.9)


def rate_at(schedule: str, progress: float) -> float:
    """Share of the highest learning rate after a share of training, in [0, 1)."""
    match schedule:
        case "one-cycle":
            rise = 0.3
            if progress < rise:
                return 0.04 + 0.96 * progress / rise
            return (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2
        case "piecewise":
            return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
        case _:
            return 1.0
