"""Figures: what is drawn is what was certified and attacked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustrl.certify.returns import certify_quantile, certify_return, certify_success
from robustrl.files import save_figure
from robustrl.noise import Gaussian, Laplace
from robustrl.report.attack import AttackReport
from robustrl.report.figures import certificate_figure
from robustrl.threat import ThreatModel

BUDGETS = [0.0, 0.2, 0.6]
RETURNS = np.random.default_rng(0).integers(100, 201, 500).astype(float)


def certificate(**options: Any) -> Any:
    return certify_return(RETURNS, Gaussian(0.2), BUDGETS, method="paper", return_low=0, return_high=200, **options)


def report(budget: float, mean: float, kind: str = "SmoothedPGD", upper: float = 190.0) -> AttackReport:
    threat = ThreatModel(norm=2, episode=budget).to_dict()
    returns = np.array([mean, mean])
    return AttackReport({"kind": kind}, threat, np.array([195.0, 195.0]), returns, np.full(2, budget), upper, 0.05)


def lines(figure: Any) -> dict[str, Any]:
    (axes,) = figure.axes
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_the_certified_curve_is_drawn_at_its_budgets() -> None:
    found = certificate()
    drawn = lines(certificate_figure(found))
    (name,) = [label for label in drawn if label.startswith("certified")]
    assert np.array_equal(drawn[name], np.stack((BUDGETS, found.values), axis=1))
    assert "plug-in (estimate)" in drawn


def test_of_several_attacks_at_a_budget_the_strongest_is_drawn() -> None:
    reports = [report(0.6, 150), report(0.6, 120, "MinimalFlip"), report(0.2, 180), report(0.6, 130)]
    drawn = lines(certificate_figure(certificate(), reports))
    assert np.array_equal(drawn["best attack (MinimalFlip / SmoothedPGD)"], [[0, 195], [0.2, 180], [0.6, 120]])


def test_the_upper_bound_is_shaded_where_there_is_one() -> None:
    with_bound = certificate_figure(certificate(), [report(0.2, 180)])
    without = certificate_figure(certificate(), [report(0.2, 180, upper=math.inf)])
    assert len(with_bound.axes[0].collections) == 1
    assert len(without.axes[0].collections) == 0


def test_titles_and_axes_name_what_is_bounded() -> None:
    axes = certificate_figure(certificate(), title="Mine").axes[0]
    assert axes.get_title() == "Mine"
    assert axes.get_xlabel() == "episode budget (l2)"
    assert axes.get_ylabel() == "mean return under attack"
    assert certificate_figure(certificate()).axes[0].get_title() == "Gaussian(sigma=0.2)"


@pytest.mark.filterwarnings("error")
def test_curves_without_any_certified_value_and_below_zero_are_drawn() -> None:
    nothing = certify_quantile(RETURNS[:3], 0.1, Gaussian(0.2), [0.5, 1.0])
    assert np.isnan(nothing.values).all()
    assert certificate_figure(nothing).axes[0].get_ylim()[0] < 0  # zero itself is visible
    negative = certify_return(-RETURNS, Gaussian(0.2), BUDGETS, return_low=-300)
    assert certificate_figure(negative).axes[0].get_ylim()[0] <= negative.values.min()
    success = certify_success(480, 500, Gaussian(0.2), BUDGETS)
    assert certificate_figure(success).axes[0].get_ylabel() == "success probability under attack"


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")]
)
def test_figures_are_written_in_the_asked_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / "deep" / f"figure{suffix}"
    save_figure(certificate_figure(certificate()), path)
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize("name", ["figure", "figure.jpg", "figure.png.txt"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="suffix of path must be one of"):
        save_figure(certificate_figure(certificate()), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_figure(certificate_figure(certificate()), path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_figures_need_no_display(tmp_path: Path) -> None:
    script = (
        "from robustrl.certify.returns import certify_success as c; from robustrl.noise import Gaussian as G\n"
        "from robustrl.files import save_figure; from robustrl.report.figures import certificate_figure\n"
        "import sys; save_figure(certificate_figure(c(9, 10, G(1.0), [0.1])), sys.argv[1])"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "f.png")], check=True, env=env)
    assert (tmp_path / "f.png").exists()


def test_attacks_in_another_norm_have_no_place_on_the_axis() -> None:
    certificate = certify_return(np.arange(50.0) % 7, Laplace(0.5), [0.0, 1.0], return_low=0)
    returns = np.full(5, 3.0)
    l2 = AttackReport(
        attack={"kind": "SmoothedPGD"},
        threat=ThreatModel(norm=2, episode=0.5).to_dict(),
        clean=returns,
        returns=returns,
        spent=returns,
        upper=4.0,
        alpha=0.05,
    )
    labels = certificate_figure(certificate, [l2]).axes[0].get_legend_handles_labels()[1]
    assert not any("attack" in label for label in labels)
