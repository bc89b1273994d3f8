"""What a robustness term costs: SAPPO with SGLD-10 and with IBP against PPO at equal steps on Hopper-v5, interleaved.

python benchmarks/bench_robust_training.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.training.robust import SAPPO

STEPS, ROUNDS = 4096, 5
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
    """Measure and print."""
    torch.set_num_threads(1)
    rounds = [{name: seconds(make) for name, make in LEARNERS.items()} for _ in range(ROUNDS)]
    for name in LEARNERS:
        whole, updates = (statistics.median(found[name][part] for found in rounds) for part in (0, 1))
        ratios = [statistics.median(found[name][part] / found["PPO"][part] for found in rounds) for part in (0, 1)]
        print(
            f"{name:24s} {1e6 * whole / STEPS:6.0f} us per step ({ratios[0]:.2f} x PPO), "
            f"updates alone {1e6 * updates / STEPS:6.0f} us ({ratios[1]:.2f} x)"
        )


if __name__ == "__main__":
    main()
