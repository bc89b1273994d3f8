"""ale-py's vector environment: every pixel is Gymnasium's, episodes start and end as robustrl/Atari-v0's do."""

from __future__ import annotations

import sys
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from scipy import stats

from robustrl.envs.recipe import EnvRecipe
from robustrl.registration import register_envs
from robustrl.rollouts.engines import AleVectorEngine, make_engine

register_envs()
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
SEED = np.random.SeedSequence(3)


def atari(env_id: str = "robustrl/Atari-v0", horizon: int | None = None, **settings: Any) -> EnvRecipe:
    return EnvRecipe(env_id=env_id, env_kwargs=settings, max_episode_steps=horizon)


@pytest.mark.parametrize("sticky", [0.0, 0.25])
@pytest.mark.parametrize(("game", "ale_id"), [("pong", "ALE/Pong-v5"), ("freeway", "ALE/Freeway-v5")])
def test_every_pixel_is_gymnasiums_from_the_same_state_of_the_emulator(game: str, ale_id: str, sticky: float) -> None:
    """Sticky actions included: an emulator with the same seed repeats at the same frames."""
    engine = AleVectorEngine(atari(game=game, noop_max=0, repeat_action_probability=sticky))
    (first,), (seed,) = engine.start(1, SEED)
    emulator = gym.make(ale_id, frameskip=1, repeat_action_probability=sticky)
    single = gym.wrappers.AtariPreprocessing(emulator, noop_max=3, scale_obs=True)
    console: Any = emulator.unwrapped

    def seed_game(seed: int) -> None:
        console.ale.setInt("random_seed", seed)  # Gymnasium's would take a hash of it
        console._np_random = Always(3)

    console.seed_game = seed_game
    frame, _ = single.reset(seed=int(seed))
    assert np.array_equal(first, frame)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(300):
        action = rng.integers(single.action_space.n)  # type: ignore[attr-defined]
        step = engine.step(np.array([action]))
        frame, reward, terminated, _, _ = single.step(action)
        assert np.array_equal(step.frames[0], frame)
        assert step.rewards[0] == reward
        assert step.finished[0] == terminated
        seen += reward != 0
    assert seen > 0 or game == "freeway", "where random chickens hardly ever cross the road"


class Always:
    """A generator that always waits so long, and never repeats an action."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def integers(self, low: int, high: int) -> int:
        return self.frames

    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"game": "pong"}, False),
        ({"game": "pong", "one_round": True}, True),
        ({"game": "breakout"}, True),
        ({"game": "air_raid", "full_action_space": True}, False),  # starts with frames of its own
        ({"game": "freeway", "noop_max": 0}, False),
    ],
    ids=str,
)
def test_episodes_are_those_of_robustrls_own_environment(settings: dict[str, Any], ends: bool) -> None:
    """Without sticky actions an episode is its waiting time and its actions."""
    recipe = atari(**settings, repeat_action_probability=0.0)
    engine = AleVectorEngine(recipe)
    frames, seeds = engine.start(2, SEED)
    shortest = engine._game(1).reset()[1]["episode_frame_number"][0]
    for slot, game in enumerate(engine._games):
        waited = game.reset(seed=seeds[slot : slot + 1].astype(np.int64))[1]["episode_frame_number"][0] - shortest
        single = recipe.base_env()
        single.unwrapped.np_random = Always(waited - 3)  # type: ignore[assignment]
        assert np.array_equal(single.reset()[0], frames[slot])
        rng, finished = np.random.default_rng(slot), False
        for _ in range(400):
            action = rng.integers(single.action_space.n)  # type: ignore[attr-defined]
            screens, rewards, stopped = (row[slot] for row in engine.step(np.full(2, action)))
            frame, reward, finished, _, _ = single.step(action)
            assert rewards == reward
            assert stopped == finished
            if finished:
                break
            assert np.array_equal(screens, frame)
        assert finished or not ends


def test_a_round_ends_with_its_first_point_alone() -> None:
    engine = AleVectorEngine(atari("robustrl/PongOneRound-v0", horizon=400))
    engine.start(2, SEED)
    points: list[float] = []
    for _ in range(400):
        step = engine.step(np.zeros(len(engine._games), dtype=np.int64))
        assert np.array_equal(step.finished, step.rewards != 0)
        points += step.rewards[step.finished].tolist()
        if step.finished.all():
            break
        engine.keep(~step.finished)
    assert points == [-1.0, -1.0]  # nobody moved the paddle


def test_the_horizon_counts_decisions() -> None:
    engine = AleVectorEngine(atari(game="pong", horizon=6))
    engine.start(1, SEED)
    assert [engine.step(np.zeros(1, dtype=np.int64)).finished[0] for _ in range(6)] == [False] * 5 + [True]


@pytest.mark.parametrize("noop_max", [0, 1, 30])
def test_an_episode_waits_as_long_as_gymnasiums(noop_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 frames of the console and 1 to noop_max of `AtariPreprocessing`, all equally likely."""
    waits: list[int] = []

    class Game:
        def __init__(self, most: int) -> None:
            self.most = most

        def reset(self, seed: Any = None) -> Any:
            self.waited = 0 if seed is None else int(np.random.default_rng(int(seed[0])).integers(self.most))
            return np.full((1, 1, 84, 84), self.waited, np.uint8), {"episode_frame_number": np.array([self.waited + 9])}

    engine = AleVectorEngine(atari(game="pong", noop_max=noop_max))
    monkeypatch.setattr(engine, "_game", lambda noop_max: Game(noop_max))
    frames, seeds = engine.start(3000, SEED)
    assert len(set(seeds.tolist())) == 3000
    assert ((seeds > 0) & (seeds < 2**31)).all()  # what ale-py takes for a seed
    waits = np.rint(frames[:, 0, 0] * 255).astype(int).tolist()
    counts = np.bincount(waits)
    expected = range(4, 4 + noop_max) if noop_max else range(3, 4)
    assert set(waits) == set(expected)
    if noop_max > 1:
        assert stats.chisquare(counts[4:]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (EnvRecipe(env_id="CartPole-v1"), "robustrl/Atari-v0 and its relatives only"),
        (EnvRecipe(env_id="ALE/Pong-v5", max_episode_steps=10), "robustrl/Atari-v0 and its relatives only"),
        (EnvRecipe(factory=lambda: gym.make("CartPole-v1")), "robustrl/Atari-v0 and its relatives only"),
        (EnvRecipe(env_id="robustrl/PongOneRound-v0", wrappers=(gym.Wrapper,)), "cannot wrap"),
        (atari("robustrl/Freeway-v0"), "another game than difficulty=1"),
        (atari(game="pong", mode=0), "another game than mode=0"),
        (atari(game="pong", render_mode="rgb_array"), "render_mode='rgb_array'"),
        (atari(game="pong", frame_skip=2), "for frame_skip=4 only, got 2"),
        (atari(game="pong", screen_size=42), "for screen_size=84 only, got 42"),
        (atari(game="pong", terminal_on_life_loss=True), "for terminal_on_life_loss=False only"),
        (atari(game="breakout", one_round=True), "as a sum"),
    ],
    ids=[f"case{i}" for i in range(11)],
)
def test_what_ale_cannot_play_alike_is_refused(recipe: EnvRecipe, reason: str) -> None:
    with pytest.raises(ValueError, match=f"engine='ale' is not available for .*{reason}.*; use 'list'"):
        make_engine(recipe, "ale")


def test_a_missing_or_another_ale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ale_py, "__version__", "0.13.0")
    with pytest.raises(ValueError, match="compared with Gymnasium's for ale-py 0.12.1, not for 0.13.0"):
        make_engine(atari(game="pong"), "ale")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ValueError, match=r"pip install 'robustrl\[atari\]'"):
        make_engine(atari(game="pong"), "ale")
