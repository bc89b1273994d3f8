"""Certificates of safe sets: values that hold, files that survive, forgeries that do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from agents.ase.small import hidden_danger, late_proof, random_world, world
from scipy.stats import binom

from robustrl.agents.ase import ASE
from robustrl.certify.safe_set import SafeSetCertificate
from robustrl.certify.transitions import l1_radius, support_samples
from robustrl.errors import CertificateError


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
def test_the_return_lies_between_the_bounds() -> None:
    """60 runs over random worlds at delta_s + delta_p = 0.2, each looked at three times."""
    runs, left, widths = 60, 0, []
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
