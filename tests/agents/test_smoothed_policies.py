"""SmoothedAgent for every kind of policy: continuous, recurrent, of dictionaries, of images, behind a normalisation."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from robustrl.agents import SmoothedAgent
from robustrl.envs import EnvRecipe
from robustrl.envs.joint import join, split
from robustrl.noise import Gaussian, Uniform
from robustrl.policy import Normalization, PolicyView
from robustrl.seeding import torch_generator

NOISE, LENGTH, SIDE = Gaussian(0.4), 6, 36
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
SEVERAL = spaces.Dict([("zeta", VECTOR), ("alpha", spaces.Box(-1, 1, (2, 2), np.float32))])  # not in alphabetical order
UNIT = spaces.Box(0, 1, (SIDE, SIDE, 1), np.float32)
BYTES = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
CAMERA = spaces.Dict({"image": UNIT, "pose": VECTOR})
BYTE_CAMERA = spaces.Dict({"image": BYTES, "pose": VECTOR})
ACTIONS = spaces.Box(np.float32([[-1, 0], [2, -3]]), np.float32([[2, 0.5], [3, -1]]))
STATISTICS = Normalization([0.2, -0.1, 0.0], [0.1, 0.5, 2.0], clip=2.0)


class Random(gym.Env[Any, Any]):
    """Random observations from the environment's generator; the reward is the sum of the action; LENGTH steps."""

    def __init__(self, space: Any = VECTOR, actions: Any = ACTIONS) -> None:
        self.observation_space, self.action_space = space, actions

    def _draw(self) -> Any:
        parts = self.observation_space if isinstance(self.observation_space, spaces.Dict) else {"": self.observation_space}
        drawn: Any = {key: self.np_random.uniform(part.low, part.high).astype(part.dtype) for key, part in parts.items()}  # type: ignore[attr-defined]
        return drawn.get("", drawn)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self._steps += 1
        return self._draw(), float(np.sum(action)), self._steps == LENGTH, False, {}


def build(algorithm: Any, space: Any = VECTOR, actions: Any = ACTIONS, *, policy: str = "", **options: Any) -> Any:
    multi, images = isinstance(space, spaces.Dict), space.shape is not None and len(space.shape) == 3
    name = (
        policy
        or ("MultiInput" if multi else "Cnn" if images else "Mlp") + ("Lstm" if algorithm is RecurrentPPO else "") + "Policy"
    )
    kwargs: dict[str, Any] = {"net_arch": [16]}
    if algorithm is RecurrentPPO:
        kwargs |= {"lstm_hidden_size": 8}
    if images:
        kwargs |= {"features_extractor_kwargs": {"features_dim": 8}}
    sizes: dict[str, Any] = {"buffer_size": 2} if algorithm in (SAC, TD3, DDPG, DQN) else {"n_steps": 2, "batch_size": 2}
    model = algorithm(name, Random(space, actions), policy_kwargs=kwargs, device="cpu", seed=0, **sizes, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


MODELS: dict[str, Any] = {
    "PPO": lambda: build(PPO),
    "SAC": lambda: build(SAC),
    "TD3": lambda: build(TD3),
    "DDPG": lambda: build(DDPG),
    "SAC gSDE": lambda: build(SAC, use_sde=True),
    "DQN": lambda: build(DQN, actions=spaces.Discrete(4)),
    "RecurrentPPO": lambda: build(RecurrentPPO),
    "RecurrentPPO discrete": lambda: build(RecurrentPPO, actions=spaces.Discrete(4)),
    "PPO of dictionaries": lambda: build(PPO, SEVERAL),
    "RecurrentPPO of dictionaries": lambda: build(RecurrentPPO, SEVERAL),
    "PPO, normalised": lambda: build(PPO),
    "RecurrentPPO, normalised": lambda: build(RecurrentPPO),
}


@cache
def model_of(name: str) -> Any:
    return MODELS[name]()


def agent_of(name: str, seed: int = 7, **options: Any) -> SmoothedAgent:
    normalization = STATISTICS if "normalised" in name else None
    return SmoothedAgent(model_of(name), NOISE, seed=seed, normalization=normalization, **options)


class ByHand:
    """Normalise, add noise, and let SB3's own `predict` act on the result."""

    def __init__(self, name: str, seed: int = 7) -> None:
        self.model, self.state = model_of(name), None
        self.normalization = STATISTICS if "normalised" in name else None
        self.generator = torch_generator(np.random.SeedSequence(seed).spawn(2)[0])

    def act(self, observation: Any, starts: np.ndarray) -> np.ndarray:
        space = self.model.observation_space
        frames = join(observation, space)
        if self.normalization is not None:
            frames = (
                ((frames - self.normalization.mean) / np.sqrt(self.normalization.var + 1e-8)).clip(-2, 2).astype(np.float32)
            )
        noisy = NOISE.perturb(torch.from_numpy(frames), self.generator).numpy()
        actions, self.state = self.model.predict(
            split(noisy, space), state=self.state, episode_start=starts, deterministic=True
        )
        return actions  # type: ignore[no-any-return]


def vec_env(name: str, n: int, seed: int = 3) -> Any:
    model = model_of(name)
    env = DummyVecEnv([lambda: Random(model.observation_space, model.action_space)] * n)
    env.seed(seed)
    return env


@pytest.mark.parametrize("name", MODELS)
def test_it_acts_as_a_loop_written_by_hand(name: str) -> None:
    """Three environments side by side, over the ends of episodes, in which a memory starts afresh."""
    smoothed, hand, env = agent_of(name), ByHand(name), vec_env(name, 3)
    observation, starts, state = env.reset(), np.ones(3, dtype=bool), None
    acted = []
    for _ in range(2 * LENGTH + 2):
        expected = hand.act(observation, starts)
        actions, state = smoothed.predict(observation, state, starts, deterministic=True)
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=2e-6)
        assert actions.dtype == expected.dtype
        acted.append(actions)
        observation, _, starts, _ = env.step(actions)
    assert len(np.unique(np.concatenate(acted), axis=0)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_its_returns_in_evaluate_policy_are_those_of_a_loop_written_by_hand(name: str) -> None:
    returns, lengths = evaluate_policy(agent_of(name), vec_env(name, 1), 4, return_episode_rewards=True, warn=False)
    env, hand = vec_env(name, 1), ByHand(name)
    observation, starts, by_hand = env.reset(), np.ones(1, dtype=bool), np.zeros(4)
    for step in range(4 * LENGTH):
        observation, rewards, starts, _ = env.step(hand.act(observation, starts))
        by_hand[step // LENGTH] += rewards[0]
    assert lengths == [LENGTH] * 4
    np.testing.assert_allclose(returns, by_hand, rtol=1e-5, atol=1e-4)


def test_without_its_memory_a_recurrent_agent_acts_otherwise() -> None:
    env = vec_env("RecurrentPPO", 3)
    smoothed, forgetful = agent_of("RecurrentPPO"), agent_of("RecurrentPPO")
    observation, state = env.reset(), None
    for _ in range(4):
        actions, state = smoothed.predict(observation, state, deterministic=True)
        other, _ = forgetful.predict(observation, None, deterministic=True)
        observation, *_ = env.step(actions)
    assert not np.allclose(actions, other)
    assert state is not None
    assert [part.shape for part in state] == [(3, 1, 3), (3, 2, 1, 8)]


@pytest.mark.parametrize("name", MODELS)
def test_one_observation_gives_one_action(name: str) -> None:
    env = Random(model_of(name).observation_space, model_of(name).action_space)
    observation, _ = env.reset(seed=0)
    single, state = agent_of(name).predict(observation, deterministic=True)
    assert env.action_space.contains(single)
    batch = {k: v[None] for k, v in observation.items()} if isinstance(observation, dict) else observation[None]
    np.testing.assert_array_equal(agent_of(name).predict(batch, deterministic=True)[0][0], single)
    again, _ = agent_of(name, seed=8).predict(observation, state, deterministic=True)
    assert np.shape(again) == np.shape(single)


@pytest.mark.parametrize("name", ["PPO", "SAC", "RecurrentPPO", "PPO of dictionaries"])
def test_sampled_actions_stay_in_the_space_and_repeat_with_the_seed(name: str) -> None:
    observation = vec_env(name, 50).reset()
    first, _ = agent_of(name).predict(observation)
    assert all(ACTIONS.contains(row) for row in first)
    assert np.array_equal(first, agent_of(name).predict(observation)[0])
    assert not np.allclose(first, agent_of(name).predict(observation, deterministic=True)[0])


def test_state_dependent_exploration_is_greedy_or_refused() -> None:
    observation = vec_env("SAC gSDE", 2).reset()
    with pytest.raises(ValueError, match="^deterministic must be True"):
        agent_of("SAC gSDE").predict(observation, deterministic=False)


# ------------------------------------------------------------------------------------------- images and layouts


def test_a_model_of_byte_images_is_smoothed_on_pixels_in_the_unit_interval() -> None:
    model, sigma = build(PPO, BYTES), Gaussian(0.05)
    smoothed = SmoothedAgent(model, sigma, observation_space=UNIT, seed=0)
    frames = np.random.default_rng(0).random((4, SIDE, SIDE, 1), dtype=np.float32)
    noisy = sigma.perturb(torch.from_numpy(frames), torch_generator(np.random.SeedSequence(0).spawn(2)[0]))
    view = PolicyView.from_sb3(model, frame_space=UNIT)
    expected = view.received(view.act_blocked(noisy[:, None], batch=4))
    np.testing.assert_allclose(smoothed.predict(frames, deterministic=True)[0], expected, atol=1e-6)
    assert evaluate_policy(smoothed, Random(UNIT), 1, warn=False)[0] != 0


def test_images_in_dictionaries_are_taken_as_the_environment_gives_them() -> None:
    model = build(PPO, BYTE_CAMERA)
    smoothed = SmoothedAgent(model, Gaussian(0.0), observation_space=CAMERA, seed=0)
    grey = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 1), dtype=np.uint8)
    pose = np.random.default_rng(1).random((4, 3), dtype=np.float32)
    actions, _ = smoothed.predict({"image": grey.astype(np.float32) / 255, "pose": pose}, deterministic=True)
    expected, _ = model.predict({"image": np.moveaxis(grey, -1, 1), "pose": pose}, deterministic=True)
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    assert np.std(expected, axis=0).max() > 1e-3


def test_a_view_behind_a_normalisation_outside_the_noise_can_be_smoothed() -> None:
    """The agent of a VecNormalize around the noise: raw frames, noise, normalisation, policy."""
    model = model_of("PPO")
    recipe = EnvRecipe(factory=Random, max_episode_steps=LENGTH, normalization=STATISTICS, normalize="after_noise")
    smoothed = SmoothedAgent(recipe.view(model), NOISE, seed=7)
    frames = np.random.default_rng(0).random((5, 3), dtype=np.float32)
    noisy = NOISE.perturb(torch.from_numpy(frames), torch_generator(np.random.SeedSequence(7).spawn(2)[0])).numpy()
    expected, _ = model.predict(STATISTICS(noisy), deterministic=True)
    np.testing.assert_allclose(smoothed.predict(frames, deterministic=True)[0], expected, atol=1e-6)


def test_a_view_of_dictionaries_needs_their_space() -> None:
    view = PolicyView.from_sb3(model_of("PPO of dictionaries"))
    observation = vec_env("PPO of dictionaries", 2).reset()
    with pytest.raises(ValueError, match=r"^observation must fit None, got the keys \['alpha', 'zeta'\]"):
        SmoothedAgent(view, NOISE).predict(observation)
    actions, _ = SmoothedAgent(view, NOISE, seed=7, observation_space=SEVERAL).predict(observation, deterministic=True)
    assert np.array_equal(actions, agent_of("PPO of dictionaries").predict(observation, deterministic=True)[0])
    joint = join(observation, SEVERAL)  # the joint vector is an observation, too
    assert np.array_equal(actions, SmoothedAgent(view, NOISE, seed=7).predict(joint, deterministic=True)[0])


# -------------------------------------------------------------------------------------------------- bad inputs


def dictionary(**parts: Any) -> dict[str, Any]:
    return {"zeta": np.zeros((2, 3), np.float32), "alpha": np.zeros((2, 2, 2), np.float32)} | parts


def predicted(name: str, observation: Any, *rest: Any, **options: Any) -> Any:
    return lambda: agent_of(name).predict(observation, *rest, **options)


STATE = (np.zeros((2, 1, 3), np.float32), np.zeros((2, 2, 1, 8), np.float32))
BAD: list[tuple[Any, type[Exception], str]] = [
    (predicted("PPO of dictionaries", {"zeta": np.zeros((2, 3), np.float32)}), ValueError, r"^observation must fit Dict\('zeta'.*got the keys \['zeta'\]"),
    (predicted("PPO of dictionaries", dictionary(beta=1)), ValueError, r"got the keys \['alpha', 'beta', 'zeta'\]"),
    (predicted("PPO of dictionaries", dictionary(alpha=np.zeros((2, 4), np.float32))), ValueError, r"or a batch of it, got shapes .*'alpha': \(2, 4\)"),
    (predicted("PPO of dictionaries", dictionary(alpha=np.zeros((3, 2, 2), np.float32))), ValueError, "or a batch of it, got shapes"),
    (predicted("PPO of dictionaries", dictionary(zeta=np.zeros(3, np.float32))), ValueError, "or a batch of it, got shapes"),
    (predicted("PPO of dictionaries", dictionary(zeta=np.full((2, 3), math.nan))), ValueError, "^observation must be finite"),
    (predicted("PPO of dictionaries", np.zeros((2, 6), np.float32)), ValueError, r"^observation must have shape \(7,\) or"),
    (predicted("PPO", dictionary()), ValueError, "^observation must fit Box"),
    (predicted("PPO", np.zeros((2, 4), np.float32)), ValueError, r"^observation must have shape \(3,\) or"),
    (predicted("PPO, normalised", np.full((2, 3), math.inf)), ValueError, "^observation must be finite"),
    (predicted("PPO", np.zeros((0, 3), np.float32)), ValueError, "^batch must be"),
    (predicted("RecurrentPPO", np.zeros((2, 3), np.float32), (STATE[0],)), ValueError, r"^state holds arrays of shapes \[\(2, 1, 3\)\], but .* need \[\(2, 1, 3\), \(2, 2, 1, 8\)\]"),
    (predicted("RecurrentPPO", np.zeros((2, 3), np.float32), (STATE[0], STATE[1][:1])), ValueError, r"^state holds arrays of shapes .*\(1, 2, 1, 8\)\]"),
    (predicted("RecurrentPPO", np.zeros((3, 3), np.float32), STATE), ValueError, r"^state holds arrays of shapes \[\(2, 1, 3\)"),
    (predicted("RecurrentPPO", np.zeros((2, 3), np.float32), STATE, np.ones(3, dtype=bool)), ValueError, r"^episode_start must have shape \(2,\)"),
    (lambda: SmoothedAgent(model_of("PPO"), NOISE, normalization=Normalization([0.0], [1.0])).predict(np.zeros((2, 3), np.float32)), ValueError, "normalization has statistics of shape"),
    (lambda: SmoothedAgent(model_of("PPO"), NOISE, normalization=0.5), TypeError, "^normalization must be a robustrl Normalization"),  # type: ignore[arg-type]
    (lambda: SmoothedAgent(model_of("PPO"), NOISE, observation_space=spaces.Box(-1, 1, (4,), np.float32)), ValueError, r"takes observations of shape \(3,\), which 1 frame"),
    (lambda: SmoothedAgent(PolicyView.from_sb3(model_of("PPO")), NOISE, observation_space=SEVERAL), ValueError, r"^observation_space must hold frames of shape \(3,\)"),
    (lambda: SmoothedAgent(model_of("PPO"), NOISE, observation_space=spaces.Discrete(3)), TypeError, "observations must be a Box space or a Dict"),
    (lambda: SmoothedAgent(model_of("PPO of dictionaries"), NOISE, frame_stack=2), ValueError, "^n_frames must be 1 for a model of dictionaries"),
    (lambda: SmoothedAgent(model_of("PPO").policy, NOISE), TypeError, "^model must be a Stable-Baselines3 model"),
    (lambda: SmoothedAgent(build(PPO, spaces.Dict({"a": VECTOR, "n": spaces.Discrete(3)})), NOISE), TypeError, "observations must be a Box space or a Dict of them"),
    (lambda: SmoothedAgent(model_of("PPO"), Uniform), TypeError, "^noise must be a robustrl noise mechanism"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("use", "kind", "message"), BAD)
def test_what_does_not_fit_is_refused(use: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        use()
