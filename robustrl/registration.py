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

GRID_WORLDS: dict[str, tuple[int, str]] = {
    "robustrl/LavaIslands-v0": (500, "LavaIslands"),
    "robustrl/DiscretePlatformer-v0": (500, "DiscretePlatformer"),
    "robustrl/TextGrid-v0": (500, "TextGrid"),
}
"""Id -> (horizon in steps, class in `robustrl.envs.grid`)."""


def register_envs() -> None:
    """Register `ENVIRONMENTS` and `GRID_WORLDS`; ids that are registered already are left alone."""
    entries = {env_id: (horizon, "atari:make_atari", kwargs) for env_id, (horizon, kwargs) in ENVIRONMENTS.items()}
    entries |= {env_id: (horizon, f"grid:{name}", {}) for env_id, (horizon, name) in GRID_WORLDS.items()}
    for env_id, (horizon, entry_point, kwargs) in entries.items():
        if env_id not in gym.registry:
            gym.register(env_id, f"robustrl.envs.{entry_point}", max_episode_steps=horizon, kwargs=dict(kwargs))
