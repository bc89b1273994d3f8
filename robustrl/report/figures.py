"""The figure: certified lower bound and best attack against the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from robustrl.certify.episode import EpisodeCertificate
from robustrl.report.attack import AttackReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def certificate_figure(
    certificate: EpisodeCertificate, reports: list[AttackReport] | None = None, title: str | None = None
) -> Figure:
    """Certified lower bound and attacked means against the episode budget, as a matplotlib figure.

    Args:
        certificate: the certified curve.
        reports: attacks at some budgets; where several share a budget the strongest is drawn. Attacks whose budget is in
            another norm than the certificate's, or per step, have no place on its axis and are left out.
        title: default the noise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    certificate.draw(ax)
    strongest: dict[float, AttackReport] = {}
    for report in reports or []:
        if report.threat["norm"] != certificate.noise.norm or report.threat["episode"] is None:
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
