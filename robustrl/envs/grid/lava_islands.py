"""Islands in lava: walking and jumping with slips."""

from __future__ import annotations

import numpy as np

from robustrl.envs.grid.base import TabularEnv, goal_and_lava
from robustrl.envs.grid.maps import load, tiles
from robustrl.errors import check_probability, check_real
from robustrl.mdp.analogy import Analogy

LEGEND = {"-": "floor", "s": "start", "a": "start", "w": "wall", "l": "lava", "g": "goal"}
REACH = 2
WINDOW = np.stack(np.divmod(np.arange((2 * REACH + 1) ** 2), 2 * REACH + 1), -1) - REACH
"""Outcome slots: by how many rows and columns a step may displace, (K, 2)."""

COMPASS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""North, east, south, west, in rows and columns."""


class LavaIslands(TabularEnv):
    """Walk and jump over islands in lava to the goal, on ground that slips.

    A state is a cell, row by row. Actions 0 to 3 walk a cell north, east, south, west; 4 to 7 jump two cells, over whatever lies
    between. The agent lands where it wants with probability 1 - slip, and beside that cell, one step to the left or the right of its
    course, with probability slip / 2 each. A step into a wall leaves it where it is; a step off the map ends at the map's edge.
    Reaching the goal pays 1 and ends the episode, lava pays -1 and ends it; nothing else pays.

    Declared: a step ends at most two rows and two columns away; the closed part of the start region is safe; the same action does
    the same in any two cells at most five rows and columns apart, unless walls or the map's edge meet it differently.

    Args:
        map: name or text of a map (`robustrl.envs.grid.maps`): "w" wall, "l" lava, "g" goal, "a" start, "s" start region, "-" floor.
            With several "a" the start is one of them, with equal probabilities.
        slip: probability of landing beside, in [0, 1].
        gamma: discount of what is declared.
        render_mode: as in `TabularEnv`.

    Examples:
        >>> import gymnasium as gym, robustrl
        >>> env = gym.make("robustrl/LavaIslands-v0", map="two_islands", slip=0.6)
    """

    def __init__(self, map: str = "two_islands", slip: float = 0.6, gamma: float = 0.9, render_mode: str | None = None) -> None:
        slip = float(check_probability("slip", check_real("slip", slip)))
        grid = load(map, LEGEND)
        width, kinds = grid.shape[1], grid.ravel()
        wall, lava, goal = kinds == "w", kinds == "l", kinds == "g"
        alive = ~(wall | lava | goal)
        states = np.arange(kinds.size)
        at = np.stack(np.divmod(states, width), -1)

        near = at[:, None] + WINDOW
        inside = ((near >= 0) & (near < grid.shape)).all(-1)
        window = np.where(inside, near @ (width, 1), states[:, None])

        aims = np.concatenate([COMPASS, 2 * COMPASS])
        drift = np.concatenate([COMPASS[:, ::-1]] * 2)
        landings = aims[:, None] + np.array([0, -1, 1])[:, None] * drift[:, None]
        reached = np.clip(at[:, None, None] + landings, 0, np.array(grid.shape) - 1)
        reached = np.where(wall[reached @ (width, 1)][..., None], at[:, None, None], reached)
        slots = (reached - at[:, None, None] + REACH) @ (2 * REACH + 1, 1)

        shape = (kinds.size, len(aims), len(WINDOW))
        probabilities = np.zeros(shape)
        rows, columns = np.ogrid[: shape[0], : shape[1]]
        for j, chance in enumerate((1 - slip, slip / 2, slip / 2)):
            probabilities[rows, columns, slots[..., j]] += chance

        candidates = inside & ~wall[window] & alive[:, None]
        mdp, outcomes = goal_and_lava(window[:, None], candidates[:, None], probabilities, goal, lava, kinds == "a", gamma)
        terrain = slots @ (1, len(WINDOW), len(WINDOW) ** 2)
        super().__init__(
            mdp,
            outcomes,
            outcomes.valid & np.isin(kinds, ("a", "s"))[:, None],
            Analogy.box(grid.shape, len(aims), radius=5, terrain=terrain),
            tiles(grid, LEGEND),
            states,
            render_mode=render_mode,
        )
