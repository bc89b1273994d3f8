"""What off-policy learners really store: SB3 keeps the observations as they were inside a VecNormalize, wherever it sits."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from robustrl.envs import EnvRecipe, check_chain, make_vec_env, sb3
from robustrl.envs.chain import check_order
from robustrl.errors import ChainError
from robustrl.noise import Gaussian
from robustrl.policy import Normalization

NOISE, LENGTH, STEPS = Gaussian(0.3), 5, 60
STATISTICS = Normalization(np.full(2, 0.5), np.full(2, 4.0))
CLEAN = np.float32(0.25)
"""The true observation, always: what differs from it is noise."""


class Still(gym.Env[Any, Any]):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, continuous: bool = False) -> None:
        self.action_space = spaces.Box(-1, 1, (1,), np.float32) if continuous else spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.full(2, CLEAN), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full(2, CLEAN), 1.0, False, False, {}


def limited(continuous: bool = False) -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Still(continuous), LENGTH)


def frozen(env: Any, **options: Any) -> VecNormalize:
    """A VecNormalize with our statistics that does not learn."""
    wrapped = VecNormalize(env, training=False, **options)
    wrapped.obs_rms.mean, wrapped.obs_rms.var = STATISTICS.mean, STATISTICS.var  # type: ignore[union-attr]
    return wrapped


def stored(algorithm: Any, env: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the learner wrote down in a short run without updates: observations, and the next ones (n, size)."""
    options = {"buffer_size": STEPS, "learning_starts": 10_000, "policy_kwargs": {"net_arch": [4]}, "device": "cpu", "seed": 0}
    buffer = algorithm("MlpPolicy", env, **options).learn(STEPS).replay_buffer
    assert buffer.pos == 0  # full
    return buffer.observations[:, 0], buffer.next_observations[:, 0]


def noise_of(seen: np.ndarray, clean: np.ndarray) -> float:
    return float((seen - clean).std())


@pytest.mark.parametrize("algorithm", [SAC, DQN])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_noise_outside_a_vec_normalize_never_reaches_the_replay_buffer_and_is_refused(algorithm: Any, norm_obs: bool) -> None:
    """The experiment, then the refusal; a VecNormalize of rewards alone hides the noise just as well."""
    make = partial(limited, algorithm is SAC)
    inside = frozen(DummyVecEnv([make])) if norm_obs else VecNormalize(DummyVecEnv([make]), training=False, norm_obs=False)
    env = sb3.NoiseObservation(inside, NOISE, seed=0)
    now, then = stored(algorithm, env)
    ends = np.arange(LENGTH - 1, STEPS, LENGTH)  # terminal observations come another way, with noise
    going_on = np.setdiff1d(np.arange(STEPS), ends)
    assert np.all(now == CLEAN)
    assert np.all(then[going_on] == CLEAN)
    assert np.all(then[ends] != CLEAN)
    assert check_chain(env).noise == NOISE  # for certificates and on-policy learners nothing is wrong
    for check in (check_chain, check_order):
        with pytest.raises(
            ChainError,
            match=r"^NoiseObservation outside VecNormalize with an off-policy learner: .*put VecNormalize outermost, or",
        ):
            check(env, off_policy=True)  # type: ignore[operator]


@pytest.mark.parametrize("algorithm", [SAC, DQN])
def test_a_vec_normalize_outside_the_noise_stores_noisy_observations(algorithm: Any) -> None:
    """SB3 stores them unnormalised and normalises what it samples."""
    env = frozen(sb3.NoiseObservation(DummyVecEnv([partial(limited, algorithm is SAC)]), NOISE, seed=0))
    assert check_chain(env, off_policy=True).noise == NOISE
    for seen in stored(algorithm, env):
        assert noise_of(seen, CLEAN) == pytest.approx(0.3, rel=0.25)
        assert len(np.unique(seen, axis=0)) == STEPS


@pytest.mark.parametrize("algorithm", [SAC, DQN])
@pytest.mark.parametrize("where", ["before_noise", "after_noise"])
def test_a_frozen_normalisation_of_make_vec_env_stores_noisy_observations(algorithm: Any, where: Any) -> None:
    recipe = EnvRecipe(
        factory=partial(Still, algorithm is SAC),
        max_episode_steps=LENGTH,
        noise=NOISE,
        normalization=STATISTICS,
        normalize=where,
    )
    env = make_vec_env(recipe, seed=0)
    assert check_chain(env, off_policy=True).noise == NOISE
    clean, sigma = STATISTICS(np.full((1, 2), CLEAN)), 0.3 if where == "before_noise" else 0.15
    for seen in stored(algorithm, env):
        assert noise_of(seen, clean) == pytest.approx(sigma, rel=0.25)
        assert len(np.unique(seen, axis=0)) == STEPS


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda env: VecFrameStack(frozen(env), 2), "VecFrameStack"),
        (lambda env: sb3.FrameStack(frozen(env), 2), "FrameStack"),
        (lambda env: sb3.FrameStack(sb3.NoiseObservation(frozen(env), NOISE), 2), "NoiseObservation"),
    ],
)
def test_frame_stacks_outside_a_vec_normalize_are_refused_for_off_policy_learners(wrap: Any, name: str) -> None:
    env = wrap(DummyVecEnv([limited]))
    check_chain(env)
    with pytest.raises(ChainError, match=f"^{name} outside VecNormalize with an off-policy learner"):
        check_chain(env, off_policy=True)


def test_a_vec_normalize_that_still_learns_is_refused_for_every_learner() -> None:
    noisy = sb3.NoiseObservation(DummyVecEnv([limited]), NOISE)
    for off_policy in (False, True):
        with pytest.raises(ChainError, match=r"VecNormalize still updates its statistics.*freeze it \(training=False"):
            check_chain(VecNormalize(noisy), off_policy=off_policy)


def test_on_policy_learners_see_the_noise_in_either_order() -> None:
    """The control: PPO takes what the chain gives."""
    for env in (
        sb3.NoiseObservation(frozen(DummyVecEnv([limited])), NOISE, seed=0),
        frozen(sb3.NoiseObservation(DummyVecEnv([limited]), NOISE, seed=0)),
    ):
        model: Any = PPO(
            "MlpPolicy", env, n_steps=STEPS, batch_size=STEPS, n_epochs=1, policy_kwargs={"net_arch": [4]}, device="cpu"
        )
        model.learn(STEPS)
        assert len(np.unique(model.rollout_buffer.observations.reshape(STEPS, 2), axis=0)) == STEPS
