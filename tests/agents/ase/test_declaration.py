"""What is known before the first step: as declared, and as cut to a closed first safe set."""

from __future__ import annotations

import dataclasses
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TransformReward

from agents.ase.small import World, hidden_danger, late_proof, random_world
from robustrl.agents.ase import ASE, Declaration, declaration
from robustrl.mdp import Analogy, Unsafe


def test_what_was_declared_is_kept_beside_what_the_first_safe_set_leaves_of_it() -> None:
    of = random_world(13)
    declared = Declaration.of(of)
    for found in (declared, Declaration.from_arrays(*declared.to_arrays())):
        np.testing.assert_array_equal(found.declared.candidates, of.outcomes.candidates)
        cut = found.declared.candidates & ~found.outcomes.candidates
        assert np.argwhere(cut).tolist() == [[0, 0, 2], [1, 0, 2]]  # the lava beside the two home pairs


def copied(of: World, **changes: object) -> World:
    """The same world, declaring something else."""
    named = {name: changes.pop(name) for name in ("tau",) if name in changes}
    found = World(
        of.truth, dataclasses.replace(of.outcomes, **changes), of.safe_set, of.analogy, of.tau, open_=of.mdp is not None
    )
    for name, value in named.items():
        setattr(found, name, value)
    return found


def test_an_environment_is_known_again_whatever_was_given_instead_of_what_it_declares() -> None:
    of = hidden_danger()
    declared = Declaration.of(of, unsafe=Unsafe.states([2]), gamma=0.5, tau=0.05, analogy=Analogy.none())
    for found in (declared, Declaration.from_arrays(*declared.to_arrays())):
        found.check(hidden_danger())
    lake = gym.make("FrozenLake-v1")
    Declaration.of(lake, unsafe=Unsafe.states([5, 7, 11, 12]), safe_set="from_P", gamma=0.9).check(gym.make("FrozenLake-v1"))


def test_what_only_one_of_two_environments_says_is_not_compared() -> None:
    of = hidden_danger()
    open_, closed = Declaration.of(of), World(of.truth, of.outcomes, of.safe_set, of.analogy, of.tau, open_=False)
    open_.check(closed)
    Declaration.of(closed).check(of)


@pytest.mark.parametrize("name", ["candidates", "dangerous", "terminal", "rewards", "successors", "start", "tau"])
def test_an_environment_that_says_something_else_of_itself_is_another_one(name: str) -> None:
    of = hidden_danger()
    if name == "tau":
        other = copied(of, tau=0.05)
    elif name == "start":
        other = copied(of, start=np.eye(4)[1])
    else:
        table = getattr(of.outcomes, name).copy()
        table[1, 1, 0] = not table[1, 1, 0] if table.dtype == bool else 3 - table[1, 1, 0]
        other = copied(of, **{name: table})
    with pytest.raises(ValueError, match=f"other {name}"):
        Declaration.of(of).check(other)


def test_a_tau_or_an_analogy_that_the_truth_denies_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    of = random_world(11)
    alike = Analogy.classes(np.zeros(of.outcomes.valid.shape, dtype=int))
    with pytest.warns(UserWarning, match=r"tau = 0\.9 is false, some outcome has probability 0\.3"):
        ASE(of, tau=0.9)
    with pytest.warns(UserWarning, match="the analogy is false"):
        ASE(of, analogy=alike)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASE(of)
        ASE(of, tau=0.2)
        ASE("robustrl/LavaIslands-v0")
        of.mdp = None  # nobody can tell
        ASE(of, tau=0.9, analogy=alike)
        monkeypatch.setattr(declaration, "MOST_COMPARED", 5)
        ASE(random_world(11), analogy=alike)


def test_wrappers_that_change_what_is_seen_or_done_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="what TransformReward changes"):
        ASE(gym.wrappers.TimeLimit(TransformReward(late_proof(), lambda reward: reward), 9))
