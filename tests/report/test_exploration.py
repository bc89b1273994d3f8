"""Tables, curves and files of exploration runs."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from robustrl.report.exploration import ExplorationRun, exploration_csv, exploration_figure, exploration_table

RUN = ExplorationRun(
    agent="ase",
    env="Somewhere-v0",
    seed=0,
    steps=(10, 20, 30),
    unsafe_visits=(0, 0, 0),
    suboptimal_steps=(9, 15, 16),
    safe_pairs=(4, 6, 8),
    values=(0.1, 0.495, 0.5),
    final_value=0.49,
    optimum=0.5,
    learnable_pairs=8,
    certified=True,
    stuck=False,
    seconds=1.5,
    digest="0a",
)
BLIND = replace(
    RUN,
    agent="q-learning",
    suboptimal_steps=None,
    safe_pairs=None,
    values=None,
    final_value=None,
    optimum=None,
    unsafe_visits=(1, 2, 3),
    certified=False,
)


def test_runs_survive_files(tmp_path: Path) -> None:
    for run in (RUN, BLIND):
        run.save(tmp_path / "run.json")
        assert ExplorationRun.load(tmp_path / "run.json") == run
    for text in ("{}", "[", '{"agent": "ase", "colour": 3}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="path must be a run that explore wrote"):
            ExplorationRun.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("values", "since"),
    [((0.1, 0.495, 0.5), 20), ((0.5, 0.1, 0.5), 30), ((0.5, 0.5, 0.5), 10), ((0.5, 0.5, 0.48), None), ((0.1, 0.49, 0.6), 20)],
)
def test_a_policy_is_optimal_since_it_was_within_a_hundredth_for_good(values: tuple[float, ...], since: int | None) -> None:
    assert replace(RUN, values=values).optimal_from == since
    assert BLIND.optimal_from is None


def test_the_table_gives_mean_smallest_and_largest_of_the_last_entries() -> None:
    other = replace(RUN, seed=1, suboptimal_steps=(9, 20, 26), values=(0.0, 0.0, 0.4), final_value=0.4, certified=False)
    first, second = exploration_table([RUN, other, BLIND]).splitlines()[2:]
    assert first == ("| ase | 2 | 30 | 0 | 21 (16 to 26) | 8 of 8 | 0.4450 (0.4000 to 0.4900) of 0.5000 | 20, 1 not | 1 of 2 |")
    assert second == "| q-learning | 1 | 30 | 3 | - | - | - | - | 0 of 1 |"


def test_every_entry_of_every_run_is_in_the_raw_data() -> None:
    rows = list(csv.DictReader(io.StringIO(exploration_csv([RUN, BLIND]).decode())))
    assert [row["step"] for row in rows] == ["10", "20", "30"] * 2
    assert rows[1]["suboptimal_steps"] == "15"
    assert rows[4] == {
        "agent": "q-learning", "seed": "0", "step": "20", "unsafe_visits": "2", "suboptimal_steps": "", "safe_pairs": "", "value": ""
    }  # fmt: skip


def test_curves_are_means_over_seeds_inside_their_extremes() -> None:
    other = replace(RUN, seed=1, suboptimal_steps=(9, 20, 26))
    panels = exploration_figure([RUN, other, BLIND]).axes
    assert [panel.get_ylabel() for panel in panels] == ["unsafe visits", "sub-optimal steps", "pairs proven safe"]
    assert panels[1].lines[0].get_ydata().tolist() == [9, 17.5, 21]
    band = panels[1].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 9
    assert band[:, 1].max() == 26
    assert len(exploration_figure([BLIND]).axes) == 1
