"""What a network is trained on: inputs, what is wanted there, and which episode they are from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustrl.errors import check_count, check_real


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets, row by row.

    Attributes:
        inputs: (n, *shape), float32, or uint8 to save memory; batches are float32 always.
        targets: classes or actions (n,), integers; or actions or a teacher's scores (n, m), float32.
        episodes: which episode every row is from, (n,), integers; None if rows are independent.
    Raises:
        ValueError: if the lengths differ, there are no rows, or a number is not finite.
        TypeError: for other types.
    """

    inputs: Tensor
    targets: Tensor
    episodes: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "episodes"):
            value = getattr(self, name)
            if value is None and name == "episodes":
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
            if len(value.shape) == 0 or len(value) == 0:
                raise ValueError(f"{name} must have at least one row, got shape {tuple(value.shape)}")
            if len(value) != len(self.inputs):
                raise ValueError(f"{name} must be as many as inputs ({len(self.inputs)}), got {len(value)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(value)).sum())} entries that are not")
        if self.inputs.dtype != torch.uint8:
            object.__setattr__(self, "inputs", self.inputs.float())
        whole = not self.targets.is_floating_point()
        if self.targets.ndim != (1 if whole else 2):
            raise ValueError(
                f"targets must be integers (n,) or floats (n, m), got {self.targets.dtype} {tuple(self.targets.shape)}"
            )
        object.__setattr__(self, "targets", self.targets.long() if whole else self.targets.float())
        if self.episodes is not None and (self.episodes.is_floating_point() or self.episodes.ndim != 1):
            raise ValueError(f"episodes must be integers (n,), got {self.episodes.dtype} {tuple(self.episodes.shape)}")

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, which: Tensor) -> Examples:
        """Some of the rows, by their numbers."""
        episodes = None if self.episodes is None else self.episodes[which]
        return Examples(self.inputs[which], self.targets[which], episodes)

    def batch(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs, float32, and targets of some rows; without the checks of `rows`."""
        return self.inputs[which].float(), self.targets[which]

    def to(self, device: torch.device | str) -> Examples:
        """The same rows on a device."""
        episodes = None if self.episodes is None else self.episodes.to(device)
        return Examples(self.inputs.to(device), self.targets.to(device), episodes)

    def draw(self, n: int, seed: int) -> Examples:
        """`n` rows at random, in their order; all if there are no more."""
        if n >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        return self.rows(torch.randperm(len(self), generator=generator)[:n].sort().values.to(self.inputs.device))

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """The larger part, and a hold-out of whole episodes: neighbouring frames are nearly the same, and single ones would leak.

        Args:
            share: of the episodes (of the rows if they are independent) to hold out, in (0, 1); at least one.
            seed: of the draw.
        Raises:
            ValueError: if either part would be empty.
        """
        share = check_real("share", share, allowed="a number in (0, 1)")
        if not 0 < share < 1:
            raise ValueError(f"share must be a number in (0, 1), got {share}")
        units, unit_of = torch.arange(len(self)), torch.arange(len(self))
        if self.episodes is not None:
            units, unit_of = torch.unique(self.episodes.cpu(), return_inverse=True)
        if len(units) < 2:
            raise ValueError(f"episodes must be at least two to hold one out, got {len(units)}")
        held = min(len(units) - 1, math.ceil(round(share * len(units), 9)))  # 0.07 * 100 is more than 7
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(check_count("seed", seed, least=0)))
        out = torch.isin(unit_of, order[:held]).to(self.inputs.device)
        return self.rows(torch.nonzero(~out).flatten()), self.rows(torch.nonzero(out).flatten())

    def check_apart(self, others: Examples) -> None:
        """Refuse a hold-out that shares episodes, or whole inputs, with these examples.

        Raises:
            ValueError: if they do. Independent rows may be equal by chance where inputs are few; then all of the hold-out must be.
        """
        if self.episodes is not None and others.episodes is not None:
            shared = torch.isin(others.episodes, self.episodes.to(others.episodes.device)).sum()
            if shared:
                raise ValueError(
                    f"validation must hold other episodes than examples, but {int(shared)} of its rows are of theirs"
                )
            return
        ours, theirs = ([hash(row.tobytes()) for row in part.inputs.cpu().numpy()] for part in (self, others))
        if set(theirs) <= set(ours):
            raise ValueError("validation must hold other inputs than examples, but every one of its inputs is among theirs")
