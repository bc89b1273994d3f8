"""Votes of all splits: the map, the exact radius by brute force over whole grids, and trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from robustrl.certify import splitting
from robustrl.certify.bands import BandAblation, verify_bands
from robustrl.certify.splitting import (
    certify_splitting,
    count_votes,
    decide_splitting,
    exact_radius,
    trajectory_radius,
    verify_splitting,
    verify_trajectory,
)
from robustrl.noise import DeterministicSplitting, Gaussian, Splitting
from robustrl.noise import splitting as noise_splitting
from robustrl.policy import PolicyView

SIZES = [(4, 3, 5, 3), (4, 3, 8, 3), (6, 3, 3, 2), (3, 4, 4, 4), (5, 3, 12, 3)]
"""(q, dimension, levels, classes) of the brute force."""


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Fixes the template."""

    def fix(values: list[int]) -> None:
        monkeypatch.setattr(noise_splitting, "_template", lambda seed, levels, shape: np.array(values, dtype=np.int32))

    return fix


class Memoised:
    """A random function of the whole noisy input, not even monotone: every new input draws its class."""

    def __init__(self, classes: int, seed: int, weights: Any = None) -> None:
        self.classes, self.weights = classes, weights
        self.generator, self.seen = np.random.default_rng(seed), dict[bytes, int]()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(x), self.classes)
        for row, key in zip(scores, x.numpy(), strict=True):
            if key.tobytes() not in self.seen:
                self.seen[key.tobytes()] = int(self.generator.choice(self.classes, p=self.weights))
            row[self.seen[key.tobytes()]] = 1
        return scores


# ------------------------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize(
    ("levels", "shown"),
    [
        (
            5,
            [
                (0.5625, 0.8125, 0.1875),
                (0.1875, 0.4375, 0.3125),
                (0.3125, 0.5, 0.4375),
                (0.4375, 0.5625, 0.5),
                (0.5, 0.6875, 0.0625),
            ],
        ),
        (3, [(0.5, 0.8125, 0.1875), (0.1875, 0.5, 0.3125), (0.3125, 0.6875, 0.0625)]),
    ],
)
def test_map_vectors(levels: int, shown: list[tuple[float, ...]], template: Any) -> None:
    """q = 4, v = (0, 2, 1), x = (1, 3, 0) / 4."""
    template([0, 2, 1])
    mechanism, x = DeterministicSplitting(levels, 4), np.array([1, 3, 0]) / 4
    assert_array_equal(mechanism.views(x, 0, levels), shown)
    assert_array_equal(mechanism.views(torch.from_numpy(x), 1, levels).numpy(), shown[1:])


@pytest.mark.parametrize(("q", "levels"), [(4, 3), (4, 5), (7, 2), (3, 20), (10, 10), (5, 4)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 3.0)])
def test_every_offset_shows_what_the_definition_says(q: int, levels: int, low: float, high: float) -> None:
    """hi = min(2 lam ceil((x - s) / 2 lam) + s, 1), lo = max(hi - 2 lam, 0) with s = ((v + o) mod L + 1/2) / q, in fractions."""
    mechanism = DeterministicSplitting(levels, q, low, high, seed=3)
    x = np.arange(q + 1)
    template, width = mechanism.template(x.shape), Fraction(levels, q)
    shown = mechanism.views(low + x * (high - low) / q, 0, levels)
    assert shown.shape == (levels, q + 1)
    for offset, k in itertools.product(range(levels), x.tolist()):
        s = (Fraction((int(template[k]) + offset) % levels) + Fraction(1, 2)) / q
        cell = math.ceil((Fraction(k, q) - s) / width)
        middle = (min(width * cell + s, Fraction(1)) + max(width * (cell - 1) + s, Fraction(0))) / 2
        assert shown[offset, k] == pytest.approx(float(low + (high - low) * middle), abs=1e-12)
        real = Splitting(float(width) / 2 * (high - low), low, high)
        moved = real.split(np.array([[low + k * (high - low) / q]]), np.array([[float(s) * (high - low)]])).item()
        assert shown[offset, k] == pytest.approx(moved, abs=1e-9)


@pytest.mark.parametrize(("q", "levels"), [(4, 3), (4, 5), (255, 127), (255, 441), (3, 20), (10, 10)])
def test_a_step_of_one_entry_changes_exactly_one_copy(q: int, levels: int) -> None:
    mechanism = DeterministicSplitting(levels, q, 0.0, float(q), seed=1)
    generator = np.random.default_rng(0)
    for _ in range(30):
        x = generator.integers(0, q + 1, 4)
        other = x.copy()
        i = generator.integers(4)
        other[i] += 1 if x[i] < q else -1
        changed = np.any(mechanism.views(x, 0, levels) != mechanism.views(other, 0, levels), axis=1).sum()
        assert changed == 1


def test_the_template_is_part_of_the_model_and_spread_evenly() -> None:
    mechanism = DeterministicSplitting(6, 4, seed=5)
    assert_array_equal(mechanism.template((3, 2)), DeterministicSplitting(6, 9, seed=5).template((3, 2)))
    assert not np.array_equal(mechanism.template((50,)), DeterministicSplitting(6, 4, seed=6).template((50,)))
    assert_array_equal(mechanism.template((8,)), [4, 3, 0, 2, 3, 3, 0, 2])  # recorded: a model outlives numpy's versions
    counts = np.bincount(mechanism.template((100, 600)).ravel(), minlength=6)
    assert_allclose(counts, 10_000, atol=400)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_training_draws_one_offset_per_input_and_every_offset_equally_often(library: str) -> None:
    mechanism, n, x = DeterministicSplitting(7, 20, seed=2), 14_000, np.array([0.3, 0.05, 1.0, 0.5])
    batch: Any = np.tile(x, (n, 1))
    if library == "numpy":
        shown = mechanism.perturb(batch, np.random.default_rng(0))
    else:
        shown = mechanism.perturb(torch.from_numpy(batch), torch.Generator().manual_seed(0)).numpy()
    rows, counts = np.unique(shown, axis=0, return_counts=True)
    expected, times = np.unique(mechanism.views(x, 0, 7), axis=0, return_counts=True)
    assert_array_equal(rows, expected)
    assert_allclose(counts, 2000 * times, atol=200)


def test_the_unevenness_of_sixty_bit_offsets_is_paid_for() -> None:
    """2^60 is no multiple of the levels: an offset's probability is at most (1 + levels / 2^60) / levels."""
    mechanism = DeterministicSplitting(2**24 - 3)
    assert float(mechanism.shift(mechanism.lam)) >= Fraction(1, 2) * (1 + Fraction(2**24 - 3, 2**60))
    assert float(mechanism.lower(1.0, mechanism.lam)) < 0.5


def test_bytes_are_taken_as_they_are() -> None:
    mechanism = DeterministicSplitting(40, 255, 0.0, 255.0)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    unit = DeterministicSplitting(40).views(x[0] / np.float32(255), 0, 40)
    assert_allclose(mechanism.views(x[0], 0, 40), 255 * unit, atol=1e-12)
    assert_allclose(mechanism.views(torch.from_numpy(x[0]), 0, 40).numpy(), 255 * unit, atol=1e-12)


# --------------------------------------------------------------------------------------------------- the radius


@pytest.mark.parametrize(
    ("counts", "prediction", "steps"),
    [
        ((300, 141, 0), 0, 79),
        ((141, 300, 0), 1, 79),
        ((5, 5, 0), 0, 0),
        ((4, 5, 0), 1, 0),
        ((0, 9), 1, 4),
        ((9, 0), 0, 4),
        ((0, 8), 1, 3),
        ((8, 0), 0, 4),
        ((0, 10, 2), 1, 4),
        ((0, 10, 3), 1, 3),
        ((1, 4, 4), 1, 0),
    ],
)
def test_radius_vectors(counts: tuple[int, ...], prediction: int, steps: int) -> None:
    found = exact_radius(counts)
    assert (int(found[0]), int(found[1])) == (prediction, steps)


def test_radius_is_the_number_of_voters_that_cannot_change_the_winner() -> None:
    """All votes of nine voters over three classes, all changes of mind by brute force."""
    votes = [c for c in itertools.product(range(10), repeat=3) if sum(c) == 9]
    winners = {c: int(np.argmax(c)) for c in votes}
    prediction, steps = exact_radius(votes)
    for c, p, r in zip(votes, prediction.tolist(), steps.tolist(), strict=True):
        assert p == winners[c]
        nearest = min(sum(max(a - b, 0) for a, b in zip(c, d, strict=True)) for d in votes if winners[d] != p)
        assert nearest == r + 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3], "two|2 at least"),
        (5, "2 at least"),
        ([1.5, 2], "integers >= 0"),
        ([-1, 2], "integers >= 0"),
        ([math.nan, 2], "integers >= 0"),
    ],
)
def test_broken_counts_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_radius(counts)


def _violations_and_hits(size: tuple[int, int, int, int], seed: int) -> tuple[int, int, int]:
    """Class changes within a certified radius, points whose nearest change is at radius + 1, and points, of a whole grid."""
    q, d, levels, classes = size
    mechanism = DeterministicSplitting(levels, q, 0.0, float(q), seed=seed)
    points = np.array(list(itertools.product(range(q + 1), repeat=d)))
    votes = certify_splitting(Memoised(classes, seed), points, mechanism)
    distance = np.abs(points[:, None] - points[None]).sum(axis=2)
    other = votes.prediction[:, None] != votes.prediction[None]
    nearest = np.where(other, distance, 10**6).min(axis=1)
    moved = np.abs(votes.counts[:, None] - votes.counts[None]).sum(axis=2) // 2
    assert np.all(moved <= distance)  # so every single step moves one vote at most
    return int((nearest <= votes.steps).sum()), int((nearest == votes.steps + 1).sum()), len(points)


@pytest.mark.parametrize("size", SIZES)
def test_no_point_of_the_grid_within_the_radius_has_another_class(size: tuple[int, int, int, int]) -> None:
    found = np.array([_violations_and_hits(size, seed) for seed in range(6)]).sum(axis=0)
    assert found[0] == 0
    assert found[1] > 0.2 * found[2]  # and often the nearest change is one step beyond


def test_the_rule_for_ties_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without [B < A] the same brute force finds points whose class changes within the radius."""

    def careless(counts: Any) -> tuple[np.ndarray, np.ndarray]:
        ordered = np.sort(counts, axis=-1)
        return np.argmax(counts, axis=-1), (ordered[..., -1] - ordered[..., -2]) // 2

    monkeypatch.setattr(splitting, "exact_radius", careless)
    assert sum(_violations_and_hits(size, seed)[0] for size in SIZES[:3] for seed in range(3)) > 0


def test_radius_in_observation_units_is_that_of_the_smallest_step() -> None:
    mechanism = DeterministicSplitting(9, 4, (-1.0, 0.0), (1.0, 8.0))
    x = np.array([[0.5, 2.0]])
    votes = certify_splitting(Memoised(2, 1, (0.9, 0.1)), x, mechanism)
    assert votes.radius.tolist() == (votes.steps * 0.5).tolist()
    assert mechanism.lam == 9 * 0.5 / 2
    bytes_, unit = DeterministicSplitting(441, 255, 0.0, 255.0), DeterministicSplitting(441)
    assert splitting.SplittingVotes(np.array([[300, 141]]), bytes_.grid.step).radius == [79.0]
    assert splitting.SplittingVotes(np.array([[300, 141]]), unit.grid.step).radius == pytest.approx([0.3098039], abs=1e-7)


# ---------------------------------------------------------------------------------------------------- evaluation


def counting(levels: int, q: int = 20) -> tuple[nn.Module, DeterministicSplitting, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = np.random.default_rng(0).integers(0, q + 1, (25, 4)) / q
    return module, DeterministicSplitting(levels, q), x


@pytest.mark.parametrize("batch_size", [None, 1, 7, 30, 31, 100])
def test_counts_do_not_depend_on_the_chunks_and_add_up(batch_size: int | None) -> None:
    module, mechanism, x = counting(31)
    counts = count_votes(module, x, mechanism, batch_size=batch_size)
    assert counts.dtype == np.int64
    assert_array_equal(counts.sum(axis=1), np.full(25, 31))
    for one, row in zip(x, counts, strict=True):
        classes = module(torch.from_numpy(mechanism.views(one, 0, 31)).float()).argmax(dim=1)
        assert_array_equal(row, np.bincount(classes.numpy(), minlength=3))


def test_an_offset_meets_the_network_in_the_same_row_of_the_same_batch_for_every_input() -> None:
    """Else the last bits of the network's arithmetic could make one noisy copy vote twice differently."""
    sizes: list[list[int]] = []

    def base(x: torch.Tensor) -> torch.Tensor:
        sizes[-1].append(len(x))
        return x[:, :2]

    _, mechanism, x = counting(31)
    for batch in (x[:1], x[3:5], x):
        sizes.append([])
        count_votes(base, batch, mechanism, batch_size=8)
        assert sizes[-1] == [8, 8, 8, 7] * len(batch)


@pytest.mark.parametrize("levels", [31, 40])
@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize("weights", [(0.9, 0.05, 0.05), (0.1, 0.6, 0.3)])
def test_a_decision_is_that_of_the_complete_vote(levels: int, batch_size: int | None, weights: tuple[float, ...]) -> None:
    _, mechanism, x = counting(levels)
    base, x = Memoised(3, 0, weights), x[:5]
    steps = certify_splitting(base, x, mechanism).steps
    for asked in {0, 1, *steps.tolist(), *(steps + 1).tolist(), levels // 2, levels // 2 + 1}:
        for radius in (asked / 20, (asked + 0.5) / 20):
            found = decide_splitting(base, x, mechanism, radius, batch_size=batch_size)
            assert_array_equal(found, steps >= asked)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_a_decision_is_right_for_every_count_of_two_classes(batch_size: int) -> None:
    generator, mechanism = np.random.default_rng(0), DeterministicSplitting(10, 20)  # odd counts have no ties
    for ones, asked in itertools.product(range(11), range(7)):
        votes = iter(generator.permutation(np.arange(10) < ones).tolist())
        found = decide_splitting(
            lambda rows, votes=votes: torch.eye(2)[[int(next(votes)) for _ in rows]],
            np.zeros((1, 3)),
            mechanism,
            asked / 20,
            batch_size=batch_size,
        )
        assert found.tolist() == [bool(exact_radius((10 - ones, ones))[1] >= asked)]


def test_a_decision_looks_at_no_more_copies_than_it_needs() -> None:
    seen: list[int] = []

    def base(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

    _, mechanism, x = counting(100)
    assert decide_splitting(base, x[:1], mechanism, 0.5, batch_size=1).all()  # 10 steps: 60 of 100 votes are enough
    assert sum(seen) == 60
    seen.clear()
    assert not decide_splitting(base, x[:1], mechanism, 51 / 20, batch_size=1).any()
    assert sum(seen) == 1


def test_broken_bases_are_refused() -> None:
    module, mechanism, x = counting(31)
    with pytest.raises(ValueError, match="scores must be finite"):
        certify_splitting(lambda rows: rows * math.nan, x, mechanism)
    with pytest.raises(ValueError, match="scores must be finite"):
        decide_splitting(lambda rows: rows * math.nan, x, mechanism, 0.1)
    with pytest.raises(ValueError, match=r"base must be in evaluation mode"):
        certify_splitting(module.train(), x, mechanism)
    with pytest.raises(ValueError, match=r"scores \(rows, K\) of K >= 2 classes"):
        certify_splitting(lambda rows: rows[:, :1], x, mechanism)
    with pytest.raises(ValueError, match="x must be a batch"):
        certify_splitting(module.eval(), x[0], mechanism)
    with pytest.raises(ValueError, match="must lie on the grid"):
        certify_splitting(module, x + 0.01, mechanism)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        decide_splitting(module, x, mechanism, -0.1)
    from gymnasium import spaces

    box = spaces.Box(-1, 1, (1,), np.float32)
    view = PolicyView.from_torch(nn.Linear(4, 2), kind="gaussian", observation_shape=(4,), action_space=box)
    with pytest.raises(TypeError, match="discrete actions and without memory"):
        certify_splitting(view, x, mechanism)


def test_ties_of_scores_vote_for_the_lowest_class() -> None:
    _, mechanism, x = counting(31)
    counts = count_votes(lambda rows: torch.ones(len(rows), 3), x[:2], mechanism)
    assert_array_equal(counts, [[31, 0, 0]] * 2)


# -------------------------------------------------------------------------------------------------- trajectories


def stacks(n_frames: int, length: int, padding: str) -> Iterator[list[int]]:
    """How often each frame (by its time) is in the stack of every step."""
    for t in range(length):
        shown = [t - age for age in range(n_frames)]
        yield [max(i, 0) for i in shown] if padding == "reset" else [i for i in shown if i >= 0]


@pytest.mark.parametrize("n_frames", [1, 2, 3])
@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize("budget", ["step", "episode"])
def test_trajectory_radius_is_the_largest_budget_that_no_division_overdraws(n_frames: int, padding: Any, budget: Any) -> None:
    """All ways to spend whole steps on four frames, against the radii of the stacks they end up in."""
    generator, length = np.random.default_rng(0), 4
    for _ in range(12):
        steps = generator.integers(0, 7, length)
        found = trajectory_radius(steps, n_frames=n_frames, padding=padding, budget=budget)
        overdrawn = []
        for spent in itertools.product(range(8), repeat=length):
            moved = [sum(spent[i] for i in shown) for shown in stacks(n_frames, length, padding)]
            if any(m > r for m, r in zip(moved, steps, strict=True)):
                overdrawn.append(max(spent) if budget == "step" else sum(spent))
        assert found == min(overdrawn) - 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"steps": []}, "steps"),
        ({"steps": [1.5]}, "steps"),
        ({"steps": [-1]}, "steps"),
        ({"steps": [math.nan]}, "steps"),
        ({"steps": [[1]]}, "steps"),
        ({"steps": [1], "n_frames": 0}, "n_frames"),
        ({"steps": [1], "padding": "first"}, "padding"),
        ({"steps": [1], "budget": "total"}, "budget"),
    ],
)
def test_broken_trajectories_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        trajectory_radius(**arguments)


def test_certificates_are_recomputed_from_their_votes() -> None:
    noise = DeterministicSplitting(441)
    assert verify_splitting({"counts": [141, 300, 0]}, noise, 0.0) == (1, pytest.approx(79 / 255), False)
    evidence = {"counts": [[141, 300], [441, 0], [220, 221]], "n_frames": 1, "padding": "reset", "budget": "episode"}
    assert verify_trajectory(evidence, noise, 0) == (3, 0.0, False)
    evidence["counts"] = [[141, 300], [441, 0]]
    assert verify_trajectory({**evidence, "n_frames": 2, "budget": "step"}, noise, 0) == (2, pytest.approx(39 / 255), False)
    for counts in ([141, 300, 1], [[141, 300]], [442, -1], [440.5, 0.5], [math.nan, 1]):
        with pytest.raises(ValueError, match="counts must"):
            verify_splitting({"counts": counts}, noise, 0.0)
    with pytest.raises(ValueError, match="alpha must be 0"):
        verify_splitting({"counts": [441, 0]}, noise, 0.01)
    with pytest.raises(TypeError, match="noise must be a DeterministicSplitting"):
        verify_splitting({"counts": [441, 0]}, Gaussian(1.0), 0.0)
    with pytest.raises(ValueError, match="counts must add up"):
        verify_trajectory({**evidence, "counts": [[441, 0], [440, 0]]}, noise, 0)


# --------------------------------------------------------------------------------------------------------- bands


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5), -1), ((3, 2, 5), -1), ((2, 5, 3), -2), ((5, 2), -2), ((5, 2, 3), -3)])
def test_every_band_is_shown_once_and_nothing_else(library: str, shape: tuple[int, ...], axis: int) -> None:
    bands, x = BandAblation(2, 5, axis, fill=-1.0), 1 + np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    shown = np.asarray(bands.views(x if library == "numpy" else torch.from_numpy(x), 0, 5))
    assert shown.shape == (5, *shape)
    columns, original = np.moveaxis(shown, axis, 1), np.moveaxis(x, axis, 0)
    for first, column in itertools.product(range(5), range(5)):
        visible = column in (first, (first + 1) % 5)
        assert_array_equal(columns[first, column], original[column] if visible else np.full_like(original[column], -1))
    assert_array_equal(np.asarray(bands.views(x if library == "numpy" else torch.from_numpy(x), 1, 3)), shown[1:3])


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_strip_within_the_certified_width_changes_the_vote(size: int, width: int) -> None:
    """Random functions of bands of bits, all images, all strips, all contents."""
    bands = BandAblation(width, size, fill=2.0)
    images = np.array(list(itertools.product((0.0, 1.0), repeat=size)), dtype=np.float32).reshape(-1, 1, size)
    certified = 0
    for seed in range(3):
        counts = count_votes(Memoised(2, seed, (0.85, 0.15)), images, bands)
        prediction, patch = exact_radius(counts)[0], bands.patch(counts)
        for image, a, m in zip(images, prediction, patch, strict=True):
            assert m + width - 1 <= size / 2 or m == 0
            certified += m > 0
            for start in range(size - m + 1 if m else 0):
                outside = (np.arange(size) < start) | (np.arange(size) >= start + m)
                attacked = np.all(images[:, 0, outside] == image[0, outside], axis=1)
                assert np.all(prediction[attacked] == a)
    assert certified > 0 or (size, width) == (5, 3)


@pytest.mark.parametrize(("counts", "width", "patch"), [((20, 8), 3, 4), ((8, 20), 3, 3), ((15, 13), 3, 0), ((28, 0), 5, 10)])
def test_patch_vectors(counts: tuple[int, int], width: int, patch: int) -> None:
    """The largest m with n_A - n_B - [B < A] >= 2 (m + width - 1)."""
    bands = BandAblation(width, 28)
    assert int(bands.patch(counts)) == patch
    lead = max(counts) - min(counts) - (counts[1] > counts[0])
    assert patch == max([m for m in range(1, 28) if lead >= 2 * (m + width - 1)], default=0)
    found = verify_bands({"counts": list(counts), "width": width}, None, 0.0)
    assert found == (int(counts[1] > counts[0]), float(patch), False)


def test_training_with_bands_draws_every_band_equally_often() -> None:
    bands = BandAblation(1, 4)
    shown = bands.perturb(np.ones((8000, 2, 4)), np.random.default_rng(0))
    assert_array_equal(shown[:, 0], shown[:, 1])
    assert_array_equal(shown[:, 0].sum(axis=1), np.ones(8000))
    assert_allclose(shown[:, 0].sum(axis=0), 2000, atol=200)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: BandAblation(0, 5), "width"),
        (lambda: BandAblation(5, 5), "width"),
        (lambda: BandAblation(2, 5, 0), "axis"),
        (lambda: BandAblation(2, 5, fill=math.nan), "fill"),
        (lambda: BandAblation(2, 5).views(np.zeros((2, 6)), 0, 5), "images"),
        (lambda: BandAblation(2, 5).patch([2, 2]), "counts"),
        (lambda: verify_bands({"counts": [3, 2], "width": 2}, None, 0.1), "alpha"),
    ],
)
def test_broken_bands_are_refused(build: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        build()
