"""Throughput of smoothed CartPole episodes: vectorised rollouts against a faithful `model.predict` loop.

    python benchmarks/bench_rollouts.py [--rounds 5] [--out benchmarks/results/rollouts.json]

Both sides play the same thing: CartPole-v1 cut at 200 steps, Gaussian noise 0.2 on every observation, the same PPO network
(64x64 tanh, SB3's own), greedy actions, one core (one torch thread). The loop steps one environment with batch-1
`model.predict`, as the published scripts do; it plays few episodes and is extrapolated per step. The two sides and the
two-worker run are interleaved round by round, because a shared machine's speed drifts; ratios are formed within a round and
the median is reported. The floor is what nobody can skip: the network's own forward pass and the physics, batched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.policy import PolicyView
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.engines import NativeCartPole
from robustrl.rollouts.executor import one_thread

EPISODES, LOOP_STEPS, SIGMA = 10_000, 4_000, 0.2


def loop_seconds_per_step(model: PPO) -> float:
    """Batch-1 `model.predict` on one noisy environment."""
    env = rrl.envs.NoiseObservation(gym.make("CartPole-v1", max_episode_steps=200), rrl.Gaussian(SIGMA), seed=0)
    observation, _ = env.reset(seed=0)
    with one_thread():
        start = time.perf_counter()
        for _ in range(LOOP_STEPS):
            action, _ = model.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(int(action))
            if terminated or truncated:
                observation, _ = env.reset()
        return (time.perf_counter() - start) / LOOP_STEPS


def rollout_seconds_per_step(job: object, n_workers: int) -> tuple[float, float]:
    """Wall-clock seconds per environment step, and in all, of 10,000 episodes."""
    start = time.perf_counter()
    episodes = collect(job, EPISODES, n_workers=n_workers)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    return seconds / episodes.lengths.sum(), seconds


def floor_seconds_per_step(model: PPO, recipe: rrl.EnvRecipe, n: int = 1250) -> float:
    """One batched forward pass and one batched physics step per environment step, nothing else."""
    view = PolicyView.from_sb3(model).for_inference()
    engine = NativeCartPole(recipe)
    frames, _ = engine.start(n, np.random.SeedSequence(0))
    observation, actions = torch.from_numpy(frames), np.zeros(n, dtype=np.int64)
    with one_thread(), torch.inference_mode():
        start = time.perf_counter()
        for _ in range(200):
            for block in observation.split(625):
                view.scores(block)
            engine.step(actions)
        seconds = (time.perf_counter() - start) / (200 * n)
    engine.close()
    return seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="zoo/cartpole-ppo-sigma0.2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = rrl.load_agent(arguments.model, device="cpu")
    recipe = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=rrl.Gaussian(SIGMA))
    job = make_job(PolicyView.from_sb3(model), recipe)
    rollout_seconds_per_step(job, 2)  # starts the worker processes: their imports take seconds, once per program
    rows = []
    for _ in range(arguments.rounds):
        loop = loop_seconds_per_step(model)
        one, seconds = rollout_seconds_per_step(job, 1)
        two, seconds2 = rollout_seconds_per_step(job, 2)
        floor = floor_seconds_per_step(model, recipe)
        rows.append(
            {
                "loop_us": loop * 1e6,
                "one_us": one * 1e6,
                "two_us": two * 1e6,
                "floor_us": floor * 1e6,
                "one_s": seconds,
                "two_s": seconds2,
                "speedup": loop / one,
                "workers": one / two,
                "over_floor": one / floor,
            }
        )
        print("  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items()), flush=True)
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"\n{EPISODES} episodes: loop {median['loop_us']:.0f} us/step; rollouts {median['one_us']:.3f} us/step "
        f"({median['one_s']:.2f} s), {median['speedup']:.0f}x faster; two workers {median['workers']:.2f}x one; "
        f"floor {median['floor_us']:.3f} us/step, we are at {median['over_floor']:.2f}x of it"
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"command": "python benchmarks/bench_rollouts.py", "median": median, "rounds": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
