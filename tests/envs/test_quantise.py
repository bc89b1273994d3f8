"""QuantiseObservation: one grid on three hosts."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.testing import assert_allclose, assert_array_equal
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from robustrl.envs import add_noise, check_chain
from robustrl.envs.quantise import QuantiseCore, QuantiseObservation, VecQuantiseObservation, VectorQuantiseObservation
from robustrl.noise import DeterministicSplitting

LOW, HIGH = (-4.8, -4.0, -0.42, -4.0), (4.8, 4.0, 0.42, 4.0)


def cartpole(steps: int = 9) -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=steps)


def on_grid(frames: Any, q: int = 50) -> bool:
    k = (np.asarray(frames, dtype=float) - LOW) / (np.array(HIGH) - LOW) * q
    return bool(np.all(np.abs(k - np.round(k)) < 1e-3) and np.all(np.asarray(frames) >= np.float32(LOW)))


def test_observations_are_clipped_and_rounded_to_the_nearest_point() -> None:
    core = QuantiseCore(spaces.Box(-2, 2, (3,), np.float32), 4)
    assert_array_equal(core([-2.7, -1.4, 0.6]), np.array([-2, -1, 1], dtype=np.float32))
    assert_array_equal(core([[math.inf, -math.inf, 1.4999]]), [[2, -2, 1]])
    assert core([0.0, 0.0, 0.0]).dtype == np.float32
    generator = np.random.default_rng(0)
    x = generator.uniform(-2, 2, (1000, 3))
    assert np.abs(core(x) - x).max() <= 0.5 + 1e-6  # half a step
    assert_array_equal(core(core(x)), core(x))
    with pytest.raises(ValueError, match="got NaN"):
        core([math.nan, 0.0, 0.0])


def test_bounds_are_the_spaces_or_the_callers() -> None:
    own = QuantiseCore(spaces.Box(np.array([-1, 0], np.float32), np.array([1, 8], np.float32)), 4)
    assert (own.grid.low, own.grid.high) == ((-1.0, 0.0), (1.0, 8.0))
    assert QuantiseCore(spaces.Box(0, 1, (2, 3, 3), np.float32), 4).grid.low == 0.0
    given = QuantiseCore(spaces.Box(-np.inf, np.inf, (2,), np.float64), 4, low=-1, high=[1.0, 3.0])
    assert given.space == spaces.Box(np.array([-1.0, -1.0]), np.array([1.0, 3.0]), dtype=np.float64)
    with pytest.raises(ValueError, match="low must be given for this observation space"):
        QuantiseCore(spaces.Box(-np.inf, np.inf, (2,), np.float32), 4, high=1)
    rows = spaces.Box(np.array([[0, 0], [1, 1]], np.float32), np.full((2, 2), 5, np.float32))
    with pytest.raises(ValueError, match="low must be given"):
        QuantiseCore(rows, 4)
    for space in (spaces.Box(0, 255, (2,), np.uint8), spaces.Discrete(3), spaces.Dict(x=spaces.Box(0, 1))):
        with pytest.raises(TypeError, match="needs a Box observation space of floats"):
            QuantiseCore(space, 4)


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
def test_a_quantised_environment_passes_the_checkers() -> None:
    env = QuantiseObservation(cartpole(), 50, LOW, HIGH)
    gymnasium_check_env(env, skip_render_check=True)
    sb3_check_env(env, warn=False)
    copy = gym.make(env.spec) if env.spec is not None else env
    assert copy.observation_space == env.observation_space


def test_three_hosts_show_the_same_observations() -> None:
    single = QuantiseObservation(cartpole(), 50, LOW, HIGH)
    vector = VectorQuantiseObservation(SyncVectorEnv([cartpole]), 50, LOW, HIGH)
    venv = DummyVecEnv([cartpole])
    venv.seed(7)
    sb3 = VecQuantiseObservation(venv, 50, LOW, HIGH)
    one, _ = single.reset(seed=7)
    shown = [one, vector.reset(seed=7)[0][0], sb3.reset()[0]]
    for t in range(8):
        assert all(np.array_equal(shown[0], other) and on_grid(other) for other in shown[1:])
        action = t % 2
        sb3_step = sb3.step(np.array([action]))
        shown = [single.step(action)[0], vector.step(np.array([action]))[0][0], sb3_step[0][0]]
    assert vector.single_observation_space == sb3.observation_space == single.observation_space


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_final_observations_are_on_the_grid_too(mode: AutoresetMode) -> None:
    env = VectorQuantiseObservation(SyncVectorEnv([cartpole] * 2, autoreset_mode=mode), 50, LOW, HIGH)
    env.reset(seed=0)
    for t in range(9):
        frames, _, _, truncated, info = env.step(np.array([t % 2, t % 2]))
        assert on_grid(frames)
    assert truncated.all()
    assert ("final_obs" in info) == (mode == AutoresetMode.SAME_STEP)
    if mode == AutoresetMode.SAME_STEP:
        assert on_grid(np.stack(list(info["final_obs"])))


def test_terminal_observations_of_sb3_are_on_the_grid_too() -> None:
    env = VecQuantiseObservation(DummyVecEnv([cartpole] * 2), 50, LOW, HIGH)
    env.reset()
    for t in range(9):
        frames, _, dones, infos = env.step(np.array([t % 2, t % 2]))
        assert on_grid(frames)
    assert dones.all()
    assert all(on_grid(info["terminal_observation"]) for info in infos)


@pytest.mark.parametrize("host", ["gymnasium", "vector", "sb3"])
def test_splitting_noise_goes_outside_of_it(host: str) -> None:
    mechanism = DeterministicSplitting(20, 50, LOW, HIGH)
    env: Any = {
        "gymnasium": lambda: QuantiseObservation(cartpole(), 50, LOW, HIGH),
        "vector": lambda: VectorQuantiseObservation(SyncVectorEnv([cartpole]), 50, LOW, HIGH),
        "sb3": lambda: VecQuantiseObservation(DummyVecEnv([cartpole]), 50, LOW, HIGH),
    }[host]()
    noisy = add_noise(env, mechanism, seed=0)
    assert check_chain(noisy).noise == mechanism
    noisy.reset()
    with pytest.raises(ValueError, match="must lie on the grid"):
        add_noise(cartpole(), mechanism, seed=0).reset()


def test_a_grid_is_what_the_mechanism_reads() -> None:
    core, mechanism = QuantiseCore(cartpole().observation_space, 255, LOW, HIGH), DeterministicSplitting(20, 255, LOW, HIGH)
    x = np.random.default_rng(0).uniform(LOW, HIGH, (200, 4))
    indices = mechanism.grid.indices(core(x))
    assert_allclose(indices, (x - LOW) / (np.array(HIGH) - LOW) * 255, atol=0.5 + 1e-9)
