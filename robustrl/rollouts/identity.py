"""Telling callables apart across processes, so that chunks of one environment are never taken for another's."""

from __future__ import annotations

import functools
import hashlib
import types
from typing import Any


def identity(value: Any) -> str:
    """Text that is the same in every process for the same code and plain data, and another one for other code.

    Two environment factories may share a name (`<lambda>`, `make_env`, a `functools.partial`) and differ in a constant or a
    captured variable. Objects without a stable text are told apart by their type only.

    Args:
        value: a factory or wrapper, or what one is made of.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(map(identity, value))}]"
        case set() | frozenset():
            return f"{{{', '.join(sorted(map(identity, value)))}}}"
        case dict():
            return f"{{{', '.join(sorted(f'{identity(k)}: {identity(v)}' for k, v in value.items()))}}}"
        case functools.partial():
            return f"partial({identity(value.func)}, {identity(value.args)}, {identity(value.keywords)})"
        case types.MethodType():
            return f"{identity(value.__self__)}.{identity(value.__func__)}"
        case types.FunctionType():
            captured = [_contents(cell) for cell in value.__closure__ or ()]
            parts = (_code(value.__code__), identity(captured), identity(value.__defaults__), identity(value.__kwdefaults__))
            return f"{_name(value)}#{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
        case type():
            return _name(value)
        case _:
            return f"a {_name(type(value))}"


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else identity(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is bound later
        return None
