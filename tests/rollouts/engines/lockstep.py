"""EnvPool and Gymnasium, step by step: Gymnasium is put into EnvPool's state, both take the same action.

The table of docs/engines.md, for the mujoco that is installed:

    PYTHONPATH=tests python -m rollouts.engines.lockstep [--slots 40] [--steps 1000] [id ...]
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines.envpool import DIFFERENT, SAME, EnvPoolEngine

PUMPS: dict[str, tuple[float, ...]] = {
    "CartPole-v1": (0.05, 0.1, 1.0, 0.3),
    "MountainCar-v0": (0.0, 100.0),
    "MountainCarContinuous-v0": (0.0, 100.0),
    "Acrobot-v1": (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "Pendulum-v1": (0.0, 0.0, 1.0),
    "InvertedPendulum-v5": (0.3, 9.0, 0.5, 1.5),
    "InvertedDoublePendulum-v5": (0.0, 5.0, 3.0, 0.0, 0.0, 0.2, 1.0, 0.5, 0.0),
}
"""Linear rules that balance a pole or swing up: random actions alone would see neither long episodes nor a goal."""


class Worst(NamedTuple):
    """The largest differences, as |difference| / (1 + |value|), and how much was compared."""

    first: float
    frame: float
    reward: float
    finished: int
    """Steps after which one of the two had ended and the other had not."""
    steps: int
    ended: int
    """Episodes that ended."""


def put(env_id: str, env: Any, frame: np.ndarray, first: bool) -> None:
    """Put Gymnasium's environment into the state behind a frame of EnvPool's.

    What the frame does not tell (a horizontal position, a velocity beyond its clip, Pusher's moving object) stays as
    Gymnasium's own last steps left it; the physics of the former does not depend on it.
    """
    frame = frame.astype(np.float64)
    match env_id:
        case "CartPole-v1" | "MountainCar-v0":
            env.state = tuple(frame)
            return
        case "MountainCarContinuous-v0":
            env.state = frame
            return
        case "Acrobot-v1":
            env.state = np.array([*np.arctan2(frame[[1, 3]], frame[[0, 2]]), *frame[4:]])
            return
        case "Pendulum-v1":
            env.state = np.array([np.arctan2(frame[1], frame[0]), frame[2]])
            return
    position, velocity = env.data.qpos.copy(), env.data.qvel.copy()
    known_velocity = np.empty(0)
    match env_id:
        case "InvertedPendulum-v5":
            position[:], known_velocity = frame[:2], frame[2:]
        case "InvertedDoublePendulum-v5":
            position[0], known_velocity = frame[0], frame[5:8]
            position[1:] += _turn(np.arctan2(frame[1:3], frame[3:5]) - position[1:])
        case "Reacher-v5":
            position[:2] += _turn(np.arctan2(frame[2:4], frame[:2]) - position[:2])
            position[2:], known_velocity = frame[4:6], frame[6:8]
        case "Pusher-v5":
            position[:7], known_velocity = frame[:7], frame[7:14]
            if first:
                position[-4:] = velocity[-4:] = 0
                env.set_state(position, velocity)
                position[-4:-2] = (frame[17:19] - env.get_body_com("object")[:2])[::-1]
        case _:
            hidden = {"Ant-v5": 2, "Humanoid-v5": 2, "HumanoidStandup-v5": 2, "Swimmer-v5": 2}.get(env_id, 1)
            shown = position.size - hidden
            position[hidden:], known_velocity = frame[:shown], frame[shown : shown + velocity.size]
    clip = 10.0 if env_id in ("Hopper-v5", "Walker2d-v5", "InvertedDoublePendulum-v5") else np.inf
    exact = np.abs(known_velocity) < clip
    velocity[: known_velocity.size][exact] = known_velocity[exact]
    if first:
        env.set_state(position, velocity)
    else:  # no forward pass: it would change what the solver starts from
        env.data.qpos[:], env.data.qvel[:] = position, velocity


def _turn(angle: np.ndarray) -> np.ndarray:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def actions_for(env_id: str, space: Any, frames: np.ndarray, slots: np.ndarray, t: int, rng: np.random.Generator) -> np.ndarray:
    """Small, large, saturated, swinging and sensible actions: slot by slot another kind."""
    kind = slots % 5
    rule = np.tanh(frames @ np.array(PUMPS[env_id])) if env_id in PUMPS else np.zeros(len(slots))
    rule = np.where(kind == 0, rule + rng.normal(0, 0.05, len(slots)), rule * rng.choice([0, 1], len(slots)))
    if isinstance(space, gym.spaces.Discrete):
        wild = rng.integers(space.n, size=len(slots))
        sensible = np.where(rule > 0, space.n - 1, 0)
        return np.where(kind < 2, sensible, wild).astype(np.int64)
    noise = rng.uniform(-1, 1, (len(slots), *space.shape))
    scale = np.choose(kind, [0.0, 0.1, 1.0, 1.0, 0.4])[:, None]
    swing = np.sin(0.1 * t * (1 + slots % 7))[:, None] * (kind == 4)[:, None]
    noise = np.where(kind[:, None] == 3, np.sign(noise), noise)
    return (space.high * np.clip(rule[:, None] + scale * noise + swing, -1, 1)).astype(np.float32)


def compare(env_id: str, *, slots: int = 10, steps: int = 200, seed: int = 0) -> Worst:
    """Play EnvPool's episodes and Gymnasium's steps beside them."""
    recipe = EnvRecipe(env_id=env_id)
    engine, rng, space = EnvPoolEngine(recipe), np.random.default_rng(seed), recipe.action_space
    frames, _ = engine.start(slots, np.random.SeedSequence(seed))
    singles = [recipe.base_env(checked=False) for _ in range(slots)]
    first = 0.0
    for single, frame in zip(singles, frames, strict=True):
        own, _ = single.reset(seed=0)
        put(env_id, single.unwrapped, frame, first=True)
        if hasattr(single.unwrapped, "_get_obs"):
            own = single.unwrapped._get_obs()
            first = max(first, float(np.abs(own - frame).max()))
    running, frame_error, reward_error, disagreed, compared, ended = np.arange(slots), 0.0, 0.0, 0, 0, 0
    for t in range(steps):
        actions = actions_for(env_id, space, frames, running, t, rng)
        for row, slot in enumerate(running if t else []):
            put(env_id, singles[slot].unwrapped, frames[row], first=False)
        step = engine.step(actions)
        for row, slot in enumerate(running):
            frame, reward, terminated, truncated, _ = singles[slot].step(actions[row])
            frame_error = max(frame_error, float((np.abs(step.frames[row] - frame) / (1 + np.abs(frame))).max()))
            reward_error = max(reward_error, abs(step.rewards[row] - float(reward)) / (1 + abs(float(reward))))
            disagreed += step.finished[row] != (terminated or truncated)
        compared, ended = compared + len(running), ended + int(step.finished.sum())
        running, frames = running[~step.finished], step.frames[~step.finished]
        if not running.size:
            break
        engine.keep(~step.finished)
    engine.close()
    return Worst(first, frame_error, float(reward_error), int(disagreed), compared, ended)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--slots", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    print(f"envpool {version('envpool')}, gymnasium {gym.__version__}, mujoco {version('mujoco')}")
    for name in options.ids or [*SAME, *DIFFERENT]:
        print(name, compare(name, slots=options.slots, steps=options.steps), flush=True)
