"""Noise mechanisms and what an attacker can do against them.

A mechanism perturbs frames and knows its trade-off function: the smallest probability `lower(p, budget)` and the
largest probability `upper(p, budget)` that any attacker within `budget` can give to an event of clean probability p.
The reward certificate of a whole episode and the certificate of one input are the same call with different evidence.

Budgets are totals over the episode in the mechanism's own norm and in observation units:

======================  ==================================  =====================================================
mechanism               norm of the budget                  lower(p, B)
======================  ==================================  =====================================================
Gaussian                l2: sqrt(sum_t ||e_t||_2^2)         Phi(Phi^-1(p) - B / sigma)
Uniform, Splitting      l1: sum_t ||e_t||_1                 max(p - B / (2 lam), 0)
DeterministicSplitting  l1: sum_t ||e_t||_1, on a grid      max(p - B / (2 lam), 0)
Laplace                 l1: sum_t ||e_t||_1                 max(p exp(-B / b), 1 - (1 - p) exp(B / b))
Ablation                l0: number of altered whole frames  max(p - (1 - (1 - keep)^B), 0)
======================  ==================================  =====================================================

All of them hold against *adaptive* attackers, provided the noise is drawn afresh at every step, independently of
everything the attacker has seen. Others have a proof for one input only:

======================  ==================================  =====================================================
UniformBall             l2: ||e||_2                         max(p - I_{(B / 2 lam)^2}(1/2, (d + 1)/2), 0)
EntryAblation           l0: altered entries of the input    max(p - (1 - C(d - B, keep) / C(d, keep)), 0)
QuantisedGaussian       l2: ||e||_2, on a grid              Phi(Phi^-1(p - slack) - B / sigma) - slack
======================  ==================================  =====================================================
"""

from __future__ import annotations

from typing import Any, cast

from robustrl.noise.base import Noise
from robustrl.noise.gaussian import Gaussian
from robustrl.noise.laplace import Laplace
from robustrl.noise.quantised import QuantisedGaussian
from robustrl.noise.splitting import DeterministicSplitting
from robustrl.noise.total_variation import Ablation, Splitting, Uniform
from robustrl.noise.whole_input import EntryAblation, UniformBall

__all__ = [
    "MECHANISMS",
    "Ablation",
    "DeterministicSplitting",
    "EntryAblation",
    "Gaussian",
    "Laplace",
    "Noise",
    "QuantisedGaussian",
    "Splitting",
    "Uniform",
    "UniformBall",
    "noise_from_dict",
]

_EPISODES = [Gaussian, Uniform, Splitting, Laplace, Ablation, DeterministicSplitting]
_ONE_INPUT = [UniformBall, EntryAblation, QuantisedGaussian]

MECHANISMS: dict[str, type[Noise]] = {kind.__name__: kind for kind in cast(list[type[Noise]], _EPISODES + _ONE_INPUT)}


def noise_from_dict(data: dict[str, Any]) -> Noise:
    """Rebuild a mechanism from `Noise.to_dict`.

    Raises:
        ValueError: if the kind or its parameters are unknown.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in MECHANISMS:
        raise ValueError(f"noise kind must be one of {sorted(MECHANISMS)}, got {kind!r}")
    try:
        return MECHANISMS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"noise {kind} does not take the parameters {sorted(fields)}: {error}") from None
