"""Finite worlds that say what is known of them: the base of the grid environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from robustrl.envs.grid.painting import MARKS, paint, write
from robustrl.errors import check_choice, check_finite_array
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.model import TabularMDP
from robustrl.mdp.outcomes import Outcomes
from robustrl.mdp.safe_sets import closed_subset

Flags = NDArray[np.bool_]
Numbers = NDArray[Any]


class TabularEnv(gym.Env[Any, Any]):
    """A finite MDP as an environment, with what a safe learner is told beforehand beside it.

    What it declares: `outcomes` (what an action may lead to), `safe_set` (pairs to begin with, (S, A)), `analogy` (pairs whose
    outcomes have the same probabilities) and `tau` (a lower bound of every positive probability). `mdp` is the truth, for oracles
    and tests. `info["cost"]` is 1 when a step was dangerous, else 0.

    Args:
        mdp: the truth; its slots are those of `outcomes`.
        outcomes: what is known of it: every slot that can fire is a candidate.
        safe_set: pairs that are safe to begin with, bool (S, A). Declared is the largest subset of it that no step leaves.
        analogy: which pairs are alike.
        tiles: what the cells of the world look like, names of `robustrl.envs.grid.painting.TILES`, (height, width).
        cells: the cell that a state is in, row by row, int (S,).
        headings: where the agent looks in a state: 0 north, 1 east, 2 south, 3 west, int (S,); default nowhere.
        render_mode: "ansi" (text), "rgb_array" (a picture) or None.

    Raises:
        ValueError: if truth and outcomes contradict each other, or no safe pair is left at a start.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8}  # noqa: RUF012

    def __init__(
        self,
        mdp: TabularMDP,
        outcomes: Outcomes,
        safe_set: Flags,
        analogy: Analogy,
        tiles: NDArray[np.str_],
        cells: NDArray[np.int64],
        headings: NDArray[np.int64] | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        support = (mdp.probabilities > 0) & outcomes.valid[..., None]
        if (support & ~outcomes.candidates).any() or (outcomes.successors != mdp.successors)[support].any():
            raise ValueError("outcomes must have every slot of mdp with a positive probability as a candidate")
        self.mdp, self.outcomes, self.analogy = mdp, outcomes, analogy
        self.safe_set: Flags = closed_subset(outcomes, outcomes.pairs("safe_set", safe_set), support)
        if not self.safe_set.any():
            raise ValueError("safe_set must hold pairs that no step leaves, at every start, got none")
        self.tau = float(mdp.probabilities[support].min())
        self.observation_space: spaces.Discrete = spaces.Discrete(mdp.n_states)
        self.action_space: spaces.Discrete = spaces.Discrete(mdp.n_actions)
        self.render_mode = render_mode
        self.tiles, self.cells, self.headings = tiles, cells, headings
        self.state = int(np.asarray(mdp.start).argmax())
        self._layers: dict[str, Numbers] = {}

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(height, width) of the world in cells."""
        height, width = self.tiles.shape
        return height, width

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """A first state, drawn from the start distribution."""
        super().reset(seed=seed)
        self.state = self._draw(np.asarray(self.mdp.start))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """A step; `info["cost"]` says whether it was dangerous.

        Raises:
            ValueError: for an action outside the space.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"action must be an integer from 0 to {self.mdp.n_actions - 1}, got {action!r}")
        slot = self.state, action, self._draw(self.mdp.probabilities[self.state, action])
        self.state = int(self.mdp.successors[slot])
        cost = int(self.outcomes.dangerous[slot])
        return self.state, float(self.mdp.rewards[slot]), bool(np.asarray(self.mdp.terminal)[slot]), False, {"cost": cost}

    def _draw(self, probabilities: NDArray[np.float64]) -> int:
        sums = probabilities.cumsum()
        return int(sums.searchsorted(self.np_random.random() * sums[-1], side="right"))

    def overlay(
        self,
        *,
        safe: ArrayLike | None = None,
        goal: ArrayLike | None = None,
        targets: ArrayLike | None = None,
        visits: ArrayLike | None = None,
        values: ArrayLike | None = None,
    ) -> None:
        """Show arrays (S,) or (S, A) on the pictures from now on; without arguments, none.

        Args:
            safe: bool; cells with such a pair are tinted and framed.
            goal: bool; cells with such a pair get a dot.
            targets: bool; cells with such a pair get a ring.
            visits: counts >= 0, summed in a cell, drawn on a logarithmic scale.
            values: the best in a cell is drawn; -inf means there is none.

        Raises:
            ValueError: for other shapes or types, NaN, or negative visits.
        """
        layers = {"safe": safe, "goal": goal, "targets": targets, "visits": visits, "values": values}
        self._layers = {name: self.on_grid(name, array) for name, array in layers.items() if array is not None}

    def on_grid(self, name: str, array: ArrayLike) -> Numbers:
        """An array (S,) or (S, A) on the cells of the world, (height, width): any of booleans, sum of "visits", best of others.

        Cells in which no state is get False, 0 or -inf.
        """
        given = np.asarray(array)
        if given.shape not in ((self.mdp.n_states,), (self.mdp.n_states, self.mdp.n_actions)):
            raise ValueError(
                f"{name} must have shape {(self.mdp.n_states,)} or {(self.mdp.n_states, self.mdp.n_actions)}, got {given.shape}"
            )
        if name in MARKS and given.dtype != bool:
            raise ValueError(f"{name} must be boolean, got {given.dtype}")
        by_state = given.reshape(self.mdp.n_states, -1)
        if name in MARKS:
            found: Numbers = np.zeros(self.tiles.size, dtype=bool)
            found[self.cells[by_state.any(1)]] = True
        elif name == "visits":
            if (check_finite_array(name, given) < 0).any():
                raise ValueError(f"visits must be >= 0, got {given.min()}")
            found = np.bincount(self.cells, by_state.sum(1), self.tiles.size)
        else:
            check_finite_array(name, np.where(given == -np.inf, 0.0, given))
            found = np.full(self.tiles.size, -np.inf)
            np.maximum.at(found, self.cells, by_state.max(1))
        return found.reshape(self.tiles.shape)

    def render(self) -> Any:
        """The world now: text ("ansi"), or uint8 (height * t, width * t, 3) with t pixels a cell ("rgb_array")."""
        if self.render_mode is None:
            gym.logger.warn('render() shows nothing: make the environment with render_mode="rgb_array" or "ansi"')
            return None
        row, column = divmod(int(self.cells[self.state]), self.tiles.shape[1])
        heading = None if self.headings is None else int(self.headings[self.state])
        if self.render_mode == "rgb_array":
            return paint(self.tiles, self._layers, (row, column), heading)
        return write(self.tiles, self._layers, (row, column), heading)


def goal_and_lava(
    successors: NDArray[Any],
    candidates: Flags,
    probabilities: NDArray[np.float64],
    goal: Flags,
    lava: Flags,
    first: Flags,
    gamma: float,
) -> tuple[TabularMDP, Outcomes]:
    """The truth and what is known of it where goals pay 1, lava pays -1 and is the danger, and both end the episode.

    Args:
        successors: of the slots, (S, A, K), or (S, 1, K) if all actions have the same; so the next one.
        candidates: which slots there are; pairs without any do not exist.
        probabilities: (S, A, K); those of pairs that do not exist sum to 1 too.
        goal: which states are goals, (S,).
        lava: which states are lava, (S,).
        first: in which states an episode may start, with equal probabilities, (S,).
        gamma: discount.
    """
    exists = candidates.any(-1, keepdims=True)
    successors = np.where(candidates, successors, np.arange(len(goal))[:, None, None])
    rewards = np.where(candidates, (1.0 * goal - lava)[successors], 0.0)
    dangerous, terminal = lava[successors] & candidates, (goal | lava)[successors] | ~exists
    start, shape = first / first.sum(), probabilities.shape
    successors, candidates, rewards, dangerous, terminal = (
        np.broadcast_to(array, shape) for array in (successors, candidates, rewards, dangerous, terminal)
    )
    outcomes = Outcomes(successors, candidates, rewards, dangerous, terminal, gamma, start)
    return TabularMDP(successors, probabilities, rewards, terminal, gamma, start), outcomes
