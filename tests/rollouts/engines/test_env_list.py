"""A list of environments: each slot is the environment itself, with its true rewards."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from toys import Steps

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.rollouts.engines import EnvList, refuse_unseeded

SEED = np.random.SeedSequence(11)


def listed(factory: Any, **changes: Any) -> EnvList:
    return EnvList(EnvRecipe(factory=factory, max_episode_steps=100, **changes))


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_a_listed_slot_is_the_environment_reset_with_its_seed(env_id: str) -> None:
    engine = EnvList(EnvRecipe(env_id=env_id))
    frames, seeds = engine.start(3, SEED)
    alone = [gym.make(env_id) for _ in seeds]
    assert len(set(seeds.tolist())) == 3
    for row, env in enumerate(alone):
        assert np.array_equal(frames[row], env.reset(seed=int(seeds[row]))[0])
    for actions in (np.array([0, 1, 2]), np.array([2, 2, 0])):
        if env_id == "MountainCarContinuous-v0":
            actions = (actions[:, None] / 3).astype(np.float32)
        step = engine.step(actions)
        for row, env in enumerate(alone):
            frame, reward, *_ = env.step(actions[row])
            assert np.array_equal(step.frames[row], frame)
            assert step.rewards[row] == reward
    engine.keep(np.array([False, True, False]))
    assert np.array_equal(engine.step(actions[:1]).frames[0], alone[1].step(actions[0])[0])


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
    engine = listed(lambda: Steps(10), wrappers=(wrapper,))
    engine.start(2, SEED)
    for reward in expected:
        assert engine.step(np.zeros(2, dtype=np.int64)).rewards.tolist() == [reward, reward]


def test_a_finished_slot_is_never_stepped_or_reset_again() -> None:
    class Counting(Steps):
        calls = 0

        def reset(self, **options: Any) -> Any:
            Counting.calls += 1
            return super().reset(**options)

        def step(self, action: Any) -> Any:
            Counting.calls += 1
            return super().step(action)

    lengths = iter([9, 2, 3, 1])  # the first instance tells the recipe its spaces
    engine = listed(lambda: Counting(next(lengths)))
    engine.start(3, SEED)
    Counting.calls, running = 0, 3
    while running:
        step = engine.step(np.zeros(running, dtype=np.int64))
        assert len(step.frames) == running
        engine.keep(~step.finished)
        running -= int(step.finished.sum())
    assert Counting.calls == 2 + 3 + 1


def test_a_step_that_is_cut_off_is_finished() -> None:
    engine = EnvList(EnvRecipe(factory=lambda: Steps(50), max_episode_steps=2))
    engine.start(1, SEED)
    assert [engine.step(np.zeros(1, dtype=np.int64)).finished[0] for _ in range(2)] == [False, True]


class Doubles(gym.ObservationWrapper[Any, Any, Any]):
    def observation(self, observation: Any) -> Any:
        return observation.astype(np.float64)


class Taller(gym.ObservationWrapper[Any, Any, Any]):
    def observation(self, observation: Any) -> Any:
        return observation[None]


def test_observations_come_in_the_declared_precision() -> None:
    engine = listed(lambda: Doubles(Steps(3)))
    frames, _ = engine.start(2, SEED)
    assert frames.dtype == np.float32
    assert engine.step(np.zeros(2, dtype=np.int64)).frames.dtype == np.float32


def test_an_observation_of_another_shape_than_declared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"returned an observation of shape \(1, 4\), declared is \(4,\)"):
        listed(lambda: Taller(Steps(3))).start(2, SEED)


def test_dictionaries_are_joined() -> None:
    class Pair(gym.Env[Any, Any]):
        observation_space = gym.spaces.Dict(
            a=gym.spaces.Box(-1, 1, (2,), np.float32), b=gym.spaces.Box(-1, 1, (1,), np.float32)
        )
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return {"a": np.array([0.1, 0.2], np.float32), "b": np.array([0.3], np.float32)}, {}

        def step(self, action: Any) -> Any:
            return self.reset()[0], 0.0, False, False, {}

    engine = listed(Pair)
    expected = np.array([[0.1, 0.2, 0.3]] * 2, np.float32)
    assert np.array_equal(engine.start(2, SEED)[0], expected)
    assert np.array_equal(engine.step(np.zeros(2, dtype=np.int64)).frames, expected)


def test_a_factory_that_hands_out_one_environment_twice_is_refused() -> None:
    env = Steps(3)
    with pytest.raises(ValueError, match="same environment twice"):
        listed(lambda: env).start(2, SEED)


def test_closing_an_engine_closes_its_environments() -> None:
    closed: list[int] = []

    class Noticed(Steps):
        def close(self) -> None:
            closed.append(1)

    engine = listed(lambda: Noticed(3))
    engine.start(4, SEED)
    closed.clear()
    engine.close()
    assert len(closed) == 4


def test_an_environment_that_ignores_its_seed_is_refused() -> None:
    class Deaf(Steps):
        draws = np.random.default_rng(9)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            generator = self.draws if seed is None else np.random.default_rng(0)
            return generator.normal(size=4).astype(np.float32), {}

    with pytest.raises(ChainError, match="ignores reset"):
        refuse_unseeded(EnvRecipe(factory=lambda: Deaf(3), max_episode_steps=100))
    refuse_unseeded(EnvRecipe(env_id="CartPole-v1"))
    refuse_unseeded(EnvRecipe(factory=lambda: Steps(3), max_episode_steps=100))  # the same start every time is a law, too
