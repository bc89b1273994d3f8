"""Which method proves what: the table that every certificate of a radius is checked against.

====================  ===============  ===========================================================
method                about            evidence
====================  ===============  ===========================================================
one-sided             input, step      how often the class was taken
two-sided             input, step      the counts of all classes
sequential            input, step      counts up to a stopping time
second-order          input, step      a count, and the gradient of its probability (Gaussian)
second-order-pairs    input, step      the same with the original estimate of the gradient
dipole                input, step      counts of antithetic pairs (Gaussian)
values                input, step      means of bounded scores
splitting             input, step      votes of all offsets; nothing is sampled
splitting-trajectory  trajectory       the same at every step; nothing is sampled
label-flips           training-labels  integer votes of the training examples; nothing is sampled
====================  ===============  ===========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from robustrl.certify.confidence import clopper_pearson_lower, clopper_pearson_upper
from robustrl.certify.labels import label_flip_certificate
from robustrl.certify.radius import ABSTAIN, Verdict
from robustrl.certify.second_order import recompute_dipole, recompute_second_order
from robustrl.certify.sequential import log_wealth, threshold
from robustrl.certify.splitting import verify_splitting, verify_trajectory
from robustrl.errors import check_alpha, check_count, check_positive, check_real
from robustrl.noise import Noise

if TYPE_CHECKING:
    from robustrl.certify.radius import RadiusCertificate

Evidence = dict[str, Any]

SAMPLED = frozenset({"input", "step"})

NO_PROOF = {
    "episode": "it is about one input fixed beforehand; an attacker of several steps adapts to the noise it has seen. The return of "
    "an agent with one noise draw per step is certified by certify_return and certify_policy",
    "trajectory": "the votes of a sampled method can err at every step of the attacked run too. Take scope 'step', or an agent whose "
    "votes are exact (DeterministicSplitAgent)",
    "training-labels": "it is about the input, not about the labels that were learned from: see robustrl.certify.labels",
    "input": "it is about the labels that were learned from, not about the input",
    "step": "it is about the labels that were learned from, not about the observation",
}
"""Why a scope is refused, where a method does not cover it."""


@dataclass(frozen=True)
class Method:
    """One way from evidence to a radius.

    Attributes:
        judge: (evidence, noise, alpha, norm) -> verdict.
        scopes: what it has a proof for.
        exact: whether nothing is sampled, so that alpha is 0.
    """

    judge: Callable[[Evidence, Noise | None, float, float], Verdict]
    scopes: frozenset[str] = SAMPLED
    exact: bool = False

    def check_alpha(self, alpha: float) -> float:
        """A failure probability in (0, 0.5], or 0 for an exact method."""
        if not self.exact:
            return check_alpha(alpha)
        if check_real("alpha", alpha) != 0:
            raise ValueError(f"alpha must be 0 for an exact method, got {alpha}")
        return 0.0


def method_for(name: str, scope: str) -> Method:
    """The method of that name, if it has a proof for the scope.

    Raises:
        ValueError: for an unknown name, or a scope without a proof; it says why there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if scope not in METHODS[name].scopes:
        covered = ", ".join(sorted(METHODS[name].scopes))
        raise ValueError(
            f"method {name!r} has no proof for scope {scope!r} (it covers {covered}): {NO_PROOF.get(scope, 'unknown scope')}"
        )
    return METHODS[name]


def exclusions(certificate: RadiusCertificate) -> tuple[str, ...]:
    """What a certificate of a radius does not cover, in sentences."""
    method = METHODS[certificate.method]
    sentences = ["Attacks of the radius or more (norm 0: of more than it)."]
    if certificate.scope == "training-labels":
        sentences += [
            "Changed, added or removed examples; features or hyperparameters that were chosen by the labels.",
            "Changes of the environment, or of what the agent observes.",
        ]
    if not method.exact:
        sentences += [
            "Deployed votes: the class is that of infinitely many noises; a vote of finitely many can err on its own.",
            "Several inputs at once, unless alpha was split over them.",
            "A choice among several certificates of one input.",
        ]
        if certificate.fp_model == "real":
            sentences.append("Floating point: noise and proof are those of real arithmetic.")
    if certificate.scope == "step":
        sentences.append("Other steps: the attacker may have reached another state.")
    if certificate.noise is not None:
        sentences += [f"{caveat[0].upper()}{caveat[1:]}." for caveat in certificate.noise.caveats]
    return tuple(sentences)


def chosen(evidence: Evidence) -> int:
    """The class that the evidence is about: that of the selection batch, fixed before all other samples were drawn."""
    if "prediction" in evidence:
        return check_count("prediction", evidence["prediction"], least=0)
    return int(np.argmax([check_count("selection", count, least=0) for count in evidence["selection"]]))


def radius_of(evidence: Evidence, noise: Noise | None, norm: float, p_lower: float, p_upper: float | None = None) -> float:
    """The mechanism's radius in a norm."""
    noise = _needed(noise)
    if norm == noise.norm:
        return float(noise.radius(p_lower, p_upper))
    return noise.radius_in(norm, p_lower, p_upper, dimension=check_count("dimension", evidence["dimension"]))


def _needed(noise: Noise | None) -> Noise:
    if noise is None:
        raise TypeError("noise must be given for a sampled method, got None")
    return noise


def _one_sided(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    p = float(clopper_pearson_lower(evidence["count"], check_count("n", evidence["n"]), alpha))
    if p <= 0.5:
        return Verdict(ABSTAIN, 0.0, p)
    return Verdict(chosen(evidence), radius_of(evidence, noise, norm, p), p)


def _two_sided(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """alpha/2 for the class, alpha/2 over all its rivals: whichever of them comes second under attack is covered."""
    counts, n, top = np.asarray(evidence["counts"]), check_count("n", evidence["n"]), chosen(evidence)
    if counts.sum() != n or len(counts) < 2 or top >= len(counts):
        raise ValueError(f"counts must hold those of at least two classes and sum to n = {n}, got {counts}")
    lower = float(clopper_pearson_lower(counts[top], n, alpha / 2))
    upper = clopper_pearson_upper(np.delete(counts, top), n, alpha / (2 * (len(counts) - 1)))
    p_upper = min(float(upper.max()), 1 - lower)
    if lower <= p_upper:
        return Verdict(ABSTAIN, 0.0, lower, p_upper)
    return Verdict(top, radius_of(evidence, noise, norm, lower, p_upper), lower, p_upper)


def _sequential(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """The answer to "is the radius at least r?", at any stopping time."""
    noise, radius = _needed(noise), check_positive("radius", evidence["radius"])
    if norm != noise.norm:
        raise ValueError(f"norm must be that of the noise, {noise.norm:g}, got {norm:g}")
    level = threshold(noise, radius)
    larger, _ = log_wealth(evidence["count"], check_count("n", evidence["n"]), level)
    if larger < -np.log(alpha / 2):
        return Verdict(ABSTAIN, 0.0)
    return Verdict(chosen(evidence), radius, level)


def _values(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """Means of scores in [low, high] by Hoeffding's inequality, alpha/K for each; a bounded score is a randomised vote."""
    low, high = (check_real("bounds", bound) for bound in evidence["bounds"])
    n, top = check_count("n", evidence["n"]), chosen(evidence)
    means = (np.asarray(evidence["sums"], dtype=np.float64) / n - low) / (high - low)
    if len(means) < 2 or top >= len(means) or not np.all((means >= -1e-9) & (means <= 1 + 1e-9)):
        raise ValueError(f"sums must hold at least two means within the bounds {low}, {high}, got {means}")
    slack = np.sqrt(-np.log(alpha / len(means)) / (2 * n))
    lower, upper = max(0.0, float(means[top] - slack)), min(1.0, float(np.delete(means, top).max() + slack))
    if lower <= upper:
        return Verdict(ABSTAIN, 0.0, lower, upper)
    return Verdict(top, radius_of(evidence, noise, norm, lower, upper), lower, upper)


def _second_order(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    prediction, radius, _ = recompute_second_order(evidence, _l2(noise, norm), alpha)
    return Verdict(prediction, radius)


def _dipole(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    prediction, radius, _ = recompute_dipole(evidence, _l2(noise, norm), alpha)
    return Verdict(prediction, radius)


def _l2(noise: Noise | None, norm: float) -> Noise:
    if norm != 2:
        raise ValueError(f"norm must be 2 for second-order and dipole certificates, got {norm:g}")
    return _needed(noise)


def _splitting(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    prediction, radius, _ = verify_splitting(evidence, _l1(noise, norm), alpha)
    return Verdict(prediction, radius)


def _trajectory(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """The prediction is the number of steps."""
    length, radius, _ = verify_trajectory(evidence, _l1(noise, norm), alpha)
    return Verdict(length, radius)


def _l1(noise: Noise | None, norm: float) -> Noise:
    if norm != 1:
        raise ValueError(f"norm must be 1 for splitting certificates, got {norm:g}")
    return _needed(noise)


def _label_flips(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """Norm 0: how many labels may be flipped."""
    if norm != 0 or noise is not None:
        raise ValueError(f"norm must be 0 and noise None for label flips, got {norm:g} and {noise}")
    prediction, radius, abstained = label_flip_certificate(evidence)
    return Verdict(ABSTAIN, 0.0) if abstained else Verdict(prediction, radius)


METHODS: dict[str, Method] = {
    "one-sided": Method(_one_sided),
    "two-sided": Method(_two_sided),
    "sequential": Method(_sequential),
    "second-order": Method(_second_order),
    "second-order-pairs": Method(_second_order),
    "dipole": Method(_dipole),
    "values": Method(_values),
    "splitting": Method(_splitting, exact=True),
    "splitting-trajectory": Method(_trajectory, frozenset({"trajectory"}), exact=True),
    "label-flips": Method(_label_flips, frozenset({"training-labels"}), exact=True),
}
"""Every method by name."""
