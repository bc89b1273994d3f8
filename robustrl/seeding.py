"""Where every random number comes from.

One tree: root seed -> chunk -> (environment, noise, attacker, policy). A stream depends on its own path alone,
so neither the number of workers nor the order of chunks nor an attacker's appetite changes anybody else's draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robustrl.errors import check_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ChunkSeeds:
    """The four independent streams of one chunk of episodes."""

    environment: np.random.SeedSequence
    noise: np.random.SeedSequence
    attacker: np.random.SeedSequence
    policy: np.random.SeedSequence


def chunk_seeds(seed: int, chunk: int) -> ChunkSeeds:
    """Seeds of chunk number `chunk` under the root `seed`.

    Raises:
        ValueError: if either is negative.
    """
    seed, chunk = check_count("seed", seed, least=0), check_count("chunk", chunk, least=0)
    return ChunkSeeds(*(np.random.SeedSequence(seed, spawn_key=(chunk, stream)) for stream in range(4)))


def integer_seed(sequence: np.random.SeedSequence) -> int:
    """One 63-bit integer for a consumer that takes no SeedSequence."""
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def slot_seeds(sequence: np.random.SeedSequence, n_slots: int) -> NDArray[np.uint32]:
    """One `reset(seed=)` per slot; shape (n_slots,)."""
    return sequence.generate_state(n_slots).astype(np.uint32)


def numpy_generator(seed: int | np.random.SeedSequence | None) -> np.random.Generator:
    """A numpy generator of our own, never an environment's."""
    return np.random.default_rng(seed)


def torch_generator(sequence: np.random.SeedSequence, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded from the tree."""
    import torch

    return torch.Generator(device).manual_seed(integer_seed(sequence))
