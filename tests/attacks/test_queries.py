"""Attacks by queries: exact optima of linear rules, counts of answers, victims without gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import network_balancer

from attacks.victims import WEIGHTS, actor, context, cost, frames_of, linear
from robustrl.attacks import NES, Flips, GradientAttack, Greedy, Margin, MinimalFlip, Square, Transfer
from robustrl.attacks.queries import _window
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel
from robustrl.training import robust

each_norm = pytest.mark.parametrize("norm", [1, 2, math.inf])


class Numpy(nn.Module):
    """Two actions by a linear rule, outside of torch; counts its answers."""

    def __init__(self, weights: Any, only_actions: bool = False) -> None:
        super().__init__()
        self.rule, self.only_actions, self.answers = np.asarray(weights, dtype=np.float64), only_actions, 0

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.answers += len(observation)
        lead = observation.detach().numpy().astype(np.float64).reshape(len(observation), -1) @ self.rule.ravel()
        scores = np.stack((-lead / 2, lead / 2), axis=1)
        return torch.from_numpy(np.eye(2)[scores.argmax(1)] if self.only_actions else scores)


def boxed(weights: Any, only_actions: bool = False) -> tuple[PolicyView, Numpy]:
    network = Numpy(weights, only_actions)
    view = PolicyView.from_torch(network, kind="q", observation_shape=np.shape(weights))
    network.answers = 0
    return view, network


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_square_finds_the_best_corner_of_a_linear_rule_exactly(n: int) -> None:
    weights = frames_of(1, n, seed=n)[0].double()
    view, _ = boxed(weights)
    x = frames_of(10, n)
    delivered = Square(queries=2000).perturb(x, context(view, x, 0.3, norm=math.inf))
    lead = x.double() @ weights
    best = x - 0.3 * (lead.sign()[:, None] * weights.sign()).float()
    torch.testing.assert_close(delivered, best, rtol=0, atol=1e-6)


def test_square_finds_the_best_corner_under_a_mask_and_with_a_scale() -> None:
    view, _ = boxed(WEIGHTS)
    x, scale = frames_of(10), torch.tensor([0.5, 2.0, 4.0, 1.0], dtype=torch.float64)
    delivered = Square(queries=500).perturb(
        x, context(view, x, 0.3, norm=math.inf, mask=(True, False, True, True), scale=scale)
    )
    lead = (x.double() @ WEIGHTS).sign()[:, None]
    best = x - (0.3 * lead * WEIGHTS.sign() * scale * torch.tensor([1, 0, 1, 1])).float()
    torch.testing.assert_close(delivered, best, rtol=0, atol=1e-5)


@each_norm
def test_the_objective_never_falls_with_more_queries_and_comes_near_the_dual_norm(norm: float) -> None:
    """The first candidates of two searches whose shares are the same are the same."""
    view, _ = boxed(WEIGHTS)
    x = 20 * frames_of(20)
    x = x[(x.double() @ WEIGHTS).abs() > 10]
    dual = {1: math.inf, 2: 2.0, math.inf: 1.0}[norm]
    drops = []
    for queries in (1, 10, 100, 1000):
        delivered = Square(queries=queries).perturb(x, context(view, x, 0.5, norm=norm))
        drops.append((x.double() @ WEIGHTS).abs() - (delivered.double() @ WEIGHTS).abs())
        assert bool((drops[-1] >= 0).all())
        assert bool((cost(x, delivered, norm) <= 0.5).all())
    assert bool((drops[-1] >= 0.97 * 0.5 * torch.linalg.vector_norm(WEIGHTS, dual)).all())
    assert float(drops[3].mean()) >= float(drops[2].mean()) >= float(drops[0].mean())


def test_a_search_keeps_what_it_has_found() -> None:
    """J of the kept candidate is non-decreasing: seen from the victim's side, query by query."""
    view, _ = boxed(WEIGHTS)
    x = frames_of(1)
    kept: list[float] = []

    class Watched(Margin):
        def against(self, context: Any, noise: Any) -> Any:
            gain = super().against(context, noise)

            def watched(point: torch.Tensor) -> torch.Tensor:
                value = gain(point)
                kept.append(float(value))
                return value

            return watched

    delivered = Square(Watched(), queries=60).perturb(x, context(view, x, 0.3, norm=math.inf))
    final = float((x.double() @ WEIGHTS).sign() * -(delivered.double() @ WEIGHTS))
    assert final == pytest.approx(max(kept), abs=1e-5)


@pytest.mark.parametrize(
    "attack", [Square(queries=37), NES(steps=3, pairs=5, restarts=2, random_start=True)], ids=["square", "nes"]
)
@pytest.mark.parametrize("noise", [None, Gaussian(0.2)], ids=["bare", "noise"])
def test_the_number_of_answers_is_exact(attack: Any, noise: Any) -> None:
    view, network = boxed(WEIGHTS)
    x = frames_of(6)
    attack.perturb(x, context(view, x, 0.3, norm=math.inf, noise=noise))
    assert network.answers == 6 * attack.answers_per_step(noise)
    assert attack.answers_per_step(None) == {"Square": 39, "NES": 2 + 2 * (3 * 11 + 1)}[type(attack).__name__]
    network.answers = 0
    attack.perturb(x, context(view, x, torch.tensor([0.3, 0.0] * 3), norm=math.inf, noise=noise))
    assert network.answers == 3 * attack.answers_per_step(noise)  # nothing is asked where nothing may be spent


@each_norm
@pytest.mark.parametrize("directions", ["gaussian", "signs"])
def test_estimated_gradients_drop_a_linear_margin_nearly_as_far_as_true_ones(norm: float, directions: Any) -> None:
    view, _ = boxed(WEIGHTS)
    x = 20 * frames_of(20)
    x = x[(x.double() @ WEIGHTS).abs() > 10]
    attack = NES(directions=directions, steps=10, pairs=50, random_start=False)
    delivered = attack.perturb(x, context(view, x, 0.5, norm=norm))
    largest = 0.5 * float(torch.linalg.vector_norm(WEIGHTS, {1: math.inf, 2: 2.0, math.inf: 1.0}[norm]))
    drop = (x.double() @ WEIGHTS).abs() - (delivered.double() @ WEIGHTS).abs()
    assert bool((drop > 0.97 * largest).all())


def test_a_scaled_threat_scales_the_estimates() -> None:
    view, _ = boxed(WEIGHTS)
    x, scale = 20 * frames_of(20), torch.tensor([0.5, 2.0, 4.0, 1.0], dtype=torch.float64)
    x = x[(x.double() @ WEIGHTS).abs() > 10]
    delivered = NES(steps=10, pairs=50, random_start=False).perturb(x, context(view, x, 0.5, scale=scale))
    drop = (x.double() @ WEIGHTS).abs() - (delivered.double() @ WEIGHTS).abs()
    assert bool((drop > 0.95 * 0.5 * (WEIGHTS * scale).norm()).all())


def test_actions_alone_are_enough_to_flip_most_votes() -> None:
    """The victim tells its action and nothing else; the share of noisy draws that flip is what the search climbs."""
    view, _ = boxed(WEIGHTS, only_actions=True)
    x = frames_of(30)
    x = x[(x.double() @ WEIGHTS).abs() < 1.5]
    noise = Gaussian(0.3)
    delivered = Square(Flips(), queries=200, draws=32).perturb(x, context(view, x, 0.3, norm=math.inf, noise=noise))
    before, after = ((seen.double() @ WEIGHTS) for seen in (x, delivered))
    assert bool((after * before < 0).all())  # 0.3 ||w||_1 = 1.95 is more than any margin here
    with pytest.raises(ValueError, match="Flips has no gradient: use a query attack"):
        GradientAttack(Flips()).check(view, ThreatModel(2, step=1.0), None)
    NES(Flips()).check(view, ThreatModel(2, step=1.0), None)


def test_gradient_attacks_cannot_take_such_a_victim_at_all() -> None:
    view, _ = boxed(WEIGHTS)
    x = frames_of(2)
    with pytest.raises(RuntimeError, match="grad"):
        GradientAttack(Margin()).perturb(x, context(view, x, 1.0))


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 8, 10), (12, 12), (10, 8, 3)], ids=str)
def test_pictures_are_attacked_in_squares_and_from_stripes(shape: tuple[int, ...]) -> None:
    """On the checked picture: a linear rule whose weights are constant down columns is solved by its first stripes sometimes."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    view, _ = boxed(weights)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(1))
    drops = []
    for queries in (1, 400):
        delivered = Square(queries=queries).perturb(x, context(view, x, 0.1, norm=math.inf, pixels=(0.0, 1.0)))
        assert float(delivered.min()) >= 0
        assert float(delivered.max()) <= 1
        lead = (x * weights).flatten(1).sum(1)
        drops.append(float((lead.abs() - lead.sign() * (delivered * weights).flatten(1).sum(1)).mean()))
    assert drops[1] > max(0.0, drops[0])
    assert drops[1] > 0.15 * 0.1 * float(weights.abs().sum())


@pytest.mark.parametrize("shape", [(2, 12, 16), (12, 16), (12, 16, 3)], ids=str)
def test_windows_are_squares_of_about_the_share_at_every_place(shape: tuple[int, ...]) -> None:
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(shape)
    for share in (0.8, 0.1, 0.001):
        for _ in range(60):
            inside = _window(torch.ones(shape), share, generator)
            plane = inside if len(shape) == 2 else inside.any(0) if shape[0] < 12 else inside.any(2)
            rows, columns = plane.any(1), plane.any(0)
            assert torch.equal(plane, rows[:, None] & columns[None])
            assert int(rows.sum()) == min(12, max(1, round(math.sqrt(share * 192))))
            assert int(inside.sum()) == int(plane.sum()) * (math.prod(shape) // 192)
            seen += inside
    assert float(seen.min()) > 0


def test_the_windows_of_vectors_hold_attackable_entries() -> None:
    generator, mask = torch.Generator().manual_seed(0), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    for share, size in ((1.0, 6), (0.5, 3), (0.01, 1)):
        counts = torch.stack([_window(mask, share, generator) for _ in range(100)])
        assert counts.sum(1).tolist() == [size] * 100
        assert not counts[:, mask == 0].any()
        assert bool(counts.any(0)[mask == 1].all())


def test_snooping_attacks_the_imitation_and_hits_the_victim() -> None:
    """An imitation with the right weights is as good as the victim; it may be asked without the victim at hand."""
    victim, _ = boxed(WEIGHTS)
    x = frames_of(40)
    attack = Transfer(linear(), GradientAttack(Margin(), allocation=Greedy(), random_start=False))
    delivered = attack.perturb(x, context(victim, x, 0.5))
    direct = attack.attack.perturb(x, context(linear(), x, 0.5))
    assert torch.equal(delivered, direct)
    assert not attack.needs_policy
    attack.check(victim, ThreatModel(2, step=1.0), None)
    attack.check(None, ThreatModel(2, step=1.0), None)
    with pytest.raises(ValueError, match="surrogate must take what the policy takes"):
        attack.check(linear(torch.ones(3)), ThreatModel(2, step=1.0), None)
    with pytest.raises(ValueError, match="Margin compares discrete actions"):
        Transfer(actor(frames_of(2, 4)), GradientAttack(Margin())).check(victim, ThreatModel(2, step=1.0), None)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Square("margin"), TypeError, "objective must be an objective"),
        (
            lambda: Square(robust.Margin()),
            TypeError,
            r"objective of robustrl\.attacks .*Margin\(.*\) of type robustrl\.training\.robust",
        ),
        (lambda: Square(queries=0), ValueError, "queries must be an integer >= 1"),
        (lambda: Square(share=1.5), ValueError, r"share must be in \(0, 1\], got 1.5"),
        (lambda: Square(draws=0), ValueError, "draws must be"),
        (lambda: Square(allocation="all"), TypeError, "allocation must be an allocation"),
        (lambda: NES(pairs=0), ValueError, "pairs must be"),
        (lambda: NES(width=0.0), ValueError, "width must be a finite number > 0"),
        (lambda: NES(directions="uniform"), ValueError, "directions must be one of"),
        (lambda: Transfer(network_balancer().actor, Square()), TypeError, "surrogate must be a PolicyView"),
        (lambda: Transfer(network_balancer(), Margin()), TypeError, "attack must be a robustrl attack"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_norm_0_has_no_small_steps() -> None:
    for attack in (Square(), NES(), MinimalFlip()):
        with pytest.raises(ValueError, match=r"threat\.norm must be 1, 2 or inf, got 0"):
            attack.check(linear(), ThreatModel(0, step=2), None)


def test_all_signs_of_stripes_occur() -> None:
    """One query leaves the start as it is: +- radius, the same down every column."""
    view, _ = boxed(torch.ones(4, 3))
    x = torch.full((1, 4, 3), -10.0)  # lead < 0: every push up counts as a gain only if it is one
    seen = set()
    for seed in range(40):
        delivered = Square(queries=1).perturb(x, context(view, x, 1.0, norm=math.inf, seed=seed))
        delta = (delivered - x)[0]
        if bool(delta.any()):
            assert torch.equal(delta, delta[:1].expand(4, 3))
            seen.add(tuple(delta[0].tolist()))
    assert seen == {signs for signs in itertools.product((-1.0, 1.0), repeat=3) if sum(signs) > 0}
