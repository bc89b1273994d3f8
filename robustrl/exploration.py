"""Many seeds of many tabular learners in one environment: what exploring cost, what it found, and pictures of the safe set growing."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from robustrl.agents.ase import (
    ASE,
    MBIE,
    Declaration,
    EpsilonGreedy,
    QLearning,
    RMax,
    SafeEpsilonGreedy,
    SafeRMax,
    TabularAgent,
    UndirectedASE,
)
from robustrl.agents.ase.ase import SafeLearner
from robustrl.agents.ase.declaration import digest
from robustrl.errors import check_choice, check_count
from robustrl.files import save_figure, write_atomically
from robustrl.mdp.planning import Beliefs, optimise
from robustrl.mdp.safe_sets import learnable_oracle, safe_oracle
from robustrl.report.exploration import OPTIMAL, ExplorationRun, exploration_csv, exploration_figure, exploration_table
from robustrl.rollouts.executor import one_thread

AGENTS: dict[str, type[TabularAgent]] = {
    "ase": ASE,
    "undirected-ase": UndirectedASE,
    "safe-r-max": SafeRMax,
    "r-max": RMax,
    "mbie": MBIE,
    "safe-epsilon-greedy": SafeEpsilonGreedy,
    "epsilon-greedy": EpsilonGreedy,
    "q-learning": QLearning,
}
"""What `explore` can compare, by name."""
FRAMES = 60
"""Pictures in an animation, at most."""


def explore(
    env: str,
    agents: Sequence[str] = ("ase",),
    *,
    seeds: int | Sequence[int] = 5,
    timesteps: int = 2_000,
    out: str | os.PathLike[str],
    every: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    agent_options: Mapping[str, Mapping[str, Any]] | None = None,
    delta: float = 0.05,
    n_workers: int = 1,
    on_run: Callable[[ExplorationRun], object] | None = None,
) -> list[ExplorationRun]:
    """Let agents explore an environment, once per seed, and write down what it cost and what they found.

    A folder gets `runs/` (per agent and seed the curves as JSON, the agent as `AgentClass.load` reads it, and the certificate of an ASE),
    `curves.csv`, `summary.md`, `curves.png`, `tb/`, and for grid worlds a map and an animation of the safe set growing, of every agent's
    first seed. Runs that are there already are not made again.

    Args:
        env: Gymnasium id.
        agents: names of `AGENTS`.
        seeds: how many (0, 1, ...), or which.
        timesteps: steps of each run.
        out: folder to write.
        every: steps between two entries of the curves, default a 200th of `timesteps`.
        env_kwargs: for `gymnasium.make`.
        options: keyword arguments of every agent, e.g. `tau`, `gamma`, `unsafe`.
        agent_options: keyword arguments of single agents, by name.
        delta: failure probability of the agents that prove something.
        n_workers: processes.
        on_run: called with every run as it is finished, in no particular order.

    Returns:
        the runs, by agent and seed.

    Raises:
        ValueError: if an argument is out of range, agents lack something that neither `options` nor the environment says, or `out` holds
            runs of another experiment.

    Examples:
        >>> import robustrl as rrl                                                                     # doctest: +SKIP
        >>> runs = rrl.explore("robustrl/LavaIslands-v0", ["ase", "r-max"], seeds=3, out="runs/islands")  # doctest: +SKIP
    """
    for name in agents:
        check_choice("agents", name, tuple(AGENTS))
    unknown = set(agent_options or {}) - set(agents)
    if unknown:
        raise ValueError(f"agent_options must be for agents that explore, got {sorted(unknown)}")
    numbers = (
        range(check_count("seeds", seeds)) if isinstance(seeds, int) else [check_count("seeds", s, least=0) for s in seeds]
    )
    total = check_count("timesteps", timesteps)
    interval = max(1, total // 200) if every is None else check_count("every", every)
    folder = Path(out)
    jobs = [(name, seed) for name in agents for seed in numbers]
    found: dict[tuple[str, int], ExplorationRun] = {}

    def job(name: str, seed: int) -> ExplorationRun:
        proves = {"delta": delta} if issubclass(AGENTS[name], SafeLearner) else {}
        settings = {**proves, **(options or {}), **(agent_options or {}).get(name, {})}
        return _explore(env, dict(env_kwargs or {}), name, settings, seed, total, interval, folder, seed == numbers[0])

    work = (delayed(job)(name, seed) for name, seed in jobs)
    for run in Parallel(n_jobs=check_count("n_workers", n_workers), return_as="generator_unordered")(work):
        found[run.agent, run.seed] = run
        if on_run is not None:
            on_run(run)
    runs = [found[key] for key in jobs]
    title = f"{runs[0].env}: mean, smallest and largest of {len(numbers)} seeds"
    write_atomically(folder / "curves.csv", exploration_csv(runs))
    write_atomically(folder / "summary.md", f"# {runs[0].env}\n\n{exploration_table(runs)}\n".encode())
    save_figure(exploration_figure(runs, title), folder / "curves.png")
    return runs


def _explore(
    env_id: str,
    env_kwargs: dict[str, Any],
    name: str,
    options: dict[str, Any],
    seed: int,
    timesteps: int,
    every: int,
    folder: Path,
    pictures: bool,
) -> ExplorationRun:
    """One run, made or found in the folder."""
    with one_thread():
        env = gym.make(env_id, **env_kwargs)
        agent = AGENTS[name](env, seed=seed, tensorboard_log=os.fspath(folder / "tb"), **options)
        title = env_id + "".join(f", {key}={value}" for key, value in env_kwargs.items())
        fingerprint, path = _digest(title, agent, timesteps), folder / "runs" / f"{name}-seed{seed}"
        if path.with_suffix(".json").exists():
            run = ExplorationRun.load(path.with_suffix(".json"))
            if run.digest != fingerprint:
                raise ValueError(
                    f"out must be a folder for this experiment, {path}.json belongs to another: give another folder"
                )
            return run
        judge, start = _Judge(agent.declaration), time.perf_counter()
        recorder = _Recorder(judge, every, keep_sets=pictures)
        agent.learn(timesteps, callback=recorder, tb_log_name=f"{name}-seed{seed}", log_interval=100)
        seconds = time.perf_counter() - start
        if not recorder.steps or recorder.steps[-1] != agent.num_timesteps:
            recorder.record()
        path.parent.mkdir(parents=True, exist_ok=True)
        agent.save(path.with_suffix(".zip"))
        if isinstance(agent, ASE):
            agent.certificate().save(path.with_name(path.name + "-certificate.json"))
        if pictures and hasattr(env.unwrapped, "overlay"):
            _draw(gym.make(env_id, **env_kwargs, render_mode="rgb_array"), agent, recorder, folder / name)
        run = ExplorationRun(
            agent=name,
            env=title,
            seed=seed,
            steps=tuple(recorder.steps),
            unsafe_visits=tuple(recorder.unsafe),
            suboptimal_steps=tuple(recorder.suboptimal) if judge.known else None,
            safe_pairs=tuple(recorder.safe_pairs) or None,
            values=tuple(recorder.values) if judge.known else None,
            final_value=judge.value(agent.greedy()) if judge.known else None,
            optimum=judge.optimum,
            learnable_pairs=judge.learnable_pairs,
            certified=agent.certified,
            stuck=getattr(agent, "mode", None) == "stuck",
            seconds=seconds,
            digest=fingerprint,
        )
        run.save(path.with_suffix(".json"))
    return run


def _digest(env: str, agent: TabularAgent, timesteps: int) -> str:
    """A fingerprint of an experiment: the environment, its law where that is known, the agent and all that it was told."""
    told, tables = agent.declaration.to_arrays()
    settings = {name: getattr(agent, name) for name in agent.settings}
    arrays = {name: digest(table) for name, table in tables.items()}
    made = [env, type(agent).__name__, settings, timesteps, told, arrays]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


class _Judge:
    """What the true MDP says of actions and policies; says nothing where the truth is unknown."""

    def __init__(self, declaration: Declaration) -> None:
        self.declaration, self.known = declaration, declaration.mdp is not None

    @cached_property
    def _truth(self) -> Beliefs:
        mdp, outcomes = self.declaration.mdp, self.declaration.outcomes
        assert mdp is not None
        fires = (mdp.probabilities > 0) & outcomes.valid[..., None]
        return Beliefs(outcomes, np.where(fires, mdp.probabilities, 0.0), np.zeros(outcomes.valid.shape), fires)

    @cached_property
    def _best(self) -> NDArray[np.float64]:
        """Action values of the best policy that avoids danger for ever (S, A); -inf for actions that do not."""
        mdp, outcomes, safe = self.declaration.mdp, self.declaration.outcomes, self.declaration.safe_set
        assert mdp is not None
        allowed = outcomes.valid if safe is None else safe_oracle(mdp, outcomes, safe)
        return optimise(self._truth, allowed=allowed, tolerance=1e-9).action_values

    def suboptimal(self, state: int, action: int) -> bool:
        """Whether an action is worth less than the best of its state by more than `OPTIMAL`, or leaves what is safe."""
        worth = self._best[state]
        return not (np.isfinite(worth[action]) and worth[action] >= worth.max() - OPTIMAL)

    def value(self, policy: NDArray[np.int64]) -> float:
        """The true value of a policy (S,) from the start."""
        mdp = self.declaration.mdp
        assert mdp is not None
        return mdp.value(mdp.evaluate(np.maximum(policy, 0)))

    @cached_property
    def _learnable(self) -> NDArray[np.bool_] | None:
        known = self.declaration
        if known.mdp is None or known.safe_set is None or known.tau is None:
            return None
        return learnable_oracle(known.mdp, known.outcomes, known.safe_set, known.analogy, known.tau)

    @property
    def learnable_pairs(self) -> int | None:
        """Size of the safe set that can be learnt."""
        return None if self._learnable is None else int(self._learnable.sum())

    @cached_property
    def optimum(self) -> float | None:
        """The best value that a policy on it has."""
        if self._learnable is None or self.declaration.mdp is None:
            return None
        plan = optimise(self._truth, allowed=self._learnable, tolerance=1e-9)
        return self.declaration.mdp.value(plan.values)


class _Recorder(BaseCallback):
    """Writes down the curves of a run."""

    model: TabularAgent

    def __init__(self, judge: _Judge, every: int, *, keep_sets: bool) -> None:
        super().__init__()
        self._judge, self._every, self._keep_sets = judge, every, keep_sets
        self._suboptimal = 0
        self.steps: list[int] = []
        self.unsafe: list[int] = []
        self.suboptimal: list[int] = []
        self.safe_pairs: list[int] = []
        self.values: list[float] = []
        self.sets: list[NDArray[np.bool_]] = []
        self.visits = np.zeros(judge.declaration.outcomes.n_states, dtype=np.int64)

    def _on_step(self) -> bool:
        self.visits[self.locals["state"]] += 1
        if self._judge.known:
            self._suboptimal += self._judge.suboptimal(self.locals["state"], self.locals["taken"])
        if self.num_timesteps % self._every == 0:
            self.record()
        return True

    def record(self) -> None:
        """An entry of every curve."""
        safe = _safe_set(self.model)
        self.steps.append(self.model.num_timesteps)
        self.unsafe.append(self.model.unsafe_visits)
        self.suboptimal.append(self._suboptimal)
        if safe is not None:
            self.safe_pairs.append(int(safe.sum()))
            if self._keep_sets and (not self.sets or (self.sets[-1] != safe).any()):
                self.sets.append(safe.copy())
        if self._judge.known:
            self.values.append(self._judge.value(self.model.acting()))


def _safe_set(agent: TabularAgent) -> NDArray[np.bool_] | None:
    """Pairs (S, A) that an agent keeps to, if it keeps to any."""
    return getattr(agent, "safe_set", None) if getattr(agent, "needs_safe_set", False) else None


def _draw(env: Any, agent: TabularAgent, recorder: _Recorder, path: Path) -> None:
    """`<path>-map.png`: visits, safe set and goal set; `<path>-growth.gif`: the safe set from first to last."""
    env.reset(seed=0)
    world, sets = env.unwrapped, recorder.sets
    goal = agent.planner.goal if isinstance(agent, ASE) else None
    world.overlay(visits=recorder.visits, safe=_safe_set(agent), goal=goal)
    _save([env.render()], path.with_name(path.name + "-map.png"))
    frames = []
    for index in np.unique(np.linspace(0, len(sets) - 1, min(FRAMES, len(sets))).round().astype(int)):
        world.overlay(safe=sets[index])
        frames.append(env.render())
    if frames:
        _save(frames, path.with_name(path.name + "-growth.gif"))


def _save(frames: list[NDArray[np.uint8]], path: Path) -> None:
    """Pictures (height, width, 3) as a file; several as an animation that rests on the last."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    data, movie = BytesIO(), {}
    if rest:
        movie = {"save_all": True, "append_images": rest, "duration": [150] * len(rest) + [2_000], "loop": 0}
    first.save(data, path.suffix[1:], **movie)
    write_atomically(path, data.getvalue())
