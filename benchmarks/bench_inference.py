"""Why CPU rollouts run their tanh layers in numpy: torch's tanh against numpy's, interleaved.

python benchmarks/bench_inference.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

ROWS, WIDTH, REPEATS, ROUNDS = 1024, 64, 200, 7


def seconds(function: object) -> float:
    """Mean seconds of one call."""
    start = time.perf_counter()
    for _ in range(REPEATS):
        function()  # type: ignore[operator]
    return (time.perf_counter() - start) / REPEATS


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    x = torch.randn(ROWS, WIDTH)
    out, array, array_out = torch.empty_like(x), x.numpy(), np.empty((ROWS, WIDTH), np.float32)
    ratios = []
    for _ in range(ROUNDS):
        ours, theirs = seconds(lambda: np.tanh(array, out=array_out)), seconds(lambda: torch.tanh(x, out=out))
        ratios.append(theirs / ours)
        print(f"numpy {1e9 * ours / x.numel():.2f} ns  torch {1e9 * theirs / x.numel():.2f} ns per element")
    print(
        f"numpy's tanh is {statistics.median(ratios):.1f}x faster; largest difference {np.abs(array_out - out.numpy()).max():.1e}"
    )


if __name__ == "__main__":
    main()
