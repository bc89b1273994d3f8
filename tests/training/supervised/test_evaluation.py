"""How well networks do under attack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustrl.errors import CertificateViolationError
from robustrl.networks.skew_orthogonal import MaxMin, OrthogonalLinear
from robustrl.training.supervised import (
    Cloning,
    CrossEntropy,
    Distillation,
    Examples,
    Region,
    RobustReport,
    RobustTrainer,
    evaluate,
)
from robustrl.training.supervised.evaluation import Trial, alignment, attacking


def linear(classes: int = 3, inputs: int = 6, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, classes)


def labelled(module: nn.Module, n: int = 400, inputs: int = 6) -> Examples:
    """Mostly what the network decides, some not."""
    x = torch.randn(n, inputs, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = module(x).argmax(1)
    labels[:20] = 0
    return Examples(x, labels)


def surviving(module: nn.Linear, examples: Examples, epsilon: float, dual: float) -> float:
    """Exactly: a linear classifier is right within epsilon iff every margin is above epsilon times the dual norm of its slope."""
    with torch.no_grad():
        scores, weights = module(examples.inputs), module.weight
    right = torch.ones(len(examples), dtype=torch.bool)
    for i, label in enumerate(examples.targets.tolist()):
        for other in set(range(module.out_features)) - {label}:
            slope = torch.linalg.vector_norm(weights[label] - weights[other], ord=dual)
            right[i] &= bool(scores[i, label] - scores[i, other] > epsilon * slope)
    return float(right.double().mean())


@pytest.mark.parametrize(("norm", "dual"), [("inf", 1.0), (2, 2.0)])
@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_accuracy_of_a_linear_classifier_under_attack_is_the_closed_form(norm: Any, dual: float, epsilon: float) -> None:
    module = linear()
    examples = labelled(module)
    report = evaluate(module, examples, epsilon=epsilon, norm=norm)
    assert report.pgd == pytest.approx(surviving(module, examples, epsilon, dual), abs=1.5 / len(examples))
    assert report.clean > report.pgd > 0.2
    assert report.clean >= report.fgsm >= report.pgd


@pytest.mark.parametrize("loss", [CrossEntropy(0.25), Distillation(2.0), Distillation(kind="logits")])
def test_what_an_attack_climbs_hardly_matters_for_a_linear_classifier(loss: Any) -> None:
    module = linear(classes=2)
    examples = labelled(module)
    if isinstance(loss, Distillation):
        examples = Examples(examples.inputs, nn.functional.one_hot(examples.targets, 2).float())
    report = evaluate(module, examples, loss, epsilon=0.1, targeted=False, restarts=1)
    expected = surviving(module, Examples(examples.inputs, loss.labels(examples.targets)), 0.1, 1.0)
    assert report.pgd == pytest.approx(expected, abs=1.5 / len(examples))


def test_targeted_attacks_find_what_the_loss_hides() -> None:
    """Scores so far apart that cross-entropy has no gradient in float32."""
    module = linear()
    with torch.no_grad():
        module.weight.mul_(1e4)
        module.bias.mul_(1e4)
    examples = labelled(module)
    found = [evaluate(module, examples, epsilon=0.3, targeted=targeted).pgd for targeted in (False, True)]
    assert found[1] == pytest.approx(surviving(module, examples, 0.3, 1.0), abs=1.5 / len(examples))
    assert found[0] > found[1]


def test_continuous_actions_are_right_within_the_tolerance() -> None:
    module = linear(classes=1)
    x = torch.randn(100, 6)
    with torch.no_grad():
        examples = Examples(x, module(x))
    slope = float(module.weight.detach().abs().sum())
    found = [evaluate(module, examples, Cloning(0.1), epsilon=c * 0.1 / slope) for c in (0.99, 1.01)]
    assert [report.clean for report in found] == [1.0, 1.0]
    assert [report.pgd for report in found] == [1.0, 0.0]
    assert found[0].certified is None


def orthogonal() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrthogonalLinear(6, 16), MaxMin(), OrthogonalLinear(16, 3))


@pytest.mark.parametrize("norm", ["inf", 2])
def test_certified_share_is_below_the_attacked_one(norm: Any) -> None:
    module = orthogonal()
    report = evaluate(module, labelled(module), epsilon=0.1, norm=norm)
    assert report.certified is not None
    assert 0.3 < report.certified <= report.pgd <= report.fgsm <= report.clean


def test_certified_share_is_that_of_the_margins() -> None:
    module = orthogonal()
    examples = labelled(module)
    with torch.no_grad():
        scores = module(examples.inputs)
    wanted = scores.gather(1, examples.targets[:, None])
    margins = (wanted - scores.scatter(1, examples.targets[:, None], -math.inf).amax(1, keepdim=True)) / math.sqrt(2)
    report = evaluate(module, examples, epsilon=0.2, norm=2)
    # A head whose rows are closer than sqrt(2) proves a little more.
    assert report.certified >= float((margins > 0.2).double().mean())  # type: ignore[operator]
    assert evaluate(module, examples, epsilon=0.1, norm=2, mask=torch.full((6,), 2.0)).certified == report.certified


@pytest.mark.parametrize("norm", ["inf", 2])
def test_no_reported_attack_leaves_the_ball_or_the_range(norm: Any) -> None:
    module, met = linear(), []
    x = labelled(module).inputs.clamp(-1, 1)
    module.register_forward_pre_hook(lambda layer, inputs: met.append(inputs[0].detach()))
    evaluate(module, Examples(x, torch.arange(len(x)) % 3), epsilon=0.3, norm=norm, bounds=(-1, 1))
    sizes = torch.stack(
        [torch.linalg.vector_norm(points - x, ord=float(norm), dim=1).max() for points in met if len(points) == len(x)]
    )
    assert 0.29 < float(sizes.max()) <= 0.3 * (1 + 1e-5)
    assert max(float(points.abs().max()) for points in met) <= 1


class Waves(nn.Module):
    """Scores whose gradients lead nowhere."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack(((60 * inputs).sin().sum(1), (60 * inputs).cos().sum(1)), 1)


def test_what_one_attack_has_turned_no_other_turns_back() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    examples = Examples(x, (torch.arange(500) % 3 == 0).long())
    trial = Trial(Region.of(0.05), CrossEntropy(), steps=1, restarts=2)
    clean, fgsm, pgd = trial.run(Waves(), examples)
    assert bool(clean.any() & (~clean).any())
    assert not bool((fgsm & ~clean).any() | (pgd & ~fgsm).any())


class Liar(nn.Module):
    """Claims a constant that is not its own."""

    def lipschitz(self) -> float:
        return 0.01

    def forward(self, inputs: Tensor) -> Tensor:
        return 3 * inputs


def test_attack_beyond_a_certificate_is_an_error() -> None:
    module = nn.Sequential(Liar(), linear())
    with pytest.raises(CertificateViolationError, match="certified"):
        evaluate(module, labelled(module), epsilon=0.3, norm=2)


def test_network_without_a_known_constant_is_only_attacked() -> None:
    module = nn.Sequential(nn.LayerNorm(6), linear())
    assert evaluate(module, labelled(module), epsilon=0.1).certified is None


def test_scores_that_are_not_finite_are_wrong_everywhere_and_refused_in_a_report() -> None:
    module = linear()
    examples = labelled(module)
    with torch.no_grad():
        module.weight[0, 0] = math.nan
    assert not any(bool(part.any()) for part in Trial(Region.of(0.1), CrossEntropy()).run(module, examples))
    with pytest.raises(ValueError, match="finite weights"):
        evaluate(module, examples, epsilon=0.1)


def test_evaluation_leaves_no_trace() -> None:
    module = nn.Sequential(linear(inputs=6, classes=8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    module[3].weight.requires_grad_(False)
    module[1].eval()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    one, same = (evaluate(module, Examples(torch.randn(50, 6), torch.arange(50) % 3), epsilon=0.1) for _ in range(2))
    del one, same
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [layer.training for layer in module.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in module.parameters()] == [True, True, True, True, False, True]
    assert bool((module[0].weight.grad == 1).all())
    assert module[0].bias.grad is None


def test_modes_and_gradients_come_back_after_an_error() -> None:
    module = nn.Sequential(linear(), nn.Dropout())
    with pytest.raises(KeyError), attacking(module):
        raise KeyError
    assert all(layer.training for layer in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_evaluations_with_one_seed_are_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    examples = labelled(module, 3000)
    one, same, other = (evaluate(module, examples, epsilon=0.2, steps=2, restarts=1, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_standard_error_is_binomial() -> None:
    report = RobustReport(clean=0.9, fgsm=0.6, pgd=0.5, certified=0.2, n=1000, epsilon=0.1, norm=2)
    assert report.standard_error() == pytest.approx(math.sqrt(0.25 / 1000))
    assert report.standard_error("certified") == pytest.approx(0.4 / math.sqrt(1000))


def test_alignment_is_the_cosine_of_gradients_in_the_ball() -> None:
    """Loss |x - 1|^2 / 2 has the gradient x - 1."""
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    region = Region.of(0.7)
    found = alignment(region, lambda point: (point - 1).square().sum(1) / 2, x, torch.Generator().manual_seed(3))
    beside = x + region.random(x, 1, torch.Generator().manual_seed(3))
    assert torch.allclose(found, nn.functional.cosine_similarity(x - 1, beside - 1, dim=1), atol=1e-6)


def test_alignment_of_linear_losses_is_one_and_of_constant_rows_nan() -> None:
    x = torch.ones(4, 5)
    found = alignment(Region.of(0.1), lambda p: p.sum(1) * torch.tensor([1.0, 0, 2, 0]), x, torch.Generator())
    assert torch.allclose(found[::2], torch.ones(2))
    assert bool(found[1::2].isnan().all())


def test_alignment_can_be_learned_from_although_some_rows_have_no_gradient() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    alive = torch.tensor([1.0, 0, 1])
    found = alignment(
        Region.of(1.0), lambda p: module(p)[:, 0] * alive, torch.ones(3, 3), torch.Generator(), differentiable=True
    )
    found[::2].sum().backward()
    assert bool(module[0].weight.grad.isfinite().all() & (module[0].weight.grad != 0).any())


def test_cosine_of_a_network_without_gradients_is_nan() -> None:
    module = linear()
    nn.init.zeros_(module.weight)
    assert math.isnan(Trial(Region.of(0.1), CrossEntropy()).cosine(module, labelled(module)))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"restarts": 0}, {"epsilon": -1.0}, {"norm": 1}])
def test_what_is_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    module = linear()
    with pytest.raises(ValueError, match=next(iter(settings))):
        evaluate(module, labelled(module), **settings)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_are_trained_and_attacked_where_they_are() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    examples = labelled(linear())
    fit = RobustTrainer("n-fgsm", 0.1, epochs=10, bounds=(-3, 3), trades=2.0, ema=0.9).fit(module, examples)
    assert {tensor.device.type for tensor in fit.best.values()} == {"cuda"}
    report = evaluate(module, examples, epsilon=0.1, bounds=(-3, 3))
    assert report.clean > 0.8
    assert evaluate(module.cpu(), examples, epsilon=0.1, bounds=(-3, 3)).clean == pytest.approx(report.clean, abs=0.01)
