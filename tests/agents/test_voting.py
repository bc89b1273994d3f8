"""Voting agents: what they do, what is certified about it, and what no attack changes."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.stats import norm as normal
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor, nn
from toys import balancer

import robustrl as rrl
from robustrl.agents import MajorityVoteAgent, MedianAgent, SmoothedAgent
from robustrl.certify.quantiles import attacked_median_ranks
from robustrl.policy import PolicyView

NOISE = rrl.Gaussian(0.2)


def line() -> PolicyView:
    """The action is the observation itself."""
    space = spaces.Box(-10, 10, (1,), np.float32)
    return PolicyView.from_torch(nn.Identity(), kind="deterministic", observation_shape=(1,), action_space=space)


class Values(nn.Module):
    """Q(s, 1) = 3 s, Q(s, 0) = 0."""

    def forward(self, observation: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(observation), 3 * observation), dim=1)


def values() -> PolicyView:
    return PolicyView.from_torch(Values(), kind="q", observation_shape=(1,))


def test_the_majority_is_that_of_the_half_space() -> None:
    agent = MajorityVoteAgent(values(), rrl.Gaussian(1.0), votes=500, seed=0)
    actions, state = agent.predict(np.array([[-0.5], [0.5]]))
    assert actions.tolist() == [0, 1]
    assert state is None
    single, _ = agent.predict(np.array([0.5]))
    assert single == 1


def test_a_certified_action_is_the_one_up_to_the_margin() -> None:
    agent = MajorityVoteAgent(values(), rrl.Gaussian(1.0), seed=0)
    found = agent.certify(np.array([[-0.5], [0.7]]), n=20_000)
    assert [c.prediction for c in found] == [0, 1]
    assert [c.scope for c in found] == ["step", "step"]
    assert 0.45 < found[0].radius < 0.5
    assert 0.65 < found[1].radius < 0.7
    for certificate in found:
        certificate.verify()


def test_mean_values_are_certified_within_their_bounds() -> None:
    """Clipped to [-1, 1], the mean of 3 (s + e) is known; the radius stays below the distance to the tie."""
    agent = MajorityVoteAgent(values(), rrl.Gaussian(1.0), seed=0)
    found = agent.certify_values(np.array([[0.6], [-0.4], [0.0]]), -1.0, 1.0, n=50_000)
    assert [c.prediction for c in found] == [1, 0, -1]
    assert 0 < found[0].radius < 0.6
    assert 0 < found[1].radius < 0.4
    assert all(c.method == "values" for c in found)
    for certificate in found:
        certificate.verify()


def test_logits_are_no_action_values() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(TypeError, match="must give action values"):
        MajorityVoteAgent(model, NOISE).certify_values(np.zeros(4), -1, 1)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_it_plays_in_sb3s_evaluation(algorithm: Any) -> None:
    env = gym.make("CartPole-v1", max_episode_steps=20)
    agent = MajorityVoteAgent(algorithm("MlpPolicy", env, seed=0, device="cpu"), NOISE, votes=50, seed=0)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=2, warn=False)  # type: ignore[arg-type]
    assert mean > 5


def test_no_attack_within_the_radius_changes_the_vote() -> None:
    view = balancer()
    agent = MajorityVoteAgent(view, NOISE, votes=4000, seed=0)
    generator = np.random.default_rng(0)
    observations = generator.uniform(-0.2, 0.2, size=(20, 4))
    for observation, certificate in zip(observations, agent.certify(observations, n=4000), strict=True):
        if certificate.abstained:
            continue
        directions = generator.normal(size=(30, 4))
        directions *= 0.99 * certificate.radius / np.linalg.norm(directions, axis=1, keepdims=True)
        share = agent.smoothed.tally(observation + directions, 4000).counts[:, certificate.prediction] / 4000
        assert share.min() > 0.5 - 4 * 0.5 / 4000**0.5  # the certified majority is that of infinitely many votes


def test_what_single_precision_moves_an_observation_is_taken_off_its_radius() -> None:
    """Double-precision observations are certified where they are, not where single precision puts them."""
    x = np.array([[0.7 + 2.0**-27]])
    moved = float(np.abs(x - x.astype(np.float32)).sum())
    assert moved > 0
    double, single = (
        MajorityVoteAgent(values(), rrl.Gaussian(1.0), seed=0).certify(x.astype(t))[0] for t in (float, np.float32)
    )
    assert double.radius == pytest.approx(single.radius - moved, rel=1e-12)
    low, high = (
        MajorityVoteAgent(values(), rrl.Gaussian(1.0), seed=0).certify_values(x.astype(t), -1.0, 1.0)[0]
        for t in (float, np.float32)
    )
    assert low.radius < high.radius
    wide, narrow = (
        MedianAgent(line(), rrl.Gaussian(1e-3), seed=0).interval(x.astype(t), 0.0, n=50_000) for t in (float, np.float32)
    )
    assert wide.low.item() <= narrow.low.item()
    assert wide.budget == narrow.budget == 0


def test_a_steps_certificate_says_which_policy_and_observation_it_is_about() -> None:
    agent, observation = MajorityVoteAgent(values(), NOISE), np.array([0.5])
    (found,) = agent.certify(observation, n=100)
    text = f"{observation.dtype}{observation.shape}".encode() + observation.tobytes()
    assert found.provenance == {"model": agent.policy.fingerprint(), "input": hashlib.sha256(text).hexdigest()}


def test_a_votes_certificate_takes_norm_and_a_level_for_all_and_no_other_option() -> None:
    agent, both = MajorityVoteAgent(values(), NOISE), np.array([[0.5], [0.6]])
    assert {(c.alpha, c.norm) for c in agent.certify(both, n=100, norm=np.inf, alpha_total=0.02)} == {(0.01, np.inf)}
    level = {c.alpha for c in agent.certify_values(both, -1, 1, n=100, alpha_total=0.02)}
    assert level == {0.01}
    with pytest.raises(TypeError, match="unexpected keyword argument 'scope'"):
        agent.certify(both, scope="episode")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="see certify_values"):
        agent.certify(both, method="values")


# ------------------------------------------------------------------------------------------------ medians


def test_the_median_action_of_a_line_is_the_observation() -> None:
    agent = MedianAgent(line(), rrl.Gaussian(1.0), votes=1001, seed=0)
    actions, _ = agent.predict(np.array([[3.0], [-2.0], [50.0]]))
    assert actions.shape == (3, 1)
    assert actions[:2, 0] == pytest.approx([3, -2], abs=0.15)
    assert actions[2, 0] == 10  # the space ends there


@pytest.mark.parametrize("budget", [0.0, 0.3])
def test_an_interval_holds_the_attacked_action_and_is_not_much_wider(budget: float) -> None:
    agent = MedianAgent(line(), rrl.Gaussian(1.0), votes=2001, seed=0)
    interval = agent.interval(np.zeros((300, 1)), budget, alpha=0.1, n=2000)
    acted, _ = agent.predict(np.full((300, 1), -budget))
    assert np.mean((acted < interval.low) | (acted > interval.high)) <= 0.1
    slack = 1.2533 * (normal.isf(0.025) / 2001**0.5 + normal.isf(0.025) / 2000**0.5)
    assert interval.low.mean() == pytest.approx(-budget - slack, abs=0.05)
    assert interval.high.mean() == pytest.approx(budget + slack, abs=0.05)


def test_where_samples_say_nothing_the_interval_is_the_action_space() -> None:
    interval = MedianAgent(line(), rrl.Gaussian(1.0), seed=0).interval(np.zeros(1), 9.0, n=100)
    assert (interval.low.item(), interval.high.item()) == (-10, 10)


def test_the_interval_is_made_of_order_statistics_at_every_entrys_share_of_alpha() -> None:
    space = spaces.Box(-100, 100, (3,), np.float32)
    view = PolicyView.from_torch(nn.Identity(), kind="deterministic", observation_shape=(3,), action_space=space)
    agent, twin = (MedianAgent(view, rrl.Gaussian(1.0), votes=501, seed=0) for _ in range(2))
    found = agent.interval(np.zeros(3), 0.1, alpha=0.06, n=500)
    ordered = np.sort(twin.smoothed.outputs(np.zeros((1, 3), np.float32), 500).numpy()[0].astype(float), axis=0)
    low, high = attacked_median_ranks(500, 501, rrl.Gaussian(1.0), 0.1, 0.06 / 3)
    assert low is not None
    assert high is not None
    assert (low, high) != attacked_median_ranks(500, 501, rrl.Gaussian(1.0), 0.1, 0.06)
    assert found.low.tolist() == [ordered[low - 1].tolist()]
    assert found.high.tolist() == [ordered[high - 1].tolist()]


def test_what_single_precision_moves_an_observation_is_added_to_the_budget_of_an_interval() -> None:
    """At the least noise that is allowed the rounding shifts the ranks, and the interval has to follow."""
    x, noise, n = np.array([1 + 0.99 * 2.0**-24]), rrl.Gaussian(2.0**-13), 50_000
    moved = float(abs(x - x.astype(np.float32)).item())
    agent, twin = (MedianAgent(line(), noise, votes=2001, seed=0) for _ in range(2))
    found = agent.interval(x, 1e-5, alpha=0.05, n=n)
    ranks = attacked_median_ranks(n, 2001, noise, 1e-5 + moved * (1 + 1e-12), 0.05)
    ignorant = attacked_median_ranks(n, 2001, noise, 1e-5, 0.05)
    assert ranks.low is not None
    assert ranks.high is not None
    assert ignorant.low is not None
    assert ignorant.high is not None
    assert ranks.low < ignorant.low
    assert ranks.high > ignorant.high
    ordered = np.sort(twin.smoothed.outputs(x[None].astype(np.float32), n).numpy().reshape(-1).astype(float))
    assert (found.low.item(), found.high.item()) == (ordered[ranks.low - 1], ordered[ranks.high - 1])


def test_a_median_agent_plays_pendulum() -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    agent = MedianAgent(SAC("MlpPolicy", env, seed=0, device="cpu", buffer_size=10), NOISE, votes=51, seed=0)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=1, warn=False)  # type: ignore[arg-type]
    assert np.isfinite(mean)


# ------------------------------------------------------------------------------------------------ doors


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: MajorityVoteAgent(line(), NOISE), TypeError, "discrete actions"),
        (lambda: MedianAgent(values(), NOISE), TypeError, "continuous actions"),
        (lambda: MedianAgent(line(), NOISE, votes=10), ValueError, "votes must be odd"),
        (lambda: MajorityVoteAgent(values(), NOISE, votes=0), ValueError, "votes must be"),
        (lambda: MajorityVoteAgent(values(), 0.2), TypeError, "noise must be"),
        (lambda: MajorityVoteAgent(values(), NOISE).predict(np.zeros(2)), ValueError, "observation must have shape"),
        (lambda: MajorityVoteAgent(values(), NOISE).predict(np.full(1, np.nan)), ValueError, "must be finite"),
        (lambda: MedianAgent(line(), NOISE).interval(np.zeros(1), -0.1), ValueError, "budget must be"),
        (lambda: MedianAgent(line(), NOISE).interval(np.zeros(1), 0.1, alpha=0.0), ValueError, "alpha must be"),
        (lambda: MajorityVoteAgent(values(), NOISE).certify_values(np.zeros(1), 1, -1), ValueError, "bounds must be"),
    ],
)
def test_misuse_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_voting_and_smoothed_agents_are_not_each_other() -> None:
    assert not issubclass(MajorityVoteAgent, SmoothedAgent)
    assert not issubclass(SmoothedAgent, MajorityVoteAgent)
    with pytest.raises(ValueError, match="no proof for scope 'episode'"):
        MajorityVoteAgent(values(), NOISE).smoothed.certify(np.zeros((1, 1)), scope="episode")
