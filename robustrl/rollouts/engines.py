"""Engines: many episodes of one environment side by side, each exactly once.

An engine starts `n` slots, steps the running ones and drops the finished ones. There is no autoreset: a slot that has
ended never starts again, so short episodes cannot crowd out long ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe, find_spec
from robustrl.envs.single import RewardProbe
from robustrl.errors import ChainError, check_choice
from robustrl.seeding import integer_seed, slot_seeds

ENGINES = ("auto", "native", "list")
CARTPOLE = "gymnasium.envs.classic_control.cartpole:"


class Step(NamedTuple):
    """What running slots return; arrays have one row per slot that was running."""

    frames: NDArray[Any]
    rewards: NDArray[np.float64]
    finished: NDArray[np.bool_]


class Engine(Protocol):
    """Episodes side by side; see the module."""

    name: str
    default_chunk: int
    """Episodes per chunk that suit the engine."""

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        """Start `n` episodes; returns first frames (n, *frame) and the environment seed of every slot (n,)."""

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Step the running slots."""

    def keep(self, running: NDArray[np.bool_]) -> None:
        """Drop the slots that are False; one entry per slot that was running."""

    def close(self) -> None:
        """Release the environments."""


class NativeCartPole:
    """Gymnasium's own vectorised CartPole; finished slots are sliced out of its state array."""

    name = "native"
    default_chunk = 1250

    def __init__(self, recipe: EnvRecipe) -> None:
        self._env: Any = CartPoleVectorEnv(num_envs=1, max_episode_steps=recipe.horizon, **recipe.env_kwargs)

    @classmethod
    def supports(cls, recipe: EnvRecipe) -> bool:
        """Whether the recipe is an unwrapped CartPole."""
        if recipe.env_id is None or recipe.wrappers or set(recipe.env_kwargs) - {"sutton_barto_reward"}:
            return False
        spec = find_spec(recipe.env_id)
        if spec.kwargs or spec.additional_wrappers:  # anyone can register a changed CartPole under an id of their own
            return False
        return spec.entry_point == CARTPOLE + "CartPoleEnv" and spec.vector_entry_point == CARTPOLE + "CartPoleVectorEnv"

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        self._resize(n)
        number = integer_seed(seed)
        frames, _ = self._env.reset(seed=number)
        return frames, np.full(n, number, dtype=np.uint64)

    def step(self, actions: NDArray[np.int64]) -> Step:
        frames, rewards, terminated, truncated, _ = self._env.step(actions)
        return Step(frames, rewards.astype(np.float64), terminated | truncated)

    def keep(self, running: NDArray[np.bool_]) -> None:
        env = self._env
        # Contiguous rows: numpy may round sines of strided ones differently, and a slot must not notice that another ended.
        env.state = np.ascontiguousarray(env.state[:, running])
        env.steps, env.prev_done = env.steps[running], env.prev_done[running]
        self._resize(int(running.sum()))

    def _resize(self, n: int) -> None:
        env = self._env
        env.num_envs = n
        if n:
            env.action_space = batch_space(env.single_action_space, n)

    def close(self) -> None:
        self._env.close()


class EnvList:
    """A plain list of environments: works for every environment, and stepping stops where an episode ends."""

    name = "list"
    default_chunk = 64

    def __init__(self, recipe: EnvRecipe) -> None:
        self._recipe, self._dtype = recipe, recipe.frame_space.dtype
        self._envs: list[gym.Env[Any, Any]] = []
        self._probes: list[RewardProbe] = []
        self._running: list[int] = []

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        while len(self._envs) < n:
            self._envs.append(self._recipe.base_env(inner=self._probe if self._recipe.wrappers else None))
        if len({id(env.unwrapped) for env in self._envs}) < len(self._envs):
            raise ValueError(
                f"the factory {self._recipe.label} returned the same environment twice; it must make a new one per call"
            )
        seeds = slot_seeds(seed, n)
        self._running = list(range(n))
        frames = [self._envs[i].reset(seed=int(seeds[i]))[0] for i in self._running]
        for probe in self._probes:
            probe.take()  # what wrappers earned while resetting is nobody's doing
        return self._stacked(frames), seeds.astype(np.uint64)

    def _probe(self, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        self._probes.append(RewardProbe(env))
        return self._probes[-1]

    def step(self, actions: NDArray[np.int64]) -> Step:
        frames, rewards, finished = [], np.empty(len(self._running)), np.empty(len(self._running), dtype=bool)
        for row, slot in enumerate(self._running):
            frame, reward, terminated, truncated, _ = self._envs[slot].step(actions[row])
            frames.append(frame)
            rewards[row] = self._probes[slot].take() if self._probes else float(reward)
            finished[row] = terminated or truncated
        return Step(self._stacked(frames), rewards, finished)

    def _stacked(self, frames: list[Any]) -> NDArray[Any]:
        return np.stack(frames).astype(self._dtype, copy=False)  # some environments return doubles from a float32 space

    def keep(self, running: NDArray[np.bool_]) -> None:
        self._running = [slot for slot, stays in zip(self._running, running, strict=True) if stays]

    def close(self) -> None:
        for env in self._envs:
            env.close()


def make_engine(recipe: EnvRecipe, engine: str = "auto") -> Engine:
    """The engine for a recipe.

    Args:
        recipe: the environment.
        engine: "native" (vectorised by Gymnasium), "list", or "auto" for the fastest that the recipe allows.
    Raises:
        ValueError: if the recipe has no native engine.
    """
    check_choice("engine", engine, ENGINES)
    native = NativeCartPole.supports(recipe)
    if engine == "native" and not native:
        raise ValueError(f"engine='native' is not available for {recipe.label}: only an unwrapped CartPole has one; use 'list'")
    return NativeCartPole(recipe) if native and engine != "list" else EnvList(recipe)


def refuse_unseeded(recipe: EnvRecipe) -> None:
    """Raise ChainError for an environment that ignores `reset(seed=)`: its episodes would be copies of each other.

    A probe of first frames: two fresh environments under different seeds start alike, although one environment does not
    start alike twice.
    """
    one, other = recipe.base_env(), recipe.base_env()
    try:
        first, second = one.reset(seed=1)[0], other.reset(seed=2)[0]
        if np.array_equal(first, second) and not np.array_equal(first, one.reset()[0]):
            raise ChainError(
                f"{recipe.label} ignores reset(seed=...): every episode would be the same; pass the seed on to its generator"
            )
    finally:
        one.close()
        other.close()
