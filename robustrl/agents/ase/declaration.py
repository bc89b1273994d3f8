"""What is known of an environment before the first step, from what it declares and what the caller says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from robustrl.errors import check_real
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.model import ROUNDING, TabularMDP
from robustrl.mdp.outcomes import Outcomes
from robustrl.mdp.safe_sets import closed_subset, validate_analogy, validate_safe_set
from robustrl.mdp.unsafe import Unsafe

Flags = NDArray[np.bool_]
SafeSet = Flags | Callable[[int, int], bool] | str
FROM_P = "from_P"
MOST_COMPARED = 20_000
"""Pairs of state and action up to which analogies are compared with the truth."""
TABLES = ("successors", "candidates", "rewards", "dangerous", "terminal", "start")
TRANSFORMERS = (gym.ActionWrapper, gym.ObservationWrapper, gym.RewardWrapper)


@dataclass(frozen=True, eq=False)
class Declaration:
    """Prior knowledge of a finite environment.

    Args:
        declared: what every pair of state and action may lead to.
        safe_set: pairs that are safe to begin with, bool (S, A), or None if nobody knows any.
        analogy: which pairs behave alike.
        tau: a lower bound of every positive probability, or None.
        mdp: the truth, where it is known; only checks and oracles look at it, no learner does.
        world: digests of what the environment says of itself, whatever was given instead.

    Attributes:
        outcomes: what is learnt with: `declared`, but pairs of `safe_set` stay in it.

    Raises:
        ValueError: if a pair of `safe_set`, or a start, cannot do so.
    """

    declared: Outcomes
    safe_set: Flags | None
    analogy: Analogy
    tau: float | None
    mdp: TabularMDP | None = None
    world: Mapping[str, str] = field(default_factory=dict)
    outcomes: Outcomes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcomes", self.declared if self.safe_set is None else cut(self.declared, self.safe_set))

    @classmethod
    def of(
        cls,
        env: Any,
        *,
        safe_set: SafeSet | None = None,
        unsafe: Unsafe | None = None,
        analogy: Analogy | None = None,
        tau: float | str | None = None,
        gamma: float | None = None,
    ) -> Declaration:
        """From an environment; whatever is given replaces what it declares. See `ASE`.

        Where the truth is known, a `safe_set` that leaks is shrunk, and a `tau` or an analogy (of at most `MOST_COMPARED` pairs) that is
        false is warned of.

        Raises:
            ValueError: if the environment neither declares outcomes nor has a table `P`, or something does not fit.
        """
        said = _Said.by(env, gamma)
        outcomes, mdp = said.outcomes, said.mdp
        if unsafe is not None:
            outcomes = dataclasses.replace(outcomes, dangerous=unsafe.mark(outcomes))
        if gamma is not None:
            outcomes = dataclasses.replace(outcomes, gamma=gamma)
        given = said.safe_set if safe_set is None else safe_set
        known = None if given is None else _safe_pairs(given, outcomes, mdp)
        alike = said.analogy if analogy is None else analogy
        if not isinstance(alike, Analogy | None):
            raise TypeError(f"analogy must be a robustrl Analogy, got {type(alike).__name__}")
        least = said.tau if tau is None else tau
        if isinstance(least, str):
            if least != FROM_P or mdp is None:
                raise ValueError(f"tau must be a number, or {FROM_P!r} for an environment with a table P, got {least!r}")
            least = mdp.smallest_probability
        if least is not None and not 0 < check_real("tau", least) <= 1:
            raise ValueError(f"tau must be in (0, 1], got {least}")
        found = cls(outcomes, known, (Analogy.none() if alike is None else alike).on(outcomes), least, mdp, said.digests())
        found._compare_with_truth()
        return found

    def check(self, env: Any) -> None:
        """Whether another environment is the one that this was said of, as far as both say what they are.

        Raises:
            ValueError: naming what differs, or if it neither declares outcomes nor has a table `P`.
        """
        theirs = _Said.by(env, self.declared.gamma).digests()
        other = [name for name, digest in self.world.items() if theirs.get(name, digest) != digest]
        if other:
            raise ValueError(f"env must be the environment that the agent was made for, it has other {', '.join(other)}")

    def _compare_with_truth(self) -> None:
        mdp, outcomes = self.mdp, self.outcomes
        if mdp is None or mdp.probabilities.shape != outcomes.candidates.shape:
            return
        p = mdp.probabilities[outcomes.nonterminal]
        least = float(p[p > 0].min(initial=1.0))
        if self.tau is not None and self.tau > least + ROUNDING:
            warnings.warn(
                f"tau = {self.tau:g} is false, some outcome has probability {least:g}: nothing is proven", stacklevel=4
            )
        if outcomes.valid.sum() > MOST_COMPARED:
            return
        claims = self.analogy if self.tau is None else self.analogy.usable(self.tau)
        found = validate_analogy(mdp, outcomes, claims)
        if not found.holds:
            warnings.warn(
                f"the analogy is false, (state, action) {found.pair} and {found.analogue} are {found.worst_excess:g} farther apart "
                "in l1 than it says: nothing is proven",
                stacklevel=4,
            )

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain data and arrays that `from_arrays` builds the same declaration from; the truth is left out."""
        plain: dict[str, Any] = {
            "tau": self.tau,
            "gamma": self.declared.gamma,
            "analogy": {"kind": type(self.analogy).__name__},
            "world": self.world,
        }
        arrays = {f"outcomes.{name}": np.asarray(getattr(self.declared, name)) for name in TABLES}
        if self.safe_set is not None:
            arrays["safe_set"] = self.safe_set
        for item in dataclasses.fields(self.analogy):
            value = getattr(self.analogy, item.name)
            if item.init and isinstance(value, np.ndarray):
                arrays[f"analogy.{item.name}"] = value
            elif item.init:
                plain["analogy"][item.name] = value
        return json.loads(json.dumps(plain)), arrays

    @classmethod
    def from_arrays(cls, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Declaration:
        """The inverse of `to_arrays`."""

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        outcomes = Outcomes(**part("outcomes."), gamma=plain["gamma"])
        described = dict(plain["analogy"])
        kind = described.pop("kind")
        kinds: list[type[Analogy]] = [Analogy, *Analogy.__subclasses__()]
        analogy = {known.__name__: known for known in kinds}[kind](**described, **part("analogy."))
        return cls(outcomes, arrays.get("safe_set"), analogy, plain["tau"], world=plain["world"])


@dataclass(frozen=True, eq=False)
class _Said:
    """What an environment says of itself."""

    outcomes: Outcomes
    mdp: TabularMDP | None
    safe_set: Any
    analogy: Any
    tau: Any

    @classmethod
    def by(cls, env: Any, gamma: float | None) -> _Said:
        between = env
        while isinstance(between, gym.Wrapper):
            if isinstance(between, TRANSFORMERS):
                warnings.warn(
                    f"env is looked through: what {type(between).__name__} changes of actions, observations or rewards is not part "
                    "of what the environment declares",
                    stacklevel=4,
                )
            between = between.env
        inner = getattr(env, "unwrapped", env)
        outcomes: Outcomes | None = getattr(inner, "outcomes", None)
        mdp: TabularMDP | None = getattr(inner, "mdp", None)
        if mdp is None and hasattr(inner, "P"):
            mdp = TabularMDP.from_gymnasium(inner, 0.95 if gamma is None else gamma)
        if outcomes is None:
            if mdp is None:
                raise ValueError(
                    f"env must declare its outcomes, or have a table P as FrozenLake has; {type(inner).__name__} does neither. "
                    "Write a robustrl.envs.grid.TabularEnv, or give your environment the attribute `outcomes`"
                )
            outcomes = mdp.outcomes()
        return cls(outcomes, mdp, *(getattr(inner, name, None) for name in ("safe_set", "analogy", "tau")))

    def digests(self) -> dict[str, str]:
        """One for each table, and for the law where it is known."""
        tables = {name: np.asarray(getattr(self.outcomes, name)) for name in TABLES}
        tables |= {} if self.mdp is None else {"probabilities": self.mdp.probabilities}
        tables |= {} if self.tau is None else {"tau": np.asarray(self.tau)}
        return {name: digest(table) for name, table in tables.items()}


def digest(table: NDArray[Any]) -> str:
    """A fingerprint of an array: its type, shape and entries."""
    return hashlib.sha256(f"{table.dtype.str}{table.shape}".encode() + np.ascontiguousarray(table).tobytes()).hexdigest()


def cut(outcomes: Outcomes, safe: Flags) -> Outcomes:
    """Outcomes under the assumption that a safe set is closed: its pairs lead back into it, or end the episode safely.

    Raises:
        ValueError: if a pair of the set, or a start, could not do so.
    """
    inside = np.any(safe, axis=1)
    stays = np.where(outcomes.terminal, True, inside[outcomes.successors]) & ~outcomes.dangerous
    candidates = outcomes.candidates & (stays | ~safe[..., None])
    stranded = safe & ~candidates.any(-1)
    if stranded.any():
        state, action = np.argwhere(stranded)[0]
        raise ValueError(f"safe_set must be closed, but state {state}, action {action} always leaves it")
    away = np.flatnonzero((np.asarray(outcomes.start) > 0) & ~inside)
    if away.size:
        raise ValueError(f"safe_set must have a pair at every start, state {away[0]} has none")
    return dataclasses.replace(outcomes, candidates=candidates)


def _safe_pairs(given: Any, outcomes: Outcomes, mdp: TabularMDP | None) -> Flags:
    """A safe set (S, A), checked against the truth where that is known."""
    if isinstance(given, str):
        if given != FROM_P or mdp is None:
            raise ValueError(f"safe_set must be pairs, or {FROM_P!r} for an environment with a table P, got {given!r}")
        found = closed_subset(outcomes, outcomes.valid, outcomes.candidates & (mdp.probabilities > 0))
        if not found.any():
            raise ValueError("safe_set cannot be made from P: no closed set of safe pairs holds the start")
        return found
    if callable(given):
        mask = np.zeros(outcomes.valid.shape, dtype=bool)
        for s, a in np.argwhere(outcomes.valid):
            mask[s, a] = given(int(s), int(a))
        given = mask
    pairs = outcomes.pairs("safe_set", given)
    if mdp is None or mdp.probabilities.shape != outcomes.candidates.shape:
        return pairs
    return validate_safe_set(mdp, outcomes, pairs)


__all__ = ["FROM_P", "Declaration", "SafeSet", "cut", "digest"]
