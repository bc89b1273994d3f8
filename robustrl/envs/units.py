"""Threat models in the units in which frames meet the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from robustrl.certify.returns import episode_budget
from robustrl.envs.recipe import EnvRecipe
from robustrl.threat import ThreatModel, Units


def frame_units(recipe: EnvRecipe) -> Units:
    """What one unit of a frame is where attacks and noise act: "normalized", "unit01" (pictures in [0, 1]) or "raw"."""
    if recipe.normalization is not None and recipe.normalize == "before_noise":
        return "normalized"
    space = recipe.frame_space
    unit_picture = (
        len(space.shape) > 1 and space.dtype is not None and space.dtype.kind == "f" and bool(np.all(space.high == 1))
    )
    return "unit01" if unit_picture else "raw"


def in_frame_units(threat: ThreatModel, recipe: EnvRecipe, *, covering: bool = False) -> ThreatModel:
    """The same threat in the recipe's frame units, with units="raw".

    Args:
        threat: in any units.
        recipe: where it acts. A threat in normalised units where the normalisation is outside the noise is meant before its clip.
        covering: allow a larger threat where there is no equal one: budgets in other units than a normalisation's, whose
            features have different sizes.
    Raises:
        ValueError: if the units mean nothing here, or there is no equal threat and `covering` is False.
    """
    units = frame_units(recipe)
    if threat.units == units or (threat.units == "raw" and units == "unit01"):
        return replace(threat, units="raw")
    if threat.units == "uint8" and units == "unit01":
        return _scaled(threat, 1 / 255)
    if recipe.normalization is None or {threat.units, units} != {"raw", "normalized"}:
        raise ValueError(
            f"a threat model in units {threat.units!r} means nothing for {recipe.label}, whose frames are {units!r}"
        )
    if threat.norm == 0:
        return replace(threat, units="raw")
    shape, scale = recipe.frame_space.shape, recipe.normalization.scale
    if scale.shape != shape:
        raise ValueError(f"a frame of shape {shape} has no units {threat.units!r}: the normalisation is of shape {scale.shape}")
    scale = scale[threat.attackable(shape)]
    factor = float(1 / scale.min()) if units == "normalized" else float(scale.max())
    if not covering and scale.min() < scale.max():
        raise ValueError(
            f"a ball in units {threat.units!r} is none in the units of {recipe.label}'s frames ({units!r}): give the attack's "
            f"budget in units {units!r}"
        )
    return _scaled(threat, factor)


def covering_budgets(threats: Sequence[ThreatModel], recipe: EnvRecipe) -> tuple[list[float], dict[str, Any]]:
    """Episode budgets of the recipe's noise that cover threat models in any units, and how they came about, as plain data.

    Raises:
        ValueError: if a threat has no such budget here.
    """
    if recipe.noise is None:
        raise ValueError("a recipe without noise has no certified budgets")
    here = [in_frame_units(threat, recipe, covering=True) for threat in threats]
    sizes = {"horizon": recipe.horizon, "n_features": math.prod(recipe.frame_space.shape)}
    stated = {
        "converted_from": [threat.to_dict() for threat in threats],
        "in_frame_units": [t.to_dict() for t in here],
        **sizes,
    }
    return [episode_budget(recipe.noise, threat, **sizes) for threat in here], stated


def _scaled(threat: ThreatModel, factor: float) -> ThreatModel:
    if threat.norm == 0:
        return replace(threat, units="raw")
    step, episode = (None if limit is None else limit * factor for limit in (threat.step, threat.episode))
    return replace(threat, step=step, episode=episode, units="raw")
