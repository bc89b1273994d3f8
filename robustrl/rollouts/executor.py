"""Who runs the chunks: this process, or joblib worker processes."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypeVar

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from robustrl.errors import WorkerError, check_count

Task = TypeVar("Task")
Result = TypeVar("Result")

DEATHS = 5
"""Times in a row that workers may die without any chunk finishing before the run is given up."""

LIBRARIES = ("robustrl", "torch", "numpy", "scipy", "gymnasium", "stable-baselines3", "mujoco")
"""What the bits of a rollout depend on."""
OPTIONAL = ("ale-py", "opencv-python-headless", "envpool")
"""The same, where installed."""


class Executor(Protocol):
    """Runs independent tasks and yields results as they finish, in any order; a dead worker's tasks are queued again."""

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """Yield (index of the task, result) as tasks finish."""


class LocalExecutor:
    """Tasks in this process (`n_workers=1`) or in that many worker processes, one torch thread each.

    Args:
        n_workers: processes.
    """

    def __init__(self, n_workers: int = 1) -> None:
        self.n_workers = check_count("n_workers", n_workers)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        if self.n_workers == 1:
            for index, task in enumerate(tasks):
                with one_thread():
                    result = function(task)
                yield index, result
            return
        waiting, deaths = set(range(len(tasks))), 0
        while waiting:
            try:
                parallel: Any = joblib.Parallel(
                    n_jobs=self.n_workers, backend="loky", return_as="generator_unordered", batch_size=1
                )
                for index, result in parallel(joblib.delayed(_pinned)(function, i, tasks[i]) for i in sorted(waiting)):
                    waiting.discard(index)
                    deaths = 0
                    yield index, result
            except TerminatedWorkerError as error:
                deaths += 1
                if deaths >= DEATHS:
                    raise WorkerError(
                        f"worker processes died {deaths} times in a row with {len(waiting)} chunks to go: "
                        "too little memory? try fewer workers or smaller chunks"
                    ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, as in the workers: the last bits of a matrix product depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def build() -> dict[str, str]:
    """What bit equality depends on: libraries, torch's CPU code path, processor family."""
    found = {name: version(name) for name in LIBRARIES}
    for name in OPTIONAL:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _pinned(function: Callable[[Task], Result], index: int, task: Task) -> tuple[int, Result]:
    torch.set_num_threads(1)
    return index, function(task)
