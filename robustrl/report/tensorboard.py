"""Certificates in the TensorBoard run that training wrote."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from robustrl.certify.deterministic import DeterministicCertificate
from robustrl.certify.episode import EpisodeCertificate
from robustrl.report.attack import AttackReport
from robustrl.report.figures import certificate_figure, suite_figure


def log_certificate(
    folder: str | os.PathLike[str],
    certificate: EpisodeCertificate | DeterministicCertificate,
    reports: list[AttackReport] | None = None,
    hparams: dict[str, Any] | None = None,
    name: str = "certificate",
) -> None:
    """Add a certificate to a TensorBoard folder, into the run that is there.

    Writes the figure `<name>`, a scalar `<name>/budget_<B>` per budget, `attack/budget_<B>` per report, and the
    hyper-parameters with the certified values as their metrics.

    Args:
        folder: the run's TensorBoard folder.
        certificate: what was certified.
        reports: attacks to draw beside it.
        hparams: hyper-parameters; values that are not numbers, text or booleans are written as text.
        name: what it is called there.
    """
    from torch.utils.tensorboard import SummaryWriter, summary

    # SummaryWriter.add_hparams would open a second run; the three summaries alone stay in this one.
    hparams_summary: Any = summary.hparams
    writer: Any = SummaryWriter(os.fspath(folder))
    try:
        finite = np.isfinite(certificate.values)
        metrics = {
            f"{name}/budget_{b:g}": float(v)
            for b, v in zip(certificate.budgets[finite], certificate.values[finite], strict=True)
        }
        for tag, value in metrics.items():
            writer.add_scalar(tag, value)
        for report in reports or []:
            writer.add_scalar(f"attack/budget_{report.budget:g}", report.mean)
        writer.add_figure(name, _on_canvas(certificate_figure(certificate, reports)))
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in (hparams or {}).items()}
        for part in hparams_summary(plain, metrics):
            writer._get_file_writer().add_summary(part)
    finally:
        writer.close()


def _on_canvas(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return figure


def log_attacks(folder: str | os.PathLike[str], reports: list[AttackReport]) -> None:
    """Add attacks to a TensorBoard folder: a scalar `attack/<name>/budget_<B>` per report, and the figure `attacks`.

    Args:
        folder: the run's TensorBoard folder.
        reports: of a suite.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(os.fspath(folder))
    try:
        for report in reports:
            writer.add_scalar(f"attack/{report.name}/budget_{report.budget:g}", report.mean)
        writer.add_figure("attacks", _on_canvas(suite_figure(reports)))
    finally:
        writer.close()
