"""Chunk files: complete or absent, and never taken for another job's."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import balancer

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChunkError
from robustrl.noise import Gaussian
from robustrl.rollouts.chunk import Episodes, Job
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.store import ChunkStore


@pytest.fixture
def job() -> Job:
    return make_job(balancer(), EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.2), max_episode_steps=50), chunk_size=10)


def made_up(n: int, seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, n)
    return Episodes(rng.random(n), lengths, rng.integers(0, 2**63, n).astype(np.uint64), rng.random(n))


def test_a_chunk_comes_back_bit_for_bit(tmp_path: Path, job: Job) -> None:
    store, episodes = ChunkStore(tmp_path / "deep" / "folder", job), made_up(10)
    assert store.load(0, 10) is None
    store.save(0, episodes)
    again = ChunkStore(tmp_path / "deep" / "folder", job).load(0, 10)
    assert again is not None
    for name, array in episodes.arrays().items():
        assert np.array_equal(again.arrays()[name], array)
        assert again.arrays()[name].dtype == array.dtype
    assert store.load(1, 10) is None


def test_a_short_last_chunk_does_not_overwrite_a_full_one(tmp_path: Path, job: Job) -> None:
    store, full, short = ChunkStore(tmp_path, job), made_up(10), made_up(4, seed=1)
    store.save(0, full)
    assert store.load(0, 4) is None
    store.save(0, short)
    for episodes in (full, short):
        found = store.load(0, len(episodes))
        assert found is not None
        assert np.array_equal(found.returns, episodes.returns)


def test_a_full_disk_leaves_the_old_chunk_and_no_debris(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChunkStore(tmp_path, job)
    store.save(0, made_up(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                store.save(0, made_up(10, seed=1))
            with pytest.raises(OSError, match="No space left"):
                ChunkStore(tmp_path / "other", job)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        assert not list(tmp_path.rglob("*.part"))


def test_a_chunk_with_missing_or_flipped_bytes_is_never_believed(tmp_path: Path, job: Job) -> None:
    store, episodes = ChunkStore(tmp_path, job), made_up(10)
    store.save(0, episodes)
    path = tmp_path / "chunk-000000-10.npz"
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    damaged = [content[:cut] for cut in (0, 1, 100, len(content) // 2, len(content) - 1)]
    for _ in range(200):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        try:
            found = store.load(0, 10)
        except ChunkError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "delete it to have the chunk run again" in str(error)  # noqa: PT017
            refused += 1
        else:  # a bit that nobody reads, such as a time stamp
            assert found is not None
            assert np.array_equal(found.returns, episodes.returns)
            assert np.array_equal(found.spent, episodes.spent)
    assert refused > 150


@pytest.mark.parametrize(
    "change",
    [
        {"returns": np.full(10, np.nan)},
        {"returns": np.zeros(9)},
        {"returns": np.zeros(10, dtype=np.float32)},
        {"returns": np.array(["x"] * 10)},
        {"returns": np.zeros((10, 1))},
        {"lengths": np.zeros(10)},
        {"spent": None},
    ],
)
def test_a_chunk_of_the_wrong_shape_or_type_is_refused(tmp_path: Path, job: Job, change: dict[str, Any]) -> None:
    store = ChunkStore(tmp_path, job)
    arrays: dict[str, Any] = {**made_up(10).arrays(), **change}
    np.savez(tmp_path / "chunk-000000-10.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ChunkError, match=r"chunk-000000-10\.npz is damaged"):
        store.load(0, 10)


def test_no_pickle_in_a_chunk_is_loaded(tmp_path: Path, job: Job) -> None:
    store, marker = ChunkStore(tmp_path, job), tmp_path / "ran"

    class Planted:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    np.savez(tmp_path / "chunk-000000-10.npz", returns=np.array([Planted()], dtype=object))
    with pytest.raises(ChunkError, match="is damaged"):
        store.load(0, 10)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed": 1}, "seed"),
        ({"chunk_size": 11, "deterministic": False}, "chunk_size, deterministic"),
        ({"policy": balancer(gain=3.0)}, "model"),
        (
            {"recipe": EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.3), max_episode_steps=50)},
            "environment, noise or horizon",
        ),
        ({"engine": "list"}, "engine"),
    ],
)
def test_another_jobs_folder_is_refused_with_what_differs(
    tmp_path: Path, job: Job, change: dict[str, Any], differs: str
) -> None:
    ChunkStore(tmp_path, job)
    with pytest.raises(ChunkError, match=rf"another experiment \(different {differs}\); choose another folder"):
        ChunkStore(tmp_path, replace(job, **change))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '"x"', "\x00", '{"fingerprint": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, job: Job, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ChunkError, match="is damaged|another experiment"):
        ChunkStore(tmp_path, job)


def test_chunks_of_another_schema_are_refused(tmp_path: Path, job: Job) -> None:
    ChunkStore(tmp_path, job)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 0}))
    with pytest.raises(ChunkError, match="different schema"):
        ChunkStore(tmp_path, job)


def test_the_manifest_says_what_the_chunks_are_of(tmp_path: Path, job: Job) -> None:
    ChunkStore(tmp_path, job)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["recipe"]["noise"] == {"kind": "Gaussian", "sigma": 0.2}
    assert found["policy_hash"] == job.policy.fingerprint()
    assert (found["seed"], found["chunk_size"], found["engine"]) == (0, 10, "native")
