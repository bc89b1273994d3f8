"""False certificates that would come from the plumbing around the statistics, each found by a review and closed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from toys import Steps, balancer

import robustrl as rrl
from robustrl.attacks import MinimalFlip, SmoothedPGD
from robustrl.errors import CertificateError, ChainError, ChunkError
from robustrl.rollouts.collect import collect, make_job

RECIPE = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=30, noise=rrl.Gaussian(0.2))


def test_until_claims_its_budget_and_no_threat_model() -> None:
    threat = rrl.ThreatModel(norm=math.inf, step=5.0)
    certificate = rrl.certify_policy(balancer(), RECIPE, threat, episodes=50, until=(1.0, 0.01))
    assert certificate.budgets.tolist() == [0.01]
    assert certificate.threat is None


def test_threat_models_and_numbers_do_not_mix() -> None:
    with pytest.raises(TypeError, match="budgets"):
        rrl.certify_policy(balancer(), RECIPE, [rrl.ThreatModel(norm=2, episode=1.0), 0.2], episodes=10)


def test_features_without_noise_need_a_mask_in_certificate_and_attack() -> None:
    recipe = replace(RECIPE, noise=rrl.Gaussian((0.2, 0.2, 0.2, 0.0)))
    with pytest.raises(ValueError, match=r"leave out features \[3\]"):
        rrl.certify_policy(balancer(), recipe, rrl.ThreatModel(norm=2, episode=0.1), episodes=10)
    threat = rrl.ThreatModel(norm=2, episode=0.4, mask=(True, True, True, False))
    certificate = rrl.certify_policy(balancer(), recipe, threat, episodes=100)
    certificate.verify()
    with pytest.raises(ValueError, match=r"leave out features \[3\]"):
        rrl.attack_policy(
            balancer(), recipe, MinimalFlip(draws=4), rrl.ThreatModel(norm=2, episode=0.4), 5, certificate=certificate
        )
    for attack in (MinimalFlip(draws=4), SmoothedPGD(draws=4, step_size=0.05)):
        report = rrl.attack_policy(balancer(), recipe, attack, threat, 5, certificate=certificate)  # the ledger checks the mask
        assert report.spent.max() > 0


def test_a_return_low_above_the_known_one_is_refused() -> None:
    certificate = rrl.certify_policy(balancer(), RECIPE, [0.0, 0.2], episodes=50)
    assert certificate.return_low == 8
    returns = np.asarray(certificate.evidence)
    forged = rrl.certify_return(
        returns, certificate.noise, certificate.budgets, return_low=float(returns.min()), return_high=30
    )
    assert returns.min() > 8
    with pytest.raises(CertificateError, match="return_low"):
        rrl.verify_certificate(replace(forged, provenance=certificate.provenance))


class Paying(Steps):
    """Pays what a global says: code that no fingerprint of the factory sees."""

    pay = 1.0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, Paying.pay, terminated, truncated, info


def paying() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Paying(3), 3)


def test_stored_chunks_of_changed_code_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = rrl.EnvRecipe(factory=paying, noise=rrl.Gaussian(0.2))
    job = make_job(balancer(), recipe, chunk_size=5)
    assert collect(job, 10, folder=tmp_path).returns.mean() == 3
    monkeypatch.setattr(Paying, "pay", 0.0)
    with pytest.raises(ChunkError, match="come out differently"):
        collect(job, 10, folder=tmp_path)


class Unseeded(Steps):
    """Draws its first frame from a generator that no seed reaches."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def __init__(self) -> None:
        super().__init__(3)
        self.own = np.random.default_rng(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.own.standard_normal(4).astype(np.float32), {}


def test_environments_that_ignore_their_seed_are_refused() -> None:
    recipe = rrl.EnvRecipe(factory=lambda: gym.wrappers.TimeLimit(Unseeded(), 3), noise=rrl.Gaussian(0.2))
    with pytest.raises(ChainError, match="ignores reset"):
        make_job(balancer(), recipe)


def test_a_changed_spec_under_a_registered_id_is_refused() -> None:
    spec = replace(gym.spec("CartPole-v1"), entry_point="gymnasium.envs.classic_control.acrobot:AcrobotEnv")
    with pytest.raises(ValueError, match="entry point"):
        rrl.EnvRecipe.of(spec)


def test_a_certificate_never_imports_the_module_that_its_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_module.py").write_text("raise SystemExit('planted code ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    certificate = rrl.certify_policy(balancer(), RECIPE, [0.0], episodes=20)
    recipe = {**certificate.provenance["recipe"], "env_id": "planted_module:CartPole-v1"}
    planted = certificate.with_provenance(recipe=recipe)
    rrl.verify_certificate(planted)
    with pytest.raises(CertificateError, match="names a module"):
        rrl.verify_certificate(planted, balancer())


def test_a_recipe_that_is_no_object_is_no_crash() -> None:
    certificate = rrl.certify_return([1.0, 2.0], rrl.Gaussian(0.2), [0.0], return_low=0)
    rrl.verify_certificate(certificate.with_provenance(recipe="CartPole-v1"))
