"""How robust a policy of discrete actions looks in terms of IBP: estimates, none of which bounds an attacked return."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import frame_units, in_frame_units
from robustrl.errors import check_count
from robustrl.networks.bounds import propagate
from robustrl.policy import PolicyView, push_frame, start_stack
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.engines import make_engine
from robustrl.seeding import chunk_seeds
from robustrl.threat import ThreatModel
from robustrl.training.robust.neighbourhood import Neighbourhood, check_threat, scale_of


def possible_actions(policy: PolicyView, observations: Tensor, around: Neighbourhood) -> Tensor:
    """Which actions IBP cannot exclude as the greedy one in the neighbourhood, boolean (n, actions); no gradients."""
    with torch.no_grad():
        return (propagate(policy, around.region(observations)).differences().high >= 0).all(1)


def estimate_certified_actions(policy: PolicyView, observations: Tensor, around: Neighbourhood) -> float:
    """Share of observations whose greedy action no perturbation in the neighbourhood changes, as far as IBP can tell.

    The "action certification rate" of the literature. Each counted observation is certified on its own (for the clean policy, without
    noise); the share is an estimate for the distribution that the observations came from, which an attacker changes.

    Args:
        policy: of discrete actions.
        observations: (n, *observation_shape), in the policy's units.
        around: the neighbourhood, e.g. `Neighbourhood.of(...)`.
    Raises:
        ValueError: if actions are continuous, there are no observations, or a layer has no known bounds.
    """
    _check(policy)
    if not len(observations):
        raise ValueError("observations must hold at least one observation, got none")
    return float((possible_actions(policy, observations, around).sum(1) == 1).double().mean())


def estimate_greedy_worst_case(
    model: Any, env: Any, threat: ThreatModel, episodes: int = 20, *, seed: int = 0, engine: str = "auto"
) -> NDArray[np.float64]:
    """Returns of episodes in which every action is the worst one that IBP cannot exclude, by the clean scores.

    RADIAL's greedy worst-case reward. It is an estimate and no lower bound of the attacked return: the action with the lowest score is
    not always the most harmful one, and harm adds up. It may also be far below every attack, where IBP is loose.

    Args:
        model: SB3 model or `PolicyView`, of discrete actions.
        env: anything `EnvRecipe.of` takes, without noise.
        threat: radius per step; norms other than inf for policies of single frames only.
        episodes: number of episodes.
        seed: of the environments.
        engine: how environments run side by side.
    Returns:
        returns, float64, (episodes,).
    Raises:
        ValueError: for bad arguments, or a policy whose bounds are not known.
    """
    recipe = EnvRecipe.of(env)
    check_count("episodes", episodes)
    if recipe.noise is not None:
        raise ValueError(f"env must have no noise: IBP bounds are for the clean policy, got {recipe.noise}")
    policy = recipe.view(model)
    _check(policy)
    around = _around(threat, recipe, policy)
    running = make_engine(recipe, make_job(policy, recipe, seed=seed, engine=engine).engine)
    returns, alive = np.zeros(episodes), np.arange(episodes)
    stack: Tensor | None = None
    try:
        frames, _ = running.start(episodes, chunk_seeds(seed, 0).environment)
        for _ in range(recipe.horizon):
            newest = torch.from_numpy(np.array(recipe.frames(frames), dtype=np.float32)).to(policy.device)
            stack = start_stack(newest, policy.n_frames, recipe.stack_padding) if stack is None else push_frame(stack, newest)
            observations = policy.fold(stack)
            with torch.no_grad():
                scores = policy.scores(observations)
            excluded = ~possible_actions(policy, observations, around)
            frames, rewards, finished = running.step(policy.received(scores.masked_fill(excluded, torch.inf).argmin(-1)))
            returns[alive] += rewards
            if finished.all():
                break
            if finished.any():
                running.keep(~finished)
                frames, alive = frames[~finished], alive[~finished]
                stack = stack[torch.from_numpy(~finished).to(policy.device)]
    finally:
        running.close()
    return returns


def _check(policy: PolicyView) -> None:
    if not policy.discrete:
        raise ValueError("policy must have discrete actions: there is no worst one of continuous actions")


def _around(threat: ThreatModel, recipe: EnvRecipe, policy: PolicyView) -> Neighbourhood:
    """The neighbourhood of a whole observation, all of whose frames were attacked."""
    here = in_frame_units(check_threat(threat), recipe)
    if policy.n_frames > 1 and here.norm != math.inf:
        raise ValueError(
            f"threat must be of norm inf for a policy that stacks {policy.n_frames} frames, got norm {here.norm:g}"
        )
    scale = scale_of(here, policy.frame_shape)
    scale = policy.fold(scale.expand(1, policy.n_frames, *scale.shape))[0].to(policy.device)
    assert here.step is not None
    pixels = (0.0, 1.0) if frame_units(recipe) == "unit01" else None
    return Neighbourhood(here.norm, here.step, scale, pixels)
