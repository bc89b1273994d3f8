"""How well a network does under attack, and how well it provably does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustrl.certify.lipschitz import LipschitzScores
from robustrl.errors import CertificateViolationError, check_count
from robustrl.rollouts.executor import one_thread
from robustrl.training.supervised.attacks import FGSMRS, PGD, Bounds, InnerAttack, Region, RowLosses
from robustrl.training.supervised.examples import Examples
from robustrl.training.supervised.losses import CrossEntropy, Loss

BATCH = 1024
TARGETS = 3
"""Other classes that targeted attacks go for, the most likely first."""
SLACK = 1 + 1e-6
"""What float32 can add to the norm of a perturbation."""


@dataclass(frozen=True)
class RobustReport:
    """Shares of examples that a network gets right.

    Attributes:
        clean: as they are.
        fgsm: also after one step of attack (FGSM-RS).
        pgd: also after every attack tried: an upper bound of the share that no attack changes, and optimistic if weights were chosen by it.
        certified: provably under every attack within epsilon; None without a proof for this network.
        n: number of examples.
        epsilon, norm: of the attacks.
    """

    clean: float
    fgsm: float
    pgd: float
    certified: float | None
    n: int
    epsilon: float
    norm: float

    def standard_error(self, name: str = "pgd") -> float:
        """Of one of the shares, over the draw of the examples: sqrt(p (1 - p) / n)."""
        share = getattr(self, name)
        return math.sqrt(share * (1 - share) / self.n)


@contextmanager
def attacking(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Inside, weights need no gradients and, unless `training`, layers are in evaluation mode: an attack leaves no trace in them."""
    modes = [(layer, layer.training) for layer in module.modules()]
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        if not training:
            module.eval()
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for layer, mode in modes:
            layer.training = mode


@dataclass(frozen=True)
class Trial:
    """Attacks with the same random numbers whenever they are run: what is compared differs in the network alone.

    Attributes:
        region: where they may go.
        loss: what they climb, and what is right.
        steps, restarts: of PGD.
        targeted: climb the margins of the most likely other classes too.
        seed: of random starts.
    """

    region: Region
    loss: Loss
    steps: int = 10
    restarts: int = 1
    targeted: bool = False
    seed: int = 0

    def run(self, module: nn.Module, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Which examples are right as they are, also after FGSM-RS, and also after every other attack; boolean (n,)."""
        with attacking(module):
            parts = [self._batch(module, x, targets, generator) for x, targets, generator in self._batches(examples)]
        clean, fgsm, pgd = (torch.cat(part) for part in zip(*parts, strict=True))
        return clean, fgsm, pgd

    def cosine(self, module: nn.Module, examples: Examples) -> float:
        """Mean of `alignment`; NaN if every gradient is zero."""
        with attacking(module):
            parts = [
                alignment(self.region, self._losses(module, targets), x, generator)
                for x, targets, generator in self._batches(examples)
            ]
        return float(torch.cat(parts).nanmean())

    def _batches(self, examples: Examples) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        device = examples.inputs.device
        generator = torch.Generator(device).manual_seed(self.seed)
        for rows in torch.split(torch.arange(len(examples), device=device), BATCH):
            yield *examples.batch(rows), generator

    def _losses(self, module: nn.Module, targets: Tensor) -> RowLosses:
        return lambda point: self.loss.rows(module(point), targets)

    def _batch(
        self, module: nn.Module, x: Tensor, targets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            scores = module(x)
        clean = self.loss.correct(scores, targets)

        def survives(attack: InnerAttack, climbed: RowLosses) -> Tensor:
            delta = attack.within(self.region, climbed, x, generator)
            with torch.no_grad():
                return self.loss.correct(module(x + delta), targets)

        climb, losses = PGD(self.steps), self._losses(module, targets)
        pgd = fgsm = clean & survives(FGSMRS(), losses)
        for _ in range(self.restarts):
            pgd = pgd & survives(climb, losses)
        labels = self.loss.labels(targets) if self.targeted else None
        if labels is not None:
            right = labels[:, None]
            others = scores.scatter(1, right, -math.inf).topk(min(TARGETS, scores.shape[1] - 1)).indices
            for other in torch.split(others, 1, 1):
                pgd = pgd & survives(climb, _margins(module, right, other))
        return clean, fgsm, pgd


def _margins(module: nn.Module, right: Tensor, other: Tensor) -> RowLosses:
    """How far another class is above the right one; both (n, 1)."""

    def margins(point: Tensor) -> Tensor:
        scores = module(point)
        difference: Tensor = scores.gather(1, other) - scores.gather(1, right)
        return difference.squeeze(1)

    return margins


def alignment(
    region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator, *, differentiable: bool = False
) -> Tensor:
    """Cosines between loss gradients at inputs and at random points of the ball, (n,); NaN where one is zero.

    Near 1, losses are as good as linear in the ball and one step of attack does what many do; at a catastrophic overfitting they fall
    to 0.

    Args:
        region: the ball.
        loss_of: from inputs to losses, row by row.
        x: inputs (n, *shape).
        generator: of the points.
        differentiable: in the network's weights.
    Source: Andriushchenko, Flammarion (NeurIPS 2020), arXiv:2007.02617.
    """
    gradients = []
    for point in (x, x + region.random(x, 1, generator)):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_of(point).sum(), point, create_graph=differentiable)
        gradients.append((gradient if region.scale is None else gradient * region.scale).flatten(1))
    one, other = gradients
    alive = (one.detach() != 0).any(1) & (other.detach() != 0).any(1)
    # Rows without gradient leave before the division: NaN times zero would be NaN in the gradient of the rest.
    cosines = functional.cosine_similarity(one[alive], other[alive], dim=1)
    return torch.full_like(one[:, 0], math.nan).masked_scatter(alive, cosines)


def evaluate(
    module: nn.Module,
    examples: Examples,
    loss: Loss | None = None,
    epsilon: float = 0.1,
    norm: float | str = "inf",
    bounds: Bounds = None,
    mask: Tensor | None = None,
    *,
    steps: int = 20,
    restarts: int = 3,
    targeted: bool = True,
    seed: int = 0,
) -> RobustReport:
    """How many examples a network gets right clean, under attack, and, where its Lipschitz constant is known, provably.

    Args:
        module: from inputs (n, *shape) to scores (n, m); stays as it is, but for gradients, which are not touched either.
        examples: unseen ones.
        loss: what attacks climb; default `CrossEntropy()`.
        epsilon, norm, bounds, mask: see `InnerAttack.perturb`.
        steps: of PGD; a step is epsilon / 4 long.
        restarts: random starts.
        targeted: climb the margins to the three most likely other classes as well.
        seed: of random starts, the same at every call.
    Raises:
        ValueError: if an argument is out of range, or a weight is not finite.
        CertificateViolationError: if an attack changed what is certified.
    """
    region = Region.of(epsilon, norm, bounds, mask)
    counts = check_count("steps", steps), check_count("restarts", restarts)
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise ValueError("module must have finite weights, got some that are not")
    device = next((parameter.device for parameter in module.parameters()), examples.inputs.device)
    examples, loss = examples.to(device), loss or CrossEntropy()
    with one_thread():
        clean, fgsm, pgd = Trial(region.to(device), loss, *counts, targeted, seed).run(module, examples)
        labels = loss.labels(examples.targets)
        certified = None if labels is None else _certified(module, examples, labels, region)
    if certified is not None and bool((certified & ~pgd).any()):
        row = int(torch.nonzero(certified & ~pgd)[0])
        raise CertificateViolationError(f"example {row} is certified at {norm} radius {epsilon}, but an attack changed it")
    proven = None if certified is None else _share(certified)
    return RobustReport(_share(clean), _share(fgsm), _share(pgd), proven, len(examples), region.epsilon, region.norm)


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _certified(module: nn.Module, examples: Examples, labels: Tensor, region: Region) -> Tensor | None:
    """Which examples are right under every attack, (n,); None for a network without a known Lipschitz constant."""
    reach = region.epsilon * (1.0 if region.scale is None else float(region.scale.max()))
    rows = torch.split(torch.arange(len(examples), device=labels.device), BATCH)
    with attacking(module):
        try:
            scores = LipschitzScores.of(module)
            found = [scores.radii(examples.batch(part)[0], region.norm) for part in rows]
        except TypeError:
            return None
    actions, radii = (torch.from_numpy(np.concatenate(parts)).to(labels.device) for parts in zip(*found, strict=True))
    return (actions == labels) & (radii > reach * SLACK)
