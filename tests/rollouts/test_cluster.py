"""Chunks on Ray: the bits of one process, whatever dies."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import ray
import torch
from ray import exceptions
from ray.cluster_utils import Cluster
from toys import Steps, balancer, network_balancer

from robustrl.attacks import SmoothedPGD
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import WorkerError
from robustrl.rollouts import cluster as cluster_module
from robustrl.rollouts.chunk import Job
from robustrl.rollouts.cluster import RayExecutor
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import build
from robustrl.threat import ThreatModel
from rollouts.test_collect import NOISE, same, small_job

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each. Tests may add nodes, and take away those they added."""
    two = Cluster()
    try:
        two.add_node(**NODE)
        two.add_node(**NODE)
        yield two
    finally:
        ray.shutdown()
        two.shutdown()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(part.startswith("ray::") or os.path.dirname(ray.__file__) in part for part in process.cmdline()):
                    process.kill()


@pytest.fixture(scope="module")
def warm(cluster: Cluster) -> Iterator[RayExecutor]:
    """An executor with both nodes at work."""
    with RayExecutor(cluster.address) as executor:
        for node in cluster.list_all_nodes():
            set_to_work(executor, node)
        yield executor


@pytest.fixture
def doomed(cluster: Cluster, warm: RayExecutor) -> Iterator[Any]:
    """A third node, at work."""
    node = cluster.add_node(**NODE)
    try:
        set_to_work(warm, node)
        yield node
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


@pytest.fixture
def unconnected() -> Iterator[None]:
    """No connection to Ray at the beginning, and none left at the end."""
    ray.shutdown()
    yield
    ray.shutdown()


def square(x: int) -> int:
    return x * x


def fail_at(notes: Path, bad: int, x: int) -> int:
    note(notes, x)
    if x == bad:
        raise ValueError(f"task {x} cannot be done")
    return x


def die_at(notes: Path, bad: int, x: int) -> int:
    note(notes, x)
    if x == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def sleep(notes: Path, seconds: float, x: int) -> int:
    note(notes, x)
    time.sleep(seconds)
    return x


def parent(_: int) -> int:
    time.sleep(0.2)
    return os.getppid()


def set_to_work(executor: RayExecutor, node: Any) -> None:
    """Until its worker has started and imported everything."""
    deadline = time.monotonic() + 120
    while raylet(node) not in dict(executor.run(parent, range(12))).values():
        assert time.monotonic() < deadline, "a node gets no work"


def raylet(node: Any) -> int:
    """The process of a node, parent of its workers."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def note(folder: Path, name: object) -> None:
    """One file for every time that something was begun."""
    (folder / f"{name}-{os.getppid()}-{secrets.token_hex(4)}").touch()


def noted(folder: Path) -> Counter[str]:
    """How often each thing was begun."""
    return Counter(path.name.split("-")[0] for path in folder.iterdir())


def busy(folder: Path, pid: int) -> bool:
    """Whether a worker of that node has begun something just now."""
    return any(time.time() - path.stat().st_mtime < 0.1 for path in folder.glob(f"*-{pid}-*"))


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """Notes every episode that begins, and may take its process or its node with it, once, in the middle of an episode."""

    def __init__(self, env: Any, notes: Path, *, kills: str = "", raylet: int = 0, pause: float = 0.0) -> None:
        super().__init__(env)
        self.notes, self.kills, self.raylet, self.pause = notes, kills, raylet, pause

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        note(self.notes, seed)
        time.sleep(self.pause)
        self.t = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        self.t += 1
        if self.t == 5 and self.kills and self.raylet in (0, os.getppid()):
            try:
                (self.notes / self.kills).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                self.kill()
        return self.env.step(action)

    def kill(self) -> None:
        if self.kills == "node":  # all at once, as when the power goes
            node = psutil.Process(self.raylet)
            others = [process for process in node.children(recursive=True) if process.pid != os.getpid()]
            for process in (node, *others):
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)


def watched(notes: Path, **options: Any) -> Job:
    notes.mkdir(exist_ok=True)
    wrapper = partial(Watched, notes=notes, **options)
    recipe = EnvRecipe(env_id="CartPole-v1", wrappers=(wrapper,), noise=NOISE, max_episode_steps=60)
    return make_job(network_balancer(), recipe, chunk_size=15)


class Between:
    """An executor that does something after a number of results."""

    def __init__(self, executor: RayExecutor, after: int, act: Callable[[], object]) -> None:
        self.executor, self.after, self.act = executor, after, act

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for done, result in enumerate(self.executor.run(function, tasks), start=1):
            if done == self.after:
                self.act()
            yield result


def interrupt() -> None:
    raise KeyboardInterrupt


# --- doors ---


def test_no_tasks_need_no_cluster(unconnected: None) -> None:
    assert list(RayExecutor("127.0.0.1:1").run(square, [])) == []
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"address": 6379}, TypeError, "address must be 'auto', 'local' or 'host:port', got 6379 of type int"),
        ({"address": None}, TypeError, "address must be 'auto', 'local' or 'host:port', got None"),
        ({"address": ""}, ValueError, "address must be 'auto', 'local' or 'host:port', got ''"),
        ({"address": "head"}, ValueError, "'host:port', got 'head'"),
        ({"address": ":6379"}, ValueError, "'host:port', got ':6379'"),
        ({"address": "head:port"}, ValueError, "'host:port', got 'head:port'"),
        ({"address": "head:0"}, ValueError, "'host:port', got 'head:0'"),
        ({"address": "head:65536"}, ValueError, "'host:port', got 'head:65536'"),
        ({"address": "ray://head:10001"}, ValueError, "'host:port', got 'ray://head:10001'"),
        ({"n_workers": 0}, ValueError, "n_workers must be an integer >= 1, got 0"),
        ({"n_workers": 1.5}, TypeError, "n_workers must be an integer >= 1, got 1.5"),
        ({"n_workers": True}, TypeError, "n_workers must be an integer >= 1"),
        ({"max_deaths": 0}, ValueError, "max_deaths must be an integer >= 1, got 0"),
        ({"max_deaths": "5"}, TypeError, "max_deaths must be an integer >= 1, got '5'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RayExecutor(**options)


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"RayExecutor needs Ray: pip install 'robustrl\[ray\]'"):
        RayExecutor()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there_is_named_at_once(unconnected: None, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    if address == "auto":
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match="no Ray cluster answers at address='127.0.0.1:1'.*refused.*use address='local'"):
        list(RayExecutor(address).run(square, [3]))
    assert not ray.is_initialized()


# --- the real thing, on this machine ---


def test_a_local_ray_gives_the_bits_of_this_process(
    unconnected: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = small_job()
    with RayExecutor("local", n_workers=1) as executor:
        found = ray.cluster_resources()
        assert (found["CPU"], found["object_store_memory"]) == (1, cluster_module.OBJECT_STORE)
        assert same(collect(job, 50, executor=executor), collect(job, 50))
        with pytest.raises(ValueError, match="task 1 cannot be done") as caught:
            list(executor.run(partial(fail_at, tmp_path, 1), range(2)))
        assert type(caught.value) is ValueError
    assert not ray.is_initialized()
    assert capfd.readouterr() == ("", "")


# --- one connection per program (these close it: first) ---


@pytest.mark.slow
def test_only_a_connection_of_its_own_is_closed(unconnected: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (large,) = (result for _, result in RayExecutor().run(np.arange, [10**6]))
    assert not ray.is_initialized()
    large += 1  # an ordinary array, not a view of Ray's memory
    assert large.sum() == 10**6 * (10**6 + 1) // 2
    with RayExecutor(cluster.address) as executor:
        assert list(executor.run(square, [3])) == [(0, 9)]
        assert ray.is_initialized()
        with RayExecutor("auto") as guest:
            assert list(guest.run(square, [4])) == [(0, 16)]
        assert ray.is_initialized()
        for other in ("local", "127.0.0.1:1"):
            with pytest.raises(ValueError, match=f"connected to Ray at {cluster.address}, not at {other}"):
                list(RayExecutor(other).run(square, [3]))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_ctrl_c_while_waiting_ends_the_run_and_its_connection(unconnected: None, cluster: Cluster, tmp_path: Path) -> None:
    def press() -> None:
        while not any(tmp_path.iterdir()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # Whoever runs the tests in the background of a script runs them with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presser = threading.Thread(target=press)
    presser.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(RayExecutor(cluster.address).run(partial(sleep, tmp_path, 100), range(4)))
    finally:
        signal.signal(signal.SIGINT, before)
    presser.join()
    assert time.monotonic() - start < 60
    assert not ray.is_initialized()


# --- two nodes ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "attacked", "sampled", "factory"])
def test_two_nodes_give_the_bits_of_one_process(warm: RayExecutor, kind: str, tmp_path: Path) -> None:
    threat = ThreatModel(norm=2, episode=0.5)
    jobs = {
        "clean": lambda: small_job(),
        "attacked": lambda: small_job(attack=SmoothedPGD(draws=8, step_size=0.05), threat=threat),
        "sampled": lambda: small_job(deterministic=False, engine="list"),
        "factory": lambda: make_job(
            balancer(), EnvRecipe(factory=lambda: Steps(rate=0.2), max_episode_steps=40, noise=NOISE), chunk_size=15
        ),
    }
    job = jobs[kind]()
    alone = collect(job, 100)
    assert same(collect(job, 100, executor=warm), alone)
    assert same(collect(job, 100, executor=warm, folder=tmp_path), alone)
    assert len(list(tmp_path.glob("chunk-*.npz"))) == 7
    assert same(collect(job, 100, executor=warm, folder=tmp_path), alone)


@pytest.mark.slow
def test_every_task_has_one_thread(warm: RayExecutor) -> None:
    def threads(_: int) -> tuple[int, str | None]:
        found = torch.get_num_threads()
        torch.set_num_threads(2)  # as an environment may
        return found, os.environ.get("OMP_NUM_THREADS")

    assert {found for _, found in warm.run(threads, range(8))} == {(1, "1")}


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_an_episode_changes_no_bit(warm: RayExecutor, tmp_path: Path) -> None:
    episodes = collect(watched(tmp_path / "ray", kills="process"), 120, executor=warm)
    assert (tmp_path / "ray" / "process").exists()
    assert same(episodes, collect(watched(tmp_path / "alone"), 120))
    begun = noted(tmp_path / "ray")
    assert sum(begun[str(seed)] == 2 for seed in episodes.seeds) == 15  # one chunk was played twice
    assert sum(begun[str(seed)] == 1 for seed in episodes.seeds) == 105


@pytest.mark.slow
def test_a_node_that_loses_power_changes_no_bit(warm: RayExecutor, doomed: Any, tmp_path: Path) -> None:
    job = watched(tmp_path / "ray", kills="node", raylet=raylet(doomed))
    episodes = collect(job, 240, executor=warm, folder=tmp_path / "chunks")
    assert (tmp_path / "ray" / "node").exists()
    assert same(episodes, collect(watched(tmp_path / "alone"), 240))
    begun = noted(tmp_path / "ray")
    assert any(begun[str(seed)] > 1 for seed in episodes.seeds)


@pytest.mark.slow
def test_a_node_that_is_taken_away_changes_no_bit(warm: RayExecutor, cluster: Cluster, doomed: Any, tmp_path: Path) -> None:
    def take_away() -> None:
        deadline = time.monotonic() + 60
        while not busy(tmp_path / "ray", raylet(doomed)):
            assert time.monotonic() < deadline, "the third node gets no work"
        cluster.remove_node(doomed)

    episodes = collect(watched(tmp_path / "ray", pause=0.05), 240, executor=Between(warm, 1, take_away))
    assert same(episodes, collect(watched(tmp_path / "alone"), 240))
    assert doomed not in cluster.worker_nodes


@pytest.mark.slow
def test_results_that_died_with_their_node_before_they_were_fetched_are_made_again(
    warm: RayExecutor, cluster: Cluster, doomed: Any, tmp_path: Path
) -> None:
    def large(x: int) -> Any:  # too large to travel with the task's reply: it stays on the node until it is fetched
        sleep(tmp_path, 0.2, x)
        return np.full(10**6, x)

    def lose() -> None:
        time.sleep(3)  # the six tasks that may be under way are done
        cluster.remove_node(doomed)

    results = dict(Between(warm, 1, lose).run(large, range(20)))
    assert all((results[x] == x).all() for x in range(20))
    assert max(noted(tmp_path).values()) > 1


@pytest.mark.slow
def test_a_task_that_always_kills_its_process_ends_in_an_error(cluster: Cluster, warm: RayExecutor, tmp_path: Path) -> None:
    done = []
    with pytest.raises(WorkerError, match=r"lost 2 times in a row \(WorkerCrashedError\) with 1 chunks to go: too little mem"):
        for index, _ in RayExecutor(cluster.address, max_deaths=2).run(partial(die_at, tmp_path, 1), range(6)):
            done.append(index)
    assert sorted(done) == [0, 2, 3, 4, 5]  # the others are not held up
    assert noted(tmp_path)["1"] >= 2


@pytest.mark.slow
def test_an_error_in_a_task_arrives_as_it_is_and_is_not_tried_again(warm: RayExecutor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^task 2 cannot be done$") as caught:
        list(warm.run(partial(fail_at, tmp_path, 2), range(5)))
    assert type(caught.value) is ValueError
    assert "fail_at" in str(caught.value.__cause__)  # where on the cluster it came from
    assert noted(tmp_path)["2"] == 1


@pytest.mark.slow
def test_a_broken_environment_raises_its_own_error(warm: RayExecutor) -> None:
    class Broken(Steps):
        def step(self, action: Any) -> Any:
            raise FloatingPointError("the simulator diverged")

    job = make_job(balancer(), EnvRecipe(factory=lambda: Broken(9), max_episode_steps=9, noise=NOISE), chunk_size=15)
    with pytest.raises(FloatingPointError, match="the simulator diverged"):
        collect(job, 30, executor=warm)


@pytest.mark.slow
def test_a_consumer_that_does_not_ask_stops_the_cluster(warm: RayExecutor, tmp_path: Path) -> None:
    run = warm.run(partial(sleep, tmp_path, 0.01), range(200))
    for asked in (1, 2):
        next(run)
        deadline = time.monotonic() + 60
        while sum(noted(tmp_path).values()) < 4 + asked - 1:  # two CPUs, and as many tasks waiting
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)
        assert sum(noted(tmp_path).values()) == 4 + asked - 1
    run.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_that_is_closed_stops_what_is_under_way(warm: RayExecutor, tmp_path: Path) -> None:
    run = warm.run(partial(sleep, tmp_path, 3), [0] + [60] * 10)
    with pytest.raises(KeyboardInterrupt):
        list(Between(warm, 1, interrupt).run(partial(sleep, tmp_path, 0.5), range(50)))
    assert sorted(warm.run(square, range(4))) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    begun = sum(noted(tmp_path).values())  # counted now: a task may be starting while it is cancelled
    assert begun < 10
    time.sleep(1)
    assert sum(noted(tmp_path).values()) == begun
    run.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_interrupted_on_ray_goes_on_here(warm: RayExecutor, tmp_path: Path) -> None:
    job = small_job()
    with pytest.raises(KeyboardInterrupt):
        collect(job, 150, folder=tmp_path, executor=Between(warm, 5, interrupt))
    assert len(list(tmp_path.glob("chunk-*.npz"))) == 4
    assert same(collect(job, 150, folder=tmp_path), collect(job, 150))


SCRIPT = """
    import sys
    import gymnasium as gym
    sys.path.insert(0, {tests!r})
    from toys import Steps, balancer
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.noise import Gaussian
    from robustrl.rollouts.cluster import RayExecutor
    from robustrl.rollouts.collect import collect, make_job

    class Mine(Steps):
        pass

    recipe = EnvRecipe(factory=lambda: Mine(rate=0.2), max_episode_steps=40, noise=Gaussian(0.3))
    job = make_job(balancer(), recipe, chunk_size=15)
    assert (collect(job, 45, executor=RayExecutor({address!r})).returns == collect(job, 45).returns).all()
    print("equal")
"""


@pytest.mark.slow
def test_what_a_script_defines_travels(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parents[1]), address=cluster.address)))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "equal\n"), run.stderr


@pytest.mark.slow
def test_a_node_with_other_libraries_is_refused(warm: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "build", lambda: build() | {"torch": "1.0"})
    with pytest.raises(WorkerError, match=rf"node \S+ has torch {torch.__version__.split('+')[0]}\S*, not 1.0: chunks of dif"):
        list(warm.run(square, [3]))


# --- the queue, on a Ray that is not there ---


class Reference:
    """What Ray gives for a result to come; the result is freed with the last of them."""


class FakeRay:
    """Tasks run when they are fetched; `fate(task)` may be an exception to raise instead."""

    exceptions, cloudpickle = exceptions, ray.cloudpickle

    def __init__(self, cpus: int = 2, fate: Callable[[Any], Exception | None] = lambda task: None) -> None:
        self.cpus, self.fate = cpus, fate
        self.under_way: dict[Reference, Callable[[], Any]] = {}
        self.connected, self.joined = True, list[tuple[str, dict[str, Any]]]()
        self.known = weakref.WeakSet[Reference]()
        self.most, self.submitted, self.options = 0, list[Any](), dict[str, Any]()

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, address: str, **options: Any) -> None:
        self.connected = True
        self.joined.append((address, options))

    def shutdown(self) -> None:
        self.connected = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} if self.cpus else {}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: SimpleNamespace(remote=partial(self.submit, function))

    def submit(self, function: Callable[..., Any], shared: Any, task: Any) -> Reference:
        def outcome() -> Any:
            if error := self.fate(task):
                raise error
            return function(shared, task)

        reference = Reference()
        self.under_way[reference] = outcome
        self.known.add(reference)
        self.submitted.append(task)
        self.most = max(self.most, len(self.under_way))
        return reference

    def wait(self, references: list[Reference], num_returns: int) -> tuple[list[Reference], list[Reference]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Reference) -> Any:
        return self.under_way.pop(reference)()

    def cancel(self, reference: Reference, force: bool) -> None:
        assert force
        del self.under_way[reference]


def pretend(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> FakeRay:
    monkeypatch.setattr(cluster_module, "_import_ray", lambda: fake)
    return fake


@pytest.mark.parametrize(("cpus", "n_workers", "most"), [(2, None, 4), (3, None, 6), (0, None, 2), (8, 3, 3), (2, 5, 5)])
def test_the_tasks_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch, cpus: int, n_workers: int | None, most: int) -> None:
    fake = pretend(monkeypatch, FakeRay(cpus))
    assert sorted(RayExecutor(n_workers=n_workers).run(square, range(50))) == [(x, x * x) for x in range(50)]
    assert fake.most == most
    assert not fake.under_way
    assert fake.options == {"num_cpus": 1, "max_retries": 0}


def test_a_result_is_freed_on_the_cluster_before_it_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeRay(2))
    for _ in RayExecutor().run(square, range(50)):
        assert set(fake.known) == set(fake.under_way)


def test_nodes_that_join_get_work_and_nodes_that_leave_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeRay(1))
    run = RayExecutor().run(square, range(100))
    sizes = []
    for cpus in (1, 4, 2):
        fake.cpus = cpus
        for _ in range(10):
            next(run)
        sizes.append(len(fake.under_way))
    assert sizes == [1, 7, 3]


LOSSES = [
    exceptions.WorkerCrashedError(),
    exceptions.NodeDiedError("gone"),
    exceptions.LocalRayletDiedError(),
    exceptions.OutOfMemoryError("full"),
    exceptions.ObjectLostError("00", None, ""),
    exceptions.OwnerDiedError("00", None, ""),
    exceptions.RayTaskError("_work", "arguments lost", exceptions.OwnerDiedError("00", None, "")).as_instanceof_cause(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_what_dies_is_done_again(monkeypatch: pytest.MonkeyPatch, loss: Exception) -> None:
    lost = Counter[int]()

    def fate(task: int) -> Exception | None:
        lost[task] += 1
        return loss if task % 3 == 0 and lost[task] == 1 else None

    fake = pretend(monkeypatch, FakeRay(fate=fate))
    assert sorted(RayExecutor().run(square, range(20))) == [(x, x * x) for x in range(20)]
    assert Counter(fake.submitted) == {x: 2 if x % 3 == 0 else 1 for x in range(20)}


def test_a_large_node_that_dies_is_one_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tasks are lost one after the other with nothing finishing in between, and none of them more than once."""
    seen = Counter[int]()

    def fate(task: int) -> Exception | None:
        seen[task] += 1
        return exceptions.NodeDiedError("gone") if seen[task] == 1 and task < 40 else None

    pretend(monkeypatch, FakeRay(20, fate))
    assert sorted(RayExecutor(max_deaths=2).run(square, range(60))) == [(x, x * x) for x in range(60)]


def test_workers_that_only_die_are_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeRay(2, lambda task: exceptions.OutOfMemoryError("full")))
    with pytest.raises(WorkerError, match=r"lost 3 times in a row \(OutOfMemoryError\) with 1000 chunks to go") as caught:
        list(RayExecutor(max_deaths=3).run(square, range(1000)))
    assert isinstance(caught.value.__cause__, exceptions.OutOfMemoryError)
    assert len(fake.submitted) <= 3 * 4  # the four that were under way, not all thousand
    assert not fake.under_way


def test_losses_count_only_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task 0 is lost 30 times, but others finish all the while."""
    lost = Counter[int]()

    def fate(task: int) -> Exception | None:
        lost[task] += 1
        return exceptions.WorkerCrashedError() if task == 0 and lost[0] <= 30 else None

    pretend(monkeypatch, FakeRay(2, fate))
    assert len(list(RayExecutor(max_deaths=2).run(square, range(200)))) == 200


@pytest.mark.parametrize(
    "error",
    [
        exceptions.RaySystemError("cannot be read"),
        exceptions.UnserializableException("an error that cannot be pickled"),
        exceptions.TaskCancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_trouble_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake = pretend(monkeypatch, FakeRay(2, lambda task: error if task == 1 else None))
    with pytest.raises(type(error)):
        list(RayExecutor().run(square, range(10)))
    assert fake.submitted.count(1) == 1
    assert not fake.under_way


def test_a_run_that_is_closed_cancels_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeRay(2))
    run = RayExecutor().run(square, range(50))
    next(run)
    assert fake.under_way
    run.close()  # type: ignore[attr-defined]
    assert not fake.under_way


def test_a_connection_is_quiet_and_closed_by_who_opened_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeRay(2))
    list(RayExecutor().run(square, range(5)))
    assert (fake.connected, fake.joined) == (True, [])
    fake.shutdown()
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    own = {"num_cpus": 3, "object_store_memory": cluster_module.OBJECT_STORE, "include_dashboard": False}
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        for given, named, expected in (
            ("local", address, ("local", own | quiet)),
            (address, "head:1", (address, quiet)),
            ("auto", address, (address, quiet)),
            ("auto", "", ("auto", quiet)),
        ):
            monkeypatch.setenv("RAY_ADDRESS", named)
            list(RayExecutor(given, n_workers=3).run(square, range(5)))
            assert not fake.connected
            with RayExecutor(given, n_workers=3) as executor:
                for _ in range(2):
                    list(executor.run(square, range(5)))
                    assert fake.connected
            assert not fake.connected
            assert fake.joined == [expected] * 2
            fake.joined.clear()


def test_a_run_left_open_when_its_connection_goes_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts itself where something is asked of it without a connection."""
    fake = pretend(monkeypatch, FakeRay(2))
    run = RayExecutor().run(square, range(50))
    next(run)
    fake.shutdown()
    run.close()  # type: ignore[attr-defined]
    assert fake.under_way  # nothing was cancelled
