"""Attack wrappers: three hosts of one core, held to their budget, that leave the environment alone."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from toys import LinearRule, Pixels, Steps

import robustrl as rrl
from robustrl.attacks import Attack, AttackContext, GradientAttack, Greedy, Margin, MinimalFlip, RandomNoise
from robustrl.envs import AttackObservation, NoiseObservation, add_attack, add_noise, set_victim
from robustrl.envs.attack_core import AttackCore
from robustrl.envs.sb3 import VecAttack
from robustrl.errors import ChainError
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

CARTPOLE = PolicyView.from_torch(
    LinearRule(torch.tensor([0.3, 0.5, 2.0, 1.0], dtype=torch.float64)), kind="q", observation_shape=(4,)
)
STEP = ThreatModel(norm=math.inf, step=0.1)
PGD = GradientAttack(Margin())


class Push(Attack):
    """As far up as the budget goes, evenly, without a look at anything; crumbs are left over."""

    needs_policy = False

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        room = (
            context.allowance
            * (context.allowance > 0.01)
            / (frames[0].numel() ** (0 if context.norm == math.inf else 1 / context.norm))
        )
        shift = (room * (1 - 1e-6)).reshape(-1, *(1,) * (frames.ndim - 1)).to(frames.dtype)
        if context.pixels is not None:
            low, high = context.pixels
            return (frames + shift).clamp(low, high)
        return frames + shift


class Pictures(gym.Env[Any, Any]):
    """Bytes, all of one value."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(0, 255, (6, 5), np.uint8)

    def __init__(self, value: int = 250) -> None:
        self.value = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.full((6, 5), self.value, np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full((6, 5), self.value, np.uint8), 0.0, False, False, {}


class Two(gym.Env[Any, Any]):
    """A dictionary of two vectors."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (2,), np.float32), "b": spaces.Box(-9, 9, (3,), np.float32)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.reset()[0], 0.0, False, False, {}


def cartpole(**options: Any) -> AttackObservation:
    options = {"victim": CARTPOLE, "seed": 0} | options
    return AttackObservation(gym.make("CartPole-v1"), options.pop("attack", PGD), options.pop("threat", STEP), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bounds", ["expand", "clip"])
@pytest.mark.parametrize("threat", [STEP, ThreatModel(norm=2, episode=0.3), ThreatModel(norm=1, step=0.2)])
def test_both_checkers_accept_an_attacked_environment(bounds: Any, threat: ThreatModel) -> None:
    check_env(cartpole(bounds=bounds, threat=threat), skip_render_check=True)
    sb3_check_env(cartpole(bounds=bounds, threat=threat))


@pytest.mark.parametrize("bounds", ["expand", "clip"])
def test_what_is_delivered_is_inside_the_space_even_at_its_edge(bounds: Any) -> None:
    class Edge(Steps):
        observation_space = spaces.Box(-1, 1, (4,), np.float32)

        def reset(self, **_: Any) -> Any:
            return np.ones(4, np.float32), {}

    env = AttackObservation(Edge(4), Push(), ThreatModel(norm=math.inf, step=0.25), bounds=bounds)
    observation, info = env.reset()
    assert env.observation_space.contains(observation)
    assert observation == pytest.approx(1.25 if bounds == "expand" else 1.0)
    assert info["attack"]["attacked"] == (bounds == "expand")


def test_the_environment_takes_no_notice() -> None:
    """Same rewards and true observations, bit for bit, under the same actions."""
    attacked, plain = cartpole(record_clean=True, attack=GradientAttack(Margin(), restarts=2)), gym.make("CartPole-v1")
    actions = np.random.default_rng(0).integers(0, 2, 60)
    for env in (attacked, plain):
        env.reset(seed=3)
    for action in actions:
        _, reward, terminated, _, info = attacked.step(action)
        expected, same_reward, same_end, _, _ = plain.step(action)
        assert np.array_equal(info["clean_obs"], expected)
        assert (reward, terminated) == (same_reward, same_end)
        if terminated:
            for env in (attacked, plain):
                env.reset()


@pytest.mark.parametrize("threat", [ThreatModel(norm=math.inf, step=0.0), ThreatModel(norm=2, episode=0.0)])
def test_without_a_budget_observations_are_delivered_bit_for_bit(threat: ThreatModel) -> None:
    env = cartpole(threat=threat, record_clean=True)
    for _ in range(3):
        observation, info = env.reset()
        assert np.array_equal(observation, info["clean_obs"])
        assert info["attack"] == {
            "norm": 0.0, "eps_t": 0.0, "budget_spent": 0.0, "budget_left": info["attack"]["budget_left"], "attacked": False,
        }  # fmt: skip
        for _ in range(5):
            observation, *_, info = env.step(0)
            assert np.array_equal(observation, info["clean_obs"])


@pytest.mark.parametrize(
    ("norm", "aggregate"), [(2, lambda n: math.sqrt(np.square(n).sum())), (1, lambda n: n.sum()), (math.inf, lambda n: n.max())]
)
def test_infos_say_what_was_spent_and_every_episode_starts_anew(norm: float, aggregate: Any) -> None:
    limits = {"step": 0.1} if norm == math.inf else {"step": 0.1, "episode": 0.25}
    env = cartpole(
        threat=ThreatModel(norm=norm, **limits), attack=GradientAttack(Margin(), allocation=Greedy()), record_clean=True
    )
    for _ in range(3):
        observation, info = env.reset()
        norms = []
        for step in range(12):
            difference = (observation.astype(np.float64) - info["clean_obs"]).ravel()
            norms.append(np.linalg.norm(difference, norm))
            said = info["attack"]
            assert said["norm"] == pytest.approx(norms[-1], abs=1e-12)
            assert said["norm"] <= said["eps_t"] * (1 + 1e-9) + 1e-12
            assert said["budget_spent"] == pytest.approx(aggregate(np.array(norms)), abs=1e-12)
            assert said["attacked"] == (norms[-1] > 0)
            if norm != math.inf:
                assert said["budget_spent"] <= 0.25 * (1 + 1e-9)
            observation, *_, info = env.step(step % 2)
        assert max(norms) > 0


def vector(mode: AutoresetMode, length: int = 4, **options: Any) -> Any:
    env = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Steps(length), length)] * 2, autoreset_mode=mode)
    return add_attack(env, Push(), ThreatModel(norm=math.inf, step=0.5), **options)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_start_a_new_ledger_with_every_episode(mode: AutoresetMode) -> None:
    """Steps count upwards from 0; under a whole budget of 1 spent greedily only an episode's first frame is moved."""
    env = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Steps(4), 4)] * 2, autoreset_mode=mode)
    wrapped = add_attack(env, Push(), ThreatModel(norm=2, episode=1.0))
    observation, info = wrapped.reset(seed=0)
    assert observation == pytest.approx(0.5, abs=1e-5)  # of 4 entries, norm 1
    firsts = 0
    for _ in range(12):
        observation, _, terminated, truncated, info = wrapped.step(np.zeros(2, dtype=np.int64))
        done = terminated | truncated
        if mode == AutoresetMode.SAME_STEP and done.any():
            assert all((final == 4.0).all() for final in info["final_obs"])  # its budget was gone
        if mode == AutoresetMode.DISABLED and done.any():
            observation, info = wrapped.reset(options={"reset_mask": done})
        if (np.floor(observation) == 0).all():
            firsts += 1
            assert observation == pytest.approx(0.5, abs=1e-5)
            assert info["attack"]["attacked"].all()
        else:
            assert (observation == np.round(observation)).all()
            assert not info["attack"]["attacked"].any()
    assert firsts == {AutoresetMode.NEXT_STEP: 2, AutoresetMode.SAME_STEP: 3, AutoresetMode.DISABLED: 3}[mode]


def test_a_masked_reset_leaves_the_others_as_they_were() -> None:
    env = add_attack(
        SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Steps(9), 9)] * 2, autoreset_mode=AutoresetMode.DISABLED),
        Push(),
        ThreatModel(norm=2, episode=1.0),
    )
    env.reset(seed=0)
    before, *_ = env.step(np.zeros(2, dtype=np.int64))
    after, info = env.reset(options={"reset_mask": np.array([True, False])})
    assert after[0] == pytest.approx(0.5, abs=1e-5)
    assert np.array_equal(after[1], before[1])
    assert info["attack"]["budget_spent"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_stable_baselines_hosts_attack_the_terminal_observation_with_its_own_episodes_budget() -> None:
    venv = VecAttack(
        DummyVecEnv([lambda: gym.wrappers.TimeLimit(Steps(3), 3)] * 2), Push(), ThreatModel(norm=2, step=0.5, episode=1.0)
    )
    seen = [venv.reset()]
    for _ in range(3):
        observation, _, dones, infos = venv.step(np.zeros(2, dtype=np.int64))
        seen.append(observation)
    assert dones.all()
    assert seen[0] == pytest.approx(0.25, abs=1e-5)
    assert seen[2] == pytest.approx(2.25, abs=1e-5)
    for info in infos:
        assert info["terminal_observation"] == pytest.approx(3.25, abs=1e-5)  # .5^2 * 4 = 1: the fourth and last quarter
        assert info["terminal_attack"]["budget_left"] == pytest.approx(0.0, abs=2e-3)
        assert info["attack"]["budget_spent"] == pytest.approx(0.5, abs=1e-5)
    assert seen[3] == pytest.approx(0.25, abs=1e-5)


def test_three_hosts_deliver_the_same() -> None:
    attack, threat, options = (
        GradientAttack(Margin(), restarts=3),
        ThreatModel(norm=2, episode=0.5),
        {"victim": CARTPOLE, "seed": 5},
    )
    single = AttackObservation(gym.make("CartPole-v1"), attack, threat, **options)
    many = add_attack(gym.make_vec("CartPole-v1", 1, vectorization_mode="sync"), attack, threat, **options)
    sb3 = VecAttack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), attack, threat, **options)
    sb3.seed(9)
    expected, other, third = single.reset(seed=9)[0], many.reset(seed=9)[0][0], sb3.reset()[0]
    for step in range(8):
        assert np.array_equal(expected, other)
        assert np.array_equal(third, expected)
        expected, other, third = (
            single.step(step % 2)[0],
            many.step(np.array([step % 2]))[0][0],
            sb3.step(np.array([step % 2]))[0][0],
        )


def test_a_seed_repeats_the_attack() -> None:
    env = cartpole(attack=GradientAttack(restarts=2), seed=None)
    runs = [[env.reset(seed=4)[0], *(env.step(step % 2)[0] for step in range(6))] for _ in range(2)]
    assert np.array_equal(*runs)


def test_dictionaries_share_one_ledger() -> None:
    env = AttackObservation(gym.wrappers.TimeLimit(Two(), 5), Push(), ThreatModel(norm=2, episode=1.0))
    observation, info = env.reset()
    assert np.concatenate([observation["a"], observation["b"]]) == pytest.approx(1 / math.sqrt(5), abs=1e-5)
    assert info["attack"]["norm"] == pytest.approx(1.0, abs=1e-5)
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize(("value", "step", "expected"), [(100, 3.7, 3), (254, 3.0, 1), (100, 1.5, 1), (255, 5.0, 0)])
def test_bytes_are_delivered_in_whole_grey_levels_that_never_wrap(value: int, step: float, expected: int) -> None:
    threat = ThreatModel(norm=math.inf, step=step, units="uint8")
    whole = AttackObservation(Pictures(value), Push(), threat, delivery="round")
    observation, info = whole.reset()
    assert observation.dtype == np.uint8
    assert whole.observation_space == whole.env.observation_space
    assert (observation == value + expected).all()
    assert info["attack"]["norm"] == expected
    floats = AttackObservation(Pictures(value), Push(), threat)
    observation, _ = floats.reset()
    assert observation.dtype == np.float32
    assert floats.observation_space.contains(observation)
    assert observation == pytest.approx(min(value + step, 255), abs=1e-4)


class Half(Attack):
    """Half a grey level in every entry, with a whole one of norm 2 to spend in each row of the picture."""

    needs_policy = False

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return frames + 0.5


def test_what_rounding_leaves_over_can_be_spent() -> None:
    """30 entries by .5 have norm 2.74: 7 whole levels have 2.65, and rounding alone delivers nothing."""
    threat = ThreatModel(norm=2, step=3.0, units="uint8")
    moved = {}
    for delivery in ("round", "greedy"):
        observation, info = AttackObservation(Pictures(100), Half(), threat, delivery=delivery).reset()
        assert observation.dtype == np.uint8
        moved[delivery] = (np.abs(observation.astype(int) - 100).sum(), info["attack"]["norm"])
    assert moved == {"round": (0, 0.0), "greedy": (7, math.sqrt(7))}


def test_a_radius_of_grey_levels_is_a_whole_number() -> None:
    with pytest.warns(UserWarning, match="means 2 for observations of integers"):
        env = AttackObservation(Pictures(100), Push(), ThreatModel(norm=math.inf, step=2.5, units="uint8"), delivery="round")
    assert env.core.threat.step == 2


def test_units_of_single_coordinates_widen_the_space_accordingly() -> None:
    class Narrow(Steps):
        observation_space = spaces.Box(-1, 1, (4,), np.float32)

    env = AttackObservation(
        Narrow(4), RandomNoise("corner"), ThreatModel(norm=math.inf, step=0.5, scale=(1.0, 2.0, 4.0, 8.0)), seed=0
    )
    observation, info = env.reset(seed=0)
    assert np.abs(observation) == pytest.approx([0.5, 1.0, 2.0, 4.0], rel=1e-5)
    assert info["attack"]["norm"] == pytest.approx(0.5, rel=1e-5)
    assert env.observation_space.high[-1] == pytest.approx(5.0, rel=1e-5)


def test_norm_0_moves_entries_to_the_ends_of_their_range() -> None:
    class Narrow(Steps):
        observation_space = spaces.Box(-7, 9, (4,), np.float32)

    env = AttackObservation(Narrow(4), RandomNoise("salt-and-pepper"), ThreatModel(norm=0, step=2), seed=0)
    observation, info = env.reset(seed=0)
    assert info["attack"]["norm"] == 2
    assert set(observation[observation != 0].tolist()) <= {-7.0, 9.0}


class Memory(gym.Env[Any, Any]):
    """Bytes that are no picture, as an Atari machine's memory."""

    action_space = spaces.Discrete(2)
    observation_space: Any = spaces.Box(0, 255, (16,), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.resize(np.array([255, 0, 254, 1], np.uint8), 16), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.reset()[0], 0.0, False, False, {}


class Careless(Attack):
    """Looks at no range."""

    needs_policy = False

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return frames + 3 * torch.where(frames > 100, 1.0, -1.0)


@pytest.mark.parametrize("delivery", ["float", "round", "greedy"])
@pytest.mark.parametrize("attack", [RandomNoise("corner"), Careless()])
def test_bytes_that_are_no_picture_do_not_wrap_either(delivery: Any, attack: Attack) -> None:
    env = AttackObservation(
        Memory(), attack, ThreatModel(norm=math.inf, step=3, units="uint8"), delivery=delivery, record_clean=True
    )
    observation, info = env.reset(seed=0)
    difference = np.abs(observation.astype(float) - info["clean_obs"])
    assert difference.max() <= 3
    assert env.observation_space.contains(observation)
    assert info["attack"]["norm"] == pytest.approx(difference.max(), abs=1e-5)


def test_pictures_inside_dictionaries_stay_in_their_range() -> None:
    class Both(Two):
        observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (2,), np.float32), "p": spaces.Box(0, 1, (3, 4), np.float32)})

        def reset(self, **_: Any) -> Any:
            return {"a": np.zeros(2, np.float32), "p": np.ones((3, 4), np.float32)}, {}

    env = AttackObservation(gym.wrappers.TimeLimit(Both(), 5), Push(), ThreatModel(norm=math.inf, step=0.5))
    observation, _ = env.reset()
    assert (observation["p"] == 1).all()
    assert observation["a"] == pytest.approx(0.5, abs=1e-5)
    assert env.observation_space.contains(observation)


def test_another_attack_in_the_middle_of_an_episode_goes_on_with_its_ledger() -> None:
    env = AttackObservation(gym.wrappers.TimeLimit(Steps(5), 5), Push(), ThreatModel(norm=2, episode=1.0), seed=0)
    env.reset()
    env.core.use(RandomNoise())
    _, _, _, _, info = env.step(0)
    assert info["attack"]["budget_spent"] == pytest.approx(1.0, abs=1e-2)
    assert info["attack"]["norm"] < 1e-2


def test_another_attack_in_the_middle_of_an_episode_goes_on_with_its_time() -> None:
    env = AttackObservation(gym.wrappers.TimeLimit(Steps(5), 5), RandomNoise(), ThreatModel(norm=2, episode=1.0), seed=0)
    env.reset()
    env.step(0)
    env.core.use(RandomNoise("corner"))
    _, _, _, _, info = env.step(0)
    left = 1 - env.core.attacker.ledger.spent[0] ** 2 + info["attack"]["norm"] ** 2
    assert info["attack"]["norm"] == pytest.approx(
        math.sqrt(left / 3), rel=1e-4
    )  # of five observations to act on, this is the third


class Watching(Push):
    """Keeps the stacks that it is told of."""

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        stacks.append(context.seen_stack.clone())
        return super().perturb(frames, context)


stacks: list[torch.Tensor] = []


def test_the_attacker_knows_what_it_delivered_before() -> None:
    env = cartpole(attack=Watching(), victim=None, frame_stack=2, record_clean=True)
    delivered, _ = env.reset(seed=0)
    _, *_, info = env.step(0)
    assert np.array_equal(stacks[-1][0, 0].numpy(), delivered)
    assert np.array_equal(stacks[-1][0, 1].numpy(), info["clean_obs"])


def test_environments_in_other_processes_can_be_attacked_too() -> None:
    venv = SubprocVecEnv([lambda: gym.make("CartPole-v1")], start_method="spawn")
    try:
        attacked = VecAttack(venv, PGD, STEP, horizon=500)
        set_victim(attacked, PPO("MlpPolicy", attacked, n_steps=8, batch_size=8, device="cpu"))
        attacked.reset()
        assert attacked.step(np.zeros(1, dtype=np.int64))[3][0]["attack"]["attacked"]
    finally:
        venv.close()


def test_who_forgets_the_victim_is_warned_of_clean_replay_buffers() -> None:
    inner = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), training=False)
    with pytest.warns(UserWarning, match="would store clean observations"):
        VecAttack(inner, RandomNoise(), ThreatModel(norm=math.inf, step=0.1, units="normalized")).reset()


def test_what_cannot_be_followed_is_refused() -> None:
    venv = VecNormalize(VecAttack(DummyVecEnv([lambda: gym.wrappers.TimeLimit(Two(), 5)]), PGD, STEP))
    with pytest.raises(ChainError, match="put it inside the attack, or freeze it"):
        set_victim(venv, PPO("MultiInputPolicy", venv, n_steps=8, batch_size=8, device="cpu"))


def test_grey_levels_and_unit_intervals_are_told_apart() -> None:
    env = AttackObservation(Pictures(0), Push(), ThreatModel(norm=math.inf, step=2 / 255, units="unit01"), delivery="round")
    assert env.core.threat.step == pytest.approx(2)
    with pytest.raises(ValueError, match="units must be 'raw'"):
        cartpole(threat=ThreatModel(norm=2, step=1.0, units="normalized"))
    normalized = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), training=False)
    with pytest.raises(ValueError, match="units must be 'normalized'"):
        VecAttack(normalized, PGD, STEP, victim=CARTPOLE)
    VecAttack(normalized, PGD, ThreatModel(norm=2, step=1.0, units="normalized"), victim=CARTPOLE)


def test_grey_levels_are_255ths_of_float_pictures() -> None:
    space = spaces.Box(0, 1, (3, 6, 5), np.float32)
    for units, step in (("uint8", 51.0), ("raw", 0.2), ("unit01", 0.2)):
        core = AttackCore(
            gym.make("CartPole-v1"), space, 1, Push(), ThreatModel(norm=math.inf, step=step, units=units), horizon=5
        )
        assert core.threat.step == pytest.approx(0.2)


def test_an_even_allocation_spends_the_whole_budget_evenly_by_the_last_step() -> None:
    env = cartpole(attack=RandomNoise("corner"), threat=ThreatModel(norm=2, episode=0.1), horizon=8, victim=None)
    _, info = env.reset(seed=0)
    norms = [info["attack"]["norm"]]
    for t in range(7):
        *_, info = env.step(t % 2)
        norms.append(info["attack"]["norm"])
    assert norms == pytest.approx([0.1 / math.sqrt(8)] * 8, rel=1e-4)
    assert info["attack"]["budget_spent"] == pytest.approx(0.1, rel=1e-4)


def test_the_right_order_is_enforced() -> None:
    noisy = NoiseObservation(gym.make("CartPole-v1"), rrl.Gaussian(0.1))
    with pytest.raises(ChainError, match="environment -> attack -> noise -> frame stack"):
        AttackObservation(noisy, PGD, STEP, victim=CARTPOLE)
    stacked = gym.wrappers.FrameStackObservation(gym.make("CartPole-v1"), 2)
    with pytest.raises(ChainError, match="outside the frame stack"):
        AttackObservation(stacked, PGD, STEP)
    assert isinstance(add_noise(cartpole(), rrl.Gaussian(0.1)), NoiseObservation)


def test_off_policy_learners_store_what_was_delivered() -> None:
    def learner(venv: Any) -> DQN:
        return DQN("MlpPolicy", venv, seed=0, learning_starts=1000, buffer_size=200)

    inside = VecAttack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), Push(), ThreatModel(norm=math.inf, step=50.0))
    model = learner(VecNormalize(inside, norm_reward=False))
    model.learn(60)
    assert model.replay_buffer.observations[:50].min() > 40
    inner = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), norm_reward=False, training=False)
    outside = VecAttack(inner, PGD, ThreatModel(norm=math.inf, step=0.1, units="normalized"))
    with pytest.raises(ChainError, match="replay buffer would get the observations"):
        outside.victim = learner(outside)


def test_adversarial_training_is_learning_behind_the_attack() -> None:
    venv = VecAttack(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), GradientAttack(Margin(), steps=2), STEP, seed=0)
    model = PPO("MlpPolicy", venv, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
    with pytest.raises(ValueError, match="victim must be given"):
        model.learn(64)
    venv.victim = model
    before = venv.victim.fingerprint()
    model.learn(128)
    assert venv.victim.fingerprint() != before  # it follows the weights
    infos = venv.step(np.zeros(2, dtype=np.int64))[3]
    assert all(info["attack"]["attacked"] for info in infos)
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.policy.parameters())


def test_the_attack_leaves_gradients_and_modes_of_a_learner_alone() -> None:
    env = gym.make("Pendulum-v1")
    model = SAC("MlpPolicy", env, buffer_size=10, seed=0)
    attacked = AttackObservation(env, GradientAttack(), STEP, victim=model)
    attacked.reset(seed=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.actor.parameters())


def test_an_attack_hurts_who_acts_behind_it() -> None:
    """The pole's own rule keeps it up for 200 steps; pushed by .3 in every entry it does not."""
    lengths = []
    for step in (0.0, 0.3):
        env = cartpole(threat=ThreatModel(norm=math.inf, step=step), attack=MinimalFlip(draws=1) if step else PGD)
        observation, _ = env.reset(seed=1)
        length, terminated = 0, False
        while not terminated and length < 200:
            action = int(CARTPOLE.scores(torch.as_tensor(observation[None])).argmax())
            observation, _, terminated, _, _ = env.step(action)
            length += 1
        lengths.append(length)
    assert lengths[0] > 2 * lengths[1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"attack": "pgd"}, TypeError, "attack must be a robustrl attack"),
        ({"threat": 0.1}, TypeError, "threat must be a ThreatModel"),
        ({"bounds": "wrap"}, ValueError, "bounds must be"),
        ({"delivery": "floor"}, ValueError, "delivery must be"),
        ({"victim": 3}, TypeError, "3|int"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cartpole(**options)


def test_spaces_without_a_norm_are_refused() -> None:
    with pytest.raises(TypeError, match="nothing there has a norm"):
        AttackObservation(gym.make("FrozenLake-v1"), Push(), STEP)
    with pytest.raises(TypeError, match="must be a gymnasium Env"):
        add_attack("CartPole-v1", Push(), STEP)


def test_an_episode_budget_needs_a_horizon() -> None:
    with pytest.raises(ValueError, match="horizon must be given"):
        AttackObservation(Steps(3), Push(), ThreatModel(norm=2, episode=1.0))


@pytest.mark.parametrize("host", ["vector", "sb3"])
def test_an_episodes_end_costs_no_other_slot_and_gives_it_nothing(host: str) -> None:
    """Four quarters of a budget of norm 2: the first slot's last frame is free, the other slot ends in between."""
    makers = [lambda length=length: gym.wrappers.TimeLimit(Steps(length), 6) for length in (5, 2)]
    threat = ThreatModel(norm=2, step=0.5, episode=1.0)
    if host == "vector":
        env: Any = add_attack(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), Push(), threat)
        seen = [env.reset(seed=0)[0]]
    else:
        env = VecAttack(DummyVecEnv(makers), Push(), threat)
        seen = [env.reset()]
    for step in range(4):
        observation, *_, info = env.step(np.zeros(2, dtype=np.int64))
        seen.append(observation)
        if step % 2:
            final = info["final_obs"][1] if host == "vector" else info[1]["terminal_observation"]
            assert final == pytest.approx(2.25, abs=1e-5)
    first, second = np.array(seen)[:, :, 0].T
    assert first == pytest.approx([0.25, 1.25, 2.25, 3.25, 4.0], abs=1e-5)
    assert second == pytest.approx([0.25, 1.25, 0.25, 1.25, 0.25], abs=1e-5)


def test_a_reset_after_an_episodes_last_step_gives_one_budget_not_two() -> None:
    env = vector(AutoresetMode.NEXT_STEP, 2)
    env = add_attack(env.env, Push(), ThreatModel(norm=2, episode=1.0))
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros(2, dtype=np.int64))
    assert env.reset()[0] == pytest.approx(0.5, abs=1e-5)
    observation, *_, info = env.step(np.zeros(2, dtype=np.int64))
    assert (observation == 1).all()
    assert info["attack"]["budget_spent"] == pytest.approx(1.0, abs=1e-5)


def test_a_seed_counts_for_one_reset_of_all_environments() -> None:
    """No running or later episode meets the same random perturbations again."""
    env = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Steps(9), 9)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    many = add_attack(env, RandomNoise(), STEP)
    first, _ = many.reset(seed=3)
    again, _ = many.reset(seed=3, options={"reset_mask": np.array([True, False])})
    assert not np.array_equal(again[0], first[0])
    assert np.array_equal(many.reset(seed=3)[0], first)
    venv = VecAttack(DummyVecEnv([lambda: Steps(3)]), RandomNoise(), STEP)
    venv.seed(3)
    assert not np.array_equal(venv.reset(), venv.reset())


def test_a_victim_whose_learner_switched_to_training_is_attacked_as_it_acts() -> None:
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    env = cartpole(victim=PolicyView.from_torch(network, kind="q", observation_shape=(4,)))
    before, _ = env.reset(seed=0)
    for part in env.victim.modules():
        part.training = True
    assert np.array_equal(env.reset(seed=0)[0], before)
    assert not any(part.training for part in env.victim.modules())


def test_a_clean_model_trains_on_behind_an_attack_that_keeps_the_space(tmp_path: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, device="cpu", seed=0).save(tmp_path / "clean.zip")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PPO.load(tmp_path / "clean.zip", env=rrl.make_vec_env("CartPole-v1", attack=PGD, threat=STEP), device="cpu")
    env = rrl.make_vec_env("CartPole-v1", attack=PGD, threat=STEP, bounds="clip", seed=0)
    model = PPO.load(tmp_path / "clean.zip", env=env, device="cpu")
    set_victim(env, model)
    before = PolicyView.of(model).fingerprint()
    model.learn(16)
    assert env.core.attacker.ledger.spent.max() > 0
    assert PolicyView.of(model).fingerprint() != before


def test_byte_pictures_stay_bytes_in_a_vector_environment_for_learners() -> None:
    threat = ThreatModel(norm=math.inf, step=4)
    env = rrl.make_vec_env(Pixels, max_episode_steps=20, attack=PGD, threat=threat, seed=0)
    assert env.observation_space == Pixels.observation_space
    model = PPO("CnnPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    set_victim(env, model)
    model.learn(16)
    assert env.core.attacker.ledger.spent == pytest.approx(4)
    spread = ThreatModel(2, step=3)  # over 30 entries: rounding takes all of it
    for delivery, norm in ((None, 0), ("round", 0), ("greedy", 3)):
        even = rrl.make_vec_env(Pictures, max_episode_steps=5, attack=Push(), threat=spread, delivery=delivery)
        even.reset()
        assert even.core.attacker.norms == pytest.approx(norm)
    floats = rrl.make_vec_env(Pixels, max_episode_steps=20, attack=PGD, threat=threat, delivery="float")
    assert floats.observation_space.dtype == np.float32


@pytest.mark.parametrize("delivery", ["round", "greedy"])
@pytest.mark.parametrize("threat", [ThreatModel(2, step=0.9), ThreatModel(1, episode=0.5), ThreatModel(math.inf, step=0.5)])
def test_a_budget_below_a_grey_level_is_warned_of(threat: ThreatModel, delivery: Any) -> None:
    with pytest.warns(UserWarning, match="less than one whole level: nothing is attacked"):
        env = add_attack(gym.wrappers.TimeLimit(Pictures(), 5), Push(), threat, delivery=delivery)
    env.reset(seed=0)
    *_, info = env.step(0)
    assert info["attack"]["norm"] == 0
    if threat.norm == math.inf:
        assert info["attack"]["eps_t"] == 0


def test_whole_levels_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # torch, about the scale
        add_attack(Pictures(), Push(), ThreatModel(2, step=1), delivery="round")
        add_attack(Pictures(), Push(), ThreatModel(0, step=1), delivery="round")
        add_attack(Pictures(), Push(), ThreatModel(2, step=0.9, scale=(2.0,) * 5), delivery="round")
        add_attack(Pictures(), Push(), ThreatModel(2, step=0.0), delivery="round")
        add_attack(Pictures(), Push(), ThreatModel(2, step=0.9))


def test_two_attacks_in_a_chain_are_refused() -> None:
    inside = add_attack(gym.make("CartPole-v1"), Push(), STEP)
    for env in (inside, SyncVectorEnv([lambda: inside]), DummyVecEnv([lambda: inside])):
        with pytest.raises(ChainError, match="budgets would add up"):
            add_attack(env, Push(), STEP)


def test_a_victim_with_a_memory_is_refused_before_the_first_step() -> None:
    victim = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(TypeError, match="victim must have no memory.*attack_policy"):
        cartpole(victim=victim)
    env = rrl.make_vec_env("CartPole-v1", attack=PGD, threat=STEP)
    with pytest.raises(TypeError, match="victim must have no memory"):
        set_victim(env, victim)
    blind = rrl.make_vec_env("CartPole-v1", attack=RandomNoise(), threat=STEP, seed=0)
    set_victim(blind, victim)  # noise that looks at nobody
    with pytest.raises(TypeError, match="victim must have no memory"):
        blind.core.use(PGD)
    blind.reset()
    assert blind.core.attacker.norms.max() > 0


def test_what_asks_a_policy_nothing_can_attack_one_with_a_memory() -> None:
    victim = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu")
    game = rrl.envs.AdversaryVecEnv("CartPole-v1", victim, STEP, rrl.attacks.Perturbation(), 2, seed=0)
    attack = game.attack(PPO("MlpPolicy", game, n_steps=8, batch_size=16, device="cpu", seed=0))
    env = rrl.make_vec_env("CartPole-v1", attack=attack, threat=STEP, seed=0)
    set_victim(env, victim)
    env.reset()
    assert env.core.attacker.norms.max() > 0
    with pytest.raises(TypeError, match="victim must have no memory"):
        env.core.use(rrl.attacks.LearnedAttack(rrl.attacks.TargetAction(), adversary=victim))


def test_frames_stacked_outside_must_be_told_to_the_attack() -> None:
    def stacked(**options: Any) -> Any:
        return VecFrameStack(add_attack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), PGD, STEP, **options), 3)

    model = PPO("MlpPolicy", stacked(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ChainError, match=r'add_attack\(\.\.\., frame_stack=3, stack_padding="zero"\)'):
        set_victim(stacked(), model)
    env = stacked(frame_stack=3, stack_padding="zero")
    set_victim(env, model)
    env.reset()
    alone = gym.wrappers.FrameStackObservation(add_attack(gym.make("CartPole-v1"), PGD, STEP), 2)
    pair = PolicyView.from_torch(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 2)), kind="q", observation_shape=(2, 4)
    )
    with pytest.raises(ChainError, match=r'add_attack\(\.\.\., frame_stack=2, stack_padding="reset"\)'):
        set_victim(alone, pair)


def test_stacked_dictionaries_are_refused_as_such() -> None:
    env = VecFrameStack(add_attack(DummyVecEnv([Two]), PGD, STEP), 2)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match="the model takes 'a' of shape"):
        set_victim(env, model)
