"""The interface of Stable-Baselines3: callbacks, logs, evaluation, time limits, files."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents.ase.small import World, hidden_danger, late_proof, one_draw_per_episode, random_world
from robustrl.agents.ase import (
    ASE,
    MBIE,
    Declaration,
    EpsilonGreedy,
    QLearning,
    RMax,
    SafeEpsilonGreedy,
    SafeRMax,
    UndirectedASE,
    UnsafeStateError,
)  # fmt: skip
from robustrl.mdp import ModelViolation

ALL = [ASE, UndirectedASE, SafeRMax, RMax, MBIE, EpsilonGreedy, SafeEpsilonGreedy, QLearning]


def tuned(kind: type[Any], of: Any, **more: Any) -> Any:
    return kind(of, seed=0, **more)


class Log(gym.Wrapper[Any, Any, Any, Any]):
    """Writes down every step as the environment itself saw it."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.steps: list[tuple[int, int, int, float, bool]] = []
        self.actions: list[int] = []
        self._at = -1

    def reset(self, **kwargs: Any) -> Any:
        self._at, info = self.env.reset(**kwargs)
        return self._at, info

    def step(self, action: Any) -> Any:
        after, reward, terminated, truncated, info = self.env.step(action)
        self.steps.append((self._at, int(action), after, float(reward), terminated))
        self.actions.append(int(action))
        self._at = after
        return after, reward, terminated, truncated, info


@pytest.mark.parametrize("kind", ALL)
def test_every_agent_learns_predicts_evaluates_and_calls_back(kind: type[Any], tmp_path: Path) -> None:
    of = one_draw_per_episode()
    agent = tuned(kind, of)
    assert isinstance(agent, BaseAlgorithm)
    seen: list[int] = []
    callbacks = [
        CheckpointCallback(50, str(tmp_path), name_prefix="step"),
        EvalCallback(
            Monitor(TimeLimit(one_draw_per_episode(), 30)),
            eval_freq=60,
            n_eval_episodes=2,
            best_model_save_path=str(tmp_path),
            verbose=0,
        ),
    ]
    assert agent.learn(120, callback=callbacks, progress_bar=False) is agent
    agent.learn(30, callback=lambda local, _: seen.append(local["self"].num_timesteps) or True, reset_num_timesteps=False)
    assert seen == list(range(121, 151))
    assert (tmp_path / "step_100_steps.zip").exists()
    assert kind.load(tmp_path / "best_model").num_timesteps in (60, 120)
    mean, _ = evaluate_policy(agent, Monitor(TimeLimit(one_draw_per_episode(), 30)), n_eval_episodes=3)
    assert 0 <= mean <= 1
    action, state = agent.predict(np.array(0))
    assert action.shape == ()
    assert state is None


def test_a_callback_stops_learning() -> None:
    agent = ASE(late_proof(), seed=0)
    agent.learn(100, callback=lambda local, _: local["self"].num_timesteps < 7)
    assert agent.num_timesteps == 7
    stop = StopTrainingOnRewardThreshold(-1.0)
    agent.learn(
        100, callback=EvalCallback(Monitor(TimeLimit(late_proof(), 20)), callback_on_new_best=stop, eval_freq=10, verbose=0)
    )
    assert agent.num_timesteps == 10


def test_a_batch_is_decided_as_its_members_are() -> None:
    of = late_proof()
    agent = ASE(of, seed=0).learn(300)
    batch = np.array([0, 1, 0, 1, 1])
    actions, _ = agent.predict(batch)
    assert actions.tolist() == [int(agent.predict(state)[0]) for state in batch]
    assert actions.dtype.kind == "i"
    for wrong in (4, -1, [0, 9], 0.5):
        with pytest.raises(ValueError, match="observation"):
            agent.predict(np.array(wrong))


def test_the_log_has_what_sb3_and_safety_need(tmp_path: Path) -> None:
    agent = ASE(TimeLimit(late_proof(), 25), seed=0)
    agent.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    agent.learn(300)
    with (tmp_path / "progress.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {
        "safety/unsafe_visits", "safety/safe_pairs", "safety/known_pools", "safety/mode", "rollout/ep_rew_mean", "rollout/ep_len_mean",
        "train/n_replans", "train/value_gap", "time/fps", "time/total_timesteps",
    } <= set(rows[-1])  # fmt: skip
    assert rows[-1]["safety/mode"] == "goal"
    assert int(rows[-1]["safety/safe_pairs"]) == agent.safe_set.sum()
    assert float(rows[-1]["train/value_gap"]) < float(rows[0]["train/value_gap"])
    assert rows[-1]["time/total_timesteps"] == "300"
    assert list(tmp_path.glob("events*"))


def test_steps_say_what_they_cost_and_what_is_allowed_next() -> None:
    agent = RMax(hidden_danger(), seed=0)
    costs: list[int] = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        info = local["infos"][0]
        costs.append(info["cost"])
        assert info["cost_sum"] == sum(costs) == agent.unsafe_visits
        assert info["certified"] is False
        assert info["safe_actions"].shape == (2,)
        return True

    agent.learn(300, callback=look)
    assert sum(costs) > 0


def test_costs_are_those_that_are_summed_whatever_the_environment_calls_a_cost() -> None:
    class Costly(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            *step, info = self.env.step(action)
            return (*step, {**info, "cost": 7})

    found: list[Any] = []
    ASE(Costly(late_proof()), seed=0).learn(3, callback=lambda local, _: found.append(local["infos"][0]) or True)
    assert [(info["cost"], info["cost_sum"]) for info in found] == [(0, 0)] * 3


def test_a_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ASE(late_proof(), seed=0).learn(20, progress_bar=True)
    assert "20/20" in "".join(capsys.readouterr())


@pytest.mark.parametrize("sharing", ["pool", "best"])
def test_a_time_limit_neither_adds_nor_changes_a_draw(sharing: Any) -> None:
    """The counts are those of the steps that the environment logged, and a truncated step is no end."""
    log = Log(late_proof())
    agent = ASE(TimeLimit(log, 20), seed=0, sharing=sharing).learn(203)
    expected = np.zeros_like(agent.knowledge.visits)
    for state, action, after, reward, ended in log.steps:
        expected[state * agent.outcomes.n_actions + action, agent.outcomes.slot(state, action, after, reward, ended)] += 1
    assert (agent.knowledge.visits == expected).all()
    assert expected.sum() == 203


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_agent_goes_on_exactly_as_it_would_have(kind: type[Any], tmp_path: Path) -> None:
    agent = tuned(kind, random_world(13)).learn(200)
    agent.save(tmp_path / "agent")
    path = tmp_path / "agent.zip"
    copies = [agent, kind.load(path)]
    logs = [Log(random_world(13)), Log(random_world(13))]
    for one, log in zip(copies, logs, strict=True):
        one.set_env(log)
        one.get_env().seed(7)
        one.learn(500, reset_num_timesteps=False)
    assert copies[1].num_timesteps == 700
    assert logs[0].actions == logs[1].actions
    assert copies[0].unsafe_visits == copies[1].unsafe_visits
    for (name, mine), theirs in zip(copies[0]._pack()[1].items(), copies[1]._pack()[1].values(), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_files_hold_no_pickle_and_bad_ones_are_refused(tmp_path: Path) -> None:
    agent = ASE(late_proof(), seed=0).learn(50)
    agent.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        assert sorted(archive.namelist()) == ["agent.json", "arrays.npz"]
        document = json.loads(archive.read("agent.json"))
        archive.extract("arrays.npz", tmp_path)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as stored:
        assert all(stored[name].dtype.kind in "biuf" for name in stored.files)
    loaded = ASE.load(tmp_path / "agent.zip")
    assert (loaded.safe_set == agent.safe_set).all()
    assert loaded.predict(0)[0] == agent.predict(0)[0]
    with pytest.raises(ValueError, match="env must be set"):
        loaded.learn(10)
    with pytest.raises(ValueError, match="holds a ASE"):
        RMax.load(tmp_path / "agent.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="path must be a file"):
        ASE.load(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.writestr("agent.json", json.dumps({**document, "format": 99}))
        archive.write(tmp_path / "arrays.npz", "arrays.npz")
    with pytest.raises(ValueError, match="format 99"):
        ASE.load(tmp_path / "old.zip")
    with pytest.raises(FileNotFoundError):
        ASE.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="exclude"):
        agent.save(tmp_path / "x", exclude=["env"])


def test_another_environment_is_refused(tmp_path: Path) -> None:
    agent = ASE(random_world(1), seed=0)
    mine = agent.get_env()
    for other in (random_world(2), late_proof()):
        with pytest.raises(ValueError, match="that the agent was made for, it has other successors"):
            agent.set_env(other)
    with pytest.raises(ValueError, match="declare its outcomes"):
        agent.set_env(gym.make("CartPole-v1"))
    assert agent.get_env() is mine
    calm, windy = (gym.make("robustrl/LavaIslands-v0", map="river", slip=slip) for slip in (0.0, 0.6))
    agent = ASE(calm, seed=0)
    agent.save(tmp_path / "agent")
    for move in (agent.set_env, agent.shield, lambda env: ASE.load(tmp_path / "agent", env=env)):
        with pytest.raises(ValueError, match="other probabilities, tau"):
            move(windy)
    agent.set_env(gym.make("robustrl/LavaIslands-v0", map="river", slip=0.0))
    one, other = (gym.make("FrozenLake-v1", desc=rows) for rows in (["SF", "FG"], ["SH", "FG"]))
    with pytest.raises(ValueError, match="agent was made for"):
        ASE(one, tau="from_P", safe_set="from_P").set_env(other)


def test_spaces_may_begin_anywhere() -> None:
    class Shifted(gym.Wrapper[Any, Any, Any, Any]):
        def __init__(self, env: gym.Env[Any, Any]) -> None:
            super().__init__(env)
            self.observation_space, self.action_space = spaces.Discrete(4, start=10), spaces.Discrete(3, start=5)

        def reset(self, **kwargs: Any) -> Any:
            state, info = self.env.reset(**kwargs)
            return state + 10, info

        def step(self, action: Any) -> Any:
            after, *rest = self.env.step(int(action) - 5)
            return (after + 10, *rest)

    plain, shifted = Log(late_proof()), Log(late_proof())
    one, other = ASE(plain, seed=3).learn(200), ASE(Shifted(shifted), seed=3).learn(200)
    assert plain.actions == shifted.actions
    assert int(other.predict(10)[0]) == int(one.predict(0)[0]) + 5


def test_environments_that_cannot_be_learnt_from_are_refused() -> None:
    with pytest.raises(ValueError, match="one environment|multiple"):
        ASE(DummyVecEnv([late_proof, late_proof]))
    with pytest.raises(ValueError, match="VecNormalize"):
        ASE(VecNormalize(DummyVecEnv([late_proof])))
    for on_violation in ("raise", "retract"):  # what nobody declared cannot be gone on from
        with pytest.warns(UserWarning, match="TransformReward"):
            agent = ASE(TransformReward(late_proof(), lambda reward: reward + 0.5), on_violation=on_violation)
        with pytest.raises(ModelViolation, match="reward"):
            agent.learn(5)
        assert not agent.certified
        assert agent.num_timesteps == 1
    of = late_proof()
    of.observation_space = spaces.Discrete(9)
    with pytest.raises(ValueError, match="observation_space"):
        ASE(of)


def test_equal_seeds_give_equal_runs_and_no_global_generator_is_touched() -> None:
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index] # noqa: NPY002
    logs = [Log(random_world(13)) for _ in range(3)]
    for log, seed in zip(logs, (5, 5, 6), strict=True):
        EpsilonGreedy(log, seed=seed).learn(100)
    assert logs[0].steps == logs[1].steps != logs[2].steps
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002


def test_an_agent_can_act_without_an_environment() -> None:
    declared = Declaration.of(late_proof())
    agent = ASE(declared, seed=0)
    assert agent.predict(0)[0] in (0,)
    with pytest.raises(ValueError, match="Declaration"):
        ASE(declared, tau=0.1)
    with pytest.raises(UnsafeStateError):
        agent.predict(2)
    with pytest.raises(NotImplementedError):
        agent.set_parameters({})
    assert agent.get_parameters()["tables"]


def test_rewards_in_single_precision_are_recognised() -> None:
    of = random_world(14)  # rewards such as 0.123, which single precision rounds
    agent = MBIE(of, seed=0).learn(200)
    assert agent.knowledge.visits.sum() == 200
    assert isinstance(of, World)
