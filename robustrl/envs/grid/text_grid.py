"""Rooms with walls, ice and lava, for an agent that turns and walks."""

from __future__ import annotations

import numpy as np

from robustrl.envs.grid.base import TabularEnv, goal_and_lava
from robustrl.envs.grid.lava_islands import COMPASS
from robustrl.envs.grid.maps import load, tiles
from robustrl.errors import check_probability, check_real
from robustrl.mdp.analogy import Analogy

LEGEND = {"-": "floor", "s": "start", "a": "start", "i": "ice", "I": "ice", "w": "wall", "l": "lava", "g": "goal"}
LEFT, RIGHT, FORWARD = range(3)
EAST = 1


class TextGrid(TabularEnv):
    """Turn and walk through rooms to the goal, over ice that slides.

    A state is a cell and a heading: 4 * cell + heading, cells row by row, headings north, east, south, west. Actions: 0 turns left,
    1 turns right, 2 walks a cell ahead. Whoever steps onto ice slides one cell further with probability `slide`, unless a wall or
    the map's edge is there; walking against these changes nothing. Reaching the goal pays 1 and ends the episode, lava pays -1 and
    ends it; nothing else pays. Episodes start with the heading east.

    Declared: turns turn, and walking may end here, one or two cells ahead; the closed part of the start region is safe; walking onto
    ice, and onto anything else, is the same wherever the same of the next two cells are free.

    Args:
        map: name or text of a map (`robustrl.envs.grid.maps`): "w" wall, "l" lava, "g" goal, "a" start, "s" start region, "I" ice of the
            start region, "i" other ice, "-" floor. With several "a" the start is one of them, with equal probabilities.
        slide: probability of sliding on, in [0, 1].
        gamma: discount of what is declared.
        render_mode: as in `TabularEnv`.

    Examples:
        >>> import gymnasium as gym, robustrl
        >>> env = gym.make("robustrl/TextGrid-v0", map="rooms")
    """

    def __init__(self, map: str = "rooms", slide: float = 0.4, gamma: float = 0.95, render_mode: str | None = None) -> None:
        slide = float(check_probability("slide", check_real("slide", slide)))
        grid = load(map, LEGEND)
        width, kinds = grid.shape[1], grid.ravel()
        cells, headings = np.divmod(np.arange(4 * kinds.size), 4)
        at = np.stack(np.divmod(cells, width), -1)
        ended = np.isin(kinds, ("l", "g"))
        alive = ~(ended | (kinds == "w"))[cells]

        ahead = at[:, None] + np.array([1, 2])[:, None] * COMPASS[headings][:, None]
        inside = ((ahead >= 0) & (ahead < grid.shape)).all(-1)
        ahead_cells = np.where(inside, ahead @ (width, 1), cells[:, None])
        free = inside & (kinds[ahead_cells] != "w") & alive[:, None]
        free[:, 1] &= free[:, 0] & ~ended[ahead_cells[:, 0]]
        ice = np.isin(kinds, ("i", "I"))[ahead_cells[:, 0]] & free[:, 0]

        shape = (cells.size, 3, 3)
        successors, probabilities = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        candidates = np.zeros(shape, dtype=bool)
        candidates[..., 0], probabilities[:, :FORWARD, 0] = alive[:, None], 1.0
        for action, turn in ((LEFT, 3), (RIGHT, 1), (FORWARD, 0)):
            successors[:, action, 0] = 4 * cells + (headings + turn) % 4
        successors[:, FORWARD, 1:] = 4 * ahead_cells + headings[:, None]
        candidates[:, FORWARD, 1:] = free
        slid = slide * (ice & free[:, 1])
        probabilities[:, FORWARD] = np.stack([~free[:, 0], free[:, 0] * (1 - slid), slid], -1)

        lava, goal, first = (kinds[cells] == kind for kind in "lga")
        mdp, outcomes = goal_and_lava(successors, candidates, probabilities, goal, lava, first & (headings == EAST), gamma)
        class_id = np.tile([LEFT, RIGHT, FORWARD], (cells.size, 1))
        class_id[:, FORWARD] += free @ (1, 2) + 4 * ice
        super().__init__(
            mdp,
            outcomes,
            outcomes.valid & np.isin(kinds, ("a", "s", "I"))[cells][:, None],
            Analogy.classes(class_id),
            tiles(grid, LEGEND),
            cells,
            headings,
            render_mode,
        )
