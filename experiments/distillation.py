"""Policy distillation under attack: CartPole's undefended DQN and PPO, and robust students of theirs.

    python experiments/distillation.py [dqn|ppo ...]      # resumes where it stopped

Teachers from `zoo/`, 200 steps, never trained against anything. Students: a plain swish network, trained by N-FGSM, and a Lipschitz
network. Everybody is attacked by the same attackers with a radius in l2 at every step: the margin of another action (PGD with restarts),
and the lowest value of the agent's own critic. An attacker with a larger radius can do what one with a smaller can, so that the attacked return at
a budget is the lowest over attacks and over all budgets up to it. Budgets, attacks and settings were chosen, among some thirty settings, on
other episodes (of other seeds) than those reported; every student was trained with one seed. Writes `experiments/results/distillation/`: `summary.md`, `returns.json` and a figure; students go to
`zoo/students/`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import robustrl as rrl
from robustrl.attacks import GradientAttack, LowValue, Margin
from robustrl.files import save_figure, write_atomically
from robustrl.training.distil import distil_run
from robustrl.training.run_files import RunInfo
from robustrl.training.supervised import NFGSM

RESULTS, ZOO = Path("experiments/results/distillation"), Path("zoo")
COMMON: dict[str, Any] = {"norm": 2, "epochs": 3, "rounds": 5, "batch_size": 256}
SWISH = {"network": "mlp", "activation": "swish"} | COMMON
LIPSCHITZ = {"network": "lipschitz-mlp", "learning_rate": 0.03} | COMMON
SHORT = NFGSM(k=1.0, alpha=0.5)
STUDENTS: dict[str, dict[str, dict[str, Any]]] = {
    "dqn": {
        "swish": SWISH | {"epsilon": 0.1, "attack": SHORT, "observations": 12_000},
        "lipschitz": LIPSCHITZ | {"epsilon": 0.1, "attack": SHORT, "observations": 12_000},
    },
    "ppo": {
        "swish": SWISH | {"epsilon": 0.05, "attack": "n-fgsm", "observations": 8_000},
        "lipschitz": LIPSCHITZ | {"epsilon": 0.05, "attack": "fgsm-rs", "observations": 8_000},
    },
}
ATTACKS = {"margin": GradientAttack(Margin(), restarts=2), "critic": GradientAttack(LowValue(), restarts=2)}


@dataclass(frozen=True)
class Settings:
    """Everything else that a number in the results depends on.

    Attributes:
        budgets: l2 radii of every step.
        episodes: per agent, attack and budget.
        seed: of the reported episodes.
    """

    budgets: tuple[float, ...] = (0.1, 0.2, 0.3)
    episodes: int = 50
    seed: int = 2021


SETTINGS = Settings()


def agents(algo: str) -> dict[str, tuple[Any, rrl.EnvRecipe]]:
    """The teacher and its students; those that are missing are trained."""
    folder = ZOO / f"cartpole-{algo}-undefended"
    recipe, teacher = RunInfo.load(folder).env, rrl.load_agent(folder, device="cpu")
    found = {"teacher": (teacher, recipe)}
    for name, options in STUDENTS[algo].items():
        out = ZOO / "students" / f"cartpole-{algo}-{name}"
        if not (out / "model.zip").exists():
            begin = time.perf_counter()
            distil_run(teacher, recipe, out, progress_bar=True, **options)
            print(f"{out}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
        found[name] = (rrl.load_agent(out, device="cpu"), recipe)
    return found


def attacked(model: Any, recipe: rrl.EnvRecipe, known: dict[str, float], save: Any) -> dict[str, float]:
    """Mean returns by "attack budget", and "clean"; what is known is not played again."""
    for budget in SETTINGS.budgets:
        for name, attack in ATTACKS.items():
            key = f"{name} {budget:g}"
            if key in known:
                continue
            threat = rrl.ThreatModel(norm=2, step=budget)
            report = rrl.attack_policy(model, recipe, attack, threat, SETTINGS.episodes, seed=SETTINGS.seed)
            known["clean"], known[key] = report.clean_mean, report.mean
            save()
            print(f"  {key}: {report.mean:.1f} (clean {report.clean_mean:.1f})", flush=True)
    return known


def lowest(found: dict[str, float]) -> list[float]:
    """Attacked returns at the budgets: no better than at any smaller one."""
    worst = [min(found[f"{name} {budget:g}"] for name in ATTACKS) for budget in SETTINGS.budgets]
    return np.minimum.accumulate([min(found["clean"], worst[0]), *worst[1:]]).tolist()


def run(algos: list[str]) -> None:
    """Train, attack and report what is missing."""
    path = RESULTS / "returns.json"
    returns: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text()) if path.exists() else {}

    def save() -> None:
        write_atomically(path, json.dumps(returns, indent=1).encode())

    for algo in algos:
        for name, (model, recipe) in agents(algo).items():
            print(f"{algo} {name}", flush=True)
            attacked(model, recipe, returns.setdefault(algo, {}).setdefault(name, {}), save)
    columns = ["agent", "clean", *(f"{budget:g}" for budget in SETTINGS.budgets)]
    lines = [
        "# Distillation under attack",
        "",
        "Mean returns of 200; l2 radius per step, the lowest over attacks and smaller radii.",
        "",
    ]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for ax, (algo, rows) in zip(np.ravel(figure.subplots(1, max(2, len(returns)))), sorted(returns.items()), strict=False):
        for name, found in rows.items():
            values = [found["clean"], *lowest(found)]
            lines.append(f"| {algo} {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
            ax.plot([0, *SETTINGS.budgets], values, "o-", label=name)
        ax.set(title=f"CartPole, {algo}", xlabel="l2 radius per step", ylabel="attacked mean return", ylim=(0, 205))
        ax.grid(alpha=0.3)
        ax.legend()
    save_figure(figure, RESULTS / "returns.png")
    lines += [
        "",
        "Students:",
        *(f"- {algo} {name}: `{options!r}`" for algo, each in STUDENTS.items() for name, options in each.items()),
    ]
    lines += ["", f"`python experiments/distillation.py`; {SETTINGS!r}, attacks {ATTACKS!r}"]
    write_atomically(RESULTS / "summary.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algos", nargs="*", default=list(STUDENTS))
    run(parser.parse_args().algos)
