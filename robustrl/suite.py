"""Many attackers at many budgets: no single attack shows how bad it can get."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from robustrl.api import attack_policy
from robustrl.attacks import (
    NES,
    ActionDeviation,
    ActionDirection,
    Attack,
    Command,
    GradientAttack,
    LowValue,
    Margin,
    MinimalFlip,
    MomentumAttack,
    Pattanaik,
    RandomNoise,
    Square,
    Targeted,
    Weighted,
)
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import in_frame_units
from robustrl.errors import ChunkError, check_choice, check_count
from robustrl.report.attack import AttackReport
from robustrl.threat import ThreatModel
from robustrl.training.adversary import train_adversary
from robustrl.training.robust_sarsa import robust_sarsa
from robustrl.training.snooping import snoop

FAST: dict[str, Callable[[], Attack]] = {
    "random": RandomNoise,
    "corner": lambda: RandomNoise("corner"),
    "margin": lambda: GradientAttack(Margin()),
    "MAD": lambda: GradientAttack(ActionDeviation()),
    "critic": lambda: GradientAttack(LowValue()),
    "flip": MinimalFlip,
}
STRONG: dict[str, Callable[[], Attack]] = {
    **FAST,
    "margin, 5 restarts": lambda: GradientAttack(Margin(), steps=20, restarts=5),
    "MAD, 5 restarts": lambda: GradientAttack(ActionDeviation(), steps=20, restarts=5),
    "targeted": lambda: GradientAttack(Targeted()),
    "momentum": lambda: MomentumAttack(Margin()),
    "Pattanaik": Pattanaik,
    "square": Square,
    "NES": NES,
}
"""Attacks that need no training, by label; `attack_suite` leaves out those that cannot serve a policy."""


def attack_suite(
    model: Any,
    env: Any,
    threats: ThreatModel | Sequence[ThreatModel],
    suite: str = "fast",
    episodes: int = 50,
    *,
    adversary_timesteps: int = 100_000,
    out: str | os.PathLike[str] | None = None,
    on_report: Callable[[AttackReport], object] | None = None,
    on_skip: Callable[[str, str], object] | None = None,
    seed: int = 1,
    **options: Any,
) -> list[AttackReport]:
    """Attack a policy with a whole suite, budget after budget.

    "fast" has random noise and gradient attacks with a few steps. "strong" adds restarts, momentum, query-only attacks, and for every
    budget adversaries that are trained (SA-RL, PA-AD); and from the policy's episodes an imitation (snooping) and a critic (Robust Sarsa).

    Args:
        model: SB3 model or `PolicyView`.
        env: as for `attack_policy`.
        threats: budget or budgets.
        suite: "fast" or "strong".
        episodes: per attack and budget; the same environment seeds for all.
        adversary_timesteps: training of each learned attacker (at most 61,440 for the critic's data); 0 leaves them out.
        out: folder for finished chunks and trained adversaries: an interrupted run goes on from them.
        on_report: called with every report as it is made.
        on_skip: called with an attack's label and the reason why it cannot serve this policy or threat.
        seed: of the episodes; adversaries learn on others.
        options: of `attack_policy`.
    Returns:
        reports, with the labels of their attacks; the most harmful of a budget's is the one with the least `mean`.
    """
    check_choice("suite", suite, ("fast", "strong"))
    check_count("adversary_timesteps", adversary_timesteps, least=0)
    several = [threats] if isinstance(threats, ThreatModel) else threats
    if not isinstance(several, Sequence) or not all(isinstance(threat, ThreatModel) for threat in several):
        raise TypeError(f"threats must be a ThreatModel or several, got {threats!r}")
    recipe = EnvRecipe.of(env, **{name: options.pop(name) for name in _RECIPE if name in options})
    view, found = recipe.view(model), []
    home = None if out is None else Path(out)
    trained = suite == "strong" and adversary_timesteps > 0
    watched = _watched(model, recipe, min(61_440, adversary_timesteps)) if trained else {}
    for number, threat in enumerate(several):
        makers = {**(FAST if suite == "fast" else STRONG), **watched}
        if trained:
            place = None if home is None else home / f"budget{number}"
            greedy = options.get("deterministic", True)
            makers |= _learned(model, recipe, threat, place, timesteps=adversary_timesteps, deterministic=greedy)
        here = in_frame_units(threat, recipe)
        for label, make in makers.items():
            try:
                attack = make()
                attack.check(view, here, recipe.noise)
            except ChunkError:
                raise
            except (TypeError, ValueError) as error:
                if on_skip is not None:
                    on_skip(label, str(error))
                continue
            chunks = None if home is None else home / f"budget{number}" / label.replace(" ", "-").replace(",", "")
            report = attack_policy(model, recipe, attack, threat, episodes, seed=seed, out=chunks, **options)
            found.append(replace(report, label=label))
            if on_report is not None:
                on_report(found[-1])
    return found


_RECIPE = ("noise", "frame_stack", "normalization", "max_episode_steps")


def _learned(
    model: Any, recipe: EnvRecipe, threat: ThreatModel, folder: Path | None, **options: Any
) -> dict[str, Callable[[], Attack]]:
    """Attackers that are trained for one budget."""

    def trained(name: str, command: Command | None = None) -> Attack:
        return train_adversary(model, recipe, threat, command, path=None if folder is None else folder / name, **options)

    return {"SA-RL": lambda: trained("sa-rl.zip"), "PA-AD": lambda: trained("pa-ad.zip", ActionDirection())}


def _watched(model: Any, recipe: EnvRecipe, timesteps: int) -> dict[str, Callable[[], Attack]]:
    """Attacks that learn from the victim's own episodes, when the first of them is made: an imitation, and a critic."""
    values = cache(lambda: robust_sarsa(model, recipe, timesteps=timesteps, epochs=100, learning_rate=1e-3))
    return {
        "snooping": lambda: snoop(model, recipe, observations=timesteps),
        "Robust Sarsa": lambda: GradientAttack(LowValue(values())),
        "Robust Sarsa + MAD": lambda: GradientAttack(Weighted(((0.99, LowValue(values())), (0.01, ActionDeviation())))),
    }
