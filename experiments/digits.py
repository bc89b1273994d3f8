"""Static certificates on scikit-learn's digits: do they come out in the order that the papers report?

    python experiments/digits.py [--workers 2] [--images 300]

8 x 8 pictures of 17 grey levels in [0, 1]; a third of them, never trained on, is certified. Every classifier is a small
network (64-256-256-10, ReLU) trained under the very noise that it is certified with. Compared are, in l2 at equal Gaussian noise, the plain
certificate, second-order (with the original and with our estimate of the gradient) and the dipole; in l1 at equal lambda, additive uniform noise,
randomised splitting, and deterministic splitting; and, for a classifier that never saw noise, denoisers trained for mean squared error and
for stability of its predictions. Writes `experiments/results/digits/`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import robustrl as rrl
from robustrl.certify.radius import RadiusCertificate
from robustrl.networks import ResidualMLP
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.report.accuracy import AccuracyReport, Row, accuracy_figure
from robustrl.rollouts.executor import LocalExecutor, one_thread
from robustrl.training.objectives import MSE, Objective, Stability

OUT = Path(__file__).parent / "results" / "digits"
LEVELS = 16
SIGMAS, LAMBDAS = (0.25, 0.5), (0.5, 1.5)
EPOCHS, BATCH = 150, 128


def data() -> tuple[torch.Tensor, np.ndarray, torch.Tensor, np.ndarray]:
    """Pictures (n, 64) in [0, 1] and labels: for training, for certification."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / LEVELS, dtype=torch.float32), np.asarray(y)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    return x[train], y[train], x[test], y[test]


def trained(noise: Noise, seed: int = 0) -> nn.Module:
    """A classifier trained on noisy pictures."""
    torch.manual_seed(seed)
    x, y, _, _ = data()
    labels = torch.from_numpy(y)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(network(noise.perturb(x[rows], generator)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def report(certificates: list[RadiusCertificate], seconds: float, title: str) -> AccuracyReport:
    """Certificates of the first pictures of the test set."""
    labels, each = data()[3], seconds / len(certificates)
    rows = (Row(i, int(labels[i]), c.prediction, c.radius, each) for i, c in enumerate(certificates))
    return AccuracyReport(tuple(rows), certificates[0].norm, title)


def gaussian(sigma: float, images: int, n: int) -> dict[str, AccuracyReport]:
    """All l2 certificates of one classifier; each method has its own noise draws."""
    noise = rrl.Gaussian(sigma)
    network, x = trained(noise), data()[2][:images]
    found = {}
    for method in ("one-sided", "second-order-pairs", "second-order", "dipole"):
        start = time.perf_counter()
        certificates = rrl.Smoothed(network, noise, seed=1).certify(x, n=n, method=method)
        found[f"sigma {sigma}: {method}"] = report(certificates, time.perf_counter() - start, f"{method}, n = {n}")
    return found


def l1(lam: float, images: int, n: int) -> dict[str, AccuracyReport]:
    """All l1 certificates at one lambda, each with its own classifier."""
    mechanisms: dict[str, Noise] = {
        "uniform": rrl.Uniform(lam),
        "splitting": rrl.Splitting(lam),
        "deterministic splitting": rrl.DeterministicSplitting(round(2 * lam * LEVELS), LEVELS),
    }
    x, found = data()[2][:images], {}
    for name, noise in mechanisms.items():
        smoothed = rrl.Smoothed(trained(noise), noise, seed=1)
        start = time.perf_counter()
        exact = name.startswith("deterministic")
        certificates = smoothed.certify(x, method="splitting") if exact else smoothed.certify(x, n=n)
        title = f"{name}, {'exact' if exact else f'n = {n}'}"
        found[f"lambda {lam}: {name}"] = report(certificates, time.perf_counter() - start, title)
    return found


def denoised(sigma: float, images: int, n: int) -> dict[str, AccuracyReport]:
    """A frozen classifier that was trained without noise: bare, and behind denoisers."""
    noise = rrl.Gaussian(sigma)
    network, x = trained(rrl.Gaussian(0.0)), data()[2][:images]
    view = PolicyView.from_torch(network, kind="logits", observation_shape=(64,))
    bases: dict[str, nn.Module] = {"bare": network}
    for name, objective in {"mse": MSE(), "stability": Stability(view)}.items():
        bases[name] = nn.Sequential(denoiser_for(objective, noise), network).eval()
    found = {}
    for name, base in bases.items():
        start = time.perf_counter()
        certificates = rrl.Smoothed(base, noise, seed=1).certify(x, n=n)
        found[f"sigma {sigma}, clean training, {name}"] = report(certificates, time.perf_counter() - start, name)
    return found


def denoiser_for(objective: Objective, noise: rrl.Gaussian, seed: int = 0) -> nn.Module:
    """A denoiser of the training pictures."""
    x, generator = data()[0], torch.Generator().manual_seed(seed)
    assert isinstance(noise.sigma, float)
    denoiser = ResidualMLP((64,), noise.sigma, x.mean(dim=0).numpy(), float(x.std()), seed=seed).train()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = objective(x[rows], denoiser(noise.perturb(x[rows], generator)), generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return denoiser.eval()


def run(task: tuple[str, float, int, int]) -> dict[str, AccuracyReport]:
    """One task of a worker."""
    kind, scale, images, n = task
    with one_thread():
        return {"gaussian": gaussian, "denoised": denoised, "l1": l1}[kind](scale, images, n)


def rows_of(found: dict[str, AccuracyReport], radii: tuple[float, ...]) -> list[str]:
    """A markdown table."""
    head = ["certificate", "accuracy", *(f"r = {r:g}" for r in radii), "ACR", "seconds per picture"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in found.items():
        shares = [f"{share:.3f}" for share in one.certified_accuracy(radii)]
        each = np.mean([row.seconds for row in one.rows])
        cells = [name, f"{one.accuracy:.3f}", *shares, f"{one.average_certified_radius:.4f}", f"{each:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Certify, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--n", type=int, default=100_000)
    arguments = parser.parse_args()
    tasks = [("gaussian", sigma, arguments.images, arguments.n) for sigma in SIGMAS]
    tasks += [("denoised", sigma, arguments.images, arguments.n // 10) for sigma in SIGMAS]
    tasks += [("l1", lam, arguments.images, arguments.n) for lam in LAMBDAS]
    parts: dict[int, dict[str, AccuracyReport]] = {}
    for index, part in LocalExecutor(arguments.workers).run(run, tasks):
        parts[index] = part
        print(f"{tasks[index]}: done", flush=True)
    found: dict[str, AccuracyReport] = {name: one for index in sorted(parts) for name, one in parts[index].items()}
    OUT.mkdir(parents=True, exist_ok=True)
    l2 = {name: one for name, one in found.items() if one.norm == 2 and "clean" not in name}
    frozen = {name: one for name, one in found.items() if "clean" in name}
    other = {name: one for name, one in found.items() if one.norm == 1}
    accuracy_figure(l2, OUT / "l2.png", "digits, Gaussian noise")
    accuracy_figure(frozen, OUT / "denoised.png", "digits, a frozen classifier under Gaussian noise")
    accuracy_figure(other, OUT / "l1.png", "digits, l1")
    raw: dict[str, Any] = {
        name: {"radii": [row.radius for row in one.rows], "predictions": [row.prediction for row in one.rows]}
        for name, one in found.items()
    }
    raw["labels"] = data()[3][: arguments.images].tolist()
    (OUT / "radii.json").write_text(json.dumps(raw))
    text = [
        "# Digits: certified accuracy",
        "",
        f"Command: `python experiments/digits.py --images {arguments.images} --n {arguments.n}`",
        "",
        f"{arguments.images} pictures that were not trained on; alpha = .001 each, n = {arguments.n} where sampled. Radii in [0, 1] pixel units.",
        "",
        "## l2, Gaussian noise",
        "",
        *rows_of(l2, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)),
        "",
        f"## l2, a frozen classifier that was trained without noise, n = {arguments.n // 10}",
        "",
        *rows_of(frozen, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)),
        "",
        "## l1",
        "",
        *rows_of(other, (0.0, 0.25, 0.5, 1.0, 1.25)),
        "",
    ]
    (OUT / "summary.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
