"""One-sided confidence limits for a probability (Clopper-Pearson) and for a whole law (DKW)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainccinv, betaincinv

from robustrl.errors import as_floats, check_alpha, check_count

Floats = NDArray[np.float64]

MOST = 10**9
"""Most trials for which the inverse beta function is known to be accurate."""
OUTWARD = 1e-12
"""Relative widening of every inverse beta function: it is accurate to about 1e-13, and may err outwards only."""


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """Exact lower confidence limit for a probability from `k` successes in `n` independent trials.

    The Clopper-Pearson limit BetaInv(alpha; k, n - k + 1): P(limit > p) <= alpha for every p.

    Args:
        k: successes, integers in [0, n]; any shape.
        n: trials, integers >= 1; broadcast against `k`.
        alpha: one-sided failure probability, in (0, 0.5]; broadcast.
    Returns:
        float64 array of the broadcast shape; 0 where k == 0.
    Raises:
        ValueError: if a count is not an integer in [0, n], n < 1, or alpha is outside (0, 0.5].
    Source: Clopper, Pearson (Biometrika 1934).
    """
    k, n, alpha = _counts(k, n, alpha)
    some = np.maximum(k, 1)
    small = betaincinv(some, n - some + 1, alpha) * (1 - OUTWARD)
    large = np.nextafter(1 - betainccinv(n - some + 1, some, alpha) * (1 + OUTWARD), 0.0)
    return np.where(k == 0, 0.0, np.where(small <= 0.5, small, large))


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """Exact upper confidence limit for a probability; accurate however small. See `clopper_pearson_lower`.

    Returns:
        float64 array of the broadcast shape; 1 where k == n.
    """
    k, n, alpha = _counts(k, n, alpha)
    some = np.minimum(k, n - 1)
    small = betainccinv(some + 1, n - some, alpha) * (1 + OUTWARD)
    large = np.nextafter(1 - betaincinv(n - some, some + 1, alpha) * (1 - OUTWARD), 1.0)
    return np.where(k == n, 1.0, np.where(small <= 0.5, small, large))


def failure_upper(successes: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """Upper confidence limit of the failure probability, 1 - clopper_pearson_lower(successes), without cancellation.

    With 10,000 successes in 10,000 trials the interest is in the failure probability of 3e-4, which an attacker
    magnifies; on the side of the success probability its digits are lost. See `clopper_pearson_upper`.
    """
    return clopper_pearson_upper(as_floats("n", n) - as_floats("successes", successes), n, alpha)


def dkw_epsilon(n: int, alpha: float) -> float:
    """Half-width of the one-sided Dvoretzky-Kiefer-Wolfowitz band with Massart's constant, sqrt(ln(1/alpha) / (2 n)).

    Args:
        n: sample size, >= 1.
        alpha: failure probability, in (0, 0.5]: the one-sided inequality does not hold above 1/2.
    Raises:
        ValueError: if either is out of range.
    Source: Massart (Annals of Probability 1990).
    """
    return math.sqrt(-math.log(check_alpha(alpha)) / (2 * check_count("n", n)))


def _counts(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Floats, Floats, Floats]:
    k, n, alpha = np.broadcast_arrays(as_floats("k", k), as_floats("n", n), as_floats("alpha", alpha))
    for name, count, valid in (("n", n, (n >= 1) & (n <= MOST)), ("k", k, (k >= 0) & (k <= n))):
        valid = valid & (count == np.floor(count))
        if not valid.all():
            allowed = f"integers in [1, {MOST:.0e}]" if name == "n" else "integers in [0, n]"
            raise ValueError(f"{name} must hold {allowed}, got {count[~valid].flat[0]}")
    if not np.all((alpha > 0) & (alpha <= 0.5)):
        raise ValueError(
            f"alpha must be a failure probability in (0, 0.5], got {alpha[~((alpha > 0) & (alpha <= 0.5))].flat[0]}"
        )
    return k, n, alpha
