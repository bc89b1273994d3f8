"""What is known of a finite MDP before its first step: which outcomes an action may have, and what each would bring."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import check_finite_array, check_probability, check_real

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class ModelViolation(RuntimeError):
    """An environment did what its declared outcomes, smallest probability or analogies exclude."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """A finite MDP up to its transition probabilities: K outcome slots for every pair of state and action.

    Slots, not successors, are what is counted: two pairs are analogous when their slots fire with the same probabilities, wherever
    the slots lead. No two candidate slots of a pair may agree in successor, reward and termination, so that a step says which fired;
    rewards must differ in single precision, in which a VecEnv hands them out.

    Args:
        successors: state that a slot leads to, int (S, A, K).
        candidates: whether a slot may fire at all, bool (S, A, K); a pair without any does not exist.
        rewards: of the slots, (S, A, K).
        dangerous: whether a slot is unsafe, bool (S, A, K).
        terminal: whether a slot ends the episode, bool (S, A, K).
        gamma: discount in (0, 1).
        start: probabilities of the first state, (S,); default state 0.

    Raises:
        ValueError: if shapes differ, a number is out of range, or two candidate slots of a pair cannot be told apart.
    """

    successors: NDArray[np.int32]
    candidates: Flags
    rewards: Floats
    dangerous: Flags
    terminal: Flags
    gamma: float = 0.95
    start: Floats | None = None

    def __post_init__(self) -> None:
        rewards = check_finite_array("rewards", self.rewards, ndim=3)
        n_states = rewards.shape[0]
        successors = np.asarray(self.successors)
        if successors.shape != rewards.shape or successors.dtype.kind not in "iu":
            raise ValueError(f"successors must be integers of shape {rewards.shape}, got {successors.dtype} {successors.shape}")
        if successors.min() < 0 or successors.max() >= n_states:
            raise ValueError(f"successors must be states 0 to {n_states - 1}, got {successors.min()} to {successors.max()}")
        flags = {}
        for name in ("candidates", "dangerous", "terminal"):
            flags[name] = np.asarray(getattr(self, name))
            if flags[name].shape != rewards.shape or flags[name].dtype != bool:
                raise ValueError(
                    f"{name} must be boolean of shape {rewards.shape}, got {flags[name].dtype} {flags[name].shape}"
                )
        if not 0 < check_real("gamma", self.gamma) < 1:
            raise ValueError(f"gamma must be in (0, 1), got {self.gamma}")
        start = np.eye(n_states)[0] if self.start is None else check_probability("start", self.start)
        if start.shape != (n_states,) or abs(start.sum() - 1) > 1e-9:
            raise ValueError(
                f"start must be {n_states} probabilities that sum to 1, got shape {start.shape}, sum {start.sum()}"
            )
        values = {"successors": successors.astype(np.int32), "rewards": rewards, "gamma": float(self.gamma), "start": start}
        for name, value in {**values, **flags}.items():
            object.__setattr__(self, name, value)
        self._check_distinct()

    def _check_distinct(self) -> None:
        n_slots = self.n_slots
        # most worlds need no more than this: no two candidates of a pair share a successor
        led = np.sort(np.where(self.candidates, self.successors, -1 - np.arange(n_slots, dtype=np.int32)), -1)
        if not (led[..., 1:] == led[..., :-1]).any():
            return
        with np.errstate(over="ignore"):
            seen = self.rewards.astype(np.float32)
        for one in range(n_slots):
            for other in range(one + 1, n_slots):
                same = self.candidates[..., one] & self.candidates[..., other]
                for values in (self.successors, seen, self.terminal):
                    same &= values[..., one] == values[..., other]
                if same.any():
                    state, action = np.argwhere(same)[0]
                    raise ValueError(
                        f"candidate slots must differ in successor, reward (in single precision) or termination, slots {one} and "
                        f"{other} of state {state}, action {action} do not: merge them"
                    )

    @property
    def n_states(self) -> int:
        """Number of states, S."""
        return int(self.rewards.shape[0])

    @property
    def n_actions(self) -> int:
        """Number of actions, A."""
        return int(self.rewards.shape[1])

    @property
    def n_slots(self) -> int:
        """Number of outcome slots, K."""
        return int(self.rewards.shape[2])

    @cached_property
    def reward_scale(self) -> float:
        """The largest reward or penalty that a step may bring, 1 where there is none."""
        return float(np.abs(self.rewards[self.candidates]).max(initial=0.0)) or 1.0

    def paying(self, rewards: ArrayLike) -> Outcomes:
        """The same slots with other rewards (S, A, K), to plan with: they need not tell slots apart."""
        found = copy.copy(self)
        vars(found).pop("reward_scale", None)
        vars(found)["rewards"] = check_finite_array("rewards", rewards, ndim=3)
        if found.rewards.shape != self.rewards.shape:
            raise ValueError(f"rewards must have shape {self.rewards.shape}, got {found.rewards.shape}")
        return found

    @cached_property
    def valid(self) -> Flags:
        """The pairs that exist, (S, A)."""
        return np.asarray(self.candidates.any(-1))

    @cached_property
    def nodes(self) -> NDArray[np.int32]:
        """Where slots lead, (S, A, K): a state, S for a safe end of the episode, S + 1 for a dangerous one."""
        return np.where(self.terminal, self.n_states + self.dangerous.astype(np.int32), self.successors)

    @cached_property
    def nonterminal(self) -> Flags:
        """Pairs that an agent may come to take, (S, A): at states reached from the start by slots that do not end the episode."""
        reached, found = np.zeros(self.n_states, dtype=bool), np.flatnonzero(np.asarray(self.start) > 0)
        while found.size:
            reached[found] = True
            goes_on = self.candidates[found] & ~self.terminal[found]
            found = np.unique(self.successors[found][goes_on]).astype(np.int64)
            found = found[~reached[found]]
        acted: Flags = np.logical_and(self.valid, reached[:, None])
        return acted

    def slot(self, state: int, action: int, successor: int, reward: float, terminated: bool) -> int:
        """Which slot a step has shown; its reward may have been rounded to single precision on the way.

        Raises:
            ModelViolation: if no candidate slot has that outcome.
        """
        fits = self.candidates[state, action] & (self.successors[state, action] == successor)
        fits &= self.terminal[state, action] == terminated
        off = np.where(fits, np.abs(self.rewards[state, action] - reward), np.inf)
        found = int(off.argmin())
        if not off[found] <= 1e-6 * max(self.reward_scale, abs(reward)):
            raise ModelViolation(
                f"state {state}, action {action} led to state {successor} with reward {reward:g}, terminated={terminated}: "
                "no outcome that was declared possible"
            )
        return found

    def pairs(self, name: str, pairs: ArrayLike) -> Flags:
        """A set of pairs, bool (S, A), checked: only pairs that exist."""
        given = np.asarray(pairs)
        if given.shape != self.valid.shape or given.dtype != bool:
            raise ValueError(f"{name} must be boolean of shape {self.valid.shape}, got {given.dtype} {given.shape}")
        if (given & ~self.valid).any():
            state, action = np.argwhere(given & ~self.valid)[0]
            raise ValueError(f"{name} must hold pairs that exist, state {state} has no action {action}")
        return given

    def slots(self, name: str, slots: ArrayLike) -> Flags:
        """A set of slots, bool (S, A, K), checked: only candidates. Slots of pairs that do not exist are dropped."""
        given = np.asarray(slots)
        if given.shape != self.candidates.shape or given.dtype != bool:
            raise ValueError(f"{name} must be boolean of shape {self.candidates.shape}, got {given.dtype} {given.shape}")
        outside = given & ~self.candidates
        if (outside & self.valid[..., None]).any():
            state, action, slot = np.argwhere(outside & self.valid[..., None])[0]
            raise ValueError(f"{name} must hold candidate slots, slot {slot} of state {state}, action {action} is none")
        return given & ~outside if outside.any() else given
