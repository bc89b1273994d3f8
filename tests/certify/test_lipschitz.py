"""Radii from Lipschitz constants: exact where that can be known, never crossed, in the right units, of the weights as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.optimize import minimize
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

import robustrl as rrl
from robustrl.certify.classify import certified
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.methods import input_method
from robustrl.certify.radius import RadiusCertificate
from robustrl.errors import CertificateError
from robustrl.networks import Householder, MaxMin, OrthogonalLinear, activation
from robustrl.networks.activations import LeakyReLU
from robustrl.networks.extractors import Contraction
from robustrl.policy import PolicyView
from robustrl.policy.normalization import Normalization

KWARGS: dict[str, Any] = {"features_extractor_class": rrl.LipschitzMLP, "net_arch": []}
VECTORS = spaces.Box(-np.inf, np.inf, (4,), np.float32)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def linear(weight: Any, bias: Any = 0.0) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.as_tensor(bias, dtype=torch.float64))
    return layer


def random_network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Of four kinds, with weights of any size."""
    torch.manual_seed(seed)
    kinds: list[Callable[[], list[nn.Module]]] = [
        lambda: [rrl.LipschitzMLP(VECTORS, (8, 6)), nn.Linear(6, 3)],
        lambda: [rrl.LipschitzMLP(VECTORS, (6, 8), activation="swish:4"), nn.Linear(8, 4)],
        lambda: [nn.Linear(4, 7), nn.Tanh(), OrthogonalLinear(7, 6), Householder(6), nn.Linear(6, 5), nn.Linear(5, 3)],
        lambda: [nn.Linear(4, 8), MaxMin(), nn.Linear(8, 3), nn.LeakyReLU()],
    ]
    network = nn.Sequential(*kinds[seed % 4]()).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(math.exp(np.random.default_rng(seed).normal()))
    return network


def strongest(network: nn.Module, x: Tensor, target: Tensor, away: Tensor, radius: Tensor, steps: int = 25) -> Tensor:
    """Largest f_target - f_away that gradient steps in the balls find, with a line search over each step's length."""
    rows = torch.arange(len(x))

    def lead(delta: Tensor) -> Tensor:
        scores = network(x + delta)
        return scores[rows, target] - scores[rows, away]

    delta = torch.zeros_like(x)
    best = lead(delta).detach()
    for _ in range(steps):
        delta = delta.requires_grad_()
        (slope,) = torch.autograd.grad(lead(delta).sum(), delta)
        slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-30)
        with torch.no_grad():
            tries = [delta + factor * radius[:, None] * slope for factor in (0.1, 0.5, 2.0)]
            tries = [t * (radius / t.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None] for t in tries]
            leads = torch.stack([lead(t) for t in tries])
            delta = torch.stack(tries)[leads.argmax(0), rows]
            best = torch.maximum(best, leads.amax(0))
    return best


def never_crossed(seed: int, points: int) -> None:
    network = random_network(seed)
    x = 2 * torch.randn(points, 4, dtype=torch.float64)
    judged = LipschitzScores.of(network)
    actions, radii = judged.radii(x)
    costs = judged.costs(x)
    for target in range(costs.shape[1]):
        inside = 0.999 * torch.from_numpy(np.stack((radii, costs[:, target])))
        taken, other = torch.from_numpy(actions), torch.full((points,), target)
        rows = taken != other
        lead = strongest(network, x[rows], other[rows], taken[rows], inside[0][rows])
        assert bool((lead < 0).all()), "another action was reached inside the radius"
        with torch.no_grad():
            rivals = judged._rivals(*judged._evaluated(x)[:2])[0][:, target]
        lead = strongest(network, x[rows], other[rows], torch.from_numpy(rivals)[rows], inside[1][rows])
        assert bool((lead < 0).all()), "an action was reached for less than it costs"


@pytest.mark.parametrize("seed", range(12))
def test_no_attack_crosses_radius_or_cost(seed: int) -> None:
    never_crossed(seed, 20)


@pytest.mark.slow
def test_no_attack_crosses_a_thousand_radii() -> None:
    for seed in range(12, 212):
        never_crossed(seed, 5)


def test_the_radius_of_a_linear_network_is_the_distance_to_the_boundary() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        weight, bias, x = generator.normal(size=(4, 6)), generator.normal(size=4), generator.normal(size=(5, 6))
        actions, radii = LipschitzScores.of(linear(weight, bias)).radii(x)
        scores = x @ weight.T + bias
        assert actions.tolist() == scores.argmax(1).tolist()
        for f, y, radius in zip(scores, actions, radii, strict=True):
            exact = min((f[y] - f[a]) / np.linalg.norm(weight[y] - weight[a]) for a in range(4) if a != y)
            assert exact - 1e-10 < radius <= exact


def test_exactly_at_the_radius_of_a_linear_network_two_actions_tie() -> None:
    layer = linear([[1.0, 2.0], [-1.0, 0.5]], [0.3, 0.0])
    x = np.array([[0.7, -0.2]])
    (action,), (radius,) = LipschitzScores.of(layer).radii(x)
    apart = np.array([-2.0, -1.5])
    for factor, sign in ((1 - 1e-9, 1), (1 + 1e-9, -1)):
        scores = layer(torch.from_numpy(x + factor * radius * apart / np.linalg.norm(apart)))[0].tolist()
        assert sign * (scores[action] - scores[1 - action]) > 0


def test_costs_of_a_linear_network_never_exceed_the_shortest_way() -> None:
    """The exact minimum is a quadratic program: all scores at most that of the action."""
    generator = np.random.default_rng(1)
    for _ in range(15):
        weight, bias, x = generator.normal(size=(4, 3)), generator.normal(size=4), generator.normal(size=3)
        costs = LipschitzScores.of(linear(weight, bias)).costs(x[None])[0]
        for a in range(4):
            rows, gaps = weight[a] - weight, (weight[a] - weight) @ x + bias[a] - bias
            rule = {"type": "ineq", "fun": lambda d, rows=rows, gaps=gaps: rows @ d + gaps}
            found = minimize(lambda d: d @ d, np.zeros(3), constraints=[rule])
            if found.success:
                assert costs[a] <= math.sqrt(found.fun) + 1e-5


def test_an_action_must_beat_every_other_one() -> None:
    """Action 2 could overtake action 0 at 1, but action 1 is always above it by then: it costs 3."""
    layer = linear([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]], [1.0, 0.3, 0.0])
    costs = LipschitzScores.of(layer).costs([[0.0, 0.0]])[0]
    assert costs[0] == 0
    assert costs[1] == pytest.approx(0.7)
    assert costs[2] == pytest.approx(3.0)


@pytest.mark.parametrize(("norm", "factor"), [(1, 1.0), (2, 1.0), (math.inf, 0.5)])
def test_norms(norm: float, factor: float) -> None:
    judged = LipschitzScores.of(random_network(0))
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert judged.costs(x, norm).tolist() == (factor * judged.costs(x)).tolist()
    assert judged.radii(x, norm)[1].tolist() == (factor * judged.radii(x)[1]).tolist()
    assert (judged.reachable(x, 0.1, norm) == (judged.costs(x, norm) <= 0.1)).all()
    assert [c.radius for c in judged.certificates(x, norm=norm)] == pytest.approx(judged.radii(x, norm)[1].tolist(), rel=1e-12)


def test_other_norms_are_refused() -> None:
    judged = LipschitzScores.of(random_network(0))
    for norm in (0, 3, -math.inf, math.nan):
        for ask in (judged.costs, judged.radii):
            with pytest.raises(ValueError, match="norm must be"):
                ask(np.zeros((1, 4)), norm)


def test_the_action_taken_costs_nothing_and_the_radius_is_the_next_cost() -> None:
    judged = LipschitzScores.of(random_network(2))
    x = np.random.default_rng(0).normal(size=(30, 4))
    actions, radii = judged.radii(x)
    costs = judged.costs(x)
    assert (costs[np.arange(30), actions] == 0).all()
    assert radii.tolist() == np.sort(costs, 1)[:, 1].tolist()
    assert judged.reachable(x, 0)[np.arange(30), actions].all()


def test_ties_have_no_radius_and_no_statement() -> None:
    judged = LipschitzScores.of(linear([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert judged.costs([[2.0, 0.0]])[0].tolist()[:2] == [0, 0]
    assert judged.radii([[2.0, 0.0]])[1].tolist() == [0]
    assert judged.certificates([[2.0, 0.0]])[0].abstained
    nothing = LipschitzScores.of(linear(np.zeros((2, 2))))
    assert nothing.costs([[2.0, 0.0]]).tolist() == [[0, 0]]
    assert nothing.certificates([[2.0, 0.0]])[0].abstained


def test_what_no_attack_can_reach_costs_infinity() -> None:
    judged = LipschitzScores.of(linear([[1.0, 0.0], [1.0, 0.0]], [1.0, 0.0]))
    assert judged.costs([[2.0, 0.0]])[0].tolist() == [0, math.inf]
    certificate = judged.certificates([[2.0, 0.0]])[0]
    assert certificate.radius > 1e300
    certificate.verify()
    flat = LipschitzScores.of(nn.Sequential(linear(np.zeros((3, 2))), nn.Tanh(), linear(np.eye(2, 3), [0.0, 1.0])))
    assert flat.radii([[0.0, 0.0]])[1].tolist() == [math.inf]


def test_one_action_is_always_taken() -> None:
    judged = LipschitzScores.of(linear([[1.0, 2.0]]))
    assert judged.radii([[1.0, 1.0]])[1].tolist() == [math.inf]
    (certificate,) = judged.certificates([[1.0, 1.0]])
    certificate.verify()
    assert certificate.prediction == 0


def test_a_decision_that_single_precision_takes_has_no_radius() -> None:
    """2^24 + 1 is 2^24 in single precision: the network itself sees a tie."""
    layer = nn.Linear(1, 2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [1.0]]))
        layer.bias.fill_(2.0**24)
    judged = LipschitzScores.of(layer)
    scores = judged.scores([[1.0]])
    assert scores[0, 1] - scores[0, 0] == 1
    assert judged.costs([[1.0]])[0].tolist() == [0, 0]
    assert judged.radii([[1.0]])[1].tolist() == [0]
    assert judged.certificates([[1.0]])[0].abstained
    assert judged.radii([[100.0]])[1] > 0


def test_both_scores_may_be_rounded_towards_each_other() -> None:
    """2^25 + 6 and 2^25 + 10 are both 2^25 + 8 in single precision."""
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[6.0], [10.0]]))
        layer.bias.fill_(2.0**25)
    judged = LipschitzScores.of(layer)
    assert judged.scores([[1.0]]).tolist() == [[2.0**25 + 6, 2.0**25 + 10]]
    assert layer(torch.ones(1, 1)).argmax() == 0
    assert judged.costs([[1.0]]).tolist() == [[0, 0]]


def test_single_precision_is_taken_off_the_margin() -> None:
    single, double = random_network(1, torch.float32), random_network(1)
    double.load_state_dict(single.state_dict())
    x = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32)
    below, above = LipschitzScores.of(single).radii(x)[1], LipschitzScores.of(double).radii(x)[1]
    assert (below <= above).all()
    np.testing.assert_allclose(below, above, atol=1e-5)
    assert (below < above).mean() > 0.9


def test_without_a_linear_last_layer_scores_are_a_joint_function() -> None:
    """The layer after the last linear one ends the chain: sqrt(2) L between any two scores."""
    first = linear([[2.0, 0.0], [0.0, 1.0]])
    judged = LipschitzScores.of(nn.Sequential(first, nn.Tanh()))
    x = np.array([[0.3, 0.1]])
    lead = math.tanh(0.6) - math.tanh(0.1)
    assert judged.lipschitz == pytest.approx(2)
    assert judged.radii(x)[1][0] == pytest.approx(lead / (2 * math.sqrt(2)))


def test_layers_before_the_last_linear_one_are_features() -> None:
    chain = nn.Sequential(linear([[3.0, 0.0], [0.0, 1.0]]), nn.Identity(), linear([[0.0, 2.0], [1.0, 0.0]]), linear(np.eye(2)))
    judged = LipschitzScores.of(chain)
    assert judged.lipschitz == pytest.approx(6)
    assert judged.radii([[1.0, 0.0]])[1][0] == pytest.approx(3 / (6 * math.sqrt(2)))


class Twice(nn.Linear):
    """Says what it does."""

    def lipschitz(self) -> float:
        return 2 * float(torch.linalg.matrix_norm(self.weight, 2))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_a_linear_layer_is_no_head() -> None:
    layer = Twice(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
    judged = LipschitzScores.of(layer)
    assert judged.lipschitz == pytest.approx(2)
    assert judged.radii([[1.0, 0.0]])[1][0] == pytest.approx(1 / math.sqrt(2))
    assert judged.trusted == ("Twice",)
    certificate = judged.certificates([[1.0, 0.0]])[0]
    assert any("layers Twice" in sentence for sentence in certificate.not_covered)


@pytest.mark.parametrize("make", [DQN, PPO, A2C])
def test_stable_baselines3_models_are_taken_as_they_are(make: Any) -> None:
    model = make("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu")
    judged = LipschitzScores.of(model)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    actions, radii = judged.radii(x)
    assert actions.tolist() == model.predict(x, deterministic=True)[0].tolist()
    assert judged.lipschitz == pytest.approx(1, abs=1e-5)
    head = model.q_net.q_net[0] if make is DQN else model.policy.action_net
    apart = float((head.weight[0] - head.weight[1]).norm())
    scores = PolicyView.of(model).scores(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(radii, np.abs(scores[:, 0] - scores[:, 1]) / apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [DQN, PPO])
def test_hidden_layers_of_stable_baselines3_have_constants_too(make: Any) -> None:
    judged = LipschitzScores.of(make("MlpPolicy", "CartPole-v1", seed=0, device="cpu"))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    upper, found = judged.audit(x)
    assert 0 < found <= upper < 50


@pytest.fixture(scope="module")
def seer() -> DQN:
    kwargs = KWARGS | {
        "features_extractor_class": rrl.LipschitzCNN,
        "features_extractor_kwargs": {"channels": (8, 8), "strides": (4, 4)},
    }
    env = FakeImageEnv(4, 36, 36, 3, channel_first=True)
    return DQN("CnnPolicy", env, policy_kwargs=kwargs, buffer_size=10, seed=0, device="cpu")


def test_radii_of_pictures_are_in_bytes(seer: DQN) -> None:
    judged = LipschitzScores.of(seer)
    assert judged.lipschitz == pytest.approx(1 / 255, rel=1e-9)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), dtype=np.uint8)
    actions, radii = judged.radii(pictures)
    assert actions.tolist() == seer.predict(pictures, deterministic=True)[0].tolist()
    unit = PolicyView.from_sb3(seer, frame_space=spaces.Box(0, 1, (3, 36, 36), np.float32))
    again, in_units = LipschitzScores.of(unit).radii(pictures / 255)
    assert again.tolist() == actions.tolist()
    np.testing.assert_allclose(255 * in_units, radii, rtol=1e-4)


def test_pictures_with_channels_last_have_the_same_radii(seer: DQN) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 36, 36, 3), dtype=np.uint8)
    view = PolicyView.from_sb3(seer, frame_space=spaces.Box(0, 255, (36, 36, 3), np.uint8))
    radii = LipschitzScores.of(view).radii(pictures)[1]
    assert radii == pytest.approx(LipschitzScores.of(seer).radii(np.moveaxis(pictures, -1, 1))[1], rel=1e-3)


def test_pixels_that_a_model_does_not_divide_are_bytes_to_it() -> None:
    kwargs = KWARGS | {"features_extractor_class": rrl.LipschitzCNN, "normalize_images": False}
    model = DQN("CnnPolicy", FakeImageEnv(4, 36, 36, 3, channel_first=True), policy_kwargs=kwargs, buffer_size=10, device="cpu")
    assert LipschitzScores.of(model).lipschitz == pytest.approx(1, rel=1e-9)
    unit = PolicyView.from_sb3(model, frame_space=spaces.Box(0, 1, (3, 36, 36), np.float32))
    assert LipschitzScores.of(unit).lipschitz == pytest.approx(255, rel=1e-9)


class Camera(gym.Env[Any, Any]):
    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (1, 36, 36), np.uint8), "pose": spaces.Box(-np.inf, np.inf, (3,), np.float32)}
    )
    action_space = spaces.Discrete(3)


class Stretch(nn.Flatten):
    def lipschitz(self) -> float:
        return 3.0

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_parts_of_a_dictionary_are_side_by_side() -> None:
    model = DQN("MultiInputPolicy", Camera(), buffer_size=10, policy_kwargs={"net_arch": []}, device="cpu")
    judged = LipschitzScores.of(model)
    x = np.concatenate(
        (np.random.default_rng(0).integers(0, 256, (6, 36 * 36)), np.random.default_rng(1).normal(size=(6, 3))), 1
    )
    view = PolicyView.of(model)
    scores = view.scores(torch.from_numpy(x).float()).detach().numpy()
    np.testing.assert_allclose(judged.scores(x), scores, atol=1e-5)
    upper, found = judged.audit(x)
    assert found <= upper
    assert found == pytest.approx(1, rel=1e-6)  # the pose is passed on as it is
    with torch.no_grad():
        for parameter in model.q_net.features_extractor.extractors["image"].parameters():
            parameter.mul_(20)
    upper, found = judged.audit(x)
    assert 1 < found <= upper
    assert judged.trusted == ()
    model.q_net.features_extractor.extractors["pose"] = Stretch()
    assert judged.trusted == ("Stretch",)
    judged.audit(x)
    assert any("layers Stretch" in sentence for sentence in judged.certificates(x)[0].not_covered)


def test_a_normalisation_widens_by_its_smallest_scale() -> None:
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu")
    statistics = Normalization(np.array([1.0, 0, 0, -2]), np.array([4.0, 0.25, 1, 9]))
    judged = LipschitzScores.of(PolicyView.of(model).after(statistics))
    assert judged.lipschitz == pytest.approx(2, rel=1e-5)
    even = Normalization(np.full(4, 3.0), np.full(4, 16.0), clip=0.5)
    x = np.random.default_rng(0).normal(size=(50, 4))
    radii = LipschitzScores.of(PolicyView.of(model).after(even)).radii(3 + 4 * x)[1]
    np.testing.assert_allclose(radii, 4 * LipschitzScores.of(model).radii(x.clip(-0.5, 0.5))[1], rtol=1e-3, atol=1e-6)


def test_weights_that_change_in_any_way_are_noticed() -> None:
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu")
    judged, x = LipschitzScores.of(model), np.random.default_rng(0).normal(size=(5, 4))
    other = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=1, device="cpu")

    def halved() -> None:
        model.q_net.q_net[0].weight.data.mul_(0.5)

    def stepped() -> None:
        model.q_net(torch.ones(1, 4)).sum().backward()
        model.policy.optimizer.step()

    for change in (
        halved,
        stepped,
        lambda: model.q_net.load_state_dict(other.q_net.state_dict()),
        lambda: polyak_update(model.q_net_target.parameters(), model.q_net.parameters(), 0.5),
    ):
        before = judged.radii(x)[1]
        change()
        after = judged.radii(x)[1]
        assert (before != after).all()
        assert after.tolist() == LipschitzScores.of(model).radii(x)[1].tolist()


def test_a_layer_between_the_layers_that_grows_is_noticed() -> None:
    network = nn.Sequential(linear(np.eye(2)), nn.ReLU(), linear([[1.0, 0.0], [0.0, 1.0]]))
    judged = LipschitzScores.of(network)
    assert judged.lipschitz == pytest.approx(1)
    network[0].weight.data[0, 0] = 5.0
    assert judged.lipschitz == pytest.approx(5)
    network[0].weight.data[0, 0] = math.nan
    for ask in (judged.scores, judged.costs, judged.radii, judged.certificates, judged.audit):
        with pytest.raises(ValueError, match="finite"):
            ask(np.ones((1, 2)))


def test_layers_that_are_swapped_or_set_anew_are_noticed() -> None:
    network = nn.Sequential(linear(np.eye(2)), nn.LeakyReLU(), linear(np.eye(2)))
    judged = LipschitzScores.of(network)
    network[1].negative_slope = -3.0
    assert judged.lipschitz == pytest.approx(3)
    network[1] = nn.Sigmoid()
    assert judged.lipschitz == pytest.approx(0.25)
    network[1] = nn.Softmax(-1)
    with pytest.raises(TypeError, match="layer Softmax"):
        judged.radii([[1.0, 2.0]])


def amplified(layer: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    return 100 * outputs


def replaced(network: nn.Sequential) -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 100 * x

        def __repr__(self) -> str:
            return "ReLU()"

    network[1] = Loud()


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network[1].register_forward_hook(amplified),
        lambda network: setattr(network[1], "forward", lambda x: 100 * x),
        replaced,
    ],
)
def test_what_no_weight_and_no_setting_tells_is_noticed(change: Callable[[nn.Sequential], Any]) -> None:
    network = nn.Sequential(linear(np.eye(2)), nn.ReLU(), linear(np.eye(2)))
    judged = LipschitzScores.of(network)
    change(network)
    with pytest.raises(TypeError, match="ReLU|Loud"):
        judged.radii([[1.0, 2.0]])


def test_a_slope_and_a_tensor_that_change_later_are_noticed() -> None:
    network = nn.Sequential(linear(np.eye(2)), Contraction(LeakyReLU(0.5)), linear(np.eye(2)))
    judged = LipschitzScores.of(network)
    network[1].slope = 0.01
    assert judged.lipschitz == pytest.approx(100)
    weight = network[0].weight.detach()
    del network[0].weight
    network[0].weight = weight
    assert judged.lipschitz == pytest.approx(100)
    network[0].weight = 3 * weight
    assert judged.lipschitz == pytest.approx(300)


def test_a_views_own_network_is_read_anew() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    view = PolicyView.from_torch(first, kind="q", observation_shape=(2,))
    judged = LipschitzScores.of(view)
    view.actor = second
    assert judged.radii([[1.0, 2.0]])[1].tolist() == LipschitzScores.of(second).radii([[1.0, 2.0]])[1].tolist()
    view.actor = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1))
    with pytest.raises(TypeError, match="Softmax"):
        judged.radii([[1.0, 2.0]])


@pytest.mark.parametrize("name", ["hook", "forward", "items", "order"])
def test_a_joint_extractor_is_taken_apart_only_as_it_is(name: str) -> None:
    model = DQN("MultiInputPolicy", Camera(), buffer_size=10, policy_kwargs={"net_arch": []}, device="cpu")
    judged = LipschitzScores.of(model)
    extractor = model.q_net.features_extractor
    if name == "hook":
        extractor.register_forward_hook(amplified)
    elif name == "forward":
        extractor.forward = lambda parts: torch.zeros(1)
    elif name == "items":
        extractor.extractors.items = lambda: []
    else:
        extractor.extractors = nn.ModuleDict(dict(reversed(extractor.extractors.items())))
    with pytest.raises(TypeError, match="CombinedExtractor|ModuleDict"):
        judged.lipschitz  # noqa: B018


@pytest.mark.parametrize("make", [PPO, A2C])
def test_logits_that_tie_as_probabilities_have_no_radius(make: Any) -> None:
    """Stable-Baselines3 takes the first of equal probabilities in float32."""
    model = make("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": []}, seed=0, device="cpu")
    generator = np.random.default_rng(0)
    w = np.array([1.0, -2.0, 0.5, 1.0])
    with torch.no_grad():
        model.policy.action_net.weight.copy_(torch.tensor(np.stack((np.zeros(4), 1e-4 * w))))
        model.policy.action_net.bias.zero_()
    x = generator.normal(size=(2000, 4))
    x += np.outer(generator.normal(size=2000) * 1e-3 - x @ w, w) / (w @ w)
    x = x.astype(np.float32)
    actions, radii = LipschitzScores.of(model).radii(x)
    wrong = model.predict(x, deterministic=True)[0] != actions
    assert wrong.sum() > 10
    assert (radii[wrong] == 0).all()


def test_what_cancels_before_the_features_is_paid_for() -> None:
    """x + 2^53 - 2^53 is 0 or 2 near 1: in real arithmetic action 1 is taken above 0.5."""
    network = nn.Sequential(linear([[1.0]], 2.0**53), linear([[1.0]], -(2.0**53)), linear([[0.0], [1.0]], [0.5, 0.0]))
    assert LipschitzScores.of(network).radii([[0.95]])[1][0] == 0
    small = nn.Sequential(activation("softplus", beta=1e-12)(), linear([[0.0], [1.0]], [1.0, 0.0]))
    x = np.linspace(1.99, 2.01, 2001)[:, None]
    actions, radii = LipschitzScores.of(small).radii(x)
    assert (radii[actions != (x[:, 0] > 2)] == 0).all()


def test_what_cancels_in_a_part_of_a_dictionary_is_paid_for() -> None:
    model = DQN("MultiInputPolicy", Camera(), buffer_size=10, policy_kwargs={"net_arch": []}, device="cpu")
    judged, x = LipschitzScores.of(model), np.zeros((1, 36 * 36 + 3))
    before = judged._evaluated(x)[1]
    extractor = model.q_net.features_extractor.extractors
    extractor["pose"] = nn.Sequential(nn.Flatten(), linear(np.eye(3), 1e12).float(), linear(np.eye(3), -1e12).float())
    assert judged._evaluated(x)[1] > 0.1 + before


def test_the_operator_in_use_is_the_one_that_is_certified() -> None:
    """The exponential of huge weights is not orthogonal in float32."""
    layer = OrthogonalLinear(64, 64)
    layer.weight.data.mul_(1e6)
    acting = float(torch.linalg.matrix_norm(layer.operator().detach().double(), 2))
    assert acting > 1.01
    assert LipschitzScores.of(nn.Sequential(layer, nn.Linear(64, 2))).lipschitz >= acting


def test_tiny_weights_do_not_read_as_none() -> None:
    """Action 1 is taken above 1."""
    network = nn.Sequential(linear([[0.0], [1e-170]], [1e-170, 0.0]))
    certificate = LipschitzScores.of(network).certificates([[0.0]])[0]
    certificate.verify()
    assert certificate.radius == pytest.approx(1)
    network = nn.Sequential(linear([[1e-170]]), linear([[1e-170]]), linear([[0.0], [1e100]], [1e-200, 0.0]))
    assert LipschitzScores.of(network).radii([[0.0]])[1][0] <= 1e40
    network = nn.Sequential(linear([[1e-170]]), linear([[0.0], [1e-170]], [1e-300, 0.0]))
    assert LipschitzScores.of(network).radii([[0.0]])[1][0] <= 1e40


def test_no_batch_takes_another_action_inside_a_radius() -> None:
    """Points as near to the boundary as float32 allows, alone and together."""
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, seed=0, device="cpu")
    judged = LipschitzScores.of(model)
    low, high = np.random.default_rng(0).normal(size=(2, 256, 4)).astype(np.float32) * 3
    side = judged.scores(low).argmax(1)
    apart = side != judged.scores(high).argmax(1)
    low, high, side = low[apart], high[apart], side[apart]
    for _ in range(40):
        middle = (low + high) / 2
        same = (judged.scores(middle).argmax(1) == side)[:, None]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    actions, radii = judged.radii(low)
    alone = np.array([model.predict(one, deterministic=True)[0] for one in low])
    assert (radii[alone != actions] == 0).all()
    assert (radii < 1e-5).all()


def test_inputs_of_a_modules_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\) do not fit"):
        LipschitzScores.of(nn.Linear(2, 2)).radii(np.ones((1, 3)))


def test_files_bring_the_same_radii_back(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS | {"share_features_extractor": False}, seed=0, device="cpu")
    x = np.random.default_rng(0).normal(size=(20, 4))
    before = LipschitzScores.of(model).radii(x)[1]
    model.save(tmp_path / "model")
    assert LipschitzScores.of(PPO.load(tmp_path / "model", device="cpu")).radii(x)[1].tolist() == before.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_observations_are_refused(bad: float) -> None:
    judged = LipschitzScores.of(random_network(0))
    with pytest.raises(ValueError, match="observations must be finite"):
        judged.costs([[0.0, bad, 0.0, 0.0]])


def test_observations_have_the_policys_shape() -> None:
    judged = LipschitzScores.of(DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, device="cpu"))
    for shape in ((4,), (2, 3), (2, 4, 1)):
        with pytest.raises(ValueError, match="observations must be of shape"):
            judged.scores(np.zeros(shape))


def test_scores_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        LipschitzScores.of(nn.Linear(1, 2)).radii([[1e300]])


def test_batches_of_any_size_say_the_same() -> None:
    judged = LipschitzScores.of(random_network(3))
    x = np.random.default_rng(0).normal(size=(600, 4))
    np.testing.assert_allclose(judged.costs(x)[500:], judged.costs(x[500:]), rtol=1e-12)


def test_what_cannot_be_taken_apart_is_named() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    view = PolicyView.of(DQN("MlpPolicy", "CartPole-v1", policy_kwargs=KWARGS, device="cpu"))
    for policy, message in (
        (Plain(), "layer Plain"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "layer BatchNorm1d"),
        (view.denoised(rrl.networks.ResidualMLP(4)) if False else view.denoised(nn.Linear(4, 4)), "layer _Denoised"),
        (SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu"), "must have discrete actions"),
        (lambda x: x, "must be a Stable-Baselines3 model"),
    ):
        with pytest.raises(TypeError, match=message):
            LipschitzScores.of(policy)


def test_recurrent_policies_are_refused() -> None:
    from sb3_contrib import RecurrentPPO

    with pytest.raises(TypeError, match="recurrent"):
        LipschitzScores.of(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu"))


def test_frozen_views_are_known_too() -> None:
    view = PolicyView.of(PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu"))
    x = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(
        LipschitzScores.of(view.for_inference()).radii(x)[1], LipschitzScores.of(view).radii(x)[1], atol=1e-5
    )


def test_the_network_itself_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    judged = LipschitzScores.of(network)
    judged.certificates(x)
    judged.audit(x)
    assert all(
        torch.equal(before[name], value) and value.dtype == torch.float32 for name, value in network.state_dict().items()
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert network[1].inplace


def test_layers_that_work_in_place_spoil_nothing() -> None:
    head = linear(np.eye(2))
    judged = [LipschitzScores.of(nn.Sequential(nn.LeakyReLU(0.5, inplace=inplace), head)) for inplace in (True, False)]
    x = np.array([[-1.0, -2.0], [1.0, -4.0]])
    assert judged[0].radii(x)[1].tolist() == judged[1].radii(x)[1].tolist()
    assert x.min() == -4
    assert judged[0].audit(x) == judged[1].audit(x)


@pytest.mark.parametrize("seed", range(8))
def test_no_expansion_above_the_constant_is_found(seed: int) -> None:
    upper, found = LipschitzScores.of(random_network(seed)).audit(np.random.default_rng(seed).normal(size=(40, 4)))
    assert 0 < found <= upper


def test_the_audit_is_exact_for_matrices() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 4))
    judged = LipschitzScores.of(nn.Sequential(linear(weight), nn.Identity(), linear(np.eye(3, 5))))
    upper, found = judged.audit(np.zeros((1, 4)), steps=200)
    assert found == pytest.approx(np.linalg.norm(weight, 2), rel=1e-9)
    assert upper == pytest.approx(found, rel=1e-9)


def test_a_wrong_claim_is_found_by_the_audit() -> None:
    class Liar(nn.Linear):
        def lipschitz(self) -> float:
            return 0.1

    layer = Liar(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    upper, found = LipschitzScores.of(nn.Sequential(layer, nn.Linear(2, 2))).audit(np.ones((2, 2)))
    assert found > upper


@pytest.fixture(scope="module")
def certificate() -> RadiusCertificate:
    return LipschitzScores.of(random_network(2)).certificates(np.random.default_rng(0).normal(size=(1, 4)))[0]


def test_a_certificate_recomputes_and_tells_its_limits(certificate: RadiusCertificate, tmp_path: Path) -> None:
    certificate.verify()
    certificate.save(tmp_path / "c.json")
    assert RadiusCertificate.load(tmp_path / "c.json") == certificate
    assert certificate.alpha == 0
    assert certificate.noise is None
    assert certificate.fp_model == "real"
    assert certificate.scope == "step"
    assert "certain" in certificate.table()
    text = " ".join(certificate.not_covered)
    for words in ("real arithmetic", "sampled or explored", "units", "eps sqrt(k)", "Other steps"):
        assert words in text
    assert "claims" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"radius": 9.0},
        {"prediction": 0},
        {"fp_model": "exact"},
        {"not_covered": ()},
        {"norm": math.inf},
    ],
)
def test_a_certificate_that_was_edited_is_found(certificate: RadiusCertificate, change: dict[str, Any]) -> None:
    assert certificate.prediction != 0
    with pytest.raises(CertificateError, match=next(iter(change)) if "norm" not in change else "radius"):
        replace(certificate, **change).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [math.nan, 0.0, 1.0]},
        {"scores": []},
        {"scores": [0.0, 1.0]},
        {"rivals": [0, 1]},
        {"rivals": [0, 1, 3]},
        {"rivals": [0, 1, -1]},
        {"rivals": [0, 1, 1.5]},
        {"differences": [1.0, 1.0, -1.0]},
        {"differences": [1.0, 1.0, math.nan]},
        {"lipschitz": -1.0},
        {"lipschitz": math.inf},
        {"rounding": -1e-3},
        {"rounding": math.nan},
        {"dimension": 0},
        {"trusted": "mine"},
        {"trusted": [1]},
        {"more": 1},
    ],
)
def test_impossible_evidence_is_refused(certificate: RadiusCertificate, change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        certified("lipschitz", certificate.evidence | change, alpha=0.0, norm=2, scope="step")


def test_it_is_a_method_of_its_own(certificate: RadiusCertificate) -> None:
    for change, message in (
        ({"alpha": 0.05}, "alpha must be 0"),
        ({"scope": "trajectory"}, "no proof for scope"),
        ({"noise": rrl.Gaussian(0.1)}, "noise must be None"),
        ({"norm": 0}, "norm must be"),
    ):
        with pytest.raises(ValueError, match=message):
            certified("lipschitz", certificate.evidence, **({"alpha": 0.0, "norm": 2, "scope": "step"} | change))
    with pytest.raises(ValueError, match="method must be one of"):
        input_method("lipschitz")


def test_any_rival_gives_a_valid_cost(certificate: RadiusCertificate) -> None:
    """Evidence about other rivals proves less, never more."""
    evidence = certificate.evidence
    y = certificate.prediction
    weights = LipschitzScores.of(random_network(2)).differences(3)
    other = evidence | {"rivals": [y] * 3, "differences": weights[y].tolist()}
    assert certified("lipschitz", other, alpha=0.0, norm=2, scope="step").radius <= certificate.radius


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_radii() -> None:
    network = random_network(0, torch.float32)
    x = np.random.default_rng(0).normal(size=(50, 4))
    actions, radii = LipschitzScores.of(network).radii(x)
    there, others = LipschitzScores.of(network.cuda()).radii(x)
    assert there.tolist() == actions.tolist()
    np.testing.assert_allclose(radii, others, atol=1e-5)
