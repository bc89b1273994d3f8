"""What exploring cost and found, run by run: tables, curves, files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from robustrl.files import write_atomically

CURVES = {"unsafe_visits": "unsafe visits", "suboptimal_steps": "sub-optimal steps", "safe_pairs": "pairs proven safe"}
OPTIMAL = 0.01
"""How far below the optimum an action's, or a policy's, value may be and still count as optimal."""


@dataclass(frozen=True)
class ExplorationRun:
    """One agent's exploration with one seed.

    Args:
        agent: its name.
        env: of the environment.
        seed: of agent and environment.
        steps: when what follows was written down, increasing.
        unsafe_visits: dangerous steps so far.
        suboptimal_steps: steps so far whose action was worth less than the best of its state by more than `OPTIMAL`, in the true MDP;
            None where that is unknown.
        safe_pairs: pairs of state and action in the proven safe set; None for agents without one.
        values: true value, from the start, of the policy that the agent goes for the return by; None where it is unknown.
        final_value: the same of the policy that its `predict` follows in the end.
        optimum: the best value that a policy on the safe set which can be learnt has, or None.
        learnable_pairs: pairs in that set, or None.
        certified: whether safety was proven, all along.
        stuck: whether no safe policy ends the episode.
        seconds: of learning.
        digest: fingerprint of the environment, the agent and its options: what makes two runs repetitions of one experiment.
    """

    agent: str
    env: str
    seed: int
    steps: tuple[int, ...]
    unsafe_visits: tuple[int, ...]
    suboptimal_steps: tuple[int, ...] | None
    safe_pairs: tuple[int, ...] | None
    values: tuple[float, ...] | None
    final_value: float | None
    optimum: float | None
    learnable_pairs: int | None
    certified: bool
    stuck: bool
    seconds: float
    digest: str

    @property
    def optimal_from(self) -> int | None:
        """The step since which the policy that it acts by has been optimal within `OPTIMAL`; None if it is not in the end."""
        if self.values is None or self.optimum is None:
            return None
        short = np.flatnonzero(np.asarray(self.values) < self.optimum - OPTIMAL)
        first = 0 if not short.size else int(short[-1]) + 1
        return self.steps[first] if first < len(self.steps) else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON document."""
        write_atomically(path, json.dumps(asdict(self), allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExplorationRun:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            with open(path, encoding="utf-8") as file:
                document: dict[str, Any] = json.load(file)
            columns: dict[str, Any] = {name: tuple(value) for name, value in document.items() if isinstance(value, list)}
            return cls(**document | columns)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"path must be a run that explore wrote, {os.fspath(path)} is not: {error}") from None


def by_agent(runs: Sequence[ExplorationRun]) -> dict[str, list[ExplorationRun]]:
    """The runs of each agent, in the order of their first appearance."""
    found: dict[str, list[ExplorationRun]] = {}
    for run in runs:
        found.setdefault(run.agent, []).append(run)
    return found


def exploration_table(runs: Sequence[ExplorationRun]) -> str:
    """A Markdown table, a line per agent: means over seeds, with the smallest and the largest in brackets."""
    lines = [
        "| agent | seeds | steps | unsafe visits | sub-optimal steps | safe pairs | value | optimal from step | proven |",
        "|---" * 9 + "|",
    ]
    for agent, group in by_agent(runs).items():
        cells = [_spread([_last(getattr(run, name)) for run in group]) for name in CURVES]
        learnable = group[0].learnable_pairs
        if learnable is not None and cells[2] != "-":
            cells[2] += f" of {learnable}"
        value = _spread([run.final_value for run in group], ".4f")
        if value != "-" and group[0].optimum is not None:
            value += f" of {group[0].optimum:.4f}"
        since = [run.optimal_from for run in group]
        late = sum(step is None for step in since)
        optimal = _spread([step for step in since if step is not None])
        optimal += f", {late} not" if late and group[0].values is not None else ""
        proven = f"{sum(run.certified for run in group)} of {len(group)}"
        row = [agent, str(len(group)), f"{group[0].steps[-1]:,}", *cells, value, optimal, proven]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _last(values: Sequence[float] | None) -> float | None:
    return None if values is None else values[-1]


def _spread(values: Sequence[float | None], form: str = ".0f") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, low, high = np.mean(known), min(known), max(known)
    return f"{mean:{form}}" if low == high else f"{mean:{form}} ({low:{form}} to {high:{form}})"


def exploration_csv(runs: Sequence[ExplorationRun]) -> bytes:
    """All curves, a line per run and recorded step."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["agent", "seed", "step", *CURVES, "value"])
    for run in runs:
        columns = [getattr(run, name) or [""] * len(run.steps) for name in (*CURVES, "values")]
        table.writerows([run.agent, run.seed, *row] for row in zip(run.steps, *columns, strict=True))
    return text.getvalue().encode()


def exploration_figure(runs: Sequence[ExplorationRun], title: str = "") -> Figure:
    """Three panels against the steps: mean over seeds as a line, from the smallest to the largest as a band."""
    groups, learnable = by_agent(runs), runs[0].learnable_pairs
    names = [name for name in CURVES if any(getattr(run, name) is not None for run in runs)]
    figure = Figure(figsize=(4.2 * len(names), 4.0), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(panels, names, strict=True):
        for number, (agent, group) in enumerate(groups.items()):
            drawn = [run for run in group if getattr(run, name) is not None]
            if drawn:
                steps, low, mean, high = _band(drawn, name)
                ax.plot(steps, mean, color=f"C{number}", label=agent)
                ax.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, lw=0)
        if name == "safe_pairs" and learnable is not None:
            ax.axhline(learnable, color="black", ls=":", lw=1, label="can be learnt")
        ax.set(xlabel="steps", ylabel=CURVES[name], ylim=(0, None))
        ax.grid(alpha=0.3)
    lines = {str(line.get_label()): line for ax in panels for line in ax.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _band(group: list[ExplorationRun], name: str) -> tuple[NDArray[Any], ...]:
    """Steps that all runs have, and least, mean and greatest there."""
    steps = np.array(sorted(set.intersection(*(set(run.steps) for run in group))))
    rows = np.array([np.interp(steps, run.steps, getattr(run, name)) for run in group])
    return steps, rows.min(0), rows.mean(0), rows.max(0)
