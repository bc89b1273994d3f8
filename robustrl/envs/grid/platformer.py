"""A platform game in cells: run, jump, and do not fall."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustrl.envs.grid.base import TabularEnv, goal_and_lava
from robustrl.envs.grid.maps import load, tiles
from robustrl.mdp.analogy import Analogy

LEGEND = {"-": "sky", "s": "sky", "a": "sky", "g": "goal", "l": "lava", "c": "concrete", "i": "ice", "d": "sand"}
SOLID = ("c", "i", "d")
WEAK_JUMP = {"c": 0.5, "i": 0.0, "d": 1.0}
"""Probability that a jump off a surface is the weak one."""

FASTEST = 2
STRONG, WEAK = 2, 1
Integers = NDArray[np.int64]


class Body(NamedTuple):
    """Where something is and how it moves, arrays of one shape; `up` is the vertical speed, rows count downwards."""

    row: Integers
    column: Integers
    right: Integers
    up: Integers


class DiscretePlatformer(TabularEnv):
    """Run and jump over platforms to the goal; below there is lava.

    A state is a cell, a horizontal and a vertical speed, each -2 to 2 cells a step; only states that can be reached are numbered
    (`bodies`). Actions are 5 * jump + (2 + wanted speed): on the ground the horizontal speed changes by one towards the wanted one,
    in the air it stays and gravity takes one from the vertical speed. A jump goes up with speed 2 or 1: with equal probabilities on
    concrete, 2 on ice, 1 on sand. Blocks and the map's sides stop what runs into them. Reaching the goal pays 1 and ends the
    episode, lava pays -1 and ends it; nothing else pays.

    Declared: how things fly, and that a jump is strong or weak; the closed part of the start region is safe; the same action with
    the same speeds on the same surface does the same anywhere.

    Args:
        level: name or text of a map (`robustrl.envs.grid.maps`): blocks of "c" concrete, "i" ice and "d" sand (as of a dune), "l"
            lava, "g" goal, "a" start, "s" cells of the start region, "-" air. The lowest row is blocks and lava.
        gamma: discount of what is declared.
        render_mode: as in `TabularEnv`.

    Examples:
        >>> import gymnasium as gym, robustrl
        >>> env = gym.make("robustrl/DiscretePlatformer-v0")
    """

    def __init__(self, level: str = "cliffs", gamma: float = 0.95, render_mode: str | None = None) -> None:
        grid = load(level, LEGEND)
        if not np.isin(grid[-1], ("l", *SOLID)).all():
            raise ValueError(f"level must have only blocks and lava in its lowest row, got {''.join(grid[-1])!r}")
        everything = (*grid.shape, 2 * FASTEST + 1, 2 * FASTEST + 1)
        grids = np.indices(everything).reshape(4, -1)
        bodies = Body(grids[0], grids[1], grids[2] - FASTEST, grids[3] - FASTEST)
        surface = _surface(grid, bodies)
        standing = surface != ""

        wanted, jump = np.tile(np.arange(-FASTEST, FASTEST + 1), 2), np.repeat([False, True], 2 * FASTEST + 1)
        right = bodies.right[:, None] + np.sign(wanted - bodies.right[:, None]) * standing[:, None]
        falling = np.maximum(bodies.up - 1, -FASTEST)
        jumps = jump & standing[:, None]

        def after(impulse: int) -> Integers:
            up = np.where(jumps, impulse, np.where(standing, 0, falling)[:, None])
            at = np.broadcast_arrays(bodies.row[:, None], bodies.column[:, None], right, up)
            moved = _fly(grid, Body(*at))
            return np.ravel_multi_index((moved.row, moved.column, moved.right + FASTEST, moved.up + FASTEST), everything)

        successors = np.stack([after(STRONG), after(WEAK)], -1)
        first = np.flatnonzero((grid[bodies.row, bodies.column] == "a") & (bodies.right == 0) & (bodies.up == 0))
        ended = np.isin(grid, ("l", "g"))[bodies.row, bodies.column]
        states = _reachable(successors, first)
        number = np.zeros(ended.size, dtype=np.int64)
        number[states] = np.arange(states.size)

        self.bodies = Body(*(field[states] for field in bodies))
        kinds = grid[self.bodies.row, self.bodies.column]
        alive, surface, jumps, chosen = ~ended[states], surface[states], jumps[states], number[successors[states]]
        differ = chosen[..., 0] != chosen[..., 1]  # a low ceiling makes strong and weak jumps one
        weak = np.select([surface == kind for kind in SOLID], [WEAK_JUMP[kind] for kind in SOLID], 0.0)[:, None] * differ
        candidates = np.stack([np.broadcast_to(alive[:, None], differ.shape), differ & alive[:, None]], -1)
        probabilities = np.stack([1 - weak, weak], -1)
        lava, goal, starts = kinds == "l", kinds == "g", np.isin(states, first)
        mdp, outcomes = goal_and_lava(chosen, candidates, probabilities, goal, lava, starts, gamma)
        speeds = np.stack([self.bodies.right + FASTEST, self.bodies.up + FASTEST], -1) @ (2 * FASTEST + 1, 1)
        floor = np.select([surface == kind for kind in SOLID], [1, 2, 3], 0)
        class_id = ((speeds * 4 + floor) * 2)[:, None] + differ
        class_id = class_id * jump.size + np.arange(jump.size)
        super().__init__(
            mdp,
            outcomes,
            outcomes.valid & np.isin(kinds, ("a", "s"))[:, None],
            Analogy.classes(class_id),
            tiles(grid, LEGEND),
            self.bodies.row * grid.shape[1] + self.bodies.column,
            render_mode=render_mode,
        )


def _surface(grid: NDArray[np.str_], bodies: Body) -> NDArray[np.str_]:
    """What bodies stand on, "" for the air: who rises from a block has left it."""
    below = grid[np.minimum(bodies.row + 1, len(grid) - 1), bodies.column]
    return np.where((bodies.up <= 0) & np.isin(below, SOLID), below, "")


def _fly(grid: NDArray[np.str_], body: Body) -> Body:
    """Where bodies are after a step at their speeds: risers go up before they go sideways, the others sideways first."""
    row, column, right, up = (np.array(field) for field in body)
    walls = np.pad(np.isin(grid, SOLID), 1, constant_values=True)
    ends = np.isin(grid, ("l", "g"))

    def move(speed: Integers, down: int, across: int, who: NDArray[np.bool_]) -> None:
        for i in range(1, FASTEST + 1):
            moving = who & (np.abs(speed) >= i) & ~ends[row, column]
            rows, columns = row + down * np.sign(speed), column + across * np.sign(speed)
            blocked = walls[rows + 1, columns + 1]
            speed[moving & blocked] = 0
            goes = moving & ~blocked
            row[goes], column[goes] = rows[goes], columns[goes]

    rising = up > 0
    move(up, -1, 0, rising)
    move(right, 0, 1, np.ones_like(rising))
    move(up, -1, 0, ~rising)
    ended = ends[row, column]
    right[ended] = 0
    up[ended | (_surface(grid, Body(row, column, right, up)) != "")] = 0
    return Body(row, column, right, up)


def _reachable(successors: Integers, first: Integers) -> Integers:
    """States reached from the first ones by any slot, sorted."""
    reached, found = np.zeros(len(successors), dtype=bool), first
    while found.size:
        reached[found] = True
        found = np.unique(successors[found])
        found = found[~reached[found]]
    return np.flatnonzero(reached)
