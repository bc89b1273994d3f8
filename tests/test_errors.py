"""The checks at every door: what passes, in which type, and what is refused by name."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from robustrl import errors
from robustrl.errors import (
    check_alpha,
    check_budget,
    check_choice,
    check_count,
    check_finite_array,
    check_positive,
    check_probability,
    check_real,
)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), np.uint8(1), np.array(1.0), Fraction(1)])
def test_real_numbers_of_every_kind_become_floats(value: object) -> None:
    number = check_real("x", value)
    assert number == 1.0
    assert type(number) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, 1j, np.complex64(1), np.array([1.0]), [1.0], torch.ones(1)])
def test_what_is_not_one_real_number_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"^width must be"):
        check_real("width", value)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), math.inf, -math.inf, np.array(np.nan), 10**400])
def test_nan_and_infinities_are_value_errors(value: object) -> None:
    with pytest.raises(ValueError, match=r"^width must be a finite real number"):
        check_real("width", value)


def test_infinity_passes_only_where_it_is_asked_for_and_nan_never() -> None:
    assert check_real("width", math.inf, infinite=True) == math.inf
    with pytest.raises(ValueError, match="width"):
        check_real("width", math.nan, infinite=True)


@pytest.mark.parametrize("value", [0, -1e-300, math.nan, math.inf])
def test_positive_means_finite_and_above_zero(value: float) -> None:
    assert check_positive("lam", 5e-324) > 0
    with pytest.raises(ValueError, match=r"^lam must be a finite number > 0"):
        check_positive("lam", value)


@pytest.mark.parametrize("value", [0, 0.5000001, 1, -0.1, math.nan])
def test_alpha_is_at_most_one_half(value: float) -> None:
    assert check_alpha(0.5) == 0.5
    with pytest.raises(ValueError, match=r"^alpha must be a failure probability in \(0, 0.5\]"):
        check_alpha(value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_counts_are_integers_of_at_least_one(value: object, kind: type[Exception]) -> None:
    assert check_count("n", np.int32(7)) == 7
    assert type(check_count("n", np.int32(7))) is int
    assert check_count("n", 0, least=0) == 0
    with pytest.raises(kind, match=r"^n must be an integer >= 1"):
        check_count("n", value)


@pytest.mark.parametrize("value", [True, False, np.bool_(True), 3, math.nan, "2", None, [2], np.array([1, 2]), torch.ones(2)])
def test_a_choice_is_one_of_the_choices_and_true_is_not_one(value: object) -> None:
    with pytest.raises(ValueError, match=r"^norm must be one of 0, 1, 2, inf"):
        check_choice("norm", value, (0, 1, 2, math.inf))


def test_a_choice_comes_back_as_the_choice_itself() -> None:
    assert type(check_choice("norm", np.float64(2.0), (0, 1, 2))) is int
    assert check_choice("norm", np.float32("inf"), (0, math.inf)) == math.inf


@pytest.mark.parametrize("value", ["a", [1j], [None], object(), [[1], [1, 2]], torch.ones(2, requires_grad=True)])
def test_arrays_of_anything_but_numbers_are_type_errors(value: object) -> None:
    with pytest.raises(TypeError, match=r"^returns must be numeric"):
        check_finite_array("returns", value)  # type: ignore[arg-type]


def test_finite_arrays_are_float64_and_name_the_first_bad_entry() -> None:
    assert check_finite_array("returns", np.array([1, 2], dtype=np.uint8)).dtype == np.float64
    with pytest.raises(ValueError, match=r"^returns must be finite, got nan at index \[1, 0\] \(2 bad in all\)"):
        check_finite_array("returns", [[0, 1], [math.nan, math.inf]])
    with pytest.raises(ValueError, match=r"^returns must not be empty"):
        check_finite_array("returns", [])
    with pytest.raises(ValueError, match=r"^returns must have 1 dimension\(s\)"):
        check_finite_array("returns", [[1.0]], ndim=1)


@pytest.mark.parametrize("value", [math.nan, -1e-12, 1 + 1e-12, math.inf, [0.5, math.nan]])
def test_probabilities_outside_the_unit_interval_are_refused_not_clipped(value: object) -> None:
    assert check_probability("p", [0, 1]).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"^p must lie in \[0, 1\]"):
        check_probability("p", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, -1e-12, -math.inf, [1.0, math.nan]])
def test_budgets_may_be_infinite_but_not_negative_or_nan(value: object) -> None:
    assert check_budget("budget", [0, math.inf]).tolist() == [0.0, math.inf]
    with pytest.raises(ValueError, match=r"^budget must be >= 0"):
        check_budget("budget", value)  # type: ignore[arg-type]


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ValueError) as caught:
        check_choice("method", "x" * 1000, ("a",))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["ChainError", "CertificateError", "BudgetExceededError", "ChunkError", "UnsafeModelError"])
def test_errors_about_what_the_user_passed_are_value_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


@pytest.mark.parametrize("name", ["CertificateViolationError", "WorkerError"])
def test_errors_about_the_world_are_runtime_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), RuntimeError)
