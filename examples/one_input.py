"""How far must one picture, or one observation of a policy, be moved before another class, or action, is chosen?

    python examples/one_input.py            # seconds; needs scikit-learn

Trains a small classifier of scikit-learn's digits under noise and certifies a few pictures that it has never seen, then one step of
the zoo's CartPole agent: the same three lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import robustrl as rrl

AGENT = Path(__file__).parents[1] / "zoo" / "cartpole-ppo-sigma0.2"


def certify(base: Any, inputs: Any, sigma: float, n: int, out: Path, scope: str) -> None:
    """Certify inputs (b, *shape), print the radii, save the first certificate."""
    smoothed = rrl.Smoothed(base, rrl.Gaussian(sigma), seed=0)
    certificates = smoothed.certify(inputs, n=n, alpha_total=0.01, scope=scope)
    certificates[0].save(out)
    for certificate in certificates:
        answer = "abstains" if certificate.abstained else f"certified: {certificate.prediction}"
        print(f"  {answer} within an l2 distance of {certificate.radius:.3f}")


def classifier(x: torch.Tensor, y: torch.Tensor, sigma: float, epochs: int) -> nn.Module:
    """A network trained on noisy pictures."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(network(x[rows] + sigma * torch.randn_like(x[rows])), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def main() -> None:
    """Train, certify pictures, certify a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/one_input"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    network = classifier(x[:-5], y[:-5], 0.25, arguments.epochs)
    print(f"digits {y[-5:].tolist()}, pixels in [0, 1]:")
    certify(network, x[-5:], 0.25, arguments.n, arguments.out / "picture.json", "input")

    observation, _ = gym.make("CartPole-v1").reset(seed=0)
    print(f"the first action on {np.round(observation, 3)}:")
    certify(rrl.load_agent(AGENT), observation[None], 0.2, arguments.n, arguments.out / "step.json", "step")


if __name__ == "__main__":
    main()
