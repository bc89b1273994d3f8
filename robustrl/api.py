"""The calls that join rollouts, certificates and reports: what most users need.

>>> import numpy as np, robustrl as rrl                                                        # doctest: +SKIP
>>> env = rrl.make_vec_env("CartPole-v1", noise=rrl.Gaussian(0.2), max_episode_steps=200)      # doctest: +SKIP
>>> certificate = rrl.certify_policy(model, env, budgets=np.linspace(0, 1, 11))                # doctest: +SKIP
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.attacks.base import Attack
from robustrl.certify.confidence import clopper_pearson_upper
from robustrl.certify.episode import EpisodeCertificate
from robustrl.certify.returns import certify_quantile, certify_return, certify_success, episode_budget, mean_upper_bound
from robustrl.certify.storage import plain_data
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import covering_budgets, frame_units, in_frame_units
from robustrl.errors import check_alpha, check_choice, check_count, check_real
from robustrl.networks import load_denoiser
from robustrl.noise import Noise
from robustrl.policy import Normalization
from robustrl.policy.loading import load_model
from robustrl.report.attack import AttackReport
from robustrl.rollouts.chunk import Job
from robustrl.rollouts.collect import check_actions, collect, make_job
from robustrl.rollouts.executor import Executor, build
from robustrl.threat import ThreatModel
from robustrl.training.run_files import DENOISER, RunInfo


def certify_policy(
    model: Any,
    env: Any,
    budgets: ArrayLike,
    episodes: int = 10_000,
    *,
    alpha: float = 0.05,
    method: str = "hybrid",
    statistic: str = "mean",
    success_at: float | None = None,
    quantile: float | None = None,
    noise: Noise | None = None,
    frame_stack: int | None = None,
    normalization: Normalization | None = None,
    max_episode_steps: int | None = None,
    return_low: float | None = None,
    return_high: float | None = None,
    simultaneous: bool = True,
    until: tuple[float, float] | None = None,
    deterministic: bool = True,
    seed: int = 0,
    n_workers: int = 1,
    chunk_size: int | None = None,
    engine: str = "auto",
    executor: Executor | None = None,
    out: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
) -> EpisodeCertificate:
    """Roll a smoothed policy out and certify its return against every adaptive attacker within a budget.

    Args:
        model: SB3 model or `PolicyView`.
        env: vector env from `make_vec_env`, id, `EnvSpec`, factory or `EnvRecipe`.
        budgets: episode budgets in the norm of the noise, observation units; a number or shape (K,). A `ThreatModel`, or a
            sequence of them, is converted (per-step radii and other norms too).
        episodes: number of episodes, fixed beforehand; with `until` the most there may be.
        alpha: failure probability of everything in the certificate.
        method: "hybrid", "paper", "dkw", "band" or "betting"; see `certify_return`.
        statistic: "mean" return, probability of "success", or "quantile" of the return.
        success_at: an episode succeeds if its return is at least this; for statistic="success".
        quantile: level in (0, 1); for statistic="quantile".
        noise: the mechanism, if `env` does not hold one.
        frame_stack: frames in one observation, if `env` does not say.
        normalization: frozen normalisation of the observations, if `env` does not say; noise and budgets are in its units.
        max_episode_steps: horizon, if `env` does not say.
        return_low: sure lower bound of the return; default what `known_return_bounds` knows.
        return_high: sure upper bound of the return, where there is one.
        simultaneous: whether the confidence covers all budgets at once.
        until: (value, budget): stop as soon as `value` is certified at `budget` (statistic="mean", method="betting"); the
            certificate then has that budget alone.
        deterministic: greedy actions, or sampled ones; part of what is certified.
        seed: root of all randomness.
        n_workers: processes; results do not depend on it.
        chunk_size: episodes per chunk; part of what names an episode.
        engine: "auto", "native", "list", "envpool" or "ale"; part of what names an episode.
        executor: another way to run the chunks than `n_workers` processes, e.g. `robustrl.rollouts.RayExecutor("auto")`.
        out: folder in which finished chunks are kept; an interrupted run goes on from them.
        progress_bar: show a bar with an ETA.
    Returns:
        EpisodeCertificate with the episodes as its evidence.
    Raises:
        ValueError: for bad arguments, or a policy that does not fit the environment.
        ChainError: if the environment breaks the proof, or has two noises or no horizon.
    """
    check_choice("statistic", statistic, ("mean", "success", "quantile"))
    recipe = EnvRecipe.of(
        env, noise=noise, frame_stack=frame_stack, normalization=normalization, max_episode_steps=max_episode_steps
    )
    if recipe.noise is None:
        raise ValueError(
            "noise must be given: an undefended policy has no certificate; pass noise=, e.g. Gaussian(0.2) (--sigma 0.2)"
        )
    check_alpha(alpha)
    check_count("episodes", episodes)
    low, high = known_return_bounds(recipe)
    low, high = (low if return_low is None else return_low), (high if return_high is None else return_high)
    if statistic == "mean" and low is None:
        raise ValueError(
            f"return_low must be given: no sure lower bound of the return is known for {recipe.label}; "
            "or certify statistic='success' or 'quantile'"
        )
    for name, value, owner in (("success_at", success_at, "success"), ("quantile", quantile, "quantile")):
        if value is not None and statistic != owner:
            raise ValueError(f"{name} belongs to statistic={owner!r}, got statistic={statistic!r}")
    if statistic == "success" and success_at is None:
        raise ValueError("success_at must be given for statistic='success': the return that counts as success")
    threshold = (
        0.0 if statistic != "success" else check_real("success_at", success_at, allowed="the return that counts as success")
    )
    level = 0.5 if statistic != "quantile" else check_real("quantile", quantile, allowed="a level in (0, 1)")
    if until is not None and (statistic != "mean" or method not in ("hybrid", "betting")):
        raise ValueError("until needs statistic='mean' and method='betting': only the betting bound may be stopped at will")
    mechanism = recipe.noise
    grid, threat = _budget_grid(recipe, budgets)
    policy = recipe.view(model)
    job = make_job(policy, recipe, seed=seed, chunk_size=chunk_size, engine=engine, deterministic=deterministic)
    recorded = {k: v for k, v in job.describe().items() if k not in ("attack", "threat")}
    recorded |= {"env": recipe.label, "units": frame_units(recipe), "versions": dict(build())} | (
        {"success_at": threshold} if statistic == "success" else {}
    )

    def certify(returns: NDArray[np.float64], stop_at: float | None = None) -> EpisodeCertificate:
        if statistic == "success":
            found = certify_success(int(np.sum(returns >= threshold)), returns.size, mechanism, grid, alpha=alpha)
        elif statistic == "quantile":
            found = certify_quantile(returns, level, mechanism, grid, alpha=alpha, simultaneous=simultaneous)
        else:
            settings: dict[str, Any] = {"alpha": alpha, "return_low": low, "return_high": high}
            if stop_at is not None:
                found = certify_return(returns, mechanism, [stop_at], method="betting", n_planned=episodes, **settings)
            else:
                found = certify_return(returns, mechanism, grid, method=method, simultaneous=simultaneous, **settings)
        return replace(found.with_provenance(**recorded), threat=threat if stop_at is None else None)

    goal = budget = None
    if until is not None:
        if not isinstance(until, tuple | list) or len(until) != 2:
            raise ValueError(f"until must be a pair (value, budget), got {until!r}")
        goal, budget = check_real("until value", until[0]), check_real("until budget", until[1])
    # One made-up episode shows whatever is wrong with the arguments before hours of real ones.
    certify(np.array([0.0 if low is None else low]), budget)
    options: dict[str, Any] = {
        "n_workers": n_workers,
        "executor": executor,
        "folder": out,
        "label": "certify",
        "progress": progress_bar,
    }
    if goal is None:
        return certify(collect(job, episodes, **options).returns)
    with tempfile.TemporaryDirectory() as waves:  # a later wave must hold the very episodes of the earlier ones
        options["folder"] = waves if out is None else out
        n = min(episodes, job.chunk_size)
        while True:
            certificate = certify(collect(job, n, **options).returns, budget)
            if certificate.values[0] >= goal or n == episodes:
                return certificate
            n = min(episodes, 2 * n)


def attack_policy(
    model: Any,
    env: Any,
    attack: Attack,
    threat: ThreatModel,
    episodes: int = 200,
    *,
    certificate: EpisodeCertificate | None = None,
    noise: Noise | None = None,
    frame_stack: int | None = None,
    normalization: Normalization | None = None,
    max_episode_steps: int | None = None,
    return_high: float | None = None,
    success_at: float | None = None,
    alpha: float = 0.05,
    deterministic: bool = True,
    seed: int = 1,
    n_workers: int = 1,
    chunk_size: int | None = None,
    engine: str = "auto",
    executor: Executor | None = None,
    out: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
) -> AttackReport:
    """Roll a policy out under attack and report the damage, beside the certificate if there is one.

    Args:
        model: SB3 model or `PolicyView`.
        env: as for `certify_policy`; without noise the undefended policy is attacked.
        attack: the attacker, e.g. `robustrl.attacks.SmoothedPGD()`.
        threat: its budget, e.g. `ThreatModel(norm=2, episode=0.6)`.
        episodes: number of episodes.
        certificate: certificate of the mean return or of success, of the same policy and noise, to compare with.
        noise, frame_stack, normalization, max_episode_steps: if `env` does not say.
        return_high: sure upper bound of the return, for the upper confidence bound; known where `known_return_bounds` knows it.
        success_at: report the probability of a return of at least this instead of the mean return; default what a
            certificate of success says.
        alpha: failure probability of the upper bound.
        deterministic: greedy actions, or sampled ones.
        seed: root of all randomness; another one than the certificate's keeps the two independent.
        n_workers, chunk_size, engine, executor, out, progress_bar: as for `certify_policy`.
    Returns:
        AttackReport.
    Raises:
        CertificateViolationError: if the attacked mean (or probability) is, with confidence 1 - alpha, below the certificate.
        ValueError: for bad arguments, or a certificate of another policy, noise or setting.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be a robustrl attack such as attacks.SmoothedPGD(), got {attack!r}")
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat must be a ThreatModel, got {threat!r}")
    recipe = EnvRecipe.of(
        env, noise=noise, frame_stack=frame_stack, normalization=normalization, max_episode_steps=max_episode_steps
    )
    check_alpha(alpha)
    if certificate is not None and not isinstance(certificate, EpisodeCertificate):
        raise TypeError(f"certificate must be an EpisodeCertificate, got {type(certificate).__name__}")
    policy, threat = recipe.view(model), in_frame_units(threat, recipe)
    settings: dict[str, Any] = {"seed": seed, "engine": engine, "deterministic": deterministic}
    job = make_job(policy, recipe, chunk_size=chunk_size, attack=attack, threat=threat, **settings)
    certified = None if certificate is None else _certified(certificate, job, threat)
    threshold = _success_threshold(certificate, success_at)
    clean_job = make_job(policy, recipe, chunk_size=job.chunk_size, **settings)
    folders = [None, None] if out is None else [Path(out) / "clean", Path(out) / "attacked"]
    runners: dict[str, Any] = {"n_workers": n_workers, "executor": executor}
    clean = collect(clean_job, episodes, folder=folders[0], **runners)
    label = f"attack, budget {threat.episode if threat.episode is not None else threat.step:g}"
    attacked = collect(job, episodes, folder=folders[1], progress=progress_bar, label=label, **runners)
    high = known_return_bounds(recipe)[1] if return_high is None else return_high
    if threshold is not None:
        wins = int(np.sum(attacked.returns >= threshold))
        upper = float(clopper_pearson_upper(wins, len(attacked), alpha))
    else:
        upper = np.inf if high is None else mean_upper_bound(attacked.returns, high, alpha=alpha)
    return AttackReport(
        attack=attack.to_dict(),
        threat=replace(threat, units=frame_units(recipe)).to_dict(),
        clean=clean.returns,
        returns=attacked.returns,
        spent=attacked.spent,
        upper=float(upper),
        alpha=alpha,
        certified=certified,
        success_at=threshold,
    )


def load_agent(
    path: str | os.PathLike[str],
    env: Any = None,
    *,
    algo: str | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
    device: str = "auto",
) -> Any:
    """Load an SB3 model from a run directory or a plain SB3 zip, without running code stored in it.

    Args:
        path: run directory or zip.
        env: anything `EnvRecipe.of` takes; the model is checked against it.
        algo: "ppo", "a2c", "dqn", "sac", "td3", "ddpg" or "recurrent_ppo"; default what the run or the file says.
        policy_kwargs: how the network is built; default what the file says as plain text.
        trust: load the pickles in the file as SB3 does; only for files whose origin you know.
        device: torch device, or "auto".
    Returns:
        the SB3 model; of a run with a denoiser, the `PolicyView` of both.
    Raises:
        FileNotFoundError: if there is no such file.
        UnsafeModelError: if something cannot be rebuilt without a pickle; the message names what to pass.
        ValueError: if it is no SB3 file, or does not fit the environment.
    """
    path, denoiser = Path(path), None
    if path.is_dir():
        run = RunInfo.load(path)
        denoiser = load_denoiser(path / DENOISER) if run.denoiser else None
        algo, path = algo or run.algo, path / "model.zip"
        env = run.environment(trust=trust) if env is None and run.self_contained else env
    recipe = None if env is None else EnvRecipe.of(env)
    model = load_model(
        path,
        algo=algo,
        policy_kwargs=None if policy_kwargs is None else dict(policy_kwargs),
        action_space=None if recipe is None else recipe.action_space,
        trust=trust,
        device=device,
    )
    if denoiser is not None:
        if recipe is None:
            raise ValueError("env must be given: a denoised run's files cannot hold its environment (--env)")
        frames = run.policy_frames
        model = replace(recipe, frame_stack=frames).view(model).denoised(denoiser, denoiser.n_frames(frames))
    if recipe is not None:
        check_actions(recipe.view(model), recipe)
    return model


def _budget_grid(recipe: EnvRecipe, budgets: Any) -> tuple[Any, dict[str, Any] | None]:
    """Episode budgets in the noise's norm, and the threat models they stand for."""
    threats = [budgets] if isinstance(budgets, ThreatModel) else budgets
    if not isinstance(threats, list | tuple) or not any(isinstance(t, ThreatModel) for t in threats):
        return budgets, None
    if not all(isinstance(t, ThreatModel) for t in threats):
        raise TypeError("budgets must be numbers or ThreatModels, got a mixture of both")
    return covering_budgets(threats, recipe)


def _difference(certified: Any, attacked: Any) -> str:
    """What differs, where that fits into a sentence."""
    if isinstance(certified, dict) and isinstance(attacked, dict):
        keys = sorted(
            key for key in {*certified, *attacked} if certified.get(key) != attacked.get(key) and key != "normalization"
        )
        return "".join(f" ({key}: {certified.get(key)} certified, {attacked.get(key)} attacked)" for key in keys[:3])
    return f" ({certified} certified, {attacked} attacked)" if isinstance(certified, bool) else ""


def _success_threshold(certificate: EpisodeCertificate | None, success_at: float | None) -> float | None:
    """The return that counts as success in an attack report; None for a report about the mean."""
    if success_at is not None:
        success_at = check_real("success_at", success_at, allowed="the return that counts as success")
    if certificate is None:
        return success_at
    if certificate.statistic != "success":
        if success_at is not None:
            raise ValueError(f"success_at is {success_at}, but the certificate is about the mean return")
        return None
    stated = certificate.provenance.get("success_at")
    if stated is None and success_at is None:
        raise ValueError("success_at must be given: the certificate of success does not record which return counts as success")
    if stated is not None and success_at not in (None, stated):
        raise ValueError(f"success_at is {success_at}, but the certificate is about {stated}")
    return success_at if stated is None or success_at is not None else float(stated)


def _certified(certificate: EpisodeCertificate, job: Job, threat: ThreatModel) -> float | None:
    recorded, noise = certificate.provenance, job.recipe.noise
    if certificate.statistic == "quantile":
        raise ValueError("an attack can be compared with a certificate of the mean or of success, got one of the quantile")
    if certificate.noise != noise:
        raise ValueError(f"the certificate is for {certificate.noise}, but the attacked agent uses {noise}")
    described = plain_data("description of the job", job.describe())  # as the certificate holds it
    for name in ("policy_hash", "recipe", "code", "deterministic"):
        if name in recorded and recorded[name] != described[name]:
            raise ValueError(
                f"the certificate is for another agent or environment: its {name} differs{_difference(recorded[name], described[name])}; "
                "give the attack the certificate's settings, or another certificate (--out)"
            )
    n_features = int(np.prod(job.recipe.frame_space.shape))
    return certificate.value_at(episode_budget(certificate.noise, threat, horizon=job.recipe.horizon, n_features=n_features))
