"""What to do next: go for the return, learn what would make a better way safe, or say that no safe way is left."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustrl.agents.ase.knowledge import Flags, Floats, Integers, Knowledge
from robustrl.mdp.planning import Beliefs, Plan, optimise
from robustrl.mdp.safe_sets import expand

Mode = Literal["goal", "explore", "stuck"]
TIE = 1e-9
"""Relative difference below which two actions are equally good."""
TOLERANCE = 1e-6
"""Of values, relative to the largest reward."""

STATE = ("safe", "goal", "targets", "policy", "wanted", "values", "_reached", "_helped")
"""What a planner remembers from one plan to the next."""


class Planner:
    """A set of pairs that is proven safe, and a policy inside it.

    `plan` brings both up to date with what is known. It first asks where the best policy that may exist, safe or not, would go.
    If that stays in the safe set, it is followed (mode "goal"). If not, the agent samples pairs in the safe set that behave like those
    at which it would leave it (mode "explore"). A way that cannot be learnt yet gives way to one that can; only when nothing at all
    can be learnt any more does the best policy inside the safe set remain, and if neither an end of the episode nor a reward can be
    reached there, the mode is "stuck".

    Args:
        knowledge: what is known; it changes between plans.
        safe_set: pairs that are safe to begin with, (S, A).
        directed: explore only towards the best policy, rather than everything at the border.

    Attributes:
        safe: proven safe pairs, (S, A).
        policy: the action of every state (S,); -1 outside the safe set.
        mode: see above.
        goal: pairs that the best policy that may exist visits, (S, A).
        targets: pairs to sample in mode "explore", (S, A).
        wanted: pools whose next stage decides the exploration.
        values: optimistic values (S,) of `goal`.

    Source: Roderick, Nagarajan, Kolter (AISTATS 2021), arXiv:2007.03574, with the changes that robustrl's documentation lists.
    """

    def __init__(self, knowledge: Knowledge, safe_set: Flags, directed: bool = True) -> None:
        self.knowledge, self.home, self.directed = knowledge, safe_set, directed
        self.scale = knowledge.outcomes.reward_scale
        self.mode: Mode = "explore"
        self.goal, self.targets = np.zeros_like(safe_set), np.zeros_like(safe_set)
        self.policy: Integers = np.full(len(safe_set), -1)
        self.wanted: Integers = np.zeros(0, dtype=np.int64)
        self.values: Floats | None = None
        self._warm: dict[str, Floats] = {}
        self._inward: tuple[Flags, Flags, Integers] | None = None
        self.n_plans = 0
        self.retract()

    def retract(self) -> None:
        """Believe only in the first safe set again."""
        self.safe = self.home.copy()
        self._n_known, self._depth = -1, 1
        self._reached = np.zeros_like(self.safe)
        self._helped = np.zeros(self.safe.size, dtype=bool)

    def pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything decided, as plain data and arrays."""
        arrays = {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}
        arrays |= {f"warm.{problem}": values for problem, values in self._warm.items()}
        if self._inward is not None:
            arrays |= {f"inward.{i}": array for i, array in enumerate(self._inward)}
        return {"mode": self.mode, "n_known": self._n_known, "depth": self._depth, "n_plans": self.n_plans}, arrays

    def unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """The inverse of `pack`."""
        self.mode, self._n_known, self._depth, self.n_plans = (plain[name] for name in ("mode", "n_known", "depth", "n_plans"))
        for name in STATE:
            setattr(self, name, arrays.get(name))
        self._warm = {name.removeprefix("warm."): array for name, array in arrays.items() if name.startswith("warm.")}
        if "inward.0" in arrays:
            self._inward = arrays["inward.0"], arrays["inward.1"], arrays["inward.2"]

    def expand(self) -> None:
        """Bring the safe set up to date, and what can be learnt inside it."""
        knowledge = self.knowledge
        n_known = int(knowledge.known.sum())
        if n_known == self._n_known:
            return
        self._n_known = n_known
        self.safe = expand(knowledge.outcomes, self.safe, knowledge.known_pairs, knowledge.possible)
        reached = self.safe & self._states_reached()[:, None]
        if (self._reached & ~reached).any():  # a pair of the first set turned out to lead nowhere
            self._helped[:] = False
            self._reached = np.zeros_like(reached)
        for pair in np.flatnonzero(reached & ~self._reached).tolist():
            self._helped[knowledge.analogy.feeds(pair)] = True
        self._reached = reached

    def _states_reached(self) -> Flags:
        """States that the safe set can be followed to from the start, (S,)."""
        outcomes = self.knowledge.outcomes
        support = self.knowledge.possible & self.safe[..., None] & ~outcomes.terminal
        reached, found = np.zeros(outcomes.n_states, dtype=bool), np.flatnonzero(np.asarray(outcomes.start) > 0)
        self._depth = 1
        while found.size:
            reached[found] = True
            found = np.unique(outcomes.successors[found][support[found]])
            found = found[~reached[found]]
            self._depth += 1
        return reached

    def plan(self) -> None:
        """Decide anew."""
        self.expand()
        knowledge = self.knowledge
        self.n_plans += 1
        known, possible = knowledge.known_pairs, knowledge.possible
        dangerous = known & (possible & knowledge.outcomes.dangerous).any(-1)
        allowed = self.safe | (knowledge.outcomes.valid & ~dangerous)
        outside = allowed & ~self.safe
        inside = np.any(self.safe, axis=1)
        edge = outside & inside[:, None]
        pool_of = knowledge.analogy.pool_of
        learnable = outside & ~known & (self._helped[pool_of] & ~knowledge.barred[knowledge.pool_of]).reshape(known.shape)
        beliefs = knowledge.beliefs()

        useful = self._useful(outside, learnable, known, possible)

        def targets(of: Flags) -> Flags:
            return self._targets(of, outside, learnable, known, possible)

        self.targets = np.zeros_like(edge)
        if not (edge & useful).any():  # nothing is left to learn
            best = self._best(beliefs, allowed & ~edge, "inside")
            self.mode = "goal" if self._worthwhile() else "stuck"
        else:
            best = self._best(beliefs, allowed, "all")
            self.mode = "explore" if (self.goal & ~self.safe).any() else "goal"
        if self.mode != "explore":
            inward = self.goal & self.safe
            if self._inward is None or (inward != self._inward[0]).any() or (self.safe != self._inward[1]).any():
                self._inward = inward, self.safe, self._steer(inward)
            self.policy = np.where(inward.any(1), best, self._inward[2])
            return
        self.targets = targets(self.goal & edge if self.directed else edge)
        if not self.targets.any():  # the best way out cannot be learnt now: try one that can be
            self._best(beliefs, allowed & ~(edge & ~useful), "learnable")
            self.targets = targets(self.goal & edge)
        if not self.targets.any():  # else learn anything: it may open the best way
            self.targets = targets(edge)
        self.policy = self._steer(self.targets)

    def _best(self, beliefs: Beliefs, allowed: Flags, problem: str) -> Integers:
        """The best policy that may exist among the allowed pairs (S,); sets `goal` to what it visits."""
        outcomes = beliefs.outcomes
        found = optimise(beliefs, allowed=allowed, initial=self._warm.get(problem), tolerance=TOLERANCE * self.scale)
        self._warm[problem] = self.values = found.values
        policy = self._choice(found, self.scale)
        law = found.kernel(policy) > 1e-12
        law &= ~outcomes.terminal[np.arange(len(policy)), policy]
        reached, states = np.zeros(outcomes.n_states, dtype=bool), np.flatnonzero(np.asarray(outcomes.start) > 0)
        while states.size:
            reached[states] = True
            acting = states[policy[states] >= 0]
            states = np.unique(outcomes.successors[acting, policy[acting]][law[acting]])
            states = states[~reached[states]]
        self.goal = np.zeros_like(allowed)
        visited = np.flatnonzero(reached & (policy >= 0))
        self.goal[visited, policy[visited]] = True
        return policy

    def _choice(self, found: Plan, scale: float) -> Integers:
        """The best actions (S,), for rewards up to `scale`; of equals one in the safe set, then the first; -1 where there is none."""
        worth = found.action_values
        most = worth.max(1)
        some = most > -np.inf
        close = worth >= np.where(some, most - TIE * np.maximum(scale, np.abs(most)), np.inf)[:, None]
        inside = np.any(close & self.safe, axis=1)
        preferred = np.where(inside[:, None], close & self.safe, close)
        return np.where(some, preferred.argmax(1), -1)

    def _steer(self, towards: Flags) -> Integers:
        """The policy inside the safe set that gets to pairs soonest (S,). Ends of episodes lead to the start again.

        Known laws are taken as they are counted: they have the true support, so whatever can be reached is reached in the end.
        """
        gamma = max(self.knowledge.outcomes.gamma, 1 - 1 / self._depth)
        found = optimise(
            self.knowledge.beliefs(certain=True, among=self.safe), allowed=self.safe, rewards=towards.astype(float), restart=True, gamma=gamma,
            initial=self._warm.get("steer"), tolerance=1e-4,
        )  # fmt: skip
        self._warm["steer"] = found.values
        return self._choice(found, 1.0)

    def _targets(self, edge: Flags, outside: Flags, learnable: Flags, known: Flags, possible: Flags) -> Flags:
        """Pairs in the safe set whose draws help to prove that an edge is safe, (S, A).

        An edge that is known already, but not its way back, is followed to the first pairs that are not.
        """
        outcomes, analogy = self.knowledge.outcomes, self.knowledge.analogy
        goes_on = possible & ~outcomes.terminal
        seen = front = edge
        while front.any():
            unknown = np.flatnonzero(front & learnable)
            if unknown.size:
                pools = np.unique(analogy.pool_of[unknown])
                found = np.zeros(edge.size, dtype=bool)
                for pool in pools.tolist():
                    found[analogy.members(pool)] = True
                self.wanted = self.knowledge.pool_of[unknown]
                return found.reshape(edge.shape) & self._reached
            through = front & known
            next_states = np.zeros(outcomes.n_states, dtype=bool)
            next_states[outcomes.successors[through][goes_on[through]]] = True
            front = outside & ~seen & next_states[:, None]
            seen = seen | front
        return np.zeros_like(edge)

    def _useful(self, outside: Flags, learnable: Flags, known: Flags, possible: Flags) -> Flags:
        """Pairs outside the safe set from which `_targets` finds something, (S, A)."""
        outcomes = self.knowledge.outcomes
        useful = learnable.copy()
        state, action = np.nonzero(outside & known)
        successors, goes_on = outcomes.successors[state, action], (possible & ~outcomes.terminal)[state, action]
        while True:
            leading = np.any(useful, axis=1)
            grown = (leading[successors] & goes_on).any(1) & ~useful[state, action]
            if not grown.any():
                return useful
            useful[state[grown], action[grown]] = True

    def _worthwhile(self) -> bool:
        """Whether a safe end of the episode, or a reward, can be reached in the safe set; or the world has no end to begin with."""
        outcomes = self.knowledge.outcomes
        ends = outcomes.terminal & ~outcomes.dangerous
        inside = self.knowledge.possible & self._reached[..., None]
        return bool((inside & (ends | (outcomes.rewards > 0))).any() or not (ends & outcomes.candidates).any())
