"""Atari games in float pixels: one frame is (84, 84), float32, in [0, 1], from the emulator to the policy.

Noise and budgets are in the same unit: the policy-smoothing paper's sigma of 12.75 and 25.5 grey levels is 0.05 and 0.1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import check_choice, check_count, check_real
from robustrl.noise import Noise
from robustrl.policy import Padding


class Emulator(NamedTuple):
    """An `ale_py.AtariEnv` of single frames without sticky actions, and the state in which every episode starts."""

    env: gym.Env[Any, int]
    start: Any

    @classmethod
    def boot(cls, env: gym.Env[Any, int]) -> Emulator:
        """Start a game and save it after two frames: ALE saves no half-drawn one, which some games start with."""
        env.reset()
        for _ in range(2):
            env.step(0)
        return cls(env, cast(Any, env).ale.cloneState())


class AtariConsole(gym.Wrapper[NDArray[np.uint8], int, NDArray[np.uint8], int]):
    """One frame at a time of an emulator, the inside of Gymnasium's `AtariPreprocessing`.

    Every episode starts from the same state of the emulator and is random through this environment's generator alone.
    ALE's own reset leaves parts of the console as the last episode left them (in Freeway, for one), so that episodes would not
    be independent, and only reloading the ROM, 0.1 s, seeds its sticky actions.

    Args:
        emulator: a booted game.
        repeat_action_probability: probability that a frame repeats the action of the frame before (sticky actions).
        one_round: end at the first point; the reward is its sign.
        spare: where `close` puts the emulator for the next console: starting one takes 0.1 s, a chunk of episodes dozens.
    """

    def __init__(self, emulator: Emulator, repeat_action_probability: float, one_round: bool, spare: list[Emulator]) -> None:
        super().__init__(emulator.env)
        self._emulator, self._spare = emulator, spare
        self._sticky, self._one_round = repeat_action_probability, one_round
        # What AtariPreprocessing reads from the emulator itself; converting every frame here too would cost a fifth of a step.
        self.observation_space = spaces.Box(0, 255, cast(Any, emulator.env).ale.getScreenDims(), np.uint8)
        self.unwrapped.np_random, _ = seeding.np_random()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        if seed is not None:
            self.unwrapped.np_random, _ = seeding.np_random(seed)
        cast(Any, self.env).ale.restoreState(self._emulator.start)
        self._last_action = 0
        ram, _, _, _, info = self.env.step(0)  # draws the screen, which a restored state does not
        return ram, info

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        if self.np_random.random() >= self._sticky:
            self._last_action = action
        ram, reward, terminated, truncated, info = self.env.step(self._last_action)
        if self._one_round:
            return ram, float(np.sign(float(reward))), terminated or reward != 0, truncated, info
        return ram, float(reward), terminated, truncated, info

    def close(self) -> None:
        if self.env is self._emulator.env:
            self.env = gym.Env()  # a closed environment must not play on in the next one's emulator
            self._spare.append(self._emulator)


_SPARE: dict[tuple[Any, ...], list[Emulator]] = {}
"""Emulators of closed environments, by game and settings."""


def make_atari(
    game: str = "Pong",
    *,
    mode: int | None = None,
    difficulty: int | None = None,
    repeat_action_probability: float = 0.25,
    frame_skip: int = 4,
    noop_max: int = 30,
    full_action_space: bool = False,
    one_round: bool = False,
    terminal_on_life_loss: bool = False,
    screen_size: int = 84,
    render_mode: str | None = None,
) -> gym.Env[NDArray[np.float32], int]:
    """One Atari game: grey, max-pooled over the last two frames, resized, float32 in [0, 1]; no horizon of its own.

    `gymnasium.make("robustrl/Atari-v0", game="Breakout")` calls this and adds the horizon. FIRE is never pressed for the agent:
    where a game waits for it, it is one of the agent's actions.

    Args:
        game: name ("SpaceInvaders"), ROM ("space_invaders") or id ("ALE/SpaceInvaders-v5").
        mode: the game's mode; default its first.
        difficulty: the console's difficulty switches; default the game's first.
        repeat_action_probability: sticky actions, in [0, 1): each frame repeats the last action with this probability.
        frame_skip: frames per decision.
        noop_max: an episode starts with 1 to `noop_max` frames of doing nothing; 0 for a fixed start.
        full_action_space: all 18 actions of the console instead of those that matter in the game.
        one_round: the episode ends at the first point, and its return is the sign of that point.
        terminal_on_life_loss: the episode ends when a life is lost. Such an environment cannot be certified; for training
            see `make_atari_env`.
        screen_size: pixels per side.
        render_mode: "rgb_array" or "human".
    Returns:
        environment with observations (screen_size, screen_size) and discrete actions.
    Raises:
        ImportError: if ale-py or OpenCV is not installed.
        ValueError: for an unknown game, mode or difficulty, or numbers out of range.
    """
    ale_py = _ale_py()
    sticky = check_real("repeat_action_probability", repeat_action_probability)
    if not 0 <= sticky < 1:
        raise ValueError(f"repeat_action_probability must lie in [0, 1), got {sticky}")
    check_choice("full_action_space", full_action_space, (True, False))
    check_choice("one_round", one_round, (True, False))
    check_choice("terminal_on_life_loss", terminal_on_life_loss, (True, False))
    switches = {
        name: None if value is None else check_count(name, value, least=0)
        for name, value in {"mode": mode, "difficulty": difficulty}.items()
    }
    preprocessing: dict[str, Any] = {
        "noop_max": check_count("noop_max", noop_max, least=0),
        "frame_skip": check_count("frame_skip", frame_skip),
        "screen_size": check_count("screen_size", screen_size),
    }
    rom = rom_of(game)
    spare = _SPARE.setdefault((rom, *switches.values(), full_action_space), []) if render_mode is None else []
    if spare:
        emulator = spare.pop()
    else:
        settings = {"obs_type": "ram", "frameskip": 1, "repeat_action_probability": 0.0, "render_mode": render_mode}
        try:
            env = ale_py.AtariEnv(rom, full_action_space=full_action_space, **settings, **switches)
        except RuntimeError as error:
            ale = ale_py.AtariEnv(rom).ale
            raise ValueError(
                f"{rom} has modes {list(ale.getAvailableModes())} and difficulties {list(ale.getAvailableDifficulties())}, "
                f"got mode={mode!r}, difficulty={difficulty!r}"
            ) from error
        if env.get_action_meanings()[0] != "NOOP":
            raise ValueError(f"game {rom!r} cannot be left alone with its minimal actions: pass full_action_space=True")
        emulator = Emulator.boot(env)
    console = AtariConsole(emulator, sticky, one_round, spare)
    return gym.wrappers.AtariPreprocessing(
        console, terminal_on_life_loss=terminal_on_life_loss, scale_obs=True, **preprocessing
    )


def _ale_py() -> Any:
    """ale-py, which registers its ids when it is imported."""
    try:
        import ale_py
        import cv2  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Atari games need ale-py and OpenCV ({error}): pip install 'robustrl[atari]'") from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    return ale_py


def rom_of(game: str) -> str:
    """The ROM of a game: "SpaceInvaders", "space_invaders" and "ALE/SpaceInvaders-v5" are "space_invaders".

    Raises:
        ValueError: if ALE has no such single-player game.
    """
    _ale_py()
    if not isinstance(game, str):
        raise TypeError(f"game must be the name of an Atari game, got {game!r} of type {type(game).__name__}")
    # Not the list of ROMs: the emulator ends the whole process when a multi-player one is loaded.
    ids = [spec for spec in gym.registry.values() if spec.entry_point == "ale_py.env:AtariEnv"]
    roms = {str(spec.kwargs["game"]).replace("_", ""): str(spec.kwargs["game"]) for spec in ids}
    plain = game.removeprefix("ALE/").removesuffix("-v5").replace("_", "").lower()
    if plain not in roms:
        close = ", ".join(repr(roms[name]) for name in difflib.get_close_matches(plain, roms)) or "'Pong' or 'space_invaders'"
        raise ValueError(f"game must be one of ALE's {len(roms)} single-player games, such as {close}, got {game!r}")
    return roms[plain]


def make_atari_env(
    env_id: str,
    n_envs: int = 1,
    *,
    noise: Noise | None = None,
    frame_stack: int = 4,
    stack_padding: Padding | None = None,
    max_episode_steps: int | None = None,
    seed: int | None = None,
    terminal_on_life_loss: bool = False,
    wrapper_class: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] | None = None,
    vec_env_cls: Any = None,
    **options: Any,
) -> Any:
    """An SB3 vector environment of an Atari game with noise and frame stack: `robustrl.make_vec_env` for pixels.

    Observations are (frame_stack, 84, 84) float32, newest frame last, which SB3's CNN takes as they are:
    `PPO("CnnPolicy", env, policy_kwargs={"normalize_images": False})`.

    Args:
        env_id: a game ("Pong"), an ALE id ("ALE/Pong-v5", or "PongNoFrameskip-v4", which has no sticky actions), or one of
            robustrl's ids ("robustrl/PongOneRound-v0", "robustrl/Freeway-v0").
        n_envs: number of environments side by side.
        noise: smoothing noise in pixels of [0, 1], e.g. `robustrl.Gaussian(0.05)`; None for none.
        frame_stack: frames in one observation.
        stack_padding: how an episode's first stack is filled, "reset" or "zero".
        max_episode_steps: horizon in decisions; default the registered one.
        seed: seeds environments, action spaces and noise.
        terminal_on_life_loss: show the learner every lost life as the end of an episode (SB3's `EpisodicLifeEnv`), while the
            game goes on and the monitor reports whole games. For training only: games are certified, not lives.
        wrapper_class: wrapper applied to each environment, inside the noise.
        vec_env_cls: SB3 class to use; default `DummyVecEnv`.
        options: keyword arguments of `make_atari`, e.g. `one_round=True`.
    Returns:
        what `make_vec_env` returns; its `EnvRecipe` is `.recipe`.
    Raises:
        ImportError: if ale-py or OpenCV is not installed.
        ValueError: for an unknown game or option, or noise in grey levels.
    """
    if not isinstance(env_id, str):
        raise TypeError(f"env_id must be the name of an Atari game or an id, got {env_id!r} of type {type(env_id).__name__}")
    widest = max(float(np.max(getattr(noise, name, 0.0))) for name in ("sigma", "lam", "b"))
    if widest > 1:
        raise ValueError(
            f"noise must be in pixels of [0, 1], got {noise}; if that is in grey levels of 0 to 255, divide by 255: "
            f"{widest:g} becomes {widest / 255:.3g}"
        )
    check_choice("terminal_on_life_loss", terminal_on_life_loss, (True, False))
    if "robustrl/" not in env_id:
        if legacy := re.fullmatch(r"(\w+)NoFrameskip-v([04])", env_id):
            env_id = legacy[1]
            options = {"repeat_action_probability": 0.25 if legacy[2] == "0" else 0.0, **options}
        env_id, options = "robustrl/Atari-v0", {"game": rom_of(env_id), **options}
    wrappers: tuple[Any, ...] = ()
    if terminal_on_life_loss:
        from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv

        wrappers = (EpisodicLifeEnv,)
    return make_vec_env(
        EnvRecipe(env_id=env_id, env_kwargs=options, wrappers=wrappers),
        n_envs,
        noise=noise,
        frame_stack=frame_stack,
        stack_padding=stack_padding,
        max_episode_steps=max_episode_steps,
        seed=seed,
        wrapper_class=wrapper_class,
        vec_env_cls=vec_env_cls,
    )
