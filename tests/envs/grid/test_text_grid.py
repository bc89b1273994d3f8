"""Turning, walking and sliding: against rules played one step at a time."""

from __future__ import annotations

import numpy as np
import pytest

from robustrl.envs.grid import TextGrid, maps

LEFT, RIGHT, FORWARD = 0, 1, 2
OPEN = "-iigi\nasIli\nsIIii\nssiw-"


@pytest.mark.parametrize("world", ["rooms", "small_rooms", "two_islands", OPEN])
@pytest.mark.parametrize("slide", [0.4, 0.0, 1.0])
def test_transitions_are_those_of_the_rules(world: str, slide: float) -> None:
    env = TextGrid(world, slide)
    grid = maps.load(world, "asiIwlg-")
    height, width = grid.shape

    def free(y: int, x: int) -> bool:
        return 0 <= y < height and 0 <= x < width and bool(grid[y, x] != "w")

    for state in range(env.mdp.n_states):
        (y, x), heading = divmod(state // 4, width), state % 4
        if grid[y, x] in "wlg":
            assert not env.outcomes.valid[state].any()
            continue
        down, right = [(-1, 0), (0, 1), (1, 0), (0, -1)][heading]
        one, two = (y + down, x + right), (y + 2 * down, x + 2 * right)
        ends = {(y, x): 1.0}
        if free(*one):
            ends = {one: 1.0}
            if grid[one] in "iI" and free(*two):
                ends = {one: 1 - slide, two: slide}
        expected = {
            LEFT: {state - heading + (heading - 1) % 4: 1.0},
            RIGHT: {state - heading + (heading + 1) % 4: 1.0},
            FORWARD: {4 * (row * width + column) + heading: p for (row, column), p in ends.items() if p > 0},
        }
        for action, table in expected.items():
            fires = np.flatnonzero(env.mdp.probabilities[state, action])
            to = env.mdp.successors[state, action, fires].tolist()
            assert dict(zip(to, env.mdp.probabilities[state, action, fires].tolist(), strict=True)) == table
            for slot in fires.tolist():
                kind = str(grid[divmod(int(env.mdp.successors[state, action, slot]) // 4, width)])
                assert env.mdp.rewards[state, action, slot] == {"g": 1, "l": -1}.get(kind, 0)
                assert env.outcomes.terminal[state, action, slot] == (kind in "gl")
                assert env.outcomes.dangerous[state, action, slot] == (kind == "l")


def test_learner_is_told_that_turns_turn_and_walks_end_within_two_free_cells() -> None:
    env = TextGrid(OPEN)
    candidates = env.outcomes.candidates

    def walk(y: int, x: int, heading: int) -> list[bool]:
        answer: list[bool] = candidates[4 * (5 * y + x) + heading, FORWARD].tolist()
        return answer

    assert (candidates[env.outcomes.valid.any(1), :FORWARD] == [True, False, False]).all()
    assert walk(1, 0, 1) == [True, True, True]
    assert walk(1, 0, 3) == [True, False, False]  # the edge
    assert walk(1, 2, 1) == [True, True, False]  # lava ends the way
    assert walk(3, 1, 1) == [True, True, False]  # a wall behind the next cell


def test_episodes_start_looking_east() -> None:
    state, _ = TextGrid("rooms").reset(seed=0)
    assert divmod(state // 4, 21) == (4, 1)
    assert state % 4 == 1


@pytest.mark.parametrize("slide", [-0.1, 1.5, float("nan")])
def test_slides_are_probabilities(slide: float) -> None:
    with pytest.raises(ValueError, match="slide must"):
        TextGrid(slide=slide)
