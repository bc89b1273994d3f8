"""Observations that an agent meets: what is trained offline is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robustrl.attacks import Attack
from robustrl.envs.recipe import EnvRecipe
from robustrl.noise import Noise
from robustrl.policy import Padding, PolicyView, fold_frames, push_frame, stacked_shape, start_stack
from robustrl.rollouts.chunk import Job, attacker_of, inside
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.engines import make_engine
from robustrl.seeding import chunk_seeds, torch_generator
from robustrl.threat import ThreatModel

SLOTS = 16
"""Episodes side by side while data are gathered."""


@dataclass(frozen=True)
class Stacks:
    """Clean frame stacks from rollouts.

    Attributes:
        frames: (n, k, *frame), float32, oldest first.
        padding: leading frames that fill the stack at the start of an episode, (n,).
        episodes: which episode each is from, int64 (n,).
    """

    frames: Tensor
    padding: Tensor
    episodes: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def joined(cls, parts: Sequence[Stacks]) -> Stacks:
        """All stacks of several rollouts, whose episodes are different ones."""
        first = np.cumsum([0, *(int(part.episodes.max()) + 1 for part in parts)])
        episodes = [part.episodes + int(start) for part, start in zip(parts, first, strict=False)]
        return cls(torch.cat([part.frames for part in parts]), torch.cat([part.padding for part in parts]), torch.cat(episodes))

    def pairs(
        self, rows: Tensor, policy: PolicyView, noise: Noise, fill: Padding, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The policy's clean observations, and the denoiser's noisy ones.

        Every frame has noise of its own; the copies of a first frame that fill a stack have the same.
        """
        frames, padding = self.frames[rows].to(policy.device), self.padding[rows].to(policy.device)
        noisy = noise.perturb(frames.flatten(0, 1), generator).reshape(frames.shape)
        place = torch.arange(frames.shape[1], device=frames.device)
        if fill == "reset":
            source = torch.maximum(place, padding[:, None])
            noisy = noisy[torch.arange(len(noisy), device=frames.device)[:, None], source]
        else:
            noisy[place < padding[:, None]] = 0
        return policy.fold(frames[:, -policy.n_frames :]), folded(noisy, policy)


def folded(frames: Tensor, policy: PolicyView) -> Tensor:
    """Observations of stacks that may hold more frames than the policy takes."""
    n = frames.shape[1]
    return fold_frames(frames, policy.observation_shape if n == policy.n_frames else stacked_shape(policy.frame_shape, n))


def gather(
    policy: PolicyView,
    recipe: EnvRecipe,
    n: int,
    seed: int,
    *,
    n_frames: int | None = None,
    engine: str = "auto",
    attack: Attack | None = None,
    threat: ThreatModel | None = None,
) -> Stacks:
    """Clean frame stacks of episodes that an agent plays: smoothed with the recipe's noise, or clean without any.

    Whole episodes are played and `n` of their stacks are drawn at random, so that early steps are not preferred.

    Args:
        policy: who acts, greedily.
        recipe: environment and noise; the agent sees as many frames as its policy takes.
        n: number of stacks.
        seed: of environments, noise, attacker and the draw.
        n_frames: frames in one of the stacks; default as many as the policy takes.
        engine: how environments run side by side.
        attack: what deceives the agent meanwhile, so that it gets where an attacker may lead it; the stacks are the true frames.
        threat: the attack's, in the recipe's frame units.
    """
    recipe = replace(recipe, frame_stack=policy.n_frames)
    job = make_job(policy, recipe, seed=seed, engine=engine, attack=attack, threat=threat)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    total = chunk = 0
    while total < n:
        found += _play(job, chunk, n_frames or policy.n_frames)
        total, chunk = sum(len(frames) for frames, _, _ in found), chunk + 1
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]
    return Stacks(*(torch.cat(part)[chosen] for part in zip(*found, strict=True)))


def _play(job: Job, chunk: int, n_frames: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The clean stacks of one chunk of episodes, step by step, their padding and their episodes."""
    policy, recipe = job.policy, job.recipe
    seeds, engine = chunk_seeds(job.seed, chunk), make_engine(recipe, job.engine)
    generator, device = torch_generator(seeds.noise, policy.device), policy.device
    attacker, slots = attacker_of(job, seeds.attacker, SLOTS, engine), np.arange(SLOTS)

    def pushed(stack: Tensor | None, frames: Tensor, count: int) -> Tensor:
        return start_stack(frames, count, recipe.stack_padding) if stack is None else push_frame(stack, frames)

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    clean: Tensor | None = None
    seen: Tensor | None = None
    try:
        observations, _ = engine.start(SLOTS, seeds.environment)
        memory = policy.memory(SLOTS)
        for step in range(recipe.horizon):
            frames = torch.from_numpy(np.array(recipe.frames(observations), dtype=np.float32)).to(device)
            told = frames if attacker is None else attacker.deliver(frames, slots, seen=seen, memory=memory)
            noisy = told if recipe.noise is None else recipe.noise.perturb(told, generator)
            clean, seen = pushed(clean, frames, n_frames), pushed(seen, noisy, policy.n_frames)
            padding = torch.full((len(slots),), max(0, n_frames - 1 - step))
            found.append((clean.cpu(), padding, torch.from_numpy(chunk * SLOTS + slots)))
            actions, memory = policy.decide(seen, memory, batch=SLOTS)
            observations, _, finished = engine.step(inside(policy.received(actions), recipe))
            if finished.all():
                break
            if finished.any():
                engine.keep(~finished)
                kept = torch.from_numpy(~finished).to(device)
                observations, clean, seen, slots = observations[~finished], clean[kept], seen[kept], slots[~finished]
                memory = None if memory is None else memory[kept]
    finally:
        engine.close()
    return found
