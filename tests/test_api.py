"""The calls most users need: certify, attack, verify."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.stats import beta
from stable_baselines3 import PPO
from toys import NothingToDo, Pixels, Steps, balancer, network_balancer

import robustrl as rrl
from robustrl.api import attack_policy, certify_policy
from robustrl.attacks import MinimalFlip, SmoothedPGD
from robustrl.certify.classify import radius_from_counts
from robustrl.certify.episode import EpisodeCertificate
from robustrl.certify.returns import certify_quantile, certify_return, certify_success, mean_upper_bound
from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import CertificateError, CertificateViolationError, ChainError, ChunkError
from robustrl.noise import Ablation, Gaussian, Laplace
from robustrl.policy import PolicyView
from robustrl.report.attack import AttackReport
from robustrl.rollouts import executor
from robustrl.rollouts.collect import collect, make_job
from robustrl.threat import ThreatModel
from robustrl.verification import Verification, verify_certificate

HORIZON, NOISE, BUDGETS = 60, Gaussian(0.3), [0.0, 0.1, 0.3]
RECIPE = EnvRecipe(env_id="CartPole-v1", noise=NOISE, max_episode_steps=HORIZON)
THREAT = ThreatModel(norm=2, episode=0.3)


def certified(env: Any = RECIPE, budgets: Any = BUDGETS, episodes: int = 240, **options: Any) -> EpisodeCertificate:
    return certify_policy(balancer(), env, budgets, episodes, **({"chunk_size": 80} | options))


def attacked(model: Any = None, env: Any = RECIPE, episodes: int = 20, **options: Any) -> rrl.AttackReport:
    settings: dict[str, Any] = {"attack": MinimalFlip(draws=4, bisections=4), "threat": THREAT, "chunk_size": 20}
    return attack_policy(balancer() if model is None else model, env, episodes=episodes, **(settings | options))


@pytest.fixture(scope="module")
def certificate() -> EpisodeCertificate:
    return certified()


# ------------------------------------------------------------------------------------------------------- certifying


def test_the_certificate_is_that_of_the_rolled_out_returns(certificate: EpisodeCertificate) -> None:
    returns = collect(make_job(balancer(), RECIPE, chunk_size=80), 240).returns
    expected = certify_return(returns, NOISE, BUDGETS, return_low=8, return_high=HORIZON)
    assert np.array_equal(certificate.evidence, returns)
    assert np.array_equal(certificate.values, expected.values)
    assert (certificate.return_low, certificate.return_high) == (8, HORIZON)  # CartPole's own bounds, known beforehand
    assert certificate.simultaneous
    assert np.all(np.diff(certificate.values) <= 0)


@pytest.mark.parametrize(
    "env",
    [
        lambda: ("CartPole-v1", {"noise": NOISE, "max_episode_steps": HORIZON}),
        lambda: (gym.spec("CartPole-v1"), {"noise": NOISE, "max_episode_steps": HORIZON}),
        lambda: (EnvRecipe(env_id="CartPole-v1"), {"noise": NOISE, "max_episode_steps": HORIZON}),
        lambda: (make_vec_env("CartPole-v1", 3, noise=NOISE, max_episode_steps=HORIZON), {}),
        lambda: (RECIPE, {"noise": NOISE}),
    ],
    ids=["id", "spec", "recipe", "vector", "same noise twice"],
)
def test_every_way_to_name_the_environment_gives_the_same_certificate(
    certificate: EpisodeCertificate, env: Callable[[], Any]
) -> None:
    what, options = env()
    assert certified(what, **options) == certificate


def test_an_sb3_model_and_its_view_are_certified_alike() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    options: dict[str, Any] = {"chunk_size": 40, "max_episode_steps": HORIZON, "noise": NOISE}
    one = certify_policy(model, "CartPole-v1", BUDGETS, 40, **options)
    other = certify_policy(PolicyView.of(model), "CartPole-v1", BUDGETS, 40, **options)
    assert one == other
    assert one.provenance["policy_hash"] == PolicyView.of(model).fingerprint()


def test_success_and_quantiles_are_those_of_the_returns(certificate: EpisodeCertificate) -> None:
    returns: Any = certificate.evidence
    success = certified(statistic="success", success_at=40)
    expected = certify_success(int((returns >= 40).sum()), 240, NOISE, BUDGETS)
    assert np.array_equal(success.values, expected.values)
    assert success.provenance["success_at"] == 40
    assert success.n == 240
    quantile = certified(statistic="quantile", quantile=0.3)
    assert np.array_equal(quantile.values, certify_quantile(returns, 0.3, NOISE, BUDGETS).values, equal_nan=True)
    assert quantile.quantile == 0.3


def test_options_reach_the_statistics() -> None:
    paper = certified(method="paper", alpha=0.01)
    assert (paper.method, paper.alpha) == ("paper", 0.01)
    assert not certified(simultaneous=False).simultaneous
    assert certified(return_low=0.0).values[-1] <= certified().values[-1]
    assert certified(budgets=0.1).budgets.tolist() == [0.1]
    assert math.isinf(certified(budgets=[0.0, math.inf]).budgets[-1])


def test_environments_without_known_bounds_need_one_for_the_mean_only() -> None:
    env = EnvRecipe(factory=lambda: Steps(rate=0.2, flat=True), max_episode_steps=40, noise=NOISE)
    with pytest.raises(ValueError, match="return_low must be given: no sure lower bound of the return is known for .*lambda"):
        certified(env)
    assert certified(env, return_low=1.0).return_low == 1.0
    assert certified(env, statistic="quantile", quantile=0.5).n == 240
    assert certified(env, statistic="success", success_at=2).n == 240


def test_provenance_says_how_the_episodes_were_made(certificate: EpisodeCertificate) -> None:
    provenance = certificate.provenance
    assert provenance["env"] == "CartPole-v1"
    assert provenance["recipe"]["noise"] == NOISE.to_dict()
    assert {name: provenance[name] for name in ("seed", "chunk_size", "engine", "deterministic", "device")} == {
        "seed": 0, "chunk_size": 80, "engine": "native", "deterministic": True, "device": "cpu",
    }  # fmt: skip
    assert provenance["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("method", ["betting", "hybrid"])
def test_until_stops_as_soon_as_the_value_is_certified(method: str) -> None:
    found = certified(until=(30.0, 0.1), episodes=2_000, method=method)
    assert found.anytime
    assert found.method == "betting"
    assert found.budgets.tolist() == [0.1]
    assert found.values[0] >= 30.0
    assert found.n < 2_000
    assert found.n % 80 == 0
    assert found.n_planned == 2_000
    found.verify()
    assert verify_certificate(found, balancer()).bit_equal


def test_until_ends_at_the_most_episodes_when_the_value_is_out_of_reach() -> None:
    found = certified(until=(59.9, 0.3), episodes=200)
    assert found.n == 200
    assert found.values[0] < 59.9


def test_until_goes_on_from_the_same_episodes(tmp_path: Path) -> None:
    found = certified(until=(59.9, 0.3), episodes=320, out=tmp_path)
    assert np.array_equal(found.evidence, certified(episodes=320).evidence)
    assert len(list(tmp_path.glob("chunk-*"))) == 4  # doubling re-used what was there


def test_threat_models_become_budgets() -> None:
    threats = [ThreatModel(norm=2, step=0.02), ThreatModel(norm=2, episode=0.3), ThreatModel(norm=math.inf, step=0.01)]
    found = certified(budgets=threats)
    assert found.budgets == pytest.approx([0.02 * math.sqrt(HORIZON), 0.3, 0.01 * math.sqrt(HORIZON * 4)])
    assert found.threat is not None
    assert [t["step"] for t in found.threat["converted_from"]] == [0.02, None, 0.01]
    assert certified(budgets=THREAT).budgets.tolist() == [0.3]


def test_a_killed_run_goes_on_from_its_folder(
    tmp_path: Path, certificate: EpisodeCertificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = certified(out=tmp_path, episodes=160)
    assert first.n == 160
    assert certified(out=tmp_path) == certificate
    with monkeypatch.context() as patch:
        patch.setattr("robustrl.rollouts.collect.LocalExecutor", NothingToDo)
        assert certified(out=tmp_path) == certificate  # nothing left to run
    with pytest.raises(ChunkError, match="different seed"):
        certified(out=tmp_path, seed=1)


def test_seeds_and_modes_give_other_episodes(certificate: EpisodeCertificate) -> None:
    for options in ({"seed": 1}, {"deterministic": False}, {"chunk_size": 60}, {"engine": "list"}):
        assert not np.array_equal(certified(**options).evidence, certificate.evidence), options


def test_two_workers_give_the_same_certificate(certificate: EpisodeCertificate) -> None:
    assert certified(n_workers=2) == certificate


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"episodes": 0}, ValueError, "episodes must be an integer >= 1"),
        ({"alpha": 0.0}, ValueError, "alpha must be"),
        ({"alpha": 0.7}, ValueError, "alpha must be"),
        ({"method": "hybird"}, ValueError, "method must be one of"),
        ({"env": "Hopper-v5", "noise": NOISE}, ValueError, "return_low must be given"),
        ({"method": "paper", "env": EnvRecipe(factory=lambda: Steps(3), max_episode_steps=5, noise=NOISE), "return_low": 0}, ValueError, "return_high must be"),
        ({"statistic": "median"}, ValueError, "statistic must be one of"),
        ({"statistic": "success"}, ValueError, "success_at must be given"),
        ({"statistic": "quantile"}, TypeError, "quantile must be a level in"),
        ({"statistic": "quantile", "quantile": 1.5}, ValueError, r"q must be a quantile level in \(0, 1\)"),
        ({"quantile": 0.5}, ValueError, "quantile belongs to statistic='quantile', got statistic='mean'"),
        ({"success_at": 5.0}, ValueError, "success_at belongs to statistic='success'"),
        ({"budgets": [-0.1]}, ValueError, "must be >= 0"),
        ({"budgets": [math.nan]}, ValueError, "must be >= 0|NaN"),
        ({"budgets": []}, ValueError, "budgets"),
        ({"budgets": "lots"}, TypeError, "must be numeric"),
        ({"budgets": [[0.1], [0.2]]}, ValueError, "budgets"),
        ({"budgets": [ThreatModel(norm=0, episode=1)]}, ValueError, "has no certificate for this threat"),
        ({"budgets": ThreatModel(norm=2, episode=1, units="unit01")}, ValueError, "units 'unit01' means nothing for CartPole"),
        ({"budgets": [THREAT, 0.5]}, TypeError, "got a mixture of both"),
        ({"until": (30.0, 0.1), "method": "band"}, ValueError, "only the betting bound may be stopped at will"),
        ({"until": (30.0, 0.1), "statistic": "success", "success_at": 1}, ValueError, "until needs statistic='mean'"),
        ({"until": (30.0, -0.1)}, ValueError, "must be >= 0"),
        ({"until": (math.nan, 0.1)}, ValueError, "until value must be"),
        ({"until": (30.0,)}, ValueError, r"until must be a pair \(value, budget\), got \(30.0,\)"),
        ({"return_low": 70.0}, ValueError, "return_low|return_high"),
        ({"return_high": 7.0}, ValueError, "return_high|returns"),
        ({"return_low": -math.inf}, ValueError, "return_low must be"),
        ({"env": "CartPole-v1", "max_episode_steps": 10}, ValueError, "noise must be given: an undefended policy has no certificate"),
        ({"env": "CartPole-v1", "noise": 0.2}, TypeError, "noise must be a robustrl noise mechanism"),
        ({"noise": Gaussian(0.5)}, ChainError, "two noises"),
        ({"env": lambda: Steps(3), "noise": NOISE, "return_low": 0}, ChainError, "no finite horizon: pass max_episode_steps="),
        ({"env": "Nothing-v0", "noise": NOISE}, ValueError, "unknown environment id"),
        ({"env": 3, "noise": NOISE}, TypeError, "env must be an id"),
        ({"env": "MountainCar-v0", "noise": NOISE}, ValueError, r"frames of shape \(4,\), but MountainCar-v0"),
        ({"frame_stack": 2}, ValueError, "the policy stacks 1 frame"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
        ({"engine": "warp"}, ValueError, "engine must be one of"),
        ({"n_workers": 0}, ValueError, "n_workers must be"),
        ({"env": EnvRecipe(env_id="CartPole-v1", env_kwargs={"render_mode": None, "sutton_barto_reward": np.bool_(False)}, noise=NOISE), "return_low": 0}, ValueError, "must be plain JSON data"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_episode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("robustrl.rollouts.collect.run_chunk", None)
    with pytest.raises(error, match=message):
        certified(**({"out": tmp_path / "new"} | options))
    assert not (tmp_path / "new").exists()


def test_the_model_must_be_one() -> None:
    with pytest.raises(TypeError, match="model must be a Stable-Baselines3 model, got str"):
        certify_policy("agent.zip", RECIPE, BUDGETS, 10)


# -------------------------------------------------------------------------------------------------------- attacking


def test_a_report_compares_with_the_certificate(certificate: EpisodeCertificate) -> None:
    report = attacked(certificate=certificate)
    assert report.certified == certificate.values[2]
    assert report.upper == mean_upper_bound(report.returns, HORIZON)
    assert report.upper >= report.certified
    assert report.attack["kind"] == "MinimalFlip"
    assert report.threat == THREAT.to_dict()
    assert report.budget == 0.3
    clean = collect(make_job(balancer(), RECIPE, seed=1, chunk_size=20), 20)
    assert np.array_equal(report.clean, clean.returns)  # the same seeds without the attack
    assert 0 < report.spent.max() <= 0.3 * (1 + 1e-9)


def test_a_budget_between_two_certified_ones_is_held_against_the_larger(certificate: EpisodeCertificate) -> None:
    report = attacked(certificate=certificate, threat=ThreatModel(norm=2, episode=0.2))
    assert report.certified == certificate.values[2]
    beyond = attacked(certificate=certificate, threat=ThreatModel(norm=2, episode=5.0))
    assert beyond.certified == 8.0  # nothing but CartPole's own lower bound


def test_per_step_threats_are_held_against_the_budget_that_covers_them(certificate: EpisodeCertificate) -> None:
    step = 0.3 / math.sqrt(HORIZON) * 0.999
    assert attacked(certificate=certificate, threat=ThreatModel(norm=2, step=step)).certified == certificate.values[2]


@pytest.mark.parametrize("sigma", [0.3, (0.2, 0.3, 0.3, 0.4)])
def test_a_certificate_fits_its_agent_after_a_round_trip_through_a_file(tmp_path: Path, sigma: Any) -> None:
    recipe = replace(RECIPE, noise=Gaussian(sigma))
    fresh = certified(recipe)
    fresh.save(tmp_path / "certificate.json")
    for found in (fresh, EpisodeCertificate.load(tmp_path / "certificate.json")):
        assert attacked(env=recipe, certificate=found).certified == fresh.value_at(0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": balancer(gain=11.0)}, "its policy_hash differs"),
        (
            {"env": replace(RECIPE, noise=Gaussian(0.4))},
            r"the certificate is for Gaussian\(sigma=0.3\), but the attacked agent uses",
        ),
        ({"env": replace(RECIPE, noise=None)}, "but the attacked agent uses None"),
        ({"env": replace(RECIPE, max_episode_steps=50)}, "its recipe differs"),
        ({"deterministic": False}, "its deterministic differs"),
    ],
)
def test_a_certificate_of_another_agent_is_refused(
    certificate: EpisodeCertificate, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("robustrl.rollouts.collect.run_chunk", None)
    with pytest.raises(ValueError, match=message):
        attacked(certificate=certificate, **options)


def test_a_certificate_of_another_factory_is_refused() -> None:
    def env(rate: float) -> EnvRecipe:
        return EnvRecipe(factory=lambda: Steps(rate=rate, flat=True), max_episode_steps=20, noise=NOISE)

    found = certified(env(0.2), return_low=1)
    assert attacked(env=env(0.2), certificate=found).certified == found.values[2]
    with pytest.raises(ValueError, match="its code differs"):
        attacked(env=env(0.3), certificate=found)


def test_a_certificate_of_a_quantile_is_refused() -> None:
    with pytest.raises(ValueError, match="got one of the quantile"):
        attacked(certificate=certified(statistic="quantile", quantile=0.5))


def test_an_attack_is_compared_with_a_certificate_of_success_on_its_own_terms() -> None:
    certificate = certified(statistic="success", success_at=40)
    report = attacked(certificate=certificate)
    assert report.success_at == 40
    assert report.mean == np.mean(report.returns >= 40)
    assert report.clean_mean == np.mean(report.clean >= 40)
    wins, n = int(np.sum(report.returns >= 40)), len(report.returns)
    assert report.upper == pytest.approx(1.0 if wins == n else beta.ppf(0.95, wins + 1, n - wins))
    assert report.certified == certificate.value_at(0.3)
    assert "probability of a return of at least 40" in report.table()
    assert AttackReport.from_dict(report.to_dict()).to_dict() == report.to_dict()
    with pytest.raises(ValueError, match=r"success_at is 39.*, but the certificate is about 40"):
        attacked(certificate=certificate, success_at=39)


def test_an_attack_below_a_certificate_of_success_raises() -> None:
    certificate = certified(budgets=[0.0, 5.0], statistic="success", success_at=40)
    boasting = replace(certificate, values=np.array([1.0, 0.99]))
    with pytest.raises(CertificateViolationError, match="probability of a return of at least 40"):
        attacked(certificate=boasting, threat=ThreatModel(norm=2, episode=5.0))


def test_an_undefended_policy_can_be_attacked() -> None:
    report = attacked(env=replace(RECIPE, noise=None), threat=ThreatModel(norm=2, episode=1.0))
    assert report.clean_mean == HORIZON
    assert report.mean < HORIZON
    assert report.certified is None


def test_without_a_known_upper_bound_there_is_no_alarm() -> None:
    env = EnvRecipe(factory=lambda: Steps(rate=0.2, flat=True), max_episode_steps=20, noise=NOISE)
    assert attacked(env=env).upper == math.inf
    assert attacked(env=env, return_high=20.0).upper < 20


def test_attacks_go_on_from_their_folder_and_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = attacked(out=tmp_path, attack=SmoothedPGD(draws=4, step_size=0.1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attacked", "clean"]
    monkeypatch.setattr("robustrl.rollouts.collect.LocalExecutor", NothingToDo)
    again = attacked(out=tmp_path, attack=SmoothedPGD(draws=4, step_size=0.1))
    assert again.to_dict() == first.to_dict()
    with pytest.raises(ChunkError, match="different attack"):
        attacked(out=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attack": "pgd"}, TypeError, "attack must be a robustrl attack"),
        ({"threat": 0.6}, TypeError, "threat must be a ThreatModel, got 0.6"),
        ({"threat": ThreatModel(norm=0, episode=1)}, ValueError, r"threat\.norm must be"),
        ({"certificate": 3}, TypeError, "certificate must be an EpisodeCertificate, got int"),
        ({"episodes": 0}, ValueError, "episodes must be"),
        ({"alpha": 2}, ValueError, "alpha must be"),
        ({"env": replace(RECIPE, noise=Ablation(0.5))}, ValueError, "needs additive noise"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"noise": Laplace(0.2)}, ChainError, "two noises"),
    ],
)
def test_bad_attack_arguments_are_refused_before_any_episode(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("robustrl.rollouts.collect.run_chunk", None)
    with pytest.raises(error, match=message):
        attacked(**options)


# -------------------------------------------------------------------------------------------------------- verifying


def test_a_certificate_is_recomputed_and_its_episodes_replayed_bit_for_bit(
    tmp_path: Path, certificate: EpisodeCertificate
) -> None:
    certificate.save(tmp_path / "certificate.json")
    for found in (certificate, tmp_path / "certificate.json", str(tmp_path / "certificate.json")):
        assert verify_certificate(found).bit_equal is None
        result = verify_certificate(found, balancer(), replay=2)
        assert result.bit_equal is True
        assert len(set(result.replayed)) == 2
        assert result.certificate == certificate
    assert verify_certificate(certificate, balancer(), replay=100).replayed == (0, 1, 2)
    assert "every return is the stored one, bit for bit" in str(result)
    assert "were not replayed (give the model to do so)" in str(verify_certificate(certificate))


def test_ordinary_networks_on_the_list_engine_replay_bit_for_bit() -> None:
    options: dict[str, Any] = {"chunk_size": 40, "engine": "list", "deterministic": False}
    found = certify_policy(network_balancer(), RECIPE, BUDGETS, 100, **options)
    assert verify_certificate(found, network_balancer(), replay=3).bit_equal is True


def test_another_policy_is_noticed(certificate: EpisodeCertificate) -> None:
    with pytest.raises(CertificateError, match="the model is not the certified one"):
        verify_certificate(certificate, balancer(gain=11.0))


def edited(certificate: EpisodeCertificate) -> EpisodeCertificate:
    returns = np.array(certificate.evidence)
    returns[np.argmin(returns)] = HORIZON
    return replace(certificate, evidence=returns)


def test_edited_evidence_and_values_are_noticed(certificate: EpisodeCertificate) -> None:
    with pytest.raises(CertificateError, match="recomputed"):
        verify_certificate(edited(certificate))
    with pytest.raises(CertificateError, match="field 'values'"):
        verify_certificate(replace(certificate, values=certificate.values + 1))
    # evidence and bound edited together can only be noticed by a replay
    returns = np.full(240, float(HORIZON))
    forged = certify_return(returns, NOISE, BUDGETS, return_low=8, return_high=HORIZON).with_provenance(
        **certificate.provenance
    )
    verify_certificate(forged)
    with pytest.raises(CertificateError, match="on the same build and CPU gives other returns"):
        verify_certificate(forged, balancer())


@pytest.mark.parametrize("forgery", [{"seed": 1}, {"chunk_size": 60}, {"engine": "list"}, {"deterministic": False}])
def test_forged_provenance_is_noticed(certificate: EpisodeCertificate, forgery: dict[str, Any]) -> None:
    with pytest.raises(CertificateError, match="other returns than the stored evidence"):
        verify_certificate(certificate.with_provenance(**forgery), balancer(), replay=4)


@pytest.mark.parametrize(
    "forgery",
    [
        {"chunk_size": 0},
        {"chunk_size": "x"},
        {"seed": -1},
        {"engine": "warp"},
        {"recipe": {}},
        {"recipe": None},
        {"recipe": {"env_id": "Nothing-v0"}},
        {"recipe": RECIPE.to_dict() | {"noise": Gaussian(0.1).to_dict()}},
        {"recipe": RECIPE.to_dict() | {"env_id": "MountainCar-v0"}},
        {"recipe": RECIPE.to_dict() | {"frame_stack": -3}},
    ],
)
def test_nonsense_in_the_provenance_is_refused_by_name(certificate: EpisodeCertificate, forgery: dict[str, Any]) -> None:
    with pytest.raises(
        CertificateError, match=r"rebuilt from the file alone|cannot be replayed|the recorded environment adds|'return_low'"
    ):
        verify_certificate(certificate.with_provenance(**forgery), balancer())


def test_a_certificate_without_provenance_cannot_be_replayed() -> None:
    bare = certify_return(np.full(50, 40.0), NOISE, BUDGETS, return_low=8, return_high=HORIZON)
    assert verify_certificate(bare).bit_equal is None
    with pytest.raises(CertificateError, match="does not record how its episodes were made"):
        verify_certificate(bare, balancer())


@pytest.mark.parametrize("elsewhere", [{"versions": {"torch": "1.0"}}, {"device": "cuda"}])
def test_on_another_machine_the_law_is_compared(certificate: EpisodeCertificate, elsewhere: dict[str, Any]) -> None:
    same_bits = verify_certificate(certificate.with_provenance(**elsewhere), balancer())
    assert same_bits.bit_equal is True
    other_seed = certificate.with_provenance(**elsewhere, seed=9)
    result = verify_certificate(other_seed, balancer(), replay=3)
    assert result.bit_equal is False
    assert result.p_value is not None
    assert "on another machine or build: same law (two-sample p = " in str(result)
    returns = np.full(240, float(HORIZON))
    forged = certify_return(returns, NOISE, BUDGETS, return_low=8, return_high=HORIZON)
    with pytest.raises(CertificateError, match="gives returns of another law"):
        verify_certificate(forged.with_provenance(**certificate.provenance | elsewhere), balancer(), replay=3)


def test_success_certificates_are_replayed_by_their_count() -> None:
    found = certified(statistic="success", success_at=60)  # 78% of the episodes
    full = verify_certificate(found, balancer(), replay=3)
    assert full.bit_equal is True
    assert "the stored number of successes" in str(full)
    part = verify_certificate(found, balancer(), replay=1)
    assert part.bit_equal is False
    assert "no other rate of success (two-sample p = " in str(part)
    assert "machine" not in str(part)
    one_more = certify_success(int(found.evidence) + 1, 240, NOISE, BUDGETS).with_provenance(**found.provenance)
    with pytest.raises(CertificateError, match=r"a full replay gives \d+ successes, not the stored"):
        verify_certificate(one_more, balancer(), replay=3)
    all_won = certify_success(240, 240, NOISE, BUDGETS).with_provenance(**found.provenance)
    with pytest.raises(CertificateError, match="gives another rate of success"):
        verify_certificate(all_won, balancer(), replay=1)
    unnamed = replace(found, provenance={k: v for k, v in found.provenance.items() if k != "success_at"})
    with pytest.raises(CertificateError, match="does not record which return counts as success"):
        verify_certificate(unnamed, balancer())


def test_quantile_certificates_replay_bit_for_bit() -> None:
    assert verify_certificate(certified(statistic="quantile", quantile=0.2), balancer()).bit_equal is True


def test_a_factory_must_be_given_again_and_must_be_the_same() -> None:
    env = EnvRecipe(factory=lambda: Steps(rate=0.2, flat=True), max_episode_steps=20, noise=NOISE)
    found = certified(env, return_low=1)
    with pytest.raises(CertificateError, match="cannot be rebuilt from the file alone, pass env="):
        verify_certificate(found, balancer())
    assert verify_certificate(found, balancer(), env=env).bit_equal is True
    with pytest.raises(CertificateError, match="env is not the certified environment: different max_episode_steps"):
        verify_certificate(found, balancer(), env=replace(env, max_episode_steps=21))
    other = EnvRecipe(factory=lambda: Steps(rate=0.3, flat=True), max_episode_steps=20, noise=NOISE)
    with pytest.raises(CertificateError, match="its factory or wrappers have other code"):
        verify_certificate(found, balancer(), env=other, replay=3)


def test_replay_must_be_a_positive_number_and_the_file_a_certificate(tmp_path: Path, certificate: EpisodeCertificate) -> None:
    with pytest.raises(ValueError, match="replay must be an integer >= 1"):
        verify_certificate(certificate, balancer(), replay=0)
    with pytest.raises(FileNotFoundError):
        verify_certificate(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CertificateError, match="schema"):
        verify_certificate(tmp_path / "bad.json")


def test_other_kinds_of_certificates_have_no_episodes() -> None:
    other = radius_from_counts(NOISE, 990, 1000, alpha=0.05)
    assert verify_certificate(other) == Verification(other)
    with pytest.raises(CertificateError, match="a RadiusCertificate has no episodes to replay"):
        verify_certificate(other, balancer())


def test_versions_name_what_bits_depend_on() -> None:
    assert {"torch", "numpy", "robustrl", "python", "machine", "cpu"} <= set(executor.build())


@pytest.mark.parametrize("units", ["raw", "uint8"])
def test_byte_pictures_are_refused_with_what_to_do(units: Any) -> None:
    """Whatever the units, the first thing to be told is that bytes have to become floats."""
    model = PPO("CnnPolicy", Pixels(), n_steps=8, device="cpu", seed=0)
    recipe = rrl.EnvRecipe(factory=Pixels, max_episode_steps=3)
    threat = rrl.ThreatModel(norm=math.inf, step=4, units=units)
    attack = rrl.attacks.GradientAttack(rrl.attacks.Margin())
    with pytest.raises(ValueError, match=r"needs float observations, but Pixels gives uint8.*wrapper.*docs/agents\.md"):
        rrl.attack_policy(model, recipe, attack, threat, 2)

    def unit_pixels(env: Any) -> Any:
        space = spaces.Box(0, 1, env.observation_space.shape, np.float32)
        return gym.wrappers.TransformObservation(env, lambda o: o.astype(np.float32) / 255, space)

    floats = replace(recipe, wrappers=(unit_pixels,))
    report = rrl.attack_policy(model, floats, attack, replace(threat, units="uint8"), 1)
    assert 0 < report.spent.max() <= 4 / 255 * (1 + 1e-6)
