"""The commands about single inputs: what they take, and what they say to what they do not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustrl import cli
from robustrl.classifiers import verify_images
from robustrl.cli_inputs import parse_device
from robustrl.rollouts.trace import RadiusTrace

ZOO = Path(__file__).parents[1] / "zoo" / "cartpole-ppo-sigma0.2"
NETWORK = "import torch\ndef small(): return torch.nn.Linear(2, 2)\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls a command; returns its status, output and errors."""
    (tmp_path / "inputs_networks.py").write_text(NETWORK)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).random((3, 2)).astype(np.float32), y=np.array([0, 1, 1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def called(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustrl", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return called


IMAGES = ("certify-images", "inputs_networks:small", "data.npz", "--out", "runs", "--n", 200, "--n0", 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sigma", 0.3, "--method", "onesided"), "method must be one of one-sided, two-sided, second-order"),
        (("--sigma", 0.3, "--method", "splitting-trajectory"), "no proof for scope 'input'"),
        (("--sigma", 0.3, "--method", "values"), "--bounds LOW HIGH"),
        (("--sigma", 0.3, "--bounds", -1, 1), "and no other"),
        (("--sigma", 0), "sigma > 0"),
        (("--sigma", 0.3, "--device", "gpu"), "--device must be cpu, cuda, cuda:N or auto, got 'gpu'"),
        (("--sigma", 0.3, "--device", "cuda:one"), "--device must be cpu"),
        (("--sigma", 0.3, "--device", "cuda:99"), "--device cuda:99: torch sees"),
        ((), "--sigma or --noise must be given"),
        (("--sigma", 0.3, "--method", "lipschitz"), "lipschitz', which has none"),
    ],
)
def test_bad_words_for_certify_images_end_in_one_line(run: Any, words: Any, message: str, tmp_path: Path) -> None:
    status, _, error = run(*IMAGES, *words)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert "label-flips" not in error.split("got")[0]
    assert not (tmp_path / "runs").exists()


def test_help_names_every_method_and_only_those(run: Any) -> None:
    for command, others in (("trace", ()), ("certify-images", ("values",))):
        told = run(command, "--help")[1]
        for name in (
            "one-sided",
            "two-sided",
            "second-order",
            "second-order-pairs",
            "dipole",
            "splitting",
            "lipschitz",
            *others,
        ):
            assert name in told
        for name in ("sequential", "label-flips", "trajectory"):
            assert name not in told


def test_bounded_scores_are_certified_from_the_shell(run: Any, tmp_path: Path) -> None:
    status, out, error = run(*IMAGES, "--sigma", 0.3, "--method", "values", "--bounds", -1, 1)
    assert status == 0, error
    assert "ACR" in out
    assert len(verify_images(tmp_path / "runs")) == 3


def test_images_are_certified_without_noise_from_the_shell(run: Any, tmp_path: Path) -> None:
    status, out, error = run(*IMAGES[:5], "--method", "lipschitz")
    assert status == 0, error
    assert "ACR" in out
    assert len(verify_images(tmp_path / "runs")) == 3
    assert run("verify", "runs")[0] == 0


def test_a_device_is_one_that_is_there() -> None:
    assert parse_device("cpu") == "cpu"
    assert parse_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_trace_is_written_once(run: Any, tmp_path: Path) -> None:
    shutil.copytree(ZOO, tmp_path / "run")
    words = ("trace", "run", "--max-episode-steps", 3, "--n", 50, "--n0", 10)
    status, _, error = run(*words)
    assert status == 0, error
    before = (tmp_path / "run" / "trace.json").read_bytes()
    status, _, error = run(*words, "--seed", 1)
    assert status == 2
    assert "already holds a trace; choose another --out, or delete it" in error
    assert (tmp_path / "run" / "trace.json").read_bytes() == before
    assert run(*words, "--seed", 1, "--out", "other")[0] == 0
    assert RadiusTrace.load(tmp_path / "other" / "trace.json").horizon == 3


def test_a_trace_needs_noise(run: Any, tmp_path: Path) -> None:
    shutil.copytree(ZOO.with_name("cartpole-ppo-undefended"), tmp_path / "run")
    assert "the run has no noise of its own" in run("trace", "run")[2]
    assert "sigma > 0" in run("trace", "run", "--sigma", 0)[2]


def test_a_policy_without_noise_is_traced_from_the_shell(run: Any, tmp_path: Path) -> None:
    shutil.copytree(ZOO.with_name("cartpole-ppo-undefended"), tmp_path / "run")
    status, out, error = run("trace", "run", "--method", "lipschitz", "--max-episode-steps", 5)
    assert status == 0, error
    assert "confidence 100%" in out
    trace = RadiusTrace.load(tmp_path / "run" / "trace.json")
    assert trace.alpha == 0
    assert (trace.radii > 0).all()
    assert run("verify", "run/trace.json")[0] == 0


def test_a_policy_under_noise_is_not_traced_without_it(run: Any, tmp_path: Path) -> None:
    shutil.copytree(ZOO, tmp_path / "run")
    assert "without noise, but this one acts under" in run("trace", "run", "--method", "lipschitz")[2]
