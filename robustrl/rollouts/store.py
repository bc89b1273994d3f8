"""Chunk files: finished episodes on disk, each file complete or absent."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from robustrl.errors import ChunkError
from robustrl.files import write_atomically
from robustrl.rollouts.chunk import Episodes, Job

SCHEMA = 1
COLUMNS = {"returns": "<f8", "lengths": "<i8", "seeds": "<u8", "spent": "<f8"}
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
"""What reading a file with flipped or missing bytes can end in."""


WORDS = {"policy_hash": "model", "recipe": "environment, noise or horizon", "code": "code of the environment"}
"""What users call the fields of a manifest."""


class ChunkStore:
    """The chunks of one job in a folder: `manifest.json` and `chunk-<number>-<episodes>.npz`.

    The last chunk of a run may be shorter than the others; it is not the beginning of a full one, so a longer or a
    shorter run of the same job has a file of its own beside it.

    Args:
        folder: where; created if missing.
        job: what the chunks belong to.
    Raises:
        ChunkError: if the folder holds another job's chunks, or its manifest is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], job: Job) -> None:
        self.folder = Path(folder)
        description = {"schema": SCHEMA, "fingerprint": job.fingerprint(), **job.describe()}
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            try:
                found = json.loads(manifest.read_text())
                fingerprint = found["fingerprint"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ChunkError(f"{manifest} is damaged ({error}); delete the folder to start again") from None
            if fingerprint != description["fingerprint"] or found.get("schema") != SCHEMA:
                differs = sorted(k for k in description if k != "fingerprint" and _text(found.get(k)) != _text(description[k]))
                raise ChunkError(
                    f"{self.folder} holds chunks of another experiment (different {', '.join(WORDS.get(k, k) for k in differs)}); "
                    "choose another folder (--out)"
                )
            return
        write_atomically(manifest, json.dumps(description, indent=1, default=str).encode())

    def _path(self, chunk: int, n: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}-{n}.npz"

    def load(self, chunk: int, n: int) -> Episodes | None:
        """A chunk of `n` episodes, or None if it has not been run.

        Raises:
            ChunkError: if the file is damaged.
        """
        path = self._path(chunk, n)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as data:
                episodes = Episodes(**{name: data[name] for name in ("returns", "lengths", "seeds", "spent")})
            kinds = {name: (array.dtype.str, array.shape) for name, array in episodes.arrays().items()}
            if kinds != {name: (kind, (n,)) for name, kind in COLUMNS.items()} or not np.isfinite(episodes.returns).all():
                raise ValueError(f"not {n} episodes")
        except DAMAGE as error:
            raise ChunkError(f"{path} is damaged ({error}); delete it to have the chunk run again") from None
        return episodes

    def save(self, chunk: int, episodes: Episodes) -> None:
        """Write a chunk atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **episodes.arrays())  # type: ignore[arg-type]
        write_atomically(self._path(chunk, len(episodes)), buffer.getvalue())


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
