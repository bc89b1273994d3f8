"""ale-py's own vector environment, for the Atari games whose episodes it can play as `robustrl.envs.atari` does.

Every pixel and reward agrees with Gymnasium's `AtariPreprocessing` in the same state of the emulator; `docs/engines.md` has
the comparison, the tests repeat it. Two things have to be arranged here: an episode's first frames, of which ale-py draws one
too few, and stopping, which it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustrl.envs.atari import make_atari, rom_of
from robustrl.envs.recipe import EnvRecipe, find_spec
from robustrl.rollouts.engines.base import Step
from robustrl.seeding import numpy_generator

COMPARED = "0.12.1"
"""The ale-py that was compared."""
BEFORE_NOOPS = 3
"""Frames that `AtariConsole` lets pass before `AtariPreprocessing` does nothing for 1 to `noop_max` more."""


class AleVectorEngine:
    """One ale-py vector environment per slot, so that the games that still run are stepped side by side, and no others.

    Threads of its own, one per running game; results do not depend on how they interleave.
    """

    name = "ale"
    default_chunk = 64

    def __init__(self, recipe: EnvRecipe) -> None:
        self._settings, self._horizon = _settings(recipe), recipe.horizon
        self._games: list[Any] = []
        self._steps = 0

    @classmethod
    def refusal(cls, recipe: EnvRecipe) -> str | None:
        """Why ale-py cannot play the recipe's episodes; None if it can."""
        if recipe.env_id is None or find_spec(recipe.env_id).entry_point != "robustrl.envs.atari:make_atari":
            return "it plays robustrl/Atari-v0 and its relatives only"
        if recipe.wrappers or find_spec(recipe.env_id).additional_wrappers:
            return "it cannot wrap single games"
        try:
            import ale_py
        except ImportError as error:
            return f"ale-py is missing ({error}): pip install 'robustrl[atari]'"
        if ale_py.__version__ != COMPARED:
            return f"its steps were compared with Gymnasium's for ale-py {COMPARED}, not for {ale_py.__version__}"
        settings = _settings(recipe)
        for name in ("mode", "difficulty", "render_mode"):
            if settings[name] is not None:
                return f"it plays another game than {name}={settings[name]!r}: ale-py's vector environment cannot set it"
        for name, compared in {"frame_skip": 4, "screen_size": 84, "terminal_on_life_loss": False}.items():
            if settings[name] != compared:
                return f"its steps were compared with Gymnasium's for {name}={compared!r} only, got {settings[name]!r}"
        if settings["one_round"] and rom_of(settings["game"]) != "pong":
            return "it sees the points of one decision as a sum, and only in pong two of them cannot fall together"
        return None

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        generator = numpy_generator(seed)
        latest = BEFORE_NOOPS + self._settings["noop_max"]
        earliest = min(BEFORE_NOOPS + 1, latest)
        _, info = self._game(noop_max=1).reset()
        boot = info["episode_frame_number"][0]  # some games start with frames of their own
        self._games, self._steps = [self._game(noop_max=latest + 1) for _ in range(n)], 0
        first, seeds = [], np.empty(n, dtype=np.uint64)
        for slot, game in enumerate(self._games):
            waited = -1
            while waited < earliest:
                seeds[slot] = generator.integers(1, 2**31)
                screen, info = game.reset(seed=seeds[slot : slot + 1].astype(np.int64))
                waited = info["episode_frame_number"][0] - boot
            first.append(screen)
        return _pixels(first), seeds

    def _game(self, noop_max: int) -> Any:
        """One game that starts after 0 to `noop_max` - 1 frames of doing nothing."""
        from ale_py import AtariVectorEnv

        return AtariVectorEnv(
            rom_of(self._settings["game"]),
            1,
            num_threads=1,
            max_num_frames_per_episode=10**9,  # the horizon, which counts decisions, comes first
            repeat_action_probability=self._settings["repeat_action_probability"],
            full_action_space=self._settings["full_action_space"],
            stack_num=1,
            noop_max=noop_max,
            reward_clipping=False,
            use_fire_reset=False,
        )

    def step(self, actions: NDArray[Any]) -> Step:
        for game, action in zip(self._games, actions[:, None], strict=True):
            game.send(action)
        screens, rewards, terminated, _, _ = zip(*(game.recv() for game in self._games), strict=True)
        self._steps += 1
        earned = np.concatenate(rewards).astype(np.float64)
        finished = np.concatenate(terminated) | (self._steps == self._horizon)
        if self._settings["one_round"]:
            finished |= earned != 0
        return Step(_pixels(screens), earned, finished)

    def keep(self, running: NDArray[np.bool_]) -> None:
        self._games = [game for game, stays in zip(self._games, running, strict=True) if stays]

    def close(self) -> None:
        self._games = []


def _settings(recipe: EnvRecipe) -> Mapping[str, Any]:
    """The keyword arguments of `make_atari`, defaults included."""
    assert recipe.env_id is not None
    arguments = inspect.signature(make_atari).bind(**{**find_spec(recipe.env_id).kwargs, **recipe.env_kwargs})
    arguments.apply_defaults()
    return arguments.arguments


def _pixels(screens: Any) -> NDArray[np.float32]:
    return np.concatenate(screens)[:, 0].astype(np.float32) / np.float32(255)
