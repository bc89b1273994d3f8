"""Small worlds for tests of safe exploration: a map of islands, built independently of the package's environments, and random ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robustrl.mdp import Analogy, Outcomes, TabularMDP, Unsafe, closed_subset

TWO_ISLANDS = (Path(__file__).parent / "data" / "two_islands.txt").read_text()
DIRECTIONS = [(-1, 0), (0, 1), (1, 0), (0, -1)]
WINDOW = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]


def islands(text: str = TWO_ISLANDS, slip: float = 0.6, gamma: float = 0.9) -> tuple[TabularMDP, Outcomes, np.ndarray]:
    """The truth, what is declared, and the initial safe set of a map: moves and jumps of length 2 that slip to either side.

    A slot is a displacement in a window of 5 x 5 cells. Lava (l) and the goal (g) end the episode.
    """
    rows = text.split()
    height, width = len(rows), len(rows[0])
    cells = np.array([list(row) for row in rows])
    shape = (height * width, 8, 25)
    successors, p = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    candidates = np.zeros(shape, dtype=bool)
    for y in range(height):
        for x in range(width):
            s = y * width + x
            if cells[y, x] in "lg":
                p[s, :, 0] = 1
                continue
            for k, (dy, dx) in enumerate(WINDOW):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    successors[s, :, k] = s + dy * width + dx
                    candidates[s, :, k] = True
            for a in range(8):
                (dy, dx), length = DIRECTIONS[a % 4], 1 + a // 4
                for side, chance in ((0, 1 - slip), (-1, slip / 2), (1, slip / 2)):
                    landing = WINDOW.index((dy * length + side * dx, dx * length + side * dy))
                    p[s, a, landing] += chance
    entered = cells.ravel()[successors]
    rewards = np.where(entered == "g", 1.0, np.where(entered == "l", -1.0, 0.0)) * candidates
    terminal = np.isin(entered, ["l", "g"]) & candidates
    start = (cells.ravel() == "a").astype(float)
    mdp = TabularMDP(successors, p, rewards, terminal, gamma, start)
    outcomes = Outcomes(successors.astype(np.int32), candidates, rewards, rewards < 0, terminal, gamma, start)
    declared = np.isin(cells.ravel(), ["s", "a"])[:, None] & outcomes.valid
    return mdp, outcomes, closed_subset(outcomes, declared, (p > 0) & candidates)


def nearby(text: str = TWO_ISLANDS) -> Analogy:
    """The same action at most 5 rows and columns away."""
    rows = text.split()
    return Analogy.box((len(rows), len(rows[0])), 8, 5)


def random_world(seed: int, n_states: int = 5, n_actions: int = 2, n_slots: int = 3) -> tuple[TabularMDP, Outcomes]:
    """A random MDP with dangers, ends, missing pairs, rewards that differ between slots, and candidates that never fire."""
    rng = np.random.default_rng(seed)
    shape = (n_states, n_actions, n_slots)
    successors = rng.integers(n_states, size=shape)
    rewards = np.round(rng.normal(size=shape), 3) + np.arange(n_slots) * 1e-6  # slots can be told apart
    candidates = rng.random(shape) < 0.8
    fires = candidates & (rng.random(shape) < 0.7)
    fires[..., 0] |= ~fires.any(-1)
    candidates |= fires
    p = np.where(fires, rng.random(shape) + 0.1, 0)
    p /= p.sum(-1, keepdims=True)
    mdp = TabularMDP(successors, p, rewards, rng.random(shape) < 0.15, 0.9)
    missing = rng.random(shape[:2]) < 0.1
    dangerous = Unsafe.pairs(rng.random(shape[:2]) < 0.1) | Unsafe.reward_below(-2.0)
    terminal = np.asarray(mdp.terminal)
    outcomes = Outcomes(
        successors.astype(np.int32), candidates & ~missing[..., None], rewards, np.zeros(shape, dtype=bool), terminal, 0.9
    )
    marked = dangerous.mark(outcomes)
    return mdp, Outcomes(outcomes.successors, outcomes.candidates, rewards, marked, terminal, 0.9)
