"""The vectorised CartPole takes the single one's steps, for the slots that run."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines import NativeCartPole, make_engine

SEED = np.random.SeedSequence(11)


def cartpole(horizon: int = 60, **changes: Any) -> EnvRecipe:
    return EnvRecipe(env_id="CartPole-v1", max_episode_steps=horizon, **changes)


def single_cartpole(state: np.ndarray, horizon: int) -> gym.Env[Any, Any]:
    env = gym.make("CartPole-v1", max_episode_steps=horizon)
    env.reset(seed=0)
    env.unwrapped.state = np.array(state)  # type: ignore[attr-defined]
    return env


def test_native_cartpole_takes_the_same_steps_as_gymnasiums_single_one() -> None:
    n, horizon = 30, 40
    engine = NativeCartPole(cartpole(horizon))
    frames, _ = engine.start(n, SEED)
    singles = [single_cartpole(state, horizon) for state in engine._env.state.T]
    slots, rng, ended = np.arange(n), np.random.default_rng(0), 0
    for _ in range(horizon):
        actions = (frames[:, 2] + 0.3 * frames[:, 3] + rng.normal(0, 0.15, len(slots)) > 0).astype(np.int64)
        step = engine.step(actions)
        for row, slot in enumerate(slots):
            frame, reward, terminated, truncated, _ = singles[slot].step(actions[row])
            np.testing.assert_allclose(step.frames[row], frame, rtol=0, atol=1e-6)
            assert step.rewards[row] == reward
            assert step.finished[row] == (terminated or truncated)
        ended += int(step.finished.sum())
        slots, frames = slots[~step.finished], step.frames[~step.finished]
        if not slots.size:
            break
        engine.keep(~step.finished)
    assert ended == n
    engine.close()


def test_slicing_keeps_the_rows_that_go_on() -> None:
    engine = NativeCartPole(cartpole())
    engine.start(12, SEED)
    engine.step(np.tile([0, 1], 6))
    before = engine._env.state.copy()
    running = np.array([True, False, True, True] * 3)
    engine.keep(running)
    assert np.array_equal(engine._env.state, before[:, running])
    assert engine._env.state.flags.c_contiguous  # on some processors the last bits of a sine depend on strides
    assert engine.step(np.zeros(9, dtype=np.int64)).frames.shape == (9, 4)
    engine.keep(np.arange(9) == 8)
    assert engine.step(np.zeros(1, dtype=np.int64)).frames.shape == (1, 4)


def test_native_starts_are_the_environments_own_uniform_law() -> None:
    frames, seeds = NativeCartPole(cartpole()).start(4000, SEED)
    assert frames.dtype == np.float32
    assert np.abs(frames).max() <= 0.05
    assert np.abs(frames.mean(axis=0)).max() < 4 * 0.1 / np.sqrt(12 * 4000)  # a uniform law on (-.05, .05)
    assert len(set(seeds.tolist())) == 1


def test_sutton_and_bartos_rewards_reach_the_native_engine() -> None:
    engine = make_engine(cartpole(env_kwargs={"sutton_barto_reward": True}), "native")
    engine.start(1, SEED)
    rewards = []
    for _ in range(20):
        step = engine.step(np.zeros(1, dtype=np.int64))
        rewards.append(float(step.rewards[0]))
        if step.finished[0]:
            break
    assert rewards == [0.0] * (len(rewards) - 1) + [-1.0]
