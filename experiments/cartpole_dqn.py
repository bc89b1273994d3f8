"""CartPole with DQN: smoothed and undefended, under the policy-smoothing paper's attack and a minimal one, over budgets.

    python experiments/cartpole_dqn.py [--episodes 10000]

The setting of experiments/cartpole.py (200 steps, whole-episode l2 budgets) for the other of the two algorithms. Policies come from zoo/.
Writes a certificate, attack reports, `summary.md` and `curves.png` to experiments/results/cartpole_dqn/; what is there is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import robustrl as rrl
from robustrl.attacks import FlipAttack, MinimalFlip, SmoothedPGD
from robustrl.files import save_figure, write_atomically
from robustrl.report.attack import AttackReport, load_reports, save_reports
from robustrl.training.run_files import RunInfo

RESULTS, ZOO = Path("experiments/results/cartpole_dqn"), Path("zoo")
BUDGETS, CERTIFIED, ATTACKED, SEED = (0.2, 0.4, 0.6, 0.8, 1.0), np.round(np.linspace(0, 1, 11), 10), 200, 2022
ATTACKS: dict[str, tuple[FlipAttack, ...]] = {
    "cartpole-dqn-undefended": (
        SmoothedPGD(draws=1),
        SmoothedPGD(draws=1, threshold=0.5),
        MinimalFlip(draws=1, threshold=0.5),
    ),
    "cartpole-dqn-sigma0.2": (SmoothedPGD(), SmoothedPGD(threshold=0.5), MinimalFlip(confidence=0.8, threshold=0.5)),
}
"""The thresholds are differences of action values."""


def certificate(name: str, episodes: int, workers: int) -> rrl.EpisodeCertificate:
    """The certificate of a smoothed policy."""
    path = RESULTS / f"certificate-{episodes}.json"
    if not path.exists():
        model, recipe = rrl.load_agent(ZOO / name, device="cpu"), RunInfo.load(ZOO / name).env
        options = {"alpha": 0.05, "seed": SEED, "n_workers": workers, "progress_bar": True}
        rrl.certify_policy(model, recipe, CERTIFIED, episodes, **options).save(path)
    return rrl.EpisodeCertificate.load(path)


def attacked(name: str, workers: int) -> dict[float, AttackReport]:
    """The strongest report of every budget."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        model, recipe = rrl.load_agent(ZOO / name, device="cpu"), RunInfo.load(ZOO / name).env
        reports = [
            rrl.attack_policy(
                model, recipe, attack, rrl.ThreatModel(norm=2, episode=b), ATTACKED, seed=SEED + 1, n_workers=workers
            )
            for attack in ATTACKS[name]
            for b in BUDGETS
        ]
        save_reports(path, reports)
    found = load_reports(path)
    return {b: min((r for r in found if r.budget == b), key=lambda r: r.mean) for b in BUDGETS}


def main() -> None:
    """Certify and attack what is missing; write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    _, smoothed = ATTACKS
    proof = certificate(smoothed, arguments.episodes, arguments.workers)
    found = {name: attacked(name, arguments.workers) for name in ATTACKS}

    lines = [
        "# CartPole, 200 steps, DQN: certified and attacked mean return",
        "",
        "Command: `python experiments/cartpole_dqn.py`",
        "",
    ]
    lines += ["| policy | row | B=0 | " + " | ".join(f"B={b:g}" for b in BUDGETS) + " |", "|" + "---|" * (len(BUDGETS) + 3)]
    shown = [int(np.flatnonzero(np.isclose(proof.budgets, b))[0]) for b in (0.0, *BUDGETS)]
    cells = [f"{proof.values[i]:.2f}" for i in shown]
    lines.append(f"| {smoothed} | certified, n={arguments.episodes:,} | " + " | ".join(cells) + " |")
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    ax = figure.subplots()
    ax.plot(proof.budgets, proof.values, "o-", ms=3, label=f"smoothed, certified (n = {arguments.episodes:,})")
    for name, reports in found.items():
        means = [reports[BUDGETS[0]].clean_mean, *(reports[b].mean for b in BUDGETS)]
        lines.append(f"| {name} | best attack, n={ATTACKED} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
        ax.plot([0, *BUDGETS], means, "s-" if name == smoothed else "s--", ms=3, label=f"{name.split('-')[-1]}, best attack")
    ax.set(xlabel="episode budget (l2)", ylabel="mean return", ylim=(0, 208), title="CartPole, DQN")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    write_atomically(RESULTS / "summary.md", "\n".join([*lines, ""]).encode())
    save_figure(figure, RESULTS / "curves.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
