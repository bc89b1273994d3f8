"""Executors: every task once, whoever dies."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from robustrl.errors import WorkerError
from robustrl.rollouts import executor
from robustrl.rollouts.executor import LocalExecutor, one_thread


def square(x: int) -> int:
    return x * x


def threads(_: int) -> int:
    return torch.get_num_threads()


def process(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def fail_at(bad: int, x: int) -> int:
    if x == bad:
        raise ValueError(f"task {x} cannot be done")
    return x


def die_once(marker: Path, x: int) -> int:
    """The first worker to take task 3 is killed, as the kernel does when memory runs out."""
    if x == 3:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return x
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_task_is_done_once_and_named(n_workers: int) -> None:
    tasks = list(range(10, 22))
    results = list(LocalExecutor(n_workers).run(square, tasks))
    assert sorted(results) == [(i, x * x) for i, x in enumerate(tasks)]


def test_no_tasks_need_no_worker() -> None:
    assert list(LocalExecutor(1).run(square, [])) == []
    assert list(LocalExecutor(2).run(square, [])) == []


def test_workers_are_processes_of_their_own_with_one_torch_thread() -> None:
    found = {pid for _, pid in LocalExecutor(2).run(process, range(8))}
    assert os.getpid() not in found
    assert len(found) <= 2  # a slow machine may start the second when the first is done
    assert {n for _, n in LocalExecutor(2).run(threads, range(4))} == {1}


def test_this_process_works_with_one_thread_and_gets_its_own_back() -> None:
    torch.set_num_threads(2)
    try:
        assert [n for _, n in LocalExecutor(1).run(threads, range(2))] == [1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), one_thread():
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_in_a_task_reaches_the_caller(n_workers: int) -> None:
    with pytest.raises(ValueError, match="task 2 cannot be done"):
        list(LocalExecutor(n_workers).run(partial(fail_at, 2), range(5)))


def test_a_killed_workers_tasks_are_done_by_others(tmp_path: Path) -> None:
    results = list(LocalExecutor(2).run(partial(die_once, tmp_path / "died"), range(8)))
    assert (tmp_path / "died").exists()
    assert sorted(results) == [(i, i) for i in range(8)]


def test_a_task_that_always_kills_its_worker_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "DEATHS", 2)
    done = []
    with pytest.raises(WorkerError, match=r"died 2 times in a row with \d+ chunks to go: too little memory\?"):
        done += LocalExecutor(2).run(die, range(5))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tasks which were still being processed")
def test_a_consumer_that_stops_early_leaves_the_executor_usable() -> None:
    run = LocalExecutor(2).run(process, range(30))
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert len(list(LocalExecutor(2).run(square, range(5)))) == 5


@pytest.mark.parametrize(("n_workers", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_wrong_number_of_workers_is_refused(n_workers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_workers must be an integer >= 1"):
        LocalExecutor(n_workers)
