"""Atari in float pixels: noise of the right size, nothing wraps, stacks of shared frames, episodes that repeat bit for bit."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import AtariPreprocessing
from numpy.testing import assert_array_equal
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer

from robustrl.envs import EnvRecipe, NoiseObservation, make_vec_env
from robustrl.envs.atari import AtariConsole, Emulator, make_atari, make_atari_env, rom_of
from robustrl.errors import ChainError
from robustrl.noise import Ablation, Gaussian, Laplace, Splitting, Uniform
from robustrl.registration import register_envs

SIGMA = 0.05
NOISE = Gaussian(SIGMA)
PIXELS = spaces.Box(0.0, 1.0, (84, 84), np.float32)
register_envs()


def play(env: Any, seed: int, steps: int, *, first: int = 0) -> list[Any]:
    """First frame, then (frame, reward, terminated, truncated, lives) per step of random actions that `seed` fixes."""
    generator = np.random.default_rng(seed)
    log: list[Any] = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        frame, reward, terminated, truncated, info = env.step(int(generator.integers(first, env.action_space.n)))
        log.append((frame, reward, terminated, truncated, info["lives"]))
        if terminated or truncated:
            break
    return log


def same(one: list[Any], other: list[Any]) -> bool:
    return pickle.dumps(one) == pickle.dumps(other)


def transitions(env: Any, steps: int, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """(observation, next observation, action, reward, done, infos) of a vector environment, as learners store them."""
    observation, generator = env.reset(), np.random.default_rng(seed)
    for _ in range(steps):
        action = generator.integers(env.action_space.n, size=env.num_envs)
        following, rewards, dones, infos = env.step(action)
        last = following.copy()
        for i in np.flatnonzero(dones):
            last[i] = infos[i]["terminal_observation"]
        yield observation, last, action, rewards, dones, infos
        observation = following


# ------------------------------------------------------------------------------------------------- units and noise


def test_noisy_pixels_live_in_a_float_space() -> None:
    env = make_atari_env("Pong", noise=NOISE)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (4, 84, 84), np.float32)
    assert env.recipe.frame_space == PIXELS
    assert env.reset().dtype == np.float32
    assert make_atari_env("Pong").observation_space == spaces.Box(0.0, 1.0, (4, 84, 84), np.float32)


def test_clean_pixels_use_the_unit_range() -> None:
    """Pong's court is grey 87 of 255, its ball and paddles are bright: nothing was divided by 255 twice, or not at all."""
    frame = make_atari_env("Pong", frame_stack=1).reset()[0]
    assert 0 <= frame.min() < 87 / 255 < frame.max() <= 1
    assert np.median(frame) == np.float32(87) / np.float32(255)


@pytest.mark.parametrize("sigma", [SIGMA, 0.1])
def test_noise_has_the_stated_size_after_the_vector_environment(sigma: float) -> None:
    """350,000 pixels: the standard error of the standard deviation is 0.12 %."""
    noisy, clean = (make_atari_env("Pong", 2, noise=noise, frame_stack=1, seed=3) for noise in (Gaussian(sigma), None))
    noise = np.array([o - c for (o, *_), (c, *_) in zip(transitions(noisy, 25), transitions(clean, 25), strict=True)])
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(sigma, rel=0.01)
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(noise.size)
    correlation = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    assert abs(correlation) < 0.01  # fresh at every frame


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_noise_survives_a_replay_buffer_bit_for_bit(optimize_memory_usage: bool) -> None:
    noisy, clean = (make_atari_env("Pong", noise=noise, frame_stack=1, seed=3) for noise in (NOISE, None))
    buffer = ReplayBuffer(
        100,
        noisy.observation_space,
        noisy.action_space,
        device="cpu",
        optimize_memory_usage=optimize_memory_usage,
        handle_timeout_termination=not optimize_memory_usage,
    )
    true, seen = {}, set()
    for (o, following, *rest), (c, clean_following, *_) in zip(transitions(noisy, 90), transitions(clean, 90), strict=True):
        buffer.add(o, following, *rest)
        true |= {o.tobytes(): c, following.tobytes(): clean_following}
        seen |= {o.tobytes(), following.tobytes()}
    sample = buffer.sample(256)
    for stored in (sample.observations.numpy(), sample.next_observations.numpy()):
        assert stored.dtype == np.float32
        assert {row.tobytes() for row in stored} <= seen
        noise = np.array([row - true[row.tobytes()][0] for row in np.unique(stored, axis=0)])
        assert noise.std() == pytest.approx(SIGMA, rel=0.01)


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_a_learner_stores_and_sees_the_environments_own_scale(optimize_memory_usage: bool) -> None:
    """The tensor that reaches the CNN is the observation: SB3 divides nothing by 255 and transposes nothing."""
    noisy, clean = (make_atari_env("Pong", noise=noise, seed=3) for noise in (NOISE, None))
    model = DQN(
        "CnnPolicy",
        noisy,
        buffer_size=64,
        learning_starts=40,
        train_freq=4,
        batch_size=4,
        exploration_fraction=1.0,
        exploration_final_eps=1.0,  # random actions; the gradient steps still run the network
        policy_kwargs={"normalize_images": False},
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    )
    reached: list[torch.Tensor] = []
    model.q_net.features_extractor.cnn.register_forward_pre_hook(lambda _, args: reached.append(args[0].clone()))
    model.learn(48)
    buffer = model.replay_buffer
    assert buffer is not None
    stored = buffer.observations[:48]
    assert stored.dtype == np.float32
    frames = [clean.reset()]
    frames += [clean.step(buffer.actions[t, 0])[0] for t in range(47)]
    assert (stored - np.array(frames)).std() == pytest.approx(SIGMA, rel=0.01)
    rows = {row.tobytes() for row in buffer.observations.reshape(-1, 4, 84, 84)}
    assert reached
    assert all(row.numpy().tobytes() in rows for batch in reached for row in batch)

    observation = noisy.reset()
    model.predict(observation, deterministic=True)
    assert_array_equal(reached[-1].numpy(), observation)


def test_the_cnn_refuses_unit_pixels_that_it_would_divide_again() -> None:
    with pytest.raises(AssertionError, match="NatureCNN"):
        DQN("CnnPolicy", make_atari_env("Pong", noise=NOISE), buffer_size=1)


class Blank(gym.Env[Any, Any]):
    """Frames of one brightness."""

    observation_space: spaces.Space[Any] = PIXELS
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, brightness: float) -> None:
        self.frame = np.full((84, 84), brightness, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.frame, {}

    def step(self, action: Any) -> Any:
        return self.frame, 0.0, False, False, {}


@pytest.mark.parametrize("brightness", [0.0, 1.0], ids=["black", "white"])
@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_nothing_wraps_at_black_or_white(brightness: float, optimize_memory_usage: bool) -> None:
    """In uint8, -3 grey levels would be 253 and 258 be 2: half of all black pixels would turn white."""
    env = make_vec_env(lambda: Blank(brightness), noise=NOISE, max_episode_steps=100, seed=0)
    buffer = ReplayBuffer(
        50,
        env.observation_space,
        env.action_space,
        device="cpu",
        optimize_memory_usage=optimize_memory_usage,
        handle_timeout_termination=not optimize_memory_usage,
    )
    for transition in transitions(env, 40):
        buffer.add(*transition)
    sample = buffer.sample(64)
    for stored in (sample.observations, sample.next_observations):
        error = stored.numpy() - brightness
        assert np.abs(error).max() < 7 * SIGMA
        assert error.min() < -3 * SIGMA
        assert error.max() > 3 * SIGMA  # nothing is clipped to [0, 1] either
        assert abs(error.mean()) < 0.001


@pytest.mark.parametrize(
    "build",
    [
        lambda: make_vec_env("ale_py:ALE/Pong-v5", noise=NOISE),
        lambda: NoiseObservation(gym.make("ALE/Pong-v5"), NOISE),
        lambda: NoiseObservation(AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1)), NOISE),
        lambda: make_vec_env(
            lambda: AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1)), noise=NOISE, max_episode_steps=9
        ),
    ],
    ids=["make_vec_env", "raw", "grey levels", "factory of grey levels"],
)
def test_noise_on_grey_levels_is_refused(build: Any) -> None:
    with pytest.raises(ChainError, match="float observation space, got uint8"):
        build()


@pytest.mark.parametrize("noise", [Gaussian(12.75), Gaussian((12.75,) * 84), Uniform(3.0), Laplace(8.0), Splitting(64.0)])
def test_noise_in_grey_levels_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match=r"noise must be in pixels of \[0, 1\].*divide by 255"):
        make_atari_env("Pong", noise=noise)


@pytest.mark.parametrize("noise", [Gaussian(1.0), Uniform(0.5), Laplace(0.1), Splitting(0.2), Ablation(0.9)])
def test_noise_in_pixel_units_is_taken(noise: Any) -> None:
    assert make_atari_env("Pong", noise=noise).recipe.noise == noise


# ------------------------------------------------------------------------------------------------------------ stacks


@pytest.mark.parametrize("padding", ["reset", "zero"])
def test_stacks_share_all_but_one_frame_and_start_as_their_padding_says(padding: Any) -> None:
    env = make_atari_env("Pong", noise=NOISE, frame_stack=4, stack_padding=padding, max_episode_steps=7, seed=1)
    observation = env.reset()[0]
    for t in range(30):
        if t % 7 == 0:
            for older in observation[:-1]:
                assert_array_equal(older, observation[-1] if padding == "reset" else np.zeros((84, 84)))
        before = observation
        batch, _, dones, infos = env.step(np.array([t % 6]))
        observation = batch[0]
        assert dones[0] == (t % 7 == 6)
        following = infos[0]["terminal_observation"] if dones[0] else observation
        assert_array_equal(following[:-1], before[1:])
        assert not np.array_equal(following[-1], following[-2])


# ---------------------------------------------------------------------------------------------------------- episodes

GAMES = ["pong", "freeway", "breakout", "qbert", "tetris"]  # a restored state of the last two lacks a half-drawn frame


def check_that_episodes_repeat(rom: str) -> None:
    one, other = (make_atari(rom, full_action_space=True) for _ in range(2))
    log = play(one, 5, 60)
    play(other, 8, 150)  # what an earlier episode leaves behind must not matter
    other.reset()
    other.step(3)
    assert same(log, play(other, 5, 60))
    assert same(log, play(one, 5, 60))


@pytest.mark.parametrize("rom", GAMES)
def test_an_episode_depends_on_its_seed_alone(rom: str) -> None:
    check_that_episodes_repeat(rom)


def test_seeds_make_episodes_differ() -> None:
    env = make_atari("Freeway")
    assert not same(*[[env.reset(seed=seed)[0]] + [env.step(1)[0] for _ in range(9)] for seed in (5, 6)])


@pytest.mark.slow
def test_an_episode_depends_on_its_seed_alone_in_every_game() -> None:
    for spec in [spec for spec in gym.registry.values() if spec.entry_point == "ale_py.env:AtariEnv" and spec.version == 5]:
        check_that_episodes_repeat(spec.kwargs["game"])


def test_a_closed_environments_emulator_plays_the_next_one_as_a_new_one_would() -> None:
    one = make_atari("Freeway", mode=1, difficulty=1)
    emulator, log = one.unwrapped, play(one, 5, 60)
    one.close()
    one.close()  # a second time must not offer the emulator twice
    other, third = (make_atari("freeway", mode=1, difficulty=1) for _ in range(2))
    assert other.unwrapped is emulator is not third.unwrapped
    assert same(log, play(other, 5, 60))
    assert same(log, play(third, 5, 60))
    with pytest.raises(NotImplementedError):
        one.step(0)
    with pytest.raises(AttributeError):
        one.reset()
    assert same(log, play(other, 5, 60))
    other.close()
    for options in ({"mode": 0, "difficulty": 1}, {"mode": 1}, {"mode": 1, "difficulty": 1, "full_action_space": True}):
        assert make_atari("Freeway", **options).unwrapped is not emulator  # type: ignore[arg-type]
    assert make_atari("Freeway", mode=1, difficulty=1, render_mode="rgb_array").render().shape == (210, 160, 3)  # type: ignore[union-attr]


def test_environments_without_a_seed_differ_even_in_a_used_emulator() -> None:
    starts = []
    for _ in range(8):
        env = make_atari("Freeway")
        starts.append(env.reset()[1]["episode_frame_number"])
        env.reset(seed=3)
        env.close()
    assert len(set(starts[1:])) > 1


@pytest.mark.parametrize("rom", ["pong", "freeway"])
def test_a_fixed_start_shows_the_same_frame_after_any_history(rom: str) -> None:
    """A restored state has no picture of its own: without a frame drawn from it, the last episode's would be shown."""
    env = make_atari(rom, noop_max=0)
    first = env.reset(seed=0)[0]
    play(env, 1, 100)
    assert_array_equal(env.reset()[0], first)


def test_without_a_seed_episodes_go_on_from_the_last_seed() -> None:
    one, other = make_atari("Freeway"), make_atari("Freeway")
    logs = []
    for env in (one, other):
        play(env, 3, 20)
        env.reset()
        logs.append([env.step(1)[0] for _ in range(40)])
    assert same(logs[0], logs[1])


def test_frames_are_those_of_gymnasiums_own_pipeline() -> None:
    """Without sticky actions both are deterministic; this start lies three frames later."""
    for rom in ("pong", "qbert"):
        ours = make_atari(rom, repeat_action_probability=0.0, noop_max=0)
        raw = ale_py.AtariEnv(rom, obs_type="rgb", frameskip=1, repeat_action_probability=0.0)
        theirs = AtariPreprocessing(raw, noop_max=0, scale_obs=True)
        ours.reset(seed=0)
        theirs.reset(seed=0)
        for _ in range(3):
            raw.step(0)
        generator = np.random.default_rng(0)
        for _ in range(60):
            action = int(generator.integers(raw.action_space.n))
            frame, reward, terminated, *_ = ours.step(action)
            expected, expected_reward, expected_end, *_ = theirs.step(action)
            assert_array_equal(frame, expected)
            assert (reward, terminated) == (expected_reward, expected_end)


class Recorder(gym.Env[Any, Any]):
    """An emulator without a game: notes its actions; the reward is 7 with action 5."""

    action_space: spaces.Space[Any] = spaces.Discrete(6)
    observation_space: spaces.Space[Any] = spaces.Box(0, 255, (128,), np.uint8)

    def __init__(self) -> None:
        self.actions: list[int] = []
        self.ale = self

    def getScreenDims(self) -> tuple[int, int]:
        return (210, 160)

    def restoreState(self, _: Any) -> None: ...

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(128, np.uint8), {}

    def step(self, action: Any) -> Any:
        self.actions.append(int(action))
        return np.zeros(128, np.uint8), 7.0 * (action == 5), False, False, {}


@pytest.mark.parametrize("sticky", [0.0, 0.25, 0.9])
def test_each_frame_repeats_the_action_of_the_last_with_the_stated_probability(sticky: float) -> None:
    emulator, n = Recorder(), 20_000
    console = AtariConsole(Emulator(emulator, None), sticky, False, [])
    console.reset(seed=1)
    emulator.actions.clear()
    for asked in range(1, n + 1):  # every action another one, so that a repeated one can be told
        console.step(asked)
    done = np.array(emulator.actions)
    fresh = done == np.arange(1, n + 1)
    assert fresh.mean() == pytest.approx(1 - sticky, abs=4 * math.sqrt(sticky * (1 - sticky) / n))
    before = np.array([0, *done[:-1]])  # an episode starts with doing nothing
    assert_array_equal(done[~fresh], before[~fresh])


def test_actions_stick_across_no_reset() -> None:
    emulator = Recorder()
    console = AtariConsole(Emulator(emulator, None), 0.999, False, [])
    console.reset(seed=1)
    while emulator.actions[-1] != 4:
        console.step(4)
    console.reset()
    console.step(3)
    assert emulator.actions[-1] == 0


def test_a_round_pays_the_sign_of_its_point() -> None:
    console = AtariConsole(Emulator(Recorder(), None), 0.0, True, [])
    console.reset(seed=0)
    assert console.step(1)[1:3] == (0.0, False)
    assert console.step(5)[1:3] == (1.0, True)


# ------------------------------------------------------------------------------------------------ the registered ids


def test_a_round_of_pong_ends_at_its_first_point() -> None:
    env = gym.make("robustrl/PongOneRound-v0")
    returns = []
    for seed in range(15):
        log = play(env, seed, 1000)
        rewards = [reward for _, reward, *_ in log[1:]]
        assert rewards[-1] in (-1.0, 1.0)
        assert not any(rewards[:-1])
        assert log[-1][2:4] == (True, False)
        returns.append(sum(rewards))
    assert set(returns) == {-1.0, 1.0}


def test_a_round_of_pong_without_a_point_returns_zero() -> None:
    log = play(gym.make("robustrl/PongOneRound-v0", max_episode_steps=30), 0, 100)
    assert len(log) == 31
    assert log[-1][1:4] == (0.0, False, True)


def test_rounds_and_games_of_pong_agree_until_the_first_point() -> None:
    a_round, game = gym.make("robustrl/PongOneRound-v0"), gym.make("robustrl/Atari-v0", game="Pong")
    one, other = play(a_round, 2, 300), play(game, 2, 300)
    assert same(one[:-1], other[: len(one) - 1])
    assert len(other) == 301
    assert one[-1][1] == other[len(one) - 1][1] != 0


@pytest.mark.parametrize("seed", [0, 1])
def test_freeway_lasts_exactly_250_decisions(seed: int) -> None:
    log = play(gym.make("robustrl/Freeway-v0"), seed, 400)
    assert len(log) == 251
    assert log[-1][2:4] == (False, True)
    assert not any(terminated or truncated for _, _, terminated, truncated, _ in log[1:-1])


def test_freeway_is_the_hard_one_with_sticky_actions() -> None:
    env: Any = gym.make("robustrl/Freeway-v0")
    assert env.unwrapped.spec.kwargs == {"game": "freeway", "difficulty": 1}
    assert (env.unwrapped._game, env.unwrapped._game_difficulty) == ("freeway", 1)
    # 1000 frames of going up: at difficulty 0 a hit costs one lane, here the whole way
    hard, easy = (
        np.mean([sum(env.step(1)[1] for _ in range(250)) for seed in range(2) if env.reset(seed=seed)])
        for env in (env, gym.make("robustrl/Freeway-v0", difficulty=0))
    )
    assert 0 < hard < easy


def test_a_lost_life_ends_no_episode_unless_asked() -> None:
    generator = np.random.default_rng(0)

    def until_a_life_is_lost(env: Any) -> tuple[bool, Any]:
        _, info = env.reset(seed=0)
        lives = info["lives"]
        assert lives == 5
        while info["lives"] == lives:
            _, _, terminated, _, info = env.step(int(generator.integers(4)))
        return terminated, env

    terminated, env = until_a_life_is_lost(gym.make("robustrl/Atari-v0", game="Breakout"))
    assert not terminated
    assert not any(env.step(int(generator.integers(4)))[2] for _ in range(10))
    assert until_a_life_is_lost(gym.make("robustrl/Atari-v0", game="Breakout", terminal_on_life_loss=True))[0]


def test_learners_may_see_lives_as_episodes_while_the_monitor_counts_games() -> None:
    env = make_atari_env("Breakout", terminal_on_life_loss=True, seed=0, max_episode_steps=2_000)
    env.reset()
    generator, ends, lives = np.random.default_rng(0), 0, []
    while True:
        _, _, dones, infos = env.step(generator.integers(4, size=1))
        ends += int(dones[0])
        if dones[0]:
            lives.append(infos[0]["lives"])
        if "episode" in infos[0]:
            break
    assert lives == [4, 3, 2, 1, 0]
    assert ends == 5
    assert env.recipe.ends_with_a_life
    assert not make_atari_env("Breakout").recipe.ends_with_a_life


def test_lives_inside_the_monitor_are_refused() -> None:
    with pytest.raises(ChainError, match="AtariPreprocessing changes rewards inside the return monitor"):
        make_vec_env(EnvRecipe(env_id="robustrl/Atari-v0", env_kwargs={"game": "Breakout", "terminal_on_life_loss": True}))


# ---------------------------------------------------------------------------------------------------- make_atari_env


@pytest.mark.parametrize(
    ("spelling", "options", "kwargs"),
    [
        ("Pong", {}, {"game": "pong"}),
        ("pong", {}, {"game": "pong"}),
        ("ALE/Pong-v5", {}, {"game": "pong"}),
        ("PongNoFrameskip-v4", {}, {"game": "pong", "repeat_action_probability": 0.0}),
        ("PongNoFrameskip-v0", {}, {"game": "pong", "repeat_action_probability": 0.25}),
        ("PongNoFrameskip-v4", {"repeat_action_probability": 0.1}, {"game": "pong", "repeat_action_probability": 0.1}),
        ("SpaceInvaders", {"mode": 3, "difficulty": 1}, {"game": "space_invaders", "mode": 3, "difficulty": 1}),
        ("ALE/MsPacman-v5", {"frame_skip": 2}, {"game": "ms_pacman", "frame_skip": 2}),
    ],
)
def test_every_spelling_of_a_game_gives_one_recipe(spelling: str, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
    recipe = make_atari_env(spelling, **options).recipe
    assert recipe == EnvRecipe(env_id="robustrl/Atari-v0", env_kwargs=kwargs, frame_stack=4)
    assert recipe.horizon == 27_000


def test_registered_ids_take_options_too() -> None:
    recipe = make_atari_env("robustrl/Freeway-v0", repeat_action_probability=0.0, max_episode_steps=9).recipe
    assert recipe.env_id == "robustrl/Freeway-v0"
    assert recipe.env_kwargs == {"repeat_action_probability": 0.0}
    assert recipe.horizon == 9


def test_a_recipe_rebuilt_from_a_file_builds_the_same_environment() -> None:
    env = make_atari_env("Pong", noise=NOISE, one_round=True, repeat_action_probability=0.1, noop_max=5)
    rebuilt = EnvRecipe.from_dict(json.loads(json.dumps(env.recipe.to_dict())))
    assert rebuilt.fingerprint() == env.recipe.fingerprint()
    assert same(play(rebuilt.base_env(), 4, 80), play(env.recipe.base_env(), 4, 80))


def test_one_seed_repeats_vector_environments_and_environments_differ_among_themselves() -> None:
    def run(seed: int) -> Any:
        env = make_atari_env("Freeway", 2, noise=NOISE, frame_stack=2, seed=seed)
        return np.array([env.reset()] + [env.step(np.full(2, 1))[0] for _ in range(9)])

    first = run(4)
    assert_array_equal(first, run(4))
    assert not np.array_equal(first, run(5))
    assert not np.array_equal(first[0, 0], first[0, 1])


def test_sizes_and_action_sets_follow_their_arguments() -> None:
    env = make_atari_env("Pong", frame_stack=3, screen_size=42, full_action_space=True)
    assert env.observation_space == spaces.Box(0.0, 1.0, (3, 42, 42), np.float32)
    assert env.action_space == spaces.Discrete(18)
    assert make_atari_env("Pong").action_space == spaces.Discrete(6)


def test_an_episode_starts_after_one_to_noop_max_idle_frames() -> None:
    env = make_atari("Pong", noop_max=4)
    starts = {env.reset(seed=seed)[1]["episode_frame_number"] for seed in range(60)}
    fixed = make_atari("Pong", noop_max=0).reset()[1]["episode_frame_number"]
    assert starts == {fixed + k for k in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (
            lambda: make_atari("Pongg"),
            ValueError,
            "game must be one of ALE's 104 single-player games, such as 'pong', got 'Pongg'",
        ),
        (lambda: make_atari(""), ValueError, "game must be one of"),
        (lambda: make_atari("combat"), ValueError, "single-player"),  # the emulator would end the process
        (lambda: make_atari(3), TypeError, "^game must be the name"),  # type: ignore[arg-type]
        (lambda: make_atari("backgammon"), ValueError, "full_action_space=True"),
        (lambda: make_atari("Pong", mode=2), ValueError, r"pong has modes \[0, 1\].*got mode=2"),
        (lambda: make_atari("Pong", mode=-1), ValueError, "^mode must be an integer >= 0"),
        (lambda: make_atari("Pong", mode=True), TypeError, "^mode must be"),
        (lambda: make_atari("Pong", difficulty=9), ValueError, r"difficulties \[0, 1, 2, 3\], got .*difficulty=9"),
        (lambda: make_atari("Pong", difficulty=0.5), TypeError, "^difficulty must be"),  # type: ignore[arg-type]
        (
            lambda: make_atari("Pong", repeat_action_probability=1.0),
            ValueError,
            r"^repeat_action_probability must lie in \[0, 1\)",
        ),
        (lambda: make_atari("Pong", repeat_action_probability=-0.1), ValueError, "^repeat_action_probability must"),
        (lambda: make_atari("Pong", repeat_action_probability=math.nan), ValueError, "^repeat_action_probability must"),
        (lambda: make_atari("Pong", repeat_action_probability="a"), TypeError, "^repeat_action_probability must"),  # type: ignore[arg-type]
        (lambda: make_atari("Pong", frame_skip=0), ValueError, "^frame_skip must"),
        (lambda: make_atari("Pong", frame_skip=2.0), TypeError, "^frame_skip must"),  # type: ignore[arg-type]
        (lambda: make_atari("Pong", noop_max=-1), ValueError, "^noop_max must"),
        (lambda: make_atari("Pong", screen_size=0), ValueError, "^screen_size must"),
        (lambda: make_atari("Pong", screen_size=(84, 84)), TypeError, "^screen_size must"),  # type: ignore[arg-type]
        (lambda: make_atari("Pong", one_round=1), ValueError, "^one_round must"),  # type: ignore[arg-type]
        (lambda: make_atari("Pong", full_action_space="yes"), ValueError, "^full_action_space must"),  # type: ignore[arg-type]
        (lambda: make_atari("Pong", terminal_on_life_loss=None), ValueError, "^terminal_on_life_loss must"),  # type: ignore[arg-type]
        (lambda: make_atari_env(3), TypeError, "^env_id must be the name of an Atari game"),  # type: ignore[arg-type]
        (lambda: make_atari_env("Pong-v4"), ValueError, "game must be one of"),  # random frame skips are not offered
        (lambda: make_atari_env("CartPole-v1"), ValueError, "game must be one of"),
        (lambda: make_atari_env("robustrl/Pong-v0"), ValueError, "unknown environment id 'robustrl/Pong-v0'"),
        (lambda: make_atari_env("Pong", frameskip=4), ValueError, "unexpected keyword argument 'frameskip'"),
        (lambda: make_atari_env("Pong", frame_skip=0), ValueError, "frame_skip must"),
        (lambda: make_atari_env("Pong", frame_stack=0), ValueError, "^frame_stack must"),
        (lambda: make_atari_env("Pong", n_envs=0), ValueError, "^n_envs must"),
        (lambda: make_atari_env("Pong", noise=0.05), TypeError, "^noise must be a robustrl noise mechanism"),  # type: ignore[arg-type]
        (lambda: make_atari_env("Pong", max_episode_steps=0), ValueError, "^max_episode_steps must"),
        (lambda: make_atari_env("Pong", terminal_on_life_loss=1), ValueError, "^terminal_on_life_loss must"),  # type: ignore[arg-type]
    ],
)
def test_bad_games_are_refused_with_the_argument_at_fault(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize(
    ("spelling", "rom"), [("SpaceInvaders", "space_invaders"), ("tic_tac_toe_3d", "tic_tac_toe_3d"), ("ALE/Qbert-v5", "qbert")]
)
def test_games_have_one_rom_under_every_name(spelling: str, rom: str) -> None:
    assert rom_of(spelling) == rom
