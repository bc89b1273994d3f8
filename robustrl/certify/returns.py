"""Episode certificates: from the returns of independent episodes to what no attacker within the budget can undercut.

The estimands, for a mechanism's trade-off function g = `noise.lower(., B)` and the clean survival S(t) = P(J > t):

- mean return under attack      >=  a + int_a^inf g(S(t)) dt      `certify_return`
- success probability           >=  g(P(success))                 `certify_success`
- q-quantile of the return      >=  the clean g(q)-quantile       `certify_quantile`

All of it is computed from upper bounds on *failure* probabilities, which are small and keep their digits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from robustrl.certify.band import band_failure_bounds
from robustrl.certify.betting import betting_lower_bounds
from robustrl.certify.confidence import clopper_pearson_upper, dkw_epsilon, failure_upper
from robustrl.certify.episode import EpisodeCertificate, standard_exclusions
from robustrl.certify.worst_case import worst_case_mean, worst_case_survival
from robustrl.errors import check_alpha, check_budget, check_choice, check_count, check_finite_array, check_real
from robustrl.noise import Gaussian, Noise
from robustrl.threat import ThreatModel

Floats = NDArray[np.float64]

METHODS = ("hybrid", "paper", "dkw", "band", "betting")
MOST_INTEGERS, CELLS = 10_000, 256


def certify_return(
    returns: ArrayLike,
    noise: Noise,
    budgets: ArrayLike,
    *,
    alpha: float = 0.05,
    method: str = "hybrid",
    return_low: float | None = None,
    return_high: float | None = None,
    simultaneous: bool = True,
    n_planned: int | None = None,
) -> EpisodeCertificate:
    """Lower confidence bounds of the mean return under any adaptive attacker within a budget.

    The methods differ in how they bound the clean law; every one of them is valid for every law of the return:

    - "hybrid": the larger of "band" and "betting", each at alpha / 2. The default.
    - "paper": Clopper-Pearson at alpha / m on m thresholds fixed beforehand: the integers if both bounds are integers
      less than 10,000 apart, else 256 even steps. Needs `return_high`.
    - "dkw": the one-sided Dvoretzky-Kiefer-Wolfowitz band.
    - "band": the exact equal-local-level band of all order statistics; good at rare failures and large budgets.
    - "betting": tangents and a test martingale; good at small budgets; the only one that may be stopped at will.

    "hybrid" and "betting" are cut to the plug-in estimate, and a curve that holds simultaneously is made monotone:
    the worst case at B is no worse than at any larger budget.

    Args:
        returns: one return per independent episode, in run order; shape (n,).
        noise: the mechanism that the policy was rolled out with.
        budgets: episode budgets in the mechanism's norm and observation units; a number or shape (K,); inf allowed.
        alpha: failure probability of the certificate, in (0, 0.5].
        method: "hybrid", "paper", "dkw", "band" or "betting".
        return_low: a number that no episode can fall below, even under attack: a fact about the environment, never
            the smallest return seen. Required.
        return_high: a number that no episode can exceed, or None.
        simultaneous: True (default) if the confidence is to cover all budgets at once ("paper", "dkw" and "band" always do).
        n_planned: for "betting" only: the largest number of episodes, fixed before the first. The certificate is then
            valid for any prefix of the run, stopped whenever one likes, and `returns` are the episodes so far.
    Returns:
        EpisodeCertificate with one value per budget.
    Raises:
        ValueError: if an argument is out of range, a return is not finite or outside [return_low, return_high], or the
            mechanism has no proof for episodes.
    Source: Kumar, Levine, Feizi (ICLR 2022), arXiv:2106.11420, for "paper" and "dkw"; docs/methods for the rest.

    Examples:
        >>> from robustrl.noise import Gaussian
        >>> certificate = certify_return([200.0] * 1000, Gaussian(0.2), [0.0, 0.2], return_low=0, return_high=200)
        >>> bool(190 < certificate.values[0] < 200)
        True
    """
    noise.require("episode")
    check_choice("method", method, METHODS)
    alpha, budgets = check_alpha(alpha), _check_budgets(budgets)
    if return_low is None:
        raise ValueError(
            "return_low must be a number that no episode can fall below, got None: without a sure lower bound the mean "
            "return has no certificate (an attacker may make one rare, terrible episode common); "
            "use certify_success or certify_quantile, which need none"
        )
    low = check_real("return_low", return_low)
    high = None if return_high is None else check_real("return_high", return_high)
    sample = _check_returns(returns, low, high)
    if n_planned is not None:
        if method != "betting":
            raise ValueError(
                f"n_planned must be None for method {method!r}: it promises validity at any stopping time, which only "
                'method="betting" has; the others need the number of episodes fixed beforehand'
            )
        n_planned = check_count("n_planned", n_planned, least=sample.size)

    if method in ("hybrid", "betting"):
        _refuse_sorted(sample)
    plug_in = plug_in_return(sample, noise, budgets, low)
    share = max(1, np.unique(budgets[np.isfinite(budgets)]).size) if simultaneous else 1

    def bet(level: float) -> Floats:
        finite = np.isfinite(budgets)
        bounds = np.full(budgets.size, low)
        bounds[finite] = betting_lower_bounds(
            sample,
            noise,
            budgets[finite],
            alpha=level / share,
            return_low=low,
            return_high=high,
            n_planned=n_planned or sample.size,
            ceiling=plug_in[finite],
        )
        return bounds

    if method == "betting":
        values = bet(alpha)
    elif method == "hybrid":
        values = np.maximum(_from_band(sample, noise, budgets, low, alpha / 2), bet(alpha / 2))
    elif method == "band":
        values = _from_band(sample, noise, budgets, low, alpha)
    elif method == "dkw":
        edges, below = _empirical(sample, low)
        values = worst_case_mean(noise, budgets, edges, np.minimum(below / sample.size + dkw_epsilon(sample.size, alpha), 1.0))
    else:
        values = _from_paper(sample, noise, budgets, low, high, alpha)
    if method in ("betting", "hybrid"):
        if simultaneous:
            values = _best_of_larger(budgets, values)
        values = np.maximum(np.minimum(values, plug_in), low)
    at_once = bool(simultaneous) or method in ("paper", "dkw", "band") or budgets.size == 1

    return EpisodeCertificate(
        statistic="mean",
        budgets=budgets,
        values=values,
        plug_in=plug_in,
        noise=noise,
        alpha=alpha,
        method=method,
        simultaneous=at_once,
        n=sample.size,
        n_planned=n_planned,
        evidence=sample,
        return_low=low,
        return_high=high,
        not_covered=standard_exclusions(noise, pointwise=not at_once, anytime=n_planned is not None),
    )


def certify_success(successes: int, n: int, noise: Noise, budgets: ArrayLike, *, alpha: float = 0.05) -> EpisodeCertificate:
    """Lower confidence bounds of the probability of success under any adaptive attacker within a budget.

    One Clopper-Pearson limit, moved through the mechanism's trade-off function: simultaneous over all budgets at no cost.

    Args:
        successes: episodes that succeeded.
        n: independent episodes, fixed beforehand.
        noise: the mechanism that the policy was rolled out with.
        budgets: episode budgets; a number or shape (K,); inf allowed.
        alpha: failure probability, in (0, 0.5].
    Returns:
        EpisodeCertificate whose values are probabilities.
    Raises:
        ValueError: if an argument is out of range.
    Source: Kumar, Levine, Feizi (ICLR 2022), arXiv:2106.11420.
    """
    noise.require("episode")
    alpha, budgets = check_alpha(alpha), _check_budgets(budgets)
    n, successes = check_count("n", n), check_count("successes", successes, least=0)
    if successes > n:
        raise ValueError(f"successes must be at most n = {n}, got {successes}")
    limit = failure_upper(successes, n, alpha)
    return EpisodeCertificate(
        statistic="success",
        budgets=budgets,
        values=np.array([float(worst_case_survival(noise, limit, b)) for b in budgets]),
        plug_in=np.array([float(worst_case_survival(noise, (n - successes) / n, b)) for b in budgets]),
        noise=noise,
        alpha=alpha,
        method="clopper-pearson",
        simultaneous=True,
        n=n,
        evidence=successes,
        return_low=0.0,
        return_high=1.0,
        not_covered=standard_exclusions(noise),
    )


def certify_quantile(
    returns: ArrayLike, q: float, noise: Noise, budgets: ArrayLike, *, alpha: float = 0.05, simultaneous: bool = True
) -> EpisodeCertificate:
    """Lower confidence bounds of a quantile of the return under any adaptive attacker within a budget.

    The q-quantile inf{x: F(x) >= q} under attack is at least the clean quantile at level f = noise.lower(q, B), and that
    is at least the order statistic x_(k), k = max{k: P(Bin(n, f) <= k - 1) <= alpha}. No bounds of the return are needed.

    Args:
        returns: one return per independent episode; shape (n,).
        q: quantile level, in (0, 1); 0.5 is the median.
        noise: the mechanism that the policy was rolled out with.
        budgets: episode budgets; a number or shape (K,); inf allowed.
        alpha: failure probability, in (0, 0.5]; shared out over the K budgets if `simultaneous`.
        simultaneous: True (default) if the confidence is to cover all budgets at once.
    Returns:
        EpisodeCertificate; its values are NaN where this many episodes can certify nothing.
    Raises:
        ValueError: if an argument is out of range.
    Source: order statistics, e.g. David, Nagaraja (2003), section 7.1; the level is moved first, then the confidence
    taken (the other order is invalid: docs/methods).
    """
    noise.require("episode")
    alpha, budgets = check_alpha(alpha), _check_budgets(budgets)
    q = check_real("q", q, allowed="a quantile level in (0, 1)")
    if not 0 < q < 1:
        raise ValueError(f"q must be a quantile level in (0, 1), got {q}")
    sample = _check_returns(returns, None, None)
    ordered, n = np.sort(sample), sample.size
    share = max(1, np.unique(budgets[np.isfinite(budgets)]).size) if simultaneous else 1
    levels = noise.lower(q, budgets)
    ranks = [_sure_rank(n, float(f), alpha / share) for f in levels]
    estimates = np.ceil(n * levels).astype(np.int64)

    def at(ranks: ArrayLike) -> Floats:
        rank = np.asarray(ranks)
        return np.where(rank > 0, ordered[np.maximum(rank, 1) - 1], np.nan)

    return EpisodeCertificate(
        statistic="quantile",
        quantile=q,
        budgets=budgets,
        values=at(ranks),
        plug_in=at(estimates),
        noise=noise,
        alpha=alpha,
        method="order-statistics",
        simultaneous=bool(simultaneous) or budgets.size == 1,
        n=n,
        evidence=sample,
        not_covered=standard_exclusions(noise, pointwise=not simultaneous and budgets.size > 1),
    )


def plug_in_return(returns: ArrayLike, noise: Noise, budgets: ArrayLike, return_low: float) -> Floats:
    """Worst-case mean return if the returns seen were the whole law: an estimate, and no certificate.

    It is what every certificate from the same returns stays below, whatever its method.

    Args:
        returns: shape (n,).
        noise: the mechanism.
        budgets: episode budgets; a number or shape (K,).
        return_low: a sure lower bound of the return.
    Returns:
        float64 array of shape (K,).
    Raises:
        ValueError: if an argument is out of range.
    """
    low = check_real("return_low", return_low)
    sample = _check_returns(returns, low, None)
    edges, below = _empirical(sample, low)
    return worst_case_mean(noise, _check_budgets(budgets), edges, below / sample.size)


def mean_upper_bound(returns: ArrayLike, return_high: float, *, alpha: float = 0.05) -> float:
    """Upper confidence bound of a mean return, without an attacker: what an attack report holds against a certificate.

    The hybrid lower bound of the mirrored returns at budget 0.

    Args:
        returns: one return per independent episode, shape (n,).
        return_high: a number that no episode can exceed.
        alpha: failure probability.
    Raises:
        ValueError: if an argument is out of range.
    """
    mirrored = -check_finite_array("returns", returns, ndim=1)
    high = check_real("return_high", return_high)
    return -float(certify_return(mirrored, Gaussian(1.0), 0.0, alpha=alpha, return_low=-high).values[0])


def episode_budget(noise: Noise, threat: ThreatModel, *, horizon: int, n_features: int) -> float:
    """The budget at which an episode certificate covers a threat model stated in another norm or per step.

    Args:
        noise: the mechanism of the certificate.
        threat: the attackers to cover.
        horizon: most steps that an episode can have.
        n_features: entries of one frame.
    Returns:
        episode budget in the mechanism's norm.
    Raises:
        ValueError: if the mechanism has no bound for that threat, or the threat reaches features that carry no noise.
    """
    noise.require("episode")
    threat = threat.covering()
    horizon, n_features = check_count("horizon", horizon), check_count("n_features", n_features)
    if noise.protected is not None:
        noisy = np.array(noise.protected)
        attackable = (
            np.ones((1, noisy.size), dtype=bool) if threat.mask is None else np.array(threat.mask).reshape(-1, noisy.size)
        )
        bare = np.flatnonzero((attackable & ~noisy).any(axis=0)).tolist()
        if bare:
            raise ValueError(f"the threat's mask must leave out features {bare}, which carry no noise in {noise}")
    return noise.covering_budget(threat.norm, step=threat.step, episode=threat.episode, horizon=horizon, n_features=n_features)


def _from_band(sample: Floats, noise: Noise, budgets: Floats, low: float, alpha: float) -> Floats:
    edges, below = _empirical(sample, low)
    return worst_case_mean(noise, budgets, edges, band_failure_bounds(sample.size, alpha)[below])


def _from_paper(sample: Floats, noise: Noise, budgets: Floats, low: float, high: float | None, alpha: float) -> Floats:
    if high is None:
        raise ValueError(
            'return_high must be a number that no episode can exceed for method="paper", whose thresholds are fixed '
            'beforehand, got None; method="hybrid" needs none'
        )
    if high == low:
        return np.full(budgets.size, low)
    whole = low == math.floor(low) and high == math.floor(high) and high - low <= MOST_INTEGERS
    edges = np.linspace(low, high, (int(high - low) if whole else CELLS) + 1)
    below = np.searchsorted(np.sort(sample), edges[1:], side="left")
    return worst_case_mean(noise, budgets, edges, clopper_pearson_upper(below, sample.size, alpha / below.size))


def _empirical(sample: Floats, low: float) -> tuple[Floats, NDArray[np.int64]]:
    """Edges low, x_(1) < x_(2) < ... and the number of returns below each but the first."""
    values, counts = np.unique(sample, return_counts=True)
    return np.concatenate([[low], values]), np.cumsum(counts) - counts


def _best_of_larger(budgets: Floats, values: Floats) -> Floats:
    order = np.argsort(-budgets, kind="stable")
    best = np.empty_like(values)
    best[order] = np.maximum.accumulate(values[order])
    return best


def _sure_rank(n: int, level: float, alpha: float) -> int:
    """max{k: P(Bin(n, level) <= k - 1) <= alpha}, 0 if there is none."""
    k = int(binom.ppf(alpha, n, level)) + 1
    while k > 0 and binom.cdf(k - 1, n, level) > alpha:
        k -= 1
    return k


def _refuse_sorted(sample: Floats) -> None:
    """Betting needs the order in which the episodes were run; sorted returns would make it see the future."""
    steps = np.diff(sample)
    if sample.size >= 20 and np.unique(sample).size >= 5 and (np.all(steps >= 0) or np.all(steps <= 0)):
        raise ValueError(
            "returns must be in run order, got them sorted: the methods 'hybrid' and 'betting' would be invalid; "
            "pass them as they were rolled out, or permute them with a seed fixed beforehand"
        )


def _check_budgets(budgets: ArrayLike) -> Floats:
    array = check_budget("budgets", budgets)
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"budgets must be a number or a non-empty 1-d array, got shape {array.shape}")
    return array.reshape(-1)


def _check_returns(returns: Any, low: float | None, high: float | None) -> Floats:
    sample = check_finite_array("returns", returns, ndim=1)
    if low is not None and high is not None and high < low:
        raise ValueError(f"return_high must be >= return_low = {low}, got {high}")
    if low is not None and sample.min() < low:
        raise ValueError(
            f"returns must be >= return_low = {low}, got {sample.min()} at index {sample.argmin()}: the bound is not sure"
        )
    if high is not None and sample.max() > high:
        raise ValueError(
            f"returns must be <= return_high = {high}, got {sample.max()} at index {sample.argmax()}: the bound is not sure"
        )
    return sample
