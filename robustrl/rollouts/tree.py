"""Search of everything that an attacker of observations can make a deterministic policy do, in copies of the environment."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustrl.certify.certificate import Floats
from robustrl.certify.explored import UNSEARCHED, Accounting, Explored
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.single import RewardProbe
from robustrl.policy import PolicyView, push_frame, start_stack
from robustrl.rollouts.chunk import inside
from robustrl.rollouts.snapshots import Snapshots

Costs = Callable[[torch.Tensor], Floats]
"""From observations (n, *shape) to what every action costs, (n, K)."""
BATCH = 64
"""Most actions that one episode looks at between two calls of the network."""
SIDE_BY_SIDE, MOST_SAVED = 16, 200_000
"""Most episodes that share a call of the network, and most states of theirs together that are kept to return to."""
WAYS_PER_STATE = 20
"""Ways to a state that are followed, on average, before a search is given up."""


class Search(NamedTuple):
    """What the searches of all episodes have in common.

    Attributes:
        recipe: environment, frame stack and horizon; its noise is left out.
        policy: who acts.
        costs: what actions cost, in `accounting.cost_norm`.
        accounting: what an attacker pays.
        budgets: (K,).
        rest: least reward of each step to come.
        reward_low: least reward of a step.
        nodes: most states of an episode, beside those of the clean one; 0 to follow that alone, without copies.
    """

    recipe: EnvRecipe
    policy: PolicyView
    costs: Costs
    accounting: Accounting
    budgets: Floats
    rest: float
    reward_low: float
    nodes: int

    @property
    def actions(self) -> list[Any]:
        """What the environment takes, by number."""
        numbers = torch.arange(self.policy.n_actions)
        return list(inside(self.policy.received(numbers), self.recipe))

    def judged(self, stacks: list[NDArray[Any]]) -> tuple[Floats, NDArray[np.int64]]:
        """Costs (n, K) of the actions on frame stacks, 0 for the greedy one, and the greedy actions (n,)."""
        frames = torch.from_numpy(np.concatenate(stacks)).float().to(self.policy.device)
        with torch.inference_mode():
            observations = self.policy.fold(frames)
            greedy = self.policy.actions(self.policy.scores(observations)).cpu().numpy()
        costs = self.costs(observations)
        costs[np.arange(len(costs)), greedy] = 0.0
        return costs, greedy


class _Label(NamedTuple):
    """One way to an action: what it has paid (that action included) and earned before. Sorted by what is to be looked at first."""

    level: int
    bound: float
    depth: int
    number: int
    edge: int
    spent: float
    earned: float


class Stepper:
    """One episode of an environment, and what the policy sees of it.

    Attributes:
        stack: the last frames, (1, k, *frame).
    """

    def __init__(self, search: Search, seed: int) -> None:
        recipe = self._recipe = search.recipe
        probes: list[RewardProbe] = []

        def probe(env: Any) -> RewardProbe:
            probes.append(RewardProbe(env))
            return probes[-1]

        env = recipe.base_env(inner=probe if recipe.wrappers else None, checked=False)
        self._env, self._probes = env, probes
        self._actions, self._reward_low = search.actions, search.reward_low
        frame = self._frame(env.reset(seed=seed)[0])
        for one in probes:
            one.take()
        self.stack = start_stack(frame, recipe.frame_stack, recipe.stack_padding)

    def step(self, action: int, time: int) -> tuple[float, bool]:
        """Reward, and whether the episode is over, `time` + 1 steps after its start."""
        frame, reward, terminated, truncated, _ = self._env.step(self._actions[action])
        reward = float(self._probes[0].take() if self._probes else reward)
        label = self._recipe.label
        if not np.isfinite(reward):
            raise ValueError(f"{label} returned rewards that are NaN or inf")
        if reward < self._reward_low:
            raise ValueError(f"reward_low = {self._reward_low:g} is no sure bound: {label} paid {reward:g} in a step")
        over = bool(terminated or truncated)
        if not over and time + 1 >= self._recipe.horizon:
            raise ValueError(f"{label}: an episode still runs after the horizon of {self._recipe.horizon} steps")
        self.stack = push_frame(self.stack, self._frame(frame))
        return reward, over

    def save(self, snapshots: Snapshots) -> bytes:
        """Everything that the rest of the episode depends on."""
        return snapshots.save((self._env, self._probes, self.stack))

    def restore(self, snapshots: Snapshots, state: bytes) -> None:
        """Go back to where it was saved."""
        self._env, self._probes, self.stack = snapshots.restore(state)

    @property
    def env(self) -> Any:
        """The environment itself, without wrappers."""
        return self._env.unwrapped

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _frame(self, observation: Any) -> NDArray[Any]:
        space = self._recipe.raw_space
        raw = np.asarray(observation).astype(space.dtype, copy=False)[None]
        frames = self._recipe.frames(raw)
        if raw.shape[1:] != space.shape or not np.isfinite(raw).all() or not np.isfinite(frames).all():
            raise ValueError(f"{self._recipe.label} returned an observation that is not finite, or not of shape {space.shape}")
        return frames


class Episode:
    """The search of one episode: all budgets at once, the smallest first.

    Of the ways that are within one budget, and not within a smaller one, that of the least sure return goes first: as soon as it is no less
    than what some way to an end within the budget has earned, nothing worse can be found there. Ways are joined where they lead to one state
    of environment, random numbers and frame stack.
    """

    def __init__(self, search: Search, seed: int) -> None:
        self._search, self.seed = search, seed
        self._stepper, self._snapshots = Stepper(search, seed), Snapshots()
        self.env = self._stepper.env
        self._limits = np.unique(search.accounting.limits(search.budgets))
        self._best = np.full(len(self._limits), np.inf)
        self._queue: list[_Label] = []
        self._labels = self._arrivals = 0
        self._states: dict[bytes, int] = {}
        self._saved: list[bytes] = []
        self._ways: list[list[tuple[float, float]]] = []
        self._edges_of: list[range] = []
        self.times: list[int] = []
        self.ended: list[bool] = []
        self.edges: list[tuple[int, int]] = []  # state, action
        self.children: list[int] = []
        self.rewards: list[float] = []
        self.edge_costs: list[float] = []
        self._charges: list[float] = []
        self._clean: list[bool] = []
        root = self._walked = self._state(0, over=False)
        self._fresh = [(root, self._stepper.stack)]
        self._ways[root].append((0.0, 0.0))
        self._waiting: list[tuple[int, float, float]] = [(root, 0.0, 0.0)]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to look at."""
        return not self._queue and not self._fresh

    def look(self) -> list[NDArray[Any]]:
        """Take the next steps; frame stacks of the states that are new."""
        if self._arrivals > WAYS_PER_STATE * max(self._search.nodes, self._search.recipe.horizon):
            self._queue.clear()
        level, taken = self._queue[0].level if self._queue else 0, 0
        while self._queue and self._queue[0].level == level and taken < BATCH:
            label = heapq.heappop(self._queue)
            if label.bound >= self._best[level]:
                continue
            child = self.children[label.edge]
            if child == UNSEARCHED:
                if not self._may_step(label.edge, level):
                    if level + 1 < len(self._limits):
                        heapq.heappush(self._queue, label._replace(level=level + 1))
                    continue
                child = self._step(label.edge)
                taken += 1
            self._arrive(child, label.spent, label.earned + self.rewards[label.edge])
        return [stack for _, stack in self._fresh]

    def judged(self, costs: Floats, greedy: NDArray[np.int64]) -> None:
        """What the actions cost in the states that `look` returned."""
        accounting = self._search.accounting
        for (state, _), row, chosen in zip(self._fresh, costs, greedy, strict=True):
            charges = accounting.charges(row, self.times[state])
            within = np.flatnonzero(charges <= self._limits[-1])
            start = len(self.edges)
            for action in within:
                self.edges.append((state, int(action)))
                self.children.append(UNSEARCHED)
                self.rewards.append(0.0)
                self.edge_costs.append(float(row[action]))
                self._charges.append(float(charges[action]))
                self._clean.append(action == chosen)
            self._edges_of[state] = range(start, len(self.edges))
        self._fresh = []
        for state, spent, earned in self._waiting:
            self._spread(state, spent, earned)
        self._waiting = []

    def explored(self) -> Explored:
        """What was seen; the environment is closed."""
        self._stepper.close()
        parents, actions = np.array(self.edges).T
        found = (self.times, self.ended, parents, actions, self.children, self.rewards, self.edge_costs)
        return Explored(np.array([self.seed]), np.array([0]), *map(np.array, found))

    def _may_step(self, edge: int, level: int) -> bool:
        """Whether there is room for a state more; every budget has a share of it, and what smaller ones leave.

        The clean episode always has room, so that no tree proves less than the prefix.
        """
        if self._clean[edge] and self.edges[edge][0] == self._walked:
            return True
        return len(self.times) * len(self._limits) < self._search.nodes * (level + 1)

    def _step(self, edge: int) -> int:
        state, action = self.edges[edge]
        if self._search.nodes:
            self._stepper.restore(self._snapshots, self._saved[state])
        self.rewards[edge], over = self._stepper.step(action, self.times[state])
        known = len(self.times)
        child = self.children[edge] = self._state(self.times[state] + 1, over)
        if self._clean[edge] and state == self._walked:
            self._walked = child
        if child == known and not over:
            self._fresh.append((child, self._stepper.stack))
        if all(self.children[e] != UNSEARCHED for e in self._edges_of[state]):
            self._saved[state] = b""
        return child

    def _state(self, time: int, over: bool) -> int:
        """The number of the state that the environment is in."""
        number, saved = len(self.times), b""
        if self._search.nodes and not over:
            saved = self._stepper.save(self._snapshots)
            key = hashlib.blake2b(time.to_bytes(8, "little") + saved, digest_size=24)
            number = self._states.setdefault(key.digest(), number)
        if number == len(self.times):
            self.times.append(time)
            self.ended.append(over)
            self._saved.append(saved)
            self._ways.append([])
            self._edges_of.append(range(0))
        return number

    def _arrive(self, state: int, spent: float, earned: float) -> None:
        """A way to a state, unless another one undercuts it."""
        ways = self._ways[state]
        if any(s <= spent and e <= earned for s, e in ways):
            return
        self._arrivals += 1
        self._ways[state] = [(s, e) for s, e in ways if s < spent or e < earned] + [(spent, earned)]
        if self.ended[state]:
            within = np.searchsorted(self._limits, spent)
            np.minimum(self._best[within:], earned, out=self._best[within:])
        elif self._edges_of[state]:
            self._spread(state, spent, earned)
        else:
            self._waiting.append((state, spent, earned))

    def _spread(self, state: int, spent: float, earned: float) -> None:
        """Queue the actions that are affordable after a way to a state."""
        time = self.times[state]
        bound = earned + (self._search.recipe.horizon - time) * self._search.rest
        for edge in self._edges_of[state]:
            after = float(self._search.accounting.add(spent, self._charges[edge]))
            if after > self._limits[-1]:
                continue
            level = int(np.searchsorted(self._limits, after))
            after = float(self._limits[level]) if self._search.accounting.per == "step" else after
            self._labels += 1
            heapq.heappush(self._queue, _Label(level, bound, -time, self._labels, edge, after, earned))


def clean_length(search: Search, seed: int) -> int:
    """Steps of the episode that nobody attacks, played to its end.

    Raises:
        ValueError: if the environment breaks its word.
    """
    stepper, time, over = Stepper(search, seed), 0, False
    while not over:
        greedy = search.judged([stepper.stack])[1]
        over, time = stepper.step(int(greedy[0]), time)[1], time + 1
    stepper.close()
    return time


def explore(search: Search, seeds: NDArray[Any], advance: Callable[[int], None]) -> Explored:
    """Search one episode per seed.

    Args:
        search: what they have in common.
        seeds: of the environment, (n,).
        advance: told how many episodes are done.
    Raises:
        ValueError: if the environment cannot be copied, or breaks its word.
    """
    parts: list[Explored] = []
    once = search.recipe.base_env(checked=False)  # kept, so that nothing else gets its id
    width = max(1, min(SIDE_BY_SIDE, MOST_SAVED // max(search.nodes, 1)))
    for start in range(0, len(seeds), width):
        episodes = [Episode(search, int(seed)) for seed in seeds[start : start + width]]
        if len({id(once.unwrapped), *(id(episode.env) for episode in episodes)}) <= len(episodes):
            raise ValueError(
                f"the factory {search.recipe.label} returned the same environment twice; it must make a new one per call"
            )
        running = episodes
        while running:
            asked = [episode.look() for episode in running]
            sizes = [len(part) for part in asked]
            if sum(sizes):
                ends = np.cumsum(sizes)[:-1]
                costs, greedy = search.judged([stack for part in asked for stack in part])
                for episode, part, chosen in zip(running, np.split(costs, ends), np.split(greedy, ends), strict=True):
                    episode.judged(part, chosen)
            advance(sum(episode.done for episode in running))
            running = [episode for episode in running if not episode.done]
        parts += [episode.explored() for episode in episodes]
    once.close()
    return joined(parts)


def joined(parts: list[Explored]) -> Explored:
    """Trees one after the other."""
    columns = {name: [getattr(part, name) for part in parts] for name in Explored._fields}
    starts = np.cumsum([0, *(len(times) for times in columns["times"])])
    for name in ("roots", "parents", "children"):
        columns[name] = [np.where(a == UNSEARCHED, a, a + start) for a, start in zip(columns[name], starts[:-1], strict=True)]
    kinds = {"seeds": np.int64, "ended": np.bool_, "rewards": np.float64, "costs": np.float64}
    return Explored(**{name: np.concatenate(a).astype(kinds.get(name, np.int32)) for name, a in columns.items()})
