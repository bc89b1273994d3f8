"""Dictionary observations as one joint vector, the object that noise and budgets are about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


def joint_box(space: spaces.Space[Any]) -> spaces.Box:
    """The Box itself, or the joint vector of a dictionary of Boxes (Gymnasium's `flatten_space`).

    Raises:
        TypeError: for other spaces.
    """
    if isinstance(space, spaces.Dict) and all(isinstance(part, spaces.Box) for part in space.values()):
        flat = spaces.flatten_space(space)
        assert isinstance(flat, spaces.Box)
        return flat
    if not isinstance(space, spaces.Box):
        raise TypeError(f"observations must be a Box space or a Dict of them, got {space}")
    return space


def join(observations: Any, space: spaces.Space[Any]) -> NDArray[Any]:
    """A batch of observations as one array (n, *shape): dictionaries key by key, in the space's order."""
    if not isinstance(space, spaces.Dict):
        return np.asarray(observations)
    parts = [np.asarray(observations[key]) for key in space]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def split(joint: NDArray[Any], space: spaces.Space[Any]) -> Any:
    """The inverse of `join`, in the dtype of `joint`."""
    if not isinstance(space, spaces.Dict):
        return joint
    shapes = {key: part.shape or () for key, part in space.items()}
    cuts = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(joint, cuts, axis=1)
    return {key: part.reshape(len(joint), *shapes[key]) for key, part in zip(shapes, parts, strict=True)}


def float_space(space: spaces.Space[Any], bound: float = np.inf) -> spaces.Space[Any]:
    """The same structure with float32 entries in [-bound, bound]."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(key, float_space(part, bound)) for key, part in space.items()])
    return spaces.Box(-bound, bound, space.shape, np.float32)


def first_row(observations: Any) -> Any:
    """One observation of a batch."""
    return {key: part[0] for key, part in observations.items()} if isinstance(observations, dict) else observations[0]


def as_batch(observation: Any) -> Any:
    """A batch of one observation."""
    if isinstance(observation, dict):
        return {key: np.asarray(part)[None] for key, part in observation.items()}
    return np.asarray(observation)[None]
