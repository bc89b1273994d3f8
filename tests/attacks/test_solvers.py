"""One-step, momentum and Langevin solvers: closed forms on linear victims, and their own formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toys import network_balancer

from attacks.victims import WEIGHTS, actor, context, cost, frames_of, linear
from robustrl.attacks import FGSM, ActionDeviation, Ball, GradientAttack, Greedy, LangevinAttack, Margin, MomentumAttack
from robustrl.noise import Gaussian
from robustrl.threat import ThreatModel

DUAL = {1: math.inf, 2: 2, math.inf: 1}
each_norm = pytest.mark.parametrize("norm", [1, 2, math.inf])


def far(n: int = 100) -> torch.Tensor:
    x = 10 * frames_of(n)
    return x[(x.double() @ WEIGHTS).abs() > 8]


def drop(x: torch.Tensor, delivered: torch.Tensor) -> torch.Tensor:
    margin = x.double() @ WEIGHTS + 0.1
    return margin.abs() - margin.sign() * (delivered.double() @ WEIGHTS + 0.1)


@each_norm
@pytest.mark.parametrize(
    "attack",
    [
        FGSM(allocation=Greedy()),
        MomentumAttack(Margin(), allocation=Greedy(), random_start=False),
        MomentumAttack(Margin(), allocation=Greedy(), random_start=False, momentum=0.5, look_ahead=True),
    ],
    ids=["fgsm", "mi-fgsm", "nesterov"],
)
def test_the_margin_of_a_linear_rule_drops_by_the_dual_norm(attack: GradientAttack, norm: float) -> None:
    x = far()
    delivered = attack.perturb(x, context(linear(), x, 0.7, norm=norm))
    expected = torch.full((len(x),), 0.7 * float(torch.linalg.vector_norm(WEIGHTS, DUAL[norm])), dtype=torch.float64)
    torch.testing.assert_close(drop(x, delivered), expected, rtol=1e-4, atol=1e-4)


def test_fgsm_is_one_signed_step_and_its_random_start_is_followed_by_five_quarters_of_the_radius() -> None:
    x = far()
    plain = FGSM(allocation=Greedy()).perturb(x, context(linear(), x, 0.5, norm=math.inf))
    uphill = -(x.double() @ WEIGHTS + 0.1).sign()[:, None] * WEIGHTS.sign()
    torch.testing.assert_close(plain, x + 0.5 * uphill.float())
    started = FGSM(allocation=Greedy(), random_start=True).perturb(x, context(linear(), x, 0.5, norm=math.inf, seed=3))
    boundary = Ball.around(x, context(linear(), x, 0.5, norm=math.inf)).boundary(torch.Generator().manual_seed(3))
    expected = x + (0.5 * boundary + 0.625 * uphill.float()).clamp(-0.5, 0.5)
    torch.testing.assert_close(started, expected)
    assert bool((started - x).abs().lt(0.49).any())


def test_momentum_adds_up_gradients_of_l1_norm_1_row_by_row() -> None:
    """v_3 = mu^2 g_1 / ||g_1||_1 + mu g_2 / ||g_2||_1 + g_3 / ||g_3||_1, and a huge row does not drown the others."""
    attack = MomentumAttack(Margin(), momentum=0.5)
    gradients = [frames_of(3, 2, 2, seed=seed) * torch.tensor([1.0, 1e-6, 1e6])[:, None, None] for seed in range(3)]
    trend = torch.zeros(3, 2, 2)
    for gradient in gradients:
        trend = attack._trend(trend, gradient)
    expected = sum(w * g / g.abs().sum((1, 2), keepdim=True) for w, g in zip((0.25, 0.5, 1.0), gradients, strict=True))
    torch.testing.assert_close(trend, expected)
    broken = attack._trend(trend, torch.full((3, 2, 2), math.nan))
    torch.testing.assert_close(broken, 0.5 * trend)


def test_momentum_crosses_a_ridge_where_plain_ascent_turns_back() -> None:
    """All zero momentum is plain ascent with steps of radius / K."""
    view, x = network_balancer(16), 0.2 * frames_of(10)
    one = MomentumAttack(ActionDeviation(), momentum=0.0).perturb(x, context(view, x, 0.5))
    other = GradientAttack(ActionDeviation(), step_size=0.05).perturb(x, context(view, x, 0.5))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_looking_ahead_takes_gradients_where_the_momentum_leads_and_stays_in_the_ball() -> None:
    seen: list[torch.Tensor] = []

    class Watched(Margin):
        def against(self, context: Any, noise: Any) -> Any:
            gain = super().against(context, noise)

            def watched(point: torch.Tensor) -> torch.Tensor:
                seen.append(point.detach().clone())
                return gain(point)

            return watched

    x = far()[:1]
    uphill = (-(x.double() @ WEIGHTS + 0.1).sign()[:, None] * WEIGHTS.sign()).float()
    attack = MomentumAttack(Watched(), steps=4, momentum=0.5, look_ahead=True, random_start=False, allocation=Greedy())
    attack.perturb(x, context(linear(), x, 0.4, norm=math.inf))
    moves = [float(((point - x) * uphill).mean()) for point in seen[1:]]  # the first look is at the true frame
    assert moves == pytest.approx([0.0, 0.15, 0.3, 0.4, 0.4], abs=1e-5)  # h / 2 further than 0, .1, .25, ...


def test_langevin_noise_lets_an_ascent_start_at_the_true_frame_and_is_of_the_published_size() -> None:
    """The gradient of a deviation is zero there; step i has sqrt(2 h) / (i + 2) of noise."""
    view, x = actor(frames_of(2, 4, seed=3), std=(1.0, 1.0)), frames_of(10)
    stuck = GradientAttack(ActionDeviation(), random_start=False).perturb(x, context(view, x, 0.5))
    assert torch.equal(stuck, x)
    free = LangevinAttack(ActionDeviation(), random_start=False).perturb(x, context(view, x, 0.5))
    assert bool((cost(x, free) > 0.4).all())
    attack = LangevinAttack(ActionDeviation(), steps=5)
    probes = attack._probes(context(view, torch.zeros(1, 4000), 1.0, mask=(True,) * 4000))
    assert probes[0] is None
    sizes = [float(probes[left].std()) for left in (5, 4, 1) if probes[left] is not None]  # type: ignore[union-attr]
    assert sizes == pytest.approx([1 / 2, 1 / 3, 1 / 6], rel=0.05)
    there = Ball.around(x, context(view, x, 0.5))
    probe = torch.ones(4)
    value, gradient = attack._slope(there, lambda point: 3 * point.sum(1), x, probe)
    torch.testing.assert_close(value, 3 * x.sum(1))
    torch.testing.assert_close(gradient, torch.full((10, 4), 3 + math.sqrt(2 * 0.5 / 5)))


@pytest.mark.parametrize("kind", [MomentumAttack, LangevinAttack])
def test_steps_are_the_radius_over_their_number_by_default(kind: Any) -> None:
    radius = torch.tensor([0.5, 2.0])
    assert kind(Margin(), steps=4)._step_length(radius).tolist() == [0.125, 0.5]
    assert kind(Margin(), steps=4, step_size=0.3)._step_length(radius).tolist() == pytest.approx([0.3, 0.3])


def test_presets_are_refused_with_settings_that_they_fix() -> None:
    with pytest.raises(TypeError, match="steps"):
        FGSM(steps=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="momentum must be >= 0, got -1"):
        MomentumAttack(Margin(), momentum=-1)
    described = FGSM(random_start=True).to_dict()
    assert (described["kind"], described["random_start"], "steps" in described) == ("FGSM", True, False)
    FGSM().check(linear(), ThreatModel(math.inf, step=0.1), Gaussian(0.2))
