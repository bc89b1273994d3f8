"""Collecting episodes: the same bits for any number of workers, order of chunks, interruption or death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium import spaces
from toys import Steps, balancer, network_balancer

from robustrl.attacks import MinimalFlip, SmoothedPGD
from robustrl.attacks.base import Attack
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChunkError, WorkerError
from robustrl.noise import Ablation, Gaussian, Splitting
from robustrl.policy import PolicyView
from robustrl.rollouts import collect as collect_module
from robustrl.rollouts.chunk import Episodes, Job
from robustrl.rollouts.collect import ATTACK_CHUNK, collect, make_job
from robustrl.rollouts.executor import LocalExecutor
from robustrl.threat import ThreatModel

NOISE = Gaussian(0.3)


def cartpole(**changes: Any) -> EnvRecipe:
    return EnvRecipe(env_id="CartPole-v1", noise=NOISE, max_episode_steps=60, **changes)


def small_job(**changes: Any) -> Job:
    return make_job(network_balancer(), cartpole(), chunk_size=15, **changes)


def same(a: Episodes, b: Episodes) -> bool:
    return all(np.array_equal(a.arrays()[name], b.arrays()[name]) for name in a.arrays())


class Shuffled:
    """Runs the tasks in another order, and counts them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.done = np.random.default_rng(seed), 0

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index in self.rng.permutation(len(tasks)):
            yield int(index), function(tasks[index])
            self.done += 1


class Interrupted(Shuffled):
    """Ctrl-C after a few chunks."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for result in super().run(function, tasks):
            if self.done == self.after:
                raise KeyboardInterrupt
            yield result


def test_exactly_as_many_episodes_as_asked_for_in_run_order() -> None:
    job = small_job()
    episodes = collect(job, 40)
    assert len(episodes) == 40
    for chunk, n in enumerate((15, 15, 10)):
        part = collect_module.run_chunk(job, chunk, n)
        assert np.array_equal(episodes.returns[15 * chunk : 15 * chunk + n], part.returns)


def test_the_order_in_which_chunks_run_changes_nothing() -> None:
    job = small_job()
    whole = collect(job, 70)
    for seed in range(3):
        assert same(collect(job, 70, executor=Shuffled(seed)), whole)


@pytest.mark.parametrize("kind", ["clean", "attacked", "sampled", "factory"])
def test_two_workers_give_the_bits_of_one(kind: str) -> None:
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
    assert same(collect(job, 50, n_workers=2), collect(job, 50))


def test_an_interrupted_run_goes_on_from_its_chunks(tmp_path: Path) -> None:
    job = small_job()
    with pytest.raises(KeyboardInterrupt):
        collect(job, 90, folder=tmp_path, executor=Interrupted(after=3))
    assert len(list(tmp_path.glob("chunk-*.npz"))) == 3
    rest = Shuffled()
    assert same(collect(job, 90, folder=tmp_path, executor=rest), collect(job, 90))
    assert rest.done == 3
    nothing = Shuffled()
    assert same(collect(job, 90, folder=tmp_path, executor=nothing), collect(job, 90))
    assert nothing.done == 0


def test_more_episodes_extend_a_run_and_fewer_leave_it_whole(tmp_path: Path) -> None:
    job = small_job()
    collect(job, 40, folder=tmp_path)
    more = Shuffled()
    assert same(collect(job, 75, folder=tmp_path, executor=more), collect(job, 75))
    assert more.done == 3  # the two full chunks of the first run are used again; its last one was short
    assert same(collect(job, 20, folder=tmp_path), collect(job, 20))
    again = Shuffled()
    collect(job, 75, folder=tmp_path, executor=again)
    assert again.done == 0


def test_a_damaged_chunk_stops_the_run_and_is_run_again_when_deleted(tmp_path: Path) -> None:
    job = small_job()
    whole = collect(job, 45, folder=tmp_path)
    damaged = tmp_path / "chunk-000001-15.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(ChunkError, match=r"chunk-000001-15\.npz is damaged"):
        collect(job, 45, folder=tmp_path)
    damaged.unlink()
    assert same(collect(job, 45, folder=tmp_path), whole)


def test_another_jobs_folder_is_never_used(tmp_path: Path) -> None:
    collect(small_job(), 15, folder=tmp_path)
    with pytest.raises(ChunkError, match="different seed"):
        collect(small_job(seed=1), 15, folder=tmp_path)


def test_a_factory_with_another_constant_is_another_experiment(tmp_path: Path) -> None:
    def job(rate: float) -> Job:
        return make_job(
            balancer(), EnvRecipe(factory=lambda: Steps(rate=rate), max_episode_steps=40, noise=NOISE), chunk_size=15
        )

    collect(job(0.2), 15, folder=tmp_path)
    collect(job(0.2), 15, folder=tmp_path)
    with pytest.raises(ChunkError, match="different code"):
        collect(job(0.3), 15, folder=tmp_path)


class DiesOnce(Steps):
    """Kills its process at the first reset anywhere; lives ever after."""

    def __init__(self, marker: Path, main: int) -> None:
        super().__init__(rate=0.2)
        self.marker, self.main = marker, main

    def reset(self, **options: Any) -> Any:
        if os.getpid() != self.main:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(**options)


def test_a_worker_killed_in_mid_run_changes_no_bit(tmp_path: Path) -> None:
    recipe = EnvRecipe(factory=partial(DiesOnce, tmp_path / "died", os.getpid()), max_episode_steps=40, noise=NOISE)
    job = make_job(balancer(), recipe, chunk_size=15)
    episodes = collect(job, 120, n_workers=2, folder=tmp_path / "chunks")
    assert (tmp_path / "died").exists()
    assert same(episodes, collect(job, 120))


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    from rollouts.test_collect import slow_job
    from robustrl.rollouts.collect import collect
    collect(slow_job(), 240, n_workers={workers}, folder={folder!r})
"""


class Sluggish(Steps):
    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        return super().step(action)


def slow_job() -> Job:
    recipe = EnvRecipe(factory=partial(Sluggish, rate=0.2), max_episode_steps=40, noise=NOISE)
    return make_job(balancer(), recipe, chunk_size=20)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_outright_goes_on_with_the_same_bits(tmp_path: Path, workers: int) -> None:
    tests = str(Path(__file__).parents[1])
    script = textwrap.dedent(SCRIPT.format(tests=tests, workers=workers, folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", script])
    children = []
    try:
        while process.poll() is None and len(list(tmp_path.glob("chunk-*.npz"))) < 3:
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()
    finished = len(list(tmp_path.glob("chunk-*.npz")))
    assert 3 <= finished < 12
    rest = Shuffled()
    assert same(collect(slow_job(), 240, folder=tmp_path, executor=rest), collect(slow_job(), 240))
    assert rest.done == 12 - finished


def test_an_executor_that_loses_chunks_is_noticed() -> None:
    class Lossy(Shuffled):
        def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            yield from list(super().run(function, tasks))[1:]

    with pytest.raises(WorkerError, match="Lossy returned only 2 of 3 chunks"):
        collect(small_job(), 45, executor=Lossy())


def test_the_progress_bar_counts_episodes_and_shows_an_eta(capsys: pytest.CaptureFixture[str]) -> None:
    collect(small_job(), 45, progress=True, label="rolling")
    shown = capsys.readouterr().out
    assert "rolling" in shown
    assert "45/45" in shown
    assert "eta" in shown
    collect(small_job(), 45)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("episodes", "options", "error", "message"),
    [
        (0, {}, ValueError, "episodes must be an integer >= 1, got 0"),
        (2.5, {}, TypeError, "episodes must be an integer >= 1, got 2.5"),
        (5, {"n_workers": 0}, ValueError, "n_workers must be an integer >= 1, got 0"),
        (5, {"n_workers": "2"}, TypeError, "n_workers must be an integer >= 1, got '2'"),
        (5, {"n_workers": True}, TypeError, "n_workers must be an integer >= 1"),
    ],
)
def test_bad_counts_are_refused_before_anything_is_written(
    tmp_path: Path, episodes: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        collect(small_job(), episodes, folder=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


class Integers(gym.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (4,), np.uint8)

    def observation(self, observation: Any) -> Any:
        return observation.astype(np.uint8)


class OtherActions(Steps):
    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(5)
        self.action_space = space  # type: ignore[assignment]


def acting_in(space: spaces.Space[Any]) -> EnvRecipe:
    return EnvRecipe(factory=lambda: OtherActions(space), max_episode_steps=9, noise=NOISE)


FLIP, BUDGET = MinimalFlip(draws=4), ThreatModel(norm=2, episode=0.5)


@pytest.mark.parametrize(
    ("policy", "recipe", "options", "error", "message"),
    [
        (balancer(2), cartpole(), {}, ValueError, "the policy stacks 2 frame.s., the environment recipe 1"),
        (
            balancer(),
            EnvRecipe(env_id="MountainCar-v0"),
            {},
            ValueError,
            r"frames of shape \(4,\), but MountainCar-v0 gives \(2,\)",
        ),
        (balancer(), acting_in(spaces.Discrete(3)), {}, ValueError, r"the policy acts in Discrete\(2\), but .* takes Discrete"),
        (balancer(), acting_in(spaces.Discrete(2, start=1)), {}, ValueError, r"the policy acts in Discrete\(2\)"),
        (balancer(), acting_in(spaces.MultiBinary(2)), {}, ValueError, "takes MultiBinary"),
        (balancer(), acting_in(spaces.Box(-1, 1, (2,))), {}, ValueError, "takes Box"),
        (balancer(), cartpole(), {"seed": -1}, ValueError, "seed must be an integer >= 0"),
        (balancer(), cartpole(), {"seed": None}, TypeError, "seed must be an integer >= 0"),
        (balancer(), cartpole(), {"chunk_size": 0}, ValueError, "chunk_size must be an integer >= 1"),
        (balancer(), cartpole(), {"engine": "fast"}, ValueError, "engine must be one of"),
        (balancer(), cartpole(), {"attack": FLIP}, ValueError, "attack and threat go together"),
        (balancer(), cartpole(), {"threat": BUDGET}, ValueError, "attack and threat go together"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_episode(
    policy: PolicyView, recipe: EnvRecipe, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_job(policy, recipe, **options)


@pytest.mark.parametrize("attack", [None, FLIP])
def test_neither_noise_nor_attacks_go_onto_integers(attack: Attack | None) -> None:
    recipe = EnvRecipe(factory=lambda: Integers(Steps(5)), max_episode_steps=9, noise=NOISE if attack is None else None)
    with pytest.raises(ValueError, match="float"):
        make_job(balancer(), recipe, attack=attack, threat=None if attack is None else BUDGET)


@pytest.mark.parametrize("noise", [Ablation(0.5), Splitting(0.5, 0.0, 1.0)])
@pytest.mark.parametrize("attack", [MinimalFlip(), SmoothedPGD()])
def test_attacks_refuse_noise_that_is_not_additive_before_any_work(attack: Attack, noise: Any) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=noise)
    with pytest.raises(ValueError, match="needs additive noise"):
        make_job(balancer(), recipe, attack=attack, threat=BUDGET)


def test_attacked_chunks_are_small_unless_asked_otherwise() -> None:
    assert make_job(balancer(), cartpole()).chunk_size == 1250
    assert make_job(balancer(), cartpole(), engine="list").chunk_size == 64
    assert make_job(balancer(), cartpole(), attack=FLIP, threat=BUDGET).chunk_size == ATTACK_CHUNK
    assert make_job(balancer(), cartpole(), attack=FLIP, threat=BUDGET, chunk_size=7).chunk_size == 7


def test_no_more_workers_than_chunks_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(collect_module, "LocalExecutor", lambda n: started.append(n) or LocalExecutor(1))
    collect(small_job(), 30, n_workers=8)
    collect(small_job(), 15, n_workers=8)
    assert started == [2, 1]
