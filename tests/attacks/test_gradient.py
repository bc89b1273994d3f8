"""Projected gradient ascent: closed forms on linear victims, budgets to the last bit, rows on their own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from toys import network_balancer

from attacks.victims import WEIGHTS, LinearQ, Matrix, actor, context, cost, frames_of, linear
from robustrl.attacks import (
    ATTACKS,
    ActionDeviation,
    Attack,
    GradientAttack,
    Greedy,
    LowValue,
    Margin,
    MinimalFlip,
    SmoothedPGD,
    Spread,
    StrategicallyTimed,
)
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.policy import PolicyView
from robustrl.threat import Ledger, ThreatModel

DUAL = {1: math.inf, 2: 2, math.inf: 1}
each_norm = pytest.mark.parametrize("norm", [1, 2, math.inf])
W = frames_of(3, 6, seed=11).double()


def margin_drop(x: torch.Tensor, delivered: torch.Tensor) -> torch.Tensor:
    """How much the better action lost against the other on the linear rule."""
    before = x.double() @ WEIGHTS + 0.1
    return before.abs() - before.sign() * (delivered.double() @ WEIGHTS + 0.1)


@each_norm
@pytest.mark.parametrize("noise", [None, Gaussian(0.2), Laplace(0.1)], ids=["bare", "gaussian", "laplace"])
def test_the_margin_of_a_linear_rule_drops_by_the_dual_norm(norm: float, noise: Noise | None) -> None:
    """The largest drop of w . x + b within ||delta||_p <= e is e ||w||_dual; noise adds the same to both sides."""
    x, budgets = 10 * frames_of(100), torch.linspace(0.1, 2, 100, dtype=torch.float64)
    x = x[(x.double() @ WEIGHTS).abs() > 8][:50]  # no noise of these sizes changes what is best
    budgets = budgets[: len(x)]
    largest = budgets * torch.linalg.vector_norm(WEIGHTS, DUAL[norm])
    straight = GradientAttack(Margin(), allocation=Greedy(), random_start=False)
    drop = margin_drop(x, straight.perturb(x, context(linear(), x, budgets, noise=noise, norm=norm)))
    torch.testing.assert_close(drop, largest, rtol=1e-4, atol=1e-5)
    for attack, share in (
        (GradientAttack(Margin(), allocation=Greedy()), 0.99),
        (replace(straight, steps=1, step_size=9.0), 0.9999),
    ):
        drop = margin_drop(x, attack.perturb(x, context(linear(), x, budgets, noise=noise, norm=norm)))
        assert bool((drop >= share * largest).all())
        assert bool((drop <= largest * (1 + 1e-5) + 1e-5).all())


@pytest.mark.parametrize("std", [(), (0.5, 1.0, 2.0)], ids=["deterministic", "gaussian"])
@pytest.mark.parametrize("noise", [None, Gaussian(0.2)], ids=["bare", "noise"])
def test_deviation_of_a_linear_policy_reaches_the_largest_singular_value(std: tuple[float, ...], noise: Noise | None) -> None:
    """max ||W d|| over ||d||_2 <= e is e sigma_max(W); a Gaussian policy's rows count in standard deviations."""
    view, x, radius = actor(W, std=std), frames_of(5, 6), 0.7
    scaled = W / torch.tensor(std or (1.0,) * 3)[:, None]
    largest = radius * float(torch.linalg.matrix_norm(scaled, 2))
    attack = GradientAttack(ActionDeviation(), allocation=Greedy(), steps=40, step_size=5.0, restarts=3)
    delivered = attack.perturb(x, context(view, x, radius, noise=noise))
    moved = (scaled @ (delivered - x).double().T).norm(dim=0)
    torch.testing.assert_close(moved, torch.full((5,), largest, dtype=torch.float64), rtol=1e-4, atol=0)


def test_deviation_of_a_linear_policy_reaches_the_best_corner_of_the_cube() -> None:
    """max ||W d|| over ||d||_inf <= e is attained at one of the 2^n sign vectors; restarts find it."""
    radius, n = 0.3, 8
    for seed in range(5):
        weights = frames_of(3, n, seed=seed).double()
        corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        largest = radius * float((corners @ weights.T).norm(dim=1).max())
        x, view = frames_of(1, n), actor(weights)
        attack = GradientAttack(ActionDeviation(), restarts=30)
        delivered = attack.perturb(x, context(view, x, radius, norm=math.inf))
        assert float((weights @ (delivered - x).double().T).norm()) == pytest.approx(largest, rel=1e-4)


@each_norm
def test_low_value_of_a_linear_critic_drops_by_the_dual_norm_of_its_gradient(norm: float) -> None:
    """Q(s, W x) = g . W x falls by at most e ||W^T g||_dual."""
    of_action = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)
    view = actor(W, q_critic=LinearQ(of_action, torch.ones(6)))
    x, radius = frames_of(20, 6), 0.4
    attack = GradientAttack(LowValue(), allocation=Greedy(), random_start=False)
    delivered = attack.perturb(x, context(view, x, radius, norm=norm, noise=Gaussian(0.1)))
    drop = -((delivered - x).double() @ W.T @ of_action)
    largest = radius * float(torch.linalg.vector_norm(W.T @ of_action, DUAL[norm]))
    torch.testing.assert_close(drop, torch.full((20,), largest, dtype=torch.float64), rtol=1e-4, atol=0)


@each_norm
def test_deviation_needs_a_random_start(norm: float) -> None:
    """Its gradient at the true frame is zero."""
    x, view = frames_of(10, 6), actor(W, std=(1.0, 1.0, 1.0))
    for noise in (None, Gaussian(0.2)):
        stuck = GradientAttack(ActionDeviation(), random_start=False).perturb(x, context(view, x, 1.0, norm=norm, noise=noise))
        assert torch.equal(stuck, x)
        free = GradientAttack(ActionDeviation()).perturb(x, context(view, x, 1.0, norm=norm, noise=noise))
        assert bool((cost(x, free, norm) > 0.5).all())


def bumpy(seed: int = 0) -> PolicyView:
    """Two inputs, one hidden layer, one action: many local maxima."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 1))
    with torch.no_grad():
        net[0].weight.mul_(4)
    return PolicyView.from_torch(
        net, kind="deterministic", observation_shape=(2,), action_space=spaces.Box(-np.inf, np.inf, (1,), np.float32)
    )


def deviation(view: PolicyView, x: torch.Tensor, delivered: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (view.mean_action(delivered) - view.mean_action(x)).square().sum(1) / 2


def test_the_best_of_the_iterates_counts_and_more_steps_or_restarts_never_hurt() -> None:
    view, x = bumpy(), frames_of(40, 2)
    for norm in (1, 2, math.inf):
        settings: list[dict[str, int]] = [{"steps": k} for k in (1, 2, 3, 5, 8, 13)] + [
            {"restarts": k} for k in (1, 2, 3, 5, 8)
        ]
        found: dict[str, list[torch.Tensor]] = {"steps": [], "restarts": []}
        for setting in settings:
            attack = GradientAttack(ActionDeviation(), allocation=Greedy(), step_size=0.3, draws=1, **setting)
            delivered = attack.perturb(x, context(view, x, 1.0, norm=norm))
            found[next(iter(setting))].append(deviation(view, x, delivered))
        for series in found.values():
            assert all(bool((more >= less - 1e-5).all()) for less, more in itertools.pairwise(series))
            assert bool((series[-1] > series[0] + 1e-3).any())


@each_norm
def test_restarts_find_the_global_maximum_of_a_small_network(norm: float) -> None:
    """Against a grid of the ball."""
    side = torch.linspace(-1, 1, 201)
    grid = torch.cartesian_prod(side, side)
    grid = grid[torch.linalg.vector_norm(grid, norm, dim=1) <= 1]
    for seed in range(3):
        view, x = bumpy(seed), frames_of(4, 2, seed=seed)
        attack = GradientAttack(ActionDeviation(), allocation=Greedy(), steps=30, step_size=0.1, restarts=20)
        reached = deviation(view, x, attack.perturb(x, context(view, x, 1.0, norm=norm)))
        for i in range(4):
            best = float(deviation(view, x[i : i + 1], x[i] + grid).max())
            assert float(reached[i]) >= 0.99 * best


ALL: list[tuple[str, PolicyView, GradientAttack]] = [
    ("margin", network_balancer(16), GradientAttack(Margin(), allocation=Greedy())),
    ("mad", actor(frames_of(2, 4, seed=3), std=(0.4, 2.0)), GradientAttack(ActionDeviation(), allocation=Greedy())),
    ("mad on logits", network_balancer(16), GradientAttack(ActionDeviation(), allocation=Greedy(), restarts=2)),
    (
        "critic",
        actor(frames_of(2, 4, seed=3), q_critic=LinearQ([1.0, 2.0], torch.ones(4))),
        GradientAttack(LowValue(), allocation=Greedy()),
    ),
]
each_victim = pytest.mark.parametrize(("view", "attack"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])


@each_victim
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deliveries_stay_within_the_allowance_to_the_last_bit(
    view: PolicyView, attack: GradientAttack, norm: float, dtype: torch.dtype
) -> None:
    x, budgets = (0.3 * frames_of(100)).to(dtype), torch.logspace(-4, 1, 100, dtype=torch.float64)
    delivered = attack.perturb(x, context(view, x, budgets, noise=Gaussian(0.2), norm=norm))
    assert delivered.dtype == dtype
    assert delivered.shape == x.shape
    assert bool((cost(x, delivered, norm) <= budgets).all())
    assert float((cost(x, delivered, norm) / budgets).median()) > 0.99
    for i in range(100):
        ledger = Ledger(ThreatModel(norm=norm, step=float(budgets[i])), 1)
        ledger.charge(x[i : i + 1].numpy(), delivered[i : i + 1].numpy())


@each_victim
def test_without_budget_frames_come_back_bit_for_bit(view: PolicyView, attack: GradientAttack) -> None:
    x = frames_of(10)
    x[0, 0] = -0.0
    assert attack.perturb(x, context(view, x, 0.0, noise=Gaussian(0.2))) is x
    delivered = attack.perturb(x, context(view, x, torch.tensor([0.0, 5.0] * 5), noise=Gaussian(0.2)))
    assert torch.equal(delivered[::2].view(torch.int32), x[::2].view(torch.int32))
    assert bool((cost(x, delivered)[1::2] > 0).all())


@each_victim
@each_norm
def test_entries_under_the_mask_are_left_alone_bit_for_bit(view: PolicyView, attack: GradientAttack, norm: float) -> None:
    x = frames_of(30)
    delivered = attack.perturb(x, context(view, x, 1.0, mask=(True, False, True, False), norm=norm))
    assert torch.equal(delivered[:, 1::2], x[:, 1::2])
    assert float(cost(x, delivered, norm).median()) > 0.99


@each_victim
def test_episodes_side_by_side_are_attacked_as_if_alone(view: PolicyView, attack: GradientAttack) -> None:
    """Noise and starts of a step are shared, so that the attack on one episode does not depend on the others."""
    x, budgets = 0.2 * frames_of(24), torch.linspace(0, 1, 24, dtype=torch.float64)
    everyone = context(view, x, budgets, noise=Gaussian(0.2))
    together = attack.perturb(x, everyone)
    for i in range(1, 24):
        alone = context(view, x[i : i + 1], budgets[i : i + 1], noise=Gaussian(0.2))
        torch.testing.assert_close(together[i : i + 1], attack.perturb(x[i : i + 1], alone), rtol=0, atol=2e-4)
        assert torch.equal(alone.generator.get_state(), everyone.generator.get_state())  # in later steps too


@each_victim
def test_an_attack_is_a_function_of_its_stream_and_writes_to_nothing(view: PolicyView, attack: GradientAttack) -> None:
    x = 0.2 * frames_of(50)
    before = x.clone()
    situations = [context(view, x, 0.5, noise=Gaussian(0.2), seed=seed) for seed in (0, 0, 1)]
    one, again, other = (attack.perturb(x, situation) for situation in situations)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(x, before)
    assert torch.equal(situations[0].clean_stack[:, -1], before)
    assert all(parameter.grad is None for parameter in view.parameters())


@pytest.mark.parametrize(("padding", "copies"), [("reset", 3), ("zero", 1)])
def test_the_first_frame_of_an_episode_moves_all_its_copies(padding: Any, copies: int) -> None:
    view = linear(torch.tensor([1.0, 0.0, 2.0, 0.0, 4.0, 0.0], dtype=torch.float64), n_frames=3)
    x = torch.full((1, 2), 50.0)
    attack = GradientAttack(Margin(), allocation=Greedy(), random_start=False)
    delivered = attack.perturb(x, context(view, x, 1.0, padding=padding))
    drop = float(view.scores(context(view, x, 1.0, padding=padding).observation(x)).diff())
    drop -= float(view.scores(context(view, x, 1.0, padding=padding).observation(delivered)).diff())
    assert drop == pytest.approx(7.0 if copies == 3 else 4.0, rel=1e-3)


class Kinked(nn.Module):
    """sqrt at 0 has an infinite gradient; the second score is NaN where the first entry is above 1."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(observation.abs().sum(1, keepdim=True))
        return torch.cat((1 + 0 * root, torch.where(observation[:, :1] > 1, torch.nan, root)), dim=1)


class Flat(nn.Module):
    """Scores that ignore the observation."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.cat((0 * observation[:, :1] + 1, 0 * observation[:, :1]), dim=1)


@pytest.mark.parametrize("objective", [Margin(), ActionDeviation(), LowValue()], ids=lambda objective: type(objective).__name__)
@each_norm
def test_where_nothing_can_be_gained_nothing_is_spent(objective: Any, norm: float) -> None:
    policy = PolicyView.from_torch(Flat(), kind="q", observation_shape=(4,))
    x = frames_of(20)
    attack = GradientAttack(objective, allocation=Greedy())
    assert torch.equal(attack.perturb(x, context(policy, x, 3.0, noise=Gaussian(0.2), norm=norm)), x)


@each_norm
@pytest.mark.parametrize("random_start", [True, False])
def test_broken_gradients_and_values_deliver_no_nan(norm: float, random_start: bool) -> None:
    policy = PolicyView.from_torch(Kinked(), kind="logits", observation_shape=(4,))
    x = torch.zeros(5, 4)
    attack = GradientAttack(Margin(), allocation=Greedy(), random_start=random_start)
    delivered = attack.perturb(x, context(policy, x, 3.0, norm=norm))
    assert bool(torch.isfinite(delivered).all())
    assert bool(torch.isfinite(policy.scores(delivered)).all())


@each_norm
def test_pictures_stay_in_their_range_and_the_budget_goes_where_there_is_room(norm: float) -> None:
    """A linear rule on pixels in [0, 1]: entries at the end of their range cannot follow the gradient any farther."""
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 16)
    view = PolicyView.from_torch(
        Matrix(weights),
        kind="deterministic",
        observation_shape=(1, 4, 4),
        action_space=spaces.Box(-np.inf, np.inf, (1,), np.float32),
        q_critic=LinearQ([-1.0], torch.zeros(16)),
    )
    x = (torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 0.5).clamp(0, 1)  # a half at the ends
    radius = {1: 1.5, 2: 0.6, math.inf: 0.2}[norm]
    attack = GradientAttack(LowValue(), allocation=Greedy(), steps=60, random_start=False)
    delivered = attack.perturb(x, context(view, x, radius, norm=norm, pixels=(0.0, 1.0)))
    assert float(delivered.min()) >= 0
    assert float(delivered.max()) <= 1
    rise = ((delivered - x).double().flatten(1) @ weights[0]).numpy()
    best = [_best_linear_rise(row, weights[0].numpy(), radius, norm) for row in x.double().flatten(1).numpy()]
    np.testing.assert_array_less(rise, np.array(best) * (1 + 1e-5))
    np.testing.assert_array_less(0.99 * np.array(best), rise)


def _best_linear_rise(x: np.ndarray, weights: np.ndarray, radius: float, norm: float) -> float:
    """max w . d over the ball and the box: every entry goes as far as a multiplier lets it (l1: the largest weights first)."""
    room, w = np.where(weights > 0, 1 - x, x), np.abs(weights)
    if norm == math.inf:
        return float(w @ np.minimum(room, radius))
    if norm == 1:
        left, rise = radius, 0.0
        for i in np.argsort(-w):
            step = min(left, room[i])
            left, rise = left - step, rise + w[i] * step
        return rise
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        if np.linalg.norm(np.minimum(room, scale * w)) > radius:
            high = scale
        else:
            low = scale
    return float(w @ np.minimum(room, low * w))


def test_noise_is_averaged_over_with_common_draws() -> None:
    """Two cliffs: the true frame sees one of them, but most noise draws are beyond the other."""

    class Cliffs(nn.Module):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            slope = torch.sigmoid(20 * (observation[:, 0] - 1)) + 10 * torch.sigmoid(20 * (observation[:, 1] - 2))
            return torch.stack((torch.full_like(slope, 2.0), slope), dim=1)

    view, x = PolicyView.from_torch(Cliffs(), kind="logits", observation_shape=(2,)), torch.zeros(1, 2)
    attack = GradientAttack(Margin(), allocation=Greedy(), steps=20, draws=64, random_start=False)
    noisy = attack.perturb(x, context(view, x, 1.5, noise=Gaussian(1.0)))[0]
    bare = attack.perturb(x, context(view, x, 1.5))[0]
    assert float(noisy[1]) > 1.3
    assert float(bare[0]) > 1.2


def test_the_names_of_the_command_line_make_attacks_that_take_their_settings() -> None:
    kinds = {name: ATTACKS[name](draws=3).to_dict() for name in ("pgd", "flip", "mad", "critic", "margin")}
    assert kinds["pgd"] == SmoothedPGD(draws=3).to_dict()
    assert kinds["flip"] == MinimalFlip(draws=3).to_dict()
    for name, objective in (("mad", "ActionDeviation"), ("critic", "LowValue"), ("margin", "Margin")):
        assert kinds[name]["kind"] == "GradientAttack"
        assert kinds[name]["objective"] == {"kind": objective}
        assert kinds[name]["draws"] == 3
    assert ATTACKS["mad"](allocation=Spread(5), steps=2) == GradientAttack(ActionDeviation(), allocation=Spread(5), steps=2)


def test_reports_tell_objective_and_allocation() -> None:
    attack: Attack = GradientAttack(LowValue(), allocation=StrategicallyTimed(0.25, Spread(7)), restarts=2)
    assert attack.to_dict() == {
        "kind": "GradientAttack",
        "objective": {"kind": "LowValue"},
        "allocation": {"kind": "StrategicallyTimed", "least_gain": 0.25, "allocation": {"kind": "Spread", "n_steps": 7}},
        "steps": 10,
        "step_size": None,
        "restarts": 2,
        "draws": 8,
        "random_start": True,
    }


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"objective": "mad"},
            TypeError,
            r"objective must be an objective of robustrl.attacks such as ActionDeviation\(\), got 'mad' of type str",
        ),
        ({"objective": Margin}, TypeError, "objective must be an objective"),
        ({"allocation": "greedy"}, TypeError, r"allocation must be an allocation such as attacks.Uniform\(\), got 'greedy'"),
        ({"allocation": Uniform(0.1)}, TypeError, "allocation must be an allocation"),
        ({"allocation": Greedy}, TypeError, "allocation must be an allocation"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
        ({"step_size": math.nan}, ValueError, "step_size must be"),
        ({"step_size": "auto"}, TypeError, "step_size must be"),
        ({"restarts": -1}, ValueError, "restarts must be an integer >= 1"),
        ({"restarts": 2, "random_start": False}, ValueError, "restarts must be 1 without random_start, got 2"),
        ({"draws": 0}, ValueError, "draws must be an integer >= 1"),
        ({"draws": True}, TypeError, "draws must be an integer"),
        ({"random_start": 1}, TypeError, "random_start must be True or False, got 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientAttack(**{"objective": Margin(), **settings})


@pytest.mark.parametrize(
    ("threat", "noise", "message"),
    [
        (ThreatModel(norm=2, episode=0.5, units="unit01"), None, "in raw units; got units='unit01'"),
        (ThreatModel(norm=2, episode=0.5, mask=(True, False, False)), None, "mask of 3 entries does not fit"),
        (ThreatModel(norm=2, episode=math.inf), None, "needs a finite budget"),
        (ThreatModel(norm=math.inf, step=math.inf), None, "needs a finite budget"),
        (ThreatModel(norm=1, episode=0.5), Ablation(0.5), "needs additive noise"),
        (ThreatModel(norm=1, episode=0.5), Splitting(0.5, 0.0, 1.0), "needs additive noise"),
    ],
)
def test_threats_that_the_attack_cannot_serve_are_refused(threat: ThreatModel, noise: Noise | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientAttack(Margin()).check(linear(), threat, noise)


def test_the_objective_is_asked_whether_it_fits_the_policy() -> None:
    GradientAttack(ActionDeviation()).check(actor(W), ThreatModel(norm=2, episode=1.0), Uniform(0.2))
    with pytest.raises(ValueError, match="LowValue needs a critic"):
        GradientAttack(LowValue()).check(actor(W), ThreatModel(norm=2, episode=1.0), None)
