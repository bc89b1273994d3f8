"""One chunk of episodes: the atom of every experiment.

(chunk number, slot) names an episode. A chunk's result depends on the job and its number alone, not on who runs it,
when, or beside what.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.attacks.attacker import Attacker
from robustrl.attacks.base import Attack
from robustrl.envs.attack_core import attack_range
from robustrl.envs.recipe import EnvRecipe
from robustrl.policy import INFERENCE_BATCH, PolicyView, push_frame, start_stack
from robustrl.rollouts.engines import Engine, make_engine
from robustrl.rollouts.executor import one_thread
from robustrl.rollouts.identity import identity
from robustrl.rollouts.streams import NoiseStreams
from robustrl.seeding import chunk_seeds, torch_generator
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class Episodes:
    """Finished episodes in run order: chunk after chunk, slot after slot.

    Attributes:
        returns: undiscounted returns, float64 (n,).
        lengths: steps, int64 (n,).
        seeds: environment seeds, uint64 (n,); with the chunk and slot they name the episode.
        spent: attack budget used, float64 (n,); zeros without an attacker.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    spent: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.returns)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The fields by name, as chunk files store them."""
        return {"returns": self.returns, "lengths": self.lengths, "seeds": self.seeds, "spent": self.spent}

    @classmethod
    def concatenate(cls, parts: list[Episodes]) -> Episodes:
        """All parts, in the order given."""
        return cls(**{name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()})


@dataclass(frozen=True)
class Job:
    """What a set of chunks has in common: everything that an episode's law and its random draws depend on.

    Args:
        policy: the view to roll out.
        recipe: environment, noise, frame stack and horizon.
        seed: root of the seed tree.
        chunk_size: episodes per chunk.
        engine: "native", "list", "envpool" or "ale".
        deterministic: greedy actions; otherwise the policy samples.
        attack: the attacker, or None.
        threat: its budget, required with an attack.
    """

    policy: PolicyView
    recipe: EnvRecipe
    seed: int
    chunk_size: int
    engine: str
    deterministic: bool = True
    attack: Attack | None = None
    threat: ThreatModel | None = None

    def describe(self) -> dict[str, Any]:
        """Plain data that identifies the job's episodes, for manifests and certificates."""
        return {
            "policy_hash": self.policy.fingerprint(),
            "recipe": self.recipe.to_dict(),
            "code": [identity(part) for part in (self.recipe.factory, *self.recipe.wrappers) if part is not None],
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "engine": self.engine,
            "deterministic": self.deterministic,
            "device": self.policy.device.type,
            "attack": None if self.attack is None else self.attack.to_dict(),
            "threat": None if self.threat is None else self.threat.to_dict(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of `describe`."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True, default=str).encode()).hexdigest()


def run_chunk(job: Job, chunk: int, n: int) -> Episodes:
    """Roll out `n` episodes, one per slot, until the last has ended.

    Per step: true frames -> attack -> noise -> frame stack -> policy -> environment. A slot's noise and policy draws do not
    depend on which others still run.

    Args:
        job: what to roll out.
        chunk: chunk number; names the random streams.
        n: slots, at most `job.chunk_size`.
    Raises:
        ValueError: if the environment returns NaN or inf, the horizon is exceeded, or the policy's scores are not finite.
        BudgetExceededError: if the attack delivers more than its threat model allows.
    """
    playing = _play(job, chunk, n)
    while True:
        try:
            next(playing)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def run_interleaved(job: Job, tasks: Sequence[tuple[int, int]], width: int) -> Iterator[tuple[int, Episodes]]:
    """Roll out chunks in one process, `width` at a time in turns, so that a GPU computes while environments step.

    Args:
        job: what to roll out.
        tasks: (chunk, n) pairs.
        width: chunks that are on their way together, each on a CUDA stream of its own.
    Yields:
        (index of the task, episodes) as chunks finish; the episodes are those of `run_chunk`.
    """
    device, waiting = job.policy.device, list(enumerate(tasks))
    running: list[tuple[int, Any, Generator[None, None, Episodes]]] = []
    while waiting or running:
        while waiting and len(running) < width:
            index, (chunk, n) = waiting.pop(0)
            stream: Any = cast(Any, torch.cuda).Stream(device) if device.type == "cuda" else None
            running.append((index, stream, _play(job, chunk, n)))
        for turn in list(running):
            index, stream, playing = turn
            with one_thread(), nullcontext() if stream is None else torch.cuda.stream(stream):
                try:
                    next(playing)
                    continue
                except StopIteration as end:
                    finished = end.value
            running.remove(turn)
            yield index, finished


def _play(job: Job, chunk: int, n: int) -> Generator[None, None, Episodes]:
    """`run_chunk`, pausing at every step when the device has its work and the host could do something else."""
    policy, recipe = job.policy.for_inference(), job.recipe
    device, seeds = policy.device, chunk_seeds(job.seed, chunk)
    engine = make_engine(recipe, job.engine)
    noise = None if recipe.noise is None else NoiseStreams(recipe.noise, seeds.noise, n, _noise_block(job, n), device)
    policy_generator = torch_generator(seeds.policy, device)
    attacker = attacker_of(job, seeds.attacker, n, engine)
    batch = _inference_batch(job)

    returns, lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
    slots = np.arange(n)
    try:
        first, environment_seeds = engine.start(n, seeds.environment)
        frames = _received(first, recipe, device)
        stack: torch.Tensor | None = None
        memory = policy.memory(n)
        for _ in range(recipe.horizon):
            if attacker is not None:
                frames = attacker.deliver(frames, slots, seen=stack, memory=memory)
            seen = frames if noise is None else noise(frames, slots)
            stack = _observe(stack, seen.float(), recipe)
            draws = None
            if not job.deterministic:
                draws = policy.draw(n, policy_generator)[torch.from_numpy(slots).to(device)]
            actions, memory = policy.decide(stack, memory, batch=batch, deterministic=job.deterministic, draws=draws)
            yield
            step = engine.step(inside(policy.received(actions), recipe))
            returns[slots] += step.rewards
            lengths[slots] += 1
            frames = _received(step.frames, recipe, device)
            if step.finished.any():
                running = ~step.finished
                slots = slots[running]
                if not slots.size:
                    break
                engine.keep(running)
                kept = torch.from_numpy(running).to(device)
                frames, stack = frames[kept], stack[kept]
                memory = None if memory is None else memory[kept]
        else:
            raise ValueError(f"{recipe.label}: {slots.size} episodes still run after the horizon of {recipe.horizon} steps")
    finally:
        engine.close()
    if not np.isfinite(returns).all():
        raise ValueError(f"{recipe.label} returned rewards that are NaN or inf")
    return Episodes(returns, lengths, environment_seeds, np.zeros(n) if attacker is None else attacker.ledger.spent)


def attacker_of(job: Job, seed: np.random.SeedSequence, n: int, engine: Engine) -> Attacker | None:
    """Who attacks `n` episodes of a job side by side; None without an attack."""
    if job.attack is None or job.threat is None:
        return None
    recipe = job.recipe
    # A frozen copy is differentiated: the user's model keeps its gradients and its training mode.
    victim = copy.deepcopy(job.policy).eval().requires_grad_(False)
    return Attacker(
        job.attack,
        job.threat,
        victim,
        n,
        noise=recipe.noise,
        n_frames=recipe.frame_stack,
        padding=recipe.stack_padding,
        horizon=recipe.horizon,
        pixels=attack_range(recipe.frame_space, job.threat),
        generator=torch_generator(seed, victim.device),
        environments=getattr(engine, "environments", None),
    )


SMALL_BATCH = 16
"""Rows per forward pass where environments are stepped one by one: their cost dwarfs a pass, and towards the end of a chunk
few of them run."""
NOISE_BLOCK = 4096
"""About how many draws slots share a generator for; a block is drawn as long as one of its slots runs."""


def _inference_batch(job: Job) -> int:
    if job.engine != "native" and job.policy.device.type == "cpu":
        return min(SMALL_BATCH, job.chunk_size)
    return math.ceil(job.chunk_size / math.ceil(job.chunk_size / INFERENCE_BATCH))


def _noise_block(job: Job, n: int) -> int:
    if job.engine == "native" or job.policy.device.type != "cpu":
        return n
    return min(n, max(1, NOISE_BLOCK // math.prod(job.recipe.frame_space.shape)))


def _received(observations: NDArray[Any], recipe: EnvRecipe, device: torch.device) -> torch.Tensor:
    frames = recipe.frames(observations)
    if not np.isfinite(observations).all() or not np.isfinite(frames).all():
        raise ValueError(f"{recipe.label} returned observations that are NaN or inf")
    return torch.from_numpy(frames).to(device)


def inside(actions: NDArray[Any], recipe: EnvRecipe) -> NDArray[Any]:
    """Actions inside the environment's own space, whose bounds the policy may know to a few digits only."""
    space = recipe.action_space
    return np.clip(actions, space.low, space.high) if isinstance(space, spaces.Box) else actions


def _observe(stack: torch.Tensor | None, frames: torch.Tensor, recipe: EnvRecipe) -> torch.Tensor:
    if stack is None:
        return start_stack(frames, recipe.frame_stack, recipe.stack_padding)
    return push_frame(stack, frames)
