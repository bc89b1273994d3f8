"""What a denoiser's training data do to the certificate, and what is gained by keeping the best candidate: CartPole, paired seeds.

    python experiments/denoising_study.py      # resumes where it stopped; about a quarter of an hour on one core

The frozen PPO of `zoo/cartpole-ppo-undefended` under noise of sigma 0.2, behind denoisers of 1,000 updates each: trained on
observations that are gathered once, by the smoothed policy alone ("smoothed") or half by it and half by the clean policy ("half clean"),
or on those of four rounds, half clean, half by the policy behind the denoiser as it is by then ("four rounds"). Every denoiser is
certified twice: with the last weights, and with those of the candidate that did best on 200 episodes. All denoisers of a seed are
certified on the same 1,000 episodes, whose seed is another one. And without any training: the affine denoiser of the smallest squared
error that there is (Wiener's filter) for the observations of the clean policy, of the smoothed one, and of the smoothed one behind the
second filter, which is what a second round would gather.
Writes `experiments/results/denoised/study/`: `runs.json`, every number of every denoiser, and `summary.md`, means over the training
seeds with their 95 % confidence intervals (Student's t).
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor, nn

import robustrl as rrl
from robustrl.files import write_atomically
from robustrl.networks import Denoiser
from robustrl.policy import PolicyView
from robustrl.training.denoise import denoise, gather
from robustrl.training.run_files import RunInfo

RESULTS, POLICY, SIGMA = Path("experiments/results/denoised/study"), Path("zoo/cartpole-ppo-undefended"), 0.2
DATA: dict[str, dict[str, Any]] = {
    "smoothed": {"rounds": 1, "updates": 1000, "clean_share": 0.0},
    "half clean": {"rounds": 1, "updates": 1000, "clean_share": 0.5},
    "four rounds": {"rounds": 4, "updates": 250, "clean_share": 0.5},
}
HISTORIES, SEEDS = (1, 5), range(5)
OBJECTIVES = {
    "smoothed": ("mse", "stability", "query"),
    "half clean": ("mse", "stability"),
    "four rounds": ("mse", "stability"),
}
FILTERED = ("clean", "smoothed", "smoothed, filtered")
CASES = [(data, objective, history) for data in DATA for objective in OBJECTIVES[data] for history in HISTORIES]
BUDGETS, EPISODES, CERTIFIED_FROM = (0.0, 0.2, 0.4), 1_000, 1_000


def certified(policy: PolicyView, recipe: rrl.EnvRecipe, seed: int) -> dict[str, float]:
    """Clean mean return and certified ones."""
    found = rrl.certify_policy(policy, recipe, BUDGETS, EPISODES, seed=CERTIFIED_FROM + seed)
    return {"clean": float(np.mean(found.evidence))} | {f"{b:g}": float(found.value_at(b)) for b in BUDGETS}


def run(model: Any, recipe: rrl.EnvRecipe, data: str, objective: str, history: int, seed: int) -> dict[str, Any]:
    """One training, and the certificates of its last and of its best weights."""
    candidates: list[tuple[int, float]] = []
    last: list[Denoiser] = []

    def note(updates: int, mean: float, denoiser: Denoiser) -> None:
        candidates.append((updates, mean))
        last[:] = [copy.deepcopy(denoiser)]

    best = denoise(model, recipe, objective=objective, history=history, seed=seed, on_candidate=note, **DATA[data])
    policy, chain = recipe.view(model), replace(recipe, frame_stack=history)
    found = {
        which: certified(policy.denoised(part, history), chain, seed) for which, part in (("last", last[0]), ("best", best))
    }
    return {"data": data, "objective": objective, "history": history, "seed": seed, "candidates": candidates, **found}


def wiener(frames: Tensor) -> nn.Linear:
    """The affine map of the smallest squared error on observations (n, size) under the noise."""
    covariance, mean = torch.cov(frames.double().T), frames.double().mean(0)
    gain = covariance @ torch.linalg.inv(covariance + SIGMA**2 * torch.eye(len(mean), dtype=torch.float64))
    filter_ = nn.Linear(len(mean), len(mean))
    with torch.no_grad():
        filter_.weight.copy_(gain)
        filter_.bias.copy_(mean - gain @ mean)
    return filter_


def filtered(policy: PolicyView, recipe: rrl.EnvRecipe, seed: int) -> dict[str, dict[str, float]]:
    """Deviation of the angle, its gain in the filter, and the certificates of the policy behind it, by whose observations it is for."""
    found, behind = {}, policy
    for name in FILTERED:
        actor, chain = (policy, replace(recipe, noise=None)) if name == "clean" else (behind, recipe)
        frames = gather(actor, chain, 20_000, seed).frames[:, -1]
        linear = wiener(frames)
        behind = policy if name == "clean" else policy.denoised(linear)
        measured = {"deviation": float(frames[:, 2].std()), "gain": linear.weight[2, 2].item()}
        found[name] = measured | certified(policy.denoised(linear), recipe, seed)
    return found


def interval(values: list[float], digits: int = 0) -> str:
    """Mean and half width of its 95 % confidence interval."""
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def summary(runs: list[dict[str, Any]], bare: list[dict[str, float]], filters: list[dict[str, dict[str, float]]]) -> list[str]:
    """The tables, in markdown."""
    columns = ("clean", *(f"{b:g}" for b in BUDGETS))
    head = ["data", "objective", "frames", "weights", "clean mean", *(f"certified, {b:g}" for b in BUDGETS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    cells = [interval([row[column] for row in bare]) for column in columns]
    lines.append("| " + " | ".join(["none", "", "", "", *cells]) + " |")
    gains: dict[str, list[str]] = {column: [] for column in columns}
    for data, objective, history in CASES:
        group = [r for r in runs if (r["data"], r["objective"], r["history"]) == (data, objective, history)]
        for which in ("last", "best"):
            cells = [interval([r[which][column] for r in group]) for column in columns]
            lines.append("| " + " | ".join([data, objective, str(history), which, *cells]) + " |")
    for data in DATA:
        rows = [r for r in runs if r["data"] == data]
        for column in columns:
            by_seed = [[r["best"][column] - r["last"][column] for r in rows if r["seed"] == seed] for seed in SEEDS]
            gains[column].append(interval([float(np.mean(part)) for part in by_seed]))
    lines += ["", "Best minus last weights, paired by seed, averaged over objectives and frames:", ""]
    lines += [
        "| data | clean mean | " + " | ".join(f"certified, {b:g}" for b in BUDGETS) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {data} | " + " | ".join(gains[column][i] for column in columns) + " |" for i, data in enumerate(DATA)]
    head = ["observations of the agent", "deviation of the angle", "gain of the angle", *head[4:]]
    lines += ["", "Wiener's filter, one frame:", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in FILTERED:
        cells = [interval([f[name][key] for f in filters], 3) for key in ("deviation", "gain")]
        cells += [interval([f[name][column] for f in filters]) for column in columns]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


if __name__ == "__main__":
    environment = replace(RunInfo.load(POLICY).env, noise=rrl.Gaussian(SIGMA))
    agent = rrl.load_agent(POLICY, device="cpu")
    path = RESULTS / "runs.json"
    done = json.loads(path.read_text()) if path.exists() else {"none": [], "wiener": [], "runs": []}
    for number in SEEDS:
        if len(done["none"]) <= number:
            done["none"].append(certified(environment.view(agent), environment, number))
            done["wiener"].append(filtered(environment.view(agent), environment, number))
        for case in CASES:
            if any((r["data"], r["objective"], r["history"], r["seed"]) == (*case, number) for r in done["runs"]):
                continue
            done["runs"].append(run(agent, environment, *case, number))
            write_atomically(path, (json.dumps(done, indent=1) + "\n").encode())
            print(json.dumps(done["runs"][-1]), flush=True)
    lines = ["# Training data and selection", "", *summary(done["runs"], done["none"], done["wiener"])]
    write_atomically(RESULTS / "summary.md", ("\n".join(lines) + "\n").encode())
