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
from robustrl.registration import register_envs

register_envs()

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
        EnvRecipe(env_id="Hopper-v5"),
        EnvRecipe(env_id="CartPole-v1", env_kwargs={"sutton_barto_reward": True}),
        EnvRecipe(env_id="MountainCarContinuous-v0", env_kwargs={"goal_velocity": 0.01}),
        EnvRecipe(env_id="Pendulum-v1", env_kwargs={"g": 9.81}),
        EnvRecipe(env_id="InvertedPendulum-v5", env_kwargs={"reset_noise_scale": 0.02}),
        EnvRecipe(env_id="robustrl/Atari-v0"),
        EnvRecipe(env_id="robustrl/Atari-v0", env_kwargs={"game": "Boxing"}),
        EnvRecipe(env_id="robustrl/PongOneRound-v0", wrappers=(lambda env: env,)),
        EnvRecipe(env_id="CartPole-v1", wrappers=(lambda env: env,)),
        EnvRecipe(factory=CartPoleEnv, max_episode_steps=500),
    ],
    ids=lambda recipe: recipe.label,
)
def test_nothing_is_claimed_about_environments_without_a_proof(recipe: EnvRecipe) -> None:
    assert known_return_bounds(recipe) == (None, None)


PENDULUM = math.pi**2 + 0.1 * 8**2 + 0.001 * 2**2


@pytest.mark.parametrize(
    ("env_id", "low", "high"),
    [
        ("MountainCarContinuous-v0", -99.9, 100.0),
        ("Pendulum-v1", -200 * PENDULUM, 0.0),
        ("InvertedPendulum-v5", 0.0, 1000.0),
        ("robustrl/PongOneRound-v0", -1.0, 1.0),
        ("robustrl/Freeway-v0", 0.0, None),
    ],
)
def test_bounds_are_those_of_the_definitions(env_id: str, low: float, high: float | None) -> None:
    found_low, found_high = known_return_bounds(EnvRecipe(env_id=env_id))
    assert found_high == high
    assert found_low is not None
    assert found_low == pytest.approx(low, rel=2e-7)
    assert found_low <= low
    shorter_low, _ = known_return_bounds(EnvRecipe(env_id=env_id, max_episode_steps=7))
    assert shorter_low is not None
    assert shorter_low >= found_low


@pytest.mark.parametrize(
    ("kwargs", "bounds"),
    [
        ({"game": "Breakout", "one_round": True}, (-1.0, 1.0)),
        ({"game": "ALE/Freeway-v5", "mode": 1}, (0.0, None)),
        ({"game": "freeway", "one_round": False}, (0.0, None)),
    ],
)
def test_bounds_of_atari_games_follow_their_options(kwargs: dict[str, Any], bounds: tuple[float | None, float | None]) -> None:
    assert known_return_bounds(EnvRecipe(env_id="robustrl/Atari-v0", env_kwargs=kwargs)) == bounds


def test_a_round_that_is_switched_off_has_no_bounds() -> None:
    recipe = EnvRecipe(env_id="robustrl/PongOneRound-v0", env_kwargs={"one_round": False})
    assert known_return_bounds(recipe) == (None, None)


def _returns(env_id: str, policies: list[Any], **kwargs: Any) -> list[float]:
    """Returns of one episode per policy, a function of (step, observation, generator)."""
    env, returns = gym.make(env_id, **kwargs), []
    for seed, policy in enumerate(policies):
        generator, t, total, done = np.random.default_rng(seed), 0, 0.0, False
        observation, _ = env.reset(seed=seed)
        while not done:
            observation, reward, terminated, truncated, _ = env.step(policy(t, observation, generator))
            t, total, done = t + 1, total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def _extremes(size: float) -> list[Any]:
    """Constant, alternating, random and bang-bang actions up to `size`; the last two pump energy in and take it out."""

    def act(value: float) -> Any:
        return np.array([value], np.float32)

    return [
        lambda t, o, g: act(size),
        lambda t, o, g: act(-size),
        lambda t, o, g: act(0.0),
        lambda t, o, g: act(size * (-1) ** t),
        lambda t, o, g: act(size * (-1) ** (t // 20)),
        lambda t, o, g: act(g.uniform(-size, size)),
        lambda t, o, g: act(size if o[-1] >= 0 else -size),
        lambda t, o, g: act(-size if o[-1] >= 0 else size),
    ]


@pytest.mark.parametrize(
    ("env_id", "size"), [("MountainCarContinuous-v0", 1.0), ("Pendulum-v1", 2.0), ("InvertedPendulum-v5", 3.0)]
)
def test_no_extreme_action_leaves_the_bounds(env_id: str, size: float) -> None:
    low, high = known_return_bounds(EnvRecipe(env_id=env_id))
    assert low is not None
    assert high is not None
    returns = _returns(env_id, _extremes(size))
    assert min(returns) >= low
    assert max(returns) <= high


@pytest.mark.parametrize("horizon", [999, 15])
def test_the_worst_return_of_the_continuous_mountain_car_is_attained(horizon: int) -> None:
    """Full throttle in one direction never gets there; the float sum of 15 times -0.1 is below -0.1 15."""
    (worst,) = _returns("MountainCarContinuous-v0", _extremes(1.0)[:1], max_episode_steps=horizon)
    low, _ = known_return_bounds(EnvRecipe(env_id="MountainCarContinuous-v0", max_episode_steps=horizon))
    assert low is not None
    assert low <= worst < -0.1 * horizon + 1e-9
    assert horizon == 999 or worst < -0.1 * horizon


def test_the_continuous_mountain_car_succeeds_if_and_only_if_its_return_is_positive() -> None:
    """Brute force over policies that pump with every force; even the slowest success pays more than it cost."""
    env: Any = gym.make("MountainCarContinuous-v0")
    outcomes = set()
    for k, force in enumerate([*np.linspace(0.0, 1.0, 9), 0.05, 1.0]):
        observation, _ = env.reset(seed=k)
        total, terminated, truncated, t = 0.0, False, False, 0
        while not (terminated or truncated):
            late = k == 10 and t < 700  # waste fuel first
            action = 1.0 if late else force if observation[1] >= 0 else -force
            observation, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
            total, t = total + reward, t + 1
        assert terminated == (total > 0.05)
        assert total >= 100 - 99.9 - 1e-9 if terminated else total <= 0
        outcomes.add(bool(terminated))
    assert outcomes == {True, False}


def test_pendulum_steps_attain_their_worst_but_never_exceed_it() -> None:
    env: Any = gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    generator, worst = np.random.default_rng(0), 0.0
    angles = [math.pi, -math.pi, -math.pi - 1e-16, math.nextafter(-math.pi, -9), *generator.uniform(-1e6, 1e6, 3_000)]
    for angle in angles:
        env.state = np.array([angle, generator.choice([-8.0, 8.0])])
        worst = min(worst, float(env.step(np.array([2.0], np.float32))[1]))
    low, _ = known_return_bounds(EnvRecipe(env_id="Pendulum-v1", max_episode_steps=1))
    assert low is not None
    assert low <= worst < -PENDULUM + 1e-6


def test_freeway_never_pays_less_than_nothing() -> None:
    """ALE clips the change of Freeway's score to 0 or 1 per frame; these frames are single, up, down and mostly up."""
    env: Any = gym.make("robustrl/Atari-v0", game="freeway", frame_skip=1, max_episode_steps=700)
    rewards = set()
    for seed, policy in enumerate(
        [lambda g: 1, lambda g: 2, lambda g: int(g.integers(3)), lambda g: 1 + int(g.random() < 0.1)]
    ):
        generator, done = np.random.default_rng(seed), False
        env.reset(seed=seed)
        while not done:
            _, reward, terminated, truncated, _ = env.step(policy(generator))
            rewards.add(reward)
            done = terminated or truncated
    assert rewards == {0.0, 1.0}


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
