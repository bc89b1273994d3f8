"""Evidence that is impossible, or from which the claim does not follow, is refused, whoever wrote it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import robustrl as rrl
from robustrl.certify.classify import certified, radius_from_counts
from robustrl.errors import CertificateError
from robustrl.noise import Gaussian, Laplace, Noise, Uniform, UniformBall

UNIT = Gaussian(1.0)
COUNT: dict[str, Any] = {"selection": [1, 9], "count": 900, "n": 1000}
SPLIT: dict[str, Any] = {"inner": 0.001, "norm1": 0.1, "norm2": 0.1, "n1": 500, "n2": 500}
HONEST: dict[str, dict[str, Any]] = {
    "one-sided": COUNT,
    "two-sided": {"selection": [1, 9, 0], "counts": [60, 900, 40], "n": 1000},
    "sequential": {"selection": [1, 9], "count": 990, "n": 1000, "radius": 1.0, "answer": "yes"},
    "second-order": COUNT | {"gradient": SPLIT},
    "second-order-pairs": COUNT | {"gradient": {"mean_inner": 0.01, "n_pairs": 500, "n_features": 2}},
    "dipole": {"selection": [1, 9], "both": 400, "exactly_one": 90, "n_pairs": 500},
    "values": {"prediction": 1, "sums": [100.0, 900.0], "n": 1000, "bounds": [0.0, 1.0]},
}


def judged(method: str, evidence: dict[str, Any], noise: Noise = UNIT) -> Any:
    return certified(method, evidence, alpha=0.01, norm=2, scope="input", noise=noise)


@pytest.mark.parametrize("method", HONEST)
def test_honest_evidence_certifies(method: str) -> None:
    certificate = judged(method, HONEST[method])
    assert certificate.prediction == 1
    assert certificate.radius > 0
    certificate.verify()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("values", {"bounds": [1.0, 0.0]}),
        ("values", {"bounds": [0.0, math.inf]}),
        ("values", {"sums": ["100", "900"]}),
        ("values", {"sums": [100.0, 1200.0]}),
        ("values", {"n": 10**300}),
        ("second-order", {"gradient": SPLIT | {"n1": 10**12, "n2": 10**12}}),
        ("second-order", {"gradient": SPLIT | {"inner": -1e9}}),
        ("second-order", {"gradient": SPLIT | {"inner": -1e9, "norm2": 0.0}}),
        ("second-order", {"gradient": SPLIT | {"norm2": -0.1}}),
        ("second-order", {"gradient": HONEST["second-order-pairs"]["gradient"]}),
        ("second-order-pairs", {"gradient": SPLIT}),
        ("second-order-pairs", {"gradient": {"mean_inner": -1e9, "n_pairs": 10**9, "n_features": 1}}),
        ("sequential", {"answer": "no"}),
        ("sequential", {"answer": None}),
        ("sequential", {"count": 84, "n": 100, "answer": "no"}),
        ("sequential", {"count": 84, "n": 100, "answer": "yes"}),
        ("two-sided", {"selection": [1, 9]}),
        ("two-sided", {"counts": [100.0, 900.0, 0.0]}),
        ("dipole", {"both": 450, "exactly_one": 90}),
        *[
            (method, {"selection": bad})
            for method in ("one-sided", "second-order", "dipole")
            for bad in ([-5, 7], ["b", "a"], "abc", {}, None, [[1, 2], [3, 4]], [True, False], [0.5, 1.5], [0, 0], [])
        ],
        *[(method, {"extra": 1}) for method in HONEST],
        *[(method, {"dimension": 3}) for method in HONEST],
        *[(method, {"rounding": -0.5}) for method in HONEST],
        *[(method, {"rounding": math.nan}) for method in HONEST],
    ],
)
def test_impossible_evidence_is_refused(method: str, changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        judged(method, HONEST[method] | changes)


def test_one_class_is_chosen_one_way() -> None:
    with pytest.raises(ValueError, match="one of prediction and selection"):
        judged("one-sided", COUNT | {"prediction": 5})
    with pytest.raises(ValueError, match="one of prediction and selection"):
        judged("one-sided", {"count": 900, "n": 1000})


def test_evidence_of_a_stopped_run_is_none_of_a_fixed_one() -> None:
    certificate = judged("sequential", HONEST["sequential"])
    with pytest.raises(CertificateError, match="evidence must hold"):
        replace(certificate, method="one-sided").verify()


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_a_radius_may_not_be_stretched_at_any_scale(scale: float) -> None:
    certificate = radius_from_counts(Gaussian(scale), 990, 1000, alpha=0.05)
    certificate.verify()
    for lie in (certificate.radius * (1 + 1e-9), max(certificate.radius * 2, 9e-14)):
        with pytest.raises(CertificateError, match="radius"):
            replace(certificate, radius=lie).verify()


# ------------------------------------------------------------------------------------------------ single precision


def step_at(place: float) -> Any:
    def base(rows: Tensor) -> Tensor:
        return torch.stack((place - rows[:, 0], rows[:, 0] - place), dim=1)

    return base


@pytest.mark.parametrize("noise", [Gaussian(1.0), Laplace(1.0), Uniform(1.0), UniformBall(1.0, 1)])
def test_noise_that_drowns_in_single_precision_is_refused(noise: Noise) -> None:
    with pytest.raises(ValueError, match="single precision"):
        rrl.Smoothed(step_at(1.7e9), noise).certify(np.array([[1.7e9 + 63.9]]))
    with pytest.raises(ValueError, match="single precision"):
        rrl.Smoothed(step_at(1.0), Gaussian(1e-10)).certify(np.array([[1.0]]))


def test_what_single_precision_moves_an_input_is_taken_off_its_radius() -> None:
    x = np.full((1, 3), 0.1 + 2.0**-27)
    moved = np.abs(x - x.astype(np.float32)).sum()
    double, single = (
        rrl.Smoothed(lambda rows: rows[:, :2] * torch.tensor([1.0, -1.0]), Uniform(0.3), seed=0).certify(point, n=2000)[0]
        for point in (x, x.astype(np.float32))
    )
    assert moved > 0
    assert double.radius < single.radius
    assert double.radius == pytest.approx(single.radius - moved, rel=1e-12)
    assert double.evidence["rounding"] >= moved
    double.verify()
    with pytest.raises(CertificateError, match="radius"):
        replace(double, radius=single.radius).verify()
