"""Small worlds in which exploring safely is hard, as environments, and what is true of them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from scipy.sparse import csr_array

from robustrl.mdp import Analogy, Outcomes, TabularMDP, closed_subset, expand, learnable_oracle


class World(gym.Env[int, int]):
    """A finite MDP that declares what it is. `mdp` is None for learners that should not see the truth; `truth` always is it."""

    def __init__(
        self, mdp: TabularMDP, outcomes: Outcomes, safe_set: np.ndarray, analogy: Analogy, tau: float, *, open_: bool = True
    ) -> None:
        self.truth, self.outcomes, self.safe_set, self.analogy, self.tau = mdp, outcomes, safe_set, analogy, tau
        self.mdp = mdp if open_ else None
        self.observation_space, self.action_space = spaces.Discrete(mdp.n_states), spaces.Discrete(mdp.n_actions)
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(self.truth.n_states, p=self.truth.start))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        p = self.truth.probabilities[self.state, action]
        at = self.state, int(action), int(self.np_random.choice(len(p), p=p))
        self.state = int(self.truth.successors[at])
        return self.state, float(self.truth.rewards[at]), bool(np.asarray(self.truth.terminal)[at]), False, {}

    def best(self, tau: float | None = None) -> float:
        """The optimal value among policies that stay in what can be learnt to be safe."""
        tau = self.tau if tau is None else tau
        inside = learnable_oracle(self.truth, self.outcomes, self.safe_set, self.analogy, tau)
        values = np.zeros(self.truth.n_states)
        for _ in range(5000):
            ahead = np.where(inside, self.truth.action_values(values), -np.inf)
            values = np.where(inside.any(1), ahead.max(1), 0)
        return self.truth.value(values)

    def value(self, policy: np.ndarray) -> float:
        """The exact value of a policy (S,); -1 counts as action 0, it must not be met."""
        return self.truth.value(self.truth.evaluate(np.maximum(policy, 0)))


def lies(world: World, pairs: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of a set that is said to be safe, and for which that is false: by looking at each, one after the other."""
    truth, known = world.truth, world.outcomes
    terminal = np.asarray(truth.terminal)
    owners = set(np.flatnonzero(pairs.any(1)).tolist())
    home = {int(s) for s in np.flatnonzero(world.safe_set.any(1))}
    back = set(home)
    while True:  # states that lead home, or to a safe end, inside the set
        more = set()
        for s, a in np.argwhere(pairs):
            for k in np.flatnonzero(truth.probabilities[s, a] > 0):
                if terminal[s, a, k] or int(truth.successors[s, a, k]) in back:
                    more.add(int(s))
        if more <= back:
            break
        back |= more
    found = []
    for s, a in np.argwhere(pairs & ~world.safe_set):
        fires = np.flatnonzero(truth.probabilities[s, a] > 0)
        leaves = [k for k in fires if not terminal[s, a, k] and int(truth.successors[s, a, k]) not in owners]
        if known.dangerous[s, a, fires].any() or leaves or int(s) not in back:
            found.append((int(s), int(a)))
    return found


def world(
    n_states: int,
    moves: dict[tuple[int, int], list[tuple[int, float, float, str]]],
    home: list[tuple[int, int]],
    alike: list[tuple[tuple[int, int], tuple[int, int]]],
    *,
    gamma: float = 0.9,
    tau: float = 0.3,
    l1: float = 0.0,
    open_: bool = True,
) -> World:
    """From (state, action) -> [(successor, probability, reward, "" or "end" or "lava")], state 0 being the start.

    Slots with probability 0 are candidates that never fire; "lava" ends the episode dangerously, "cliff" is dangerous and goes on.
    """
    n_actions, n_slots = 1 + max(a for _, a in moves), max(map(len, moves.values()))
    shape = (n_states, n_actions, n_slots)
    successors, p, rewards = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    candidates, dangerous, terminal = (np.zeros(shape, dtype=bool) for _ in range(3))
    p[..., 0] = 1
    for (s, a), slots in moves.items():
        p[s, a] = 0
        for k, (after, chance, reward, kind) in enumerate(slots):
            successors[s, a, k], p[s, a, k], rewards[s, a, k], candidates[s, a, k] = after, chance, reward, True
            dangerous[s, a, k], terminal[s, a, k] = kind in ("lava", "cliff"), kind in ("lava", "end")
    mdp = TabularMDP(successors, p, rewards, terminal, gamma)
    outcomes = Outcomes(successors.astype(np.int32), candidates, rewards, dangerous, terminal, gamma)
    safe_set = np.zeros(shape[:2], dtype=bool)
    safe_set[tuple(np.transpose(home))] = True
    ids = [(one[0] * n_actions + one[1], other[0] * n_actions + other[1]) for one, other in alike]
    rows, columns = (
        ([pair[0] for pair in ids] + [pair[1] for pair in ids]),
        ([pair[1] for pair in ids] + [pair[0] for pair in ids]),
    )
    size = n_states * n_actions
    analogy = (
        Analogy.sparse(csr_array((np.full(len(rows), l1), (rows, columns)), shape=(size, size))) if ids else Analogy.none()
    )
    return World(mdp, outcomes, safe_set, analogy, tau, open_=open_)


STAYS = {(0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")], (1, 0): [(0, 0.7, 0.0, ""), (1, 0.3, 0.0, "")]}
"""Two home states that one may walk between: each step succeeds with probability 0.7."""


def late_proof(second_best: float = 0.0) -> World:
    """The best way out (0, 1) can only be learnt at state 2, and nothing but curiosity, or a smaller prize, leads there."""
    moves = {
        **STAYS,
        (1, 1): [(0, 0.7, 0.0, ""), (1, 0.3, 0.0, "")],
        (0, 1): [(3, 0.7, 1.0, "end"), (0, 0.3, 0.0, "")],
        (0, 2): [(2, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
        (2, 0): [(0, 0.7, second_best, ""), (2, 0.3, 0.0, "")],
        (2, 1): [(2, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
    }
    alike = [((0, 2), (1, 1)), ((2, 0), (1, 0)), ((2, 1), (1, 0)), ((0, 1), (2, 1))]
    return world(4, moves, [(0, 0), (1, 0), (1, 1)], alike)


def proof_beyond_the_edge() -> World:
    """The edge (0, 1) is learnt by walking about; that what comes after it is safe must be learnt at (1, 1), on purpose."""
    moves = {
        **STAYS,
        (1, 1): [(0, 0.7, 0.0, ""), (1, 0.3, 0.0, "")],
        (0, 1): [(2, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
        (2, 0): [(3, 0.7, 1.0, "end"), (2, 0.3, 0.0, "")],
    }
    return world(4, moves, [(0, 0), (1, 0), (1, 1)], [((0, 1), (0, 0)), ((2, 0), (1, 1))])


def one_draw_per_episode() -> World:
    """What must be sampled is left behind for good: only the end of the episode leads back, and waiting costs nothing."""
    moves = {
        (0, 0): [(1, 0.7, 0.0, ""), (0, 0.3, 0.0, "")],
        (0, 1): [(3, 0.7, 1.0, "end"), (0, 0.3, 0.0, "")],
        (1, 0): [(2, 0.5, 0.0, ""), (1, 0.5, 0.0, "")],
        (2, 0): [(1, 0.5, 0.0, ""), (2, 0.5, 0.0, "")],
        (1, 1): [(3, 0.7, 0.0, "end"), (1, 0.3, 0.0, "")],
    }
    return world(4, moves, [(0, 0), (1, 0), (2, 0), (1, 1)], [((0, 1), (0, 0))])


def hidden_danger(tau: float = 0.1) -> World:
    """Both ways out fall into lava with probability `tau`; at home the same law is harmless."""
    law = [1 - tau, tau]
    moves = {
        (0, 0): [(1, law[0], 0.0, ""), (0, law[1], 0.0, "")],
        (1, 0): [(0, law[0], 0.0, ""), (1, law[1], 0.0, "")],
        (0, 1): [(2, law[0], 1.0, "end"), (3, law[1], -1.0, "lava")],
        (1, 1): [(2, law[0], 0.9, "end"), (3, law[1], -1.0, "lava")],
    }
    return world(4, moves, [(0, 0), (1, 0)], [((0, 1), (0, 0)), ((1, 1), (1, 0))], tau=tau)


def random_world(seed: int, n_states: int = 7) -> World:
    """Random steps under two laws, one that never slips into lava and one that does; pairs of one law are alike at random."""
    rng = np.random.default_rng(seed)
    lava, laws = n_states, ([0.7, 0.3, 0.0], [0.4, 0.3, 0.3])
    moves, risky = {}, {}
    for s in range(n_states):
        for a in range(2):
            risky[s, a] = bool(rng.random() < 0.2)
            law = laws[risky[s, a]]
            one, other = rng.choice(n_states, 2, replace=False)
            ends = rng.random() < 0.2
            prize = round(float(rng.random()), 3) if ends or rng.random() < 0.2 else 0.0
            moves[s, a] = [
                (int(one), law[0], prize, "end" if ends else ""),
                (int(other), law[1], 0.0, ""),
                (lava, law[2], -1.0, "lava"),
            ]
    for s in (0, 1):  # home
        risky[s, 0] = False
        moves[s, 0] = [(1 - s, 0.7, 0.0, ""), (s, 0.3, 0.0, ""), (lava, 0.0, -1.0, "lava")]
    pairs = list(moves)
    alike = [
        (x, y) for i, x in enumerate(pairs) for y in pairs[:i] if risky[x] == risky[y] and rng.random() < 0.5
    ]  # fmt: skip
    return world(n_states + 1, moves, [(0, 0), (1, 0)], alike, tau=0.3)


def truly_closed(found: World) -> np.ndarray:
    """The largest safe set of the truth, for comparison."""
    support = (found.truth.probabilities > 0) & found.outcomes.candidates
    start = closed_subset(found.outcomes, found.safe_set, support)
    return expand(found.outcomes, start, found.outcomes.valid, support)
