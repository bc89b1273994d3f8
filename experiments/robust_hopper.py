"""Hopper-v5 under every attack, l-inf .075 in normalised units: PPO, SA-PPO and ATLA-PPO.

    python experiments/robust_hopper.py [--seeds 0] [--workers 1] [--episodes 50]

Agents come from zoo/ (the commands are in zoo/README.md; other seeds are trained here, into experiments/cache/). Critics and learned
adversaries are trained once per agent into zoo/adversaries/hopper, or experiments/cache/ for other seeds. Reports go to
experiments/results/robust_hopper/; what is there is not computed again. The attackers of the table see neither each other's episodes nor
those that a setting was chosen on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import robustrl as rrl
from robustrl.attacks import ActionDeviation, ActionDirection, Attack, GradientAttack, LowValue, RandomNoise, Weighted
from robustrl.envs import EnvRecipe
from robustrl.files import save_figure, write_atomically
from robustrl.report.attack import AttackReport, load_reports, save_reports
from robustrl.training.presets import mujoco
from robustrl.training.robust_sarsa import ActionValues, fit, gather
from robustrl.training.run_files import RunInfo
from robustrl.training.train import train

ZOO, HERE = Path("zoo"), Path("experiments")
RESULTS, CACHE = HERE / "results" / "robust_hopper", HERE / "cache" / "robust_hopper"
THREAT = rrl.ThreatModel(norm=math.inf, step=0.075, units="normalized")
AGENTS: dict[str, dict[str, Any]] = {
    "ppo-undefended": {"timesteps": 1_000_000},
    "sa-ppo": {"algo": "sa_ppo", "timesteps": 500_000},
    "atla-ppo": {"attack": "learned", "threat": THREAT, "timesteps": 500_000},
}
ADVERSARY_STEPS = 300_000
SARSA = ((0.02, 0.1), (0.05, 0.3), (0.1, 1.0))
"""(epsilon, regularisation) of Robust Sarsa; the strongest on episodes of its own counts."""
CHOICE_EPISODES, CHOICE_SEED, TEST_SEED = 20, 100, 1
LABELS = {
    "none": "none",
    "random": "random corner",
    "min-v": "MinV",
    "mad": "MAD",
    "rs": "RS",
    "rs-shuffled": "RS, shuffled",
    "rs-mad": "RS + MAD",
    "sa-rl": "SA-RL",
    "pa-ad": "PA-AD",
}


def agent(name: str, seed: int) -> tuple[Any, EnvRecipe]:
    """Model and environment; trained if missing."""
    home = ZOO / f"hopper-{name}" if seed == 0 else CACHE / f"hopper-{name}-seed{seed}"
    if not (home / "model.zip").exists():
        begin = time.perf_counter()
        train("Hopper-v5", home, seed=seed, progress_bar=True, **AGENTS[name])
        print(f"{home}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return rrl.load_agent(home, device="cpu"), RunInfo.load(home).env


def critic(model: Any, recipe: EnvRecipe, home: Path, successor: str, evaluate: Callable[[Attack], float]) -> ActionValues:
    """The critic whose attack is the strongest of the settings."""
    path = home.with_name(f"{home.name}-sarsa-{successor}.pt")
    size = int(np.prod(recipe.frame_space.shape)) + int(np.prod(recipe.action_space.shape or ()))
    if not path.exists():
        data, found = gather(recipe.view(model), recipe, 61_440, seed=0), []
        for epsilon, regularisation in SARSA:
            options: dict[str, Any] = {
                "epsilon": epsilon,
                "regularisation": regularisation,
                "epochs": 100,
                "learning_rate": 1e-3,
            }
            values = fit(data, successor=successor, progress=True, **options)  # type: ignore[arg-type]
            found.append((evaluate(GradientAttack(LowValue(values))), options, values))
            print(f"{path.name} {options}: {found[-1][0]:.0f}", flush=True)
        _, options, values = min(found, key=lambda each: each[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values.state_dict(), path)
        record = {"chosen": options, "mean_returns": [[o, m] for m, o, _ in found], "successor": successor, "timesteps": 61_440}
        write_atomically(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    values = ActionValues(size)
    values.load_state_dict(torch.load(path, weights_only=True))
    return values.eval().requires_grad_(False)


def adversary(model: Any, recipe: EnvRecipe, home: Path, name: str, seed: int) -> Attack:
    """A learned attack; its adversary is trained if missing."""
    path, command = home.with_name(f"{home.name}-{name}.zip"), ActionDirection() if name == "pa-ad" else None
    options: dict[str, Any] = {"timesteps": ADVERSARY_STEPS, "path": path, "seed": seed, **mujoco.ppo, "n_steps": 256}
    begin = time.perf_counter()
    attack = rrl.train_adversary(model, recipe, THREAT, command, **options)
    print(f"{path}: {time.perf_counter() - begin:.0f} s", flush=True)
    return attack


def reports_of(name: str, seed: int, episodes: int, workers: int) -> dict[str, AttackReport]:
    """One report per attack."""
    model, recipe = agent(name, seed)
    home = (ZOO / "adversaries" / "hopper" if seed == 0 else CACHE / f"adversaries-seed{seed}") / name

    def attacked(attack: Attack, n: int, number: int) -> AttackReport:
        return rrl.attack_policy(model, recipe, attack, THREAT, n, seed=number, n_workers=workers)

    def chosen(attack: Attack) -> float:
        return attacked(attack, CHOICE_EPISODES, CHOICE_SEED).mean

    def values(successor: str) -> ActionValues:
        return critic(model, recipe, home, successor, chosen)

    makers: dict[str, Callable[[], Attack]] = {
        "random": lambda: RandomNoise("corner"),
        "min-v": lambda: GradientAttack(LowValue()),
        "mad": lambda: GradientAttack(ActionDeviation()),
        "rs": lambda: GradientAttack(LowValue(values("true"))),
        "rs-shuffled": lambda: GradientAttack(LowValue(values("shuffled"))),
        "rs-mad": lambda: GradientAttack(Weighted(((0.99, LowValue(values("true"))), (0.01, ActionDeviation())))),
        "sa-rl": lambda: adversary(model, recipe, home, "sa-rl", seed),
        "pa-ad": lambda: adversary(model, recipe, home, "pa-ad", seed),
    }
    found: dict[str, AttackReport] = {}
    for attack, make in makers.items():
        path = RESULTS / f"seed{seed}" / f"{name}-{attack}.json"
        if not path.exists():
            save_reports(path, [attacked(make(), episodes, TEST_SEED)])
        (found[attack],) = load_reports(path)
        print(
            f"seed {seed} {name} {attack}: clean {found[attack].clean_mean:.0f}, attacked {found[attack].mean:.0f}", flush=True
        )
    return found


def summary(found: dict[int, dict[str, dict[str, AttackReport]]], episodes: int) -> str:
    """The table: mean return and standard deviation over episodes, one row per agent and seed."""
    lines = ["# Hopper-v5, l-inf .075 in normalised units", ""]
    lines += [
        f"`python experiments/robust_hopper.py`; mean return of {episodes} episodes and their standard deviation, greedy actions",
        "",
    ]
    lines += ["| agent | seed | " + " | ".join(LABELS.values()) + " | worst |", "|---" * (len(LABELS) + 3) + "|"]
    for seed, agents in found.items():
        for name, reports in agents.items():
            clean = next(iter(reports.values())).clean
            rows = [clean, *(reports[attack].returns for attack in LABELS if attack != "none")]
            cells = [f"{row.mean():.0f} ± {row.std(ddof=1):.0f}" for row in rows]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + f" | {min(row.mean() for row in rows):.0f} |")
    return "\n".join([*lines, ""])


def figure(agents: dict[str, dict[str, AttackReport]]) -> Figure:
    """Bars by agent and attack."""
    picture = Figure(figsize=(9, 3.8), layout="constrained")
    ax = picture.subplots()
    width = 0.8 / len(agents)
    for i, (name, reports) in enumerate(agents.items()):
        rows = [next(iter(reports.values())).clean, *(reports[attack].returns for attack in LABELS if attack != "none")]
        errors = [1.96 * row.std(ddof=1) / math.sqrt(len(row)) for row in rows]
        ax.bar(
            np.arange(len(rows)) + (i - (len(agents) - 1) / 2) * width,
            [row.mean() for row in rows],
            width,
            yerr=errors,
            label=name,
            error_kw={"lw": 1},
        )
    ax.set_xticks(range(len(LABELS)), list(LABELS.values()), fontsize=8)
    ax.set_ylabel("mean return (95 % over episodes)")
    ax.set_title("Hopper-v5, every observation moved by up to .075 standard deviations")
    ax.legend(loc="upper left")
    return picture


def main() -> None:
    """Train and attack what is missing; write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    found = {
        seed: {name: reports_of(name, seed, arguments.episodes, arguments.workers) for name in arguments.agents}
        for seed in arguments.seeds
    }
    write_atomically(RESULTS / "summary.md", summary(found, arguments.episodes).encode())
    save_figure(figure(found[arguments.seeds[0]]), RESULTS / "returns.png")
    print(summary(found, arguments.episodes))


if __name__ == "__main__":
    main()
