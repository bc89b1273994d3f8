"""The batched core that every noise wrapper is a thin shell of."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.errors import ChainError
from robustrl.noise import Noise
from robustrl.seeding import numpy_generator


class NoiseCore:
    """Adds noise to batches of frames, from a generator of its own.

    Args:
        noise: the mechanism.
        space: observation space of one environment: a Box of a floating dtype.
        seed: seed of the noise; None for an unpredictable one.

    Raises:
        TypeError: if the space is not a Box, or `noise` not a mechanism.
        ChainError: if the space holds integers.
    """

    def __init__(self, noise: Noise, space: spaces.Space[Any], seed: int | None = None) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {noise!r}")
        if not isinstance(space, spaces.Box):
            raise TypeError(f"noise needs a Box observation space, got {space}")
        if space.dtype is None or space.dtype.kind != "f":
            raise ChainError(
                f"noise needs a float observation space, got {space.dtype}: noise on integers is rounded and wraps around; "
                "convert to float and scale before the noise wrapper"
            )
        noise.require("episode")
        self.noise = noise
        self.space = spaces.Box(-np.inf, np.inf, space.shape, np.float32)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Restart the noise."""
        self._generator = numpy_generator(None if seed is None else np.random.SeedSequence(seed, spawn_key=(1,)))

    def __call__(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        """Noisy float32 copies of frames (n, *frame).

        The sum is formed in the frames' own precision and rounded afterwards: rounding first could enlarge an attack.
        """
        return self.noise.perturb(frames, self._generator).astype(np.float32, copy=False)
