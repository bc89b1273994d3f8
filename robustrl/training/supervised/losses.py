"""What a network is to output: a class, a demonstrator's action, or a teacher's scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from robustrl.errors import check_choice, check_positive, check_real


class Loss(ABC):
    """How wrong a network's scores are, row by row; the attack climbs what training descends.

    `CrossEntropy` and the like only say what is wrong with scores. `TRADES` also uses the scores of the clean inputs, `needs_clean`.
    """

    needs_clean = False
    """Whether training uses the scores of clean inputs."""

    @abstractmethod
    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Losses (n,) of scores (n, m)."""

    @abstractmethod
    def labels(self, targets: Tensor) -> Tensor | None:
        """The wanted classes (n,); None for targets that are none."""

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Whether the greedy decision is the wanted one, (n,), boolean. Scores that are not finite are wrong."""
        wanted = self.labels(targets)
        assert wanted is not None
        return (scores.argmax(1) == wanted) & scores.isfinite().all(1)

    def divergence(self, clean: Tensor, scores: Tensor) -> Tensor:
        """How far scores are from those of the clean inputs, (n,)."""
        return _divergence(functional.log_softmax(clean, 1), functional.log_softmax(scores, 1))

    def climbed(self, scores: Tensor, targets: Tensor, clean: Tensor | None) -> Tensor:
        """What an attack on training climbs, (n,); `clean` are scores of the clean inputs, without gradients, if needed."""
        return self.rows(scores, targets)

    def descended(self, scores: Tensor, targets: Tensor, clean: Tensor | None) -> Tensor:
        """What training descends, (n,): scores of attacked inputs, and of clean ones if needed."""
        return self.rows(scores, targets)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergences (n,) of log-probabilities (n, m)."""
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def _offset(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Scores with sqrt(2) * margin less for the wanted class: what an l2 attacker of that radius can take from a network with
    Lipschitz constant 1."""
    return scores if margin == 0 else scores - math.sqrt(2) * margin * functional.one_hot(labels, scores.shape[1])


def _check_margin(margin: float) -> None:
    if check_real("margin", margin) < 0:
        raise ValueError(f"margin must be >= 0, got {margin}")


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of softmax(scores / temperature), after the wanted score was lowered by sqrt(2) * margin.

    Args:
        temperature: > 0; below 1 where scores are small, as those of networks with Lipschitz constant 1.
        margin: certified radius to train for, in l2 and units of the inputs, >= 0; for networks with Lipschitz constant 1.
    Source: the margin is that of Prach et al. (CVPR 2024), arXiv:2311.16833, and of Tsuzuku et al. (NeurIPS 2018), arXiv:1802.04034.
    """

    temperature: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        _check_margin(self.margin)

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(_offset(scores, targets, self.margin) / self.temperature, targets, reduction="none")

    def labels(self, targets: Tensor) -> Tensor:
        return targets

    def divergence(self, clean: Tensor, scores: Tensor) -> Tensor:
        return super().divergence(clean / self.temperature, scores / self.temperature)


@dataclass(frozen=True)
class Cloning(Loss):
    """Behaviour cloning: cross-entropy of discrete actions, mean squared error of continuous ones.

    Args:
        tolerance: continuous actions count as right if no entry is farther off, > 0; discrete ones if they are the same.
    """

    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return (scores - targets).square().mean(1)
        return functional.cross_entropy(scores, targets, reduction="none")

    def labels(self, targets: Tensor) -> Tensor | None:
        return None if targets.is_floating_point() else targets

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return (scores - targets).abs().amax(1) <= self.tolerance  # False for NaN
        return super().correct(scores, targets)

    def divergence(self, clean: Tensor, scores: Tensor) -> Tensor:
        # Unlike softmax's, this gives the same for continuous actions and for scores, whose scale is the demonstrator's.
        return (scores - clean).square().mean(1)


@dataclass(frozen=True)
class Distillation(Loss):
    """Kullback-Leibler divergence from a teacher's softmax(scores / temperature); its greedy action is what is correct.

    Args:
        temperature: > 0; small ones make a teacher's preferences sharp.
        kind: "q": the student's scores are values in the teacher's units, softmax(scores / temperature) too. "logits": they are
            logits, softmax(scores).
        margin: lowers the student's score of the teacher's greedy action by sqrt(2) * margin, see `CrossEntropy`.
    Source: Rusu et al. (ICLR 2016), arXiv:1511.06295; under attack: Fischer et al. (2019), arXiv:1911.00756.
    """

    temperature: float = 1.0
    kind: str = "q"
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("kind", self.kind, ("q", "logits"))
        _check_margin(self.margin)

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        wanted = functional.log_softmax(targets / self.temperature, 1)
        return _divergence(wanted, self._logs(_offset(scores, targets.argmax(1), self.margin)))

    def labels(self, targets: Tensor) -> Tensor:
        return targets.argmax(1)

    def divergence(self, clean: Tensor, scores: Tensor) -> Tensor:
        return _divergence(self._logs(clean), self._logs(scores))

    def _logs(self, scores: Tensor) -> Tensor:
        return functional.log_softmax(scores / self.temperature if self.kind == "q" else scores, 1)


@dataclass(frozen=True)
class TRADES(Loss):
    """A loss on clean inputs, and `beta` times how far attacked scores are from clean ones, which is also what the attack climbs.

    That divergence has no gradient at the clean input: attacks must start elsewhere, as all of ours do.

    Args:
        loss: on clean inputs.
        beta: weight, > 0.
    Source: Zhang et al. (ICML 2019), arXiv:1901.08573.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    beta: float = 6.0

    needs_clean = True

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss) or self.loss.needs_clean:
            raise ValueError(f"loss must be one of scores alone, got {self.loss!r}")
        check_positive("beta", self.beta)

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self.loss.rows(scores, targets)

    def labels(self, targets: Tensor) -> Tensor | None:
        return self.loss.labels(targets)

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self.loss.correct(scores, targets)

    def divergence(self, clean: Tensor, scores: Tensor) -> Tensor:
        return self.loss.divergence(clean, scores)

    def climbed(self, scores: Tensor, targets: Tensor, clean: Tensor | None) -> Tensor:
        assert clean is not None
        return self.divergence(clean, scores)

    def descended(self, scores: Tensor, targets: Tensor, clean: Tensor | None) -> Tensor:
        assert clean is not None
        return self.rows(clean, targets) + self.beta * self.divergence(clean, scores)
