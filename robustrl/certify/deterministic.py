"""The artifact of a search: what no attacker can push the episodes of a deterministic policy below."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from robustrl.certify.certificate import Certificate, Floats
from robustrl.certify.explored import Accounting, Explored, Flags, decoded, encoded, worst_returns
from robustrl.certify.returns import certify_return
from robustrl.certify.storage import Fields, encode_floats
from robustrl.errors import CertificateError, check_alpha, check_choice, check_count, check_finite_array, check_real
from robustrl.files import save_figure
from robustrl.noise import Gaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("constancy", "prefix", "tree")
EXCLUSIONS = (
    "Changes to the environment's state, dynamics or rewards.",
    "Policies, settings and environments other than the one that was searched.",
    "Environments with random numbers that reset(seed=...) does not seed, or with state outside of their own objects, or (for trees) in "
    "objects that leave it out when they are pickled.",
    "Rounding in the environment, in what the attacker delivers, and of the network at other observations than those searched, where it "
    "is part of the margins.",
    "Attackers that rewrite old frames of the stack at every step, not each frame once when it arrives.",
    "That reward_low, return_low and never_ends_early are true, and constants that layers claim of themselves: they are their authors' word.",
    "Paths that no verification has walked again: a replay walks a sample of them.",
    "Other episodes than those played, in the mean of the bounds; the values with confidence are about all of them.",
    "Stopping, dropping or adding episodes after a look at their bounds.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeterministicCertificate(Certificate):
    """What no attacker within a budget can push the episodes of a deterministic policy below.

    The attacker may know everything, the environment's random numbers of all the episode included, and be adaptive. In every episode that
    was played the attacked return is at least `bounds`, for certain; with confidence 1 - alpha the expected return under attack, over the
    environment's randomness, is at least `values` at all budgets at once.

    Args:
        method: "constancy" (the clean return, unless any action can be changed), "prefix" (the rewards before the first action that can
            be changed) or "tree" (the worst of all sequences of actions that can be brought about).
        accounting: what an attacker pays.
        budgets: per step or per episode, in units of the frames, shape (K,).
        values: lower confidence bounds of the expected return under attack, (K,).
        mean_bound: mean of the bounds of the episodes played, (K,).
        horizon: most steps of an episode.
        reward_low: sure lower bound of the reward of a step.
        return_low: sure lower bound of the return.
        never_ends_early: whether every episode has `horizon` steps, whatever happens.
        evidence: what was searched.
    """

    method: str
    accounting: Accounting
    budgets: Floats
    values: Floats
    mean_bound: Floats
    horizon: int
    reward_low: float
    return_low: float
    never_ends_early: bool
    evidence: Explored

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        check_choice("method", self.method, METHODS)
        for name in ("budgets", "values", "mean_bound"):
            array = check_finite_array(name, getattr(self, name), ndim=1).copy()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            if array.shape != self.budgets.shape:
                raise ValueError(f"{name} must hold one number per budget, got {array}")
        if self.budgets.min() < 0:
            raise ValueError(f"budgets must be >= 0, got {self.budgets.min()}")
        check_count("horizon", self.horizon)
        for name in ("reward_low", "return_low"):
            object.__setattr__(self, name, check_real(name, getattr(self, name)))
        if type(self.never_ends_early) is not bool:
            raise TypeError(f"never_ends_early must be a bool, got {self.never_ends_early!r}")

    @classmethod
    def of(
        cls,
        evidence: Explored,
        *,
        method: str,
        accounting: Accounting,
        budgets: ArrayLike,
        alpha: float,
        horizon: int,
        reward_low: float,
        return_low: float,
        never_ends_early: bool,
        threat: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Self:
        """What the evidence proves.

        Raises:
            ValueError: if something is out of range, or the evidence makes no sense.
        """
        grid = np.atleast_1d(check_finite_array("budgets", budgets))
        settings: dict[str, Any] = {
            "method": method,
            "accounting": accounting,
            "budgets": grid,
            "alpha": alpha,
            "horizon": horizon,
            "reward_low": reward_low,
            "return_low": return_low,
            "never_ends_early": never_ends_early,
            "evidence": evidence,
            "not_covered": EXCLUSIONS,
        }
        unknown = np.zeros(grid.shape)
        bounds = cls(**settings, values=unknown, mean_bound=unknown).bounds
        values = _confident(bounds, grid, alpha, return_low)
        return cls(
            **settings,
            values=values,
            mean_bound=bounds.mean(0),
            threat=threat,
            provenance={} if provenance is None else provenance,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.method}, {self.accounting}, {self.confidence}, n = {self.n}>"

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.evidence.roots)

    @property
    def confidence(self) -> str:
        """The confidence level in per cent, in words."""
        return f"{100 * (1 - self.alpha):.10g}%"

    @cached_property
    def _worst(self) -> tuple[Floats, Floats]:
        rest = self.reward_low if self.never_ends_early else min(self.reward_low, 0.0)
        self.evidence.check(self.horizon, self.reward_low, self.never_ends_early)
        played, cut = worst_returns(self.evidence, self.accounting, self.budgets, self.horizon, rest)
        if played.min() < self.return_low:
            raise ValueError(f"return_low = {self.return_low:g} is no sure bound: an episode returned {played.min():g}")
        return played, cut

    @property
    def bounds(self) -> Floats:
        """Lower bound of the attacked return of every episode at every budget, (n, K)."""
        played, cut = self._worst
        if self.method == "constancy":
            found = np.where(cut < math.inf, self.return_low, played)
        else:
            found = np.minimum(played, cut)
        return np.maximum(found, self.return_low)

    @property
    def exhausted(self) -> Flags:
        """Whether no part of the episode that was left unsearched, within the budget, could hold anything worse, (n, K)."""
        played, cut = self._worst
        return played <= cut

    def value_at(self, budget: float) -> float:
        """Certified value for any budget: that of the smallest listed one which is no smaller; `return_low` beyond the list.

        Raises:
            ValueError: if `budget` is negative or NaN.
        """
        number = check_real("budget", budget, allowed="a number >= 0", infinite=True)
        if number < 0:
            raise ValueError(f"budget must be a number >= 0, got {budget}")
        covering = np.flatnonzero(self.budgets >= number)
        return self.return_low if covering.size == 0 else float(self.values[covering[np.argmin(self.budgets[covering])]])

    def verify(self) -> None:
        """Search the stored trees again for their worst paths; no policy and no environment is needed.

        Raises:
            CertificateError: naming the first field that differs from the recomputation.
        """
        try:
            bounds = self.bounds
            fresh = {"mean_bound": bounds.mean(0), "values": _confident(bounds, self.budgets, self.alpha, self.return_low)}
        except (TypeError, ValueError, OverflowError) as error:
            raise CertificateError(f"the certificate cannot be recomputed from its evidence: {error}") from None
        # return_low is anybody's word, and no scale: the lower it is, the less would be checked.
        scales = {
            "mean_bound": 1e-12 * max(1.0, np.abs(bounds).max()),
            "values": 1e-9 * np.maximum(1.0, np.abs(fresh["values"])),
        }
        for name, recomputed in fresh.items():
            stated = getattr(self, name)
            if np.any(np.abs(stated - recomputed) > scales[name]):
                raise CertificateError(f"field {name!r} is {stated}; recomputed from the evidence: {recomputed}")
        omitted = [sentence for sentence in EXCLUSIONS if sentence not in self.not_covered]
        if omitted:
            raise CertificateError(f"field 'not_covered' leaves out: {omitted[0]}")
        recipe = self.provenance.get("recipe")
        if isinstance(recipe, dict):
            accounting = self.accounting
            stated = {"frame_stack": accounting.frame_stack, "stack_padding": accounting.stack_padding, "noise": None}
            for name, value in (stated | {"max_episode_steps": self.horizon}).items():
                if recipe.get(name) != value:
                    raise CertificateError(f"{name} is {value!r}, but that of the recorded environment is {recipe.get(name)!r}")

    def table(self) -> str:
        """The curve as plain text."""
        nodes, shares = len(self.evidence.times), self.exhausted.mean(0)
        ends = "every episode has them all" if self.never_ends_early else "an episode may end before"
        lines = [
            f"Certified return under attack of a deterministic policy, {self.accounting}, method {self.method}",
            f"n = {self.n} episodes, {nodes} states searched; confidence {self.confidence}, all budgets at once",
            f"taken as sure: every step pays at least {self.reward_low:g}, at most {self.horizon} steps ({ends}), "
            f"every episode returns at least {self.return_low:g}",
            f"{'budget':>12}  {'certified':>12}  {'mean bound':>12}  {'exhausted':>12}",
        ]
        for budget, value, mean, share in zip(self.budgets, self.values, self.mean_bound, shares, strict=True):
            lines.append(f"{budget:>12.6g}  {value:>12.6g}  {mean:>12.6g}  {100 * share:>11.4g}%")
        if isinstance(trusted := self.provenance.get("trusted"), list) and trusted:
            lines.append(f"taken as sure: the Lipschitz constants that {', '.join(map(str, trusted))} claim")
        lines.append("mean bound: certain for the episodes played; exhausted: episodes searched to the end at that budget")
        return "\n".join(lines)

    def draw(self, ax: Axes) -> None:
        """Draw the curve into matplotlib axes: the values with confidence solid, the mean bound of the episodes played dashed."""
        order = np.argsort(self.budgets, kind="stable")
        label = f"certified ({self.confidence}, simultaneous, n = {self.n})"
        ax.plot(self.budgets[order], self.values[order], "o-", label=label)
        ax.plot(
            self.budgets[order], self.mean_bound[order], "--", color="grey", label="mean bound of the episodes played (certain)"
        )
        units = {"normalized": ", normalised units", "unit01": ", pixels in [0, 1]"}.get(str(self.provenance.get("units")), "")
        ax.set_xlabel(f"{self.accounting}{units}")
        ax.set_ylabel("return under attack")
        ax.set_title(", ".join(filter(None, (self.provenance.get("env"), f"deterministic, {self.method}"))))
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
        return {
            "method": self.method,
            "accounting": self.accounting.to_dict(),
            "budgets": encode_floats(self.budgets),
            "values": encode_floats(self.values),
            "mean_bound": encode_floats(self.mean_bound),
            "horizon": self.horizon,
            "reward_low": self.reward_low,
            "return_low": self.return_low,
            "never_ends_early": self.never_ends_early,
            "evidence": encoded(self.evidence),
        }

    @classmethod
    def _from_specific(cls, fields: Fields, common: dict[str, Any]) -> Self:
        certificate = dict(
            common,
            method=fields.take("method", str),
            accounting=Accounting.from_fields(fields.inner("accounting")),
            **{name: fields.floats(name) for name in ("budgets", "values", "mean_bound")},
            horizon=fields.take("horizon", int),
            **{name: fields.take(name, float) for name in ("reward_low", "return_low")},
            never_ends_early=fields.take("never_ends_early", bool),
            evidence=decoded(fields.inner("evidence")),
        )
        fields.finish()
        return cls(**certificate)


def _confident(bounds: Floats, budgets: Floats, alpha: float, return_low: float) -> Floats:
    """Lower confidence bounds of the expected bound of an episode, all budgets at once.

    Episodes are independent, and the bound of one is a function of its seed: its mean is bounded like that of any return, at alpha over
    the number of budgets. An attacker within a budget is within all larger ones: what holds there holds here.
    """
    distinct, place = np.unique(budgets, return_inverse=True)
    first = [int(np.flatnonzero(budgets == budget)[0]) for budget in distinct]
    clean = Gaussian(1.0)  # at budget 0 every mechanism leaves the law of the returns as it is
    share = alpha / len(distinct)
    found = [certify_return(bounds[:, k], clean, 0.0, alpha=share, return_low=return_low).values[0] for k in first]
    best: Floats = np.maximum.accumulate(np.array(found)[::-1])[::-1]
    return best[place]
