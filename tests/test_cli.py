"""The command line, through the same entry point as the installed script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import NothingToDo

from robustrl import cli, options
from robustrl.certify.classify import radius_from_counts
from robustrl.certify.episode import EpisodeCertificate
from robustrl.errors import CertificateViolationError
from robustrl.noise import Gaussian
from robustrl.report.attack import load_reports


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> Done:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["robustrl", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return Done(int(stop.value.code or 0), *capsys.readouterr())


@pytest.fixture
def robustrl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: call(capsys, monkeypatch, *words)


TRAIN = ("train", "--env", "CartPole-v1", "--sigma", 0.2, "--max-episode-steps", 50, "--timesteps", 600, "--n-envs", 4)
CERTIFY = ("--episodes", 60, "--chunk-size", 20, "--budgets", "0:0.2:3")
ATTACK = ("--episodes", 10, "--attack", "flip", "--draws", 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as `robustrl train` leaves it; not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [str(word) for word in (*TRAIN, "--out", folder)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["robustrl", *words])
        cli.main()
    assert not stop.value.code
    return folder


@pytest.fixture
def run_directory(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def plain_zip(tmp_path: Path) -> Path:
    PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0, policy_kwargs={"net_arch": [8]}).save(tmp_path / "agent.zip")
    return tmp_path / "agent.zip"


def test_a_run_directory_goes_through_all_commands(robustrl: Run, run_directory: Path) -> None:
    certified = robustrl("certify", run_directory, *CERTIFY)
    assert certified.status == 0, certified.err
    assert "Certified mean return under attack, Gaussian(sigma=0.2)" in certified.out
    assert "not covered:" in certified.out
    certificate = EpisodeCertificate.load(run_directory / "certificate.json")
    assert certificate.budgets.tolist() == [0.0, 0.1, 0.2]
    assert certificate.n == 60

    attacked = robustrl("attack", run_directory, "--budget", "0.1,0.2", *ATTACK)
    assert attacked.status == 0, attacked.err
    reports = load_reports(run_directory / "attack.json")
    assert [report.budget for report in reports] == [0.1, 0.2]
    assert [report.certified for report in reports] == certificate.values[1:].tolist()
    assert "\nflip  " in attacked.out

    verified = robustrl("verify", run_directory / "certificate.json", "--replay", 3)
    assert verified.status == 0, verified.err
    assert "verified: digest and recomputed bound agree" in verified.out
    assert "3 chunk(s) [0, 1, 2] replayed: every return is the stored one, bit for bit" in verified.out

    for name in ("figure.pdf", "figure.svg"):
        plotted = robustrl("plot", run_directory, "--out", run_directory / name)
        assert plotted.status == 0, plotted.err
    assert (run_directory / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert robustrl("plot", run_directory / "certificate.json").status == 0
    names = {path.name for path in run_directory.iterdir()}
    assert names == {"model.zip", "run.json", "tb", "chunks", "certificate.json", "certificate.png", "attack.json", "figure.pdf", "figure.svg"}  # fmt: skip
    assert not list(run_directory.rglob("*.part"))


def test_tensorboard_has_one_run_with_everything(robustrl: Run, run_directory: Path) -> None:
    assert robustrl("certify", run_directory, *CERTIFY).status == 0
    assert robustrl("attack", run_directory, "--budget", "0.2", *ATTACK).status == 0
    assert {path.parent for path in run_directory.rglob("events.out.tfevents*")} == {run_directory / "tb"}
    events = EventAccumulator(str(run_directory / "tb"))
    events.Reload()
    tags = events.Tags()
    certificate = EpisodeCertificate.load(run_directory / "certificate.json")
    for budget, value in zip(certificate.budgets, certificate.values, strict=True):
        assert events.Scalars(f"certificate/budget_{budget:g}")[-1].value == pytest.approx(value)
    assert {"attack/budget_0.2", "rollout/ep_rew_mean", "train/loss"} <= set(tags["scalars"])
    assert tags["images"] == ["certificate"]
    assert events.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


def test_a_plain_sb3_file_goes_through_all_commands(robustrl: Run, plain_zip: Path, tmp_path: Path) -> None:
    where = ("--env", "CartPole-v1", "--sigma", 0.3, "--max-episode-steps", 40)
    certified = robustrl("certify", plain_zip, *where, "--algo", "ppo", *CERTIFY)
    assert certified.status == 0, certified.err
    results = tmp_path / "runs" / "agent"
    attacked = robustrl("attack", plain_zip, *where, "--budget", 0.2, *ATTACK)
    assert attacked.status == 0, attacked.err
    assert load_reports(results / "attack.json")[0].certified is not None
    alone = robustrl("verify", results / "certificate.json")
    assert alone.status == 0, alone.err
    assert "episodes were not replayed (give the model to do so)" in alone.out
    replayed = robustrl("verify", results / "certificate.json", "--model", plain_zip)
    assert replayed.status == 0, replayed.err
    assert "bit for bit" in replayed.out
    assert robustrl("plot", results).status == 0


@pytest.mark.parametrize(
    ("words", "statistic", "method"),
    [
        (("--success-at", 20), "success", "clopper-pearson"),
        (("--quantile", 0.5), "quantile", "order-statistics"),
        (("--method", "paper"), "mean", "paper"),
        (("--until", "8.5@0.1", "--episodes", 400), "mean", "betting"),
        (("--pointwise", "--stochastic", "--seed", 3, "--alpha", 0.01), "mean", "hybrid"),
    ],
)
def test_options_reach_the_certificate(
    robustrl: Run, run_directory: Path, words: tuple[Any, ...], statistic: str, method: str
) -> None:
    done = robustrl("certify", run_directory, *CERTIFY, *words)
    assert done.status == 0, done.err
    found = EpisodeCertificate.load(run_directory / "certificate.json")
    assert (found.statistic, found.method) == (statistic, method)
    if "--until" in words:
        assert found.n < 400
    if "--stochastic" in words:
        assert (found.alpha, found.simultaneous) == (0.01, False)
        assert (found.provenance["seed"], found.provenance["deterministic"]) == (3, False)
    assert robustrl("verify", run_directory / "certificate.json").status == 0
    assert robustrl("plot", run_directory).status == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gaussian:0.2", {"kind": "Gaussian", "sigma": 0.2}),
        ("Uniform:0.3", {"kind": "Uniform", "lam": 0.3}),
        ("splitting:0.5,-3,3", {"kind": "Splitting", "lam": 0.5, "low": -3.0, "high": 3.0}),
        ("ablation:0.7", {"kind": "Ablation", "keep": 0.7}),
    ],
)
def test_every_mechanism_can_be_named(
    robustrl: Run, plain_zip: Path, tmp_path: Path, text: str, expected: dict[str, Any]
) -> None:
    done = robustrl("certify", plain_zip, "--env", "CartPole-v1", "--noise", text, *CERTIFY, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    noise = EpisodeCertificate.load(tmp_path / "out" / "certificate.json").noise.to_dict()
    assert {key: noise[key] for key in expected} == expected


def test_frame_stacks_and_algorithms_are_trained_and_certified(robustrl: Run, tmp_path: Path) -> None:
    folder = tmp_path / "stacked"
    options = ("--algo", "a2c", "--frame-stack", 2, "--out", folder)
    assert robustrl(*TRAIN[:-4], "--timesteps", 40, "--n-envs", 2, *options).status == 0
    assert robustrl("certify", folder, *CERTIFY).status == 0
    found = EpisodeCertificate.load(folder / "certificate.json")
    assert found.provenance["recipe"]["frame_stack"] == 2
    assert json.loads((folder / "run.json").read_text())["algo"] == "a2c"


def test_an_agent_is_trained_against_attackers_and_certified_as_a_plain_one(robustrl: Run, tmp_path: Path) -> None:
    folder = tmp_path / "robust"
    options = ("--algo", "sa-ppo", "--epsilon", 0.05, "--kappa", 0.3, "--norm", "2", "--loss", "ibp", "--out", folder)
    quick = ("--hyperparameters", '{"n_steps": 16, "batch_size": 32}')
    assert robustrl(*TRAIN[:-4], "--timesteps", 40, "--n-envs", 2, *options, *quick).status == 0
    run = json.loads((folder / "run.json").read_text())
    assert run["algo"] == "sa_ppo"
    stated = {"epsilon": 0.05, "kappa": 0.3, "norm": "2", "loss": "ibp", "n_steps": 16}
    assert run["hyperparameters"].items() >= stated.items()
    assert robustrl("certify", folder, *CERTIFY).status == 0


UNDEFENDED = ("--env", "CartPole-v1", "--max-episode-steps", 20, "--episodes", 2)


def test_a_report_of_one_attack_is_labelled_by_its_name(robustrl: Run, plain_zip: Path, tmp_path: Path) -> None:
    for words, name in ((("--attack", "square"), "square"), (("--attack", "fgsm"), "fgsm"), ((), "pgd")):
        done = robustrl("attack", plain_zip, *UNDEFENDED, "--budget", 0.2, *words)
        assert done.status == 0, done.err
        assert f"\n{name}  " in done.out
        assert [report.name for report in load_reports(tmp_path / "runs" / "agent" / "attack.json")] == [name]


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        (("--norm", 2, "--epsilon", 0.05), [(0.05, None)]),
        (("--norm", 1, "--epsilon", 0.05, "--budget", "0.1,0.2"), [(0.05, 0.1), (0.05, 0.2)]),
        (("--norm", "inf", "--epsilon", 0.05), [(0.05, None)]),
        (("--norm", "inf", "--budget", 0.1), [(0.1, None)]),
        ((), [(None, 0.6)]),
    ],
)
def test_budgets_limit_episodes_and_epsilon_limits_steps(
    robustrl: Run, plain_zip: Path, tmp_path: Path, words: tuple[Any, ...], limits: list[Any]
) -> None:
    done = robustrl("attack", plain_zip, *UNDEFENDED, "--attack", "margin", *words)
    assert done.status == 0, done.err
    found = load_reports(tmp_path / "runs" / "agent" / "attack.json")
    assert [(report.threat["step"], report.threat["episode"]) for report in found] == limits
    assert all(report.spent.max() > 0 for report in found)


def test_runs_that_differ_in_epsilon_share_no_chunks(robustrl: Run, plain_zip: Path, tmp_path: Path) -> None:
    for words in (("--epsilon", 0.05), ("--epsilon", 0.1), ("--epsilon", 0.1, "--budget", 0.2), ("--budget", 0.2)):
        done = robustrl("attack", plain_zip, *UNDEFENDED, "--attack", "margin", *words)
        assert done.status == 0, done.err
    assert len(list((tmp_path / "runs" / "agent" / "chunks").iterdir())) == 4


def test_training_says_what_it_trained_against(robustrl: Run, tmp_path: Path) -> None:
    quick = ("--timesteps", 32, "--n-envs", 1, "--hyperparameters", '{"n_steps": 16, "batch_size": 16}')
    words = ("--env", "CartPole-v1", "--attack", "fgsm", "--epsilon", 0.05, "--norm", 2, "--out", tmp_path / "run")
    assert "attack fgsm, epsilon 0.05, norm 2: " in robustrl("train", *words, *quick).out


def test_a_folder_with_a_model_of_another_kind_names_the_file_to_give(robustrl: Run, plain_zip: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    shutil.copy(plain_zip, tmp_path / "best" / "model.zip")
    for words in ((), UNDEFENDED):
        done = robustrl("attack", tmp_path / "best", *words)
        assert done.status == 2
        assert f"it has no run.json; for the model alone give {tmp_path / 'best' / 'model.zip'}" in done.err
    assert robustrl("attack", tmp_path / "best" / "model.zip", *UNDEFENDED).status == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "robustrl", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("robustrl ")


def test_help_names_norms_and_where_all_attacks_are(robustrl: Run) -> None:
    text = " ".join(robustrl("attack", "--help").out.replace("│", " ").split())
    for words in ("docs/methods/attacks.md", "square", "fgsm", "Norm of the budget: 2, 1, 0", "Radius per step"):
        assert words in text


def test_finished_chunks_are_not_run_again(robustrl: Run, run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert robustrl("certify", run_directory, *CERTIFY).status == 0
    assert robustrl("attack", run_directory, "--budget", "0.2", *ATTACK).status == 0
    before = EpisodeCertificate.load(run_directory / "certificate.json")
    monkeypatch.setattr("robustrl.rollouts.collect.LocalExecutor", NothingToDo)
    assert robustrl("certify", run_directory, *CERTIFY).status == 0
    assert EpisodeCertificate.load(run_directory / "certificate.json") == before
    assert robustrl("attack", run_directory, "--budget", "0.2", *ATTACK).status == 0


def test_another_sigma_in_the_same_folder_is_refused(robustrl: Run, plain_zip: Path) -> None:
    where = ("--env", "CartPole-v1", "--max-episode-steps", 40)
    assert robustrl("certify", plain_zip, *where, "--sigma", 0.3, *CERTIFY).status == 0
    done = robustrl("certify", plain_zip, *where, "--sigma", 0.4, *CERTIFY)
    assert done.status == 2
    assert "holds chunks of another experiment (different environment, noise or horizon); choose another folder" in done.err


# ------------------------------------------------------------------------------------------------------ bad input

HERE = "HERE"
"""Stands for the folder with everything in it."""


@pytest.fixture(scope="module")
def ward(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healthy files and broken ones."""
    folder = tmp_path_factory.mktemp("ward")
    shutil.copytree(trained, folder / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["robustrl", "certify", str(folder / "run"), *map(str, CERTIFY)])
        cli.main()
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save(folder / "agent.zip")
    A2C("MlpPolicy", "Pendulum-v1", device="cpu").save(folder / "continuous.zip")
    (folder / "truncated.zip").write_bytes((folder / "agent.zip").read_bytes()[:-900])
    (folder / "text.zip").write_text("no zip")
    (folder / "text.npz").write_text("no archive")
    (folder / "empty").mkdir()
    for name, text in (
        ("norun", None),
        ("badrun", "{"),
        ("oddrun", '{"schema": 1, "algo": "sac", "recipe": {}, "seed": 0, "timesteps": 1}'),
    ):
        (folder / name).mkdir()
        shutil.copy(folder / "run" / "model.zip", folder / name)
        if text is not None:
            (folder / name / "run.json").write_text(text)
    certificate = (folder / "run" / "certificate.json").read_text()
    document = json.loads(certificate)
    (folder / "edited.json").write_text(json.dumps(document | {"values": [50.0, 50.0, 50.0]}))
    (folder / "cut.json").write_text(certificate[: len(certificate) // 2])
    (folder / "other.json").write_text("{}")
    shutil.copytree(folder / "run", folder / "spoilt")
    (folder / "spoilt" / "certificate.json").write_text("{}")
    (folder / "spoilt" / "attack.json").write_text("{}")
    chunks = folder / "spoilt" / "chunks" / "certify-seed0"
    next(chunks.glob("chunk-000001-*")).write_bytes(b"x")
    return folder


ZIP = ("HERE/agent.zip", "--env", "CartPole-v1")
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no such command": (("certfy",), "No such command"),
    "no such option": (("certify", "HERE/run", "--epsiodes", 3), "No such option"),
    "missing target": (("certify",), "Missing argument"),
    "missing option": (("train", "--env", "CartPole-v1"), "Missing option"),
    "text for a number": (("certify", "HERE/run", "--episodes", "many"), "--episodes"),
    "no such model": (("certify", "HERE/nothing"), "no run directory or model file"),
    "folder without run": (("certify", "HERE/empty"), "has no run.json"),
    "run without run.json": (("certify", "HERE/norun"), "has no run.json"),
    "damaged run.json": (("certify", "HERE/badrun"), "run.json is damaged"),
    "odd algorithm": (("certify", "HERE/oddrun", *ZIP[1:], "--sigma", 0.2), "its policy class is not one of SAC's own"),
    "zip without env": (("certify", "HERE/agent.zip"), "a plain model file needs --env"),
    "zip without noise": (("certify", *ZIP), "noise must be given"),
    "no zip": (("certify", "HERE/text.zip", *ZIP[1:], "--sigma", 0.2), "is not a Stable-Baselines3 model file"),
    "truncated zip": (("certify", "HERE/truncated.zip", *ZIP[1:], "--sigma", 0.2), "is not a Stable-Baselines3 model file"),
    "wrong algorithm": (("certify", *ZIP, "--sigma", 0.2, "--algo", "dqn"), "pass the right --algo"),
    "unknown algorithm": (("certify", *ZIP, "--sigma", 0.2, "--algo", "trpo"), "algo must be one of"),
    "continuous actions": (("certify", "HERE/continuous.zip", *ZIP[1:], "--sigma", 0.2), "the policy takes observations of shape (3,)"),
    "unknown environment": (("certify", "HERE/agent.zip", "--env", "Carpole-v1", "--sigma", 0.2), "unknown environment id"),
    "other observations": (("certify", "HERE/agent.zip", "--env", "MountainCar-v0", "--sigma", 0.2), "the policy takes observations of shape"),
    "frame stack": (("certify", *ZIP, "--sigma", 0.2, "--frame-stack", 2), "does it stack 1 frames?"),
    "zero frame stack": (("certify", *ZIP, "--sigma", 0.2, "--frame-stack", 0), "frame_stack must be"),
    "negative sigma": (("certify", *ZIP, "--sigma", -1), "sigma must be"),
    "nan sigma": (("certify", *ZIP, "--sigma", "nan"), "sigma must be"),
    "sigma and noise": (("certify", *ZIP, "--sigma", 0.2, "--noise", "gaussian:0.2"), "exclude each other"),
    "second noise": (("certify", "HERE/run", "--sigma", 0.3), "two noises"),
    "unknown noise": (("certify", *ZIP, "--noise", "pink:1"), "--noise must be KIND:PARAMETERS"),
    "noise without parameter": (("certify", *ZIP, "--noise", "gaussian"), "--noise must be KIND:PARAMETERS"),
    "noise with text": (("certify", *ZIP, "--noise", "gaussian:much"), "'much' is not a number"),
    "noise with too many": (("certify", *ZIP, "--noise", "laplace:1,2"), "laplace does not take 2 parameter"),
    "noise with five": (("certify", *ZIP, "--noise", "splitting:1,2,3,4,5"), "splitting does not take 5 parameter"),
    "zero episodes": (("certify", "HERE/run", "--episodes", 0), "episodes must be"),
    "zero workers": (("certify", "HERE/run", "--workers", 0), "n_workers must be"),
    "zero chunks": (("certify", "HERE/run", "--chunk-size", 0), "chunk_size must be"),
    "budgets as text": (("certify", "HERE/run", "--budgets", "0,lots"), "'lots' is not a number"),
    "budgets in two parts": (("certify", "HERE/run", "--budgets", "0:1"), "--budgets must be"),
    "budgets without count": (("certify", "HERE/run", "--budgets", "0:1:many"), "--budgets must be"),
    "no budgets": (("certify", "HERE/run", "--budgets", "0:1:0"), "--budgets must be"),
    "infinite grid": (("certify", "HERE/run", "--budgets", "0:inf:3"), "--budgets must be"),
    "negative budgets": (("certify", "HERE/run", "--budgets=-1,0"), "must be >= 0"),
    "empty budgets": (("certify", "HERE/run", "--budgets", ""), "is not a number"),
    "alpha": (("certify", "HERE/run", "--alpha", 1.5), "alpha must be"),
    "method": (("certify", "HERE/run", "--method", "hybird"), "method must be one of"),
    "two statistics": (("certify", "HERE/run", "--success-at", 1, "--quantile", 0.5), "--success-at and --quantile exclude"),
    "quantile": (("certify", "HERE/run", "--quantile", 2), "quantile level"),
    "until": (("certify", "HERE/run", "--until", "190"), "--until must be VALUE@BUDGET"),
    "until by band": (("certify", "HERE/run", "--until", "190@0.2", "--method", "band"), "only the betting bound"),
    "return low": (("certify", "HERE/run", "--return-low", 60), "return_"),
    "horizon": (("certify", *ZIP, "--sigma", 0.2, "--max-episode-steps", 0), "max_episode_steps must be"),
    "policy kwargs": (("certify", *ZIP, "--sigma", 0.2, "--policy-kwargs", "{"), "--policy-kwargs must be a JSON object"),
    "policy kwargs list": (("certify", *ZIP, "--sigma", 0.2, "--policy-kwargs", "[1]"), "--policy-kwargs must be a JSON object"),
    "wrong policy kwargs": (("certify", *ZIP, "--sigma", 0.2, "--policy-kwargs", '{"net_arch": [3]}'), "pass --algo / --policy-kwargs"),
    "damaged chunk": (("certify", "HERE/spoilt", *CERTIFY), "is damaged"),
    "seed": (("certify", "HERE/run", "--seed", -1), "seed must be"),
    "unknown attack": (("attack", "HERE/run", "--attack", "magic"), "--attack must be one of pgd, flip"),
    "infinite attack": (("attack", "HERE/run", "--budget", "inf"), "needs a finite budget"),
    "negative attack": (("attack", "HERE/run", "--budget=-1"), "episode must be a number >= 0"),
    "draws": (("attack", "HERE/run", "--draws", 0), "draws must be"),
    "threshold": (("attack", "HERE/run", "--threshold", -1), "threshold must be"),
    "attack on another agent": (("attack", "HERE/run", "--stochastic"), "its deterministic differs"),
    "attack beside a bad certificate": (("attack", "HERE/spoilt"), "certificate.json: field 'schema'"),
    "attack on ablation": (("attack", *ZIP, "--noise", "ablation:0.5"), "needs additive noise"),
    "no certificate": (("verify", "HERE/nothing.json"), "no certificate"),
    "edited certificate": (("verify", "HERE/edited.json"), "digest"),
    "cut certificate": (("verify", "HERE/cut.json"), "not a complete JSON file"),
    "other file": (("verify", "HERE/other.json"), "field 'schema'"),
    "another model": (("verify", "HERE/run/certificate.json", "--model", "HERE/agent.zip"), "the model is not the certified one"),
    "missing model": (("verify", "HERE/run/certificate.json", "--model", "HERE/nothing.zip"), "no model file"),
    "zero replays": (("verify", "HERE/run/certificate.json", "--replay", 0), "replay must be"),
    "nothing to plot": (("plot", "HERE/empty"), "run robustrl certify first"),
    "only a model to plot": (("plot", "HERE/norun"), "the folder holds a model, run robustrl certify"),
    "bad certificate to plot": (("plot", "HERE/spoilt"), "field 'schema'"),
    "format": (("plot", "HERE/run", "--out", "HERE/figure.jpg"), "suffix of path must be one of"),
    "train over a model": (("train", "--env", "CartPole-v1", "--sigma", 0.2, "--out", "HERE/run"), "already holds a model"),
    "train into a file": ((*TRAIN, "--out", "HERE/agent.zip"), "FileExistsError|NotADirectory"),
    "train for no steps": ((*TRAIN[:-4], "--timesteps", 0, "--out", "HERE/new"), "timesteps must be"),
    "train in no environment": ((*TRAIN, "--n-envs", 0, "--out", "HERE/new"), "n_envs must be"),
    "train an unknown algorithm": ((*TRAIN, "--algo", "trpo", "--out", "HERE/new"), "algo must be one of"),
    "train an algorithm for other actions": ((*TRAIN, "--algo", "sac", "--out", "HERE/new"), "sac needs a Box action space"),
    "train off-policy on learned statistics": (
        (*TRAIN, "--algo", "dqn", "--sigma", 0.1, "--normalize", "--out", "HERE/new"),
        "its replay buffer would get the observations",
    ),
    "train with hyperparameters that are no JSON": ((*TRAIN, "--hyperparameters", "{", "--out", "HERE/new"), "--hyperparameters must be a JSON object"),
    "train with a list of hyperparameters": ((*TRAIN, "--hyperparameters", "[1]", "--out", "HERE/new"), "--hyperparameters must be a JSON object"),
    "train with an epsilon that nothing needs": ((*TRAIN, "--epsilon", 0.1, "--out", "HERE/new"), "epsilon: only the algorithms sa_ppo and sa_dqn take this"),
    "train robustly with an unknown loss": (
        (*TRAIN, "--algo", "sa-ppo", "--loss", "crown", "--out", "HERE/new"),
        "loss must be one of 'sgld', 'pgd', 'fgsm-rs', 'n-fgsm', 'ibp', 'radial'",
    ),
    "train with odd environment arguments": ((*TRAIN, "--env-kwargs", '{"wings": 2}', "--out", "HERE/new"), "cannot be made with"),
    "no normalisation file": (("certify", *ZIP, "--sigma", 0.2, "--normalization", "HERE/none.npz"), "no normalisation file"),
    "normalisation that is none": (("certify", *ZIP, "--sigma", 0.2, "--normalization", "HERE/text.npz"), "is not a normalisation file"),
    "pickled normalisation without trust": (("certify", *ZIP, "--sigma", 0.2, "--normalization", "HERE/text.zip"), "is a pickle"),
    "unknown engine": (("certify", *ZIP, "--sigma", 0.2, "--engine", "warp"), "engine must be one of"),
    "engine of another environment": (("certify", *ZIP, "--sigma", 0.2, "--engine", "ale"), "engine='ale'"),
    "unreachable cluster": (("certify", *ZIP, "--sigma", 0.2, "--ray", "nowhere"), "address"),
    "environment arguments that are no object": (("certify", *ZIP, "--sigma", 0.2, "--env-kwargs", "3"), "--env-kwargs must be a JSON object"),
    "threshold of another attack": (("attack", *ZIP, "--sigma", 0.2, "--attack", "mad", "--threshold", 1), "the attack mad takes no --threshold"),
    "suite and attack": (("attack", *ZIP, "--sigma", 0.2, "--suite", "fast", "--attack", "mad"), "--suite has attacks of its own"),
    "unknown suite": (("attack", *ZIP, "--sigma", 0.2, "--suite", "medium"), "suite must be one of"),
    "attack in training without radius": (("train", "--env", "CartPole-v1", "--attack", "margin", "--out", "HERE/new"), "--attack needs --epsilon"),
    "unknown attack in training": (
        ("train", "--env", "CartPole-v1", "--attack", "nothing", "--epsilon", 0.1, "--out", "HERE/new"), "--attack must be one of"
    ),
    "epsilon and budget of norm inf": (
        ("attack", *ZIP, "--sigma", 0.2, "--norm", "inf", "--epsilon", 0.1, "--budget", 0.2), "--budget and --epsilon are both the radius per step"
    ),
    "epsilon without an attack": (("train", "--env", "CartPole-v1", "--epsilon", 0.1, "--out", "HERE/new"), "--attack NAME --epsilon RADIUS"),
    "unknown norm": (("attack", *ZIP, "--sigma", 0.2, "--norm", 3), "norm must be one of"),
    "norm that is no number": (("attack", *ZIP, "--sigma", 0.2, "--norm", "two"), "--norm: 'two' is not a number"),
    "train with continuous actions": (("train", "--env", "Nothing-v0", "--out", "HERE/new"), "unknown environment id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_input_ends_in_one_line_and_status_2(name: str, robustrl: Run, ward: Path, tmp_path: Path) -> None:
    words, message = BAD[name]
    before = {path: path.stat().st_mtime_ns for path in ward.rglob("*") if path.is_file()}
    done = robustrl(*(str(word).replace(HERE, str(ward)) for word in words))
    assert done.status == 2, done
    assert done.err.count("\n") == 1
    assert done.err.startswith("robustrl: ")
    assert any(part in done.err for part in message.split("|")), done.err
    assert "Traceback" not in done.err + done.out
    assert {path: path.stat().st_mtime_ns for path in ward.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(robustrl: Run, ward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["robustrl", "--debug", "certify", str(ward / "nothing")])
    with pytest.raises(FileNotFoundError, match="no run directory"):
        cli.main()
    assert robustrl("certify", ward / "nothing").status == 2  # and is off again in the next call


def test_the_installed_script_behaves_the_same(ward: Path) -> None:
    script = Path(sys.executable).with_name("robustrl")
    done = subprocess.run([script, "plot", str(ward / "nothing")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    debug = subprocess.run([script, "--debug", "certify", str(ward / "nothing")], capture_output=True, text=True)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "FileNotFoundError: no run directory" in debug.stderr


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("certify", "--help"), ("train", "-h")])
def test_help_is_shown_on_request_and_without_words(robustrl: Run, words: tuple[str, ...]) -> None:
    done = robustrl(*words)
    assert done.status == 0
    assert "Usage: " in done.out
    if not words or words[0].startswith("-"):
        for command in ("train", "certify", "attack", "verify", "plot", "demo"):
            assert command in done.out


def test_a_message_of_several_lines_becomes_one(robustrl: Run, monkeypatch: pytest.MonkeyPatch, ward: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("first\n  second\n\nthird")

    monkeypatch.setattr("robustrl.api.load_agent", fail)
    assert robustrl("certify", ward / "run").err == "robustrl: ValueError: first second third\n"


@pytest.mark.parametrize(("file", "figure"), [("log.tsv", "accuracy.png"), ("trace.json", "trace.png")])
def test_plot_says_where_figures_of_other_commands_are(robustrl: Run, tmp_path: Path, file: str, figure: str) -> None:
    (tmp_path / file).touch()
    (tmp_path / "model.zip").touch()
    assert f"drawn in {figure}" in robustrl("plot", tmp_path).err


def test_a_warning_is_one_line_of_ours(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((1, 2), np.float32), y=np.zeros(1, int))
    (tmp_path / "my_networks.py").write_text("import torch\ndef small(): return torch.nn.Linear(2, 2)\n")
    script = Path(sys.executable).with_name("robustrl")
    words = "certify-images my_networks:small data.npz --sigma 0.3 --n 5 --out runs"
    done = subprocess.run([script, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "warn" in line.lower()]
    assert lines == ["robustrl: warning: n = 5 samples can never certify at alpha = 0.001: every input abstains"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, EOFError])
def test_an_interrupt_says_how_to_go_on(robustrl: Run, run_directory: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise kind

    monkeypatch.setattr("robustrl.rollouts.collect.run_chunk", stop)
    done = robustrl("certify", run_directory, *CERTIFY)
    assert done.status == 130
    assert (
        done.err.strip()
        == "robustrl: interrupted; certify, attack and certify-images go on where they were when repeated, others start again"
    )
    assert not (run_directory / "certificate.json").exists()
    monkeypatch.undo()
    assert not list(run_directory.rglob("*.part"))


def test_a_crossed_certificate_is_an_error(robustrl: Run, run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert robustrl("certify", run_directory, *CERTIFY).status == 0

    def violate(*_: Any, **__: Any) -> None:
        raise CertificateViolationError("the attack got below the certificate")

    monkeypatch.setattr("robustrl.api.attack_policy", violate)
    done = robustrl("attack", run_directory, "--budget", "0.2", *ATTACK)
    assert done.status == 2
    assert done.err == "robustrl: CertificateViolationError: the attack got below the certificate\n"
    assert not (run_directory / "attack.json").exists()


def test_a_planted_pickle_is_not_run_and_trust_runs_it(robustrl: Run, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Planted:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    model.extra = Planted()  # type: ignore[attr-defined]
    model.save(tmp_path / "agent.zip")
    options = ("--env", "CartPole-v1", "--sigma", 0.2, "--max-episode-steps", 20, *CERTIFY)
    done = robustrl("certify", tmp_path / "agent.zip", *options)
    assert done.status == 0, done.err
    assert not marker.exists()
    assert robustrl("certify", tmp_path / "agent.zip", *options, "--trust").status == 0
    assert marker.exists()


def test_activation_functions_can_be_named(robustrl: Run, tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0, policy_kwargs={"activation_fn": torch.nn.ReLU})
    model.save(tmp_path / "agent.zip")
    options = ("--env", "CartPole-v1", "--sigma", 0.2, "--max-episode-steps", 20, *CERTIFY)
    assert robustrl("certify", tmp_path / "agent.zip", *options).status == 0
    expected = EpisodeCertificate.load(tmp_path / "runs" / "agent" / "certificate.json")
    given = ("--policy-kwargs", '{"activation_fn": "ReLU"}', "--out", tmp_path / "given")
    assert robustrl("certify", tmp_path / "agent.zip", *options, *given).status == 0
    assert EpisodeCertificate.load(tmp_path / "given" / "certificate.json") == expected


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(robustrl: Run, tmp_path: Path) -> None:
    words = ("demo", "--out", tmp_path / "demo", "--timesteps", 2048, "--episodes", 50, "--attack-episodes", 2, "--workers", 1)
    done = robustrl(*words)
    assert done.status == 0, done.err
    assert "bit for bit" in done.out
    assert len(load_reports(tmp_path / "demo" / "attack.json")) == 5
    again = robustrl(*words)
    assert again.status == 0, again.err
    assert "holds a trained model; using it" in again.out


def test_budget_lists_read_as_they_are_written() -> None:
    assert options.parse_budgets("0:1:11") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert options.parse_budgets("0.5") == [0.5]
    assert options.parse_budgets("0.3,0.1") == [0.3, 0.1]
    assert options.parse_budgets("2:2:1") == [2]
    assert np.isinf(options.parse_budgets("inf"))
    assert options.parse_until("190@0.2") == (190, 0.2)


def test_warnings_do_not_stop_a_command(robustrl: Run, tmp_path: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", device="cpu", learning_rate=lambda left: 1e-3 * left).save(tmp_path / "agent.zip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = robustrl("certify", tmp_path / "agent.zip", "--env", "CartPole-v1", "--sigma", 0.2, *CERTIFY)
    assert done.status == 0, done.err
    assert any("learning-rate schedule" in str(warning.message) for warning in caught)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["robustrl", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert capsys.readouterr().out == "robustrl 0.1.0\n"


def test_a_certificate_of_one_input_verifies_beside_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no episodes; the model of the folder is not asked to play them."""
    for name in ("model.zip", "run.json"):
        (tmp_path / name).write_text("not to be opened")
    radius_from_counts(Gaussian(0.2), 990, 1000, alpha=0.05).save(tmp_path / "certificate.json")
    cli.verify(tmp_path / "certificate.json")
    assert "its author's word" in capsys.readouterr().out
