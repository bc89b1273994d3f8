"""1-Lipschitz convolutions side by side: throughput, and certified accuracy on digits after equal time on one core.

    pip install --no-deps deel-torchlip orthogonium        # optional; what is not installed is left out and said so
    python benchmarks/bench_lipschitz_layers.py [--rounds 7] [--seconds 30] [--seeds 3] [--out benchmarks/results/lipschitz_layers.json]

Throughput: images per CPU second through one 3 x 3 layer (32 pictures, 32 channels, 16 x 16), all layers in turns; "train" is forward
and backward of input and weights, whatever the layer recomputes of its weights included; "eval" is without gradients and with whatever it keeps.

"ours" with "reshapes" bounds the norm of its filter as the original does, K is the number of Taylor terms.

Accuracy: conv 1 -> 16, conv 64 -> 32, conv 128 -> 32 (pictures are unshuffled by 2 before the last two), MaxMin after each, one linear
layer; 1257 pictures to train with, 180 to choose the learning rate by (certified at .5, after a third of the time), 360 to test; cross
entropy with offset margin and temperature, Adam, a triangular learning rate over the time that is given. The certificate is the margin over the norm of the difference of the last layer's rows times the layers' constants,
measured for all alike: the largest singular value of the matrix of the whole layer, in evaluation mode.

"skew, published" is the recipe of Singla and Feizi (2021) written anew: four reshapes, one step of power iteration per update, 5 terms in
training and 12 in evaluation. "cayley" is Trockman and Kolter's (2021).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustrl.files import write_atomically
from robustrl.networks.skew_orthogonal import MaxMin, SkewOrthogonalConv2d, skew_exponential, skew_filter

Layer = Callable[[int, int], nn.Module]
RADII = (0.25, 0.5, 0.75, 1.0)


class Published(nn.Module):
    """Skew orthogonal convolution with the four norms of power iteration, truncated earlier in training."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, size = outputs, max(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(size, size, 3, 3) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.shapes = ((0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 2, 3), (2, 3, 0, 1))
        self.sizes = (3 * size, 3 * size, size, 9 * size)
        for i, n in enumerate(self.sizes):
            self.register_buffer(f"u{i}", functional.normalize(torch.randn(n), dim=0))
        self._norm(skew_filter(self.weight.detach()), 50)

    def _norm(self, filters: Tensor, steps: int) -> Tensor:
        norms = []
        for i, (order, n) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            matrix = filters.permute(order).reshape(n, -1)
            u: Tensor = getattr(self, f"u{i}")
            with torch.no_grad():
                fixed = matrix.detach()
                for _ in range(steps):
                    u = functional.normalize(fixed @ (fixed.T @ u), dim=0)
                v = functional.normalize(fixed.T @ u, dim=0)
                setattr(self, f"u{i}", u)
            norms.append(u @ (matrix @ v))
        return torch.stack(norms).amin()

    def forward(self, x: Tensor) -> Tensor:
        filters = skew_filter(self.weight)
        filters = 0.7 * filters / self._norm(filters, int(self.training))
        missing = len(filters) - x.shape[1]
        out = skew_exponential(functional.pad(x, (0, 0, 0, 0, 0, missing)), filters, 5 if self.training else 12)
        return out[:, : self.outputs] + self.bias[:, None, None]


class Cayley(nn.Module):
    """Circular convolution that is (I - A)(I + A)^-1 at every frequency."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.size = outputs, max(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(self.size, self.size, 3, 3) / math.sqrt(9 * self.size))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, 0, 0, self.size - x.shape[1]))
        waves = torch.fft.rfft2(x).permute(2, 3, 1, 0)
        symbols = torch.fft.rfft2(self.weight, s=x.shape[2:]).permute(2, 3, 0, 1)
        skew, one = symbols - symbols.mH, torch.eye(self.size, dtype=symbols.dtype)
        turned = (one - skew) @ torch.linalg.solve(one + skew, waves)
        out = torch.fft.irfft2(turned.permute(3, 2, 0, 1), s=x.shape[2:])
        return out[:, : self.outputs] + self.bias[:, None, None]


def spectral_norm(inputs: int, outputs: int) -> nn.Module:
    """torch's own, of the reshaped kernel: not the operator's norm, which is measured afterwards."""
    return torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))


def layers() -> dict[str, Layer | str]:
    """By name; text where a peer is not installed."""
    found: dict[str, Layer | str] = {
        "ours, K = 4": lambda i, o: SkewOrthogonalConv2d(i, o, terms=4),
        "ours, K = 4, reshapes": lambda i, o: SkewOrthogonalConv2d(i, o, terms=4, normalizer="reshapes"),
        "ours, K = 8": lambda i, o: SkewOrthogonalConv2d(i, o, terms=8),
        "ours, K = 8, reshapes": lambda i, o: SkewOrthogonalConv2d(i, o, terms=8, normalizer="reshapes"),
        "ours, K = 8, circular": lambda i, o: SkewOrthogonalConv2d(i, o, terms=8, padding_mode="circular"),
        "skew, published": Published,
        "cayley": Cayley,
        "spectral norm": spectral_norm,
    }
    try:
        from deel.torchlip import SpectralConv2d

        found["deel-torchlip SpectralConv2d (Bjorck)"] = lambda i, o: SpectralConv2d(i, o, 3, padding=1)
    except ImportError as error:
        found["deel-torchlip SpectralConv2d (Bjorck)"] = f"not installed: {error}"
    try:
        from orthogonium.layers import AdaptiveOrthoConv2d
        from orthogonium.layers.conv.adaptiveSOC.fast_skew_ortho_conv import FastSOC

        # Its kernel is 7 x 7, for which its own padding is too small.
        found["orthogonium FastSOC"] = lambda i, o: nn.Sequential(
            nn.ZeroPad2d(3), FastSOC(i, o, 3, padding=0, padding_mode="zeros")
        )
        found["orthogonium AdaptiveOrthoConv2d"] = lambda i, o: AdaptiveOrthoConv2d(i, o, 3)
    except ImportError as error:
        found["orthogonium"] = f"not installed: {error}"
    return found


def throughput(known: dict[str, Layer], rounds: int) -> dict[str, dict[str, float]]:
    """Images per CPU second by layer."""
    torch.manual_seed(0)
    pictures = torch.randn(32, 32, 16, 16)
    modules = {name: layer(32, 32) for name, layer in known.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"train": [], "eval": []} for name in modules}
    for _ in range(rounds + 1):
        for name, module in modules.items():
            module.train().requires_grad_(True)
            start = time.process_time()
            module(pictures.requires_grad_()).square().mean().backward()
            times[name]["train"].append(time.process_time() - start)
            module.eval().requires_grad_(False)
            with torch.no_grad():
                assert module(pictures).shape == pictures.shape
                start = time.process_time()
                module(pictures)
                times[name]["eval"].append(time.process_time() - start)
    return {
        name: {kind: round(32 / statistics.median(found[1:])) for kind, found in kinds.items()} for name, kinds in times.items()
    }


class Net(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([layer(1, 16), layer(64, 32), layer(128, 32)])
        self.head, self.between = nn.Linear(128, 10), MaxMin()

    def features(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate(self.convolutions):
            x = self.between(convolution(functional.pixel_unshuffle(x, 2) if i else x))
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x))
        return scores

    def constant(self) -> float:
        """Product of the norms of the matrices of the convolutions, evaluation mode."""
        total = 1.0
        for module, (channels, side) in zip(self.convolutions, ((1, 8), (64, 4), (128, 2)), strict=True):
            layer = copy.deepcopy(module).eval()
            basis = torch.eye(channels * side * side).reshape(-1, channels, side, side)
            with torch.no_grad():
                matrix = (layer(basis) - layer(torch.zeros_like(basis[:1]))).flatten(1).double()
            total *= float(torch.linalg.matrix_norm(matrix, 2))
        return total


def certified(net: Net, x: Tensor, y: Tensor) -> dict[str, float]:
    """Clean and certified accuracy in percent."""
    net.eval()
    with torch.no_grad():
        scores, rows, constant = net(x).double(), net.head.weight.double(), net.constant()
    lead = scores.gather(1, y[:, None]) - scores
    apart = torch.cdist(rows, rows)[y]
    radius = (lead / apart.clamp_min(1e-30)).scatter(1, y[:, None], math.inf).amin(1) / constant
    return {"constant": constant, "clean": 100 * float((radius > 0).float().mean())} | {
        f"at {r}": 100 * float((radius > r).float().mean()) for r in RADII
    }


def digits() -> tuple[list[Tensor], list[Tensor]]:
    """Pictures and labels to train with, to choose by and to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    rest, x_test, labels, y_test = train_test_split(x / 16.0, y, test_size=360, stratify=y, random_state=0)
    x_train, x_held, y_train, y_held = train_test_split(rest, labels, test_size=180, stratify=labels, random_state=0)
    pictures = [torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in (x_train, x_held, x_test)]
    return pictures, [torch.tensor(part) for part in (y_train, y_held, y_test)]


def train(layer: Layer, seconds: float, rate: float, seed: int, arguments: argparse.Namespace) -> tuple[Net, int]:
    """A network after so many CPU seconds, and its updates."""
    (x, _, _), (y, _, _) = digits()
    torch.manual_seed(seed)
    net = Net(layer)
    optimizer = torch.optim.Adam(net.parameters())
    start, steps = time.process_time(), 0
    while (spent := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(spent / 0.3 + 0.04, (1 - spent) / 0.7)
        rows = torch.randint(len(x), (128,))
        # Rows of the head of norm 1, so that margins are in units of the input.
        scores = functional.linear(net.features(x[rows]), functional.normalize(net.head.weight, dim=1), net.head.bias)
        offset = functional.one_hot(y[rows], 10) * arguments.margin * math.sqrt(2)
        loss = functional.cross_entropy((scores - offset) / arguments.temperature, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        net.head.weight.copy_(functional.normalize(net.head.weight, dim=1))
    return net, steps


def accuracy(layer: Layer, arguments: argparse.Namespace) -> dict[str, object]:
    """Certified accuracy in percent after equal time, over seeds."""
    (_, x_held, x_test), (_, y_held, y_test) = digits()

    def held_out(rate: float) -> float:
        net, _ = train(layer, arguments.seconds / 3, rate, 100, arguments)
        return certified(net, x_held, y_held)["at 0.5"]

    rate, runs = max(arguments.rates, key=held_out), []
    for seed in range(arguments.seeds):
        net, steps = train(layer, arguments.seconds, rate, seed, arguments)
        runs.append({**certified(net, x_test, y_test), "updates": steps})
    means = {key: round(statistics.mean(run[key] for run in runs), 4) for key in runs[0]}
    return {"learning rate": rate, **means, "runs at 0.5": [round(run["at 0.5"], 2) for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 2e-2, 8e-2])
    parser.add_argument("--temperature", type=float, default=0.25)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lipschitz_layers.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = layers()
    known = {name: layer for name, layer in every.items() if not isinstance(layer, str)}
    found: dict[str, object] = {
        "torch": torch.__version__,
        "left out": {name: reason for name, reason in every.items() if isinstance(reason, str)},
        "images per CPU second": throughput(known, arguments.rounds),
    }
    print(json.dumps(found, indent=1))
    after: dict[str, object] = {}
    for name, layer in known.items():
        after[name] = accuracy(layer, arguments)
        print(name, after[name], flush=True)
    found[f"after {arguments.seconds:g} CPU seconds"] = after
    write_atomically(arguments.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
