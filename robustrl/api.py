"""The calls that join rollouts, certificates and reports: what most users need.

>>> import numpy as np, robustrl as rrl                                                        # doctest: +SKIP
>>> env = rrl.make_vec_env("CartPole-v1", noise=rrl.Gaussian(0.2), max_episode_steps=200)      # doctest: +SKIP
>>> certificate = rrl.certify_policy(model, env, budgets=np.linspace(0, 1, 11))                # doctest: +SKIP
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import fisher_exact, ks_2samp

from robustrl.agents.loading import load_model
from robustrl.attacks.base import Attack
from robustrl.certify.certificate import Certificate, EpisodeCertificate
from robustrl.certify.returns import certify_quantile, certify_return, certify_success, episode_budget, mean_upper_bound
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import CertificateError, check_alpha, check_choice, check_count, check_real
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.report.attack import AttackReport
from robustrl.rollouts.chunk import Job, run_chunk
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import one_thread
from robustrl.threat import ThreatModel
from robustrl.training.run_files import RunInfo

LIBRARIES = ("robustrl", "torch", "numpy", "scipy", "gymnasium", "stable-baselines3")
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
        until: (value, budget): stop as soon as `value` is certified at `budget` (statistic="mean", method="betting").
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
        raise ValueError("noise must be given: an undefended policy has no certificate; pass noise=, e.g. Gaussian(0.2)")
    check_alpha(alpha)
    check_count("episodes", episodes)
    low, high = known_return_bounds(recipe)
    low, high = (low if return_low is None else return_low), (high if return_high is None else return_high)
    if statistic == "mean" and low is None:
        raise ValueError(
            f"return_low must be given: no sure lower bound of the return is known for {recipe.label}; "
            "or certify statistic='success' or 'quantile'"
        )
    if statistic == "success":
        check_real("success_at", success_at, allowed="the return that counts as success")
    if statistic == "quantile":
        check_real("quantile", quantile, allowed="a level in (0, 1)")
    grid, threat = _budget_grid(recipe, budgets)
    recipe.noise.lower(0.5, grid)  # refuses what the mechanism cannot certify before any episode is run
    policy = PolicyView.of(model, n_frames=recipe.frame_stack)
    job = make_job(policy, recipe, seed=seed, chunk_size=chunk_size, engine=engine, deterministic=deterministic)
    options: dict[str, Any] = {"n_workers": n_workers, "folder": out, "label": "certify"}

    if until is not None:
        if statistic != "mean" or method not in ("hybrid", "betting"):
            raise ValueError("until needs statistic='mean' and method='betting': only the betting bound may be stopped at will")
        certificate = _certify_until(job, episodes, until, alpha, recipe.noise, low, high, options, progress_bar)
    else:
        done = collect(job, episodes, progress=progress_bar, **options)
        if statistic == "success":
            certificate = certify_success(int(np.sum(done.returns >= success_at)), episodes, recipe.noise, grid, alpha=alpha)
        elif statistic == "quantile":
            assert quantile is not None
            certificate = certify_quantile(done.returns, quantile, recipe.noise, grid, alpha=alpha, simultaneous=simultaneous)
        else:
            certificate = certify_return(
                done.returns, recipe.noise, grid, alpha=alpha, method=method, return_low=low, return_high=high, simultaneous=simultaneous
            )
    extra = {} if success_at is None else {"success_at": float(success_at)}
    described = {k: v for k, v in job.describe().items() if k not in ("attack", "threat")}
    certificate = certificate.with_provenance(env=recipe.label, versions=_versions(), **described, **extra)
    if threat is None:
        return certificate
    from dataclasses import replace

    return replace(certificate, threat=threat)


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
        bit_equal: whether every replayed return was the stored one to the last bit; None without a replay.
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
        return _compare_successes(found, again, tuple(chunks))
    before = np.concatenate(stored)
    if np.array_equal(before, again):
        return Verification(found, tuple(chunks), bit_equal=True)
    if found.provenance.get("versions") == _versions():
        raise CertificateError(f"replaying chunks {chunks} on the same build and CPU gives other returns than the stored evidence")
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
        env = run.env if env is None and run.recipe.get("factory") is None and not run.recipe.get("wrappers") else env
    model = load_model(path, algo=algo, policy_kwargs=None if policy_kwargs is None else dict(policy_kwargs), trust=trust, device=device)
    if env is not None:
        recipe = EnvRecipe.of(env)
        _check_fit(model, recipe)
    return model


def _check_fit(model: Any, recipe: EnvRecipe) -> None:
    shape, frame = model.observation_space.shape, recipe.frame_space.shape
    frames = recipe.frame_stack
    if shape not in ((frames, *frame), (*frame[:-1], frames * frame[-1])) and not (frames == 1 and shape == frame):
        hint = ""
        if len(shape) == len(frame) and frame and shape[:-1] == frame[:-1] and shape[-1] % frame[-1] == 0:
            hint = f"; does the model stack {shape[-1] // frame[-1]} frames? then pass frame_stack={shape[-1] // frame[-1]} (--frame-stack)"
        raise ValueError(f"the model takes observations of shape {shape}, but {recipe.label} with frame_stack={frames} gives frames {frame}{hint}")
    if getattr(model.action_space, "n", None) != getattr(recipe.action_space, "n", None):
        raise ValueError(f"the model acts in {model.action_space}, but {recipe.label} takes {recipe.action_space}")


def _budget_grid(recipe: EnvRecipe, budgets: Any) -> tuple[Any, dict[str, Any] | None]:
    """Episode budgets in the noise's norm, and the threat models they stand for."""
    threats = [budgets] if isinstance(budgets, ThreatModel) else budgets
    if not isinstance(threats, list | tuple) or not threats or not all(isinstance(t, ThreatModel) for t in threats):
        return budgets, None
    assert recipe.noise is not None
    if any(t.units != "raw" or t.mask is not None for t in threats):
        raise ValueError("threat models must be in raw units and without a mask to be converted into episode budgets")
    n_features = int(np.prod(recipe.frame_space.shape))
    grid = [episode_budget(recipe.noise, t, horizon=recipe.horizon, n_features=n_features) for t in threats]
    return grid, {"converted_from": [t.to_dict() for t in threats]}


def _certify_until(
    job: Job,
    most: int,
    until: tuple[float, float],
    alpha: float,
    noise: Noise,
    low: float | None,
    high: float | None,
    options: dict[str, Any],
    progress_bar: bool,
) -> EpisodeCertificate:
    value, budget = (check_real(name, x) for name, x in zip(("until value", "until budget"), until, strict=True))
    n = 0
    while True:
        n = min(most, max(2 * n, job.chunk_size))
        done = collect(job, n, progress=progress_bar, **options)
        certificate = certify_return(
            done.returns, noise, [budget], alpha=alpha, method="betting", return_low=low, return_high=high, n_planned=most
        )
        if certificate.values[0] >= value or n == most:
            return certificate


def _certified(certificate: EpisodeCertificate, job: Job, threat: ThreatModel) -> float | None:
    recorded, noise = certificate.provenance, job.recipe.noise
    if certificate.statistic != "mean":
        raise ValueError(f"an attack on the mean return needs a certificate of the mean, got one of the {certificate.statistic}")
    if certificate.noise != noise:
        raise ValueError(f"the certificate is for {certificate.noise}, but the attacked agent uses {noise}")
    for name in ("policy_hash", "recipe", "deterministic"):
        if name in recorded and recorded[name] != job.describe()[name]:
            raise ValueError(f"the certificate is for another agent: its {name} differs")
    n_features = int(np.prod(job.recipe.frame_space.shape))
    return certificate.value_at(episode_budget(certificate.noise, threat, horizon=job.recipe.horizon, n_features=n_features))


def _recorded_job(certificate: EpisodeCertificate, model: Any, env: Any) -> Job:
    recorded = certificate.provenance
    try:
        recipe = EnvRecipe.from_dict(recorded["recipe"]) if env is None else EnvRecipe.of(env)
        settings = {name: recorded[name] for name in ("seed", "chunk_size", "engine", "deterministic")}
        policy_hash = recorded["policy_hash"]
    except KeyError as error:
        raise CertificateError(f"the certificate does not record how its episodes were made (no {error}); it cannot be replayed") from None
    if recipe.noise != certificate.noise:
        raise CertificateError(f"the certificate is for {certificate.noise}, but its recipe uses {recipe.noise}")
    policy = PolicyView.of(model, n_frames=recipe.frame_stack)
    if policy.fingerprint() != policy_hash:
        raise CertificateError("the model is not the certified one: its weights have another hash")
    return make_job(policy, recipe, **settings)


def _compare_successes(certificate: EpisodeCertificate, returns: Any, chunks: tuple[int, ...]) -> Verification:
    """Success certificates keep only the count: the replay can test the rate, not the episodes."""
    assert isinstance(certificate.evidence, int)
    threshold = certificate.provenance.get("success_at")
    if threshold is None:
        raise CertificateError("the certificate does not record which return counts as success; it cannot be replayed")
    wins = int(np.sum(returns >= threshold))
    if len(returns) == certificate.n:
        if wins == certificate.evidence:
            return Verification(certificate, chunks, bit_equal=True)
        if certificate.provenance.get("versions") == _versions():
            raise CertificateError(f"a full replay gives {wins} successes, not the stored {certificate.evidence}")
    table = [[wins, len(returns) - wins], [certificate.evidence, certificate.n - certificate.evidence]]
    p_value = float(fisher_exact(table).pvalue)
    if p_value < SAME_LAW_LEVEL:
        raise CertificateError(f"replaying chunks {list(chunks)} gives another rate of success (p = {p_value:.3g})")
    return Verification(certificate, chunks, bit_equal=False, p_value=p_value)


def _versions() -> dict[str, str]:
    """What bit equality depends on: libraries, torch's CPU code path, processor family."""
    found = {name: version(name) for name in LIBRARIES}
    return {**found, "python": platform.python_version(), "machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}
