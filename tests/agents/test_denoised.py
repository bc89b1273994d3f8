"""A frozen policy behind a denoiser."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.special import ndtri
from stable_baselines3 import PPO, SAC
from torch import nn
from toys import balancer, network_balancer

import robustrl as rrl
from robustrl.agents import MajorityVoteAgent, MedianAgent, SmoothedAgent
from robustrl.agents.denoised import DenoisedAgent
from robustrl.networks import ResidualMLP
from robustrl.policy import PolicyView

NOISE = rrl.Gaussian(0.2)


class Constant(nn.Module):
    """Sees nothing."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.register_buffer("value", torch.as_tensor(value, dtype=torch.float32))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(observation), *self.value.shape)


class Mean(nn.Module):
    """The mean of the frames."""

    def __init__(self, n_frames: int) -> None:
        super().__init__()
        self.n_frames = n_frames

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return observation.reshape(len(observation), self.n_frames, -1).mean(1)


def frames(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


@pytest.mark.parametrize("history", [1, 3])
def test_an_untrained_denoiser_makes_the_smoothed_agent(history: int) -> None:
    denoiser = ResidualMLP((4 * history,), 0.2, keep=4, hidden=(8,))
    plain, denoised = (
        SmoothedAgent(network_balancer(), NOISE, seed=1),
        DenoisedAgent(network_balancer(), denoiser, NOISE, seed=1),
    )
    assert denoised.frame_stack == history
    states: list[Any] = [None, None]
    for step in range(20):
        for i, agent in enumerate((plain, denoised)):
            actions, states[i] = agent.predict(frames(50, step), states[i], deterministic=True)
            if i == 0:
                expected = actions
        assert np.array_equal(actions, expected)


def test_the_policy_acts_on_what_the_denoiser_makes_of_its_noisy_history() -> None:
    """A denoiser that averages three frames, and a policy on the average: the same agent as a policy of three averaged frames."""
    one, three = (
        DenoisedAgent(balancer(), Mean(3), NOISE, history=3, seed=4),
        SmoothedAgent(balancer(3), NOISE, frame_stack=3, seed=4),
    )
    states: list[Any] = [None, None]
    for step in range(10):
        found, states[0] = one.predict(frames(100, step), states[0], deterministic=True)
        expected, states[1] = three.predict(frames(100, step), states[1], deterministic=True)
        assert np.mean(found == expected) > 0.98  # up to float32 averages on the boundary
        assert np.array_equal(states[0][0], states[1][0])


def test_weights_that_change_end_the_certificates() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0)
    agent = DenoisedAgent(model, ResidualMLP((4,), 0.2), NOISE)
    agent.check_frozen()
    assert isinstance(agent.view, PolicyView)
    model.learn(32)
    for use in (agent.check_frozen, lambda: agent.view, agent.vote):
        with pytest.raises(RuntimeError, match="weights changed"):
            use()


def test_single_actions_are_certified_through_the_denoiser() -> None:
    """Behind a denoiser that sees nothing every vote is the same: the radius is that of n votes of n."""
    agent = DenoisedAgent(network_balancer(), Constant([0.1, 0.1, 0.1, 0.1]), NOISE).vote(100, seed=0)
    assert isinstance(agent, MajorityVoteAgent)
    certificate = agent.certify(frames(1), alpha=0.001, n=1000)[0]
    assert (certificate.prediction, certificate.abstained, certificate.scope) == (1, False, "step")
    assert certificate.radius == pytest.approx(0.2 * ndtri(0.001 ** (1 / 1000)), rel=1e-6)
    raw = MajorityVoteAgent(network_balancer(), NOISE, votes=100, seed=0)
    assert raw.certify(-0.05 * np.ones((1, 4), np.float32), alpha=0.001, n=1000)[0].radius < certificate.radius


def test_continuous_policies_vote_by_their_median() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", seed=0)
    agent = DenoisedAgent(model, Constant([1.0, 0.0, 0.0]), rrl.Gaussian(0.1))
    vote = agent.vote(11, seed=0)
    assert isinstance(vote, MedianAgent)
    expected, _ = model.predict(np.array([1.0, 0.0, 0.0], dtype=np.float32), deterministic=True)
    assert vote.predict(np.zeros(3, np.float32))[0] == pytest.approx(expected, abs=1e-5)
    assert agent.predict(np.zeros(3, np.float32), deterministic=True)[0] == pytest.approx(expected, abs=1e-5)


def test_normalised_frames_are_denoised_in_normalised_units() -> None:
    """Noise and denoiser come after a normalisation inside the noise."""
    normalization = rrl.Normalization(np.full(4, 5.0), np.full(4, 4.0))
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            seen.append(observation)
            return observation

    agent = DenoisedAgent(network_balancer(), Spy(), rrl.Gaussian(1e-6), normalization=normalization)
    agent.predict(np.full(4, 9.0, np.float32), deterministic=True)
    assert seen[-1].numpy() == pytest.approx(np.full((1, 4), 2.0), abs=1e-4)
    with pytest.raises(ValueError, match="normalization"):
        agent.vote()


def test_episodes_of_the_agents_view_are_certified_and_attacked() -> None:
    agent = DenoisedAgent(network_balancer(), Mean(2), NOISE, history=2)
    options: dict[str, Any] = {"noise": NOISE, "frame_stack": agent.frame_stack, "max_episode_steps": 30}
    certificate = rrl.certify_policy(agent.view, "CartPole-v1", [0.0, 0.3], 100, **options)
    assert certificate.values[0] > certificate.values[1] > 0
    threat = rrl.ThreatModel(norm=2, episode=0.3)
    attack = rrl.attacks.SmoothedPGD(draws=4)
    report = rrl.attack_policy(agent.view, "CartPole-v1", attack, threat, 20, certificate=certificate, **options)
    assert report.mean >= certificate.values[1]


def test_an_agent_in_place_of_its_view_is_answered_with_what_to_pass() -> None:
    agent = DenoisedAgent(balancer(), ResidualMLP((4,), 0.2, hidden=(8,)), rrl.Gaussian(0.2))
    with pytest.raises(TypeError, match=r"got DenoisedAgent; pass agent\.view"):
        rrl.certify_policy(agent, "CartPole-v1", 0.1, 10, noise=rrl.Gaussian(0.2))


def test_dictionaries_keep_their_space() -> None:
    space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Box(-1, 1, (3,))})
    agent = DenoisedAgent(
        PolicyView.from_torch(nn.Linear(5, 2), kind="logits", observation_shape=(5,)),
        ResidualMLP((5,), 0.2),
        NOISE,
        observation_space=space,
    )
    assert agent.predict({"a": np.zeros((3, 2)), "b": np.zeros((3, 3))}, deterministic=True)[0].shape == (3,)


@pytest.mark.parametrize(
    ("denoiser", "options", "error", "message"),
    [
        (lambda x: x, {}, TypeError, "denoiser must be a torch.nn.Module"),
        (ResidualMLP((5,), 0.2), {}, ValueError, "denoiser does not take"),
        (nn.Linear(4, 5), {}, ValueError, "denoiser must give"),
        (ResidualMLP((8,), 0.2, keep=4), {"history": 3}, ValueError, "denoiser does not take"),
        (ResidualMLP((4,), 0.2), {"history": 0}, ValueError, "n_frames"),
    ],
)
def test_bad_denoisers_are_named(denoiser: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenoisedAgent(network_balancer(), denoiser, NOISE, **options)
