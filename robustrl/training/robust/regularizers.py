"""Terms that are added to a learner's loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustrl.errors import check_count, check_positive, check_real
from robustrl.networks.bounds import Region, propagate
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.training.robust.neighbourhood import Ascent, Measure, Neighbourhood, Solver


@dataclass(frozen=True)
class Minibatch:
    """What a learner is about to take a step for.

    Attributes:
        observations: as its network takes them, float, (n, *shape).
        actions: (n,) int64, or (n, size).
        advantages: of an actor-critic learner, as its loss has them, (n,).
        old_log_prob: of the actions when they were taken, (n,).
        clip_range: PPO's.
        target: gives the target network's scores (n, n_scores) for the observations, of a Q learner.
    """

    observations: Tensor
    actions: Tensor | None = None
    advantages: Tensor | None = None
    old_log_prob: Tensor | None = None
    clip_range: float = 0.2
    target: Callable[[], Tensor] | None = None

    def needed(self, *names: str) -> list[Tensor]:
        """Attributes by name.

        Raises:
            ValueError: if the learner has no such thing.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"the minibatch must have {', '.join(missing)} for this loss")
        return [getattr(self, name) for name in names]


class Regularizer(ABC):
    """A term of the loss of `SAPPO` and `SADQN`."""

    kinds: ClassVar[tuple[str, ...]]
    """Of policies that it has a meaning for; see `PolicyView`."""

    def check(self, policy: PolicyView) -> None:
        """Raise ValueError if it has no meaning for this policy."""
        if policy.kind not in self.kinds:
            raise ValueError(
                f"loss {type(self).__name__} needs a policy whose scores are {' or '.join(self.kinds)}, got {policy.kind!r}"
            )

    @abstractmethod
    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        """A scalar, with gradients of the policy's parameters; it draws from `generator` alone and changes nobody's gradient."""


@dataclass(frozen=True)
class StateAdversarial(Regularizer):
    """The state-adversarial loss of SA-PPO and SA-DQN: what the policy does shall not change within the neighbourhood.

    The mean over observations s of the largest value in the neighbourhood x of
    KL(pi(s) || pi(x)) for logits; 1/2 ||(mu(x) - mu(s)) / sigma||^2 for Gaussian policies, where sigma has no gradient, so that more
    exploration is no way out; max(-hinge, max_{a != a*} Q_a(x) - Q_{a*}(x)) with a* = argmax Q(s) for action values.

    Args:
        solver: `Ascent` (from below) or `IBP` (from above).
        hinge: for action values, how much of a lead is enough.

    Source: Zhang et al., "Robust Deep Reinforcement Learning against Adversarial Perturbations on State Observations" (NeurIPS 2020),
        arXiv:2003.08938.
    """

    solver: Solver = field(default_factory=Ascent)
    hinge: float = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("logits", "gaussian", "q")

    def __post_init__(self) -> None:
        check_positive("hinge", self.hinge)

    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        measure = MEASURES[policy.kind](policy.scores(batch.observations))
        found = self.solver.largest(policy, batch.observations, measure, around, generator)
        return (found.clamp_min(-self.hinge) if policy.kind == "q" else found).mean()


@dataclass(frozen=True)
class Divergence(Measure):
    """KL(pi(s) || pi(x)) of logits."""

    clean: Tensor

    def at(self, scores: Tensor) -> Tensor:
        logs, clean = scores.log_softmax(-1), self.clean.log_softmax(-1)
        return (clean.exp() * (clean - logs)).sum(-1)

    def over(self, region: Region) -> Tensor:
        clean, lowest = self.clean.log_softmax(-1), -region.differences().high.logsumexp(-1)
        return (clean.exp() * (clean - lowest)).sum(-1)


@dataclass(frozen=True)
class Distance(Measure):
    """1/2 ||(mu(x) - mu(s)) / sigma||^2 of means and log standard deviations."""

    clean: Tensor

    def _cost(self, shift: Tensor) -> Tensor:
        log_std = self.clean.chunk(2, dim=-1)[1].detach()
        return 0.5 * (shift / log_std.exp()).square().sum(-1)

    def at(self, scores: Tensor) -> Tensor:
        return self._cost(scores.chunk(2, dim=-1)[0] - self.clean.chunk(2, dim=-1)[0])

    def over(self, region: Region) -> Tensor:
        box, mean = region.box(), self.clean.chunk(2, dim=-1)[0]
        low, high = (end.chunk(2, dim=-1)[0] for end in (box.low, box.high))
        return self._cost(torch.maximum(mean - low, high - mean))


@dataclass(frozen=True)
class Lead(Measure):
    """max_{a != a*} Q_a(x) - Q_{a*}(x): the lead of the best other action, negative where the clean one stays the best."""

    clean: Tensor

    def at(self, scores: Tensor) -> Tensor:
        best = self.clean.argmax(-1, keepdim=True)
        return (scores - scores.gather(-1, best)).scatter(-1, best, -torch.inf).amax(-1)

    def over(self, region: Region) -> Tensor:
        best = self.clean.argmax(-1, keepdim=True)
        over_best = region.differences().high[torch.arange(len(best), device=best.device), best[:, 0]]
        return over_best.scatter(-1, best, -torch.inf).amax(-1)


MEASURES: dict[str, Callable[[Tensor], Measure]] = {"logits": Divergence, "gaussian": Distance, "q": Lead}


@dataclass(frozen=True)
class Margin(Regularizer):
    """CAMP's margin loss: a larger gap between the two best actions, which is what a smoothed agent's certificate lives on.

    mean(eta - (Q_1 - Q_2)) over observations on which the greedy action is the target network's; eta, the difference of the batch's
    largest and smallest value and never below a gap, is a constant here. The neighbourhood does not matter.

    Source: "CAMP in the Odyssey: Provably Robust Reinforcement Learning with Certified Radius Maximization" (USENIX Security 2025),
        arXiv:2501.17667; its code adds the term with a weight of 0.5 to 16, 1 by default.
    """

    kinds: ClassVar[tuple[str, ...]] = ("q",)

    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        scores = policy.scores(batch.observations)
        eta = (scores.amax() - scores.amin()).detach()
        best, second = scores.topk(2, dim=-1).values.unbind(-1)
        counted = torch.ones_like(best)
        if batch.target is not None:
            counted = (scores.argmax(-1) == batch.target().argmax(-1)).to(scores)
        return (counted * (eta - (best - second))).sum() / counted.sum().clamp_min(1)


@dataclass(frozen=True)
class Consistency(Regularizer):
    """Noisy copies of an observation shall be answered alike: consistency regularisation for smoothed policies.

    Logits and action values: the mean of KL(p || p_i) over `copies` noisy copies, with p the mean of their softmax
    distributions p_i, plus `entropy` times the entropy of p. Gaussian policies: the mean of 1/2 ||(mu_i - mu) / sigma||^2. The
    neighbourhood does not matter: the noise takes its place.

    Args:
        noise: that the agent will be smoothed with.
        copies: at least 2.
        entropy: weight of the entropy, relative to the first term. The paper has 0.5 beside a first term of weight 10 to 20; here the
            default is 0, since it works against exploration.

    Source: Jeong and Shin, "Consistency Regularization for Certified Robustness of Smoothed Classifiers" (NeurIPS 2020),
        arXiv:2006.04062.
    """

    noise: Noise
    copies: int = 2
    entropy: float = 0.0
    kinds: ClassVar[tuple[str, ...]] = ("logits", "q", "gaussian")

    def __post_init__(self) -> None:
        if not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a robustrl.noise mechanism, e.g. Gaussian(0.2), got {self.noise!r}")
        check_count("copies", self.copies, least=2)
        if check_real("entropy", self.entropy) < 0:
            raise ValueError(f"entropy must be >= 0, got {self.entropy}")

    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        copies = batch.observations.repeat(self.copies, *(1,) * (batch.observations.ndim - 1))
        scores = torch.stack(policy.scores(self.noise.perturb(copies, generator)).chunk(self.copies))
        if policy.kind == "gaussian":
            mean, log_std = scores.chunk(2, dim=-1)
            return 0.5 * ((mean - mean.mean(0)) / log_std.detach().exp()).square().sum(-1).mean()
        logs = scores.log_softmax(-1)
        log_mean = logs.logsumexp(0) - math.log(self.copies)
        divergence = (log_mean.exp() * (log_mean - logs)).sum(-1).mean()
        return divergence - self.entropy * (log_mean.exp() * log_mean).sum(-1).mean()


@dataclass(frozen=True)
class Overlap(Regularizer):
    """RADIAL for action values: bounds of better and worse actions shall not overlap, weighted by how much it would matter.

    The mean over observations of sum_b d_b max(0, high_b - low_a + d_b / 2) with d_b = max(0, Q_a - Q_b) without gradient, a the
    action that was taken and [low, high] IBP bounds in the neighbourhood. high_b - low_a is bounded as one difference.

    Source: Oikarinen et al., "Robust Deep Reinforcement Learning through Adversarial Loss" (NeurIPS 2021), arXiv:2008.01976, approach 2.
    """

    kinds: ClassVar[tuple[str, ...]] = ("q",)

    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        (actions,) = batch.needed("actions")
        rows = torch.arange(len(actions), device=actions.device)
        scores = policy.scores(batch.observations).detach()
        worse = (scores[rows, actions][:, None] - scores).clamp_min(0.0)
        over_taken = propagate(policy, around.region(batch.observations)).differences().high[rows, actions]
        return (worse * (over_taken + worse / 2).clamp_min(0.0)).sum(-1).mean()


@dataclass(frozen=True)
class WorstSurrogate(Regularizer):
    """RADIAL for PPO: the clipped surrogate at the worst log-probability that IBP allows in the neighbourhood.

    Minus the mean over the batch of min over r in {pi_low / pi_old, pi_high / pi_old} of min(r A, clip(r) A); advantages A are
    normalised once, as PPO's own. A weight kappa beside PPO's loss is what the paper writes as 1 / (1 + kappa) and
    kappa / (1 + kappa); half and half is kappa = 1.

    Source: Oikarinen et al. (NeurIPS 2021), arXiv:2008.01976, appendix on RADIAL-PPO.
    """

    kinds: ClassVar[tuple[str, ...]] = ("logits", "gaussian")

    def loss(self, policy: PolicyView, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        actions, advantages, old_log_prob = batch.needed("actions", "advantages", "old_log_prob")
        region = propagate(policy, around.region(batch.observations))
        clipped = (1 - batch.clip_range, 1 + batch.clip_range)
        worst = torch.full_like(advantages, torch.inf)
        for log_prob in LOG_PROBABILITIES[policy.kind](region, actions):
            ratio = (log_prob - old_log_prob).exp()
            for factor in (ratio, ratio.clamp(*clipped)):
                worst = torch.minimum(worst, factor * advantages)
        return -worst.mean()


def categorical_log_probabilities(region: Region, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (n,) of the log-probability of actions (n,), over a region of logits."""
    apart, rows = region.differences(), torch.arange(len(actions), device=actions.device)
    return -apart.high[rows, actions].logsumexp(-1), -apart.low[rows, actions].logsumexp(-1)


def gaussian_log_probabilities(region: Region, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (n,) of the log-density of actions (n, size), over a region of means and log standard deviations.

    The farthest and the nearest mean of the box to the action; the standard deviations are the same everywhere.
    """
    box = region.box()
    (low, log_std), (high, _) = box.low.chunk(2, dim=-1), box.high.chunk(2, dim=-1)
    farthest = torch.where((actions - low).abs() > (actions - high).abs(), low, high)
    nearest = torch.maximum(torch.minimum(actions, high), low)

    def log_density(mean: Tensor) -> Tensor:
        return (-0.5 * ((actions - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    return log_density(farthest), log_density(nearest)


LOG_PROBABILITIES: dict[str, Callable[[Region, Tensor], tuple[Tensor, Tensor]]] = {
    "logits": categorical_log_probabilities,
    "gaussian": gaussian_log_probabilities,
}
