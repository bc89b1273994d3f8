"""Networks and activations by name: what is built, saved and opened again without pickles."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC

from robustrl.errors import UnsafeModelError
from robustrl.networks.activations import LeakyReLU, SmoothActivation, from_text
from robustrl.networks.extractors import LipschitzCNN, LipschitzMLP
from robustrl.policy import PolicyView
from robustrl.policy.loading import _known_text, load_model
from robustrl.training.architecture import architecture, warn_of_actions


@pytest.mark.parametrize(
    ("text", "kind", "setting"),
    [
        ("swish", SmoothActivation, {"name": "swish", "beta": 1.0}),
        ("softplus:4.5", SmoothActivation, {"name": "softplus", "beta": 4.5}),
        ("leaky_relu:0.25", LeakyReLU, {"slope": 0.25}),
        ("relu", LeakyReLU, {"slope": 0.0}),
    ],
)
def test_an_activation_is_its_name_and_its_setting(text: str, kind: type, setting: dict[str, Any]) -> None:
    made = from_text(text)()
    assert type(made) is kind
    assert {name: getattr(made, name) for name in setting} == setting


@pytest.mark.parametrize("text", ["sine", "", "swish:", "swish:steep", "swish:-1", "swish:nan", "relu:2", "leaky_relu:2"])
def test_what_is_no_activation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="activation|beta|slope"):
        from_text(text)


def test_a_lipschitz_network_is_an_extractor_and_one_linear_layer_of_the_actor_alone() -> None:
    assert architecture("dqn", "lipschitz-mlp") == {"features_extractor_class": LipschitzMLP, "net_arch": []}
    found = architecture("a2c", "lipschitz-cnn", "householder")
    assert found == {
        "features_extractor_class": LipschitzCNN,
        "net_arch": [],
        "features_extractor_kwargs": {"activation": "householder"},
        "share_features_extractor": False,
    }
    assert architecture("ppo") == architecture("ppo", "mlp") == {}
    with pytest.raises(ValueError, match="no meaning for recurrent_ppo"):
        architecture("recurrent_ppo", "lipschitz-mlp")
    with pytest.raises(ValueError, match="network must be one of"):
        architecture("ppo", "resnet")
    for network in (None, "mlp"):
        with pytest.raises(ValueError, match="activation 'maxmin' needs network lipschitz-mlp or lipschitz-cnn"):
            architecture("ppo", network, "maxmin")


@pytest.mark.filterwarnings("error")
def test_only_lipschitz_networks_of_continuous_actions_are_warned_of() -> None:
    box = spaces.Box(-1, 1, (2,))
    for network, space in ((None, box), ("same", box), ("mlp", box), ("lipschitz-cnn", spaces.Discrete(2))):
        warn_of_actions(network, space)
    with pytest.warns(UserWarning, match="network lipschitz-cnn: .* discrete actions only"):
        warn_of_actions("lipschitz-cnn", box)


@pytest.mark.parametrize(
    ("algo", "kind", "env", "network", "text"),
    [
        ("ppo", PPO, "CartPole-v1", None, "swish:4"),
        ("dqn", DQN, "CartPole-v1", "mlp", "leaky_relu:0.1"),
        ("a2c", A2C, "CartPole-v1", "lipschitz-mlp", "maxmin"),
        ("sac", SAC, "Pendulum-v1", "lipschitz-mlp", "swish:2"),
        ("dqn", DQN, "CartPole-v1", "lipschitz-mlp", None),
    ],
)
def test_files_of_all_of_them_open_without_pickles(
    tmp_path: Path, algo: str, kind: Any, env: str, network: str | None, text: str | None
) -> None:
    model = kind("MlpPolicy", env, policy_kwargs=architecture(algo, network, text), seed=0, device="cpu")
    model.save(tmp_path / "model.zip")
    loaded = load_model(tmp_path / "model.zip", device="cpu")
    assert PolicyView.of(loaded).fingerprint() == PolicyView.of(model).fingerprint()
    again = io.BytesIO()
    loaded.save(again)  # what was opened so can be saved and opened so
    (tmp_path / "again.zip").write_bytes(again.getvalue())
    observations = np.random.default_rng(0).normal(size=(50, *model.observation_space.shape)).astype(np.float32)
    acts = [m.predict(observations, deterministic=True)[0] for m in (model, load_model(tmp_path / "again.zip", device="cpu"))]
    assert np.array_equal(*acts)


def test_a_learnable_sharpness_is_opened_with_its_weights(tmp_path: Path) -> None:
    from robustrl.networks import activation

    kwargs = {"activation_fn": activation("swish", beta=3, learnable=True)}
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu")
    with torch.no_grad():
        model.policy.mlp_extractor.policy_net[1].position.add_(0.5)
    model.save(tmp_path / "model.zip")
    loaded = load_model(tmp_path / "model.zip", device="cpu")
    assert loaded.policy.mlp_extractor.policy_net[1].beta == model.policy.mlp_extractor.policy_net[1].beta != 3


FORGED = [
    "functools.partial(<class 'robustrl.networks.activations.SmoothActivation'>, __import__('os').system('false'))",
    "functools.partial(<class 'robustrl.networks.activations.SmoothActivation'>, 'swish', beta=open('x'))",
    "functools.partial(<class 'robustrl.networks.activations.SmoothActivation'>, 'swish'), (1)",
    "functools.partial(<class 'robustrl.networks.activations.SmoothActivation'>, " + "(" * 500 + ")",
    "functools.partial(<class 'robustrl.networks.activations.Family'>, 'swish')",
    "functools.partial(<class 'os.system'>, 'false')",
]


@pytest.mark.parametrize("text", FORGED)
def test_text_that_is_no_recipe_of_literals_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(UnsafeModelError, match="is not a known name"):
        _known_text(Path("model.zip"), "activation_fn", text)
