"""What every engine promises: the same episodes from the same seed, and slots that do not notice each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robustrl.envs.recipe import EnvRecipe
from robustrl.registration import register_envs
from robustrl.rollouts.engines import AleVectorEngine, Engine, EnvList, EnvPoolEngine, NativeCartPole

register_envs()
SEED = np.random.SeedSequence(5)
CARTPOLE = EnvRecipe(env_id="CartPole-v1", max_episode_steps=60)
CONTINUOUS = EnvRecipe(env_id="MountainCarContinuous-v0", max_episode_steps=30)
PENDULUM = EnvRecipe(env_id="InvertedPendulum-v5", max_episode_steps=30)
PONG = EnvRecipe(env_id="robustrl/Atari-v0", env_kwargs={"game": "pong", "noop_max": 10}, max_episode_steps=25)

SEEDED_BY_SLOT = [
    (EnvList, CARTPOLE, 12),
    (EnvList, CONTINUOUS, 6),
    (EnvPoolEngine, CARTPOLE, 12),
    (EnvPoolEngine, CONTINUOUS, 6),
    (EnvPoolEngine, PENDULUM, 6),
    (AleVectorEngine, PONG, 2),
]


def engines(*cases: Any) -> Any:
    return pytest.mark.parametrize(
        ("kind", "recipe", "n"), cases, ids=lambda value: getattr(value, "name", getattr(value, "env_id", value))
    )


every_engine = engines((NativeCartPole, CARTPOLE, 200), *SEEDED_BY_SLOT)

Kind = Callable[[EnvRecipe], Engine]


def play(engine: Engine, recipe: EnvRecipe, n: int, drop: Callable[[np.ndarray, int], np.ndarray] | None = None) -> list[Any]:
    """(frames, rewards) of every slot; an action depends on slot and step alone. `drop` takes further slots out."""
    frames, seeds = engine.start(n, SEED)
    assert frames.shape == (n, *recipe.raw_space.shape)
    assert frames.dtype == recipe.raw_space.dtype
    assert seeds.shape == (n,)
    assert seeds.dtype == np.uint64
    draws = np.random.default_rng(0)
    script = np.stack([[recipe_action(recipe, draws) for _ in range(n)] for _ in range(recipe.horizon)])
    told: list[Any] = [[(frame.copy(), 0.0)] for frame in frames]
    running = np.arange(n)
    for t in range(recipe.horizon):
        step = engine.step(script[t][running])
        assert len(step.frames) == len(step.rewards) == len(step.finished) == len(running)
        assert step.frames.dtype == frames.dtype
        assert step.rewards.dtype == np.float64
        for row, slot in enumerate(running):
            told[slot].append((step.frames[row].copy(), step.rewards[row]))
        stays = ~step.finished if drop is None else ~step.finished & ~drop(running, t)
        running = running[stays]
        if not running.size:
            break
        engine.keep(stays)
    assert not running.size, "the horizon ends every episode"
    engine.close()
    return told


def recipe_action(recipe: EnvRecipe, rng: np.random.Generator) -> Any:
    space: Any = recipe.action_space
    if hasattr(space, "n"):
        return int(rng.integers(space.n))
    return rng.uniform(space.low, space.high).astype(np.float32)


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(f, g) and r == s for (f, r), (g, s) in zip(one, other, strict=False))


@every_engine
def test_the_same_seed_brings_the_same_episodes_again(kind: Kind, recipe: EnvRecipe, n: int) -> None:
    engine = kind(recipe)
    first = play(engine, recipe, n)
    for again in (play(kind(recipe), recipe, n), play(engine, recipe, n)):
        assert [len(episode) for episode in again] == [len(episode) for episode in first]
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(first[0][-1][0], other[-1][0]) for other in first[1:])


@every_engine
def test_a_slot_does_not_notice_who_else_runs(kind: Kind, recipe: EnvRecipe, n: int) -> None:
    everyone = play(kind(recipe), recipe, n)
    draws = np.random.default_rng(1)
    fewer = play(kind(recipe), recipe, n, drop=lambda running, t: draws.random(len(running)) < 0.1)
    last_alone = play(kind(recipe), recipe, n, drop=lambda running, t: running != n - 1)
    first_alone = play(kind(recipe), recipe, n, drop=lambda running, t: running != 0)
    for other in (fewer, last_alone, first_alone):
        assert all(same(a, b) for a, b in zip(everyone, other, strict=True))
    assert len(last_alone[-1]) == len(everyone[-1])
    assert len(first_alone[0]) == len(everyone[0])


@engines(*SEEDED_BY_SLOT)  # one generator starts all slots of the native CartPole
def test_a_chunk_with_fewer_slots_begins_like_the_whole_one(kind: Kind, recipe: EnvRecipe, n: int) -> None:
    whole, part = kind(recipe), kind(recipe)
    (frames, seeds), (fewer_frames, fewer_seeds) = whole.start(n, SEED), part.start(n - 1, SEED)
    assert np.array_equal(frames[:-1], fewer_frames)
    assert np.array_equal(seeds[:-1], fewer_seeds)
    whole.close()
    part.close()


@every_engine
def test_chunks_share_no_seed(kind: Kind, recipe: EnvRecipe, n: int) -> None:
    frames, seeds = zip(*(kind(recipe).start(2, np.random.SeedSequence(chunk)) for chunk in range(2)), strict=True)
    assert not set(seeds[0].tolist()) & set(seeds[1].tolist())
    if kind is not AleVectorEngine:  # two of its games can well start alike
        assert not np.array_equal(frames[0][0], frames[1][0])
