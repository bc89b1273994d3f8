"""robustrl: reinforcement learning that stays good when its observations are tampered with, and can prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robustrl.registration import register_envs

if TYPE_CHECKING:
    from robustrl import agents, attacks, certify, envs, mdp, networks, policy, rollouts
    from robustrl.api import attack_policy, certify_policy, load_agent
    from robustrl.certify.certificate import Certificate
    from robustrl.certify.classify import radius_from_counts
    from robustrl.certify.deterministic import DeterministicCertificate
    from robustrl.certify.episode import EpisodeCertificate
    from robustrl.certify.lipschitz import LipschitzScores
    from robustrl.certify.radius import RadiusCertificate
    from robustrl.certify.returns import certify_quantile, certify_return, certify_success, episode_budget, plug_in_return
    from robustrl.certify.safe_set import SafeSetCertificate
    from robustrl.certify.sampling import Smoothed, Tally
    from robustrl.envs.atari import make_atari_env
    from robustrl.envs.bounds import known_return_bounds
    from robustrl.envs.chain import check_chain
    from robustrl.envs.hosts import add_attack, add_noise
    from robustrl.envs.recipe import EnvRecipe, make_vec_env
    from robustrl.exploration import explore
    from robustrl.networks.extractors import LipschitzCNN, LipschitzMLP
    from robustrl.noise import (
        Ablation,
        DeterministicSplitting,
        EntryAblation,
        Gaussian,
        Laplace,
        Noise,
        QuantisedGaussian,
        Splitting,
        Uniform,
        UniformBall,
    )
    from robustrl.policy.normalization import Normalization
    from robustrl.report.attack import AttackReport
    from robustrl.rollouts.deterministic import certify_deterministic
    from robustrl.suite import attack_suite
    from robustrl.threat import Ledger, ThreatModel
    from robustrl.training import presets, supervised
    from robustrl.training.adversary import train_adversary
    from robustrl.training.denoise import denoise
    from robustrl.training.distil import distil
    from robustrl.training.robust import SADQN, SAPPO
    from robustrl.training.robust_sarsa import robust_sarsa
    from robustrl.training.snooping import snoop
    from robustrl.training.supervised import RobustTrainer
    from robustrl.training.train import train
    from robustrl.verification import Verification, verify_certificate

__version__ = "0.1.0"

register_envs()

# Public names and where they live. Loaded on first use (PEP 562), so that `import robustrl` is quick.
# fmt: off
_HOMES = {
    "robustrl.api": ("attack_policy", "certify_policy", "load_agent"),
    "robustrl.certify.certificate": ("Certificate",),
    "robustrl.certify.classify": ("radius_from_counts",),
    "robustrl.certify.deterministic": ("DeterministicCertificate",),
    "robustrl.certify.episode": ("EpisodeCertificate",),
    "robustrl.certify.lipschitz": ("LipschitzScores",),
    "robustrl.certify.radius": ("RadiusCertificate",),
    "robustrl.certify.returns": ("certify_quantile", "certify_return", "certify_success", "episode_budget", "plug_in_return"),
    "robustrl.certify.safe_set": ("SafeSetCertificate",),
    "robustrl.certify.sampling": ("Smoothed", "Tally"),
    "robustrl.envs.atari": ("make_atari_env",),
    "robustrl.envs.bounds": ("known_return_bounds",),
    "robustrl.envs.chain": ("check_chain",),
    "robustrl.envs.hosts": ("add_attack", "add_noise"),
    "robustrl.envs.recipe": ("EnvRecipe", "make_vec_env"),
    "robustrl.exploration": ("explore",),
    "robustrl.networks.extractors": ("LipschitzCNN", "LipschitzMLP"),
    "robustrl.policy.normalization": ("Normalization",),
    "robustrl.noise": (
        "Ablation", "DeterministicSplitting", "EntryAblation", "Gaussian", "Laplace", "Noise", "QuantisedGaussian",
        "Splitting", "Uniform", "UniformBall",
    ),
    "robustrl.report.attack": ("AttackReport",),
    "robustrl.rollouts.deterministic": ("certify_deterministic",),
    "robustrl.suite": ("attack_suite",),
    "robustrl.threat": ("Ledger", "ThreatModel"),
    "robustrl.training.adversary": ("train_adversary",),
    "robustrl.training.denoise": ("denoise",),
    "robustrl.training.distil": ("distil",),
    "robustrl.training.robust": ("SADQN", "SAPPO"),
    "robustrl.training.robust_sarsa": ("robust_sarsa",),
    "robustrl.training.snooping": ("snoop",),
    "robustrl.training.supervised": ("RobustTrainer",),
    "robustrl.training.train": ("train",),
    "robustrl.verification": ("Verification", "verify_certificate"),
}
# fmt: on
_MODULES = {
    "agents": "robustrl.agents",
    "attacks": "robustrl.attacks",
    "certify": "robustrl.certify",
    "envs": "robustrl.envs",
    "mdp": "robustrl.mdp",
    "networks": "robustrl.networks",
    "policy": "robustrl.policy",
    "presets": "robustrl.training.presets",
    "rollouts": "robustrl.rollouts",
    "supervised": "robustrl.training.supervised",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SADQN",
    "SAPPO",
    "Ablation",
    "AttackReport",
    "Certificate",
    "DeterministicCertificate",
    "DeterministicSplitting",
    "EntryAblation",
    "EnvRecipe",
    "EpisodeCertificate",
    "Gaussian",
    "Laplace",
    "Ledger",
    "LipschitzCNN",
    "LipschitzMLP",
    "LipschitzScores",
    "Noise",
    "Normalization",
    "QuantisedGaussian",
    "RadiusCertificate",
    "RobustTrainer",
    "SafeSetCertificate",
    "Smoothed",
    "Splitting",
    "Tally",
    "ThreatModel",
    "Uniform",
    "UniformBall",
    "Verification",
    "add_attack",
    "add_noise",
    "agents",
    "attack_policy",
    "attack_suite",
    "attacks",
    "certify",
    "certify_deterministic",
    "certify_policy",
    "certify_quantile",
    "certify_return",
    "certify_success",
    "check_chain",
    "denoise",
    "distil",
    "envs",
    "episode_budget",
    "explore",
    "known_return_bounds",
    "load_agent",
    "make_atari_env",
    "make_vec_env",
    "mdp",
    "networks",
    "plug_in_return",
    "policy",
    "presets",
    "radius_from_counts",
    "robust_sarsa",
    "rollouts",
    "snoop",
    "supervised",
    "train",
    "train_adversary",
    "verify_certificate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'robustrl' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
