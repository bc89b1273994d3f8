"""Noise for slots of which some have ended, such that nobody's draws depend on the others."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustrl.noise import Noise
from robustrl.seeding import distinct_seeds, torch_generator


class NoiseStreams:
    """One generator per block of slots. A block is drawn whole at every step as long as one of its slots runs, so a slot's
    draws are the same whoever else has ended, and at most a block's worth of them is wasted.

    Args:
        noise: the mechanism.
        seed: of the chunk's noise.
        n: slots.
        block: slots per generator; `n` for a single one.
        device: of the frames.
    """

    def __init__(self, noise: Noise, seed: np.random.SeedSequence, n: int, block: int, device: torch.device) -> None:
        self._noise, self._block = noise, block
        self._starts = range(0, n, block)
        if block >= n:
            self._generators = [torch_generator(seed, device)]
        else:  # torch's CPU generator takes 32 bits of a seed: these are distinct in them
            seeds = distinct_seeds(seed, len(self._starts))
            self._generators = [torch.Generator(device).manual_seed(int(one)) for one in seeds]
        self._everyone: Tensor | None = None
        self._n = n

    def __call__(self, frames: Tensor, slots: NDArray[np.int64]) -> Tensor:
        """Noisy copies of the frames (m, *frame) of the running `slots` (m,), in increasing order."""
        if self._block == 1:
            return self._noise.perturb(frames, [self._generators[slot] for slot in slots])
        if slots.size == self._n and len(self._generators) == 1:
            return self._noise.perturb(frames, self._generators[0])
        if self._everyone is None:
            self._everyone = frames.new_zeros(self._n, *frames.shape[1:])
        rows = torch.from_numpy(slots).to(frames.device)
        self._everyone.index_copy_(0, rows, frames)
        if len(self._generators) == 1:
            return self._noise.perturb(self._everyone, self._generators[0]).index_select(0, rows)
        seen = torch.empty_like(frames)
        first = np.searchsorted(slots, [*self._starts, self._n])
        for start, generator, a, b in zip(self._starts, self._generators, first, first[1:], strict=False):
            if a < b:
                block = self._noise.perturb(self._everyone[start : start + self._block], generator)
                seen[a:b] = block[rows[a:b] - start]
        return seen
