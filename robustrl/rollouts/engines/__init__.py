"""Engines: many episodes of one environment side by side, each exactly once."""

from __future__ import annotations

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import check_choice
from robustrl.rollouts.engines.ale import AleVectorEngine
from robustrl.rollouts.engines.base import Engine, Step
from robustrl.rollouts.engines.cartpole import NativeCartPole
from robustrl.rollouts.engines.env_list import EnvList, refuse_unseeded
from robustrl.rollouts.engines.envpool import EnvPoolEngine

__all__ = [
    "ENGINES",
    "AleVectorEngine",
    "Engine",
    "EnvList",
    "EnvPoolEngine",
    "NativeCartPole",
    "Step",
    "make_engine",
    "refuse_unseeded",
]

_KINDS: dict[str, type[NativeCartPole | EnvList | EnvPoolEngine | AleVectorEngine]] = {
    kind.name: kind for kind in (NativeCartPole, EnvList, EnvPoolEngine, AleVectorEngine)
}
ENGINES = ("auto", *_KINDS)


def make_engine(recipe: EnvRecipe, engine: str = "auto") -> Engine:
    """The engine for a recipe.

    Args:
        recipe: the environment.
        engine: "native" (CartPole, vectorised by Gymnasium), "list" (any environment), "envpool", "ale", or "auto": native
            where there is one, else list. Auto looks at the recipe alone, so that episodes do not depend on what is installed.
    Raises:
        ValueError: if the engine plays another environment than the recipe's, or its package is missing.
    """
    if check_choice("engine", engine, ENGINES) == "auto":
        engine = "list" if NativeCartPole.refusal(recipe) else "native"
    if reason := _KINDS[engine].refusal(recipe):
        raise ValueError(f"engine={engine!r} is not available for {recipe.label}: {reason}; use 'list'")
    return _KINDS[engine](recipe)
