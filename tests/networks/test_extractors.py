"""Lipschitz extractors: sound as a whole, and at home in Stable-Baselines3."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

import robustrl as rrl
from robustrl.networks import OrthogonalLinear, SkewOrthogonalConv2d
from robustrl.networks.extractors import Contraction, LipschitzExtractor, between

VECTORS = spaces.Box(-np.inf, np.inf, (4,), np.float32)
PICTURES = spaces.Box(0, 255, (2, 9, 7), np.uint8)
KWARGS: dict[str, Any] = {"features_extractor_class": rrl.LipschitzMLP, "net_arch": []}
BUILD: dict[str, Callable[[], LipschitzExtractor]] = {
    "mlp": lambda: rrl.LipschitzMLP(VECTORS, (12, 8)),
    "householder mlp": lambda: rrl.LipschitzMLP(VECTORS, (8, 8, 6), activation="householder"),
    "cnn": lambda: rrl.LipschitzCNN(PICTURES, (8, 6), (2, 2)),
    "swish mlp": lambda: rrl.LipschitzMLP(VECTORS, (8, 6), activation="swish:4"),
    "lisht cnn": lambda: rrl.LipschitzCNN(PICTURES, (8, 6), (2, 2), activation="lisht"),
    "circular cnn": lambda: rrl.LipschitzCNN(
        PICTURES, (8, 6), (2, 1), activation="householder", padding_mode="circular", terms=4
    ),
    "checkpointed cnn": lambda: rrl.LipschitzCNN(
        PICTURES, (4, 4), (1, 3), kernel_size=1, checkpoint=True, terms=12, max_norm=3.0
    ),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def observations(extractor: LipschitzExtractor, n: int) -> Tensor:
    return torch.rand(n, *extractor._observation_space.shape, dtype=next(extractor.parameters()).dtype)  # type: ignore[misc]


def stirred(extractor: LipschitzExtractor) -> LipschitzExtractor:
    """As after training: weights of any size, angles anywhere."""
    with torch.no_grad():
        for parameter in extractor.parameters():
            parameter.mul_(float(torch.empty(()).uniform_(0.1, 4))).add_(0.1 * torch.randn_like(parameter))
    return extractor


@pytest.mark.parametrize("name", BUILD)
def test_no_jacobian_is_larger_than_the_constant(name: str) -> None:
    extractor = stirred(BUILD[name]()).double()
    constant = extractor.lipschitz()
    assert 1 <= constant <= 1 + 1e-10
    steepest = 0.0
    for row in observations(extractor, 5):
        jacobian = torch.autograd.functional.jacobian(lambda x: extractor(x[None])[0], row).reshape(extractor.features_dim, -1)
        assert torch.linalg.matrix_norm(jacobian, 2) <= constant * (1 + 1e-12)
        steepest = max(steepest, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert steepest > (0.5 if any(isinstance(layer, Contraction) for layer in extractor.layers) else 0.8)


@pytest.mark.parametrize("name", BUILD)
def test_features_never_move_further_than_observations(name: str) -> None:
    extractor = stirred(BUILD[name]()).double()
    a = observations(extractor, 500)
    shift = torch.randn_like(a) * 10.0 ** torch.empty(500, *(1,) * (a.ndim - 1), dtype=a.dtype).uniform_(-5, 1)
    with torch.no_grad():
        moved = (extractor(a + shift) - extractor(a)).norm(dim=1)
    assert (moved <= shift.flatten(1).norm(dim=1) * extractor.lipschitz() * (1 + 1e-9)).all()


def test_the_features_of_widening_layers_keep_every_distance_until_an_activation() -> None:
    """One layer and MaxMin on pairs that are ordered alike: an isometry."""
    extractor = rrl.LipschitzMLP(VECTORS, (8,)).double()
    a = torch.randn(1, 4, dtype=torch.float64)
    b = a + 1e-7 * torch.randn(20, 4, dtype=torch.float64)
    with torch.no_grad():
        ratios = (extractor(b) - extractor(a)).norm(dim=1) / (b - a).norm(dim=1)
    torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-6, rtol=0)


def test_the_constant_is_the_product_of_the_layers() -> None:
    extractor = rrl.LipschitzMLP(VECTORS, (8, 8)).double()

    class Twice(nn.Module):
        def lipschitz(self) -> float:
            return 2.0

        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    one = extractor.lipschitz()
    extractor.layers.append(Twice())
    extractor.layers.append(Twice())
    assert extractor.lipschitz() == pytest.approx(4 * one, rel=1e-15)


@pytest.mark.parametrize("name", BUILD)
def test_attacks_never_change_the_decision_inside_the_radius(name: str) -> None:
    """Radius of a linear head on the features: the least lead over the distance of the two rows."""
    flips, tried = 0, 0
    for seed in range(12):
        torch.manual_seed(seed)
        extractor = stirred(BUILD[name]()).double().requires_grad_(False)
        head = nn.Linear(extractor.features_dim, 3).double().requires_grad_(False)
        x = observations(extractor, 10)
        with torch.no_grad():
            scores = head(extractor(x))
        best = scores.argmax(1)
        lead = scores.gather(1, best[:, None]) - scores
        apart = (head.weight[best][:, None] - head.weight[None]).norm(dim=2)
        radius = (lead / apart).where(apart > 0, torch.inf).amin(1) / extractor.lipschitz()
        attacked = ascend(lambda z, e=extractor, h=head: h(e(z)), x, best, 0.999 * radius)
        with torch.no_grad():
            assert torch.equal(head(extractor(attacked)).argmax(1), best)
            further = ascend(lambda z, e=extractor, h=head: h(e(z)), x, best, 4 * radius)
            flips += int((head(extractor(further)).argmax(1) != best).sum())
        tried += len(x)
    assert flips > tried / 20  # the attack can flip, and the radius is not vacuous


def ascend(network: Callable[[Tensor], Tensor], x: Tensor, best: Tensor, radius: Tensor) -> Tensor:
    """Projected gradient ascent of the best other score's lead, then the end of the ball along the direction found."""
    shape = (-1, *(1,) * (x.ndim - 1))
    delta = torch.zeros_like(x)
    for step in range(8):
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            scores = network(point)
            other = scores.scatter(1, best[:, None], -torch.inf).amax(1)
            (gradient,) = torch.autograd.grad((other - scores.gather(1, best[:, None])[:, 0]).sum(), point)
        delta = delta + gradient * (radius / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)).reshape(shape) / (1 + step)
        delta = delta * (radius / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).reshape(shape)
    return x + delta


@pytest.mark.parametrize("name", BUILD)
def test_the_state_is_parameters_alone_and_copies_answer_the_same(name: str) -> None:
    extractor = stirred(BUILD[name]())
    assert not list(extractor.buffers())
    assert set(extractor.state_dict()) == {key for key, _ in extractor.named_parameters()}
    x = observations(extractor, 3)
    with torch.no_grad():
        features = extractor(x)
        assert features.shape == (3, extractor.features_dim)
        assert torch.equal(pickle.loads(pickle.dumps(extractor))(x), features)
        assert torch.equal(copy.deepcopy(extractor)(x), features)
        fresh = BUILD[name]()
        fresh.load_state_dict(extractor.state_dict())
        assert torch.equal(fresh(x), features)


def dqn(**settings: Any) -> DQN:
    options = {"learning_starts": 16, "batch_size": 16, "buffer_size": 500, "seed": 0, "device": "cpu"}
    return DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, **(options | settings))


def test_dqn_is_the_extractor_and_one_linear_layer() -> None:
    q_net = dqn().policy.q_net
    assert isinstance(q_net.features_extractor, rrl.LipschitzMLP)
    (head,) = q_net.q_net
    assert type(head) is nn.Linear
    assert head.in_features == q_net.features_extractor.features_dim == 64


def test_the_target_network_of_dqn_is_the_network_that_its_parameters_say() -> None:
    model = dqn(target_update_interval=8, tau=0.3, train_freq=1, learning_rate=1e-2)
    states = torch.randn(32, 4)
    before = model.q_net_target(states).detach()
    model.learn(64)
    online, target = model.q_net, model.q_net_target
    assert not target.training
    fresh = copy.deepcopy(model.policy).q_net_target
    with torch.no_grad():
        assert not torch.allclose(target(states), before)
        assert not torch.allclose(target(states), online(states))
        assert torch.equal(target(states), fresh(states))
        polyak_update(online.parameters(), target.parameters(), 1.0)
        assert torch.equal(target(states), online.eval()(states))
    assert torch.equal(online.train()(states), target(states))


@pytest.mark.parametrize("algorithm", [DQN, PPO, A2C])
def test_models_train_and_come_back_from_their_files_bit_for_bit(algorithm: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"policy_kwargs": KWARGS, "seed": 0, "device": "cpu"}
    options |= {"learning_starts": 16, "buffer_size": 500} if algorithm is DQN else {"n_steps": 64}
    model = algorithm("MlpPolicy", "CartPole-v1", **options)
    first = copy.deepcopy(model.policy.state_dict())
    model.learn(128)
    changed = [key for key, value in model.policy.state_dict().items() if not torch.equal(value, first[key])]
    extracted = [key for key in changed if "features_extractor" in key]
    assert any("layers.0.weight" in key for key in extracted)
    assert any("layers.2.weight" in key for key in extracted)
    model.save(tmp_path / "model")
    states = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    for loaded in (
        algorithm.load(tmp_path / "model", device="cpu"),
        rrl.load_agent(tmp_path / "model.zip", "CartPole-v1", algo=algorithm.__name__.lower()),
        rrl.load_agent(tmp_path / "model.zip", "CartPole-v1", algo=algorithm.__name__.lower(), policy_kwargs=KWARGS),
    ):
        model.policy.set_training_mode(False)
        own = model.policy.q_net.features_extractor if algorithm is DQN else model.policy.features_extractor
        other = loaded.policy.q_net.features_extractor if algorithm is DQN else loaded.policy.features_extractor
        with torch.no_grad():
            assert torch.equal(other(torch.from_numpy(states)), own(torch.from_numpy(states)))
        assert other.lipschitz() == own.lipschitz()
        assert np.array_equal(loaded.predict(states, deterministic=True)[0], model.predict(states, deterministic=True)[0])


@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_pictures_of_bytes_train_too(algorithm: Any) -> None:
    environment = FakeImageEnv(screen_height=20, screen_width=18, n_channels=3, discrete=True, channel_first=False)
    kwargs = {"features_extractor_class": rrl.LipschitzCNN, "net_arch": []}
    kwargs["features_extractor_kwargs"] = {"channels": (8, 8), "strides": (4, 2)}
    options: dict[str, Any] = {"learning_starts": 8, "buffer_size": 50} if algorithm is DQN else {"n_steps": 16, "n_epochs": 2}
    model = algorithm("CnnPolicy", environment, policy_kwargs=kwargs, batch_size=8, seed=0, device="cpu", **options)
    extractor = model.policy.q_net.features_extractor if algorithm is DQN else model.policy.features_extractor
    assert extractor.features_dim == 8 * 3 * 3
    before = copy.deepcopy(extractor.state_dict())
    model.learn(32)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    assert not torch.equal(extractor.layers[0].weight, before["layers.0.weight"])
    assert extractor.lipschitz() == 1.0


def test_ppo_leaves_the_initial_weights_of_orthogonal_layers_alone() -> None:
    """Its own initialisation would scale what is not a plain linear layer's weight."""
    policy = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu").policy
    layer = policy.features_extractor.layers[2]
    assert isinstance(layer, OrthogonalLinear)
    assert 0.8 < float(layer.weight.detach().std()) < 1.2
    assert bool((layer.bias != 0).all())  # type: ignore[union-attr]


def test_the_default_picture_network_takes_atari_frames() -> None:
    extractor = rrl.LipschitzCNN(spaces.Box(0, 255, (4, 84, 84), np.uint8))
    assert extractor.features_dim == 32 * 6 * 6
    convolutions = [layer for layer in extractor.layers if isinstance(layer, SkewOrthogonalConv2d)]
    assert [len(layer.weight) for layer in convolutions] == [64, 64, 64]
    with torch.no_grad():
        assert extractor(torch.rand(1, 4, 84, 84)).shape == (1, 1152)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rrl.LipschitzMLP(VECTORS, (64, 7)), "widths must be one or more even numbers"),
        (lambda: rrl.LipschitzMLP(VECTORS, ()), "widths must be one or more even numbers"),
        (lambda: rrl.LipschitzMLP(VECTORS, activation="swsh"), "activation must be one of 'maxmin', 'householder', 'swish'"),
        (lambda: rrl.LipschitzMLP(VECTORS, activation="maxmin:2"), "activation must be one of 'maxmin', 'householder'"),
        (lambda: rrl.LipschitzMLP(VECTORS, activation="swish:"), "activation must be NAME or NAME:NUMBER"),
        (lambda: rrl.LipschitzMLP(VECTORS, activation="swish:nan"), "beta must be a finite number > 0"),
        (lambda: rrl.LipschitzMLP(VECTORS, activation="relu:2"), "beta and learnable must be left out for 'relu'"),
        (
            lambda: rrl.LipschitzMLP(spaces.Box(0, 255, (4, 84, 84), np.uint8)),
            "at most 4096 entries, got 28224: take LipschitzCNN",
        ),
        (lambda: rrl.LipschitzCNN(VECTORS), r"observation_space must be a Box of \(channels, height, width\)"),
        (lambda: rrl.LipschitzCNN(PICTURES, (3,), (2,)), "channels must be one or more even numbers"),
        (lambda: rrl.LipschitzCNN(PICTURES, (4, 4), (2,)), "strides must have one entry per entry of channels, got 1 for 2"),
        (lambda: rrl.LipschitzCNN(PICTURES, (4,), (2,), padding_mode="reflect"), "padding_mode must be one of"),
        (lambda: rrl.LipschitzCNN(PICTURES, (4,), (2,), max_norm=3.4), "max_norm must be at most 3.395"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_activations_between_layers_are_divided_by_their_largest_slope() -> None:
    """A slope of 1 is reached, and none above it."""
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64)[:, None]
    for text in ("swish", "swish:4", "gelu:0.5", "lisht", "sigmoid", "bent_identity:3", "leaky_relu:0.1", "relu"):
        layer = between(text)(2).double()
        y = layer(x)
        steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
        assert steepest == pytest.approx(1, rel=2e-2 if text.startswith("bent") else 1e-3), text
        assert steepest <= 1 + 1e-9
        assert layer.lipschitz() == 1


@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_attacks_see_through_the_extractor(algorithm: Any) -> None:
    model = algorithm("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu")
    view = rrl.policy.PolicyView.from_sb3(model)
    states = torch.randn(8, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(view.scores(states).sum(), states)
    assert (slope.norm(dim=1) > 1e-3).all()
    assert np.array_equal(view.scores(states).argmax(1).numpy(), model.predict(states.detach().numpy(), deterministic=True)[0])
    frozen = view.for_inference()
    with torch.no_grad():
        torch.testing.assert_close(frozen.scores(states), view.scores(states))
