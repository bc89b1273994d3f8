"""How far an attacker must go until a network with a Lipschitz constant takes an action; plain formulas, and their verdict.

The features of an input within delta lie within L ||delta||_2 of its own, and the difference of scores f_b - f_a = <w_b - w_a, features>
+ const moves by at most ||w_b - w_a||_2 times that. For a to be taken, it has to reach every b above it: ||delta||_2 is at least

    rho_a = max_b (f_b - f_a) / (||w_b - w_a|| L).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustrl.errors import check_choice, check_count, check_finite_array, check_real

Floats = NDArray[np.float64]
NORMS = (1, 2, math.inf)
LARGEST = sys.float_info.max
"""Stands for an infinite radius, which files do not hold."""


def pushes(margins: Floats, differences: Floats, lipschitz: float) -> Floats:
    """l2 norms that differences of scores take to be made up for; 0 where there is nothing to make up for.

    Args:
        margins: f_b - f_a less what rounding could be, any shape.
        differences: ||w_b - w_a||, of a shape that goes with it.
        lipschitz: L.
    """
    reach = np.where((differences > 0) & (lipschitz > 0), np.maximum(differences * lipschitz, sys.float_info.min), 0.0)
    reach = np.broadcast_to(reach, margins.shape)
    out = np.full(margins.shape, math.inf)
    with np.errstate(over="ignore"):
        np.divide(margins, reach, out=out, where=reach > 0)
    return np.where(margins > 0, out, 0.0)


def from_l2(radii: Floats, norm: float, dimension: int) -> Floats:
    """Radii in l1, l2 or l-inf of balls inside those in l2."""
    return radii / math.sqrt(dimension) if check_choice("norm", norm, NORMS) == math.inf else radii


def lipschitz_verdict(evidence: dict[str, Any], norm: float) -> tuple[int, float]:
    """Class and radius that the scores of one input give; (-1, 0) at ties.

    Args:
        evidence: scores (K,); for every action a a rival b and ||w_b - w_a||; the constant, what rounding takes off the margins, the
            dimension of the input, and the classes of layers whose constants were taken on trust.
    Raises:
        ValueError, TypeError: for impossible evidence.
    """
    scores, differences = (check_finite_array(name, evidence[name], ndim=1) for name in ("scores", "differences"))
    rivals = [check_count("rivals", rival, least=0) for rival in evidence["rivals"]]
    if not len(scores) == len(differences) == len(rivals) or max(rivals) >= len(scores) or differences.min() < 0:
        raise ValueError(f"rivals and differences >= 0 must be those of {len(scores)} scores, got {rivals} and {differences}")
    lipschitz, rounding = (check_real(name, evidence[name]) for name in ("lipschitz", "rounding"))
    if lipschitz < 0 or rounding < 0:
        raise ValueError(f"lipschitz and rounding must be >= 0, got {lipschitz} and {rounding}")
    trusted = evidence["trusted"]
    if not isinstance(trusted, list) or not all(isinstance(name, str) for name in trusted):
        raise ValueError(f"trusted must be names of layers, got {trusted!r}")
    costs = pushes(scores[rivals] - scores - rounding, differences, lipschitz)
    prediction = int(scores.argmax())
    others = np.delete(from_l2(costs, norm, check_count("dimension", evidence["dimension"])), prediction)
    radius = min(float(others.min(initial=math.inf)), LARGEST)
    return (prediction, radius) if radius > 0 else (-1, 0.0)
