"""Band ablation: exact certificates against a corrupted patch or strip of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robustrl.certify.splitting import Counts, exact_radius
from robustrl.errors import as_floats, check_choice, check_count, check_real
from robustrl.noise.draws import check_frames, integers, like, namespace


@dataclass(frozen=True)
class BandAblation:
    """Only one band of an image is shown, of every place it can have (around the edge too); patches.

    A patch that touches m adjacent columns is visible in at most m + width - 1 of the `size` bands, so it changes at most so
    many votes, whatever it contains and however high it is.

    Args:
        width: columns in one band.
        size: columns of the image.
        axis: -1 if columns are the last axis of an image, -2 for channels last (or for bands of rows).
        fill: what is shown elsewhere.

    Votes: `robustrl.certify.splitting.count_votes(base, x, bands)`.

    Source: Levine, Feizi, "(De)randomized smoothing for certifiable defense against patch attacks" (NeurIPS 2020),
    arXiv:2002.10733.
    """

    width: int
    size: int
    axis: int = -1
    fill: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", check_count("width", self.width))
        object.__setattr__(self, "size", check_count("size", self.size))
        object.__setattr__(self, "axis", check_choice("axis", self.axis, (-1, -2, -3)))
        object.__setattr__(self, "fill", check_real("fill", self.fill))
        if self.width >= self.size:
            raise ValueError(f"width must be < size = {self.size}, got {self.width}")

    @property
    def levels(self) -> int:
        """Number of bands."""
        return self.size

    def show(self, x: Any, first: Any) -> Any:
        """Images (n, *shape) of which only the columns first, first + 1, ... are shown; `first` (n,), same library."""
        if x.ndim < 1 - self.axis or x.shape[self.axis] != self.size:
            raise ValueError(f"images must have {self.size} columns along axis {self.axis}, got shape {tuple(x.shape)}")
        xp = namespace(x)
        columns = np.arange(self.size) if isinstance(x, np.ndarray) else xp.arange(self.size, device=x.device)
        shown = (columns - first.reshape(-1, 1)) % self.size < self.width
        shown = shown.reshape(len(first), *(1 for _ in range(x.ndim + self.axis - 1)), self.size, *(1,) * (-1 - self.axis))
        return xp.where(shown, x, like(self.fill, x))

    def views(self, x: Any, start: int, stop: int) -> Any:
        """Bands start .. stop - 1 of one image, (stop - start, *x.shape)."""
        torch = namespace(x)
        first = np.arange(start, stop) if isinstance(x, np.ndarray) else torch.arange(start, stop, device=x.device)
        return self.show(x[None], first)

    def perturb(self, x: Any, generator: Any) -> Any:
        """One random band of every image (n, *shape), for training; see `robustrl.noise.Noise.perturb`."""
        check_frames(x, generator)
        rows = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]
        return self.show(x, integers(rows, generator) % self.size)

    def patch(self, counts: ArrayLike) -> Counts:
        """Side of the largest patch (or width of the largest strip) that cannot change the vote, (...), 0 for none.

        Args:
            counts: votes of all bands per class, (..., K).
        Raises:
            ValueError: if they do not add up to the number of bands; see `exact_radius`.
        """
        changes = exact_radius(counts)[1]
        if not np.all(np.sum(counts, axis=-1) == self.size):
            raise ValueError(f"counts must add up to the {self.size} bands, got {np.sum(counts, axis=-1)}")
        return np.maximum(changes - self.width + 1, 0)


def verify_bands(evidence: dict[str, Any], noise: object, alpha: float) -> tuple[int, float, bool]:
    """Prediction, side of the patch in columns, and abstention (never) from {"counts": votes per class, "width"}.

    Raises:
        ValueError: if alpha is not 0, or the evidence makes no sense.
    """
    if alpha != 0:
        raise ValueError(f"alpha must be 0 for an exact certificate, got {alpha}")
    counts = as_floats("counts", evidence["counts"])
    bands = BandAblation(evidence["width"], int(counts.sum()))
    return int(exact_radius(counts)[0]), float(bands.patch(counts)), False
