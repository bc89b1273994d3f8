"""Splitting noise in integers, for observations on a grid: few enough offsets to look at all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_count
from robustrl.noise.base import Floats, Frames, Generator
from robustrl.noise.draws import BITS, check_frames, integers, namespace, rounded
from robustrl.noise.grid import MOST, Bound, Grid
from robustrl.noise.total_variation import TotalVariationL1


@dataclass(frozen=True)
class DeterministicSplitting(TotalVariationL1):
    """Splitting noise (DSSN) with `levels` possible outcomes per input, in integers; l1 budgets.

    For observations low + k (high - low) / q with integers k. A template v in {0 .. levels - 1}, one number per entry, is
    fixed by the seed. Under offset o an entry is cut at the points w + 1/2, w + levels + 1/2, ... with w = (v + o) mod levels
    (and continued downwards), and becomes the middle of its cell within [0, q]. A step of one entry by one grid point crosses
    a cut under exactly one offset: k + 1/2 is a cut when w = k modulo levels. Hence an attack of n grid steps in all
    changes at most n of the `levels` noisy inputs, whichever policy looks at them: `robustrl.certify.splitting`.

    Args:
        levels: number of offsets L, at most 2^24; in units of the grid a cell has the width L.
        quantisation: steps of the grid, q; 255 for bytes.
        low: lowest observation: one number, or one per feature (broadcast along the last axis).
        high: highest observation, likewise. Bytes have quantisation=255, low=0, high=255.
        seed: of the template, which is part of the model: training, certification and deployment need the same.

    `perturb` draws one offset per input and is what to train with; certificates look at all offsets. Attacks that leave the
    grid are not covered. With steps of different sizes l1 budgets are those of the smallest step.

    Source: Levine, Feizi, "Improved, deterministic smoothing for L1 certified robustness" (ICML 2021), arXiv:2103.10834.
    """

    levels: int
    quantisation: int = 255
    low: Bound = 0.0
    high: Bound = 1.0
    seed: int = 0
    scopes: ClassVar[frozenset[str]] = frozenset({"input", "step", "trajectory", "episode"})
    fp_model: ClassVar[Literal["real", "exact"]] = "exact"

    def __post_init__(self) -> None:
        grid = Grid(self.quantisation, self.low, self.high)
        for name in ("quantisation", "low", "high"):
            object.__setattr__(self, name, getattr(grid, name))
        object.__setattr__(self, "levels", check_count("levels", self.levels, least=2))
        object.__setattr__(self, "seed", check_count("seed", self.seed, least=0))
        if self.levels > MOST:
            raise ValueError(f"levels must be <= {MOST}, got {self.levels}")

    @property
    def grid(self) -> Grid:
        """The observations that can be split."""
        return Grid(self.quantisation, self.low, self.high)

    @property
    def lam(self) -> float:  # type: ignore[override]
        """Half the cell width in observation units."""
        return self.levels * self.grid.step / 2

    def template(self, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """The template v of inputs of a shape."""
        return _template(self.seed, self.levels, tuple(shape))

    def split(self, indices: Any, offsets: Any) -> Any:
        """The splitting map in integers.

        Args:
            indices: grid indices (n, *shape), int32, array or tensor; or (1, *shape) for many offsets of one input.
            offsets: offsets (n,), integers in 0 .. levels - 1, of the same library.
        Returns:
            middles of the cells, int32 (n, *shape), counted in quarters of a grid step.
        """
        xp, q = namespace(indices), self.quantisation
        template = self.template(tuple(indices.shape[1:]))
        if not isinstance(indices, np.ndarray):
            template = xp.tensor(template, device=indices.device)
        offsets = offsets.reshape(-1, *(1 for _ in template.shape))
        # Not reduced modulo levels: the cuts have that period.
        cut = template + (offsets.astype(np.int32) if isinstance(offsets, np.ndarray) else offsets.int())
        bottom = (indices - cut - 1) // self.levels * self.levels + cut  # the cell is (bottom + 1/2, bottom + levels + 1/2)
        return xp.clip(2 * (bottom + self.levels) + 1, None, 2 * q) + xp.clip(2 * bottom + 1, 0, None)

    def views(self, x: Any, start: int, stop: int) -> Any:
        """The noisy inputs (stop - start, *x.shape), double precision, of one input under offsets start .. stop - 1.

        Args:
            x: one input on the grid, array or tensor of any numeric dtype.
            start: first offset.
            stop: the one after the last offset.
        Raises:
            ValueError: if the input is not on the grid.
        """
        xp = namespace(x)
        offsets = np.arange(start, stop) if isinstance(x, np.ndarray) else xp.arange(start, stop, device=x.device)
        return self.grid.values(self.split(self.grid.indices(x)[None], offsets), parts=4)

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        indices = self.grid.indices(x)
        first = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]
        offsets = integers(first, generator) % self.levels
        return rounded(self.grid.values(self.split(indices, offsets), parts=4), x)

    def shift(self, budget: ArrayLike) -> Floats:
        # An offset's probability under `perturb` exceeds 1 / levels by at most 2^-60.
        return np.minimum(super().shift(budget) * (1 + self.levels * 2.0**-BITS), 1.0)

    @property
    def caveats(self) -> tuple[str, ...]:
        return ("attacks whose observations leave the grid",)


@lru_cache(maxsize=16)
def _template(seed: int, levels: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))  # numpy guarantees this stream, but not that of `integers`
    template = (np.asarray(raw, dtype=np.uint64) % np.uint64(levels)).astype(np.int32).reshape(shape)
    template.setflags(write=False)
    return template
