"""Robust training of small classifiers of digits: which attack to train with, what a Lipschitz network proves, and robust overfitting.

    python experiments/robust_digits.py [--workers 2] [--seeds 5]

8 x 8 pictures in [0, 1], 1257 to train with, 180 to choose weights by, 360 to test on (stratified, seed 0); test figures chose nothing.

1. l-inf: a ReLU network 64-128-128-10, 20 epochs, epsilon .1 and .2; accuracy under PGD-20 with 3 restarts and targeted margins.
2. l2: orthogonal layers 64-128-128-10 with MaxMin between them, 40 epochs, temperature .25, three offset margins; certified accuracy,
   and accuracy under PGD-20 x 3 at radius .5.
3. Robust overfitting: PGD-5, a tenth of the learning rate after half of the epochs and a hundredth after three quarters; five activations.
   With the labels as they are (64-128-128-10, epsilon .15, 120 epochs), and with a fifth of the labels wrong, those to choose by
   included (64-512-512-10, 600 pictures, epsilon .05, 120 epochs): robust networks overfit what is not so. "best" are the weights that
   the 180 pictures choose under attack, "last" those at the end; test labels are right.

The learning rate of part 2 is the one of four that proves most of the 180 pictures.

Writes `experiments/results/robust_digits/`: runs.json, from which an interrupted experiment goes on, summary.md and overfitting.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from robustrl.certify.lipschitz import LipschitzScores
from robustrl.files import save_figure, write_atomically
from robustrl.networks import MaxMin, OrthogonalLinear, activation
from robustrl.rollouts.executor import LocalExecutor
from robustrl.training.supervised import PGD, CrossEntropy, Evaluation, Examples, RobustTrainer, evaluate

OUT = Path(__file__).parent / "results" / "robust_digits"
ATTACKS, EPSILONS = ("none", "fgsm-rs", "n-fgsm", "pgd"), (0.1, 0.2)
MARGINS, RADII = (0.25, 0.5, 1.0), (0.25, 0.5, 0.75, 1.0)
ACTIVATIONS: dict[str, dict[str, float]] = {
    "relu": {},
    "leaky_relu": {"slope": 0.3},
    "swish, beta 1": {"beta": 1.0},
    "swish, beta 4": {"beta": 4.0},
    "swish, beta 16": {"beta": 16.0},
}
RATES = (0.02, 0.05, 0.1, 0.2)
CHOSEN_RATE = 0.1
"""By the runs of part "rates", seed 100; checked when tables are written."""


class Overfit(NamedTuple):
    """One setting of part 3."""

    pictures: int
    width: int
    epsilon: float
    wrong: float


OVERFIT = {"labels as they are": Overfit(1257, 128, 0.15, 0.0), "a fifth of the labels wrong": Overfit(600, 512, 0.05, 0.2)}


class Task(NamedTuple):
    """One network."""

    part: str
    setting: str
    seed: int


@cache
def data() -> tuple[Examples, Examples, Examples]:
    """Pictures to train with, to choose by, and to test on."""
    x, y = load_digits(return_X_y=True)
    rest, x_test, labels, y_test = train_test_split(x / 16.0, y, test_size=360, stratify=y, random_state=0)
    x_train, x_held, y_train, y_held = train_test_split(rest, labels, test_size=180, stratify=labels, random_state=0)
    pairs = ((x_train, y_train), (x_held, y_held), (x_test, y_test))
    train, held, test = (Examples(torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for x, y in pairs)
    return train, held, test


def mislabelled(examples: Examples, share: float) -> Examples:
    """With another label for some, the same for every seed."""
    labels, generator = examples.targets.clone(), torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=generator) < share
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    return Examples(examples.inputs, labels)


def mlp(name: str = "relu", width: int = 128) -> nn.Module:
    """64-width-width-10."""
    make = activation(name.split(",")[0], **ACTIVATIONS[name])
    return nn.Sequential(nn.Linear(64, width), make(), nn.Linear(width, width), make(), nn.Linear(width, 10))


def attacked(setting: str, seed: int) -> dict[str, Any]:
    """Part 1."""
    attack, epsilon = setting.split(", ")
    train, _, test = data()
    module = mlp()
    trainer = RobustTrainer(attack if attack != "pgd" else PGD(steps=7), float(epsilon), bounds=(0, 1), hold_out=0, seed=seed)
    start = time.process_time()
    trainer.fit(module, train)
    seconds = time.process_time() - start
    report = evaluate(module, test, epsilon=float(epsilon), bounds=(0, 1), seed=1)
    return {"clean": report.clean, "pgd": report.pgd, "CPU seconds": seconds}


def orthogonal(margin: float, rate: float, seed: int) -> tuple[nn.Module, float]:
    """A network with constant 1, and the CPU seconds that it took to train."""
    module = nn.Sequential(
        *(OrthogonalLinear(64, 128), MaxMin(), OrthogonalLinear(128, 128), MaxMin(), OrthogonalLinear(128, 10))
    )
    trainer = RobustTrainer("none", 0.5, 2, epochs=40, learning_rate=rate, hold_out=0, seed=seed)
    start = time.process_time()
    trainer.fit(module, data()[0], CrossEntropy(temperature=0.25, margin=margin))
    return module, time.process_time() - start


def proven(module: nn.Module, examples: Examples, radius: float) -> float:
    """Share of the pictures that are right within a radius."""
    actions, radii = LipschitzScores.of(module).radii(examples.inputs)
    return float(((actions == examples.targets.numpy()) & (radii > radius)).mean())


def rates(setting: str, seed: int) -> dict[str, Any]:
    """What part 2 chooses its learning rate by."""
    return {"certified at 0.5": proven(orthogonal(0.5, float(setting), seed)[0], data()[1], 0.5)}


def lipschitz(setting: str, seed: int) -> dict[str, Any]:
    """Part 2."""
    module, seconds = orthogonal(float(setting), CHOSEN_RATE, seed)
    report = evaluate(module, data()[2], epsilon=0.5, norm=2, seed=1)
    found = {f"certified at {r:g}": proven(module, data()[2], r) for r in RADII}
    return {"clean": report.clean, **found, "PGD-l2 at 0.5": report.pgd, "CPU seconds": seconds}


def overfitting(setting: str, seed: int) -> dict[str, Any]:
    """Part 3: errors over training, and of best and last weights."""
    labels, name = setting.split(": ")
    chosen = OVERFIT[labels]
    train, held, test = data()
    train, held = mislabelled(train.draw(chosen.pictures, 0), chosen.wrong), mislabelled(held, chosen.wrong)
    module, curve = mlp(name, chosen.width), []
    against: dict[str, Any] = {"epsilon": chosen.epsilon, "bounds": (0, 1)}

    def follow(row: Evaluation, now: nn.Module) -> None:
        if round(row.epoch) % 4 == 0:
            quick = {**against, "steps": 10, "restarts": 1, "targeted": False, "seed": 1}
            curve.append([row.epoch, *(1 - evaluate(now, part, **quick).pgd for part in (train, test))])

    trainer = RobustTrainer(
        PGD(steps=5),
        chosen.epsilon,
        bounds=(0, 1),
        epochs=120,
        schedule="piecewise",
        learning_rate=2e-3,
        warm_up=0,
        guard=False,
        seed=seed,
        callbacks=(follow,),
    )
    fit = trainer.fit(module, train, validation=held)
    found: dict[str, Any] = {"curve": curve, "best epoch": fit.best_epoch, "curvature": curvature(module)}
    for which, weights in (("best", fit.best), ("last", fit.last)):
        module.load_state_dict(weights)
        report, seen = evaluate(module, test, **against, seed=2), evaluate(module, train, **against, seed=2)
        found[which] = {
            "robust error": 1 - report.pgd,
            "clean error": 1 - report.clean,
            "robust error in training": 1 - seen.pgd,
        }
    return found


def curvature(module: nn.Module) -> float:
    """Secant curvature of the activations at h = .1, which smooth ones and ones with kinks both have."""
    return float(next(layer.secant_curvature(0.1) for layer in module if hasattr(layer, "secant_curvature")))  # type: ignore[operator]


def run(task: Task) -> dict[str, Any]:
    """One network."""
    torch.manual_seed(task.seed)
    parts = {"attacks": attacked, "rates": rates, "lipschitz": lipschitz, "overfitting": overfitting}
    return parts[task.part](task.setting, task.seed)


def interval(values: Sequence[float]) -> str:
    """Mean in percent and half a 95 % confidence interval (Student) over seeds."""
    half = (
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    )
    return f"{100 * np.mean(values):.1f} +- {100 * half:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def summary(found: dict[Task, dict[str, Any]], seeds: int) -> list[str]:
    """The three tables."""

    def over(part: str, setting: str, *keys: str) -> list[float]:
        values = []
        for task, one in found.items():
            if (task.part, task.setting) == (part, setting):
                value: Any = one
                for key in keys:
                    value = value[key]
                values.append(float(value))
        return values

    attacks = [
        [
            *(attack, epsilon),
            *(interval(over("attacks", f"{attack}, {epsilon}", key)) for key in ("clean", "pgd")),
            f"{np.median(over('attacks', f'{attack}, {epsilon}', 'CPU seconds')):.2f}",
        ]
        for epsilon in map(str, EPSILONS)
        for attack in ATTACKS
    ]
    keys = ("clean", *(f"certified at {r:g}" for r in RADII), "PGD-l2 at 0.5")
    certified = [[f"{m:g}", *(interval(over("lipschitz", f"{m:g}", key)) for key in keys)] for m in MARGINS]
    by_rate = {rate: over("rates", f"{rate:g}", "certified at 0.5")[0] for rate in RATES}
    assert max(by_rate, key=lambda rate: by_rate[rate]) == CHOSEN_RATE, by_rate
    head = ["activation", "secant curvature at .1", "best", "last", "last - best", "last: test - train"]
    text = [
        "# Robust training on digits",
        "",
        f"Command: `python experiments/robust_digits.py --seeds {seeds}`",
        "",
        f"Percent of 360 test pictures, mean over {seeds} seeds +- half a 95 % confidence interval over seeds (the split is one and the",
        "same: the draw of the pictures adds about 2.3 points to each figure, but little to differences).",
        "",
        "**l-inf, by the attack trained with**",
        "",
        *table(["attack", "epsilon", "clean", "PGD-20 x 3", "CPU seconds"], attacks),
        "",
        "**l2, orthogonal layers**",
        "",
        *table(["margin", *keys], certified),
        "",
        f"Learning rate {CHOSEN_RATE:g}: certified at .5 of the held-out pictures, "
        + ", ".join(f"{100 * share:.1f} at {rate:g}" for rate, share in by_rate.items())
        + " (margin .5).",
        "",
    ]
    for labels, chosen in OVERFIT.items():
        rows = []
        base, kept = (np.array(over("overfitting", f"{labels}: relu", which, "robust error")) for which in ("last", "best"))
        for name in ACTIVATIONS:
            setting = f"{labels}: {name}"
            best, last = (np.array(over("overfitting", setting, which, "robust error")) for which in ("best", "last"))
            seen = np.array(over("overfitting", setting, "last", "robust error in training"))
            figures = (best, last, last - best, last - seen, best - kept, last - base)
            bend, when = over("overfitting", setting, "curvature")[0], np.median(over("overfitting", setting, "best epoch"))
            rows.append([name, f"{bend:.2f}", *map(interval, figures), f"{when:.0f}"])
        text += [
            f"**Robust overfitting, {labels}: robust error at epsilon {chosen.epsilon:g}**",
            "",
            *table([*head, "best - relu's", "last - relu's", "median best epoch"], rows),
            "",
        ]
    return text


def figure(found: dict[Task, dict[str, Any]]) -> None:
    """Robust error over training."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, (labels, chosen) in zip(drawing.subplots(1, 2), OVERFIT.items(), strict=True):
        for number, name in enumerate(ACTIVATIONS):
            task = ("overfitting", f"{labels}: {name}")
            curves = 100 * np.array([one["curve"] for key, one in found.items() if key[:2] == task])
            epochs = curves[0, :, 0] / 100
            ax.plot(epochs, curves[:, :, 2].mean(0), color=f"C{number}", label=name)
            ax.plot(epochs, curves[:, :, 1].mean(0), color=f"C{number}", linestyle=":")
        ax.set_title(f"{labels}, l-inf {chosen.epsilon:g}")
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("error under PGD-10 (%)\ntest (lines), training (dots)")
    drawing.axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(drawing, OUT / "overfitting.png")


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    tasks = [Task("attacks", f"{a}, {e}", s) for e in EPSILONS for a in ATTACKS for s in seeds]
    tasks += [Task("rates", f"{rate:g}", 100) for rate in RATES]
    tasks += [Task("lipschitz", f"{m:g}", s) for m in MARGINS for s in seeds]
    tasks += [Task("overfitting", f"{labels}: {a}", s) for labels in OVERFIT for s in seeds for a in ACTIVATIONS]
    raw = OUT / "runs.json"
    found = {Task(*name): one for name, one in json.loads(raw.read_text())} if raw.exists() else {}
    missing = [task for task in tasks if task not in found]
    OUT.mkdir(parents=True, exist_ok=True)
    for index, one in LocalExecutor(arguments.workers).run(run, missing):
        found[missing[index]] = one
        write_atomically(raw, json.dumps(list(found.items())).encode())
        print(f"{len(found)} of {len(tasks)}: {missing[index]}", flush=True)
    found = {task: found[task] for task in tasks}
    figure(found)
    text = summary(found, arguments.seeds)
    write_atomically(OUT / "summary.md", "\n".join(text).encode())
    print("\n".join(text))


if __name__ == "__main__":
    main()
