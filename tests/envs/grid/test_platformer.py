"""Running and jumping: against rules played one body at a time, and flights worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from robustrl.envs.grid import DiscretePlatformer, maps

Motion = tuple[int, int, int, int]
LEVELS = ["cliffs", "sscc-g-\nsa-----\nsss-dd-\ncccllic", "ssss--\nassscc\ncicl-g\nlllldd"]


def after(rows: list[str], motion: Motion, action: int, impulse: int) -> Motion:
    """The rules: (row, column, speed to the right, speed up) after a step whose jump, if any, has the impulse."""
    y, x, right, up = motion
    jump, wanted = action >= 5, action % 5 - 2

    def solid(row: int, column: int) -> bool:
        return row < 0 or not 0 <= column < len(rows[0]) or rows[row][column] in "cid"

    def walk(y: int, x: int, down: int, across: int, cells: int) -> tuple[int, int, bool]:
        for _ in range(cells):
            if rows[y][x] in "gl":
                break
            if solid(y + down, x + across):
                return y, x, True
            y, x = y + down, x + across
        return y, x, False

    if up <= 0 and solid(y + 1, x):
        right += (wanted > right) - (wanted < right)
        up = impulse if jump else 0
    else:
        up = max(up - 1, -2)
    if up > 0:
        y, x, hit = walk(y, x, -1, 0, up)
        up = 0 if hit else up
    rises = up > 0 or y != motion[0]
    y, x, hit = walk(y, x, 0, 1 if right > 0 else -1, abs(right))
    right = 0 if hit else right
    if not rises and up < 0:
        y, x, _ = walk(y, x, 1, 0, -up)
    if rows[y][x] in "gl":
        return y, x, 0, 0
    return y, x, right, 0 if up <= 0 and solid(y + 1, x) else up


@pytest.mark.parametrize("level", LEVELS, ids=lambda text: text[:6])
def test_steps_are_those_of_the_rules(level: str) -> None:
    env = DiscretePlatformer(level)
    rows = ["".join(row) for row in maps.load(level, "cidlgas-")]
    motions = [tuple(int(part) for part in motion) for motion in zip(*env.bodies, strict=True)]
    assert len(set(motions)) == env.mdp.n_states
    for state, motion in enumerate(motions):
        if rows[motion[0]][motion[1]] in "gl":
            assert not env.outcomes.valid[state].any()
            continue
        below = rows[motion[0] + 1][motion[1]] if motion[3] <= 0 else ""
        for action in range(10):
            strong, weak = (after(rows, motion, action, impulse) for impulse in (2, 1))  # type: ignore[arg-type]
            chance = {"c": 0.5, "d": 1.0}.get(below, 0.0) if action >= 5 else 0.0
            expected: dict[Motion, float] = {}
            for end, p in ((strong, 1 - chance), (weak, chance)):
                expected[end] = expected.get(end, 0.0) + p
            slots = env.outcomes.candidates[state, action]
            assert {motions[end] for end in env.mdp.successors[state, action][slots]} == {strong, weak}
            given = {
                motions[end]: float(p)
                for end, p in zip(env.mdp.successors[state, action], env.mdp.probabilities[state, action], strict=True)
                if p > 0
            }
            assert given == {end: p for end, p in expected.items() if p > 0}


def fly(level: str, action: int, steps: int = 6) -> list[tuple[int, int]]:
    """(row, column) after each step; the agent jumps once and does nothing after."""
    env = DiscretePlatformer(level)
    env.reset(seed=0)
    path = []
    for i in range(steps):
        state, _, ended, _, _ = env.step(action if i == 0 else 2)
        path.append((int(env.bodies.row[state]), int(env.bodies.column[state])))
        if ended:
            break
    return path


def test_strong_jumps_rise_three_cells_and_weak_ones_one() -> None:
    sky = ["s" * 9] * 4
    ground = ["assssssss"]
    ice, sand = ("\n".join([*sky, *ground, kind * 9]) for kind in "id")
    assert fly(ice, 5 + 3) == [(2, 1), (1, 2), (1, 3), (2, 4), (4, 5), (4, 5)]
    assert fly(sand, 5 + 3, 4) == [(3, 1), (3, 2), (4, 3), (4, 3)]


def test_a_low_ceiling_makes_both_jumps_one_outcome() -> None:
    env = DiscretePlatformer("icii\nasss\ncclc")
    state = int(np.argmax(env.mdp.start))  # type: ignore[arg-type]
    assert env.outcomes.candidates[state, 5 + 2].tolist() == [True, False]
    assert env.mdp.probabilities[state, 5 + 2].tolist() == [1.0, 0.0]
    higher = DiscretePlatformer("icii\nssss\nasss\ncclc")
    state = int(np.argmax(higher.mdp.start))  # type: ignore[arg-type]
    assert higher.mdp.probabilities[state, 5 + 2].tolist() == [0.5, 0.5]


def test_whoever_walks_off_a_ledge_falls_into_the_lava() -> None:
    env = DiscretePlatformer("as----\ncc----\nllllll")
    env.reset(seed=0)
    costs = []
    for _ in range(5):
        state, reward, ended, _, info = env.step(4)
        costs.append((reward, ended, info["cost"]))
        if ended:
            break
    assert costs[-1] == (-1.0, True, 1)
    assert all(cost == (0.0, False, 0) for cost in costs[:-1])
    assert int(env.bodies.row[state]) == 2


def test_analogues_move_alike_on_the_same_surface_with_the_same_action() -> None:
    env = DiscretePlatformer()
    grid = maps.load("cliffs", "cidlgas-")
    analogy = env.analogy.on(env.outcomes)
    pairs = np.flatnonzero(env.outcomes.valid.ravel())
    for pair in pairs[::97].tolist():
        members = np.intersect1d(analogy.members(int(analogy.pool_of[pair])), pairs)
        states, actions = np.divmod(members, 10)
        row, column, right, up = (part[states] for part in env.bodies)
        below = np.where((up <= 0) & np.isin(grid[row + 1, column], list("cid")), grid[row + 1, column], "")
        assert [len(np.unique(same)) for same in (actions, right, up, below)] == [1, 1, 1, 1]


def test_level_has_at_most_three_thousand_states() -> None:
    assert 1000 < DiscretePlatformer().mdp.n_states <= 3000


def test_a_level_without_a_bottom_is_refused() -> None:
    with pytest.raises(ValueError, match="level must have only blocks and lava in its lowest row, got 'cc-c'"):
        DiscretePlatformer("ass-\ncc-c")
