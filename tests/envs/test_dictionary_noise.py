"""Noise on dictionary observations: that of their joint vector, each entry where it belongs, on every host."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy import stats
from stable_baselines3.common.vec_env import DummyVecEnv

from robustrl.envs import EnvRecipe, NoiseObservation, add_noise, check_chain, make_vec_env, sb3, vector
from robustrl.envs.joint import as_batch, first_row, float_space, join, joint_box, split
from robustrl.errors import ChainError
from robustrl.noise import Gaussian, Uniform

LENGTH, N = 4, 3
SPACE = spaces.Dict(
    [
        ("b", spaces.Box(-1, 1, (2,), np.float32)),  # not in alphabetical order
        ("a", spaces.Box(-1, 1, (2, 2), np.float64)),
        ("c", spaces.Box(-1, 1, (), np.float32)),
    ]
)
SIGMA = (0.1, 0.2, 1.0, 2.0, 4.0, 8.0, 32.0)
NOISE = Gaussian(SIGMA)
PLACE = {"b": (slice(0, 2), (2,)), "a": (slice(2, 6), (2, 2)), "c": (slice(6, 7), ())}
OFFSET = {"b": 1.0, "a": -2.0, "c": 3.0}


class Still(gym.Env[Any, Any]):
    """The true observation never changes, so what a wrapper shows is its noise; episodes last LENGTH steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: Any = SPACE) -> None:
        self.observation_space = space

    def _observation(self) -> Any:
        shapes = {key: (part.shape, part.dtype) for key, part in self.observation_space.items()}  # type: ignore[attr-defined]
        return {key: np.full(shape, OFFSET.get(key, 0), dtype) for key, (shape, dtype) in shapes.items()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self._observation(), 1.0, self._steps == LENGTH, False, {}


def _single(episodes: int) -> list[Any]:
    env, seen = NoiseObservation(Still(), NOISE, seed=0), []
    for _ in range(episodes):
        seen += [env.reset()[0]] + [env.step(0)[0] for _ in range(LENGTH)]
    return [as_batch(one) for one in seen]


def _vector(mode: AutoresetMode, episodes: int) -> list[Any]:
    env = vector.NoiseObservation(SyncVectorEnv([Still] * N, autoreset_mode=mode), NOISE, seed=0)
    seen = [env.reset()[0]]
    for _ in range(episodes * LENGTH):
        observation, *_, info = env.step(np.zeros(N, dtype=np.int64))
        seen.append({key: part.copy() for key, part in observation.items()})
        seen += [as_batch(info["final_obs"][i]) for i in np.flatnonzero(info.get("_final_obs", []))]
    return seen


def _sb3(episodes: int) -> list[Any]:
    env = sb3.NoiseObservation(DummyVecEnv([Still] * N), NOISE, seed=0)
    seen = [env.reset()]
    for _ in range(episodes * LENGTH):
        observation, _, dones, infos = env.step(np.zeros(N, dtype=np.int64))
        seen.append(observation)
        seen += [as_batch(info["terminal_observation"]) for info, done in zip(infos, dones, strict=True) if done]
    return seen


HOSTS = {
    "single": lambda: _single(400),
    "vector, next-step autoreset": lambda: _vector(AutoresetMode.NEXT_STEP, 150),
    "vector, same-step autoreset": lambda: _vector(AutoresetMode.SAME_STEP, 150),
    "Stable-Baselines3": lambda: _sb3(150),
}


@pytest.mark.parametrize("host", HOSTS)
def test_every_key_carries_its_part_of_the_joint_noise(host: str) -> None:
    """Law and place: each entry has the sigma of its place in the joint vector, independent of the others."""
    seen = HOSTS[host]()
    columns = []
    for key, (place, shape) in PLACE.items():
        parts = np.concatenate([step[key] for step in seen])
        assert parts.dtype == np.float32
        assert parts.shape[1:] == shape
        scaled = (parts.reshape(len(parts), -1).astype(np.float64) - OFFSET[key]) / np.array(SIGMA)[place]
        for column in scaled.T:
            assert stats.kstest(column, "norm").pvalue > 1e-3
            columns.append(column)
    n = len(columns[0])
    assert n >= 1800
    correlations = np.corrcoef(columns) - np.eye(7)
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
    assert len(np.unique(np.stack(columns, axis=1), axis=0)) == n


@pytest.mark.parametrize("wrap", [lambda: Still(), lambda: SyncVectorEnv([Still] * 2), lambda: DummyVecEnv([Still] * 2)])
def test_the_host_is_picked_and_its_chain_is_right(wrap: Any) -> None:
    env = add_noise(wrap(), NOISE)
    assert check_chain(add_noise(gym.wrappers.TimeLimit(Still(), 9), NOISE)).noise == NOISE
    space = getattr(env, "single_observation_space", env.observation_space)
    assert list(space) == ["b", "a", "c"]
    assert all(part == spaces.Box(-np.inf, np.inf, SPACE[key].shape, np.float32) for key, part in space.items())


def test_a_masked_reset_leaves_running_episodes_with_the_dictionary_they_have() -> None:
    env = vector.NoiseObservation(SyncVectorEnv([Still] * 4, autoreset_mode=AutoresetMode.DISABLED), NOISE, seed=0)
    env.reset()
    before = {key: part.copy() for key, part in env.step(np.zeros(4, dtype=np.int64))[0].items()}
    mask = np.array([True, False, True, False])
    after, _ = env.reset(options={"reset_mask": mask})
    for key in SPACE:
        assert np.array_equal(after[key][~mask], before[key][~mask])
        assert np.all(after[key][mask] != before[key][mask])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gymnasiums_checker_accepts_the_wrapper() -> None:
    check_env(NoiseObservation(Still(), Uniform(0.2)), skip_render_check=True)


def test_a_vector_env_of_dictionaries_is_noise_inside_and_nothing_else() -> None:
    env = make_vec_env(Still, 2, noise=NOISE, max_episode_steps=3, seed=1)
    again = make_vec_env(Still, 2, noise=NOISE, max_episode_steps=3, seed=1)
    first, second = env.reset(), again.reset()
    assert all(np.array_equal(first[key], second[key]) for key in SPACE)
    assert EnvRecipe.of(env).frame_space == joint_box(SPACE)


def test_joining_and_splitting_are_inverse_and_in_the_spaces_order() -> None:
    generator = np.random.default_rng(0)
    batch = {key: generator.random((5, *part.shape)).astype(np.float32) for key, part in SPACE.items()}
    joint = join(batch, SPACE)
    assert joint.shape == (5, *joint_box(SPACE).shape) == (5, 7)
    for key, (place, _) in PLACE.items():
        assert np.array_equal(joint[:, place], batch[key].reshape(5, -1))
    parts = split(joint, SPACE)
    assert list(parts) == list(SPACE)
    assert all(np.array_equal(parts[key], batch[key]) for key in SPACE)
    row = first_row(parts)
    assert all(np.array_equal(as_batch(row)[key][0], batch[key][0]) for key in SPACE)
    assert np.array_equal(joint[0], spaces.flatten(SPACE, row))
    box = spaces.Box(-1, 1, (3,), np.float32)
    plain = np.ones((2, 3))
    assert join(plain, box) is plain
    assert split(plain, box) is plain
    assert float_space(box, 5.0) == spaces.Box(-5, 5, (3,), np.float32)


WITH_INTEGERS = spaces.Dict({"a": SPACE["a"], "n": spaces.Box(0, 9, (2,), np.int64)})
WITH_BYTES = spaces.Dict({"a": SPACE["a"], "image": spaces.Box(0, 255, (4, 4, 1), np.uint8)})
WITH_CHOICE = spaces.Dict({"a": SPACE["a"], "which": spaces.Discrete(3)})
NESTED = spaces.Dict({"a": spaces.Dict({"b": SPACE["b"]})})


REFUSED: dict[str, tuple[spaces.Space[Any], type[Exception], str]] = {
    "integers": (WITH_INTEGERS, ChainError, "float observation space, got int64: .*convert to float and scale before"),
    "bytes": (WITH_BYTES, ChainError, "float observation space, got uint8"),
    "choice": (WITH_CHOICE, TypeError, r"^observations must be a Box space or a Dict of them, got Dict.*Discrete\(3\)"),
    "nested": (NESTED, TypeError, "^observations must be a Box space or a Dict of them"),
    "tuple": (spaces.Tuple((SPACE["a"],)), TypeError, "^noise needs a Box observation space or a Dict of them, got Tuple"),
}
WRAP: dict[str, Any] = {
    "single": lambda make: NoiseObservation(make(), NOISE),
    "add_noise": lambda make: add_noise(make(), NOISE),
    "vector": lambda make: vector.NoiseObservation(SyncVectorEnv([make]), NOISE),
    "sb3": lambda make: sb3.NoiseObservation(DummyVecEnv([make]), NOISE),
}


@pytest.mark.parametrize(
    ("host", "name"),  # Stable-Baselines3 refuses the last two itself
    [(host, name) for host in WRAP for name in REFUSED if host != "sb3" or name not in ("nested", "tuple")],
)
def test_entries_that_cannot_carry_noise_are_refused(host: str, name: str) -> None:
    space, kind, message = REFUSED[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        WRAP[host](lambda: Still(space))


def test_a_sigma_of_another_length_is_refused() -> None:
    env = NoiseObservation(Still(), Gaussian((0.1, 0.2)))
    with pytest.raises(ValueError, match="sigma has 2 entries, but the frames' last axis has 7"):
        env.reset()
