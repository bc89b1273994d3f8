"""Planning and safe sets on a map of 100 x 100 cells, beside loops over pairs and slots, on one core.

    python benchmarks/bench_exploration.py [--rounds 9] [--out benchmarks/results/exploration.json]

8 actions whose landing cell is one of three; 2 % of the cells and the border are lava. "sweep" is one optimistic backup of all pairs
that have such a ball around three outcomes; "window" the same before learning, when half of the pairs may land anywhere in a window of
5 x 5 cells. "plan" is a whole optimisation for the latter, cold and continued after 1 % of the balls have shrunk. "expand" finds the
safe set from a home of 5 x 5 cells, all outcomes known. The naive loops do the same, pair by pair; they and the arrays take turns
round by round, because a shared machine's speed drifts; ratios are medians over rounds. "step" is what ASE does with one step of a
shipped map: counting it for all analogues, and a look at what it proves. Seconds are CPU time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from robustrl.agents import ASE
from robustrl.mdp import Beliefs, Outcomes, closed_subset, expand, optimise

SIDE, GAMMA = 100, 0.95
WINDOW = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
MOVES = [(dy * n, dx * n) for n in (1, 2) for dy, dx in ((-1, 0), (0, 1), (1, 0), (0, -1))]


def world() -> tuple[Outcomes, np.ndarray, np.ndarray]:
    """What is declared of the map, the true probabilities (S, A, K), and the home set (S, A)."""
    rng = np.random.default_rng(0)
    lava = rng.random((SIDE, SIDE)) < 0.02
    lava[[0, 1, -2, -1]] = lava[:, [0, 1, -2, -1]] = True
    lava[40:60, 40:60] = False
    goal = np.zeros_like(lava)
    goal[80, 80], lava[80, 80] = True, False
    y, x = np.divmod(np.arange(SIDE * SIDE), SIDE)
    to_y, to_x = (axis[:, None] + np.array(WINDOW)[:, i] for i, axis in ((0, y), (1, x)))
    floor = ~(lava | goal).ravel()
    candidates = floor[:, None] & (to_y >= 0) & (to_y < SIDE) & (to_x >= 0) & (to_x < SIDE)
    successors = np.where(candidates, to_y * SIDE + to_x, 0)
    law = np.zeros((len(MOVES), len(WINDOW)))
    for a, (dy, dx) in enumerate(MOVES):
        side = (int(dx != 0), int(dy != 0))
        for sign, chance in ((0, 0.4), (-1, 0.3), (1, 0.3)):
            law[a, WINDOW.index((dy + sign * side[0], dx + sign * side[1]))] = chance
    shape = (len(y), len(MOVES), len(WINDOW))
    everywhere = {
        "successors": successors, "candidates": candidates, "dangerous": lava.ravel()[successors] & candidates,
        "terminal": ~floor[successors] & candidates, "rewards": np.where(candidates, goal.ravel()[successors] * 1.0, 0.0),
    }  # fmt: skip
    slots = {name: np.broadcast_to(table[:, None], shape) for name, table in everywhere.items()}
    start = np.eye(len(y))[50 * SIDE + 50]
    outcomes = Outcomes(**slots, gamma=GAMMA, start=start)
    p = np.where(floor[:, None, None], law, 0.0)
    square = (np.abs(y - 50) <= 4) & (np.abs(x - 50) <= 4)
    home = closed_subset(outcomes, outcomes.valid & square[:, None], p > 0)
    return outcomes, p, home


def naive_sweep(beliefs: Beliefs, values: np.ndarray) -> np.ndarray:
    """One optimistic backup in plain Python."""
    known, found = beliefs.outcomes, np.full(beliefs.radii.shape, -np.inf)
    successors, rewards, terminal = known.successors.tolist(), known.rewards.tolist(), known.terminal.tolist()
    worth, p, radii = values.tolist(), beliefs.estimates.tolist(), beliefs.radii.tolist()
    for s, a in np.argwhere(beliefs.support.any(-1)).tolist():
        slots = np.flatnonzero(beliefs.support[s, a]).tolist()
        ends, ahead = terminal[s][a], successors[s][a]
        ranked = sorted((rewards[s][a][k] + (0.0 if ends[k] else GAMMA * worth[ahead[k]]), p[s][a][k]) for k in slots)
        left = moved = min(radii[s][a] / 2, 1.0)
        total = 0.0
        for utility, mass in ranked:
            taken = min(left, mass)
            left -= taken
            total += (mass - taken) * utility
        found[s, a] = total + (moved - left if radii[s][a] < 2 else 1.0) * ranked[-1][0]
    return found


def naive_expand(outcomes: Outcomes, safe: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The safe extension by sweeps over sets of pairs in plain Python."""
    home, end = set(np.flatnonzero(safe.any(1)).tolist()), -1
    leads = {}
    for s, a in np.argwhere(possible.any(-1) & ~(possible & outcomes.dangerous).any(-1) & ~safe).tolist():
        slots = np.flatnonzero(possible[s, a])
        leads[s, a] = [end if outcomes.terminal[s, a, k] else int(outcomes.successors[s, a, k]) for k in slots]
    size = -1
    while len(leads) != size:
        size = len(leads)
        for forward in (True, False):
            reached, before = home | {end}, -1
            while len(reached) != before:
                before = len(reached)
                for (s, _), after in leads.items():
                    if forward and s in reached:
                        reached.update(after)
                    elif not forward and not reached.isdisjoint(after):
                        reached.add(s)
            leads = {
                pair: after
                for pair, after in leads.items()
                if (pair[0] in reached if forward else not reached.isdisjoint(after))
            }
        owned = home | {end} | {s for s, _ in leads}
        leads = {pair: after for pair, after in leads.items() if owned.issuperset(after)}
    found = safe.copy()
    for pair in leads:
        found[pair] = True
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(fast: Callable[[], np.ndarray], slow: Callable[[], np.ndarray], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds, after a check that both give the same."""
    np.testing.assert_allclose(fast(), slow(), atol=1e-12)
    times = [(seconds(fast), seconds(slow)) for _ in range(rounds)]
    return {
        "ms": round(1e3 * statistics.median(one for one, _ in times), 2),
        "naive ms": round(1e3 * statistics.median(other for _, other in times), 1),
        "ratio": round(statistics.median(other / one for one, other in times), 1),
    }


def step(name: str) -> float:
    """Median microseconds to learn from a step: 2,000 random ones in the first safe set of a shipped map."""
    world: Any = gym.make("robustrl/LavaIslands-v0", map=name).unwrapped
    knowledge, rng = ASE(world, seed=0).knowledge, np.random.default_rng(0)
    pairs = np.argwhere(world.safe_set)[rng.integers(world.safe_set.sum(), size=2_000)].tolist()
    draws = [(s, a, int(rng.choice(world.mdp.probabilities[s, a].size, p=world.mdp.probabilities[s, a]))) for s, a in pairs]
    times = [seconds(lambda draw=draw: knowledge.record(*draw)) for draw in draws]
    return round(1e6 * statistics.median(times), 1)


def measure(rounds: int) -> dict[str, object]:
    outcomes, p, home = world()
    rng, support = np.random.default_rng(1), p > 0
    fresh = outcomes.valid & (rng.random(outcomes.valid.shape) < 0.5)
    radii = np.where(outcomes.valid, rng.random(outcomes.valid.shape), 0.0)
    learnt = Beliefs(outcomes, p, radii, support)
    early = (outcomes, p, np.where(fresh, 2.0, radii))
    window = np.where(fresh[..., None], outcomes.candidates, support)
    shrunk = (outcomes, p, np.where(rng.random(radii.shape) < 0.01, 0.9, 1.0) * early[2])
    values = rng.random(outcomes.n_states)
    found: dict[str, object] = {"states": outcomes.n_states, "pairs": int(outcomes.valid.sum()), "slots": outcomes.n_slots}
    for name, beliefs in (("sweep", learnt), ("window", Beliefs(*early, window))):
        # A plan with a tolerance that its first sweep meets is one sweep: what is public, checks and all.
        def sweep(beliefs: Beliefs = beliefs) -> np.ndarray:
            return optimise(beliefs, allowed=outcomes.valid, initial=values, tolerance=1e9).action_values

        found[name] = compared(
            sweep, lambda beliefs=beliefs: naive_sweep(beliefs, np.where(outcomes.valid.any(1), values, 0)), rounds
        )
    found["expand"] = compared(
        lambda: expand(outcomes, home, outcomes.valid, support), lambda: naive_expand(outcomes, home, support), rounds
    )
    found["safe pairs"] = int(expand(outcomes, home, outcomes.valid, support).sum())
    plan = optimise(Beliefs(*early, window), allowed=outcomes.valid)
    cold, warm = [], []
    for _ in range(rounds):
        cold.append(seconds(lambda: optimise(Beliefs(*early, window), allowed=outcomes.valid)))
        warm.append(seconds(lambda: optimise(Beliefs(*shrunk, window), allowed=outcomes.valid, initial=plan.values)))
    found["plan ms"] = {"cold": round(1e3 * statistics.median(cold), 1), "warm": round(1e3 * statistics.median(warm), 1)}
    found["sweeps of the cold plan"] = plan.sweeps
    found["step us"] = {name: step(name) for name in ("two_islands", "five_islands", "archipelago")}
    found["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exploration.json"))
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(json.dumps(found, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"numpy": np.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
