"""A restored environment goes on as the saved one did."""

from __future__ import annotations

import threading
from functools import partial
from types import MethodType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
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


class Holder(gym.Env[Any, Any]):
    """Counts steps in one place, and shows the count from another that only shares memory, variables or a stream with it."""

    observation_space, action_space = spaces.Discrete(9), spaces.Discrete(2)

    def __init__(self, way: str) -> None:
        self.count, self.way = np.zeros(4), way
        self.seen: Any = None
        calls = 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            return float(self.count[0]) + calls / 8

        def default(calls: list[int] = [], *, self: Any = self) -> float:  # noqa: B006
            calls.append(1)
            return float(self.count[0]) + len(calls) / 8

        def attribute() -> float:
            attribute.calls = getattr(attribute, "calls", 0) + 1  # type: ignore[attr-defined]
            return float(attribute.calls)  # type: ignore[attr-defined]

        late: float

        def unset() -> float:
            nonlocal late
            try:
                late += 1
            except NameError:
                late = 0.0
            return late

        fortran = np.zeros((2, 3), order="F")
        self.fortran, self.turned = fortran, fortran.T[1:, ::-1]
        ways = {
            "closure": closure,
            "default": default,
            "attribute": attribute,
            "unset": unset,
            "method": MethodType(lambda self: float(self.count[0]), self),
            "view": partial(float, self.count[:1].reshape(())),
            "strided": self.count[::-2][-1:].item,
        }
        self.seen = ways.get(way)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.count[:] = 0
        return 0, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.count[:] += 1
        self.fortran[0, 2] += 1
        shown = float(self.turned[1, 1])
        if self.way == "spawn":
            shown = float(self.np_random.spawn(1)[0].random())
        elif self.way == "legacy":
            self.legacy = getattr(self, "legacy", None) or np.random.RandomState(self.np_random.bit_generator)
            shown = float(self.legacy.normal()) + float(self.np_random.random())
        elif self.seen is not None:
            shown = float(self.seen())
        return 0, shown, False, False, {}


@pytest.mark.parametrize(
    "way", ["closure", "default", "attribute", "unset", "method", "view", "strided", "fortran", "spawn", "legacy"]
)
def test_what_shares_variables_memory_or_streams_shares_them_in_a_copy(way: str) -> None:
    env, plain = Holder(way), Holder(way)
    for one in (env, plain):
        one.reset(seed=5)
    expected = played(plain, [0] * 6)
    snapshots = Snapshots()
    first = snapshots.save(env)
    for _ in range(2):
        env = snapshots.restore(first)
        assert played(env, [0] * 3) == expected[:3]
        middle = snapshots.save(env)
        env = snapshots.restore(first)
        played(env, [0] * 5)
        env = snapshots.restore(middle)
        assert snapshots.save(env) == middle
        assert played(env, [0] * 3) == expected[3:]


def test_a_read_only_array_stays_one() -> None:
    env = Holder("view")
    env.table = np.arange(6.0).reshape(2, 3).copy("F")  # type: ignore[attr-defined]
    env.table.flags.writeable = False  # type: ignore[attr-defined]
    env.part = env.count[1:]  # type: ignore[attr-defined]
    env.part.flags.writeable = False  # type: ignore[attr-defined]
    env.empty = np.zeros((0, 2))  # type: ignore[attr-defined]
    snapshots = Snapshots()
    again = snapshots.restore(snapshots.save(env))
    assert again.table.tolist() == env.table.tolist()  # type: ignore[attr-defined]
    assert again.table.strides == env.table.strides  # type: ignore[attr-defined]
    assert not again.table.flags.writeable
    assert not again.part.flags.writeable
    assert np.shares_memory(again.part, again.count)
    assert again.empty.shape == (0, 2)


def shared_tensors() -> Any:
    tensor = torch.zeros(2)
    return [tensor, tensor[:1]]


def tied_parameters() -> Any:
    weights = torch.zeros(2)
    return [torch.nn.Parameter(weights), torch.nn.Parameter(weights)]


@pytest.mark.parametrize(
    "make",
    [
        shared_tensors,
        tied_parameters,
        lambda: torch.from_numpy(np.zeros(2)),
        lambda: torch.zeros(2).numpy(),
        lambda: np.frombuffer(bytearray(8)),
        lambda: np.array([[1, "a"]], dtype=object)[0],
        lambda: np.zeros(2, [("a", float)])[0],
        lambda: np.zeros((2, 3, 4)).transpose(1, 0, 2).copy("K")[1:],
        lambda: np.zeros(3).view(np.matrix),
    ],
)
def test_memory_that_copies_would_share_or_lose_is_refused(make: Any) -> None:
    env = Maze(0)
    env.reset(seed=0)
    env.kept = make()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot be copied"):
        Snapshots().save(env)


def test_networks_and_arrays_that_own_their_memory_are_copied() -> None:
    env = Maze(0)
    env.reset(seed=0)
    env.kept = [torch.nn.Linear(2, 3), torch.ones(2), np.array([1, "a"], dtype=object), np.frombuffer(b"12345678")]  # type: ignore[attr-defined]
    snapshots = Snapshots()
    linear, tensor, objects, bytes_ = snapshots.restore(snapshots.save(env)).kept
    assert torch.equal(linear.weight, env.kept[0].weight)  # type: ignore[attr-defined]
    assert tensor.tolist() == [1, 1]
    assert objects.tolist() == [1, "a"]
    assert bytes_.tobytes() == b"12345678"


class Slotted(Maze):
    """Keeps its state in a slot."""

    __slots__ = ("ones",)

    def step(self, action: Any) -> Any:
        self.ones = getattr(self, "ones", 0) + 1
        return 0, float(self.ones), False, False, {}


class Listed(Maze, list[Any]):
    """Keeps its state in the list that it is."""

    __hash__ = object.__hash__


def test_slots_belong_to_the_state_and_builtin_bases_are_refused() -> None:
    env = Slotted(0)
    env.reset(seed=0)
    env.step(0)
    snapshots = Snapshots()
    state = snapshots.save(env)
    env.step(0)
    assert snapshots.restore(state).step(0)[1] == 2
    with pytest.raises(ValueError, match="Listed keeps state in a built-in class"):
        Snapshots().save(Listed(0))


def test_a_space_that_changes_is_noticed() -> None:
    snapshots, env = Snapshots(), Maze(0)
    env.reset(seed=0)
    state = snapshots.save(env)
    with pytest.raises(ValueError, match="read-only"):
        env.observation_space.high[0] += 1  # type: ignore[attr-defined]
    env.observation_space.high = env.observation_space.high + 1  # type: ignore[attr-defined]
    with pytest.raises(ChainError, match="changes its space Box"):
        snapshots.restore(state)
