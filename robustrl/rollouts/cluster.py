"""Chunks on a Ray cluster."""

from __future__ import annotations

import importlib
import os
import pickle
import platform
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from robustrl.errors import WorkerError, check_count
from robustrl.rollouts.executor import DEATHS, Result, Task, build, one_thread

OBJECT_STORE = 200 * 2**20
"""Bytes of shared memory of an `address="local"` Ray: one pickled job and some chunks of returns."""

ANSWER = 10.0
"""Seconds for a cluster's address to answer; Ray itself keeps knocking for minutes."""

LOST = ("WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "OutOfMemoryError")
"""What Ray raises for a task whose process or node is gone."""


class RayExecutor:
    """Tasks on the CPUs of a Ray cluster, one torch thread each; bit-equal to `LocalExecutor`.

    A program has one connection to Ray. One that is open is used and left open; otherwise every `run` opens and closes its
    own, or a `with` block one for all runs inside, which keeps the workers warm::

        with RayExecutor("10.0.0.1:6379") as executor:
            collect(job, 100_000, executor=executor)
            collect(other, 100_000, executor=executor)

    Every node needs the Python environment of this process. The function travels by value if it comes from the script being
    run, otherwise by the name of its module, which is looked for where this process looks (`sys.path`).

    Args:
        address: "host:port" of a cluster's head; "auto" for the one in `RAY_ADDRESS` or on this machine; "local" starts
            Ray on this machine for as long as the connection lasts.
        n_workers: tasks handed out at a time; by default two for every CPU that the cluster has at that moment, so that
            the next task waits where one ends. With "local" also the number of CPUs.
        max_deaths: times that a task may be lost with a process or a node, no task finishing in between, before the run is
            given up.
    Raises:
        ImportError: without Ray.
    """

    def __init__(self, address: str = "auto", *, n_workers: int | None = None, max_deaths: int = DEATHS) -> None:
        if not isinstance(address, str):
            raise TypeError(f"address must be 'auto', 'local' or 'host:port', got {address!r} of type {type(address).__name__}")
        if address not in ("auto", "local") and _host_and_port(address) is None:
            raise ValueError(f"address must be 'auto', 'local' or 'host:port', got {address!r}")
        self.address = address
        self.n_workers = None if n_workers is None else check_count("n_workers", n_workers)
        self.max_deaths = check_count("max_deaths", max_deaths)
        self._opened = False
        _import_ray()

    def __enter__(self) -> Self:
        self._opened = self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            _import_ray().shutdown()
        self._opened = False

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """Yield (index of the task, result) as tasks finish.

        Raises:
            WorkerError: if a task is lost too often, or a node has other libraries than this process.
            ConnectionError: if no cluster answers.
            ValueError: if this process is connected to another cluster.
        """
        if not tasks:
            return
        ray, opened = _import_ray(), self._connect()
        lost = tuple(getattr(ray.exceptions, name) for name in LOST)
        waiting, losses = deque(range(len(tasks))), Counter[int]()
        running: dict[Any, int] = {}
        try:
            shared = ray.put((ray.cloudpickle.dumps(function), sys.path, build()))
            # One CPU makes Ray set OMP_NUM_THREADS=1. Its own retries are off: it counts them task by task, whatever else
            # finishes, and hardly at all where memory is short.
            remote = ray.remote(num_cpus=1, max_retries=0)(_work)
            while waiting or running:
                for _ in range(min(len(waiting), self._at_a_time() - len(running))):
                    index = waiting.popleft()
                    running[remote.remote(shared, tasks[index])] = index
                (finished,), _ = ray.wait(list(running), num_returns=1)
                index = running.pop(finished)
                try:
                    result = pickle.loads(ray.get(finished))
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", error)
                    if not isinstance(cause, lost):
                        raise cause from None if cause is error else error
                    losses[index] += 1
                    if losses[index] >= self.max_deaths:
                        raise WorkerError(
                            f"a chunk was lost {losses[index]} times in a row ({type(cause).__name__}) with "
                            f"{len(waiting) + len(running) + 1} chunks to go: too little memory? try smaller chunks"
                        ) from error
                    waiting.appendleft(index)
                    continue
                finally:
                    del finished  # frees the result in the cluster's memory while the caller has it
                losses.clear()
                yield index, result
        finally:
            if ray.is_initialized():  # otherwise `cancel` would start a Ray of its own
                for task in running:
                    ray.cancel(task, force=True)
                if opened:
                    ray.shutdown()

    def _at_a_time(self) -> int:
        return self.n_workers or 2 * max(1, int(_import_ray().cluster_resources().get("CPU", 0)))

    def _connect(self) -> bool:
        """Whether this opened a connection."""
        ray = _import_ray()
        if ray.is_initialized():
            if self.address != "auto" and not self._opened and (here := ray.get_runtime_context().gcs_address) != self.address:
                raise ValueError(f"this process is connected to Ray at {here}, not at {self.address}: address='auto' uses that")
            return False
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address == "local":
            ray.init("local", num_cpus=self.n_workers, object_store_memory=OBJECT_STORE, include_dashboard=False, **quiet)
            return True
        where = (os.environ.get("RAY_ADDRESS") or "auto") if self.address == "auto" else self.address
        try:
            if (reachable := _host_and_port(where)) is not None:
                socket.create_connection(reachable, timeout=ANSWER).close()
            ray.init(where, **quiet)
        except OSError as error:
            raise ConnectionError(
                f"no Ray cluster answers at address={where!r} ({error}): start one with 'ray start --head' (with token "
                "authentication, set RAY_AUTH_MODE=token here too), or use address='local'"
            ) from error
        return True


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("RayExecutor needs Ray: pip install 'robustrl[ray]'") from error


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    valid = host and "/" not in host and port.isdecimal() and 0 < int(port) < 2**16
    return (host.strip("[]"), int(port)) if valid else None


def _work(shared: tuple[bytes, list[str], dict[str, str]], task: Any) -> bytes:
    """One task in a worker process. Bytes in and out: arrays of Ray's own would be read-only views of its shared memory."""
    ray = _import_ray()
    function, path, expected = shared
    found = build()
    if found != expected:
        differs = ", ".join(f"{name} {found[name]}, not {expected[name]}" for name in found if found[name] != expected[name])
        raise WorkerError(
            f"node {platform.node()} has {differs}: chunks of different builds differ in their last bits; give all nodes the "
            "same libraries and processors of one generation"
        )
    sys.path.extend(folder for folder in path if folder not in sys.path)
    with one_thread():
        result: bytes = ray.cloudpickle.dumps(ray.cloudpickle.loads(function)(task))
    return result
