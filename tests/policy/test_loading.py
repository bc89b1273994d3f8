"""Model files: ordinary ones load, planted code does not run."""

from __future__ import annotations

import base64
import copy
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
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
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


class Spaces(gym.Env[Any, Any]):
    """Spaces to build models for."""

    def __init__(self, observations: Any, actions: Any = None) -> None:
        self.observation_space, self.action_space = observations, actions or ACTIONS


VECTOR = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = spaces.Box(np.float32([-2, 1 / 3]), np.float32([1, 5.1]))
SEVERAL = spaces.Dict(
    [
        ("zeta", spaces.Box(np.float32([-1, -2, -3]), np.float32([1, 2, 3]))),  # not in alphabetical order, bounds per entry
        ("alpha", spaces.Box(-1, 1, (2, 2), np.float64)),
        ("image", spaces.Box(0, 255, (36, 36, 1), np.uint8)),
        ("codes", spaces.Box(0, 9, (2,), np.uint8)),
    ]
)
GOALS = spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), VECTOR))
PENDULUM, CONTINUOUS = "Pendulum-v1", Spaces(VECTOR)
IMAGES = spaces.Box(0, 255, (36, 36, 1), np.uint8)
SMALL_CNN = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
SMALL_LSTM = {"net_arch": [8], "lstm_hidden_size": 8}


def model(algorithm: Any = PPO, policy: Any = "MlpPolicy", env: Any = "CartPole-v1", **options: Any) -> Any:
    settings: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}
    if algorithm in (DQN, SAC, TD3, DDPG, QRDQN, TQC, CrossQ):
        settings["buffer_size"] = 100
    if algorithm is RecurrentPPO and policy == "MlpPolicy":
        policy = "MlpLstmPolicy"
    settings |= options
    settings["policy_kwargs"] = copy.deepcopy(settings["policy_kwargs"])  # SB3 writes into it
    made = algorithm(policy, env, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # new networks act alike everywhere
        for parameter in made.policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


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
    "sac default": lambda: model(SAC, env=PENDULUM, policy_kwargs=None),
    "sac gSDE": lambda: model(SAC, env=CONTINUOUS, use_sde=True, policy_kwargs={"net_arch": [8], "log_std_init": -2, "use_expln": True}),
    "sac schedules": lambda: model(SAC, env=CONTINUOUS, learning_rate=1e-3, ent_coef="auto_0.1", target_entropy=-3.0),
    "sac trained": lambda: model(SAC, env=PENDULUM, learning_starts=10, batch_size=4).learn(14),
    "sac with hindsight": lambda: model(SAC, "MultiInputPolicy", Spaces(GOALS), replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 4}),
    "sac images": lambda: model(SAC, "CnnPolicy", Spaces(IMAGES), policy_kwargs=SMALL_CNN),
    "sac several": lambda: model(SAC, "MultiInputPolicy", Spaces(SEVERAL), optimize_memory_usage=False),
    "td3 default": lambda: model(TD3, env=PENDULUM, policy_kwargs=None),
    "td3 three critics": lambda: model(TD3, env=CONTINUOUS, policy_kwargs={"net_arch": {"pi": [8], "qf": [4]}, "n_critics": 3}),
    "td3 with action noise": lambda: model(TD3, env=PENDULUM, action_noise=NormalActionNoise(np.zeros(1), np.ones(1))),
    "td3 images": lambda: model(TD3, "CnnPolicy", Spaces(IMAGES), policy_kwargs=SMALL_CNN),
    "td3 several": lambda: model(TD3, "MultiInputPolicy", Spaces(SEVERAL)),
    "ddpg default": lambda: model(DDPG, env=PENDULUM, policy_kwargs=None),
    "ddpg lean memory": lambda: model(DDPG, env=PENDULUM, optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}),
    "ddpg several": lambda: model(DDPG, "MultiInputPolicy", Spaces(SEVERAL)),
    "recurrent default": lambda: model(RecurrentPPO, env=PENDULUM, policy_kwargs=None),
    "recurrent layers": lambda: model(RecurrentPPO, policy_kwargs={**SMALL_LSTM, "n_lstm_layers": 2, "enable_critic_lstm": False}),
    "recurrent several": lambda: model(RecurrentPPO, "MultiInputLstmPolicy", Spaces(SEVERAL), policy_kwargs=SMALL_LSTM, n_steps=8, batch_size=8),
    "recurrent images": lambda: model(RecurrentPPO, "CnnLstmPolicy", Spaces(IMAGES), policy_kwargs={**SMALL_LSTM, **SMALL_CNN}, n_steps=8, batch_size=8),
    "ppo continuous": lambda: model(env=CONTINUOUS),
    "ppo gSDE squashed": lambda: model(env=CONTINUOUS, use_sde=True, policy_kwargs={"net_arch": [8], "squash_output": True}),
    "ppo images": lambda: model(policy="CnnPolicy", env=Spaces(IMAGES), policy_kwargs=SMALL_CNN, n_steps=8, batch_size=8),
    "ppo undivided images": lambda: model(policy="CnnPolicy", env=Spaces(IMAGES), policy_kwargs={**SMALL_CNN, "normalize_images": False}, n_steps=8, batch_size=8),
    "ppo float images": lambda: model(policy="CnnPolicy", env=Spaces(spaces.Box(0, 1, (1, 36, 36), np.float32)), policy_kwargs={**SMALL_CNN, "normalize_images": False}, n_steps=8, batch_size=8),
    "ppo flat bytes": lambda: model(env=Spaces(spaces.Box(0, 255, (6, 5, 3), np.uint8))),
    "ppo bytes that are no image": lambda: model(env=Spaces(spaces.Box(0, 3, (6, 5, 3), np.uint8))),
    "ppo several": lambda: model(policy="MultiInputPolicy", env=Spaces(SEVERAL), n_steps=8, batch_size=8),
    "a2c several": lambda: model(A2C, "MultiInputPolicy", Spaces(SEVERAL), policy_kwargs={"normalize_images": False}),
    "a2c continuous": lambda: model(A2C, env=PENDULUM),
    "dqn several": lambda: model(DQN, "MultiInputPolicy", Spaces(SEVERAL, spaces.Discrete(3))),
    "dqn images": lambda: model(DQN, "CnnPolicy", Spaces(IMAGES, spaces.Discrete(3)), policy_kwargs=SMALL_CNN),
    "dqn trained": lambda: model(DQN, train_freq=(4, "step"), learning_starts=10, target_update_interval=20).learn(60),
}  # fmt: skip


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


def frames_of(space: Any, n: int = 100) -> Any:
    """Observations of any space, bytes as bytes."""
    generator = np.random.default_rng(0)
    if isinstance(space, spaces.Dict):
        return {key: frames_of(part, n) for key, part in space.items()}
    if space.dtype == np.uint8:
        return generator.integers(0, int(space.high.max()) + 1, (n, *space.shape), dtype=np.uint8)
    return generator.normal(size=(n, *space.shape)).astype(space.dtype)


def assert_acts_alike(loaded: Any, original: Any) -> None:
    frames = frames_of(original.observation_space)
    expected = original.predict(frames, deterministic=True)[0]
    np.testing.assert_allclose(loaded.predict(frames, deterministic=True)[0], expected, rtol=1e-6)
    assert len(np.unique(expected, axis=0)) > 1 or expected.dtype.kind == "i"


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_load_and_predict_as_before(name: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save(tmp_path / "agent.zip")
    loaded = load_model(tmp_path / "agent.zip", device="cpu")
    assert type(loaded) is type(original)
    assert type(loaded.policy) is type(original.policy)
    assert loaded.action_space == original.action_space
    assert_acts_alike(loaded, original)
    k = 3 if "stacked" in name else 1
    assert PolicyView.of(loaded, n_frames=k).fingerprint() == PolicyView.of(original, n_frames=k).fingerprint()


@pytest.mark.parametrize(
    "name", ["sac default", "td3 three critics", "sac with hindsight", "ddpg lean memory", "recurrent layers"]
)
def test_models_load_with_trust_as_well(name: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save(tmp_path / "agent.zip")
    loaded = load_model(tmp_path / "agent.zip", trust=True, device="cpu")
    assert type(loaded) is type(original)
    assert PolicyView.of(loaded).fingerprint() == PolicyView.of(original).fingerprint()


def saved(path: Path, model: Any, **data: Any) -> Path:
    """A model's file with entries of its data replaced."""
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return written(path, members, **data)


@pytest.mark.parametrize("trust", [False, True], ids=["safe", "trust"])
def test_huge_replay_buffers_are_not_allocated(trust: bool, tmp_path: Path) -> None:
    """A hundred terabytes, of which not one observation more than one is asked for."""
    original = MODELS["sac images"]()
    loaded = load_model(saved(tmp_path / "agent.zip", original, buffer_size=10**11), trust=trust, device="cpu")
    assert loaded.replay_buffer.buffer_size == 1
    assert_acts_alike(loaded, original)


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


@pytest.mark.parametrize("name", ["sac default", "td3 with action noise", "dqn several", "recurrent default"])
def test_code_planted_in_every_pickle_at_once_does_not_run(name: str, tmp_path: Path) -> None:
    """Behind the text that SB3 wrote, in every algorithm's file: it loads, and nothing has run."""
    marker, original = tmp_path / "ran", MODELS[name]()
    code = base64.b64encode(cloudpickle.dumps(Planted(marker))).decode()
    original.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        data = json.loads(archive.read("data"))
    pickled = {
        key: {**entry, ":serialized:": code}
        for key, entry in data.items()
        if isinstance(entry, dict) and ":serialized:" in entry
    }
    assert len(pickled) >= 4
    loaded = load_model(saved(tmp_path / "agent.zip", original, **pickled), device="cpu")
    assert not marker.exists()
    assert_acts_alike(loaded, original)


@pytest.mark.parametrize("env", ["CartPole-v1", {"a": 1}, [3]])
def test_an_environment_in_a_file_is_left_there(plain: dict[str, bytes], tmp_path: Path, env: Any) -> None:
    assert load_model(written(tmp_path / "agent.zip", plain, env=env), device="cpu").env is None


ODD: tuple[Any, ...] = (-1, 0, 1e30, "x", [], [[]], {}, {"a": 1}, True, {":type:": "x", ":serialized:": ""})


@pytest.mark.parametrize("name", ["sac default", "dqn default", "recurrent layers", "ppo several"])
def test_odd_values_under_any_key_end_in_a_clean_error_or_the_model(name: str, tmp_path: Path) -> None:
    path, generator = saved(tmp_path / "agent.zip", MODELS[name]()), np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    for key in json.loads(members["data"]):
        for i in generator.choice(len(ODD), 2, replace=False):
            opened(written(path, members, **{key: ODD[i]}))


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
        ({"n_steps": 10**14}, "weights do not fit"),  # more memory than there is
        ({"n_steps": 10**30}, "weights do not fit"),
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
    with pytest.raises(
        ValueError, match="algo must be one of ppo, a2c, dqn, sac, td3, ddpg, recurrent_ppo, sa_ppo, sa_dqn, got 'trpo'"
    ):
        load_model(path, algo="trpo")
    with pytest.raises(UnsafeModelError, match="pass the right --algo"):
        load_model(path, algo="dqn")


FOREIGN: dict[str, tuple[Any, str]] = {
    "TRPO": (lambda: model(TRPO), "which algorithm wrote it cannot be told; pass --algo"),
    "QR-DQN": (lambda: model(QRDQN), "its policy is of sb3_contrib.qrdqn.policies; supported algorithms are ppo, "),
    "ARS": (lambda: ARS("LinearPolicy", "CartPole-v1"), "its policy is of sb3_contrib.ars.policies"),
    "TQC": (lambda: model(TQC, env=PENDULUM), "its policy is of sb3_contrib.tqc.policies"),
    "CrossQ": (lambda: model(CrossQ, env=PENDULUM), "its policy is of sb3_contrib.crossq.policies"),
    "MaskablePPO": (lambda: model(MaskablePPO), "its policy is of sb3_contrib.common.maskable.policies"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("trust", [False, True], ids=["safe", "trust"])
def test_other_algorithms_are_never_taken_for_one_of_ours(name: str, trust: bool, tmp_path: Path) -> None:
    make, message = FOREIGN[name]
    make().save(tmp_path / "agent.zip")
    with pytest.raises(UnsafeModelError, match=message):
        load_model(tmp_path / "agent.zip", trust=trust)


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        *(("TQC", "sac"), ("QR-DQN", "dqn"), ("CrossQ", "td3"), ("ARS", "a2c"), ("MaskablePPO", "ppo")),
        *(("recurrent default", "ppo"), ("ppo continuous", "recurrent_ppo"), ("td3 default", "sac"), ("sac default", "ddpg"), ("dqn default", "sac")),
    ],
)  # fmt: skip
def test_an_algorithm_that_did_not_write_the_file_is_refused(name: str, algo: str, tmp_path: Path) -> None:
    (FOREIGN[name][0] if name in FOREIGN else MODELS[name])().save(tmp_path / "agent.zip")
    with pytest.raises(UnsafeModelError, match="its policy class is not one of .* own; pass the right --algo"):
        load_model(tmp_path / "agent.zip", algo=algo)


@pytest.mark.parametrize(
    ("name", "algo"), [("ppo continuous", "a2c"), ("ddpg default", "td3"), ("td3 default", "ddpg"), ("a2c default", "ppo")]
)
def test_algorithms_that_share_their_policies_act_alike(name: str, algo: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save(tmp_path / "agent.zip")
    try:
        loaded = load_model(tmp_path / "agent.zip", algo=algo, device="cpu")
    except UnsafeModelError as error:  # another algorithm's constructor may need numbers that the file does not hold
        assert "pass --algo / --policy-kwargs" in str(error)  # noqa: PT017
        return
    assert_acts_alike(loaded, original)


def test_a_twin_delayed_model_without_delay_acts_as_itself(tmp_path: Path) -> None:
    """The numbers of DDPG: which of the two wrote the file does not matter for acting."""
    original = model(TD3, env=CONTINUOUS, policy_delay=1, target_noise_clip=0.0)
    original.save(tmp_path / "agent.zip")
    assert_acts_alike(load_model(tmp_path / "agent.zip", device="cpu"), original)


# ------------------------------------------------------------------------------------------------ action spaces


def test_long_action_spaces_need_the_environments(tmp_path: Path) -> None:
    """numpy abbreviates arrays of more than 1000 entries with dots."""
    generator = np.random.default_rng(0)
    low = -generator.random(2000).astype(np.float32)
    space, path = spaces.Box(low, -low), tmp_path / "agent.zip"
    original = model(env=Spaces(VECTOR, space))
    original.save(path)
    assert "..." in json.loads(zipfile.ZipFile(path).read("data"))["action_space"]["low"]
    others = [None, spaces.Box(low - 1, -low), spaces.Box(low[:-1], -low[:-1]), spaces.Discrete(2000)]
    for other in others:
        with pytest.raises(
            UnsafeModelError, match=r"agent\.zip: its action space is no Discrete or Box that can be rebuilt from text"
        ):
            load_model(path, action_space=other)
    loaded = load_model(path, action_space=space, device="cpu")
    assert loaded.action_space == space
    assert_acts_alike(loaded, original)


def test_bounds_that_text_rounds_are_the_environments_where_they_agree(tmp_path: Path) -> None:
    low, high = np.float32([-1 / 3, 0.1234567891]), np.float32([2 / 3, 16777217.0])
    exact = spaces.Box(low, high)
    model(env=Spaces(VECTOR, exact)).save(tmp_path / "agent.zip")
    assert np.array_equal(load_model(tmp_path / "agent.zip", action_space=exact).action_space.low, low)
    near = spaces.Box(np.nextafter(low, np.float32(9)), high)
    assert np.array_equal(load_model(tmp_path / "agent.zip", action_space=near).action_space.low, near.low)
    for other in (
        spaces.Box(low - 1, high),
        spaces.Box(low, 2 * high),
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Discrete(2),
    ):
        assert np.allclose(load_model(tmp_path / "agent.zip", action_space=other).action_space.low, low)


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2])], ids=str)
def test_actions_without_a_view_are_refused(space: Any, tmp_path: Path) -> None:
    model(env=Spaces(VECTOR, space)).save(tmp_path / "agent.zip")
    with pytest.raises(UnsafeModelError, match="its action space is no Discrete or Box"):
        load_model(tmp_path / "agent.zip")


@pytest.mark.parametrize(
    "part", [spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict({"b": VECTOR}), spaces.Box(0, 9, (2,), np.int64)], ids=str
)
def test_dictionaries_of_anything_but_plain_boxes_are_refused(part: Any, tmp_path: Path) -> None:
    original = model(policy="MultiInputPolicy", env=Spaces(spaces.Dict({"a": VECTOR})))
    text = {":type:": "", ":serialized:": "", "spaces": str({"a": VECTOR, "b": part})}
    with pytest.raises(
        UnsafeModelError, match="its observation space is no Box .or Dict of them. that can be rebuilt from text"
    ):
        load_model(saved(tmp_path / "agent.zip", original, observation_space=text))


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
        (
            EnvRecipe(env_id="MountainCar-v0", noise=Gaussian(0.1)),
            r"takes observations of shape \(12,\), which 1 frame\(s\) of shape \(2,\) do not make",
        ),
        (EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1)), r"does it stack 3 frames\? \(frame_stack=3, --frame-stack 3\)"),
        (
            EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.1), frame_stack=2),
            r"which 2 frame\(s\) .* does it stack 3 frames\?",
        ),
        ("Acrobot-v1", r"does it stack 2 frames\?"),
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
    with pytest.raises(ValueError, match=r"the policy acts in Discrete\(3\), but .* takes Discrete\(2\)"):
        load_agent(tmp_path / "agent.zip", recipe)
