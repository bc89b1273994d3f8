"""Threat models in the units of frames: the converted one contains the stated one, and is no larger than it has to be."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from robustrl.certify.returns import episode_budget
from robustrl.envs import EnvRecipe
from robustrl.envs.units import covering_budgets, frame_units, in_frame_units
from robustrl.noise import Gaussian
from robustrl.policy import Normalization
from robustrl.threat import Ledger, ThreatModel

VARIANCES = np.array([0.25, 4.0, 1.0, 9.0])
UNEVEN = Normalization(np.array([0.1, 0.2, -0.3, 0.0]), VARIANCES, epsilon=1e-8, clip=5.0)
EVEN = Normalization(np.zeros(4), np.full(4, 4.0), epsilon=1e-8, clip=5.0)
PICTURE = Normalization(np.full((3, 4), 0.5), np.full((3, 4), 0.04))
SCALE = np.sqrt(VARIANCES + 1e-8)
NORMS = (0, 1, 2, math.inf)


class Shown(gym.Env[Any, Any]):
    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Box) -> None:
        self.observation_space = space


def recipe(space: spaces.Box, **fields: Any) -> EnvRecipe:
    return EnvRecipe(factory=partial(Shown, space), max_episode_steps=5, **fields)


VECTOR = spaces.Box(-1, 1, (4,), np.float32)
UNIT = spaces.Box(0, 1, (3, 4), np.float32)
RECIPES: dict[str, EnvRecipe] = {
    "vector": recipe(VECTOR),
    "picture in [0, 1]": recipe(UNIT),
    "picture in [0, 255]": recipe(spaces.Box(0, 255, (3, 4), np.float32)),
    "bytes": recipe(spaces.Box(0, 255, (3, 4), np.uint8)),
    "vector in [0, 1]": recipe(spaces.Box(0, 1, (4,), np.float32)),
    "normalised before": recipe(VECTOR, normalization=UNEVEN),
    "normalised after": recipe(VECTOR, normalization=UNEVEN, normalize="after_noise"),
    "evenly before": recipe(VECTOR, normalization=EVEN),
    "evenly after": recipe(VECTOR, normalization=EVEN, normalize="after_noise"),
    "picture normalised before": recipe(UNIT, normalization=PICTURE),
    "picture normalised after": recipe(UNIT, normalization=PICTURE, normalize="after_noise"),
}
FRAMES = dict.fromkeys(RECIPES, "raw") | {
    "picture in [0, 1]": "unit01",
    "normalised before": "normalized",
    "evenly before": "normalized",
    "picture normalised before": "normalized",
    "picture normalised after": "unit01",
}
FACTORS: dict[tuple[str, str], float] = {
    # (units of frames and how, units of the threat) -> one unit of the threat in units of frames
    **{(name, FRAMES[name]): 1.0 for name in RECIPES},
    **{(name, "raw"): 1.0 for name in RECIPES if FRAMES[name] == "unit01"},
    **{(name, "uint8"): 1 / 255 for name in RECIPES if FRAMES[name] == "unit01"},
    ("normalised before", "raw"): 1 / 0.5,
    ("normalised after", "normalized"): 3.0,
    ("evenly before", "raw"): 1 / 2.0,
    ("evenly after", "normalized"): 2.0,
    ("picture normalised before", "raw"): 1 / 0.2,
}
UNEVEN_PAIRS = {("normalised before", "raw"), ("normalised after", "normalized")}
UNITS: tuple[Any, ...] = ("raw", "normalized", "unit01", "uint8")


def limited(norm: float, units: Any, mask: Any = None) -> ThreatModel:
    step, episode = (2, 3) if norm == 0 else (0.3, None if norm == math.inf else 0.5)
    return ThreatModel(norm, step=step, episode=episode, units=units, mask=mask)


@pytest.mark.parametrize("name", RECIPES)
def test_frames_know_their_units(name: str) -> None:
    assert frame_units(RECIPES[name]) == FRAMES[name]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_pair_of_units_has_its_factor_or_is_refused(name: str, units: Any, norm: float) -> None:
    threat, pair = limited(norm, units), (name, units)
    if pair not in FACTORS:
        why = rf"^a threat model in units '{units}' means nothing for .*, whose frames are '{FRAMES[name]}'"
        with pytest.raises(ValueError, match="needs float observations" if name == "bytes" else why):
            in_frame_units(threat, RECIPES[name], covering=True)
        return
    if pair in UNEVEN_PAIRS and norm != 0:
        sizes = 1 / SCALE if units == "raw" else SCALE
        exact = in_frame_units(threat, RECIPES[name])
        np.testing.assert_allclose(exact.scale, sizes, rtol=1e-15)
        assert replace(exact, scale=None, units=units) == threat  # the same radii, of delta / scale
        assert exact.covering() == in_frame_units(threat, RECIPES[name], covering=True)
    else:
        assert in_frame_units(threat, RECIPES[name]) == in_frame_units(threat, RECIPES[name], covering=True)
    found, factor = in_frame_units(threat, RECIPES[name], covering=True), 1.0 if norm == 0 else FACTORS[pair]
    assert found.units == "raw"
    assert found.norm == norm
    assert found.step == pytest.approx(threat.step * factor, rel=1e-6)  # type: ignore[operator]
    assert found.episode == (None if threat.episode is None else pytest.approx(threat.episode * factor, rel=1e-6))


def perturbed(raw: np.ndarray, delta: np.ndarray, units: str, normalization: Normalization | None) -> np.ndarray:
    """Raw observations after an attack of `delta` in units of the threat."""
    scale: Any = {"raw": 1.0, "unit01": 1.0, "uint8": 1 / 255}.get(units)
    return raw + delta * (normalization.scale if scale is None and normalization is not None else scale)


def size(delta: np.ndarray, norm: float) -> np.ndarray:
    flat = delta.reshape(len(delta), -1)
    return np.count_nonzero(np.abs(flat) > 1e-9, axis=1) if norm == 0 else np.linalg.norm(flat, norm, axis=1)


def attacks(threat: ThreatModel, shape: tuple[int, ...], n: int = 400) -> np.ndarray:
    """Perturbations on the limit of the threat: random directions, and all the budget on one entry."""
    generator = np.random.default_rng(0)
    delta = np.concatenate([generator.standard_normal((n, *shape)), 1e-3 + np.eye(math.prod(shape)).reshape(-1, *shape) * 1e6])
    delta *= threat.attackable(shape)
    delta = delta[size(delta, 2) > 1e-6]
    if threat.norm == 0:
        order = np.argsort(generator.random(delta.shape).reshape(len(delta), -1) + (delta == 0).reshape(len(delta), -1), axis=1)
        np.put_along_axis(delta.reshape(len(delta), -1), order[:, int(threat.step or 0) :], 0.0, axis=1)
        return delta
    return delta * (threat.step / size(delta, threat.norm)).reshape(-1, *(1,) * len(shape))


@pytest.mark.parametrize("pair", FACTORS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_attack_within_the_stated_threat_exceeds_the_converted_one(pair: tuple[str, str], norm: float, masked: bool) -> None:
    """Brute force through the recipe's own frames; and the converted limit is reached, so that it is no larger than needed."""
    name, units = pair
    where, shape = RECIPES[name], RECIPES[name].frame_space.shape
    mask = (True, False, True, False) if masked else None
    threat = limited(norm, units, mask)
    converted = in_frame_units(threat, where, covering=True)
    assert converted.mask == mask

    def delivered(delta: np.ndarray) -> np.ndarray:
        raw = np.random.default_rng(1).uniform(-0.1, 0.1, delta.shape)
        before, after = (where.frames(x) for x in (raw, perturbed(raw, delta, units, where.normalization)))
        change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
        assert not change[:, ~threat.attackable(shape)].any()
        return np.where(np.abs(change) > 1e-6, change, 0)  # frames are float32

    delta = attacks(threat, shape)
    spent = size(delivered(delta), norm)
    assert converted.step is not None
    assert spent.max() <= converted.step * (1 + 1e-5)
    assert spent.max() >= converted.step * (1 - 1e-3)
    if norm in (1, 2):
        assert threat.episode is not None
        assert converted.episode is not None
        episodes = np.repeat(delta, 4, axis=0) * np.random.default_rng(2).random((4 * len(delta), *(1,) * len(shape)))
        total = (size(episodes, norm).reshape(-1, 4) ** norm).sum(1) ** (1 / norm)
        episodes *= np.repeat(threat.episode / total, 4).reshape(-1, *(1,) * len(shape))
        spent = (size(delivered(episodes), norm).reshape(-1, 4) ** norm).sum(1) ** (1 / norm)
        assert spent.max() <= converted.episode * (1 + 1e-5)
        assert spent.max() >= converted.episode * (1 - 1e-3)


@pytest.mark.parametrize(("name", "units"), sorted(UNEVEN_PAIRS))
@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_with_scales_is_the_stated_one_in_other_units(name: str, units: str, norm: float) -> None:
    """What an attack costs is the same before and after the conversion, with a scale of its own as well."""
    where = RECIPES[name]
    for own in (None, (0.5, 2.0, 1.0, 3.0)):
        threat = replace(limited(norm, units), scale=own)
        delta = attacks(threat, (4,)) * (1.0 if own is None or norm == 0 else 0.3)
        raw = np.random.default_rng(1).uniform(-0.1, 0.1, delta.shape)
        change = [np.asarray(where.frames(x), np.float64) for x in (raw, perturbed(raw, delta, units, where.normalization))]
        frames = np.where(np.abs(change[1] - change[0]) > 1e-6, change[1] - change[0], 0)
        there = in_frame_units(threat, where)
        stated = size(delta / (1.0 if own is None else np.array(own)), norm)
        np.testing.assert_allclose(size(frames / np.array(there.scale or 1.0), norm), stated, rtol=1e-3)
        ledger = Ledger(replace(there, step=math.inf, episode=None), len(delta))
        np.testing.assert_allclose(ledger.charge(np.zeros_like(frames), frames), stated, rtol=1e-3)


def test_certificates_cover_a_scale_through_its_largest_attackable_entry() -> None:
    noisy = recipe(VECTOR, noise=Gaussian(0.5))
    threat = ThreatModel(2, episode=0.5, scale=(3.0, 0.1, 0.2, 2.0))
    assert covering_budgets([threat], noisy)[0] == [1.5]
    assert covering_budgets([replace(threat, mask=(False, True, True, True))], noisy)[0] == [1.0]
    assert episode_budget(Gaussian(0.5), threat, horizon=5, n_features=4) == 1.5
    stated = covering_budgets([threat], noisy)[1]
    assert ThreatModel.from_dict(stated["converted_from"][0]) == threat
    assert ThreatModel.from_dict(stated["in_frame_units"][0]) == ThreatModel(2, episode=1.5)


def test_a_mask_decides_which_features_count() -> None:
    """Closed form: the smallest (or largest) scale among the attackable features alone."""
    for mask, low, high in (
        ((True, True, False, False), 0.5, 2.0),
        ((False, True, True, True), 1.0, 3.0),
        ((False, False, True, False), 1.0, 1.0),
    ):
        raw, unit = limited(2, "raw", mask), limited(2, "normalized", mask)
        assert in_frame_units(raw, RECIPES["normalised before"], covering=True).step == pytest.approx(0.3 / low, rel=1e-6)
        assert in_frame_units(unit, RECIPES["normalised after"], covering=True).step == pytest.approx(0.3 * high, rel=1e-6)
    single = in_frame_units(limited(2, "raw", (False, False, True, False)), RECIPES["normalised before"])
    assert single.step == pytest.approx(0.3, rel=1e-6)  # one feature has one scale: nothing to cover


def test_unlimited_parts_stay_unlimited() -> None:
    found = in_frame_units(ThreatModel(2, step=math.inf, episode=1.0, units="uint8"), RECIPES["picture in [0, 1]"])
    assert found == ThreatModel(2, step=math.inf, episode=1 / 255)
    assert in_frame_units(ThreatModel(1, episode=2.0, units="raw"), RECIPES["evenly before"]).step is None


def test_statistics_of_whole_stacks_have_no_units_of_frames() -> None:
    stacked = Normalization(np.zeros(12), np.ones(12))
    where = recipe(VECTOR, normalization=stacked, normalize="after_noise", frame_stack=3)
    assert in_frame_units(limited(2, "raw"), where) == limited(2, "raw")
    with pytest.raises(
        ValueError, match=r"a frame of shape \(4,\) has no units 'normalized': the normalisation is of shape \(12,\)"
    ):
        in_frame_units(limited(2, "normalized"), where, covering=True)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of 3 entries does not fit frames of shape \(4,\)"):
        in_frame_units(limited(2, "raw", (True, False, True)), RECIPES["normalised before"], covering=True)
