"""The noise wrappers: every arriving frame gets fresh noise exactly once, on every host, and the environment never notices."""

from __future__ import annotations

import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.testing import assert_array_equal
from scipy import stats
from stable_baselines3 import DQN
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from robustrl.envs import NoiseObservation, add_noise, sb3, vector
from robustrl.envs.single import RewardProbe
from robustrl.errors import ChainError
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform

SIGMA, LENGTH, N = 0.3, 4, 3
NOISE = Gaussian(SIGMA)


class Still(gym.Env[np.ndarray, np.int64]):
    """The true frame is always zero, so what a wrapper shows is its noise; episodes last LENGTH steps."""

    def __init__(self, shape: tuple[int, ...] = (2,), dtype: Any = np.float32, value: float = 0.0) -> None:
        self.observation_space = (
            spaces.Box(-1, 1, shape, dtype) if np.dtype(dtype).kind == "f" else spaces.Box(0, 255, shape, dtype)
        )
        self.action_space = spaces.Discrete(2)
        self._frame = np.full(shape, value, dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._frame.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self._frame.copy(), 1.0, self._steps == LENGTH, False, {}


def _rows(frames: Any) -> np.ndarray:
    return np.asarray(frames).reshape(-1, 2)


def _single(episodes: int) -> list[np.ndarray]:
    env, seen = NoiseObservation(Still(), NOISE, seed=0), []
    for _ in range(episodes):
        seen.append(_rows(env.reset()[0]))
        seen += [_rows(env.step(0)[0]) for _ in range(LENGTH)]
    return seen


def _vector(mode: AutoresetMode, episodes: int) -> list[np.ndarray]:
    env = vector.NoiseObservation(SyncVectorEnv([Still] * N, autoreset_mode=mode), NOISE, seed=0)
    seen = [_rows(env.reset()[0])]
    for t in range(episodes * (LENGTH + (mode == AutoresetMode.NEXT_STEP))):
        if mode == AutoresetMode.DISABLED and t and t % LENGTH == 0:
            seen.append(_rows(env.reset()[0]))
        frames, *_, info = env.step(np.zeros(N, dtype=np.int64))
        seen.append(_rows(frames))
        if "final_obs" in info:
            assert info["_final_obs"].all()
            seen.append(_rows(np.stack(list(info["final_obs"]))))
    return seen


def _sb3(episodes: int) -> list[np.ndarray]:
    env = sb3.NoiseObservation(DummyVecEnv([Still] * N), NOISE, seed=0)
    seen = [_rows(env.reset())]
    for _ in range(episodes * LENGTH):
        frames, _, dones, infos = env.step(np.zeros(N, dtype=np.int64))
        seen.append(_rows(frames))
        seen += [_rows(info["terminal_observation"]) for info, done in zip(infos, dones, strict=True) if done]
    return seen


HOSTS = {
    "single": _single,
    "vector, next-step autoreset": lambda episodes: _vector(AutoresetMode.NEXT_STEP, episodes),
    "vector, same-step autoreset": lambda episodes: _vector(AutoresetMode.SAME_STEP, episodes),
    "vector, no autoreset": lambda episodes: _vector(AutoresetMode.DISABLED, episodes),
    "Stable-Baselines3": _sb3,
}
every_host = pytest.mark.parametrize("host", list(HOSTS))


@every_host
def test_every_frame_including_final_ones_carries_noise_of_its_own(host: str) -> None:
    """No draw is ever shown twice, nothing is shown clean, and the law is the mechanism's."""
    seen = HOSTS[host](400)
    y = np.concatenate(seen)
    assert y.dtype == np.float32
    assert len(np.unique(y, axis=0)) == len(y) >= 2000
    assert stats.kstest(y.ravel() / SIGMA, "norm").pvalue > 1e-3
    first = np.stack([step[0] for step in seen])
    for lag in (1, LENGTH, LENGTH + 1, 2 * LENGTH):
        correlation = np.mean(first[lag:] * first[:-lag]) / SIGMA**2
        assert abs(correlation) < 4 / math.sqrt(2 * (len(first) - lag))
    if host != "single":
        both = np.stack([step[:2] for step in seen if len(step) == N])
        assert abs(np.mean(both[:, 0] * both[:, 1])) / SIGMA**2 < 4 / math.sqrt(2 * len(both))


@pytest.mark.parametrize(
    "noise", [NOISE, Uniform(0.2), Laplace(0.2), Splitting(0.7, low=-5, high=5), Ablation(0.7)], ids=lambda n: n.scale
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_both_environment_checkers_accept_the_wrapper(noise: Noise) -> None:
    env = NoiseObservation(gym.make("CartPole-v1"), noise)
    gymnasium_check_env(env, skip_render_check=True)
    sb3_check_env(env, warn=False, skip_render_check=True)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (4,), np.float32)


def test_the_sb3_checker_has_nothing_to_warn_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(NoiseObservation(Still(), NOISE))


def _true_states(env: Any) -> np.ndarray:
    return np.array([member.unwrapped.state for member in (env.unwrapped.envs if hasattr(env.unwrapped, "envs") else [env])])


@pytest.mark.parametrize("host", ["single", "vector", "sb3"])
def test_replayed_actions_give_the_same_trajectory_with_and_without_noise(host: str) -> None:
    """Bit for bit, across resets, generator state included: noise never draws from the environment's generator."""

    def run(noisy: bool) -> list[np.ndarray]:
        env: Any
        if host == "single":
            env = gym.make("CartPole-v1")
        elif host == "vector":
            env = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * N)
        else:
            env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * N)
        env = add_noise(env, NOISE) if noisy else env
        actions = np.random.default_rng(1).integers(2, size=(60, N))
        trace = []
        if host == "sb3":
            env.seed(7)
            env.reset()
        else:
            env.reset(seed=7)
        for action in actions:
            if host == "single":
                _, reward, terminated, truncated, _ = env.step(int(action[0]))
                state, end = _true_states(env), terminated or truncated
                if end:
                    env.reset()
            else:
                _, reward, *ends = env.step(action)
                state, end = _true_states(env), ends[0]
            trace += [state, np.asarray(reward), np.asarray(end)]
        members = [env] if host == "single" else env.unwrapped.envs
        trace.append(np.array([member.unwrapped.np_random.random() for member in members]))
        return trace

    clean, noisy = run(False), run(True)
    assert any(np.any(end) for end in clean[2::3])
    for left, right in zip(clean, noisy, strict=True):
        assert_array_equal(left, right)


def test_a_masked_reset_leaves_running_episodes_with_the_observation_they_have() -> None:
    """Noising a frame a second time would show it to the policy twice."""
    env = vector.NoiseObservation(SyncVectorEnv([Still] * 4, autoreset_mode=AutoresetMode.DISABLED), NOISE, seed=0)
    env.reset()
    before = env.step(np.zeros(4, dtype=np.int64))[0]
    kept = before.copy()
    before[:] = 99.0  # the caller may do as it likes with its array
    mask = np.array([True, False, True, False])
    after, _ = env.reset(options={"reset_mask": mask})
    assert_array_equal(after[~mask], kept[~mask])
    assert np.all(np.any(after[mask] != kept[mask], axis=1))
    again, _ = env.reset(options={"reset_mask": ~mask})
    assert_array_equal(again[mask], after[mask])
    assert np.all(np.any(again[~mask] != after[~mask], axis=1))


def test_a_seed_given_with_a_masked_reset_repeats_no_noise_of_running_episodes() -> None:
    env = vector.NoiseObservation(SyncVectorEnv([Still] * 2, autoreset_mode=AutoresetMode.DISABLED), NOISE)
    seen = [env.reset(seed=5)[0][1]]
    for _ in range(3):
        seen.append(env.step(np.zeros(2, dtype=np.int64))[0][1])
        env.reset(seed=5, options={"reset_mask": np.array([True, False])})
    assert len(np.unique(seen, axis=0)) == 4
    first, _ = env.reset(seed=5, options={"reset_mask": np.array([True, True])})
    assert_array_equal(first[1], seen[0])  # a reset of everybody does start again


def test_a_seed_given_to_stable_baselines_waits_for_the_next_reset() -> None:
    env = sb3.NoiseObservation(DummyVecEnv([Still] * 2), NOISE)
    env.seed(3)
    seen = [env.reset()]
    env.seed(3)  # in the middle of the episodes
    seen += [env.step(np.zeros(2, dtype=np.int64))[0] for _ in range(3)]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 8
    assert_array_equal(env.reset(), seen[0])


@pytest.mark.parametrize("host", ["single", "vector", "vector, list of seeds", "sb3"])
def test_the_same_seed_gives_the_same_noise_and_another_seed_another(host: str) -> None:
    def start(seed: int) -> np.ndarray:
        if host == "single":
            return NoiseObservation(Still(), NOISE).reset(seed=seed)[0]
        if host == "sb3":
            env = sb3.NoiseObservation(DummyVecEnv([Still] * N), NOISE)
            env.seed(seed)
            return env.reset()
        seeds = seed if host == "vector" else [seed + i for i in range(N)]
        return vector.NoiseObservation(SyncVectorEnv([Still] * N), NOISE).reset(seed=seeds)[0]

    assert_array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


def test_noise_shares_no_draws_with_an_environment_of_the_same_seed() -> None:
    class Echo(Still):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            return self.np_random.standard_normal(2).astype(np.float32), {}

    clean = Echo().reset(seed=4)[0]
    noisy = NoiseObservation(Echo(), Gaussian(1.0)).reset(seed=4)[0]
    assert not np.any(np.isclose(noisy - clean, clean, atol=1e-4))


def test_without_a_seed_the_noise_goes_on_over_a_reset() -> None:
    env = NoiseObservation(Still(), NOISE)
    first, _ = env.reset(seed=0)
    assert not np.array_equal(env.reset()[0], first)


def test_noise_keeps_its_size_in_stable_baselines_vector_env_and_replay_buffer() -> None:
    """An integer space would cut fractions off and wrap around 0 and 255 here; the declared float32 space does not."""
    frames = add_noise(DummyVecEnv([lambda: Still((12, 12, 1), value=0.02)]), Gaussian(0.1))
    model = DQN(
        "MlpPolicy", frames, buffer_size=600, learning_starts=10_000, policy_kwargs={"net_arch": [4]}, device="cpu", seed=0
    )
    model.learn(600)
    buffer = model.replay_buffer
    assert buffer is not None
    assert buffer.observations.dtype == np.float32
    for stored in (buffer.observations, buffer.next_observations):
        noise = stored[:600].astype(np.float64) - 0.02
        assert noise.std() == pytest.approx(0.1, rel=0.01)
        assert abs(noise.mean()) < 0.002
        assert noise.min() < -0.3  # nothing was clipped or wrapped
        assert stats.kstest(noise[::3].ravel() / 0.1, "norm").pvalue > 1e-3
    ends = np.flatnonzero(buffer.dones[:600, 0])
    assert len(ends) == 600 // LENGTH
    assert np.all(buffer.next_observations[ends] != np.float32(0.02))  # terminal observations are noisy in the buffer too


@pytest.mark.parametrize("host", ["single", "vector", "sb3", "add_noise"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_integer_observation_spaces_are_refused(host: str, dtype: Any) -> None:
    def make() -> Still:
        return Still((4, 4, 1), dtype)

    env: Any = SyncVectorEnv([make]) if host == "vector" else DummyVecEnv([make]) if host == "sb3" else make()
    wrap: Any = {
        "vector": vector.NoiseObservation,
        "sb3": sb3.NoiseObservation,
        "single": NoiseObservation,
        "add_noise": add_noise,
    }
    with pytest.raises(ChainError, match=f"float observation space, got {np.dtype(dtype)}.*convert to float and scale before"):
        wrap[host](env, NOISE)


@pytest.mark.parametrize("noise", [0.2, None, "gaussian", Gaussian], ids=str)
def test_what_is_not_a_mechanism_is_refused(noise: Any) -> None:
    with pytest.raises(TypeError, match=r"^noise must be a robustrl noise mechanism"):
        NoiseObservation(Still(), noise)


def test_observations_that_are_not_a_box_are_refused() -> None:
    with pytest.raises(TypeError, match=r"noise needs a Box observation space or a Dict of them, got Discrete\(16\)"):
        NoiseObservation(gym.make("FrozenLake-v1"), NOISE)


@pytest.mark.parametrize("env", [None, "CartPole-v1", 3, gym.Env])
def test_add_noise_refuses_what_is_not_an_environment(env: Any) -> None:
    with pytest.raises(TypeError, match=r"^env must be a gymnasium Env or VectorEnv or an SB3 VecEnv"):
        add_noise(env, NOISE)


def test_add_noise_picks_the_host() -> None:
    assert type(add_noise(Still(), NOISE)) is NoiseObservation
    assert type(add_noise(SyncVectorEnv([Still]), NOISE)) is vector.NoiseObservation
    assert type(add_noise(DummyVecEnv([Still]), NOISE)) is sb3.NoiseObservation


def test_double_precision_frames_are_rounded_after_the_noise_only() -> None:
    """Rounded first, 1 + 1e-9 would be 1 and an attack of that size would be lost or, elsewhere, enlarged."""
    tiny = 1e-9
    env = NoiseObservation(Still(dtype=np.float64, value=tiny), Gaussian(0.0))
    shown = env.reset()[0]
    assert shown.dtype == np.float32
    assert_array_equal(shown, np.full(2, tiny, dtype=np.float32))
    frames: list[np.ndarray] = []

    class Recorder(Gaussian):
        def perturb(self, x: Any, generator: Any) -> Any:
            frames.append(x)
            return super().perturb(x, generator)

    NoiseObservation(Still(dtype=np.float64, value=1 + tiny), Recorder(0.1)).reset()
    assert frames[0].dtype == np.float64
    assert np.all(frames[0] == 1 + tiny)


def test_the_wrapper_travels_in_an_environment_spec() -> None:
    env = NoiseObservation(gym.make("CartPole-v1"), NOISE)
    assert env.spec is not None
    rebuilt = gym.make(env.spec)
    assert isinstance(rebuilt, NoiseObservation)
    assert rebuilt.noise == NOISE


def test_a_reward_probe_remembers_the_reward_inside_later_wrappers() -> None:
    env = gym.wrappers.TransformReward(RewardProbe(Still()), lambda reward: 100 * float(reward))
    env.reset()
    assert env.step(np.int64(0))[1] == 100.0
    assert env.env.take() == 1.0  # type: ignore[attr-defined]
