"""Certificates without noise, from the Lipschitz constant of a network: one forward pass, no samples, no failure probability.

Source: Tsuzuku, Sato, Sugiyama (NeurIPS 2018), arXiv:1802.04034 (margins over constants); Singla, Feizi (ICML 2021), arXiv:2105.11417.
That an action must beat every other one, and the network's own rounding in the margin, are ours.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import Tensor, nn

from robustrl.certify.classify import certified, provenance
from robustrl.certify.margins import Floats, from_l2, pushes
from robustrl.certify.radius import RadiusCertificate
from robustrl.errors import check_count, check_finite_array, refuse_altered
from robustrl.networks.constants import ROUNDING, TINY, UP, Link, chain, claims, constant, known, lengths
from robustrl.policy.actions import refuse_broken
from robustrl.policy.sb3 import _Entry, _Network
from robustrl.policy.view import PolicyView, _ChannelsFirst, _Normalized, _NumpyTanh

BATCH = 256
"""Rows per forward pass in float64."""
PLAIN = (bool, int, float, complex, str, tuple, list, type(None))
PROBABILITIES = 2**-20
"""Logits that are closer can tie as probabilities in float32, of which PPO's and A2C's `predict` takes the largest: at most 7/8 of it
for up to e^8 actions, twice the rounding of log-probabilities below 8, of their exponentials and of the division."""


class LipschitzScores:
    """The scores of a network, and how far an attacker must go to make it take each action. Build one with `of`.

    Statements are about the greedy decision, an argmax over the scores. They hold for the weights as they are at each call: a change
    is noticed by value. Units are those of the observations given, before any preprocessing of the policy's own.

    A view holds the layers of a Stable-Baselines3 model: what happens to those is noticed. What is put in their place in the model
    later (`model.policy.q_net.q_net = ...`), or hooked to the modules around them, is not: make a new one.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._shape = policy.observation_shape if isinstance(policy, PolicyView) else None
        self._state: _State | None = None
        self._refresh()

    @classmethod
    def of(cls, policy: Any) -> LipschitzScores:
        """Take a network apart into features of known Lipschitz constant and at most one linear layer.

        Args:
            policy: a `PolicyView` or Stable-Baselines3 model with discrete actions, or a torch module from inputs (n, *shape) to
                scores (n, K): a chain of layers of which a constant is known (`robustrl.networks.constants`). A layer of another class
                is taken at the word of its method `lipschitz()`, and named in the certificates.
        Raises:
            TypeError: for a layer without a known constant, or with hooks, which is named; continuous actions; a recurrent policy.
            ValueError: if a weight is not finite.
        """
        if isinstance(policy, nn.Module) and not isinstance(policy, PolicyView):
            return cls(policy)
        view = PolicyView.of(policy, n_frames=getattr(policy, "n_frames", 1))
        if not view.discrete:
            raise TypeError(
                f"policy must have discrete actions, got {view.action_space}: no action is certified to stay the same"
            )
        if view.memory_shape is not None:
            raise TypeError("policy must not be recurrent: no Lipschitz constant of its memory is known")
        return cls(view)

    @property
    def _network(self) -> nn.Module:
        return self._policy.actor if isinstance(self._policy, PolicyView) else self._policy

    @property
    def lipschitz(self) -> float:
        """Constant of the features, l2 to l2, in units of the observations."""
        self._refresh()
        return self._lipschitz

    @property
    def trusted(self) -> tuple[str, ...]:
        """Classes of layers whose constants are their own claims."""
        self._refresh()
        return self._trusted

    def scores(self, observations: ArrayLike | Tensor) -> Floats:
        """What the network computes, in float64, (n, K).

        Raises:
            ValueError: if observations or scores are not finite, or of the wrong shape.
        """
        return self._evaluated(observations)[0]

    def costs(self, observations: ArrayLike | Tensor, norm: float = 2) -> Floats:
        """Norms below which no attack makes the network take an action, (n, K); 0 for the one it takes, and at ties.

        Args:
            observations: (n, *shape), as the policy gets them.
            norm: of the attack, 1, 2 or inf.
        Raises:
            ValueError: see `scores`.
        """
        scores, rounding, dimension = self._evaluated(observations)
        return from_l2(self._rivals(scores, rounding)[1], norm, dimension)

    def radii(self, observations: ArrayLike | Tensor, norm: float = 2) -> tuple[NDArray[np.int64], Floats]:
        """Actions (n,), and radii (n,) strictly within which they stay the same; 0 at ties, inf if nothing else can be taken."""
        scores, rounding, dimension = self._evaluated(observations)
        costs = from_l2(self._rivals(scores, rounding)[1], norm, dimension)
        others = np.sort(costs, axis=1)[:, 1:]
        return scores.argmax(1), others.min(axis=1, initial=math.inf)

    def reachable(self, observations: ArrayLike | Tensor, radius: float, norm: float = 2) -> NDArray[np.bool_]:
        """Which actions an attack of norm at most `radius` may bring about, (n, K); the others it cannot."""
        return self.costs(observations, norm) <= radius

    def certificates(
        self, observations: ArrayLike | Tensor, *, scope: str = "step", norm: float = 2
    ) -> list[RadiusCertificate]:
        """A certificate per observation, of method "lipschitz": nothing is sampled, alpha is 0. It abstains at ties.

        Args:
            observations: (n, *shape).
            scope: "step", or "input" for a classifier.
            norm: of the radius, 1, 2 or inf.
        """
        scores, rounding, dimension = self._evaluated(observations)
        rivals, differences = self._rivals(scores, rounding)[0], self.differences(scores.shape[1])
        common = {"lipschitz": self._lipschitz, "dimension": dimension, "trusted": list(self._trusted)}
        return [
            certified(
                "lipschitz",
                {
                    "scores": scores[i].tolist(),
                    "rounding": float(rounding[i]),
                    "rivals": rivals[i].tolist(),
                    "differences": differences[np.arange(len(row)), row].tolist(),
                    **common,
                },
                alpha=0.0,
                norm=norm,
                scope=scope,
                provenance=origin,
            )
            for i, (row, origin) in enumerate(zip(rivals, provenance(self._policy, observations), strict=True))
        ]

    def audit(self, observations: ArrayLike | Tensor, steps: int = 20, seed: int = 0) -> tuple[float, float]:
        """The constant, and the largest expansion that is found of the features: never above it, unless something is wrong.

        Args:
            observations: (n, *shape); Jacobians at each by power iteration, and differences between neighbours in the list.
            steps: of the power iteration.
            seed: of its start.
        Returns:
            upper and lower bound of the true constant.
        """
        self._refresh()
        device = next(self._network.parameters(), torch.empty(0)).device
        x = self._checked(observations).to(device).requires_grad_()
        with torch.enable_grad():
            features = self._features(x)[0].flatten(1)
            weights = torch.zeros_like(features, requires_grad=True)
            (back,) = torch.autograd.grad(features, x, weights, create_graph=True)  # J^T w, linear in w
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(device)
            for _ in range(check_count("steps", steps)):
                direction = direction / lengths(direction).clamp_min(sys.float_info.min).reshape(-1, *(1,) * (x.ndim - 1))
                (forth,) = torch.autograd.grad(back, weights, direction, retain_graph=True)
                (direction,) = torch.autograd.grad(features, x, forth, retain_graph=True)
        moved, apart = lengths(features[1:] - features[:-1]), lengths(x[1:] - x[:-1])
        found = [lengths(forth), moved[apart > 0] / apart[apart > 0]]
        return self._lipschitz, float(torch.cat(found).max().detach())

    def differences(self, n_actions: int) -> Floats:
        """||w_a - w_b||_2 of the last layer's rows, rounded up, (K, K); of unit vectors without a linear last layer."""
        if self._head is None:
            return math.sqrt(2) * UP * (1 - np.eye(n_actions))
        rows = self._head.weight.cpu().numpy()
        apart = rows[:, None] - rows
        largest = np.abs(apart).max(-1, initial=0.0)
        scale = np.where(largest > 0, largest, 1.0)  # squares must not underflow
        norms: Floats = np.maximum(scale * np.linalg.norm(apart / scale[..., None], axis=-1) * UP, TINY)
        return np.where(largest > 0, norms, 0.0)

    def _rivals(self, scores: Floats, rounding: Floats) -> tuple[NDArray[np.int64], Floats]:
        """For every action the one that is hardest to overtake, and the l2 norm that it takes."""
        margins = scores[:, None, :] - scores[:, :, None] - rounding[:, None, None]
        each = pushes(margins, self.differences(scores.shape[1]), self._lipschitz)
        return each.argmax(-1), each.max(-1)

    def _evaluated(self, observations: ArrayLike | Tensor) -> tuple[Floats, Floats, int]:
        """Scores, what rounding may take off their differences (n,), and the number of entries of an observation."""
        self._refresh()
        inputs = self._checked(observations)
        with torch.inference_mode():
            parts = [self._with_rounding(part) for part in torch.split(inputs, BATCH)]
        scores, rounding = (torch.cat(rows).cpu().numpy() for rows in zip(*parts, strict=True))
        refuse_broken(not (np.isfinite(scores).all() and np.isfinite(rounding).all()))
        return scores, rounding, math.prod(inputs.shape[1:])

    def _checked(self, observations: ArrayLike | Tensor) -> Tensor:
        given = observations.detach().cpu().numpy() if isinstance(observations, Tensor) else observations
        inputs = torch.from_numpy(check_finite_array("observations", given))
        shape = tuple(inputs.shape[1:])
        if not shape or shape != (self._shape or shape):
            raise ValueError(f"observations must be of shape (n, *{self._shape or 'shape'}), got {tuple(inputs.shape)}")
        return inputs

    def _with_rounding(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        at = next(self._network.parameters(), torch.empty(0))
        inputs = inputs.to(at.device)
        try:
            features, error = self._features(inputs)
            scores, terms = features, features.abs()
            if self._head is not None:
                scores, terms = self._head(features), terms @ self._head.weight.abs().T
        except RuntimeError as error_:
            raise ValueError(f"observations of shape {tuple(inputs.shape)} do not fit the network: {error_}") from error_
        if scores.ndim != 2 or len(scores) != len(inputs):
            raise ValueError(
                f"the network must give scores (n, K) of {len(inputs)} observations, got shape {tuple(scores.shape)}"
            )
        size = (terms + scores.abs()).amax(1)
        exact = error * float(self.differences(scores.shape[1]).max()) + ROUNDING * size
        # Twice: the action that the network takes by its own rounding then costs nothing. In other batches it may be a few eps another.
        own = 2 * (self._network(inputs.to(at.dtype)).double() - scores).abs().amax(1)
        own = torch.maximum(own, 4 * torch.finfo(at.dtype).eps * size)
        return scores, own + exact + (PROBABILITIES if getattr(self._policy, "kind", None) == "logits" else 0.0)

    def _features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return _through(self._links, inputs, torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device))

    def _refresh(self) -> None:
        """Take the network apart again if it is not the one that was taken apart."""
        if isinstance(self._policy, PolicyView):
            refuse_altered(self._policy)
        network = self._network
        if self._state is not None and self._state.is_of(network):
            return
        self._state = None
        with torch.no_grad():
            acting = chain(network)  # whose operators in its own precision are not exactly those in float64
        twin = copy.deepcopy(network).double().requires_grad_(False)
        for module in twin.modules():
            if "inplace" in vars(module):
                vars(module)["inplace"] = False
        with torch.no_grad():
            links = chain(twin)
        constants = [max(link.lipschitz, other.lipschitz) for link, other in zip(links, acting, strict=True)]
        links = [replace(link, lipschitz=most) for link, most in zip(links, constants, strict=True)]
        last = links[-1].function if links else None
        self._head = last if type(last) is nn.Linear else None  # a subclass may compute anything
        self._links = links if self._head is None else links[:-1]
        self._lipschitz = constant(self._links) * UP
        self._trusted = claims(links)
        self._state = _State(network)


class _State:
    """What decides what a network computes: its modules, their settings, hooks and methods, and tensors by value."""

    def __init__(self, network: nn.Module) -> None:
        self.modules, self.settings, tensors = self._read(network)
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @staticmethod
    def _read(network: nn.Module) -> tuple[list[nn.Module], list[Any], dict[tuple[str, str], Tensor]]:
        modules, settings, tensors = [], list[Any](), {}
        for name, module in network.named_modules():
            modules.append(module)
            settings += [name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
            for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if isinstance(value, Tensor):
                    tensors[name, key] = value
                elif callable(value):
                    settings.append((key, value))
                elif key != "training" and isinstance(value, PLAIN):
                    settings.append((key, repr(value)))
        return modules, settings, tensors

    def is_of(self, network: nn.Module) -> bool:
        modules, settings, tensors = self._read(network)
        if (modules, settings, tensors.keys()) != (self.modules, self.settings, self.tensors.keys()):
            return False
        return all(_equal(kept, tensors[name]) for name, kept in self.tensors.items())


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


@dataclass(frozen=True)
class _SideBySide(Link):
    """Chains for blocks of columns, of which the outputs are joined."""

    parts: tuple[list[Link], ...] = ()
    sizes: tuple[int, ...] = ()

    def through(self, inputs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        blocks = torch.split(inputs, list(self.sizes), dim=1)
        found = [_through(part, block, error) for part, block in zip(self.parts, blocks, strict=True)]
        outputs, errors = zip(*found, strict=True)
        return torch.cat(outputs, dim=1), torch.linalg.vector_norm(torch.stack(errors), dim=0)


def _through(links: Iterable[Link], inputs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    for link in links:
        inputs, error = link.through(inputs, error)
    return inputs, error


@known.register
def _(layer: _NumpyTanh) -> list[Link]:
    return chain(nn.Tanh())


@known.register
def _(layer: _ChannelsFirst) -> list[Link]:
    return [Link(lambda images: images.movedim(-1, 1), 1.0), *chain(layer.network)]


@known.register
def _(layer: _Normalized) -> list[Link]:
    def normalized(observations: Tensor) -> Tensor:
        return torch.clamp((observations - layer.mean) / layer.scale, -layer.clip, layer.clip)

    return [Link(normalized, UP / float(layer.scale.min())), *chain(layer.network)]


@known.register
def _(layer: _Network) -> list[Link]:
    entries, extractor = layer._entries, layer.extractor
    if entries[0].key is None:
        return [_scaling(entries[0]), *chain(extractor), *chain(layer.heads)]
    keys = [str(entry.key) for entry in entries]
    if type(extractor) is not CombinedExtractor or list(extractor.extractors) != keys:
        raise TypeError(f"no Lipschitz constant is known of {type(extractor).__name__} of dictionaries")
    for module in (extractor, extractor.extractors):
        refuse_altered(module)
    parts = [
        [Link(entry.laid_out, 1.0), _scaling(entry), *chain(extractor.extractors[key])]
        for entry, key in zip(entries, keys, strict=True)
    ]
    joined = _SideBySide(
        layer.features,
        max(map(constant, parts)),
        claims(link for part in parts for link in part),
        parts=tuple(parts),
        sizes=tuple(math.prod(entry.shape) for entry in entries),
    )
    return [joined, *chain(layer.heads)]


def _scaling(entry: _Entry) -> Link:
    return Link(entry.scaled, float(entry.scaled(torch.ones(1, dtype=torch.float64))) * UP)
