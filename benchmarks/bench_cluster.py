"""What Ray costs: 10,000 smoothed CartPole episodes on two Ray nodes against two local worker processes.

    python benchmarks/bench_cluster.py [--rounds 7] [--out benchmarks/results/cluster.json]

The same job as in `bench_rollouts.py`: CartPole-v1 cut at 200 steps, Gaussian noise 0.2, a 64x64 tanh PPO network. Both nodes
are on this machine, one CPU each, so that only the executor differs; both sides have started and imported everything before
the clock starts. The two sides alternate, and take turns in going first, because a shared machine's speed drifts; ratios are
formed within a round and the median is reported. The returns must be equal to the last bit. The overhead of one chunk is
measured with tasks that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported; Ray would keep a token in the user's home
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
from ray.cluster_utils import Cluster

import robustrl as rrl
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import Episodes, Job
from robustrl.rollouts.cluster import RayExecutor
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import Executor, LocalExecutor

EPISODES, SIGMA, EMPTY = 10_000, 0.2, 1_000
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def nothing(_: int) -> None:
    """A task without work."""


def seconds_of_rollouts(job: Job, executor: Executor) -> tuple[float, Episodes]:
    """Wall-clock seconds of all episodes."""
    start = time.perf_counter()
    episodes = collect(job, EPISODES, executor=executor)
    return time.perf_counter() - start, episodes


def seconds_of_nothing(executor: Executor) -> float:
    """Wall-clock seconds per empty task."""
    start = time.perf_counter()
    assert len(list(executor.run(nothing, range(EMPTY)))) == EMPTY
    return (time.perf_counter() - start) / EMPTY


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="zoo/cartpole-ppo-sigma0.2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = rrl.load_agent(arguments.model, device="cpu")
    recipe = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=rrl.Gaussian(SIGMA))
    job = make_job(PolicyView.from_sb3(model), recipe)
    two = Cluster(initialize_head=True, head_node_args=NODE)
    rows = []
    try:
        two.add_node(**NODE)
        with RayExecutor(two.address) as cluster:
            sides: dict[str, Executor] = {"local": LocalExecutor(2), "ray": cluster}
            for executor in (*sides.values(), *sides.values()):  # twice: a node may be late with its first worker
                seconds_of_rollouts(job, executor)
            for number in range(arguments.rounds):
                row, found = {}, {}
                for name in sorted(sides, reverse=bool(number % 2)):
                    row[f"{name}_s"], found[name] = seconds_of_rollouts(job, sides[name])
                    row[f"{name}_task_ms"] = 1e3 * seconds_of_nothing(sides[name])
                assert np.array_equal(found["local"].returns, found["ray"].returns)
                rows.append(row | {"ray_over_local": row["ray_s"] / row["local_s"]})
                print("  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items()), flush=True)
    finally:
        ray.shutdown()
        two.shutdown()
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"\n{EPISODES} episodes, {-(-EPISODES // job.chunk_size)} chunks: two local workers {median['local_s']:.2f} s, two Ray "
        f"nodes {median['ray_s']:.2f} s, {median['ray_over_local']:.2f}x; an empty task {median['local_task_ms']:.2f} ms and "
        f"{median['ray_task_ms']:.2f} ms; returns bit-equal"
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"command": "python benchmarks/bench_cluster.py", "median": median, "rounds": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
