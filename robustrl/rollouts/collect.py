"""Collect episodes: chunks from disk where they exist, from an executor where they do not."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete

from robustrl.attacks.base import Attack
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import check_float_frames
from robustrl.errors import ChainError, ChunkError, WorkerError, check_count
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import Episodes, Job, run_chunk, run_interleaved
from robustrl.rollouts.cluster import RayExecutor
from robustrl.rollouts.engines import make_engine, refuse_unseeded
from robustrl.rollouts.executor import Executor, LocalExecutor, one_thread
from robustrl.rollouts.progress import progress_bar
from robustrl.rollouts.store import ChunkStore
from robustrl.threat import ThreatModel

ATTACK_CHUNK = 100
"""Episodes per attacked chunk: every one of them carries `draws` copies through the network."""
IN_FLIGHT = 4
"""Chunks in turns on a GPU."""


def make_job(
    policy: PolicyView,
    recipe: EnvRecipe,
    *,
    seed: int = 0,
    chunk_size: int | None = None,
    engine: str = "auto",
    deterministic: bool = True,
    attack: Attack | None = None,
    threat: ThreatModel | None = None,
) -> Job:
    """A checked job; see `Job` for the arguments.

    Raises:
        ValueError: if policy, environment, attack and threat model do not fit each other.
        TypeError: for spaces without a view.
    """
    check_count("seed", seed, least=0)
    shape, space = policy.frame_shape, recipe.frame_space
    if recipe.frame_stack != policy.n_frames:
        raise ValueError(f"the policy stacks {policy.n_frames} frame(s), the environment recipe {recipe.frame_stack}")
    if shape != space.shape:
        raise ValueError(f"the policy takes frames of shape {shape}, but {recipe.label} gives {space.shape}")
    check_actions(policy, recipe)
    if not deterministic and not policy.samples:
        raise ValueError("deterministic must be True: state-dependent exploration (gSDE) is not a policy of one step")
    if recipe.ends_with_a_life:
        raise ChainError(
            f"an episode of {recipe.label} is one life, not a whole game: make it without terminal_on_life_loss / EpisodicLifeEnv"
        )
    if recipe.noise is not None or attack is not None:
        check_float_frames(recipe, "an attack" if recipe.noise is None else "noise")
    if (attack is None) != (threat is None):
        raise ValueError("attack and threat go together: got one without the other")
    if attack is not None and threat is not None:
        attack.check(policy, threat, recipe.noise)
    plans = attack is not None and attack.needs_simulator
    probe = make_engine(recipe, "list" if plans and engine == "auto" else engine)
    probe.close()
    if attack is not None:
        attack.check_host(simulators=hasattr(probe, "environments"))
    if probe.name == "list":
        refuse_unseeded(recipe)
    default = probe.default_chunk if attack is None else min(probe.default_chunk, ATTACK_CHUNK)
    size = default if chunk_size is None else check_count("chunk_size", chunk_size)
    return Job(policy, recipe, int(seed), size, probe.name, bool(deterministic), attack, threat)


def check_actions(policy: PolicyView, recipe: EnvRecipe) -> None:
    """Raise ValueError if the environment does not take the policy's actions."""
    ours, theirs = policy.action_space, recipe.action_space
    if isinstance(ours, Discrete) and isinstance(theirs, Discrete):
        fits = ours.n == theirs.n and int(theirs.start) == 0
    else:
        fits = (
            isinstance(ours, Box)
            and isinstance(theirs, Box)
            and ours.shape == theirs.shape
            and np.allclose(ours.low, theirs.low)
            and np.allclose(ours.high, theirs.high)
        )
    if not fits:
        raise ValueError(f"the policy acts in {ours}, but {recipe.label} takes {theirs}")


def collect(
    job: Job,
    episodes: int,
    *,
    n_workers: int = 1,
    executor: Executor | None = None,
    folder: str | os.PathLike[str] | None = None,
    in_flight: int | None = None,
    progress: bool = False,
    label: str = "episodes",
) -> Episodes:
    """Roll out `episodes` episodes of a job, in run order.

    Args:
        job: what to roll out.
        episodes: how many; fixed beforehand, whatever their returns.
        n_workers: processes on this machine.
        executor: another way to run the chunks.
        folder: where finished chunks are kept; a run that was killed or interrupted goes on from them.
        in_flight: chunks that take turns in this process, which keeps a GPU busy; default 4 on a GPU, else 1. Only without
            workers and executor; results do not depend on it.
        progress: show a bar with an ETA.
        label: its text.
    Returns:
        the episodes; bit-equal for any number of workers and after any interruption.
    Raises:
        ChunkError: if the folder holds damaged chunks or another job's.
        WorkerError: if workers keep dying.
    """
    check_count("episodes", episodes)
    check_count("n_workers", n_workers)
    store = None if folder is None else ChunkStore(folder, job)
    sizes = [min(job.chunk_size, episodes - start) for start in range(0, episodes, job.chunk_size)]
    parts: list[Episodes | None] = [None if store is None else store.load(i, n) for i, n in enumerate(sizes)]
    missing = [i for i, part in enumerate(parts) if part is None]
    if store is not None and len(missing) < len(parts):
        _check_stored(job, store, parts)
    if isinstance(executor, RayExecutor) and job.policy.device.type != "cpu":
        raise ValueError(
            f"a cluster's tasks compute on CPUs, but the policy is on {job.policy.device}: load the agent with device='cpu'"
        )
    tasks = [(i, sizes[i]) for i in missing]
    width = IN_FLIGHT if job.policy.device.type == "cuda" else 1
    if in_flight is not None:
        width = check_count("in_flight", in_flight)
    runner = executor or LocalExecutor(min(n_workers, max(1, len(missing))))
    if executor is None and n_workers == 1 and width > 1:
        finished = run_interleaved(job, tasks, width)
    else:
        finished = runner.run(partial(_run, job), tasks)
    try:
        with progress_bar(label, episodes, visible=progress) as advance:
            advance(sum(len(part) for part in parts if part is not None))
            for index, part in finished:
                if store is not None:
                    store.save(missing[index], part)
                parts[missing[index]] = part
                advance(len(part))
    finally:
        # A traceback would keep it alive, and with it what is still running.
        getattr(finished, "close", lambda: None)()
    done = [part for part in parts if part is not None]
    if len(done) < len(parts):
        raise WorkerError(f"{type(runner).__name__} returned only {len(done)} of {len(parts)} chunks")
    return Episodes.concatenate(done)


def _check_stored(job: Job, store: ChunkStore, parts: list[Episodes | None]) -> None:
    """Play one stored chunk again: neither the environment's code nor the libraries may have changed since it was written."""
    chunk, stored = next((i, part) for i, part in enumerate(parts) if part is not None)
    with one_thread():
        again = run_chunk(job, chunk, len(stored))
    if not np.array_equal(stored.returns, again.returns) or not np.array_equal(stored.lengths, again.lengths):
        raise ChunkError(
            f"{store.folder} holds episodes that come out differently now (chunk {chunk} was played again): the environment, the "
            "policy's code, a library or the processor changed since; choose another folder"
        )


def _run(job: Job, task: tuple[int, int]) -> Any:
    return run_chunk(job, *task)
