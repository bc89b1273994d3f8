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
lipschitz             input, step      scores of a network, and its Lipschitz constant; no noise
label-flips           training-labels  integer votes of the training examples; nothing is sampled
====================  ===============  ===========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from robustrl.certify.confidence import clopper_pearson_lower, clopper_pearson_upper
from robustrl.certify.labels import label_flip_certificate
from robustrl.certify.margins import lipschitz_verdict
from robustrl.certify.radius import ABSTAIN, Verdict
from robustrl.certify.second_order import (
    DipoleBound,
    NoisePairs,
    SecondOrderBound,
    SplitMeans,
    certify_dipole,
    certify_second_order,
)
from robustrl.certify.sequential import log_wealth, threshold
from robustrl.certify.splitting import verify_splitting, verify_trajectory
from robustrl.errors import check_alpha, check_count, check_positive, check_real
from robustrl.noise import Gaussian, Noise

if TYPE_CHECKING:
    from robustrl.certify.radius import RadiusCertificate

Evidence = dict[str, Any]

SAMPLED = frozenset({"input", "step"})

ELSEWHERE = frozenset({"sequential", "lipschitz"})
"""Methods about inputs that are not those of `Smoothed.certify`: see `Smoothed.decide` and `LipschitzScores`."""

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
        keys: what the evidence holds, exactly; sampled methods also say how the class was chosen, and may say "dimension" (needed for
            another norm than the noise's) and "rounding" (how far the sampled point is from the certified one).
        scopes: what it has a proof for.
        exact: whether nothing is sampled, so that alpha is 0.
        real: whether it is about real arithmetic all the same.
    """

    judge: Callable[[Evidence, Noise | None, float, float], Verdict]
    keys: frozenset[str]
    scopes: frozenset[str] = SAMPLED
    exact: bool = False
    real: bool = False

    def check_alpha(self, alpha: float) -> float:
        """A failure probability in (0, 0.5], or 0 for an exact method."""
        if not self.exact:
            return check_alpha(alpha)
        if check_real("alpha", alpha) != 0:
            raise ValueError(f"alpha must be 0 for an exact method, got {alpha}")
        return 0.0

    def verdict(self, evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
        """What follows from the evidence.

        Raises:
            ValueError, TypeError: if it is incomplete, contradictory or impossible.
        """
        given = set(evidence)
        if not self.exact:
            if len(given & {"prediction", "selection"}) != 1:
                raise ValueError(f"evidence must hold one of prediction and selection, got {sorted(given)}")
            given -= {"prediction", "selection", "rounding"}
            if noise is not None and norm != noise.norm:
                given -= {"dimension"}
        if given != self.keys:
            raise ValueError(f"evidence must hold {sorted(self.keys)}, got {sorted(given)}")
        found = self.judge(evidence, noise, self.check_alpha(alpha), norm)
        if self.exact or found.prediction == ABSTAIN:
            return found
        # Samples around the rounded point certify a ball there; the ball inside it around the point itself is smaller.
        rounding = check_real("rounding", evidence.get("rounding", 0.0))
        if rounding < 0:
            raise ValueError(f"rounding must be >= 0, got {rounding}")
        return replace(found, radius=max(0.0, found.radius - rounding))


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


def input_method(name: str, scope: str = "input") -> Method:
    """The method of that name, if it is one of `Smoothed.certify`.

    Raises:
        ValueError: see `method_for`; an unknown name is answered with those of `Smoothed.certify` alone.
    """
    taken = tuple(key for key, method in METHODS.items() if "input" in method.scopes and key not in ELSEWHERE)
    method = method_for(name, scope) if name in METHODS else None
    if method is None or name not in taken:
        raise ValueError(f"method must be one of {', '.join(taken)}, got {name!r}")
    return method


LIPSCHITZ = (
    "Floating point: the proof is about real arithmetic; the network's own rounding (float32, TF32, bfloat16) is accounted for at the "
    "input itself, not at perturbed ones, in other batches, on other devices, or of the observation.",
    "Actions that are sampled or explored, masked, or chosen by a rule of the policy's own: the decision is the greedy one.",
    "Hooks, and parts of the policy that were replaced after it was taken apart; a normalisation that goes on learning.",
    "Other units: the radius is in those of the observation that was given (bytes of a picture, or pixels in [0, 1]; behind a VecNormalize "
    "normalised ones).",
    "Scores and constant: they are stated by whoever made the certificate; recomputing it checks the arithmetic.",
    "Frames apart: it is that of the whole observation; in a stack of k, frames that are changed by eps each move it by eps sqrt(k).",
)


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
    if certificate.method == "lipschitz":
        sentences += LIPSCHITZ
        if trusted := certificate.evidence.get("trusted"):
            sentences.append(f"Wrong claims of their own constants by the layers {', '.join(map(str, trusted))}.")
    if certificate.method == "splitting-trajectory" and certificate.evidence.get("n_frames") == 1:
        sentences.append("Frames that stay in a stack: every observation is attacked afresh.")
    if certificate.scope == "step":
        sentences.append("Other steps: the attacker may have reached another state.")
    if certificate.noise is not None:
        sentences += [f"{caveat[0].upper()}{caveat[1:]}." for caveat in certificate.noise.caveats]
    return tuple(sentences)


def chosen(evidence: Evidence) -> int:
    """The class that the evidence is about: that of the selection batch, fixed before all other samples were drawn."""
    if "prediction" in evidence:
        return check_count("prediction", evidence["prediction"], least=0)
    selection = evidence["selection"]
    if not isinstance(selection, list) or not selection:
        raise ValueError(f"selection must be a list of counts, got {selection!r}")
    counts = [check_count("selection", count, least=0) for count in selection]
    if not any(counts):
        raise ValueError("selection must hold at least one count > 0")
    return int(np.argmax(counts))


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
    count, n, prediction = check_count("count", evidence["count"], least=0), check_count("n", evidence["n"]), chosen(evidence)
    p = float(clopper_pearson_lower(count, n, alpha))
    if p <= 0.5:
        return Verdict(ABSTAIN, 0.0, p)
    return Verdict(prediction, radius_of(evidence, noise, norm, p), p)


def _two_sided(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """alpha/2 for the class, alpha/2 over all its rivals: whichever of them comes second under attack is covered."""
    counts = np.array([check_count("counts", count, least=0) for count in evidence["counts"]])
    n, top = check_count("n", evidence["n"]), chosen(evidence)
    if counts.sum() != n or len(counts) < 2 or top >= len(counts) or len(evidence.get("selection", counts)) != len(counts):
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
    level, prediction = threshold(noise, radius), chosen(evidence)
    bettors = log_wealth(check_count("count", evidence["count"], least=0), check_count("n", evidence["n"]), level)
    answer = answer_of(*bettors, alpha)
    if evidence["answer"] != answer:
        raise ValueError(f"answer is {evidence['answer']!r}; the counts say {answer!r}")
    return Verdict(prediction, radius, level) if answer == "yes" else Verdict(ABSTAIN, 0.0)


def answer_of(above: Any, below: Any, alpha: float) -> str:
    """Which of the two bettors, at alpha/2 each, has won: "yes", "no", or "undecided"."""
    bar = -np.log(alpha / 2)
    return "yes" if above >= bar else "no" if below >= bar else "undecided"


def _values(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """Means of scores in [low, high] by Hoeffding's inequality, alpha/K for each; a bounded score is a randomised vote."""
    low, high = (check_real("bounds", bound) for bound in evidence["bounds"])
    if low >= high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {evidence['bounds']}")
    n, top = check_count("n", evidence["n"]), chosen(evidence)
    if n >= 2**53:
        raise ValueError(f"n must be below 2^53, got {n}")
    means = (np.array([check_real("sums", total) for total in evidence["sums"]]) / n - low) / (high - low)
    if len(means) < 2 or top >= len(means) or not np.all((means >= -1e-9) & (means <= 1 + 1e-9)):
        raise ValueError(f"sums must hold at least two means within the bounds {low}, {high}, got {means}")
    slack = np.sqrt(-np.log(alpha / len(means)) / (2 * n))
    lower, upper = max(0.0, float(means[top] - slack)), min(1.0, float(np.delete(means, top).max() + slack))
    if lower <= upper:
        return Verdict(ABSTAIN, 0.0, lower, upper)
    return Verdict(top, radius_of(evidence, noise, norm, lower, upper), lower, upper)


def _second_order(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    stated, n = evidence["gradient"], check_count("n", evidence["n"])
    if set(stated) != {"inner", "norm1", "norm2", "n1", "n2"}:
        raise ValueError(f"gradient must hold inner, norm1, norm2, n1 and n2, got {sorted(stated)}")
    inner, *norms = (check_real(f"gradient.{name}", stated[name]) for name in ("inner", "norm1", "norm2"))
    n1, n2 = (check_count(f"gradient.{name}", stated[name]) for name in ("n1", "n2"))
    if n1 + n2 != n:
        raise ValueError(f"gradient must be that of two halves of the n = {n} samples, got {stated}")
    if min(norms) < 0 or abs(inner) > norms[0] * norms[1] * (1 + 1e-9):
        raise ValueError(f"gradient holds two vectors of norms {norms}, whose product cannot be {inner}")
    return _with_gradient(evidence, SplitMeans(inner, norms[1], n1, n2), noise, alpha, norm)


def _second_order_pairs(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    stated, n = evidence["gradient"], check_count("n", evidence["n"])
    if set(stated) != {"mean_inner", "n_pairs", "n_features"} or 2 * check_count("n_pairs", stated["n_pairs"]) != n:
        raise ValueError(f"gradient must be that of {n // 2} pairs, got {stated}")
    return _with_gradient(evidence, NoisePairs(**stated), noise, alpha, norm)


def _with_gradient(
    evidence: Evidence, gradient: SplitMeans | NoisePairs, noise: Noise | None, alpha: float, norm: float
) -> Verdict:
    bound = certify_second_order(evidence["count"], evidence["n"], gradient, alpha)
    return _in_units_of_sigma(evidence, bound, noise, norm)


def _dipole(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    bound = certify_dipole(evidence["both"], evidence["exactly_one"], evidence["n_pairs"], alpha)
    return _in_units_of_sigma(evidence, bound, noise, norm)


def _in_units_of_sigma(evidence: Evidence, bound: SecondOrderBound | DipoleBound, noise: Noise | None, norm: float) -> Verdict:
    if norm != 2:
        raise ValueError(f"norm must be 2 for second-order and dipole certificates, got {norm:g}")
    if not isinstance(noise, Gaussian) or noise.smallest == 0:
        raise ValueError(f"noise must be Gaussian with sigma > 0: the proof is about its density, got {noise!r}")
    prediction = chosen(evidence)
    if bound.abstained:
        return Verdict(ABSTAIN, 0.0, bound.p_lower)
    return Verdict(prediction, noise.smallest * bound.radius, bound.p_lower)


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


def _lipschitz(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    if noise is not None:
        raise ValueError(f"noise must be None: the network is certified as it is, got {noise}")
    return Verdict(*lipschitz_verdict(evidence, norm))


def _label_flips(evidence: Evidence, noise: Noise | None, alpha: float, norm: float) -> Verdict:
    """Norm 0: how many labels may be flipped."""
    if norm != 0 or noise is not None:
        raise ValueError(f"norm must be 0 and noise None for label flips, got {norm:g} and {noise}")
    prediction, radius, abstained = label_flip_certificate(evidence)
    return Verdict(ABSTAIN, 0.0) if abstained else Verdict(prediction, radius)


COUNT, GRADIENT, PAIRS = frozenset({"count", "n"}), frozenset({"count", "n", "gradient"}), {"both", "exactly_one", "n_pairs"}
VOTES = frozenset({"counts"})

METHODS: dict[str, Method] = {
    "one-sided": Method(_one_sided, COUNT),
    "two-sided": Method(_two_sided, frozenset({"counts", "n"})),
    "sequential": Method(_sequential, COUNT | {"radius", "answer"}),
    "second-order": Method(_second_order, GRADIENT),
    "second-order-pairs": Method(_second_order_pairs, GRADIENT),
    "dipole": Method(_dipole, frozenset(PAIRS)),
    "values": Method(_values, frozenset({"sums", "n", "bounds"})),
    "splitting": Method(_splitting, VOTES, exact=True),
    "splitting-trajectory": Method(
        _trajectory, VOTES | {"n_frames", "padding", "budget"}, frozenset({"trajectory"}), exact=True
    ),
    "lipschitz": Method(
        _lipschitz,
        frozenset({"scores", "rounding", "rivals", "differences", "lipschitz", "dimension", "trusted"}),
        exact=True,
        real=True,
    ),
    "label-flips": Method(
        _label_flips, frozenset({"weights", "labels", "n_classes", "q", "method"}), frozenset({"training-labels"}), exact=True
    ),
}
"""Every method by name."""
