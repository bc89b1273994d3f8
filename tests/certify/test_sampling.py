"""Tallies: every sample is drawn once, counted once, and does not depend on how the work is cut."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from torch import Tensor, nn

import robustrl as rrl
from robustrl.certify import sampling
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.policy import PolicyView

GAUSSIAN = Gaussian(0.5)
LINEAR = nn.Linear(3, 2)
POINTS = np.array([[0.1, 0.2, 0.3], [-0.4, 0.0, 2.0], [0.0, 0.0, 0.0]])


def smoothed(base: Any = LINEAR, noise: Noise = GAUSSIAN, **options: Any) -> rrl.Smoothed:
    return rrl.Smoothed(base, noise, **({"seed": 3} | options))


class Recorder:
    """Two classes by the sign of the first entry; keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.seen.append(rows.clone())
        return torch.stack((-rows.flatten(1)[:, 0], rows.flatten(1)[:, 0]), dim=1)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.seen)


@pytest.mark.parametrize(
    "noise", [GAUSSIAN, Gaussian((0.5, 0.1, 0.2)), Uniform(0.3), Laplace(0.2), Splitting(0.4), Ablation(0.6)]
)
def test_every_input_is_counted_exactly_n_times(noise: Noise) -> None:
    for n in (1, 7, 1024, 1025, 3001):
        counts = smoothed(noise=noise).tally(POINTS, n).counts
        assert counts.dtype == np.int64
        assert counts.shape == (3, 2)
        assert (counts.sum(axis=1) == n).all()


def test_counts_are_those_of_the_copies_that_the_base_saw() -> None:
    base = Recorder()
    tally = smoothed(base).tally(POINTS, 500)
    rows = base.rows
    assert rows.shape == (1500, 3)
    for i in range(3):  # an input's copies come one after the other
        mine = rows[500 * i : 500 * (i + 1)]
        assert tally.counts[i].tolist() == [int((mine[:, 0] <= 0).sum()), int((mine[:, 0] > 0).sum())]
        assert mine.mean(dim=0).numpy() == pytest.approx(POINTS[i], abs=4 * 0.5 / 500**0.5)


def test_all_samples_of_all_calls_are_different() -> None:
    """The batch that chooses the class and the batch that is counted share no sample, nor do two inputs."""
    base = Recorder()
    smoothed(base).certify(np.zeros((2, 3)), n0=100, n=2000)
    assert len(torch.unique(base.rows, dim=0)) == len(base.rows) == 2 * 2100


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"gradient": True}])
def test_counts_do_not_depend_on_the_batch_size(options: dict[str, Any]) -> None:
    classes = [1, 0, 1] if options else None
    results = [
        smoothed(batch_size=batch).tally(POINTS, 3000, classes=classes, **options) for batch in (None, 1, 17, 1000, 10_000)
    ]
    for result in results[1:]:
        for name in ("counts", "both", "exactly_one", "moments", "products"):
            mine, first = getattr(result, name), getattr(results[0], name)
            assert (mine is None) == (first is None)
            assert mine is None or np.array_equal(mine, first)


def test_an_inputs_counts_do_not_depend_on_the_inputs_after_it() -> None:
    together, alone = smoothed().tally(POINTS, 2500), smoothed().tally(POINTS[:1], 2500)
    assert np.array_equal(together.counts[:1], alone.counts)


def test_a_seed_repeats_the_counts_and_calls_go_on_from_each_other() -> None:
    one, other = smoothed(), smoothed()
    first = one.tally(POINTS, 300)
    assert np.array_equal(first.counts, other.tally(POINTS, 300).counts)
    assert not np.array_equal(first.counts, one.tally(POINTS, 300).counts)
    assert not np.array_equal(first.counts, smoothed(seed=4).tally(POINTS, 300).counts)


def test_tallies_add_up_and_travel() -> None:
    function = smoothed(bounds=(0.0, 1.0))
    for options in ({}, {"pairs": True}, {"gradient": True}, {"values": True}):
        classes = None if "values" in options or not options else [0, 1, 1]
        parts = [function.tally(POINTS, n, classes=classes, **options) for n in (100, 250 * 2)]
        total = pickle.loads(pickle.dumps(parts[0])) + parts[1]
        assert total.n == 600
        assert np.array_equal(total.counts, parts[0].counts + parts[1].counts)
        for name in ("both", "exactly_one", "moments", "products", "values"):
            if getattr(parts[0], name) is not None:
                assert np.array_equal(getattr(total, name), getattr(parts[0], name) + getattr(parts[1], name))
        if total.halves is not None:
            assert total.halves == (300, 300)


def test_tallies_of_different_things_do_not_add_up() -> None:
    function = smoothed()
    plain, pairs = function.tally(POINTS, 10), function.tally(POINTS, 10, classes=[0, 0, 0], pairs=True)
    for other in (pairs, function.tally(POINTS[:2], 10)):
        with pytest.raises(ValueError, match="tallies can only be added"):
            plain + other
    with pytest.raises(ValueError, match="tallies can only be added"):
        pairs + function.tally(POINTS, 10, classes=[1, 0, 0], pairs=True)


def test_antithetic_pairs_mirror_each_other_and_are_counted_as_pairs() -> None:
    base = Recorder()
    tally = smoothed(base).tally(np.full((1, 3), 0.2), 1000, classes=[1], pairs=True)
    rows = base.rows
    plus, minus = rows[:500], rows[500:]
    assert (plus + minus).numpy() == pytest.approx(0.4, abs=1e-6)
    up, down = plus[:, 0] > 0, minus[:, 0] > 0
    assert tally.both is not None
    assert tally.exactly_one is not None
    assert tally.both[0] == int((up & down).sum())
    assert tally.exactly_one[0] == int((up ^ down).sum())


def test_moments_and_products_are_sums_over_the_noise_of_two_halves() -> None:
    base = Recorder()
    tally = smoothed(base).tally(np.full((1, 3), 0.2), 1000, classes=[1], gradient=True)
    noise = (base.rows.double() - 0.2) / 0.5
    hit = (base.rows[:, 0] > 0).double()
    expected = [((hit - 0.5)[part, None] * noise[part]).sum(dim=0).numpy() for part in (slice(500), slice(500, None))]
    assert tally.halves == (500, 500)
    assert tally.moments == pytest.approx(np.array([expected]), abs=1e-3)
    both = (hit[:500] * hit[500:] * (noise[:500] * noise[500:]).sum(dim=1)).sum()
    assert tally.products == pytest.approx(np.array([float(both)]), abs=1e-3)


def test_the_gradient_of_a_half_space_is_found() -> None:
    """E[(1{class} - 1/2) e / sigma] = phi(margin / sigma) w / ||w||."""
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, -1.0])
    tally = smoothed(base).tally(np.ones((1, 2)), 200_000, classes=[1], gradient=True)
    density = np.exp(-(2.4**2) / 2) / np.sqrt(2 * np.pi)
    assert tally.moments is not None
    for mean in tally.moments[0] / 100_000:
        assert mean == pytest.approx(density * np.array([0.6, 0.8]), abs=4 * 0.5 / 100_000**0.5)


def test_scores_are_clipped_before_they_are_averaged() -> None:
    base = Recorder()
    tally = smoothed(base, bounds=(-0.25, 0.5)).tally(np.full((1, 3), 0.2), 1000, values=True)
    first = base.rows[:, 0].double()
    expected = [[float((-first).clamp(-0.25, 0.5).sum()), float(first.clamp(-0.25, 0.5).sum())]]
    assert tally.values == pytest.approx(np.array(expected), abs=1e-4)


def test_pictures_go_through_in_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ENTRIES_CPU", 1000)
    monkeypatch.setattr(sampling, "ROWS_CPU", (2, 8192))
    base = Recorder()
    smoothed(base).tally(np.zeros((2, 3, 10, 10)), 10)
    assert max(len(rows) for rows in base.seen) == 2  # 600 entries
    assert sum(len(rows) for rows in base.seen) == 20


def test_modules_are_evaluated_in_evaluation_mode_and_left_as_they_were() -> None:
    base = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), LINEAR)
    base.train()
    base[1].eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    counts = smoothed(base).tally(POINTS, 500).counts
    assert [part.training for part in base] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert np.array_equal(counts, smoothed(base.eval()).tally(POINTS, 500).counts)


def test_inputs_that_do_not_fit_are_named_and_other_failures_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"does not take inputs of shape \(2,\), float32, on cpu: mat1 and mat2") as refused:
        smoothed().certify(torch.zeros(1, 2))
    assert isinstance(refused.value.__cause__, RuntimeError)

    def full(rows: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        smoothed(full).tally(torch.zeros(1, 2), 10)


def test_a_module_that_fails_is_left_as_it_was() -> None:
    class Failing(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            raise RuntimeError("no")

    base = Failing().train()
    with pytest.raises(ValueError, match="no"):
        smoothed(base).tally(POINTS, 5)
    assert base.training


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_a_policy_is_counted_by_what_its_model_predicts(algorithm: Any) -> None:
    model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    x = np.array([[0.01, 0.2, -0.02, 0.1]], dtype=np.float32)
    function = smoothed(model, Gaussian(0.3))
    rows = next(iter(smoothed(model, Gaussian(0.3))._passes(torch.from_numpy(x), 400))).rows
    actions, _ = model.predict(rows.numpy(), deterministic=True)
    assert function.tally(x, 400).counts.tolist() == [np.bincount(actions, minlength=2).tolist()]


def test_a_policy_that_is_trained_on_is_counted_as_it_is_now() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    function, x = smoothed(model, Gaussian(0.3)), np.zeros((1, 4), dtype=np.float32)
    before = function.tally(x, 400).counts
    model.policy.action_net.bias.data += torch.tensor([100.0, 0.0])  # which torch's version counters do not see
    assert function.tally(x, 400).counts.tolist() == [[400, 0]]
    assert before.tolist() != [[400, 0]]


def test_outputs_come_in_the_order_of_the_inputs() -> None:
    base = Recorder()
    outputs = smoothed(base).outputs(POINTS, 700)
    assert outputs.shape == (3, 700, 2)
    assert torch.equal(outputs[..., 1], base.rows[:, 0].reshape(3, 700))


def test_continuous_policies_have_outputs_but_no_classes() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", buffer_size=10)
    function = smoothed(model, Gaussian(0.1))
    x = np.zeros((2, 3), dtype=np.float32)
    outputs = function.outputs(x, 50)
    assert outputs.shape == (2, 50, 1)
    view = PolicyView.of(model)
    assert float(outputs.abs().max()) <= 2.0
    assert outputs[0].mean() == pytest.approx(float(view.mean_action(torch.zeros(1, 3)).detach()[0, 0]), abs=0.5)
    with pytest.raises(TypeError, match="discrete"):
        function.tally(x, 10)


def test_half_precision_stays_inside_the_base_function() -> None:
    seen: list[torch.dtype] = []

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, rows: Tensor) -> Tensor:
            scores = self.linear(rows)
            seen.extend([rows.dtype, scores.dtype])
            return scores

    tally = smoothed(Base(), amp=torch.bfloat16).tally(POINTS, 100)
    assert seen == [torch.float32, torch.bfloat16]
    assert (tally.counts.sum(axis=1) == 100).all()


def test_half_precision_counts_policies_with_tanh_layers() -> None:
    """Whose layers run in numpy, which has no bfloat16."""
    network = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    view = PolicyView.from_torch(network, kind="logits", observation_shape=(3,))
    half, full = (smoothed(view, amp=dtype).tally(POINTS, 1000).counts for dtype in (torch.bfloat16, None))
    assert np.abs(half - full).max() <= 20


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (np.zeros((2, 3), dtype=np.uint8), TypeError, "floating dtype, got torch.uint8"),
        (np.zeros((2, 3), dtype=np.int64), TypeError, "floating dtype"),
        (np.full((1, 3), np.nan), ValueError, "x must be finite"),
        (np.full((1, 3), np.inf), ValueError, "x must be finite"),
        (np.zeros(3), ValueError, "batch of inputs"),
        (np.zeros((0, 3)), ValueError, "batch of inputs"),
        ("pictures", TypeError, "x must be an array or tensor"),
        (None, TypeError, "x must be an array or tensor"),
    ],
)
def test_inputs_that_are_none_are_refused(x: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        smoothed().tally(x, 10)


@pytest.mark.parametrize("where", [0, 1100, 2999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_anywhere_is_refused(where: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ROWS_CPU", (2, 1024))
    calls = [0]

    def base(rows: Tensor) -> Tensor:
        scores = rows[:, :2].clone()
        if calls[0] <= where < calls[0] + len(rows):
            scores[where - calls[0], 1] = value
        calls[0] += len(rows)
        return scores

    with pytest.raises(ValueError, match="scores of the base function must be finite"):
        smoothed(base).tally(POINTS[:1], 3000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": 11, "pairs": True, "classes": [0, 0, 0]}, "n must be even"),
        ({"n": 10, "gradient": True}, "classes must be given"),
        ({"n": 10, "gradient": True, "classes": [0, 0]}, "one class >= 0 per input"),
        ({"n": 10, "gradient": True, "classes": [0, 0, -1]}, "one class >= 0 per input"),
        ({"n": 10, "gradient": True, "classes": [0, 0, 0.5]}, "one class >= 0 per input"),
        ({"n": 10, "gradient": True, "classes": [0, 0, 2]}, "classes must be below K = 2"),
        ({"n": 10, "gradient": True, "pairs": True, "classes": [0, 0, 0]}, "ask for one of them"),
        ({"n": 10, "values": True}, "bounds must be given"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smoothed().tally(POINTS, **arguments)


@pytest.mark.parametrize("noise", [Uniform(0.1), Gaussian((0.1, 0.2, 0.3)), Gaussian(0.0)])
def test_pairs_and_gradients_need_a_gaussian_of_one_sigma(noise: Noise) -> None:
    for wanted in ("pairs", "gradient"):
        with pytest.raises(ValueError, match="need Gaussian noise of one sigma"):
            smoothed(noise=noise).tally(POINTS, 10, classes=[0, 0, 0], **{wanted: True})


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (3, TypeError, "base must be"),
        (lambda rows: rows[:, 0], ValueError, r"scores \(rows, K\), got shape"),
        (lambda rows: rows[:3], ValueError, "a row of scores per input"),
        (lambda rows: [1.0], ValueError, r"scores \(rows, K\), got list"),
    ],
)
def test_functions_that_give_no_scores_are_refused(base: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        smoothed(base).tally(POINTS, 10)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_bounds_must_be_a_range(bounds: Any) -> None:
    with pytest.raises(ValueError, match="bounds must be"):
        smoothed(bounds=bounds)


def test_recurrent_policies_are_no_functions_of_one_observation() -> None:
    from sb3_contrib import RecurrentPPO

    with pytest.raises(TypeError, match="without memory"):
        smoothed(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, device="cpu"))
    with pytest.raises(TypeError, match="noise must be"):
        rrl.Smoothed(LINEAR, 0.5)  # type: ignore[arg-type]
