"""Certified and attacked CartPole: 1 and 5 frames, sigma 0.2 and 0.4, the undefended agents attacked.

    python experiments/cartpole.py                       # everything; resumes where it stopped
    python experiments/cartpole.py --episodes 10000      # certificates from 10,000 episodes only

The setting of Kumar, Levine, Feizi (ICLR 2022): 200 steps, whole-episode l2 budgets 0..1, confidence 95%. Policies come
from `zoo/` (see zoo/README.md for the commands that trained them). Per policy the script writes into
`experiments/results/cartpole/<policy>/`: a certificate per number of episodes (with all returns as evidence), the attack
reports, and a figure; and for all of them `summary.md` and `curves.png`. Attacks: the paper's at several thresholds and the
minimal-flip attack; the strongest per budget is the one to look at, and it is a selection, so its mean is an estimate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import robustrl as rrl
from robustrl.attacks import FlipAttack, MinimalFlip, SmoothedPGD
from robustrl.files import save_figure
from robustrl.report.attack import AttackReport, load_reports, save_reports
from robustrl.report.figures import certificate_figure


@dataclass(frozen=True)
class Settings:
    """Everything that a number in the results depends on."""

    budgets: tuple[float, ...] = tuple(float(b) for b in np.round(np.linspace(0, 1, 11), 10))
    """Certified budgets."""
    attack_budgets: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Attacked budgets, the paper's."""
    attack_episodes: int = 200
    """Episodes per attack and budget."""
    attacks: tuple[FlipAttack, ...] = (
        SmoothedPGD(threshold=0.0),
        SmoothedPGD(threshold=1.0),
        MinimalFlip(confidence=0.8, threshold=1.0),
    )
    """On smoothed agents. The thresholds are in units of the policy's logits."""
    undefended_attacks: tuple[FlipAttack, ...] = (
        SmoothedPGD(draws=1),
        SmoothedPGD(draws=1, threshold=4.0),
        MinimalFlip(draws=1, threshold=4.0),
    )
    """On undefended agents: no noise to average over."""
    smoothed: tuple[str, ...] = (
        "cartpole-ppo-sigma0.2",
        "cartpole-ppo-sigma0.4",
        "cartpole-ppo-sigma0.2-5frames",
        "cartpole-ppo-sigma0.4-5frames",
    )
    undefended: tuple[str, ...] = ("cartpole-ppo-undefended", "cartpole-ppo-undefended-5frames")
    alpha: float = 0.05
    seed: int = 2022


RESULTS, CACHE = Path("experiments/results/cartpole"), Path("experiments/cache/cartpole")


def certify(name: str, episodes: int, settings: Settings, workers: int) -> rrl.EpisodeCertificate:
    """The certificate of one policy from `episodes` episodes; loaded if it is there already."""
    path = RESULTS / name / f"certificate-{episodes}.json"
    if path.exists():
        return rrl.EpisodeCertificate.load(path)
    recipe = rrl.EnvRecipe.of(_run(name).env)
    model = rrl.load_agent(Path("zoo") / name, device="cpu")
    certificate = rrl.certify_policy(
        model,
        recipe,
        settings.budgets,
        episodes,
        alpha=settings.alpha,
        seed=settings.seed,
        n_workers=workers,
        out=CACHE / name / "chunks",
        progress_bar=True,
    )
    certificate.save(path)
    return certificate


def attack(name: str, settings: Settings, workers: int, certificate: rrl.EpisodeCertificate | None) -> list[AttackReport]:
    """Reports of every attack at every budget; finished ones are kept."""
    path = RESULTS / name / "attack.json"
    reports = load_reports(path) if path.exists() else []
    done = {(json.dumps(r.attack, sort_keys=True), r.budget) for r in reports}
    model, recipe = rrl.load_agent(Path("zoo") / name, device="cpu"), rrl.EnvRecipe.of(_run(name).env)
    for attacker in settings.attacks if certificate is not None else settings.undefended_attacks:
        for budget in settings.attack_budgets:
            if (json.dumps(attacker.to_dict(), sort_keys=True), budget) in done:
                continue
            threat = rrl.ThreatModel(norm=2, episode=budget)
            reports.append(
                rrl.attack_policy(
                    model,
                    recipe,
                    attacker,
                    threat,
                    settings.attack_episodes,
                    certificate=certificate,
                    alpha=settings.alpha,
                    seed=settings.seed + 1,
                    n_workers=workers,
                )
            )
            save_reports(path, reports)
            print(name, reports[-1].attack, f"B={budget:g}: {reports[-1].clean_mean:.1f} -> {reports[-1].mean:.1f}", flush=True)
    return reports


def _run(name: str) -> object:
    from robustrl.training.run_files import RunInfo

    return RunInfo.load(Path("zoo") / name)


def paper_value(certificate: rrl.EpisodeCertificate) -> np.ndarray:
    """The published method (Clopper-Pearson on 200 thresholds from 0) on the same returns."""
    returns = np.asarray(certificate.evidence)
    return rrl.certify_return(
        returns, certificate.noise, certificate.budgets, alpha=certificate.alpha, method="paper", return_low=0, return_high=200
    ).values


def summarise(
    curves: dict[str, dict[int, rrl.EpisodeCertificate]], attacks: dict[str, list[AttackReport]], settings: Settings
) -> None:
    """`summary.md` and `curves.png`."""
    shown = [0.0, *settings.attack_budgets]
    lines = ["# CartPole, 200 steps: certified and attacked mean return", "", "Command: `python experiments/cartpole.py`", ""]
    header = "| policy | row | " + " | ".join(f"B={b:g}" for b in shown) + " |"
    lines += [header, "|" + "---|" * (len(shown) + 2)]
    for name, by_n in curves.items():
        for n, certificate in by_n.items():
            index = [int(np.flatnonzero(np.isclose(certificate.budgets, b))[0]) for b in shown]
            rows = {
                f"certified, n={n:,}": certificate.values,
                f"paper's method, n={n:,}": paper_value(certificate),
                f"plug-in, n={n:,}": certificate.plug_in,
            }
            lines += [
                f"| {name} | {row} | " + " | ".join(f"{values[i]:.2f}" for i in index) + " |" for row, values in rows.items()
            ]
        lines.append(_attack_row(name, attacks[name], settings))
    lines += [_attack_row(name, attacks[name], settings) for name in settings.undefended]
    (RESULTS / "summary.md").write_text("\n".join(lines) + "\n")

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for ax, (name, by_n) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        for n, certificate in by_n.items():
            ax.plot(certificate.budgets, certificate.values, "o-", ms=3, label=f"certified, n = {n:,}")
        ax.plot(
            certificate.budgets, paper_value(by_n[min(by_n)]), ":", color="grey", label=f"paper's method, n = {min(by_n):,}"
        )
        budgets, means = _strongest(attacks[name])
        ax.plot([0, *budgets], [attacks[name][0].clean_mean, *means], "s-", ms=3, color="tab:red", label="best attack")
        plain = settings.undefended["5frames" in name]
        budgets, means = _strongest(attacks[plain])
        ax.plot(
            [0, *budgets],
            [attacks[plain][0].clean_mean, *means],
            "s--",
            ms=3,
            color="black",
            label="undefended agent, best attack",
        )
        ax.set(title=name, xlabel="episode budget (l2)", ylabel="mean return under attack", ylim=(0, 208))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save_figure(figure, RESULTS / "curves.png")


def _strongest(reports: list[AttackReport]) -> tuple[list[float], list[float]]:
    budgets = sorted({r.budget for r in reports})
    return budgets, [min(r.mean for r in reports if r.budget == b) for b in budgets]


def _attack_row(name: str, reports: list[AttackReport], settings: Settings) -> str:
    _, means = _strongest(reports)
    return (
        f"| {name} | best attack, n={settings.attack_episodes} | {reports[0].clean_mean:.2f} | "
        + " | ".join(f"{m:.2f}" for m in means)
        + " |"
    )


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings()
    curves = {
        name: {n: certify(name, n, settings, arguments.workers) for n in arguments.episodes} for name in settings.smoothed
    }
    attacks = {name: attack(name, settings, arguments.workers, curves[name][min(curves[name])]) for name in settings.smoothed}
    attacks |= {name: attack(name, settings, arguments.workers, None) for name in settings.undefended}
    for name in settings.smoothed:
        save_figure(
            certificate_figure(curves[name][max(curves[name])], attacks[name], title=name), RESULTS / name / "curve.png"
        )
    summarise(curves, attacks, settings)
    print((RESULTS / "summary.md").read_text())


if __name__ == "__main__":
    main()
