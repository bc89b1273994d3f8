"""Files are the old ones or the complete new ones."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from robustrl.files import write_atomically


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomically(str(path), b"")
    assert path.read_bytes() == b""
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"]
)
def test_whatever_goes_wrong_the_old_file_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: BaseException
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise kind

    class Stream:
        def __init__(self, *arguments: Any) -> None:
            self.stream = open(*arguments)  # noqa: SIM115

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.stream.close()

        write = fail

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr("robustrl.files.open", Stream, raising=False)
        else:
            patch.setattr(os, step, fail)
        with pytest.raises(type(kind)):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, versions = tmp_path / "file.bin", [bytes([i]) * 100_000 for i in range(2)]
    write_atomically(path, versions[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_atomically(path, versions[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(versions)


def test_writers_side_by_side_do_not_share_a_part(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "file", bytes([i]) * 1000)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_target_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"x")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file" / "below", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
