"""Safe sets as shields: masks that hold whatever is shown, and whatever slips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from worlds import TWO_ISLANDS, WINDOW, islands, nearby

from agents.ase.small import World, hidden_danger, late_proof, lies, random_world
from robustrl.agents.ase import ASE, SafeActionMask, UnsafeStateError


def shielded(of: World, steps: int = 900) -> SafeActionMask:
    agent = ASE(of, seed=0, exploration="undirected", confidence="heuristic").learn(steps)
    assert lies(of, agent.safe_set) == []
    return agent.shield(of)


@pytest.mark.parametrize("seed", [1, 3, 13, 52])
def test_random_actions_behind_the_shield_never_meet_danger(seed: int) -> None:
    shield = shielded(random_world(seed), 500)
    rng, state = np.random.default_rng(seed), shield.reset(seed=seed)[0]
    outcomes, visited = shield.outcomes, set()
    assert outcomes is not None
    for _ in range(3000):
        action = int(rng.choice(np.flatnonzero(shield.action_masks())))
        after, reward, ended, _, info = shield.step(action)
        assert not outcomes.dangerous[state, action, outcomes.slot(state, action, after, reward, ended)]
        assert not info["shielded"]
        visited.add(state)
        state = shield.reset()[0] if ended else after
    assert len(visited) > 1


def test_unsafe_actions_are_refused_or_replaced() -> None:
    of = hidden_danger(0.3)
    strict = SafeActionMask(of, of.safe_set)
    with pytest.raises(RuntimeError, match="reset"):
        strict.action_masks()
    strict.reset(seed=0)
    with pytest.raises(ValueError, match=r"one of \[0\]"):
        strict.step(1)
    lenient = SafeActionMask(of, of.safe_set, on_unsafe="replace")
    lenient.reset(seed=0)
    for _ in range(200):
        *_, ended, _, info = lenient.step(1)
        assert info["shielded"]
        assert not ended
    for shield in (strict, lenient):
        shield.reset(seed=0)
        for nonsense in (-1, 2, 0.5):
            with pytest.raises(ValueError, match=r"action must be one of Discrete\(2\), got"):
                shield.step(nonsense)
    with pytest.raises(ValueError, match="Discrete"):
        SafeActionMask(of, np.ones((3, 3), dtype=bool))
    empty = SafeActionMask(of, np.zeros((4, 2), dtype=bool))
    empty.reset()
    with pytest.raises(UnsafeStateError):
        empty.action_masks()


def neighbours(text: str, radius: int) -> np.ndarray:
    rows = text.split()
    cells = np.array([(y, x) for y in range(len(rows)) for x in range(len(rows[0]))])
    return np.abs(cells[:, None] - cells[None]).max(-1) <= radius


def test_robust_masks_hold_in_every_state_that_may_be_hidden() -> None:
    """Exhaustively: whatever is seen and whatever is hidden, the action is safe there and leads to where the same holds again."""
    text = "\n".join(
        ["l" * 14] * 2
        + ["ll" + "s" * 10 + "ll"] * 4
        + ["ll" + "ssssassss-" + "ll"]
        + ["ll" + "s" * 10 + "ll"] * 4
        + ["l" * 14] * 2
    )
    mdp, outcomes, safe = islands(text, slip=0.4)
    of = World(mdp, outcomes, safe, nearby(text), 0.2)
    support = (mdp.probabilities > 0) & outcomes.candidates
    shield = SafeActionMask(of, safe, outcomes=outcomes, support=support)
    hidden = neighbours(text, 1)
    mask = shield.robust_mask(hidden)
    assert (shield.robust_mask(csr_array(hidden)) == mask).all()
    assert (shield.robust_mask(np.eye(len(safe), dtype=bool)) == safe).all()
    assert mask.any()
    met, front = set(), {int(np.argmax(mdp.start))}
    while front:  # every state that some attacker and some random choice can lead to
        met |= front
        reached: set[int] = set()
        for state in front:
            for seen in np.flatnonzero(hidden[:, state]):
                assert mask[seen].any()
                for action in np.flatnonzero(mask[seen]):
                    assert safe[state, action]
                    fires = np.flatnonzero(support[state, action])
                    assert not outcomes.dangerous[state, action, fires].any()
                    reached |= {
                        int(s) for s in outcomes.successors[state, action, fires[~outcomes.terminal[state, action, fires]]]
                    }
        front = reached - met
    assert len(met) > 4


def test_a_hiding_place_without_a_common_action_is_avoided_or_refused() -> None:
    of = late_proof()
    agent = ASE(of, seed=0, exploration="undirected").learn(1500)
    shield = agent.shield(of)
    assert shield.safe[2].any()
    # State 3 as seen hides states 0 and 2; they share actions 0 and 1.
    hidden = np.zeros((4, 4), dtype=bool)
    hidden[3, [0, 2]] = True
    assert (shield.robust_mask(hidden)[3] == (shield.safe[0] & shield.safe[2])).all()
    without = np.zeros_like(shield.safe)
    without[2, 0] = without[1, 1] = True
    poor = SafeActionMask(of, shield.safe & ~without, outcomes=of.outcomes, support=shield.support)
    hidden[3] = [False, True, True, False]  # states 1 and 2 share nothing then: neither is visited, and (0, 1) leads to neither
    assert poor.robust_mask(hidden)[0].tolist() == [False, True, False]
    apart = np.zeros_like(shield.safe)
    apart[0, 1] = apart[2, 0] = True
    hidden[3] = [True, False, True, False]
    with pytest.raises(ValueError, match=r"hidden must leave .*; none was found"):
        SafeActionMask(of, apart, outcomes=of.outcomes, support=shield.support).robust_mask(hidden)
    with pytest.raises(ValueError, match="shape"):
        shield.robust_mask(np.zeros((2, 2), dtype=bool))
    with pytest.raises(ValueError, match="outcomes must be given"):
        SafeActionMask(of, shield.safe).robust_mask(hidden)


def test_more_outcomes_make_a_smaller_shield_that_is_closed_under_them() -> None:
    mdp, outcomes, safe = islands(TWO_ISLANDS)
    support = (mdp.probabilities > 0) & outcomes.candidates
    shield = SafeActionMask(World(mdp, outcomes, safe, nearby(), 0.3), safe, outcomes=outcomes, support=support)
    extra = np.zeros_like(support)
    extra[:, 1, WINDOW.index((0, 2))] = True  # a step east may turn into a jump
    more = shield.inflate_support(extra)
    assert 0 < more.safe.sum() < safe.sum()
    fires = more.support
    owners = more.safe.any(1)
    for s, a in np.argwhere(more.safe):
        for k in np.flatnonzero(fires[s, a]):
            assert outcomes.terminal[s, a, k] or owners[outcomes.successors[s, a, k]]
            assert not outcomes.dangerous[s, a, k]
    with pytest.raises(ValueError, match="extra must leave"):
        shield.inflate_support(outcomes.candidates)


def test_outcomes_that_the_first_safe_set_assumes_away_can_come_back() -> None:
    """Home never leaves itself, it is said. For whom that is no longer true, the shield must let go what may leave."""
    mdp, outcomes, safe = islands(TWO_ISLANDS)
    agent = ASE(World(mdp, outcomes, safe, nearby(), 0.3), seed=0)
    shield = agent.shield(agent.env.envs[0])  # type: ignore[union-attr]
    assert (shield.safe == safe).all()
    cut = outcomes.candidates & ~agent.outcomes.candidates
    assert cut.any()
    for s, a, k in np.argwhere(cut)[::97]:
        extra = np.zeros_like(cut)
        extra[s, a, k] = True
        kept = shield.inflate_support(extra).safe
        assert not kept[s, a]
        assert kept.sum() < safe.sum()
    everything = cut & (np.arange(8) > 3)[:, None]
    more = shield.inflate_support(everything)
    assert more.safe.any()
    owners, may = more.safe.any(1), outcomes.candidates & (everything | agent.outcomes.candidates)
    stays = (outcomes.terminal | owners[outcomes.successors]) & ~outcomes.dangerous
    assert not (may & ~stays)[more.safe].any()
    with pytest.raises(ValueError, match="extra must hold candidate slots"):
        SafeActionMask(shield.env, safe, outcomes=agent.outcomes).inflate_support(cut)
    with pytest.raises(ValueError, match="support must hold candidate slots"):
        SafeActionMask(shield.env, safe, outcomes=agent.outcomes, support=outcomes.candidates)


@pytest.mark.slow
def test_a_hundred_thousand_random_steps_on_the_islands() -> None:
    mdp, outcomes, safe = islands(TWO_ISLANDS)
    of: Any = World(mdp, outcomes, safe, nearby(), 0.3)
    agent = ASE(of, seed=0).learn(2200)
    assert lies(of, agent.safe_set) == []
    choices = [np.flatnonzero(row) for row in agent.safe_set]
    rng, state, worst = np.random.default_rng(0), int(np.argmax(mdp.start)), False
    cumulative = mdp.probabilities.cumsum(-1)
    for _ in range(100_000):
        action = choices[state][rng.integers(len(choices[state]))]
        slot = int((cumulative[state, action] < rng.random()).sum())
        worst |= bool(outcomes.dangerous[state, action, slot])
        ended = outcomes.terminal[state, action, slot]
        state = int(np.argmax(mdp.start)) if ended else int(outcomes.successors[state, action, slot])
    assert not worst
