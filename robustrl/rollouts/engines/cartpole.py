"""Gymnasium's own vectorised CartPole."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines.base import Step, plain_spec
from robustrl.seeding import integer_seed

MODULE = "gymnasium.envs.classic_control.cartpole:"


class NativeCartPole:
    """Gymnasium's own vectorised CartPole; finished slots are sliced out of its state array."""

    name = "native"
    default_chunk = 1250

    def __init__(self, recipe: EnvRecipe) -> None:
        self._env: Any = CartPoleVectorEnv(num_envs=1, max_episode_steps=recipe.horizon, **recipe.env_kwargs)

    @classmethod
    def refusal(cls, recipe: EnvRecipe) -> str | None:
        """Why the recipe is no unwrapped CartPole; None if it is one."""
        spec = plain_spec(recipe, kwargs=("sutton_barto_reward",))
        if spec and (spec.entry_point, spec.vector_entry_point) == (MODULE + "CartPoleEnv", MODULE + "CartPoleVectorEnv"):
            return None
        return "only an unwrapped CartPole has one"

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        self._resize(n)
        number = integer_seed(seed)
        frames, _ = self._env.reset(seed=number)
        return frames, np.full(n, number, dtype=np.uint64)

    def step(self, actions: NDArray[Any]) -> Step:
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
