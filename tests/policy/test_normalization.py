"""Frozen normalisation: the numbers of SB3's VecNormalize, in a file without code, inside or outside the noise."""

from __future__ import annotations

import io
import math
import pickle
from functools import cache
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from robustrl.envs import EnvRecipe, make_vec_env, sb3
from robustrl.errors import UnsafeModelError
from robustrl.noise import Gaussian
from robustrl.policy import Normalization, PolicyView, start_stack

NOISE = Gaussian(0.2)
STATISTICS = Normalization([0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1e-6, 0.0], epsilon=1e-4, clip=1.5)


class Pixels(gym.Env[Any, Any]):
    """Random pictures of bytes."""

    observation_space = spaces.Box(0, 255, (4, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (4, 3), dtype=np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.integers(0, 256, (4, 3), dtype=np.uint8), 0.0, False, False, {}


def cartpole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1")


def driven(env: Any, steps: int = 60, **options: Any) -> Any:
    """A VecNormalize that has seen something."""
    live = VecNormalize(env, **options)
    live.seed(0)
    live.reset()
    live.action_space.seed(0)
    for _ in range(steps):
        live.step(np.array([live.action_space.sample() for _ in range(live.num_envs)]))
    live.training = False
    return live


def build(env: Any, algorithm: Any = PPO) -> Any:
    options: dict[str, Any] = {"buffer_size": 2} if algorithm is SAC else {"n_steps": 2, "batch_size": 2}
    model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, device="cpu", seed=0, **options)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter *= 1.5
    return model


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("make", "dtype"), [(cartpole, np.float32), (cartpole, np.float64), (Pixels, np.uint8)])
@pytest.mark.parametrize("clip", [10.0, 0.5])
def test_it_gives_the_same_bits_as_vec_normalize(make: Any, dtype: Any, clip: float) -> None:
    live = driven(DummyVecEnv([make] * 3), clip_obs=clip, epsilon=1e-3)
    x = (30 * np.random.default_rng(0).random((200, *live.observation_space.shape))).astype(dtype)
    ours = Normalization.of(live)(x)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, live.normalize_obs(x))
    assert np.abs(ours).max() <= clip
    assert (np.abs(ours) == clip).any() == (clip == 0.5 or make is cartpole)


def test_statistics_do_not_follow_the_vec_normalize_they_come_from() -> None:
    live = driven(DummyVecEnv([cartpole] * 3))
    frozen = Normalization.of(live)
    before = frozen.to_dict()
    live.training = True
    live.step(np.zeros(3, dtype=np.int64))
    live.obs_rms.mean[:] += 1
    assert frozen.to_dict() == before
    assert frozen != Normalization.of(live)


def test_normalisations_are_equal_when_their_numbers_are() -> None:
    same = Normalization(STATISTICS.mean.copy(), STATISTICS.var.copy(), 1e-4, 1.5)
    assert same == STATISTICS
    assert hash(same) == hash(STATISTICS)
    others = [
        Normalization(STATISTICS.mean + 1e-15, STATISTICS.var, 1e-4, 1.5),
        Normalization(STATISTICS.mean, STATISTICS.var * (1 + 1e-15), 1e-4, 1.5),
        Normalization(STATISTICS.mean, STATISTICS.var, 2e-4, 1.5),
        Normalization(STATISTICS.mean, STATISTICS.var, 1e-4, 1.6),
        Normalization(STATISTICS.mean.reshape(2, 2), STATISTICS.var.reshape(2, 2), 1e-4, 1.5),
    ]
    assert all(other != STATISTICS for other in others)
    assert STATISTICS.to_dict() != STATISTICS
    negative = Normalization([-0.0], [1.0])
    assert negative == Normalization([0.0], [1.0])
    assert hash(negative) == hash(Normalization([0.0], [1.0]))


def test_the_scale_is_the_size_of_one_normalised_unit() -> None:
    x = np.zeros((1, 4))
    one = STATISTICS(STATISTICS.mean + STATISTICS.scale)
    assert np.allclose(one, 1.0)
    assert np.allclose(STATISTICS(x), np.clip(-STATISTICS.mean / np.sqrt(STATISTICS.var + 1e-4), -1.5, 1.5))


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("shape", [(4,), (), (3, 2), (2, 3, 4)])
def test_files_give_back_every_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    original = Normalization(generator.standard_normal(shape), generator.random(shape), 1e-7, 1 / 3)
    original.save(tmp_path / "normalization.npz")
    for loaded in (Normalization.load(tmp_path / "normalization.npz"), Normalization.of(str(tmp_path / "normalization.npz"))):
        assert loaded == original
        assert loaded.mean.tobytes() == original.mean.tobytes()
    assert Normalization.from_dict(original.to_dict()) == original
    assert Normalization.of(original) is original


def _refused(content: bytes) -> bool:
    """Whether damaged content is refused; anything else but the unharmed numbers fails."""
    try:
        assert Normalization.load(cast(Any, io.BytesIO(content))) == STATISTICS
    except ValueError as error:
        assert "is not a normalisation file (" in str(error)  # noqa: PT017
        return True
    return False


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    STATISTICS.save(tmp_path / "normalization.npz")
    found = (tmp_path / "normalization.npz").read_bytes()
    assert not _refused(found)
    return found


def test_every_truncation_of_a_file_is_refused(content: bytes) -> None:
    assert all(_refused(content[:length]) for length in range(len(content)))


def test_flipped_bits_are_refused_or_change_nothing(content: bytes) -> None:
    """A random bit of every byte, and every bit of the archive's headers: versions, compression and encryption among them."""
    generator = np.random.default_rng(0)
    places = [(i, int(generator.integers(8))) for i in range(len(content))]
    for signature in (b"PK\x01\x02", b"PK\x03\x04"):
        start = content.index(signature)
        places += [(start + i, bit) for i in range(16) for bit in range(8)]
    refused = 0
    for i, bit in places:
        flipped = bytearray(content)
        flipped[i] ^= 1 << bit
        refused += _refused(bytes(flipped))
    assert refused > len(places) // 2


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


FIELDS = {"mean": np.zeros(2), "var": np.ones(2), "epsilon": np.float64(1e-8), "clip": np.float64(10)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"mean",
        pickle.dumps({"mean": 1}),
        _npz(**{k: v for k, v in FIELDS.items() if k != "var"}),
        _npz(**{**FIELDS, "mean": np.zeros(3)}),
        _npz(**{**FIELDS, "mean": np.array([0, np.nan])}),
        _npz(**{**FIELDS, "var": np.array([1.0, -1.0])}),
        _npz(**{**FIELDS, "clip": np.float64(0)}),
        _npz(**{**FIELDS, "epsilon": np.zeros(2)}),
        _npz(**{**FIELDS, "mean": np.array(["a", "b"])}),
        _npz(**{**FIELDS, "mean": np.array([{}, 1], dtype=object)}),
    ],
    ids=["empty", "text", "pickle", "no var", "shapes", "nan", "negative", "clip 0", "epsilon", "letters", "objects"],
)
def test_what_holds_no_normalisation_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "normalization.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"normalization\.npz is not a normalisation file \("):
        Normalization.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    path.write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(ValueError, match="is not a normalisation file"):
        Normalization.of(path)


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_foreign_pickle_is_loaded_with_trust_and_never_without(tmp_path: Path) -> None:
    live = driven(DummyVecEnv([cartpole] * 2))
    live.save(str(tmp_path / "vecnormalize.pkl"))
    with pytest.raises(UnsafeModelError, match=r"vecnormalize\.pkl is a pickle, .*pass --trust \(trust=True\)"):
        Normalization.of(tmp_path / "vecnormalize.pkl")
    assert Normalization.of(tmp_path / "vecnormalize.pkl", trust=True) == Normalization.of(live)
    (tmp_path / "planted.pkl").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    for name in ("planted.pkl", "planted.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
        with pytest.raises(ValueError, match=r"is a pickle|is not a normalisation file"):
            Normalization.of(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="^normalization must be a Normalization, a VecNormalize or a file"):
        Normalization.of(tmp_path / "planted.pkl", trust=True)
    assert (tmp_path / "ran").exists()  # the control: trust is what lets it run


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2])[:-3]])
def test_a_damaged_pickle_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "vecnormalize.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"vecnormalize\.pkl is not a normalisation file"):
        Normalization.of(tmp_path / "vecnormalize.pkl", trust=True)


def _switched_off() -> Any:
    live = VecNormalize(DummyVecEnv([cartpole]))
    live.norm_obs = False
    return live


def _partial(keys: list[str]) -> Any:
    class Two(gym.Env[Any, Any]):
        observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (1,))})
        action_space = spaces.Discrete(2)

    return VecNormalize(DummyVecEnv([Two]), norm_obs_keys=keys)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: Normalization([0.0], [1.0, 1.0]), ValueError, r"^mean and var must have the same shape, got \(1,\) and \(2,\)"),
        (lambda: Normalization([0.0], [-1e-9]), ValueError, "^var must be >= 0, got -1e-09"),
        (lambda: Normalization([math.nan], [1.0]), ValueError, "^mean must be finite"),
        (lambda: Normalization([0.0], [math.inf]), ValueError, "^var must be finite"),
        (lambda: Normalization([], []), ValueError, "^mean must not be empty"),
        (lambda: Normalization(["a"], [1.0]), TypeError, "^mean must be numeric"),
        (lambda: Normalization([0.0], [1.0], epsilon=0), ValueError, "^epsilon must be a finite number > 0"),
        (lambda: Normalization([0.0], [1.0], epsilon=math.nan), ValueError, "^epsilon must be"),
        (lambda: Normalization([0.0], [1.0], clip=-1), ValueError, "^clip must be a finite number > 0"),
        (lambda: Normalization([0.0], [1.0], clip=math.inf), ValueError, "^clip must be"),
        (lambda: Normalization([0.0], [1.0], clip=True), TypeError, "^clip must be"),
        (lambda: Normalization.from_dict({}), ValueError, "^not a normalisation: 'mean'"),
        (lambda: Normalization.from_dict({"mean": [0], "var": [1], "epsilon": 1e-8}), ValueError, "^not a normalisation: 'clip'"),
        (lambda: Normalization.from_dict({"mean": "x", "var": [1], "epsilon": 1e-8, "clip": 1}), ValueError, "^not a normalisation"),
        (lambda: Normalization.from_dict({"mean": [0], "var": [1], "epsilon": None, "clip": 1}), ValueError, "^not a normalisation"),
        (lambda: Normalization.from_dict({"mean": [0], "var": [math.nan], "epsilon": 1, "clip": 1}), ValueError, "^var must be finite"),
        (lambda: Normalization.from_dict([1]), ValueError, "^not a normalisation"),  # type: ignore[arg-type]
        (lambda: Normalization.load("no/such/normalization.npz"), FileNotFoundError, "^no normalisation file no/such"),
        (lambda: Normalization.of("no/such/vecnormalize.pkl"), FileNotFoundError, "^no normalisation file no/such"),
        (lambda: Normalization.of("no/such/vecnormalize.pkl", trust=True), FileNotFoundError, "^no normalisation file"),
        (lambda: Normalization.of(None), TypeError, "^normalization must be a Normalization, a VecNormalize or a file, got NoneType"),
        (lambda: Normalization.of({"mean": [0]}), TypeError, "^normalization must be"),
        (lambda: Normalization.of(DummyVecEnv([cartpole])), TypeError, "^normalization must be .*got DummyVecEnv"),
        (lambda: Normalization.of(VecNormalize(DummyVecEnv([cartpole]), norm_obs=False)), ValueError, "does not normalise observations"),
        (lambda: Normalization.of(_switched_off()), ValueError, "does not normalise observations"),
        (lambda: Normalization.of(_partial(["a"])), ValueError, r"^every key must be normalised, got \['a'\] of \['a', 'b'\]"),
        (lambda: EnvRecipe(env_id="CartPole-v1", normalization="n.npz"), TypeError, "^normalization must be a robustrl Normalization"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", normalization=STATISTICS, normalize="outside"), ValueError, "^normalize must be one of 'before_noise', 'after_noise'"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="Acrobot-v1", normalization=STATISTICS).frame_space, ValueError, r"normalization has statistics of shape \(4,\), but Acrobot-v1 gives \(6,\)"),
        (lambda: make_vec_env("Acrobot-v1", normalization=STATISTICS), ValueError, r"normalization has statistics of shape \(4,\), but observations have \(6,\)"),
        (lambda: sb3.NormalizeObservation(DummyVecEnv([lambda: gym.make("FrozenLake-v1")]), STATISTICS), TypeError, "observations must be a Box space"),
        (lambda: linear().after(Normalization([0.0], [1.0])), ValueError, r"normalization has statistics of shape \(1,\), but the policy takes frames of shape \(4,\)"),
        (lambda: linear().after(STATISTICS).after(Normalization(STATISTICS.mean, STATISTICS.var)), ValueError, "^normalization must be the one that the policy has already"),
    ],
)  # fmt: skip
def test_bad_normalisations_are_refused_by_name(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


# ------------------------------------------------------------------------------------- behind a policy, and inside


def linear(frames: int = 1) -> PolicyView:
    torch.manual_seed(0)
    return PolicyView(
        nn.Linear(4 * frames, 2),
        kind="logits",
        observation_shape=(4 * frames,),
        n_frames=frames,
        critic=nn.Linear(4 * frames, 1),
    )


def test_a_policy_behind_a_normalisation_sees_normalised_frames() -> None:
    plain, x = linear(), torch.randn(50, 4)
    view = plain.after(STATISTICS)
    normalised = torch.from_numpy(STATISTICS(x.numpy()))
    assert torch.equal(view.scores(x), plain.scores(normalised))
    assert torch.equal(view.value(x), plain.value(normalised))
    assert torch.equal(plain.scores(x), linear().scores(x))  # the original is what it was
    assert view.fingerprint() not in (
        plain.fingerprint(),
        plain.after(Normalization(STATISTICS.mean, STATISTICS.var)).fingerprint(),
    )
    assert view.after(STATISTICS) is view  # twice is once
    x.requires_grad_(True)
    gradient = torch.autograd.grad(view.scores(x)[:, 0].sum(), x)[0]
    expected = plain.actor.weight[0].detach() / torch.from_numpy(STATISTICS.scale).float()  # type: ignore[union-attr]
    expected = torch.where(normalised.abs() < 1.5, expected.expand(50, 4), 0)
    assert torch.allclose(gradient, expected, rtol=1e-5)
    assert (gradient == 0).any()  # clipped entries
    assert torch.equal(view.for_inference().scores(x), view.scores(x))


def test_frame_shaped_statistics_hold_for_every_frame_of_a_stack() -> None:
    plain, frames = linear(3), torch.randn(20, 3, 4)
    view = plain.after(STATISTICS)
    normalised = torch.from_numpy(STATISTICS(frames.numpy())).reshape(20, 12)
    assert torch.equal(view.scores(view.fold(frames)), plain.scores(normalised))
    stacked = Normalization(np.arange(12) / 10, np.arange(1, 13) / 5)  # a VecNormalize outside the stack
    folded = torch.from_numpy(stacked(frames.reshape(20, 12).numpy()))
    assert torch.equal(plain.after(stacked).scores(frames.reshape(20, 12)), plain.scores(folded))


@pytest.mark.parametrize("frame", [(5, 6), (5, 6, 2), (2, 5, 6)], ids=str)
def test_statistics_of_pictures_are_stacked_as_the_pictures_are(frame: tuple[int, ...]) -> None:
    shape = {2: (3, 5, 6), 3: (5, 6, 6) if frame[-1] == 2 else (6, 5, 6)}[len(frame)]
    generator = np.random.default_rng(0)
    statistics = Normalization(generator.standard_normal(frame), 0.1 + generator.random(frame))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2))
    plain = PolicyView(network, kind="logits", observation_shape=shape, n_frames=3, frame_shape=frame)
    frames = torch.from_numpy(generator.standard_normal((7, 3, *frame))).float()
    normalised = torch.from_numpy(statistics(frames.numpy()))
    view = plain.after(statistics)
    assert torch.equal(view.scores(view.fold(frames)), plain.scores(plain.fold(normalised)))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_after_noise_is_a_vec_normalize_around_the_noisy_environment(frames: int, algorithm: Any) -> None:
    env_id = "CartPole-v1" if algorithm is PPO else "Pendulum-v1"
    env = driven(make_vec_env(env_id, 3, noise=NOISE, frame_stack=frames, seed=0))
    model, recipe = build(env, algorithm), EnvRecipe.of(env)
    assert recipe.normalize == "after_noise"
    assert recipe.normalization == Normalization.of(env)
    assert recipe.noise == NOISE
    view = recipe.view(model)
    assert recipe.view(view).fingerprint() == view.fingerprint()  # a view is not normalised a second time
    seen = env.normalize_obs(env.get_original_obs())
    for _ in range(5):
        raw = torch.from_numpy(env.get_original_obs())
        stack = raw.reshape(3, frames, -1)
        expected = model.predict(seen, deterministic=True)[0]
        np.testing.assert_allclose(view.received(view.act_blocked(stack, batch=4)), expected, atol=1e-5)
        seen, *_ = env.step(expected)
    assert np.array_equal(recipe.frames(raw.numpy()), raw.numpy())  # noise and attacks meet raw units
    if algorithm is PPO:
        assert recipe.frame_space == gym.make(env_id).observation_space


def test_a_recipe_with_frame_shaped_statistics_after_the_noise_builds_the_same_chain() -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=3, normalization=STATISTICS, normalize="after_noise")
    env, raw = make_vec_env(recipe, 2, seed=0), make_vec_env("CartPole-v1", 2, noise=NOISE, seed=0)
    model = build(env)
    view, observation = recipe.view(model), env.reset()
    stack = start_stack(torch.from_numpy(raw.reset()), 3)
    assert np.array_equal(observation, STATISTICS(stack.numpy()).reshape(2, 12))
    assert np.array_equal(view.act_blocked(stack, batch=2).numpy(), model.predict(observation, deterministic=True)[0])


@pytest.mark.parametrize("frames", [1, 3])
def test_before_noise_is_a_frozen_vec_normalize_inside_the_noise(frames: int) -> None:
    """The same seeds, bit for bit: normalisation, then noise, then the stack; final observations too."""
    inner = driven(DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=6)] * 2), norm_reward=False)
    normalization = Normalization.of(inner)
    chain: Any = sb3.NoiseObservation(inner, NOISE)
    theirs = sb3.FrameStack(chain, 3) if frames == 3 else chain
    recipe = EnvRecipe(env_id="CartPole-v1", max_episode_steps=6, noise=NOISE, normalization=normalization, frame_stack=frames)
    ours = make_vec_env(recipe, 2)
    assert recipe.frame_space == spaces.Box(-10, 10, (4,), np.float32)
    assert recipe.raw_space == gym.make("CartPole-v1").observation_space
    for env in (ours, theirs):
        env.seed(5)
    assert np.array_equal(ours.reset(), theirs.reset())
    ended = 0
    for _ in range(14):
        left, right = (env.step(np.array([1, 0])) for env in (ours, theirs))
        assert np.array_equal(left[0], right[0])
        for mine, other in zip(left[3], right[3], strict=True):
            if "terminal_observation" in other:
                ended += 1
                assert np.array_equal(mine["terminal_observation"], other["terminal_observation"])
    assert ended >= 2
    raw = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert np.array_equal(recipe.frames(raw), inner.normalize_obs(raw))
    model = build(ours)
    assert recipe.view(model).fingerprint() == PolicyView.from_sb3(model, n_frames=frames).fingerprint()


def test_recipes_with_a_normalisation_travel_in_files() -> None:
    import json

    recipes = [
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=STATISTICS),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=STATISTICS, normalize="after_noise"),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=Normalization(STATISTICS.mean, STATISTICS.var)),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE),
    ]
    assert len({recipe.fingerprint() for recipe in recipes}) == 4
    for recipe in recipes:
        rebuilt = EnvRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert rebuilt.fingerprint() == recipe.fingerprint()
        assert (rebuilt.normalization, rebuilt.normalize) == (recipe.normalization, recipe.normalize)


# ----------------------------------------------------------------------------- what a model says of its normalisation


@cache
def normalised_model() -> Any:
    return build(driven(DummyVecEnv([cartpole] * 2)))


@pytest.mark.parametrize("where", ["before_noise", "after_noise"])
def test_a_model_with_a_live_vec_normalize_needs_the_same_one_stated(where: Any) -> None:
    model = normalised_model()
    normalization = Normalization.of(model.get_vec_normalize_env())
    stated = EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=normalization, normalize=where)
    assert (stated.view(model).normalization == normalization) == (where == "after_noise")
    other = EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=STATISTICS, normalize=where)
    for recipe in (other, EnvRecipe(env_id="CartPole-v1", noise=NOISE)):
        with pytest.raises(ValueError, match=r"PPO sees observations through a VecNormalize, which is not the recipe's"):
            recipe.view(model)
    assert PolicyView.from_sb3(model, normalization=normalization).n_actions == 2


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_normalised_rewards_are_no_part_of_the_recipe() -> None:
    for normalization in (None, STATISTICS):
        env = VecNormalize(make_vec_env("CartPole-v1", noise=NOISE, normalization=normalization), norm_obs=False)
        assert EnvRecipe.of(env) == EnvRecipe.of(env.venv)
        assert EnvRecipe.of(env).view(build(env)).n_actions == 2
