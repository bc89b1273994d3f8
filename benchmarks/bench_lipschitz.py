"""Skew orthogonal convolutions on one core: what the norm costs, how tight it is, and frozen layers in the frequency domain.

    python benchmarks/bench_lipschitz.py [--rounds 9] [--out benchmarks/results/lipschitz.json]

"norm" is the bound of a random 3 x 3 filter's norm, once per change of the weights, and "reshapes ms" the cheap one by reshapes of the
filter; "reshapes" is how many times as large that one is. "spectrum" is a frozen circular layer (32 pictures of 32 channels, 21 x 21) beside the same layer iterated, in
turns, because a shared machine's speed drifts. Seconds are CPU time, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from robustrl.files import write_atomically
from robustrl.networks.skew_orthogonal import (
    SkewOrthogonalConv2d,
    norm_bound,
    reshaped_norm_bound,
    skew_exponential,
    skew_filter,
)

CHANNELS = (8, 32, 64, 128)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    found: dict[str, object] = {"norm ms": {}, "reshapes ms": {}, "reshapes": {}}
    for channels in CHANNELS:
        filters = skew_filter(torch.randn(channels, channels, 3, 3)) / math.sqrt(channels)
        for name, bound in (("norm ms", norm_bound), ("reshapes ms", reshaped_norm_bound)):
            times = [seconds(lambda filters=filters, bound=bound: bound(filters)) for _ in range(rounds)]
            found[name][str(channels)] = round(1e3 * statistics.median(times), 1)  # type: ignore[index]
        ratio = float(reshaped_norm_bound(filters)) / float(norm_bound(filters))
        found["reshapes"][str(channels)] = round(ratio, 2)  # type: ignore[index]
    layer = SkewOrthogonalConv2d(32, 32, padding_mode="circular").requires_grad_(False)
    pictures = torch.randn(32, 32, 21, 21)
    filters = layer.operator()

    def iterated() -> Tensor:
        assert layer.bias is not None
        return skew_exponential(pictures, filters, layer.terms, "circular") + layer.bias[:, None, None]

    torch.testing.assert_close(layer(pictures), iterated(), atol=1e-4, rtol=1e-4)
    pairs = [(seconds(lambda: layer(pictures)), seconds(iterated)) for _ in range(rounds)]
    found["spectrum"] = {
        "ms": round(1e3 * statistics.median(one for one, _ in pairs), 2),
        "iterated ms": round(1e3 * statistics.median(other for _, other in pairs), 2),
        "ratio": round(statistics.median(other / one for one, other in pairs), 2),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lipschitz.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.rounds)
    print(json.dumps(found, indent=1))
    write_atomically(arguments.out, json.dumps({"torch": torch.__version__, **found}, indent=1).encode())


if __name__ == "__main__":
    main()
