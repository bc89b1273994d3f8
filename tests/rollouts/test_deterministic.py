"""Certificates of deterministic policies: real networks, files, replays, forgeries, and the command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from typer.testing import CliRunner

import robustrl as rrl
from robustrl.certify.deterministic import DeterministicCertificate, _confident
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.returns import certify_return
from robustrl.cli import app
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import CertificateError
from robustrl.policy import Normalization
from rollouts.brute import Maze, Streak, all_paths, linear, worst

SHORT = EnvRecipe("CartPole-v1", max_episode_steps=20)
BUDGETS = [0.0, 0.005, 0.05]


def network(seed: int = 0) -> DQN:
    return DQN(
        "MlpPolicy",
        gym.make("CartPole-v1"),
        policy_kwargs={
            "features_extractor_class": rrl.LipschitzMLP,
            "features_extractor_kwargs": {"widths": (16,)},
            "net_arch": [],
        },
        seed=seed,
        buffer_size=100,
        device="cpu",
    )


def maze() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Streak(Maze(1, noisy=True)), 5)


def certified(**settings: Any) -> DeterministicCertificate:
    return rrl.certify_deterministic(
        linear(1), maze, **({"budgets": [0.0, 0.3, 1.0], "episodes": 6, "reward_low": -1.5} | settings)
    )


def test_attacks_of_a_lipschitz_network_stay_above() -> None:
    model = network()
    found = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=10, nodes=500)
    assert found.n == 10
    for k, budget in enumerate(BUDGETS):
        threat = rrl.ThreatModel(2, step=budget)
        report = rrl.attack_policy(model, SHORT, rrl.attacks.ATTACKS["pgd"](), threat, 10, seed=0, engine="list")
        assert np.all(report.returns >= found.bounds[:, k])
        if budget == 0:
            assert np.array_equal(report.returns, found.bounds[:, 0])
    assert np.all(np.diff(found.values) <= 0)
    assert np.all(found.values <= found.mean_bound)


def test_values_hold_for_all_budgets_with_the_stated_confidence() -> None:
    """Groups of ten out of 500 episodes: at alpha = 0.3, no more than 30 % of them may say more than the mean of all."""
    trees = certified(episodes=500)
    assert np.ptp(trees.bounds[:, 0]) > 0
    statements = [_confident(trees.bounds[i : i + 10], trees.budgets, 0.3, trees.return_low) for i in range(0, 500, 10)]
    assert np.mean([np.any(values > trees.mean_bound) for values in statements]) <= 0.3
    assert np.all(_confident(trees.bounds, trees.budgets, 0.05, trees.return_low) > trees.mean_bound - 0.5)


def test_the_failure_probability_is_shared_by_the_budgets() -> None:
    bounds, budgets = np.random.default_rng(0).normal(size=(60, 1)).repeat(4, 1), np.array([0.0, 1.0, 0.5, 1.0])
    shared = certify_return(bounds[:, 0], rrl.Gaussian(1.0), 0.0, alpha=0.1 / 3, return_low=-9.0).values[0]
    assert _confident(bounds, budgets, 0.1, -9.0).tolist() == [shared] * 4
    better = bounds + np.array([0.0, 1.0, 0.0, 1.0])  # what holds at a larger budget holds at a smaller one
    assert np.ptp(_confident(better, budgets, 0.1, -9.0)) == 0


def test_threat_models_are_converted_into_the_units_of_frames() -> None:
    normalization = Normalization(np.zeros(4), np.full(4, 0.25), epsilon=1e-12)
    inside = replace(SHORT, normalization=normalization)
    outside = replace(inside, normalize="after_noise")
    raw, scaled = (rrl.ThreatModel(2, step=0.02, units=units) for units in ("raw", "normalized"))
    model = network()
    by = {
        (place, threat.units): rrl.certify_deterministic(model, recipe, [threat], episodes=6, nodes=300).bounds
        for place, recipe in (("in", inside), ("out", outside))
        for threat in (raw, scaled)
    }
    assert np.array_equal(by["in", "raw"], by["out", "raw"])
    assert np.array_equal(by["in", "normalized"], by["out", "normalized"])
    plain = rrl.certify_deterministic(model, inside, [0.04], episodes=6, nodes=300)
    assert np.array_equal(by["in", "raw"], plain.bounds)
    certificate = rrl.certify_deterministic(model, outside, scaled, episodes=2, nodes=50)
    rrl.verify_certificate(certificate, model)
    assert certificate.budgets == pytest.approx([0.01])
    assert certificate.threat is not None
    with pytest.raises(CertificateError, match="threat"):
        rrl.verify_certificate(replace(certificate, budgets=np.array([0.02]), mean_bound=certificate.mean_bound))


def test_stacked_frames_of_a_network_against_brute_force() -> None:
    """The units of a stack: costs are those of a whole observation, budgets those of single frames."""
    recipe, policy = EnvRecipe(factory=maze, frame_stack=2), linear(7, n_frames=2)
    assert LipschitzScores.of(policy).lipschitz == pytest.approx(1)
    found = rrl.certify_deterministic(policy, recipe, [0.2, 0.8], episodes=2, reward_low=-1.5)
    for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
        paths = all_paths(maze, int(seed), 5, policy, 2)
        assert bounds == pytest.approx([worst(paths, b, "step", lambda t: 0.5) for b in (0.2, 0.8)])


@pytest.mark.parametrize("method", ["tree", "prefix", "constancy"])
@pytest.mark.parametrize("per", ["step", "episode"])
def test_files_keep_everything(tmp_path: Path, method: str, per: str) -> None:
    found = certified(method=method, per=per)
    found.save(tmp_path / "c.json")
    again = rrl.Certificate.load(tmp_path / "c.json")
    assert again == found
    assert isinstance(again, DeterministicCertificate)
    assert np.array_equal(again.bounds, found.bounds)
    again.verify()
    result = rrl.verify_certificate(again, linear(1), env=maze, replay=3)
    assert len(result.replayed) == 3
    assert "same rewards" in str(result)
    found.plot(tmp_path / "c.png")
    assert found.table().count("\n") == 7
    assert method in found.table()


def test_the_same_seed_is_the_same_certificate() -> None:
    assert certified() == certified()
    assert certified() != certified(seed=1)


def again(found: DeterministicCertificate, **changes: Any) -> DeterministicCertificate:
    """What a forger makes of changed evidence or settings: everything else follows from it."""
    names = (
        "method",
        "accounting",
        "budgets",
        "alpha",
        "horizon",
        "reward_low",
        "return_low",
        "never_ends_early",
        "provenance",
    )
    settings = {name: getattr(found, name) for name in names} | {"evidence": found.evidence} | changes
    return DeterministicCertificate.of(settings.pop("evidence"), **settings)


def column(found: DeterministicCertificate, name: str, change: Any) -> Any:
    return found.evidence._replace(**{name: change(getattr(found.evidence, name).copy())})


def raised(values: Any, place: Any, value: Any) -> Any:
    values[place] = value
    return values


def test_honest_evidence_is_verified() -> None:
    rrl.verify_certificate(again(certified()), linear(1), env=maze, replay=6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("costs", lambda c: np.where(c > 0, c + 5, c)),
        ("rewards", lambda r: np.where(r != 0, r + 1, r)),
        ("actions", lambda a: (a + 1) % 3),
    ],
)
def test_forged_trees_are_found_by_a_replay(name: str, change: Any) -> None:
    found = certified()
    forged = again(found, evidence=column(found, name, change))
    forged.verify()
    with pytest.raises(CertificateError, match="costs|comes out differently"):
        rrl.verify_certificate(forged, linear(1), env=maze, replay=6)


def test_left_out_actions_are_found_by_a_replay() -> None:
    found = certified()
    keep = found.evidence.costs == 0
    cut = {name: getattr(found.evidence, name)[keep] for name in ("parents", "actions", "children", "rewards", "costs")}
    forged = again(found, evidence=found.evidence._replace(**cut))
    assert np.all(forged.bounds >= found.bounds)
    assert np.any(forged.bounds > found.bounds)
    with pytest.raises(CertificateError, match="costs"):
        rrl.verify_certificate(forged, linear(1), env=maze, replay=6)


def test_forged_statements_are_refused() -> None:
    model = network()
    found = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=4, nodes=100)
    rrl.verify_certificate(found, model)
    other = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=4, nodes=100, seed=1)
    forgeries = {
        "values": replace(found, values=found.values + 1),
        "mean_bound": replace(found, mean_bound=found.mean_bound + 1),
        "not_covered": replace(found, not_covered=found.not_covered[1:]),
        "episodes are not those of seed": again(found, evidence=other.evidence),
        "reward_low": again(found, reward_low=0.5, return_low=8.0, never_ends_early=False) and replace(found, reward_low=1.5),
        "return_low": again(found, return_low=9.0),
        "frame_stack": again(found, accounting=replace(found.accounting, frame_stack=2)),
        "recomputed|horizon|max_episode_steps": replace(found, horizon=19),
        "units": again(found, provenance=found.provenance | {"units": "normalized"}),
    }
    for words, forged in forgeries.items():
        with pytest.raises(CertificateError, match=words):
            rrl.verify_certificate(forged)
    with pytest.raises(CertificateError, match="another hash"):
        rrl.verify_certificate(found, network(1))


def test_edited_files_are_refused(tmp_path: Path) -> None:
    certified().save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    for old, new in (
        ('"per": "step"', '"per": "episode"'),
        ('"horizon": 5', '"horizon": 6'),
        ('"<f8"', '"<f4"'),
        ('"frame_stack": 1', '"frame_stack": 1.0'),
    ):
        assert old in text
        (tmp_path / "d.json").write_text(text.replace(old, new))
        with pytest.raises(CertificateError):
            rrl.Certificate.load(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budgets": [-0.1]}, ValueError, "budgets"),
        ({"budgets": [np.nan]}, ValueError, "budgets"),
        ({"budgets": [0.1, rrl.ThreatModel(2, step=0.1)]}, TypeError, "mixture"),
        ({"budgets": [rrl.ThreatModel(2, episode=0.1), rrl.ThreatModel(2, step=0.1)]}, ValueError, "one norm"),
        ({"budgets": rrl.ThreatModel(0, step=1)}, ValueError, "one norm"),
        ({"per": "day"}, ValueError, "per"),
        ({"norm": np.inf, "per": "episode"}, ValueError, "per must be 'step'"),
        ({"method": "guess"}, ValueError, "method"),
        ({"episodes": 0}, ValueError, "episodes"),
        ({"nodes": 0}, ValueError, "nodes"),
        ({"alpha": 0.7}, ValueError, "alpha"),
        ({"reward_low": np.nan}, ValueError, "reward_low"),
        ({"never_ends_early": 1}, TypeError, "never_ends_early"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        certified(**changes)


def test_networks_without_a_known_constant_are_refused() -> None:
    bare = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 3))
    with pytest.raises(TypeError, match="LayerNorm"):
        rrl.certify_deterministic(
            rrl.policy.PolicyView.from_torch(bare, kind="q", observation_shape=(2,)), maze, 0.1, reward_low=-1.5
        )


def test_the_command_writes_and_verifies(tmp_path: Path) -> None:
    model = network()
    model.save(tmp_path / "agent.zip")
    run = partial(CliRunner().invoke, app)
    where = [
        str(tmp_path / "agent.zip"),
        "--env",
        "CartPole-v1",
        "--max-episode-steps",
        "20",
        "--out",
        str(tmp_path / "out"),
        "--trust",
    ]
    result = run(["certify-deterministic", *where, "--epsilons", "0:0.02:3", "--episodes", "4", "--nodes", "60"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "states searched" in result.output
    assert "exhausted" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"deterministic.json", "deterministic.png", "tb"}
    file = str(tmp_path / "out" / "deterministic.json")
    checked = run(["verify", file, "--model", str(tmp_path / "agent.zip"), "--trust"])
    assert checked.exit_code == 0, checked.output + repr(checked.exception)
    assert "replayed" in checked.output
    both = run(
        ["certify-deterministic", str(tmp_path / "agent.zip"), "--env", "CartPole-v1", "--epsilons", "0", "--budgets", "1"]
    )
    assert "exclude each other" in str(both.exception)


def test_a_known_return_counts_where_the_search_is_cut_and_is_refused_if_an_episode_was_worse() -> None:
    cut = certified(nodes=3, budgets=[1.0])
    least = float(certified().bounds.min())
    assert cut.bounds.min() < least
    better = certified(nodes=3, budgets=[1.0], return_low=least)
    assert better.return_low == least == float(better.bounds.min())
    assert better.values[0] > cut.values[0]
    better.verify()
    with pytest.raises(ValueError, match=r"return_low = .* is no sure bound"):
        certified(return_low=least + 0.1)
    with pytest.raises(CertificateError, match="return_low"):
        replace(certified(), return_low=least + 0.1).verify()
