"""Radius traces: one certificate per step, all of them together at the stated confidence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from toys import balancer, network_balancer

import robustrl as rrl
from robustrl.agents import MajorityVoteAgent
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.envs.quantise import QuantiseObservation
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import CertificateError
from robustrl.policy import PolicyView
from robustrl.rollouts.trace import RadiusTrace, radius_trace

RECIPE = EnvRecipe(env_id="CartPole-v1", max_episode_steps=25, noise=rrl.Gaussian(0.2))


@pytest.fixture(scope="module")
def trace() -> RadiusTrace:
    agent = MajorityVoteAgent(balancer(), rrl.Gaussian(0.2), votes=200, seed=0)
    return radius_trace(agent, RECIPE, alpha=0.05, n=500, seed=3)


def test_the_level_is_split_over_the_horizon(trace: RadiusTrace) -> None:
    assert len(trace.certificates) == len(trace.actions) == len(trace.rewards) == 25
    assert {c.alpha for c in trace.certificates} == {0.05 / 25}
    assert trace.alpha == 0.05
    assert trace.horizon == 25
    for certificate in trace.certificates:
        certificate.verify()
        assert certificate.scope == "step"


def test_certified_actions_are_the_executed_ones(trace: RadiusTrace) -> None:
    """Replayed in the true environment without noise, the actions earn the same."""
    for certificate, action in zip(trace.certificates, trace.actions, strict=True):
        assert certificate.abstained or certificate.prediction == action
    env = gym.make("CartPole-v1", max_episode_steps=25)
    env.reset(seed=3)
    rewards = [env.step(int(action))[1] for action in trace.actions]
    assert trace.rewards.tolist() == rewards


def test_it_is_told_in_words_numbers_and_a_picture(trace: RadiusTrace, tmp_path: Path) -> None:
    assert "25 steps, return 25" in trace.table()
    assert "all steps at once" in trace.table()
    trace.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 5000
    trace.save(tmp_path / "trace.json")
    stored = json.loads((tmp_path / "trace.json").read_text())
    assert [step["radius"] for step in stored["steps"]] == trace.radii.tolist()
    again = RadiusTrace.load(tmp_path / "trace.json")
    assert again.radii.tolist() == trace.radii.tolist()
    assert again.actions.tolist() == trace.actions.tolist()
    with pytest.raises(ValueError, match="suffix of path"):
        trace.plot(tmp_path / "trace.bmp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["steps"][3].update(radius=9.0), "step 3 does not follow"),
        (lambda d: d["steps"][3].update(evidence={}), "no trace"),
        (lambda d: [step.update(action=1 - step["action"]) for step in d["steps"]], "another action"),
        (lambda d: d.update(alpha=0.0499), "not one statement"),
        (lambda d: d.update(horizon=26), "not one statement"),
        (lambda d: d.update(horizon=24), "not one statement"),
        (lambda d: d.update(horizon=0), "no trace"),
        (lambda d: d.pop("horizon"), "no trace"),
        (lambda d: d.pop("noise"), "no trace"),
        (lambda d: d.update(norm=1), "no trace"),
    ],
)
def test_a_trace_that_was_edited_is_found(trace: RadiusTrace, tmp_path: Path, change: Any, message: str) -> None:
    trace.save(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    change(document)
    (tmp_path / "trace.json").write_text(json.dumps(document))
    with pytest.raises(CertificateError, match=message):
        RadiusTrace.load(tmp_path / "trace.json")


def test_a_level_that_is_enough_for_the_steps_taken_is_not_enough_for_those_that_might_have_been(
    trace: RadiusTrace, tmp_path: Path
) -> None:
    """How long an episode is depends on its samples: alpha is split over the horizon, not over the length."""
    short = replace(trace, certificates=trace.certificates[:5], actions=trace.actions[:5], rewards=trace.rewards[:5])
    short.save(tmp_path / "trace.json")
    assert len(RadiusTrace.load(tmp_path / "trace.json").radii) == 5
    replace(short, alpha=0.02).save(tmp_path / "trace.json")
    with pytest.raises(CertificateError, match="5 of at most 25 steps .* not one statement"):
        RadiusTrace.load(tmp_path / "trace.json")


def test_exact_votes_are_traced_too(tmp_path: Path) -> None:
    low, high = (-4.8, -4.0, -0.42, -4.0), (4.8, 4.0, 0.42, 4.0)
    splitting = rrl.DeterministicSplitting(32, 255, low, high)
    env = EnvRecipe.of(lambda: QuantiseObservation(gym.make("CartPole-v1", max_episode_steps=5), 255, low, high))
    found = radius_trace(MajorityVoteAgent(balancer(), splitting), env, method="splitting", seed=3)
    found.save(tmp_path / "trace.json")
    assert RadiusTrace.load(tmp_path / "trace.json").radii.tolist() == found.radii.tolist()
    assert {c.alpha for c in found.certificates} == {0}


def test_alpha_must_be_one() -> None:
    with pytest.raises(ValueError, match="alpha must be"):
        radius_trace(MajorityVoteAgent(balancer(), rrl.Gaussian(0.2)), RECIPE, alpha=1.0)


def test_radii_shrink_where_the_vote_is_close(trace: RadiusTrace) -> None:
    certified = [c for c in trace.certificates if not c.abstained]
    assert len(certified) > 5
    by_share = sorted(certified, key=lambda c: c.evidence["count"])
    assert [c.radius for c in by_share] == sorted(c.radius for c in certified)


@pytest.fixture(scope="module")
def plain() -> RadiusTrace:
    """A clean episode of a network without noise."""
    return radius_trace(network_balancer(), replace(RECIPE, noise=None), method="lipschitz", seed=3)


def test_a_policy_without_noise_is_certified_at_every_step(plain: RadiusTrace, tmp_path: Path) -> None:
    assert (plain.alpha, len(plain.certificates)) == (0, 25)
    env = gym.make("CartPole-v1", max_episode_steps=25)
    observation, _ = env.reset(seed=3)
    judged = LipschitzScores.of(network_balancer())
    for certificate, action in zip(plain.certificates, plain.actions, strict=True):
        certificate.verify()
        (taken,), (radius,) = judged.radii(observation[None])
        assert (certificate.prediction, certificate.radius) == (taken, radius) == (action, radius)
        observation = env.step(int(action))[0]
    plain.save(tmp_path / "trace.json")
    assert RadiusTrace.load(tmp_path / "trace.json").radii.tolist() == plain.radii.tolist()
    plain.plot(tmp_path / "trace.png")
    assert "lipschitz" in plain.table()
    assert "confidence 100%" in plain.table()


@pytest.mark.parametrize(
    "change", [{"alpha": 0.05}, {"alpha_per_step": 0.002}, {"method": "one-sided"}, {"noise": {"kind": "none"}}]
)
def test_a_trace_without_noise_claims_no_level(plain: RadiusTrace, tmp_path: Path, change: dict[str, Any]) -> None:
    plain.save(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps(document | change))
    with pytest.raises(CertificateError, match="no trace"):
        RadiusTrace.load(tmp_path / "trace.json")


def test_frames_are_stacked_for_a_policy_without_noise() -> None:
    weights = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Linear(12, 2)
    network.weight.data.copy_(weights)
    policy = PolicyView.from_torch(network, kind="q", observation_shape=(12,), n_frames=3)
    trace = radius_trace(policy, replace(RECIPE, noise=None, frame_stack=3), method="lipschitz", seed=0)
    assert {c.evidence["dimension"] for c in trace.certificates} == {12}
    assert any("eps sqrt(k)" in sentence for sentence in trace.certificates[0].not_covered)


def test_methods_and_agents_go_together() -> None:
    agent = MajorityVoteAgent(balancer(), rrl.Gaussian(0.2), votes=10)
    for who, method in ((agent, "lipschitz"), (balancer(), "one-sided")):
        with pytest.raises(TypeError, match="agent must be a MajorityVoteAgent, or a policy for method 'lipschitz'"):
            radius_trace(who, RECIPE, method=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update({"return": 500.0}), "the return is 500"),
        (lambda document: document.update(not_covered=[]), "not_covered"),
        (lambda document: document["steps"][0].update(action=0.9), "action"),
        (lambda document: document["steps"][0].update(prediction=float(document["steps"][0]["prediction"])), "prediction"),
    ],
)
def test_everything_that_a_trace_states_is_recomputed(plain: RadiusTrace, tmp_path: Path, change: Any, message: str) -> None:
    plain.save(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    change(document)
    (tmp_path / "trace.json").write_text(json.dumps(document))
    with pytest.raises(CertificateError, match=message):
        RadiusTrace.load(tmp_path / "trace.json")


def test_a_key_that_occurs_twice_is_found(plain: RadiusTrace, tmp_path: Path) -> None:
    plain.save(tmp_path / "trace.json")
    text = (tmp_path / "trace.json").read_text()
    (tmp_path / "trace.json").write_text(text.replace('"lipschitz":', '"lipschitz": 1e-9, "lipschitz":', 1))
    with pytest.raises(CertificateError, match="twice"):
        RadiusTrace.load(tmp_path / "trace.json")
