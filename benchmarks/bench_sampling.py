"""Randomised smoothing: our sampling core beside the loop that everybody copies, on one core, same network and device.

    python benchmarks/bench_sampling.py [--rounds 5] [--samples 100000] [--out benchmarks/results/sampling.json]

The loop repeats the input, draws noise, runs the network, takes the argmax, brings it to the host and counts it element by
element in Python, 1,000 copies at a time, as the original does. Both draw the same number of noisy copies of one input; the two
take turns round by round, because a shared machine's speed drifts. "Network" is the forward passes alone in single precision, on batches of
the size that the core uses: the floor. Then: how many samples the sequential decision takes where a fixed number would be 100,000, over inputs whose
true class probabilities are spread as a trained network's are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import robustrl as rrl
from robustrl.policy import PolicyView
from robustrl.rollouts.executor import one_thread

SIGMA = 0.25


def mlp() -> nn.Module:
    """The 64-64 tanh policy of SB3 on CartPole's observations."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def cnn() -> nn.Module:
    """Two convolutions and two linear layers on pictures of 28 x 28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def ppo() -> Any:
    """The same network inside an SB3 model."""
    from stable_baselines3 import PPO

    return PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")


CASES: dict[str, tuple[Any, tuple[int, ...], torch.dtype | None]] = {
    "ppo": (ppo, (4,), None),
    "mlp": (mlp, (4,), None),
    "cnn": (cnn, (1, 28, 28), None),
    "cnn, bfloat16 inside": (cnn, (1, 28, 28), torch.bfloat16),
}


def scores(network: Any, x: Tensor) -> Tensor:
    """Logits of a network, or of an SB3 model's policy."""
    found: Tensor = network.policy.get_distribution(x).distribution.logits if hasattr(network, "policy") else network(x)
    return found


def loop(network: nn.Module, x: Tensor, n: int, n_classes: int, batch: int = 1000) -> np.ndarray:
    """The usual loop."""
    counts = np.zeros(n_classes, dtype=int)
    with torch.no_grad():
        for start in range(0, n, batch):
            size = min(batch, n - start)
            copies = x.repeat((size, *[1] * (x.ndim - 1)))
            predictions = scores(network, copies + torch.randn_like(copies) * SIGMA).argmax(1)
            for prediction in predictions.cpu().numpy():
                counts[prediction] += 1
    return counts


def floor(function: rrl.Smoothed, x: Tensor, n: int) -> float:
    """Seconds of the forward passes alone."""
    rows = function.rows(x)
    batch = x.repeat((rows, *[1] * (x.ndim - 1)))
    with function.evaluating() as network:
        start = time.perf_counter()
        for _ in range(math.ceil(n / rows)):
            network(batch)
        return time.perf_counter() - start


def compare(name: str, rounds: int, n: int) -> dict[str, Any]:
    """Seconds for `n` samples, side by side."""
    torch.manual_seed(0)
    make, shape, amp = CASES[name]
    network = make()
    x = torch.rand(1, *shape)
    n_classes = scores(network, x).shape[1]
    base = PolicyView.from_torch(network, kind="q", observation_shape=shape) if name == "mlp" else network
    function = rrl.Smoothed(base, rrl.Gaussian(SIGMA), seed=0, amp=amp)
    rows = []
    for _ in range(rounds):
        start = time.perf_counter()
        theirs = loop(network, x, n, n_classes)
        usual = time.perf_counter() - start
        start = time.perf_counter()
        ours = function.tally(x, n).counts[0]
        core = time.perf_counter() - start
        difference = np.abs(ours - theirs).max() / math.sqrt(n)
        if difference > 4:
            raise SystemExit(f"the two count differently: {ours}, {theirs}")
        rows.append({"loop_s": usual, "core_s": core, "network_s": floor(function, x, n), "times": usual / core})
        print(name, "  ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
    return {"samples": n, "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]}, "rounds": rows}


def decisions(n_inputs: int = 200) -> dict[str, Any]:
    """Samples that decide "is the radius at least r?" for inputs at distances spread over a half-space's two sides."""
    weight = nn.Linear(1, 2)
    weight.weight.data, weight.bias.data = torch.tensor([[0.0], [1.0]]), torch.zeros(2)
    margins = np.abs(np.random.default_rng(0).normal(scale=2.0, size=(n_inputs, 1)))
    function = rrl.Smoothed(weight, rrl.Gaussian(1.0), seed=0)
    found: dict[str, Any] = {}
    for radius in (0.5, 1.0, 2.0):
        answers = function.decide(margins, radius)
        n = np.array([answer.evidence["n"] for answer in answers])
        wrong = sum(
            (answer.evidence["answer"] == "yes") != (margin[0] > radius)
            for answer, margin in zip(answers, margins, strict=True)
            if answer.evidence["answer"] != "undecided"
        )
        found[f"radius {radius}"] = {
            "mean_samples": float(n.mean()),
            "median_samples": float(np.median(n)),
            "fewer_by": float(100_000 / n.mean()),
            "undecided": sum(answer.evidence["answer"] == "undecided" for answer in answers),
            "wrong": int(wrong),
        }
        print(f"decide radius {radius}: {found[f'radius {radius}']}", flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with one_thread():
        found: dict[str, Any] = {name: compare(name, arguments.rounds, arguments.samples) for name in CASES}
        found["decide"] = decisions()
    command = f"python benchmarks/bench_sampling.py --rounds {arguments.rounds} --samples {arguments.samples}"
    if arguments.out:
        arguments.out.write_text(json.dumps({"command": command, **found}, indent=1))


if __name__ == "__main__":
    main()
