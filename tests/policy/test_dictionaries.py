"""Dictionary observations: one joint vector, each key in its place, as SB3's MultiInputPolicy sees them."""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC

from robustrl.envs import EnvRecipe, make_vec_env
from robustrl.envs.joint import join, joint_box, split
from robustrl.noise import Gaussian
from robustrl.policy import Normalization, PolicyView

VECTORS = spaces.Dict(
    [
        ("zeta", spaces.Box(-1, 1, (3,), np.float32)),  # not in alphabetical order
        ("alpha", spaces.Box(-5, 5, (2, 2), np.float32)),
        ("middle", spaces.Box(-1, 1, (1,), np.float32)),
    ]
)
SIDE = 36
CAMERA = spaces.Dict(
    {
        "pose": spaces.Box(-1, 1, (3,), np.float32),
        "image": spaces.Box(0, 255, (SIDE, SIDE, 2), np.uint8),
        "goal": spaces.Box(-1, 1, (2,), np.float32),
    }
)
UNIT = spaces.Dict({**CAMERA.spaces, "image": spaces.Box(0, 1, (SIDE, SIDE, 2), np.float32)})
LEVELS = spaces.Dict({**CAMERA.spaces, "image": spaces.Box(0, 255, (SIDE, SIDE, 2), np.float32)})


class Several(gym.Env[Any, Any]):
    """Random dictionaries."""

    def __init__(self, space: Any = VECTORS, actions: Any = None) -> None:
        self.observation_space, self.action_space = space, actions or spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._draw(), 0.0, False, False, {}

    def _draw(self) -> Any:
        return {k: np.asarray(self.np_random.uniform(p.low, p.high).astype(p.dtype)) for k, p in self.observation_space.items()}  # type: ignore[attr-defined]


def build(algorithm: Any = PPO, space: Any = VECTORS, actions: Any = None, *, env: Any = None, **policy_kwargs: Any) -> Any:
    options: dict[str, Any] = {"buffer_size": 2} if algorithm in (DQN, SAC) else {"n_steps": 2, "batch_size": 2}
    kwargs = {"net_arch": [16], **policy_kwargs}
    policy = "MultiInputLstmPolicy" if algorithm is sb3_contrib.RecurrentPPO else "MultiInputPolicy"
    model = algorithm(policy, env or Several(space, actions), policy_kwargs=kwargs, device="cpu", seed=0, **options)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter *= 2
    return model


@cache
def camera_model(normalize_images: bool = True) -> Any:
    model = build(space=CAMERA, features_extractor_kwargs={"cnn_output_dim": 16}, normalize_images=normalize_images)
    assert model.observation_space["image"].shape == (2, SIDE, SIDE)  # SB3 transposed it
    return model


def batch(space: Any, n: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {k: generator.uniform(p.low, p.high, (n, *p.shape)).astype(p.dtype) for k, p in space.items()}


BOX2 = spaces.Box(np.float32([-1, 0]), np.float32([2, 5]))


@pytest.mark.parametrize(
    ("algorithm", "actions"), [(PPO, None), (DQN, None), (PPO, BOX2), (SAC, BOX2), (sb3_contrib.RecurrentPPO, None)], ids=str
)
def test_a_joint_vector_acts_like_the_dictionary(algorithm: Any, actions: Any) -> None:
    """Through a recipe, whose keys keep the order of the environment's space."""
    model, x = build(algorithm, actions=actions), batch(VECTORS)
    recipe = EnvRecipe(factory=lambda: Several(VECTORS, actions), max_episode_steps=5)
    view = recipe.view(model)
    assert view.frame_shape == recipe.frame_space.shape == (8,)
    joint = join(x, VECTORS)
    assert np.array_equal(joint, np.concatenate([x["zeta"], x["alpha"].reshape(-1, 4), x["middle"]], axis=1))
    found, _ = view.decide(torch.from_numpy(joint)[:, None], view.memory(40), batch=16)
    np.testing.assert_allclose(view.received(found), model.predict(x, deterministic=True)[0], atol=1e-5)
    assert len(np.unique(found)) > 1


def test_the_recipes_environment_gives_the_joint_vector() -> None:
    recipe = EnvRecipe(factory=Several, max_episode_steps=5)
    flat, native = recipe.base_env(), recipe.base_env(flat=False)
    assert recipe.native_space == native.observation_space == VECTORS
    assert flat.observation_space == recipe.raw_space == joint_box(VECTORS)
    seen, original = flat.reset(seed=3)[0], native.reset(seed=3)[0]
    assert np.array_equal(seen, join({key: part[None] for key, part in original.items()}, VECTORS)[0])


@pytest.mark.parametrize("form", ["bytes", "unit", "levels"])
@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_in_dictionaries_keep_their_layout_and_units(form: str, normalize_images: bool) -> None:
    """Channels last in the environment, channels first in the model; bytes, [0, 1] or [0, 255]."""
    model, x = camera_model(normalize_images), batch(CAMERA, 8)
    space = {"bytes": CAMERA, "unit": UNIT, "levels": LEVELS}[form]
    view = PolicyView.from_sb3(model, frame_space=space)
    scale = np.float32(255 if form == "unit" else 1)
    joint = join({**x, "image": x["image"] / scale}, space).astype(np.float32)
    native = {**x, "image": np.moveaxis(x["image"], -1, 1)}
    with torch.no_grad():
        expected = model.policy.get_distribution({k: torch.from_numpy(v) for k, v in native.items()}).distribution.logits
        found = view.scores(torch.from_numpy(joint)).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5 if normalize_images else 1e-3, rtol=1e-4)
    assert expected.std(0).max() > 1e-3
    if normalize_images:  # 255 times larger inputs drive the last layers into saturation
        tensor = torch.from_numpy(joint).requires_grad_(True)
        gradient = torch.autograd.grad(view.scores(tensor)[:, 0].sum(), tensor)[0]
        assert all(part.any() for part in split(gradient.numpy(), space).values())


@pytest.mark.parametrize("space", [CAMERA, UNIT], ids=["bytes", "unit"])
def test_a_recipe_tells_its_view_how_images_lie(space: Any) -> None:
    model = camera_model()
    view = EnvRecipe(factory=lambda: Several(space), max_episode_steps=5).view(model)
    assert view.fingerprint() == PolicyView.from_sb3(model, frame_space=space).fingerprint()


def test_fingerprints_tell_forms_of_images_apart() -> None:
    views = [PolicyView.from_sb3(camera_model(), frame_space=space) for space in (CAMERA, UNIT, None)]
    assert len({view.fingerprint() for view in views}) == 3
    other = camera_model(False)
    other.policy.load_state_dict(camera_model().policy.state_dict())
    assert PolicyView.from_sb3(other).fingerprint() != views[2].fingerprint()
    camera_model.cache_clear()


def test_byte_images_are_in_the_models_own_layout_unless_stated() -> None:
    model, x = camera_model(), batch(CAMERA, 8)
    native = {**x, "image": np.moveaxis(x["image"], -1, 1)}
    joint = torch.from_numpy(join(native, model.observation_space).astype(np.float32))
    actions = PolicyView.from_sb3(model).act_blocked(joint[:, None], batch=8).numpy()
    assert np.array_equal(actions, model.predict(native, deterministic=True)[0])


@pytest.mark.parametrize("where", ["before_noise", "after_noise"])
def test_normalised_dictionaries_are_those_of_a_vec_normalize(where: Any) -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    live = VecNormalize(DummyVecEnv([Several] * 2))
    live.reset()
    for _ in range(20):
        live.step(np.zeros(2, dtype=np.int64))
    live.training = False
    model, x = build(env=live), batch(VECTORS)
    normalization = Normalization.of(live)
    normalised = live.normalize_obs(x)
    assert np.array_equal(normalization(join(x, VECTORS)), join(normalised, VECTORS))
    recipe = EnvRecipe(factory=Several, max_episode_steps=5, normalization=normalization, normalize=where)
    view = recipe.view(model)
    seen = recipe.frames(join(x, VECTORS))
    actions = view.act_blocked(torch.from_numpy(seen)[:, None], batch=16).numpy()
    assert np.array_equal(actions, model.predict(normalised, deterministic=True)[0])
    assert len(np.unique(actions)) > 1


def test_make_vec_env_gives_dictionaries_that_a_multi_input_policy_learns_from() -> None:
    statistics = Normalization(np.arange(8) / 10, np.arange(1, 9) / 4)
    env = make_vec_env(Several, 2, noise=Gaussian(0.1), normalization=statistics, max_episode_steps=3, seed=0)
    model = build(env=env).learn(8)
    observation = env.reset()
    assert {key: part.shape for key, part in observation.items()} == {"zeta": (2, 3), "alpha": (2, 2, 2), "middle": (2, 1)}
    view = EnvRecipe.of(env).view(model)
    joint = torch.from_numpy(join(observation, env.observation_space))
    assert np.array_equal(view.act_blocked(joint[:, None], batch=2).numpy(), model.predict(observation, deterministic=True)[0])


MIXED = spaces.Dict({"where": spaces.Box(-1, 1, (3,), np.float32), "which": spaces.Discrete(3)})
NESTED = spaces.Dict({"inner": spaces.Dict({"x": spaces.Box(-1, 1, (3,), np.float32)})})
SHORT = spaces.Dict({**CAMERA.spaces, "pose": spaces.Box(-1, 1, (2,), np.float32)})
RENAMED = spaces.Dict({"pose": CAMERA["pose"], "image": CAMERA["image"], "target": CAMERA["goal"]})
REORDERED = spaces.Dict([(key, CAMERA[key]) for key in ("pose", "image", "goal")])
SIDEWAYS = spaces.Dict({**CAMERA.spaces, "image": spaces.Box(0, 255, (SIDE, 2, SIDE), np.uint8)})


@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda: PolicyView.from_sb3(build(space=MIXED)), TypeError, r"PPO: observations must be a Box space or a Dict of them, got Dict.*Discrete\(3\)"),
        (lambda: EnvRecipe(factory=lambda: Several(MIXED), max_episode_steps=5).frame_space, TypeError, "observations must be a Box space or a Dict of them, got Dict"),
        (lambda: EnvRecipe(factory=lambda: Several(NESTED), max_episode_steps=5, noise=Gaussian(0.1)).horizon, TypeError, "observations must be a Box space or a Dict of them"),
        (lambda: make_vec_env(lambda: Several(MIXED), noise=Gaussian(0.1), max_episode_steps=5), TypeError, "observations must be a Box space or a Dict of them"),
        (lambda: PolicyView.from_sb3(camera_model(), frame_space=joint_box(CAMERA)), ValueError, "^frame_space must be the environment's Dict, where images have their layout"),
        (lambda: PolicyView.from_sb3(camera_model(), frame_space=SHORT), ValueError, r"the model takes 'pose' of shape \(3,\), the environment gives \(2,\)"),
        (lambda: PolicyView.from_sb3(camera_model(), frame_space=SIDEWAYS), ValueError, r"the model takes 'image' of shape \(2, 36, 36\), the environment gives \(36, 2, 36\)"),
        (lambda: PolicyView.from_sb3(camera_model(), frame_space=REORDERED), ValueError, r"with the keys \['goal', 'image', 'pose'\], the environment gives \['pose', 'image', 'goal'\]"),
        (lambda: PolicyView.from_sb3(camera_model(), frame_space=RENAMED), ValueError, r"the model takes dictionaries with the keys \['goal', 'image', 'pose'\], the environment gives \['image', 'pose', 'target'\]"),
        (lambda: PolicyView.from_sb3(build(), frame_space=spaces.Box(-1, 1, (7,), np.float32)), ValueError, r"takes observations of shape \(8,\), which 1 frame"),
        (lambda: PolicyView.from_sb3(build(), n_frames=2), ValueError, "^n_frames must be 1 for a model of dictionaries, got 2: a joint vector holds no frame stack"),
        (lambda: PolicyView.from_sb3(build(), frame_space=spaces.Discrete(8)), TypeError, "observations must be a Box space or a Dict of them"),
        (lambda: make_vec_env(Several, frame_stack=2, max_episode_steps=5), TypeError, "^frame stacking needs a Box observation space"),
    ],
)  # fmt: skip
def test_dictionaries_without_a_joint_vector_are_refused(use: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        use()
