"""Pattanaik's attack: it delivers what makes the victim's greedy action worth least."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from toys import network_balancer

from attacks.victims import LinearQ, Matrix, actor, context, frames_of, linear
from robustrl.attacks import Pattanaik, Uniform
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

each_norm = pytest.mark.parametrize("norm", [0, 1, 2, math.inf])
BOX = (-3.0, 3.0)


def three(seed: int = 0) -> PolicyView:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    return PolicyView.from_torch(net, kind="q", observation_shape=(4,))


@each_norm
def test_the_greedy_action_under_attack_is_worth_no_more_in_the_true_state_and_often_less(norm: float) -> None:
    view, x = three(), frames_of(60)
    budget = 2.0 if norm == 0 else 0.8
    delivered = Pattanaik().perturb(x, context(view, x, budget, norm=norm, pixels=BOX))
    values = view.scores(x)
    before, after = (values.gather(1, view.scores(seen).argmax(1, keepdim=True)) for seen in (x, delivered))
    assert bool((after <= before).all())
    assert float((after < before).double().mean()) > 0.2
    unchanged = (after == before).squeeze(1)
    assert torch.equal(delivered[unchanged], x[unchanged])


def test_a_linear_rule_is_flipped_whenever_a_candidate_reaches_the_border() -> None:
    """The border is at distance |w . x + b| / ||w||; 100 lengths from Beta(2, 2) leave few gaps below .95 of the radius."""
    x = frames_of(300)
    view = linear()
    distance = view.scores(x).diff().abs().squeeze(1) / math.sqrt(14.25)
    delivered = Pattanaik().perturb(x, context(view, x, 0.5))
    flipped = view.scores(x).argmax(1) != view.scores(delivered).argmax(1)
    assert bool(flipped[distance < 0.95 * 0.5].all())
    assert not bool(flipped[distance > 0.5 * (1 + 1e-6)].any())
    assert bool(((delivered - x).norm(dim=1)[flipped] > distance[flipped]).all())


def test_the_lengths_are_those_of_beta_2_2() -> None:
    """The middle one of three uniform numbers: its distribution function is 3 u^2 - 2 u^3."""
    u = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)).median(1).values
    for at in (0.1, 0.3, 0.5, 0.9):
        assert float((u <= at).double().mean()) == pytest.approx(3 * at**2 - 2 * at**3, abs=0.005)


def test_continuous_actions_follow_the_critic_of_actions() -> None:
    """Q(s, W x) = g . W x falls fastest along -W^T g, and the longest candidate is the best one."""
    w, g = frames_of(2, 4, seed=3).double(), torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, view = frames_of(20), actor(w, q_critic=LinearQ(g, torch.ones(4)))
    delivered = Pattanaik(candidates=300).perturb(x, context(view, x, 0.5, noise=Gaussian(0.1)))
    delta = (delivered - x).double()
    along = delta @ (w.T @ g) / (delta.norm(dim=1) * (w.T @ g).norm())
    torch.testing.assert_close(along, -torch.ones(20, dtype=torch.float64), rtol=1e-4, atol=0)
    assert bool((delta.norm(dim=1) > 0.45).all())
    other = actor(w, std=(1.0, 1.0))
    same = Pattanaik(LinearQ(g, torch.ones(4)), candidates=300).perturb(x, context(other, x, 0.5, noise=Gaussian(0.1)))
    torch.testing.assert_close(same, delivered)


def test_a_critic_from_outside_says_what_is_worst_for_a_policy_of_logits() -> None:
    policy = PolicyView.from_torch(network_balancer(16).actor, kind="logits", observation_shape=(4,))
    critic = Matrix([[0.0] * 4], 1.0)  # action 0 is worth 0, action 1 is worth 1
    x = 0.05 * frames_of(40)
    delivered = Pattanaik(critic).perturb(x, context(policy, x, 0.5))
    assert bool((policy.scores(delivered).argmax(1) == 0).all())
    with pytest.raises(ValueError, match=r"critic must give values \(n, 2\), it gives \(40, 1\)"):
        Pattanaik(Matrix([[0.0] * 4])).perturb(x, context(policy, x, 0.5))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"critic": "rs"}, TypeError, "critic must be a torch.nn.Module or None, got str"),
        ({"candidates": 0}, ValueError, "candidates must be an integer >= 1"),
        ({"draws": 0}, ValueError, "draws must be"),
        ({"allocation": Uniform}, TypeError, "allocation must be an allocation"),
    ],
)
def test_bad_settings_are_refused(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pattanaik(**settings)


def test_a_policy_without_action_values_is_refused() -> None:
    with pytest.raises(ValueError, match="Pattanaik needs action values"):
        Pattanaik().check(network_balancer(), ThreatModel(2, step=1.0), None)
    Pattanaik(nn.Identity()).check(network_balancer(), ThreatModel(2, step=1.0), None)


def test_candidates_lie_along_the_gradient_towards_the_worst_action() -> None:
    """Linear action values W x: the direction is w_worst - sum_a p_a w_a, with p a softmax in units of the values' spread."""
    weights = frames_of(3, 4, seed=7).double()
    view = PolicyView.from_torch(Matrix(weights), kind="q", observation_shape=(4,))
    x = frames_of(60)
    delivered = Pattanaik().perturb(x, context(view, x, 2.0))
    values = x.double() @ weights.T
    shares = (values / values.std(1, unbiased=False, keepdim=True)).softmax(1)
    direction = weights[values.argmin(1)] - shares @ weights
    moved = (delivered != x).any(1)
    assert int(moved.sum()) > 20
    cosine = torch.nn.functional.cosine_similarity((delivered - x).double()[moved], direction[moved])
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-4, atol=0)


def test_the_best_length_of_a_linear_critic_is_the_longest_of_those_drawn() -> None:
    """The stream's first numbers, three per candidate."""
    x, view = frames_of(5), actor(frames_of(2, 4, seed=3).double(), q_critic=LinearQ([1.0, -2.0], torch.ones(4)))
    delivered = Pattanaik(candidates=7).perturb(x, context(view, x, 0.5, seed=3))
    drawn = torch.rand(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sort(1).values[:, 1]
    torch.testing.assert_close((delivered - x).norm(dim=1), torch.full((5,), 0.5 * float(drawn.max())))
