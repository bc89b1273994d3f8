"""Suites: many attacks on the same episodes, the ones that do not fit left out with a reason."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from toys import LinearRule
from typer.testing import CliRunner

import robustrl as rrl
from robustrl.attacks import RandomNoise
from robustrl.cli import app
from robustrl.envs import EnvRecipe
from robustrl.errors import ChunkError
from robustrl.policy import PolicyView
from robustrl.report.attack import AttackReport, attack_table, load_reports, save_reports
from robustrl.report.figures import suite_figure
from robustrl.suite import FAST, STRONG, attack_suite
from robustrl.threat import ThreatModel
from robustrl.training.adversary import train_adversary

CARTPOLE = EnvRecipe.of("CartPole-v1", max_episode_steps=20)
RULE = PolicyView.from_torch(
    LinearRule(torch.tensor([0.3, 0.5, 2.0, 1.0], dtype=torch.float64)), kind="q", observation_shape=(4,)
)
THREATS = [ThreatModel(norm=2, episode=budget) for budget in (0.2, 0.5)]


def test_every_attack_that_fits_meets_the_same_episodes_at_every_budget() -> None:
    skipped: dict[str, str] = {}
    reports = attack_suite(RULE, CARTPOLE, THREATS, "fast", 3, on_skip=lambda label, why: skipped.update({label: why}))
    assert [r.name for r in reports] == [*FAST, *FAST]
    assert not skipped
    assert all(np.array_equal(r.clean, reports[0].clean) for r in reports)
    assert {r.budget for r in reports} == {0.2, 0.5}
    assert all((r.spent <= r.budget).all() for r in reports)


def test_one_threat_model_is_a_suite_of_one_budget() -> None:
    (one, *_), (listed, *_) = (attack_suite(RULE, CARTPOLE, threats, "fast", 2) for threats in (THREATS[0], THREATS[:1]))
    assert one.to_dict() == listed.to_dict()
    with pytest.raises(TypeError, match="threats must be a ThreatModel or several, got 0.2"):
        attack_suite(RULE, CARTPOLE, 0.2)  # type: ignore[arg-type]


def test_attacks_that_cannot_serve_a_policy_are_left_out_with_their_reason() -> None:
    """Flips need discrete actions, Pattanaik action values; an infinite-norm budget has no episode."""
    model, found = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu"), {}
    reports = attack_suite(
        *(model, EnvRecipe.of("Pendulum-v1", max_episode_steps=3), [ThreatModel(norm=math.inf, step=0.1)], "strong", 2),
        adversary_timesteps=0,
        on_skip=lambda label, why: found.update({label: why}),
    )
    assert {"flip", "margin", "targeted", "Pattanaik"} <= set(found)
    assert "discrete actions" in found["flip"]
    assert {r.name for r in reports} | set(found) == set(STRONG)


@pytest.mark.slow
def test_the_strong_suite_trains_adversaries_once(tmp_path: Path) -> None:
    labels = []
    for _ in range(2):
        reports = attack_suite(
            *(RULE, CARTPOLE, THREATS[:1], "strong", 2),
            adversary_timesteps=64,
            out=tmp_path,
            on_report=lambda r: labels.append(r.name),
        )
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.zip")}
    assert len(written) == 2
    assert {"SA-RL", "PA-AD"} <= {r.name for r in reports}
    first, second = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    assert first == second


def test_an_adversary_of_another_victim_is_not_used_again(tmp_path: Path) -> None:
    path = tmp_path / "adversary.zip"
    train_adversary(RULE, CARTPOLE, THREATS[0], timesteps=64, path=path)
    other = PolicyView.from_torch(LinearRule(-torch.ones(4, dtype=torch.float64)), kind="q", observation_shape=(4,))
    with pytest.raises(ChunkError, match="another victim, environment or budget"):
        train_adversary(other, CARTPOLE, THREATS[0], timesteps=64, path=path)
    with pytest.raises(ChunkError, match="another victim, environment or budget"):
        train_adversary(RULE, CARTPOLE, THREATS[1], timesteps=64, path=path)
    train_adversary(RULE, CARTPOLE, THREATS[0], timesteps=64, path=path)


def test_labels_survive_files_and_figures(tmp_path: Path) -> None:
    reports = attack_suite(RULE, CARTPOLE, THREATS, "fast", 3)
    save_reports(tmp_path / "attack.json", reports)
    again = load_reports(tmp_path / "attack.json")
    assert [r.name for r in again] == [r.name for r in reports]
    table = attack_table(again)
    assert all(label in table for label in FAST)
    axes = suite_figure(again).axes[0]
    assert set(FAST) <= {text.get_text() for text in axes.get_legend().get_texts()}


def test_the_interval_of_a_table_is_students() -> None:
    report = AttackReport(
        {"kind": "X"},
        ThreatModel(norm=2, step=1.0).to_dict(),
        np.zeros(4),
        np.array([1.0, 2.0, 3.0, 6.0]),
        np.zeros(4),
        math.inf,
        0.05,
    )
    assert report.margin == pytest.approx(3.182446305 * np.std([1, 2, 3, 6], ddof=1) / 2)


def test_the_suite_from_the_shell(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent.parent / "zoo" / "cartpole-ppo-undefended", run)
    arguments = [
        "attack",
        str(run),
        "--suite",
        "fast",
        "--norm",
        "inf",
        "--budget",
        "0,0.1",
        "--episodes",
        "2",
        "--max-episode-steps",
        "20",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (run / "attacks.png").stat().st_size > 10_000
    document = json.loads((run / "attack.json").read_text())
    assert {report["label"] for report in document["reports"]} == set(FAST)
    assert "MAD" in result.output
    assert any((run / "tb").iterdir())
    refused = CliRunner().invoke(app, [*arguments, "--attack", "mad"])
    assert "--suite has attacks of its own" in str(refused.exception)


def test_unknown_suites_are_refused() -> None:
    with pytest.raises(ValueError, match="suite must be"):
        attack_suite(RULE, CARTPOLE, THREATS, "medium")
    with pytest.raises(ValueError, match="adversary_timesteps"):
        attack_suite(RULE, CARTPOLE, THREATS, adversary_timesteps=-1)
    assert rrl.attack_suite is attack_suite


def test_the_seed_of_a_suite_is_that_of_its_episodes_and_adversaries_play_the_victim_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, recipe = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu"), EnvRecipe.of("Pendulum-v1", max_episode_steps=3)
    threat = ThreatModel(norm=math.inf, step=0.1)
    expected = rrl.attack_policy(model, recipe, RandomNoise(), threat, 2, seed=7)
    found = attack_suite(model, recipe, [threat], "fast", 2, seed=7)[0]
    assert np.array_equal(found.clean, expected.clean)
    assert np.array_equal(found.returns, expected.returns)
    asked: list[bool] = []

    def refuse(*_: object, deterministic: bool, **__: object) -> None:
        asked.append(deterministic)
        raise ValueError("not today")

    monkeypatch.setattr("robustrl.suite.train_adversary", refuse)
    monkeypatch.setattr("robustrl.suite.STRONG", {})
    monkeypatch.setattr("robustrl.suite._watched", lambda *_: {})
    for deterministic in (True, False):
        attack_suite(model, recipe, [threat], "strong", 2, deterministic=deterministic)
    assert asked == [True, True, False, False]
