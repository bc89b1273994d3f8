"""The batched core that every noise wrapper is a thin shell of."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.envs.joint import as_batch, first_row, float_space, join, joint_box, split
from robustrl.errors import ChainError
from robustrl.noise import Noise
from robustrl.seeding import numpy_generator


class NoiseCore:
    """Adds noise to batches of frames, from a generator of its own.

    Args:
        noise: the mechanism.
        space: observation space of one environment: a Box of a floating dtype, or a Dict of them, whose entries then
            carry the noise of their joint vector.
        seed: seed of the noise; None for an unpredictable one.

    Raises:
        TypeError: if the space is no Box or Dict of Boxes, or `noise` not a mechanism.
        ChainError: if the space holds integers.
    """

    def __init__(self, noise: Noise, space: spaces.Space[Any], seed: int | None = None) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {noise!r}")
        if not isinstance(space, spaces.Box | spaces.Dict):
            raise TypeError(f"noise needs a Box observation space or a Dict of them, got {space}")
        box = joint_box(space)
        kinds = {part.dtype for part in space.values()} if isinstance(space, spaces.Dict) else {box.dtype}
        odd = next((dtype for dtype in kinds if dtype is None or dtype.kind != "f"), None)
        if odd is not None:
            raise ChainError(
                f"noise needs a float observation space, got {odd}: noise on integers is rounded and wraps around; "
                "convert to float and scale before the noise wrapper"
            )
        noise.require("episode")
        self.noise = noise
        self.space = float_space(space)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Restart the noise."""
        self._generator = numpy_generator(None if seed is None else np.random.SeedSequence(seed, spawn_key=(1,)))

    def __call__(self, frames: Any) -> Any:
        """Noisy float32 copies of a batch of frames (n, *frame), or of a dictionary of them.

        The sum is formed in the frames' own precision and rounded afterwards: rounding first could enlarge an attack.
        """
        noisy: NDArray[Any] = self.noise.perturb(join(frames, self.space), self._generator)
        return split(noisy.astype(np.float32, copy=False), self.space)

    def one(self, frame: Any) -> Any:
        """A noisy copy of a single frame."""
        return first_row(self(as_batch(frame)))
