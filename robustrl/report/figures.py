"""The figure: certified lower bound and best attack against the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from robustrl.certify.deterministic import DeterministicCertificate
from robustrl.certify.episode import EpisodeCertificate
from robustrl.report.attack import AttackReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def certificate_figure(
    certificate: EpisodeCertificate | DeterministicCertificate,
    reports: list[AttackReport] | None = None,
    title: str | None = None,
) -> Figure:
    """Certified lower bound and attacked means against the episode budget, as a matplotlib figure.

    Args:
        certificate: the certified curve.
        reports: attacks at some budgets; where several share a budget the strongest is drawn. Attacks whose budget is in
            another norm than the certificate's, or per step, have no place on its axis and are left out, and all of them beside a
            certificate of a deterministic policy.
        title: default the noise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    certificate.draw(ax)
    strongest: dict[float, AttackReport] = {}
    for report in reports or []:
        if (
            isinstance(certificate, DeterministicCertificate)
            or report.threat["norm"] != certificate.noise.norm
            or report.threat["episode"] is None
        ):
            continue
        if report.budget not in strongest or report.mean < strongest[report.budget].mean:
            strongest[report.budget] = report
    if strongest:
        budgets = sorted(strongest)
        means = np.array([strongest[b].mean for b in budgets])
        upper = np.array([strongest[b].upper for b in budgets])
        names = " / ".join(sorted({strongest[b].name for b in budgets}))
        clean = strongest[budgets[0]].clean_mean
        line = ax.plot([0, *budgets], [clean, *means], "s-", color="tab:red", label=f"best attack ({names})")[0]
        if np.isfinite(upper).all():
            ax.fill_between(
                budgets,
                means,
                upper,
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
                label=f"its {100 * (1 - strongest[budgets[0]].alpha):g}% upper bound",
            )
    low, high = float(np.nanmin([0.0, *certificate.values])), ax.get_ylim()[1]
    ax.set_ylim(low - 0.03 * (high - low), high)
    ax.grid(alpha=0.3)
    ax.legend(loc="best")
    if title:
        ax.set_title(title)
    return figure


def suite_figure(
    reports: list[AttackReport], certificate: EpisodeCertificate | None = None, title: str | None = None
) -> Figure:
    """Attacked means against the budget, a line per attack with 95 % intervals over episodes, as a matplotlib figure.

    Args:
        reports: attacks at some budgets, all in one norm and of one policy.
        certificate: drawn below them if its budgets are in the same norm and of whole episodes.
        title: default none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    ax = figure.subplots()
    threat = reports[0].threat
    norm = "inf" if threat["norm"] == "inf" else f"{threat['norm']:g}"
    if certificate is not None and threat["episode"] is not None and certificate.noise.norm == threat["norm"]:
        certificate.draw(ax)
    names = list(dict.fromkeys(report.name for report in reports))
    for i, name in enumerate(names):
        own = sorted((report for report in reports if report.name == name), key=lambda report: report.budget)
        budgets, means, margins = (np.array([getattr(r, what) for r in own]) for what in ("budget", "mean", "margin"))
        style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        ax.errorbar(budgets, means, yerr=margins, marker="o", markersize=3, capsize=2, linewidth=1, label=name, **style)
    ax.axhline(reports[0].clean_mean, color="0.6", linewidth=1, linestyle="-.", label="no attack")
    ax.set_xlabel(
        f"l{norm} {'radius per step' if threat['episode'] is None else 'budget of an episode'} ({threat['units']} units)"
    )
    ax.set_ylabel(reports[0].statistic)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    if title:
        ax.set_title(title)
    return figure
