"""Attacks that networks learn from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustrl.training.supervised import FGSMRS, NFGSM, PGD, InnerAttack, NoAttack, Region
from robustrl.training.supervised.attacks import ATTACKS, check_attack

EPSILON = 0.3
SLOPE = torch.tensor([2.0, -1.0, 0.5, -3.0, 0.25])
X = torch.linspace(0, 1, 40).reshape(8, 5)
EVERY = [FGSMRS(), NFGSM(), PGD(), PGD(steps=3, alpha=0.7, restarts=3)]
INSIDE = [attack for attack in EVERY if not isinstance(attack, NFGSM)]


def linear(points: Tensor) -> Tensor:
    return points @ SLOPE


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(delta: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ord=norm, dim=1)


@pytest.mark.parametrize("attack", [FGSMRS(alpha=2), FGSMRS(alpha=2.5), PGD(steps=8)])
def test_linear_loss_is_raised_by_the_dual_norm_in_norm_inf(attack: InnerAttack) -> None:
    delta = attack.perturb(linear, X, EPSILON, "inf", generator=generator())
    assert torch.equal(delta, (EPSILON * SLOPE.sign()).expand_as(X))
    assert torch.allclose(linear(delta), EPSILON * SLOPE.abs().sum().expand(len(X)))


def test_linear_loss_is_raised_by_the_dual_norm_in_norm_2() -> None:
    delta = PGD(steps=300, alpha=0.25).perturb(linear, X, EPSILON, 2, generator=generator())
    assert torch.allclose(linear(delta), EPSILON * SLOPE.norm().expand(len(X)), rtol=1e-5)
    assert torch.allclose(delta, (EPSILON * SLOPE / SLOPE.norm()).expand_as(X), atol=1e-4)


@pytest.mark.parametrize("norm", ["inf", 2])
def test_pgd_raises_a_linear_loss_more_than_fgsm_and_that_more_than_a_random_start(norm: Any) -> None:
    raised = [
        linear(attack.perturb(linear, X, EPSILON, norm, generator=generator())).mean()
        for attack in (PGD(steps=20), FGSMRS(alpha=1))
    ]
    start = linear(Region.of(EPSILON, norm).random(X, 1, generator())).mean()
    assert raised[0] >= raised[1] > start


def test_mean_size_of_fgsm_rs_is_the_closed_form() -> None:
    """U + 1.25 epsilon, cut at epsilon, has the mean 0.859375 epsilon for U uniform in +-epsilon."""
    delta = FGSMRS().perturb(lambda x: x.sum(1), torch.zeros(2000, 50), EPSILON, generator=generator())
    assert float(delta.abs().mean()) / EPSILON == pytest.approx(0.859375, abs=2e-3)
    assert float((delta == EPSILON).float().mean()) == pytest.approx(0.625, abs=5e-3)


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("k", [1.0, 2.0])
def test_n_fgsm_leaves_the_ball_but_not_the_larger_one(norm: Any, k: float) -> None:
    delta = NFGSM(k=k).perturb(linear, torch.zeros(2000, 5), EPSILON, norm, generator=generator())
    largest = float(sizes(delta, float(norm)).max())
    assert EPSILON < largest <= (k + 1) * EPSILON * (1 + 1e-6)
    assert largest > 0.9 * (k + 1) * EPSILON


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("attack", INSIDE)
def test_perturbations_stay_in_ball_and_range_at_every_gradient_step(attack: InnerAttack, norm: Any) -> None:
    met: list[Tensor] = []

    def loss(points: Tensor) -> Tensor:
        met.append(points.detach().clone())
        return (points * SLOPE).sin().sum(1)

    delta = attack.perturb(loss, X, EPSILON, norm, (0.0, 1.0), generator=generator())
    for points in (*met, X + delta):
        assert sizes(points - X, float(norm)).max() <= EPSILON * (1 + 1e-5)
        assert points.min() >= 0
        assert points.max() <= 1


@pytest.mark.parametrize("attack", EVERY)
def test_range_may_differ_between_entries(attack: InnerAttack) -> None:
    low, high = np.array([0, 0, 0.5, -1, -np.inf]), torch.tensor([1, 0.1, 0.6, 1, math.inf])
    x = torch.tensor([[0.5, 0.0, 0.55, 0.0, 3.0]]).expand(50, 5)
    points = x + attack.perturb(linear, x, EPSILON, bounds=(low, high), generator=generator())
    assert bool((points >= torch.from_numpy(low) - 1e-6).all() & (points <= high + 1e-6).all())


def test_l2_steps_go_where_there_is_room() -> None:
    """The steepest entry is at the end of its range: all of the budget is for the other one."""
    x = torch.tensor([[1.0, 0.5]]).expand(20, 2)
    delta = PGD().perturb(lambda p: p @ torch.tensor([10.0, 1.0]), x, EPSILON, 2, (0, 1), generator=generator())
    assert torch.allclose(delta, torch.tensor([0.0, EPSILON]).expand(20, 2), atol=1e-6)


def test_start_of_n_fgsm_is_cut_to_the_range_before_the_step() -> None:
    """Or half of the starts at an end of the range would undo the step."""
    delta = NFGSM().perturb(lambda x: x.sum(1), torch.zeros(100, 4), EPSILON, bounds=(0, 10), generator=generator())
    assert float(delta.min()) >= EPSILON


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("attack", EVERY)
def test_masked_entries_stay(attack: InnerAttack, norm: Any) -> None:
    mask = torch.tensor([True, False, True, False, True])
    delta = attack.perturb(linear, X, EPSILON, norm, mask=mask, generator=generator())
    assert bool((delta[:, ~mask] == 0).all())
    assert bool((delta[:, mask] != 0).all())


@pytest.mark.parametrize("entries", [1, 5])
def test_random_starts_are_at_even_distances_whatever_is_masked(entries: int) -> None:
    found = sizes(Region.of(EPSILON, 2, mask=torch.arange(5) < entries).random(torch.zeros(4000, 5), 2, generator()), 2)
    assert torch.allclose(
        found.quantile(torch.tensor([0.25, 0.5, 0.75, 1]).double()) / EPSILON, torch.arange(1, 5).double() / 2, atol=0.05
    )


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("attack", EVERY)
def test_units_scale_perturbations_entry_by_entry(attack: InnerAttack, norm: Any) -> None:
    """In units of its own an entry looks the same."""
    units = torch.tensor([1.0, 10.0, 0.1, 2.0, 0.0])
    whole = attack.perturb(linear, X, EPSILON, norm, mask=units, generator=generator())
    alike = attack.perturb(
        lambda e: (e * units) @ SLOPE, X, EPSILON, norm, mask=torch.tensor([1.0, 1, 1, 1, 0]), generator=generator()
    )
    assert torch.allclose(whole, alike * units, atol=1e-5)


@pytest.mark.parametrize("attack", EVERY)
def test_zero_radius_changes_nothing(attack: InnerAttack) -> None:
    assert torch.equal(attack.perturb(linear, X, 0.0, generator=generator()), torch.zeros_like(X))


def test_no_attack_changes_nothing() -> None:
    assert torch.equal(NoAttack().perturb(linear, X, EPSILON), torch.zeros_like(X))
    assert NoAttack().scaled(0.5) == NoAttack()


@pytest.mark.parametrize("attack", EVERY)
def test_gradients_of_weights_stay_as_they_were(attack: InnerAttack) -> None:
    module = nn.Linear(5, 1)
    module.weight.grad = torch.full_like(module.weight, 7.0)
    delta = attack.perturb(lambda x: module(x)[:, 0], X.clone().requires_grad_(), EPSILON, "inf", (0, 1), generator=generator())
    assert not delta.requires_grad
    assert bool((module.weight.grad == 7).all())
    assert module.bias.grad is None


@pytest.mark.parametrize("attack", EVERY)
def test_one_generator_state_gives_one_perturbation(attack: InnerAttack) -> None:
    one, same, other = (attack.perturb(linear, X, EPSILON, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert isinstance(attack, PGD) or not torch.equal(one, other)


@pytest.mark.parametrize("attack", EVERY)
def test_row_without_a_finite_gradient_is_only_started(attack: InnerAttack) -> None:
    delta = attack.perturb(lambda x: x.sum(1) * torch.nan, X, EPSILON, generator=generator())
    assert bool(delta.isfinite().all())


def test_restarts_keep_the_worst_point_row_by_row() -> None:
    def bumps(points: Tensor) -> Tensor:
        return (20 * points).sin().sum(1)

    single = [bumps(X + PGD(5).perturb(bumps, X, 1.0, generator=generator(seed))) for seed in range(3)]
    several = bumps(X + PGD(5, restarts=30).perturb(bumps, X, 1.0, generator=generator()))
    assert bool((several >= single[0] - 1e-6).all())
    assert float(several.mean()) > max(float(one.mean()) for one in single)


def test_kl_divergence_has_no_gradient_at_the_input_itself_so_starts_are_random() -> None:
    module = nn.Linear(5, 3)
    clean = module(X).log_softmax(1).detach()

    def divergence(points: Tensor) -> Tensor:
        return nn.functional.kl_div(module(points).log_softmax(1), clean, reduction="none", log_target=True).sum(1)

    at = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence(at).sum(), at)
    assert float(slope.abs().max()) < 1e-6
    for attack in EVERY:
        assert float(divergence(X + attack.perturb(divergence, X, EPSILON, generator=generator())).min().detach()) > 1e-4


def test_shorter_steps_are_the_same_attack() -> None:
    assert FGSMRS().scaled(0.8) == FGSMRS(alpha=1.0)
    assert NFGSM(k=3, alpha=1).scaled(0.5) == NFGSM(k=3, alpha=0.5)
    assert PGD(7, restarts=2).scaled(0.5) == PGD(7, alpha=0.125, restarts=2)


def test_names_and_settings_of_the_attacks() -> None:
    assert {name: check_attack(name) for name in ATTACKS} == {
        "none": NoAttack(),
        "fgsm-rs": FGSMRS(1.25),
        "n-fgsm": NFGSM(2, 1),
        "pgd": PGD(10, 0.25, 1),
    }
    assert check_attack(PGD(3)) == PGD(steps=3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FGSMRS(0), "alpha"),
        (lambda: PGD(0), "steps"),
        (lambda: PGD(restarts=0), "restarts"),
        (lambda: NFGSM(k=math.nan), "k must"),
        (lambda: check_attack("fgsm"), "attack must be one of"),
        (lambda: Region.of(-1), "epsilon"),
        (lambda: Region.of(math.nan), "epsilon"),
        (lambda: Region.of(1, 1), "norm"),
        (lambda: Region.of(1, bounds=(1, 0)), "bounds"),
        (lambda: Region.of(1, bounds=(math.nan, 0)), "bounds"),
        (lambda: Region.of(1, mask=torch.tensor([-1.0, 1])), "mask"),
        (lambda: Region.of(1, mask=torch.zeros(3)), "mask"),
        (lambda: Region.of(1, mask=torch.tensor([math.nan, 1])), "mask"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
