"""A restored environment goes on as the saved one did."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.rollouts.snapshots import Snapshots
from rollouts.brute import Maze, Streak

ENVIRONMENTS: dict[str, Any] = {
    "maze": lambda: gym.wrappers.TimeLimit(Streak(Maze(3, noisy=True)), 9),
    "stacked": lambda: gym.wrappers.FrameStackObservation(gym.wrappers.TimeLimit(Maze(3, noisy=True), 9), 3),
    "closures": lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: 2 * float(r)),
    "Acrobot-v1": None,
    "MountainCar-v0": None,
    "FrozenLake-v1": None,
    "Taxi-v4": None,
    "InvertedPendulum-v5": None,
    "robustrl/LavaIslands-v0": None,
    "robustrl/Freeway-v0": None,
}


def played(env: Any, actions: list[Any]) -> list[Any]:
    found: list[Any] = []
    for action in actions:
        observation, *rest, _ = env.step(action)
        found.append((np.array(observation).tolist(), *rest))
        if rest[1] or rest[2]:
            break
    return found


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_restored_environment_goes_on_as_the_saved_one(name: str) -> None:
    make = ENVIRONMENTS[name] or (lambda: EnvRecipe(name).base_env())
    env, plain = make(), make()
    space = env.action_space
    space.seed(1)
    actions = [space.sample() for _ in range(6)]
    del space
    for one in (env, plain):
        one.reset(seed=5)
        played(one, actions[:2])
    expected = played(plain, actions[2:])
    env = make()  # one whose space nobody has drawn from
    env.reset(seed=5)
    played(env, actions[:2])
    snapshots = Snapshots()
    state = snapshots.save(env)
    assert played(env, actions[2:]) == expected
    for _ in range(2):
        env = snapshots.restore(state)
        played(env, actions[3:])
        env = snapshots.restore(state)
        assert played(env, actions[2:]) == expected


def test_ways_to_one_state_meet_and_others_do_not() -> None:
    """Action 1 of this environment leads somewhere new, actions that end up in one place leave one state behind."""
    env = gym.wrappers.TimeLimit(Maze(0), 9)
    env.reset(seed=0)
    snapshots, ends = Snapshots(), dict[int, set[bytes]]()
    home = snapshots.save(env)
    for first in range(3):
        for second in range(3):
            env = snapshots.restore(home)
            env.step(first)
            env = snapshots.restore(snapshots.save(env))
            env.step(second)
            ends.setdefault(env.unwrapped._state, set()).add(snapshots.save(env))
    assert 1 < len(ends) < 9
    assert all(len(states) == 1 for states in ends.values())
    assert len(set.union(*ends.values())) == len(ends)


def test_random_numbers_belong_to_the_state() -> None:
    snapshots, env = Snapshots(), Maze(0, noisy=True)
    env.reset(seed=0)
    before = snapshots.save(env)
    env.np_random.random()
    assert snapshots.save(env) != before


def test_a_seeded_space_belongs_to_the_state() -> None:
    snapshots, env = Snapshots(), Maze(0)
    env.reset(seed=0)
    env.action_space.seed(3)
    state = snapshots.save(env)
    draws = [snapshots.restore(state).action_space.sample() for _ in range(5)]
    assert len(set(draws)) == 1
    other = snapshots.restore(state)
    other.action_space.sample()
    assert snapshots.save(other) != state


def test_drawing_from_an_unseeded_space_is_noticed() -> None:
    snapshots, env = Snapshots(), Maze(0)
    env.reset(seed=0)
    state = snapshots.save(env)
    snapshots.restore(state).action_space.sample()
    with pytest.raises(ChainError, match="samples from Discrete"):
        snapshots.restore(state)


class Coy(Maze):
    """Leaves its state out when it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_state"}


def test_environments_do_not_choose_what_is_saved() -> None:
    snapshots, env = Snapshots(), Coy(0)
    env.reset(seed=0)
    assert snapshots.restore(snapshots.save(env))._state == env._state


def test_what_cannot_be_copied_is_refused() -> None:
    class Locked(Maze):
        def __init__(self) -> None:
            super().__init__(0)
            self.lock = threading.Lock()

    env = Locked()
    assert isinstance(env.observation_space, spaces.Box)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="method='prefix' needs no copies"):
        Snapshots().save(env)
