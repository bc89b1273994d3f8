"""Sure bounds on the undiscounted return of well-known environments, under any behaviour of the agent.

A certificate of the mean integrates from a lower bound that holds in every single episode. These are proven from the
environment's definition, never read off samples.
"""

from __future__ import annotations

from robustrl.envs.recipe import EnvRecipe, find_spec

CARTPOLE_EARLIEST_END = 8
"""No action sequence ends CartPole before step 8: see `tests/envs/test_bounds.py` for the comparison argument."""


def known_return_bounds(recipe: EnvRecipe) -> tuple[float | None, float | None]:
    """(low, high) return of an episode whatever the agent does, or None where nothing is proven.

    Args:
        recipe: the environment; only Gymnasium's own, unmodified ones (no wrappers, no keyword arguments) are known.
    """
    if recipe.env_id is None or recipe.wrappers or recipe.env_kwargs:
        return None, None
    spec = find_spec(recipe.env_id)
    if spec.kwargs or spec.additional_wrappers:
        return None, None
    horizon = float(recipe.horizon)
    match spec.entry_point:  # not the id, which anyone can register for another environment
        case "gymnasium.envs.classic_control.cartpole:CartPoleEnv":
            return min(float(CARTPOLE_EARLIEST_END), horizon), horizon
        case "gymnasium.envs.classic_control.acrobot:AcrobotEnv" | "gymnasium.envs.classic_control.mountain_car:MountainCarEnv":
            return -horizon, 0.0
        case _:
            return None, None
