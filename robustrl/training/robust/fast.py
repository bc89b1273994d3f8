"""Robustness terms by single-step attacks; `robustrl.training.supervised` has the attacks themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustrl.policy import PolicyView
from robustrl.training.robust.neighbourhood import Measure, Neighbourhood, Solver
from robustrl.training.supervised.attacks import InnerAttack


@dataclass(frozen=True)
class Fast(Solver):
    """An inner attack of fast adversarial training, norms 2 and inf: a value of the policy's real output.

    Args:
        attack: `FGSMRS()` finds a lower bound of the maximum in two passes through the network; `NFGSM()` leaves the neighbourhood, by up to
            three times its radius, which keeps single steps honest.

    Source: Wong, Rice, Kolter (ICLR 2020), arXiv:2001.03994; de Jorge et al. (NeurIPS 2022), arXiv:2202.01181.
    """

    attack: InnerAttack

    def largest(
        self, policy: PolicyView, observations: Tensor, measure: Measure, around: Neighbourhood, generator: torch.Generator
    ) -> Tensor:
        def values(found: Tensor) -> Tensor:
            return measure.at(policy.scores(found))

        reach = around.radius, around.norm, around.pixels, around.scale
        return values(observations + self.attack.perturb(values, observations, *reach, generator))
