"""Sure bounds on returns: proven here, because a mean certificate integrates from them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.envs.registration import registry

from robustrl.envs import EnvRecipe, known_return_bounds
from robustrl.envs.bounds import CARTPOLE_EARLIEST_END
from robustrl.noise import Gaussian

STEP, FORCE, GRAVITY, MASS, POLE, LENGTH = 0.02, 10.0, 9.8, 1.1, 0.05, 0.5
ANGLE_LIMIT, POSITION_LIMIT, START = 12 * 2 * math.pi / 360, 2.4, 0.05


def test_the_constants_of_the_argument_are_those_of_the_environment() -> None:
    env: Any = CartPoleEnv()
    assert (env.tau, env.force_mag, env.gravity, env.total_mass) == (STEP, FORCE, GRAVITY, MASS)
    assert (env.polemass_length, env.length, env.masspole) == (POLE, LENGTH, 0.1)
    assert (env.theta_threshold_radians, env.x_threshold) == (ANGLE_LIMIT, POSITION_LIMIT)
    assert env.kinematics_integrator == "euler"
    starts = np.array([env.reset(seed=seed)[0] for seed in range(200)])
    assert np.abs(starts).max() <= START


def _largest_angular_acceleration(angle: float, speed: float) -> float:
    """Upper bound on |theta''| for |theta| <= angle (at most 12 degrees), |omega| <= speed and either push.

    |theta''| = |g sin - cos (F + m l omega^2 sin) / M| / (l (4/3 - m cos^2 / M)); with |cos| <= 1 in the numerator and
    cos^2 <= 1 in the denominator every term is at its largest. Increasing in `angle` and `speed`.
    """
    sine = math.sin(angle)
    return (GRAVITY * sine + (FORCE + POLE * speed**2 * sine) / MASS) / (LENGTH * (4 / 3 - 0.1 / MASS))


def _bounds_after(steps: int) -> tuple[float, float]:
    """Bounds on |theta| and |x| after `steps` Euler steps from the initial box, whatever the pushes."""
    angle = speed = position = velocity = START
    for _ in range(steps):
        angular = _largest_angular_acceleration(angle, speed)
        # |x''| = |temp - m l theta'' cos / M|, temp = (F + m l omega^2 sin) / M
        linear = (FORCE + POLE * speed**2 * math.sin(angle)) / MASS + POLE * angular / MASS
        angle, speed = angle + STEP * speed, speed + STEP * angular
        position, velocity = position + STEP * velocity, velocity + STEP * linear
    return angle, position


def test_cartpole_cannot_end_before_step_eight_by_a_comparison_argument() -> None:
    """By induction |theta_k| and |omega_k| never exceed the solution of the recursion with the largest acceleration."""
    last_sure = CARTPOLE_EARLIEST_END - 1
    for steps in range(last_sure + 1):
        angle, position = _bounds_after(steps)
        assert angle < ANGLE_LIMIT - 1e-6, steps
        assert position < POSITION_LIMIT, steps
    # the largest acceleration really is increasing in both arguments, which the induction uses
    grid = [(a, w) for a in np.linspace(0, ANGLE_LIMIT, 30) for w in np.linspace(0, 5, 30)]
    for a, w in grid:
        assert _largest_angular_acceleration(a + 1e-3, w) >= _largest_angular_acceleration(a, w)
        assert _largest_angular_acceleration(a, w + 1e-3) >= _largest_angular_acceleration(a, w)


def test_cartpole_accelerations_never_exceed_their_bound() -> None:
    generator = np.random.default_rng(0)
    angle, speed = ANGLE_LIMIT, 4.0
    theta, omega = generator.uniform(-angle, angle, 100_000), generator.uniform(-speed, speed, 100_000)
    force = generator.choice([-FORCE, FORCE], 100_000)
    temp = (force + POLE * omega**2 * np.sin(theta)) / MASS
    acceleration = (GRAVITY * np.sin(theta) - np.cos(theta) * temp) / (LENGTH * (4 / 3 - 0.1 * np.cos(theta) ** 2 / MASS))
    assert np.abs(acceleration).max() <= _largest_angular_acceleration(angle, speed)


def test_cartpole_earliest_end_by_brute_force_over_actions_and_corners() -> None:
    """All 2^9 action sequences from all 16 corners of the initial box, in Gymnasium's own vector environment."""
    sequences = np.array(list(itertools.product((0, 1), repeat=9)))
    corners = np.array(list(itertools.product((-START, START), repeat=4)))
    env = CartPoleVectorEnv(num_envs=len(sequences) * len(corners), max_episode_steps=500)
    env.reset(seed=0)
    env.state = np.repeat(corners, len(sequences), axis=0).T.copy()
    actions = np.tile(sequences, (len(corners), 1))
    ends = np.full(env.num_envs, 99)
    for t in range(9):
        terminated = env.step(actions[:, t])[2]
        ends = np.where(terminated & (ends == 99), t + 1, ends)
    assert ends.min() >= CARTPOLE_EARLIEST_END
    assert ends.min() == CARTPOLE_EARLIEST_END  # and it is attained: 8 cannot be raised to 9


def test_bounds_of_cartpole() -> None:
    assert known_return_bounds(EnvRecipe(env_id="CartPole-v1")) == (8.0, 500.0)
    assert known_return_bounds(EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=Gaussian(0.2), frame_stack=5)) == (
        8.0,
        200.0,
    )
    assert known_return_bounds(EnvRecipe(env_id="CartPole-v1", max_episode_steps=5)) == (5.0, 5.0)


@pytest.mark.parametrize(
    ("env_id", "horizon"), [("Acrobot-v1", 500), ("MountainCar-v0", 200), ("Acrobot-v1", 30), ("CartPole-v1", 500)]
)
def test_no_behaviour_leaves_the_bounds(env_id: str, horizon: int) -> None:
    low, high = known_return_bounds(EnvRecipe(env_id=env_id, max_episode_steps=horizon))
    assert low is not None
    assert high is not None
    env = gym.make(env_id, max_episode_steps=horizon)
    generator, returns = np.random.default_rng(0), []
    n_actions = int(env.action_space.n)  # type: ignore[attr-defined]
    for episode in range(4):
        env.reset(seed=episode)
        total, done = 0.0, False
        constant = episode % n_actions
        while not done:
            action = constant if episode < 2 else int(generator.integers(n_actions))
            _, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    assert all(low <= total <= high for total in returns)
    if env_id == "MountainCar-v0":
        assert min(returns) == low  # pushing one way never gets there


@pytest.mark.parametrize(
    "recipe",
    [
        EnvRecipe(env_id="FrozenLake-v1"),
        EnvRecipe(env_id="Pendulum-v1"),
        EnvRecipe(env_id="MountainCarContinuous-v0"),
        EnvRecipe(env_id="CartPole-v1", env_kwargs={"sutton_barto_reward": True}),
        EnvRecipe(env_id="CartPole-v1", wrappers=(lambda env: env,)),
        EnvRecipe(factory=CartPoleEnv, max_episode_steps=500),
    ],
    ids=lambda recipe: recipe.label,
)
def test_nothing_is_claimed_about_environments_without_a_proof(recipe: EnvRecipe) -> None:
    assert known_return_bounds(recipe) == (None, None)


@pytest.mark.parametrize("env_id", ["CartPole-v77", "elsewhere/CartPole-v1"])
def test_a_name_is_not_a_proof(env_id: str) -> None:
    """Anyone may register an environment under a familiar name, or Gymnasium's under other rules."""

    class Negative(CartPoleEnv):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            return observation, -1.0, *rest

    gym.register(env_id, entry_point=Negative, max_episode_steps=500)
    try:
        assert known_return_bounds(EnvRecipe(env_id=env_id)) == (None, None)
        original = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
        gym.register(env_id + "1", entry_point=original, max_episode_steps=500, kwargs={"sutton_barto_reward": True})
        assert known_return_bounds(EnvRecipe(env_id=env_id + "1")) == (None, None)
    finally:
        registry.pop(env_id)
        registry.pop(env_id + "1", None)
