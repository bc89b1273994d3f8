"""Certified accuracy: the curve is a share, its area is the ACR, and logs survive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import integrate

from robustrl.report.accuracy import HEADER, AccuracyReport, Row, accuracy_figure

ROWS = (Row(0, 3, 3, 0.5, 0.25), Row(2, 1, 1, 1.25, 61.5), Row(4, 7, 1, 2.0, 3700.0), Row(6, 0, -1, 0.0, 0.0))
REPORT = AccuracyReport(ROWS, 2, "test")


def test_the_curve_is_the_share_of_correct_inputs_at_each_radius() -> None:
    assert REPORT.certified_accuracy([0, 0.5, 0.5000001, 1.25, 1.3]).tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert (REPORT.accuracy, REPORT.abstained) == (0.5, 0.25)


def test_the_average_certified_radius_is_the_area_under_the_curve() -> None:
    area = integrate.quad(lambda r: float(REPORT.certified_accuracy(r)), 0, 2, points=[0.5, 1.25])[0]
    assert REPORT.average_certified_radius == pytest.approx(area) == pytest.approx((0.5 + 1.25) / 4)


def test_logs_survive_to_the_last_digit(tmp_path: Path) -> None:
    REPORT.write_log(tmp_path / "log.tsv")
    text = (tmp_path / "log.tsv").read_text()
    assert text.splitlines()[0] == HEADER == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    assert text.splitlines()[2] == "2\t1\t1\t1.25\t1\t0:01:01.500000"
    found = AccuracyReport.read_log(tmp_path / "log.tsv")
    assert [row[:4] for row in found.rows] == [row[:4] for row in ROWS]
    assert [row.seconds for row in found.rows] == pytest.approx([row.seconds for row in ROWS])


def test_logs_of_the_original_tools_are_read_as_they_are(tmp_path: Path) -> None:
    lines = [HEADER, "0\t3\t3\t1.74\t1\t0:00:17.607906", "20\t7\t-1\t0.0\t0\t0:00:15.486042", "40\t4\t0\t0.162\t0\t0:00:15.1"]
    (tmp_path / "sigma_0.50").write_text("\n".join(lines))
    found = AccuracyReport.read_log(tmp_path / "sigma_0.50")
    assert found.certified_accuracy([0, 1.0, 2.0]).tolist() == pytest.approx([1 / 3, 1 / 3, 0])
    assert found.rows[0].seconds == pytest.approx(17.607906)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0\t1\t1\t0.5\t1",
        "a\t1\t1\t0.5\t1\t0:0:1",
        "0\t1\t1\tnan\t1\t0:0:1",
        "0\t1\t1\t-1\t1\t0:0:1",
        "0\t1\t1\t1\t7\t0:0:1",
    ],
)
def test_damaged_logs_are_refused_with_their_name(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(f"{HEADER}\n{line}x\n" if line else "something else\n")
    with pytest.raises(ValueError, match="bad.tsv"):
        AccuracyReport.read_log(path)


def test_the_curve_is_told_in_words_and_pictures(tmp_path: Path) -> None:
    assert "4 inputs" in REPORT.table()
    assert "ACR 0.4375" in REPORT.table([0, 1])
    REPORT.plot(tmp_path / "one.png")
    accuracy_figure({"a": REPORT, "b": AccuracyReport(ROWS[:2], 1)}, tmp_path / "two.svg", "both")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert "each curve in its own norm" in (tmp_path / "two.svg").read_text()
    with pytest.raises(ValueError, match="suffix of path"):
        REPORT.plot(tmp_path / "one.bmp")


@pytest.mark.parametrize("radii", [[np.nan], []])
def test_radii_must_be_numbers(radii: list[float]) -> None:
    with pytest.raises(ValueError, match="radii must"):
        REPORT.certified_accuracy(radii)
