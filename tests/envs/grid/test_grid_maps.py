"""Maps as text: what is a map, and what a name stands for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from robustrl.envs.grid import LavaIslands, maps

TEXT = "sas\nsgs\n"


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_REGISTERED", {})


def test_a_registered_name_is_its_text() -> None:
    maps.register_map("mine", TEXT)
    maps.register_map("mine", TEXT)
    assert "mine" in maps.names()
    np.testing.assert_array_equal(maps.load("mine", "asg"), maps.load(TEXT, "asg"))
    np.testing.assert_array_equal(LavaIslands("mine").mdp.probabilities, LavaIslands(TEXT).mdp.probabilities)


def test_two_maps_of_one_size_share_nothing() -> None:
    one, other = LavaIslands("sas\nsgs"), LavaIslands("sss\nsga")
    assert (one.mdp.start != other.mdp.start).any()  # type: ignore[union-attr]
    assert one.outcomes.candidates[5].any()
    again = LavaIslands("sas\nsgs")
    np.testing.assert_array_equal(again.mdp.probabilities, one.mdp.probabilities)


def test_blank_lines_and_indents_around_a_text_do_not_count() -> None:
    text = """
        sas
        sgs
    """
    np.testing.assert_array_equal(maps.load(text, "asg"), maps.load(TEXT, "asg"))


def test_tiles_are_what_the_legend_says() -> None:
    assert maps.tiles(maps.load("ab\nba", "ab"), {"a": "floor", "b": "wall"}).tolist() == [["floor", "wall"], ["wall", "floor"]]


def test_names_of_other_maps_are_refused() -> None:
    for name in ("river", "mine"):
        if name == "mine":
            maps.register_map("mine", TEXT)
        with pytest.raises(ValueError, match=f"name must be new, '{name}' is the name of another map"):
            maps.register_map(name, "sas\nsss")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sas\nss", r"map must be lines of equal length, at least two, the text has lengths \[2, 3\]"),
        ("sxs\nsas", "map must be drawn with a s g, the text has 'x' in row 0, column 1"),
        ("sss\nsgs", "map must have a start 'a', the text has none"),
        ("nowhere", "map must be a text of several lines or one of archipelago, .*, got 'nowhere'"),
    ],
)
def test_bad_maps_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maps.load(text, "asg")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="map must be the name or the text of a map, got list"):
        maps.load(["sas", "sgs"], "asg")  # type: ignore[arg-type]


def test_a_bad_text_gets_no_name() -> None:
    with pytest.raises(ValueError, match="lines of equal length"):
        maps.register_map("bad", "one line")
    assert "bad" not in maps.names()


def test_shipped_maps_have_the_sizes_that_they_are_for() -> None:
    shapes = {name: maps.load(name, "awslg-iIcd").shape for name in maps.names()}
    assert shapes["two_islands"] == (11, 23)
    assert shapes["five_islands"] == (25, 25)
    assert shapes["archipelago"] == (100, 100)
    assert shapes["river"] == shapes["small_rooms"] == (7, 7)


def test_every_map_file_is_package_data() -> None:
    root = Path(__file__).parents[3]
    assert '"envs/grid/maps/*.txt"' in (root / "pyproject.toml").read_text()
    assert {entry.name for entry in files(maps).iterdir() if entry.name.endswith(".txt")} == {
        f"{name}.txt" for name in maps.names()
    }
