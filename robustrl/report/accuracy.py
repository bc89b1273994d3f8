"""Certified accuracy of a classifier: the curve, its area, and logs that other tools read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_finite_array
from robustrl.files import save_figure, write_atomically

Floats = NDArray[np.float64]
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
"""The first line of the logs of the original randomised-smoothing code and its descendants."""


class Row(NamedTuple):
    """One certified input of a log."""

    idx: int
    label: int
    prediction: int
    radius: float
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label; abstaining is not."""
        return self.prediction == self.label >= 0

    def line(self) -> str:
        """As in the original logs, with all digits of the radius."""
        hours, rest = divmod(self.seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        time = f"{int(hours)}:{int(minutes):02d}:{seconds:09.6f}"
        return f"{self.idx}\t{self.label}\t{self.prediction}\t{self.radius!r}\t{int(self.correct)}\t{time}"

    @classmethod
    def parse(cls, line: str) -> Row:
        """The inverse of `line`; also reads logs of other tools.

        Raises:
            ValueError: for anything else.
        """
        try:
            index, label, prediction, radius, correct, time = line.split("\t")
            parts = [float(part) for part in time.split(":")]
            row = cls(int(index), int(label), int(prediction), float(radius), sum(p * 60**i for i, p in enumerate(parts[::-1])))
        except ValueError:
            raise ValueError(f"not a line of a certification log ({HEADER!r}): {line!r}") from None
        sound = math.isfinite(row.radius) and math.isfinite(row.seconds) and row.radius >= 0
        if int(correct) != row.correct or not sound or (row.prediction < 0 and row.radius > 0):
            raise ValueError(f"not a line of a certification log, it contradicts itself: {line!r}")
        return row


@dataclass(frozen=True)
class AccuracyReport:
    """Certificates of a labelled data set.

    Attributes:
        rows: one per certified input.
        norm: of the radii.
        title: what was certified, in words.
    """

    rows: tuple[Row, ...]
    norm: float = 2
    title: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def radii(self) -> Floats:
        """Radius of every input that is classified correctly, -1 for the others; (n,)."""
        return np.array([row.radius if row.correct else -1.0 for row in self.rows])

    @property
    def accuracy(self) -> float:
        """Share of inputs that the smoothed classifier gets right; abstaining counts as wrong."""
        return float(np.mean([row.correct for row in self.rows]))

    @property
    def abstained(self) -> float:
        """Share of inputs without a prediction."""
        return float(np.mean([row.prediction < 0 for row in self.rows]))

    @property
    def average_certified_radius(self) -> float:
        """Mean over all inputs of the radius, 0 where the prediction is wrong (ACR)."""
        return float(np.maximum(self.radii, 0).mean())

    def certified_accuracy(self, radii: ArrayLike) -> Floats:
        """Share of inputs that are classified correctly with a radius of at least each of `radii`."""
        wanted = check_finite_array("radii", radii)
        if wanted.min() < 0:
            raise ValueError(f"radii must be >= 0, got {wanted.min()}")
        return np.asarray((self.radii[:, None] >= wanted.reshape(-1)).mean(axis=0)).reshape(wanted.shape)

    def table(self, radii: Sequence[float] | None = None) -> str:
        """The curve as plain text; an estimate of the data set's accuracy, each certificate at its own confidence."""
        chosen = self._grid(6) if radii is None else np.asarray(radii, dtype=np.float64)
        curve = zip(chosen, self.certified_accuracy(chosen), strict=True)
        return "\n".join(
            [
                f"{self.title or 'certified accuracy'}: {len(self)} inputs",
                f"accuracy {self.accuracy:.4f}, abstained {self.abstained:.4f}, ACR {self.average_certified_radius:.4f}",
                f"{f'l{self.norm:g} radius':>12}  {'certified accuracy':>18}",
                *(f"{radius:>12.4g}  {share:>18.4f}" for radius, share in curve),
            ]
        )

    def _grid(self, size: int) -> Floats:
        top = float(self.radii.max(initial=0.0))
        return np.linspace(0, top if top > 0 else 1.0, size)

    def draw(self, ax: Any, label: str | None = None) -> None:
        """Draw the exact step function into matplotlib axes."""
        edges = np.concatenate(([0.0], np.sort(self.radii[self.radii >= 0])))
        steps = self.certified_accuracy(edges)
        ax.step(edges, steps, where="pre", label=label or self.title or None)
        ax.set_xlabel(f"l{self.norm:g} radius")
        ax.set_ylabel("certified accuracy")
        ax.set_ylim(0, 1.02)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the curve as .png, .pdf or .svg, atomically."""
        accuracy_figure({self.title: self}, path)

    def write_log(self, path: str | os.PathLike[str]) -> None:
        """A tab-separated log, readable by the tools of the original repositories."""
        write_atomically(path, "\n".join([HEADER, *(row.line() for row in self.rows), ""]).encode())

    @classmethod
    def read_log(cls, path: str | os.PathLike[str], norm: float = 2, title: str = "") -> AccuracyReport:
        """A log of ours or of the original tools.

        Raises:
            ValueError: for lines that are none, naming the file.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        try:
            if not lines or lines[0].split("\t") != HEADER.split("\t"):
                raise ValueError(f"the first line must be {HEADER!r}")
            rows = tuple(Row.parse(line) for line in lines[1:] if line)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        return cls(rows, norm, title)


def accuracy_figure(reports: dict[str, AccuracyReport], path: str | os.PathLike[str], title: str = "") -> None:
    """Certified-accuracy curves in one figure, written as .png, .pdf or .svg, atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for label, report in reports.items():
        report.draw(ax, label)
    norms = {report.norm for report in reports.values()}
    if len(norms) > 1:
        ax.set_xlabel("radius, each curve in its own norm")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    if any(reports):
        ax.legend()
    save_figure(figure, path)


def read_rows(lines: Iterable[str]) -> list[Row]:
    """Complete lines of a log that may have been cut off in the middle of the last one."""
    found: list[Row] = []
    for line in lines:
        if line.rstrip("\n") == HEADER:
            continue
        if not line.endswith("\n"):
            break
        found.append(Row.parse(line.rstrip("\n")))
    return found
