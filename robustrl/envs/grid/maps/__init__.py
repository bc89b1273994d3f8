"""Worlds drawn as text, one character a cell: those that are shipped, and the user's own by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

_REGISTERED: dict[str, str] = {}


def names() -> list[str]:
    """The shipped and the registered maps."""
    shipped = [entry.name.removesuffix(".txt") for entry in files(__package__).iterdir() if entry.name.endswith(".txt")]
    return sorted([*shipped, *_REGISTERED])


def register_map(name: str, text: str) -> None:
    """Give a map a name, in this process; environments that other processes are to build get its text instead.

    Raises:
        ValueError: if the name is another map's, or the text is no map (one line only, or lines of different lengths).
    """
    if name in names() and _text(name) != text:
        raise ValueError(f"name must be new, {name!r} is the name of another map")
    _cells(name, text)
    _REGISTERED[name] = text


def load(map: str, legend: Collection[str]) -> NDArray[np.str_]:
    """The cells of a map, (height, width), one character each.

    Args:
        map: a name, or the text itself: lines of equal length. A text has at least two lines.
        legend: the characters that may occur. "a" is a start.

    Raises:
        TypeError: if it is no text.
        ValueError: if the name is unknown, lines differ in length, a character is not in the legend, or no cell is a start.
    """
    if not isinstance(map, str):
        raise TypeError(f"map must be the name or the text of a map, got {type(map).__name__}")
    name, text = ("the text", map) if "\n" in map.strip() else (map, _text(map))
    cells = _cells(name, text)
    strange = ~np.isin(cells, list(legend))
    if strange.any():
        row, column = np.argwhere(strange)[0]
        raise ValueError(
            f"map must be drawn with {' '.join(legend)}, {name} has {str(cells[row, column])!r} in row {row}, column {column}"
        )
    if not (cells == "a").any():
        raise ValueError(f"map must have a start 'a', {name} has none")
    return cells


def tiles(cells: NDArray[np.str_], legend: Mapping[str, str]) -> NDArray[np.str_]:
    """What the cells of a map look like, (height, width)."""
    return np.array([legend[cell] for cell in cells.ravel().tolist()]).reshape(cells.shape)


def _text(name: str) -> str:
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in names():
        raise ValueError(f"map must be a text of several lines or one of {', '.join(names())}, got {name!r}")
    return files(__package__).joinpath(f"{name}.txt").read_text(encoding="ascii")


def _cells(name: str, text: str) -> NDArray[np.str_]:
    rows = [line.strip() for line in text.strip().splitlines()]
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"map must be lines of equal length, at least two, {name} has lengths {sorted({len(row) for row in rows})}"
        )
    return np.array([list(row) for row in rows])
