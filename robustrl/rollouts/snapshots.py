"""States of a running environment as bytes: to return to them, and to tell two of them apart."""

from __future__ import annotations

import copyreg
import io
import pickle
import zlib
from functools import cache
from types import FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from robustrl.errors import ChainError

FIXED = (type, ModuleType, EnvSpec)
"""What no step changes."""
SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Fixed too, as long as nobody draws from them or changes them."""
HEAP_TYPE = 1 << 9
"""Flag of classes made by a `class` statement (Py_TPFLAGS_HEAPTYPE)."""

LARGE = 4096
"""Bytes from which on a state is compressed: pictures are."""


class Snapshots:
    """Saves and restores one environment, and whatever else holds it.

    Equal bytes have one future: `restore` makes everything from them, but for what no step changes. (Equal states may come out as
    different bytes; they merely look different.) What was restored last uses the emulators, generators and closures of what was restored
    before: only the last one may be stepped.
    """

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._spaces: list[tuple[Any, dict[str, Any]]] = []
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
            ChainError: if the environment draws from a space, whose random numbers come from nowhere, or changes one.
        """
        for space, before in self._spaces:
            if space._np_random is not None:
                raise ChainError(
                    f"the environment samples from {space}, which reset(seed=...) does not seed: it has no episodes"
                )
            if any(before.get(name) is not value for name, value in vars(space).items()):
                raise ChainError(
                    f"the environment changes its space {space} in the middle of an episode; copies would share it"
                )
        raw = state if state.startswith(pickle.PROTO) else zlib.decompress(state)
        return _Unpickler(io.BytesIO(raw), self).load()

    def number(self, part: Any) -> int:
        """What a part that is not saved is called."""
        number = self._numbers.setdefault(id(part), len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)  # kept, so that nothing else gets its id
            if isinstance(part, SPACES):
                self._spaces.append((part, dict(vars(part))))
                for value in vars(part).values():
                    if isinstance(value, np.ndarray):
                        value.flags.writeable = False  # a change is an error, not something that copies share
        return number

    def part(self, number: int, *_: Any) -> Any:
        """A part that is not saved itself; what it holds is restored beside it."""
        return self._parts[number]


def _shared(number: int, *held: Any) -> Any:
    """Stands in the bytes for `Snapshots.part`."""
    raise pickle.UnpicklingError("a snapshot can only be restored by what saved it")


class _Table:
    """The transitions of a toy environment: thousands of entries, the same for ever."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _set_state(obj: Any, state: Any) -> None:
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    obj.__dict__.update(attributes or {})
    for name, value in (slots or {}).items():
        setattr(obj, name, value)


def _spawned(bits: np.random.BitGenerator) -> int:
    return getattr(bits.seed_seq, "n_children_spawned", 0)


def _set_stream(bits: Any, state: Any) -> None:
    numbers, spawned = state
    if _spawned(bits) == spawned:
        bits.state = numbers
        return
    root = bits.seed_seq
    fresh = np.random.SeedSequence(root.entropy, spawn_key=root.spawn_key, pool_size=root.pool_size, n_children_spawned=spawned)
    bits.__setstate__((numbers, fresh))


def _set_emulator(emulator: Any, state: Any) -> None:
    emulator.restoreState(state)


def _held(function: FunctionType) -> tuple[Any, ...]:
    """What a function holds that is no code: captured variables (a tuple each, empty for one not assigned yet) and defaults."""
    cells: list[tuple[Any, ...]] = []
    for cell in function.__closure__ or ():
        try:
            cells.append((cell.cell_contents,))
        except ValueError:
            cells.append(())
    return cells, function.__defaults__, function.__kwdefaults__, function.__dict__


def _set_held(function: FunctionType, state: Any) -> None:
    cells, function.__defaults__, function.__kwdefaults__, attributes = state
    function.__dict__ = attributes
    for cell, content in zip(function.__closure__ or (), cells, strict=True):
        if content:
            (cell.cell_contents,) = content
        else:
            del cell.cell_contents


def _array(content: bytes, shape: tuple[int, ...], dtype: Any, order: Any, writeable: bool) -> NDArray[Any]:
    array: NDArray[Any] = np.ndarray(shape, dtype, content, order=order).copy(order)
    array.flags.writeable = writeable
    return array


def _view(memory: NDArray[Any], shape: Any, dtype: Any, offset: int, strides: Any, writeable: bool) -> NDArray[Any]:
    array: NDArray[Any] = np.ndarray(shape, dtype, memory, offset, strides)
    array.flags.writeable = writeable
    return array


def _memory(array: NDArray[Any]) -> NDArray[Any]:
    """The array that owns what an array shows.

    Raises:
        PicklingError: if no array owns it.
    """
    owner: Any = array.base
    while isinstance(owner, np.ndarray):
        array, owner = owner, owner.base
    if owner is not None and not isinstance(owner, bytes):
        raise pickle.PicklingError(f"an array shows memory of a {type(owner).__name__}, which copies would share or lose")
    return array


def _reduced(array: NDArray[Any]) -> Any:
    """How an array is made again; views show one memory before and after."""
    memory, flags = _memory(array), array.flags
    kind = array.dtype.str if array.dtype.isbuiltin == 1 else array.dtype
    if memory is not array:
        if array.dtype.hasobject or not memory.flags.forc or flags.writeable > memory.flags.writeable:
            raise pickle.PicklingError("a view of an array cannot be copied together with it")
        offset = array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        return _view, (memory, array.shape, kind, offset, array.strides, flags.writeable)
    if array.dtype.hasobject:
        return NotImplemented
    order = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    return _array, (array.tobytes(order), array.shape, kind, order, flags.writeable)  # type: ignore[arg-type]


TREATED = {FunctionType: "function", MethodType: "method", _Table: "table"}
OWN = (_shared, _set_state, _set_stream, _set_emulator, _set_held, _array, _view)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, snapshots: Snapshots) -> None:
        super().__init__(file, protocol=5)
        self._number = snapshots.number
        self._tensors: dict[int, int] = {}

    def reducer_override(self, obj: Any) -> Any:
        match _treatment(type(obj)):  # type: ignore[arg-type]  # a class can be hashed
            case "plain":
                return NotImplemented
            case "environment":
                state: Any = object.__getstate__(obj)  # whatever its class leaves out
                if type(state) is dict and "P" in state and type(obj).__module__.startswith("gymnasium.envs.toy_text."):
                    state = state | {"P": _Table(state["P"])}
                return copyreg.__newobj__, (type(obj),), state, None, None, _set_state  # type: ignore[attr-defined]
            case "array":
                return _reduced(obj)
            case "generator":
                return _shared, (self._number(obj), obj.bit_generator)
            case "stream":
                return _shared, (self._number(obj),), (obj.state, _spawned(obj)), None, None, _set_stream
            case "emulator":
                return _shared, (self._number(obj),), obj.cloneState(include_rng=True), None, None, _set_emulator
            case "table":
                return _shared, (self._number(obj.content),)
            case "function" if obj.__closure__ or obj.__defaults__ or obj.__kwdefaults__ or obj.__dict__:
                return _shared, (self._number(obj),), _held(obj), None, None, _set_held
            case "method":
                return MethodType, (obj.__func__, obj.__self__)
            case "tensor":
                self._refuse_shared(obj)
                return NotImplemented
            case "unowned":
                if obj.base is None:
                    return NotImplemented
                raise pickle.PicklingError(f"a {type(obj).__name__} is a view of an array")
            case "foreign":
                raise pickle.PicklingError(f"{type(obj).__name__} keeps state in a built-in class that it is derived from")
            case "space" if obj._np_random is not None:
                return NotImplemented
        return NotImplemented if obj in OWN else (_shared, (self._number(obj),))

    def _refuse_shared(self, tensor: torch.Tensor) -> None:
        """Tensors are copied one by one, with all their memory: nothing else may show it."""
        storage = tensor.untyped_storage()
        alone = storage.resizable() and self._tensors.setdefault(storage.data_ptr(), id(tensor)) == id(tensor)
        if storage.nbytes() and not alone:
            raise pickle.PicklingError("a tensor shares its memory with an array or another tensor")


@cache
def _treatment(kind: Any) -> str:
    """How what is of a class is saved."""
    if issubclass(kind, gym.Env | EzPickle):  # pickled in its own way, it would be made anew, or leave something out
        made = next(base for base in kind.__mro__ if not base.__flags__ & HEAP_TYPE)
        return "environment" if made is object else "foreign"
    if kind is np.ndarray:
        return "array"
    if issubclass(kind, np.ndarray | np.void):
        return "unowned"
    if issubclass(kind, torch.Tensor) and kind is not torch.nn.Parameter:  # a parameter is pickled as the tensor in it
        return "tensor"
    if issubclass(kind, np.random.Generator):
        return "generator"
    if issubclass(kind, np.random.BitGenerator):
        return "stream"
    if kind.__name__ == "ALEInterface":
        return "emulator"
    if kind in TREATED:
        return TREATED[kind]
    return "space" if kind in SPACES else "fixed" if issubclass(kind, FIXED) else "plain"


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, snapshots: Snapshots) -> None:
        super().__init__(file)
        self._snapshots = snapshots

    def find_class(self, module: str, name: str) -> Any:
        return self._snapshots.part if name == _shared.__name__ and module == __name__ else super().find_class(module, name)
