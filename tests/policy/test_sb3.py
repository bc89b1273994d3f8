"""The networks inside SB3's policies: every algorithm acts through its view as it acts through `predict`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from scipy import stats
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.dqn.policies import CnnPolicy, DQNPolicy, QNetwork
from torch import nn

from robustrl.policy import PolicyView

FRAMES = spaces.Box(-5, 5, (3,), np.float32)
LOW, HIGH = np.array([[[-2, 0, -1], [1, -0.5, -3]], [[1, 5, 0.5], [1.5, 0.5, 2]]], dtype=np.float32)
ACTIONS = spaces.Box(LOW, HIGH)
"""Neither symmetric nor flat, so that a bound or an axis in the wrong place shows."""


class Nothing(gym.Env[Any, Any]):
    """Spaces to build models for."""

    def __init__(self, observations: spaces.Space[Any] = FRAMES, actions: spaces.Space[Any] = ACTIONS) -> None:
        self.observation_space, self.action_space = observations, actions


def build(algorithm: Any, policy: str = "MlpPolicy", env: Any = None, **options: Any) -> Any:
    """A small model whose random weights are large enough to drive actions to their bounds."""
    if algorithm in (DQN, SAC, TD3, DDPG):
        options.setdefault("buffer_size", 10)
    kwargs = {"net_arch": [16], **options.pop("policy_kwargs", {})}
    model = algorithm(policy, env or Nothing(), policy_kwargs=kwargs, device="cpu", seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if "log_std" not in name:
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


DISCRETE = Nothing(actions=spaces.Discrete(4))
MODELS: dict[str, Callable[[], Any]] = {
    "PPO": lambda: build(PPO),
    "A2C": lambda: build(A2C),
    "SAC": lambda: build(SAC),
    "SAC gSDE": lambda: build(SAC, use_sde=True),
    "SAC gSDE without clipped mean": lambda: build(SAC, use_sde=True, policy_kwargs={"clip_mean": 0.0}),
    "TD3": lambda: build(TD3),
    "DDPG": lambda: build(DDPG),
    "PPO gSDE": lambda: build(PPO, use_sde=True),
    "PPO gSDE squashed": lambda: build(PPO, use_sde=True, policy_kwargs={"squash_output": True}),
    "PPO, extractors of its own": lambda: build(PPO, policy_kwargs={"share_features_extractor": False, "net_arch": {"pi": [8], "vf": [4]}}),
    "PPO discrete": lambda: build(PPO, env=DISCRETE),
    "A2C discrete": lambda: build(A2C, env=DISCRETE),
    "DQN": lambda: build(DQN, env=DISCRETE, exploration_initial_eps=0.4),
    "RecurrentPPO": lambda: build(sb3_contrib.RecurrentPPO, "MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 8}, n_steps=8),
    "RecurrentPPO discrete": lambda: build(sb3_contrib.RecurrentPPO, "MlpLstmPolicy", DISCRETE, policy_kwargs={"lstm_hidden_size": 8, "n_lstm_layers": 2}, n_steps=8),
}  # fmt: skip
GSDE = [name for name in MODELS if "gSDE" in name]
RECURRENT = [name for name in MODELS if "Recurrent" in name]
CLIPPED = ("PPO", "A2C", "PPO gSDE", "PPO, extractors of its own", "RecurrentPPO")


@cache
def model_of(name: str) -> Any:
    """Models are built once; tests that change one build their own."""
    return MODELS[name]()


def observations(n: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)


def act(view: PolicyView, x: np.ndarray, memory: Any = None, **options: Any) -> np.ndarray:
    actions, _ = view.decide(
        torch.from_numpy(x)[:, None], view.memory(len(x)) if memory is None else memory, batch=64, **options
    )
    return view.received(actions)


# ---------------------------------------------------------------------------------------------- greedy actions


@pytest.mark.parametrize("name", MODELS)
def test_greedy_actions_are_those_of_predict(name: str) -> None:
    model, x = model_of(name), observations(300)
    view = PolicyView.from_sb3(model)
    expected, _ = model.predict(x, deterministic=True)
    for version in (view, view.for_inference()):
        found = act(version, x)
        assert found.dtype == (np.int64 if view.discrete else np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)
        assert all(view.action_space.contains(row) for row in found)
    assert len(np.unique(expected, axis=0)) > (1 if view.discrete else 100)
    if name in CLIPPED:
        low, high = np.mean(expected == LOW), np.mean(expected == HIGH)
        assert 0.01 < low < 0.9
        assert 0.01 < high < 0.9
    assert view.action_space == model.action_space
    assert view.frame_shape == (3,)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_view_goes_through_episodes_as_predict_does(name: str) -> None:
    """Five episodes side by side that start at different times; batches of four, so that rows are padded."""
    model, generator = model_of(name), np.random.default_rng(0)
    view = PolicyView.from_sb3(model).for_inference()
    state, memory = None, view.memory(5)
    assert memory is not None
    forgot = []
    for step in range(8):
        x, starts = observations(5, seed=step), generator.random(5) < (1.0 if step == 0 else 0.25)
        expected, state = model.predict(x, state=state, episode_start=starts, deterministic=True)
        memory = torch.where(torch.from_numpy(starts)[:, None, None, None], 0, memory)
        actions, memory = view.decide(torch.from_numpy(x)[:, None], memory, batch=4)
        assert memory is not None
        np.testing.assert_allclose(view.received(actions), expected, rtol=1e-5, atol=2e-6)
        for part, theirs in enumerate(state):
            np.testing.assert_allclose(memory[:, part].movedim(0, 1).numpy(), theirs, rtol=1e-5, atol=1e-6)
        forgot.append(np.array_equal(act(view, x), expected))
    assert not all(forgot)  # the memory matters


@pytest.mark.parametrize("name", ["SAC", "TD3", "DDPG"])
def test_action_values_are_the_lowest_of_the_critics(name: str) -> None:
    model, x = model_of(name), torch.from_numpy(observations(50))
    view = PolicyView.from_sb3(model)
    generator = np.random.default_rng(0)
    actions = np.stack([generator.uniform(LOW, HIGH).astype(np.float32) for _ in range(50)])
    scaled = torch.from_numpy(model.policy.scale_action(actions)).flatten(1)
    with torch.no_grad():
        expected = torch.cat(model.critic(x, scaled), dim=1).amin(1)
        assert torch.allclose(view.action_value(x, torch.from_numpy(actions).flatten(1)), expected, atol=1e-5)
        greedy = torch.from_numpy(model.predict(x.numpy(), deterministic=True)[0]).flatten(1)
        assert torch.allclose(view.value(x), view.action_value(x, greedy), atol=1e-4)
    x.requires_grad_(True)
    assert torch.autograd.grad(view.value(x).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["PPO", "A2C", "PPO gSDE"])
def test_state_values_are_the_critics(name: str) -> None:
    model, x = model_of(name), torch.from_numpy(observations(50))
    with torch.no_grad():
        assert torch.allclose(PolicyView.from_sb3(model).value(x), model.policy.predict_values(x).squeeze(1), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if "discrete" not in name and name != "DQN"])
def test_the_mean_action_is_the_greedy_one_before_clipping_and_differentiable(name: str) -> None:
    model = model_of(name)
    view, x = PolicyView.from_sb3(model), torch.from_numpy(observations(100)).requires_grad_(True)
    mean = view.mean_action(x, view.memory(100))
    low, high = (torch.from_numpy(bound).flatten() for bound in (LOW, HIGH))
    np.testing.assert_allclose(
        mean.clamp(low, high).detach().reshape(-1, 2, 3).numpy(), act(view, x.detach().numpy()), atol=1e-6
    )
    outside = bool(((mean < low - 1e-3) | (mean > high + 1e-3)).any())
    assert outside == (name in CLIPPED)
    gradient = torch.autograd.grad(mean[:, 2].sum(), x)[0]
    e = torch.zeros(3)
    e[1] = 1e-3
    with torch.no_grad():
        slope = (view.mean_action(x + e, view.memory(100)) - view.mean_action(x - e, view.memory(100)))[:, 2] / 2e-3
    smooth = (slope - gradient[:, 1]).abs() < 0.02 * (1 + gradient[:, 1].abs())  # ReLU networks have kinks
    assert smooth.float().mean() > 0.9
    assert gradient.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- sampled actions


@pytest.mark.parametrize("name", [name for name in MODELS if name not in GSDE and name != "DQN"])
def test_the_law_of_sampled_actions_is_that_of_predict(name: str) -> None:
    """Each entry by Kolmogorov-Smirnov, pairs of entries by their covariance; DQN explores row by row, see `test_view`."""
    model, n = model_of(name), 4000
    view = PolicyView.from_sb3(model)
    x = np.repeat(observations(1, seed=5) / 10, n, axis=0)
    draws = view.draw(n, torch.Generator().manual_seed(2))
    ours = act(view, x, deterministic=False, draws=draws).reshape(n, -1).astype(np.float64)
    torch.manual_seed(3)
    theirs = model.predict(x, deterministic=False)[0].reshape(n, -1).astype(np.float64)
    if name in ("TD3", "DDPG"):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        return
    for left, right in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(left, right).pvalue > 1e-3
    assert len(np.unique(ours, axis=0)) > (1 if view.discrete else n // 2)
    scale = np.atleast_2d(np.cov(ours.T)).diagonal()
    assert np.all(np.abs(np.cov(ours.T) - np.cov(theirs.T)) < 0.2 * np.sqrt(np.outer(scale, scale)))


@pytest.mark.parametrize("bias", [-40.0, 10.0])
def test_the_standard_deviation_of_sac_has_its_limits(bias: float) -> None:
    """SB3 clips its logarithm to [-20, 2]."""
    model, x = build(SAC), torch.from_numpy(observations(20))
    with torch.no_grad():
        model.actor.log_std.bias += bias
        log_std = PolicyView.from_sb3(model).scores(x)[:, 6:]
        assert torch.equal(log_std, model.actor.get_action_dist_params(x)[1])
    assert (log_std == (-20 if bias < 0 else 2)).any()


@pytest.mark.parametrize("name", GSDE)
def test_state_dependent_exploration_is_no_policy_of_one_step(name: str) -> None:
    view = PolicyView.from_sb3(model_of(name))
    assert not view.samples
    draws = view.draw(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"^deterministic must be True: state-dependent exploration \(gSDE\)"):
        act(view, observations(2), deterministic=False, draws=draws)
    with pytest.raises(ValueError, match="^deterministic must be True"):
        view.actions(view.scores(torch.zeros(2, 3)), deterministic=False, draws=draws)


# ---------------------------------------------------------------------------------------------- broken weights


LAST_LAYERS = {
    "PPO": "action_net.bias",
    "SAC": "actor.mu.bias",
    "SAC gSDE": "actor.mu.0.bias",
    "TD3": "actor.mu.2.bias",
    "DDPG": "actor.mu.2.bias",
    "PPO gSDE": "action_net.bias",
    "PPO gSDE squashed": "action_net.bias",
    "DQN": "q_net.q_net.2.bias",
    "RecurrentPPO": "action_net.bias",
    "PPO discrete": "action_net.bias",
}


SQUASHED = ("SAC gSDE", "TD3", "DDPG", "PPO gSDE squashed")
"""Their networks end in a tanh: an infinite weight there is no broken one."""


@pytest.mark.parametrize(
    ("name", "value"), [(n, math.nan) for n in LAST_LAYERS] + [(n, math.inf) for n in LAST_LAYERS if n not in SQUASHED]
)
def test_broken_weights_never_become_an_action(name: str, value: float) -> None:
    model = MODELS[name]()
    view = PolicyView.from_sb3(model)
    assert act(view, observations(3)).shape[0] == 3
    with torch.no_grad():
        dict(model.policy.named_parameters())[LAST_LAYERS[name]][0] = value
    x = torch.from_numpy(observations(3))
    for version in (view, view.for_inference()):
        actions, _ = version.decide(x[:, None], version.memory(3), batch=2)
        assert not torch.isfinite(actions).all() if actions.is_floating_point() else (actions < 0).all()
        with pytest.raises(ValueError, match="scores must be finite, got NaN or inf"):
            version.received(actions)
    with pytest.raises(ValueError, match="scores must be finite"):
        view.actions(view.scores(x, view.memory(3)))


def test_a_broken_row_leaves_the_others_alone() -> None:
    view, x = PolicyView.from_sb3(model_of("PPO")), torch.from_numpy(observations(4))
    x[2] = math.nan
    actions, _ = view.decide(x[:, None], batch=4)
    assert torch.isfinite(actions).all(1).tolist() == [True, True, False, True]
    np.testing.assert_allclose(view.received(actions[:2]), act(view, x[:2].numpy()), atol=1e-6)


# ------------------------------------------------------------------------------------------------- refusals


class Lively(ActorCriticPolicy):
    """Its Gaussian is not the one of its layers."""

    def get_distribution(self, obs: Any) -> Any:
        distribution: Any = super().get_distribution(obs)
        distribution.distribution.loc += 0.5
        return distribution


class Second(DQNPolicy):
    """Takes the second best action."""

    def _predict(self, obs: Any, deterministic: bool = True) -> torch.Tensor:
        return self.q_net(obs).argsort(1)[:, -2]


class FarOff(DQNPolicy):
    """Takes the best action near 0 alone."""

    def _predict(self, obs: Any, deterministic: bool = True) -> torch.Tensor:
        return self.q_net(torch.where(obs.abs() > 1, -obs, obs)).argmax(1)


class Opposite(ActorCriticPolicy):
    """Takes another action than `predict` of its base class."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        actions, state = super().predict(*args, **kwargs)
        return 1 - actions, state


def hooked(model: Any, name: str) -> Any:
    attrgetter(name)(model).register_forward_hook(lambda module, inputs, output: output)
    return model


def louder(model: Any) -> Any:
    """A policy whose standard deviation is not its parameter."""
    original = model.policy.get_distribution

    def get_distribution(obs: Any) -> Any:
        distribution = original(obs)
        distribution.distribution.scale = distribution.distribution.scale * 2
        return distribution

    model.policy.get_distribution = get_distribution
    return model


class OwnActor(SAC.policy_aliases["MlpPolicy"]):  # type: ignore[name-defined,misc]
    def make_actor(self, features_extractor: Any = None) -> Any:
        actor = super().make_actor(features_extractor)
        original = actor.get_action_dist_params
        actor.get_action_dist_params = lambda obs: (original(obs)[0] * 2, *original(obs)[1:])
        return actor


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(PPO, Lively), "computes something else than Stable-Baselines3's own"),
        (lambda: louder(build(PPO)), "no view for PPO: .* of its own"),
        (lambda: build(DQN, Second, env=DISCRETE), "no view for DQN: its policy class computes something else"),
        (lambda: build(DQN, FarOff, env=DISCRETE), "no view for DQN: its policy class computes something else"),
        (lambda: build(PPO, Opposite, env=DISCRETE), "no view for PPO: its policy class computes something else"),
        (lambda: hooked(build(DQN, env=DISCRETE), "policy.q_net"), "no view for DQN: QNetwork has hooks"),
        (lambda: hooked(build(PPO), "policy.mlp_extractor"), "no view for PPO: MlpExtractor has hooks"),
        (lambda: hooked(build(SAC), "policy.actor"), "no view for SAC: Actor has hooks"),
        (lambda: hooked(build(A2C), "policy"), "no view for A2C: ActorCriticPolicy has hooks"),
        (lambda: build(SAC, OwnActor), "no view for SAC: .* of its own"),
        (lambda: build(PPO, env=Nothing(actions=spaces.MultiDiscrete([2, 2]))), r"actions must be a Discrete or a Box space, got MultiDiscrete"),
        (lambda: build(A2C, env=Nothing(actions=spaces.MultiBinary(3))), r"A2C: actions must be a Discrete or a Box space, got MultiBinary"),
        (lambda: build(DQN, env=Nothing(spaces.MultiDiscrete([2, 2]), spaces.Discrete(2))), "observations must be a Box space or a Dict of them"),
        (lambda: build(PPO, env=Nothing(spaces.MultiBinary(3))), "observations must be a Box space or a Dict of them, got MultiBinary"),
        (lambda: build(sb3_contrib.QRDQN, env=DISCRETE, buffer_size=10), "no view for QRDQN with QRDQNPolicy; supported are PPO"),
        (lambda: build(sb3_contrib.TQC, buffer_size=10), "no view for TQC with TQCPolicy"),
        (lambda: sb3_contrib.ARS("LinearPolicy", Nothing()), "no view for ARS"),
        (lambda: build(sb3_contrib.CrossQ, buffer_size=10), "no view for CrossQ"),
        (lambda: build(sb3_contrib.MaskablePPO, env=DISCRETE), "no view for MaskablePPO"),
        (lambda: build(PPO).policy, "model must be a Stable-Baselines3 model, got ActorCriticPolicy"),
    ],
)  # fmt: skip
def test_what_has_no_view_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PolicyView.from_sb3(make())


def test_a_bidirectional_memory_is_refused() -> None:
    model = MODELS["RecurrentPPO"]()
    model.policy.lstm_actor = nn.LSTM(3, 4, bidirectional=True)
    with pytest.raises(TypeError, match="no view for RecurrentPPO: its LSTM is bidirectional, batch-first or projected"):
        PolicyView.from_sb3(model)


def test_trust_region_models_are_actor_critics_like_ppo() -> None:
    model, x = build(sb3_contrib.TRPO), observations(50)
    np.testing.assert_allclose(act(PolicyView.from_sb3(model), x), model.predict(x, deterministic=True)[0], atol=2e-6)


def test_viewing_leaves_a_models_training_mode_as_it_was() -> None:
    for mode in (True, False):
        model = build(PPO)
        model.policy.set_training_mode(mode)
        PolicyView.from_sb3(model)
        assert model.policy.training == mode


# ------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_acts_is_in_the_fingerprint(name: str) -> None:
    """One entry of each tensor in turn: the fingerprint changes exactly where the scores can."""
    model = MODELS[name]()
    view, x = PolicyView.from_sb3(model), torch.from_numpy(observations(20))
    memory = view.memory(20)
    if memory is not None:
        memory += torch.linspace(-1, 1, memory.numel()).reshape(memory.shape)
    with torch.no_grad():
        prints, scores = {view.fingerprint()}, view.scores(x, memory)
        acting = 0
        for parameter in model.policy.parameters():
            before = parameter.clone()
            parameter += 0.5
            moved = not torch.equal(view.scores(x, memory), scores)
            changed = view.fingerprint() not in prints
            assert changed >= moved
            acting += moved
            prints.add(view.fingerprint())
            parameter.copy_(before)
            assert view.fingerprint() in prints
    assert acting >= 2


def test_pictures_are_compared_over_all_their_bytes() -> None:
    """Up to a fourth of the brightness nothing differs."""

    class Contrast(QNetwork):
        def extract_features(self, obs: Any, features_extractor: Any) -> torch.Tensor:
            x = obs.float() / 255
            return features_extractor(torch.where(x > 0.25, 1000 * (x - 0.25) + 0.25, x))

    class Sharp(CnnPolicy):
        def make_q_net(self) -> QNetwork:
            return Contrast(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)

    with pytest.raises(TypeError, match="computes something else"):
        PolicyView.of(DQN(Sharp, FakeImageEnv(3, 36, 36, 1, channel_first=True), buffer_size=10, device="cpu"))
