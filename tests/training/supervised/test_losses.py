"""What networks are trained to output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robustrl.training.supervised import TRADES, Cloning, CrossEntropy, Distillation, Loss

SCORES = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [3.0, -2.0, 1.0]])
LABELS = torch.tensor([1, 2, 1])
TEACHER = torch.tensor([[0.5, 1.5, 0.0], [2.0, 1.0, 2.5], [0.0, 0.1, -0.1]])


def softmax(values: Tensor) -> list[float]:
    powers = [math.exp(float(v)) for v in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_cross_entropy_is_that_of_scores_over_temperature_after_the_margin(temperature: float, margin: float) -> None:
    found = CrossEntropy(temperature, margin).rows(SCORES, LABELS)
    for value, scores, label in zip(found, SCORES.clone(), LABELS, strict=True):
        scores[label] -= math.sqrt(2) * margin
        assert float(value) == pytest.approx(-math.log(softmax(scores / temperature)[int(label)]), rel=1e-5)


def test_margin_is_what_an_l2_attack_takes_from_a_network_with_constant_one() -> None:
    """f_y may fall and f_j may rise by no more than sqrt(2) * margin together: the loss bounds that of every attack."""
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    attacked = x + 0.5 * torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = torch.arange(500) % 3
    assert bool((CrossEntropy().rows(attacked, labels) <= CrossEntropy(margin=0.5).rows(x, labels) + 1e-5).all())


@pytest.mark.parametrize("kind", ["q", "logits"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_divergence_from_the_teacher(kind: str, temperature: float) -> None:
    found = Distillation(temperature, kind).rows(SCORES, TEACHER)
    for value, scores, teacher in zip(found, SCORES, TEACHER, strict=True):
        wanted, own = softmax(teacher / temperature), softmax(scores / temperature if kind == "q" else scores)
        assert float(value) == pytest.approx(sum(p * math.log(p / q) for p, q in zip(wanted, own, strict=True)), rel=1e-5)


def test_distillation_of_the_teacher_itself_costs_nothing() -> None:
    assert torch.allclose(Distillation(0.3).rows(TEACHER, TEACHER), torch.zeros(3), atol=1e-6)
    assert bool((Distillation(0.3, margin=0.1).rows(TEACHER, TEACHER) > 0).all())


def test_distillation_is_right_where_the_greedy_actions_agree() -> None:
    assert Distillation().correct(SCORES, TEACHER).tolist() == [True, False, False]
    assert Distillation().labels(TEACHER).tolist() == [1, 2, 1]


def test_cloning_of_discrete_actions_is_cross_entropy() -> None:
    assert torch.equal(Cloning().rows(SCORES, LABELS), CrossEntropy().rows(SCORES, LABELS))
    assert Cloning().correct(SCORES, LABELS).tolist() == [True, False, False]


def test_cloning_of_continuous_actions_is_the_mean_squared_error() -> None:
    wanted = SCORES + torch.tensor([[0.1, -0.05, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, -0.09]])
    loss = Cloning(tolerance=0.101)
    assert torch.allclose(loss.rows(SCORES, wanted), torch.tensor([0.0125, 0.09, 0.0081]) / 3, atol=1e-6)
    assert loss.correct(SCORES, wanted).tolist() == [True, False, True]
    assert loss.labels(wanted) is None


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(CrossEntropy(), LABELS), (Cloning(), LABELS), (Cloning(), TEACHER), (Distillation(), TEACHER), (TRADES(), LABELS)],
)
def test_scores_that_are_not_finite_are_never_right(loss: Loss, targets: Tensor) -> None:
    for value in (math.nan, math.inf):
        scores = SCORES.clone()
        scores[0, 1] = value
        assert not bool(loss.correct(scores, targets)[0])


@pytest.mark.parametrize(
    ("loss", "targets"), [(CrossEntropy(0.5), LABELS), (Distillation(0.5, "logits"), TEACHER), (Cloning(), TEACHER)]
)
def test_trades_is_the_clean_loss_and_beta_times_the_divergence(loss: Loss, targets: Tensor) -> None:
    attacked, trades = SCORES.flip(1), TRADES(loss, 3.0)
    divergence = loss.divergence(SCORES, attacked)
    assert bool((divergence[[0, 2]] > 0).all())
    assert torch.equal(trades.climbed(attacked, targets, SCORES), divergence)
    assert torch.allclose(trades.descended(attacked, targets, SCORES), loss.rows(SCORES, targets) + 3 * divergence)
    assert torch.equal(trades.rows(attacked, targets), loss.rows(attacked, targets))
    assert torch.equal(trades.correct(attacked, targets), loss.correct(attacked, targets))
    assert torch.allclose(trades.divergence(SCORES, SCORES), torch.zeros(3), atol=1e-7)


def test_divergence_is_that_of_softmax_at_the_loss_own_temperature() -> None:
    attacked = TEACHER
    for temperature in (0.5, 2.0):
        one, other = softmax(SCORES[0] / temperature), softmax(attacked[0] / temperature)
        expected = sum(p * math.log(p / q) for p, q in zip(one, other, strict=True))
        assert float(CrossEntropy(temperature).divergence(SCORES, attacked)[0]) == pytest.approx(expected, rel=1e-5)
        assert float(Distillation(temperature).divergence(SCORES, attacked)[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CrossEntropy(0), "temperature"),
        (lambda: CrossEntropy(margin=-1), "margin"),
        (lambda: CrossEntropy(margin=math.nan), "margin"),
        (lambda: Cloning(0), "tolerance"),
        (lambda: Distillation(0), "temperature"),
        (lambda: Distillation(kind="values"), "kind"),
        (lambda: Distillation(margin=-1), "margin"),
        (lambda: TRADES(beta=0), "beta"),
        (lambda: TRADES(TRADES()), "loss"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
