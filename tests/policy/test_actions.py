"""Decision rules: scores to actions, by closed forms, inside the action space or not at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from robustrl.policy import PolicyView
from robustrl.policy.actions import Categorical, action_rule

LOW, HIGH = np.array([[[-2, 0, -1], [1, -0.5, -3]], [[1, 5, 0.5], [1.5, 0.5, 2]]], dtype=np.float32)
BOX = spaces.Box(LOW, HIGH)
UNBOUNDED = spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
HALF = spaces.Box(np.float32([0, -np.inf]), np.float32([np.inf, 1]))
CONTINUOUS: Any = ("gaussian", "squashed", "deterministic")


def scores_of(kind: str, n: int = 500, size: int = 6, scale: float = 3.0) -> torch.Tensor:
    torch.manual_seed(0)
    mean, log_std = scale * torch.randn(n, size), torch.randn(n, size) / 2
    return mean if kind == "deterministic" else torch.cat((mean, log_std), dim=1)


def by_hand(kind: str, scores: np.ndarray, draws: np.ndarray | None, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    size = low.size
    x = scores[:, :size].astype(np.float64)
    if kind != "deterministic" and draws is not None:
        x = x + np.exp(scores[:, size:].astype(np.float64)) * draws
    if kind == "squashed":
        x = low.ravel() + (np.tanh(x) + 1) / 2 * (high - low).ravel()
    return np.clip(x, low.ravel(), high.ravel())


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("sampled", [False, True])
def test_actions_follow_from_scores_and_draws_by_the_closed_form(kind: Any, sampled: bool) -> None:
    scores = scores_of(kind)
    rule = action_rule(kind, scores.shape[1], space=BOX)
    draws = rule.draw(500, torch.Generator().manual_seed(1), torch.device("cpu")) if sampled else None
    assert draws is None or draws.shape == (500, 6)
    actions = rule.choose(scores, draws)
    expected = by_hand(kind, scores.numpy(), None if draws is None else draws.numpy(), LOW, HIGH)
    np.testing.assert_allclose(actions.numpy(), expected, atol=2e-6)
    delivered = rule.deliver(actions.numpy())
    assert delivered.shape == (500, 2, 3)
    assert delivered.dtype == np.float32
    assert all(BOX.contains(row) for row in delivered)
    assert np.array_equal(delivered.reshape(500, 6), actions.numpy())


@pytest.mark.parametrize("space", [UNBOUNDED, HALF], ids=["unbounded", "half bounded"])
def test_open_sides_are_not_clipped(space: spaces.Box) -> None:
    size = int(np.prod(space.shape))
    scores = scores_of("gaussian", size=size, scale=1e3)
    rule = action_rule("gaussian", 2 * size, space=space)
    expected = np.clip(scores[:, :size].numpy(), space.low.ravel(), space.high.ravel())
    assert np.array_equal(rule.deliver(rule.choose(scores, None).numpy()).reshape(500, size), expected)
    assert (np.abs(expected) > 500).any()


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("bound", [0.1, 0.3, 1 / 3, 2.7])
def test_actions_of_double_precision_stay_inside_their_space(kind: Any, bound: float) -> None:
    """The nearest float32 of a bound can lie outside it."""
    space = spaces.Box(-bound, bound, (2,), np.float64)
    scores = 30 * torch.tensor([[1.0, -1.0, 0.0, 0.0]])[:, : 2 if kind == "deterministic" else 4]
    rule = action_rule(kind, scores.shape[1], space=space)
    delivered = rule.deliver(rule.choose(scores, None).numpy())
    assert delivered.dtype == np.float64
    assert space.contains(delivered[0])
    np.testing.assert_allclose(delivered, [[bound, -bound]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "q", *CONTINUOUS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, -1])
def test_one_broken_score_makes_its_row_invalid_and_no_other(kind: Any, value: float, column: int) -> None:
    scores = scores_of(kind, n=5) if kind in CONTINUOUS else torch.randn(5, 3)
    rule = action_rule(kind, scores.shape[1], space=BOX)
    draws = rule.draw(5, torch.Generator().manual_seed(0), torch.device("cpu"))
    whole = [rule.choose(scores, d) for d in (None, draws)]
    scores[3, column] = value
    for before, d in zip(whole, (None, draws), strict=True):
        actions = rule.choose(scores, d)
        assert torch.equal(actions[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
        assert (actions[3] == -1).all() if kind in ("logits", "q") else torch.isnan(actions[3]).all()
        with pytest.raises(ValueError, match="^the policy's scores must be finite, got NaN or inf"):
            rule.deliver(actions.numpy())
        assert len(rule.deliver(actions[:3].numpy())) == 3


def test_a_standard_deviation_that_overflows_is_no_action() -> None:
    rule = action_rule("gaussian", 2, space=spaces.Box(-np.inf, np.inf, (1,), np.float32))
    actions = rule.choose(torch.tensor([[0.0, 200.0]]), torch.tensor([[1.0]]))
    with pytest.raises(ValueError, match="must be finite"):
        rule.deliver(actions.numpy())


def test_discrete_actions_arrive_as_plain_integers() -> None:
    rule = Categorical(3)
    delivered = rule.deliver(rule.choose(torch.eye(3), None).numpy())
    assert delivered.dtype == np.int64
    assert delivered.tolist() == [0, 1, 2]


def test_a_sampled_deterministic_policy_is_the_greedy_one() -> None:
    rule, scores = action_rule("deterministic", 6, space=BOX), scores_of("deterministic")
    assert torch.equal(rule.choose(scores, torch.randn(500, 6)), rule.choose(scores, None))


# ---------------------------------------------------------------------------------------------------- in a view


def continuous_view(kind: Any = "gaussian", space: Any = BOX, outputs: int = 12, **options: Any) -> PolicyView:
    torch.manual_seed(0)
    return PolicyView(nn.Linear(4, outputs), kind=kind, observation_shape=(4,), action_space=space, **options)


def test_fingerprints_tell_bounds_shapes_and_kinds_apart() -> None:
    wider = spaces.Box(LOW, HIGH + np.float32(1e-6) * (HIGH == 5))
    views = [
        continuous_view(),
        continuous_view(space=wider),
        continuous_view(space=spaces.Box(LOW.reshape(3, 2), HIGH.reshape(3, 2))),
        continuous_view(space=spaces.Box(LOW - 1, HIGH)),
        continuous_view("squashed"),
    ]
    prints = {view.fingerprint() for view in views}
    assert len(prints) == 5
    assert continuous_view().fingerprint() in prints


def test_a_continuous_view_of_ones_own_network() -> None:
    view = PolicyView.from_torch(
        nn.Linear(4, 6), kind="deterministic", observation_shape=(4,), action_space=BOX, q_critic=SumOfActions()
    )
    x = torch.randn(7, 4)
    assert not view.discrete
    assert view.action_space == BOX
    mean = view.mean_action(x)
    assert torch.equal(mean, view.scores(x))
    assert torch.allclose(view.value(x), mean.sum(1))
    assert view.received(view.actions(view.scores(x))).shape == (7, 2, 3)
    assert view.received(view.act_blocked(x[:0, None], batch=4)).shape == (0, 2, 3)


class SumOfActions(nn.Module):
    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return action.sum(1)


class Remembering(nn.Module):
    """Adds up what it has seen."""

    def forward(self, observation: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        after = memory + observation
        return after, after


def test_a_recurrent_view_of_ones_own_network_needs_its_memory() -> None:
    view = PolicyView(Remembering(), kind="logits", observation_shape=(3,), memory_shape=(3,))
    x, memory = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), view.memory(2)
    scores, memory = view.advance(x, memory)
    scores, memory = view.advance(x, memory)
    assert torch.equal(scores, 2 * x)
    assert torch.equal(view.scores(x, memory), 3 * x)
    actions, after = view.decide(x[:, None], memory, batch=3)
    assert actions.tolist() == [0, 1]
    assert after is not None
    assert torch.equal(after, 3 * x)
    for call in (lambda: view.scores(x), lambda: view.decide(x[:, None], batch=2)):
        with pytest.raises(ValueError, match=r"^memory must be given: the policy is recurrent; start with policy.memory\(n\)"):
            call()


MATRIX = spaces.MultiDiscrete([2, 2])
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: continuous_view(space=None), ValueError, r"^a policy of kind 'gaussian' needs action_space=, a Box of floats, got None"),
    (lambda: continuous_view("squashed", space=MATRIX), ValueError, "^a policy of kind 'squashed' needs action_space=, a Box"),
    (lambda: continuous_view("deterministic", space=spaces.Discrete(6)), ValueError, r"a Box of floats, got Discrete\(6\)"),
    (lambda: continuous_view(space=spaces.Box(0, 3, (2, 3), np.int64)), ValueError, "a Box of floats, got Box.*int64"),
    (lambda: continuous_view("squashed", space=UNBOUNDED), ValueError, "^a squashed policy needs a bounded action space, got Box"),
    (lambda: continuous_view("squashed", space=HALF, outputs=4), ValueError, "^a squashed policy needs a bounded action space"),
    (lambda: continuous_view(outputs=6), ValueError, "needs 12 scores per row, the network gives 6"),
    (lambda: continuous_view("squashed", outputs=13), ValueError, "needs 12 scores per row, the network gives 13"),
    (lambda: continuous_view("deterministic"), ValueError, "(?s)'deterministic' over Box.* needs 6 scores per row, the network gives 12"),
    (lambda: continuous_view("tanh"), ValueError, "^kind must be one of 'logits', 'q', 'gaussian', 'squashed', 'deterministic'"),
    (lambda: continuous_view(None), ValueError, "^kind must be one of"),
    (lambda: continuous_view().n_actions, TypeError, r"^the policy's actions are continuous \(Box"),
    (lambda: continuous_view().distribution(torch.zeros(1, 4)), ValueError, "^only logits define a distribution"),
    (lambda: continuous_view().value(torch.zeros(1, 4)), ValueError, "pass critic="),
    (lambda: continuous_view().action_value(torch.zeros(1, 4), torch.zeros(1, 6)), ValueError, "pass q_critic="),
    (lambda: PolicyView(nn.Linear(4, 2), kind="logits", observation_shape=(4,)).mean_action(torch.zeros(1, 4)), TypeError, "discrete: use scores"),
    (lambda: continuous_view().act_blocked(torch.zeros(3, 1, 4), batch=2, deterministic=False), ValueError, "^draws must be given"),
    (lambda: continuous_view().act_blocked(torch.zeros(3, 1, 4), batch=2, deterministic=False, draws=torch.zeros(2, 6)), ValueError, r"^draws must have 3 rows, got shape \(2, 6\)"),
    (lambda: continuous_view(samples=False).act_blocked(torch.zeros(1, 1, 4), batch=2, deterministic=False, draws=torch.zeros(1, 6)), ValueError, "^deterministic must be True"),
    (lambda: continuous_view(n_frames=True), TypeError, "^n_frames must be"),
    (lambda: continuous_view(frame_shape=(3,)), ValueError, r"which 1 frame\(s\) of shape \(3,\) do not make; is it the right environment\?"),
    (lambda: continuous_view(frame_shape=(2,)), ValueError, r"does it stack 2 frames\? \(frame_stack=2, --frame-stack 2\)"),
    (lambda: continuous_view().act_blocked(torch.zeros(1, 1, 4), batch=0), ValueError, "^batch must be"),
    (lambda: continuous_view().act_blocked(torch.zeros(1, 1, 4), batch=2.0), TypeError, "^batch must be"),  # type: ignore[arg-type]
    (lambda: continuous_view().act_blocked(torch.zeros(1, 2, 4), batch=2), ValueError, "stack of 2 frames of shape .* does not fit"),
    (lambda: PolicyView(Remembering(), kind="logits", observation_shape=(3,)), TypeError, "memory"),
    (lambda: PolicyView(nn.Linear(5, 2), kind="logits", observation_shape=(4,)), ValueError, r"does not take observations of shape \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "kind", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()
