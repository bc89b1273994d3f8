"""Is a probability above a threshold? Tests that may stop at any time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, betaincc, betaln

from robustrl.certify.certificate import Floats
from robustrl.certify.confidence import MOST
from robustrl.errors import as_floats, check_positive
from robustrl.noise import Noise

OUTWARD = 1e-12


def log_wealth(k: ArrayLike, n: ArrayLike, p0: float) -> tuple[Floats, Floats]:
    """Log-wealth of two bettors after `k` successes in `n` trials: against p <= p0, and against p >= p0.

    Each mixes all alternatives uniformly: W = int_{p0}^1 L(q) dq / ((1 - p0) L(p0)), and likewise below. It starts at 1 and is a
    supermartingale if its hypothesis is true, so P(ever W >= 1/alpha) <= alpha: the hypothesis may be rejected at any stopping time.

    Args:
        k: successes; any shape.
        n: trials, broadcast against `k`.
        p0: threshold in (0, 1).
    Returns:
        two float64 arrays of the broadcast shape; -inf where a bettor is ruined beyond the smallest float.
    Raises:
        ValueError: if p0 is outside (0, 1), or counts are impossible.
    Source: Ville (1939); Robbins (Annals of Mathematical Statistics 1970).
    """
    if not 0 < p0 < 1:
        raise ValueError(f"p0 must lie in (0, 1), got {p0}")
    k, n = np.broadcast_arrays(as_floats("k", k), as_floats("n", n))
    if not np.all((k >= 0) & (k <= n) & (k == np.floor(k)) & (n == np.floor(n)) & (n <= MOST)):
        raise ValueError(f"k must hold integers in [0, n], n integers up to {MOST:.0e}")
    a, b = k + 1, n - k + 1
    null = k * np.log(p0) + (n - k) * np.log1p(-p0)
    with np.errstate(divide="ignore"):
        above = betaln(a, b) + np.log(betaincc(a, b, p0)) - np.log1p(-p0) - null
        below = betaln(a, b) + np.log(betainc(a, b, p0)) - np.log(p0) - null
    return above, below


def threshold(noise: Noise, radius: float) -> float:
    """The class probability from which on the mechanism's radius is at least `radius`, rounded up.

    Raises:
        ValueError: if no probability gives that radius.
    """
    check_positive("radius", radius)
    p0 = float(noise.upper(0.5, radius))  # lower(p, r) >= 1/2 if and only if p >= upper(1/2, r)
    for margin in (OUTWARD, 1e3 * OUTWARD):  # mechanisms have margins of their own
        above = 1 - (1 - p0) * (1 - margin)
        if above < 1 and noise.radius(above) >= radius * (1 - 1e-9):
            return above
    raise ValueError(f"radius must be one that {noise} can certify, got {radius}")
