"""What is dangerous in a finite MDP: a few words that users combine, turned into marks on outcome slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_real

if TYPE_CHECKING:
    from robustrl.mdp.model import TabularMDP
    from robustrl.mdp.outcomes import Outcomes

Flags = NDArray[np.bool_]
Predicate = Callable[[int, int, int, float, bool], bool]
"""Whether (state, action, successor, reward, terminal) is dangerous."""


@dataclass(frozen=True)
class Unsafe:
    """Which outcomes an agent must never have; build one with a class method, join several with `|`.

    A negative reward need not be a danger (each step of CliffWalking costs 1) and a danger need not end the episode (its cliff
    does not): hence a choice of descriptions rather than a convention.
    """

    tests: tuple[Callable[[TabularMDP | Outcomes], Flags], ...] = ()

    @classmethod
    def reward_below(cls, threshold: float) -> Unsafe:
        """Outcomes that pay less than `threshold`."""
        return cls((partial(_pays_less, check_real("threshold", threshold)),))

    @classmethod
    def pairs(cls, mask: ArrayLike) -> Unsafe:
        """Every outcome of these pairs, bool (S, A)."""
        return cls((partial(_of_pairs, _booleans(mask, ndim=2)),))

    @classmethod
    def states(cls, states: ArrayLike) -> Unsafe:
        """Entering these states: bool (S,), or a list of states."""
        given = np.asarray(states)
        if given.dtype != bool and (given.ndim != 1 or given.dtype.kind not in "iu" or not given.size or given.min() < 0):
            raise ValueError(f"states must be booleans (S,) or a list of states, got {states!r}")
        return cls((partial(_enters, given),))

    @classmethod
    def when(cls, predicate: Predicate) -> Unsafe:
        """Outcomes for which predicate(state, action, successor, reward, terminal) is true."""
        if not callable(predicate):
            raise TypeError(f"predicate must be callable, got {type(predicate).__name__}")
        return cls((partial(_satisfies, predicate),))

    def __or__(self, other: Unsafe) -> Unsafe:
        return Unsafe(self.tests + other.tests)

    def mark(self, mdp: TabularMDP | Outcomes) -> Flags:
        """The dangerous ones of the slots that may fire, bool (S, A, K).

        Raises:
            ValueError: if a mask does not fit the sizes of `mdp`.
        """
        found: Flags = reduce(np.logical_or, (test(mdp) for test in self.tests), np.zeros(mdp.rewards.shape, dtype=bool))
        return found & _may_fire(mdp)


def _may_fire(mdp: Any) -> Flags:
    found: Flags = mdp.candidates if hasattr(mdp, "candidates") else mdp.probabilities > 0
    return found


def _booleans(mask: ArrayLike, ndim: int) -> Flags:
    given = np.asarray(mask)
    if given.dtype != bool or given.ndim != ndim:
        raise ValueError(f"mask must be boolean with {ndim} dimension(s), got {given.dtype} of shape {given.shape}")
    return given


def _pays_less(threshold: float, mdp: TabularMDP | Outcomes) -> Flags:
    found: Flags = mdp.rewards < threshold
    return found


def _of_pairs(mask: Flags, mdp: TabularMDP | Outcomes) -> Flags:
    if mask.shape != mdp.rewards.shape[:2]:
        raise ValueError(f"mask must have shape {mdp.rewards.shape[:2]}, got {mask.shape}")
    found: Flags = np.broadcast_to(mask[..., None], mdp.rewards.shape)
    return found


def _enters(states: NDArray[Any], mdp: TabularMDP | Outcomes) -> Flags:
    if states.dtype == bool:
        if states.shape != (mdp.n_states,):
            raise ValueError(f"states must have shape ({mdp.n_states},), got {states.shape}")
        states = np.flatnonzero(states)
    elif states.max() >= mdp.n_states:
        raise ValueError(f"states must be at most {mdp.n_states - 1}, got {states.max()}")
    return np.isin(mdp.successors, states)


def _satisfies(predicate: Predicate, mdp: TabularMDP | Outcomes) -> Flags:
    found = np.zeros(mdp.rewards.shape, dtype=bool)
    for s, a, k in zip(*np.nonzero(_may_fire(mdp)), strict=True):
        found[s, a, k] = predicate(
            int(s), int(a), int(mdp.successors[s, a, k]), float(mdp.rewards[s, a, k]), bool(np.asarray(mdp.terminal)[s, a, k])
        )
    return found
