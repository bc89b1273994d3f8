"""Pictures of grid worlds, painted with numpy: tiles, what is known of them laid over, and the agent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Colour = tuple[int, int, int]

TILES = {
    "floor": ".",
    "start": ".",
    "wall": "#",
    "lava": "~",
    "goal": "G",
    "ice": "=",
    "sky": " ",
    "concrete": "#",
    "sand": "%",
}
"""What a cell can look like, and its letter in text."""

MARKS = {"safe": "+", "goal": "o", "targets": "?"}
"""Layers of booleans and their letters in text; later ones are drawn over earlier ones."""

LAYERS = (*MARKS, "visits", "values")

ARROWS = "^>v<"
GROUND = ("floor", "start", "ice", "goal")
SOLID = ("concrete", "ice", "sand", "wall")
PICTURE_SIZE = 800
"""Pixels of the longer side that a picture aims at."""

BASE: dict[str, Colour] = {
    "floor": (245, 239, 227),
    "start": (238, 240, 222),
    "wall": (86, 94, 112),
    "lava": (224, 88, 50),
    "goal": (245, 239, 227),
    "ice": (196, 226, 242),
    "sky": (222, 236, 247),
    "concrete": (146, 152, 162),
    "sand": (230, 194, 122),
}
INK: Colour = (38, 42, 62)
PAPER: Colour = (255, 255, 255)
TEAL: Colour = (0, 140, 130)
BLUE: Colour = (36, 92, 220)
MAGENTA: Colour = (205, 30, 140)
INDIGO: Colour = (74, 48, 160)
VALUE_SCALE: tuple[Colour, ...] = ((68, 40, 110), (50, 100, 142), (34, 160, 134), (150, 212, 70), (252, 230, 60))


def write(tiles: NDArray[np.str_], layers: Mapping[str, NDArray[Any]], agent: tuple[int, int], heading: int | None) -> str:
    """The world as text, a letter a cell: "@" or an arrow is the agent, marks are shown on cells without a letter of their own."""
    letters = np.array([[TILES[tile] for tile in row] for row in tiles.tolist()])
    empty = np.isin(tiles, ("floor", "start", "ice", "sky"))
    for name, mark in MARKS.items():
        if name in layers:
            letters[layers[name] & empty] = mark
    letters[agent] = "@" if heading is None else ARROWS[heading]
    return "\n".join("".join(row) for row in letters.tolist())


def paint(
    tiles: NDArray[np.str_],
    layers: Mapping[str, NDArray[Any]],
    agent: tuple[int, int] | None = None,
    heading: int | None = None,
) -> NDArray[np.uint8]:
    """The world as a picture, uint8 (height * t, width * t, 3), t pixels a cell.

    Args:
        tiles: names of `TILES`, (height, width).
        layers: any of `LAYERS`, each (height, width): booleans, visits >= 0, values (-inf where there are none).
        agent: its cell.
        heading: where it looks: 0 north, 1 east, 2 south, 3 west; or None.
    """
    t = int(np.clip(PICTURE_SIZE // max(tiles.shape), 6, 48))
    names, kinds = np.unique(tiles, return_inverse=True)
    picture: Pixels = np.stack([_tile(name, t) for name in names.tolist()])[kinds.reshape(tiles.shape)]
    _paint_shores(picture, tiles, t)
    land = ~np.isin(tiles, ("wall", "lava"))
    if "values" in layers:
        values = layers["values"]
        drawn = np.isfinite(values) & land
        if drawn.any():
            low, high = values[drawn].min(), values[drawn].max()
            scale = (np.where(drawn, values, low) - low) / ((high - low) or 1.0)
            stops = np.linspace(0, 1, len(VALUE_SCALE))
            colours = np.stack([np.interp(scale, stops, channel) for channel in zip(*VALUE_SCALE, strict=True)], -1)
            _lay(picture, drawn * 0.85, np.ones((t, t)), colours)
    if "visits" in layers:
        heat = np.log1p(layers["visits"])
        _lay(picture, 0.85 * heat / (heat.max() or 1.0), _disc(t, 0.42), INDIGO)
    if "safe" in layers:
        safe = layers["safe"]
        _lay(picture, safe * 0.22, np.ones((t, t)), TEAL)
        for side, beyond in _sides(safe, outside=False):
            _lay(picture, safe & ~beyond, _strip(t, side, max(2.0, t / 12)), TEAL)
    if "goal" in layers:
        _lay(picture, layers["goal"], _disc(t, 0.2), PAPER)
        _lay(picture, layers["goal"], _disc(t, 0.15), BLUE)
    if "targets" in layers:
        _lay(picture, layers["targets"], _disc(t, 0.42) - _disc(t, 0.26), PAPER)
        _lay(picture, layers["targets"], _disc(t, 0.39) - _disc(t, 0.29), MAGENTA)
    if agent is not None:
        here = np.zeros(tiles.shape)
        here[agent] = 1
        for size, colour in ((0.44, PAPER), (0.34, INK)):
            _lay(picture, here, _disc(t, size) if heading is None else _arrow(t, size, heading), colour)
    height, width = tiles.shape
    return np.rint(picture.transpose(0, 2, 1, 3, 4).reshape(height * t, width * t, 3)).astype(np.uint8)


def _lay(picture: Pixels, weight: NDArray[Any], stencil: NDArray[Any], colour: Any) -> None:
    """Blend colours, one (3,) or one a cell (height, width, 3), into the cells by weight (height, width) times stencil (t, t)."""
    on = weight > 0
    colours = np.broadcast_to(np.asarray(colour, dtype=np.float32), (*weight.shape, 3))[on][:, None, None]
    alpha = (weight[on].astype(np.float32)[:, None, None] * stencil.astype(np.float32))[..., None]
    picture[on] += alpha * (colours - picture[on])


def _axes(t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the pixels of a tile are, down (t, 1) and across (1, t), in (-0.5, 0.5)."""
    centres = (np.arange(t) + 0.5) / t - 0.5
    return centres[:, None], centres[None, :]


def _disc(t: int, radius: float) -> NDArray[np.float64]:
    down, across = _axes(t)
    covered: NDArray[np.float64] = np.clip((radius - np.hypot(down, across)) * t + 0.5, 0, 1)
    return covered


def _arrow(t: int, size: float, heading: int) -> NDArray[np.float64]:
    """A triangle that points north, east, south or west."""
    down, across = _axes(t)
    inside = np.minimum(0.8 * size - down, (down + size - 2.0 * np.abs(across)) / 5**0.5) * t
    return np.rot90(np.clip(inside + 0.5, 0, 1), -heading)


def _star(t: int, radius: float, notch: float = 0.42) -> NDArray[np.float64]:
    """Five points; what lies within the line from a tip to a notch is inside."""
    down, across = _axes(t)
    turn = np.abs((np.arctan2(across, -down) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2 * np.pi / 5
    over, up = notch * np.cos(np.pi / 5) - 1, notch * np.sin(np.pi / 5)
    reach = up / (np.cos(turn) * up - np.sin(turn) * over)
    covered: NDArray[np.float64] = np.clip((radius * reach - np.hypot(down, across)) * t * 0.8 + 0.5, 0, 1)
    return covered


def _strip(t: int, side: int, width: float) -> NDArray[np.float64]:
    """The pixels within `width` of a tile's side: 0 north, 1 east, 2 south, 3 west."""
    strip = np.clip(width - np.arange(t), 0, 1)[:, None] * np.ones((1, t))
    return np.rot90(strip, -side)


def _sides(cells: NDArray[np.bool_], outside: bool) -> list[tuple[int, NDArray[np.bool_]]]:
    """For every side, whether the neighbour there is one of the cells; beyond the map: `outside`."""
    wide = np.pad(cells, 1, constant_values=outside)
    return [(0, wide[:-2, 1:-1]), (1, wide[1:-1, 2:]), (2, wide[2:, 1:-1]), (3, wide[1:-1, :-2])]


def _paint_shores(picture: Pixels, tiles: NDArray[np.str_], t: int) -> None:
    """Land stands above the lava, blocks above the sky: what makes the regions of a map easy to see."""
    lava = tiles == "lava"
    for side, land in _sides(np.isin(tiles, GROUND), outside=False):
        _lay(picture, lava & land, _strip(t, side, t * (0.24 if side == 0 else 0.07)), (112, 58, 44))
    sky = np.isin(tiles, ("sky", "start")) & (tiles == "sky").any()
    for side, open_air in _sides(sky, outside=False):
        _lay(picture, np.isin(tiles, SOLID) & open_air, _strip(t, side, t * 0.1) * 0.55, PAPER if side == 0 else INK)


@cache
def _tile(name: str, t: int) -> Pixels:
    """A tile without neighbours, (t, t, 3); what has a texture has one that goes on in the next cell."""
    down, across = _axes(t)
    plain = np.ones((t, t))
    tile = np.empty((1, 1, t, t, 3), dtype=np.float32)

    def lay(weight: float, stencil: NDArray[Any], colour: Colour) -> None:
        _lay(tile, np.full((1, 1), weight), stencil, colour)

    tile[:] = BASE[name]
    wave = np.sin(2 * np.pi * (across + 0.16 * np.sin(2 * np.pi * down)))
    if name == "lava":
        crests = np.sin(2 * np.pi * (2 * down + 0.12 * wave))
        lay(0.6, np.clip(crests, 0, 1) ** 2, (246, 140, 66))
        lay(0.35, np.clip(-crests, 0, 1), (196, 54, 42))
    elif name == "wall":
        joints = np.maximum(np.abs(down) > 0.5 - 1 / t, (np.abs(across) > 0.5 - 1 / t) & (down < 0))
        joints = np.maximum(joints, np.maximum(np.abs(down) < 0.6 / t, (np.abs(across) < 0.6 / t) & (down > 0)))
        lay(0.5, joints * plain, (50, 56, 72))
    elif name == "ice":
        for offset, width in ((0.1, 0.05), (0.32, 0.1)):
            lay(0.75, plain * (np.abs((down + across + offset) % 1 - 0.5) < width), PAPER)
        lay(0.6, np.maximum(_strip(t, 0, 1), _strip(t, 3, 1)), (160, 200, 224))
    elif name == "sand":
        for y, x in ((-0.3, -0.2), (-0.1, 0.3), (0.2, -0.35), (0.35, 0.1)):
            lay(0.7, np.clip((0.05 - np.hypot(down - y, across - x)) * t + 0.5, 0, 1), (196, 152, 84))
    elif name == "concrete":
        lay(0.8, np.maximum(_strip(t, 2, 1), _strip(t, 1, 1)), (112, 118, 130))
    elif name != "sky":
        lay(0.9, np.maximum(_strip(t, 0, 1), _strip(t, 3, 1)), (226, 217, 200))
    if name == "goal":
        lay(1.0, _disc(t, 0.45), (34, 150, 84))
        lay(1.0, _star(t, 0.4), (255, 224, 92))
    painted: Pixels = tile[0, 0]
    return painted
