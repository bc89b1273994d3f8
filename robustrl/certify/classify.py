"""Certificates of a smoothed function: what it predicts, and how far around an input it keeps predicting it."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import binom
from torch import nn

from robustrl.certify.methods import Evidence, answer_of, exclusions, input_method, method_for
from robustrl.certify.radius import ABSTAIN, RadiusCertificate, Scope
from robustrl.certify.sampling import Counts, Smoothed, Tally
from robustrl.certify.second_order import SplitMeans
from robustrl.certify.sequential import log_wealth, threshold
from robustrl.certify.splitting import count_votes
from robustrl.errors import check_alpha, check_choice, check_count
from robustrl.noise import DeterministicSplitting, Gaussian, Noise
from robustrl.policy import PolicyView


def predict(smoothed: Smoothed, x: Any, n: int = 1000, alpha: float = 0.001) -> Counts:
    """The smoothed function's class of each input, or `ABSTAIN` where the vote is too close.

    The two most frequent classes of one batch are compared by a two-sided binomial test.

    Args:
        smoothed: the function.
        x: inputs (b, *shape).
        n: noisy copies of each.
        alpha: probability of another class than the true one, for each input.
    Returns:
        int64 (b,).
    Source: Cohen, Rosenfeld, Kolter (ICML 2019), PREDICT; Hung, Fithian (Annals of Statistics 2019).
    """
    check_alpha(alpha)
    counts = smoothed.tally(x, n).counts
    if 2 * 0.5**n > alpha:
        warnings.warn(f"n = {n} samples can never decide at alpha = {alpha}: every input abstains", stacklevel=3)
    second, first = np.sort(counts, axis=1)[:, -2:].T
    p_value = np.minimum(1.0, 2 * binom.sf(first - 1, first + second, 0.5))
    decided = (p_value <= alpha) & (first > second)
    return np.where(decided, counts.argmax(axis=1), ABSTAIN).astype(np.int64)


def certify(
    smoothed: Smoothed,
    x: Any,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    *,
    method: str = "one-sided",
    norm: float | None = None,
    alpha_total: float | None = None,
    scope: str = "input",
) -> list[RadiusCertificate]:
    """A radius around each input within which the smoothed function keeps its class.

    A first batch of `n0` copies chooses the class, `n` other copies give the evidence.

    Args:
        smoothed: the function.
        x: inputs (b, *shape).
        n0: copies that choose the class.
        n: copies that give the evidence.
        alpha: failure probability of each certificate.
        method: "one-sided", "two-sided", "second-order", "second-order-pairs", "dipole" or "values"; or "splitting" for the exact
            votes of a `DeterministicSplitting`, which samples nothing (alpha, n0 and n do not count). See `methods`.
        norm: of the radius; default the noise's own.
        alpha_total: failure probability of all certificates together, in place of `alpha`.
        scope: "input", or "step" for a policy.
    Returns:
        RadiusCertificate per input; it abstains where nothing can be said. Its `provenance` is that of the function below.
    Raises:
        ValueError: for bad numbers, or a statement that has no proof, which it explains.
    Source: Cohen, Rosenfeld, Kolter (ICML 2019), arXiv:1902.02918; two-sided with the level split over all classes; second
        order and dipole: arXiv:2010.10549.
    """
    input_method(method, scope)
    check_noise(smoothed.noise, scope)
    check_count("n0", n0)
    check_count("n", n)
    inputs = smoothed.inputs(x)
    if method == "splitting":
        check_choice("norm", 1 if norm is None else norm, (1,))
        return _exactly(smoothed, x, scope)
    level = check_alpha(alpha) if alpha_total is None else check_alpha(alpha_total, "alpha_total") / len(inputs)
    share, trials = level if method == "one-sided" else level / 2, n // 2 if method == "dipole" else n
    if method != "values" and share ** (1 / max(trials, 1)) <= 0.5:
        warnings.warn(f"n = {n} samples can never certify at alpha = {level}: every input abstains", stacklevel=3)
    own = smoothed.noise.norm
    dimension = {} if norm in (None, own) else {"dimension": math.prod(inputs.shape[1:])}
    if norm not in (None, own):
        smoothed.noise.radius_in(norm, 0.9, dimension=dimension["dimension"])  # refused before anything is sampled
    rounding = _rounding(smoothed, x, own if norm is None else norm)
    selection = smoothed.tally(inputs, n0, values=method == "values")
    votes = selection.counts if selection.values is None else selection.values
    classes = votes.argmax(axis=1)
    tally = smoothed.tally(
        inputs,
        n,
        classes=classes,
        pairs=method == "dipole",
        gradient=method.startswith("second-order"),
        values=method == "values",
    )
    origins = provenance(smoothed.function, x)
    return [
        certified(
            method,
            {**_evidence(method, tally, i, int(c), smoothed), **_selected(selection, i, int(c)), **dimension, **rounding[i]},
            norm=own if norm is None else norm,
            alpha=level,
            scope=scope,
            noise=smoothed.noise,
            provenance=origins[i],
        )
        for i, c in enumerate(classes)
    ]


def provenance(function: Any, x: Any) -> list[dict[str, str]]:
    """What each certificate says about its origin: the hashes of the base function (`fingerprint`, if it has one) and of the input.

    An input's is sha256 over the text of dtype and shape, e.g. "float32(3, 8, 8)", and the bytes, as it was given.
    """
    mark = fingerprint(function)
    return [({} if mark is None else {"model": mark}) | {"input": _digest(part)} for part in torch.as_tensor(x)]


def fingerprint(function: Any) -> str | None:
    """SHA-256 over a module's layers and weights, a policy's decision rule included; None for a callable without them."""
    if isinstance(function, PolicyView):
        return function.fingerprint()
    if not isinstance(function, nn.Module):
        return None
    state = {name: value for name, value in function.state_dict().items() if isinstance(value, torch.Tensor)}
    text = repr(function) + "".join(f"{name}{_digest(value)}" for name, value in sorted(state.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(part: torch.Tensor) -> str:
    host = part.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}{tuple(host.shape)}".removeprefix("torch.").encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_noise(noise: Noise, scope: str) -> None:
    """Raise ValueError unless the mechanism can certify something about one input or step."""
    if scope in ("input", "step"):
        noise.require(scope)
    if isinstance(noise, Gaussian) and noise.smallest == 0:
        raise ValueError(f"noise must have sigma > 0, got {noise}: without noise no radius can be certified")


def _exactly(smoothed: Smoothed, x: Any, scope: str) -> list[RadiusCertificate]:
    """Votes of all noisy copies, where there are finitely many."""
    noise = smoothed.noise
    if not isinstance(noise, DeterministicSplitting):
        raise ValueError(f"noise must be a DeterministicSplitting for method 'splitting', got {noise}")
    with smoothed.evaluating() as scores:
        votes = count_votes(scores, smoothed.inputs(x), noise, batch_size=smoothed.batch_size)
    return [
        certified("splitting", {"counts": counts.tolist()}, alpha=0.0, norm=1, scope=scope, noise=noise, provenance=origin)
        for counts, origin in zip(votes, provenance(smoothed.function, x), strict=True)
    ]


def decide(
    smoothed: Smoothed,
    x: Any,
    radius: float,
    alpha: float = 0.001,
    max_n: int = 100_000,
    *,
    n0: int = 100,
    scope: str = "input",
    alpha_total: float | None = None,
) -> list[RadiusCertificate]:
    """Whether the radius of each input is at least `radius`, sampling only until it is decided.

    Two bettors with alpha/2 each bet that the class's probability is above or below what the radius takes, and stop when one has won.

    Args:
        smoothed: the function.
        x: inputs (b, *shape).
        radius: in the noise's own norm.
        alpha: failure probability of each answer.
        max_n: most copies of each input.
        n0: copies that choose the class.
        scope: "input", or "step" for a policy.
        alpha_total: failure probability of all answers together, in place of `alpha`.
    Returns:
        RadiusCertificate per input, of `radius` (less what single precision moved the input) where the answer is yes; where it abstains, `evidence["answer"]` is "no" or
        "undecided". `evidence["n"]` is how many copies it took.
    """
    method_for("sequential", scope)
    check_noise(smoothed.noise, scope)
    inputs, level = smoothed.inputs(x), threshold(smoothed.noise, radius)
    share = check_alpha(alpha) if alpha_total is None else check_alpha(alpha_total, "alpha_total") / len(inputs)
    check_count("max_n", max_n)
    rounding = _rounding(smoothed, x, smoothed.noise.norm)
    selection = smoothed.tally(inputs, check_count("n0", n0))
    classes, n_inputs = selection.top, len(inputs)
    hits, drawn = np.zeros(n_inputs, np.int64), np.zeros(n_inputs, np.int64)
    answers = np.full(n_inputs, "undecided", dtype=object)
    running, n = np.arange(n_inputs), 0
    while running.size and n < max_n:
        step = min(max(FIRST_STEP, n // 8), max_n - n)
        counts = smoothed.tally(inputs[running], step).counts
        n += step
        hits[running] += counts[np.arange(running.size), classes[running]]
        drawn[running] = n
        for i, above, below in zip(running, *log_wealth(hits[running], n, level), strict=True):
            answers[i] = answer_of(above, below, share)
        running = np.flatnonzero(answers == "undecided")
    origins = provenance(smoothed.function, x)
    return [
        certified(
            "sequential",
            {
                "selection": selection.counts[i].tolist(),
                "count": int(hits[i]),
                "n": int(drawn[i]),
                "radius": float(radius),
                "answer": str(answers[i]),
                **rounding[i],
            },
            norm=smoothed.noise.norm,
            alpha=share,
            scope=scope,
            noise=smoothed.noise,
            provenance=origins[i],
        )
        for i in range(n_inputs)
    ]


FIRST_STEP = 64
"""Copies before the first look of a sequential decision; looks are free, calls are not."""


def radius_from_counts(
    noise: Noise,
    count: int,
    n: int,
    *,
    alpha: float,
    prediction: int = 0,
    norm: float | None = None,
    dimension: int | None = None,
) -> RadiusCertificate:
    """The radius that `count` of `n` noisy copies give, wherever they were drawn.

    Args:
        noise: the mechanism.
        count: copies that were of the class, which was fixed before they were drawn.
        n: copies.
        alpha: failure probability.
        prediction: the class.
        norm: of the radius; default the noise's own.
        dimension: entries of the input, needed for another norm.
    """
    evidence = {"prediction": prediction, "count": count, "n": n} | ({} if dimension is None else {"dimension": dimension})
    noise.require("input")
    return certified("one-sided", evidence, noise=noise, alpha=alpha, norm=noise.norm if norm is None else norm, scope="input")


def certified(
    method: str,
    evidence: Evidence,
    *,
    alpha: float,
    norm: float,
    scope: str,
    noise: Noise | None = None,
    provenance: dict[str, Any] | None = None,
) -> RadiusCertificate:
    """The certificate that a method makes of its evidence.

    Raises:
        ValueError: if the method has no proof for the scope, or the evidence is impossible.
    """
    judge = method_for(method, scope)
    check_choice("norm", norm, (0, 1, 2, math.inf))
    verdict = judge.verdict(evidence, noise, judge.check_alpha(alpha), norm)
    fp_model = "real" if judge.real else "exact" if judge.exact or noise is None else noise.fp_model
    bare = RadiusCertificate(
        alpha=alpha,
        not_covered=(),
        provenance=provenance or {},
        prediction=verdict.prediction,
        radius=verdict.radius,
        norm=norm,
        scope=cast(Scope, scope),
        method=method,
        evidence=evidence,
        noise=noise,
        p_lower=verdict.p_lower,
        p_upper=verdict.p_upper,
        fp_model=fp_model,
    )
    return bare.with_exclusions(exclusions(bare))


def _rounding(smoothed: Smoothed, x: Any, norm: float) -> list[Evidence]:
    """What single precision takes off the radius of each input, where it takes any."""
    return [{"rounding": length} if length else {} for length in smoothed.rounding(x, norm)]


def _selected(selection: Tally, i: int, c: int) -> Evidence:
    """How the class was chosen: by the first batch's counts, or by its highest mean score."""
    return {"selection": selection.counts[i].tolist()} if selection.values is None else {"prediction": c}


def _evidence(method: str, tally: Tally, i: int, c: int, smoothed: Smoothed) -> Evidence:
    """What the method needs of the tally, about input i and class c."""
    if tally.values is not None:
        return {"sums": tally.values[i].tolist(), "n": tally.n, "bounds": list(smoothed.bounds or ())}
    if tally.both is not None and tally.exactly_one is not None:
        return {"both": int(tally.both[i]), "exactly_one": int(tally.exactly_one[i]), "n_pairs": tally.n // 2}
    count = {"count": int(tally.counts[i, c]), "n": tally.n}
    if tally.moments is not None and tally.halves is not None and tally.products is not None:
        n1, n2 = tally.halves
        split = SplitMeans.from_sums(tally.moments[i], n1, n2)
        pairs = {"mean_inner": float(tally.products[i]) / n1, "n_pairs": n1, "n_features": tally.moments.shape[2]}
        norm1 = float(np.linalg.norm(tally.moments[i, 0])) / n1
        fields = {"inner": split.inner, "norm1": norm1, "norm2": split.norm2, "n1": n1, "n2": n2}
        return {**count, "gradient": pairs if method == "second-order-pairs" else fields}
    return {"counts": tally.counts[i].tolist(), "n": tally.n} if method == "two-sided" else count
