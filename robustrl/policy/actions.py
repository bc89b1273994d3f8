"""Decision rules: from a network's scores to actions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from robustrl.errors import check_choice, check_real

Kind = Literal["logits", "q", "gaussian", "squashed", "deterministic"]
KINDS = ("logits", "q", "gaussian", "squashed", "deterministic")


class ActionRule(ABC):
    """How actions follow from scores (n, n_scores); rows do not depend on each other.

    Attributes:
        space: the actions.
        n_scores: scores per row.
    """

    space: spaces.Discrete | spaces.Box
    n_scores: int

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """The random numbers that `n` sampled actions need, (n, m)."""

    @abstractmethod
    def choose(self, scores: Tensor, draws: Tensor | None) -> Tensor:
        """Actions (n, ...) of scores; greedy without draws. A row whose scores are not finite has no valid action."""

    @abstractmethod
    def deliver(self, actions: NDArray[Any]) -> NDArray[Any]:
        """What an environment's `step` takes of chosen actions: (n,) int64, or (n, *shape) in the space's dtype.

        Raises:
            ValueError: if a row has no valid action.
        """

    def parameters(self) -> tuple[Any, ...]:
        """What tells two rules of one kind apart, for fingerprints."""
        return ()


def refuse_broken(broken: Any) -> None:
    """Raise ValueError where scores were NaN or inf."""
    if broken:
        raise ValueError("the policy's scores must be finite, got NaN or inf: weights or observations are broken")


class DiscreteRule(ActionRule):
    """One of finitely many actions."""

    space: spaces.Discrete

    def __init__(self, n_actions: int) -> None:
        self.space, self.n_scores = spaces.Discrete(n_actions), n_actions

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.rand(n, 2, generator=generator, device=device)

    def choose(self, scores: Tensor, draws: Tensor | None) -> Tensor:
        actions = scores.argmax(-1) if draws is None else self.sample(scores, draws)
        return torch.where(torch.isfinite(scores).all(-1), actions, -1)

    @abstractmethod
    def sample(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        """Random actions from independent U[0, 1) draws (n, 2)."""

    def deliver(self, actions: NDArray[Any]) -> NDArray[Any]:
        refuse_broken((actions < 0).any())
        return actions


class Categorical(DiscreteRule):
    """Scores are logits."""

    def sample(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        return (cumulative <= uniforms[:, :1].double()).sum(-1).clamp_(max=self.n_scores - 1)


class EpsilonGreedy(DiscreteRule):
    """Scores are action values; a sampled action is uniformly random with probability `exploration`."""

    def __init__(self, n_actions: int, exploration: float = 0.0) -> None:
        super().__init__(n_actions)
        self.exploration = check_real("exploration", exploration, allowed="a probability in [0, 1]")
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration must be a probability in [0, 1], got {exploration}")

    def sample(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        random_action = (uniforms[:, 1] * self.n_scores).long().clamp_(max=self.n_scores - 1)
        return torch.where(uniforms[:, 0] < self.exploration, random_action, scores.argmax(-1))


class ContinuousRule(ActionRule):
    """Actions in a bounded or unbounded Box; scores are (flat) parameters of their distribution."""

    space: spaces.Box
    scores_per_entry = 2

    def __init__(self, space: spaces.Box) -> None:
        self.space, self.size = space, math.prod(space.shape)
        self.n_scores = self.scores_per_entry * self.size
        self._low, self._high = (torch.from_numpy(bound.reshape(-1).astype(np.float32)) for bound in (space.low, space.high))

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest action, (size,), on the device of `like`."""
        return self._low.to(like.device), self._high.to(like.device)

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.randn(n, self.size, generator=generator, device=device)

    @abstractmethod
    def mean(self, scores: Tensor) -> Tensor:
        """The greedy action before clipping, in the environment's units, differentiable; (n, size)."""

    def choose(self, scores: Tensor, draws: Tensor | None) -> Tensor:
        low, high = self.bounds(scores)
        actions = torch.clamp(self.mean(scores) if draws is None else self.sample(scores, draws), low, high)
        return torch.where(torch.isfinite(scores).all(-1, keepdim=True), actions, torch.nan)

    def sample(self, scores: Tensor, normals: Tensor) -> Tensor:
        """Random actions before clipping, from independent N(0, 1) draws (n, size)."""
        mean, log_std = scores.chunk(2, dim=-1)
        return self.mean(torch.cat((mean + log_std.exp() * normals, log_std), dim=-1))

    def deliver(self, actions: NDArray[Any]) -> NDArray[Any]:
        refuse_broken(not np.isfinite(actions).all())
        rows = actions.reshape(len(actions), *self.space.shape).astype(self.space.dtype, copy=False)
        return np.clip(rows, self.space.low, self.space.high)  # float32 bounds can lie outside those of a double space

    def parameters(self) -> tuple[Any, ...]:
        return (self.space.shape, self._low.tolist(), self._high.tolist())


class GaussianRule(ContinuousRule):
    """Scores are mean and log standard deviation of a Gaussian; actions are clipped to the space."""

    def mean(self, scores: Tensor) -> Tensor:
        return scores[:, : self.size]


class SquashedGaussianRule(ContinuousRule):
    """A Gaussian squashed by tanh and scaled to the (bounded) space."""

    def mean(self, scores: Tensor) -> Tensor:
        low, high = self.bounds(scores)
        return low + 0.5 * (torch.tanh(scores[:, : self.size]) + 1) * (high - low)


class DirectRule(ContinuousRule):
    """Scores are the action itself, clipped to the space; there is nothing to sample."""

    scores_per_entry = 1

    def mean(self, scores: Tensor) -> Tensor:
        return scores

    def sample(self, scores: Tensor, normals: Tensor) -> Tensor:
        return scores


def action_rule(kind: Kind, n_scores: int, *, exploration: float = 0.0, space: spaces.Box | None = None) -> ActionRule:
    """The rule of a kind of network.

    Args:
        kind: "logits" or "q" for discrete actions; "gaussian" (mean and log std), "squashed" (the same before a tanh) or
            "deterministic" for continuous ones.
        n_scores: scores per row that the network gives.
        exploration: for "q".
        space: the action space, for continuous kinds.
    Raises:
        ValueError: if they do not fit each other.
    """
    check_choice("kind", kind, KINDS)
    if kind in ("logits", "q"):
        return Categorical(n_scores) if kind == "logits" else EpsilonGreedy(n_scores, exploration)
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        raise ValueError(f"a policy of kind {kind!r} needs action_space=, a Box of floats, got {space}")
    if kind == "squashed" and not space.is_bounded():
        raise ValueError(f"a squashed policy needs a bounded action space, got {space}")
    continuous: dict[str, Any] = {"gaussian": GaussianRule, "squashed": SquashedGaussianRule, "deterministic": DirectRule}
    rule: ContinuousRule = continuous[kind](space)
    if rule.n_scores != n_scores:
        raise ValueError(
            f"a policy of kind {kind!r} over {space} needs {rule.n_scores} scores per row, the network gives {n_scores}"
        )
    return rule
