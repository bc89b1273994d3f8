"""What a robustness term costs: SAPPO with SGLD-10 and with IBP against PPO at equal steps on Hopper-v5, interleaved.

python benchmarks/bench_robust_training.py [--rounds 5] [--out benchmarks/results/robust_training.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.files import write_atomically
from robustrl.training.robust import SAPPO

STEPS = 4096
LEARNERS: dict[str, Callable[..., Any]] = {
    "PPO": PPO,
    "SAPPO, ibp": lambda *args, **kwargs: SAPPO(*args, loss="ibp", epsilon_schedule="constant", **kwargs),
    "SAPPO, sgld (10 steps)": lambda *args, **kwargs: SAPPO(*args, loss="sgld", epsilon_schedule="constant", **kwargs),
}


def seconds(make: Callable[..., Any]) -> tuple[float, float]:
    """Of `STEPS` environment steps with their updates, and of the updates alone."""
    preset = rrl.presets.mujoco
    model = make("MlpPolicy", rrl.make_vec_env("Hopper-v5", **preset.env, seed=0), seed=0, **preset.ppo)
    train, updates = model.train, [0.0]

    def timed() -> None:
        start = time.perf_counter()
        train()
        updates[0] += time.perf_counter() - start

    model.train = timed
    start = time.perf_counter()
    model.learn(STEPS)
    whole = time.perf_counter() - start
    model.get_env().close()
    return whole, updates[0]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/robust_training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = [{name: seconds(make) for name, make in LEARNERS.items()} for _ in range(arguments.rounds)]
    results = {}
    for name in LEARNERS:
        whole, updates = (statistics.median(found[name][part] for found in rounds) for part in (0, 1))
        ratios = [statistics.median(found[name][part] / found["PPO"][part] for found in rounds) for part in (0, 1)]
        results[name] = {
            "microseconds per step": round(1e6 * whole / STEPS),
            "times PPO": round(ratios[0], 2),
            "of updates alone": round(1e6 * updates / STEPS),
            "updates, times PPO": round(ratios[1], 2),
        }
        print(f"{name:24s} {results[name]}")
    record = {"torch": torch.__version__, "steps": STEPS, "rounds": arguments.rounds, "results": results, "seconds": rounds}
    write_atomically(arguments.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
