"""What an inner attack costs: epochs of robust training against plain ones on inputs of the size of the digits, interleaved.

python benchmarks/bench_supervised.py [--rounds 9] [--out benchmarks/results/supervised.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from robustrl.files import write_atomically
from robustrl.networks.skew_orthogonal import MaxMin, OrthogonalLinear
from robustrl.training.supervised import PGD, Examples, InnerAttack, RobustTrainer

ROWS, EPOCHS = 1280, 2
ATTACKS: dict[str, str | InnerAttack] = {"none": "none", "fgsm-rs": "fgsm-rs", "n-fgsm": "n-fgsm", "pgd, 7 steps": PGD(steps=7)}


def mlp() -> nn.Module:
    """64-128-128-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions with batch norm and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


def lipschitz_mlp() -> nn.Module:
    """64-128-128-10, orthogonal."""
    return nn.Sequential(OrthogonalLinear(64, 128), MaxMin(), OrthogonalLinear(128, 128), MaxMin(), OrthogonalLinear(128, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": cnn, "Lipschitz MLP": lipschitz_mlp}


def seconds(make: Callable[[], nn.Module], attack: str | InnerAttack) -> float:
    """CPU time of an epoch, without evaluations."""
    torch.manual_seed(0)
    module, examples = make(), Examples(torch.rand(ROWS, 64), torch.randint(10, (ROWS,)))
    trainer = RobustTrainer(attack, bounds=(0, 1), epochs=EPOCHS, hold_out=0)
    start = time.process_time()
    trainer.fit(module, examples)
    return (time.process_time() - start) / EPOCHS


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/supervised.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, raw = {}, {}
    for network, make in NETWORKS.items():
        seconds(make, "pgd")  # warm up
        rounds = [{name: seconds(make, attack) for name, attack in ATTACKS.items()} for _ in range(arguments.rounds)]
        raw[network] = rounds
        results[network] = {
            name: {
                "ms per epoch": round(1e3 * statistics.median(found[name] for found in rounds), 1),
                "times plain": round(statistics.median(found[name] / found["none"] for found in rounds), 2),
            }
            for name in ATTACKS
        }
        for name, figures in results[network].items():
            print(f"{network:14s} {name:14s} {figures}")
    record = {"torch": torch.__version__, "rows": ROWS, "rounds": arguments.rounds, "results": results, "seconds": raw}
    write_atomically(arguments.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
