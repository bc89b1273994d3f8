"""Attack a policy that can only be watched: learn an imitation from its clean episodes, and attack that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from robustrl.attacks import ActionDeviation, Attack, GradientAttack, Margin, Transfer
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import check_count
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.executor import one_thread
from robustrl.training.gathering import gather
from robustrl.training.objectives import ask, fit_surrogate


def snoop(
    model: Any, env: Any, attack: Attack | None = None, *, observations: int = 20_000, updates: int = 5_000, seed: int = 0
) -> Transfer:
    """An attack that needs nothing of its victim but what it did in clean episodes.

    Args:
        model: SB3 model or `PolicyView` without memory; only its greedy actions are looked at. A black box with nothing but `predict`
            is a `PolicyView.from_torch` of a module that asks it, as docs/methods/attacks.md shows under "Queries".
        env: anything `EnvRecipe.of` takes; its noise is left out while the victim is watched.
        attack: what attacks the imitation; default the margin of another action, or the largest change of a continuous one.
        observations: of the victim's own episodes, with what it did.
        updates: gradient steps of the imitation.
        seed: of episodes, weights and batches.
    Raises:
        TypeError: for a policy with a memory.
    """
    recipe = replace(EnvRecipe.of(env), noise=None)
    policy = recipe.view(model)
    if policy.memory_shape is not None:
        raise TypeError("model must have no memory: what it does is no function of the observation")
    engine = make_job(policy, recipe, seed=seed).engine
    with one_thread():
        stacks = gather(policy, recipe, check_count("observations", observations, least=2), seed, engine=engine)
        seen = policy.fold(stacks.frames.to(policy.device))
        surrogate = fit_surrogate(policy, seen, ask(policy, seen), updates=updates, seed=seed)
    if attack is None:
        attack = GradientAttack(Margin() if policy.discrete else ActionDeviation())
    return Transfer(surrogate, attack)
