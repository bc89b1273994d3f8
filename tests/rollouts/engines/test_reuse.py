"""Environments that serve several episodes: those that are reused leave nothing of one episode in the next."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from toys import Steps

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines import EnvList, env_list

REUSED = [
    "Acrobot-v1", "Ant-v5", "CartPole-v1", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "Pusher-v5",
    "Reacher-v5", "Swimmer-v5", "Walker2d-v5", "robustrl/PongOneRound-v0", "robustrl/Freeway-v0",
]  # fmt: skip


def played(env: gym.Env[Any, Any], seed: int, steps: int = 40) -> list[Any]:
    seen: list[Any] = [np.asarray(env.reset(seed=seed)[0]).tobytes()]
    env.action_space.seed(seed)
    for _ in range(steps):
        frame, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen += [np.asarray(frame).tobytes(), float(reward), terminated, truncated]
        if terminated or truncated:
            break
    return seen


@pytest.mark.parametrize("env_id", REUSED)
@pytest.mark.filterwarnings("ignore")
def test_an_environment_that_is_reused_plays_what_a_fresh_one_plays(env_id: str) -> None:
    recipe = EnvRecipe(env_id=env_id)
    assert env_list._kind(recipe) is not None
    used = recipe.base_env(checked=False)
    played(used, 1)
    played(used, 2, steps=7)
    assert played(used, 3) == played(recipe.base_env(checked=False), 3)


def chunk(recipe: EnvRecipe, seed: int, steps: int = 5) -> bytes:
    engine = EnvList(recipe)
    frames, _ = engine.start(3, np.random.SeedSequence(seed))
    seen = [frames.tobytes()]
    for _ in range(steps):
        step = engine.step(np.zeros((3, 1), np.float32))
        seen += [step.frames.tobytes(), step.rewards.tobytes()]
    engine.close()
    return b"".join(seen)


def test_chunks_on_reused_environments_repeat_and_make_no_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_list, "_spares", env_list._Spares())
    recipe = EnvRecipe(env_id="Pendulum-v1")
    first = chunk(recipe, 1)
    chunk(recipe, 2)
    monkeypatch.setattr(EnvRecipe, "base_env", None)
    assert chunk(recipe, 1) == first


def test_other_settings_are_other_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_list, "_spares", env_list._Spares())
    recipes = [
        EnvRecipe(env_id="Pendulum-v1"),
        EnvRecipe(env_id="Pendulum-v1", env_kwargs={"g": 1.0}),
        EnvRecipe(env_id="Pendulum-v1", max_episode_steps=3),
    ]
    alone = [chunk(recipe, 1, steps=3) for recipe in recipes]
    assert [chunk(recipe, 1, steps=3) for recipe in recipes] == alone
    assert len({env_list._kind(recipe) for recipe in recipes}) == 3


def test_environments_of_ones_own_are_made_anew_for_every_episode() -> None:
    made = []

    def factory() -> gym.Env[Any, Any]:
        made.append(Steps(3))
        return made[-1]

    for recipe in (
        EnvRecipe(factory=factory, max_episode_steps=3),
        EnvRecipe(env_id="Pendulum-v1", wrappers=(gym.wrappers.ClipAction,)),
    ):
        assert env_list._kind(recipe) is None
    recipe = EnvRecipe(factory=factory, max_episode_steps=3)
    recipe.horizon  # noqa: B018
    before = len(made)
    for _ in range(2):
        engine = EnvList(recipe)
        engine.start(2, np.random.SeedSequence(0))
        engine.close()
    assert len(made) == before + 4
