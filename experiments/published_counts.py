"""The certificates on published return counts: 10,000 episodes of two smoothed 5-frame CartPole agents.

    python experiments/published_counts.py        # writes experiments/results/published_counts.md; seconds

The counts (`tests/data/cartpole_return_counts.csv`) hold no run order, which the default method needs: the returns are permuted with
four fixed seeds and the worst of the four is reported. The last table repeats every return 100 times.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import robustrl as rrl

BUDGETS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SOURCE, RESULT = Path("tests/data/cartpole_return_counts.csv"), Path("experiments/results/published_counts.md")


def published_returns() -> dict[float, NDArray[np.float64]]:
    """Returns by sigma, from the survival counts #(J > t)."""
    table = np.loadtxt(SOURCE, delimiter=",", skiprows=2, dtype=int)
    values = np.append(table[:, 0], 200).astype(float)
    found = {}
    for column, sigma in ((1, 0.2), (2, 0.4)):
        survivors = table[:, column]
        counts = -np.diff(survivors, prepend=10_000, append=0)
        found[sigma] = np.repeat(values, counts)
    return found


def rows(copies: int) -> list[str]:
    """One table row per sigma and budget."""
    lines = ["| sigma | B | plug-in | paper | hybrid, worst of 4 permutations |", "|---|---|---|---|---|"]
    for sigma, returns in published_returns().items():
        noise, sample = rrl.Gaussian(sigma), np.repeat(returns, copies)
        bounds = {"return_low": 0.0, "return_high": 200.0}
        paper = rrl.certify_return(sample, noise, BUDGETS, method="paper", **bounds)
        shuffled = [np.random.default_rng(seed).permutation(sample) for seed in range(4)]
        hybrid = np.min([rrl.certify_return(order, noise, BUDGETS, **bounds).values for order in shuffled], axis=0)
        lines += [
            f"| {sigma:g} | {b:g} | {plug:.2f} | {old:.2f} | {new:.2f} |"
            for b, plug, old, new in zip(BUDGETS, paper.plug_in, paper.values, hybrid, strict=True)
        ]
    return lines


def main() -> None:
    """Compute and write."""
    text = [
        "Command: `python experiments/published_counts.py`; 95%, all seven budgets at once.",
        "",
        "n = 10,000, as published:",
        "",
        *rows(1),
        "",
        "n = 1,000,000, every return repeated 100 times:",
        "",
        *rows(100),
    ]
    RESULT.write_text("\n".join(text) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
