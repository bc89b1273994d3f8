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
    """One `reset(seed=)` per slot; shape (n_slots,). See `distinct_seeds`."""
    return distinct_seeds(sequence, n_slots)


def distinct_seeds(sequence: np.random.SeedSequence, n: int) -> NDArray[np.uint32]:
    """`n` seeds of 32 bits for a chunk's stream, different from each other and from those of its other chunks.

    Random 32-bit seeds would meet: among a million episodes about a hundred pairs would share one. These count up from a
    random number of the root and stream, and cannot meet up to 2^20 chunks of 4096 slots.

    Args:
        sequence: of a chunk's stream, with the spawn key (chunk, stream).
        n: how many; more than 4096 are random.
    """
    if n > 4096 or len(sequence.spawn_key) < 2:
        return sequence.generate_state(n).astype(np.uint32)
    chunk, *stream = sequence.spawn_key
    first = np.random.SeedSequence(sequence.entropy, spawn_key=tuple(stream)).generate_state(1).astype(np.uint64)[0]
    numbers: NDArray[np.uint64] = first + np.uint64(chunk) + (np.arange(n, dtype=np.uint64) << np.uint64(20))
    return (numbers % np.uint64(2**32)).astype(np.uint32)


def numpy_generator(seed: int | np.random.SeedSequence | None) -> np.random.Generator:
    """A numpy generator of our own, never an environment's."""
    return np.random.default_rng(seed)


def torch_generator(sequence: np.random.SeedSequence, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded from the tree."""
    import torch

    return torch.Generator(device).manual_seed(integer_seed(sequence))
