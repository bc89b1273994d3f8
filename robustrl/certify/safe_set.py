"""The artifact of safe exploration: a set of pairs that is never left, and what a policy inside it is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from robustrl.certify.certificate import Certificate
from robustrl.certify.storage import Fields, pack
from robustrl.certify.transitions import l1_radius, support_samples
from robustrl.errors import CertificateError, check_count, check_finite_array, check_real
from robustrl.mdp.outcomes import Flags, Floats, Outcomes
from robustrl.mdp.planning import Beliefs, evaluate, optimise
from robustrl.mdp.safe_sets import expand

Integers = NDArray[np.int64]
ENCODING = "base64(zlib(arrays one after the other, little-endian, C order))"
MOST_BYTES = 2_000_000_000
DRAWN = ("safe_set", "counts", "extra", "pool_of", "policy")
"""What of the evidence is no declared outcome."""
SAME = 1e-9
"""Difference of values that other builds of the linear algebra may make."""
ASSUMPTIONS = (
    "A1: that every step of a pair of the first safe set leads to a state with such a pair, or ends the episode without danger, is assumed.",
    "A2: that every positive probability of an outcome is at least tau is assumed; a tau that is too large voids the proof.",
    "A3: that pairs said to behave alike do so, within the l1 distances given, is assumed.",
    "That outcomes which were not declared possible never happen is assumed; a step that shows one voids the proof.",
)
UNPROVEN = "Nothing: the supports were believed before they were proven, or a proven one was contradicted."


class Evidence(NamedTuple):
    """What was declared and drawn.

    Attributes:
        outcomes: declared, those of `safe_set` cut to what stays in it.
        safe_set: the first safe set, bool (S, A).
        counts: draws that stand for a pair, its analogues' included, (S, A, K).
        extra: l1 distance that analogues may add to the counted law, (S, A).
        pool_of: the pool of draws that a pair reads, (S, A); pairs of one pool have the same `counts` and `extra`.
        policy: the certified policy, (S,); an action in every state that owns a safe pair, -1 elsewhere.
    """

    outcomes: Outcomes
    safe_set: Flags
    counts: Integers
    extra: Floats
    pool_of: Integers
    policy: Integers


class _Proof(NamedTuple):
    pairs: Flags
    certified: bool
    value_lower: float | None
    value_upper: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SafeSetCertificate(Certificate):
    """Pairs of state and action which an agent that starts in them can take for ever, without danger and with a way home.

    With probability at least 1 - alpha, for all time and whatever decides among the actions of `pairs`: no dangerous step is taken,
    and the first safe set, or a safe end of the episode, stays within reach. The expected discounted return of the policy from the
    start lies between `value_lower` and `value_upper`; the latter bounds every policy that avoids known danger. Episodes are those that
    begin at a start of the declared outcomes: what these do not lead to was never tested.

    Args:
        alpha: delta_s + delta_p.
        delta_s: failure probability of the safe set.
        delta_p: failure probability of the values, beside delta_s.
        tau: lower bound of every positive probability that was assumed.
        n_support: draws after which a pair's outcomes were believed to be all it has.
        n_pools: pools of draws that were tested, at least those of pairs that a start leads to.
        values: whether the radii behind the values hold at all times; otherwise there are no values.
        evidence: what was declared and drawn.

    Attributes:
        pairs: the set, bool (S, A).
        certified: whether `n_support` is what the proof needs, and nothing was contradicted.
        value_lower, value_upper: None without a proof.
    """

    delta_s: float
    delta_p: float
    tau: float
    n_support: int
    n_pools: int
    contradicted: bool
    pairs: Flags
    certified: bool
    value_lower: float | None
    value_upper: float | None
    evidence: Evidence

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "delta_s", "delta_p", "tau"):
            object.__setattr__(self, name, check_real(name, getattr(self, name)))
        for name in ("n_support", "n_pools"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        total = self.delta_s + self.delta_p
        if not (min(self.delta_s, self.delta_p) > 0 and self.alpha < 1 and math.isclose(self.alpha, total)):
            raise ValueError(f"alpha must be delta_s + delta_p < 1, got {self.alpha}, {self.delta_s}, {self.delta_p}")
        if type(self.certified) is not bool or type(self.contradicted) is not bool:
            raise TypeError("certified and contradicted must be booleans")
        object.__setattr__(self, "pairs", self.evidence.outcomes.pairs("pairs", self.pairs))

    @classmethod
    def of(
        cls,
        evidence: Evidence,
        *,
        delta_s: float,
        delta_p: float,
        tau: float,
        n_support: int,
        n_pools: int,
        values: bool = True,
        contradicted: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> Self:
        """What the evidence proves.

        Raises:
            ValueError: if something is out of range or does not fit.
        """
        proof = _proof(evidence, delta_s, delta_p, tau, n_support, n_pools, values, contradicted)
        return cls(
            alpha=delta_s + delta_p,
            not_covered=_exclusions(proof.certified),
            provenance=provenance or {},
            delta_s=delta_s,
            delta_p=delta_p,
            tau=tau,
            n_support=n_support,
            n_pools=n_pools,
            contradicted=contradicted,
            evidence=evidence,
            **proof._asdict(),
        )

    def __repr__(self) -> str:
        what = f"{int(self.pairs.sum())} safe pairs" if self.certified else "nothing proven"
        return f"<{type(self).__name__}: {what}, confidence {100 * (1 - self.alpha):.10g}%>"

    @property
    def value_gap(self) -> float | None:
        """How far the bounds of the return are apart."""
        return None if self.value_lower is None or self.value_upper is None else self.value_upper - self.value_lower

    def verify(self) -> None:
        """Recompute draws, supports, closure and values from the evidence.

        Raises:
            CertificateError: naming the first field that differs.
        """
        try:
            fresh = _proof(
                self.evidence, self.delta_s, self.delta_p, self.tau, self.n_support, self.n_pools, self.value_lower is not None,
                self.contradicted,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise CertificateError(f"the certificate cannot be recomputed from its evidence: {error}") from None
        if self.certified != fresh.certified:
            raise CertificateError(f"field 'certified' is {self.certified}; recomputed: {fresh.certified}")
        if (self.pairs != fresh.pairs).any():
            raise CertificateError(f"field 'pairs' holds {self.pairs.sum()} pairs; recomputed: {fresh.pairs.sum()}")
        least = min(1.0, self.evidence.outcomes.reward_scale)
        for name in ("value_lower", "value_upper"):
            stated, again = getattr(self, name), getattr(fresh, name)
            if (stated is None) != (again is None) or (
                stated is not None and abs(stated - again) > SAME * max(least, abs(again))
            ):
                raise CertificateError(f"field {name!r} is {stated}; recomputed: {again}")
        omitted = [sentence for sentence in _exclusions(fresh.certified) if sentence not in self.not_covered]
        if omitted:
            raise CertificateError(f"field 'not_covered' leaves out: {omitted[0]}")

    def table(self) -> str:
        """The certificate as plain text."""
        first = int(self.evidence.safe_set.sum())
        rows = [
            ("safe pairs", f"{int(self.pairs.sum())} of {int(self.evidence.outcomes.valid.sum())}, at first {first}"),
            ("certified", "yes" if self.certified else "no"),
            ("confidence", f"{100 * (1 - self.delta_s):.10g}% safe, {100 * (1 - self.alpha):.10g}% with the values"),
            ("tau", f"{self.tau:g}"),
            ("draws", f"{self.n_support} per pool, {self.n_pools} pools"),
        ]
        if self.value_lower is not None and self.value_upper is not None:
            rows.append(
                ("return", f"{self.value_lower:.6g} to {self.value_upper:.6g} (discounted by {self.evidence.outcomes.gamma:g})")
            )
        return "\n".join(f"{name:<14}{value}" for name, value in rows)

    def _specific(self) -> dict[str, Any]:
        return {
            "delta_s": self.delta_s,
            "delta_p": self.delta_p,
            "tau": self.tau,
            "n_support": self.n_support,
            "n_pools": self.n_pools,
            "contradicted": self.contradicted,
            "certified": self.certified,
            "value_lower": self.value_lower,
            "value_upper": self.value_upper,
            "pairs": np.flatnonzero(self.pairs).tolist(),
            "evidence": _encoded(self.evidence),
        }

    @classmethod
    def _from_specific(cls, fields: Fields, common: dict[str, Any]) -> Self:
        none = type(None)
        evidence = _decoded(fields.inner("evidence"))
        pairs, listed = np.zeros(evidence.safe_set.size, dtype=bool), fields.take("pairs", list)
        if not all(type(pair) is int and 0 <= pair < pairs.size for pair in listed):
            raise fields.error("pairs", f"must hold numbers of pairs from 0 to {pairs.size - 1}")
        pairs[listed] = True
        certificate = dict(
            common,
            evidence=evidence,
            pairs=pairs.reshape(evidence.safe_set.shape),
            **{name: fields.take(name, float) for name in ("delta_s", "delta_p", "tau")},
            **{name: fields.take(name, int) for name in ("n_support", "n_pools")},
            **{name: fields.take(name, bool) for name in ("contradicted", "certified")},
            **{name: fields.take(name, float, none) for name in ("value_lower", "value_upper")},
        )
        fields.finish()
        return cls(**certificate)


def _exclusions(certified: bool) -> tuple[str, ...]:
    return ASSUMPTIONS if certified else (*ASSUMPTIONS, UNPROVEN)


def _proof(
    evidence: Evidence,
    delta_s: float,
    delta_p: float,
    tau: float,
    n_support: int,
    n_pools: int,
    values: bool,
    contradicted: bool,
) -> _Proof:
    outcomes = evidence.outcomes
    safe_set, counts, extra, policy = _checked(evidence, n_pools)
    draws = counts.sum(-1, dtype=np.float64)  # integers might wrap around
    known = (draws >= n_support) & outcomes.nonterminal  # nothing else was paid for
    possible = np.where(known[..., None], counts > 0, outcomes.candidates)
    pairs = expand(outcomes, safe_set, known, possible)
    certified = n_support >= support_samples(tau, delta_s, n_pools) and not contradicted
    if not (values and certified):
        return _Proof(pairs, certified, None, None)
    inside = pairs.any(1)
    if ((policy >= 0) != inside).any() or not pairs[inside, policy[inside]].all():
        raise ValueError("policy must choose pairs of the safe set, in every state that owns one and nowhere else")
    n_possible = possible.sum(-1)
    radii = l1_radius(draws, np.maximum(n_possible, 1), delta_p / n_pools) + extra
    estimates = counts / np.maximum(draws, 1)[..., None]
    sure = n_possible == 1
    estimates[sure], radii[sure] = possible[sure], 0.0
    beliefs = Beliefs(outcomes, estimates, np.minimum(radii, 2.0), possible)
    tolerance = 1e-6 * outcomes.reward_scale
    worst = evaluate(beliefs, policy, tolerance=tolerance)
    dangerous = known & (possible & outcomes.dangerous).any(-1)
    best = optimise(beliefs, allowed=pairs | (outcomes.valid & ~dangerous), tolerance=tolerance)
    start = np.asarray(outcomes.start)
    return _Proof(pairs, True, float(start @ worst.values - worst.error), float(start @ best.values + best.error))


def _checked(evidence: Evidence, n_pools: int) -> tuple[Flags, Integers, Floats, Integers]:
    """The first safe set, the counts, the extra distances and the policy, if they can be what an honest learner has seen.

    Raises:
        ValueError: if they cannot.
    """
    outcomes = evidence.outcomes
    pair_shape, n_states, taken = outcomes.valid.shape, outcomes.n_states, outcomes.nonterminal
    safe_set = outcomes.pairs("safe_set", evidence.safe_set)
    counts = _integers("counts", evidence.counts, outcomes.candidates.shape, 0)
    pool_of = _integers("pool_of", evidence.pool_of, pair_shape, 0)
    policy = _integers("policy", evidence.policy, (n_states,), -1, outcomes.n_actions - 1)
    extra = check_finite_array("extra", evidence.extra)
    if extra.shape != pair_shape or extra.min() < 0:
        raise ValueError(f"extra must be distances >= 0 of shape {pair_shape}, got {extra.shape}, least {extra.min()}")
    if (counts[~outcomes.candidates] > 0).any():
        raise ValueError("counts must show candidate slots only")
    _, first, pool = np.unique(pool_of[taken], return_index=True, return_inverse=True)
    if n_pools < len(first):
        raise ValueError(f"n_pools must count the {len(first)} pools of the evidence, got {n_pools}")
    for name, table in (("counts", counts[taken]), ("extra", extra[taken])):
        if (table != table[first][pool]).any():
            raise ValueError(f"{name} must be the same for all pairs of a pool")
    home: Flags = np.any(safe_set, axis=1)
    leaves = ~(outcomes.terminal | home[outcomes.successors]) | outcomes.dangerous
    if not home[np.asarray(outcomes.start) > 0].all() or (outcomes.candidates & leaves)[safe_set].any():
        raise ValueError("safe_set must own a pair at every start, be free of danger and never be left")
    return safe_set, counts, extra, policy


def _integers(name: str, value: Any, shape: tuple[int, ...], least: int, most: int | None = None) -> Integers:
    given = np.asarray(value)
    if given.shape != shape or given.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape {shape}, got {given.dtype} {given.shape}")
    if given.min() < least or (most is not None and given.max() > most):
        raise ValueError(
            f"{name} must be integers >= {least}{'' if most is None else f', <= {most}'}, got {given.min()} to {given.max()}"
        )
    return given


def _arrays(evidence: Evidence) -> dict[str, NDArray[Any]]:
    names = ("successors", "candidates", "rewards", "dangerous", "terminal", "start")
    known = {name: np.asarray(getattr(evidence.outcomes, name)) for name in names}
    return {**known, **{name: np.asarray(getattr(evidence, name)) for name in DRAWN}}


def _encoded(evidence: Evidence) -> dict[str, Any]:
    little = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in _arrays(evidence).items()}
    return {
        "encoding": ENCODING,
        "gamma": evidence.outcomes.gamma,
        "arrays": [[name, array.dtype.str, list(array.shape)] for name, array in little.items()],
        **pack(b"".join(array.tobytes() for array in little.values())),
    }


def _decoded(fields: Fields) -> Evidence:
    if fields.take("encoding", str) != ENCODING:
        raise fields.error("encoding", f"must be {ENCODING!r}")
    gamma, listed = fields.take("gamma", float), fields.take("arrays", list)
    try:
        layout = [(name, np.dtype(kind), tuple(shape)) for name, kind, shape in listed]
        sizes = [kind.itemsize * math.prod(shape) for _, kind, shape in layout]
        if min(sizes) < 0 or sum(sizes) > MOST_BYTES or any(kind.kind not in "biuf" for _, kind, _ in layout):
            raise ValueError(f"arrays of {sum(sizes)} bytes")
    except (TypeError, ValueError, OverflowError) as error:
        raise fields.error("arrays", f"cannot be laid out: {error}") from None
    raw = fields.unpack(sum(sizes), f"{sum(sizes)} bytes of arrays")
    fields.finish()
    parts = np.split(np.frombuffer(raw, dtype=np.uint8), np.cumsum(sizes)[:-1])
    arrays = {name: part.view(kind).reshape(shape).copy() for (name, kind, shape), part in zip(layout, parts, strict=True)}
    try:
        rest = {name: arrays.pop(name) for name in DRAWN}
        return Evidence(Outcomes(**arrays, gamma=gamma), **rest)
    except (KeyError, TypeError, ValueError) as error:
        raise fields.error("arrays", f"are not those of a safe set: {error}") from None
