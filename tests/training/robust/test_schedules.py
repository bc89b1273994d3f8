"""Radii that grow: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from robustrl.training.robust import Constant, Linear, Schedule, Smoothed


def test_a_linear_schedule_is_a_straight_line_between_its_ends() -> None:
    schedule = Linear(0.2, 0.7)
    done = [0.0, 0.2, 0.45, 0.7, 1.0]
    assert [schedule(1 - part) for part in done] == pytest.approx([0, 0, 0.5, 1, 1])


def test_a_smoothed_schedule_is_quartic_in_its_first_quarter_and_its_tangent_after_it() -> None:
    """a t^4, then a (m^4 + 4 m^3 (t - m)) with m = 1/4; 1 at 1: a = 256 / 13."""
    schedule, a = Smoothed(0.0, 1.0), 256 / 13
    t = np.linspace(0, 1, 101)
    expected = np.where(t <= 0.25, a * t**4, a * (1 / 256 + (t - 0.25) / 16))
    np.testing.assert_allclose([schedule(1 - part) for part in t], expected, rtol=1e-9, atol=1e-12)
    assert schedule(0.0) == 1.0
    assert Smoothed(0.25, 0.75)(1 - 0.5) == pytest.approx(schedule(0.5))


def test_a_constant_schedule_is_the_whole_radius_from_its_start() -> None:
    assert [Constant()(remaining) for remaining in (1.0, 0.5, 0.0)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", [Linear, Smoothed])
def test_ends_that_meet_are_a_jump(kind: type[Schedule]) -> None:
    assert (kind(0.5, 0.5)(0.51), kind(0.5, 0.5)(0.5)) == (0.0, 1.0)


@pytest.mark.parametrize("ends", [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_ends_outside_training_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="start and end must satisfy"):
        Linear(*ends)
