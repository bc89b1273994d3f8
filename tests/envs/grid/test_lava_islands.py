"""Walking and jumping with slips: against a table written cell by cell, and against numbers found by others."""

from __future__ import annotations

import numpy as np
import pytest

from robustrl.envs.grid import LavaIslands, maps
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.safe_sets import learnable_oracle, safe_oracle, validate_analogy

Cell = tuple[int, int]


def table(text: str, slip: float, cells: list[Cell]) -> dict[tuple[Cell, int], dict[Cell, float]]:
    """Where an action may lead to from a cell, and how likely: the rules, one at a time."""
    rows = text.split()
    height, width = len(rows), len(rows[0])
    found = {}
    for y, x in cells:
        for action in range(8):
            down, right = [(-1, 0), (0, 1), (1, 0), (0, -1)][action % 4]
            length = 1 if action < 4 else 2
            ends: dict[Cell, float] = {}
            for aside, chance in ((0, 1 - slip), (-1, slip / 2), (1, slip / 2)):
                to_y = min(max(y + length * down + aside * right, 0), height - 1)
                to_x = min(max(x + length * right + aside * down, 0), width - 1)
                end = (y, x) if rows[to_y][to_x] == "w" else (to_y, to_x)
                ends[end] = ends.get(end, 0.0) + chance
            found[(y, x), action] = ends
    return found


def random_map(seed: int) -> str:
    generator = np.random.default_rng(seed)
    cells = generator.choice(list("wsss"), (6, 7))
    cells[0], cells[:, 6] = generator.choice(list("wls-"), 7), generator.choice(list("wls-"), 6)
    cells[2:5, 3], cells[3, 3], cells[0, 6] = "s", "a", "g"
    return "\n".join("".join(row) for row in cells)


SHIPPED = ["two_islands", "river", "five_islands", "archipelago"]


@pytest.mark.parametrize("slip", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("world", [*SHIPPED, *(random_map(seed) for seed in range(6))], ids=lambda text: text[:12].strip())
def test_transitions_are_those_of_the_rules(world: str, slip: float) -> None:
    env = LavaIslands(world, slip)
    grid = maps.load(world, "awslg-")
    alive = [(int(y), int(x)) for y, x in np.argwhere(~np.isin(grid, list("wlg")))]
    np.testing.assert_array_equal(env.outcomes.valid.any(1), ~np.isin(grid, list("wlg")).ravel())
    cells = alive[:: max(1, len(alive) // 150)]
    text = "\n".join("".join(row) for row in grid)
    for ((y, x), action), ends in table(text, slip, cells).items():
        state = y * grid.shape[1] + x
        p, to = env.mdp.probabilities[state, action], env.mdp.successors[state, action]
        given = {divmod(int(end), grid.shape[1]): float(chance) for end, chance in zip(to, p, strict=True) if chance > 0}
        assert given == pytest.approx({end: chance for end, chance in ends.items() if chance > 0}, abs=1e-15)
        for slot in np.flatnonzero(env.outcomes.candidates[state, action]).tolist():
            kind = str(grid[divmod(int(to[slot]), grid.shape[1])])
            assert env.outcomes.rewards[state, action, slot] == {"g": 1, "l": -1}.get(kind, 0)
            assert env.outcomes.terminal[state, action, slot] == (kind in "gl")
            assert env.outcomes.dangerous[state, action, slot] == (kind == "l")


@pytest.mark.parametrize("seed", range(20))
def test_analogy_holds_beside_walls_and_edges(seed: int) -> None:
    env = LavaIslands(random_map(seed))
    assert validate_analogy(env.mdp, env.outcomes, env.analogy).holds


def test_without_terrain_the_analogy_would_be_false_at_the_edge() -> None:
    env = LavaIslands("river")
    plain = Analogy.box(env.grid_shape, 8, radius=5)
    assert validate_analogy(env.mdp, env.outcomes, plain).worst_excess == pytest.approx(2.0)


def test_analogues_are_at_most_five_cells_apart() -> None:
    env = LavaIslands("five_islands")
    analogy = env.analogy
    rows, columns = np.divmod(analogy.members(8 * (12 * 25 + 12) + 3) // 8, 25)
    assert (np.unique(rows).tolist(), np.unique(columns).tolist()) == ([*range(7, 18)], [*range(7, 18)])


def test_candidates_are_the_window_cut_to_the_map_and_free_of_walls() -> None:
    env = LavaIslands("ssss-\nsssws\nssass\nsssss\nsssss", slip=0.0)
    cells = env.outcomes.successors[12, 3][env.outcomes.candidates[12, 3]]
    assert sorted(cells.tolist()) == sorted(set(range(25)) - {8})
    corner = env.outcomes.successors[0, 0][env.outcomes.candidates[0, 0]]
    assert sorted(corner.tolist()) == [0, 1, 2, 5, 6, 7, 10, 11, 12]


def danger_avoiding_value(env: LavaIslands, pairs: np.ndarray) -> float:
    values = np.zeros(env.mdp.n_states)
    for _ in range(400):
        worth = np.where(pairs, env.mdp.action_values(values), -np.inf)
        values = np.where(pairs.any(1), worth.max(1), 0.0)
    return env.mdp.value(values)


def test_two_islands_have_the_reference_sets_and_value() -> None:
    # from an independent prototype: 204 pairs, 490 safe and 490 learnable ones, and 0.412067 where the reward is discounted once more,
    # because it is paid for leaving the goal instead of for entering it
    env = LavaIslands("two_islands", slip=0.6, gamma=0.9)
    safe = safe_oracle(env.mdp, env.outcomes, env.safe_set)
    learnable = learnable_oracle(env.mdp, env.outcomes, env.safe_set, env.analogy, env.tau)
    assert (env.safe_set.sum(), safe.sum(), learnable.sum()) == (204, 490, 490)
    assert (learnable == safe).all()
    assert env.tau == pytest.approx(0.3)
    assert env.mdp.gamma * danger_avoiding_value(env, safe) == pytest.approx(0.412067, abs=5e-7)


def test_four_of_five_islands_are_a_jump_away_from_home() -> None:
    env = LavaIslands("five_islands")
    learnable = learnable_oracle(env.mdp, env.outcomes, env.safe_set, env.analogy, env.tau)
    reached = env.on_grid("safe", learnable)
    grid = maps.load("five_islands", "awslg-")
    for island in (grid[2:7, 8:17], grid[18:23, 8:17], grid[5:19, 2:8], grid[6:20, 17:23]):
        assert (island == "-").sum() > 30
    assert reached[grid == "-"].mean() > 0.95
    assert not env.on_grid("safe", env.safe_set)[grid == "-"].any()


@pytest.mark.parametrize("slip", [-0.1, 1.1, float("nan")])
def test_slips_are_probabilities(slip: float) -> None:
    with pytest.raises(ValueError, match="slip must"):
        LavaIslands(slip=slip)


def test_a_start_from_which_every_action_may_leave_the_region_is_refused() -> None:
    with pytest.raises(ValueError, match="safe_set must hold pairs"):
        LavaIslands("lll\nlal\nlll")
