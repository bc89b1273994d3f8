"""States of a running environment as bytes: to return to them, and to tell two of them apart."""

from __future__ import annotations

import copyreg
import io
import pickle
import zlib
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import EzPickle

from robustrl.errors import ChainError

FIXED = (type, FunctionType, ModuleType, EnvSpec)
"""What no step changes."""
SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Fixed too, as long as nobody draws from them."""

LARGE = 4096
"""Bytes from which on a state is compressed: pictures are."""


class Snapshots:
    """Saves and restores one environment, and whatever else holds it.

    Equal bytes have one future: `restore` makes everything from them, but for what no step changes. (Equal states may come out as
    different bytes; they merely look different.) What was restored last uses the emulators and generators of what was restored before:
    only the last one may be stepped.
    """

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._numbers: dict[int, int] = {}

    def save(self, state: Any) -> bytes:
        """The state of an object that holds the environment.

        Raises:
            ValueError: if it cannot be copied.
        """
        file = io.BytesIO()
        try:
            _Pickler(file, self).dump(state)
        except (TypeError, AttributeError, NotImplementedError, pickle.PicklingError) as error:
            raise ValueError(
                f"the environment cannot be copied in the middle of an episode ({error}); method='prefix' needs no copies"
            ) from error
        raw = file.getvalue()
        return raw if len(raw) < LARGE else zlib.compress(raw, 1)

    def restore(self, state: bytes) -> Any:
        """What was saved, as it was.

        Raises:
            ChainError: if the environment draws from a space, whose random numbers come from nowhere.
        """
        for part in self._parts:
            if isinstance(part, SPACES) and part._np_random is not None:
                raise ChainError(
                    f"the environment samples from {part}, which reset(seed=...) does not seed: it has no episodes"
                )
        raw = state if state.startswith(pickle.PROTO) else zlib.decompress(state)
        return _Unpickler(io.BytesIO(raw), self).load()

    def number(self, part: Any) -> int:
        """What a part that is not saved is called."""
        number = self._numbers.setdefault(id(part), len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)  # kept, so that nothing else gets its id
        return number

    def part(self, number: int, state: Any) -> Any:
        """A part that is not saved, in the state that is."""
        part = self._parts[number]
        if isinstance(part, np.random.Generator):
            part.bit_generator.state = state
        elif state is not None:
            part.restoreState(state)
        return part


def _shared(number: int, state: Any) -> Any:
    """Stands in the bytes for `Snapshots.part`."""
    raise pickle.UnpicklingError("a snapshot can only be restored by what saved it")


class _Table:
    """The transitions of a toy environment: thousands of entries, the same for ever."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _set_state(obj: Any, state: dict[str, Any]) -> None:
    obj.__dict__.update(state)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, snapshots: Snapshots) -> None:
        super().__init__(file, protocol=5)
        self._number = snapshots.number

    def reducer_override(self, obj: Any) -> Any:
        match _treatment(type(obj)):  # type: ignore[arg-type]  # a class can be hashed
            case "plain":
                return NotImplemented
            case "environment":
                state = obj.__dict__
                if "P" in state and type(obj).__module__.startswith("gymnasium.envs.toy_text."):
                    state = state | {"P": _Table(state["P"])}
                return copyreg.__newobj__, (type(obj),), state, None, None, _set_state  # type: ignore[attr-defined]
            case "generator":
                return _shared, (self._number(obj), obj.bit_generator.state)
            case "emulator":
                return _shared, (self._number(obj), obj.cloneState(include_rng=True))
            case "table":
                return _shared, (self._number(obj.content), None)
            case "space" if obj._np_random is not None:
                return NotImplemented
        return NotImplemented if obj in (_shared, _set_state) else (_shared, (self._number(obj), None))


@cache
def _treatment(kind: Any) -> str:
    """How what is of a class is saved."""
    if issubclass(kind, gym.Env | EzPickle):  # pickled in its own way, it would be made anew, or leave something out
        return "environment"
    if issubclass(kind, np.random.Generator):
        return "generator"
    if kind.__name__ == "ALEInterface":
        return "emulator"
    if kind is _Table:
        return "table"
    return "space" if kind in SPACES else "fixed" if issubclass(kind, FIXED) else "plain"


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, snapshots: Snapshots) -> None:
        super().__init__(file)
        self._snapshots = snapshots

    def find_class(self, module: str, name: str) -> Any:
        return self._snapshots.part if name == _shared.__name__ and module == __name__ else super().find_class(module, name)
