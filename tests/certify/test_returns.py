from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from return_laws import Law, g
from scipy.special import betaincinv
from scipy.stats import beta as beta_law
from scipy.stats import norm

from robustrl.certify.band import band_failure_bounds
from robustrl.certify.betting import block_ends
from robustrl.certify.returns import (
    METHODS,
    certify_quantile,
    certify_return,
    certify_success,
    episode_budget,
    mean_upper_bound,
    plug_in_return,
)
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.threat import ThreatModel

Returns = Callable[[float], np.ndarray]
UNIT = Gaussian(1.0)

# Specification 3.2, 10,000 CartPole episodes: budgets, plug-in, paper, DKW at alpha / 2, ELL.
TABLE = {
    0.2: np.array(
        [
            [0, 197.92, 197.43, 195.20, 197.48],
            [0.1, 194.76, 193.38, 186.80, 193.52],
            [0.2, 188.92, 185.28, 169.78, 185.63],
            [0.4, 168.66, 149.31, 105.77, 150.67],
            [0.6, 145.10, 85.98, 36.88, 88.34],
            [0.8, 130.14, 28.14, 6.03, 29.74],
            [1.0, 124.99, 4.36, 0.42, 4.77],
        ]
    ),
    0.4: np.array(
        [
            [0, 145.85, 143.55, 143.13, 143.75],
            [0.2, 121.94, 119.19, 117.60, 119.44],
            [0.4, 97.75, 94.51, 90.84, 94.80],
            [0.6, 75.36, 71.39, 65.02, 71.74],
            [0.8, 55.91, 50.87, 42.15, 51.28],
            [1.0, 40.05, 33.61, 24.08, 34.05],
        ]
    ),
}
BETTING = {0.2: [197.72, 194.25, 187.02, 151.39], 0.4: [144.65, 120.60, 96.25]}  # the same table, mu <= 2 and mu <= 1
RED = {(0.2, 0.8): 130.9, (0.2, 1.0): 130.1}  # published values above the no-confidence optimum (3.3)


def on_cartpole(returns: np.ndarray, sigma: float, method: str, budgets: Any = None, **options: Any) -> np.ndarray:
    budgets = TABLE[sigma][:, 0] if budgets is None else budgets
    return certify_return(returns, Gaussian(sigma), budgets, method=method, return_low=0, return_high=200, **options).values


@pytest.mark.parametrize("sigma", [0.2, 0.4])
def test_cartpole_columns_of_the_specified_table(cartpole: Returns, sigma: float) -> None:
    returns = cartpole(sigma)
    columns = [
        plug_in_return(returns, Gaussian(sigma), TABLE[sigma][:, 0], 0),
        on_cartpole(returns, sigma, "paper"),
        on_cartpole(returns, sigma, "dkw", alpha=0.025),  # the two-sided constant of the peer's code
        on_cartpole(returns, sigma, "band"),
    ]
    # .01 from the table's rounding; its ELL column was made with gamma to three digits
    for column, expected, tolerance in zip(columns, TABLE[sigma].T[1:], [0.0101, 0.0101, 0.0101, 0.02], strict=True):
        assert column == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("sigma", [0.2, 0.4])
def test_single_budget_betting_is_no_worse_than_the_specified_table(cartpole: Returns, sigma: float) -> None:
    for budget, expected in zip(TABLE[sigma][:, 0], BETTING[sigma], strict=False):
        assert on_cartpole(cartpole(sigma), sigma, "betting", budget)[0] >= expected - 0.05


def test_hybrid_beats_the_paper_on_cartpole_and_never_exceeds_the_plug_in(cartpole: Returns) -> None:
    gains = []
    for sigma, table in TABLE.items():
        for seed in range(3):
            returns = np.random.default_rng(seed).permutation(cartpole(sigma))
            values = on_cartpole(returns, sigma, "hybrid")
            gains.append(values - on_cartpole(returns, sigma, "paper"))
            assert np.all(values <= plug_in_return(returns, Gaussian(sigma), table[:, 0], 0))
            assert all(values[table[:, 0] == budget] < red for (s, budget), red in RED.items() if s == sigma)
    assert min(gain.min() for gain in gains) >= 0.0
    assert np.mean(np.concatenate(gains)) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_certificate_never_exceeds_the_plug_in_and_falls_with_the_budget(cartpole: Returns, method: str) -> None:
    returns, budgets = cartpole(0.2)[:3000], np.linspace(0, 1.6, 17)
    certificate = certify_return(returns, Gaussian(0.2), budgets, method=method, return_low=0, return_high=200)
    assert np.all(certificate.values <= certificate.plug_in + 1e-9)
    assert np.all(np.diff(certificate.values) <= 1e-9)
    assert np.all(certificate.values >= 0)


@pytest.mark.parametrize("method", METHODS)
def test_certificate_rises_with_alpha(cartpole: Returns, method: str) -> None:
    returns = cartpole(0.4)[:2000]
    values = [on_cartpole(returns, 0.4, method, alpha=alpha) for alpha in (0.001, 0.01, 0.05, 0.2, 0.5)]
    assert np.all(np.diff(values, axis=0) >= -1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_certificate_rises_with_the_number_of_episodes_on_average(cartpole: Returns, method: str) -> None:
    returns = cartpole(0.4)
    few = np.mean([on_cartpole(part, 0.4, method) for part in returns.reshape(20, 500)], axis=0)
    many = np.mean([on_cartpole(part, 0.4, method) for part in returns.reshape(2, 5000)], axis=0)
    assert np.all(many > few)


@pytest.mark.parametrize(("method", "high"), [(m, h) for m in METHODS for h in (None, 200.0) if m != "paper" or h])
def test_certificate_is_affinely_equivariant(cartpole: Returns, method: str, high: float | None) -> None:
    returns, budgets, scale, shift = cartpole(0.4)[:1000], [0.0, 0.3, 0.8], 0.37, -91.0
    # non-integer bounds make both runs use even cells
    options = {"method": method, "return_low": 0.5, "return_high": None if high is None else high + 0.5}
    moved = dict(options, return_low=0.5 * scale + shift, return_high=None if high is None else (high + 0.5) * scale + shift)
    plain = certify_return(returns, Gaussian(0.4), budgets, **options).values
    other = certify_return(returns * scale + shift, Gaussian(0.4), budgets, **moved).values
    # float rounding may push a return across a threshold of the paper's grid: one cell of 200 / 256
    assert other == pytest.approx(plain * scale + shift, abs=1e-6 if method != "paper" else 0.3)


@pytest.mark.parametrize("method", ["paper", "dkw", "band"])
def test_band_methods_ignore_the_order_of_the_episodes(cartpole: Returns, method: str) -> None:
    returns = cartpole(0.2)[:1000]
    assert np.array_equal(on_cartpole(returns, 0.2, method), on_cartpole(np.sort(returns), 0.2, method))


@pytest.mark.parametrize("method", METHODS)
def test_constant_returns_at_both_bounds_certify_themselves(method: str) -> None:
    certificate = certify_return([7.0] * 20, UNIT, [0, 1, 5], method=method, return_low=7, return_high=7)
    assert certificate.values.tolist() == [7.0] * 3


@pytest.mark.parametrize("method", METHODS)
def test_infinite_and_huge_budgets_leave_the_sure_lower_bound(cartpole: Returns, method: str) -> None:
    returns = cartpole(0.2)[:500]
    certificate = certify_return(returns, Gaussian(0.2), [0.1, 20.0, math.inf], method=method, return_low=8, return_high=200)
    assert certificate.values[0] > 100
    assert certificate.values[1:] == pytest.approx([8, 8], abs=1e-9)
    assert certificate.plug_in[2] == 8
    assert certify_return(returns, Gaussian(0.2), math.inf, method=method, return_low=8, return_high=200).values.tolist() == [8]


@pytest.mark.parametrize("method", METHODS)
def test_undefended_agent_is_certified_at_budget_zero_alone(cartpole: Returns, method: str) -> None:
    returns = cartpole(0.2)[:500]
    certificate = certify_return(returns, Gaussian(0.0), 0, method=method, return_low=0, return_high=200)
    assert 185 < certificate.values[0] < returns.mean()
    with pytest.raises(ValueError, match="sigma must be > 0"):
        certify_return(returns, Gaussian(0.0), [0, 0.1], method=method, return_low=0, return_high=200)


@pytest.mark.parametrize("method", METHODS)
def test_negative_returns_stay_below_the_true_worst_case(method: str) -> None:
    # specification 2.4: {-5 (20%), -1 (80%)}, mu = 2: the peers' integral from 0 gives -2.459, the truth is -4.507
    returns = np.random.default_rng(0).permutation(np.repeat([-5.0, -1.0], [2000, 8000]))
    value = certify_return(returns, UNIT, 2.0, method=method, return_low=-5, return_high=0).values[0]
    assert -4.75 < value <= -5 + 4 * norm.cdf(norm.ppf(0.8) - 2) == pytest.approx(-4.507, abs=5e-4)


def test_a_larger_sure_lower_bound_helps() -> None:
    # specification 2.4: return_low = 8 adds 7.5 at mu = 5
    returns = np.full(10_000, 200.0)
    values = [certify_return(returns, UNIT, 5.0, method="paper", return_low=a, return_high=200).values[0] for a in (0, 8)]
    assert 7 < values[1] - values[0] < 8


def test_paper_needs_no_integers(rng: np.random.Generator) -> None:
    returns = rng.random(5000) - 0.25
    value = certify_return(returns, UNIT, 1.0, method="paper", return_low=-0.25, return_high=0.75).values[0]
    assert 0.19 < value + 0.25 < 0.23975  # the worst case of Uniform(0, 1), moved


# ---- population formulae -----------------------------------------------------------------------------------------


def test_plug_in_of_a_uniform_law_matches_its_closed_form() -> None:
    # W = Phi(-mu / sqrt 2) for Uniform(0, 1): .361837, .239750, .0786496 (specification 2.3)
    grid = (np.arange(200_000) + 0.5) / 200_000
    values = plug_in_return(grid, UNIT, [0.5, 1, 2], 0)
    assert values == pytest.approx([0.361837, 0.239750, 0.0786496], abs=3e-6)
    assert values == pytest.approx(norm.cdf(-np.array([0.5, 1, 2]) / math.sqrt(2)), abs=3e-6)


def test_plug_in_of_a_lognormal_law_matches_its_closed_form() -> None:
    # exp(m - mu s + s^2 / 2) for LogNormal(m, s): m = .3, s = .7, mu = 1: .856415 (specification 2.3)
    grid = np.exp(0.3 + 0.7 * norm.ppf((np.arange(400_000) + 0.5) / 400_000))
    assert plug_in_return(grid, UNIT, 1.0, 0)[0] == pytest.approx(0.856415, abs=2e-4)


def test_plug_in_adds_up_over_returns_of_the_same_order(rng: np.random.Generator) -> None:
    x = np.sort(rng.random(300))
    f, h = x**2, np.floor(5 * x)
    total = plug_in_return(f + h, UNIT, [0.3, 2.0], 0)
    assert total == pytest.approx(plug_in_return(f, UNIT, [0.3, 2.0], 0) + plug_in_return(h, UNIT, [0.3, 2.0], 0), abs=1e-9)


def test_tiny_failure_probabilities_keep_their_digits() -> None:
    # specification 2.3: f = 1e-20, mu = 5 -> 1.0115e-5; the success side gives 0
    from robustrl.certify.worst_case import worst_case_survival

    assert 1 - worst_case_survival(UNIT, 1e-20, 5.0) == pytest.approx(1.0115e-5, rel=1e-4)
    assert worst_case_survival(UNIT, 1 - 1e-12, 1.0) == pytest.approx(norm.cdf(norm.ppf(1e-12) - 1), rel=1e-3)


@pytest.mark.parametrize("noise", [UNIT, Uniform(0.5), Splitting(0.5), Laplace(1.0), Ablation(0.2)])
@pytest.mark.parametrize("law", ["ties", "heavy atoms", "signed", "cartpole 0.4"])
def test_every_mechanism_is_certified_through_its_own_trade_off_function(
    laws: dict[str, Law], noise: Noise, law: str, rng: np.random.Generator
) -> None:
    chosen = laws[law]
    budgets, returns = np.array([0.0, 0.3, 1.0, 2.0]), chosen.sample(rng, (20_000,))
    truth = np.array([chosen.worst_mean(noise, budget) for budget in budgets])
    span = chosen.high - chosen.low
    assert plug_in_return(returns, noise, budgets, chosen.low) == pytest.approx(truth, abs=0.02 * span)
    certificate = certify_return(returns, noise, budgets, return_low=chosen.low, return_high=chosen.high)
    assert np.all(certificate.values <= truth)
    assert np.all(certificate.values >= truth - 0.04 * span)


# ---- betting -----------------------------------------------------------------------------------------------------


def slow_betting(
    returns: np.ndarray,
    noise: Noise,
    budget: float,
    alpha: float,
    knots: np.ndarray,
    n_planned: int,
    ceiling: float,
    warm_up: int = 0,
) -> float:
    """Specification 2.6, episode by episode, each with what earlier blocks alone have shown; all returns are knots."""
    t, widths = knots[:-1], np.diff(knots)
    starts = np.concatenate([[warm_up], block_ends(warm_up, n_planned)])
    ledger = []
    for i, episode in list(enumerate(returns))[warm_up:]:
        k = int(starts[np.searchsorted(starts, i, side="right") - 1])
        past = returns[:k]
        prior = 1 - 0.5 * (t - knots[0]) / (knots[-1] - knots[0])
        survival = ((past[:, None] > t).sum(axis=0) + 3 * prior) / (k + 3)
        effective = min(n_planned, max(4 * k, 50))
        c = np.minimum(betaincinv(effective * survival, effective * (1 - survival) + 1, 0.3), 1 - 1e-9)
        slope = noise.slope(c, budget)
        floor = knots[0] + widths @ (g(noise, c, budget) - c * slope)
        gains = np.array([(slope * widths)[t < r].sum() for r in past])
        variance = gains.var() if k else 0.0
        variance = (k * variance + 3 * (slope @ widths) ** 2 / 4) / (k + 3)
        wager = math.sqrt(2 * math.log(1 / alpha) / (n_planned * variance))
        ledger.append((floor, floor + (slope * widths)[t < episode].sum(), wager))
    floors, outcomes, wagers = np.array(ledger).T
    stops = [int(end) - 1 - warm_up for end in block_ends(warm_up, len(returns))]
    bottom, top = max(float(knots[0]), floors.max()), ceiling
    for _ in range(60):
        m = (bottom + top) / 2
        capital = np.cumsum(np.log1p(np.minimum(wagers, 0.9 / (m - floors)) * (outcomes - m)))
        bottom, top = (m, top) if capital[stops].max() >= math.log(1 / alpha) else (bottom, m)
    return float(bottom)


TENTHS = np.linspace(0, 12, 121)


@pytest.mark.parametrize("noise", [Gaussian(0.5), Uniform(1.0), Laplace(0.7)])
@pytest.mark.parametrize("budget", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("n", [7, 95, 233])
def test_betting_equals_a_slow_reading_of_the_specification(
    noise: Noise, budget: float, n: int, rng: np.random.Generator
) -> None:
    returns = rng.binomial(12, 0.6, n).astype(float)
    certificate = certify_return(returns, noise, budget, method="betting", alpha=0.1, return_low=0, return_high=12)
    slow = slow_betting(returns, noise, budget, 0.1, TENTHS, n, float(certificate.plug_in[0]))
    assert certificate.values[0] == pytest.approx(max(slow, 0), abs=1e-9)


def test_betting_never_looks_at_the_block_it_wagers_on(rng: np.random.Generator) -> None:
    # within a block neither tangents nor wagers change, so the order there cannot matter, in the first block or later
    returns = rng.binomial(12, 0.6, 300).astype(float)
    shuffled = returns.copy()
    for start, end in [(0, 10), (10, 20), (100, 200), (200, 300)]:
        shuffled[start:end] = rng.permutation(shuffled[start:end])
    options: dict[str, Any] = {"method": "betting", "return_low": 0, "return_high": 12}
    values = [certify_return(r, UNIT, [0, 0.5, 1.5], **options).values for r in (returns, shuffled)]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


def test_prefix_with_planned_length_depends_on_the_prefix_alone(rng: np.random.Generator) -> None:
    returns = rng.binomial(12, 0.6, 400).astype(float)
    options: dict[str, Any] = {"method": "betting", "return_low": 0, "return_high": 12, "n_planned": 400}
    slow = slow_betting(returns[:137], UNIT, 0.5, 0.05, TENTHS, 400, plug_in_return(returns[:137], UNIT, 0.5, 0)[0])
    certificate = certify_return(returns[:137], UNIT, 0.5, **options)
    assert certificate.anytime
    assert certificate.n_planned == 400
    assert certificate.values[0] == pytest.approx(slow, abs=1e-9)
    assert not certify_return(returns, UNIT, 0.5, method="betting", return_low=0).anytime


@pytest.mark.parametrize("n", [25, 130, 400])
def test_warm_up_chooses_thresholds_and_wagers_nothing(n: int, rng: np.random.Generator) -> None:
    returns = rng.choice([0.0, 2.0, 3.0], 400, p=[0.2, 0.3, 0.5])[:n]
    knots = np.unique(np.concatenate([[0.0, 2.0, 3.0], 3 + (3 - np.median(returns[:20])) * np.arange(1, 9) / 8]))
    ceiling = plug_in_return(returns, UNIT, 0.5, 0)[0]
    slow = slow_betting(returns, UNIT, 0.5, 0.05, knots, 400, ceiling, warm_up=20)
    certificate = certify_return(returns, UNIT, 0.5, method="betting", return_low=0, n_planned=400)
    assert certificate.values[0] == pytest.approx(slow, abs=1e-9)


def test_warm_up_certifies_nothing(rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"method": "betting", "return_low": -3.0, "n_planned": 1000}
    returns = 5 + rng.random(1000)
    assert certify_return(returns[:50], UNIT, [0, 0.5], **options).values.tolist() == [-3.0, -3.0]
    assert np.all(certify_return(returns, UNIT, [0, 0.5], **options).values > [4.5, 1.5])


@pytest.mark.parametrize("high", [None, 200.0])
def test_hybrid_is_the_better_of_both_halves_at_half_of_alpha(cartpole: Returns, high: float | None) -> None:
    returns, noise, budgets = cartpole(0.4)[:2000], Gaussian(0.4), np.array([0.0, 0.2, 0.4, 1.0, 1.6])
    options: dict[str, Any] = {"return_low": 0, "return_high": high}

    def curve(method: str, alpha: float, **more: Any) -> np.ndarray:
        return certify_return(returns, noise, budgets, method=method, alpha=alpha, **options, **more).values

    single = [certify_return(returns, noise, b, method="betting", alpha=0.05 / 5, **options).values[0] for b in budgets]
    assert curve("betting", 0.05) == pytest.approx(np.maximum.accumulate(single[::-1])[::-1], abs=1e-9)
    for simultaneous in (True, False):
        parts = curve("band", 0.025), curve("betting", 0.025, simultaneous=simultaneous)
        assert curve("hybrid", 0.05, simultaneous=simultaneous) == pytest.approx(np.maximum(*parts), abs=1e-9)
    pointwise = [certify_return(returns, noise, b, alpha=0.05, **options).values[0] for b in budgets]
    assert curve("hybrid", 0.05, simultaneous=False) == pytest.approx(pointwise, abs=1e-9)


def test_only_simultaneous_curves_borrow_from_larger_budgets() -> None:
    # on these twelve episodes, betting happens to do better at 1.1 than at 1.05
    returns, budgets = np.full(12, 100.0), np.linspace(0, 2, 41)
    options: dict[str, Any] = {"method": "betting", "return_low": 0, "return_high": 200}
    pointwise = certify_return(returns, Uniform(1.0), budgets, simultaneous=False, **options).values
    single = [certify_return(returns, Uniform(1.0), b, **options).values[0] for b in budgets]
    assert pointwise.tolist() == single
    assert np.diff(pointwise).max() > 1
    curve = certify_return(returns, Uniform(1.0), budgets, **options).values
    alone = [certify_return(returns, Uniform(1.0), b, alpha=0.05 / 41, **options).values[0] for b in budgets]
    assert curve == pytest.approx(np.maximum.accumulate(alone[::-1])[::-1], abs=1e-9)
    assert np.all(np.diff(curve) <= 0)


def test_band_method_uses_the_rank_of_the_first_of_tied_returns() -> None:
    returns, u = np.array([0.0, 3.0, 3.0, 10.0]), band_failure_bounds(4, 0.05)
    expected = 3 * g(UNIT, 1 - u[1], 0.5) + 7 * g(UNIT, 1 - u[3], 0.5)  # x_1 = 0 adds nothing
    value = certify_return(returns, UNIT, 0.5, method="band", return_low=0).values[0]
    assert value == pytest.approx(expected, abs=1e-9)


def test_simultaneity_is_stated_truthfully(cartpole: Returns) -> None:
    returns = cartpole(0.2)[:200]
    for method in METHODS:
        for asked in (True, False):
            certificate = on_cartpole_certificate(returns, method, [0, 0.1], asked)
            assert certificate.simultaneous == (asked or method in ("paper", "dkw", "band"))
            assert any("on its own" in sentence for sentence in certificate.not_covered) == (not certificate.simultaneous)
            assert on_cartpole_certificate(returns, method, 0.1, asked).simultaneous


def on_cartpole_certificate(returns: np.ndarray, method: str, budgets: Any, simultaneous: bool) -> Any:
    return certify_return(
        returns, Gaussian(0.2), budgets, method=method, return_low=0, return_high=200, simultaneous=simultaneous
    )


# ---- success and quantile ----------------------------------------------------------------------------------------


def test_success_is_the_shifted_clopper_pearson_limit() -> None:
    # all 1000 succeed: p >= alpha^(1/n), and the ceiling of specification 3.2, p_adv = .5 at mu = 2.749
    certificate = certify_success(1000, 1000, UNIT, [0.0, 1.0, 2.749])
    p = 0.05 ** (1 / 1000)
    assert certificate.values == pytest.approx(norm.cdf(norm.ppf(p) - np.array([0, 1, 2.749])), abs=1e-11)
    assert certificate.values[2] == pytest.approx(0.5, abs=2e-4)
    assert certificate.plug_in.tolist() == [1.0, 1.0, 1.0]
    assert certificate.simultaneous


@pytest.mark.parametrize("noise", [Uniform(0.5), Splitting(0.5), Laplace(1.0), Ablation(0.2)])
def test_success_for_the_other_norms(noise: Noise) -> None:
    limit = beta_law.ppf(0.05, 900, 101)  # Clopper-Pearson, 900 of 1000
    budgets = np.array([0.0, 0.3, 1.0, 2.0, math.inf])
    expected = [float(g(noise, np.array(limit), b)) for b in budgets[:-1]]
    assert certify_success(900, 1000, noise, budgets).values == pytest.approx([*expected, 0.0], abs=1e-9)


def test_no_success_certifies_nothing() -> None:
    assert certify_success(0, 50, UNIT, [0, 1]).values.tolist() == [0, 0]


def test_quantile_indices_of_the_specified_table() -> None:
    # specification 2.7: n = 1000, q = .5, alpha = .05; at mu = 3 published code still "certifies", n = 1000 cannot
    certificate = certify_quantile(np.arange(1, 1001), 0.5, UNIT, [0, 0.5, 1, 1.5, 3, math.inf], simultaneous=False)
    assert certificate.values[:4].tolist() == [474, 285, 140, 54]
    assert np.isnan(certificate.values[4:]).all()
    assert np.isnan(certificate.plug_in[5])
    assert np.all(certificate.values[:4] <= certificate.plug_in[:4])


def test_simultaneous_quantiles_share_alpha(rng: np.random.Generator) -> None:
    returns = rng.random(500)
    both = certify_quantile(returns, 0.5, UNIT, [0, 0.5]).values
    single = [certify_quantile(returns, 0.5, UNIT, b, alpha=0.025).values[0] for b in (0, 0.5)]
    assert both.tolist() == single
    assert both[0] < certify_quantile(returns, 0.5, UNIT, 0).values[0]


def test_quantile_needs_no_bounds_and_commutes_with_increasing_maps(rng: np.random.Generator) -> None:
    returns = rng.standard_cauchy(2000)
    plain = certify_quantile(returns, 0.3, Uniform(0.5), [0, 0.1, 0.2]).values
    assert np.array_equal(certify_quantile(np.arctan(returns), 0.3, Uniform(0.5), [0, 0.1, 0.2]).values, np.arctan(plain))


# ---- budgets of threat models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "threat", "expected"),
    [
        (Gaussian(0.2), ThreatModel(norm=2, episode=0.6), 0.6),
        (Gaussian(0.2), ThreatModel(norm=2, step=0.1), 0.1 * math.sqrt(200)),
        (Gaussian(0.2), ThreatModel(norm=2, step=0.1, episode=0.6), 0.6),
        (Gaussian(0.2), ThreatModel(norm=1, episode=0.6), 0.6),
        (Gaussian(0.2), ThreatModel(norm=math.inf, step=0.01), 0.01 * math.sqrt(200 * 4)),
        (Uniform(1.0), ThreatModel(norm=1, episode=0.6), 0.6),
        (Laplace(1.0), ThreatModel(norm=math.inf, step=0.01), 0.01 * 200 * 4),
        (Ablation(0.1), ThreatModel(norm=0, episode=3), 3.0),
    ],
)
def test_threat_models_become_episode_budgets(noise: Noise, threat: ThreatModel, expected: float) -> None:
    assert episode_budget(noise, threat, horizon=200, n_features=4) == pytest.approx(expected)


def test_uncovered_threats_are_refused() -> None:
    with pytest.raises(ValueError, match="no certificate"):
        episode_budget(Gaussian(0.2), ThreatModel(norm=0, episode=3), horizon=200, n_features=4)
    with pytest.raises(ValueError, match="horizon"):
        episode_budget(Gaussian(0.2), ThreatModel(norm=2, episode=3), horizon=0, n_features=4)


# ---- refusals ----------------------------------------------------------------------------------------------------


class Inputless(Gaussian):
    """A mechanism without a proof for episodes."""

    scopes = frozenset({"input"})


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"returns": []}, ValueError, "returns must not be empty"),
    ({"returns": [1.0, math.nan]}, ValueError, "returns must be finite"),
    ({"returns": [1.0, math.inf]}, ValueError, "returns must be finite"),
    ({"returns": [[1.0, 2.0]]}, ValueError, "returns must have 1 dim"),
    ({"returns": ["a"]}, TypeError, "returns must be numeric"),
    ({"returns": [-0.1, 5.0]}, ValueError, "returns must be >= return_low"),
    ({"returns": [5.0, 10.5]}, ValueError, "returns must be <= return_high"),
    ({"return_low": None}, ValueError, "certify_success or certify_quantile"),
    ({"return_low": -math.inf}, ValueError, "return_low must"),
    ({"return_low": math.nan}, ValueError, "return_low must"),
    ({"return_low": True}, TypeError, "return_low must"),
    ({"return_high": math.inf}, ValueError, "return_high must"),
    ({"return_low": 11.0}, ValueError, "return_high must be >= return_low"),
    ({"return_high": None, "method": "paper"}, ValueError, "return_high must"),
    ({"alpha": 0.0}, ValueError, "alpha must"),
    ({"alpha": 0.51}, ValueError, "alpha must"),
    ({"alpha": -0.05}, ValueError, "alpha must"),
    ({"alpha": math.nan}, ValueError, "alpha must"),
    ({"alpha": "0.05"}, TypeError, "alpha must"),
    ({"method": "bootstrap"}, ValueError, "method must"),
    ({"budgets": -0.1}, ValueError, "budgets must"),
    ({"budgets": [0.1, math.nan]}, ValueError, "budgets must"),
    ({"budgets": []}, ValueError, "budgets must"),
    ({"budgets": [[0.1]]}, ValueError, "budgets must"),
    ({"noise": Gaussian(0.0), "budgets": 0.1}, ValueError, "sigma must be > 0"),
    ({"noise": Inputless(0.5)}, ValueError, "no proof for scope 'episode'"),
    ({"n_planned": 100}, ValueError, "any stopping time"),
    ({"n_planned": 100, "method": "band"}, ValueError, "any stopping time"),
    ({"n_planned": 1, "method": "betting"}, ValueError, "n_planned must"),
    ({"n_planned": 10.0, "method": "betting"}, TypeError, "n_planned must"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], error: type[Exception], match: str) -> None:
    good = {"returns": [1.0, 9.0, 4.0], "noise": UNIT, "budgets": [0.0, 0.5], "return_low": 0, "return_high": 10}
    certify_return(**good)
    with pytest.raises(error, match=match):
        certify_return(**{**good, **change})


@pytest.mark.parametrize(
    ("successes", "n", "match"), [(-1, 5, "successes"), (6, 5, "successes"), (0, 0, "n must"), (3, -2, "n must")]
)
def test_success_refuses_impossible_counts(successes: int, n: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        certify_success(successes, n, UNIT, 0.1)


def test_success_refuses_fractions() -> None:
    with pytest.raises(TypeError, match="successes"):
        certify_success(0.5, 5, UNIT, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("q", [0.0, 1.0, -0.5, math.nan])
def test_quantile_refuses_bad_levels(q: float) -> None:
    with pytest.raises(ValueError, match="q must"):
        certify_quantile([1.0, 2.0], q, UNIT, 0.1)


@pytest.mark.parametrize("function", [certify_success, certify_quantile])
def test_other_statistics_share_the_refusals(function: Any) -> None:
    evidence: tuple[Any, ...] = (3, 5) if function is certify_success else ([1.0, 2.0], 0.5)
    for budgets in (-1.0, math.nan, []):
        with pytest.raises(ValueError, match="budgets"):
            function(*evidence, UNIT, budgets)
    with pytest.raises(ValueError, match="alpha"):
        function(*evidence, UNIT, 0.1, alpha=0.6)
    with pytest.raises(ValueError, match="scope"):
        function(*evidence, Inputless(1.0), 0.1)


def test_a_threat_that_reaches_features_without_noise_has_no_budget() -> None:
    noise = Gaussian([0.2, 0.0])
    with pytest.raises(ValueError, match=r"leave out features \[1\]"):
        episode_budget(noise, ThreatModel(norm=2, episode=1.0), horizon=10, n_features=2)
    masked = ThreatModel(norm=2, episode=1.0, mask=(True, False))
    assert episode_budget(noise, masked, horizon=10, n_features=2) == 1.0


@pytest.mark.parametrize("law", ["uniform", "atoms"])
def test_the_upper_bound_of_the_mean_covers_and_is_not_vacuous(law: str) -> None:
    rng, misses, widths = np.random.default_rng(3), 0, []
    for _ in range(200):
        returns = rng.uniform(0, 200, 300) if law == "uniform" else rng.choice([8.0, 200.0], 300, p=[0.1, 0.9])
        truth = 100.0 if law == "uniform" else 0.1 * 8 + 0.9 * 200
        upper = mean_upper_bound(returns, 200, alpha=0.05)
        misses += upper < truth
        widths.append(upper - truth)
    assert misses <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5
    assert np.mean(widths) < 20


@pytest.mark.parametrize("method", ["hybrid", "betting"])
def test_sorted_returns_are_refused_where_the_order_matters(method: str) -> None:
    sample = np.sort(np.random.default_rng(0).uniform(size=400))
    for ordered in (sample, sample[::-1]):
        with pytest.raises(ValueError, match="run order"):
            certify_return(ordered, Gaussian(0.2), 0.1, return_low=0, return_high=1, method=method)
        assert certify_return(ordered, Gaussian(0.2), 0.1, return_low=0, return_high=1, method="band").values[0] > 0
