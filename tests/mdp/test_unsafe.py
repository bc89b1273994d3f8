"""Descriptions of danger: what each marks, and that they combine."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from worlds import random_world

from robustrl.mdp import Unsafe

MDP, OUTCOMES = random_world(7)
FIRES = MDP.probabilities > 0


def test_each_description_marks_what_it_says() -> None:
    assert (Unsafe.reward_below(0.3).mark(MDP) == (FIRES & (MDP.rewards < 0.3))).all()
    pairs = np.random.default_rng(0).random((5, 2)) < 0.5
    assert (Unsafe.pairs(pairs).mark(MDP) == (FIRES & pairs[..., None])).all()
    entered = FIRES & ((MDP.successors == 1) | (MDP.successors == 4))
    assert (Unsafe.states([1, 4]).mark(MDP) == entered).all()
    assert (Unsafe.states(np.isin(np.arange(5), [1, 4])).mark(MDP) == entered).all()
    found = Unsafe.when(lambda s, a, to, r, end: s == 2 and a == 1 and (to != 2 or r > 0 or end)).mark(MDP)
    expected = np.zeros_like(FIRES)
    expected[2, 1] = FIRES[2, 1] & ((MDP.successors[2, 1] != 2) | (MDP.rewards[2, 1] > 0) | np.asarray(MDP.terminal)[2, 1])
    assert (found == expected).all()
    assert not Unsafe().mark(MDP).any()


def test_a_threshold_itself_is_not_below() -> None:
    paid = float(MDP.rewards[0, 0, 0])
    assert not Unsafe.reward_below(paid).mark(MDP)[0, 0, 0]


def test_descriptions_combine() -> None:
    one, other = Unsafe.reward_below(-1.0), Unsafe.states([3])
    assert ((one | other).mark(MDP) == (one.mark(MDP) | other.mark(MDP))).all()
    assert one.mark(MDP).sum() < (one | other).mark(MDP).sum()


def test_what_is_only_a_candidate_can_be_dangerous_too() -> None:
    found = Unsafe.states([3]).mark(OUTCOMES)
    assert (found == (OUTCOMES.candidates & (OUTCOMES.successors == 3))).all()
    assert (found & ~FIRES).any()


def test_descriptions_travel_to_other_processes() -> None:
    unsafe = Unsafe.reward_below(0.0) | Unsafe.states([3]) | Unsafe.pairs(np.ones((5, 2), dtype=bool))
    assert (pickle.loads(pickle.dumps(unsafe)).mark(MDP) == unsafe.mark(MDP)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unsafe.reward_below(float("nan")), "threshold must be a finite real number"),
        (lambda: Unsafe.pairs(np.ones((5, 2))), r"mask must be boolean with 2 dimension\(s\), got float64"),
        (lambda: Unsafe.pairs(np.ones(5, dtype=bool)), "mask must be boolean"),
        (lambda: Unsafe.pairs(np.ones((4, 2), dtype=bool)).mark(MDP), r"mask must have shape \(5, 2\), got \(4, 2\)"),
        (lambda: Unsafe.states([5]).mark(MDP), "states must be at most 4, got 5"),
        (lambda: Unsafe.states(np.ones(4, dtype=bool)).mark(MDP), r"states must have shape \(5,\), got \(4,\)"),
        (lambda: Unsafe.states([-1]), "states must be booleans"),
        (lambda: Unsafe.states([]), "states must be booleans"),
        (lambda: Unsafe.states([0.5]), "states must be booleans"),
    ],
)
def test_nonsense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_predicate_must_be_callable() -> None:
    with pytest.raises(TypeError, match="predicate must be callable, got int"):
        Unsafe.when(3)  # type: ignore[arg-type]
