"""Sure bounds on the undiscounted return of well-known environments, under any behaviour of the agent.

A certificate of the mean integrates from a lower bound that holds in every single episode. These are proven from the
environment's definition, never read off samples. They take actions inside the action space for granted, as every policy
view gives.
"""

from __future__ import annotations

import math

from robustrl.envs.recipe import EnvRecipe, find_spec

CARTPOLE_EARLIEST_END = 8
"""No action sequence ends CartPole before step 8: see `tests/envs/test_bounds.py` for the comparison argument."""


def known_return_bounds(recipe: EnvRecipe) -> tuple[float | None, float | None]:
    """(low, high) return of an episode whatever the agent does, or None where nothing is proven.

    Args:
        recipe: the environment; only Gymnasium's own, unmodified ones (no wrappers, no keyword arguments) and robustrl's
            Atari games are known.
    """
    if recipe.env_id is None or recipe.wrappers:
        return None, None
    spec = find_spec(recipe.env_id)
    options = {**spec.kwargs, **recipe.env_kwargs}
    atari = spec.entry_point == "robustrl.envs.atari:make_atari"
    if spec.additional_wrappers or (options and not atari):
        return None, None
    horizon = float(recipe.horizon)
    match spec.entry_point:  # not the id, which anyone can register for another environment
        case "gymnasium.envs.classic_control.cartpole:CartPoleEnv":
            return min(float(CARTPOLE_EARLIEST_END), horizon), horizon
        case "gymnasium.envs.classic_control.acrobot:AcrobotEnv" | "gymnasium.envs.classic_control.mountain_car:MountainCarEnv":
            return -horizon, 0.0
        case "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv":
            # Every step costs 0.1 a^2 with |a| <= 1, and the one that ends at the goal earns 100. With at most 999 steps, the
            # registered horizon, an episode reaches the goal if and only if its return is positive: then it is >= 100 - 99.9,
            # otherwise <= 0. So success_at=0.05 is success.
            return -_rounded_up(0.1 * horizon, horizon), 100.0
        case "gymnasium.envs.classic_control.pendulum:PendulumEnv":
            # A step costs angle^2 + 0.1 speed^2 + 0.001 torque^2: the angle is normalised into [-pi, pi], the speed clipped to
            # 8 (an episode starts with at most 1), the torque to 2.
            return -_rounded_up((math.pi**2 + 0.1 * 8**2 + 0.001 * 2**2) * horizon, horizon), 0.0
        case "gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv":
            return 0.0, horizon  # 1 per step, 0 in the one that ends with a fallen pole
        case "robustrl.envs.atari:make_atari":
            return _atari(options.get("game"), options.get("one_round") is True)
        case _:
            return None, None


def _rounded_up(total: float, terms: float) -> float:
    """`total` and more than all the rounding of adding it up: float32 factors in the terms, 2^-53 for every addition."""
    return total * (1 + 1e-7 + terms * 2.0**-52)


def _atari(game: str | None, one_round: bool) -> tuple[float | None, float | None]:
    if one_round:
        return -1.0, 1.0  # by construction: the sign of one point, or 0 if there was none
    from robustrl.envs.atari import rom_of

    # ALE's rewards in Freeway are 0 or 1 per frame. Crossings also take their time, but that is in the ROM: no upper bound.
    return (0.0 if game is not None and rom_of(game) == "freeway" else None), None
