"""DeterministicSplitAgent: one action per observation, and trajectories that no attack within the radius changes."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.testing import assert_array_equal
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn

from robustrl.agents.split import DeterministicSplitAgent, SplitEpisode, play_episode
from robustrl.certify.splitting import Budget, verify_trajectory
from robustrl.envs.quantise import QuantiseObservation
from robustrl.errors import CertificateError
from robustrl.noise import DeterministicSplitting, Splitting
from robustrl.policy import Normalization, PolicyView

Q, LENGTH = 6, 4


class Walk(gym.Env[np.ndarray, int]):
    """Two counters on 0 .. Q; an action moves one of them, and chance of the environment's own moves the other."""

    observation_space = spaces.Box(0, Q, (2,), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.t = self.np_random.integers(1, Q, 2), 0
        return self.state.astype(np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.state = np.clip(np.add(self.state, [int(action) - 1, self.np_random.integers(-1, 2)]), 0, Q)
        return self.state.astype(np.uint8), float(self.state.sum()), self.t == LENGTH, False, {}


class Pieces(nn.Module):
    """A random function of few inputs with neighbouring classes alike, so that radii are not all 0."""

    def __init__(self, inputs: int, seed: int, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weights", torch.randn(inputs, classes, generator=generator, dtype=torch.float64))
        self.register_buffer("bends", torch.randn(inputs, classes, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double() - Q / 2
        return (x[:, :, None] * self.weights).sum(1) + (torch.sin(x)[:, :, None] * self.bends).sum(1)


def agent(seed: int, levels: int = 2 * Q + 1, n_frames: int = 1) -> DeterministicSplitAgent:
    policy = PolicyView.from_torch(
        Pieces(2 * n_frames, seed), kind="logits", observation_shape=(2 * n_frames,), n_frames=n_frames
    )
    return DeterministicSplitAgent(policy, DeterministicSplitting(levels, Q, 0.0, float(Q), seed=seed))


def attacks_on(observation: np.ndarray, size: int) -> list[np.ndarray]:
    """All observations on the grid within an l1 distance."""
    grid = np.array(list(itertools.product(range(Q + 1), repeat=len(observation))))
    return list(grid[np.abs(grid - observation).sum(axis=1) <= size])


@pytest.mark.parametrize("budget", ["step", "episode"])
def test_no_attack_within_the_radius_changes_an_executed_trajectory(budget: Budget) -> None:
    """Every attacked observation at every step, exhaustively: the trajectory is a chain, so branches stay few."""
    moved = 0
    for seed in range(12):
        victim, env = agent(seed), Walk()
        episode = play_episode(victim, env, seed=seed)
        size = round(episode.radius(budget))
        moved += size
        actions = episode.counts.argmax(axis=1)
        observation, _ = env.reset(seed=seed)
        for action in actions:
            attacked = np.stack(attacks_on(observation.astype(int), size))
            assert_array_equal(victim.predict(attacked)[0], np.full(len(attacked), action))
            observation = env.step(int(action))[0]
    assert moved > 3


def test_some_attack_one_step_beyond_the_radius_changes_a_trajectory() -> None:
    broken = 0
    for seed in range(12):
        victim, env = agent(seed), Walk()
        episode = play_episode(victim, env, seed=seed)
        observation, _ = env.reset(seed=seed)
        for action in episode.counts.argmax(axis=1):
            attacked = np.stack(attacks_on(observation.astype(int), round(episode.radius()) + 1))
            broken += bool(np.any(victim.predict(attacked)[0] != action))
            observation = env.step(int(action))[0]
    assert broken >= 3


def test_a_played_episode_knows_the_frame_stack_of_its_policy() -> None:
    """The certificate's default is the policy's stack: read as single frames, the same votes would allow attacks twice as large."""
    stacked = gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(Walk(), 2))
    larger = 0
    for seed in range(10):
        episode = play_episode(agent(seed, levels=4 * Q + 1, n_frames=2), stacked, seed=seed)
        found = episode.certificate("step")
        assert found.evidence["n_frames"] == 2
        assert found == episode.certificate("step", n_frames=2)
        larger += episode.radius("step") < episode.radius("step", n_frames=1)
    assert larger


def test_a_trajectorys_certificate_says_which_policy_and_observations_it_is_about() -> None:
    victim, env = agent(0), Walk()
    episode = play_episode(victim, env, seed=1)
    seen = [env.reset(seed=1)[0]]
    seen += [env.step(int(action))[0] for action in episode.counts.argmax(axis=1)]
    observations = np.stack(seen[:-1])
    text = f"{observations.dtype}{observations.shape}".encode() + observations.tobytes()
    expected = {"model": victim.policy.fingerprint(), "input": hashlib.sha256(text).hexdigest()}
    assert episode.certificate().provenance == expected


def _stacked_episode(victim: DeterministicSplitAgent, seed: int, padding: str) -> tuple[SplitEpisode, list[np.ndarray]]:
    """One clean episode of an agent that sees the last two frames, and its frames, one before the first included."""
    env, counts = Walk(), []
    first = env.reset(seed=seed)[0].astype(int)
    frames = [first if padding == "reset" else np.zeros(2, dtype=int), first]
    for _ in range(LENGTH):
        action, _ = victim.predict(np.concatenate(frames[-2:]))
        assert victim.votes is not None
        counts.append(victim.votes.counts[0])
        frames.append(env.step(int(action))[0].astype(int))
    return SplitEpisode(np.stack(counts), np.zeros(LENGTH), victim.mechanism), frames


def _attacked_stacks(frames: list[np.ndarray], t: int, size: int, padding: str, budget: str) -> np.ndarray:
    """Everything an attacker who alters each frame once can make of the stack at step t, on the grid."""
    choices = [np.array(e) for e in itertools.product(range(-size, size + 1), repeat=2) if sum(map(abs, e)) <= size]
    found = []
    for before, now in itertools.product(choices, choices):
        if t == 0:
            before = now if padding == "reset" else np.zeros(2, dtype=int)
        spent = np.abs(now).sum() + (np.abs(before).sum() if t else 0)
        if budget == "step" or spent <= size:
            found.append(np.concatenate([frames[t] + before, frames[t + 1] + now]))
    stacks = np.unique(found, axis=0)
    return stacks[np.all((stacks >= 0) & (stacks <= Q), axis=1)]


@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize("budget", ["step", "episode"])
def test_no_attack_on_frames_changes_the_trajectory_of_a_stack(padding: Any, budget: Budget) -> None:
    """Step by step: as long as no action has changed, the frames are the clean ones, and only stacks differ."""
    sizes, broken = [], 0
    for seed in range(10):
        victim = agent(seed, levels=4 * Q + 1, n_frames=2)
        episode, frames = _stacked_episode(victim, seed, padding)
        sizes.append(round(episode.radius(budget, n_frames=2, padding=padding)))
        for t, action in enumerate(episode.counts.argmax(axis=1)):
            attacked = _attacked_stacks(frames, t, min(sizes[-1], 2), padding, budget)
            assert np.all(victim.predict(attacked)[0] == action)
            beyond = _attacked_stacks(frames, t, min(sizes[-1] + 1, 3), padding, budget)
            broken += bool(np.any(victim.predict(beyond)[0] != action))
    assert sum(sizes) > 5
    assert broken > 2  # with one grid step more some of them are changed


def test_an_episode_is_recomputed_from_its_votes() -> None:
    victim = agent(3)
    episode = play_episode(victim, Walk(), seed=3)
    assert episode.counts.shape == (LENGTH, 3)
    assert episode.rewards.shape == (LENGTH,)
    certificate = episode.certificate("step")
    length, radius, abstained = verify_trajectory(certificate.evidence, victim.mechanism, 0.0)
    assert (length, radius, abstained) == (LENGTH, episode.radius("step"), False)
    assert (certificate.prediction, certificate.scope, certificate.alpha) == (LENGTH, "trajectory", 0)
    assert (certificate.norm, certificate.fp_model) == (1, "exact")
    certificate.verify()
    with pytest.raises(CertificateError, match="radius"):
        replace(certificate, radius=radius + 1).verify()
    with pytest.raises(ValueError, match="max_steps must be at least the episode's length"):
        play_episode(victim, Walk(), seed=3, max_steps=LENGTH - 1)


def test_actions_are_the_majority_and_radii_those_of_the_votes() -> None:
    victim, x = agent(1), np.array([[0, 1], [3, 5], [6, 6]])
    actions, radii = victim.predict_with_radius(x)
    for one, action, radius in zip(x, actions, radii, strict=True):
        scores = victim.policy.scores(torch.from_numpy(victim.mechanism.views(one, 0, 2 * Q + 1)).float())
        counts = np.bincount(scores.argmax(dim=1).numpy(), minlength=3)
        assert action == counts.argmax()
        single = victim.predict_with_radius(one)
        assert (int(single[0]), float(single[1])) == (action, radius)
        assert np.shape(single[0]) == np.shape(single[1]) == ()
    assert actions.dtype == np.int64
    assert_array_equal(victim.predict(x, deterministic=False)[0], actions)


LOW, HIGH = (-4.8, -4.0, -0.42, -4.0), (4.8, 4.0, 0.42, 4.0)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_it_goes_into_evaluate_policy_and_ordinary_environments(algorithm: Any) -> None:
    env = QuantiseObservation(gym.make("CartPole-v1", max_episode_steps=15), 255, LOW, HIGH)
    model = algorithm("MlpPolicy", env, device="cpu", seed=0)
    victim = DeterministicSplitAgent(model, DeterministicSplitting(32, 255, LOW, HIGH))
    first, _ = evaluate_policy(victim, env, 2, warn=False)
    assert 5 < first <= 15
    vector = make_vec_env(lambda: QuantiseObservation(gym.make("CartPole-v1", max_episode_steps=10), 255, LOW, HIGH), 2, seed=0)
    evaluate_policy(victim, vector, 3)
    assert victim.votes is not None
    assert victim.votes.counts.shape == (2, 2)


class Picture(gym.Env[np.ndarray, int]):
    """Random bytes with channels last."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8), 1.0, self.t == 3, False, {}


def test_byte_pictures_and_stacks_of_them_go_in_as_they_are() -> None:
    stacked = VecFrameStack(DummyVecEnv([Picture]), 2)
    model = PPO("CnnPolicy", stacked, device="cpu", n_steps=2, batch_size=2)
    mechanism = DeterministicSplitting(9, 255, 0.0, 255.0)
    victim = DeterministicSplitAgent(model, mechanism, observation_space=stacked.observation_space)
    observation = stacked.reset()
    _, radius = victim.predict_with_radius(observation)
    views = mechanism.views(observation[0], 0, 9)
    noisy = torch.from_numpy(views).float().permute(0, 3, 1, 2)
    scores = model.policy.get_distribution(noisy).distribution.logits
    assert_array_equal(np.bincount(scores.argmax(dim=1).numpy(), minlength=2), victim.votes.counts[0])  # type: ignore[union-attr]
    assert radius[0] == victim.votes.steps[0]  # type: ignore[union-attr]
    assert evaluate_policy(victim, stacked, 1, warn=False)[0] == 3


def test_a_frozen_normalisation_goes_outside_of_the_splitting() -> None:
    env = QuantiseObservation(gym.make("CartPole-v1"), 255, LOW, HIGH)
    normalised = VecNormalize(DummyVecEnv([lambda: env]), norm_reward=False)
    model = PPO("MlpPolicy", normalised, device="cpu", n_steps=64, batch_size=64)
    model.learn(64)
    statistics = Normalization.of(normalised)
    mechanism = DeterministicSplitting(16, 255, LOW, HIGH)
    victim = DeterministicSplitAgent(model, mechanism, normalization=statistics)
    observation = env.reset(seed=0)[0]
    victim.predict(observation)
    views = mechanism.views(observation, 0, 16)
    actions, _ = model.predict(normalised.normalize_obs(views).astype(np.float32), deterministic=True)
    assert_array_equal(np.bincount(actions, minlength=2), victim.votes.counts[0])  # type: ignore[union-attr]


def test_wrong_agents_and_observations_are_refused() -> None:
    victim = agent(0)
    mechanism = victim.mechanism
    with pytest.raises(TypeError, match="mechanism must be a DeterministicSplitting"):
        DeterministicSplitAgent(victim.policy, Splitting(0.5))  # type: ignore[arg-type]
    continuous = PolicyView.from_torch(
        nn.Linear(2, 2), kind="gaussian", observation_shape=(2,), action_space=spaces.Box(-1, 1, (1,), np.float32)
    )
    with pytest.raises(TypeError, match="discrete actions and no memory"):
        DeterministicSplitAgent(continuous, mechanism)
    with pytest.raises(ValueError, match="batch_size must"):
        DeterministicSplitAgent(victim.policy, mechanism, batch_size=0)
    with pytest.raises(ValueError, match="observation must have shape"):
        victim.predict(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="must lie on the grid"):
        victim.predict(np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="must lie on the grid"):
        victim.predict(np.array([math.nan, 1.0]))
