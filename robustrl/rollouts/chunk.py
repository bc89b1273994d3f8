"""One chunk of episodes: the atom of every experiment.

(chunk number, slot) names an episode. A chunk's result depends on the job and its number alone, not on who runs it,
when, or beside what.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustrl.attacks.base import Attack, AttackContext
from robustrl.envs.recipe import EnvRecipe
from robustrl.policy import INFERENCE_BATCH, PolicyView, push_frame, start_stack
from robustrl.rollouts.engines import make_engine
from robustrl.rollouts.identity import identity
from robustrl.seeding import chunk_seeds, torch_generator
from robustrl.threat import Ledger, ThreatModel


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
        engine: "native" or "list".
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

    Per step: true frames -> attack -> noise -> frame stack -> policy -> environment. Noise and policy draws are made for
    all `n` slots at every step, so a slot's draws do not depend on which others still run.

    Args:
        job: what to roll out.
        chunk: chunk number; names the random streams.
        n: slots, at most `job.chunk_size`.
    Raises:
        ValueError: if the environment returns NaN or inf, the horizon is exceeded, or the policy's scores are not finite.
        BudgetExceededError: if the attack delivers more than its threat model allows.
    """
    policy, recipe, noise = job.policy.for_inference(), job.recipe, job.recipe.noise
    device, seeds = policy.device, chunk_seeds(job.seed, chunk)
    engine = make_engine(recipe, job.engine)
    noise_generator = torch_generator(seeds.noise, device)
    policy_generator = torch_generator(seeds.policy, device)
    attacker_generator = torch_generator(seeds.attacker, device)
    ledger = None if job.threat is None else Ledger(job.threat, n)
    batch = math.ceil(job.chunk_size / math.ceil(job.chunk_size / INFERENCE_BATCH))
    # The attacker differentiates a frozen copy: the user's model keeps its gradients and its training mode.
    victim = None if job.attack is None else copy.deepcopy(job.policy).eval().requires_grad_(False)

    attackable = torch.ones(())
    if job.threat is not None:
        attackable = torch.from_numpy(job.threat.attackable(policy.frame_shape).astype(np.float32)).to(device)
    returns, lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
    slots = np.arange(n)
    try:
        first, environment_seeds = engine.start(n, seeds.environment)
        frames = _received(first, recipe, device)
        everyone = frames
        stack: torch.Tensor | None = None
        clean_stack: torch.Tensor | None = None
        rows = torch.arange(n, device=device)
        for _ in range(recipe.horizon):
            if job.attack is not None:
                assert ledger is not None
                assert victim is not None
                clean_stack = _observe(clean_stack, frames, recipe)
                context = AttackContext(
                    policy=victim,
                    noise=noise,
                    clean_stack=clean_stack,
                    seen_stack=start_stack(frames, recipe.frame_stack, recipe.stack_padding)
                    if stack is None
                    else push_frame(stack, frames),
                    attackable=attackable,
                    allowance=torch.from_numpy(ledger.allowance[slots]).to(device),
                    first_step=stack is None,
                    padding=recipe.stack_padding,
                    generator=attacker_generator,
                )
                delivered = job.attack.perturb(frames, context)
                ledger.charge(frames.cpu().numpy(), delivered.cpu().numpy(), slots)
                frames = delivered
            seen = frames
            if noise is not None:
                if slots.size == n:
                    everyone = frames
                else:
                    everyone[rows] = frames
                seen = noise.perturb(everyone, noise_generator)
                if slots.size < n:
                    seen = seen[rows]
            stack = _observe(stack, seen.float(), recipe)
            uniforms = None
            if not job.deterministic:
                uniforms = torch.rand(n, 2, generator=policy_generator, device=device)[rows]
            actions = policy.act_blocked(stack, batch=batch, deterministic=job.deterministic, uniforms=uniforms)
            step = engine.step(actions.cpu().numpy())
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
                frames, stack, rows = frames[kept], stack[kept], rows[kept]
                clean_stack = None if clean_stack is None else clean_stack[kept]
        else:
            raise ValueError(f"{recipe.label}: {slots.size} episodes still run after the horizon of {recipe.horizon} steps")
    finally:
        engine.close()
    if not np.isfinite(returns).all():
        raise ValueError(f"{recipe.label} returned rewards that are NaN or inf")
    return Episodes(returns, lengths, environment_seeds, np.zeros(n) if ledger is None else ledger.spent)


def _received(frames: NDArray[Any], recipe: EnvRecipe, device: torch.device) -> torch.Tensor:
    if not np.isfinite(frames).all():
        raise ValueError(f"{recipe.label} returned observations that are NaN or inf")
    return torch.from_numpy(frames).to(device)


def _observe(stack: torch.Tensor | None, frames: torch.Tensor, recipe: EnvRecipe) -> torch.Tensor:
    if stack is None:
        return start_stack(frames, recipe.frame_stack, recipe.stack_padding)
    return push_frame(stack, frames)
