"""What the experiments on a single policy have in common: certify, attack, write results that resume."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import robustrl as rrl
from robustrl.attacks.base import Attack
from robustrl.envs.units import frame_units
from robustrl.files import save_figure, write_atomically
from robustrl.report.attack import AttackReport, attack_table, load_reports, save_reports
from robustrl.report.figures import certificate_figure
from robustrl.training.run_files import RunInfo

RESULTS, CACHE, ZOO = Path("experiments/results"), Path("experiments/cache"), Path("zoo")


@dataclass(frozen=True)
class Settings:
    """Everything that a number in the results depends on.

    Attributes:
        policy: folder in `zoo/`; zoo/README.md has the command that trained it.
        budgets: certified whole-episode l2 budgets, in the units of the noise.
        episodes: certified episodes.
        success_at: certify the probability of a return of at least this; None for the mean return.
        attacks: attackers; every one at every attacked budget.
        attack_budgets: attacked budgets.
        attack_episodes: episodes per attack and budget.
        deterministic: greedy actions, or sampled ones.
        alpha: failure probability of the certificate, and of every row of the attack table on its own.
        seed: of the certified episodes; the attacked ones use the next.
    """

    policy: str
    budgets: tuple[float, ...]
    episodes: int
    success_at: float | None
    attacks: tuple[Attack, ...]
    attack_budgets: tuple[float, ...]
    attack_episodes: int
    deterministic: bool = True
    alpha: float = 0.05
    seed: int = 2023


def run(settings: Settings, command: str, description: str | None) -> None:
    """Certify and attack what is missing, then write the certificate, the reports, a figure and a summary."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    folder, cache = RESULTS / settings.policy, CACHE / settings.policy
    model, recipe = rrl.load_agent(ZOO / settings.policy, device="cpu"), RunInfo.load(ZOO / settings.policy).env
    certificate = certify(settings, model, recipe, folder / "certificate.json", cache, workers)
    print(certificate.table(), flush=True)
    reports = attack(settings, model, recipe, certificate, folder / "attack.json", cache, workers)
    save_figure(certificate_figure(certificate, reports, title=settings.policy), folder / "certificate.png")
    lines = [
        f"# {settings.policy}",
        "",
        f"Command: `{command}`. Budgets in {frame_units(recipe)} units; {recipe.noise}; horizon {recipe.horizon}.",
        "",
        "```",
        certificate.table(),
        "",
        attack_table(reports),
        "```",
        "",
        "Settings: " + "; ".join(f"{key} = {value!r}" for key, value in asdict(settings).items() if key != "attacks"),
        "",
        *(f"- attack: `{json.dumps(attacker.to_dict())}`" for attacker in settings.attacks),
    ]
    returns = np.asarray(reports[0].clean)
    lines += [
        "",
        f"Clean return over {returns.size} other episodes: mean {returns.mean():.4g}, median {np.median(returns):.4g}.",
    ]
    write_atomically(folder / "summary.md", ("\n".join(lines) + "\n").encode())
    print((folder / "summary.md").read_text())


def certify(
    settings: Settings, model: object, recipe: rrl.EnvRecipe, path: Path, cache: Path, workers: int
) -> rrl.EpisodeCertificate:
    """The certificate; loaded if it is there already."""
    if path.exists():
        return rrl.EpisodeCertificate.load(path)
    certificate = rrl.certify_policy(
        model,
        recipe,
        settings.budgets,
        settings.episodes,
        alpha=settings.alpha,
        statistic="mean" if settings.success_at is None else "success",
        success_at=settings.success_at,
        deterministic=settings.deterministic,
        seed=settings.seed,
        n_workers=workers,
        out=cache / "certify",
        progress_bar=True,
    )
    certificate.save(path)
    return certificate


def attack(
    settings: Settings,
    model: object,
    recipe: rrl.EnvRecipe,
    certificate: rrl.EpisodeCertificate,
    path: Path,
    cache: Path,
    workers: int,
) -> list[AttackReport]:
    """Reports of every attack at every budget; finished ones are kept."""
    reports = load_reports(path) if path.exists() else []
    done = {(json.dumps(report.attack, sort_keys=True), report.budget) for report in reports}
    for number, attacker in enumerate(settings.attacks):
        for budget in settings.attack_budgets:
            if (json.dumps(attacker.to_dict(), sort_keys=True), budget) in done:
                continue
            report = rrl.attack_policy(
                model,
                recipe,
                attacker,
                rrl.ThreatModel(norm=2, episode=budget, units=frame_units(recipe)),
                settings.attack_episodes,
                certificate=certificate,
                alpha=settings.alpha,
                deterministic=settings.deterministic,
                seed=settings.seed + 1,
                n_workers=workers,
                out=cache / f"attack-{number}-{budget:g}",
                progress_bar=True,
            )
            reports.append(report)
            save_reports(path, reports)
            print(report, flush=True)
    return reports
