"""Around an observation: what a training loss holds the policy to, and how its worst point is found or bounded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecTransposeImage, is_vecenv_wrapped
from torch import Tensor

from robustrl.attacks.geometry import ascent, moved, project, unblocked
from robustrl.errors import check_choice, check_count, check_positive, check_real
from robustrl.networks.bounds import Ball, Region, propagate
from robustrl.policy import PolicyView
from robustrl.policy.sb3 import is_uint8_image
from robustrl.threat import ThreatModel, Units

NORMS: Mapping[Any, float] = {"inf": math.inf, "2": 2, "1": 1, math.inf: math.inf, 2: 2, 1: 1}
"""Norms as they are written."""


@dataclass(frozen=True)
class Neighbourhood:
    """All x + scale * e with ||e||_norm <= radius.

    Attributes:
        norm: 1, 2 or inf, of a whole observation, frame stack included.
        radius: in the units of the observations.
        scale: >= 0, (*shape), float32; 0 for entries that cannot change.
        pixels: range of a picture's entries.
    """

    norm: float
    radius: float
    scale: Tensor
    pixels: tuple[float, float] | None = None

    @classmethod
    def of(cls, threat: ThreatModel, space: spaces.Space[Any], units: Units) -> Neighbourhood:
        """What a threat model allows around a learner's observations.

        Args:
            threat: with a radius per step and no episode budget.
            space: of the observations, as the learner stores them.
            units: theirs, see `learner_units`.
        Raises:
            ValueError: if the threat model does not fit.
        """
        step = check_threat(threat).step
        assert step is not None
        factors = {("unit01", "uint8"): 255.0, ("uint8", "unit01"): 1 / 255, ("raw", "uint8"): 1.0, ("raw", "unit01"): 1.0}
        factor = 1.0 if threat.units == units else factors.get((threat.units, units))
        if factor is None:
            raise ValueError(
                f"epsilon is in units {threat.units!r}, but the learner's observations are in units {units!r}; "
                "a plain number is in the learner's own"
            )
        ends = {"uint8": (0.0, 255.0), "unit01": (0.0, 1.0)}
        return cls(threat.norm, factor * step, scale_of(threat, space.shape or ()), ends.get(units))

    @classmethod
    def of_learner(cls, model: Any, epsilon: float | ThreatModel, norm: float | str | None = None) -> Neighbourhood:
        """Around the observations of an SB3 model; a number is in their own units.

        Raises:
            ValueError: if the model's observations are no arrays, or the threat model does not fit them.
        """
        vec_normalize = model.get_vec_normalize_env()
        units = learner_units(model.observation_space, normalized=vec_normalize is not None and vec_normalize.norm_obs)
        threat = check_epsilon(epsilon, norm)
        threat = threat if isinstance(epsilon, ThreatModel) else replace(threat, units=units)
        transposed = is_vecenv_wrapped(model.get_env(), VecTransposeImage) if model.get_env() is not None else False
        if transposed and (threat.mask is not None or threat.scale is not None):
            raise ValueError(
                "epsilon must have no mask and no scale for images with channels last, which the learner sees with channels first: "
                "transpose them in the environment"
            )
        around = cls.of(threat, model.observation_space, units)
        return replace(around, scale=around.scale.to(model.device))

    def region(self, observations: Tensor) -> Region:
        """For bounds; (n, *shape). The range of pixels counts for norm inf only."""
        radii = observations.new_full((len(observations),), self.radius)
        ball = Ball(observations, radii, self.norm, self.scale.to(observations)[None])
        if self.norm != math.inf or self.pixels is None:
            return ball
        low, high = self.pixels
        return ball.box().monotone(lambda end: end.clamp(low, high))

    def normals(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Gaussian numbers (n, *shape) for the entries that can change."""
        return torch.randn(observations.shape, generator=generator, device=observations.device) * (self.scale > 0)

    def inside(self, e: Tensor) -> Tensor:
        """The nearest points of the ball."""
        return project(e, e.new_full((len(e),), self.radius), self.norm)

    def reached(self, observations: Tensor, e: Tensor) -> Tensor:
        """Where points of the ball lead, in the range of pixels."""
        return moved(observations, self.scale * e, self.pixels)


def check_threat(threat: ThreatModel) -> ThreatModel:
    """Return a threat model that robust training can take.

    Raises:
        ValueError: if it has no radius per step, an episode budget, or norm 0.
    """
    if threat.norm == 0 or threat.step is None or not math.isfinite(threat.step) or threat.episode is not None:
        raise ValueError(f"epsilon must be a radius per step of norm 1, 2 or inf without an episode budget, got {threat}")
    return threat


def check_epsilon(epsilon: float | ThreatModel, norm: float | str | None = None) -> ThreatModel:
    """A threat model that robust training can take, of one, or of a number and a norm.

    Raises:
        ValueError: if they do not go together, or the threat model does not fit; see `check_threat`.
    """
    if isinstance(epsilon, ThreatModel):
        if norm is not None:
            raise ValueError(f"norm must be None beside a ThreatModel, which has its own, got {norm!r}")
        return check_threat(epsilon)
    check_choice("norm", norm, (None, *NORMS))
    radius = check_real("epsilon", epsilon, allowed="a finite number >= 0, or a ThreatModel")
    if radius < 0:
        raise ValueError(f"epsilon must be a finite number >= 0, or a ThreatModel, got {epsilon}")
    return ThreatModel(NORMS[norm or "inf"], radius)


def scale_of(threat: ThreatModel, shape: tuple[int, ...]) -> Tensor:
    """A threat model's scale where its mask allows a change, 0 elsewhere; float32, (*shape)."""
    scales = threat.scales(shape)
    return torch.from_numpy(np.array(threat.attackable(shape) * (1.0 if scales is None else scales), dtype=np.float32))


def learner_units(space: spaces.Space[Any], *, normalized: bool) -> Units:
    """In which units a learner has its observations.

    Args:
        space: of the observations, as the learner stores them.
        normalized: whether a VecNormalize is between them and the environment.
    Raises:
        ValueError: for dictionaries and other spaces than a Box.
    """
    if not isinstance(space, spaces.Box):
        raise ValueError(f"robust training needs observations from a Box space, got {space}")
    if is_uint8_image(space):
        return "uint8"
    unit = len(space.shape) > 1 and space.dtype.kind == "f" and bool(np.all(space.high == 1))
    return "unit01" if unit else "normalized" if normalized else "raw"


class Measure(Protocol):
    """How far a policy is from what it should do, row by row; computed from what it does on the true observations."""

    def at(self, scores: Tensor) -> Tensor:
        """For scores (n, n_scores); (n,)."""

    def over(self, region: Region) -> Tensor:
        """An upper bound for all scores of a region; (n,)."""


class Solver(ABC):
    """Finds or bounds the largest measure in a neighbourhood."""

    @abstractmethod
    def largest(
        self, policy: PolicyView, observations: Tensor, measure: Measure, around: Neighbourhood, generator: torch.Generator
    ) -> Tensor:
        """One value per row, (n,), with gradients of the policy's parameters."""


@dataclass(frozen=True)
class Ascent(Solver):
    """Projected gradient ascent from a random start: a lower bound of the maximum, at a policy's real output.

    Args:
        steps: gradient steps.
        rate: length of a step, times steps / radius.
        temperature: for SGLD: Gaussian noise of standard deviation sqrt(2 * temperature * length of a step) on every gradient, before
            its signs or direction are taken; 0 for none (PGD).

    Source: SGLD as in Zhang et al. (NeurIPS 2020), arXiv:2003.08938. At the true observation a divergence has no gradient, so the
    start is one step away.
    """

    steps: int = 10
    rate: float = 2.5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_positive("rate", self.rate)
        if check_real("temperature", self.temperature) < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")

    def largest(
        self, policy: PolicyView, observations: Tensor, measure: Measure, around: Neighbourhood, generator: torch.Generator
    ) -> Tensor:
        return measure.at(policy.scores(self.find(policy, observations, measure, around, generator)))

    def find(
        self, policy: PolicyView, observations: Tensor, measure: Measure, around: Neighbourhood, generator: torch.Generator
    ) -> Tensor:
        """The worst observations found, (n, *shape); nobody's gradient changes."""
        step = self.rate * around.radius / self.steps
        noise = math.sqrt(2 * self.temperature * step)
        e = around.inside(step * ascent(around.normals(observations, generator), around.norm))
        for _ in range(self.steps):
            found = around.reached(observations, e).requires_grad_()
            (slope,) = torch.autograd.grad(measure.at(policy.scores(found)).sum(), found)
            slope = unblocked(around.scale * slope, found.detach(), around.pixels)
            if noise:
                slope = slope + noise * around.normals(observations, generator)
            e = around.inside(e + step * ascent(slope, around.norm))
        return around.reached(observations, e)


@dataclass(frozen=True)
class IBP(Solver):
    """Interval bound propagation: an upper bound of the maximum, for a few forward passes; loose for deep networks."""

    def largest(
        self, policy: PolicyView, observations: Tensor, measure: Measure, around: Neighbourhood, generator: torch.Generator
    ) -> Tensor:
        return measure.over(propagate(policy, around.region(observations)))
