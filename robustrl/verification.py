"""Check certificates: digest, bound, and episodes played again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import fisher_exact, ks_2samp

from robustrl.certify.certificate import Certificate
from robustrl.certify.deterministic import DeterministicCertificate
from robustrl.certify.episode import EpisodeCertificate
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.storage import plain_data
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import covering_budgets, frame_units
from robustrl.errors import CertificateError, check_count
from robustrl.rollouts.chunk import Job, run_chunk
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.deterministic import check_statement, code_of, replay_paths
from robustrl.rollouts.executor import build, one_thread
from robustrl.threat import ThreatModel

SAME_LAW_LEVEL = 1e-4
"""Failure probability of the two-sample test that replaces bit equality on another machine or build."""


@dataclass(frozen=True)
class Verification:
    """What `verify_certificate` found; it raises where something is wrong.

    Attributes:
        certificate: the certificate.
        replayed: chunk numbers that were rolled out again; of a search, numbers of episodes.
        bit_equal: whether every replayed return was the stored one to the last bit (of a success certificate, which
            stores no returns: whether a full replay gave the stored count); None without a replay, and of a search.
        p_value: of the two-sample test that was made where bits may differ; None otherwise.
    """

    certificate: Certificate
    replayed: tuple[int, ...] = ()
    bit_equal: bool | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        text = "digest and recomputed bound agree with the stored evidence"
        if isinstance(self.certificate, DeterministicCertificate):
            if not self.replayed:
                return f"{text}; no episode was replayed (model=, --model): that they are of this model is their author's word"
            return f"{text}; random paths of {len(self.replayed)} episode(s) {list(self.replayed)} replayed: same rewards, same costs"
        if not isinstance(self.certificate, EpisodeCertificate):
            return f"{text}; that the evidence is of this model and input is its author's word"
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
    if isinstance(found, EpisodeCertificate):
        _check_units(found, env)
    if isinstance(found, DeterministicCertificate):
        return _verify_search(found, model, env, replay)
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


def _verify_search(certificate: DeterministicCertificate, model: Any, env: Any, replay: int) -> Verification:
    """What a search says about its episodes, and paths of it walked again with the model."""
    recorded = certificate.provenance
    try:
        recipe = _recipe_of(recorded.get("recipe"), env)
    except CertificateError:
        if env is not None or model is not None:
            raise
        recipe = None
    if "seed" not in recorded and (model is not None or env is not None):
        raise CertificateError("the certificate does not record the seed of its episodes: some may be left out, or chosen")
    check_statement(certificate, recipe)
    if model is None or recipe is None:
        return Verification(certificate)
    policy = recipe.view(model)
    if policy.fingerprint() != recorded.get("policy_hash"):
        raise CertificateError("the model is not the certified one: its weights have another hash")
    if recorded.get("versions") == build() and recorded.get("code") != code_of(recipe):
        raise CertificateError("env is not the certified environment: its factory or wrappers have other code")
    trusted = list(LipschitzScores.of(policy).trusted)
    if recorded.get("trusted") != trusted:
        raise CertificateError(f"layers taken at their word are {trusted}, not {recorded.get('trusted')}")
    return Verification(certificate, tuple(replay_paths(certificate, policy, recipe, check_count("replay", replay))))


def _check_return_low(certificate: Certificate) -> None:
    """Where the environment's sure lower bound is known, a certificate of the mean may not assume a higher one."""
    recipe = certificate.provenance.get("recipe")
    if not isinstance(certificate, EpisodeCertificate) or certificate.return_low is None or not isinstance(recipe, dict):
        return
    if certificate.statistic != "mean":
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
    """The recipe in a certificate, whose author may be anybody."""
    if not isinstance(stated, dict):
        raise ValueError(f"not an environment recipe: {stated!r}")
    return EnvRecipe.from_dict(stated)


def _recipe_of(stated: Any, env: Any) -> EnvRecipe:
    """The certified environment: rebuilt from the certificate, or the caller's after a comparison."""
    if env is None:
        try:
            return _stated_recipe(stated)
        except (TypeError, ValueError) as error:
            raise CertificateError(
                f"the certificate's environment cannot be rebuilt from the file alone, pass env=: {error}"
            ) from None
    recipe = EnvRecipe.of(env)
    described = plain_data("recipe", recipe.to_dict())
    if not isinstance(stated, dict) or described != stated:
        differs = sorted(k for k in described if not isinstance(stated, dict) or stated.get(k) != described[k])
        raise CertificateError(f"env is not the certified environment: different {', '.join(differs)}")
    return recipe


def _check_units(certificate: EpisodeCertificate, env: Any) -> None:
    """What the budgets mean must follow from the recipe: their units, and the threat models that they are said to cover."""
    recorded, threat = certificate.provenance, certificate.threat
    if "recipe" not in recorded:
        return
    try:
        recipe = _recipe_of(recorded["recipe"], env)
        units: str = frame_units(recipe)
    except (CertificateError, TypeError, ValueError) as error:
        stated = threat or {}
        plain = recorded.get("units", "raw") == "raw" and stated.get("in_frame_units") == stated.get("converted_from")
        if env is not None or not plain:
            raise CertificateError(
                f"what the budgets mean cannot be recomputed without the environment, pass env=: {error}"
            ) from None
        return
    if recorded.get("units", units) != units:
        raise CertificateError(
            f"its units are said to be {recorded['units']!r}, but the frames of {recipe.label} are {units!r}"
        )
    if threat is None or "converted_from" not in threat:
        return
    try:
        budgets, stated = covering_budgets([ThreatModel.from_dict(item) for item in threat["converted_from"]], recipe)
    except (TypeError, ValueError) as error:
        raise CertificateError(f"field 'threat' cannot be converted into budgets: {error}") from None
    known = {key: value for key, value in plain_data("threat", stated).items() if key in threat}
    if known != threat or not np.allclose(budgets, certificate.budgets, rtol=1e-12, atol=0):
        raise CertificateError(
            f"field 'threat' stands for the budgets {budgets} in {recipe.label}, not for {certificate.budgets}"
        )


def _recorded_job(certificate: EpisodeCertificate, model: Any, env: Any) -> Job:
    recorded = certificate.provenance
    try:
        settings = {name: recorded[name] for name in ("seed", "chunk_size", "engine", "deterministic")}
        policy_hash, stated = recorded["policy_hash"], recorded["recipe"]
    except KeyError as error:
        raise CertificateError(
            f"the certificate does not record how its episodes were made (no {error}); it cannot be replayed"
        ) from None
    recipe = _recipe_of(stated, env)
    if recipe.noise != certificate.noise:
        raise CertificateError(f"the certificate is for {certificate.noise}, but its recipe uses {recipe.noise}")
    policy = recipe.view(model)
    if policy.fingerprint() != policy_hash:
        raise CertificateError("the model is not the certified one: its weights have another hash")
    try:
        job = make_job(policy, recipe, **settings)
    except (TypeError, ValueError) as error:
        raise CertificateError(f"the certificate's record of its episodes cannot be replayed: {error}") from None
    # Bytecode is comparable within a build only.
    if _same_build(certificate, job) and recorded.get("code", job.describe()["code"]) != job.describe()["code"]:
        raise CertificateError("env is not the certified environment: its factory or wrappers have other code")
    return job


def _same_build(certificate: EpisodeCertificate, job: Job) -> bool:
    """Whether episodes must come out as recorded to the last bit."""
    return certificate.provenance.get("versions") == build() and certificate.provenance.get("device") == job.policy.device.type


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
