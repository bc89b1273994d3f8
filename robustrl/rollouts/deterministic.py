"""Certificates of deterministic policies: what no attacker can push their episodes below, without noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robustrl.certify.certificate import Floats
from robustrl.certify.deterministic import METHODS, DeterministicCertificate
from robustrl.certify.explored import UNSEARCHED, Accounting, Explored
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.margins import from_l2, pushes
from robustrl.certify.storage import plain_data
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.recipe import EnvRecipe, find_spec
from robustrl.envs.units import frame_units, in_frame_units
from robustrl.errors import CertificateError, ChainError, check_alpha, check_choice, check_count, check_finite_array, check_real
from robustrl.policy import PolicyView
from robustrl.rollouts.collect import check_actions
from robustrl.rollouts.engines import refuse_unseeded
from robustrl.rollouts.executor import build, one_thread
from robustrl.rollouts.identity import identity
from robustrl.rollouts.progress import progress_bar as bar
from robustrl.rollouts.tree import Search, Stepper, clean_length, explore
from robustrl.seeding import chunk_seeds, slot_seeds
from robustrl.threat import ThreatModel

CHUNK = 4096
"""Episodes per branch of the seed tree."""
SAME = 1e-3
"""What the environment's rounding on another machine may make of a cost, relatively."""
REWARDS = {
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": 1.0,
    "gymnasium.envs.classic_control.acrobot:AcrobotEnv": -1.0,
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": -1.0,
}
"""Least reward of a step of Gymnasium's own environments without arguments, by entry point."""
ENDING = frozenset(REWARDS)
"""Gymnasium's own environments that may end an episode early, by entry point: a pole that falls, a goal that is reached."""


def certify_deterministic(
    model: Any,
    env: Any,
    budgets: ArrayLike | ThreatModel | Sequence[ThreatModel],
    *,
    per: Literal["step", "episode"] = "step",
    norm: float = 2,
    method: str = "tree",
    episodes: int = 100,
    alpha: float = 0.05,
    nodes: int = 10_000,
    reward_low: float | None = None,
    return_low: float | None = None,
    never_ends_early: bool = False,
    seed: int = 0,
    progress_bar: bool = False,
) -> DeterministicCertificate:
    """Bound the return of a deterministic policy under every attacker of its observations, from its Lipschitz constant.

    The attacker may know all there is to know, future random numbers included. Noise in the recipe is left out: greedy actions of the bare
    policy are certified.

    Args:
        model: SB3 model or `PolicyView` with discrete actions, whose network has a known constant (`LipschitzScores.of`), for example a
            DQN on `LipschitzMLP` features.
        env: anything `EnvRecipe.of` takes.
        budgets: in units of the frames as attackers meet them, a number or shape (K,); or threat models, all of one kind.
        per: "step": every frame changes by at most the budget; "episode": the root of the sum of squared changes (norm 1: their sum).
        norm: 1, 2 or inf ("step" only).
        method: "tree" (search in copies of the environment), "prefix" or "constancy" (the clean episode alone; no copies).
        episodes: number of episodes, fixed beforehand.
        alpha: failure probability of `values`; `bounds` of the episodes played are certain.
        nodes: most states of one episode's tree, beside those of the clean episode. What is left counts as the worst that `reward_low` allows.
        reward_low: sure lower bound of the reward of a step; default what is known of Gymnasium's own environments.
        return_low: sure lower bound of the return of an episode, if a better one is known than `reward_low` at every step.
        never_ends_early: whether every episode has all its steps, whatever happens: then a positive `reward_low` counts for those to come.
        seed: root of the environment's randomness.
        progress_bar: show a bar with an ETA.
    Returns:
        DeterministicCertificate.
    Raises:
        TypeError: if no Lipschitz constant of the network is known.
        ValueError: for bad arguments, an environment that cannot be copied, or one that breaks `reward_low` or `never_ends_early`.
        ChainError: if the environment does not repeat itself under one seed.
    """
    check_choice("method", method, METHODS)
    check_count("episodes", episodes)
    check_count("nodes", nodes)
    check_alpha(alpha)
    if type(never_ends_early) is not bool:
        raise TypeError(f"never_ends_early must be a bool, got {never_ends_early!r}")
    recipe = replace(EnvRecipe.of(env), noise=None)
    policy = recipe.view(model)
    constants = LipschitzScores.of(policy)
    check_actions(policy, recipe)
    grid, per, norm, threat = in_budgets(budgets, per, norm, recipe)
    accounting = Accounting(per, norm, recipe.frame_stack, recipe.stack_padding)
    low = known_reward_low(recipe) if reward_low is None else check_real("reward_low", reward_low)
    if low is None:
        raise ValueError(
            f"reward_low (--reward-low) must be given: no sure lower bound of the reward of a step is known for {recipe.label}"
        )
    rest = low if never_ends_early else min(low, 0.0)
    floor = sure_return(recipe, rest)
    if return_low is not None:
        floor = max(floor, check_real("return_low", return_low))
    refuse_false(recipe, low, floor, never_ends_early)
    search = make_search(policy, recipe, accounting, grid, rest=rest, reward_low=low, nodes=nodes if method == "tree" else 0)
    refuse_unseeded(recipe)
    seeds = episode_seeds(seed, episodes)
    with one_thread(), bar("search", episodes, visible=progress_bar) as advance:
        evidence = explore(search, seeds, advance)
    certificate = DeterministicCertificate.of(
        evidence,
        method=method,
        accounting=accounting,
        budgets=grid,
        alpha=alpha,
        horizon=recipe.horizon,
        reward_low=low,
        return_low=floor,
        never_ends_early=never_ends_early,
        threat=threat,
        provenance={
            "policy_hash": policy.fingerprint(),
            "recipe": recipe.to_dict(),
            "code": code_of(recipe),
            "env": recipe.label,
            "units": frame_units(recipe),
            "seed": seed,
            "nodes": nodes,
            "versions": dict(build()),
            "device": policy.device.type,
            "lipschitz": constants.lipschitz,
            "trusted": list(constants.trusted),
        },
    )
    if never_ends_early:
        with one_thread():
            for number in np.flatnonzero(~ended_within(evidence)):
                check_length(search, evidence, int(number))
    try:
        replay_paths(certificate, policy, recipe, episodes=2, paths=2)
    except CertificateError as error:
        raise ChainError(
            f"{recipe.label} does not repeat itself ({error}): it has random numbers that reset(seed=...) does not seed, or state that "
            "its copies share"
        ) from None
    return certificate


def code_of(recipe: EnvRecipe) -> list[str]:
    """What tells factories and wrappers apart, within a build."""
    return [identity(part) for part in (recipe.factory, *recipe.wrappers) if part is not None]


def make_search(
    policy: PolicyView,
    recipe: EnvRecipe,
    accounting: Accounting,
    budgets: Floats,
    *,
    rest: float,
    reward_low: float,
    nodes: int,
) -> Search:
    """A search with the costs of the policy's own network."""
    costs = partial(LipschitzScores.of(policy).costs, norm=accounting.cost_norm)
    return Search(recipe, policy.for_inference(), costs, accounting, budgets, rest, reward_low, nodes)


def episode_seeds(seed: int, episodes: int) -> NDArray[np.int64]:
    """Seeds of the environment, all different, (episodes,)."""
    sizes = [min(CHUNK, episodes - start) for start in range(0, episodes, CHUNK)]
    parts = [slot_seeds(chunk_seeds(seed, chunk).environment, size) for chunk, size in enumerate(sizes)]
    return np.concatenate(parts).astype(np.int64)


def known_reward_low(recipe: EnvRecipe) -> float | None:
    """Least reward of a step whatever the agent does, or None where nothing is known; wrappers and arguments make it unknown."""
    if recipe.env_id is None or recipe.wrappers or recipe.env_kwargs:
        return None
    spec = find_spec(recipe.env_id)
    if spec.entry_point == "robustrl.envs.atari:make_atari":
        return known_return_bounds(recipe)[0]  # 0 or -1, of single rewards too: of one round only the last one counts
    if spec.additional_wrappers or spec.kwargs:
        return None
    return REWARDS.get(str(spec.entry_point))


def refuse_false(recipe: EnvRecipe, reward_low: float, return_low: float, never_ends_early: bool) -> None:
    """Raise ValueError for words about rewards and ends that are known to be false.

    Of an environment of which nothing is known, its owner's word is taken; the certificate's table says so.
    """
    low = known_reward_low(recipe)
    if low is not None and reward_low > low:
        raise ValueError(f"reward_low is {reward_low:g}, but a step may pay as little as {low:g}")
    if never_ends_early and may_end_early(recipe):
        raise ValueError(
            f"never_ends_early must be False: an episode of {recipe.label} may end before its {recipe.horizon} steps"
        )
    sure = sure_return(recipe, reward_low if never_ends_early else min(reward_low, 0.0))
    if known_return_bounds(recipe)[0] is not None and return_low > sure:
        raise ValueError(f"return_low is {return_low:g}, but an episode may return as little as {sure:g}")


def may_end_early(recipe: EnvRecipe) -> bool:
    """Whether some episodes are known to end before the horizon; wrappers make it unknown."""
    if recipe.env_id is None or recipe.wrappers:
        return False
    spec = find_spec(recipe.env_id)
    return not spec.additional_wrappers and spec.entry_point in ENDING


def ended_within(tree: Explored) -> NDArray[np.bool_]:
    """Whether an end of every episode was seen, (n,)."""
    return np.logical_or.reduceat(tree.ended, tree.roots)


def check_length(search: Search, tree: Explored, episode: int) -> None:
    """Raise ValueError if an episode that nobody attacks, played again, ends before the horizon."""
    steps, horizon = clean_length(search, int(tree.seeds[episode])), search.recipe.horizon
    if steps < horizon:
        raise ValueError(f"never_ends_early must be False: an episode ended after {steps} of {horizon} steps")


def sure_return(recipe: EnvRecipe, rest: float) -> float:
    """Sure lower bound of an episode's return: the better one of what is known of it, and of the rewards of its steps."""
    known = known_return_bounds(recipe)[0]
    each = recipe.horizon * rest
    return each if known is None else max(known, each)


def check_statement(certificate: DeterministicCertificate, recipe: EnvRecipe | None) -> None:
    """Raise CertificateError if what is said about episodes, rewards and budgets does not follow from seed and recipe."""
    recorded = certificate.provenance
    if "seed" in recorded and not _same_seeds(recorded["seed"], certificate.evidence.seeds):
        raise CertificateError(f"its episodes are not those of seed {recorded['seed']}: some were left out, or chosen")
    if recipe is None:
        if certificate.threat is not None or recorded.get("units", "raw") != "raw":
            raise CertificateError("what the budgets mean cannot be recomputed without the environment, pass env=")
        return
    try:
        refuse_false(recipe, certificate.reward_low, certificate.return_low, certificate.never_ends_early)
    except ValueError as error:
        raise CertificateError(f"what it takes as sure is false: {error}") from None
    if recorded.get("units", frame_units(recipe)) != frame_units(recipe):
        raise CertificateError(
            f"its units are said to be {recorded['units']!r}, but frames of {recipe.label} are {frame_units(recipe)!r}"
        )
    if certificate.threat is None:
        return
    accounting = certificate.accounting
    try:
        threats = [ThreatModel.from_dict(item) for item in certificate.threat["converted_from"]]
        grid, per, norm, stated = in_budgets(threats, accounting.per, accounting.norm, recipe)
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"field 'threat' cannot be converted into budgets: {error}") from None
    same = plain_data("threat", stated) == certificate.threat and (per, norm) == (accounting.per, accounting.norm)
    if not same or grid.shape != certificate.budgets.shape or not np.allclose(grid, certificate.budgets, rtol=1e-12, atol=0):
        raise CertificateError(f"field 'threat' stands for the budgets {grid} in {recipe.label}, not for {certificate.budgets}")


def _same_seeds(seed: Any, seeds: NDArray[np.int64]) -> bool:
    try:
        return np.array_equal(episode_seeds(check_count("seed", seed, least=0), len(seeds)), seeds)
    except (TypeError, ValueError) as error:
        raise CertificateError(f"no episodes have the recorded seed: {error}") from None


def replay_paths(
    certificate: DeterministicCertificate,
    policy: PolicyView,
    recipe: EnvRecipe,
    episodes: int,
    paths: int = 8,
) -> list[int]:
    """Walk random paths of random episodes' trees again, from the start; numbers of the episodes of which a step was walked.

    Args:
        certificate: with the trees.
        policy, recipe: that were certified.
        episodes: most episodes.
        paths: of each; the first is the clean one.
    Raises:
        CertificateError: if a reward or an end comes out differently, an action costs less than the tree says, or an episode ends early
            that never should.
    """
    tree, rng = certificate.evidence, np.random.default_rng()
    settings: dict[str, Any] = {"rest": 0.0, "reward_low": certificate.reward_low, "nodes": 0}
    search = make_search(policy, recipe, certificate.accounting, certificate.budgets, **settings)
    chosen = sorted(rng.choice(certificate.n, size=min(episodes, certificate.n), replace=False).tolist())
    order = np.argsort(tree.parents, kind="stable")
    starts = np.searchsorted(tree.parents[order], np.arange(len(tree.times) + 1))
    ended, walked = ended_within(tree), set[int]()
    for episode in chosen:
        if certificate.never_ends_early and not ended[episode]:
            try:
                check_length(search, tree, episode)
            except ValueError as error:
                raise CertificateError(f"episode {episode} cannot be played again: {error}") from None
        for path in range(paths):
            stepper, state = Stepper(search, int(tree.seeds[episode])), int(tree.roots[episode])
            seen: list[tuple[int, NDArray[Any]]] = []
            while not tree.ended[state]:
                seen.append((state, stepper.stack))
                edges = order[starts[state] : starts[state + 1]]
                looked = edges[tree.children[edges] != UNSEARCHED]
                if not looked.size:
                    break
                edge = looked[np.argmin(tree.costs[looked])] if path == 0 else rng.choice(looked)
                try:
                    reward, over = stepper.step(int(tree.actions[edge]), int(tree.times[state]))
                except (ValueError, IndexError) as error:
                    raise CertificateError(f"episode {episode} cannot be played again: {error}") from None
                state = int(tree.children[edge])
                walked.add(episode)
                if over != tree.ended[state] or not np.isclose(reward, tree.rewards[edge], rtol=1e-9, atol=1e-12):
                    raise CertificateError(f"episode {episode} comes out differently after {tree.times[state]} steps")
            stepper.close()
            _check_costs(
                certificate,
                search,
                [(state, order[starts[state] : starts[state + 1]]) for state, _ in seen],
                [s for _, s in seen],
            )
    return sorted(walked)


def _check_costs(
    certificate: DeterministicCertificate, search: Search, places: list[tuple[int, NDArray[Any]]], stacks: list[NDArray[Any]]
) -> None:
    """Raise CertificateError if an action costs less in a state, or is not among its edges, than the network says again."""
    tree, accounting = certificate.evidence, certificate.accounting
    found, _ = search.judged(stacks)
    stated = np.full(found.shape, np.inf)
    for row, (_, edges) in enumerate(places):
        known = edges[tree.actions[edges] < found.shape[1]]
        stated[row, tree.actions[known]] = tree.costs[known]
    times = tree.times[[state for state, _ in places]][:, None]
    within = accounting.charges(found, times) <= accounting.limits(certificate.budgets).max() * (1 - 2 * SAME)
    most = np.maximum(found, _without_rounding(search, stacks, accounting.cost_norm))
    wrong = within & (stated > most * (1 + SAME))
    if wrong.any():
        row, action = np.argwhere(wrong)[0]
        raise CertificateError(
            f"step {times[row, 0]} of a path: action {action} costs {found[row, action]:g}, not {stated[row, action]:g}"
        )


def _without_rounding(search: Search, stacks: list[NDArray[Any]], norm: float) -> Floats:
    """What actions would cost without the network's rounding in float32, which is another one on other machines, (n, K)."""
    scores = LipschitzScores.of(search.policy)
    observations = search.policy.fold(torch.from_numpy(np.concatenate(stacks)).float().to(search.policy.device))
    values = scores.scores(observations)
    each = pushes(values[:, None, :] - values[:, :, None], scores.differences(values.shape[1]), scores.lipschitz)
    return from_l2(each.max(-1), norm, math.prod(observations.shape[1:]))


def in_budgets(
    budgets: Any, per: Any, norm: Any, recipe: EnvRecipe
) -> tuple[Floats, Literal["step", "episode"], float, dict[str, Any] | None]:
    """Budgets in frame units, what they are per and in which norm, and the threat models that they stand for."""
    threats = [budgets] if isinstance(budgets, ThreatModel) else budgets
    if not isinstance(threats, list | tuple) or not any(isinstance(one, ThreatModel) for one in threats):
        grid = np.atleast_1d(check_finite_array("budgets", budgets))
        if grid.min() < 0:
            raise ValueError(f"budgets must be >= 0, got {grid.min()}")
        return grid, per, norm, None
    if not all(isinstance(one, ThreatModel) for one in threats):
        raise TypeError("budgets must be numbers or ThreatModels, got a mixture of both")
    here = [in_frame_units(one, recipe, covering=True) for one in threats]
    kinds = {(one.norm, one.episode is None) for one in here}
    if len(kinds) > 1 or any(one.norm == 0 for one in here):
        raise ValueError("budgets must be ThreatModels of one norm, 1, 2 or inf, all per step or all per episode")
    ((norm, steps),) = kinds
    limits: list[Any] = [one.step if steps else one.episode for one in here]
    grid = check_finite_array("budgets", limits)
    stated = {"converted_from": [one.to_dict() for one in threats], "in_frame_units": [one.to_dict() for one in here]}
    return grid, "step" if steps else "episode", norm, stated
