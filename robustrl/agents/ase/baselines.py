"""What ASE is compared with: optimistic and greedy learners, on the same counts and analogies, with and without a safe set."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustrl.agents.ase.ase import SafeLearner
from robustrl.agents.ase.base import TabularAgent, UnsafeStateError
from robustrl.agents.ase.knowledge import Flags, Floats, Integers
from robustrl.agents.ase.planner import TOLERANCE
from robustrl.errors import check_positive, check_real
from robustrl.mdp.planning import Beliefs, optimise
from robustrl.mdp.safe_sets import expand


class _Planning(SafeLearner):
    """Follows the best policy under what it believes; safe ones inside what they happen to have proven.

    Args:
        env, delta, sharing, ...: as in `ASE`.
        penalty: reward of a dangerous step as the learner sees it; default the environment's.
    """

    settings: ClassVar[tuple[str, ...]] = (*SafeLearner.settings, "penalty")
    needs_safe_set: ClassVar[bool] = False

    def __init__(self, env: Any, *, penalty: float | None = None, **rest: Any) -> None:
        super().__init__(env, **rest)
        self.penalty = None if penalty is None else check_real("penalty", penalty)
        if self.penalty is not None:
            paid = np.where(self.outcomes.dangerous, self.penalty, self.outcomes.rewards)
            self.knowledge.outcomes = self.outcomes.paying(paid)
        safe = self.declaration.safe_set
        self._safe: Flags | None = safe.copy() if self.needs_safe_set and safe is not None else None
        self._due: Integers = np.zeros(self.outcomes.valid.size, dtype=np.int64)
        self._policy: Integers = np.full(self.outcomes.n_states, -1)
        self._values: Floats = np.zeros(self.outcomes.n_states)
        self._stale = True
        self.n_plans = 0

    @property
    def safe_set(self) -> Flags:
        """Pairs that the learner allows itself, (S, A)."""
        return self.outcomes.valid if self._safe is None else self._safe

    @property
    def certified(self) -> bool:
        return self._safe is not None and self.knowledge.proven

    def safe_actions(self, state: int) -> Flags:
        mask: Flags = self.safe_set[state]
        return mask

    @abstractmethod
    def _beliefs(self) -> Beliefs:
        """What to plan with."""

    def _act(self, state: int) -> int:
        action = int(self.greedy()[state])
        if action < 0:
            raise UnsafeStateError(f"no action is proven safe in state {state}")
        return action

    def _observe(self, state: int, action: int, slot: int, successor: int, ended: bool) -> None:
        learnt = self.knowledge.record(state, action, slot)
        pool = self.knowledge.pool_of[state * self.outcomes.n_actions + action]
        self._stale = self._stale or bool(self.knowledge.totals[pool] >= self._due[pool]) or bool((learnt == pool).any())

    def greedy(self) -> Integers:
        if self._stale:
            knowledge = self.knowledge
            if self._safe is not None:
                self._safe = expand(self.outcomes, self._safe, knowledge.known_pairs, knowledge.possible)
            found = optimise(self._beliefs(), allowed=self.safe_set, initial=self._values, tolerance=TOLERANCE * self._scale)
            self._policy, self._values = found.policy, found.values
            self._due = knowledge.next_look()
            self._stale, self.n_plans = False, self.n_plans + 1
        return self._policy

    def _facts(self) -> dict[str, Any]:
        shared = {**super()._facts(), "train/n_replans": self.n_plans}
        return shared if self._safe is None else {**shared, "safety/safe_pairs": int(self._safe.sum())}

    def _pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        plain, arrays = super()._pack()
        more = {"safe": self.safe_set, "due": self._due, "policy": self._policy, "values": self._values}
        return {**plain, "stale": self._stale, "n_plans": self.n_plans}, {**arrays, **more}

    def _unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        super()._unpack(plain, arrays)
        self._safe = None if self._safe is None else arrays["safe"]
        self._due, self._policy, self._values = arrays["due"], arrays["policy"], arrays["values"]
        self._stale, self.n_plans = plain["stale"], plain["n_plans"]


class RMax(_Planning):
    """R-max: anything may happen to a pair until it is known, then what was counted (Brafman and Tennenholtz, 2002)."""

    def _beliefs(self) -> Beliefs:
        found = self.knowledge.beliefs(certain=True)
        radii = np.where(self.knowledge.known_pairs | (found.radii == 0), 0.0, 2.0)
        return dataclasses.replace(found, radii=radii)


class SafeRMax(RMax):
    """R-max inside a proven safe set, which grows with what it happens to learn."""

    needs_safe_set = True


class MBIE(_Planning):
    """Model-based interval estimation: the best law within the l1 radius of what was counted (Strehl and Littman, 2008)."""

    def _beliefs(self) -> Beliefs:
        return self.knowledge.beliefs()


class _EpsilonGreedy(TabularAgent):
    """Now and then a random action.

    Args:
        exploration_fraction: part of `learn`'s steps over which epsilon falls linearly.
        exploration_initial_eps, exploration_final_eps: from where to where, as in SB3's DQN.
    """

    epsilons: ClassVar[tuple[str, ...]] = ("exploration_fraction", "exploration_initial_eps", "exploration_final_eps")

    def __init__(
        self,
        env: Any,
        *,
        exploration_fraction: float = 0.25,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.1,
        **rest: Any,
    ) -> None:
        super().__init__(env, **rest)
        self.exploration_fraction = _fraction("exploration_fraction", exploration_fraction)
        self.exploration_initial_eps = _fraction("exploration_initial_eps", exploration_initial_eps)
        self.exploration_final_eps = _fraction("exploration_final_eps", exploration_final_eps)

    @property
    def epsilon(self) -> float:
        """Probability of a random action now: falling linearly over the first part of `learn`."""
        spent = 1 - self._current_progress_remaining
        share = 1.0 if self.exploration_fraction == 0 else min(1.0, spent / self.exploration_fraction)
        return self.exploration_initial_eps + share * (self.exploration_final_eps - self.exploration_initial_eps)


class EpsilonGreedy(_EpsilonGreedy, _Planning):
    """The best action by what was counted, or, now and then, any one.

    Args:
        exploration_fraction, exploration_initial_eps, exploration_final_eps: as in SB3's DQN; the rest as in `ASE`.
    """

    settings = (*_Planning.settings, *_EpsilonGreedy.epsilons)

    def _act(self, state: int) -> int:
        best = super()._act(state)
        if self._rng.random() < self.epsilon:
            return int(self._rng.choice(np.flatnonzero(self.safe_set[state])))
        return best

    def _beliefs(self) -> Beliefs:
        found = self.knowledge.beliefs(certain=True)
        tried = found.estimates.any(-1)
        return dataclasses.replace(found, radii=np.where(tried, 0.0, 2.0))


class SafeEpsilonGreedy(EpsilonGreedy):
    """The same inside a proven safe set, which grows with what it happens to learn."""

    needs_safe_set = True


class QLearning(_EpsilonGreedy):
    """Watkins' Q-learning: no model, no safe set, no analogies.

    Args:
        env, gamma, ...: as in `TabularAgent`.
        decay: the learning rate of a pair's n-th draw is n ** -decay, in (0.5, 1].
        exploration_fraction, exploration_initial_eps, exploration_final_eps: as in `EpsilonGreedy`.
    """

    settings = ("decay", *_EpsilonGreedy.epsilons)

    def __init__(self, env: Any, *, decay: float = 0.6, **rest: Any) -> None:
        super().__init__(env, **rest)
        self.decay = check_positive("decay", decay)
        if not 0.5 < self.decay <= 1:
            raise ValueError(f"decay must be in (0.5, 1], got {decay}")
        self.action_values = np.where(self.outcomes.valid, 0.0, -np.inf)
        self.visits = np.zeros(self.outcomes.valid.shape, dtype=np.int64)

    def greedy(self) -> Integers:
        return np.where(self.outcomes.valid.any(1), self.action_values.argmax(1), -1)

    def _act(self, state: int) -> int:
        if self._rng.random() < self.epsilon:
            return int(self._rng.choice(np.flatnonzero(self.outcomes.valid[state])))
        return int(self.action_values[state].argmax())

    def _observe(self, state: int, action: int, slot: int, successor: int, ended: bool) -> None:
        self.visits[state, action] += 1
        ahead = 0.0 if ended else float(self.action_values[successor].max())
        aim = float(self.outcomes.rewards[state, action, slot]) + self.outcomes.gamma * ahead
        self.action_values[state, action] += (aim - self.action_values[state, action]) / self.visits[
            state, action
        ] ** self.decay

    def _pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {}, {"action_values": self.action_values, "visits": self.visits}

    def _unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.action_values, self.visits = arrays["action_values"], arrays["visits"]


def _fraction(name: str, value: float) -> float:
    if not 0 <= check_real(name, value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)
