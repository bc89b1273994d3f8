"""Finite MDPs in PRISM's explicit file format, which Storm reads too: to check a safe set with a model checker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.files import write_atomically
from robustrl.mdp.model import TabularMDP

Flags = NDArray[np.bool_]


def export(
    mdp: TabularMDP, path: str | os.PathLike[str], labels: Mapping[str, ArrayLike] | None = None, pairs: ArrayLike | None = None
) -> list[Path]:
    """Write an MDP as PATH.tra (transitions), PATH.sta (states), PATH.lab (labels) and PATH.trew (rewards of transitions).

    A state that ends the episode is a second, absorbing copy of it (`ended=1`), for the same state may also be passed through.

    Args:
        path: without a suffix.
        labels: sets of states by name, bool (S,) each; both copies of a state wear them. Beside them are "init" and "deadlock".
        pairs: leave out all other pairs of state and action, bool (S, A): then "P>=1 [ G !"unsafe" ]" is about this set.

    Returns:
        The four files.

    Raises:
        ValueError: if a label or `pairs` has another shape, or a label cannot be read back.
        OSError: if a file cannot be written.
    """
    n_states, terminal = mdp.n_states, np.asarray(mdp.terminal)
    kept = np.ones((n_states, mdp.n_actions), dtype=bool) if pairs is None else _booleans("pairs", pairs, mdp.rewards.shape[:2])
    named = {name: _booleans(f"labels[{name!r}]", states, (n_states,)) for name, states in (labels or {}).items()}
    for name in named:
        if not name.isidentifier() or name in ("init", "deadlock"):
            raise ValueError(f'labels must be named by identifiers other than "init" and "deadlock", got {name!r}')
    state, action, slot = np.nonzero((mdp.probabilities > 0) & kept[..., None])
    fires = (state, action, slot)
    ends = np.unique(mdp.successors[fires][terminal[fires]])
    to = mdp.successors[fires]
    to[terminal[fires]] = n_states + np.searchsorted(ends, to[terminal[fires]])

    # The choices of a state are numbered from 0 without gaps; slots that lead to one state become one transition.
    choice = (kept.cumsum(1) - 1)[state, action]
    rows, inverse = np.unique(np.stack([state, choice, to], axis=1), axis=0, return_inverse=True)
    weights = np.bincount(inverse.ravel(), mdp.probabilities[fires])
    paid = np.bincount(inverse.ravel(), mdp.probabilities[fires] * mdp.rewards[fires]) / weights
    original = np.concatenate([np.arange(n_states), ends])
    ended = np.arange(len(original)) >= n_states
    stuck = np.flatnonzero(ended | ~np.concatenate([kept.any(1), np.ones(len(ends), dtype=bool)]))
    transitions = [(i, k, j, p, r) for (i, k, j), p, r in zip(rows.tolist(), weights.tolist(), paid.tolist(), strict=True)]
    transitions = sorted(transitions + [(int(i), 0, int(i), 1.0, 0.0) for i in stuck])
    pays = [(i, k, j, r) for i, k, j, _, r in transitions if r]
    n_choices = int(kept.sum()) + len(stuck)

    sets = {"init": (np.asarray(mdp.start)[original] > 0) & ~ended, "deadlock": np.isin(np.arange(len(original)), stuck)}
    sets |= {name: states[original] for name, states in named.items()}
    worn = ((i, [str(n) for n, states in enumerate(sets.values()) if states[i]]) for i in range(len(original)))
    files = {
        ".tra": [f"{len(original)} {n_choices} {len(transitions)}", *(f"{i} {k} {j} {p!r}" for i, k, j, p, _ in transitions)],
        ".sta": ["(s,ended)", *(f"{i}:({s},{int(e)})" for i, (s, e) in enumerate(zip(original, ended, strict=True)))],
        ".lab": [" ".join(f'{n}="{name}"' for n, name in enumerate(sets)), *(f"{i}: {' '.join(on)}" for i, on in worn if on)],
        ".trew": [f"{len(original)} {n_choices} {len(pays)}", *(f"{i} {k} {j} {r!r}" for i, k, j, r in pays)],
    }
    for suffix, lines in files.items():
        write_atomically(f"{os.fspath(path)}{suffix}", ("\n".join(lines) + "\n").encode())
    return [Path(f"{os.fspath(path)}{suffix}") for suffix in files]


def _booleans(name: str, mask: ArrayLike, shape: tuple[int, ...]) -> Flags:
    given = np.asarray(mask)
    if given.shape != shape or given.dtype != bool:
        raise ValueError(f"{name} must be boolean of shape {shape}, got {given.dtype} {given.shape}")
    return given
