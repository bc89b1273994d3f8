"""Finite Markov decision processes that are known exactly: the oracle behind tabular attackers and safe exploration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csc_array, eye_array
from scipy.sparse.linalg import MatrixRankWarning, spsolve

from robustrl.errors import check_finite_array, check_probability, check_real
from robustrl.mdp.outcomes import Outcomes

if TYPE_CHECKING:
    from robustrl.mdp.unsafe import Unsafe

Floats = NDArray[np.float64]
ROUNDING = 1e-9
"""How far probabilities may be from summing to 1."""


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite MDP whose transitions are outcome slots: in state s, action a fires slot k with a known probability.

    Slots keep apart outcomes that lead to the same state with different rewards, and they make room for what is known about an
    outcome beside its probability.

    Args:
        successors: state that a slot leads to, int (S, A, K).
        probabilities: of the slots, (S, A, K); a slot that does not exist has probability 0.
        rewards: of the slots, (S, A, K).
        terminal: whether a slot ends the episode, bool (S, A, K); default none does.
        gamma: discount in (0, 1].
        start: probabilities of the first state, (S,); default state 0.

    Raises:
        ValueError: if shapes differ, probabilities do not sum to 1, or a number is out of range.

    Build one with `dense` or `from_gymnasium`.
    """

    successors: NDArray[np.int64]
    probabilities: Floats
    rewards: Floats
    terminal: NDArray[np.bool_] | None = None
    gamma: float = 0.99
    start: Floats | None = None

    def __post_init__(self) -> None:
        successors, probabilities = np.asarray(self.successors), check_probability("probabilities", self.probabilities)
        rewards = check_finite_array("rewards", self.rewards, ndim=3)
        terminal = np.zeros(successors.shape, dtype=bool) if self.terminal is None else np.asarray(self.terminal)
        shapes = {array.shape for array in (successors, probabilities, rewards, terminal)}
        if len(shapes) > 1:
            raise ValueError(
                f"successors, probabilities, rewards and terminal must have one shape (S, A, K), got {sorted(shapes)}"
            )
        n_states = rewards.shape[0]
        if successors.dtype.kind not in "iu" or successors.min() < 0 or successors.max() >= n_states:
            raise ValueError(f"successors must be states 0 to {n_states - 1}, got {successors.min()} to {successors.max()}")
        if terminal.dtype != bool:
            raise ValueError(f"terminal must be boolean, got {terminal.dtype}")
        _check_sums("probabilities of every state and action", probabilities)
        if not 0 < check_real("gamma", self.gamma) <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")
        start = np.eye(n_states)[0] if self.start is None else check_probability("start", self.start)
        if start.shape != (n_states,):
            raise ValueError(f"start must have shape ({n_states},), got {start.shape}")
        _check_sums("start", start)
        values = (successors.astype(np.int64), probabilities, rewards, terminal, float(self.gamma), start)
        for name, value in zip(("successors", "probabilities", "rewards", "terminal", "gamma", "start"), values, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def dense(cls, transitions: ArrayLike, rewards: ArrayLike, gamma: float = 0.99, start: Any = None) -> TabularMDP:
        """From transition probabilities (S, A, S) and rewards (S, A) or (S, A, S)."""
        probabilities = check_finite_array("transitions", transitions, ndim=3)
        n_states, n_actions = probabilities.shape[:2]
        if probabilities.shape[2] != n_states:
            raise ValueError(f"transitions must have shape (S, A, S), got {probabilities.shape}")
        paid = check_finite_array("rewards", rewards)
        if paid.shape not in ((n_states, n_actions), probabilities.shape):
            raise ValueError(f"rewards must have shape {(n_states, n_actions)} or {probabilities.shape}, got {paid.shape}")
        slots = np.broadcast_to(np.arange(n_states), probabilities.shape)
        each = np.broadcast_to(paid.reshape(n_states, n_actions, -1), probabilities.shape)
        return cls(slots, probabilities, each, gamma=gamma, start=start)

    @classmethod
    def from_gymnasium(cls, env: Any, gamma: float = 0.99) -> TabularMDP:
        """From an environment with a table `P`, as FrozenLake, CliffWalking and Taxi have; wrappers are looked through.

        Outcomes that cannot be told apart are merged.

        Raises:
            ValueError: if it has none.
        """
        inner = env.unwrapped
        if not hasattr(inner, "P"):
            raise ValueError(f"env must have a table P of transitions, {type(inner).__name__} has none")
        n_states, n_actions = len(inner.P), len(inner.P[0])
        size = max(len(outcomes) for actions in inner.P.values() for outcomes in actions.values())
        shape = (n_states, n_actions, size)
        successors, probabilities = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        rewards, terminal = np.zeros(shape), np.zeros(shape, dtype=bool)
        for s, actions in inner.P.items():
            for a, outcomes in actions.items():
                for k, (p, after, reward, ended) in enumerate(outcomes):
                    successors[s, a, k], probabilities[s, a, k] = after, p
                    rewards[s, a, k], terminal[s, a, k] = reward, ended
        start = getattr(inner, "initial_state_distrib", None)
        return cls(successors, probabilities, rewards, terminal, gamma, start).merged()

    def merged(self) -> TabularMDP:
        """The same MDP with one slot for equal successor, reward and termination, in the order of their first appearance."""
        n_pairs, n_slots = self.rewards[..., 0].size, self.rewards.shape[2]
        pair, slot = np.nonzero(self.probabilities.reshape(n_pairs, n_slots))
        tables = (self.successors, self.rewards, np.asarray(self.terminal), self.probabilities)
        to, paid, ended, p = (table.reshape(n_pairs, n_slots)[pair, slot] for table in tables)
        order = np.lexsort((slot, ended, paid, to, pair))
        new = np.ones(len(order), dtype=bool)
        new[1:] = np.any([np.diff(key[order]) != 0 for key in (pair, to, paid, ended.astype(int))], axis=0)
        groups = np.flatnonzero(new)
        total, first = np.add.reduceat(p[order], groups), order[groups]
        total, first = total[np.argsort(first)], np.sort(first)
        place = np.arange(len(first)) - np.searchsorted(pair[first], pair[first])
        packed = [np.zeros((n_pairs, place.max() + 1), dtype=table.dtype) for table in tables]
        for table, value in zip(packed, (to[first], paid[first], ended[first], total.clip(max=1.0)), strict=True):
            table[pair[first], place] = value
        successors, rewards, terminal, probabilities = (table.reshape(*self.rewards.shape[:2], -1) for table in packed)
        return TabularMDP(successors, probabilities, rewards, terminal, self.gamma, self.start)

    def outcomes(self, unsafe: Unsafe | None = None) -> Outcomes:
        """What may happen, without how likely it is; `unsafe` says what is dangerous, default nothing.

        States that are only entered at the end of an episode (and do not start one) own no pair.

        Raises:
            ValueError: if outcomes of a pair cannot be told apart (use `merged`), or gamma is 1.
        """
        fires, terminal = self.probabilities > 0, np.asarray(self.terminal)
        entered, ended = (
            np.bincount(self.successors[fires & which], minlength=self.n_states) > 0 for which in (~terminal, terminal)
        )
        fires &= (entered | ~ended | (np.asarray(self.start) > 0))[:, None, None]
        dangerous = fires & (False if unsafe is None else unsafe.mark(self))
        successors = self.successors.astype(np.int32)
        return Outcomes(successors, fires, self.rewards, dangerous, terminal, self.gamma, self.start)

    @cached_property
    def smallest_probability(self) -> float:
        """Smallest positive probability of an outcome that can be told apart from the others of its pair."""
        merged = self.merged().probabilities
        return float(merged[merged > 0].min())

    @property
    def n_states(self) -> int:
        """Number of states."""
        return int(self.rewards.shape[0])

    @property
    def n_actions(self) -> int:
        """Number of actions."""
        return int(self.rewards.shape[1])

    @cached_property
    def following(self) -> Floats:
        """Discounted probability that a slot fires and the episode goes on, (S, A, K)."""
        return self.gamma * np.where(np.asarray(self.terminal), 0.0, self.probabilities)

    @cached_property
    def mean_rewards(self) -> Floats:
        """Expected reward of a step, (S, A)."""
        found: Floats = (self.probabilities * self.rewards).sum(-1)
        return found

    def action_values(self, values: Floats) -> Floats:
        """E[reward + gamma V(next state)] of V (S,) or several, (S, n); (S, A) or (S, A, n)."""
        ahead: Floats = np.einsum("sak,sak...->sa...", self.following, values[self.successors])
        return ahead + self.mean_rewards.reshape(self.mean_rewards.shape + (1,) * (values.ndim - 1))

    def evaluate(self, policy: ArrayLike) -> Floats:
        """Exact values (S,) of a policy: probabilities (S, A), or an action per state (S,), by one sparse linear system.

        Raises:
            ValueError: if it is no policy, or gamma is 1 and an episode might never end.
        """
        chosen, n = self.policy(policy), self.n_states
        rewards = (chosen * self.mean_rewards).sum(1)
        rows = np.broadcast_to(np.arange(n)[:, None, None], self.rewards.shape)
        weights = chosen[:, :, None] * self.following
        follow = csc_array((weights.ravel(), (rows.ravel(), self.successors.ravel())), shape=(n, n))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MatrixRankWarning)
            values: Floats = np.asarray(spsolve(csc_array(eye_array(n)) - follow, rewards))
        if not np.abs(follow @ values + rewards - values).max() <= 1e-6 * (1 + np.abs(values).max()):  # NaN too
            raise ValueError("gamma must be < 1 for a policy under which an episode may never end, got 1")
        return values

    def policy(self, policy: ArrayLike) -> Floats:
        """A policy as probabilities (S, A), checked."""
        given = np.asarray(policy)
        if given.shape == (self.n_states,) and given.dtype.kind in "iu":
            if given.min() < 0 or given.max() >= self.n_actions:
                raise ValueError(f"policy must name actions 0 to {self.n_actions - 1}, got {given.min()} to {given.max()}")
            one_hot: Floats = np.eye(self.n_actions)[given]
            return one_hot
        chosen = check_probability("policy", given)
        if chosen.shape != (self.n_states, self.n_actions):
            raise ValueError(
                f"policy must have shape {(self.n_states, self.n_actions)} or ({self.n_states},), got {chosen.shape}"
            )
        _check_sums("policy", chosen)
        return chosen

    def solve(self) -> tuple[Floats, NDArray[np.int64]]:
        """Optimal values (S,) and an optimal action per state (S,), by policy iteration: exact up to rounding.

        Raises:
            ValueError: if gamma is 1: episodes under some policy might never end.
        """
        if self.gamma == 1:
            raise ValueError("gamma must be < 1 to solve an MDP, got 1")
        return improved(self.action_values, self.evaluate, np.zeros(self.n_states, dtype=np.int64))

    def value(self, values: Floats) -> float:
        """The value of the start: values (S,) under the distribution of first states."""
        return float(np.asarray(self.start) @ values)


def improved(
    look_ahead: Callable[[Floats], Floats], evaluate: Callable[[NDArray[np.int64]], Floats], choice: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.int64]]:
    """Policy iteration: values (S,) and choices (S,) that no single change improves by more than rounding.

    Args:
        look_ahead: from values (S,) to what every choice is worth, (S, choices); -inf for forbidden ones.
        evaluate: exact values of choices.
        choice: where to start.
    """
    while True:
        values = evaluate(choice)
        worth = look_ahead(values)
        best = worth.argmax(1)
        gain = worth.max(1) - np.take_along_axis(worth, choice[:, None], 1)[:, 0]
        better = gain > 1e-12 * max(1.0, float(np.abs(values).max()))
        if not better.any():
            return values, choice
        choice = np.where(better, best, choice)


def _check_sums(name: str, probabilities: Floats) -> None:
    sums = probabilities.sum(-1)
    if np.abs(sums - 1).max() > ROUNDING:
        raise ValueError(f"{name} must sum to 1, got {sums.flat[np.abs(sums - 1).argmax()]}")
