"""Files that are complete or absent."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from robustrl.errors import check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".pdf", ".svg")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is either the old one or the complete new one, even if the disk fills up or the power goes.

    Missing parent folders are created.

    Raises:
        OSError: if the file cannot be written; the old one, if any, is untouched then.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a matplotlib figure as .png, .pdf or .svg, atomically.

    Raises:
        ValueError: for another suffix.
        OSError: if the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    check_choice("suffix of path", suffix, FIGURES)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=150)
    write_atomically(path, buffer.getvalue())
