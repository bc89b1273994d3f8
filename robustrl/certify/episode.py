"""The artifact of a whole episode: a lower bound on return, success or quantile as a function of the budget."""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from robustrl.certify.certificate import Certificate, Floats
from robustrl.certify.storage import Fields, encode_floats, encode_returns, plain_data
from robustrl.errors import CertificateError, check_alpha, check_choice, check_count, check_real
from robustrl.files import save_figure
from robustrl.noise import Noise
from robustrl.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Statistic = Literal["mean", "success", "quantile"]


def standard_exclusions(noise: Noise, *, pointwise: bool = False, anytime: bool = False) -> tuple[str, ...]:
    """What an episode certificate does not cover, in sentences."""
    sentences = [
        "Attackers who see the noise of the current step before they act.",
        "Changes to the environment's state, dynamics or rewards.",
        "Policies, settings and environments other than the one that was rolled out.",
        "A choice among several certificates: the best of several seeds, checkpoints or noise levels.",
        "Floating point: noise and proof are those of real arithmetic.",
    ]
    looked = "Dropping episodes or choosing n_planned" if anytime else "Stopping, dropping or adding episodes"
    sentences.append(f"{looked} after a look at their returns.")
    if pointwise:
        sentences.append("Several budgets at once: every row holds with the stated confidence on its own.")
    return (*sentences, *(f"{caveat[0].upper()}{caveat[1:]}." for caveat in noise.caveats))


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeCertificate(Certificate):
    """What no attacker within an episode budget can push a policy below.

    Args:
        noise: the mechanism whose proof is used.
        statistic: "mean" return, probability of "success", or "quantile" of the return.
        budgets: episode budgets in the norm of the mechanism, shape (K,).
        values: certified values, shape (K,); NaN where a quantile has no certificate.
        plug_in: the same without any confidence, shape (K,): an estimate.
        method: how the clean law was bounded.
        simultaneous: True if the confidence covers all budgets at once.
        n: number of episodes.
        evidence: returns in run order, shape (n,), or the number of successes.
        quantile: level of the quantile, else None.
        return_low: sure lower bound of the return, or None.
        return_high: sure upper bound of the return, or None.
        n_planned: largest number of episodes of an anytime-valid run, or None.
    """

    noise: Noise
    statistic: Statistic
    budgets: Floats
    values: Floats
    plug_in: Floats
    method: str
    simultaneous: bool
    n: int
    evidence: Floats | int
    quantile: float | None = None
    return_low: float | None = None
    return_high: float | None = None
    n_planned: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        if not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a Noise, got {type(self.noise).__name__}")
        check_choice("statistic", self.statistic, ("mean", "success", "quantile"))
        for name in ("budgets", "values", "plug_in"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            empty = np.isnan(array) & (self.statistic != "quantile" or name == "budgets")
            infinite = np.isinf(array) & (name != "budgets")
            if (
                array.ndim != 1
                or array.shape != self.budgets.shape
                or array.size == 0
                or np.any(empty | infinite | (array == -math.inf))
            ):
                raise ValueError(f"{name} must hold one finite number per budget, got {array}")
        if np.any(self.budgets < 0):
            raise ValueError(f"budgets must be >= 0, got {self.budgets}")
        if type(self.simultaneous) is not bool:
            raise TypeError(f"simultaneous must be a bool, got {self.simultaneous!r}")
        check_count("n", self.n)
        if (self.quantile is not None) != (self.statistic == "quantile"):
            raise ValueError(f"quantile must be given for the statistic 'quantile' alone, got {self.quantile}")
        for name in ("quantile", "return_low", "return_high"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_real(name, getattr(self, name)))
        if self.statistic == "success":
            object.__setattr__(self, "evidence", check_count("evidence", self.evidence, least=0))
        else:
            evidence = np.array(self.evidence, dtype=np.float64)
            evidence.flags.writeable = False
            object.__setattr__(self, "evidence", evidence)
            if evidence.shape != (self.n,) or not np.isfinite(evidence).all():
                raise ValueError(f"evidence must hold n = {self.n} finite returns, got shape {evidence.shape}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.estimand}, {self.noise.scale}, {self.confidence}, n = {self.n}>"

    @property
    def anytime(self) -> bool:
        """Whether the run could be stopped at will after a look at the returns."""
        return self.n_planned is not None

    @property
    def confidence(self) -> str:
        """The confidence level in per cent, in words."""
        return f"{100 * (1 - self.alpha):.10g}%"

    def value_at(self, budget: float) -> float:
        """Certified value for any budget: that of the smallest listed budget which is no smaller.

        Beyond the list it is `return_low` (0 for a success probability), NaN for a quantile.

        Raises:
            ValueError: if `budget` is negative or NaN.
        """
        budget = check_real("budget", budget, allowed="a number >= 0", infinite=True)
        if budget < 0:
            raise ValueError(f"budget must be a number >= 0, got {budget}")
        covering = np.flatnonzero(self.budgets >= budget)
        if covering.size == 0:
            return math.nan if self.return_low is None else self.return_low
        return float(self.values[covering[np.argmin(self.budgets[covering])]])

    def verify(self) -> None:
        """Recompute everything from the evidence; no policy and no environment is needed.

        Raises:
            CertificateError: naming the first field that differs from the recomputation.
        """
        from robustrl.certify import returns

        try:
            if self.statistic == "success":
                fresh = returns.certify_success(int(self.evidence), self.n, self.noise, self.budgets, alpha=self.alpha)
            elif self.statistic == "quantile":
                assert self.quantile is not None
                fresh = returns.certify_quantile(
                    self.evidence, self.quantile, self.noise, self.budgets, alpha=self.alpha, simultaneous=self.simultaneous
                )
            else:
                fresh = returns.certify_return(
                    self.evidence,
                    self.noise,
                    self.budgets,
                    alpha=self.alpha,
                    method=self.method,
                    return_low=self.return_low,
                    return_high=self.return_high,
                    simultaneous=self.simultaneous,
                    n_planned=self.n_planned,
                )
        except (TypeError, ValueError, OverflowError) as error:
            raise CertificateError(f"the certificate cannot be recomputed from its evidence: {error}") from None
        for name in ("method", "simultaneous", "n", "n_planned", "return_low", "return_high"):
            if getattr(self, name) != getattr(fresh, name):
                raise CertificateError(f"field {name!r} is {getattr(self, name)!r}; recomputed: {getattr(fresh, name)!r}")
        low = self.return_low or 0.0
        for name in ("plug_in", "values"):
            stated, recomputed = getattr(self, name), getattr(fresh, name)
            # Other builds of the special functions differ in the last digits of what is added to the lower bound; the
            # tolerance must not grow with the evidence, whose largest return may be far above what is certified.
            tolerance = 1e-9 * np.abs(recomputed - low) + 1e-13 * (abs(low) + 1)
            same = (np.abs(stated - recomputed) <= tolerance) | (np.isnan(stated) & np.isnan(recomputed))
            if not same.all():
                raise CertificateError(f"field {name!r} is {stated}; recomputed from the evidence: {recomputed}")
        omitted = [sentence for sentence in fresh.not_covered if sentence not in self.not_covered]
        if omitted:
            raise CertificateError(f"field 'not_covered' leaves out: {omitted[0]}")
        recipe = self.provenance.get("recipe")
        recipe_noise = recipe.get("noise") if isinstance(recipe, dict) else None
        if recipe_noise is not None and recipe_noise != plain_data("noise", self.noise.to_dict()):
            raise CertificateError(f"field 'noise' is {self.noise}, but the recorded environment adds {recipe_noise}")
        if self.threat is not None:
            self._verify_threat()

    def _verify_threat(self) -> None:
        """Convert the stated threat models again; their budgets must be the certificate's."""
        from robustrl.certify.returns import episode_budget

        assert self.threat is not None
        try:
            stated = self.threat.get("in_frame_units", self.threat["converted_from"])
            threats = [ThreatModel.from_dict(item) for item in stated]
            sizes = {name: self.threat[name] for name in ("horizon", "n_features")}
            budgets = np.array([episode_budget(self.noise, item, **sizes) for item in threats])
        except (KeyError, TypeError, ValueError) as error:
            raise CertificateError(f"field 'threat' cannot be converted into budgets: {error}") from None
        if budgets.shape != self.budgets.shape or not np.allclose(budgets, self.budgets, rtol=1e-12, atol=0):
            raise CertificateError(f"field 'threat' stands for the budgets {budgets}, not for {self.budgets}")

    @property
    def estimand(self) -> str:
        """What is bounded, in words."""
        threshold = self.provenance.get("success_at")
        success = "success probability" + ("" if threshold is None else f" (a return of at least {threshold})")
        names = {"mean": "mean return", "success": success, "quantile": f"{self.quantile}-quantile of the return"}
        return f"{names[self.statistic]} under attack"

    def table(self) -> str:
        """The curve as plain text."""
        scope = "all budgets at once" if self.simultaneous else "each budget on its own (pointwise)"
        stop = f", stopped at will before {self.n_planned}" if self.anytime else ""
        norm = f"l{self.noise.norm:g} budget"
        known = [
            f"{name} {value:g}"
            for name, value in (("at least", self.return_low), ("at most", self.return_high))
            if value is not None
        ]
        sure = [f"taken as sure: every episode returns {' and '.join(known)}"] if known and self.statistic == "mean" else []
        lines = [
            f"Certified {self.estimand}, {self.noise.scale}",
            f"confidence {self.confidence}, {scope}; n = {self.n} episodes{stop}; method {self.method}",
            *sure,
            f"{norm:>12}  {'certified':>12}  {'plug-in':>12}",
        ]
        for row in zip(self.budgets, self.values, self.plug_in, strict=True):
            budget, value, estimate = ("none" if math.isnan(x) else f"{x:.6g}" for x in row)
            lines.append(f"{budget:>12}  {value:>12}  {estimate:>12}")
        return "\n".join([*lines, "plug-in: an estimate without confidence, not a certificate"])

    def draw(self, ax: Axes) -> None:
        """Draw the curve into matplotlib axes: the certificate solid, the plug-in estimate dashed."""
        shown = np.flatnonzero(np.isfinite(self.budgets))
        shown = shown[np.argsort(self.budgets[shown], kind="stable")]
        scope = "simultaneous" if self.simultaneous else "pointwise"
        ax.plot(self.budgets[shown], self.values[shown], "o-", label=f"certified ({self.confidence}, {scope}, n = {self.n})")
        ax.plot(self.budgets[shown], self.plug_in[shown], "--", color="grey", label="plug-in (estimate)")
        units = {"normalized": ", normalised units", "unit01": ", pixels in [0, 1]"}.get(str(self.provenance.get("units")), "")
        ax.set_xlabel(f"episode budget (l{self.noise.norm:g}{units})")
        ax.set_ylabel("\n".join(textwrap.wrap(self.estimand, 40)))
        ax.set_title(", ".join(filter(None, (self.provenance.get("env"), self.noise.scale))))
        ax.legend()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the curve as .png, .pdf or .svg, atomically; needs no display.

        Raises:
            ValueError: for another suffix.
            OSError: if the file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        self.draw(figure.subplots())
        save_figure(figure, path)

    def _specific(self) -> dict[str, Any]:
        evidence = {"successes": self.evidence} if isinstance(self.evidence, int) else encode_returns(self.evidence)
        return {
            "noise": plain_data("noise", self.noise.to_dict()),
            "statistic": self.statistic,
            "budgets": encode_floats(self.budgets),
            "values": encode_floats(self.values),
            "plug_in": encode_floats(self.plug_in),
            "method": self.method,
            "simultaneous": self.simultaneous,
            "anytime": self.anytime,
            "n": self.n,
            "n_planned": self.n_planned,
            "evidence": evidence,
            "quantile": self.quantile,
            "return_low": self.return_low,
            "return_high": self.return_high,
        }

    @classmethod
    def _from_specific(cls, fields: Fields, common: dict[str, Any]) -> Self:
        none = type(None)
        statistic = fields.take("statistic", str)
        quantile = statistic == "quantile"
        certificate = dict(
            common,
            noise=fields.noise("noise"),
            statistic=statistic,
            budgets=fields.floats("budgets"),
            values=fields.floats("values", missing=quantile),
            plug_in=fields.floats("plug_in", missing=quantile),
            method=fields.take("method", str),
            simultaneous=fields.take("simultaneous", bool),
            n=fields.take("n", int),
            n_planned=fields.take("n_planned", int, none),
            quantile=fields.take("quantile", float, none),
            return_low=fields.take("return_low", float, none),
            return_high=fields.take("return_high", float, none),
        )
        if fields.take("anytime", bool) != (certificate["n_planned"] is not None):
            raise fields.error("anytime", "contradicts n_planned")
        certificate["evidence"] = fields.successes("evidence") if statistic == "success" else fields.returns("evidence")
        fields.finish()
        return cls(**certificate)
