"""A plain list of environments."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe, find_spec
from robustrl.envs.single import RewardProbe
from robustrl.errors import ChainError
from robustrl.rollouts.engines.base import Step
from robustrl.seeding import slot_seeds

REUSABLE = ("gymnasium.envs.mujoco.", "gymnasium.envs.classic_control.", "robustrl.envs.atari:")
"""Where the environments come from whose `reset(seed=)` is known (tests/rollouts/engines) to leave nothing of the last episode. All
others are made anew for every episode: what one leaves behind must not reach the next, nor depend on who played what before."""


class _Spares:
    """Environments of this process that wait for the next chunk: making one costs as much as a hundred steps."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._envs: list[gym.Env[Any, Any]] = []

    def take(self, kind: str | None, n: int) -> list[gym.Env[Any, Any]]:
        """Up to `n` environments of a kind."""
        if kind is None or kind != self._kind:
            return []
        taken, self._envs = self._envs[:n], self._envs[n:]
        return taken

    def keep(self, kind: str | None, envs: list[gym.Env[Any, Any]]) -> None:
        """Keep environments of a kind, and close those of any other."""
        unwanted = envs
        if kind is not None:
            unwanted, self._envs = ([], self._envs + envs) if kind == self._kind else (self._envs, list(envs))
            self._kind = kind
        for env in unwanted:
            env.close()


_spares = _Spares()


def _kind(recipe: EnvRecipe) -> str | None:
    """What tells reusable environments apart, or None for those that are not."""
    if recipe.env_id is None or recipe.wrappers:
        return None
    spec = find_spec(recipe.env_id)
    known = isinstance(spec.entry_point, str) and spec.entry_point.startswith(REUSABLE) and not spec.additional_wrappers
    if not known:
        return None
    try:
        return json.dumps([spec.id, spec.entry_point, spec.kwargs, dict(recipe.env_kwargs), recipe.horizon], sort_keys=True)
    except TypeError:  # an argument that has no exact text
        return None


def _within_limit(env: gym.Env[Any, Any]) -> tuple[gym.Env[Any, Any], int | None]:
    """The environment inside what `gym.make` puts around it, and the limit to count instead: a tenth of a cheap step."""
    if type(env) is TimeLimit and type(env.env) is OrderEnforcing:
        return env.env.env, env._max_episode_steps
    return env, None


class EnvList:
    """A plain list of environments: works for every environment, and stepping stops where an episode ends."""

    name = "list"
    default_chunk = 64

    def __init__(self, recipe: EnvRecipe) -> None:
        self._recipe, space = recipe, recipe.raw_space
        self._shape, self._dtype = space.shape, space.dtype  # some environments return doubles from a float32 space
        self._kind = _kind(recipe)
        self._envs: list[gym.Env[Any, Any]] = []
        self._probes: list[RewardProbe] = []
        self._running: list[int] = []

    @classmethod
    def refusal(cls, recipe: EnvRecipe) -> str | None:
        """None: every environment can be listed."""
        del recipe
        return None

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        self._envs += _spares.take(self._kind, n - len(self._envs))
        while len(self._envs) < n:
            self._envs.append(self._recipe.base_env(inner=self._probe if self._recipe.wrappers else None, checked=False))
        if len({id(env.unwrapped) for env in self._envs}) < len(self._envs):
            raise ValueError(
                f"the factory {self._recipe.label} returned the same environment twice; it must make a new one per call"
            )
        self._inner = [_within_limit(env) for env in self._envs]
        self._steps = 0
        seeds = slot_seeds(seed, n)
        self._running = list(range(n))
        first = [np.asarray(self._envs[i].reset(seed=int(seeds[i]))[0]) for i in self._running]
        for frame in first:
            if frame.shape != self._shape:
                raise ValueError(
                    f"{self._recipe.label} returned an observation of shape {frame.shape}, declared is {self._shape}"
                )
        for probe in self._probes:
            probe.take()  # what wrappers earned while resetting is nobody's doing
        return np.stack(first).astype(self._dtype, copy=False), seeds.astype(np.uint64)

    def _probe(self, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        self._probes.append(RewardProbe(env))
        return self._probes[-1]

    def environments(self) -> list[gym.Env[Any, Any]]:
        """The environments that are stepped, by slot."""
        return [env for env, _ in self._inner]

    def step(self, actions: NDArray[Any]) -> Step:
        envs, probes, n = self._inner, self._probes, len(self._running)
        self._steps += 1
        frames = np.empty((n, *self._shape), self._dtype)
        rewards, finished = np.empty(n), np.empty(n, dtype=np.bool_)
        for row, slot in enumerate(self._running):
            env, limit = envs[slot]
            frames[row], reward, terminated, truncated, _ = env.step(actions[row])
            rewards[row] = probes[slot].take() if probes else reward
            finished[row] = terminated or truncated or self._steps == limit
        return Step(frames, rewards, finished)

    def keep(self, running: NDArray[np.bool_]) -> None:
        self._running = [slot for slot, stays in zip(self._running, running, strict=True) if stays]

    def close(self) -> None:
        _spares.keep(self._kind, self._envs)
        self._envs = []


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
