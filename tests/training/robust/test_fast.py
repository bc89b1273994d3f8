"""Robustness terms by a single step: closed forms on linear policies."""

from __future__ import annotations

import math

import pytest
import torch
from toys import LinearRule

from robustrl.policy import PolicyView
from robustrl.training.robust import SADQN, SAPPO, Ascent, Fast
from robustrl.training.robust.neighbourhood import Neighbourhood
from robustrl.training.robust.regularizers import Lead
from robustrl.training.supervised.attacks import FGSMRS, NFGSM

WEIGHTS = torch.tensor([2.0, -1.0, 0.5, 0.0])


def policy() -> PolicyView:
    return PolicyView.from_torch(LinearRule(WEIGHTS), kind="q", observation_shape=(4,))


def around(radius: float, norm: float, scale: torch.Tensor | None = None) -> Neighbourhood:
    return Neighbourhood(norm, radius, torch.ones(4) if scale is None else scale)


def observations() -> torch.Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [None, torch.tensor([1.0, 0.0, 5.0, 1.0])])
def test_a_full_step_of_fgsm_rs_finds_the_largest_lead_of_a_linear_policy(scale: torch.Tensor | None) -> None:
    """By alpha = 2 every start ends in the corner: the lead is -|w . x| + epsilon ||scale * w||_1."""
    x, view = observations(), policy()
    measure = Lead(view.scores(x))
    found = Fast(FGSMRS(alpha=2.0)).largest(view, x, measure, around(0.3, math.inf, scale), torch.Generator().manual_seed(0))
    reach = 0.3 * (WEIGHTS if scale is None else WEIGHTS * scale).abs().sum()
    assert torch.allclose(found.double(), -(x.double() @ WEIGHTS.double()).abs() + reach, atol=1e-5)


def test_fgsm_rs_stays_inside_and_n_fgsm_does_not() -> None:
    x, view = observations(), policy()
    measure, generator = Lead(view.scores(x)), torch.Generator().manual_seed(0)
    largest = -(x @ WEIGHTS).abs() + 0.3 * WEIGHTS.abs().sum()
    inside = Fast(FGSMRS()).largest(view, x, measure, around(0.3, math.inf), generator)
    beyond = Fast(NFGSM()).largest(view, x, measure, around(0.3, math.inf), generator)
    assert (inside <= largest + 1e-5).all()
    assert (beyond > largest + 1e-3).any()


def test_pixels_keep_their_range() -> None:
    x, view = torch.zeros(8, 4), policy()
    near = Neighbourhood(math.inf, 5.0, torch.ones(4), (0.0, 1.0))
    found = Fast(NFGSM()).largest(
        view, x, Lead(torch.tensor([[1.0, 0.0]]).expand(8, 2)), near, torch.Generator().manual_seed(0)
    )
    assert found.max() <= 2.5 + 1e-5  # w . x over [0, 1]^4


def test_both_algorithms_know_the_names() -> None:
    for kind in (SAPPO, SADQN):
        assert {"fgsm-rs", "n-fgsm", "pgd"} <= kind.losses.keys()
        assert isinstance(kind.losses["pgd"].solver, Ascent)  # type: ignore[attr-defined]
        assert kind.losses["n-fgsm"].solver == Fast(NFGSM())  # type: ignore[attr-defined]
        assert kind.losses["fgsm-rs"].solver == Fast(FGSMRS())  # type: ignore[attr-defined]
