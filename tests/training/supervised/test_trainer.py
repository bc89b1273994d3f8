"""Robust training on examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustrl.networks.activations import SmoothActivation
from robustrl.threat import ThreatModel
from robustrl.training.supervised import (
    FGSMRS,
    PGD,
    Cloning,
    CollapseGuard,
    CrossEntropy,
    Distillation,
    Evaluation,
    Examples,
    InnerAttack,
    NoAttack,
    Region,
    RobustTrainer,
)
from robustrl.training.supervised import evaluation as evaluation_module
from robustrl.training.supervised.attacks import RowLosses
from robustrl.training.supervised.weights import copied

SMALL: dict[str, Any] = {"epochs": 4, "batch_size": 32, "hold_out": 0.2, "learning_rate": 0.01}


def examples(n: int = 320, seed: int = 0) -> Examples:
    """Two classes: the sign of the first entry is right most of the time; the second one is always right, but small."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    signs = 2.0 * labels - 1
    inputs = torch.randn(n, 4, generator=generator)
    inputs[:, 0] = signs * 0.8 + 0.5 * inputs[:, 0]
    inputs[:, 1] = signs * 0.05
    return Examples(inputs, labels, torch.arange(n) // 8)


def network(*, norm: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 16), middle, SmoothActivation("swish"), nn.Linear(16, 2))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Recorder:
    """Remembers evaluations and the weights at each."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[Evaluation] = []
        self.weights: list[dict[str, Tensor]] = []
        self.stop_at = stop_at

    def __call__(self, row: Evaluation, module: nn.Module) -> bool:
        self.rows.append(row)
        self.weights.append(copied(module))
        return len(self.rows) != self.stop_at


def script(monkeypatch: pytest.MonkeyPatch, accuracies: list[float], fgsm: list[float] | None = None) -> None:
    """Evaluations that say what the test wants."""
    told = iter(zip(accuracies, fgsm or accuracies, strict=True))

    def run(self: Any, module: nn.Module, data: Examples) -> tuple[Tensor, ...]:
        del self, module, data
        pgd, one_step = next(told)
        return torch.ones(1), torch.tensor([one_step]), torch.tensor([pgd])

    monkeypatch.setattr(evaluation_module.Trial, "run", run)


@dataclass(frozen=True)
class Spy(InnerAttack):
    """Remembers what it is asked for."""

    regions: list[Region] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def within(self, region: Region, loss_of: RowLosses, x: Tensor, generator: torch.Generator | None) -> Tensor:
        del loss_of, generator
        self.regions.append(region)
        self.inputs.append(x)
        return torch.zeros_like(x)


@pytest.mark.parametrize("attack", ["fgsm-rs", "n-fgsm", "pgd"])
def test_robust_training_learns_what_an_attack_cannot_turn(attack: str) -> None:
    """The sure entry is worth nothing within 0.3; a plainly trained network relies on it too much."""
    found = {}
    for name in ("none", attack):
        fit = RobustTrainer(name, 0.3, **SMALL | {"epochs": 15, "keep": "last"}).fit(network(norm=False), examples())
        found[name] = fit.history[-1]
    assert found[attack].pgd > found["none"].pgd + 0.1
    assert found["none"].clean > 0.85


def test_weights_of_the_first_best_evaluation_are_kept_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.2, 0.5, 0.5, 0.4])
    recorder, module = Recorder(), network()
    fit = RobustTrainer(**SMALL, callbacks=[recorder]).fit(module, examples())
    assert [row.pgd for row in fit.history] == pytest.approx([0.2, 0.5, 0.5, 0.4])
    assert fit.best_epoch == 2.0
    assert same(copied(module), recorder.weights[1])
    assert same(fit.best, recorder.weights[1])
    assert same(fit.last, recorder.weights[3])
    assert not same(fit.best, fit.last)
    assert not module.training


def test_last_weights_are_kept_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.2, 0.5, 0.5, 0.4])
    recorder, module = Recorder(), network()
    RobustTrainer(**SMALL, keep="last", callbacks=[recorder]).fit(module, examples())
    assert same(copied(module), recorder.weights[3])


def test_collapse_goes_back_to_the_best_weights_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.4, 0.42, 0.05])
    recorder, module = Recorder(), network()
    settings = SMALL | {"keep": "last", "warm_up": 0.0, "guard": CollapseGuard(cosine=-1, most=1)}
    fit = RobustTrainer("fgsm-rs", **settings, callbacks=[recorder]).fit(module, examples())
    assert [row.collapsed for row in fit.history] == [False, False, True]
    assert same(copied(module), recorder.weights[1])  # batch norm's buffers included
    assert not same(recorder.weights[1], recorder.weights[2])
    assert fit.attack == FGSMRS(alpha=1.0)
    assert fit.rollbacks == 1


def test_training_goes_on_from_the_best_weights_with_shorter_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.4, 0.1, 0.5, 0.55], [0.4, 0.4, 0.5, 0.85])
    recorder, module = Recorder(), network()
    settings = SMALL | {"warm_up": 0.0, "guard": CollapseGuard(cosine=-1)}
    fit = RobustTrainer("n-fgsm", **settings, callbacks=[recorder]).fit(module, examples())
    assert [row.collapsed for row in fit.history] == [False, True, False, True]
    assert [row.alpha for row in fit.history] == pytest.approx([1, 1, 0.8, 0.8])
    assert fit.best_epoch == 3.0
    assert same(fit.last, recorder.weights[2])
    assert same(fit.best, recorder.weights[2])


def test_optimiser_goes_back_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of which the second is undone, and one epoch with the other's batches, end alike only if Adam's moments do too."""
    script(monkeypatch, [0.5, 0.1, 0.6])
    recorder = Recorder()
    common: dict[str, Any] = {**SMALL, "epochs": 3, "schedule": "constant", "warm_up": 0.0, "callbacks": [recorder]}
    attack = Spy()
    RobustTrainer(attack, guard=CollapseGuard(cosine=-1), **common).fit(network(), examples())
    per_epoch = len(attack.inputs) // 3
    script(monkeypatch, [0.5, 0.6, 0.7])
    undisturbed, module = Recorder(), network()
    replayed = iter([*range(per_epoch), *range(2 * per_epoch, 3 * per_epoch)])
    rows = examples().split(0.2, 0)[0]

    def order(self: Any) -> Any:
        for batch in replayed:
            yield torch.stack([torch.nonzero((rows.inputs == x).all(1))[0, 0] for x in attack.inputs[batch]])

    from robustrl.training.supervised import trainer

    monkeypatch.setattr(trainer._Training, "_order", order)
    RobustTrainer(Spy(), **{**common, "callbacks": [undisturbed]}).fit(module, examples())
    assert same(recorder.weights[0], undisturbed.weights[0])
    assert same(recorder.weights[2], undisturbed.weights[1])


def test_guard_rests_in_the_warm_up_and_in_plain_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that has met little of the attack yet must fail under all of it."""
    for settings in (
        {"attack": "n-fgsm", "warm_up": 0.9},
        {"attack": "none", "warm_up": 0.0},
        {"guard": False, "warm_up": 0.0},
    ):
        script(monkeypatch, [0.5, 0.1, 0.1], [0.5, 0.9, 0.9])
        fit = RobustTrainer(**{**SMALL, "epochs": 3, **settings}).fit(network(), examples())
        assert fit.rollbacks == (1 if settings.get("attack") == "n-fgsm" else 0)  # the last evaluation is after the warm-up


def test_patience_and_callbacks_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.5, 0.4, 0.3, 0.2])
    assert len(RobustTrainer(**SMALL, patience=2).fit(network(), examples()).history) == 3
    script(monkeypatch, [0.5, 0.4, 0.3, 0.2])
    assert len(RobustTrainer(**SMALL, callbacks=[Recorder(stop_at=2)]).fit(network(), examples()).history) == 2


def test_every_evaluation_attacks_the_same_rows_with_the_same_random_numbers() -> None:
    """Weights that stay give the same figures each time, though the attack is too short to converge."""
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    fit = RobustTrainer(**SMALL | {"learning_rate": 1e-30}, every=0.5).fit(module, examples())
    assert len({(row.clean, row.fgsm, row.pgd, row.cos) for row in fit.history}) == 1
    assert [row.epoch for row in fit.history] == pytest.approx([0.5 * k for k in range(1, 9)], abs=0.1)
    assert fit.best_epoch == fit.history[0].epoch


def test_evaluations_take_the_whole_radius_and_training_rises_to_it() -> None:
    attack = Spy()
    RobustTrainer(attack, 0.3, **SMALL, warm_up=0.5).fit(network(), examples())
    steps = len(attack.regions)
    expected = [0.3 * min(1.0, step / (0.5 * steps)) for step in range(steps)]
    assert [region.epsilon for region in attack.regions] == pytest.approx(expected)


def test_episodes_of_the_hold_out_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data, attack, held = examples(), Spy(), []
    inputs = data.inputs.clone()
    assert data.episodes is not None
    inputs[:, 3] = data.episodes.float()
    run = evaluation_module.Trial.run
    monkeypatch.setattr(
        evaluation_module.Trial, "run", lambda self, module, rows: held.append(rows.inputs) or run(self, module, rows)
    )
    RobustTrainer(attack, **SMALL).fit(network(), Examples(inputs, data.targets, data.episodes))
    trained, out = (set(torch.cat(parts)[:, 3].tolist()) for parts in (attack.inputs, held))
    assert not trained & out
    assert len(trained | out) == 40
    assert len(out) == 8


def test_hold_out_that_was_given_must_be_apart() -> None:
    data = examples()
    with pytest.raises(ValueError, match="other episodes"):
        RobustTrainer(**SMALL).fit(network(), data, validation=data.rows(torch.arange(8)))


def test_without_a_hold_out_the_last_weights_are_the_best() -> None:
    module = network()
    fit = RobustTrainer(**SMALL | {"hold_out": 0.0}).fit(module, examples())
    assert fit.history == ()
    assert math.isnan(fit.best_epoch)
    assert same(fit.best, fit.last)
    assert same(copied(module), fit.last)


@pytest.mark.parametrize(
    "settings", [{}, {"awp": 0.01}, {"gradalign": 0.2}, {"trades": 6.0}, {"ema": 0.9}, {"amp": "bfloat16"}]
)
def test_seed_decides_everything(settings: dict[str, Any]) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        module = network()
        torch.manual_seed(torch.seed() % 1000)
        RobustTrainer(**SMALL | {"epochs": 2}, **settings, seed=seed).fit(nn.Sequential(*module, nn.Dropout(0.3)), examples())
        return copied(module)

    state = torch.get_rng_state()
    one, other = trained(1), trained(2)
    assert same(one, trained(1))
    assert not same(one, other)
    assert all(bool(tensor.isfinite().all()) for tensor in one.values())
    torch.set_rng_state(state)
    module = network()
    before = torch.get_rng_state()
    RobustTrainer(**SMALL | {"epochs": 1}).fit(module, examples())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch_statistics", "per_step"), [(False, 1), (True, 4)])
def test_attacks_leave_batch_norm_alone_unless_asked(batch_statistics: bool, per_step: int) -> None:
    module = network().eval()
    settings = SMALL | {"epochs": 1, "hold_out": 0.0, "batch_statistics": batch_statistics}
    RobustTrainer(PGD(steps=3), **settings).fit(module, examples())
    assert int(module[1].num_batches_tracked) == 10 * per_step


@pytest.mark.parametrize(("batch_statistics", "per_step"), [(False, 1), (True, 2)])
def test_attacks_on_weights_leave_batch_norm_alone_unless_asked(batch_statistics: bool, per_step: int) -> None:
    module = network()
    settings = SMALL | {"epochs": 1, "hold_out": 0.0, "batch_statistics": batch_statistics}
    RobustTrainer("none", awp=0.01, **settings).fit(module, examples())
    assert int(module[1].num_batches_tracked) == 10 * per_step


def test_no_batch_is_a_single_left_over_row() -> None:
    attack = Spy()
    RobustTrainer(attack, epochs=1, batch_size=128, hold_out=0).fit(network(), examples().draw(129, 0))
    assert sorted(len(x) for x in attack.inputs) == [64, 65]


def test_moving_average_is_what_is_evaluated_and_kept() -> None:
    recorder, module = Recorder(), network()
    fit = RobustTrainer(**SMALL, ema=0.99, keep="last", callbacks=[recorder]).fit(module, examples())
    assert same(copied(module), fit.last)
    assert same(recorder.weights[-1], fit.last)
    plain = RobustTrainer(**SMALL, keep="last").fit(network(), examples())
    assert not same(plain.last, fit.last)
    best = [row.pgd for row in fit.history].index(max(row.pgd for row in fit.history))
    assert same(fit.best, recorder.weights[best])


def test_gradients_are_taken_at_the_adversarial_weights() -> None:
    """One SGD step on a linear loss s w: the gradient does not depend on w; on s w^2 / 2 it is s w (1 + awp)."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1, 1), 2.0))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * 0 + self.weight

    rows = Examples(torch.zeros(8, 1), torch.zeros(8, 1))
    for awp in (0.0, 0.1):
        module = Square()
        settings: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "hold_out": 0.0, "epochs": 1, "batch_size": 8}
        RobustTrainer("none", awp=awp, learning_rate=0.01, **settings).fit(module, rows, Cloning())
        assert float(module.weight.detach()) == pytest.approx(2 - 0.01 * 2 * 2 * (1 + awp))


def test_gradient_alignment_keeps_gradients_aligned() -> None:
    """Rings around 0, whose classes no linear function tells apart."""
    inputs = 2 * torch.randn(320, 4, generator=torch.Generator().manual_seed(0))
    rings = Examples(inputs, ((2 * inputs.norm(dim=1)).long() // 2) % 2)
    cosines = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 64), SmoothActivation("swish", 8), nn.Linear(64, 2))
        settings = SMALL | {"epochs": 15, "keep": "last", "gradalign": weight, "guard": False}
        cosines.append(RobustTrainer("fgsm-rs", 0.5, **settings).fit(module, rings).history[-1].cos)
    assert cosines[1] > cosines[0] + 0.05, cosines


def test_trades_climbs_the_divergence_and_learns_from_clean_inputs() -> None:
    fit = RobustTrainer("pgd", 0.3, **SMALL | {"epochs": 15, "keep": "last"}, trades=6.0).fit(network(), examples())
    plain = RobustTrainer("none", 0.3, **SMALL | {"epochs": 15, "keep": "last"}).fit(network(), examples())
    assert fit.history[-1].pgd > plain.history[-1].pgd + 0.1


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (Distillation(0.5), lambda y: nn.functional.one_hot(y, 2).float()),
        (Cloning(0.5), lambda y: torch.stack((y, 1 - y), 1).float()),
    ],
)
def test_teachers_scores_and_continuous_actions_are_learned(loss: Any, targets: Any) -> None:
    data = examples()
    rows = Examples(data.inputs, targets(data.targets), data.episodes)
    fit = RobustTrainer("n-fgsm", 0.1, **SMALL | {"epochs": 15}).fit(network(norm=False), rows, loss)
    assert max(row.clean for row in fit.history) > 0.85


def test_pictures_in_bytes_are_attacked_as_floats_in_their_range() -> None:
    attack = Spy()
    pictures = Examples((examples().inputs * 20 + 128).clamp(0, 255).to(torch.uint8), examples().targets)
    RobustTrainer(attack, 8.0, bounds=(0, 255), **SMALL).fit(network(), pictures)
    assert attack.inputs[0].dtype == torch.float32
    assert attack.regions[0].bounds == (torch.tensor(0.0), torch.tensor(255.0))


@pytest.mark.parametrize("value", [math.inf, 1e38])
def test_loss_that_is_not_finite_leaves_the_best_weights(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    script(monkeypatch, [0.4, 0.5, 0.3, 0.2])
    recorder, module = Recorder(), network()
    spoiled = [0.0, 0.0, 0.0]

    class Spoiled(CrossEntropy):
        def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
            late = len(recorder.rows) == 3
            spoiled[0] += late
            return super().rows(scores, targets) * (value if late and spoiled[0] < 4 else 1.0)

    with pytest.raises(RuntimeError, match="not finite"):
        RobustTrainer(**SMALL, guard=False, optimizer="sgd", callbacks=[recorder]).fit(module, examples(), Spoiled())
    assert same(copied(module), recorder.weights[1])
    assert not module.training


def test_threat_model_is_norm_radius_mask_and_units() -> None:
    mask, scale = (True, False, True, True), (1.0, 2.0, 3.0, 4.0)
    region = RobustTrainer(epsilon=ThreatModel(2, 0.5, mask=mask, scale=scale)).region((4,))
    assert (region.epsilon, region.norm) == (0.5, 2.0)
    assert region.scale is not None
    assert region.scale.tolist() == [1.0, 0.0, 3.0, 4.0]
    assert RobustTrainer(epsilon=ThreatModel("inf", 0.5)).region((4,)).scale is None  # type: ignore[arg-type]
    same_region = RobustTrainer(epsilon=0.5, norm=2, mask=torch.tensor([1.0, 0, 3, 4])).region((4,))
    assert torch.equal(same_region.scale, region.scale)  # type: ignore[arg-type]


def test_scalars_are_written_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit = RobustTrainer(**SMALL, tensorboard=tmp_path).fit(network(), examples())
    log = EventAccumulator(str(tmp_path)).Reload()
    names = {"clean", "pgd", "fgsm", "gap", "cos", "alpha", "lr", "kappa"}
    assert set(log.Tags()["scalars"]) == {f"robust/{name}" for name in names} | {"kappa/2"}
    for name in names - {"kappa"}:
        expected = [getattr(row, name) for row in fit.history]
        assert [event.value for event in log.Scalars(f"robust/{name}")] == pytest.approx(expected)
    assert [event.value for event in log.Scalars("robust/kappa")] == [0.5] * 4
    assert [event.step for event in log.Scalars("robust/pgd")] == [8, 16, 24, 32]


def test_figures_of_the_history_are_consistent() -> None:
    fit = RobustTrainer("fgsm-rs", 0.2, **SMALL, schedule="piecewise").fit(network(), examples())
    for row in fit.history:
        assert row.clean >= row.fgsm >= row.pgd
        assert row.gap == row.fgsm - row.pgd
        assert -1 <= row.cos <= 1
        assert row.loss > 0
    assert [row.lr for row in fit.history] == pytest.approx([0.01, 0.01, 0.001, 0.0001])
    assert (fit.epsilon, fit.norm) == (0.2, math.inf)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attack": "fgsm"}, "attack"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"norm": 1}, "norm"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"epsilon": ThreatModel(2, 0.1), "norm": 2}, "norm"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"every": 0}, "every"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"schedule": "cosine"}, "schedule"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"ema": 1.0}, "ema"),
        ({"hold_out": 1.0}, "hold_out"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"gradalign": -1}, "gradalign"),
        ({"awp": math.nan}, "awp"),
        ({"keep": "first"}, "keep"),
        ({"patience": 0}, "patience"),
        ({"amp": "float16"}, "amp"),
        ({"seed": -1}, "seed"),
        ({"trades": 6.0, "attack": NoAttack()}, "trades"),
        ({"trades": -1.0}, "trades"),
        ({"trades": 0.0, "attack": NoAttack()}, "trades"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RobustTrainer(**settings)


def test_threat_that_cannot_be_trained_for_is_refused() -> None:
    for threat in (ThreatModel(2, episode=1.0), ThreatModel(1, 0.5)):
        with pytest.raises(ValueError, match="epsilon|norm"):
            RobustTrainer(epsilon=threat).fit(network(), examples())
