"""Averages over noise draws: the same numbers for any size of block, and memory that does not grow with the draws."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from attacks.victims import context, cost, frames_of
from robustrl.attacks import (
    ActionDeviation,
    Attack,
    AttackContext,
    GradientAttack,
    Margin,
    MinimalFlip,
    SmoothedPGD,
    expectation,
)
from robustrl.attacks.expectation import answers, samples
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView

SIDE, DRAWS = 8, 16
FLOATS = SIDE * SIDE * 2  # of one observation


class Watched(nn.Module):
    """A convolutional victim on two stacked frames that remembers the largest input it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(2, 6, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3))
        self.largest, self.passes = 0, 0

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.largest, self.passes = max(self.largest, observation.numel()), self.passes + 1
        return self.net(observation)


@pytest.fixture
def victim() -> PolicyView:
    view = PolicyView.from_torch(Watched(), kind="q", observation_shape=(2, SIDE, SIDE), n_frames=2)
    view.actor.largest = view.actor.passes = 0
    return view


def pictures(n: int) -> torch.Tensor:
    return torch.rand(n, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def situation(view: PolicyView, x: torch.Tensor, **more: Any) -> AttackContext:
    return context(view, x, 1.5, noise=Gaussian(0.1), seen=pictures(len(x) + 1)[1:, None], pixels=(0.0, 1.0), **more)


PICTURE_ATTACKS = {
    "pgd": SmoothedPGD(draws=DRAWS, step_size=0.3),
    "flip": MinimalFlip(draws=DRAWS),
    "margin": GradientAttack(Margin(), draws=DRAWS, steps=4),
    "mad": GradientAttack(ActionDeviation(), draws=DRAWS, steps=4),
}
each_attack = pytest.mark.parametrize("attack", PICTURE_ATTACKS.values(), ids=PICTURE_ATTACKS)


@each_attack
@pytest.mark.parametrize("copies", [3 * DRAWS, DRAWS, 5], ids=lambda copies: f"{copies} copies a pass")
def test_attacks_do_not_depend_on_the_size_of_a_block(
    victim: PolicyView, attack: Attack, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pictures(5)
    whole = attack.perturb(x, situation(victim, x))
    assert victim.actor.largest > 3 * DRAWS * FLOATS
    assert bool((cost(x, whole) > 0).any())
    victim.actor.largest = 0
    monkeypatch.setattr(expectation, "BLOCK", copies * FLOATS + FLOATS // 2)
    in_blocks = attack.perturb(x, situation(victim, x))
    assert victim.actor.largest == copies * FLOATS
    torch.testing.assert_close(in_blocks, whole, rtol=0, atol=1e-3)


@each_attack
def test_blocks_of_whole_rows_compute_nothing_twice(
    victim: PolicyView, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient through a checkpoint")

    monkeypatch.setattr(expectation, "BLOCK", 2 * DRAWS * FLOATS)
    original = expectation.checkpoint
    monkeypatch.setattr(expectation, "checkpoint", lambda *a, **k: (refuse if torch.is_grad_enabled() else original)(*a, **k))
    x = pictures(5)
    assert bool((cost(x, attack.perturb(x, situation(victim, x))) > 0).any())


class _Box:
    """A tensor that a graph keeps for its gradient."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_a_gradient_over_many_draws_keeps_no_activations(victim: PolicyView, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradient, but between two passes the graph holds no layer's output, however many draws there are."""
    noise = samples(Gaussian(0.1), (64, SIDE, SIDE), torch.Generator().manual_seed(0), torch.float32, torch.device("cpu"))

    def gradient() -> tuple[torch.Tensor, int]:
        x = pictures(3).requires_grad_(True)
        alive: weakref.WeakSet[_Box] = weakref.WeakSet()

        def keep(tensor: torch.Tensor) -> _Box:
            box = _Box(tensor)
            alive.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            value = answers(AttackContext.scores, x, situation(victim, x.detach()), noise).square().sum()
        given = {tensor.untyped_storage().data_ptr() for tensor in (x, noise)}
        kept = {box.tensor.untyped_storage().data_ptr(): box.tensor.numel() for box in alive}
        return torch.autograd.grad(value, x)[0], sum(size for place, size in kept.items() if place not in given)

    at_once, kept = gradient()
    assert kept > 3 * 64 * FLOATS
    monkeypatch.setattr(expectation, "BLOCK", 4 * FLOATS)
    in_blocks, kept = gradient()
    assert kept < 3 * 64 * FLOATS / 10
    torch.testing.assert_close(in_blocks, at_once, rtol=1e-4, atol=1e-4)


def test_one_block_is_one_pass_and_one_gradient(victim: PolicyView) -> None:
    """Nothing is computed twice where memory does not ask for it."""
    x = pictures(4).requires_grad_(True)
    value = answers(AttackContext.scores, x, situation(victim, x.detach()), torch.zeros(5, SIDE, SIDE))
    assert value.shape == (4, 5, 3)
    torch.autograd.grad(value.sum(), x)
    assert victim.actor.passes == 1


def test_answers_are_those_of_every_row_under_every_draw(victim: PolicyView, monkeypatch: pytest.MonkeyPatch) -> None:
    x, noise = pictures(5), 0.1 * frames_of(6, SIDE, SIDE)
    for block in (expectation.BLOCK, 4 * FLOATS):
        monkeypatch.setattr(expectation, "BLOCK", block)
        found = answers(AttackContext.scores, x, situation(victim, x), noise)
        for i in range(5):
            for j in range(6):
                stack = torch.stack((pictures(6)[i + 1], x[i] + noise[j]))[None]
                torch.testing.assert_close(found[i, j], victim.scores(stack)[0], rtol=1e-4, atol=1e-5)


@each_attack
@pytest.mark.parametrize("pixels", [(0.0, 1.0), (0.1, 0.7)])
def test_attacked_pictures_stay_in_their_range(victim: PolicyView, attack: Attack, pixels: tuple[float, float]) -> None:
    low, high = pixels = tuple(torch.tensor(pixels).tolist())
    x = (2 * pictures(12) - 0.5).clamp(low, high)  # many entries at the ends
    for norm, budget in ((1, 20.0), (2, 2.5), (float("inf"), 0.3)):
        delivered = attack.perturb(x, replace(context(victim, x, budget, norm=norm, pixels=pixels), noise=Gaussian(0.1)))
        assert bool((cost(x, delivered, norm) > 0).any())
        assert bool((cost(x, delivered, norm) <= budget).all())
        assert float(delivered.min()) >= low
        assert float(delivered.max()) <= high


class Brightness(nn.Module):
    """Action 1 is worth the sum of the entries, action 0 `level`."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        total = observation.flatten(1).sum(1)
        return torch.stack((torch.full_like(total, self.level), total), dim=1)


@pytest.mark.parametrize("attack", [SmoothedPGD(draws=1, step_size=2.0), MinimalFlip(draws=1)], ids=["pgd", "flip"])
def test_nothing_is_spent_on_a_flip_that_is_beyond_the_range(attack: Attack) -> None:
    """32 entries at .9 can rise to 32 in all; the l2 ball alone would allow more."""
    x = torch.full((1, 4, 8), 0.9)
    for level, flips in ((31.0, True), (33.0, False)):
        view = PolicyView.from_torch(Brightness(level), kind="q", observation_shape=(4, 8))
        delivered = attack.perturb(x, context(view, x, 10.0, pixels=(0.0, 1.0)))
        assert bool(view.scores(delivered).argmax() == 1) == flips
        assert torch.equal(delivered, x) != flips


@pytest.mark.parametrize("kind", [SmoothedPGD, MinimalFlip])
def test_a_flip_of_pictures_pays_for_entries_with_room_only(kind: type[Attack]) -> None:
    """Half of the entries are at the end of their range: the least l2 norm is that of the other half."""

    view = PolicyView.from_torch(Brightness(20.0), kind="q", observation_shape=(4, 8))
    x = torch.full((1, 4, 8), 0.2)
    x[0, :2] = 1.0  # 16 + 3.2: the others have to rise by 0.8 in all
    settings = {"draws": 1} | ({"step_size": 0.005} if kind is SmoothedPGD else {"bisections": 14})
    delivered = kind(**settings).perturb(x, context(view, x, 1.0, pixels=(0.0, 1.0)))
    assert float(cost(x, delivered)) == pytest.approx(0.8 / 4, abs=0.006)
    assert torch.equal(delivered[0, :2], x[0, :2])
