"""What an engine is: many episodes of one environment side by side, each exactly once.

An engine starts `n` slots, steps the running ones and drops the finished ones. There is no autoreset: a slot that has
ended never starts again, so short episodes cannot crowd out long ones.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe, find_spec


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
        """Start `n` episodes; returns first raw observations (n, *frame) and the environment seed of every slot (n,)."""

    def step(self, actions: NDArray[Any]) -> Step:
        """Step the running slots with actions (n,) of integers, or (n, *action) of floats for a Box."""

    def keep(self, running: NDArray[np.bool_]) -> None:
        """Drop the slots that are False; one entry per slot that was running."""

    def close(self) -> None:
        """Release the environments."""


def plain_spec(recipe: EnvRecipe, kwargs: Collection[str] = ()) -> EnvSpec | None:
    """The registered spec if the recipe is that environment and nothing else: no wrappers, no arguments except `kwargs`.

    Anyone can register a changed environment under any id, so a caller still has to look at the entry point.
    """
    if recipe.env_id is None or recipe.wrappers or set(recipe.env_kwargs) - set(kwargs):
        return None
    spec = find_spec(recipe.env_id)
    return None if spec.additional_wrappers or spec.kwargs else spec
