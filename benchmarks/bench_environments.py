"""What certification costs beside the environment itself: Hopper-v5 and one round of Pong.

    python benchmarks/bench_environments.py [hopper] [pong] [--rounds 5] [--out benchmarks/results]

The floor plays the very episodes that are certified: their actions are recorded beforehand, and then nothing but the
environment is stepped, on one core. For Hopper it is `env.unwrapped.step`, and MuJoCo's own `mj_step` with the same controls
is measured beside it; for Pong it is `env.step` (emulator, greyscale, resizing) and the network alone, on batches of the size
that the rollouts use. Certification is everything: making environments, resetting, noise, frame stacks, network, bookkeeping.
All are interleaved round by round, because a shared machine's speed drifts; ratios are formed within a round and the median
is reported. Worker processes are started before the first round: their imports take seconds, once per program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import robustrl as rrl
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import SMALL_BATCH, Job
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import one_thread
from robustrl.training.run_files import RunInfo

ZOO = {"hopper": "zoo/hopper-ppo-sigma0.1", "pong": "zoo/pong-one-round-ppo-sigma0.05"}
EPISODES, CHUNK = {"hopper": 128, "pong": 256}, {"hopper": 64, "pong": 64}

Recording = dict[int, list[Any]]


class Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the actions of every episode, by the seed that it was reset with."""

    episodes: Recording = {}  # noqa: RUF012

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._actions = Recorder.episodes.setdefault(seed, [])
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        self._actions.append(np.array(action))
        return super().step(action)


def replayed(env: gym.Env[Any, Any], episodes: Recording) -> float:
    """Seconds that stepping alone takes; resets are not counted."""
    seconds = 0.0
    with one_thread():
        for seed, actions in episodes.items():
            env.reset(seed=seed)
            start = time.perf_counter()
            for action in actions:
                env.step(action)
            seconds += time.perf_counter() - start
    return seconds


def physics(env: Any, episodes: Recording) -> float:
    """Seconds of `mj_step` with the recorded controls, in the recorded states."""
    import mujoco

    seconds = 0.0
    for seed, actions in episodes.items():
        env.reset(seed=seed)
        model, data, frames = env.unwrapped.model, env.unwrapped.data, env.unwrapped.frame_skip
        start = time.perf_counter()
        for action in actions:
            data.ctrl[:] = action
            mujoco.mj_step(model, data, nstep=frames)
        seconds += time.perf_counter() - start
    return seconds


def network(view: PolicyView, steps: int) -> float:
    """Seconds of the forward passes alone."""
    policy, observation = view.for_inference(), torch.rand(SMALL_BATCH, *view.observation_shape)
    with one_thread(), torch.inference_mode():
        start = time.perf_counter()
        for _ in range(steps // SMALL_BATCH):
            policy.scores(observation)
        return time.perf_counter() - start


def certified(job: Job, episodes: int, n_workers: int) -> float:
    """Seconds of the whole rollout."""
    start = time.perf_counter()
    collect(job, episodes, n_workers=n_workers)
    return time.perf_counter() - start


def measure(task: str, rounds: int) -> dict[str, Any]:
    """All rounds of a task, and their median."""
    folder, n = ZOO[task], EPISODES[task]
    recipe = RunInfo.load(folder).env
    view = recipe.view(rrl.load_agent(folder, device="cpu"))
    job = make_job(view, recipe, chunk_size=CHUNK[task])
    Recorder.episodes.clear()
    lengths = collect(make_job(view, replace(recipe, wrappers=(Recorder,)), chunk_size=CHUNK[task]), n).lengths
    steps, episodes = int(lengths.sum()), dict(Recorder.episodes)
    recorded = sum(map(len, episodes.values()))
    if recorded != steps:
        raise SystemExit(f"recorded {recorded} steps of {steps}")
    env: Any = recipe.base_env(checked=False)
    certified(job, n, 2)
    rows = []
    for _ in range(rounds):
        row = {"certify_us": certified(job, n, 1)}
        if task == "hopper":
            row |= {"env_step_us": replayed(env.unwrapped, episodes), "mj_step_us": physics(env, episodes)}
            floor = row["env_step_us"]
        else:
            row |= {"env_step_us": replayed(env, episodes), "network_us": network(view, steps)}
            floor = row["env_step_us"] + row["network_us"]
        two, one = certified(job, n, 2), row["certify_us"]
        row = {key: value / steps * 1e6 for key, value in row.items()} | {"over_floor": one / floor, "workers": one / two}
        rows.append(row)
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"episodes": n, "steps": steps, "mean_length": float(lengths.mean()), "median": median, "rounds": rows}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(ZOO)}; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for task in arguments.tasks or ZOO:
        found = {"command": f"python benchmarks/bench_environments.py {task}", **measure(task, arguments.rounds)}
        print(
            f"{task}: {found['episodes']} episodes of {found['mean_length']:.0f} steps; median "
            + "  ".join(f"{key} {value:.3g}" for key, value in found["median"].items()),
            flush=True,
        )
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{task}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
