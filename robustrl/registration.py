"""The environments that robustrl registers with Gymnasium. Entry points are text: registering imports no emulator."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

ENVIRONMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    # 108,000 emulated frames, the usual half hour of play
    "robustrl/Atari-v0": (27_000, {}),
    "robustrl/PongOneRound-v0": (1_000, {"game": "pong", "one_round": True}),
    "robustrl/Freeway-v0": (250, {"game": "freeway", "difficulty": 1}),
}
"""Id -> (horizon in decisions, keyword arguments of `robustrl.envs.atari.make_atari`)."""


def register_envs() -> None:
    """Register `ENVIRONMENTS`; ids that are registered already are left alone."""
    for env_id, (horizon, kwargs) in ENVIRONMENTS.items():
        if env_id not in gym.registry:
            gym.register(env_id, "robustrl.envs.atari:make_atari", max_episode_steps=horizon, kwargs=dict(kwargs))
