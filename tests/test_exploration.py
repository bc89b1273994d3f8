"""Comparing explorers over seeds, from Python and from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import robustrl as rrl
from robustrl.agents import ASE
from robustrl.certify.certificate import Certificate
from robustrl.cli import app
from robustrl.exploration import explore
from robustrl.mdp import Unsafe
from robustrl.report.exploration import ExplorationRun

RIVER = {"env": "robustrl/LavaIslands-v0", "env_kwargs": {"map": "river"}}

FROM_P = {"tau": "from_P", "safe_set": "from_P"}


@pytest.fixture(scope="module")
def river(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ExplorationRun]]:
    out = tmp_path_factory.mktemp("river")
    return out, explore(agents=["ase", "q-learning"], seeds=2, timesteps=600, every=100, out=out, **RIVER)


def test_a_safe_explorer_finds_the_way_without_a_scratch(river: tuple[Path, list[ExplorationRun]]) -> None:
    _, runs = river
    assert [(run.agent, run.seed) for run in runs] == [("ase", 0), ("ase", 1), ("q-learning", 0), ("q-learning", 1)]
    for run in runs:
        assert run.steps == (100, 200, 300, 400, 500, 600)
        assert list(run.unsafe_visits) == sorted(run.unsafe_visits)
        assert (run.safe_pairs is None) == (run.agent == "q-learning")
    for run in runs[:2]:
        assert run.unsafe_visits[-1] == 0
        assert run.certified
        assert list(run.safe_pairs) == sorted(run.safe_pairs)
        assert run.safe_pairs[-1] <= run.learnable_pairs
        assert max(*run.values, run.final_value) <= run.optimum + 1e-6
    assert min(run.unsafe_visits[-1] for run in runs[2:]) > 0
    assert not any(run.certified for run in runs[2:])


def test_everything_is_written_and_can_be_read(river: tuple[Path, list[ExplorationRun]]) -> None:
    out, runs = river
    names = {path.name for path in out.iterdir()}
    assert {"curves.csv", "curves.png", "summary.md", "tb", "ase-map.png", "ase-growth.gif", "q-learning-map.png"} <= names
    assert len((out / "curves.csv").read_text().splitlines()) == 1 + 4 * 6
    certificate = Certificate.load(out / "runs" / "ase-seed1-certificate.json")
    assert int(certificate.pairs.sum()) == runs[1].safe_pairs[-1]
    agent = ASE.load(out / "runs" / "ase-seed1.zip")
    assert np.array_equal(agent.safe_set, certificate.pairs)


def test_runs_that_are_there_are_kept(river: tuple[Path, list[ExplorationRun]]) -> None:
    out, runs = river
    path = out / "runs" / "ase-seed0.json"
    stamp = path.stat().st_mtime_ns
    again = explore(agents=["ase"], seeds=[1, 0], timesteps=600, every=100, out=out, **RIVER)
    assert again == [runs[1], runs[0]]
    assert path.stat().st_mtime_ns == stamp
    for change in (
        {"timesteps": 700}, {"delta": 0.4}, {"options": {"tau": 0.1}}, {"options": {"unsafe": Unsafe.reward_below(-9)}}, {"agent_options": {"ase": {"beta": 0.1}}},
        {"env_kwargs": {"map": "river", "slip": 0.4}}, {"env": "FrozenLake-v1", "options": FROM_P, "env_kwargs": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="out must be a folder for this experiment"):
            explore(**{"agents": ["ase"], "seeds": 1, "timesteps": 600, "every": 100, "out": out, **RIVER} | change)
    assert path.stat().st_mtime_ns == stamp


def test_a_run_that_stopped_early_is_kept_too(tmp_path: Path) -> None:
    settings = {"seeds": 1, "timesteps": 5000, "options": {"stop_on_gap": 1.5}, "out": tmp_path, **RIVER}
    (run,) = explore(**settings)
    assert run.steps[-1] < 5000
    assert explore(**settings) == [run]


def test_a_run_is_the_same_whatever_is_written_down_and_by_whom(
    river: tuple[Path, list[ExplorationRun]], tmp_path: Path
) -> None:
    _, runs = river
    (other,) = explore(agents=["ase"], seeds=[1], timesteps=600, every=7, out=tmp_path, n_workers=2, **RIVER)
    assert other.unsafe_visits[-1] == runs[1].unsafe_visits[-1]
    assert (other.suboptimal_steps[-1], other.safe_pairs[-1], other.values[-1]) == (
        runs[1].suboptimal_steps[-1], runs[1].safe_pairs[-1], runs[1].values[-1],
    )  # fmt: skip


def test_what_cannot_be_explored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="agents must be one of"):
        rrl.explore("Taxi-v4", ["sarsa"], out=tmp_path)
    with pytest.raises(ValueError, match=r"agent_options must be for agents that explore, got \['r-max'\]"):
        rrl.explore("Taxi-v4", agent_options={"r-max": {}}, out=tmp_path)
    with pytest.raises(ValueError, match="tau must be given"):
        rrl.explore("Taxi-v4", options={"unsafe": Unsafe.reward_below(-5)}, seeds=1, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_shell_says_plainly_that_no_safe_policy_reaches_the_goal(tmp_path: Path) -> None:
    command = "explore --env FrozenLake-v1 --tau from_P --safe-set from_P --unsafe-states 5,7,11,12 --seeds 1 --timesteps 50"
    result = CliRunner().invoke(app, [*command.split(), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no safe policy reaches an end of the episode" in result.output
    assert "4 of 4" in result.output
    assert json.loads((tmp_path / "runs" / "ase-seed0.json").read_text())["stuck"]


def test_agents_have_options_of_their_own_in_the_shell(tmp_path: Path) -> None:
    command = (
        "explore --env CliffWalking-v1 --tau from_P --safe-set from_P --unsafe-below -50 --gamma 0.95 --seeds 1 --timesteps 60"
    )
    options = ["--agent", "ase", "--agent", "q-learning", "--options", '{"q-learning": {"decay": 0.9}}', "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command.split(), *options])
    assert result.exit_code == 0, result.output
    assert "149 of 149" in result.output
    assert rrl.agents.QLearning.load(tmp_path / "runs" / "q-learning-seed0.zip").decay == 0.9
