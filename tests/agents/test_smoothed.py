"""SmoothedAgent: SB3's `predict`, the noise inside, and the law that certificates are about."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from toys import LinearRule, balancer

from robustrl.agents import SmoothedAgent
from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.noise import Ablation, Gaussian, Noise
from robustrl.policy import PolicyView
from robustrl.rollouts.collect import collect, make_job

NOISE = Gaussian(0.3)


def agent(n_frames: int = 1, seed: int | None = 0, noise: Noise = NOISE, **options: Any) -> SmoothedAgent:
    return SmoothedAgent(balancer(n_frames), noise, frame_stack=n_frames, seed=seed, **options)


@pytest.mark.parametrize("n_frames", [1, 3])
def test_its_return_in_evaluate_policy_is_that_of_the_rollouts(n_frames: int) -> None:
    horizon, n = 60, 150
    recipe = EnvRecipe(env_id="CartPole-v1", noise=NOISE, max_episode_steps=horizon, frame_stack=n_frames)
    rolled = collect(make_job(balancer(n_frames), recipe, chunk_size=500), 1000).returns
    clean = make_vec_env("CartPole-v1", 5, max_episode_steps=horizon, seed=3)
    returns, lengths = evaluate_policy(agent(n_frames), clean, n, return_episode_rewards=True)
    assert returns == pytest.approx(lengths)
    error = math.hypot(np.std(returns) / math.sqrt(n), rolled.std() / math.sqrt(1000))
    assert abs(np.mean(returns) - rolled.mean()) < 4 * error
    assert rolled.mean() < 0.95 * horizon  # the noise hurts: an agent without it would be told apart


def test_it_works_in_evaluate_policy_on_a_plain_environment() -> None:
    mean, _ = evaluate_policy(agent(2, noise=Gaussian(0.01)), gym.make("CartPole-v1", max_episode_steps=50), 3, warn=False)
    assert mean == 50


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_an_sb3_model_is_taken_as_it_is(algorithm: Any) -> None:
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    smoothed = SmoothedAgent(model, Gaussian(0.0), seed=0)
    frames = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    actions, _ = smoothed.predict(frames, deterministic=True)
    assert np.array_equal(actions, model.predict(frames, deterministic=True)[0])


def test_one_frame_or_a_batch_of_them() -> None:
    frame = np.array([0.0, 0.0, 0.1, 0.0], dtype=np.float32)
    action, state = agent(2).predict(frame)
    assert np.shape(action) == ()
    assert state[0].shape == (1, 2, 4)
    actions, state = agent(2).predict(np.stack([frame] * 5))
    assert actions.shape == (5,)
    assert actions.dtype == np.int64
    assert state[0].shape == (5, 2, 4)
    assert int(action) in (0, 1)


def test_stacks_go_on_until_their_own_episode_starts_again() -> None:
    """Without noise the stacks can be read."""
    smoothed = agent(3, noise=Gaussian(0.0))

    def frames(t: int) -> np.ndarray:
        return np.full((3, 4), t, dtype=np.float32)

    _, state = smoothed.predict(frames(1), None, np.ones(3, dtype=bool))
    assert np.array_equal(state[0][:, :, 0], [[1, 1, 1]] * 3)
    _, state = smoothed.predict(frames(2), state, np.zeros(3, dtype=bool))
    _, state = smoothed.predict(frames(3), state, np.array([False, True, False]))
    assert np.array_equal(state[0][:, :, 0], [[1, 2, 3], [3, 3, 3], [1, 2, 3]])
    _, state = smoothed.predict(frames(4), state)
    assert np.array_equal(state[0][:, :, 0], [[2, 3, 4], [3, 3, 4], [2, 3, 4]])
    _, state = agent(3, noise=Gaussian(0.0), stack_padding="zero").predict(frames(1))
    assert np.array_equal(state[0][:, :, 0], [[0, 0, 1]] * 3)


def test_a_caller_may_go_back_to_an_earlier_state() -> None:
    smoothed, frames = agent(2, noise=Gaussian(0.0)), np.ones((2, 4), dtype=np.float32)
    _, first = smoothed.predict(frames)
    kept = first[0].copy()
    smoothed.predict(2 * frames, first, np.array([True, True]))
    assert np.array_equal(first[0], kept)


def test_every_frame_gets_fresh_noise_once() -> None:
    smoothed, frames = agent(2), np.zeros((1000, 4), dtype=np.float32)
    _, first = smoothed.predict(frames)
    _, second = smoothed.predict(frames, first)
    assert np.array_equal(first[0][:, 0], first[0][:, 1])  # the first frame's copies are one noisy frame
    assert np.array_equal(second[0][:, 0], first[0][:, 1])
    fresh = second[0][:, 1]
    assert fresh.std() == pytest.approx(0.3, rel=0.05)
    assert abs(np.corrcoef(fresh.ravel(), second[0][:, 0].ravel())[0, 1]) < 0.08


def test_a_seed_makes_it_repeatable() -> None:
    frames = np.zeros((200, 4), dtype=np.float32)
    one, again, other = (agent(seed=seed).predict(frames)[0] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    restarted = agent(seed=5)
    restarted.predict(frames)
    restarted.set_random_seed(0)
    assert np.array_equal(restarted.predict(frames)[0], one)
    assert not np.array_equal(agent(seed=None).predict(frames)[0], agent(seed=None).predict(frames)[0])


def test_actions_are_greedy_or_sampled_as_asked() -> None:
    policy = PolicyView.from_torch(LinearRule(np.zeros(4), bias=1.0), kind="logits", observation_shape=(4,))
    smoothed, frames = SmoothedAgent(policy, NOISE, seed=0), np.zeros((2000, 4), dtype=np.float32)
    assert set(smoothed.predict(frames, deterministic=True)[0].tolist()) == {1}
    share = smoothed.predict(frames)[0].mean()
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


@pytest.mark.parametrize("noise", [Ablation(0.5), Gaussian((0.1, 0.2, 0.3, 0.4))])
def test_other_mechanisms_smooth_as_well(noise: Noise) -> None:
    actions, _ = agent(noise=noise).predict(np.zeros((5, 4), dtype=np.float32))
    assert actions.shape == (5,)


@pytest.mark.parametrize("layout", ["read-only", "strided", "reversed", "double"])
def test_observations_of_any_layout_are_taken(layout: str) -> None:
    frames = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    given = {
        "read-only": frames.copy(),
        "strided": np.repeat(frames, 2, axis=0)[::2],
        "reversed": frames[::-1].copy()[::-1],
        "double": frames.astype(np.float64),
    }[layout]
    given.flags.writeable = False
    assert np.array_equal(agent(noise=Gaussian(0.0)).predict(given, deterministic=True)[0], agent(noise=Gaussian(0.0)).predict(frames, deterministic=True)[0])  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_observations_that_are_not_finite_are_refused(value: float) -> None:
    frames = np.zeros((3, 4), dtype=np.float32)
    frames[1, 2] = value
    with pytest.raises(ValueError, match="observation must be finite, got NaN or inf"):
        agent().predict(frames)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (), (2, 2, 4), (8,)])
def test_observations_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"observation must have shape \(4,\) or"):
        agent(2).predict(np.zeros(shape, dtype=np.float32))


def test_state_and_episode_starts_of_another_batch_are_refused() -> None:
    smoothed = agent(2)
    _, state = smoothed.predict(np.zeros((3, 4), dtype=np.float32))
    with pytest.raises(ValueError, match=r"state holds arrays of shapes \[\(3, 2, 4\)\], but .* need \[\(4, 2, 4\)\]"):
        smoothed.predict(np.zeros((4, 4), dtype=np.float32), state)
    with pytest.raises(ValueError, match=r"episode_start must have shape \(3,\)"):
        smoothed.predict(np.zeros((3, 4), dtype=np.float32), state, np.ones(4, dtype=bool))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": 0.2}, TypeError, "noise must be a robustrl noise mechanism such as Gaussian"),
        ({"noise": NOISE, "frame_stack": 0}, ValueError, "frame_stack must be an integer >= 1"),
        ({"noise": NOISE, "frame_stack": 3}, ValueError, "the policy stacks 2 frame"),
        ({"noise": NOISE, "frame_stack": 2, "stack_padding": "edge"}, ValueError, "stack_padding must be one of"),
        ({"noise": NOISE, "frame_stack": 2, "seed": -1}, ValueError, "non-negative"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SmoothedAgent(balancer(2), **options)


def test_integer_observations_are_refused() -> None:
    with pytest.raises(ValueError, match="floating dtype"):
        agent().predict(np.zeros((2, 4), dtype=np.int64))


def test_the_generators_of_torch_and_numpy_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.random()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    agent().predict(np.zeros((5, 4), dtype=np.float32))
    assert (torch.rand(1).item(), np.random.random()) == expected  # noqa: NPY002
