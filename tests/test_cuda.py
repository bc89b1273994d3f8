"""The same code on a GPU: same law, same guarantees; skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

import robustrl as rrl
from robustrl.attacks import MinimalFlip, SmoothedPGD
from robustrl.certify import sampling
from robustrl.rollouts.collect import collect, make_job

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"
RECIPE = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=rrl.Gaussian(0.2))


def balancing_policy(device: str) -> rrl.policy.PolicyView:
    """A linear rule that balances CartPole."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [0.5, 1, 10, 3]]))
        layer.bias.zero_()
    return rrl.policy.PolicyView.from_torch(layer.to(device), kind="logits", observation_shape=(4,))


def test_a_gpu_run_repeats_itself_and_follows_the_cpu_law() -> None:
    job = make_job(balancing_policy(DEVICE), RECIPE, chunk_size=500)
    first, second = collect(job, 1_000), collect(job, 1_000)
    assert np.array_equal(first.returns, second.returns)
    on_cpu = collect(make_job(balancing_policy("cpu"), RECIPE, chunk_size=500), 1_000)
    assert ks_2samp(first.returns, on_cpu.returns).pvalue > 1e-4


@pytest.mark.parametrize("attack", [SmoothedPGD(draws=16), MinimalFlip(draws=16)])
def test_attacks_on_a_gpu_stay_within_budget(attack: rrl.attacks.Attack) -> None:
    threat = rrl.ThreatModel(norm=2, episode=0.4)
    job = make_job(balancing_policy(DEVICE), RECIPE, attack=attack, threat=threat)
    assert collect(job, 20).spent.max() <= 0.4 * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------ counting

POINTS = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
KINDS: list[dict[str, Any]] = [{}, {"gradient": True}, {"pairs": True}, {"values": True}]


class Recorder(nn.Module):
    """A small network, or the first three entries themselves; keeps the copies that it was shown."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.shown: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.shown.append(rows.clone())
        return rows[:, :3].clone() if self.network is None else self.network(rows)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.shown).cpu()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))


def counted(base: Any, n: int = 5_000, kind: dict[str, Any] | None = None, **options: Any) -> sampling.Tally:
    smoothed = rrl.Smoothed(base, rrl.Gaussian(0.7), device=DEVICE, seed=1, bounds=(-1.0, 1.0), **options)
    return smoothed.tally(POINTS, n, classes=np.array([0, 1, 2]), **(kind or {}))


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes per tally, also on a GPU."""
    for name in ("ROWS_CPU", "ROWS_GPU"):
        monkeypatch.setattr(sampling, name, (32, 2048))


@pytest.mark.usefixtures("small_passes")
def test_counts_on_a_gpu_are_those_of_the_same_copies_on_a_cpu() -> None:
    base = Recorder(network().to(DEVICE))
    tally = counted(base)
    rows = base.rows.reshape(3, 5_000, 8)
    assert rows.unique(dim=1).shape == rows.shape
    assert torch.allclose(rows.mean(dim=1), torch.from_numpy(POINTS), atol=5 * 0.7 / 5_000**0.5)
    with torch.no_grad():
        scores = network()(rows)
    first, second = scores.topk(2, dim=2).values.unbind(2)
    close = (first - second < 1e-4).sum(dim=1).numpy()
    here = torch.stack([(scores.argmax(dim=2) == c).sum(dim=1) for c in range(3)], dim=1).numpy()
    assert close.max() <= 10
    assert np.all(np.abs(tally.counts - here) <= close[:, None])


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("kind", KINDS)
def test_counts_on_a_gpu_do_not_depend_on_the_batch_size(kind: dict[str, Any]) -> None:
    """Of a base function without sums, whose last bits would."""
    recorders = [Recorder() for _ in range(3)]
    tallies = [counted(base, 1_000, kind, batch_size=size) for base, size in zip(recorders, (None, 7, 500), strict=True)]
    for base, tally in zip(recorders[1:], tallies[1:], strict=True):
        assert torch.equal(base.rows, recorders[0].rows)
        for name in ("counts", "both", "exactly_one", "moments", "products", "values"):
            mine, first = getattr(tally, name), getattr(tallies[0], name)
            assert np.array_equal(mine, first) if first is not None else mine is None


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_does_not_wait_between_the_first_pass_and_the_result(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []

    def switch(mode: str) -> None:
        modes.append(mode)
        torch.cuda.set_sync_debug_mode(mode)

    class Strict(Recorder):
        def forward(self, rows: Tensor) -> Tensor:
            switch("error")
            return super().forward(rows)

    result = sampling._Counting.result

    def transfer(counting: Any) -> sampling.Tally:
        switch("default")
        return result(counting)

    monkeypatch.setattr(sampling._Counting, "result", transfer)
    try:
        tally = counted(Strict(network().to(DEVICE)), 4_096, kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == ["error"] * 6 + ["default"]
    assert tally.counts.sum(axis=1).tolist() == [4_096] * 3


def test_half_precision_on_a_gpu_stays_inside_the_base_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watching(Recorder):
        def forward(self, rows: Tensor) -> Tensor:
            scores = super().forward(rows)
            seen.append(("inside", rows.dtype, scores.dtype, torch.is_autocast_enabled(DEVICE)))
            return scores

    add = sampling._Counting.add

    def watched(counting: Any, copies: Any, scores: Tensor) -> None:
        seen.append(("outside", copies.rows.dtype, scores.dtype, torch.is_autocast_enabled(DEVICE)))
        add(counting, copies, scores)

    monkeypatch.setattr(sampling._Counting, "add", watched)
    half, full = Watching(network().to(DEVICE)), Recorder(network().to(DEVICE))
    counts = counted(half, amp=torch.bfloat16).counts
    assert set(seen) == {("inside", torch.float32, torch.bfloat16, True), ("outside", torch.float32, torch.float32, False)}
    expected = counted(full).counts
    assert torch.equal(half.rows, full.rows)  # the same noise
    assert np.abs(counts - expected).max() < 0.02 * 5_000
