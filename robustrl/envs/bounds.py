"""Sure bounds on the undiscounted return of well-known environments, under any behaviour of the agent.

A certificate of the mean integrates from a lower bound that holds in every single episode. These are proven from the
environment's definition, never read off samples.
"""

from __future__ import annotations

from robustrl.envs.recipe import EnvRecipe

CARTPOLE_EARLIEST_END = 8
"""No action sequence ends CartPole before step 8: see `tests/envs/test_bounds.py` for the comparison argument."""


def known_return_bounds(recipe: EnvRecipe) -> tuple[float | None, float | None]:
    """(low, high) return of an episode whatever the agent does, or None where nothing is proven.

    Args:
        recipe: the environment; only unmodified registered ones (no wrappers, no keyword arguments) are known.
    """
    horizon = recipe.horizon
    if recipe.env_id is None or recipe.wrappers or recipe.env_kwargs:
        return None, None
    name = recipe.env_id.rsplit("/", 1)[-1].rsplit("-v", 1)[0]
    match name:
        case "CartPole":
            return float(min(CARTPOLE_EARLIEST_END, horizon)), float(horizon)
        case "Acrobot" | "MountainCar":
            return -float(horizon), 0.0
        case "FrozenLake" | "FrozenLake8x8":
            return 0.0, 1.0
        case "CliffWalking":
            return -100.0 * horizon, 0.0
        case _:
            return None, None
