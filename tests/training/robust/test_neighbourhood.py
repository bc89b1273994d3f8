"""Where a loss looks for the worst observation, and in which units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from robustrl import ThreatModel
from robustrl.policy import PolicyView
from robustrl.policy.sb3 import _MeanAndStd
from robustrl.training.robust import IBP, Ascent, Neighbourhood
from robustrl.training.robust.neighbourhood import check_epsilon, learner_units
from robustrl.training.robust.regularizers import Distance, Divergence, Lead

VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
BYTES = spaces.Box(0, 255, (4, 84, 84), np.uint8)
UNIT = spaces.Box(0, 1, (4, 84, 84), np.float32)


def around(radius: float, norm: float = math.inf, size: int = 3) -> Neighbourhood:
    return Neighbourhood(norm, radius, torch.ones(size))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(n_scores: int, kind: str = "logits", size: int = 3) -> PolicyView:
    torch.manual_seed(5)
    return PolicyView.from_torch(nn.Linear(size, n_scores), kind=kind, observation_shape=(size,))  # type: ignore[arg-type]


def gaussian() -> PolicyView:
    torch.manual_seed(6)
    space = spaces.Box(-1, 1, (2,), np.float32)
    network = _MeanAndStd(nn.Linear(3, 2), nn.Parameter(torch.tensor([0.3, -0.5])))
    return PolicyView.from_torch(network, kind="gaussian", observation_shape=(3,), action_space=space)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_an_ascent_stays_in_the_ball_and_ends_at_the_maximum_of_a_linear_lead(norm: float) -> None:
    """max over the ball of (w_b - w_a) x: the dual norm; two actions, so that the lead is linear."""
    policy, x = linear(2, "q"), torch.randn(5, 3)
    clean = policy.scores(x)
    best = clean.argmax(-1)
    weight = policy.actor.weight
    direction = weight[1 - best] - weight[best]
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    expected = -(clean[torch.arange(5), best] - clean[torch.arange(5), 1 - best]) + 0.2 * torch.linalg.vector_norm(
        direction, ord=dual, dim=1
    )
    found = Ascent(steps=20).find(policy, x, Lead(clean.detach()), around(0.2, norm), generator())
    assert (torch.linalg.vector_norm((found - x).double(), ord=norm, dim=1) <= 0.2 * (1 + 1e-5)).all()
    torch.testing.assert_close(Lead(clean).at(policy.scores(found)), expected, rtol=1e-4, atol=1e-4)


def test_the_largest_action_difference_of_a_linear_policy_has_a_closed_form() -> None:
    """1/2 max ||W e / sigma||^2 over the cube: over its corners; IBP adds up the maxima of the entries, ascent is below."""
    policy, x = gaussian(), torch.randn(4, 3)
    weight, std = policy.actor.mean.weight, policy.actor.log_std.exp()
    corners = 0.1 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    best = (0.5 * ((corners @ weight.T) / std).square().sum(1)).max()
    above = (0.5 * (0.1 * weight.abs().sum(1) / std).square()).sum()
    measure = Distance(policy.scores(x))
    found = Ascent(steps=10, rate=2.5).largest(policy, x, measure, around(0.1), generator())
    bound = IBP().largest(policy, x, measure, around(0.1), generator())
    assert (found <= best * (1 + 1e-4)).all()
    assert found.max().item() == pytest.approx(best.item(), rel=1e-4)
    torch.testing.assert_close(bound, above.expand(4), rtol=1e-3, atol=1e-5)
    assert (bound >= best).all()


def test_one_action_entry_makes_ibp_exact_for_a_linear_policy() -> None:
    policy, x = gaussian(), torch.randn(4, 3)
    with torch.no_grad():
        policy.actor.mean.weight[1] = 0
    weight, std = policy.actor.mean.weight[0], policy.actor.log_std[0].exp()
    exact = 0.5 * (0.1 * weight.abs().sum() / std) ** 2
    measure = Distance(policy.scores(x))
    torch.testing.assert_close(
        IBP().largest(policy, x, measure, around(0.1), generator()), exact.expand(4), rtol=1e-3, atol=1e-6
    )
    found = Ascent().largest(policy, x, measure, around(0.1), generator())
    torch.testing.assert_close(found, exact.expand(4), rtol=1e-3, atol=1e-6)


def test_a_divergence_has_no_gradient_at_the_true_observation_and_the_random_start_gets_away() -> None:
    policy = linear(3)
    x = torch.randn(6, 3).requires_grad_()
    measure = Divergence(policy.scores(x).detach())
    (slope,) = torch.autograd.grad(measure.at(policy.scores(x)).sum(), x)
    assert slope.abs().max() < 1e-6
    for solver in (Ascent(), Ascent(rate=1.0, temperature=1e-5)):
        found = solver.find(policy, x.detach(), measure, around(0.3), generator())
        assert (measure.at(policy.scores(found)) > 1e-3).all()


def test_the_divergence_is_kullback_leiblers_and_its_bound_above_all_of_the_cube() -> None:
    policy, x = linear(3), torch.randn(4, 3)
    clean = policy.scores(x)
    measure = Divergence(clean)
    bound = IBP().largest(policy, x, measure, around(0.4), generator())
    for _ in range(200):
        other = policy.scores(x + 0.4 * (2 * torch.rand(4, 3, generator=generator(_)) - 1))
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=other)
        )
        torch.testing.assert_close(measure.at(other), expected, rtol=1e-4, atol=1e-6)
        assert (expected <= bound).all()
    assert (bound < 2).all()


def test_entries_behind_a_mask_stay_and_others_go_by_their_scale() -> None:
    threat = ThreatModel(norm=math.inf, step=0.1, mask=(True, False, True, True), scale=(1.0, 1.0, 2.0, 3.0))
    near = Neighbourhood.of(threat, VECTOR, "raw")
    policy, x = linear(2, "q", 4), torch.randn(3, 4)
    found = Ascent().find(policy, x, Lead(policy.scores(x).detach()), near, generator())
    reached = (found - x).abs().amax(0)
    torch.testing.assert_close(reached, torch.tensor([0.1, 0.0, 0.2, 0.3]), rtol=1e-4, atol=1e-6)
    box = near.region(x).box()
    torch.testing.assert_close(box.high - x, torch.tensor([0.1, 0.0, 0.2, 0.3]).expand(3, 4), rtol=1e-3, atol=1e-5)


def test_pixels_stay_in_their_range() -> None:
    near = Neighbourhood.of(
        ThreatModel(norm=math.inf, step=3, units="uint8"), spaces.Box(0, 255, (1, 36, 36), np.uint8), "uint8"
    )
    x = torch.randint(0, 256, (4, 1, 36, 36), generator=generator()).float()
    x[:, :, :4], x[:, :, -4:] = 0.0, 255.0
    network = nn.Sequential(nn.Flatten(), nn.Linear(1296, 2))
    policy = PolicyView.from_torch(network, kind="q", observation_shape=(1, 36, 36))
    found = Ascent().find(policy, x, Lead(policy.scores(x).detach()), near, generator())
    box = near.region(x).box()
    for end in (found, box.low, box.high):
        assert end.min() >= 0
        assert end.max() <= 255
    assert ((found - x).abs() <= 3 + 1e-4).all()
    assert (found <= box.high).all()
    assert (found >= box.low).all()


def test_a_radius_is_not_spent_on_pixels_that_have_reached_their_end() -> None:
    """Norm 2, a linear lead that rises with every pixel, half of which are white: all of the radius goes to the others."""
    near = Neighbourhood(2, 10.0, torch.ones(1, 6, 6), (0.0, 255.0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack((torch.zeros(36), torch.ones(36))))
        network[1].bias.copy_(torch.tensor([1e5, 0.0]))
    policy = PolicyView.from_torch(network, kind="q", observation_shape=(1, 6, 6))
    x = torch.full((2, 1, 6, 6), 100.0)
    x[:, :, :3] = 255.0
    found = Ascent(20).find(policy, x, Lead(policy.scores(x).detach()), near, generator())
    assert ((found - x).flatten(1).sum(1) >= 0.98 * 10 * math.sqrt(18)).all()


def test_a_temperature_is_noise_on_the_gradient() -> None:
    policy, x = linear(3), torch.randn(6, 3)
    measure = Divergence(policy.scores(x).detach())
    cold, again, warm, hot = (
        Ascent(rate=1.0, temperature=t).find(policy, x, measure, around(0.3), generator()) for t in (0.0, 0.0, 1e-9, 1e6)
    )
    assert torch.equal(cold, again)
    assert not torch.equal(cold, warm) or not torch.equal(cold, hot)
    gains = [measure.at(policy.scores(found)).mean() for found in (cold, hot)]
    assert gains[1] < gains[0]  # a random walk


@pytest.mark.parametrize(
    ("threat", "space", "normalized", "radius"),
    [
        (ThreatModel(norm=2, step=0.5), VECTOR, False, 0.5),
        (ThreatModel(norm=2, step=0.5, units="normalized"), VECTOR, True, 0.5),
        (ThreatModel(norm=math.inf, step=2, units="uint8"), BYTES, False, 2.0),
        (ThreatModel(norm=math.inf, step=2 / 255, units="unit01"), BYTES, False, 2.0),
        (ThreatModel(norm=math.inf, step=2, units="uint8"), UNIT, False, 2 / 255),
        (ThreatModel(norm=math.inf, step=2, units="raw"), BYTES, False, 2.0),
    ],
)
def test_units_are_those_of_the_learners_observations(
    threat: ThreatModel, space: spaces.Box, normalized: bool, radius: float
) -> None:
    near = Neighbourhood.of(threat, space, learner_units(space, normalized=normalized))
    assert near.radius == pytest.approx(radius)
    assert near.pixels == {id(BYTES): (0.0, 255.0), id(UNIT): (0.0, 1.0)}.get(id(space))


@pytest.mark.parametrize(("units", "normalized"), [("normalized", False), ("raw", True), ("uint8", False)])
def test_units_that_mean_something_else_are_refused(units: str, normalized: bool) -> None:
    with pytest.raises(ValueError, match=f"epsilon is in units '{units}', but the learner's observations are in units"):
        threat = ThreatModel(norm=2, step=0.5, units=units)  # type: ignore[arg-type]
        Neighbourhood.of(threat, VECTOR, learner_units(VECTOR, normalized=normalized))


@pytest.mark.parametrize(
    ("epsilon", "norm", "match"),
    [
        (-0.1, None, "epsilon must be a finite number >= 0"),
        (math.nan, None, "epsilon must be a finite number >= 0"),
        (0.1, 3, "norm must be one of"),
        (0.1, "two", "norm must be one of"),
        (ThreatModel(norm=2, step=0.1), 2, "norm must be None beside a ThreatModel"),
        (ThreatModel(norm=2, episode=0.1), None, "epsilon must be a radius per step"),
        (ThreatModel(norm=2, step=0.1, episode=1), None, "epsilon must be a radius per step"),
        (ThreatModel(norm=0, step=1), None, "epsilon must be a radius per step of norm 1, 2 or inf"),
    ],
)
def test_radii_that_no_loss_can_take_are_refused(epsilon: float, norm: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_epsilon(epsilon, norm)


@pytest.mark.parametrize(("norm", "number"), [(None, math.inf), ("inf", math.inf), ("2", 2), (1, 1)])
def test_norms_are_numbers_or_their_names(norm: float, number: float) -> None:
    assert check_epsilon(0.1, norm) == ThreatModel(norm=number, step=0.1)


def test_dictionaries_are_refused() -> None:
    with pytest.raises(ValueError, match="observations from a Box space"):
        learner_units(spaces.Dict({"a": VECTOR}), normalized=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 0.0}, {"temperature": -1.0}])
def test_bad_ascents_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Ascent(**options)  # type: ignore[arg-type]
