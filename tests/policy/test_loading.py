"""Model files: ordinary ones load, planted code does not run."""

from __future__ import annotations

import base64
import inspect
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor

from robustrl.api import load_agent
from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import UnsafeModelError
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.policy.loading import load_model


class OwnExtractor(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.flat = torch.nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(x)


class OwnPolicy(ActorCriticPolicy):
    """Somebody's own."""


def model(algorithm: Any = PPO, policy: Any = "MlpPolicy", env: Any = "CartPole-v1", **options: Any) -> Any:
    settings = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0} | (
        {"buffer_size": 100} if algorithm in (DQN, SAC) else {}
    )
    return algorithm(policy, env, **(settings | options))


MODELS: dict[str, Callable[[], Any]] = {
    "ppo default": lambda: model(policy_kwargs=None),
    "ppo relu": lambda: model(policy_kwargs={"activation_fn": torch.nn.ReLU, "net_arch": {"pi": [16, 8], "vf": [4]}}),
    "ppo adamw": lambda: model(policy_kwargs={"optimizer_class": torch.optim.AdamW, "ortho_init": False}),
    "ppo extractor": lambda: model(
        policy_kwargs={"features_extractor_class": FlattenExtractor, "share_features_extractor": False}
    ),
    "ppo stacked": lambda: model(env=make_vec_env("CartPole-v1", noise=Gaussian(0.2), frame_stack=3)),
    "ppo schedules": lambda: model(clip_range=lambda left: 0.2 * left, clip_range_vf=lambda left: 0.1),
    "ppo trained": lambda: model(n_steps=16, batch_size=16, n_epochs=1).learn(32),
    "a2c default": lambda: model(A2C, policy_kwargs=None),
    "a2c tf rmsprop": lambda: model(A2C, policy_kwargs={"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}),
    "a2c elu": lambda: model(A2C, policy_kwargs={"activation_fn": torch.nn.ELU}),
    "dqn default": lambda: model(DQN, policy_kwargs=None),
    "dqn tanh": lambda: model(DQN, policy_kwargs={"activation_fn": torch.nn.Tanh, "net_arch": [12]}),
    "dqn trained": lambda: model(DQN, train_freq=(4, "step"), learning_starts=10, target_update_interval=20).learn(60),
}


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@pytest.fixture(autouse=True)
def no_pickle_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with unpickling switched off, unless it trusts its file."""
    if "trust" in request.node.name:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was loaded")

    for module in (pickle, cloudpickle):
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_load_and_predict_as_before(name: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save(tmp_path / "agent.zip")
    loaded = load_model(tmp_path / "agent.zip", device="cpu")
    assert type(loaded) is type(original)
    frames = np.random.default_rng(0).normal(size=(200, *original.observation_space.shape)).astype(np.float32)
    assert np.array_equal(loaded.predict(frames, deterministic=True)[0], original.predict(frames, deterministic=True)[0])
    k = 3 if "stacked" in name else 1
    assert PolicyView.of(loaded, n_frames=k).fingerprint() == PolicyView.of(original, n_frames=k).fingerprint()


def test_image_models_load_too(tmp_path: Path) -> None:
    class Pixels(gym.Env[Any, Any]):
        observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        action_space = spaces.Discrete(3)

        def reset(self, **_: Any) -> Any:
            return np.zeros((36, 36, 1), np.uint8), {}

    original = model(policy="CnnPolicy", env=Pixels(), policy_kwargs={"features_extractor_kwargs": {"features_dim": 16}})
    original.save(tmp_path / "agent.zip")
    frames = np.random.default_rng(0).integers(0, 256, (20, 1, 36, 36), dtype=np.uint8)
    loaded = load_model(tmp_path / "agent.zip", device="cpu")
    assert np.array_equal(loaded.predict(frames, deterministic=True)[0], original.predict(frames, deterministic=True)[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of an ordinary PPO file."""
    path = tmp_path_factory.mktemp("plain") / "agent.zip"
    model(policy_kwargs={"activation_fn": torch.nn.ReLU, "net_arch": [8]}).save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, members: dict[str, bytes], **data: Any) -> Path:
    """The members as a file, with entries of `data` replaced (None: removed)."""
    content = {**json.loads(members["data"]), **data}
    members = {**members, "data": json.dumps({k: v for k, v in content.items() if v is not None}).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return path


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def opened(path: Path) -> Any:
    """Load a file that may or may not be refused; anything but the two clean outcomes fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_model(path, device="cpu")
        except UnsafeModelError as error:
            assert str(path) in str(error)  # noqa: PT017
            return None


def test_code_planted_under_any_key_of_the_data_does_not_run(plain: dict[str, bytes], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = base64.b64encode(cloudpickle.dumps(Planted(marker))).decode()
    keys = [
        *json.loads(plain["data"]),
        "brand_new",
        "replay_buffer_class",
        "_vec_normalize_env",
        "env",
        "train_freq",
        "__class__",
    ]
    outcomes = []
    for key in keys:
        original = json.loads(plain["data"]).get(key)
        # as a bare pickle, and hidden behind the text that SB3 wrote
        for disguise in ({}, original if isinstance(original, dict) else {"low": "0"}):
            entry = {**disguise, ":type:": "<class 'dict'>", ":serialized:": code}
            outcomes.append(opened(written(tmp_path / "agent.zip", plain, **{key: entry})))
            assert not marker.exists(), key
    assert sum(outcome is not None for outcome in outcomes) > len(keys) // 2  # most entries do not matter for acting


@pytest.mark.parametrize("member", ["policy.pth", "pytorch_variables.pth", "policy.optimizer.pth", "extra.pth", "tensors.pth"])
@pytest.mark.parametrize("form", ["torch", "bare", "module"])
def test_code_planted_in_a_weights_file_does_not_run(plain: dict[str, bytes], tmp_path: Path, member: str, form: str) -> None:
    marker, buffer = tmp_path / "ran", io.BytesIO()
    if form == "torch":
        torch.save({"x": Planted(marker)}, buffer)
    elif form == "module":
        torch.save(torch.nn.Linear(2, 2), buffer)
    else:
        buffer.write(pickle.dumps(Planted(marker)))
    path = written(tmp_path / "agent.zip", {**plain, member: buffer.getvalue()})
    with pytest.raises(UnsafeModelError, match="a weights file holds more than tensors, loading refused"):
        load_model(path, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("member", ["policy.pth", "extra.pth", "policy.optimizer.pth"])
def test_weights_that_are_damaged_or_somebody_elses_are_refused(plain: dict[str, bytes], tmp_path: Path, member: str) -> None:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    content = plain.get(member, buffer.getvalue())
    broken = [b"", b"no torch file", content[: len(content) // 2], buffer.getvalue()]
    for _ in range(10):
        flipped = bytearray(content)
        for _ in range(20):
            flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        broken.append(bytes(flipped))
    refused = sum(opened(written(tmp_path / "agent.zip", {**plain, member: data})) is None for data in broken)
    assert refused >= 4


def test_a_file_without_its_weights_is_refused(plain: dict[str, bytes], tmp_path: Path) -> None:
    members = {name: value for name, value in plain.items() if name != "policy.pth"}
    with pytest.raises(UnsafeModelError, match="pass --algo / --policy-kwargs"):
        load_model(written(tmp_path / "agent.zip", members))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"observation_space": None}, "observation space is no Box"),
        ({"observation_space": {"_shape": [4], "dtype": "object", ":serialized:": ""}}, "observation space is no Box"),
        ({"observation_space": {"_shape": "4", "dtype": "float32", ":serialized:": ""}}, "observation space is no Box"),
        ({"observation_space": {"_shape": [-4], "dtype": "float32", ":serialized:": ""}}, "observation space is no Box"),
        ({"observation_space": {"_shape": [5], "dtype": "float32", ":serialized:": ""}}, "weights do not fit"),
        ({"observation_space": {"spaces": "x", ":serialized:": ""}}, "observation space is no Box"),
        ({"action_space": None}, "action space is no Discrete"),
        ({"action_space": {"n": "many", ":serialized:": ""}}, "action space is no Discrete"),
        ({"action_space": {"n": "-1", ":serialized:": ""}}, "action space is no Discrete"),
        ({"action_space": {"n": "3", ":serialized:": ""}}, "weights do not fit"),
        ({"policy_class": None}, "policy class is not one of PPO's own"),
        ({"policy_class": "ActorCriticPolicy"}, "policy class is not one of PPO's own"),
        ({"policy_class": {"__doc__": None, ":serialized:": ""}}, "policy class is not one of PPO's own"),
        ({"policy_class": {"__doc__": 3, ":serialized:": ""}}, "policy class is not one of PPO's own"),
        ({"policy_class": {"__module__": "mine", "__doc__": ActorCriticPolicy.__doc__, ":serialized:": ""}}, "not one of PPO's own"),
        ({"policy_kwargs": {"net_arch": [9]}}, r"policy_kwargs \{'net_arch': \[9\]\}"),
        ({"policy_kwargs": {"features_extractor_class": "x"}}, "weights do not fit"),
        ({"policy_kwargs": {"activation_fn": "<class 'os.system'>", ":serialized:": ""}}, "policy_kwargs.'activation_fn'.* is not a known name"),
        ({"policy_kwargs": {"activation_fn": "<function f at 0x1>", ":serialized:": ""}}, "pass --policy-kwargs .policy_kwargs=., or --trust"),
        ({"policy_kwargs": 3}, "weights do not fit"),
        ({"clip_range": None, "gae_lambda": None}, "which algorithm wrote it cannot be told; pass --algo"),
        ({"use_sde": [], "n_steps": "x"}, "weights do not fit"),
    ],
)  # fmt: skip
def test_contradictory_data_is_refused_by_name(
    plain: dict[str, bytes], tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "agent.zip", plain, **data)
    with pytest.raises(UnsafeModelError, match=message):
        load_model(path, device="cpu")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all", None], ids=["empty", "header", "text", "truncated"])
def test_what_is_no_model_file_is_refused(plain: dict[str, bytes], tmp_path: Path, content: bytes | None) -> None:
    path = written(tmp_path / "agent.zip", plain)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ValueError, match=r"agent\.zip is not a Stable-Baselines3 model file"):
        load_model(path)


@pytest.mark.parametrize("data", [None, b"{", b"[]", b"\xff", b"[" * 100_000], ids=["none", "open", "list", "bytes", "deep"])
def test_a_zip_without_sb3s_data_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "agent.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other" if data is None else "data", data or b"")
    with pytest.raises(ValueError, match="is not a Stable-Baselines3 model file"):
        load_model(path)


def test_flipped_bytes_anywhere_end_in_a_clean_error_or_the_model(plain: dict[str, bytes], tmp_path: Path) -> None:
    path, rng = written(tmp_path / "agent.zip", plain), np.random.default_rng(0)
    content = path.read_bytes()
    for _ in range(40):
        flipped = bytearray(content)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(flipped))
        try:
            opened(path)
        except ValueError as error:
            assert "is not a Stable-Baselines3 model file" in str(error)  # noqa: PT017


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model file"):
        load_model(tmp_path / "agent.zip")


def test_an_unknown_algorithm_is_refused(plain: dict[str, bytes], tmp_path: Path) -> None:
    path = written(tmp_path / "agent.zip", plain)
    with pytest.raises(ValueError, match="algo must be one of ppo, a2c, dqn, got 'sac'"):
        load_model(path, algo="sac")
    with pytest.raises(UnsafeModelError, match="pass the right --algo"):
        load_model(path, algo="dqn")


def test_continuous_actions_are_refused(tmp_path: Path) -> None:
    model(SAC, env="Pendulum-v1").save(tmp_path / "agent.zip")
    with pytest.raises(UnsafeModelError, match="continuous actions have no view yet"):
        load_model(tmp_path / "agent.zip")


def test_policies_of_ones_own_need_trust(tmp_path: Path) -> None:
    model(policy=OwnPolicy).save(tmp_path / "policy.zip")
    model(policy_kwargs={"features_extractor_class": OwnExtractor}).save(tmp_path / "extractor.zip")
    with pytest.raises(UnsafeModelError, match="policy class is not one of PPO's own; .*--trust"):
        load_model(tmp_path / "policy.zip")
    with pytest.raises(UnsafeModelError, match="features_extractor_class.* --policy-kwargs .*--trust"):
        load_model(tmp_path / "extractor.zip")


def test_trust_loads_the_pickles(tmp_path: Path) -> None:
    original = model(policy=OwnPolicy)
    original.save(tmp_path / "agent.zip")
    loaded = load_model(tmp_path / "agent.zip", trust=True, device="cpu")
    assert type(loaded.policy) is OwnPolicy
    frames = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(loaded.predict(frames, deterministic=True)[0], original.predict(frames, deterministic=True)[0])


def test_trust_is_what_lets_planted_code_run(plain: dict[str, bytes], tmp_path: Path) -> None:
    """The control for the tests above: their code does run where pickles are loaded."""
    marker = tmp_path / "ran"
    entry = {":type:": "", ":serialized:": base64.b64encode(cloudpickle.dumps(Planted(marker))).decode()}
    load_model(written(tmp_path / "agent.zip", plain, brand_new=entry), trust=True, device="cpu")
    assert marker.exists()


def test_policy_kwargs_can_be_given_and_classes_by_name(plain: dict[str, bytes], tmp_path: Path) -> None:
    unreadable = {"activation_fn": "<function f at 0x1>", ":serialized:": ""}
    path = written(tmp_path / "agent.zip", plain, policy_kwargs=unreadable)
    frames = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    scores = []
    for activation in (torch.nn.ReLU, "ReLU", "torch.nn.ReLU", "torch.nn.modules.activation.ReLU"):
        loaded = load_model(path, policy_kwargs={"activation_fn": activation, "net_arch": [8]}, device="cpu")
        assert isinstance(loaded.policy.mlp_extractor.policy_net[1], torch.nn.ReLU)
        scores.append(PolicyView.of(loaded).scores(frames))
    assert all(torch.equal(scores[0], other) for other in scores[1:])
    with pytest.raises(UnsafeModelError, match="'Nothing' is stored as a pickle and is not a known name"):
        load_model(path, policy_kwargs={"activation_fn": "Nothing"})


def test_docstrings_stripped_of_their_indentation_still_name_the_policy(plain: dict[str, bytes], tmp_path: Path) -> None:
    """As Python 3.13 stores them."""
    entry = json.loads(plain["data"])["policy_class"]
    entry["__doc__"] = inspect.cleandoc(entry["__doc__"])
    assert load_model(written(tmp_path / "agent.zip", plain, policy_class=entry), device="cpu").policy is not None


def test_a_learning_rate_schedule_is_left_out_with_a_warning(tmp_path: Path) -> None:
    original = model(learning_rate=lambda left: 1e-3 * left)
    original.save(tmp_path / "agent.zip")
    with pytest.warns(UserWarning, match="learning-rate schedule is a pickle and was not loaded"):
        loaded = load_model(tmp_path / "agent.zip", device="cpu")
    frames = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(loaded.predict(frames, deterministic=True)[0], original.predict(frames, deterministic=True)[0])


def test_plain_learning_rates_come_back(tmp_path: Path) -> None:
    model(learning_rate=2e-4).save(tmp_path / "agent.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(tmp_path / "agent.zip", device="cpu").lr_schedule(1.0) == 2e-4


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (EnvRecipe(env_id="MountainCar-v0", noise=Gaussian(0.1)), r"takes observations of shape \(12,\), but MountainCar-v0"),
        (EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1)), r"does the model stack 3 frames\? then pass frame_stack=3"),
        (EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1), frame_stack=2), r"then pass frame_stack=3 \(--frame-stack\)"),
        ("Acrobot-v1", r"does the model stack 2 frames\?"),
    ],
)
def test_a_model_that_does_not_fit_its_environment_is_refused_with_a_hint(tmp_path: Path, env: Any, message: str) -> None:
    MODELS["ppo stacked"]().save(tmp_path / "agent.zip")
    assert load_agent(tmp_path / "agent.zip", EnvRecipe(env_id="CartPole-v1", frame_stack=3)).n_envs == 1
    with pytest.raises(ValueError, match=message):
        load_agent(tmp_path / "agent.zip", env)


def test_a_model_with_other_actions_is_refused(tmp_path: Path) -> None:
    model(env="Acrobot-v1").save(tmp_path / "agent.zip")

    class TwoActions(gym.ActionWrapper[Any, Any, Any]):
        action_space = spaces.Discrete(2)

        def action(self, action: Any) -> Any:
            return action

    recipe = EnvRecipe(factory=lambda: TwoActions(gym.make("Acrobot-v1")), noise=Gaussian(0.1))
    with pytest.raises(ValueError, match=r"the model acts in Discrete\(3\), but .* takes Discrete\(2\)"):
        load_agent(tmp_path / "agent.zip", recipe)
