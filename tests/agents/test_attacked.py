"""Attacked agents: the attack of the wrappers and of rollouts, on the agent's side."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from toys import LinearRule

import robustrl as rrl
from robustrl.agents import AttackedAgent, MajorityVoteAgent, MedianAgent, SmoothedAgent
from robustrl.attacks import ActionDeviation, AttackContext, GradientAttack, Greedy, Margin, MinimalFlip, RandomNoise
from robustrl.envs import AttackObservation
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

STEP, EPISODE = ThreatModel(norm=math.inf, step=0.1), ThreatModel(norm=2, episode=0.5)
RULE = PolicyView.from_torch(
    LinearRule(torch.tensor([0.3, 0.5, 2.0, 1.0], dtype=torch.float64)), kind="q", observation_shape=(4,)
)
FRAMES = np.random.default_rng(0).normal(scale=0.05, size=(6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def ppo() -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")


def test_a_model_behind_the_attack_acts_as_in_an_attacked_environment(ppo: PPO) -> None:
    attack = GradientAttack(Margin(), restarts=2)
    agent = AttackedAgent(ppo, attack, EPISODE, horizon=500, seed=0)
    inside = AttackObservation(gym.make("CartPole-v1"), attack, EPISODE, victim=ppo, seed=0, record_clean=True)
    observation, info = inside.reset(seed=1)
    inside.core.seed(0)
    inside.core.reset()
    observation, info = inside.core.one(info["clean_obs"], 0), {"clean_obs": info["clean_obs"]}
    start = np.array([True])
    for _ in range(10):
        action, _ = agent.predict(info["clean_obs"], episode_start=start, deterministic=True)
        assert action == ppo.predict(observation, deterministic=True)[0]
        observation, *_, info = inside.step(action)
        start = np.array([False])
        assert agent.attacker.ledger.spent[0] <= 0.5


def test_without_a_budget_nothing_changes(ppo: PPO) -> None:
    none = ThreatModel(norm=2, episode=0.0)
    for make in (
        lambda: ppo,
        lambda: SmoothedAgent(RULE, rrl.Gaussian(0.1), seed=3),
        lambda: MajorityVoteAgent(RULE, rrl.Gaussian(0.1), seed=3),
    ):
        attacked, plain = AttackedAgent(make(), GradientAttack(Margin()), none, horizon=9), make()
        states: list[Any] = [None, None]
        for _ in range(4):
            mine, states[0] = attacked.predict(FRAMES, states[0], deterministic=True)
            theirs, states[1] = plain.predict(FRAMES, states[1], deterministic=True)
            assert np.array_equal(mine, theirs)


def test_budgets_start_again_with_every_episode(ppo: PPO) -> None:
    agent = AttackedAgent(ppo, GradientAttack(Margin(), allocation=Greedy()), EPISODE, horizon=500)
    agent.predict(FRAMES, episode_start=np.ones(6, dtype=bool))
    spent = agent.attacker.ledger.spent
    assert (spent > 0).any()
    agent.predict(FRAMES, episode_start=np.zeros(6, dtype=bool))
    assert (agent.attacker.ledger.spent >= spent).all()
    assert (agent.attacker.ledger.spent <= 0.5).all()
    agent.predict(FRAMES, episode_start=np.arange(6) == 2)
    assert agent.attacker.ledger.remaining[2] == pytest.approx(math.sqrt(0.25 - agent.attacker.norms[2] ** 2))


def test_it_goes_into_evaluate_policy_and_hurts() -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=200)] * 2)
    agent = SmoothedAgent(RULE, rrl.Gaussian(0.02), seed=0)
    attacked = AttackedAgent(
        SmoothedAgent(RULE, rrl.Gaussian(0.02), seed=0), MinimalFlip(draws=16), ThreatModel(norm=2, step=0.3), seed=0
    )
    means = [evaluate_policy(which, env, n_eval_episodes=4, warn=False)[0] for which in (agent, attacked)]
    assert means[1] < 0.5 * means[0]


def test_expectation_over_the_noise_flips_a_majority_and_moves_a_median() -> None:
    """A half-space at distance .1 of the frame and a linear action: what can be reached is known."""
    weights = torch.tensor([0.6, 0.8, 0.0, 0.0], dtype=torch.float64)
    rule = PolicyView.from_torch(LinearRule(weights), kind="logits", observation_shape=(4,))
    frame = np.array([[0.06, 0.08, 0.0, 0.0]], dtype=np.float32)
    for budget, expected in ((0.05, 1), (0.15, 0)):
        vote = MajorityVoteAgent(rule, rrl.Gaussian(0.2), votes=4000, seed=0)
        agent = AttackedAgent(vote, GradientAttack(Margin(), draws=64), ThreatModel(norm=2, step=budget), seed=0)
        assert agent.predict(frame)[0][0] == expected
    model = SAC("MlpPolicy", "Pendulum-v1", seed=0, buffer_size=10, policy_kwargs={"net_arch": [8]})
    median = MedianAgent(model, rrl.Gaussian(0.05), votes=2001, seed=0)
    clean = median.predict(FRAMES[:, :3])[0]
    attack = GradientAttack(ActionDeviation(), draws=32, restarts=2)
    moved = AttackedAgent(median, attack, ThreatModel(norm=2, step=0.5), seed=0).predict(FRAMES[:, :3])[0]
    aimless = median.predict(FRAMES[:, :3] + np.float32(0.5 / math.sqrt(3)))[0]
    assert np.abs(moved - clean).mean() > np.abs(aimless - clean).mean()


def test_a_recurrent_agent_is_attacked_without_the_memory_of_its_last_episode() -> None:
    from sb3_contrib import RecurrentPPO

    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs={"lstm_hidden_size": 8})
    smoothed = SmoothedAgent(model, rrl.Gaussian(0.0), seed=0)
    seen: list[torch.Tensor] = []

    class Remembering(RandomNoise):
        def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
            seen.extend([] if context.memory is None else [context.memory.clone()])
            return frames

    agent, state = AttackedAgent(smoothed, Remembering(), STEP, seed=0), None
    for start in ([True, True], [False, False], [False, True]):
        _, state = agent.predict(FRAMES[:2], state, np.array(start), deterministic=True)
    assert seen[-2].abs().sum() > 0
    assert seen[-1][0].abs().sum() > 0
    assert not seen[-1][1].any()


def test_the_attacker_knows_the_noisy_frames_that_a_smoothed_agent_saw() -> None:
    stacked = PolicyView.from_torch(
        LinearRule(torch.ones(8, dtype=torch.float64)), kind="q", observation_shape=(8,), n_frames=2
    )
    smoothed, seen = SmoothedAgent(stacked, rrl.Gaussian(0.5), frame_stack=2, seed=0), []

    class Watching(RandomNoise):
        def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
            seen.append(context.seen_stack.clone())
            return frames

    agent, state = AttackedAgent(smoothed, Watching(), STEP, seed=0), None
    for _ in range(2):
        _, state = agent.predict(FRAMES, state, deterministic=True)
    last = seen[-1][:, 0].numpy() - FRAMES
    assert 0.3 < last.std() < 0.8  # the frame of the step before, with its noise
    assert np.array_equal(seen[-1][:, 1].numpy(), FRAMES)


def test_a_plain_model_goes_on_with_its_episodes_unless_told_that_one_starts(ppo: PPO) -> None:
    agent = AttackedAgent(ppo, GradientAttack(ActionDeviation(), allocation=Greedy()), EPISODE, horizon=500)
    agent.predict(FRAMES)
    spent = agent.attacker.ledger.spent.copy()
    assert (spent > 0.49).any()
    agent.predict(FRAMES)
    assert (agent.attacker.ledger.spent >= spent).all()
    assert (agent.attacker.ledger.spent <= 0.5).all()


def test_the_users_model_keeps_gradients_and_mode() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    model.policy.train()
    AttackedAgent(model, GradientAttack(Margin()), STEP).predict(FRAMES)
    assert all(parameter.requires_grad for parameter in model.policy.parameters())


def test_bytes_that_are_no_picture_stay_in_their_range() -> None:
    """The wrappers' rule: a machine's memory at 255 or 0 has nowhere farther to go."""
    seen: list[torch.Tensor] = []

    class Watching(LinearRule):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            seen.append(observation.detach().clone())
            return super().forward(observation)

    view = PolicyView.from_torch(Watching(torch.ones(4, dtype=torch.float64)), kind="q", observation_shape=(4,))
    agent = SmoothedAgent(view, rrl.Gaussian(0.0), observation_space=spaces.Box(0, 255, (4,), np.uint8), seed=0)
    attacked = AttackedAgent(agent, RandomNoise("corner"), ThreatModel(norm=math.inf, step=3.0), seed=0)
    attacked.predict(np.array([[255, 0, 255, 0]], dtype=np.uint8), deterministic=True)
    assert seen[-1].min() >= 0
    assert seen[-1].max() <= 255


def test_what_cannot_be_attacked_is_refused_with_a_hint(ppo: PPO) -> None:
    with pytest.raises(ValueError, match="horizon must be given"):
        AttackedAgent(ppo, GradientAttack(), EPISODE)
    stacked = PolicyView.from_torch(
        LinearRule(torch.ones(8, dtype=torch.float64)), kind="q", observation_shape=(8,), n_frames=2
    )
    with pytest.raises(ValueError, match="one frame"):
        AttackedAgent(MajorityVoteAgent(stacked, rrl.Gaussian(0.1)), GradientAttack(), STEP)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        AttackedAgent(ppo, GradientAttack(Margin()), STEP).predict(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="attack must be"):
        AttackedAgent(ppo, "pgd", STEP)  # type: ignore[arg-type]


def test_units_of_an_attacked_agent_are_those_of_its_observations() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    threat = rrl.ThreatModel(norm=math.inf, step=4, units="uint8")
    with pytest.raises(
        ValueError, match=r"threat\.units must be 'raw' here, got 'uint8': give its radii in the units of the observations"
    ):
        AttackedAgent(model, rrl.attacks.RandomNoise(), threat)
