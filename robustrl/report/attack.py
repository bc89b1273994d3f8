"""What an attack achieved, beside what was certified."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from robustrl.errors import CertificateViolationError, check_alpha, check_finite_array, check_real
from robustrl.files import write_atomically

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class AttackReport:
    """Returns of a policy under attack; an estimate of the attack's strength, not a guarantee about other attacks.

    Attributes:
        attack: the attack's name and parameters.
        threat: the threat model (`ThreatModel.to_dict`).
        clean: returns of as many episodes without an attack, on the same seeds, shape (n,).
        returns: returns under attack, shape (n,).
        spent: episode budget used, in the threat's norm, shape (n,).
        upper: upper confidence bound of `mean`; inf if no `return_high` is known.
        alpha: its failure probability.
        certified: certified lower bound at this budget, or None without a certificate.
        success_at: where given, `mean`, `clean_mean`, `upper` and `certified` are not about the return itself but about the
            probability of a return of at least this.
        label: name of the attack in tables and figures; default its class, or the objective of a `GradientAttack`.
    """

    attack: dict[str, Any]
    threat: dict[str, Any]
    clean: NDArray[np.float64]
    returns: NDArray[np.float64]
    spent: NDArray[np.float64]
    upper: float
    alpha: float
    certified: float | None = None
    success_at: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.certified is not None and self.upper < self.certified:
            raise CertificateViolationError(
                f"the attack {self.name} with budget {self.budget:g} got the {self.statistic} down to {self.mean:.6g} "
                f"(upper confidence bound {self.upper:.6g}), below the certified {self.certified:.6g}: the certificate, the attack's "
                "accounting or the environment's wrapper order is wrong"
            )

    def __repr__(self) -> str:
        return f"<AttackReport: {self.name}, budget {self.budget:g}, {self.clean_mean:.4g} -> {self.mean:.4g}, n = {len(self.returns)}>"

    @property
    def name(self) -> str:
        """The attack's name in tables and figures: its label, its class, or the objective of a `GradientAttack`."""
        if self.label is not None:
            return self.label
        kind, objective = self.attack["kind"], self.attack.get("objective")
        if kind == "GradientAttack" and isinstance(objective, dict):
            return str(objective.get("kind", kind))
        return str(kind)

    @property
    def budget(self) -> float:
        """Episode budget, or the per-step radius where there is none."""
        return float(self.threat["episode"] if self.threat["episode"] is not None else self.threat["step"])

    @property
    def margin(self) -> float:
        """Half the width of a 95 % interval of `mean` (Student's, over episodes); no guarantee, other than `upper`."""
        n = len(self.returns)
        return math.inf if n < 2 else float(stdtrit(n - 1, 0.975) * np.std(self._outcomes(self.returns), ddof=1) / math.sqrt(n))

    @property
    def statistic(self) -> str:
        """What `mean` is, in words."""
        return "mean return" if self.success_at is None else f"probability of a return of at least {self.success_at:g}"

    @property
    def mean(self) -> float:
        """Mean return (or share of successes) under attack."""
        return float(self._outcomes(self.returns).mean())

    @property
    def clean_mean(self) -> float:
        """Mean return (or share of successes) without attack."""
        return float(self._outcomes(self.clean).mean())

    def _outcomes(self, returns: NDArray[np.float64]) -> NDArray[Any]:
        return returns if self.success_at is None else returns >= self.success_at

    def table(self) -> str:
        """One line per fact, as plain text."""
        return attack_table([self])

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return {
            "attack": self.attack,
            "threat": self.threat,
            "clean": self.clean.tolist(),
            "returns": self.returns.tolist(),
            "spent": self.spent.tolist(),
            "upper": None if math.isinf(self.upper) else self.upper,
            "alpha": self.alpha,
            "certified": self.certified,
            "success_at": self.success_at,
        } | ({} if self.label is None else {"label": self.label})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttackReport:
        """Rebuild a report.

        Raises:
            ValueError: if fields are missing or not numbers.
            CertificateViolationError: if its attack undercuts its certificate.
        """
        try:
            arrays: dict[str, Any] = {
                name: check_finite_array(name, data[name], ndim=1) for name in ("clean", "returns", "spent")
            }
            upper = math.inf if data["upper"] is None else check_real("upper", data["upper"])
            certified = None if data["certified"] is None else check_real("certified", data["certified"])
            success_at = None if data.get("success_at") is None else check_real("success_at", data["success_at"])
            alpha, attack, threat = check_alpha(data["alpha"]), dict(data["attack"]), dict(data["threat"])
            attack["kind"], threat["episode"], threat["step"]  # what tables and figures read
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an attack report: {error}") from None
        label = None if data.get("label") is None else str(data["label"])
        facts: dict[str, Any] = {"alpha": alpha, "certified": certified, "success_at": success_at, "label": label}
        return cls(attack=attack, threat=threat, upper=upper, **facts, **arrays)


def attack_table(reports: list[AttackReport]) -> str:
    """A plain-text table, one row per report."""
    lines = [f"{reports[0].statistic}"] if reports and reports[0].success_at is not None else []
    width = max([14, *(len(r.name) for r in reports)]) + 2
    lines.append(
        f"{'attack':<{width}}{'budget':>8}{'episodes':>10}{'clean':>10}{'attacked':>10}{'+-':>9}{'upper':>10}{'certified':>11}{'spent':>8}"
    )
    for r in reports:
        digits = 2 if r.success_at is None else 4
        certified = "-" if r.certified is None else f"{r.certified:.{digits}f}"
        lines.append(
            f"{r.name:<{width}}{r.budget:>8g}{len(r.returns):>10}{r.clean_mean:>10.{digits}f}{r.mean:>10.{digits}f}"
            f"{r.margin:>9.{digits}f}{r.upper:>10.{digits}f}{certified:>11}{r.spent.mean():>8.3f}"
        )
    level = 100 * (1 - reports[0].alpha) if reports else 95
    what = "attacked mean" if not reports or reports[0].success_at is None else "attacked probability"
    lines.append(
        f"+-: 95% interval over episodes; upper: {level:g}% upper confidence bound of the {what}, each row on its own; an attack shows what "
        "is possible, not what is worst"
    )
    return "\n".join(lines)


def save_reports(path: str | os.PathLike[str], reports: list[AttackReport]) -> None:
    """Write reports as JSON, atomically."""
    write_atomically(path, json.dumps({"schema": SCHEMA, "reports": [r.to_dict() for r in reports]}, allow_nan=False).encode())


def load_reports(path: str | os.PathLike[str]) -> list[AttackReport]:
    """Read what `save_reports` wrote.

    Raises:
        ValueError: if it is not such a file.
    """
    try:
        data = json.loads(Path(path).read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        return [AttackReport.from_dict(item) for item in data["reports"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an attack report file ({error})") from None
