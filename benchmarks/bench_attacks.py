"""Projected gradient ascent on 64 environments' observations at once, beside one environment at a time, on one core.

    python benchmarks/bench_attacks.py [--rounds 9] [--out benchmarks/results/attacks.json]

PGD with 10 steps, norm inf, on the 64-64 tanh policy of an SB3 PPO model and on a NatureCNN Q-network (8 pictures for the latter).
"Floor" is the 11 forward and 10 backward passes alone, on the same batch: what no solver can save. The three take turns round by
round, because a shared machine's speed drifts; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustrl as rrl
from robustrl.attacks.attacker import Attacker
from robustrl.policy import PolicyView
from robustrl.rollouts.executor import one_thread

STEPS = 10


def mlp() -> PolicyView:
    """SB3's default PPO policy on Hopper's 11 numbers."""
    from stable_baselines3 import PPO

    return PolicyView.from_sb3(PPO("MlpPolicy", "Hopper-v5", seed=0, device="cpu"))


def cnn() -> PolicyView:
    """The NatureCNN on four pictures of 84 x 84."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 49, 512), nn.ReLU(), nn.Linear(512, 6)),
    )
    return PolicyView.from_torch(network, kind="q", observation_shape=(4, 84, 84), n_frames=4)


CASES: dict[str, tuple[Callable[[], PolicyView], int]] = {"mlp": (mlp, 64), "cnn": (cnn, 8)}


def attacked(view: PolicyView, n: int, frames: Tensor) -> Callable[[], object]:
    """PGD on `n` environments at a time, frame by frame, until all frames are done."""
    attack = rrl.attacks.GradientAttack(steps=STEPS, draws=1)
    attacker = Attacker(attack, rrl.ThreatModel(norm=math.inf, step=0.075), view, n, n_frames=view.n_frames)
    return lambda: [attacker.deliver(part) for part in torch.split(frames, n)]


def floor(view: PolicyView, frames: Tensor) -> Callable[[], object]:
    """The passes alone."""

    def run() -> None:
        stack = frames.unsqueeze(1).expand(-1, view.n_frames, *view.frame_shape)
        for step in range(STEPS + 1):
            x = frames.clone().requires_grad_(step < STEPS)
            scores = view.scores(view.fold(stack, x))
            if step < STEPS:
                torch.autograd.grad(scores.sum(), x)

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str, rounds: int) -> dict[str, Any]:
    make, n = CASES[name]
    view = make().eval().requires_grad_(False)
    frames = torch.rand(n, *view.frame_shape, generator=torch.Generator().manual_seed(0))
    runs = {"together": attacked(view, n, frames), "one at a time": attacked(view, 1, frames), "floor": floor(view, frames)}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run))
    ratios = [slow / fast for slow, fast in zip(times["one at a time"], times["together"], strict=True)]
    overheads = [fast / least for fast, least in zip(times["together"], times["floor"], strict=True)]
    found = {
        "network": name,
        "environments": n,
        "steps": STEPS,
        "ms": {key: round(1e3 * statistics.median(value), 3) for key, value in times.items()},
        "speedup of batching": round(statistics.median(ratios), 1),
        "attack over floor": round(statistics.median(overheads), 2),
    }
    print(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attacks.json"))
    arguments = parser.parse_args()
    with one_thread():
        results = [measure(name, arguments.rounds) for name in CASES]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
