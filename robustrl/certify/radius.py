"""The artifact of one input: a radius within which no attacker changes what is predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

from robustrl.certify.certificate import Certificate
from robustrl.certify.storage import Fields, plain_data
from robustrl.errors import CertificateError, check_choice, check_real
from robustrl.noise import Noise

Scope = Literal["input", "step", "trajectory", "training-labels"]
SCOPES = ("input", "step", "trajectory", "training-labels")
SAME = 1e-11
"""Relative difference that other builds of the special functions may make."""
ABSTAIN = -1
"""The prediction of a certificate that makes none."""


@dataclass(frozen=True)
class Verdict:
    """What a method makes of its evidence.

    Attributes:
        prediction: the class, or `ABSTAIN`.
        radius: 0 when abstaining.
        p_lower: lower confidence limit of the prediction's probability, None for methods without one.
        p_upper: upper confidence limit of every other class's, None for methods without one.
    """

    prediction: int
    radius: float
    p_lower: float | None = None
    p_upper: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RadiusCertificate(Certificate):
    """A prediction that no attacker strictly within a radius can change (norm 0: with at most that many changes).

    Args:
        prediction: the certified class, or -1 if no statement is made: abstaining is always sound. Of a trajectory: its steps.
        radius: in `norm`, in the units of the input; 0 when abstaining.
        norm: 0, 1, 2 or inf.
        scope: what is attacked: one "input", one "step" of a policy, every step of a "trajectory", or "training-labels".
        method: how the evidence was judged; see `robustrl.certify.methods`.
        evidence: plain data that `verify` recomputes everything else from.
        noise: the mechanism, None for methods without one.
        p_lower: lower confidence limit of the prediction's probability, if the method has one.
        p_upper: upper confidence limit of every other class's, if the method has one.
        fp_model: "exact" if noise and arithmetic around it are exact, "real" if the proof is about real numbers.
    """

    prediction: int
    radius: float
    norm: float
    scope: Scope
    method: str
    evidence: dict[str, Any]
    noise: Noise | None = None
    p_lower: float | None = None
    p_upper: float | None = None
    fp_model: str = "real"

    def __post_init__(self) -> None:
        super().__post_init__()
        from robustrl.certify.methods import method_for

        check_choice("scope", self.scope, SCOPES)
        method = method_for(self.method, self.scope)
        object.__setattr__(self, "alpha", method.check_alpha(self.alpha))
        if self.noise is not None and not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a Noise or None, got {type(self.noise).__name__}")
        check_choice("norm", self.norm, (0, 1, 2, math.inf))
        check_choice("fp_model", self.fp_model, ("real", "exact"))
        if type(self.prediction) is not int or self.prediction < ABSTAIN:
            raise ValueError(f"prediction must be a class >= 0, or {ABSTAIN} for none, got {self.prediction!r}")
        for name in ("radius", "p_lower", "p_upper"):
            value = getattr(self, name)
            if value is not None or name == "radius":
                object.__setattr__(self, name, check_real(name, value))
        if self.radius < 0 or (self.abstained and self.radius > 0):
            raise ValueError(f"radius must be >= 0, and 0 when abstaining, got {self.radius}")
        object.__setattr__(self, "evidence", plain_data("evidence", self.evidence))

    def __repr__(self) -> str:
        what = "abstains" if self.abstained else f"class {self.prediction}, l{self.norm:g} radius {self.radius:.6g}"
        return f"<{type(self).__name__}: {what}, {self.method}, confidence {100 * (1 - self.alpha):.10g}%>"

    @property
    def abstained(self) -> bool:
        """Whether no statement is made."""
        return self.prediction == ABSTAIN

    def verify(self) -> None:
        """Recompute prediction and radius from the evidence.

        Raises:
            CertificateError: naming the first field that differs from the recomputation.
        """
        from robustrl.certify.methods import METHODS, exclusions

        try:
            fresh = METHODS[self.method].verdict(self.evidence, self.noise, self.alpha, self.norm)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CertificateError(f"the certificate cannot be recomputed from its evidence: {error!r}") from None
        if self.prediction != fresh.prediction:
            raise CertificateError(f"field 'prediction' is {self.prediction}; recomputed: {fresh.prediction}")
        for name in ("radius", "p_lower", "p_upper"):
            stated, recomputed = getattr(self, name), getattr(fresh, name)
            # Other builds of the special functions differ in the last digits.
            if (stated is None) != (recomputed is None) or (
                stated is not None and not math.isclose(stated, recomputed, rel_tol=SAME, abs_tol=0.0)
            ):
                raise CertificateError(f"field {name!r} is {stated}; recomputed from the evidence: {recomputed}")
        omitted = [sentence for sentence in exclusions(self) if sentence not in self.not_covered]
        if omitted:
            raise CertificateError(f"field 'not_covered' leaves out: {omitted[0]}")
        expected = "real" if self.noise is None else self.noise.fp_model
        method = METHODS[self.method]
        if self.fp_model != expected and (method.real or not method.exact):
            what = self.method if self.noise is None else self.noise
            raise CertificateError(f"field 'fp_model' is {self.fp_model!r}, but {what} is {expected!r}")

    def with_exclusions(self, sentences: tuple[str, ...]) -> Self:
        """A copy that lists what it does not cover."""
        return replace(self, not_covered=sentences)

    def table(self) -> str:
        """The certificate as plain text."""
        what = ("prediction", "none (abstains)" if self.abstained else str(self.prediction))
        if self.scope == "trajectory":
            bounded = "of the whole episode" if self.evidence.get("budget") == "episode" else "of every step's frame"
            what = ("steps", f"{self.prediction}; the radius is that {bounded}")
        rows = [
            what,
            (f"l{self.norm:g} radius", f"{self.radius:.6g}"),
            ("method", f"{self.method}, {'no noise' if self.noise is None else self.noise.scale}"),
            ("confidence", "certain" if self.alpha == 0 else f"{100 * (1 - self.alpha):.10g}%"),
            ("about", {"input": "this input", "step": "this step", "trajectory": "every step"}.get(self.scope, self.scope)),
        ]
        if self.p_lower is not None:
            rows.append(("probability", f"at least {self.p_lower:.6g}"))
        if self.p_upper is not None:
            rows.append(("of any other", f"at most {self.p_upper:.6g}"))
        return "\n".join(f"{name:<14}{value}" for name, value in rows)

    def _specific(self) -> dict[str, Any]:
        return {
            "noise": None if self.noise is None else plain_data("noise", self.noise.to_dict()),
            "prediction": self.prediction,
            "radius": self.radius,
            "norm": "inf" if self.norm == math.inf else float(self.norm),
            "scope": self.scope,
            "method": self.method,
            "evidence": self.evidence,
            "p_lower": self.p_lower,
            "p_upper": self.p_upper,
            "fp_model": self.fp_model,
        }

    @classmethod
    def _from_specific(cls, fields: Fields, common: dict[str, Any]) -> Self:
        none = type(None)
        norm = fields.take("norm", float, str)
        if isinstance(norm, str) and norm != "inf":
            raise fields.error("norm", f"must be a number or 'inf', got {norm!r}")
        certificate = dict(
            common,
            noise=fields.noise("noise", missing=True),
            prediction=fields.take("prediction", int),
            radius=fields.take("radius", float),
            norm=float(norm),
            scope=cast(Scope, fields.take("scope", str)),
            method=fields.take("method", str),
            evidence=fields.take("evidence", dict),
            p_lower=fields.take("p_lower", float, none),
            p_upper=fields.take("p_upper", float, none),
            fp_model=fields.take("fp_model", str),
        )
        fields.finish()
        return cls(**certificate)
