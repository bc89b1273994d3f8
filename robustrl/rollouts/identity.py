"""Telling callables apart across processes, so that chunks of one environment are never taken for another's."""

from __future__ import annotations

import functools
import hashlib
import types
from typing import Any


def identity(value: Any, depth: int = 8) -> str:
    """Text that is the same in every process for the same code and plain data, and another one for other code.

    Two environment factories may share a name (`<lambda>`, `make_env`, a `functools.partial`) and differ in a constant or a
    captured variable. Objects without a stable text are told apart by their type only.

    Args:
        value: a factory or wrapper, or what one is made of.
        depth: how deep to look into captured variables, which may hold each other.
    """

    def inner(part: Any) -> str:
        return identity(part, depth - 1)

    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case type():
            return _name(value)
        case _ if depth == 0:
            return f"a {_name(type(value))}"
        case tuple() | list():
            return f"[{', '.join(map(inner, value))}]"
        case set() | frozenset():
            return f"{{{', '.join(sorted(map(inner, value)))}}}"
        case dict():
            return f"{{{', '.join(sorted(f'{inner(key)}: {inner(item)}' for key, item in value.items()))}}}"
        case functools.partial():
            return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
        case types.MethodType():
            return f"{inner(value.__self__)}.{inner(value.__func__)}"
        case types.FunctionType():
            parts = (inner(value.__code__), inner(value.__closure__), inner(value.__defaults__), inner(value.__kwdefaults__))
            return f"{_name(value)}#{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
        case types.CodeType():
            return f"{value.co_code.hex()} {value.co_names} {inner(value.co_consts)}"
        case types.CellType():
            try:
                return inner(value.cell_contents)
            except ValueError:  # a name that is bound later
                return "unbound"
        case _:
            return f"a {_name(type(value))}"


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
