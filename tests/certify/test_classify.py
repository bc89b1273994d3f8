"""Certificates of one input: exact where the truth is known, covered, and never crossed by an attack."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import optimize
from scipy.stats import norm as normal
from torch import Tensor, nn

import robustrl as rrl
from robustrl.certify.certificate import Certificate
from robustrl.certify.classify import certified, radius_from_counts
from robustrl.certify.methods import METHODS, NO_PROOF
from robustrl.certify.radius import ABSTAIN, RadiusCertificate
from robustrl.certify.sequential import log_wealth
from robustrl.errors import CertificateError
from robustrl.noise import DeterministicSplitting, Gaussian, Laplace, Noise, Uniform
from robustrl.policy import PolicyView

UNIT = Gaussian(1.0)
SAMPLED = [name for name, method in METHODS.items() if not method.exact and name != "sequential"]


def half_space(w: np.ndarray, b: float) -> nn.Linear:
    """Class 1 where w . x + b > 0."""
    linear = nn.Linear(len(w), 2)
    linear.weight.data = torch.tensor(np.stack((np.zeros_like(w), w)), dtype=torch.float32)
    linear.bias.data = torch.tensor([0.0, b])
    return linear


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    ("n", "k", "alpha", "p_lower", "radius"),
    [
        (100, 100, 0.001, 0.933254300797, 1.500475024),
        (100, 99, 0.001, 0.911373111296, 1.349259039),
        (1000, 900, 0.001, 0.867464018026, 1.114483162),
        (10_000, 9900, 0.001, 0.986531159324, 2.212419665),
        (10_000, 10_000, 0.001, 0.999309463003, 3.198577515),
        (100_000, 100_000, 0.001, 0.999930924833, 3.811456563),
        (100_000, 99_999, 0.001, 0.999907669666, 3.739126669),
        (100_000, 99_000, 0.001, 0.988989340377, 2.289999955),
        (100_000, 75_214, 0.001, 0.747898840667, 0.6678923379),
        (100_000, 50_500, 0.001, 0.50010895174, 2.731015e-4),
        (2000, 1500, 0.05, 0.733557769505, 0.623608905),
    ],
)
def test_radius_from_counts_is_the_published_one(n: int, k: int, alpha: float, p_lower: float, radius: float) -> None:
    certificate = radius_from_counts(UNIT, k, n, alpha=alpha)
    assert certificate.p_lower == pytest.approx(p_lower, abs=1e-11)
    assert certificate.radius == pytest.approx(radius, rel=1e-6)
    assert radius_from_counts(Gaussian(0.25), k, n, alpha=alpha).radius == pytest.approx(radius / 4, rel=1e-6)


@pytest.mark.parametrize(("n", "k"), [(100_000, 50_489), (10, 0), (100, 50), (5, 5)])
def test_too_few_votes_abstain(n: int, k: int) -> None:
    certificate = radius_from_counts(UNIT, k, n, alpha=0.001)
    assert certificate.abstained
    assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0.0)


@pytest.mark.parametrize(("n", "decides"), [(9, False), (10, True)])
def test_ten_samples_are_the_fewest_that_can_certify(n: int, decides: bool) -> None:
    assert radius_from_counts(UNIT, n, n, alpha=0.001).abstained is not decides


@pytest.mark.parametrize(
    ("p_lower", "p_upper", "radius"),
    [(0.7, 0.2, 0.68301087), (0.6, 0.1, 0.76744933), (0.45, 0.3, 0.19936958), (0.99, 0.005, 2.45108859)],
)
def test_two_sided_radius_of_known_probabilities(p_lower: float, p_upper: float, radius: float) -> None:
    assert UNIT.radius(p_lower, p_upper) == pytest.approx(radius, abs=1e-8)


def test_two_sided_radius_from_counts() -> None:
    """Both limits at level .0005: alpha = .001 over the class and one rival."""
    evidence = {"selection": [10, 0], "counts": [6000, 4000], "n": 10_000}
    assert certified("two-sided", evidence, alpha=0.001, norm=2, scope="input", noise=UNIT).p_lower == pytest.approx(
        0.583758660, abs=1e-9
    )
    three = {"selection": [10, 0, 0], "counts": [6000, 1000, 3000], "n": 10_000}
    found = certified("two-sided", three, alpha=0.002, norm=2, scope="input", noise=UNIT)
    assert found.p_lower == pytest.approx(float(rrl.certify.confidence.clopper_pearson_lower(6000, 10_000, 0.001)))
    assert found.p_upper == pytest.approx(float(rrl.certify.confidence.clopper_pearson_upper(3000, 10_000, 0.0005)))


def test_the_level_is_split_over_all_rivals_not_given_to_the_runner_up() -> None:
    counts = [5000, *[500] * 10]
    evidence = {"selection": [10, *[0] * 10], "counts": counts, "n": 10_000}
    found = certified("two-sided", evidence, alpha=0.01, norm=2, scope="input", noise=UNIT)
    assert found.p_upper == pytest.approx(float(rrl.certify.confidence.clopper_pearson_upper(500, 10_000, 0.01 / 20)))


@pytest.mark.parametrize("counts", [[6000, 1000, 2999], [6000, 1000, 3001], [10_000], [12_000, -2000, 0]])
def test_counts_that_do_not_add_up_are_no_evidence(counts: list[int]) -> None:
    evidence = {"selection": [10, 0, 0], "counts": counts, "n": 10_000}
    with pytest.raises(ValueError, match="counts must"):
        certified("two-sided", evidence, alpha=0.01, norm=2, scope="input", noise=UNIT)


def test_mean_scores_give_the_published_radius() -> None:
    """Q = 1.2 against .7 in [-2, 3], 10,000 draws, level .05 over two actions, sigma .1."""
    evidence = {"prediction": 0, "sums": [12_000.0, 7000.0], "n": 10_000, "bounds": [-2.0, 3.0]}
    found = certified("values", evidence, alpha=0.1, norm=2, scope="step", noise=Gaussian(0.1))
    assert found.radius == pytest.approx(0.00973051, abs=1e-8)
    assert (found.p_lower or 0) * 5 - 2 == pytest.approx(1.2 - 0.06119367, abs=1e-8)


# ------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize("dimension", [1, 2, 10, 1000])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_a_half_space_is_certified_up_to_its_margin_from_below(dimension: int, sigma: float) -> None:
    """The true radius is the margin, whatever sigma and the dimension are."""
    generator = np.random.default_rng(dimension)
    w = generator.normal(size=dimension)
    x = generator.normal(size=dimension)
    margin = 1.2 * sigma
    b = margin * float(np.linalg.norm(w)) - float(w @ x)
    smoothed = rrl.Smoothed(half_space(w, b), Gaussian(sigma), seed=1)
    found = [smoothed.certify(x[None], n=n, alpha=0.001)[0] for n in (100, 1000, 20_000)]
    assert [c.prediction for c in found] == [1, 1, 1]
    assert all(c.radius < margin for c in found)
    assert found[-1].radius > 0.95 * margin
    assert found[0].radius < found[-1].radius


@pytest.mark.parametrize("method", ["one-sided", "two-sided", "dipole", "second-order"])
def test_coverage_is_neither_violated_nor_vacuous(method: str) -> None:
    """2000 certificates of one point at alpha = .05: a radius beyond the margin is a miss."""
    alpha, runs, n, margin = 0.05, 2000, 200, 0.8
    smoothed = rrl.Smoothed(half_space(np.array([0.6, 0.8]), margin), UNIT, seed=7)
    found = smoothed.certify(np.zeros((runs, 2)), n0=20, n=n, alpha=alpha, method=method)
    missed = sum(c.radius > margin for c in found) / runs
    assert missed <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    # Clopper-Pearson on a grid of 200 counts, half the level for two-sided bounds; the dipole pays twice.
    assert missed >= {"one-sided": 0.01, "two-sided": 0.004, "dipole": 0.0005, "second-order": 0.0}[method]


def test_means_are_covered_too() -> None:
    """The score is a step function: its mean is a probability, and the truth is the half-space's."""

    def base(rows: Tensor) -> Tensor:
        hit = (rows[:, 0] > -0.8).float()
        return torch.stack((1 - hit, hit), dim=1)

    smoothed = rrl.Smoothed(base, UNIT, bounds=(0.0, 1.0), seed=2)
    found = smoothed.certify(np.zeros((1000, 1)), n0=20, n=200, alpha=0.1, method="values")
    assert sum(c.radius > 0.8 for c in found) <= 100
    assert np.mean([c.radius for c in found]) > 0.3


def test_a_union_of_half_spaces_has_its_closed_form() -> None:
    """Class 1 where x > -a or y > -b: the noise's coordinates are independent, so p = 1 - Phi(-a) Phi(-b)."""
    a, b = 0.3, 0.6

    def base(rows: Tensor) -> Tensor:
        inside = ((rows[:, 0] > -a) | (rows[:, 1] > -b)).float()
        return torch.stack((1 - inside, inside), dim=1)

    p = 1 - normal.cdf(-a) * normal.cdf(-b)
    certificate = rrl.Smoothed(base, UNIT, seed=3).certify(np.zeros((1, 2)), n=50_000)[0]
    assert certificate.p_lower == pytest.approx(p, abs=0.01)
    assert (certificate.p_lower or 0) < p


@pytest.mark.parametrize("interval", [(-0.5, 3.0), (-1.0, 1.0), (-0.2, 0.9), (-4.0, 0.8)])
@pytest.mark.parametrize("method", ["one-sided", "two-sided", "second-order", "second-order-pairs", "dipole"])
def test_no_shift_of_an_interval_crosses_the_certificate(interval: tuple[float, float], method: str) -> None:
    """The smoothed class of an interval at distance t is known exactly, and so is the nearest flip."""
    low, high = interval

    def base(rows: Tensor) -> Tensor:
        inside = ((rows[:, 0] > low) & (rows[:, 0] < high)).float()
        return torch.stack((1 - inside, inside), dim=1)

    certificate = rrl.Smoothed(base, UNIT, seed=4).certify(np.zeros((1, 1)), n=100_000, method=method)[0]

    def excess(t: float) -> float:
        p = normal.cdf(high - t) - normal.cdf(low - t)
        return (p if certificate.prediction == 1 else 1 - p) - 0.5

    flips = [optimize.brentq(excess, 0, side) for side in (-8.0, 8.0) if excess(0) * excess(side) < 0]
    assert flips or certificate.prediction == 0
    assert all(certificate.radius <= abs(flip) for flip in flips)


@pytest.mark.parametrize("noise", [Gaussian(0.4), Uniform(0.7), Laplace(0.4)])
def test_a_hill_climbing_attack_stays_outside_the_radius(noise: Noise) -> None:
    """The attacker moves the input in the noise's norm to just inside the radius; many fresh votes still say the same."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
    for layer in (base[0], base[2]):
        assert isinstance(layer, nn.Linear)
        layer.weight.data *= 3
    smoothed = rrl.Smoothed(base, noise, seed=5)
    x = np.random.default_rng(0).uniform(size=(6, 3))
    for point, certificate in zip(x, smoothed.certify(x, n=5000), strict=True):
        if certificate.abstained:
            continue
        directions = np.random.default_rng(1).normal(size=(40, 3))
        directions /= np.linalg.norm(directions, ord=noise.norm, axis=1, keepdims=True)
        moved = point + 0.99 * certificate.radius * directions
        share = smoothed.tally(moved, 4000).counts[:, certificate.prediction] / 4000
        assert share.min() > 0.5 - 4 * 0.5 / 4000**0.5


# ------------------------------------------------------------------------------------------------ doors


def test_predict_says_what_is_certain_and_abstains_from_ties() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=0)
    assert smoothed.predict(np.array([[-2.0], [0.0], [2.0]]), n=1000).tolist() == [0, ABSTAIN, 1]


def test_predict_is_wrong_at_most_as_often_as_stated() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=1)
    said = smoothed.predict(np.full((4000, 1), 0.05), n=101, alpha=0.1)
    assert np.mean(said == 0) <= 0.1
    assert np.mean(said == 0) >= 0.001
    assert np.mean(said == 1) > np.mean(said == 0)


@pytest.mark.parametrize(("n", "decides"), [(10, False), (11, True)])
def test_eleven_samples_are_the_fewest_that_can_predict(n: int, decides: bool) -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 100.0), UNIT)
    if decides:
        assert smoothed.predict(np.zeros((1, 1)), n=n).tolist() == [1]
    else:
        with pytest.warns(UserWarning, match="can never decide"):
            assert smoothed.predict(np.zeros((1, 1)), n=n).tolist() == [ABSTAIN]


def test_a_number_of_samples_that_can_never_certify_is_warned_about() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 100.0), UNIT)
    with pytest.warns(UserWarning, match="can never certify"):
        assert smoothed.certify(np.zeros((1, 1)), n=9)[0].abstained


def test_alpha_total_is_split_over_the_inputs() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 1.0), UNIT, seed=0)
    found = smoothed.certify(np.zeros((4, 1)), n=500, alpha_total=0.02)
    assert [c.alpha for c in found] == [0.005] * 4
    assert smoothed.decide(np.zeros((4, 1)), 0.5, alpha_total=0.02)[0].alpha == 0.005


def test_another_norm_is_converted_and_recomputable() -> None:
    smoothed = rrl.Smoothed(half_space(np.ones(4), 2.0), UNIT, seed=0)
    plain, box = (smoothed.certify(np.zeros((1, 4)), n=4000, norm=norm)[0] for norm in (2, math.inf))
    assert box.radius == pytest.approx(UNIT.radius(box.p_lower or 0) / 2)
    assert plain.norm == 2
    for certificate in (plain, box):
        certificate.verify()


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("scope", ["episode", "trajectory", "training-labels", "nonsense"])
def test_statements_without_a_proof_are_refused_with_the_reason(method: str, scope: str) -> None:
    smoothed = rrl.Smoothed(half_space(np.ones(2), 1.0), UNIT, bounds=(0, 1))
    with pytest.raises(ValueError, match=f"no proof for scope {scope!r}") as caught:
        smoothed.certify(np.zeros((1, 2)), n=10, method=method, scope=scope)
    assert NO_PROOF.get(scope, "unknown scope") in str(caught.value)


@pytest.mark.parametrize("name", ["onesided", "sequential", "label flips"])
def test_a_method_that_certify_does_not_know_is_answered_with_those_that_it_does(name: str) -> None:
    with pytest.raises(ValueError, match="method must be one of") as refused:
        rrl.Smoothed(nn.Linear(1, 2), UNIT).certify(torch.zeros(1, 1), method=name)
    listed = str(refused.value).split("one of ")[1].split(", got")[0].split(", ")
    assert set(listed) == {"one-sided", "two-sided", "second-order", "second-order-pairs", "dipole", "values", "splitting"}


def test_without_noise_no_radius_is_certified() -> None:
    smoothed = rrl.Smoothed(nn.Linear(1, 2), Gaussian(0.0))
    for ask in (lambda: smoothed.certify(torch.zeros(1, 1)), lambda: smoothed.decide(torch.zeros(1, 1), 0.1)):
        with pytest.raises(ValueError, match="sigma > 0"):
            ask()


# ------------------------------------------------------------------------------------------------ where they come from


def digest_of(x: np.ndarray) -> str:
    return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_certificates_hold_the_hashes_of_model_and_input(dtype: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(dtype)
    smoothed = rrl.Smoothed(half_space(np.ones(3), 0.1), UNIT)
    ways = [smoothed.certify(x, n=100), smoothed.certify(torch.from_numpy(x), n=100), smoothed.decide(x, 0.1, max_n=100)]
    for found in ways:
        assert [c.provenance["input"] for c in found] == [digest_of(part) for part in x]
        assert len({c.provenance["model"] for c in found}) == 1
    assert ways[0][0].provenance == ways[2][0].provenance
    ways[0][0].save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json").provenance == ways[0][0].provenance


def test_exact_votes_hold_them_too() -> None:
    x = np.array([[0.0, 0.25], [0.5, 1.0]])
    model = half_space(np.ones(2), -1.0)
    found = rrl.Smoothed(model, DeterministicSplitting(levels=3, quantisation=4)).certify(x, method="splitting")
    assert [c.provenance["input"] for c in found] == [digest_of(part) for part in x]
    sampled = rrl.Smoothed(model, UNIT).certify(x, n=100)
    assert {c.provenance["model"] for c in found} == {c.provenance["model"] for c in sampled}


def test_models_are_told_apart_by_weights_and_layers_and_hashed_at_every_call() -> None:
    x, model = torch.zeros(1, 2), half_space(np.ones(2), 0.1)
    smoothed = rrl.Smoothed(model, UNIT)

    def mark(what: rrl.Smoothed) -> str:
        return str(what.certify(x, n=100)[0].provenance["model"])

    first = mark(smoothed)
    assert mark(rrl.Smoothed(half_space(np.ones(2), 0.1), UNIT)) == first
    assert mark(rrl.Smoothed(nn.Sequential(model), UNIT)) != first
    assert mark(rrl.Smoothed(nn.Sequential(model, nn.ReLU()), UNIT)) != mark(
        rrl.Smoothed(nn.Sequential(model, nn.Tanh()), UNIT)
    )
    model.bias.data[0] += 1e-6
    assert mark(smoothed) != first


def test_a_policys_hash_is_its_own_and_a_plain_function_has_none() -> None:
    x, model = torch.zeros(1, 2), half_space(np.ones(2), 0.1)
    view = PolicyView.from_torch(model, kind="q", observation_shape=(2,))
    assert rrl.Smoothed(view, UNIT).certify(x, n=100)[0].provenance["model"] == view.fingerprint()
    assert list(rrl.Smoothed(lambda rows: model(rows), UNIT).certify(x, n=100)[0].provenance) == ["input"]


def test_an_exact_or_unknown_method_is_no_sampled_one() -> None:
    smoothed = rrl.Smoothed(half_space(np.ones(2), 1.0), UNIT)
    for method in ("sequential", "nonsense"):
        with pytest.raises(ValueError, match="method must be"):
            smoothed.certify(np.zeros((1, 2)), method=method)


@pytest.mark.parametrize("method", SAMPLED)
def test_certificates_recompute_and_survive_a_file(method: str, tmp_path: Path) -> None:
    smoothed = rrl.Smoothed(half_space(np.ones(2), 1.0), UNIT, bounds=(-3.0, 3.0), seed=0)
    certificate = smoothed.certify(np.zeros((1, 2)), n=5000, alpha=0.01, method=method, scope="step")[0]
    assert certificate.prediction == 1
    certificate.verify()
    certificate.save(tmp_path / "c.json")
    loaded = Certificate.load(tmp_path / "c.json")
    assert loaded == certificate
    rrl.verify_certificate(tmp_path / "c.json")
    assert "l2 radius" in certificate.table()
    assert method in repr(certificate)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"radius": 9.0}, "radius"),
        ({"prediction": 0}, "prediction"),
        ({"p_lower": 0.99}, "p_lower"),
        ({"p_upper": 0.2}, "p_upper"),
        ({"evidence": {"selection": [0, 9], "count": 11_000, "n": 10_000}}, "cannot be recomputed"),
        ({"evidence": {}}, "cannot be recomputed"),
        ({"not_covered": ()}, "not_covered"),
        ({"fp_model": "exact"}, "fp_model"),
        ({"alpha": 0.2}, "radius"),
        ({"noise": Gaussian(3.0)}, "radius"),
        ({"norm": 1}, "cannot be recomputed"),
        ({"noise": None}, "cannot be recomputed"),
    ],
)
def test_a_certificate_that_was_tampered_with_does_not_verify(changes: dict[str, Any], field: str) -> None:
    from dataclasses import replace

    smoothed = rrl.Smoothed(half_space(np.ones(2), 1.0), UNIT, seed=0)
    certificate = smoothed.certify(np.zeros((1, 2)), n=5000)[0]
    with pytest.raises(CertificateError, match=field):
        replace(certificate, **changes).verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": -2}, "prediction must be"),
        ({"prediction": 1.0}, "prediction must be"),
        ({"radius": -1.0}, "radius must be"),
        ({"radius": math.nan}, "radius must be"),
        ({"prediction": -1}, "0 when abstaining"),
        ({"norm": 3}, "norm must be"),
        ({"scope": "episode"}, "no proof for scope|scope must be"),
        ({"method": "magic"}, "method must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"alpha": 0.7}, "alpha must be"),
        ({"fp_model": "approximate"}, "fp_model must be"),
        ({"evidence": {"x": math.nan}}, "evidence must be plain JSON"),
    ],
)
def test_impossible_certificates_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    certificate = radius_from_counts(UNIT, 990, 1000, alpha=0.05)
    with pytest.raises(ValueError, match=message):
        replace(certificate, **changes)


# ------------------------------------------------------------------------------------------------ exact methods


def test_exact_votes_are_the_same_three_lines() -> None:
    noise = rrl.DeterministicSplitting(levels=5, quantisation=4)
    smoothed = rrl.Smoothed(half_space(np.ones(3), -1.2), noise)
    x = np.array([[1, 3, 0], [4, 4, 4]]) / 4
    found = smoothed.certify(x, method="splitting")
    assert [c.alpha for c in found] == [0, 0]
    assert [c.fp_model for c in found] == ["exact", "exact"]
    for certificate in found:
        certificate.verify()
        assert sum(certificate.evidence["counts"]) == 5
        assert certificate.radius * 4 == round(certificate.radius * 4)
        assert "certain" in certificate.table()
    with pytest.raises(ValueError, match="norm must be one of 1, got 2"):
        smoothed.certify(x, method="splitting", norm=2)
    with pytest.raises(ValueError, match="noise must be a DeterministicSplitting"):
        rrl.Smoothed(half_space(np.ones(3), 1.0), UNIT).certify(x, method="splitting")


def test_exact_votes_survive_a_file_and_refuse_a_forgery(tmp_path: Path) -> None:
    from dataclasses import replace

    noise = rrl.DeterministicSplitting(levels=7, quantisation=4)
    certificate = rrl.Smoothed(half_space(np.ones(3), -1.0), noise).certify(np.ones((1, 3)), method="splitting")[0]
    certificate.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == certificate
    rrl.verify_certificate(tmp_path / "c.json")
    for changes in ({"evidence": {"counts": [0, 8]}}, {"radius": 2.0}, {"alpha": 0.0, "norm": 2}):
        with pytest.raises(CertificateError):
            replace(certificate, **changes).verify()
    with pytest.raises(ValueError, match="alpha must be 0"):
        replace(certificate, alpha=0.01)
    for scope in ("trajectory", "training-labels"):
        with pytest.raises(ValueError, match="no proof for scope"):
            replace(certificate, scope=scope)


def test_a_cloned_agents_certificate_counts_labels(tmp_path: Path) -> None:
    observations = np.random.default_rng(0).normal(size=(60, 2))
    both = spaces.Box(-5, 5, (2,)), spaces.Discrete(2)
    agent = rrl.agents.BehaviourCloning(*both, n_features=16).learn(observations, (observations[:, 0] > 0).astype(int))
    certificate = agent.certificate(np.array([1.5, 0.0]))
    assert (certificate.prediction, certificate.norm, certificate.scope, certificate.alpha) == (1, 0, "training-labels", 0)
    assert certificate.radius == agent.radius(np.array([1.5, 0.0]))
    certificate.verify()
    certificate.save(tmp_path / "c.json")
    rrl.verify_certificate(tmp_path / "c.json")
    assert any("added or removed examples" in sentence for sentence in certificate.not_covered)


# ------------------------------------------------------------------------------------------------ sequential


def test_a_decision_takes_few_samples_where_the_answer_is_clear() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=0)
    x = np.array([[0.0], [0.5], [1.5], [3.0]])
    yes = smoothed.decide(x, 1.0)
    assert [c.evidence["answer"] for c in yes] == ["no", "no", "yes", "yes"]
    assert [c.radius for c in yes] == [0, 0, 1, 1]
    assert max(c.evidence["n"] for c in yes) < 10_000
    for certificate in yes:
        certificate.verify()


def test_a_decision_that_is_too_close_stays_open() -> None:
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=0)
    found = smoothed.decide(np.array([[1.0]]), 1.0, max_n=2000)[0]
    assert (found.evidence["answer"], found.evidence["n"]) == ("undecided", 2000)
    assert found.abstained


def test_wrong_decisions_are_as_rare_as_stated() -> None:
    """At the very margin every yes is a mistake, looked for at every step."""
    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=3)
    found = smoothed.decide(np.full((1000, 1), 0.5), 0.5, alpha=0.1, max_n=1000)
    said = [c.evidence["answer"] for c in found]
    assert said.count("yes") <= 50 + 3 * math.sqrt(50)
    assert said.count("yes") >= 3


def test_a_decision_needs_twice_the_odds_of_its_level_as_there_are_two_bettors() -> None:
    level = normal.cdf(1.0)
    above = {n: float(log_wealth(n, n, level)[0]) for n in range(1, 60)}
    alpha = 0.01
    barely = next(n for n, wealth in above.items() if wealth >= -math.log(alpha))
    enough = next(n for n, wealth in above.items() if wealth >= -math.log(alpha / 2))
    assert barely < enough
    for n, answer, says in ((barely, "undecided", ABSTAIN), (enough, "yes", 1)):
        evidence = {"selection": [0, 9], "count": n, "n": n, "radius": 1.0, "answer": answer}
        assert certified("sequential", evidence, alpha=alpha, norm=2, scope="input", noise=UNIT).prediction == says


def test_a_forged_decision_does_not_verify() -> None:
    from dataclasses import replace

    smoothed = rrl.Smoothed(half_space(np.array([1.0]), 0.0), UNIT, seed=0)
    certificate: RadiusCertificate = smoothed.decide(np.array([[1.5]]), 1.0)[0]
    lie = {**certificate.evidence, "radius": 1.4}
    with pytest.raises(CertificateError, match="the counts say 'undecided'"):
        replace(certificate, radius=1.4, evidence=lie).verify()
