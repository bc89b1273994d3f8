"""PRISM files: read back by a reader written from the format's description, they are the same MDP."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from worlds import random_world

from robustrl.mdp import TabularMDP, Unsafe, closed_subset, prism


def read(path: Path) -> tuple[TabularMDP, dict[str, set[int]], list[tuple[int, int]]]:
    """The MDP in explicit files, its labels, and (state, ended) of its states."""
    header, *lines = Path(f"{path}.tra").read_text().splitlines()
    transitions = [(int(i), int(k), int(j), float(p)) for i, k, j, p in map(str.split, lines)]
    n, n_choices, n_transitions = map(int, header.split())
    assert len(transitions) == n_transitions
    assert len({t[:2] for t in transitions}) == n_choices
    assert len({t[:3] for t in transitions}) == n_transitions
    assert transitions == sorted(transitions)
    for s in range(n):
        assert sorted({k for i, k, _, _ in transitions if i == s}) == list(
            range(len({k for i, k, _, _ in transitions if i == s}))
        )
    width = 1 + max(k for _, k, _, _ in transitions)
    p, r = np.zeros((n, width, n)), np.zeros((n, width, n))
    for i, k, j, value in transitions:
        p[i, k, j] = value
    header, *lines = Path(f"{path}.trew").read_text().splitlines()
    assert header.split() == [str(n), str(n_choices), str(len(lines))]
    for i, k, j, value in map(str.split, lines):
        assert p[int(i), int(k), int(j)] > 0
        r[int(i), int(k), int(j)] = float(value)
    p[..., 0] += ~p.any(-1)  # choices that a state does not have: never better than its first
    r[p.sum(-1) == 0] = 0
    missing = np.array([[not any(t[:2] == (s, a) for t in transitions) for a in range(width)] for s in range(n)])
    p[missing], r[missing] = p[:, :1].repeat(width, 1)[missing], r[:, :1].repeat(width, 1)[missing]
    header, *lines = Path(f"{path}.lab").read_text().splitlines()
    names = {int(number): name.strip('"') for number, name in (item.split("=") for item in header.split())}
    labels: dict[str, set[int]] = {name: set() for name in names.values()}
    for state, worn in (line.split(": ") for line in lines):
        for number in worn.split():
            labels[names[int(number)]].add(int(state))
    header, *lines = Path(f"{path}.sta").read_text().splitlines()
    assert header == "(s,ended)"
    states = []
    for i, line in enumerate(lines):
        assert line.startswith(f"{i}:(")
        s, ended = line.split("(")[1].rstrip(")").split(",")
        states.append((int(s), int(ended)))
    return TabularMDP.dense(p, r, 0.9), labels, states


@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_back_has_the_same_values(seed: int, tmp_path: Path) -> None:
    mdp, _ = random_world(seed)
    paths = prism.export(mdp, tmp_path / "model")
    assert sorted(paths) == sorted(tmp_path.iterdir())
    found, labels, states = read(tmp_path / "model")
    np.testing.assert_allclose(found.solve()[0][:5], mdp.solve()[0], atol=1e-12)
    assert labels["init"] == {0}
    assert labels["deadlock"] == {i for i, (_, ended) in enumerate(states) if ended}
    np.testing.assert_allclose(found.solve()[0][5:], 0, atol=1e-12)


def test_labels_are_worn_by_states_and_by_their_ended_copies(tmp_path: Path) -> None:
    lake = TabularMDP.from_gymnasium(gym.make("FrozenLake-v1"), 0.9)
    prism.export(lake, tmp_path / "lake", labels={"goal": np.arange(16) == 15, "safe": np.isin(np.arange(16), [0, 4])})
    found, labels, states = read(tmp_path / "lake")
    assert labels["goal"] == {15} | {i for i, state in enumerate(states) if state == (15, 1)}
    assert len(labels["goal"]) == 2
    assert labels["safe"] == {0, 4}
    assert states[:16] == [(s, 0) for s in range(16)]
    assert sorted(states[16:]) == [(s, 1) for s in (5, 7, 11, 12, 15)]
    assert found.value(np.append(lake.solve()[0], np.zeros(5))) == lake.value(lake.solve()[0])


def test_a_shield_leaves_only_its_pairs(tmp_path: Path) -> None:
    lake = TabularMDP.from_gymnasium(gym.make("FrozenLake-v1", map_name="8x8"), 0.9)
    holes = np.flatnonzero([cell in b"H" for cell in gym.make("FrozenLake-v1", map_name="8x8").unwrapped.desc.ravel()])
    outcomes = lake.outcomes(Unsafe.states(holes))
    safe = closed_subset(outcomes, outcomes.valid, lake.probabilities > 0)
    prism.export(lake, tmp_path / "shield", labels={"unsafe": np.isin(np.arange(64), holes)}, pairs=safe)
    found, labels, states = read(tmp_path / "shield")
    reached = {0}
    for _ in range(found.n_states):
        at = list(reached)
        reached |= set(found.successors[at][found.probabilities[at] > 0].tolist())
    assert not reached & labels["unsafe"]  # P>=1 [ G !"unsafe" ]
    assert {s for s in reached if not states[s][1]} <= set(np.flatnonzero(safe.any(1)).tolist())
    assert labels["deadlock"] >= set(np.flatnonzero(~safe.any(1)).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"goal": np.zeros(4, dtype=bool)}}, r"labels\['goal'\] must be boolean of shape \(5,\), got bool \(4,\)"),
        ({"labels": {"goal": np.zeros(5)}}, r"labels\['goal'\] must be boolean"),
        ({"labels": {"init": np.zeros(5, dtype=bool)}}, "labels must be named by identifiers other than"),
        ({"labels": {'a"b': np.zeros(5, dtype=bool)}}, "labels must be named by identifiers"),
        ({"pairs": np.zeros((5, 3), dtype=bool)}, r"pairs must be boolean of shape \(5, 2\)"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prism.export(random_world(0)[0], tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())
