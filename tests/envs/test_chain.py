"""The chain validator: every order that breaks the proof is refused, by the name of the wrapper at fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorObservationWrapper, VectorWrapper
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, EpisodicLifeEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from robustrl.envs import NoiseObservation, add_noise, check_chain, make_vec_env, sb3, vector
from robustrl.envs.chain import find_horizon, layers_of
from robustrl.envs.single import RewardProbe
from robustrl.errors import ChainError
from robustrl.noise import Gaussian

NOISE = Gaussian(0.2)
RIGHT_ORDER = "the right order is environment -> attack -> noise -> frame stack"


class Attack(gym.Wrapper[Any, Any, Any, Any]):
    chain_role = "attack"


class VectorAttack(VectorWrapper[Any, Any, Any, Any, Any]):
    chain_role = "attack"


class MyStack(wrappers.FrameStackObservation[Any, Any, Any]):
    """A user's subclass under another name."""


class GreyLevels(gym.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, env.observation_space.shape, np.uint8)

    def observation(self, observation: Any) -> Any:
        return np.clip(observation, 0, 255).astype(np.uint8)


class BackToFloat(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, env.observation_space.shape, np.float32)


def cartpole(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", **kwargs)


def endless() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=-1)


def noisy(env: Any) -> Any:
    return NoiseObservation(env, NOISE)


def sync(make: Callable[[], Any] = cartpole) -> SyncVectorEnv:
    return SyncVectorEnv([make] * 2)


def dummy(make: Callable[[], Any] = cartpole) -> DummyVecEnv:
    return DummyVecEnv([make] * 2)


def identity(x: Any) -> Any:
    return x


def tripled(x: Any) -> Any:
    return 3 * x


GOOD: dict[str, Callable[[], Any]] = {
    "clean": cartpole,
    "noise": lambda: noisy(cartpole()),
    "attack, noise, stack": lambda: wrappers.FrameStackObservation(noisy(Attack(cartpole())), 4),
    "monitor inside": lambda: noisy(wrappers.TransformReward(RewardProbe(cartpole()), identity)),
    "monitor between attack and noise": lambda: noisy(Monitor(Attack(cartpole()))),
    "reshaping between attack and noise": lambda: noisy(wrappers.ReshapeObservation(Attack(cartpole()), (2, 2))),
    "observations computed inside the attack": lambda: noisy(Attack(wrappers.TransformObservation(cartpole(), tripled, None))),
    "frozen normaliser": lambda: noisy(_frozen(wrappers.NormalizeObservation(cartpole()))),
    "vector": lambda: vector.NoiseObservation(VectorAttack(sync()), NOISE),
    "vector, native": lambda: vector.NoiseObservation(gym.make_vec("CartPole-v1", 2, "vector_entry_point"), NOISE),
    "sb3": lambda: sb3.FrameStack(sb3.NoiseObservation(dummy(lambda: Monitor(Attack(cartpole()))), NOISE), 3),
    "sb3's own stack": lambda: VecFrameStack(sb3.NoiseObservation(dummy(), NOISE), 3),
    "make_vec_env": lambda: make_vec_env("CartPole-v1", 2, noise=NOISE, frame_stack=5),
}


def _frozen(env: Any) -> Any:
    env.update_running_mean = False
    return env


@pytest.mark.parametrize("name", list(GOOD))
def test_right_orders_pass(name: str) -> None:
    chain = check_chain(GOOD[name]())
    assert chain.horizon == 500
    assert chain.noise == (None if name == "clean" else NOISE)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    # each frame would be shown several times through fresh noise
    "noise after gymnasium's stack": (
        lambda: noisy(wrappers.FrameStackObservation(cartpole(), 4)),
        f"noise after frame stacking in .*FrameStackObservation -> NoiseObservation: .*{RIGHT_ORDER}",
    ),
    "noise after a subclass of it": (
        lambda: noisy(MyStack(cartpole(), 4)),
        "noise after frame stacking in .*MyStack -> NoiseObservation",
    ),
    "noise after a stack further in": (
        lambda: noisy(wrappers.TransformReward(wrappers.FrameStackObservation(cartpole(), 4), identity)),
        "noise after frame stacking",
    ),
    "noise after a stack in each environment of a vector": (
        lambda: vector.NoiseObservation(sync(lambda: wrappers.FrameStackObservation(cartpole(), 4)), NOISE),
        "noise after frame stacking in .*FrameStackObservation -> SyncVectorEnv -> NoiseObservation",
    ),
    "noise after sb3's stack": (
        lambda: sb3.NoiseObservation(VecFrameStack(dummy(), 4), NOISE),
        "noise after frame stacking in .*VecFrameStack",
    ),
    "noise after our stack": (lambda: sb3.NoiseObservation(sb3.FrameStack(dummy(), 4), NOISE), "noise after frame stacking"),
    # the attacker would see the noise
    "attack outside noise": (
        lambda: Attack(noisy(cartpole())),
        f"attack outside the noise in .*NoiseObservation -> Attack: .*{RIGHT_ORDER}",
    ),
    "one attack inside, one outside": (lambda: Attack(noisy(Attack(cartpole()))), "attack outside the noise"),
    "attack outside noise, vector": (
        lambda: VectorAttack(vector.NoiseObservation(sync(), NOISE)),
        "attack outside the noise in .*VectorAttack",
    ),
    # statistics that still move leak clean observations
    "trainable VecNormalize outside": (
        lambda: VecNormalize(sb3.NoiseObservation(dummy(), NOISE)),
        r"VecNormalize still updates its statistics.*freeze it \(training=False",
    ),
    "trainable VecNormalize inside": (lambda: sb3.NoiseObservation(VecNormalize(dummy()), NOISE), "VecNormalize still updates"),
    "trainable NormalizeObservation": (
        lambda: noisy(wrappers.NormalizeObservation(cartpole())),
        "NormalizeObservation still updates",
    ),
    "trainable vector NormalizeObservation": (
        lambda: vector.NoiseObservation(vector_wrappers.NormalizeObservation(sync()), NOISE),
        "NormalizeObservation still updates",
    ),
    # rounding between attack and noise
    "integers between attack and noise": (
        lambda: noisy(BackToFloat(wrappers.TransformReward(GreyLevels(Attack(cartpole())), identity))),
        "GreyLevels computes new observations between the attack and the noise",
    ),
    "attack on integers": (
        lambda: noisy(BackToFloat(Attack(GreyLevels(cartpole())))),
        r"Attack has an integer observation space \(uint8\) between the attack and the noise.*convert to float before the attack point",
    ),
    # another scale between attack and noise
    "rescaling between attack and noise": (
        lambda: noisy(wrappers.TransformObservation(Attack(cartpole()), tripled, None)),
        "TransformObservation computes new observations between the attack and the noise.*put it inside the attack or outside the noise",
    ),
    "frozen normaliser between attack and noise": (
        lambda: noisy(_frozen(wrappers.NormalizeObservation(Attack(cartpole())))),
        "NormalizeObservation computes new observations between the attack and the noise",
    ),
    "frozen VecNormalize between attack and noise": (
        lambda: sb3.NoiseObservation(VecNormalize(dummy(lambda: Attack(cartpole())), training=False, norm_reward=False), NOISE),
        "VecNormalize computes new observations between the attack and the noise",
    ),
    "vector transformation between attack and noise": (
        lambda: vector.NoiseObservation(vector_wrappers.TransformObservation(VectorAttack(sync()), tripled), NOISE),
        "TransformObservation computes new observations between",
    ),
    # returns must be the environment's
    "clipped rewards inside the monitor": (
        lambda: noisy(Monitor(ClipRewardEnv(cartpole()))),
        "ClipRewardEnv changes rewards inside the return monitor .*put the monitor nearer to the environment",
    ),
    "any RewardWrapper inside the monitor": (
        lambda: wrappers.RecordEpisodeStatistics(wrappers.TransformReward(cartpole(), identity)),
        "TransformReward changes rewards inside the return monitor",
    ),
    "vector reward wrapper inside the monitor": (
        lambda: vector_wrappers.RecordEpisodeStatistics(vector_wrappers.ClipReward(sync(), -1, 1)),
        "ClipReward changes rewards inside the return monitor",
    ),
    "normalised rewards inside a VecMonitor": (
        lambda: VecMonitor(VecNormalize(dummy(), training=False, norm_obs=False)),
        "VecNormalize changes rewards inside the return monitor",
    ),
    "life loss inside the monitor": (
        lambda: Monitor(_episodic_life()),
        "EpisodicLifeEnv changes rewards inside the return monitor",
    ),
    # and the rest
    "no finite horizon": (
        lambda: noisy(endless()),
        "no finite horizon: wrap it in gymnasium.wrappers.TimeLimit or pass max_episode_steps=",
    ),
    "two noises": (
        lambda: noisy(noisy(cartpole())),
        "two noise wrappers in .*NoiseObservation -> NoiseObservation: .*keep one",
    ),
    "two noises in two layers": (lambda: sb3.NoiseObservation(dummy(lambda: noisy(cartpole())), NOISE), "two noise wrappers"),
    "odd one out": (
        lambda: DummyVecEnv([cartpole, lambda: Attack(cartpole())]),
        "environment 1 of DummyVecEnv has other wrappers than environment 0: .*Attack",
    ),
}


def _episodic_life() -> gym.Env[Any, Any]:
    env = EpisodicLifeEnv.__new__(EpisodicLifeEnv)  # its constructor needs an Atari emulator
    gym.Wrapper.__init__(env, cartpole())
    return env


@pytest.mark.parametrize("name", list(BAD))
def test_wrong_orders_are_refused_by_name(name: str) -> None:
    make, message = BAD[name]
    env = make()
    with pytest.raises(ChainError, match=f"(?s){message}"):
        check_chain(env)


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("noise after")])
def test_adding_noise_in_the_wrong_place_is_refused_at_once(name: str) -> None:
    wrapped = BAD[name][0]()
    inner = wrapped.venv if hasattr(wrapped, "venv") else wrapped.env
    with pytest.raises(ChainError, match="noise after frame stacking"):
        add_noise(inner, NOISE)


def test_vectorised_emulators_that_stack_frames_themselves_count_as_frame_stacks() -> None:
    class Emulator(VectorEnv[Any, Any, Any]):
        num_envs, stack_num, max_episode_steps = 2, 4, 100
        single_observation_space = spaces.Box(0, 1, (4, 3), np.float32)
        observation_space = spaces.Box(0, 1, (2, 4, 3), np.float32)

    with pytest.raises(ChainError, match="noise after frame stacking in Emulator -> NoiseObservation"):
        add_noise(Emulator(), NOISE)
    Emulator.stack_num = 1
    assert check_chain(add_noise(Emulator(), NOISE)).horizon == 100


def test_vector_wrappers_between_host_and_environments_are_not_skipped() -> None:
    class Double(VectorObservationWrapper[Any, Any, Any, Any]):
        def observations(self, observations: Any) -> Any:
            return 2 * observations

    names = [layer.name for layer in layers_of(Double(VectorAttack(sync())))]
    assert names[-3:] == ["SyncVectorEnv", "VectorAttack", "Double"]
    with pytest.raises(ChainError, match="Double computes new observations"):
        check_chain(vector.NoiseObservation(Double(VectorAttack(sync())), NOISE))


def test_environments_in_other_processes_cannot_be_vouched_for() -> None:
    hidden = AsyncVectorEnv.__new__(AsyncVectorEnv)
    with pytest.raises(
        ChainError, match=r"AsyncVectorEnv runs its environments in other processes.*use DummyVecEnv / SyncVectorEnv"
    ):
        layers_of(hidden)
    with pytest.raises(ChainError, match="SubprocVecEnv runs its environments in other processes"):
        layers_of(SubprocVecEnv.__new__(SubprocVecEnv))


@pytest.mark.parametrize("env", [None, 3, "CartPole-v1", gym.Env])
def test_what_is_not_an_environment_is_a_type_error(env: Any) -> None:
    with pytest.raises(TypeError, match=r"^env must be a gymnasium Env or VectorEnv or an SB3 VecEnv"):
        check_chain(env)


def test_the_horizon_is_the_tightest_limit_of_the_chain() -> None:
    assert find_horizon(layers_of(endless())) is None
    assert find_horizon(layers_of(wrappers.TimeLimit(cartpole(max_episode_steps=70), 90))) == 70
    assert find_horizon(layers_of(wrappers.TimeLimit(noisy(cartpole()), 30))) == 30
    assert find_horizon(layers_of(gym.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=60))) == 60
    assert find_horizon(layers_of(dummy(lambda: cartpole(max_episode_steps=9)))) == 9


def test_a_chain_describes_itself_from_the_environment_outwards() -> None:
    text = str(check_chain(make_vec_env("CartPole-v1", noise=NOISE, max_episode_steps=200)))
    assert text == (
        "CartPoleEnv -> PassiveEnvChecker -> OrderEnforcing -> TimeLimit -> Monitor -> DummyVecEnv -> NoiseObservation"
        "  (noise: Gaussian(sigma=0.2), horizon: 200)"
    )
