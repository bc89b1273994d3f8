"""When to keep weights, and when to go back to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from robustrl.training.supervised import CollapseGuard, EarlyStopping


def indices_kept(values: Any) -> tuple[list[int], EarlyStopping]:
    stopping = EarlyStopping()
    return [i for i, value in enumerate(values) if stopping.update(value)], stopping


def test_curve_of_robust_overfitting_is_stopped_at_its_best_epoch() -> None:
    """A curve of the published shape: robust accuracy rises, jumps when the learning rate falls at epoch 100, peaks at 102 and
    decays for 98 epochs, with noise of the size of a hold-out of 1,000."""
    noise = np.random.default_rng(0).normal(0, 0.004, 200)
    epochs = np.arange(200)
    curve = np.where(epochs < 100, 0.44 - 0.15 * np.exp(-epochs / 15), 0.54 - 0.0009 * (epochs - 100)) + noise
    curve[102] = 0.553
    kept, stopping = indices_kept(curve)
    assert stopping.best_index == kept[-1] == 102
    assert stopping.best == 0.553
    assert not stopping.finished


def test_first_of_equals_is_kept() -> None:
    kept, stopping = indices_kept([0.25, 0.5, 0.5, 0.25, 0.5])
    assert kept == [0, 1]
    assert stopping.best_index == 1


@pytest.mark.parametrize(("patience", "length"), [(1, 4), (2, 5), (3, 9)])
def test_patience_counts_evaluations_without_a_better_one(patience: int, length: int) -> None:
    stopping, seen = EarlyStopping(patience), 0
    for value in (0.1, 0.2, 0.3, 0.3, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1):
        stopping.update(value)
        seen += 1
        if stopping.finished:
            break
    assert seen == length


def test_nothing_is_finished_before_it_began() -> None:
    assert not EarlyStopping(1).finished


def test_nan_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match="value"):
        EarlyStopping().update(math.nan)


HEALTHY = {"best": 0.5, "pgd": 0.45, "fgsm": 0.55, "cosine": 0.9}


@pytest.mark.parametrize(
    ("change", "collapsed"),
    [
        ({}, False),
        ({"pgd": 0.36, "fgsm": 0.4}, False),
        ({"pgd": 0.34, "fgsm": 0.4}, True),
        ({"fgsm": 0.69}, False),
        ({"fgsm": 0.71}, True),
        ({"cosine": 0.21}, False),
        ({"cosine": 0.19}, True),
        ({"cosine": math.nan}, False),
        ({"best": -math.inf}, False),
        ({"best": 0.42, "pgd": 0.05, "fgsm": 0.05}, True),
    ],
)
def test_each_sign_alone_is_a_collapse(change: dict[str, float], collapsed: bool) -> None:
    assert CollapseGuard().collapsed(**{**HEALTHY, **change}) is collapsed


def test_slow_collapse_is_measured_from_the_best_not_from_the_last() -> None:
    """Drops of 0.06 each: a guard of consecutive epochs would see none of them."""
    guard, best, found = CollapseGuard(), -math.inf, []
    for accuracy in (0.4, 0.5, 0.44, 0.38, 0.32):
        found.append(guard.collapsed(best, accuracy, accuracy, 1.0))
        best = max(best, accuracy)
    assert found == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"drop": 0}, "drop"),
        ({"gap": -1}, "gap"),
        ({"factor": 1.0}, "factor"),
        ({"most": 0}, "most"),
        ({"cosine": math.nan}, "cosine"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CollapseGuard(**settings)


def test_patience_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping(0)
