"""Attack reports: facts, tables, files, and the alarm when a certificate is undercut."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustrl import attacks
from robustrl.errors import CertificateViolationError
from robustrl.report import AttackReport
from robustrl.report.attack import attack_table, load_reports, save_reports
from robustrl.threat import ThreatModel


def report(budget: float = 0.6, **changes: Any) -> AttackReport:
    fields: dict[str, Any] = {
        "attack": {"kind": "SmoothedPGD", "draws": 8},
        "threat": ThreatModel(norm=2, episode=budget).to_dict(),
        "clean": np.array([200.0, 190.0, 200.0]),
        "returns": np.array([150.0, 100.0, 50.0]),
        "spent": np.array([0.6, 0.5, 0.4]),
        "upper": 130.0,
        "alpha": 0.05,
        "certified": 80.0,
    }
    return AttackReport(**(fields | changes))


def test_means_and_budget() -> None:
    assert report().mean == 100.0
    assert report().clean_mean == pytest.approx(590 / 3)
    assert report(0.25).budget == 0.25
    assert report(threat=ThreatModel(norm=2, step=0.1).to_dict()).budget == 0.1


def test_attacks_of_one_objective_have_names_of_their_own() -> None:
    kinds = [attacks.GradientAttack(attacks.Margin()), attacks.FGSM(), attacks.Square(), attacks.NES(), attacks.Pattanaik()]
    names = [report(attack=kind.to_dict()).name for kind in kinds]
    assert names == ["Margin", "FGSM", "Square", "NES", "Pattanaik"]


def test_an_upper_bound_below_the_certificate_raises_the_alarm() -> None:
    with pytest.raises(
        CertificateViolationError, match=r"attack SmoothedPGD with budget 0\.6 got the mean return down to 100 "
    ):
        report(certified=130.1)
    assert report(certified=130.0).certified == 130.0
    assert report(certified=None, upper=-5.0).certified is None
    assert report(certified=1e9, upper=math.inf).upper == math.inf


MARGIN = f"{4.302652730 * float(np.std(report().returns, ddof=1)) / math.sqrt(3):.2f}"
"""Student's interval of three episodes."""


def test_the_table_has_a_line_per_report_and_says_what_it_is_not() -> None:
    lines = attack_table([report(), report(0.25, certified=None, upper=math.inf)]).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["attack", "budget", "episodes", "clean", "attacked", "+-", "upper", "certified", "spent"]
    assert lines[1].split() == ["SmoothedPGD", "0.6", "3", "196.67", "100.00", MARGIN, "130.00", "80.00", "0.500"]
    assert lines[2].split() == ["SmoothedPGD", "0.25", "3", "196.67", "100.00", MARGIN, "inf", "-", "0.500"]
    assert (
        lines[3]
        == "+-: 95% interval over episodes; upper: 95% upper confidence bound of the attacked mean, each row on its own; an attack shows "
        "what is possible, not what is worst"
    )
    assert report().table() == attack_table([report()])
    assert len(attack_table([]).splitlines()) == 2


@pytest.mark.parametrize("changes", [{}, {"certified": None}, {"upper": math.inf}])
def test_reports_come_back_from_their_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_reports(tmp_path / "deep" / "attack.json", [report(**changes), report(0.1)])
    first, second = load_reports(tmp_path / "deep" / "attack.json")
    assert first.to_dict() == report(**changes).to_dict()
    assert second.budget == 0.1
    assert np.array_equal(first.returns, report().returns)
    assert first.upper == changes.get("upper", 130.0)


def test_a_report_that_undercuts_its_certificate_is_not_loaded_silently(tmp_path: Path) -> None:
    save_reports(tmp_path / "attack.json", [report()])
    document = json.loads((tmp_path / "attack.json").read_text())
    document["reports"][0]["certified"] = 140.0
    (tmp_path / "attack.json").write_text(json.dumps(document))
    with pytest.raises(CertificateViolationError):
        load_reports(tmp_path / "attack.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"schema": 2, "reports": []}', '{"schema": 1}', '{"schema": 1, "reports": [3]}', "\x00"])  # fmt: skip
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "attack.json").write_text(text)
    with pytest.raises(ValueError, match=r"attack\.json is not an attack report file"):
        load_reports(tmp_path / "attack.json")


@pytest.mark.parametrize(
    "change",
    [
        {"returns": []},
        {"returns": [1.0, None]},
        {"returns": "x"},
        {"clean": [[1.0]]},
        {"spent": [math.nan]},
        {"upper": "x"},
        {"upper": math.nan},
        {"alpha": 0.9},
        {"certified": "80"},
        {"attack": {}},
        {"attack": 3},
        {"threat": {"norm": 2}},
        {"threat": None},
    ],
)
def test_damaged_fields_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "attack.json"
    path.write_text(json.dumps({"schema": 1, "reports": [{**report().to_dict(), **change}]}))
    with pytest.raises(ValueError, match="is not an attack report file"):
        load_reports(path)


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attack.json"
    save_reports(path, [report()])
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_reports(path, [replace(report(), alpha=0.1)])
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
