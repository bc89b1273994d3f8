"""Chunk files: finished episodes on disk, each file complete or absent."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from robustrl.errors import ChunkError
from robustrl.files import write_atomically
from robustrl.rollouts.chunk import Episodes, Job

SCHEMA = 1


class ChunkStore:
    """The chunks of one job in a folder: `manifest.json` and `chunk-000000.npz`, ...

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
            if fingerprint != description["fingerprint"]:
                differs = sorted(k for k in job.describe() if json.dumps(found.get(k), sort_keys=True, default=str) != json.dumps(description[k], sort_keys=True, default=str))
                raise ChunkError(f"{self.folder} holds chunks of another experiment (different {', '.join(differs)}); choose another folder")
            return
        write_atomically(manifest, json.dumps(description, indent=1, default=str).encode())

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.npz"

    def load(self, chunk: int, n: int) -> Episodes | None:
        """The first `n` episodes of a chunk, or None if the file is missing or holds a shorter run of the chunk.

        Raises:
            ChunkError: if the file is damaged.
        """
        path = self._path(chunk)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as data:
                episodes = Episodes(**{name: data[name] for name in ("returns", "lengths", "seeds", "spent")})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError) as error:
            raise ChunkError(f"{path} is damaged ({error}); delete it to have the chunk run again") from None
        if len({len(array) for array in episodes.arrays().values()}) != 1 or not np.isfinite(episodes.returns).all():
            raise ChunkError(f"{path} is damaged (inconsistent arrays); delete it to have the chunk run again")
        return episodes if len(episodes) == n else None

    def save(self, chunk: int, episodes: Episodes) -> None:
        """Write a chunk atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **episodes.arrays())  # type: ignore[arg-type]
        write_atomically(self._path(chunk), buffer.getvalue())
