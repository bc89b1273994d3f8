"""What attackers pay, and the worst of a tree, against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from robustrl.certify import explored
from robustrl.certify.explored import Accounting, Explored, worst_returns
from robustrl.policy import push_frame, start_stack


def stacks(changes: Any, k: int, padding: Any) -> Any:
    """Changes of the stacks (T, k, d) that changes of frames (T, d) make, by the library's own stacking."""
    stack = start_stack(changes[:1], k, padding)
    found = [stack[0]]
    for t in range(1, len(changes)):
        stack = push_frame(stack, changes[t : t + 1])
        found.append(stack[0])
    return np.array(found)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["reset", "zero"])
def test_no_change_of_frames_pays_for_more_than_its_budget(k: int, padding: Any) -> None:
    rng = np.random.default_rng(k)
    for trial in range(400):
        changes = rng.normal(size=(7, 2)) * (rng.random((7, 1)) < rng.random())
        if trial < 7:
            changes = np.eye(7)[trial][:, None] * [3.0, 4.0]
        moved, times = stacks(changes, k, padding), np.arange(7)
        costs = np.sqrt((moved**2).sum((1, 2)))
        sizes = np.sqrt((changes**2).sum(1))
        per_step, episode = Accounting("step", 2, k, padding), Accounting("episode", 2, k, padding)
        assert per_step.charges(costs, times).max() <= sizes.max() * (1 + 1e-12)
        assert episode.charges(costs, times).sum() <= (sizes**2).sum() * (1 + 1e-12)
        assert Accounting("step", math.inf, k, padding).charges(abs(moved).max((1, 2)), times).max() <= abs(changes).max()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_weights_cannot_be_smaller(k: int) -> None:
    """A change of the first frame alone pays k (k + 1) / 2 times with copies of it in the first stack, k times for others."""
    first = np.zeros((9, 1))
    first[0] = 1.0
    for padding, copies in (("reset", k * (k + 1) / 2), ("zero", k)):
        moved = stacks(first, k, padding)
        assert (moved**2).sum() == copies
        charges = Accounting("episode", 2, k, padding).charges(np.sqrt((moved**2).sum((1, 2))), np.arange(9))
        assert charges.sum() == pytest.approx(1.0)
    constant = np.ones((9, 1))
    assert Accounting("step", 2, k).charges(
        np.sqrt((stacks(constant, k, "reset") ** 2).sum((1, 2))), np.arange(9)
    ).max() == pytest.approx(1)


def layered(rng: Any, layers: int, width: int, actions: int) -> Explored:
    """A random process with joined states; the last layer has ended, and so have some before."""
    times = np.repeat(np.arange(layers + 1), [1, *[width] * layers]).astype(np.int32)
    ended = (times == layers) | ((times > 0) & (rng.random(len(times)) < 0.15))
    parents, numbers = np.divmod(np.arange(len(times) * actions), actions)
    keep = ~ended[parents]
    parents, numbers = parents[keep], numbers[keep]
    children = 1 + times[parents] * width + rng.integers(width, size=len(parents))
    children[rng.random(len(parents)) < 0.1] = -1
    costs = rng.random(len(parents)) * (numbers > 0)
    rewards = np.where(children < 0, 0.0, rng.integers(-3, 4, size=len(parents)) / 2)
    kinds = (np.int64, np.int32, np.int32, np.bool_, np.int32, np.int32, np.int32, np.float64, np.float64)
    columns = ([7], [0], times, ended, parents, numbers, children, rewards, costs)
    return Explored(*(np.asarray(c, dtype=kind) for c, kind in zip(columns, kinds, strict=True)))


def by_hand(tree: Explored, accounting: Accounting, budget: float, horizon: int, rest: float) -> tuple[float, float]:
    """Every path, one by one."""
    edges = {s: np.flatnonzero(tree.parents == s) for s in range(len(tree.times))}
    best = [math.inf, math.inf]

    def follow(state: int, paid: list[float], earned: float) -> None:
        if tree.ended[state]:
            best[0] = min(best[0], earned)
            return
        for e in edges[state]:
            charge = float(accounting.charges(tree.costs[e : e + 1], tree.times[state])[0])
            total = max([*paid, charge]) if accounting.per == "step" else sum([*paid, charge])
            if total > accounting.limits(np.array([budget]))[0]:
                continue
            if tree.children[e] < 0:
                best[1] = min(best[1], earned + (horizon - int(tree.times[state])) * rest)
            else:
                follow(int(tree.children[e]), [*paid, charge], earned + float(tree.rewards[e]))

    follow(0, [], 0.0)
    return best[0], best[1]


@pytest.mark.parametrize("per", ["step", "episode"])
@pytest.mark.parametrize("seed", range(6))
def test_worst_returns_are_those_of_all_paths(per: Any, seed: int) -> None:
    rng, budgets = np.random.default_rng(seed), np.array([0.9, 0.0, 0.2, 0.5])
    tree, accounting = layered(rng, 5, 3, 3), Accounting(per, 2, 2)
    tree.check(5, -1.5, False)
    played, cut = worst_returns(tree, accounting, budgets, 5, -1.5)
    for k, budget in enumerate(budgets):
        assert (played[0, k], cut[0, k]) == pytest.approx(by_hand(tree, accounting, budget, 5, -1.5))


def test_joined_accounts_stay_below(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = np.array([0.0, 0.3, 0.6, 1.0, 1.5])
    looser = 0
    for seed in range(20):
        tree, accounting = layered(np.random.default_rng(seed), 6, 3, 3), Accounting("episode")
        exact = np.minimum(*worst_returns(tree, accounting, budgets, 6, -1.5))
        monkeypatch.setattr(explored, "MOST_LABELS", 2)
        joined = np.minimum(*worst_returns(tree, accounting, budgets, 6, -1.5))
        monkeypatch.undo()
        assert np.all(joined <= exact)
        looser += int((joined < exact).any())
    assert looser > 0


def changed(tree: Explored, name: str, place: int, value: Any) -> Explored:
    column = getattr(tree, name).copy()
    column[place] = value
    return tree._replace(**{name: column})


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        ("roots", 0, 1, "roots"),
        ("times", 0, 1, "roots|children"),
        ("times", -1, 9, "times"),
        ("ended", -1, False, "horizon"),
        ("ended", 0, True, "roots|have not ended"),
        ("parents", 0, -1, "parents"),
        ("parents", 0, 10**6, "parents"),
        ("children", 0, 10**6, "parents"),
        ("children", 0, -2, "children"),
        ("children", 0, 0, "one step later"),
        ("actions", 0, 1, "once"),
        ("costs", 1, -0.1, "costs"),
        ("costs", 1, math.nan, "costs"),
        ("costs", 0, 0.1, "nothing"),
        ("rewards", 0, math.inf, "rewards"),
        ("rewards", 0, -2.0, "rewards"),
    ],
)
def test_impossible_trees_are_refused(name: str, place: int, value: Any, words: str) -> None:
    tree = layered(np.random.default_rng(4), 5, 3, 3)
    assert tree.children[0] >= 0
    with pytest.raises(ValueError, match=words):
        changed(tree, name, place, value).check(5, -1.5, False)
    with pytest.raises(ValueError, match="never_ends_early"):
        tree.check(5, -1.5, True)


def test_accounts_are_checked() -> None:
    for arguments in (("day",), ("step", 0), ("episode", math.inf), ("step", 2, 0), ("step", 2, 1, "mirror")):
        with pytest.raises(ValueError, match="must be"):
            Accounting(*arguments)
    assert [str(Accounting(*a)) for a in itertools.product(("step",), (1, math.inf))] == [
        "l1 budget per step",
        "linf budget per step",
    ]
