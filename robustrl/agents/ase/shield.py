"""A safe set as a shield: which actions another learner may choose from, also when somebody tampers with what it sees or does."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, eye_array, issparse

from robustrl.agents.ase.base import UnsafeStateError
from robustrl.errors import check_choice
from robustrl.mdp.outcomes import Flags, Outcomes
from robustrl.mdp.safe_sets import closed_subset


class SafeActionMask(gym.Wrapper[Any, Any, Any, Any]):
    """An environment in which only actions of a safe set are taken; sb3-contrib's MaskablePPO reads `action_masks()`.

    Args:
        env: with Discrete spaces.
        safe: pairs that may be taken, bool (S, A).
        outcomes: what pairs may lead to, also those outcomes that are assumed away for a first safe set, and
        support: the slots that may fire, bool (S, A, K): needed by `robust_mask` and `inflate_support` alone; default every candidate.
        on_unsafe: what `step` does with an action that is not safe: "raise", or "replace" it by the first one that is.

    Raises:
        ValueError: if the set does not fit the spaces.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        safe: Flags,
        *,
        outcomes: Outcomes | None = None,
        support: Flags | None = None,
        on_unsafe: str = "raise",
    ) -> None:
        super().__init__(env)
        self.safe: Flags = np.array(safe, dtype=bool)
        for name, space, size in zip(
            ("observation", "action"), (env.observation_space, env.action_space), self.safe.shape, strict=True
        ):
            if not isinstance(space, spaces.Discrete) or space.n != size:
                raise ValueError(f"env must have a Discrete({size}) {name} space for this safe set, got {space}")
        self.first_state, self.first_action = int(env.observation_space.start), int(env.action_space.start)  # type: ignore[attr-defined]
        self.outcomes, self.support = outcomes, support
        if outcomes is not None:
            self.support = outcomes.slots("support", outcomes.candidates if support is None else support)
        self.on_unsafe: str = check_choice("on_unsafe", on_unsafe, ("raise", "replace"))
        self._state: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._state = int(observation) - self.first_state
        return observation, info

    def action_masks(self) -> Flags:
        """The actions that are safe now, bool (A,).

        Raises:
            UnsafeStateError: if there is none.
            RuntimeError: before the first reset.
        """
        if self._state is None:
            raise RuntimeError("reset the environment first")
        mask: Flags = self.safe[self._state].copy()
        if not mask.any():
            raise UnsafeStateError(f"no action is proven safe in state {self._state + self.first_state}")
        return mask

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """A step; `info["shielded"]` says whether the action was replaced.

        Raises:
            ValueError: for an unsafe action, with `on_unsafe="raise"`; for one that does not exist, always.
        """
        mask = self.action_masks()
        if not self.action_space.contains(action):
            raise ValueError(f"action must be one of {self.action_space}, got {action!r}")
        shielded = not mask[int(action) - self.first_action]
        if shielded:
            if self.on_unsafe == "raise":
                raise ValueError(
                    f"action must be one of {(np.flatnonzero(mask) + self.first_action).tolist()} to be safe here, got {action}"
                )
            action = int(mask.argmax()) + self.first_action
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._state = int(observation) - self.first_state
        return observation, reward, terminated, truncated, {**info, "shielded": shielded}

    def robust_mask(self, hidden: Any) -> Flags:
        """Actions that are safe in whichever state an attacker of the observations is hiding: no danger is met, for ever.

        States that may look like others with which they share no safe action are avoided altogether, and so is what may lead there:
        all of them at a time, so it holds, but a larger one may exist.

        Args:
            hidden: bool (S, S), dense or a scipy sparse array: whether the first state, as seen, may hide the second. Every state
                may be itself.
        Returns:
            bool (S, A): for every state as seen; a row is empty where no state that may still be met can look like it.
        Raises:
            ValueError: if none was found that leaves something safe at every start.
        """
        outcomes, support = self._known()
        n_states = len(self.safe)
        given: Any = hidden if issparse(hidden) else np.asarray(hidden)
        if given.shape != (n_states, n_states) or given.dtype != bool:
            raise ValueError(f"hidden must be boolean of shape {(n_states, n_states)}, got {given.dtype} {given.shape}")
        seen_as = ((csr_array(given).astype(np.int32) + eye_array(n_states, dtype=np.int32, format="csr")) > 0).astype(np.int32)
        safe = self.safe
        while True:
            met = np.any(safe, axis=1)
            possible = seen_as @ met.astype(np.int32) > 0
            mask: Flags = (seen_as @ (met[:, None] & ~safe).astype(np.int32) == 0) & possible[:, None]
            helpless = possible & ~mask.any(1)
            if not helpless.any():
                return mask
            confused = seen_as.T @ helpless.astype(np.int32) > 0
            safe = closed_subset(outcomes, safe & ~confused[:, None], support)
            if not safe.any():
                raise ValueError("hidden must leave a safe action at every start, whatever it looks like; none was found")

    def inflate_support(self, extra: ArrayLike) -> SafeActionMask:
        """The shield for an attacker of actions, or a world that slips more: pairs may also fire `extra` slots, bool (S, A, K).

        Raises:
            ValueError: if nothing safe is left at a start, or `extra` holds slots that are no candidates of `outcomes`.
        """
        outcomes, support = self._known()
        more = outcomes.slots("extra", extra) | support
        kept = closed_subset(outcomes, self.safe, more)
        if not kept.any():
            raise ValueError("extra must leave a safe action at every start; it does not")
        return SafeActionMask(self.env, kept, outcomes=outcomes, support=more, on_unsafe=self.on_unsafe)

    def _known(self) -> tuple[Outcomes, Flags]:
        if self.outcomes is None or self.support is None:
            raise ValueError("outcomes must be given to make a shield robust: SafeActionMask(env, safe, outcomes=...)")
        return self.outcomes, self.support
