"""The calls that join rollouts, certificates and reports: what most users need.

>>> import numpy as np, robustrl as rrl                                                        # doctest: +SKIP
>>> env = rrl.make_vec_env("CartPole-v1", noise=rrl.Gaussian(0.2), max_episode_steps=200)      # doctest: +SKIP
>>> certificate = rrl.certify_policy(model, env, budgets=np.linspace(0, 1, 11))                # doctest: +SKIP
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import fisher_exact, ks_2samp

from robustrl.attacks.base import Attack
from robustrl.certify.certificate import Certificate, EpisodeCertificate
from robustrl.certify.returns import certify_quantile, certify_return, certify_success, episode_budget, mean_upper_bound
from robustrl.certify.storage import plain_data
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import CertificateError, check_alpha, check_choice, check_count, check_real
from robustrl.noise import Noise
from robustrl.policy import PolicyView, frame_shape
from robustrl.policy.loading import load_model
from robustrl.report.attack import AttackReport
from robustrl.rollouts.chunk import Job, run_chunk
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import one_thread
from robustrl.threat import ThreatModel
from robustrl.training.run_files import LIBRARIES, RunInfo

SAME_LAW_LEVEL = 1e-4
"""Failure probability of the two-sample test that replaces bit equality on another machine or build."""


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
    out: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
) -> EpisodeCertificate:
    """Roll a smoothed policy out and certify its return against every adaptive attacker within a budget.

    Args:
        model: SB3 model (PPO, A2C, DQN) or `PolicyView`.
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
        max_episode_steps: horizon, if `env` does not say.
        return_low: sure lower bound of the return; known for CartPole, Acrobot and MountainCar.
        return_high: sure upper bound of the return, where there is one.
        simultaneous: whether the confidence covers all budgets at once.
        until: (value, budget): stop as soon as `value` is certified at `budget` (statistic="mean", method="betting"); the
            certificate then has that budget alone.
        deterministic: greedy actions, or sampled ones; part of what is certified.
        seed: root of all randomness.
        n_workers: processes; results do not depend on it.
        chunk_size: episodes per chunk; part of what names an episode.
        engine: "auto", "native" or "list".
        out: folder in which finished chunks are kept; an interrupted run goes on from them.
        progress_bar: show a bar with an ETA.
    Returns:
        EpisodeCertificate with the episodes as its evidence.
    Raises:
        ValueError: for bad arguments, or a policy that does not fit the environment.
        ChainError: if the environment breaks the proof, or has two noises or no horizon.
    """
    check_choice("statistic", statistic, ("mean", "success", "quantile"))
    recipe = EnvRecipe.of(env, noise=noise, frame_stack=frame_stack, max_episode_steps=max_episode_steps)
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
    policy = PolicyView.of(model, n_frames=recipe.frame_stack)
    job = make_job(policy, recipe, seed=seed, chunk_size=chunk_size, engine=engine, deterministic=deterministic)
    recorded = {k: v for k, v in job.describe().items() if k not in ("attack", "threat")}
    recorded |= {"env": recipe.label, "versions": _versions()} | ({"success_at": threshold} if statistic == "success" else {})

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
    options: dict[str, Any] = {"n_workers": n_workers, "folder": out, "label": "certify", "progress": progress_bar}
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
    max_episode_steps: int | None = None,
    return_high: float | None = None,
    alpha: float = 0.05,
    deterministic: bool = True,
    seed: int = 1,
    n_workers: int = 1,
    chunk_size: int | None = None,
    engine: str = "auto",
    out: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
) -> AttackReport:
    """Roll a policy out under attack and report the damage, beside the certificate if there is one.

    Args:
        model: SB3 model (PPO, A2C, DQN) or `PolicyView`.
        env: as for `certify_policy`; without noise the undefended policy is attacked.
        attack: the attacker, e.g. `robustrl.attacks.SmoothedPGD()`.
        threat: its budget, e.g. `ThreatModel(norm=2, episode=0.6)`.
        episodes: number of episodes.
        certificate: mean-return certificate of the same policy and noise to compare with.
        noise, frame_stack, max_episode_steps: if `env` does not say.
        return_high: sure upper bound of the return, for the upper confidence bound; known for CartPole, Acrobot and
            MountainCar.
        alpha: failure probability of the upper bound.
        deterministic: greedy actions, or sampled ones.
        seed: root of all randomness; another one than the certificate's keeps the two independent.
        n_workers, chunk_size, engine, out, progress_bar: as for `certify_policy`.
    Returns:
        AttackReport.
    Raises:
        CertificateViolationError: if the attacked mean is, with confidence 1 - alpha, below the certificate.
        ValueError: for bad arguments, or a certificate of another policy, noise or setting.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be a robustrl attack such as attacks.SmoothedPGD(), got {attack!r}")
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat must be a ThreatModel, got {threat!r}")
    recipe = EnvRecipe.of(env, noise=noise, frame_stack=frame_stack, max_episode_steps=max_episode_steps)
    check_alpha(alpha)
    if certificate is not None and not isinstance(certificate, EpisodeCertificate):
        raise TypeError(f"certificate must be an EpisodeCertificate, got {type(certificate).__name__}")
    policy = PolicyView.of(model, n_frames=recipe.frame_stack)
    settings: dict[str, Any] = {"seed": seed, "engine": engine, "deterministic": deterministic}
    job = make_job(policy, recipe, chunk_size=chunk_size, attack=attack, threat=threat, **settings)
    certified = None if certificate is None else _certified(certificate, job, threat)
    clean_job = make_job(policy, recipe, chunk_size=job.chunk_size, **settings)
    folders = [None, None] if out is None else [Path(out) / "clean", Path(out) / "attacked"]
    clean = collect(clean_job, episodes, n_workers=n_workers, folder=folders[0])
    label = f"attack, budget {threat.episode if threat.episode is not None else threat.step:g}"
    attacked = collect(job, episodes, n_workers=n_workers, folder=folders[1], progress=progress_bar, label=label)
    high = known_return_bounds(recipe)[1] if return_high is None else return_high
    upper = np.inf if high is None else mean_upper_bound(attacked.returns, high, alpha=alpha)
    return AttackReport(
        attack=attack.to_dict(),
        threat=threat.to_dict(),
        clean=clean.returns,
        returns=attacked.returns,
        spent=attacked.spent,
        upper=float(upper),
        alpha=alpha,
        certified=certified,
    )


@dataclass(frozen=True)
class Verification:
    """What `verify_certificate` found; it raises where something is wrong.

    Attributes:
        certificate: the certificate.
        replayed: chunk numbers that were rolled out again.
        bit_equal: whether every replayed return was the stored one to the last bit (of a success certificate, which
            stores no returns: whether a full replay gave the stored count); None without a replay.
        p_value: of the two-sample test that was made where bits may differ; None otherwise.
    """

    certificate: Certificate
    replayed: tuple[int, ...] = ()
    bit_equal: bool | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        text = "digest and recomputed bound agree with the stored evidence"
        if self.bit_equal is None:
            return text + "; episodes were not replayed (give the model to do so)"
        chunks = f"{len(self.replayed)} chunk(s) {list(self.replayed)} replayed"
        if getattr(self.certificate, "statistic", None) == "success":
            found = (
                "the stored number of successes"
                if self.bit_equal
                else f"no other rate of success (two-sample p = {self.p_value:.3g})"
            )
            return f"{text}; {chunks}: {found}; single episodes are not stored"
        if self.bit_equal:
            return f"{text}; {chunks}: every return is the stored one, bit for bit"
        return f"{text}; {chunks} on another machine or build: same law (two-sample p = {self.p_value:.3g}), not the same bits"


def verify_certificate(
    certificate: str | os.PathLike[str] | Certificate,
    model: Any = None,
    *,
    env: Any = None,
    replay: int = 2,
) -> Verification:
    """Check a certificate: its digest, its bound recomputed from its evidence, and its episodes replayed.

    Args:
        certificate: file or object.
        model: the certified SB3 model or `PolicyView`; None to skip the replay.
        env: the environment, needed for a replay only if its recipe used a factory or wrappers.
        replay: number of randomly chosen chunks to roll out again.
    Returns:
        Verification.
    Raises:
        CertificateError: naming what is wrong: an edited field, a bound that the evidence does not give, another policy,
            or episodes that come out differently.
    """
    found = certificate if isinstance(certificate, Certificate) else Certificate.load(certificate)
    found.verify()
    _check_return_low(found)
    if model is None:
        return Verification(found)
    if not isinstance(found, EpisodeCertificate):
        raise CertificateError(f"a {type(found).__name__} has no episodes to replay")
    check_count("replay", replay)
    job = _recorded_job(found, model, env)
    n_chunks = -(-found.n // job.chunk_size)
    chunks = sorted(np.random.default_rng().choice(n_chunks, size=min(replay, n_chunks), replace=False).tolist())
    stored, fresh = [], []
    for chunk in chunks:
        start = chunk * job.chunk_size
        size = min(job.chunk_size, found.n - start)
        with one_thread():
            fresh.append(run_chunk(job, chunk, size).returns)
        if isinstance(found.evidence, np.ndarray):
            stored.append(found.evidence[start : start + size])
    again = np.concatenate(fresh)
    if not stored:
        return _compare_successes(found, again, tuple(chunks), _same_build(found, job))
    before = np.concatenate(stored)
    if np.array_equal(before, again):
        return Verification(found, tuple(chunks), bit_equal=True)
    if _same_build(found, job):
        raise CertificateError(
            f"replaying chunks {chunks} on the same build and CPU gives other returns than the stored evidence"
        )
    p_value = float(ks_2samp(before, again).pvalue)
    if p_value < SAME_LAW_LEVEL:
        raise CertificateError(f"replaying chunks {chunks} gives returns of another law (two-sample p = {p_value:.3g})")
    return Verification(found, tuple(chunks), bit_equal=False, p_value=p_value)


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
        algo: "ppo", "a2c" or "dqn"; default what the run or the file says.
        policy_kwargs: how the network is built; default what the file says as plain text.
        trust: load the pickles in the file as SB3 does; only for files whose origin you know.
        device: torch device, or "auto".
    Returns:
        the SB3 model.
    Raises:
        FileNotFoundError: if there is no such file.
        UnsafeModelError: if something cannot be rebuilt without a pickle; the message names what to pass.
        ValueError: if it is no SB3 file, or does not fit the environment.
    """
    path = Path(path)
    if path.is_dir():
        run = RunInfo.load(path)
        algo, path = algo or run.algo, path / "model.zip"
        env = run.env if env is None and run.self_contained else env
    model = load_model(
        path, algo=algo, policy_kwargs=None if policy_kwargs is None else dict(policy_kwargs), trust=trust, device=device
    )
    if env is not None:
        recipe = EnvRecipe.of(env)
        _check_fit(model, recipe)
    return model


def _check_fit(model: Any, recipe: EnvRecipe) -> None:
    shape, frame, frames = model.observation_space.shape or (), recipe.frame_space.shape, recipe.frame_stack
    if not _stacks(shape, frames, frame):
        hint = next(
            (
                f"; does the model stack {k} frames? then pass frame_stack={k} (--frame-stack)"
                for k in range(1, 65)
                if _stacks(shape, k, frame)
            ),
            "",
        )
        raise ValueError(
            f"the model takes observations of shape {shape}, but {recipe.label} with frame_stack={frames} gives frames {frame}{hint}"
        )
    if getattr(model.action_space, "n", None) != getattr(recipe.action_space, "n", None):
        raise ValueError(f"the model acts in {model.action_space}, but {recipe.label} takes {recipe.action_space}")


def _stacks(shape: tuple[int, ...], n_frames: int, frame: tuple[int, ...]) -> bool:
    try:
        return frame_shape(shape, n_frames) == frame
    except ValueError:
        return False


def _budget_grid(recipe: EnvRecipe, budgets: Any) -> tuple[Any, dict[str, Any] | None]:
    """Episode budgets in the noise's norm, and the threat models they stand for."""
    threats = [budgets] if isinstance(budgets, ThreatModel) else budgets
    if not isinstance(threats, list | tuple) or not any(isinstance(t, ThreatModel) for t in threats):
        return budgets, None
    if not all(isinstance(t, ThreatModel) for t in threats):
        raise TypeError("budgets must be numbers or ThreatModels, got a mixture of both")
    assert recipe.noise is not None
    if any(t.units != "raw" for t in threats):
        raise ValueError("threat models must be in raw units to be converted into episode budgets")
    sizes = {"horizon": recipe.horizon, "n_features": int(np.prod(recipe.frame_space.shape))}
    grid = [episode_budget(recipe.noise, t, **sizes) for t in threats]
    return grid, {"converted_from": [t.to_dict() for t in threats], **sizes}


def _certified(certificate: EpisodeCertificate, job: Job, threat: ThreatModel) -> float | None:
    recorded, noise = certificate.provenance, job.recipe.noise
    if certificate.statistic != "mean":
        raise ValueError(
            f"an attack on the mean return needs a certificate of the mean, got one of the {certificate.statistic}"
        )
    if certificate.noise != noise:
        raise ValueError(f"the certificate is for {certificate.noise}, but the attacked agent uses {noise}")
    described = plain_data("description of the job", job.describe())  # as the certificate holds it
    for name in ("policy_hash", "recipe", "code", "deterministic"):
        if name in recorded and recorded[name] != described[name]:
            raise ValueError(f"the certificate is for another agent or environment: its {name} differs")
    n_features = int(np.prod(job.recipe.frame_space.shape))
    return certificate.value_at(episode_budget(certificate.noise, threat, horizon=job.recipe.horizon, n_features=n_features))


def _check_return_low(certificate: Certificate) -> None:
    """Where the environment's sure lower bound is known, a certificate may not assume a higher one."""
    recipe = certificate.provenance.get("recipe")
    if not isinstance(certificate, EpisodeCertificate) or certificate.return_low is None or not isinstance(recipe, dict):
        return
    try:
        low = known_return_bounds(_stated_recipe(recipe))[0]
    except (TypeError, ValueError):  # a factory, a wrapper, or an id that is not registered here: nothing is known
        return
    if low is not None and certificate.return_low > low:
        raise CertificateError(
            f"field 'return_low' is {certificate.return_low:g}, but an episode may return as little as {low:g}"
        )


def _stated_recipe(stated: Any) -> EnvRecipe:
    """The recipe in a certificate, whose author may be anybody: it must not make this process import a module."""
    env_id = stated.get("env_id") if isinstance(stated, dict) else None
    module, _, _ = env_id.rpartition(":") if isinstance(env_id, str) else ("", "", "")
    if module and module not in sys.modules:
        raise ValueError(f"its id {env_id!r} names a module that is not imported here")
    return EnvRecipe.from_dict(stated)


def _recorded_job(certificate: EpisodeCertificate, model: Any, env: Any) -> Job:
    recorded = certificate.provenance
    try:
        settings = {name: recorded[name] for name in ("seed", "chunk_size", "engine", "deterministic")}
        policy_hash, stated = recorded["policy_hash"], recorded["recipe"]
    except KeyError as error:
        raise CertificateError(
            f"the certificate does not record how its episodes were made (no {error}); it cannot be replayed"
        ) from None
    if env is None:
        try:
            recipe = _stated_recipe(stated)
        except (TypeError, ValueError) as error:
            raise CertificateError(
                f"the certificate's environment cannot be rebuilt from the file alone, pass env=: {error}"
            ) from None
    else:
        recipe = EnvRecipe.of(env)
        described = plain_data("recipe", recipe.to_dict())
        if not isinstance(stated, dict) or described != stated:
            differs = sorted(k for k in described if not isinstance(stated, dict) or stated.get(k) != described[k])
            raise CertificateError(f"env is not the certified environment: different {', '.join(differs)}")
    if recipe.noise != certificate.noise:
        raise CertificateError(f"the certificate is for {certificate.noise}, but its recipe uses {recipe.noise}")
    policy = PolicyView.of(model, n_frames=recipe.frame_stack)
    if policy.fingerprint() != policy_hash:
        raise CertificateError("the model is not the certified one: its weights have another hash")
    try:
        return make_job(policy, recipe, **settings)
    except (TypeError, ValueError) as error:
        raise CertificateError(f"the certificate's record of its episodes cannot be replayed: {error}") from None


def _same_build(certificate: EpisodeCertificate, job: Job) -> bool:
    """Whether episodes must come out as recorded to the last bit."""
    return (
        certificate.provenance.get("versions") == _versions() and certificate.provenance.get("device") == job.policy.device.type
    )


def _compare_successes(
    certificate: EpisodeCertificate, returns: Any, chunks: tuple[int, ...], same_build: bool
) -> Verification:
    """Success certificates keep only the count: the replay can test the rate, not the episodes."""
    assert isinstance(certificate.evidence, int)
    threshold = certificate.provenance.get("success_at")
    if threshold is None:
        raise CertificateError("the certificate does not record which return counts as success; it cannot be replayed")
    wins = int(np.sum(returns >= threshold))
    if len(returns) == certificate.n:
        if wins == certificate.evidence:
            return Verification(certificate, chunks, bit_equal=True)
        if same_build:
            raise CertificateError(f"a full replay gives {wins} successes, not the stored {certificate.evidence}")
    table = np.array([[wins, len(returns) - wins], [certificate.evidence, certificate.n - certificate.evidence]])
    p_value = float(fisher_exact(table).pvalue)
    if p_value < SAME_LAW_LEVEL:
        raise CertificateError(f"replaying chunks {list(chunks)} gives another rate of success (p = {p_value:.3g})")
    return Verification(certificate, chunks, bit_equal=False, p_value=p_value)


def _versions() -> dict[str, str]:
    """What bit equality depends on: libraries, torch's CPU code path, processor family."""
    found = {name: version(name) for name in LIBRARIES}
    return {
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
