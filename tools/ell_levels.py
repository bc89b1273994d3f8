"""Make robustrl/certify/ell_levels.npz, the levels of the equal-local-level band for larger samples.

Every entry is computed exactly and rounded down. About 10 minutes on one core; it saves after each sample size, and
started again it continues where it was stopped:

    python tools/ell_levels.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from robustrl.certify.band import TABLE, solve_level

SIZES = (*(scale * step // 20 for scale in (1_000, 10_000) for step in (20, 25, 30, 40, 50, 60, 80, 100, 120, 160)), 100_000)
ALPHAS = (0.25, 0.2, 0.1, 0.05, 0.025, 0.02, 0.0125, 0.01, 0.005, 0.0025, 0.001, 0.0005, 0.00025, 0.0001)


def main(path: Path = TABLE) -> None:
    """Fill in the missing rows of the table, smallest sample size first."""
    rows: dict[int, np.ndarray] = {}
    if path.exists():
        with np.load(path) as saved:
            if tuple(saved["alpha"]) == ALPHAS:
                rows = dict(zip(saved["n"].tolist(), saved["gamma"], strict=True))
    for n in SIZES:
        if n in rows:
            continue
        rows[n] = np.array([solve_level(n, alpha) for alpha in ALPHAS])
        sizes = sorted(rows)
        part = path.with_suffix(".part.npz")
        np.savez(part, n=np.array(sizes), alpha=np.array(ALPHAS), gamma=np.array([rows[size] for size in sizes]))
        os.replace(part, path)
        print(n, rows[n], flush=True)


if __name__ == "__main__":
    main()
