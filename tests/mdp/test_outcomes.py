"""What is declared of an MDP, and what an MDP declares of itself."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from worlds import islands, random_world

from robustrl.mdp import ModelViolation, Outcomes, TabularMDP, Unsafe


def doubled(seed: int) -> tuple[TabularMDP, TabularMDP]:
    """A random MDP and the same one with slots split in two, shuffled, and empty slots in between."""
    mdp = random_world(seed)[0].merged()
    rng = np.random.default_rng(seed)
    share = rng.random(mdp.probabilities.shape)
    order = rng.permutation(3 * mdp.rewards.shape[2])

    def spread(table: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts, axis=2)[..., order].astype(table.dtype)

    p = mdp.probabilities
    tables = [spread(t, [t, t, t]) for t in (mdp.successors, mdp.rewards, np.asarray(mdp.terminal))]
    probabilities = spread(p, [p * share, p * 0, p * (1 - share)])
    return mdp, TabularMDP(tables[0], probabilities, tables[1], tables[2], mdp.gamma)


@pytest.mark.parametrize("seed", range(10))
def test_merging_joins_equal_outcomes_and_changes_no_value(seed: int) -> None:
    mdp, split = doubled(seed)
    merged = split.merged()
    np.testing.assert_allclose(merged.solve()[0], mdp.solve()[0], atol=1e-12)
    assert merged.rewards.shape[2] == (mdp.probabilities > 0).sum(-1).max()
    assert (np.sort(merged.probabilities > 0, axis=2)[..., ::-1] == (merged.probabilities > 0)).all()  # packed to the left

    def law(model: TabularMDP, s: int, a: int) -> dict[tuple[int, float, bool], float]:
        fires = np.flatnonzero(model.probabilities[s, a])
        keys = zip(model.successors[s, a], model.rewards[s, a], np.asarray(model.terminal)[s, a], strict=True)
        return {key: model.probabilities[s, a, k] for k, key in enumerate(keys) if k in fires}

    for s, a in np.ndindex(5, 2):
        assert law(merged, s, a) == pytest.approx(law(mdp, s, a))
    assert (
        merged.smallest_probability
        == pytest.approx(split.smallest_probability)
        == mdp.probabilities[mdp.probabilities > 0].min()
    )
    again = merged.merged()
    assert (again.probabilities == merged.probabilities).all()
    assert (again.successors == merged.successors).all()


def test_slots_keep_the_order_of_their_first_appearance() -> None:
    to = np.array([[[2, 1, 2, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])
    p = np.array([[[0.25, 0.25, 0.5, 0.0]], [[1.0, 0, 0, 0]], [[1.0, 0, 0, 0]]])
    merged = TabularMDP(to, p, np.zeros((3, 1, 4))).merged()
    assert merged.successors.tolist() == [[[2, 1]], [[0, 0]], [[0, 0]]]
    assert merged.probabilities.tolist() == [[[0.75, 0.25]], [[1, 0]], [[1, 0]]]
    paid = TabularMDP(to, p, np.array([0.0, 0, 7, 0]) * np.ones((3, 1, 1))).merged()
    assert paid.successors[0].tolist() == [[2, 1, 2]]  # rewards tell them apart
    ends = TabularMDP(to, p, np.zeros((3, 1, 4)), np.array([True, False, False, False]) & np.ones((3, 1, 1), dtype=bool))
    assert ends.merged().rewards.shape == (3, 1, 3)  # so do ends


def test_outcomes_that_cannot_be_told_apart_must_be_merged_first() -> None:
    _, split = doubled(0)
    with pytest.raises(ValueError, match="merge them"):
        split.outcomes()
    assert (split.merged().outcomes().candidates == (split.merged().probabilities > 0)).all()


@pytest.mark.parametrize(("less", "more", "apart"), [(1.0, 1.0 + 1e-9, False), (1e300, 2e300, False), (1.0, 1.0 + 1e-6, True)])
def test_rewards_must_differ_in_single_precision(less: float, more: float, apart: bool) -> None:
    """As a VecEnv hands them out: a dangerous outcome must not pass for its harmless twin."""
    none = np.zeros((1, 1, 2), dtype=bool)
    rewards = np.array([[[less, more]]])
    if apart:
        Outcomes(none.astype(int), ~none, rewards, rewards == more, none)
        return
    with pytest.raises(ValueError, match=r"reward \(in single precision\).*slots 0 and 1"):
        Outcomes(none.astype(int), ~none, rewards, rewards == more, none)


def test_gymnasium_tables_are_merged() -> None:
    lake = gym.make("FrozenLake-v1")
    found = TabularMDP.from_gymnasium(lake)
    outcomes = found.outcomes(Unsafe.when(lambda s, a, to, r, end: end and not r))
    assert found.smallest_probability == pytest.approx(1 / 3)
    assert found.probabilities[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])  # left and up both stay in the corner
    assert outcomes.valid.sum() == 44  # no pair at 4 holes and the goal
    assert (outcomes.nonterminal == outcomes.valid).all()
    assert set(outcomes.successors[outcomes.dangerous].tolist()) == {5, 7, 11, 12}


def test_a_state_that_is_entered_at_ends_only_owns_no_pair() -> None:
    """Unless an episode starts there, or nothing enters it at all."""
    to, ends = np.array([[[1]], [[1]], [[0]]]), np.array([[[True]], [[True]], [[False]]])
    mdp = TabularMDP(to, np.ones((3, 1, 1)), np.zeros((3, 1, 1)), ends)
    assert mdp.outcomes().valid.ravel().tolist() == [True, False, True]
    starting = TabularMDP(to, np.ones((3, 1, 1)), np.zeros((3, 1, 1)), ends, start=np.array([0.5, 0.5, 0]))
    assert starting.outcomes().valid.all()
    entered = TabularMDP(to, np.ones((3, 1, 1)), np.zeros((3, 1, 1)), ends & (np.arange(3) == 1)[:, None, None])
    assert entered.outcomes().valid.all()


def test_pairs_that_may_be_taken_are_those_at_states_that_the_start_leads_to() -> None:
    to = np.array([[[1, 3]], [[0, 2]], [[2, 1]], [[3, 0]], [[4, 0]]])
    candidates = np.array([[[True, True]], [[True, False]], [[True, True]], [[True, True]], [[True, True]]])
    ends = to == 3
    none = np.zeros((5, 1, 2), dtype=bool)
    outcomes = Outcomes(to, candidates, np.zeros((5, 1, 2)), none, ends)
    assert outcomes.nonterminal.ravel().tolist() == [True, True, False, False, False]


def test_a_step_says_which_slot_fired_or_that_the_declaration_is_wrong() -> None:
    _, outcomes, _ = islands()
    state = int(np.asarray(outcomes.start).argmax())
    for k in np.flatnonzero(outcomes.candidates[state, 0]):
        step = (int(outcomes.successors[state, 0, k]), outcomes.rewards[state, 0, k], bool(outcomes.terminal[state, 0, k]))
        assert outcomes.slot(state, 0, *step) == k
    for wrong in ((0, 0.0, False), (state, 0.5, False), (state, 0.0, True)):
        with pytest.raises(ModelViolation, match=f"state {state}, action 0 led to state {wrong[0]}"):
            outcomes.slot(state, 0, *wrong)


def test_sets_of_slots_are_candidates() -> None:
    _, outcomes = random_world(3)
    assert (outcomes.slots("support", outcomes.candidates) == outcomes.candidates).all()
    everything = np.ones(outcomes.candidates.shape, dtype=bool)
    with pytest.raises(ValueError, match=r"support must hold candidate slots, slot \d of state \d, action \d is none"):
        outcomes.slots("support", everything)
    missing = outcomes.candidates | ~outcomes.valid[..., None]
    assert (missing != outcomes.candidates).any()
    assert (outcomes.slots("support", missing) == outcomes.candidates).all()  # pairs that do not exist have no slots
    with pytest.raises(ValueError, match="support must be boolean of shape"):
        outcomes.slots("support", outcomes.valid)


def test_other_rewards_to_plan_with_leave_the_slots_as_they_are() -> None:
    outcomes = TabularMDP.dense([[[0.5, 0.5]], [[0.0, 1.0]]], [[[0.0, 2.0]], [[0.0, 4.0]]], gamma=0.9).outcomes()
    assert outcomes.reward_scale == 4
    other = outcomes.paying(np.full(outcomes.rewards.shape, -8.0))
    assert other.reward_scale == 8
    assert outcomes.reward_scale == 4
    assert other.successors is outcomes.successors
    for rewards in (np.zeros((1, 1, 1)), np.full(outcomes.rewards.shape, np.nan)):
        with pytest.raises(ValueError, match="rewards must"):
            outcomes.paying(rewards)
