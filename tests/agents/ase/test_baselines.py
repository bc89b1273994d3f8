"""The learners that ASE is compared with: what they optimise, and which of them are safe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agents.ase.small import hidden_danger, late_proof, lies, random_world, world
from robustrl.agents.ase import MBIE, EpsilonGreedy, QLearning, RMax, SafeEpsilonGreedy, SafeRMax


@pytest.mark.parametrize(("kind", "slack"), [(RMax, 1e-6), (MBIE, 0.05), (EpsilonGreedy, 0.05), (QLearning, 0.1)])
def test_unsafe_learners_find_the_unconstrained_optimum(kind: type[Any], slack: float) -> None:
    of = hidden_danger(0.3)
    values, _ = of.truth.solve()
    agent = kind(of, seed=0, **({"delta": 0.5} if kind is MBIE else {})).learn(6000 if kind is MBIE else 3000)
    assert of.value(agent.greedy()) >= of.truth.value(values) - slack
    assert agent.unsafe_visits > 0
    assert not agent.certified


@pytest.mark.parametrize("kind", [SafeRMax, SafeEpsilonGreedy])
def test_safe_learners_meet_no_danger(kind: type[Any]) -> None:
    for seed in range(6):
        of = random_world(seed)
        agent = kind(of, seed=seed).learn(300)
        assert agent.unsafe_visits == 0
        assert lies(of, agent.safe_set) == []
        assert agent.certified


def test_safe_learners_use_what_they_happen_to_prove() -> None:
    of = late_proof(0.2)
    agent = SafeEpsilonGreedy(of, seed=0, exploration_final_eps=0.5).learn(1500)
    assert agent.safe_set[0, 1]
    assert of.value(agent.greedy()) == pytest.approx(of.best(), abs=1e-6)


def test_a_penalty_keeps_learners_away_from_danger() -> None:
    of = hidden_danger(0.3)
    brave, careful = (RMax(of, seed=0, penalty=penalty).learn(2000) for penalty in (None, -100.0))
    assert careful.unsafe_visits < brave.unsafe_visits
    assert (careful.greedy()[:2] == 0).all()


def test_a_penalty_may_equal_another_reward() -> None:
    of = world(2, {(0, 0): [(1, 0.5, 0.25, "end"), (1, 0.5, -1.0, "lava")]}, [(0, 0)], [])
    of.safe_set = None  # type: ignore[assignment]
    agent = RMax(of, seed=0, penalty=0.25).learn(400)
    assert agent.unsafe_visits == agent.knowledge.visits[0, 1] > 0
    assert agent._values[0] == pytest.approx(0.25, abs=1e-6)


def test_random_actions_become_rarer() -> None:
    """Of two actions a random one is the best half of the time; epsilon falls to its end over the first half of the steps."""
    of = hidden_danger(0.3)
    shares = []
    for first, last in ((1.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        agent = QLearning(of, seed=1, exploration_initial_eps=first, exploration_final_eps=last, exploration_fraction=0.5)
        other: list[bool] = []
        agent.learn(1000, callback=_others(agent, other))
        shares.append(np.mean(other[600:]))
    assert shares[0] == pytest.approx(0.5, abs=0.08)
    assert max(shares[1:]) < 0.02


def _others(agent: QLearning, found: list[bool]) -> Any:
    """A callback that says of every step whether another action is best by now."""

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        found.append(bool(local["taken"] != agent.greedy()[local["state"]]))
        return True

    return look


def test_q_learning_converges_to_the_fixed_point_on_a_deterministic_world() -> None:
    of = late_proof()
    agent = QLearning(of, seed=0, decay=1.0, exploration_final_eps=1.0).learn(4000)
    values, _ = of.truth.solve()
    exact = np.where(of.outcomes.valid, of.truth.action_values(values), -np.inf)
    np.testing.assert_allclose(agent.action_values[0, 1], exact[0, 1], atol=0.1)


@pytest.mark.parametrize(
    ("argument", "value"), [("exploration_fraction", 1.5), ("exploration_final_eps", -0.1), ("decay", 0.3)]
)
def test_numbers_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        QLearning(late_proof(), **{argument: value})
