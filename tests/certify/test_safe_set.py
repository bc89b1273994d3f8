"""Certificates of safe sets: values that hold, files that survive, forgeries that do not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents.ase.small import STAYS, hidden_danger, late_proof, random_world, world
from scipy.stats import binom

from robustrl.agents.ase import ASE
from robustrl.certify.safe_set import Evidence, SafeSetCertificate
from robustrl.certify.transitions import l1_radius, support_samples
from robustrl.errors import CertificateError
from robustrl.mdp import Analogy


@pytest.fixture(scope="module")
def agent() -> ASE:
    return ASE(late_proof(), seed=0).learn(700)


@pytest.fixture(scope="module")
def certificate(agent: ASE) -> SafeSetCertificate:
    return agent.certificate()


def test_it_states_what_the_agent_has_proven(agent: ASE, certificate: SafeSetCertificate) -> None:
    assert certificate.certified
    assert (certificate.pairs == agent.safe_set).all()
    assert certificate.alpha == pytest.approx(0.05)
    assert certificate.n_support == support_samples(0.3, 0.025, certificate.n_pools)
    assert certificate.value_lower is not None
    assert certificate.value_upper is not None
    certificate.verify()
    assert "A2" in " ".join(certificate.not_covered)
    assert f"{agent.safe_set.sum()} of 7" in certificate.table()
    assert "95% with the values" in certificate.table()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("runs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_the_return_lies_between_the_bounds(runs: int) -> None:
    """Random worlds at delta_s + delta_p = 0.2, each run looked at three times."""
    left, widths = 0, []
    for seed in range(runs):
        of = random_world(seed % 20)
        found = ASE(of, seed=seed, delta=0.2)
        outside = False
        for _ in range(3):
            found.learn(60, reset_num_timesteps=False)
            certificate = found.certificate()
            assert certificate.value_lower is not None
            assert certificate.value_upper is not None
            value = of.value(np.where(found.safe_set.any(1), found.greedy(), -1))
            outside |= not certificate.value_lower <= value <= certificate.value_upper
        left += outside
        widths.append(certificate.value_gap)
    assert left <= binom.ppf(0.999, runs, 0.2)
    assert np.isfinite(widths).all()


def test_the_bounds_close_with_the_square_root_of_the_draws() -> None:
    widths = []
    for steps in (500, 2000, 8000):
        found = ASE(late_proof(), seed=1).learn(steps)
        widths.append(found.certificate().value_gap)
    assert 1.5 < widths[0] / widths[1] < 2.7
    assert 1.5 < widths[1] / widths[2] < 2.7


@pytest.mark.parametrize("l1", [0.0, 0.2])
def test_the_bounds_of_a_bandit_are_those_of_the_radius(l1: float) -> None:
    """By hand: with probability q the episode ends and pays 1, else one tries again: V = q / (1 - 0.9 (1 - q)). The radius moves
    half of itself, and what an analogue adds, from one outcome to the other."""
    moves = {
        (0, 0): [(2, 0.7, 1.0, "end"), (0, 0.3, 0.0, "")],
        (0, 1): [(1, 0.5, 0.0, ""), (0, 0.5, 0.0, "")],
        (1, 0): [(0, 0.6, 0.0, ""), (1, 0.4, 0.0, "")],
    }
    of = world(3, moves, [(0, 0), (0, 1), (1, 0)], [((0, 0), (1, 0))] if l1 else [], l1=l1)
    found = ASE(of, seed=0)
    for i in range(400):
        found._observe(0, 0, int(i % 10 < 3), 0, False)
        if l1:
            found._observe(1, 0, int(i % 10 < 3), 0, False)
    n, pools = (800, 3) if l1 else (400, 3)
    moved = l1_radius(n, 2, 0.025 / pools) / 2 + l1 / 4  # half of the draws are the analogue's
    certificate = found.certificate()
    assert certificate.n_pools == pools
    low, high = (q / (1 - 0.9 * (1 - q)) for q in (0.7 - moved, 0.7 + moved))
    assert certificate.value_lower == pytest.approx(low, abs=1e-4)
    assert certificate.value_upper == pytest.approx(high, abs=1e-4)
    assert certificate.value_lower <= low
    assert certificate.value_upper >= high


def test_nothing_is_certified_with_too_few_draws_and_no_values_without_a_radius_that_holds() -> None:
    hasty = ASE(hidden_danger(), seed=0, n_support=2).learn(1).certificate()
    assert not hasty.certified
    assert hasty.value_lower is hasty.value_upper is None
    assert any(sentence.startswith("Nothing") for sentence in hasty.not_covered)
    guessed = ASE(late_proof(), seed=0, confidence="weissman").learn(30).certificate()
    assert guessed.certified
    assert guessed.value_gap is None
    for found in (hasty, guessed):
        found.verify()


@pytest.mark.parametrize("sharing", ["pool", "best"])
def test_it_survives_a_file(sharing: str, tmp_path: Path) -> None:
    written = ASE(random_world(13), seed=0, sharing=sharing).learn(300).certificate()  # type: ignore[arg-type]
    written.save(tmp_path / "safe.json")
    read = SafeSetCertificate.load(tmp_path / "safe.json")
    assert read == written
    assert hash(read) == hash(written)
    assert (read.pairs == written.pairs).all()
    read.verify()


def forged(certificate: SafeSetCertificate, **changes: object) -> SafeSetCertificate:
    return replace(certificate, **changes)  # type: ignore[arg-type]


def test_forgeries_are_found(certificate: SafeSetCertificate) -> None:
    evidence = certificate.evidence
    fewer = certificate.pairs & ~evidence.safe_set
    for field, value in (
        ("pairs", fewer),
        ("value_lower", certificate.value_lower + 0.01),  # type: ignore[operator]
        ("value_upper", certificate.value_upper - 0.01),  # type: ignore[operator]
        ("certified", False),
        ("not_covered", certificate.not_covered[1:]),
    ):
        with pytest.raises(CertificateError, match=field):
            forged(certificate, **{field: value}).verify()
    with pytest.raises(CertificateError, match="certified"):
        forged(certificate, n_support=3).verify()
    with pytest.raises(CertificateError, match="certified"):
        forged(certificate, tau=0.1).verify()
    with pytest.raises(CertificateError, match="n_pools"):
        forged(certificate, n_pools=1).verify()
    counts = np.where(evidence.counts > 0, 1, 0)
    with pytest.raises(CertificateError, match="pairs"):
        forged(certificate, evidence=evidence._replace(counts=counts)).verify()
    with pytest.raises(ValueError, match="alpha"):
        forged(certificate, alpha=0.01)


def test_edited_files_are_refused(certificate: SafeSetCertificate, tmp_path: Path) -> None:
    path = tmp_path / "safe.json"
    certificate.save(path)
    document = json.loads(path.read_text())
    edits: list[tuple[str, object]] = [("tau", 0.5), ("value_lower", 1.0), ("pairs", [99]), ("pairs", [True]), ("n_pools", 0)]
    for name, value in edits:
        path.write_text(json.dumps({**document, name: value}))
        with pytest.raises(CertificateError):
            SafeSetCertificate.load(path)
    for name, value in (
        ("data", "AAAA"),
        ("sha256", "0"),
        ("encoding", "pickle"),
        ("arrays", [["counts", "O", [1]]]),
        ("arrays", []),
    ):
        path.write_text(json.dumps({**document, "evidence": {**document["evidence"], name: value}}))
        with pytest.raises(CertificateError):
            SafeSetCertificate.load(path)


def test_a_policy_that_leaves_the_set_has_no_value() -> None:
    hasty = ASE(late_proof(), seed=0).learn(5).certificate()
    policy = hasty.evidence.policy.copy()
    policy[0] = 1
    assert not hasty.pairs[0, 1]
    with pytest.raises(CertificateError, match="policy"):
        forged(hasty, evidence=hasty.evidence._replace(policy=policy)).verify()


FORGERIES: list[tuple[str, object]] = [
    ("extra", lambda e: e.extra - 0.05),
    ("extra", lambda e: e.extra * np.nan),
    ("extra", lambda e: e.extra[0]),
    ("extra", lambda e: np.zeros(())),
    ("counts", lambda e: e.counts.astype(float)),
    ("counts", lambda e: -e.counts),
    ("counts", lambda e: e.counts[:1]),
    ("counts", lambda e: e.counts + ~e.outcomes.candidates),
    ("pool_of", lambda e: e.pool_of[:2]),
    ("pool_of", lambda e: e.pool_of[..., None] * np.ones(3, dtype=int)),
    ("pool_of", lambda e: e.pool_of * np.nan),
    ("safe_set", lambda e: np.zeros_like(e.safe_set)),
    ("safe_set", lambda e: e.safe_set & (np.arange(len(e.safe_set)) != 1)[:, None]),  # state 0 leads to state 1
    ("safe_set", lambda e: e.safe_set & (np.arange(len(e.safe_set)) != 0)[:, None]),  # the start
    ("policy", lambda e: np.full_like(e.policy, -1)),
    ("policy", lambda e: np.where(e.policy < 0, -7, e.policy)),
    ("policy", lambda e: e.policy + 100),
    ("policy", lambda e: e.policy[:2]),
    ("policy", lambda e: e.policy.astype(float)),
    ("policy", lambda e: np.where(e.policy < 0, 0, e.policy)),
]


@pytest.mark.parametrize(("field", "forge"), FORGERIES)
def test_evidence_that_no_learner_can_have_seen_is_refused(field: str, forge: Any, certificate: SafeSetCertificate) -> None:
    evidence = certificate.evidence._replace(**{field: forge(certificate.evidence)})
    with pytest.raises(CertificateError, match=f"from its evidence: {field} must"):
        forged(certificate, evidence=evidence).verify()


@pytest.mark.parametrize(("field", "table"), [("counts", np.eye(2, dtype=int)), ("extra", np.array([0.1, 0.2]))])
def test_pairs_of_one_pool_have_its_draws(field: str, table: np.ndarray) -> None:
    """Else one pool, and the few draws that prove it, could stand for all pairs."""
    of = world(2, STAYS, [(0, 0), (1, 0)], [])
    parts: dict[str, Any] = {"counts": np.ones((2, 1, 2), dtype=int), "extra": np.zeros((2, 1))}
    evidence = Evidence(
        of.outcomes, of.safe_set, parts["counts"], parts["extra"], np.zeros((2, 1), dtype=int), np.zeros(2, dtype=int)
    )
    n_support = support_samples(0.3, 0.025, 1)
    assert SafeSetCertificate.of(evidence, delta_s=0.025, delta_p=0.025, tau=0.3, n_support=n_support, n_pools=1).certified
    other = evidence._replace(**{field: parts[field] + table.reshape(parts[field].shape)})
    with pytest.raises(ValueError, match=f"{field} must be the same for all pairs of a pool"):
        SafeSetCertificate.of(other, delta_s=0.025, delta_p=0.025, tau=0.3, n_support=n_support, n_pools=1)


def test_a_policy_acts_wherever_it_can() -> None:
    of = world(2, STAYS, [(0, 0), (1, 0)], [])
    nothing = np.zeros((2, 1), dtype=int)
    evidence = Evidence(of.outcomes, of.safe_set, np.ones((2, 1, 2), dtype=int), nothing * 0.0, nothing, np.array([0, -1]))
    n_support = support_samples(0.3, 0.025, 1)
    with pytest.raises(ValueError, match="policy must choose pairs of the safe set, in every state that owns one"):
        SafeSetCertificate.of(evidence, delta_s=0.025, delta_p=0.025, tau=0.3, n_support=n_support, n_pools=1)


def test_a_first_set_that_may_meet_danger_without_leaving_is_refused(certificate: SafeSetCertificate) -> None:
    """A cliff: the step is dangerous, and goes on inside the set."""
    known = certificate.evidence.outcomes
    outcomes = replace(known, dangerous=known.candidates & certificate.evidence.safe_set[..., None])
    with pytest.raises(CertificateError, match="safe_set must .* be free of danger"):
        forged(certificate, evidence=certificate.evidence._replace(outcomes=outcomes)).verify()


def test_draws_without_number_do_not_overflow() -> None:
    of = world(1, {(0, 0): [(0, 0.5, 0.0, ""), (0, 0.5, 1.0, "")]}, [(0, 0)], [], tau=0.5)
    none = np.zeros((1, 1))
    evidence = Evidence(of.outcomes, of.safe_set, np.full((1, 1, 2), 2**62), none, none.astype(int), np.zeros(1, dtype=int))
    found = SafeSetCertificate.of(evidence, delta_s=0.025, delta_p=0.025, tau=0.5, n_support=7, n_pools=1)
    assert found.value_lower == pytest.approx(5, abs=1e-4)
    assert found.value_upper == pytest.approx(5, abs=1e-4)


def test_pairs_that_no_start_leads_to_are_not_added() -> None:
    """State 2 is part of the first safe set but never entered: n_pools does not cover what would extend the set there."""
    moves = {(s, 0): [(s, 1.0, 0.0, "")] for s in range(3)} | {(2, 1): [(2, 0.5, 0.0, ""), (0, 0.5, 0.0, "")]}
    of = world(3, moves, [(0, 0), (1, 0), (2, 0)], [], tau=0.5)
    counts = of.outcomes.candidates * np.array([50, 50])
    evidence = Evidence(
        of.outcomes, of.safe_set, counts, np.zeros((3, 2)), np.arange(6).reshape(3, 2), np.zeros(3, dtype=int)
    )  # fmt: skip
    found = SafeSetCertificate.of(evidence, delta_s=0.025, delta_p=0.025, tau=0.5, n_support=7, n_pools=1)
    assert found.certified
    assert (found.pairs == of.safe_set).all()
    started = evidence._replace(outcomes=replace(of.outcomes, start=np.full(3, 1 / 3)))
    assert SafeSetCertificate.of(started, delta_s=0.025, delta_p=0.025, tau=0.5, n_support=9, n_pools=4).pairs[2, 1]


def test_what_is_retracted_is_out_of_the_certificate() -> None:
    """A false class, or a tau that is too large: the agent goes on, and its certificate says the same as it, proving nothing."""
    moves = {
        (0, 0): [(0, 0.7, 0.0, ""), (1, 0.3, 0.0, "")],
        (1, 0): [(0, 0.7, 0.0, ""), (1, 0.3, 0.0, "")],
        (1, 1): [(0, 0.7, 0.5, ""), (1, 0.3, 0.5, "")],
    }
    blind = world(2, moves, [(0, 0), (1, 0)], [], tau=0.95, open_=False)
    blind.analogy = Analogy.classes([[0, 5], [0, 0]])
    wall = world(
        2,
        {
            (0, 0): [(0, 0.5, 0.0, ""), (1, 0.5, 0.0, "")],
            (1, 0): [(1, 0.45, 0.0, ""), (0, 0.45, 0.0, ""), (0, 0.1, 0.5, "")],
        },
        [(0, 0), (1, 0)],
        [],
        tau=0.1,
        open_=False,
    )
    wall.analogy = Analogy.classes([[0], [0]])
    for of in (blind, wall):
        contradicted = 0
        for seed in range(8):
            agent = ASE(of, seed=seed, on_violation="retract").learn(300)
            found = agent.certificate()
            assert (found.pairs == agent.safe_set).all()
            assert found.certified is not found.contradicted
            found.verify()
            contradicted += found.contradicted
        assert contradicted


@pytest.mark.parametrize("seed", range(4))
def test_the_best_analogue_may_be_near_rather_than_equal(seed: int) -> None:
    """At every moment the certificate can be made, says what the agent believes, and can be verified."""
    first = (0.6, 0.55, 0.5, 0.52, 0.58, 0.5)
    to = {(0, 0): (1, 0), (1, 0): (0, 1), (0, 1): (1, 2), (1, 1): (0, 2), (2, 0): (0, 1), (2, 1): (0, 2)}
    of = world(
        3,
        {pair: [(ends[0], p, 0.0, ""), (ends[1], 1 - p, 0.3, "")] for (pair, ends), p in zip(to.items(), first, strict=True)},
        [(0, 0), (1, 0)],
        [(x, y) for x, y in itertools.combinations(to, 2)],
        tau=0.4,
        l1=0.2,
    )
    agent = ASE(of, seed=seed, sharing="best")
    for _ in range(20):
        found = agent.learn(8, reset_num_timesteps=False).certificate()
        assert (found.pairs == agent.safe_set).all()
        found.verify()
    assert found.pairs.sum() == 6


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_bounds_are_as_tight_in_whatever_unit_rewards_are_paid(unit: float) -> None:
    def bounds(of: float) -> tuple[float, float]:
        moves = {
            (0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
            (1, 0): [(0, 0.7, 0.5 * of, ""), (1, 0.3, 0.0, "")],
            (1, 1): [(1, 1.0, of, "end")],
        }
        certificate = ASE(world(2, moves, list(moves), [], tau=0.3), seed=0).learn(300).certificate()
        return certificate.value_lower, certificate.value_upper

    assert np.array(bounds(unit)) / unit == pytest.approx(np.array(bounds(1.0)), rel=1e-5)
