"""The threat model and the ledger that holds an attacker to its budget, run by run."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from robustrl.errors import BudgetExceededError
from robustrl.noise import Gaussian
from robustrl.threat import Ledger, ThreatModel


def _frames(*norms: float) -> np.ndarray:
    """One frame of 4 entries per row whose l0 = 1 perturbation has the given size."""
    return np.array([[0.0, size, 0.0, 0.0] for size in norms])


CLEAN2 = np.zeros((2, 4))


# ------------------------------------------------------------------------------------------------------- the ledger


def test_l2_budgets_add_up_as_squares_within_an_episode_and_per_slot() -> None:
    ledger = Ledger(ThreatModel(norm=2, episode=1.0), 2)
    assert_allclose(ledger.charge(CLEAN2, _frames(0.6, 0.3)), [0.6, 0.3])
    assert_allclose(ledger.spent, [0.6, 0.3])
    assert_allclose(ledger.remaining, [0.8, math.sqrt(0.91)])
    assert_allclose(ledger.allowance, ledger.remaining)
    ledger.charge(CLEAN2, _frames(0.8, 0.4))
    assert_allclose(ledger.spent, [1.0, 0.5])
    assert_allclose(ledger.remaining, [0.0, math.sqrt(0.75)], atol=1e-7)


def test_l1_budgets_add_up_linearly_and_linf_limits_single_steps() -> None:
    l1 = Ledger(ThreatModel(norm=1, episode=1.0), 1)
    for _ in range(4):
        l1.charge(np.zeros((1, 4)), np.full((1, 4), 0.0625))
    assert_allclose(l1.remaining, [0.0], atol=1e-15)
    linf = Ledger(ThreatModel(norm=math.inf, step=0.1), 1)
    for _ in range(50):
        assert_allclose(linf.charge(np.zeros((1, 4)), np.full((1, 4), 0.1)), [0.1])
    assert_allclose(linf.allowance, [0.1])
    assert_array_equal(linf.remaining, [math.inf])
    assert_allclose(linf.spent, [0.1])


def test_l0_budgets_count_altered_frames_and_their_step_limit_counts_entries() -> None:
    ledger = Ledger(ThreatModel(norm=0, step=2, episode=2), 2)
    ledger.charge(CLEAN2, np.array([[9.0, -9.0, 0, 0], [0, 0, 0, 0]]))
    assert_array_equal(ledger.spent, [1.0, 0.0])
    assert_array_equal(ledger.allowance, [2.0, 2.0])
    ledger.charge(CLEAN2, _frames(1e-300, 0.0))
    assert_array_equal(ledger.allowance, [0.0, 2.0])
    with pytest.raises(BudgetExceededError, match="slot 0"):
        ledger.charge(CLEAN2, _frames(1e-3, 0.0))
    with pytest.raises(BudgetExceededError, match="l0 norm 3 in slot 1"):
        ledger.charge(CLEAN2, np.array([[0.0] * 4, [1, 1, 1, 0]]))


@pytest.mark.parametrize(("norm", "size"), [(2, 1.0), (1, 1.0), (math.inf, 1.0)])
def test_one_millionth_over_the_budget_raises_and_books_nothing(norm: float, size: float) -> None:
    threat = ThreatModel(norm=norm, step=size) if norm == math.inf else ThreatModel(norm=norm, episode=size)
    ledger = Ledger(threat, 3)
    ledger.charge(np.zeros((1, 4)), _frames(0.5), np.array([1]))
    before = ledger.spent
    with pytest.raises(BudgetExceededError, match=r"norm 1.000001 in slot 2 exceeds the allowance 1\b"):
        ledger.charge(np.zeros((3, 4)), _frames(0.25, 0.25, 1 + 1e-6))
    assert_array_equal(ledger.spent, before)
    ledger.charge(np.zeros((3, 4)), _frames(0.25, 0.25, 1.0))


@pytest.mark.parametrize("norm", [1, 2])
def test_the_excess_cannot_be_split_over_many_steps(norm: float) -> None:
    """Float slack is charged like everything else: a thousand steps buy no more than one."""
    ledger, total = Ledger(ThreatModel(norm=norm, episode=0.3), 1), 0.0
    for _ in range(1000):
        size = float(ledger.allowance[0]) * 0.05
        ledger.charge(np.zeros((1, 1)), np.full((1, 1), size))
        total += size**norm
    for _ in range(1000):
        size = float(ledger.allowance[0]) * (1 + 0.9e-9) + 0.2e-12
        ledger.charge(np.zeros((1, 1)), np.full((1, 1), size))
        total += size**norm
    assert total ** (1 / norm) <= 0.3 * (1 + 3e-9)


def test_a_spent_budget_leaves_room_for_the_clean_frame_only() -> None:
    ledger = Ledger(ThreatModel(norm=2, episode=0.5), 1)
    ledger.charge(np.zeros((1, 4)), _frames(0.5))
    assert_array_equal(ledger.charge(np.ones((1, 4)), np.ones((1, 4))), [0.0])
    with pytest.raises(BudgetExceededError):
        ledger.charge(np.ones((1, 4)), np.ones((1, 4)) + 1e-6)


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_slack_follows_the_units_of_the_budget(scale: float) -> None:
    ledger = Ledger(ThreatModel(norm=2, step=scale), 1)
    ledger.charge(np.zeros((1, 4)), _frames(scale))
    with pytest.raises(BudgetExceededError):
        ledger.charge(np.zeros((1, 4)), _frames(scale * (1 + 1e-6)))


def test_small_perturbations_of_large_float32_frames_are_measured_in_double_precision() -> None:
    """Summed in float32, ten thousand charges of (1e-4)^2 on top of 25 would be lost."""
    ledger = Ledger(ThreatModel(norm=2, episode=10.0), 1)
    ledger.charge(np.zeros((1, 1), dtype=np.float32), np.full((1, 1), 5.0, dtype=np.float32))
    for _ in range(10_000):
        ledger.charge(np.zeros((1, 1), dtype=np.float32), np.full((1, 1), 1e-4, dtype=np.float32))
    assert np.float32(25.0) + np.float32(1e-8) == np.float32(25.0)
    assert float(ledger.spent[0]) == pytest.approx(math.sqrt(25 + 1e4 * float(np.float32(1e-4)) ** 2), rel=1e-11)
    assert ledger.spent.dtype == ledger.remaining.dtype == ledger.allowance.dtype == np.float64


def test_the_delivered_perturbation_is_charged_not_the_proposed_one() -> None:
    """1e9 + 20 rounds to 1e9 + 0 in float32 and 1e9 + 40 to 1e9 + 64: that is what the policy receives."""
    ledger = Ledger(ThreatModel(norm=2, episode=100.0), 1)
    clean = np.full((1, 1), 1e9, dtype=np.float32)
    assert_array_equal(ledger.charge(clean, clean + np.float32(20)), [0.0])
    assert_array_equal(ledger.charge(clean, clean + np.float32(40)), [64.0])


def test_grey_levels_do_not_wrap_around() -> None:
    ledger = Ledger(ThreatModel(norm=math.inf, step=10, units="uint8"), 1)
    clean, delivered = np.array([[5, 250]], dtype=np.uint8), np.array([[0, 255]], dtype=np.uint8)
    assert_array_equal(ledger.charge(clean, delivered), [5.0])


def test_step_and_episode_limits_hold_together() -> None:
    ledger = Ledger(ThreatModel(norm=2, step=0.6, episode=1.0), 1)
    ledger.charge(np.zeros((1, 4)), _frames(0.6))
    assert_allclose(ledger.allowance, [0.6])
    ledger.charge(np.zeros((1, 4)), _frames(0.6))
    assert_allclose(ledger.allowance, [math.sqrt(1 - 0.72)])
    with pytest.raises(BudgetExceededError):
        ledger.charge(np.zeros((1, 4)), _frames(0.6))


def test_a_reset_gives_back_the_budget_of_the_named_rows_only() -> None:
    ledger = Ledger(ThreatModel(norm=2, episode=1.0), 3)
    ledger.charge(np.zeros((3, 4)), _frames(0.5, 0.6, 0.7))
    ledger.reset(np.array([1]))
    assert_allclose(ledger.spent, [0.5, 0.0, 0.7])
    ledger.reset()
    assert_array_equal(ledger.spent, np.zeros(3))


def test_rows_can_be_named_by_number_or_by_mask_but_not_twice() -> None:
    ledger = Ledger(ThreatModel(norm=1, episode=1.0), 3)
    ledger.charge(CLEAN2, _frames(0.1, 0.2), np.array([2, 0]))
    ledger.charge(CLEAN2, _frames(0.1, 0.2), np.array([True, False, True]))
    assert_allclose(ledger.spent, [0.3, 0.0, 0.3])
    with pytest.raises(ValueError, match="slots must name each row at most once"):
        ledger.charge(CLEAN2, _frames(0.1, 0.2), np.array([0, 0]))
    assert ledger.charge(np.zeros((0, 4)), np.zeros((0, 4)), np.array([], dtype=np.int64)).shape == (0,)


def test_masked_entries_are_protected() -> None:
    everywhere = ThreatModel(norm=2, episode=1.0)
    assert everywhere.attackable((2, 3)).all()
    per_channel = ThreatModel(norm=2, episode=1.0, mask=(True, False))
    assert_array_equal(per_channel.attackable((3, 2)), [[True, False]] * 3)
    whole_frame = ThreatModel(norm=2, episode=1.0, mask=(True, True, False, False, True, True))
    assert_array_equal(whole_frame.attackable((3, 2)), [[True, True], [False, False], [True, True]])
    for threat, touched in ((per_channel, (0, 0, 1)), (whole_frame, (0, 1, 0))):
        ledger, delivered = Ledger(threat, 1), np.zeros((1, 3, 2))
        delivered[0, 0, 0] = 0.5
        ledger.charge(np.zeros((1, 3, 2)), delivered)
        delivered[touched] = 1e-9
        with pytest.raises(ValueError, match="delivered frames differ in entries that the threat model's mask protects"):
            ledger.charge(np.zeros((1, 3, 2)), delivered)
    with pytest.raises(ValueError, match=r"mask of 2 entries does not fit frames of shape \(2, 3\)"):
        per_channel.attackable((2, 3))


def test_a_budget_that_holds_only_on_average_breaks_the_bound() -> None:
    """Spending 2 B with probability 1/4 has E sum ||e||^2 = B^2, yet success falls to .8995 < .9076.

    p = .99, mu = B / sigma = 1: the theorem (Kumar, Levine, Feizi 2022) needs the budget in every single run.
    """
    noise, p, budget, n = Gaussian(1.0), 0.99, 1.0, 400_000
    bound = float(noise.lower(p, budget))
    mixed = 0.75 * p + 0.25 * float(noise.lower(p, 2 * budget))
    assert bound == pytest.approx(0.9076, abs=5e-5)
    assert mixed == pytest.approx(0.8995, abs=5e-5)

    generator = np.random.default_rng(0)
    e = np.where(generator.random((n, 1)) < 0.25, 2 * budget, 0.0)
    assert float(np.mean(e**2)) == pytest.approx(budget**2, rel=0.02)
    success = float(np.mean(noise.perturb(e, generator) <= 2.3263478740408408))
    assert success == pytest.approx(mixed, abs=4 * math.sqrt(0.09 / n))
    assert success < bound - 0.005
    with pytest.raises(BudgetExceededError):
        Ledger(ThreatModel(norm=2, episode=budget), n).charge(np.zeros((n, 1)), e)


# ------------------------------------------------------------------------------------------------- the threat model


def test_a_threat_model_is_plain_data_and_compares_by_value() -> None:
    threat = ThreatModel(norm=2.0, episode=1, step=np.float32(0.5), mask=[True, False])  # type: ignore[arg-type]
    assert threat == ThreatModel(norm=2, step=0.5, episode=1.0, mask=(True, False))
    assert hash(threat) == hash(ThreatModel(norm=2, step=0.5, episode=1.0, mask=(True, False)))
    assert json.loads(json.dumps(threat.to_dict())) == {
        "norm": 2,
        "step": 0.5,
        "episode": 1.0,
        "units": "raw",
        "mask": [True, False],
    }
    assert ThreatModel(norm=math.inf, step=0.1).to_dict()["norm"] == "inf"
    assert (
        repr(ThreatModel(norm=2, episode=0.6))
        == "ThreatModel(norm=2, step=None, episode=0.6, units='raw', mask=None, scale=None)"
    )


def test_old_files_have_no_scale_and_new_ones_only_where_there_is_one() -> None:
    old = {"norm": "inf", "step": 0.1, "episode": None, "units": "raw", "mask": None}
    assert ThreatModel.from_dict(old) == ThreatModel(math.inf, step=0.1)
    assert ThreatModel.from_dict(old).to_dict() == old
    scaled = ThreatModel(1, step=0.1, scale=[1, 2.5], mask=(True, False))  # type: ignore[arg-type]
    assert scaled.to_dict()["scale"] == (1.0, 2.5)
    assert ThreatModel.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled
    for broken in ({"norm": 2}, old | {"sise": 1}, {**old, "scale": 3.0}):
        with pytest.raises(ValueError, match=r"not a threat model|scale"):
            ThreatModel.from_dict(broken)


@pytest.mark.parametrize("norm", [0, 1, 2, math.inf])
def test_the_ledger_charges_norms_in_units_per_coordinate(norm: float) -> None:
    scale, delta = np.array([0.5, 2.0, 4.0]), np.array([[1.0, -1.0, 0.0], [0.1, 0.0, 3.0]])
    expected = [np.count_nonzero(row) if norm == 0 else np.linalg.norm(row / scale, norm) for row in delta]
    ledger = Ledger(ThreatModel(norm, step=9, scale=tuple(scale)), 2)
    assert_allclose(ledger.charge(np.zeros((2, 3)), delta), expected, rtol=1e-15)
    pictures = Ledger(ThreatModel(norm, step=9, scale=tuple(scale)), 2)
    assert_allclose(pictures.charge(np.zeros((2, 1, 3)), delta[:, None]), expected, rtol=1e-15)
    with pytest.raises(BudgetExceededError):
        Ledger(ThreatModel(norm, step=min(expected) * 0.99, scale=tuple(scale)), 2).charge(np.zeros((2, 3)), delta)
    with pytest.raises(ValueError, match=r"scale of 3 entries does not fit frames of shape \(4,\)"):
        ledger.charge(CLEAN2, CLEAN2)


def test_the_covering_threat_contains_the_scaled_one_and_touches_it() -> None:
    """The largest ||d|| over ||d / scale|| <= r is r times the largest scale among attackable entries."""
    threat = ThreatModel(2, step=0.5, episode=2.0, scale=(0.5, 3.0, 1.0))
    assert threat.covering() == ThreatModel(2, step=1.5, episode=6.0)
    masked = ThreatModel(math.inf, step=0.5, scale=(0.5, 3.0, 1.0), mask=(True, False, True))
    assert masked.covering() == ThreatModel(math.inf, step=0.5, mask=(True, False, True))
    frame = ThreatModel(1, step=1.0, scale=(5.0, 2.0), mask=(False, True, False, False, False, True))
    assert frame.covering().step == 2.0
    assert ThreatModel(1, step=1.0, scale=(5.0, 2.0, 1.0, 7.0, 1.0, 1.0), mask=(True, False)).covering().step == 5.0
    assert ThreatModel(0, step=2, scale=(5.0, 2.0)).covering() == ThreatModel(0, step=2)
    plain = ThreatModel(2, step=0.5)
    assert plain.covering() is plain
    with pytest.raises(ValueError, match="mask of 2 entries does not fit a scale of 3"):
        ThreatModel(1, step=1.0, scale=(1.0, 2.0, 3.0), mask=(True, False)).covering()


@pytest.mark.parametrize(("epsilon", "level"), [(0.00392, 1), (1 / 255, 1), (0.01176, 3), (0.0, 0), (8 / 255, 8), (0.0314, 8)])
def test_literals_of_papers_mean_whole_grey_levels(epsilon: float, level: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        threat = ThreatModel.from_unit01(epsilon)
    assert threat == ThreatModel(math.inf, step=level, units="uint8")
    assert len(told) == (abs(255 * epsilon - level) > 1e-9)
    assert all(f"{level}/255" in str(one.message) for one in told)


def test_other_radii_keep_their_fractions() -> None:
    assert ThreatModel.from_unit01(0.01).step == pytest.approx(2.55, rel=1e-12)
    assert ThreatModel.from_unit01(0.00392, norm=2).step == pytest.approx(0.9996)
    with pytest.raises(ValueError, match="epsilon"):
        ThreatModel.from_unit01(math.nan)


def test_a_fraction_of_a_grey_level_is_floored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"step = 2\.55 of norm inf means 2 "):
        assert ThreatModel(math.inf, step=2.55, units="uint8").in_whole_levels().step == 2.0
    assert ThreatModel(math.inf, step=255 * (3 / 255), units="uint8").in_whole_levels().step == 3.0
    for kept in (ThreatModel(2, step=2.5), ThreatModel(math.inf, step=math.inf), ThreatModel(math.inf, step=2.5, scale=(2.0,))):
        assert kept.in_whole_levels() == kept


def test_unlimited_budgets_are_allowed_by_name() -> None:
    ledger = Ledger(ThreatModel(norm=2, episode=math.inf), 1)
    for _ in range(2):
        ledger.charge(np.zeros((1, 4)), _frames(1e30))
    assert_array_equal(ledger.remaining, [math.inf])


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ({"norm": 3, "episode": 1.0}, "norm", ValueError),
        ({"norm": math.nan, "episode": 1.0}, "norm", ValueError),
        ({"norm": True, "episode": 1.0}, "norm", ValueError),
        ({"norm": "2", "episode": 1.0}, "norm", ValueError),
        ({"norm": 2, "episode": -1e-9}, "episode", ValueError),
        ({"norm": 2, "episode": math.nan}, "episode", ValueError),
        ({"norm": 2, "episode": "1"}, "episode", TypeError),
        ({"norm": 2, "step": -1.0}, "step", ValueError),
        ({"norm": 2, "step": True}, "step", TypeError),
        ({"norm": 2}, "episode", ValueError),
        ({"norm": math.inf, "episode": 1.0}, "episode", ValueError),
        ({"norm": math.inf, "step": 1.0, "episode": 1.0}, "episode", ValueError),
        ({"norm": 2, "episode": 1.0, "units": "pixels"}, "units", ValueError),
        ({"norm": 2, "episode": 1.0, "mask": (False, False)}, "mask", ValueError),
        ({"norm": 2, "episode": 1.0, "mask": ()}, "mask", ValueError),
        ({"norm": 2, "episode": 1.0, "mask": (1, 0)}, "mask", ValueError),
        ({"norm": 2, "episode": 1.0, "mask": ((True, False), (True, True))}, "mask", ValueError),
        ({"norm": 2, "episode": 1.0, "mask": True}, "mask", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": ()}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": (1.0, 0.0)}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": (1.0, -1.0)}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": (1.0, math.nan)}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": (1.0, math.inf)}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": ((1.0, 1.0),)}, "scale", ValueError),
        ({"norm": 2, "episode": 1.0, "scale": "all"}, "scale", TypeError),
    ],
)
def test_bad_threat_models_are_refused_by_name(arguments: dict[str, Any], name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"\b{name}\b"):
        ThreatModel(**arguments)


@pytest.mark.parametrize(
    ("clean", "delivered", "message"),
    [
        (np.zeros((2, 4)), np.full((2, 4), math.nan), "delivered frames must be finite"),
        (np.zeros((2, 4)), np.full((2, 4), math.inf), "delivered frames must be finite"),
        (np.full((2, 4), math.nan), np.zeros((2, 4)), "delivered frames must be finite"),
        (np.zeros((2, 4)), np.zeros((2, 3)), "clean and delivered must both have shape"),
        (np.zeros((1, 4)), np.zeros((2, 4)), "clean and delivered must both have shape"),
        (np.zeros(4), np.zeros((2, 4)), "clean and delivered must both have shape"),
        (np.zeros((4, 2)), np.zeros((4, 2)), "clean and delivered must both have shape"),
    ],
)
def test_frames_that_cannot_be_compared_are_refused(clean: np.ndarray, delivered: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger(ThreatModel(norm=2, episode=1e9), 2).charge(clean, delivered)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_ledger_needs_at_least_one_slot(n: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^n_slots must be an integer"):
        Ledger(ThreatModel(norm=2, episode=1.0), n)


def test_the_norm_may_be_spelled_as_in_files_and_on_the_command_line() -> None:
    threat = ThreatModel(norm="inf", step=0.1)  # type: ignore[arg-type]
    assert threat == ThreatModel(norm=math.inf, step=0.1)
    assert threat.norm == math.inf
    with pytest.raises(ValueError, match="norm must be one of"):
        ThreatModel(norm="2", step=0.1)  # type: ignore[arg-type]
