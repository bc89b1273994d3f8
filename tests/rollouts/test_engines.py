"""Engines: the environment's own episodes, every slot exactly once, true rewards."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import register, registry
from toys import Steps

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.noise import Gaussian
from robustrl.rollouts.engines import EnvList, NativeCartPole, make_engine

SEED = np.random.SeedSequence(11)


def cartpole(horizon: int = 60, **changes: Any) -> EnvRecipe:
    return EnvRecipe(env_id="CartPole-v1", max_episode_steps=horizon, noise=Gaussian(0.2), **changes)


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
    assert engine.step(np.zeros(9, dtype=np.int64)).frames.shape == (9, 4)
    engine.keep(np.arange(9) == 8)
    assert engine.step(np.zeros(1, dtype=np.int64)).frames.shape == (1, 4)


def test_native_starts_are_the_environments_own_uniform_law() -> None:
    frames, seeds = NativeCartPole(cartpole()).start(4000, SEED)
    assert frames.dtype == np.float32
    assert np.abs(frames).max() <= 0.05
    assert np.abs(frames.mean(axis=0)).max() < 4 * 0.1 / np.sqrt(12 * 4000)  # a uniform law on (-.05, .05)
    assert len(set(seeds.tolist())) == 1


def test_an_engine_can_be_started_again_with_the_same_outcome() -> None:
    for engine in (NativeCartPole(cartpole()), EnvList(cartpole())):
        first, seeds = engine.start(5, SEED)
        engine.step(np.zeros(5, dtype=np.int64))
        engine.keep(np.arange(5) > 2)
        again, seeds_again = engine.start(5, SEED)
        assert np.array_equal(first, again)
        assert np.array_equal(seeds, seeds_again)


def test_a_listed_slot_is_the_environment_reset_with_its_seed() -> None:
    engine = EnvList(EnvRecipe(env_id="MountainCar-v0", noise=Gaussian(0.1)))
    frames, seeds = engine.start(3, SEED)
    alone = [gym.make("MountainCar-v0") for _ in seeds]
    assert len(set(seeds.tolist())) == 3
    for row, env in enumerate(alone):
        assert np.array_equal(frames[row], env.reset(seed=int(seeds[row]))[0])
    for actions in ([0, 1, 2], [2, 2, 0]):
        step = engine.step(np.array(actions))
        for row, env in enumerate(alone):
            frame, reward, *_ = env.step(actions[row])
            assert np.array_equal(step.frames[row], frame)
            assert step.rewards[row] == reward
    engine.keep(np.array([False, True, False]))
    assert np.array_equal(engine.step(np.array([1])).frames[0], alone[1].step(1)[0])


class DoubleReward(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


class Repeat(gym.Wrapper[Any, Any, Any, Any]):
    """Every action four times, and twice while resetting; it reports only the last reward."""

    def reset(self, **options: Any) -> Any:
        self.env.reset(**options)
        self.env.step(0)
        observation, _, _, _, info = self.env.step(0)
        return observation, info

    def step(self, action: Any) -> Any:
        for _ in range(4):
            result = self.env.step(action)
            if result[2] or result[3]:
                break
        return result


@pytest.mark.parametrize(("wrapper", "expected"), [(DoubleReward, [1, 2, 3]), (Repeat, [3 + 4 + 5 + 6, 7 + 8 + 9 + 10])])
def test_rewards_are_those_of_the_environment_inside_its_wrappers(wrapper: Any, expected: list[int]) -> None:
    """`Steps` pays t at its t-th step: the rewards name the steps that were taken."""
    engine = EnvList(EnvRecipe(factory=lambda: Steps(10), max_episode_steps=100, wrappers=(wrapper,), noise=Gaussian(1.0)))
    engine.start(2, SEED)
    for reward in expected:
        assert engine.step(np.zeros(2, dtype=np.int64)).rewards.tolist() == [reward, reward]


def test_observations_come_in_the_declared_precision() -> None:
    class Doubles(gym.ObservationWrapper[Any, Any, Any]):
        def observation(self, observation: Any) -> Any:
            return observation.astype(np.float64)

    engine = EnvList(EnvRecipe(factory=lambda: Doubles(Steps(3)), max_episode_steps=100, noise=Gaussian(1.0)))
    frames, _ = engine.start(2, SEED)
    assert frames.dtype == np.float32
    assert engine.step(np.zeros(2, dtype=np.int64)).frames.dtype == np.float32


def test_a_factory_that_hands_out_one_environment_twice_is_refused() -> None:
    env = Steps(3)
    with pytest.raises(ValueError, match="same environment twice"):
        EnvList(EnvRecipe(factory=lambda: env, max_episode_steps=100, noise=Gaussian(1.0))).start(2, SEED)


def test_closing_an_engine_closes_its_environments() -> None:
    closed: list[int] = []

    class Noticed(Steps):
        def close(self) -> None:
            closed.append(1)

    engine = EnvList(EnvRecipe(factory=lambda: Noticed(3), max_episode_steps=100, noise=Gaussian(1.0)))
    engine.start(4, SEED)
    closed.clear()
    engine.close()
    assert len(closed) == 4


def test_auto_takes_the_native_engine_for_an_unwrapped_cartpole_alone() -> None:
    wrapped = cartpole(wrappers=(DoubleReward,))
    rewarded = cartpole(env_kwargs={"sutton_barto_reward": True})
    rendered = cartpole(env_kwargs={"render_mode": "rgb_array"})
    names = [make_engine(recipe).name for recipe in (cartpole(), wrapped, rewarded, rendered)]
    assert names == ["native", "list", "native", "list"]
    assert make_engine(cartpole(), "list").name == "list"
    assert make_engine(EnvRecipe(env_id="Acrobot-v1")).name == "list"
    assert make_engine(EnvRecipe(factory=lambda: gym.make("CartPole-v1"))).name == "list"


@pytest.mark.parametrize(
    "changes",
    [
        {"kwargs": {"sutton_barto_reward": True}},
        {"additional_wrappers": (gym.wrappers.TimeAwareObservation.wrapper_spec(),)},
        {"entry_point": "toys:Steps", "kwargs": {"length": 3}},
    ],
)
def test_a_changed_cartpole_under_an_id_of_its_own_is_not_taken_for_the_native_one(changes: dict[str, Any]) -> None:
    spec = gym.spec("CartPole-v1")
    settings: dict[str, Any] = {
        "entry_point": spec.entry_point,
        "vector_entry_point": spec.vector_entry_point,
        "max_episode_steps": 50,
    }
    register("Changed-v0", **(settings | changes))
    try:
        assert make_engine(EnvRecipe(env_id="Changed-v0")).name == "list"
    finally:
        del registry["Changed-v0"]


def test_sutton_and_bartos_rewards_reach_the_native_engine() -> None:
    engine = make_engine(cartpole(env_kwargs={"sutton_barto_reward": True}))
    engine.start(1, SEED)
    rewards = []
    for _ in range(20):
        step = engine.step(np.zeros(1, dtype=np.int64))
        rewards.append(float(step.rewards[0]))
        if step.finished[0]:
            break
    assert rewards == [0.0] * (len(rewards) - 1) + [-1.0]


def test_an_engine_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="engine='native' is not available for MountainCar-v0"):
        make_engine(EnvRecipe(env_id="MountainCar-v0"), "native")
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'native', 'list', got 'fast'"):
        make_engine(cartpole(), "fast")


def test_an_environment_without_a_horizon_has_no_engine() -> None:
    with pytest.raises(ChainError, match="no finite horizon: pass max_episode_steps="):
        make_engine(EnvRecipe(factory=lambda: Steps(3)))
