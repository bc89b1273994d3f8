"""Robust training of a network on examples: attack a batch, learn from it, and keep the weights that are robust on a hold-out."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robustrl.errors import check_choice, check_count, check_positive, check_real
from robustrl.rollouts.executor import one_thread
from robustrl.rollouts.progress import progress_bar as bar
from robustrl.threat import ThreatModel
from robustrl.training.objectives import set_rate
from robustrl.training.robust.neighbourhood import check_threat, scale_of
from robustrl.training.supervised.attacks import Bounds, InnerAttack, NoAttack, Region, check_attack
from robustrl.training.supervised.evaluation import Trial, alignment, attacking
from robustrl.training.supervised.examples import Examples
from robustrl.training.supervised.guard import CollapseGuard, EarlyStopping
from robustrl.training.supervised.history import Evaluation, RobustFit, Scalars, scalars
from robustrl.training.supervised.losses import TRADES, CrossEntropy, Loss
from robustrl.training.supervised.weights import Average, Snapshot, adversarial_weights, copied, optimizer_for, rate_at

HELD_OUT = 1000
"""Examples of the hold-out that are attacked, at most."""


@dataclass(frozen=True, eq=False)
class RobustTrainer:
    """Trains any torch module from inputs (n, *shape) to scores (n, m) to be right under attack.

    Args:
        attack: "none", "fgsm-rs", "n-fgsm" (the default: as cheap as the former, and steadier), "pgd", or an `InnerAttack`.
        epsilon: radius, >= 0, in units of the inputs; or a `ThreatModel` with a radius per step, which replaces norm and mask.
        norm: 2 or "inf", of a whole input.
        bounds: range (low, high) of inputs, numbers, tensors or arrays (*shape); None for no range.
        mask: entries that may change, boolean (*shape), or their units; see `InnerAttack.perturb`.
        epochs: passes over the examples.
        batch_size: examples per step; a pass has equal batches of this size or a little less.
        learning_rate: the highest.
        optimizer: "adam" or "sgd" (momentum 0.9).
        schedule: of the learning rate: "one-cycle" (up for 30 %, then down to zero), "piecewise" (a tenth from 50 %, a hundredth from
            75 %), or "constant".
        warm_up: share of training over which epsilon rises from 0, in [0, 1).
        weight_decay: of all parameters but the shapes of activations.
        gradalign: weight of 1 - cos(gradient at x, gradient beside x), which keeps one-step attacks honest at about three times their
            cost; best with smooth activations.
        awp: size of adversarial weight perturbations, relative to the weights, e.g. 0.005; one more forward and backward pass.
        ema: decay of a moving average of the weights, e.g. 0.999, which is then evaluated and kept; 0 for none.
        trades: beta of `TRADES`, e.g. 6; None for the loss itself on attacked inputs.
        batch_statistics: attack inputs and weights in training mode, so that batch norm and dropout do what they do in training;
            running statistics then see attacked batches more than once.
        guard: recognise catastrophic overfitting after the warm-up, go back to the best weights and shorten the attack's steps; True,
            False, or a `CollapseGuard`. Plain training has nothing to guard.
        hold_out: share of the episodes to evaluate on, unless `fit` is given others; 0 for none.
        every: epochs between evaluations; fractions will do.
        keep: which weights the module has in the end: "best" or "last".
        patience: evaluations without a better one after which to stop; None for never.
        amp: "bfloat16" for mixed precision in training; evaluations are in full precision.
        seed: of the hold-out, batches and attacks.
        tensorboard: folder for the scalars robust/{clean,pgd,fgsm,gap,cos,alpha,lr,kappa}.
        callbacks: called with every `Evaluation` and the module, which must not be changed; returning False ends training.
    Raises:
        ValueError: if an argument is out of range.
    Sources: see `attacks`, `losses`, `guard` and `weights`.

    Examples:
        >>> RobustTrainer("fgsm-rs", epsilon=0.1, bounds=(0, 1)).attack
        FGSMRS(alpha=1.25)
    """

    attack: str | InnerAttack = "n-fgsm"
    epsilon: float | ThreatModel = 0.1
    norm: float | str = "inf"
    bounds: Bounds = None
    mask: Tensor | None = None
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 5e-3
    optimizer: str = "adam"
    schedule: str = "one-cycle"
    warm_up: float = 0.3
    weight_decay: float = 0.0
    gradalign: float = 0.0
    awp: float = 0.0
    ema: float = 0.0
    trades: float | None = None
    batch_statistics: bool = False
    guard: bool | CollapseGuard = True
    hold_out: float = 0.1
    every: float = 1.0
    keep: str = "best"
    patience: int | None = None
    amp: str | None = None
    seed: int = 0
    tensorboard: str | os.PathLike[str] | None = None
    callbacks: Sequence[Callable[[Evaluation, nn.Module], object]] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", check_attack(self.attack))
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "every"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "gradalign", "awp"):
            if check_real(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("warm_up", "ema", "hold_out"):
            if not 0 <= check_real(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        check_choice("schedule", self.schedule, ("one-cycle", "piecewise", "constant"))
        check_choice("keep", self.keep, ("best", "last"))
        check_choice("amp", self.amp, (None, "bfloat16"))  # half precision would lose the signs of small gradients
        check_count("seed", self.seed, least=0)
        EarlyStopping(self.patience)
        if self.trades is not None and check_positive("trades", self.trades) and isinstance(self.attack, NoAttack):
            raise ValueError("trades needs an attack: without one, clean and attacked scores are the same")
        if not isinstance(self.epsilon, ThreatModel):
            Region.of(self.epsilon, self.norm, self.bounds, self.mask)
        elif self.norm != "inf" or self.mask is not None:
            raise ValueError("norm and mask must be left out beside a ThreatModel, which has its own")

    def region(self, shape: tuple[int, ...]) -> Region:
        """Where attacks on inputs of a shape may go.

        Raises:
            ValueError: if the threat does not fit the shape.
        """
        if not isinstance(self.epsilon, ThreatModel):
            return Region.of(self.epsilon, self.norm, self.bounds, self.mask)
        threat = check_threat(self.epsilon)
        assert threat.step is not None
        whole = threat.mask is None and threat.scale is None
        return Region.of(threat.step, threat.norm, self.bounds, None if whole else scale_of(threat, shape))

    def fit(
        self,
        module: nn.Module,
        examples: Examples,
        loss: Loss | None = None,
        validation: Examples | None = None,
        *,
        progress_bar: bool = False,
    ) -> RobustFit:
        """Train a module in place.

        Args:
            module: from inputs (n, *shape) to scores (n, m); in the end in evaluation mode with the weights `keep` says.
            examples: to learn from; without `validation` a share of their episodes is held out.
            loss: default `CrossEntropy()`.
            validation: other episodes to choose weights by; never those that results are reported on.
            progress_bar: show a bar with an ETA.
        Raises:
            ValueError: if an argument is out of range, or validation and examples overlap.
            RuntimeError: if the loss is not finite; the weights are then the best so far.
        """
        region = self.region(tuple(examples.inputs.shape[1:]))
        if validation is not None:
            examples.check_apart(validation)
        elif self.hold_out:
            examples, validation = examples.split(self.hold_out, self.seed)
        loss = loss or CrossEntropy()
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        with one_thread(), torch.random.fork_rng([device] if device.type == "cuda" else []), scalars(self.tensorboard) as log:
            torch.manual_seed(self.seed)  # dropout has no generator of its own
            return _Training(self, module, examples, loss, validation, region, log).run(progress_bar)


class _Training:
    """One call of `RobustTrainer.fit`."""

    def __init__(
        self,
        settings: RobustTrainer,
        module: nn.Module,
        examples: Examples,
        loss: Loss,
        validation: Examples | None,
        region: Region,
        log: Scalars,
    ) -> None:
        self.settings, self.module, self.log = settings, module, log
        self.optimizer = optimizer_for(module, settings.optimizer, settings.learning_rate, settings.weight_decay)
        self.device = self.optimizer.param_groups[0]["params"][0].device
        self.examples, self.region = examples.to(self.device), region.to(self.device)
        self.validation = None if validation is None else validation.draw(HELD_OUT, settings.seed).to(self.device)
        self.loss = loss if settings.trades is None else TRADES(loss, settings.trades)
        self.attack = check_attack(settings.attack)
        self.average = Average(module, settings.ema) if settings.ema else None
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.trial = Trial(self.region, loss, seed=settings.seed)
        guard = CollapseGuard() if settings.guard is True else settings.guard or None
        self.guard = None if isinstance(self.attack, NoAttack) else guard
        self.stopping, self.history = EarlyStopping(settings.patience), list[Evaluation]()
        self.best = Snapshot.of(module, self.optimizer, self.average)
        self.per_epoch = math.ceil(len(examples) / settings.batch_size)
        self.total = settings.epochs * self.per_epoch
        rounds = math.ceil(settings.epochs / settings.every)
        self.marks = {min(self.total, max(1, round(k * settings.every * self.per_epoch))) for k in range(1, rounds + 1)}

    def run(self, progress_bar: bool) -> RobustFit:
        losses, since, done = torch.zeros((), device=self.device), 0, False
        with bar("train", self.settings.epochs, visible=progress_bar) as advance:
            for step, rows in enumerate(self._order()):
                self.module.train()
                losses, since = losses + self._step(rows, step / self.total), since + 1
                ends, due = (step + 1) % self.per_epoch == 0, step + 1 in self.marks
                if ends or due:
                    self._check(losses)
                if due and self.validation is not None:
                    done = self._evaluate(step + 1, float(losses) / since)
                    losses, since = torch.zeros_like(losses), 0
                if ends:
                    advance(1)
                if done:
                    break
        return self._finish()

    def _check(self, losses: Tensor) -> None:
        """Once in a while: asking at every step would make the device wait, and no later loss hides one that is not finite."""
        if not bool(losses.isfinite()) or not all(bool(parameter.isfinite().all()) for parameter in self._learned()):
            self.module.load_state_dict(self.best.result)
            self.module.eval()
            raise RuntimeError(
                "the loss or a weight is not finite: try a smaller learning_rate; the module has its best weights so far"
            )

    def _order(self) -> Iterator[Tensor]:
        """Rows of every batch: equal ones, because batch norm cannot do with one left-over row."""
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(self.examples), generator=self.batches).to(self.device)
            yield from order.tensor_split(self.per_epoch)

    def _step(self, rows: Tensor, progress: float) -> Tensor:
        """Attack a batch and learn from it; the mean loss."""
        settings = self.settings
        set_rate(self.optimizer, settings.learning_rate * rate_at(settings.schedule, progress))
        x, targets = self.examples.batch(rows)
        risen = min(1.0, progress / settings.warm_up) if settings.warm_up else 1.0
        region = replace(self.region, epsilon=risen * self.region.epsilon)
        attacked = x + self._perturbation(region, x, targets)
        if settings.awp:
            self.module.train(settings.batch_statistics)
            gradients = torch.autograd.grad(self._objective(region, x, attacked, targets), self._learned(), allow_unused=True)
            self.module.train()
            with adversarial_weights(self.module, gradients, settings.awp):
                loss = self._descend(region, x, attacked, targets)
        else:
            loss = self._descend(region, x, attacked, targets)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.module)
        return loss

    def _perturbation(self, region: Region, x: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.attack, NoAttack):
            return torch.zeros_like(x)
        with attacking(self.module, training=self.settings.batch_statistics):
            clean = None
            if self.loss.needs_clean:
                with torch.no_grad():
                    clean = self._scores(x)
            return self.attack.within(
                region, lambda point: self.loss.climbed(self._scores(point), targets, clean), x, self.generator
            )

    def _descend(self, region: Region, x: Tensor, attacked: Tensor, targets: Tensor) -> Tensor:
        loss = self._objective(region, x, attacked, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _objective(self, region: Region, x: Tensor, attacked: Tensor, targets: Tensor) -> Tensor:
        if self.loss.needs_clean:
            # One pass, so that batch norm sees both alike.
            clean, scores = self._scores(torch.cat((x, attacked))).chunk(2)
        else:
            clean, scores = None, self._scores(attacked)
        loss = self.loss.descended(scores, targets, clean).mean()
        if self.settings.gradalign:
            losses = functools.partial(self._losses, targets)
            cosines = alignment(region, losses, x, self.generator, differentiable=True)
            bends = (1 - cosines).nan_to_num(0.0).sum() / cosines.isfinite().sum().clamp(min=1)
            loss = loss + self.settings.gradalign * bends
        return loss

    def _losses(self, targets: Tensor, point: Tensor) -> Tensor:
        return self.loss.rows(self._scores(point), targets)

    def _scores(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp is not None):
            scores: Tensor = self.module(inputs)
        return scores.float()

    def _learned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _evaluate(self, step: int, loss: float) -> bool:
        """Attack the hold-out, keep the weights or go back; whether training is to end."""
        assert self.validation is not None
        with self.average.inside(self.module) if self.average else nullcontext():
            clean, fgsm, pgd = (float(part.double().mean()) for part in self.trial.run(self.module, self.validation))
            cos = self.trial.cosine(self.module, self.validation)
            warm = bool(self.history) and step > self.settings.warm_up * self.total
            collapsed = self.guard is not None and warm and self.guard.collapsed(self.stopping.best, pgd, fgsm, cos)
            alpha, lr = getattr(self.attack, "alpha", math.nan), self.optimizer.param_groups[0]["lr"]
            row = Evaluation(step / self.per_epoch, loss, clean, pgd, fgsm, cos, alpha, lr, collapsed)
            self.history.append(row)
            self.log.write(row, self.module, step)
            told = [callback(row, self.module) for callback in self.settings.callbacks]
        if self.stopping.update(-math.inf if collapsed else pgd):
            self.best = Snapshot.of(self.module, self.optimizer, self.average)
        if collapsed:
            assert self.guard is not None
            self.average = self.best.restore(self.module, self.optimizer)
            self.attack = self.attack.scaled(self.guard.factor)
        rollbacks = sum(row.collapsed for row in self.history)
        spent = self.guard is not None and rollbacks >= self.guard.most
        return spent or self.stopping.finished or any(answer is False for answer in told)

    def _finish(self) -> RobustFit:
        last = copied(self.module) if self.average is None else self.average.weights
        best = self.best.result if self.history else last
        self.module.load_state_dict(best if self.settings.keep == "best" else last)
        self.module.eval()
        epoch = self.history[self.stopping.best_index].epoch if self.history else math.nan
        return RobustFit(tuple(self.history), best, last, epoch, self.region.epsilon, self.region.norm, self.attack)
