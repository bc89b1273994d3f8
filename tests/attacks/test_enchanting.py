"""Enchanting: plans are made in copies of the environment, which stays as it is, and they lead where the attacker wants."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from toys import LinearRule, Steps, balancer

import robustrl as rrl
from attacks.victims import context
from robustrl.agents import AttackedAgent
from robustrl.attacks import AttackContext, Enchanting, RandomNoise
from robustrl.attacks.enchanting import Simulator
from robustrl.envs import AttackObservation, EnvRecipe
from robustrl.policy import PolicyView
from robustrl.rollouts.collect import collect, make_job
from robustrl.threat import ThreatModel

FALLEN_LEFT = {"target": (0.0, 0.0, -0.3, 0.0), "weights": (0.0, 0.0, 1.0, 0.0)}
CARTPOLE = EnvRecipe.of("CartPole-v1", max_episode_steps=40)
STEP = ThreatModel(norm=math.inf, step=0.2)
SMALL: dict[str, Any] = {"samples": 20, "iterations": 2, "steps": 3}


@dataclass(frozen=True)
class Idle(Enchanting):
    """Plans, and delivers the truth."""

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        super().perturb(frames, context)
        return frames


def made(name: str) -> gym.Env[Any, Any]:
    env = gym.make(name)
    env.reset(seed=3)
    env.action_space.seed(0)
    for _ in range(5):
        env.step(env.action_space.sample())
    return env


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "Hopper-v5", "Humanoid-v5", "InvertedPendulum-v5", "FrozenLake-v1"]
)
def test_a_copy_goes_on_as_the_environment_does_and_leaves_it_alone(name: str) -> None:
    env = made(name)
    actions = [env.action_space.sample() for _ in range(12)]
    if name == "FrozenLake-v1":
        env.unwrapped.P = {s: {a: [max(row)] for a, row in rows.items()} for s, rows in env.unwrapped.P.items()}
    before = copy.deepcopy(env.unwrapped.np_random.bit_generator.state)
    simulator, played = Simulator(env, np.random.default_rng(0)), []
    for _ in range(2):
        branch = simulator.branch()
        played.append([branch.step(action)[:4] for action in actions])
    assert env.unwrapped.np_random.bit_generator.state == before
    for action, *copies in zip(actions, *played, strict=True):
        truth = env.step(action)[:4]
        for found in copies:
            assert np.array_equal(found[0], truth[0])
            assert found[1:] == truth[1:]
        if truth[2]:
            break


def test_a_copied_console_shows_the_same_pictures() -> None:
    env = gym.make("robustrl/Atari-v0", game="Pong", repeat_action_probability=0.0, max_episode_steps=50)
    env.reset(seed=3)
    simulator = Simulator(env, np.random.default_rng(0))
    for _ in range(2):
        branch = simulator.branch()
        copies = [branch.step(2)[0] for _ in range(5)]
    for found in copies:
        assert np.array_equal(found, env.step(2)[0])


class Dice(Steps):
    """Shows a random number."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, *rest = super().step(action)
        return observation + np.float32(self.np_random.random()), *rest


def test_copies_throw_their_own_dice() -> None:
    env = Dice(10)
    env.reset(seed=0)
    simulator = Simulator(env, np.random.default_rng(0))
    shown = [float(branch.step(0)[0][0]) for branch in (simulator.branch() for _ in range(3))]
    shown.append(float(env.step(0)[0][0]))
    assert len(set(shown)) == 4


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
def test_planning_changes_no_bit_of_an_episode(env_id: str) -> None:
    recipe = EnvRecipe.of(env_id, max_episode_steps=12, noise=rrl.Gaussian(0.01))
    if env_id == "CartPole-v1":
        victim = balancer()
    else:
        space = spaces.Box(-3, 3, (1,), np.float32)
        victim = PolicyView.from_torch(Pull(), kind="deterministic", observation_shape=(4,), action_space=space)
    idle = Idle((0.0,) * 4, **SMALL)
    clean = collect(make_job(victim, recipe, engine="list"), 3)
    planned = collect(make_job(victim, recipe, attack=idle, threat=STEP), 3)
    for name in ("returns", "lengths", "seeds"):
        assert np.array_equal(getattr(clean, name), getattr(planned, name))
    assert not planned.spent.any()


def test_a_wrapped_environment_is_changed_in_no_bit_by_planning() -> None:
    env, twin = (made("CartPole-v1") for _ in range(2))
    attacked = AttackObservation(env, Idle(**FALLEN_LEFT, **SMALL), STEP, victim=balancer(), seed=0)
    seen, true = attacked.reset(seed=4)[0], twin.reset(seed=4)[0]
    for _ in range(12):
        assert np.array_equal(seen, true)
        assert np.array_equal(env.unwrapped.state, twin.unwrapped.state)
        assert env.unwrapped.np_random.bit_generator.state == twin.unwrapped.np_random.bit_generator.state
        assert env.get_wrapper_attr("_elapsed_steps") == twin.get_wrapper_attr("_elapsed_steps")
        seen, true = attacked.step(0)[0], twin.step(0)[0]


class Pull(torch.nn.Module):
    """Keeps the pole of InvertedPendulum up."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        gains = torch.tensor([1.0, 20.0, 1.5, 4.0], dtype=torch.float64)
        return (observation.double() * gains).sum(1, keepdim=True)


def fell_left(env: Any, victim: PolicyView, attack: Any, episodes: int, threat: ThreatModel = STEP) -> int:
    """How many episodes ended with the pole far to the left."""
    attacked, count = AttackObservation(env, attack, threat, victim=victim, seed=0), 0
    for seed in range(episodes):
        observation, ended = attacked.reset(seed=seed)[0], False
        while not ended:
            seen = torch.from_numpy(observation).float()[None]
            scores = victim.scores(seen)
            action = int(scores.argmax()) if victim.discrete else scores[0].detach().numpy().astype(np.float32)
            observation, _, terminated, truncated, _ = attacked.step(action)
            ended = terminated or truncated
        angle = env.unwrapped.state[2] if victim.discrete else env.unwrapped.data.qpos[1]
        count += bool(angle < -0.19)
    return count


QUICK: dict[str, Any] = {"samples": 24, "iterations": 2, "steps": 4}


def test_the_agent_is_led_to_the_target_and_random_noise_leads_it_nowhere() -> None:
    env = gym.make("CartPole-v1", max_episode_steps=30, disable_env_checker=True)
    assert fell_left(env, balancer(), Enchanting(**FALLEN_LEFT, **QUICK), 8) >= 7
    assert fell_left(env, balancer(), RandomNoise("corner"), 8) <= 1
    mirrored = Enchanting((0.0, 0.0, 0.3, 0.0), weights=FALLEN_LEFT["weights"], **QUICK)
    assert fell_left(env, balancer(), mirrored, 4) == 0  # led to the other side


def test_continuous_actions_are_pulled_towards_the_plan() -> None:
    env = gym.make("InvertedPendulum-v5", max_episode_steps=30, disable_env_checker=True)
    space = spaces.Box(-3, 3, (1,), np.float32)
    victim = PolicyView.from_torch(Pull(), kind="deterministic", observation_shape=(4,), action_space=space)
    attack = Enchanting((0.0, -0.3, 0.0, 0.0), weights=(0.0, 1.0, 0.0, 0.0), **QUICK)
    threat = ThreatModel(norm=math.inf, step=0.25)
    enchanted, random = (fell_left(env, victim, tried, 8, threat) for tried in (attack, RandomNoise()))
    assert enchanted >= 6
    assert random <= 1


class Corridor(gym.Env[Any, Any]):
    """Cells 0 to 9; action 11 goes right, 10 left."""

    observation_space = spaces.Box(0, 9, (1,), np.float32)
    action_space = spaces.Discrete(2, start=10)

    def __init__(self, start: int = 4) -> None:
        self.start = start

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell = self.start
        return np.array([self.cell], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(int(action))
        self.cell = min(max(self.cell + 2 * (action - 10) - 1, 0), 9)
        return np.array([self.cell], np.float32), 0.0, False, False, {}


@pytest.mark.parametrize(("target", "first"), [(7.0, 1), (1.0, 0)])
def test_a_plan_is_the_way_to_the_target_and_lasts_until_it_is_made_again(target: float, first: int) -> None:
    env = Corridor()
    env.reset()
    attack = Enchanting((target,), length=3, every=2, samples=20, elite=0.2)
    assert attack._plan(env, 3, np.random.default_rng(0)).tolist() == [first] * 3
    planned = [attack._planned(env, step, 10 - step, seed=step) for step in (0, 1)]
    assert planned == [first, first]
    env.cell = int(target)  # now every plan is as good: the old one lasts until step 2
    assert attack._plans[env][0] == 0
    attack._planned(env, 2, 8, seed=2)
    assert attack._plans[env][0] == 2
    attack._planned(env, 0, 10, seed=2)  # another episode
    assert attack._plans[env][0] == 0
    assert len(attack._planned(env, 0, 1, seed=0).shape) == 0
    assert len(attack._plans[env][1]) == 1  # no longer than the episode


RIGHT_IF_HIGH = PolicyView.from_torch(LinearRule([1.0], -4.0), kind="q", observation_shape=(1,))


def test_every_episode_is_planned_in_its_own_environment() -> None:
    """From cells 1 and 7 to cell 4: what is shown goes up in the one and down in the other."""
    attack = Enchanting((4.0,), length=3, every=2, samples=20, elite=0.2)
    venv = DummyVecEnv([lambda: Corridor(1), lambda: Corridor(7)])
    attacked = rrl.envs.add_attack(venv, attack, ThreatModel(norm=2, step=0.5), victim=RIGHT_IF_HIGH, horizon=10)
    assert attacked.reset().ravel().tolist() == pytest.approx([1.5, 6.5])
    frames = torch.tensor([[1.0], [7.0]])
    several = context(RIGHT_IF_HIGH, frames, [0.0, 0.5], environments=tuple(venv.envs))
    assert attack.perturb(frames, several).ravel().tolist() == pytest.approx([1.0, 6.5])


def test_plans_stay_where_their_environments_are() -> None:
    env = Corridor()
    env.reset()
    attack = Enchanting((7.0,), samples=20)
    attack._planned(env, 0, 10, seed=0)
    assert len(attack._plans) == 1
    for copied in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack)):
        assert copied == attack
        assert type(copied._plans) is type(attack._plans)
        assert not copied._plans
    del env
    assert not attack._plans


def test_episodes_are_planned_as_if_alone_and_by_the_seed() -> None:
    attack, numbers = Enchanting(**FALLEN_LEFT, **SMALL), []
    for width in (None, 2):
        job = make_job(balancer(), CARTPOLE, attack=attack, threat=STEP, seed=2, chunk_size=4)
        assert job.engine == "list"
        numbers.append(collect(job, 8, in_flight=width))
    for name in ("returns", "lengths", "spent"):
        assert np.array_equal(*(getattr(found, name) for found in numbers))


@pytest.mark.parametrize("host", ["dummy", "sync"])
def test_vector_hosts_lead_every_episode(host: str) -> None:
    def one() -> gym.Env[Any, Any]:
        return gym.make("CartPole-v1", max_episode_steps=20)

    attack = Enchanting(**FALLEN_LEFT, samples=30, iterations=3)
    venv: Any = DummyVecEnv([one] * 2) if host == "dummy" else gym.vector.SyncVectorEnv([one] * 2)
    attacked, policy = rrl.envs.add_attack(venv, attack, STEP, victim=balancer(), seed=0), balancer()
    attacked.seed(0) if host == "dummy" else None
    seen = attacked.reset() if host == "dummy" else attacked.reset(seed=0)[0]
    for _ in range(12):
        actions = policy.scores(torch.from_numpy(seen)).argmax(1).numpy()
        seen = attacked.step(actions)[0]
        angles = [env.unwrapped.state[2] for env in venv.envs]
        if min(angles) < -0.1:
            break
    assert max(angles) < 0


def test_where_there_is_no_simulator_that_is_said() -> None:
    attack = Enchanting(**FALLEN_LEFT)
    with pytest.raises(ValueError, match="Enchanting plans in copies of the running environments, which cannot be had here"):
        rrl.attack_policy(balancer(), CARTPOLE, attack, STEP, 2, engine="native")
    with pytest.raises(ValueError, match="cannot be had here"):
        AttackedAgent(balancer(), attack, STEP)
    remote = SubprocVecEnv([lambda: gym.make("CartPole-v1")])
    try:
        with pytest.raises(ValueError, match="cannot be had here"):
            rrl.envs.add_attack(remote, attack, STEP, victim=balancer())
    finally:
        remote.close()
    env = gym.make("CartPole-v1")
    env.unwrapped.screen = iter(())  # as a window: it cannot be copied
    env.unwrapped.handle = open(__file__)  # noqa: SIM115
    attacked = AttackObservation(env, attack, STEP, victim=balancer())
    with pytest.raises(ValueError, match="plans in copies of the environment, but .* cannot be copied"):
        attacked.reset(seed=0)
    env.unwrapped.handle.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": (math.nan,) * 4}, "target must be finite"),
        ({"weights": (1.0,)}, "weights must be 4 numbers"),
        ({"weights": (0.0,) * 4}, "not all of them 0"),
        ({"weights": (1.0, 1.0, 1.0, -1.0)}, "weights must be 4 numbers >= 0"),
        ({"every": 11}, "every must be at most length = 10, got 11"),
        ({"samples": 0}, "samples must be"),
        ({"elite": 1.0}, "elite must be"),
        ({"elite": 0.0}, "elite must be"),
        ({"elite": 0.001}, "samples must be at least 1000 for an elite of 0.001, got 60"),
        ({"samples": 8}, "samples must be at least 10 for an elite of 0.1, got 8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Enchanting(**{**FALLEN_LEFT, **change})


def test_target_and_policy_must_fit() -> None:
    with pytest.raises(ValueError, match="target must have the 4 entries of a frame, got 2"):
        make_job(balancer(), CARTPOLE, attack=Enchanting((0.0, 1.0)), threat=STEP)
    with pytest.raises(ValueError, match="GradientAttack needs additive noise"):
        make_job(balancer(), replace(CARTPOLE, noise=rrl.Ablation(0.5)), attack=Enchanting(**FALLEN_LEFT), threat=STEP)
    told = Enchanting(**FALLEN_LEFT).to_dict()
    assert told["kind"] == "Enchanting"
    assert told["target"] == [0.0, 0.0, -0.3, 0.0]
    assert "_plans" not in told
