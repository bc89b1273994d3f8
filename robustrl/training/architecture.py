"""What a policy's network is made of, by name: `policy_kwargs` for Stable-Baselines3 that files can be loaded with, without pickles."""

from __future__ import annotations

import warnings
from typing import Any

from gymnasium import spaces

from robustrl.errors import check_choice
from robustrl.networks.activations import from_text
from robustrl.networks.extractors import PAIRS, LipschitzCNN, LipschitzMLP

NETWORKS = {"mlp": None, "lipschitz-mlp": LipschitzMLP, "lipschitz-cnn": LipschitzCNN}
"""Feature extractors by name; "mlp" is what Stable-Baselines3 has for the space."""
SHARING = ("ppo", "a2c", "sa_ppo")
"""Algorithms whose critic would shape the features of the policy, if they were one extractor's."""


def architecture(algo: str, network: str | None = None, activation_fn: str | None = None) -> dict[str, Any]:
    """`policy_kwargs` of a network and an activation.

    Args:
        algo: of `robustrl.policy.loading.ALGORITHMS`.
        network: "mlp" (as None), or "lipschitz-mlp" or "lipschitz-cnn": an extractor of Lipschitz constant 1 and one linear layer.
        activation_fn: NAME or NAME:SETTING. In a plain network a family of `robustrl.networks.activations` with its beta, "relu", or
            "leaky_relu" with its slope; in a Lipschitz extractor what that takes.
    Raises:
        ValueError: for an unknown name or a bad setting, or if they do not go together.
    """
    extractor = None if network is None else NETWORKS[check_choice("network", network, tuple(NETWORKS))]
    if extractor is None:
        if activation_fn in PAIRS:
            raise ValueError(
                f"activation {activation_fn!r} needs network lipschitz-mlp or lipschitz-cnn (--network lipschitz-mlp)"
            )
        return {} if activation_fn is None else {"activation_fn": from_text(activation_fn)}
    if algo == "recurrent_ppo":
        raise ValueError(f"network {network!r} has no meaning for recurrent_ppo: no Lipschitz constant of its LSTM is known")
    kwargs: dict[str, Any] = {"features_extractor_class": extractor, "net_arch": []}
    if activation_fn is not None:
        kwargs["features_extractor_kwargs"] = {"activation": activation_fn}
    return kwargs | ({"share_features_extractor": False} if algo in SHARING else {})


def warn_of_actions(network: str | None, space: spaces.Space[Any]) -> None:
    """A UserWarning where a Lipschitz network will not get what it is chosen for: a certificate without noise."""
    if network is not None and NETWORKS.get(network) is not None and not isinstance(space, spaces.Discrete):
        warnings.warn(f"network {network}: certificates without noise take discrete actions only, got {space}", stacklevel=3)
