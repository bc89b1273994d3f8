"""ASE against seven other learners in three worlds: unsafe visits, sub-optimal steps, what was proven safe.

    python experiments/exploration.py [--only two-islands] [--workers 2]

Two islands (the setting of a first prototype): 50 seeds of ASE and undirected ASE with the true smallest probability, .3, as
tau, 10 with tau = .1, 10 of every other learner. Five islands: 10 seeds of each; the platformer: 5. Runs that are there are kept. Results go
to experiments/results/exploration/<world>/: `summary.md`, `curves.csv`, `curves.png`, a map and an animation of the safe set growing;
agents, certificates and TensorBoard logs to experiments/cache/exploration/.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import robustrl as rrl
from robustrl.exploration import AGENTS
from robustrl.files import save_figure, write_atomically
from robustrl.report.exploration import ExplorationRun, by_agent, exploration_csv, exploration_figure, exploration_table

RESULTS, CACHE = Path("experiments/results/exploration"), Path("experiments/cache/exploration")


@dataclass(frozen=True)
class World:
    """One comparison: names of agents with how many seeds each, and with which options."""

    env: str
    timesteps: int
    seeds: dict[str, int]
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


OTHERS = {name: 10 for name in AGENTS if not name.endswith("ase")}
WORLDS = {
    "two-islands": World("robustrl/LavaIslands-v0", 2_200, {"ase": 50, "undirected-ase": 50, **OTHERS}),
    "two-islands-tau-0.1": World("robustrl/LavaIslands-v0", 4_200, {"ase": 10}, options={"tau": 0.1}),
    "five-islands": World("robustrl/LavaIslands-v0", 4_000, dict.fromkeys(AGENTS, 10), env_kwargs={"map": "five_islands"}),
    "platformer": World("robustrl/DiscretePlatformer-v0", 12_000, dict.fromkeys(AGENTS, 5)),
}


def paired(runs: list[ExplorationRun]) -> str:
    """Directed against undirected exploration, seed by seed."""
    groups = by_agent(runs)
    if "undirected-ase" not in groups:
        return ""
    directed, undirected = (np.array([run.suboptimal_steps[-1] for run in groups[name]]) for name in ("ase", "undirected-ase"))  # type: ignore[index]
    fewer, other = int((directed < undirected).sum()), int((directed > undirected).sum())
    p = binomtest(fewer, fewer + other, alternative="greater").pvalue if fewer + other else 1.0
    return (
        f"\nDirected exploration takes fewer sub-optimal steps than undirected with {fewer} of {len(directed)} seeds (sign test: "
        f"p = {p:.2g}); {(undirected - directed).mean():.0f} fewer on average.\n"
    )


def compare(name: str, workers: int) -> None:
    """Run what is missing and write the results of one world."""
    world, runs = WORLDS[name], []
    for agent, seeds in world.seeds.items():
        runs += rrl.explore(
            world.env, [agent], seeds=seeds, timesteps=world.timesteps, env_kwargs=world.env_kwargs, options=world.options,
            every=world.timesteps // 100, out=CACHE / name, n_workers=workers,
        )  # fmt: skip
        print(exploration_table(runs[-seeds:]).splitlines()[-1], flush=True)
    out = RESULTS / name
    title = f"{runs[0].env}: mean, smallest and largest over seeds"
    text = [
        f"# {runs[0].env}",
        "",
        f"`python experiments/exploration.py --only {name}`",
        "",
        exploration_table(runs),
        paired(runs),
    ]
    write_atomically(out / "summary.md", "\n".join(text).encode())
    write_atomically(out / "curves.csv", exploration_csv(runs))
    save_figure(exploration_figure(runs, title), out / "curves.png")
    for picture in ("ase-map.png", "ase-growth.gif"):
        shutil.copyfile(CACHE / name / picture, out / picture)


def main() -> None:
    """Compare in every world, or in the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(WORLDS), nargs="+", default=list(WORLDS))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.only:
        compare(name, arguments.workers)


if __name__ == "__main__":
    main()
