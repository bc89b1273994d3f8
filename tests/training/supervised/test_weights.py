"""Weights in training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustrl.networks.activations import SmoothActivation
from robustrl.networks.skew_orthogonal import Householder, OrthogonalLinear
from robustrl.training.supervised.weights import Average, Snapshot, adversarial_weights, copied, optimizer_for, rate_at


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), SmoothActivation("swish", learnable=True), nn.Linear(8, 2))


def learn(module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(16, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        average.update(module)


def everything(module: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> list[Tensor]:
    state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values() if value is not None]
    return [
        *module.state_dict().values(),
        *(torch.as_tensor(value) for value in state),
        *average.weights.values(),
        torch.tensor(average.steps),
    ]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_training_goes_on_from_a_snapshot_bit_by_bit(name: str) -> None:
    module = network()
    optimizer, average = optimizer_for(module, name, 0.01, 0.1), Average(module, 0.9)
    learn(module, optimizer, average, 5, seed=1)
    snapshot, before = Snapshot.of(module, optimizer, average), [t.clone() for t in everything(module, optimizer, average)]
    for _ in range(2):  # a snapshot is good for more than once
        learn(module, optimizer, average, 7, seed=2)
        after = everything(module, optimizer, average)
        assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        restored = snapshot.restore(module, optimizer)
        assert restored is not None
        average = restored
        now = everything(module, optimizer, average)
        assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))


def test_moving_average_is_the_weighted_sum() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average, expected = Average(module, 0.5), 1.0
    for step in range(30):
        nn.init.constant_(module.weight, float(step))
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)


def test_average_counts_batches_and_hands_the_weights_back() -> None:
    module = network()
    optimizer, average = optimizer_for(module, "adam", 0.1, 0), Average(module, 0.99)
    learn(module, optimizer, average, 5, seed=0)
    own = copied(module)
    with pytest.raises(KeyError), average.inside(module):
        assert not torch.equal(module[0].weight, own["0.weight"])
        assert torch.equal(module[0].weight, average.weights["0.weight"])
        assert int(module[1].num_batches_tracked) == 5
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())


def test_adversarial_weights_are_a_relative_step_along_the_gradient_and_go_back_bit_by_bit() -> None:
    module = network()
    own = copied(module)
    learned = list(module.parameters())
    gradients = torch.autograd.grad(module(torch.randn(16, 4)).square().sum(), learned)
    with adversarial_weights(module, gradients, 0.01):
        for (name, parameter), gradient in zip(module.named_parameters(), gradients, strict=True):
            step = parameter.detach() - own[name]
            if parameter.ndim == 1 or not parameter.shape:
                assert not bool(step.any())
                continue
            assert float(step.norm()) == pytest.approx(0.01 * float(own[name].norm()), rel=1e-3)
            assert float((step * gradient).sum()) == pytest.approx(float(step.norm() * gradient.norm()), rel=1e-3)
    assert all(torch.equal(parameter, own[name]) for name, parameter in module.named_parameters())


def test_weights_without_a_part_in_the_loss_stay() -> None:
    module = nn.Linear(2, 2)
    with adversarial_weights(module, [None, None], 0.5):
        pass
    with adversarial_weights(module, [torch.zeros(2, 2), None], 0.5):
        assert bool(module.weight.isfinite().all())


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_shapes_of_activations_do_not_decay(name: str) -> None:
    module = nn.Sequential(OrthogonalLinear(4, 6), Householder(6), SmoothActivation("swish", learnable=True), nn.Linear(6, 2))
    groups = optimizer_for(module, name, 0.1, 0.5).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays[id(module[1].angle)] == decays[id(module[2].position)] == 0
    assert {decays[id(p)] for layer in (module[0], module[3]) for p in layer.parameters()} == {0.5}
    assert len(decays) == len(list(module.parameters()))


def test_frozen_network_is_refused() -> None:
    with pytest.raises(ValueError, match="module"):
        optimizer_for(network().requires_grad_(False), "adam", 0.1, 0)


def test_learning_rates_of_the_schedules() -> None:
    one_cycle = [rate_at("one-cycle", progress / 1000) for progress in range(1000)]
    assert one_cycle[0] == 0.04
    assert max(one_cycle) == one_cycle[300] == 1.0
    assert one_cycle == sorted(one_cycle[:300]) + sorted(one_cycle[300:], reverse=True)
    assert one_cycle[650] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert one_cycle[-1] < 1e-4
    assert [rate_at("piecewise", p) for p in (0, 0.49, 0.5, 0.74, 0.75, 0.99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rate_at("constant", 0.9) == 1
