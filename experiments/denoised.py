"""Denoised smoothing: frozen policies, raw and behind denoisers, certified and attacked.

    python experiments/denoised.py [cartpole|hopper ...]      # resumes where it stopped

CartPole: PPO that never saw noise, smoothed at sigma 0.2 (200 steps): as it is, and behind denoisers of one frame or of five,
trained for the observation (mse), for the policy's actions (stability) or through surrogates fitted to queried actions (query).
For comparison PPO that was trained under this noise. Hopper: PPO trained at sigma 0.1, smoothed at 0.5, in normalised units.
Writes `experiments/results/denoised/`: a certificate and attack reports per agent, `summary.md` and a figure per environment.
Policies come from `zoo/`; they are not trained again, and their weights are compared bit by bit.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import robustrl as rrl
from robustrl.attacks import ActionDeviation, GradientAttack, MinimalFlip, Spread
from robustrl.attacks.base import Attack
from robustrl.envs.units import frame_units
from robustrl.files import save_figure, write_atomically
from robustrl.networks import Denoiser, load_denoiser
from robustrl.policy import PolicyView
from robustrl.report.attack import AttackReport, load_reports, save_reports
from robustrl.training.denoise import denoise
from robustrl.training.run_files import RunInfo

RESULTS, TRAINED, ZOO = Path("experiments/results/denoised"), Path("zoo/denoisers"), Path("zoo")


@dataclass(frozen=True)
class Settings:
    """Everything that a number in the results depends on.

    Attributes:
        policy: folder in `zoo/`, the frozen policy.
        sigma: of the noise.
        denoisers: (objective, history) of every denoiser.
        trained: folder in `zoo/` of a policy that was trained under this noise, or None.
        budgets: certified whole-episode l2 budgets.
        shown: those in the table.
        episodes: certified episodes.
        success_at: certify the probability of a return of at least this; None for the mean return.
        attack: the attacker.
        attack_budgets: attacked budgets.
        attacked: which agents, by label.
        attack_episodes: episodes per budget.
        training: further arguments of `denoise`.
        alpha: failure probability of each certificate, and of every attacked mean on its own.
        seed: of training and certified episodes; the attacked ones use the next.
    """

    policy: str
    sigma: float
    denoisers: tuple[tuple[str, int], ...]
    trained: str | None
    budgets: tuple[float, ...]
    shown: tuple[float, ...]
    episodes: int
    success_at: float | None
    attack: Attack
    attack_budgets: tuple[float, ...]
    attacked: tuple[str, ...]
    attack_episodes: int
    training: tuple[tuple[str, float], ...] = ()
    alpha: float = 0.05
    seed: int = 2020


SETTINGS = {
    "cartpole": Settings(
        policy="cartpole-ppo-undefended",
        sigma=0.2,
        denoisers=(("mse", 1), ("stability", 1), ("query", 1), ("mse", 5), ("stability", 5), ("query", 5)),
        trained="cartpole-ppo-sigma0.2",
        budgets=tuple(float(b) for b in np.round(np.linspace(0, 1, 11), 10)),
        shown=(0.0, 0.2, 0.4, 0.6),
        episodes=10_000,
        success_at=None,
        attack=MinimalFlip(confidence=0.8, threshold=1.0),
        attack_budgets=(0.2, 0.6),
        attacked=("as it is", "mse, 5 frames"),
        attack_episodes=40,
        training=(("rounds", 1), ("clean_share", 0.0), ("updates", 1_000), ("evaluate_episodes", 200)),
    ),
    "hopper": Settings(
        policy="hopper-ppo-sigma0.1",
        sigma=0.5,
        denoisers=(("mse", 1), ("mse", 4)),
        trained=None,
        budgets=tuple(float(b) for b in np.round(np.linspace(0, 1, 6), 10)),
        shown=(0.0, 0.2, 0.4, 0.6),
        episodes=300,
        success_at=1_000.0,
        attack=GradientAttack(ActionDeviation(), allocation=Spread(100)),
        attack_budgets=(0.6, 2.0),
        attacked=("as it is", "mse, 4 frames"),
        attack_episodes=40,
        training=(("rounds", 4), ("clean_share", 0.5), ("updates", 2_000), ("evaluate_episodes", 0)),
    ),
}


def agents(name: str, settings: Settings) -> dict[str, tuple[PolicyView, rrl.EnvRecipe]]:
    """Every agent's view and environment, by label; trains the denoisers that are missing."""
    stored = RunInfo.load(ZOO / settings.policy).env
    recipe = replace(stored, noise=rrl.Gaussian(settings.sigma))
    model = rrl.load_agent(ZOO / settings.policy, device="cpu")
    policy = recipe.view(model)
    before = policy.fingerprint()
    found = {"as it is": (policy, recipe)}
    for objective, history in settings.denoisers:
        denoiser = trained(name, settings, model, recipe, objective, history)
        frames = f"{history} frame{'s' if history > 1 else ''}"
        found[f"{objective}, {frames}"] = (policy.denoised(denoiser, history), replace(recipe, frame_stack=history))
    if policy.fingerprint() != before:
        raise RuntimeError("the frozen policy changed")
    if settings.trained is not None:
        found["trained under the noise"] = (recipe.view(rrl.load_agent(ZOO / settings.trained, device="cpu")), recipe)
    return found


def trained(name: str, settings: Settings, model: Any, recipe: rrl.EnvRecipe, objective: str, history: int) -> Denoiser:
    """A denoiser; loaded if it is there already."""
    path = TRAINED / name / f"{objective}-{history}.pt"
    if not path.exists():
        begin = time.perf_counter()
        options: dict[str, Any] = {"objective": objective, "history": history, "seed": settings.seed, **dict(settings.training)}
        denoise(model, recipe, progress_bar=True, **options).save(path)
        print(f"{name} {objective} {history}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return load_denoiser(path)


def certify(settings: Settings, view: PolicyView, recipe: rrl.EnvRecipe, path: Path, workers: int) -> rrl.EpisodeCertificate:
    """The certificate; loaded if it is there already."""
    if not path.exists():
        statistic = "mean" if settings.success_at is None else "success"
        rrl.certify_policy(
            view,
            recipe,
            settings.budgets,
            settings.episodes,
            alpha=settings.alpha,
            statistic=statistic,
            success_at=settings.success_at,
            seed=settings.seed,
            n_workers=workers,
            progress_bar=True,
        ).save(path)
    return rrl.EpisodeCertificate.load(path)


def attack(
    settings: Settings, view: PolicyView, recipe: rrl.EnvRecipe, certificate: rrl.EpisodeCertificate, path: Path, workers: int
) -> list[AttackReport]:
    """A report per budget; finished ones are kept."""
    reports = load_reports(path) if path.exists() else []
    for budget in settings.attack_budgets[len(reports) :]:
        threat = rrl.ThreatModel(norm=2, episode=budget, units=frame_units(recipe))
        options: dict[str, Any] = {
            "certificate": certificate,
            "alpha": settings.alpha,
            "seed": settings.seed + 1,
            "n_workers": workers,
        }
        reports.append(rrl.attack_policy(view, recipe, settings.attack, threat, settings.attack_episodes, **options))
        save_reports(path, reports)
    return reports


def run(name: str, settings: Settings, workers: int) -> list[str]:
    """Train, certify and attack what is missing; returns the lines of the summary."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    ax = figure.subplots()
    what = "mean return" if settings.success_at is None else f"P(return >= {settings.success_at:g})"
    columns = ["agent", "clean", *(f"certified, {b:g}" for b in settings.shown)]
    columns += [f"attacked, {b:g}" for b in settings.attack_budgets]
    lines = [f"## {name}", "", f"`zoo/{settings.policy}`, sigma {settings.sigma:g}, {what}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    colors = {objective: f"C{i}" for i, objective in enumerate(("mse", "stability", "query"))}
    for label, (view, recipe) in agents(name, settings).items():
        slug = label.replace(", ", "-").replace(" ", "-")
        certificate = certify(settings, view, recipe, RESULTS / name / f"{slug}.json", workers)
        reports = []
        if label in settings.attacked:
            reports = attack(settings, view, recipe, certificate, RESULTS / name / f"{slug}-attack.json", workers)
        color, style = colors.get(label.split(",")[0], "k"), {"as it is": "--", "trained under the noise": ":"}.get(label, "-")
        width = 1.0 if label.endswith("1 frame") else 2.0
        ax.plot(settings.budgets, certificate.values, style, color=color, linewidth=width, label=label)
        ax.plot([report.budget for report in reports], [report.mean for report in reports], "x", color=color, markersize=5)
        clean = certificate.evidence / certificate.n if isinstance(certificate.evidence, int) else certificate.evidence.mean()
        numbers = [clean, *(certificate.value_at(b) for b in settings.shown), *(report.mean for report in reports)]
        cells = [f"{number:.4g}" for number in numbers]
        lines.append("| " + " | ".join([label, *cells, *[""] * (len(columns) - 1 - len(cells))]) + " |")
        print(lines[-1], flush=True)
    ax.set_title(f"{name}, sigma {settings.sigma:g}; lines: certified, crosses: attacked")
    ax.set_xlabel(f"whole-episode l2 budget ({frame_units(recipe)} units)")
    ax.set_ylabel(what)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, RESULTS / f"{name}.png")
    return [*lines, "", f"Settings: `{settings!r}`", ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=list(SETTINGS))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    for environment in arguments.environments:
        summary = run(environment, SETTINGS[environment], arguments.workers)
        write_atomically(RESULTS / environment / "summary.md", ("\n".join(summary) + "\n").encode())
