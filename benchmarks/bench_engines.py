"""Engines side by side: microseconds per environment step, and milliseconds to start a slot.

    python benchmarks/bench_engines.py [--rounds 5] [--out benchmarks/results/engines.json]

Every engine plays whole chunks of random actions, on one core except "ale", which has a thread per game: from the first
frames until the last slot has ended, finished slots dropped as they end. "loop" steps the same environments one after the
other, each to its end, and does nothing else. The alternatives are interleaved round by round, because a shared machine's
speed drifts; ratios to the list are formed within a round and the median is reported. An engine that is refused is left out:
EnvPool plays MuJoCo's environments only where `mujoco` is the version inside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from robustrl import EnvRecipe
from robustrl.registration import register_envs
from robustrl.rollouts.engines import ENGINES, make_engine

CASES: dict[str, tuple[int, int]] = {  # id -> (horizon, most slots)
    "CartPole-v1": (500, 1250),
    "MountainCarContinuous-v0": (200, 256),
    "InvertedPendulum-v5": (1000, 256),
    "Hopper-v5": (1000, 256),
    "robustrl/Atari-v0": (200, 16),
}


def actions(recipe: EnvRecipe, n: int) -> np.ndarray:
    """Random actions (n, ...) of the dtype that policies send."""
    space: Any = recipe.action_space
    rng = np.random.default_rng(0)
    if hasattr(space, "n"):
        return rng.integers(space.n, size=n)
    return rng.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)


def play(recipe: EnvRecipe, name: str, n: int) -> tuple[float, float]:
    """Microseconds per step and milliseconds per started slot of one chunk."""
    engine, draws, steps, running = make_engine(recipe, name), actions(recipe, 64 * n), 0, n
    begin = time.perf_counter()
    engine.start(n, np.random.SeedSequence(0))
    started = time.perf_counter()
    for t in range(recipe.horizon):
        step = engine.step(draws[(t % 64) * n :][:running])
        steps += running
        running -= int(step.finished.sum())
        if not running:
            break
        if step.finished.any():
            engine.keep(~step.finished)
    ended = time.perf_counter()
    engine.close()
    return (ended - started) / steps * 1e6, (started - begin) / n * 1e3


def loop(recipe: EnvRecipe, n: int) -> tuple[float, float]:
    """The same without an engine."""
    draws, steps, seconds = actions(recipe, recipe.horizon), 0, 0.0
    begin = time.perf_counter()
    envs = [recipe.base_env(checked=False) for _ in range(n)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    started = time.perf_counter()
    for env in envs:
        for action in draws:
            _, _, terminated, truncated, _ = env.step(action)
            steps += 1
            if terminated or truncated:
                break
    seconds = time.perf_counter() - started
    for env in envs:
        env.close()
    return seconds / steps * 1e6, (started - begin) / n * 1e3


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    register_envs()
    results: dict[str, Any] = {}
    for env_id in arguments.ids or CASES:
        horizon, most = CASES[env_id]
        kwargs = {"game": "pong"} if env_id.startswith("robustrl/") else {}
        recipe = EnvRecipe(env_id=env_id, env_kwargs=kwargs, max_episode_steps=horizon)
        chunks: dict[str, int] = {}
        for name in ENGINES[1:]:
            try:
                chunks[name] = min(most, make_engine(recipe, name).default_chunk)
            except ValueError as reason:
                print(f"{env_id}: {reason}")
        rounds = []
        for _ in range(arguments.rounds):
            row = {"loop": loop(recipe, chunks["list"])} | {name: play(recipe, name, n) for name, n in chunks.items()}
            rounds.append(row)
        medians = {
            name: {
                "us_per_step": statistics.median(row[name][0] for row in rounds),
                "start_ms_per_slot": statistics.median(row[name][1] for row in rounds),
                "times_list": statistics.median(row["list"][0] / row[name][0] for row in rounds),
                "slots": chunks.get(name, chunks["list"]),
            }
            for name in rounds[0]
        }
        results[env_id] = {"median": medians, "rounds": rounds}
        for name, row in medians.items():
            print(
                f"{env_id:26s} {name:8s} {row['slots']:5d} slots  {row['us_per_step']:8.2f} us/step  "
                f"{row['times_list']:6.2f} x list  start {row['start_ms_per_slot']:7.3f} ms/slot",
                flush=True,
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python benchmarks/bench_engines.py", *arguments.ids, f"--rounds {arguments.rounds}"])
        libraries = {name: version(name) for name in ("gymnasium", "mujoco", "envpool", "ale-py")}
        arguments.out.write_text(json.dumps({"command": command, "libraries": libraries, "results": results}, indent=1))


if __name__ == "__main__":
    main()
