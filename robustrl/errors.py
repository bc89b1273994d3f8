"""Named errors, and the checks every door uses.

Every check names the argument, the value it got and what is allowed, and returns the value in the type that
the caller computes with. NaN never passes.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class ChainError(ValueError):
    """A chain of wrappers (or a recipe) in an order that breaks the proof."""


class CertificateError(ValueError):
    """A certificate file that is damaged, edited, or not recomputable from its own evidence."""


class CertificateViolationError(RuntimeError):
    """An attack within the budget did better than its certificate allows: one of the two is wrong."""


class BudgetExceededError(ValueError):
    """A delivered perturbation is larger than the threat model allows."""


class ChunkError(ValueError):
    """A chunk file that is damaged or belongs to another experiment."""


class UnsafeModelError(ValueError):
    """A model file that cannot be loaded without running code stored in it."""


class WorkerError(RuntimeError):
    """Worker processes died repeatedly on the same work, or have other libraries than this one."""


def _refuse(name: str, value: object, allowed: str) -> ValueError:
    text = repr(value)
    return ValueError(f"{name} must be {allowed}, got {text if len(text) <= 120 else text[:117] + '...'}")


def with_type(value: object) -> str:
    """A value and where its class is from, for messages: two of the package's rooms have classes of one name."""
    kind = type(value)
    return f"{value!r} of type {kind.__module__}.{kind.__qualname__}".replace("of type builtins.", "of type ")


def check_real(name: str, value: Any, *, allowed: str = "a finite real number", infinite: bool = False) -> float:
    """Return `value` as a float; refuse booleans, NaN and (unless `infinite`) infinities."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise _refuse(name, value, allowed) from None
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise _refuse(name, value, allowed)
    return number


def check_positive(name: str, value: Any) -> float:
    """Return `value` as a finite float > 0."""
    number = check_real(name, value, allowed="a finite number > 0")
    if number <= 0:
        raise _refuse(name, value, "a finite number > 0")
    return number


def check_alpha(alpha: Any, name: str = "alpha") -> float:
    """Return a failure probability in (0, 0.5]; larger ones void the one-sided DKW constant."""
    number = check_real(name, alpha, allowed="a failure probability in (0, 0.5]")
    if not 0 < number <= 0.5:
        raise _refuse(name, alpha, "a failure probability in (0, 0.5]")
    return number


def refuse_altered(module: Any) -> None:
    """Refuse a torch module that its class and weights do not tell all about: it has hooks, or a method was set on the instance.

    Raises:
        TypeError: naming the class and the methods.
    """
    from torch.nn.modules import module as torch_module

    shared = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    set_here = [name for name, value in vars(module).items() if callable(value) and callable(getattr(type(module), name, None))]
    if set_here or any((module._forward_hooks, module._forward_pre_hooks, *shared)):
        own = ", ".join(set_here) or "hooks"
        raise TypeError(f"{type(module).__name__} has {own} of its own, so that nothing is known of what it computes")


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int >= `least`; refuse booleans and fractions."""
    allowed = f"an integer >= {least}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral | np.integer):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise _refuse(name, value, allowed)
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return the one of `choices` that equals `value`; True is not 1."""
    if isinstance(value, str | numbers.Real) or value is None:
        for choice in choices:
            if isinstance(value, bool) == isinstance(choice, bool) and value == choice:
                return choice
    raise _refuse(name, value, "one of " + ", ".join(repr(choice) for choice in choices))


def as_floats(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return `value` as a float64 array; refuse what is not numeric."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a torch tensor with a gradient
        raise TypeError(f"{name} must be numeric, got {type(value).__name__}") from None


def check_finite_array(name: str, value: ArrayLike, *, ndim: int | None = None) -> NDArray[np.float64]:
    """Return `value` as a non-empty float64 array without NaN or inf."""
    array = as_floats(name, value)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty")
    bad = ~np.isfinite(array)
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        raise ValueError(f"{name} must be finite, got {array[tuple(where)]} at index {where} ({int(bad.sum())} bad in all)")
    return array


def check_probability(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return probabilities as float64; refuse NaN and anything outside [0, 1]."""
    array = as_floats(name, value)
    if not np.all((array >= 0) & (array <= 1)):
        bad = array[~((array >= 0) & (array <= 1))].flat[0]
        raise ValueError(f"{name} must lie in [0, 1], got {bad}")
    return array


def check_budget(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return attack budgets as float64; refuse NaN and negatives (inf is allowed)."""
    array = as_floats(name, value)
    if not np.all(array >= 0):
        bad = array[~(array >= 0)].flat[0]
        raise ValueError(f"{name} must be >= 0, got {bad}")
    return array
