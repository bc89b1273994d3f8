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


def check_float_frames(recipe: EnvRecipe, what: str) -> None:
    """Raise ValueError if the frames are integers, which neither noise nor the attack of a rollout can be added to."""
    dtype = recipe.frame_space.dtype
    if dtype is not None and dtype.kind != "f":
        raise ValueError(
            f"{what} needs float observations, but {recipe.label} gives {dtype}: convert them in a wrapper, "
            "EnvRecipe(wrappers=(...,)), as docs/agents.md shows for pictures (make_atari_env does for Atari); "
            "a network trained on bytes needs no change"
        )


def in_frame_units(threat: ThreatModel, recipe: EnvRecipe, *, covering: bool = False) -> ThreatModel:
    """The same threat in the recipe's frame units, with units="raw".

    A normalisation whose features have different sizes turns a ball into one with a scale per feature.

    Args:
        threat: in any units.
        recipe: where it acts. A threat in normalised units where the normalisation is outside the noise is meant before its clip.
        covering: return the smallest threat without a scale that contains it: what certificates are about.
    Raises:
        ValueError: if the units mean nothing here.
    """
    found = _in_frame_units(threat, recipe)
    return found.covering() if covering else found


def _in_frame_units(threat: ThreatModel, recipe: EnvRecipe) -> ThreatModel:
    units = frame_units(recipe)
    if threat.units == units or (threat.units == "raw" and units == "unit01"):
        return replace(threat, units="raw")
    if threat.units == "uint8" and units == "unit01":
        return threat.times(1 / 255, units="raw")
    check_float_frames(recipe, "an attack")
    if recipe.normalization is None or {threat.units, units} != {"raw", "normalized"}:
        raise ValueError(
            f"a threat model in units {threat.units!r} means nothing for {recipe.label}, whose frames are {units!r}"
        )
    if threat.norm == 0:
        return replace(threat, units="raw")
    shape, scale = recipe.frame_space.shape, recipe.normalization.scale
    if scale.shape != shape:
        raise ValueError(f"a frame of shape {shape} has no units {threat.units!r}: the normalisation is of shape {scale.shape}")
    sizes = 1 / scale if units == "normalized" else scale
    own, attackable = threat.scales(shape), threat.attackable(shape)
    if own is None and np.ptp(sizes[attackable]) == 0:
        return threat.times(float(sizes[attackable][0]), units="raw")
    return replace(threat, scale=tuple((sizes if own is None else sizes * own).ravel().tolist()), units="raw")


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
