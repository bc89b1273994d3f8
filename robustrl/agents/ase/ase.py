"""ASE: learn to act well without ever leaving what is proven safe (Analogous Safe-state Exploration)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustrl.agents.ase.base import TabularAgent, UnsafeStateError
from robustrl.agents.ase.declaration import SafeSet
from robustrl.agents.ase.knowledge import Flags, Integers, Knowledge, Sharing
from robustrl.agents.ase.planner import TOLERANCE, Mode, Planner
from robustrl.agents.ase.shield import SafeActionMask
from robustrl.certify.safe_set import SafeSetCertificate
from robustrl.errors import check_alpha, check_choice, check_count, check_positive
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.planning import optimise
from robustrl.mdp.unsafe import Unsafe

EXPLORATIONS = ("directed", "undirected")


class SafeLearner(TabularAgent):
    """A learner that knows a first safe set and may prove a larger one: what ASE and the safe baselines share.

    The arguments are those of `ASE`.
    """

    settings: ClassVar[tuple[str, ...]] = ("delta", "sharing", "confidence", "beta", "n_support", "on_violation")
    needs_safe_set: ClassVar[bool] = True

    def __init__(
        self,
        env: Any,
        *,
        delta: float = 0.05,
        sharing: Sharing = "pool",
        confidence: str = "laplace",
        beta: float = 0.5,
        n_support: int | None = None,
        on_violation: str = "raise",
        **common: Any,
    ) -> None:
        super().__init__(env, **common)
        self.delta, self.sharing, self.confidence, self.beta = check_alpha(delta, "delta"), sharing, confidence, beta
        self.n_support, self.on_violation = n_support, on_violation
        tau, safe_set = self.declaration.tau, self.declaration.safe_set
        if tau is None:
            raise ValueError("tau must be given, a lower bound of every positive probability: the environment declares none")
        if safe_set is None and self.needs_safe_set:
            raise ValueError("safe_set must be given, pairs that are safe to begin with: the environment declares none")
        self.knowledge = Knowledge(
            self.outcomes, self.declaration.analogy, tau, self.delta / 2, self.delta / 2, sharing=sharing, confidence=confidence,
            beta=beta, n_support=n_support, on_violation=on_violation,
        )  # fmt: skip

    def _contradicted(self, why: str, declared: bool) -> None:
        self.knowledge.contradicted = True
        if self.on_violation == "raise" or not declared:
            super()._contradicted(why, declared)

    def _pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        found = self.knowledge
        names = ("visits", "counts", "totals", "transfer", "known", "barred", "support")
        return {"contradicted": found.contradicted}, {f"knowledge.{name}": getattr(found, name) for name in names}

    def _unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        for name in ("visits", "counts", "totals", "transfer", "known", "barred", "support"):
            if arrays[f"knowledge.{name}"].shape != getattr(self.knowledge, name).shape:
                raise ValueError(f"{name} has another shape than the declared outcomes")
            setattr(self.knowledge, name, arrays[f"knowledge.{name}"])
        self.knowledge.contradicted = plain["contradicted"]

    def _facts(self) -> dict[str, Any]:
        return {"safety/known_pools": int(self.knowledge.known.sum())}


class ASE(SafeLearner):
    """Analogous Safe-state Exploration: near-optimal among the policies that can be proven safe, and safe on the way.

    The agent acts inside a set of pairs of state and action which is closed, free of danger and from which it can always come home.
    The set starts as `safe_set` and grows when draws of analogous pairs inside it prove what pairs outside it may lead to.

    **Guarantee.** With probability at least 1 - delta / 2, for all time: no dangerous step is taken, and the first safe set or a
    safe end of the episode stays within reach - provided that
    A1: every step of a pair of `safe_set` leads to a state with a pair of it, or ends the episode without danger;
    A2: every positive probability of an outcome is at least `tau` (a `tau` larger than the truth voids the proof: it is the
    easiest way to fool oneself);
    A3: analogous pairs behave alike, within the stated l1 distances.
    `validate_safe_set`, `TabularMDP.smallest_probability` and `validate_analogy` check them where the truth is known.

    Args:
        env: one environment with Discrete spaces, or its id. What it declares (`outcomes`, `safe_set`, `analogy`, `tau`) is the
            default of what follows; environments with a table `P`, as FrozenLake, get their outcomes from it.
        safe_set: pairs that are safe to begin with: bool (S, A), a function (state, action) -> bool, or "from_P".
        unsafe: what is dangerous.
        analogy: which pairs behave alike; only those closer than 2 `tau` in l1 are used.
        tau: lower bound of every positive probability, or "from_P".
        delta: failure probability in (0, 0.5]; half is for the safe set, half for the values.
        gamma: discount in (0, 1).
        sharing: "pool" all draws of analogues, or use the "best" single analogue.
        confidence: l1 radius that planning is optimistic within: "laplace" holds at all times; "weissman" and "heuristic" prove
            nothing of values. Safety does not depend on it.
        exploration: "directed" towards the best policy that may exist, or "undirected".
        replan_every: plan at least that often, in steps; default when the draws of a visited pool have grown by half, or one
            that matters became known.
        on_violation: "raise" a ModelViolation when the environment contradicts the assumptions, or "retract" what rested on them:
            the agent goes on from `safe_set`. Either way nothing is certified any more, for good. An outcome that was not declared
            at all always raises.
        stop_on_gap: stop learning when the bounds of the return from the start are that close.
        beta: of the radius "heuristic".
        n_support: draws after which all outcomes of a pair are believed to have been seen; default as many as the proof needs.
            With fewer nothing is certified.
        common: `tensorboard_log`, `verbose`, `seed`, as in SB3.

    Attributes:
        unsafe_visits: dangerous steps so far.

    Examples:
        >>> import robustrl as rrl
        >>> agent = rrl.agents.ASE("robustrl/LavaIslands-v0", seed=0).learn(500)
        >>> agent.unsafe_visits
        0
    """

    settings = (*SafeLearner.settings, "exploration", "replan_every", "stop_on_gap")

    def __init__(
        self,
        env: Any,
        *,
        safe_set: SafeSet | None = None,
        unsafe: Unsafe | None = None,
        analogy: Analogy | None = None,
        tau: float | str | None = None,
        delta: float = 0.05,
        gamma: float | None = None,
        sharing: Sharing = "pool",
        confidence: str = "laplace",
        exploration: str = "directed",
        replan_every: int | None = None,
        on_violation: str = "raise",
        stop_on_gap: float | None = None,
        beta: float = 0.5,
        n_support: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(
            env, safe_set=safe_set, unsafe=unsafe, analogy=analogy, tau=tau, delta=delta, gamma=gamma, sharing=sharing,
            confidence=confidence, beta=beta, n_support=n_support, on_violation=on_violation, **common,
        )  # fmt: skip
        self.exploration = check_choice("exploration", exploration, EXPLORATIONS)
        self.replan_every = None if replan_every is None else check_count("replan_every", replan_every)
        self.stop_on_gap = None if stop_on_gap is None else check_positive("stop_on_gap", stop_on_gap)
        assert self.declaration.safe_set is not None
        self.planner = Planner(self.knowledge, self.declaration.safe_set, self.exploration == "directed")
        self._due = np.zeros(self.outcomes.valid.size, dtype=np.int64)
        self._planned_at = -1
        self._stale, self._n_barred = True, 0
        self._gap: float | None = None
        self._before = np.full(self.outcomes.n_states, -1)
        self._greedy: Integers | None = None

    @property
    def safe_set(self) -> Flags:
        """Pairs that are proven safe, bool (S, A)."""
        return self.planner.safe

    @property
    def mode(self) -> Mode:
        """ "goal", "explore", or "stuck": no safe policy reaches the goal and nothing is left to learn."""
        if self._stale:
            self._plan()
        return self.planner.mode

    @property
    def certified(self) -> bool:
        return self.knowledge.proven

    @property
    def finished(self) -> bool:
        return self.stop_on_gap is not None and self._gap is not None and self._gap <= self.stop_on_gap

    def safe_actions(self, state: int) -> Flags:
        mask: Flags = self.planner.safe[state]
        return mask

    def _act(self, state: int) -> int:
        if self._stale:
            self._plan()
        action = int(self.planner.policy[state])
        if action < 0 and self.on_violation == "retract":  # the set has shrunk around the agent
            action = int(self._before[state])
        if action < 0:
            raise UnsafeStateError(f"no action is proven safe in state {state}")
        return action

    def _observe(self, state: int, action: int, slot: int, successor: int, ended: bool) -> None:
        knowledge, planner = self.knowledge, self.planner
        learnt = knowledge.record(state, action, slot)
        if self.on_violation == "retract" and int(knowledge.barred.sum()) != self._n_barred:
            self._retract()
        if learnt.size:
            self._greedy = None
        pool = knowledge.pool_of[state * self.outcomes.n_actions + action]
        self._stale = (
            self._stale
            or bool(knowledge.totals[pool] >= self._due[pool])
            or (learnt.size > 0 and bool(np.isin(planner.wanted, learnt).any() or (learnt == pool).any()))
            or (self.replan_every is not None and self.num_timesteps - self._planned_at >= self.replan_every)
        )

    def _plan(self) -> None:
        before = self.planner.mode
        self.planner.plan()
        self._due = self.knowledge.next_look()
        self._planned_at, self._stale = self.num_timesteps, False
        self._gap = self._greedy = None
        if self.stop_on_gap is not None and self.planner.mode != "explore":
            self._value_gap()
        if self.planner.mode == "stuck" and before != "stuck" and self.verbose:
            print("No safe policy reaches the goal: nothing is left to learn inside the safe set.")

    def _value_gap(self) -> float | None:
        """How far the bounds of the return were apart when it was first asked for after a plan; None without bounds."""
        if self._gap is None and self.certified and self.knowledge.confidence == "laplace":
            self._gap = self.certificate().value_gap
        return self._gap

    def _retract(self) -> None:
        """What rested on a contradicted claim is no longer believed; outside the smaller set the old actions are all there is."""
        self._n_barred = int(self.knowledge.barred.sum())
        self._before = np.where(self.planner.policy < 0, self._before, self.planner.policy)
        self.planner.retract()
        self._stale = True

    def greedy(self) -> Integers:
        """The policy (S,) to use what was learnt with: the one in the safe set with the largest return that is proven."""
        if self._stale:
            self._plan()
        if self._greedy is None:
            self.planner.expand()
            found = optimise(
                self.knowledge.beliefs(), allowed=self.planner.safe, optimistic=False, tolerance=TOLERANCE * self.planner.scale
            )
            self._greedy = found.policy
        return self._greedy

    def acting(self) -> Integers:
        return self.greedy() if self.mode == "explore" else self.planner.policy

    def certificate(self) -> SafeSetCertificate:
        """What is proven now: the safe set, and bounds of the return of the policy that `predict` follows."""
        knowledge, policy = self.knowledge, self.greedy()  # may plan anew
        return SafeSetCertificate.of(
            knowledge.evidence(self.planner.home, policy),
            delta_s=knowledge.delta_s,
            delta_p=knowledge.delta_p,
            tau=knowledge.tau,
            n_support=knowledge.n_support,
            n_pools=knowledge.n_pools,
            values=knowledge.confidence == "laplace",
            contradicted=knowledge.contradicted,
            provenance={"agent": type(self).__name__, "num_timesteps": self.num_timesteps, "sharing": knowledge.sharing},
        )

    def shield(self, env: Any) -> SafeActionMask:
        """The safe set as action masks for another learner in `env`.

        Raises:
            ValueError: if that is another environment than the agent's.
        """
        self.declaration.check(env)
        return SafeActionMask(env, self.planner.safe, outcomes=self.declaration.declared, support=self.knowledge.possible)

    def _facts(self) -> dict[str, Any]:
        gap = self._value_gap()
        return {
            **super()._facts(),
            "safety/safe_pairs": int(self.planner.safe.sum()),
            "safety/mode": self.planner.mode,
            "train/n_replans": self.planner.n_plans,
            **({} if gap is None else {"train/value_gap": gap}),
        }

    def _pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        plain, arrays = super()._pack()
        planned, learnt = self.planner.pack()
        plain = {**plain, "planner": planned, "planned_at": self._planned_at, "stale": self._stale, "gap": self._gap}
        return plain, {
            **arrays,
            **{f"planner.{name}": array for name, array in learnt.items()},
            "due": self._due,
            "before": self._before,
            **({} if self._greedy is None else {"greedy": self._greedy}),
        }

    def _unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        super()._unpack(plain, arrays)
        prefix = "planner."
        learnt = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        self.planner.unpack(plain["planner"], learnt)
        self._due, self._before, self._greedy = arrays["due"], arrays["before"], arrays.get("greedy")
        self._planned_at, self._stale = plain["planned_at"], plain["stale"]
        self._gap, self._n_barred = plain["gap"], int(self.knowledge.barred.sum())


class UndirectedASE(ASE):
    """ASE that explores everything at the border of the safe set whenever the best way leaves it."""

    def __init__(self, env: Any, *, exploration: str = "undirected", **rest: Any) -> None:
        super().__init__(env, exploration=exploration, **rest)
