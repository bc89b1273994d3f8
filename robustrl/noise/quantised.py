"""Gaussian noise on a grid, whose certificate is about the floating-point program that runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_positive, check_probability, check_real
from robustrl.noise.base import Floats, Frames, Generator, Noise
from robustrl.noise.draws import BITS, check_frames, integers, namespace, rounded
from robustrl.noise.gaussian import Gaussian
from robustrl.noise.grid import Grid

MOST_ENTRIES = 2**20
"""Of one input; `QuantisedGaussian.slack` covers that many draws."""
LARGEST = 4096
"""Sigma in grid steps; the table of thresholds takes seconds beyond."""


@dataclass(frozen=True)
class QuantisedGaussian(Noise):
    """Gaussian noise, rounded to whole grid steps, for observations on a grid such as bytes; l2 budgets, one input.

    In floating point x + noise is not a shifted copy of the noise, and certificates of real arithmetic can be wrong for the
    program that runs. Here everything that x meets is integers: the noisy index is clip(i + N, -K, q + K), with K = ceil(6
    sigma / h) and h the grid step, and only then becomes an observation.

    *Proof.* Let G ~ N(0, sigma^2 / h^2) and N = round(G). Since i is an integer, i + N = round(i + G): the shown index is a
    function of the Gaussian mechanism's output, so its certificate holds for attackers who stay on the grid. Clipping N to
    [-M, M], M = q + K, changes nothing, for abs(N) >= M puts i + N on or beyond the end of the range. N is drawn as the number of
    thresholds t_j <= u, less M, where u is uniform on 0 .. 2^60 - 1 and t_j = round(2^60 Phi((j - 1/2) h / sigma)), j = -M + 1
    .. M, computed to 40 digits. A threshold misses by at most 2^-61, and half the sum of the errors of all cells is at
    most the sum of those of the thresholds: the law of N is within 2 M 2^-61 of the exact one in total variation, that of an
    input of 2^20 entries within `slack` = 2^20 M 2^-60. Probabilities are those of the program, hence `lower` gives slack
    away twice, before and after the Gaussian's own: max(Phi(Phi^-1(p - slack) - B / sigma) - slack, 0). With q = 255 and
    sigma = 1/4 of the range, slack is 6e-10.

    Args:
        sigma: standard deviation in observation units, at most 4096 grid steps.
        quantisation: steps of the grid, q; 255 for bytes.
        low: lowest observation.
        high: highest observation.

    Distances are those between grid points.

    Source: Voracek, Hein, "Sound randomized smoothing in floating-point arithmetic" (ICLR 2023), arXiv:2207.07209, for
    integer noise from thresholds; the bound on the error of the thresholds is ours.
    """

    sigma: float
    quantisation: int = 255
    low: float = 0.0
    high: float = 1.0
    norm: ClassVar[float] = 2
    scopes: ClassVar[frozenset[str]] = frozenset({"input", "step"})
    fp_model: ClassVar[Literal["real", "exact"]] = "exact"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, check_real(name, getattr(self, name)))
        object.__setattr__(self, "sigma", check_positive("sigma", self.sigma))
        object.__setattr__(self, "quantisation", self.grid.quantisation)
        if not self.sigma <= LARGEST * self.grid.step:
            raise ValueError(
                f"sigma must be at most {LARGEST} grid steps of {self.grid.step:g}, got {self.sigma}: use a coarser grid"
            )

    @property
    def grid(self) -> Grid:
        """The observations that can carry this noise."""
        return Grid(self.quantisation, self.low, self.high)

    @property
    def margin(self) -> int:
        """Grid steps K by which noisy observations may leave [low, high]."""
        return math.ceil(6 * self.sigma / self.grid.step)

    @property
    def slack(self) -> float:
        """Total variation between the noise that is drawn for one input and rounded Gaussian noise, at most."""
        return MOST_ENTRIES * (self.quantisation + self.margin) * 2.0**-BITS * (1 + 1e-9)

    def thresholds(self) -> NDArray[np.int64]:
        """The integers t_j, j = -M + 1 .. M; see the class."""
        return _thresholds(self.sigma, self.quantisation, self.low, self.high, self.quantisation + self.margin)

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        check_frames(x, generator)
        if math.prod(x.shape[1:]) > MOST_ENTRIES:
            raise ValueError(f"frames must have at most {MOST_ENTRIES} entries, got shape {tuple(x.shape)}")
        xp, table = namespace(x), self.thresholds()
        drawn = integers(x, generator)
        if isinstance(x, np.ndarray):
            below = np.searchsorted(table, drawn, side="right")
        else:
            below = xp.searchsorted(xp.tensor(table, device=x.device), drawn, right=True)
        shown = self.grid.indices(x) + below - len(table) // 2
        return rounded(self.grid.values(xp.clip(shown, -self.margin, self.quantisation + self.margin)), x)

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p = check_probability("p", p)
        worst = Gaussian(self.sigma).lower(np.maximum(p - self.slack, 0.0), budget) - self.slack
        return np.where(np.equal(budget, 0), p, np.maximum(worst, 0.0))

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p = check_probability("p", p)
        worst = Gaussian(self.sigma).upper(np.minimum(p + self.slack, 1.0), budget) + self.slack
        return np.where(np.equal(budget, 0), p, np.minimum(worst, 1.0))

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p = np.maximum(check_probability("p", p) - self.slack, 0.0)
        gaussian = Gaussian(self.sigma)
        steep = np.where(gaussian.lower(p, budget) > self.slack, gaussian.slope(p, budget), 0.0)
        return np.where(np.equal(budget, 0), 1.0, steep)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        return 0.0 if p_lower <= rival else self._crossing(p_lower, rival, 40 * self.sigma)

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return []


@lru_cache(maxsize=16)
def _thresholds(sigma: float, quantisation: int, low: float, high: float, most: int) -> NDArray[np.int64]:
    lower_half = []
    with localcontext() as context:
        context.prec = 40
        root = (2 * _PI).sqrt()
        steps = quantisation / (Decimal(high) - Decimal(low)) * Decimal(sigma)
        for j in range(1, most + 1):
            x = (j - Decimal("0.5")) / steps
            lower_half.append(0 if x > 10 else round(2**BITS * _normal_tail(x, root)))  # 2^60 Phi(-10) < 1e-5
    lower = np.array(lower_half[::-1], dtype=np.int64)
    table = np.concatenate((lower, 2**BITS - lower[::-1]))
    table.setflags(write=False)
    return table


_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def _normal_tail(x: Decimal, root: Decimal) -> Decimal:
    """Phi(-x) for 0 <= x <= 10: 1/2 - phi(x) sum_n x^(2n+1) / (1 3 5 .. (2n+1)), whose terms are all positive."""
    term = total = x
    odd, square = 1, x * x
    while term > Decimal("1e-40"):
        odd += 2
        term = term * square / odd
        total += term
    return Decimal("0.5") - total * (-square / 2).exp() / root
