"""Terms of the loss against their formulas, written out or searched by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

from robustrl import Gaussian
from robustrl.networks.bounds import Interval
from robustrl.policy import PolicyView
from robustrl.policy.sb3 import _MeanAndStd
from robustrl.training.robust import (
    IBP,
    Ascent,
    Consistency,
    Margin,
    Minibatch,
    Neighbourhood,
    Overlap,
    StateAdversarial,
    WorstSurrogate,
)
from robustrl.training.robust.regularizers import categorical_log_probabilities, gaussian_log_probabilities


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def around(radius: float) -> Neighbourhood:
    return Neighbourhood(math.inf, radius, torch.ones(3))


def network(n_scores: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, n_scores))


def view(kind: str, n_scores: int = 3) -> PolicyView:
    if kind != "gaussian":
        return PolicyView.from_torch(network(n_scores), kind=kind, observation_shape=(3,))  # type: ignore[arg-type]
    actor = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), _MeanAndStd(nn.Linear(8, 2), nn.Parameter(torch.tensor([0.2, -0.4]))))
    space = spaces.Box(-1, 1, (2,), np.float32)
    return PolicyView.from_torch(actor, kind="gaussian", observation_shape=(3,), action_space=space)


def searched(policy: PolicyView, x: Tensor, radius: float, measure: object) -> Tensor:
    """The largest value over a fine grid of the cube, row by row."""
    axis = torch.linspace(-radius, radius, 17)
    grid = torch.cartesian_prod(axis, axis, axis)
    with torch.no_grad():
        rows = [measure(policy.scores(row[None]), policy.scores(row + grid)).max() for row in x]  # type: ignore[operator]
    return torch.stack(rows)


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=clean.expand_as(other)), Categorical(logits=other))


def distance(clean: Tensor, other: Tensor) -> Tensor:
    (mean, log_std), (moved, _) = clean.chunk(2, dim=-1), other.chunk(2, dim=-1)
    return 0.5 * ((moved - mean) / log_std.exp()).square().sum(-1)


def lead(clean: Tensor, other: Tensor) -> Tensor:
    best = int(clean.argmax())
    others = [a for a in range(clean.shape[-1]) if a != best]
    return (other[:, others] - other[:, [best]]).amax(-1).clamp_min(-1.0)


@pytest.mark.parametrize(("kind", "measure"), [("logits", divergence), ("gaussian", distance), ("q", lead)])
def test_an_ascent_is_below_the_true_maximum_and_intervals_are_above(kind: str, measure: object) -> None:
    policy, x, radius = view(kind), torch.randn(6, 3), 0.2
    exact = searched(policy, x, radius, measure).mean().item()
    batch = Minibatch(x)
    below = StateAdversarial(Ascent(20)).loss(policy, batch, around(radius), generator()).item()
    above = StateAdversarial(IBP()).loss(policy, batch, around(radius), generator()).item()
    assert below <= exact + abs(exact) * 0.01
    assert below >= exact - abs(exact) * 0.35
    assert exact <= above
    assert above < exact + 1


@pytest.mark.parametrize("kind", ["logits", "gaussian", "q"])
@pytest.mark.parametrize("solver", [Ascent(5), Ascent(5, temperature=1e-5, rate=1.0), IBP()], ids=["pgd", "sgld", "ibp"])
def test_a_radius_of_zero_leaves_nothing_but_the_hinge(kind: str, solver: object) -> None:
    policy, x = view(kind), torch.randn(6, 3)
    loss = StateAdversarial(solver).loss(policy, Minibatch(x), around(0.0), generator())  # type: ignore[arg-type]
    scores = policy.scores(x)
    expected = torch.stack([lead(row[None], row[None])[0] for row in scores]).mean() if kind == "q" else torch.tensor(0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_the_hinge_is_what_lead_is_enough() -> None:
    policy, x = view("q"), torch.randn(6, 3)
    with torch.no_grad():
        policy.actor[2].weight.mul_(100)
    for hinge in (0.25, 2.0):
        loss = StateAdversarial(IBP(), hinge=hinge).loss(policy, Minibatch(x), around(0.0), generator()).item()
        assert loss >= -hinge
    assert loss < -0.25


def test_exploration_is_no_way_out_of_the_gaussian_loss() -> None:
    policy, x = view("gaussian"), torch.randn(6, 3)
    for solver in (Ascent(), IBP()):
        StateAdversarial(solver).loss(policy, Minibatch(x), around(0.2), generator()).backward()
        assert not policy.actor[2].log_std.grad.any()
        assert policy.actor[0].weight.grad.abs().max() > 0


def test_the_search_leaves_the_parameters_gradients_alone() -> None:
    policy, x = view("logits"), torch.randn(6, 3)
    loss = StateAdversarial(Ascent()).loss(policy, Minibatch(x), around(0.2), generator())
    assert all(p.grad is None for p in policy.parameters())
    assert loss.requires_grad


def test_the_search_draws_from_its_own_generator() -> None:
    policy, batch = view("logits"), Minibatch(torch.randn(6, 3))
    before = torch.get_rng_state()
    terms = (StateAdversarial(Ascent(temperature=1e-3)), Consistency(Gaussian(0.3)))
    for term in terms:
        first, again = (term.loss(policy, batch, around(0.2), generator()).item() for _ in range(2))
        other = term.loss(policy, batch, around(0.2), torch.Generator().manual_seed(1)).item()
        assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_the_margin_loss_is_camps() -> None:
    """Rows: gaps of 1, 2.5 and 0.5; in the third row the target network prefers another action."""
    scores = torch.tensor([[0.0, 1.0], [0.5, 3.0], [2.5, 3.0]])
    policy = PolicyView.from_torch(nn.Identity(), kind="q", observation_shape=(2,))
    target = torch.tensor([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0]])
    eta = 3.0
    batch = Minibatch(scores, target=lambda: target)
    near = Neighbourhood(math.inf, 0.0, torch.ones(2))
    loss = Margin().loss(policy, batch, near, generator()).item()
    assert loss == pytest.approx(((eta - 1) + (eta - 2.5)) / 2)
    alone = Margin().loss(policy, Minibatch(scores), near, generator()).item()
    assert alone == pytest.approx(((eta - 1) + (eta - 2.5) + (eta - 0.5)) / 3)
    none = Margin().loss(policy, Minibatch(scores, target=lambda: -target), near, generator()).item()
    assert none == pytest.approx(eta - 0.5)


def test_the_margin_loss_pulls_the_two_best_actions_apart_and_takes_eta_as_given() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    policy = PolicyView.from_torch(nn.Identity(), kind="q", observation_shape=(3,))
    Margin().loss(policy, Minibatch(scores), around(0.0), generator()).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, 1.0, -1.0]]))


@pytest.mark.parametrize("kind", ["logits", "q", "gaussian"])
def test_consistency_is_the_divergence_of_noisy_copies_from_their_mean(kind: str) -> None:
    policy, x, noise = view(kind), torch.randn(5, 3), Gaussian(0.4)
    loss = Consistency(noise, copies=3, entropy=0.0 if kind == "gaussian" else 0.25)
    found = loss.loss(policy, Minibatch(x), around(9.9), generator()).item()
    scores = policy.scores(noise.perturb(x.repeat(3, 1), generator())).reshape(3, 5, -1)
    if kind == "gaussian":
        mean, log_std = scores.chunk(2, dim=-1)
        expected = (0.5 * ((mean - mean.mean(0)) / log_std.exp()) ** 2).sum(-1).mean()
    else:
        p = scores.softmax(-1)
        mean = p.mean(0)
        expected = (mean * (mean / p).log()).sum(-1).mean() - 0.25 * (mean * mean.log()).sum(-1).mean()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_radials_overlap_against_its_formula() -> None:
    """Linear action values: bounds of differences are exact, and so are the overlaps."""
    policy, x, actions, radius = view("q"), torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0]), 0.15
    policy.actor = linear = nn.Linear(3, 3)
    expected = torch.zeros(())
    for row, a in zip(x, actions.tolist(), strict=True):
        q = linear(row)
        for b in range(3):
            gap = (q[a] - q[b]).clamp_min(0).detach()
            highest = q[b] - q[a] + radius * (linear.weight[b] - linear.weight[a]).abs().sum()
            expected = expected + gap * (highest + gap / 2).clamp_min(0) / 7
    found = Overlap().loss(policy, Minibatch(x, actions), around(radius), generator())
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert found.item() > 0.001
    slopes = [torch.autograd.grad(loss, [linear.weight, linear.bias]) for loss in (found, expected)]
    for ours, formula in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-3, atol=1e-5)


def test_log_probabilities_are_bounded_by_the_ends_of_a_box() -> None:
    low = torch.tensor([[0.0, -1.0, 0.5]])
    high = low + torch.tensor([[0.5, 0.2, 1.0]])
    box, action = Interval(low, high), torch.tensor([1])
    lowest, highest = categorical_log_probabilities(box, action)
    corners = torch.cartesian_prod(*[torch.tensor([lo, hi]) for lo, hi in zip(low[0], high[0], strict=True)])
    logs = corners.log_softmax(-1)[:, 1]
    assert lowest.item() == pytest.approx(logs.min().item(), rel=1e-4)
    assert highest.item() == pytest.approx(logs.max().item(), rel=1e-4)


@pytest.mark.parametrize("action", [[-2.0, 3.0], [0.2, 0.1], [0.45, -5.0]])
def test_log_densities_are_bounded_by_the_farthest_and_the_nearest_mean(action: list[float]) -> None:
    low, high, log_std = torch.tensor([[0.0, -1.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.3, -0.7]])
    box = Interval(torch.cat((low, log_std), 1), torch.cat((high, log_std), 1))
    taken = torch.tensor([action])
    grid = torch.cartesian_prod(torch.linspace(0, 0.5, 201), torch.linspace(-1, 1, 201))
    logs = Normal(grid, log_std.exp()).log_prob(taken).sum(-1)
    lowest, highest = gaussian_log_probabilities(box, taken)
    assert lowest.item() == pytest.approx(logs.min().item(), rel=1e-4, abs=1e-4)
    assert highest.item() == pytest.approx(logs.max().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["logits", "gaussian"])
def test_radials_surrogate_is_ppos_at_radius_zero_and_below_every_attack(kind: str) -> None:
    policy, x, advantages = view(kind), torch.randn(9, 3), torch.randn(9)
    scores = policy.scores(x).detach()

    def log_prob(scores: Tensor) -> Tensor:
        if kind == "logits":
            return Categorical(logits=scores).log_prob(actions)
        mean, log_std = scores.chunk(2, dim=-1)
        return Normal(mean, log_std.exp()).log_prob(actions).sum(-1)

    actions = torch.arange(9) % 3 if kind == "logits" else torch.randn(9, 2)
    old = log_prob(scores) + 0.2 * torch.randn(9)

    def surrogate(scores: Tensor) -> float:
        ratio = (log_prob(scores) - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.7, 1.3) * advantages).mean().item()

    batch = Minibatch(x, actions, advantages, old, clip_range=0.3)
    clean = WorstSurrogate().loss(policy, batch, around(0.0), generator()).item()
    assert clean == pytest.approx(surrogate(scores), rel=1e-3, abs=1e-4)
    worst = WorstSurrogate().loss(policy, batch, around(0.2), generator()).item()
    for seed in range(50):
        e = 0.2 * (2 * torch.rand(9, 3, generator=torch.Generator().manual_seed(seed)) - 1)
        assert surrogate(policy.scores(x + e).detach()) <= worst
    assert worst > clean


@pytest.mark.parametrize(
    ("term", "kind"),
    [(Margin(), "logits"), (Overlap(), "gaussian"), (WorstSurrogate(), "q"), (StateAdversarial(), "deterministic")],
)
def test_terms_refuse_policies_for_which_they_have_no_meaning(term: object, kind: str) -> None:
    policy = view("q")
    policy.kind = kind  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"needs a policy whose scores are .*, got '{kind}'"):
        term.check(policy)  # type: ignore[attr-defined]


def test_what_a_minibatch_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="the minibatch must have advantages, old_log_prob"):
        WorstSurrogate().loss(view("logits"), Minibatch(torch.zeros(1, 3), torch.zeros(1).long()), around(0.1), generator())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: StateAdversarial(hinge=0), ValueError),
        (lambda: Consistency(0.2), TypeError),  # type: ignore[arg-type]
        (lambda: Consistency(Gaussian(0.2), copies=1), ValueError),
        (lambda: Consistency(Gaussian(0.2), entropy=-1), ValueError),
    ],
)
def test_bad_terms_are_refused(make: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"hinge|noise|copies|entropy"):
        make()  # type: ignore[operator]
