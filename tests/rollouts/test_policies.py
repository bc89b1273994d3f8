"""Chunks of every kind of policy: each slot is the episode that Stable-Baselines3's own `predict` would have played."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from torch import nn

from robustrl.attacks import ActionDeviation, GradientAttack, MinimalFlip, SmoothedPGD
from robustrl.envs.recipe import EnvRecipe
from robustrl.noise import Gaussian
from robustrl.policy import Normalization, PolicyView
from robustrl.rollouts.chunk import Episodes, run_chunk, run_interleaved
from robustrl.rollouts.collect import collect, make_job
from robustrl.seeding import chunk_seeds, slot_seeds
from robustrl.threat import ThreatModel

MODELS = {
    "ppo": lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu"),
    "ppo-sde": lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=8, use_sde=True, seed=0, device="cpu"),
    "a2c": lambda env: A2C("MlpPolicy", env, seed=0, device="cpu"),
    "sac": lambda env: SAC("MlpPolicy", env, buffer_size=10, seed=0, device="cpu"),
    "td3": lambda env: TD3("MlpPolicy", env, buffer_size=10, seed=0, device="cpu"),
    "ddpg": lambda env: DDPG("MlpPolicy", env, buffer_size=10, seed=0, device="cpu"),
    "recurrent": lambda env: RecurrentPPO("MlpLstmPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu"),
}
DISCRETE = {
    **{name: MODELS[name] for name in ("ppo", "a2c", "recurrent")},
    "dqn": lambda env: DQN("MlpPolicy", env, buffer_size=10, seed=0, device="cpu"),
}
STATISTICS = Normalization(np.array([0.1, -0.2, 0.5]), np.array([0.5, 0.3, 4.0]))


def by_hand(model: Any, recipe: EnvRecipe, seed: int, chunk: int, n: int) -> np.ndarray:
    """Returns of undefended episodes, one environment and one `predict` at a time."""
    found = []
    for number in slot_seeds(chunk_seeds(seed, chunk).environment, n):
        env = recipe.base_env()
        frame, total, state, start = env.reset(seed=int(number))[0], 0.0, None, np.ones(1, bool)
        while True:
            shown = recipe.normalization(frame[None]) if recipe.normalization is not None else np.asarray(frame)[None]
            action, state = model.predict(shown.astype(np.float32), state=state, episode_start=start, deterministic=True)
            start = np.zeros(1, bool)
            frame, reward, terminated, truncated, _ = env.step(action[0])
            total += float(reward)
            if terminated or truncated:
                break
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("place", ["none", "before_noise", "after_noise"])
@pytest.mark.parametrize("name", MODELS)
def test_continuous_agents_play_what_predict_plays(name: str, place: Any) -> None:
    statistics = {} if place == "none" else {"normalization": STATISTICS, "normalize": place}
    recipe = EnvRecipe(env_id="Pendulum-v1", max_episode_steps=25, **statistics)
    model = MODELS[name]("Pendulum-v1")
    episodes = run_chunk(make_job(recipe.view(model), recipe, seed=3, chunk_size=5), 1, 5)
    assert episodes.returns == pytest.approx(by_hand(model, recipe, 3, 1, 5), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_agents_play_what_predict_plays(name: str) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", max_episode_steps=40)
    model = DISCRETE[name]("CartPole-v1")
    episodes = run_chunk(make_job(recipe.view(model), recipe, seed=3, chunk_size=20, engine="list"), 1, 20)
    assert np.array_equal(episodes.returns, by_hand(model, recipe, 3, 1, 20))


def same(a: Episodes, b: Episodes) -> bool:
    return all(np.array_equal(a.arrays()[name], b.arrays()[name]) for name in a.arrays())


class Pictures(gym.Env[Any, Any]):
    """Float pictures of 36 x 36 whose brightness tells the reward of each action; ends at random."""

    observation_space = spaces.Box(0, 1, (36, 36), np.float32)
    action_space = spaces.Discrete(3)

    def _draw(self) -> Any:
        self._level = float(self.np_random.random())
        return np.full((36, 36), self._level, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == int(self._level * 3))
        return self._draw(), reward, bool(self.np_random.random() < 0.2), False, {}


def pictured(noise: Any = Gaussian(0.1)) -> tuple[Any, EnvRecipe]:  # noqa: B008
    recipe = EnvRecipe(factory=Pictures, max_episode_steps=10, noise=noise, frame_stack=4)
    shape = spaces.Box(0, 1, (4, 36, 36), np.float32)

    class Stacked(gym.Env[Any, Any]):
        observation_space, action_space = shape, Pictures.action_space

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return shape.sample(), {}

        def step(self, action: Any) -> Any:
            return shape.sample(), 0.0, False, False, {}

    model = PPO(
        "CnnPolicy", Stacked(), n_steps=8, batch_size=8, seed=0, device="cpu", policy_kwargs={"normalize_images": False}
    )
    return recipe.view(model), recipe


def test_pictures_are_played_as_predict_plays_them() -> None:
    view, recipe = pictured(noise=None)
    episodes = run_chunk(make_job(view, recipe, seed=1, chunk_size=6), 0, 6)
    for slot, number in enumerate(slot_seeds(chunk_seeds(1, 0).environment, 6)):
        env = gym.wrappers.FrameStackObservation(recipe.base_env(), 4)
        frame, total, ended = env.reset(seed=int(number))[0], 0.0, False
        while not ended:
            action = int(view.scores(torch.from_numpy(frame)[None]).argmax())
            frame, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        assert episodes.returns[slot] == total


@pytest.mark.parametrize(
    ("attack", "kind"),
    [
        (MinimalFlip(draws=2, bisections=2), "pictures"),
        (SmoothedPGD(draws=2, step_size=0.5), "pictures"),
        (SmoothedPGD(draws=2, step_size=0.1), "recurrent"),
        (GradientAttack(ActionDeviation(), steps=2, draws=2), "sac"),
    ],
    ids=["flip-pictures", "pgd-pictures", "pgd-recurrent", "mad-sac"],
)
def test_attacks_on_every_kind_of_policy_stay_in_budget_and_repeat(attack: Any, kind: str) -> None:
    if kind == "pictures":
        view, recipe = pictured()
    else:
        env_id = "CartPole-v1" if kind == "recurrent" else "Pendulum-v1"
        recipe = EnvRecipe(env_id=env_id, max_episode_steps=12, noise=Gaussian(0.1))
        view = recipe.view((DISCRETE if kind == "recurrent" else MODELS)[kind](env_id))
    job = make_job(view, recipe, chunk_size=4, attack=attack, threat=ThreatModel(2, episode=0.7))
    episodes = run_chunk(job, 0, 4)
    assert np.all(episodes.spent <= 0.7 * (1 + 1e-9))
    assert episodes.spent.max() > 0
    assert same(episodes, run_chunk(job, 0, 4))


@pytest.mark.parametrize("width", [1, 2, 3, 10])
def test_chunks_in_turns_are_the_chunks_one_by_one(width: int) -> None:
    recipe = EnvRecipe(env_id="Pendulum-v1", max_episode_steps=10, noise=Gaussian(0.2))
    job = make_job(recipe.view(MODELS["sac"]("Pendulum-v1")), recipe, chunk_size=4, deterministic=False)
    tasks = [(7, 4), (2, 4), (5, 3), (0, 1), (3, 4)]
    found = dict(run_interleaved(job, tasks, width))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(same(found[i], run_chunk(job, *task)) for i, task in enumerate(tasks))


def test_chunks_in_turns_compute_on_one_thread() -> None:
    class Counting(nn.Module):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            threads.append(torch.get_num_threads())
            return observation[:, :2]

    recipe = EnvRecipe(env_id="CartPole-v1", max_episode_steps=5)
    before, threads = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        view = PolicyView.from_torch(Counting(), kind="q", observation_shape=(4,))
        threads.clear()
        list(run_interleaved(make_job(view, recipe, chunk_size=2), [(0, 2), (1, 2)], 2))
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


def test_results_do_not_depend_on_how_many_chunks_are_in_flight() -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", max_episode_steps=30, noise=Gaussian(0.2))
    job = make_job(recipe.view(DISCRETE["ppo"]("CartPole-v1")), recipe, chunk_size=10)
    assert same(collect(job, 45), collect(job, 45, in_flight=3))
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match="in_flight must be"):
            collect(job, 10, in_flight=wrong)


def test_a_broken_environment_among_chunks_in_turns_is_reported() -> None:
    class Broken(gym.Env[Any, Any]):
        observation_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.np_random.random(3).astype(np.float32), {}

        def step(self, action: Any) -> Any:
            return np.full(3, np.nan, np.float32), 0.0, False, False, {}

    recipe = EnvRecipe(factory=Broken, max_episode_steps=5, noise=Gaussian(0.1))
    job = make_job(recipe.view(MODELS["td3"]("Pendulum-v1")), recipe, chunk_size=2)
    with pytest.raises(ValueError, match="NaN or inf"):
        dict(run_interleaved(job, [(0, 2), (1, 2)], 2))


def test_a_policy_of_gsde_is_certified_greedily_or_not_at_all() -> None:
    recipe = EnvRecipe(env_id="Pendulum-v1", max_episode_steps=5, noise=Gaussian(0.1))
    view = recipe.view(MODELS["ppo-sde"]("Pendulum-v1"))
    with pytest.raises(ValueError, match="gSDE"):
        make_job(view, recipe, deterministic=False)


def test_other_actions_are_refused() -> None:
    view = EnvRecipe(env_id="Pendulum-v1").view(MODELS["sac"]("Pendulum-v1"))
    wide = EnvRecipe(factory=lambda: gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1))
    with pytest.raises(ValueError, match=r"the policy acts in Box\(-2.0, 2.0"):
        make_job(view, wide)
    assert make_job(view, replace(wide, factory=lambda: gym.make("Pendulum-v1"))).engine == "list"
