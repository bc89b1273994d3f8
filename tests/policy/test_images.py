"""Images: layouts, units of grey levels, and frame stacks, through the view of a convolutional policy."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from robustrl.envs import EnvRecipe, make_vec_env
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView, fold_frames, holds_frames, push_frame, stacked_shape, start_stack

SIDE = 36
"""The smallest that SB3's NatureCNN takes."""


class Camera(gym.Env[Any, Any]):
    """Random pictures in bytes, floats in [0, 1] or floats in [0, 255]."""

    def __init__(self, shape: tuple[int, ...] = (SIDE, SIDE, 3), unit: str = "byte", continuous: bool = False) -> None:
        self.unit, high = unit, 1.0 if unit == "one" else 255
        self.observation_space = spaces.Box(0, high, shape, np.uint8 if unit == "byte" else np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if continuous else spaces.Discrete(5)

    def _frame(self) -> np.ndarray:
        grey = self.np_random.integers(0, 256, self.observation_space.shape, dtype=np.uint8)
        return grey if self.unit == "byte" else grey.astype(np.float32) / np.float32(255 if self.unit == "one" else 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._frame(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._frame(), 0.0, False, False, {}


def recipe(
    shape: tuple[int, ...] = (SIDE, SIDE, 3), unit: str = "byte", *, continuous: bool = False, **fields: Any
) -> EnvRecipe:
    return EnvRecipe(factory=partial(Camera, shape, unit, continuous), max_episode_steps=4, **fields)


def build(algorithm: Any, env: Any, **policy_kwargs: Any) -> Any:
    options: dict[str, Any] = {"n_steps": 2, "batch_size": 2} if algorithm is PPO else {"buffer_size": 2}
    kwargs = {"features_extractor_kwargs": {"features_dim": 16}, "net_arch": [8], **policy_kwargs}
    model = algorithm("CnnPolicy", env, policy_kwargs=kwargs, device="cpu", seed=0, **options)
    with torch.no_grad():  # flat new networks would act alike everywhere
        for parameter in model.policy.parameters():
            parameter *= 1.5
    return model


@cache
def byte_model(algorithm: Any = PPO, normalize_images: bool = True, channels: int = 3) -> Any:
    """A model of byte pictures with channels last, which SB3 wraps in a VecTransposeImage."""
    env = Camera((SIDE, SIDE, channels), continuous=algorithm is SAC)
    model = build(algorithm, env, normalize_images=normalize_images)
    assert isinstance(model.env, VecTransposeImage)
    assert model.observation_space.shape == (channels, SIDE, SIDE)
    return model


def pictures(n: int = 12, shape: tuple[int, ...] = (SIDE, SIDE, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def statement(model: Any, pictures: np.ndarray) -> torch.Tensor:
    """What SB3 itself computes of byte pictures with channels first."""
    x = torch.from_numpy(pictures)
    with torch.no_grad():
        if isinstance(model, DQN):
            return model.q_net(x)  # type: ignore[no-any-return]
        if isinstance(model, SAC):
            return torch.cat(model.actor.get_action_dist_params(x)[:2], dim=1)
        return model.policy.get_distribution(x).distribution.logits  # type: ignore[no-any-return]


def scores(view: PolicyView, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        found = view.scores(torch.from_numpy(x).float())
    return found.log_softmax(-1) if view.kind == "logits" else found


def decided(view: PolicyView, x: np.ndarray) -> np.ndarray:
    return view.act_blocked(torch.from_numpy(x).float(), batch=8).numpy()


# ------------------------------------------------------------------------------------------- layouts and units


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
@pytest.mark.parametrize("unit", ["byte", "one", "level"])
def test_a_model_of_byte_images_acts_alike_on_every_form_of_a_picture(algorithm: Any, unit: str) -> None:
    """Channels last, as bytes, as floats in [0, 1] or as floats in [0, 255]."""
    model, x = byte_model(algorithm), pictures()
    view = recipe(unit=unit, continuous=algorithm is SAC).view(model)
    assert view.frame_shape == view.observation_shape == (SIDE, SIDE, 3)
    native = x if unit == "byte" else x.astype(np.float32) / np.float32(255 if unit == "one" else 1)
    expected = statement(model, np.moveaxis(x, -1, 1))
    assert torch.allclose(scores(view, native), expected, atol=1e-5)
    assert expected.std(0).min() > 1e-3  # pictures differ, and a scrambled one would show
    actions = view.received(view.act_blocked(torch.from_numpy(native).float()[:, None], batch=8))
    np.testing.assert_allclose(actions, model.predict(x, deterministic=True)[0], atol=1e-5)


@pytest.mark.parametrize("unit", ["byte", "one", "level"])
def test_images_are_not_divided_for_a_model_that_does_not(unit: str) -> None:
    """normalize_images=False: such a network was trained on 0 to 255, so pixels in [0, 1] go back to that."""
    model, x = byte_model(normalize_images=False), pictures()
    native = x if unit == "byte" else x.astype(np.float32) / np.float32(255 if unit == "one" else 1)
    assert torch.allclose(scores(recipe(unit=unit).view(model), native), statement(model, np.moveaxis(x, -1, 1)), atol=1e-3)


@pytest.mark.parametrize("unit", ["one", "level"])
def test_models_of_float_images_take_them_as_they_are(unit: str) -> None:
    model = build(PPO, Camera((3, SIDE, SIDE), unit), normalize_images=False)
    x = np.moveaxis(pictures(), -1, 1).astype(np.float32) / np.float32(255 if unit == "one" else 1)
    view = recipe((3, SIDE, SIDE), unit).view(model)
    assert torch.allclose(scores(view, x), statement(model, x), atol=1e-5)
    assert torch.allclose(scores(PolicyView.from_sb3(model), x), statement(model, x), atol=1e-5)


def test_without_a_frame_space_a_view_takes_what_the_model_takes() -> None:
    model, x = byte_model(), np.moveaxis(pictures(), -1, 1)
    assert torch.allclose(scores(PolicyView.from_sb3(model), x), statement(model, x), atol=1e-5)


def test_the_form_of_the_pictures_is_in_the_fingerprint() -> None:
    model = byte_model()
    views = [recipe(unit="byte").view(model), recipe(unit="one").view(model), PolicyView.from_sb3(model)]
    assert len({view.fingerprint() for view in views}) == 3
    assert recipe(unit="level").view(model).fingerprint() == views[0].fingerprint()  # bytes and floats: the same numbers
    other = byte_model(normalize_images=False)
    other.policy.load_state_dict(model.policy.state_dict())
    assert recipe(unit="byte").view(other).fingerprint() not in {view.fingerprint() for view in views}
    byte_model.cache_clear()


@pytest.mark.parametrize("unit", ["one", "level"])
def test_gradients_reach_every_pixel_in_its_own_units(unit: str) -> None:
    view, scale = recipe(unit=unit).view(byte_model()), 255.0 if unit == "level" else 1.0
    x = (torch.from_numpy(pictures(2)).float() / 255 * scale).requires_grad_(True)
    gradient = torch.autograd.grad(view.scores(x)[:, 0].sum(), x)[0]
    assert gradient.shape == x.shape
    assert (gradient[:, 2:30, 2:30] != 0).float().mean() > 0.9
    along = gradient / gradient.norm()
    step = 1e-3 * scale
    with torch.no_grad():
        slope = (view.scores(x + step * along) - view.scores(x - step * along))[:, 0].sum() / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("shape", [(SIDE, SIDE, 4), (SIDE, 3, SIDE), (40, 40, 3), (3 * SIDE * SIDE,), (SIDE, SIDE)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^the policy takes observations of shape .*, which 1 frame.* do not make"):
        recipe(shape).view(byte_model())


# ------------------------------------------------------------------------------------------------- frame stacks


STACKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "pictures": ((SIDE, SIDE), (3, SIDE, SIDE), 3),
    "one channel last": ((SIDE, SIDE, 1), (SIDE, SIDE, 3), 3),
    "two channels last": ((SIDE, SIDE, 2), (SIDE, SIDE, 6), 3),
    "one channel first": ((1, SIDE, SIDE), (3, SIDE, SIDE), 3),
    "two channels first": ((2, SIDE, SIDE), (4, SIDE, SIDE), 2),
    "vectors": ((4,), (12,), 3),
    "a single picture": ((SIDE, SIDE, 1), (SIDE, SIDE, 1), 1),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_shapes_are_what_folding_makes(name: str) -> None:
    frame, expected, k = STACKS[name]
    assert stacked_shape(frame, k) == expected
    assert holds_frames(expected, frame, k)
    assert not holds_frames(expected, frame, k + 1)
    frames = np.random.default_rng(0).random((2, k, *frame), dtype=np.float32)
    folded = fold_frames(frames, expected)
    assert folded.shape == (2, *expected)
    assert np.array_equal(fold_frames(torch.from_numpy(frames), expected).numpy(), folded)
    axis = 1 if name == "pictures" or "first" in name else -1
    for i, part in enumerate(np.split(folded, k, axis=axis)):  # the oldest frame first, whole and in one place
        assert np.array_equal(part.reshape(2, *frame), frames[:, i])


def test_frames_without_an_axis_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="frame stacking needs observations with at least one axis"):
        stacked_shape((), 2)
    assert stacked_shape((), 1) == ()


@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize("name", ["pictures", "one channel first", "two channels first"])
def test_a_convolutional_policy_sees_our_stacks_as_its_vector_env_makes_them(name: str, padding: Any) -> None:
    """Frame by frame through the view, against `predict` on what `make_vec_env` gives; over the end of an episode."""
    shape, stacked, k = STACKS[name]
    source = recipe(shape, "one", noise=Gaussian(0.1), frame_stack=k, stack_padding=padding)
    env = make_vec_env(source, 3, seed=0)
    model = build(PPO, env, normalize_images=False)
    view = source.view(model)
    assert view.observation_shape == stacked
    assert view.frame_shape == shape
    observation = env.reset()
    newest: Any = {
        "pictures": lambda x: x[:, -1],
        "one channel first": lambda x: x[:, -1:],
        "two channels first": lambda x: x[:, -2:],
    }[name]
    stack = start_stack(torch.from_numpy(newest(observation).copy()), k, padding)
    acted = []
    for _ in range(6):
        actions = decided(view, stack.numpy())
        assert np.array_equal(actions, model.predict(observation, deterministic=True)[0])
        assert torch.equal(view.fold(stack), torch.from_numpy(observation))
        acted.append(actions)
        observation, _, dones, _ = env.step(actions)
        frames = torch.from_numpy(newest(observation).copy())
        fresh = torch.from_numpy(dones)[(...,) + (None,) * (stack.ndim - 1)]
        stack = torch.where(fresh, start_stack(frames, k, padding), push_frame(stack, frames))
    assert len(np.unique(acted)) > 1
    past, last = stack.clone().requires_grad_(True), stack[:, -1].clone().requires_grad_(True)
    gradient, older = torch.autograd.grad(view.scores(view.fold(past, last))[:, 0].sum(), (last, past))
    assert (gradient != 0).float().mean() > 0.5
    assert not older[:, -1].any()
    assert older[:, :-1].any()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("unit", ["byte", "one"])
def test_a_model_trained_on_sb3s_own_stack_of_byte_images_is_viewed_from_single_frames(channels: int, unit: str) -> None:
    """The chain of SB3's zoo: channels last, VecFrameStack, VecTransposeImage."""
    k = 3
    venv = VecFrameStack(DummyVecEnv([lambda: Camera((SIDE, SIDE, channels))] * 2), k)
    model = build(PPO, venv)
    assert model.observation_space.shape == (k * channels, SIDE, SIDE)
    view = recipe((SIDE, SIDE, channels), unit, frame_stack=k, stack_padding="zero").view(model)
    venv.seed(0)
    observation, stack = venv.reset(), None
    for _ in range(4):
        frames = torch.from_numpy(observation[..., -channels:].copy()).float() / (255 if unit == "one" else 1)
        stack = start_stack(frames, k, "zero") if stack is None else push_frame(stack, frames)
        theirs = statement(model, np.moveaxis(observation, -1, 1))
        with torch.no_grad():
            assert torch.allclose(view.scores(view.fold(stack)).log_softmax(-1), theirs, atol=1e-5)
        observation = venv.step(np.zeros(2, dtype=np.int64))[0]


@pytest.mark.parametrize(
    ("build_recipe", "message"),
    [
        (lambda: recipe(frame_stack=2), r"do not make"),
        (lambda: recipe((SIDE, SIDE, 1)), r"does it stack 3 frames\? \(frame_stack=3, --frame-stack 3\)"),
        (lambda: recipe((SIDE, SIDE)), r"does it stack 3 frames\?"),
    ],
)
def test_another_number_of_frames_is_refused_with_a_hint(build_recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe().view(byte_model())
