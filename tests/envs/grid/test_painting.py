"""Pictures of grid worlds: what is laid over a cell is seen in that cell, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from robustrl.envs.grid import LavaIslands, TextGrid
from robustrl.envs.grid.painting import LAYERS, TILES, paint

T = 48
FLOOR = np.full((3, 4), "floor")


def cells_that_differ(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    by_cell = (one != other).reshape(one.shape[0] // T, T, one.shape[1] // T, T, 3).any((1, 3, 4))
    return [(int(y), int(x)) for y, x in np.argwhere(by_cell)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_changes_the_cells_that_it_marks_alone(name: str) -> None:
    layer: np.ndarray = np.zeros(FLOOR.shape, dtype=bool)
    layer[1, 2] = True
    if name == "visits":
        layer = layer * 3.0
    elif name == "values":
        layer = np.where(layer, 0.5, -np.inf)
    assert cells_that_differ(paint(FLOOR, {}), paint(FLOOR, {name: layer})) == [(1, 2)]


def test_a_tile_is_painted_in_its_cell() -> None:
    tiles = FLOOR.copy()
    tiles[2, 1] = "goal"
    assert cells_that_differ(paint(FLOOR, {}), paint(tiles, {})) == [(2, 1)]


def test_agent_is_drawn_in_its_cell_and_every_heading_looks_different() -> None:
    plain, disc = paint(FLOOR, {}), paint(FLOOR, {}, (0, 3))
    arrows = [paint(FLOOR, {}, (0, 3), heading) for heading in range(4)]
    assert all(cells_that_differ(plain, picture) == [(0, 3)] for picture in (disc, *arrows))
    dark = [np.argwhere(picture[:T, 3 * T :].sum(-1) < 200).mean(0) - (T - 1) / 2 for picture in arrows]
    # a triangle has its mass away from its tip
    assert [tuple(np.sign(np.rint(centre)).tolist()) for centre in dark] == [(1, 0), (0, -1), (-1, 0), (0, 1)]


def test_values_have_the_colours_of_their_order_and_visits_get_darker() -> None:
    values = np.tile(np.arange(4.0), (3, 1))
    columns = paint(FLOOR, {"values": values}).astype(int).mean(0).reshape(4, T, 3).mean(1)
    assert (np.diff(columns[:, 1]) > 0).all()  # green grows along the scale
    visits = np.tile([0, 1, 10, 100], (3, 1))
    columns = paint(FLOOR, {"visits": visits}).astype(int).mean(0).reshape(4, T, 3).mean((1, 2))
    assert (np.diff(columns) < 0).all()
    few, many = (paint(FLOOR, {"visits": np.full(FLOOR.shape, n)}) for n in (1, 1000))
    np.testing.assert_array_equal(few, many)  # the scale is that of the most visited cell


def test_safe_regions_are_framed_along_their_border_only() -> None:
    safe = np.zeros(FLOOR.shape, dtype=bool)
    safe[:, :2] = True
    picture = paint(FLOOR, {"safe": safe}).astype(int)
    inner, border = picture[T // 2, T + 2 : 2 * T - 10], picture[T // 2, 2 * T - 1]
    assert border.sum() < inner.sum(1).min() - 100
    assert picture[T // 2, T - 1].sum() > border.sum() + 100  # between two safe cells there is no frame


@pytest.mark.parametrize(("shape", "pixels"), [((3, 4), 48), ((25, 25), 32), ((100, 100), 8), ((9, 400), 6)])
def test_cells_get_as_many_pixels_as_the_picture_has_room_for(shape: tuple[int, int], pixels: int) -> None:
    picture = paint(np.full(shape, "lava"), {})
    assert picture.shape == (shape[0] * pixels, shape[1] * pixels, 3)
    assert picture.dtype == np.uint8


def test_every_tile_looks_different() -> None:
    pictures = {paint(np.full((1, 1), name), {}).tobytes() for name in TILES}
    assert len(pictures) == len(TILES)


def test_painting_leaves_its_inputs_alone() -> None:
    tiles, safe = FLOOR.copy(), np.ones(FLOOR.shape, dtype=bool)
    first = paint(tiles, {"safe": safe}, (0, 0))
    np.testing.assert_array_equal(first, paint(tiles, {"safe": safe}, (0, 0)))  # tiles are kept: they must not be painted on
    assert (tiles == "floor").all()
    assert safe.all()


def test_text_shows_the_world_the_agent_and_the_marks() -> None:
    env = LavaIslands("sasl-\nsssl-\nwwslg", render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == ".@.~.\n...~.\n##.~G"
    safe = np.zeros(15, dtype=bool)
    safe[[0, 1, 2, 3, 5, 10, 14]] = True
    targets = np.zeros((15, 8), dtype=bool)
    targets[5, 3] = True
    env.overlay(safe=safe, targets=targets)
    assert env.render() == "+@+~.\n?..~.\n##.~G"
    env.overlay()
    assert env.render() == ".@.~.\n...~.\n##.~G"


def test_text_shows_where_the_agent_looks() -> None:
    env = TextGrid("asI\nsgl", render_mode="ansi")
    env.reset(seed=0)
    seen = []
    for _ in range(4):
        seen.append(env.render())
        env.step(1)
    assert seen == [f"{arrow}.=\n.G~" for arrow in ">v<^"]


def test_states_of_one_cell_are_joined() -> None:
    env = TextGrid("as\nsg")
    numbers = np.arange(16.0)
    assert env.on_grid("visits", numbers).tolist() == [[6, 22], [38, 54]]
    assert env.on_grid("values", np.where(numbers == 7, -np.inf, numbers)).tolist() == [[3, 6], [11, 15]]
    assert env.on_grid("safe", numbers == 9).tolist() == [[False, False], [True, False]]
    pairs = np.stack([numbers, numbers, numbers], -1)
    assert env.on_grid("values", pairs * [1, 2, 1]).tolist() == [[6, 14], [22, 30]]
    assert env.on_grid("visits", pairs).tolist() == [[18, 66], [114, 162]]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"safe": np.ones(15)}, "safe must be boolean, got float64"),
        ({"goal": np.ones(14, dtype=bool)}, r"goal must have shape \(15,\) or \(15, 8\), got \(14,\)"),
        ({"values": np.full(15, np.nan)}, "values must be finite, got nan"),
        ({"values": np.full(15, np.inf)}, "values must be finite, got inf"),
        ({"visits": np.full(15, np.nan)}, "visits must be finite"),
        ({"visits": np.arange(15) - 1}, "visits must be >= 0, got -1"),
    ],
)
def test_bad_overlays_are_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LavaIslands("sasl-\nsssl-\nwwslg").overlay(**layers)


def test_overlays_reach_the_picture() -> None:
    env = LavaIslands("sasl-\nsssl-\nwwslg", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.overlay(safe=env.safe_set)
    assert (env.render() != before).any()
    env.overlay()
    np.testing.assert_array_equal(env.render(), before)
