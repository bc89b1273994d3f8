"""ASE: safe on the truth after every plan, near-optimal among what can be proven, and none of the traps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.seeding import np_random
from scipy.stats import binom
from worlds import TWO_ISLANDS, islands, nearby

from agents.ase.small import (
    STAYS,
    World,
    hidden_danger,
    late_proof,
    lies,
    one_draw_per_episode,
    proof_beyond_the_edge,
    random_world,
    world,
)  # fmt: skip
from robustrl.agents.ase import ASE, UndirectedASE, UnsafeStateError
from robustrl.mdp import Analogy, ModelViolation, TabularMDP, Unsafe, learnable_oracle


def after_every_plan(agent: ASE, check: Any) -> Any:
    """A callback that runs `check` whenever the agent has planned anew."""
    seen = [-1]

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if agent.planner.n_plans != seen[0]:
            seen[0] = agent.planner.n_plans
            check()
        return True

    return look


def runs_with_lies(make: Any, seeds: range, steps: int, **settings: Any) -> int:
    """In how many runs a pair was ever said to be safe that is not."""
    failures = 0
    for seed in seeds:
        of = make(seed)
        agent = ASE(of, seed=seed, **settings)
        false: list[Any] = []
        check = after_every_plan(agent, lambda of=of, agent=agent, false=false: false.extend(lies(of, agent.safe_set)))
        with contextlib.suppress(ModelViolation) if "n_support" in settings else contextlib.nullcontext():
            agent.learn(steps, callback=check)
        false.extend(lies(of, agent.safe_set))
        failures += bool(false)
        assert agent.unsafe_visits == 0 or false  # danger is only met where something false was believed
    return failures


# Safety on the truth ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["pool", "best"])
def test_the_safe_set_is_closed_free_of_danger_and_leads_home_in_truth_after_every_plan(sharing: str) -> None:
    seeds = range(200)
    assert runs_with_lies(random_world, seeds, 250, sharing=sharing, confidence="heuristic") <= binom.ppf(
        0.999, len(seeds), 0.025
    )


@pytest.mark.slow
def test_with_a_third_of_the_draws_the_same_test_finds_unsafe_pairs() -> None:
    """The danger has probability tau, so that the proof is nearly used up; every pool is drawn from."""
    settings = {"exploration": "undirected", "confidence": "heuristic"}
    proof = ASE(hidden_danger(), **settings).knowledge.proof_draws
    assert runs_with_lies(lambda _: hidden_danger(), range(40), 200, **settings) <= binom.ppf(0.999, 40, 0.025)
    cut = proof // 3
    failures = runs_with_lies(lambda _: hidden_danger(), range(200), 100, **settings, n_support=cut)
    assert failures == sum(misses(seed, cut) for seed in range(200)) > 0


def misses(seed: int, draws: int) -> bool:
    """Whether the first draws in one of the two home states of `hidden_danger` all show the likely outcome, by its random numbers."""
    numbers, _ = np_random(seed)
    numbers.random()  # the start
    state, counts, likely = 0, [0, 0], [True, True]
    while min(counts) < draws:
        stays = numbers.random() >= 0.9
        counts[state] += 1
        likely[state] &= not stays or counts[state] > draws
        state = state if stays else 1 - state
    return any(likely)


def test_with_too_few_draws_nothing_is_certified() -> None:
    agent = ASE(hidden_danger(), n_support=3).learn(1)
    assert not agent.certified
    assert not agent.certificate().certified


@pytest.mark.slow
def test_grid_runs_keep_to_the_truth() -> None:
    """Two hundred runs on a map of 5 x 5 home cells and a gap of lava."""
    text = "\n".join(
        ["l" * 13] * 2 + ["ll-sss-l--lll", "llsssssl---ll", "llssassl-g-ll", "llsssssl---ll", "ll-sss-l--lll"] + ["l" * 13] * 2
    )

    def make(_: int) -> World:
        mdp, outcomes, safe = islands(text, slip=0.4)
        return World(mdp, outcomes, safe, nearby(text), 0.2)

    assert runs_with_lies(make, range(200), 600, confidence="heuristic") <= binom.ppf(0.999, 200, 0.025)


# Optimality, and the traps on the way -----------------------------------------------------------------------------------------


def test_what_is_followed_in_the_end_is_nearly_the_best_that_can_be_proven_safe() -> None:
    seeds, far = range(16), 0
    for seed in seeds:
        of = random_world(seed)
        agent = ASE(of, seed=seed, confidence="heuristic", beta=1.0).learn(900)
        far += of.value(agent.greedy()) < of.best() - 0.03
    assert far <= binom.ppf(0.999, len(seeds), 0.05)


@pytest.mark.parametrize("kind", [ASE, UndirectedASE])
@pytest.mark.parametrize("second_best", [0.0, 0.2])
def test_a_way_out_that_cannot_be_learnt_yet_is_not_given_up(kind: type[ASE], second_best: float) -> None:
    """Traps a and d: the best way is excluded for the time being, and only other exploration makes it learnable. By hand, the
    value v of trying it until it works is 0.7 + 0.3 * 0.9 v."""
    of = late_proof(second_best)
    best = 0.7 / (1 - 0.27)
    if second_best == 0:
        assert of.best() == pytest.approx(best)
    agent = kind(of, seed=0).learn(1500)
    assert agent.mode == "goal"
    assert of.value(agent.greedy()) == pytest.approx(of.best(), abs=1e-6)
    assert agent.greedy()[0] == 1


@pytest.mark.parametrize("kind", [ASE, UndirectedASE])
def test_a_known_edge_is_followed_to_what_is_not_known_behind_it(kind: type[ASE]) -> None:
    """By hand: the goal is two steps away, each tried until it works."""
    of = proof_beyond_the_edge()
    agent = kind(of, seed=0).learn(600)
    reach = 0.7 / (1 - 0.27)
    assert of.value(agent.greedy()) == pytest.approx(0.9 * reach * reach, abs=1e-6)


def test_outcomes_of_the_first_safe_set_are_cut_to_what_stays_in_it() -> None:
    of = random_world(13)
    assert of.outcomes.candidates[0, 0].tolist() == [True, True, True]  # the last one is lava
    assert ASE(of).outcomes.candidates[0, 0].tolist() == [True, True, False]


def test_the_end_of_an_episode_is_a_way_back_to_what_must_be_sampled() -> None:
    """Trap b: waiting is free, and what must be sampled lies before it; the agent ends the episode to get there."""
    of = one_draw_per_episode()
    agent = ASE(of, seed=0)
    states: list[int] = []
    agent.learn(800, callback=lambda local, _: states.append(local["state"]) or True)
    assert of.value(agent.greedy()) == pytest.approx(0.7 / (1 - 0.27), abs=1e-6)
    waiting = np.isin(states, [1, 2])
    longest = max(len(run) for run in "".join("w" if w else " " for w in waiting).split(" "))
    assert longest < 60


def test_a_start_region_that_leaks_is_shrunk_with_a_warning_and_nobody_dies() -> None:
    """Trap c: corner cells of the start region own no safe action."""
    text = "\n".join(
        ["l" * 11] * 2 + ["ll" + "s" * 7 + "ll"] * 3 + ["ll" + "sssasss" + "ll"] + ["ll" + "s" * 7 + "ll"] * 3 + ["l" * 11] * 2
    )
    mdp, outcomes, closed = islands(text)
    cells = np.array(list("".join(text.split())))
    declared = np.isin(cells, ["s", "a"])[:, None] & outcomes.valid
    assert closed.sum() < declared.sum()
    of = World(mdp, outcomes, declared, nearby(text), 0.3)
    with pytest.warns(UserWarning, match="leaks"):
        agent = ASE(of, seed=0)
    assert (agent.safe_set == closed).all()
    agent.learn(600)
    assert agent.unsafe_visits == 0
    assert (agent.safe_set >= closed).all()


def test_directed_exploration_samples_only_what_the_best_way_needs() -> None:
    """Two ways out; the better one needs draws at state 0 only, so nothing is spent on state 1's pair (1, 1)."""
    moves = {
        **STAYS,
        (0, 1): [(2, 0.7, 1.0, "end"), (0, 0.3, 0.0, "")],
        (1, 1): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
        (1, 2): [(2, 0.7, 0.2, "end"), (1, 0.3, 0.0, "")],
    }
    of = world(3, moves, [(0, 0), (1, 0), (1, 1)], [((0, 1), (0, 0)), ((1, 2), (1, 1))])
    directed, undirected = ASE(of, seed=0).learn(400), UndirectedASE(of, seed=0).learn(400)
    drawn = [agent.knowledge.visits.sum(1).reshape(3, 3)[1, 1] for agent in (directed, undirected)]
    assert drawn[0] < directed.knowledge.n_support / 2  # some tries while nothing is known at all
    assert drawn[0] < drawn[1]


def test_a_goal_that_no_safe_policy_reaches_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    """FrozenLake 4x4, slippery: four safe pairs, and no more can be learnt."""
    env = gym.make("FrozenLake-v1", is_slippery=True)
    agent = ASE(env, unsafe=_holes(env), safe_set="from_P", tau="from_P", seed=0, verbose=1)
    assert agent.safe_set.sum() == 4
    assert agent.mode == "stuck"
    agent.learn(300)
    assert agent.mode == "stuck"
    assert agent.unsafe_visits == 0
    assert "No safe policy reaches the goal" in capsys.readouterr().out
    assert agent.certificate().value_lower == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("env_id", "unsafe", "pairs", "value"),
    [("FrozenLake8x8-v1", None, 57, 0.028441), ("CliffWalking-v1", Unsafe.reward_below(-50), 149, -9.733158)],
)
def test_toy_environments_reach_the_exact_safe_value(env_id: str, unsafe: Unsafe | None, pairs: int, value: float) -> None:
    """Values from exact solutions of the tables at discount 0.95. The cliff is dangerous but ends nothing."""
    env = gym.make(env_id)
    agent = ASE(
        env, unsafe=unsafe or _holes(env), safe_set="from_P", tau="from_P", gamma=0.95, confidence="heuristic", beta=0.1, seed=1
    )
    assert agent.safe_set.sum() == pairs
    agent.learn(4000)
    assert agent.unsafe_visits == 0
    assert agent.mode == "goal"
    truth = TabularMDP.from_gymnasium(env, 0.95)
    assert truth.value(truth.evaluate(np.maximum(agent.greedy(), 0))) >= value - 0.003
    assert truth.value(truth.evaluate(np.maximum(agent.greedy(), 0))) <= value + 1e-6


def _holes(env: gym.Env[Any, Any]) -> Unsafe:
    tiles = env.unwrapped.desc.ravel()  # type: ignore[attr-defined]
    return Unsafe.states(np.flatnonzero(tiles == b"H"))


@pytest.mark.slow
def test_two_islands_are_crossed_safely_and_nearly_optimally() -> None:
    """The map of the specification: 490 pairs can be proven, and every run ends up following a policy within 0.01 of the optimum. The
    one that is proven best lags behind while the radii are wide."""
    mdp, outcomes, safe = islands(TWO_ISLANDS)
    of = World(mdp, outcomes, safe, nearby(), 0.3)
    best = of.best()
    for seed in range(4):
        for kind in (ASE, UndirectedASE):
            agent = kind(of, seed=seed)
            agent.learn(2200)
            assert agent.unsafe_visits == 0
            assert lies(of, agent.safe_set) == []
            assert of.value(agent.planner.policy) >= best - 0.01
            assert of.value(agent.greedy()) >= best - 0.02
    reachable = learnable_oracle(mdp, outcomes, safe, nearby(), 0.3)
    assert reachable.sum() == 490


# When the assumptions are false -----------------------------------------------------------------------------------------------


def walled() -> World:
    """State 1 is next to a wall: what slips at state 0 stays there, but is said to be like state 0."""
    moves = {
        (0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
        (1, 0): [(0, 1.0, 0.0, "")],
        (1, 1): [(2, 1.0, 1.0, "end")],
    }
    return world(3, moves, [(0, 0), (1, 0)], [((0, 0), (1, 0)), ((1, 1), (1, 0))], open_=False)


def test_a_false_analogy_stops_learning_before_anything_happens() -> None:
    agent = ASE(walled(), seed=0)
    with pytest.raises(ModelViolation, match="behave alike"):
        agent.learn(200)
    assert agent.unsafe_visits == 0


def test_a_contradiction_is_never_certified_again(tmp_path: Path) -> None:
    agent = ASE(walled(), seed=0)
    assert agent.certified
    for _ in range(2):
        with pytest.raises(ModelViolation):
            agent.learn(200, reset_num_timesteps=False)
        assert not agent.certified
        assert not agent.certificate().certified
    agent.save(tmp_path / "agent")
    assert not ASE.load(tmp_path / "agent", env=walled()).certified


def leaky() -> World:
    """A first safe set that is none: one step in twenty falls."""
    return world(2, {(0, 0): [(0, 0.95, 0.0, ""), (1, 0.05, -1.0, "lava")]}, [(0, 0)], [], tau=0.05, open_=False)


def test_danger_in_the_first_safe_set_is_counted_and_voids_the_proof(tmp_path: Path) -> None:
    agent = ASE(leaky(), seed=0)
    with pytest.raises(ModelViolation, match="first safe set"):
        agent.learn(300)
    assert agent.unsafe_visits == 1
    assert not agent.certified
    assert not agent.certificate().certified
    agent.save(tmp_path / "agent")
    loaded = ASE.load(tmp_path / "agent")
    assert (loaded.unsafe_visits, loaded.certified) == (1, False)


def test_retracting_goes_on_where_the_first_safe_set_was_left() -> None:
    falls: list[bool] = []
    agent = ASE(leaky(), seed=0, on_violation="retract")
    agent.learn(300, callback=lambda local, _: falls.append(bool(local["dones"][0])) or True)
    assert agent.num_timesteps == 300
    assert agent.unsafe_visits == sum(falls) > 0
    assert not agent.certified


def test_retracting_goes_on_from_the_first_safe_set_without_a_guarantee() -> None:
    of = walled()
    agent = ASE(of, seed=0, on_violation="retract").learn(300)
    assert not agent.certified
    assert not agent.certificate().certified
    assert agent.num_timesteps == 300
    assert lies(of, agent.safe_set) == []


def test_a_tau_that_is_too_large_is_noticed_once_the_outcome_shows() -> None:
    of = hidden_danger(0.02)
    of.mdp = None
    with pytest.raises(ModelViolation, match="below tau"):
        ASE(of, tau=0.5, seed=3, confidence="heuristic").learn(3000)


def test_an_action_outside_the_safe_set_is_never_invented() -> None:
    agent = ASE(late_proof(), seed=0)
    with pytest.raises(UnsafeStateError, match="state 2"):
        agent.predict(2)


def test_what_is_not_declared_must_be_given() -> None:
    of = late_proof()
    of.safe_set, of.mdp = None, None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="safe_set must be given"):
        ASE(of)
    of = late_proof()
    of.tau = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="tau must be given"):
        ASE(of)
    with pytest.raises(ValueError, match="declare its outcomes"):
        ASE(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="Discrete|outcomes"):
        ASE("Blackjack-v1")


def test_what_is_given_replaces_what_is_declared() -> None:
    of = late_proof()
    agent = ASE(
        of, tau=0.2, gamma=0.5, analogy=Analogy.none(), safe_set=lambda s, a: s < 2 and a == 0, unsafe=Unsafe.states([2])
    )
    assert agent.knowledge.tau == 0.2
    assert agent.outcomes.gamma == 0.5
    assert agent.knowledge.analogy.members(0).tolist() == [0]
    assert np.argwhere(agent.safe_set).tolist() == [[0, 0], [1, 0]]
    assert agent.outcomes.dangerous[0, 2].tolist() == [True, False]


def test_what_is_predicted_is_what_is_proven_best_and_what_the_certificate_bounds() -> None:
    """One action pays 0.5 for sure; that another one pays 1 may be hoped, and is worth a try, but is not proven."""
    moves = {(0, 0): [(1, 1.0, 0.5, "end")], (0, 1): [(1, 0.1, 1.0, "end"), (1, 0.9, 0.0, "end")]}
    agent = ASE(world(2, moves, [(0, 0), (0, 1)], [], tau=0.1), seed=0)
    assert agent.mode == "goal"
    assert agent._act(0) == 1
    assert agent.predict(0)[0] == 0
    assert agent.certificate().value_lower == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("make", [late_proof, lambda: random_world(1)])
def test_the_certificate_is_of_the_policy_and_the_set_that_are_used(make: Any, tmp_path: Path) -> None:
    agent = ASE(make(), seed=0)
    for _ in range(120):
        agent.learn(1, reset_num_timesteps=False)
        certificate = agent.certificate()
        np.testing.assert_array_equal(certificate.evidence.policy, agent.greedy())
        np.testing.assert_array_equal(certificate.pairs, agent.safe_set)
    agent.save(tmp_path / "agent")
    np.testing.assert_array_equal(ASE.load(tmp_path / "agent").greedy(), agent.greedy())


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_rewards_in_another_unit_change_nothing(scale: float) -> None:
    def chain(unit: float) -> World:
        moves = {(s, 0): [(s, 1.0, 0.0, "")] for s in range(5)}
        moves |= {(s, 1): [(s + 1, 0.8, unit * (s == 4), "end" if s == 4 else ""), (s, 0.2, 0.0, "")] for s in range(5)}
        return world(6, moves, list(moves), [], tau=0.2)

    plain, scaled = ASE(chain(1.0), seed=0).learn(400), ASE(chain(scale), seed=0).learn(400)
    np.testing.assert_array_equal(scaled.knowledge.visits, plain.knowledge.visits)
    np.testing.assert_array_equal(scaled.greedy(), plain.greedy())


def test_learning_stops_when_the_bounds_meet() -> None:
    agent = ASE(late_proof(), seed=0, stop_on_gap=0.35).learn(20_000)
    assert agent.num_timesteps < 20_000
    gap = agent.certificate().value_gap
    assert gap is not None
    assert gap <= 0.35


def test_two_worlds_of_one_size_share_nothing() -> None:
    one, other = ASE(random_world(1), seed=0), ASE(random_world(2), seed=0)
    one.learn(50)
    assert not other.knowledge.counts.any()
    assert (other.outcomes.successors != one.outcomes.successors).any()
