"""Leading an agent to a state of the attacker's choice: the enchanting attack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from torch import Tensor

from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.expectation import answers
from robustrl.attacks.gradient import GradientAttack
from robustrl.attacks.learned import Wanted
from robustrl.attacks.objectives import Gain, Objective
from robustrl.attacks.timing import Allocation, Uniform, check_allocation
from robustrl.errors import check_count, check_finite_array, check_real
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

Floats = NDArray[np.float64]


class _Plans(WeakKeyDictionary[gym.Env[Any, Any], tuple[int, NDArray[Any]]]):
    """Plans of running episodes, (first step, actions); they do not travel to other processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plans, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plans:
        return _Plans()


@dataclass(frozen=True)
class Enchanting(Attack):
    """Plan actions that lead to a target state, then perturb every observation so that the agent takes them.

    The plan is made by the cross-entropy method in copies of the true environment, which start in its present state, with dice of their
    own: the attacker knows the dynamics and not the future. Every so many steps it is made again. The perturbations are gradient
    ascent on the planned action's lead (continuous actions: the mean action is pulled towards the planned one).

    It needs hosts that have the environment: `attack_policy` (which plays it with engine="list"), and the attack wrappers of a
    `gymnasium.Env`, a `DummyVecEnv` or a `SyncVectorEnv`. MuJoCo and ALE continue from a snapshot; other environments must be copied by
    `copy.deepcopy`. Copied wrappers act too: those that write files belong outside the attack.

    Args:
        target: an observation of the environment (before normalisation), flattened.
        weights: what differences to it count, >= 0, one per entry; default 1. The distance is sqrt(sum (weight * difference)^2).
        length: steps of a plan; it is as good as the least distance on its way.
        every: steps until it is made again, at most `length`.
        samples: plans tried per iteration; each costs `length` steps of the environment.
        iterations: of the cross-entropy method.
        elite: share of the plans that the next ones are drawn around.
        allocation: what a step may cost of an episode budget.
        steps, draws: of the `GradientAttack` that pushes to the planned action.

    Source: Lin, Hong, Liao, Shih, Liu, Sun (IJCAI 2017), arXiv:1703.06748, with the simulator in place of a learned model of it.
    """

    needs_simulator: ClassVar[bool] = True

    target: tuple[float, ...]
    _: KW_ONLY
    weights: tuple[float, ...] | None = None
    length: int = 10
    every: int = 5
    samples: int = 60
    iterations: int = 4
    elite: float = 0.1
    allocation: Allocation = field(default_factory=Uniform)
    steps: int = 10
    draws: int = 8
    _plans: _Plans = field(default_factory=_Plans, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        target = check_finite_array("target", self.target).ravel()
        object.__setattr__(self, "target", tuple(target.tolist()))
        if self.weights is not None:
            weights = check_finite_array("weights", self.weights).ravel()
            if weights.shape != target.shape or weights.min() < 0 or not weights.any():
                raise ValueError(f"weights must be {target.size} numbers >= 0, not all of them 0, got {self.weights}")
            object.__setattr__(self, "weights", tuple(weights.tolist()))
        for name in ("length", "every", "samples", "iterations", "steps", "draws"):
            check_count(name, getattr(self, name))
        if self.every > self.length:
            raise ValueError(f"every must be at most length = {self.length}, got {self.every}")
        if not 0 < check_real("elite", self.elite) < 1:
            raise ValueError(f"elite must be in (0, 1), got {self.elite}")
        if self.elite * self.samples < 1:
            raise ValueError(
                f"samples must be at least {math.ceil(1 / self.elite)} for an elite of {self.elite:g}, got {self.samples}"
            )
        check_allocation("allocation", self.allocation)

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        size = int(np.prod(policy.frame_shape))
        if len(self.target) != size:
            raise ValueError(f"target must have the {size} entries of a frame, got {len(self.target)}")
        self._solver(policy).check(policy, threat, noise)

    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        assert context.environments is not None
        seeds = (context.uniforms(1)[:, 0] * 2**53).long()
        rows = torch.nonzero(context.allowance > 0).flatten()
        if not len(rows):
            return frames
        part, result = context.select(rows), frames.clone()
        assert part.environments is not None
        situations = zip(part.environments, part.step.tolist(), part.steps_left.tolist(), seeds[rows].tolist(), strict=True)
        command = torch.from_numpy(np.stack([self._planned(*situation) for situation in situations])).to(frames.device)
        result[rows] = self._solver(context.policy).perturb(frames[rows], replace(part, command=command))
        return result

    def _solver(self, policy: PolicyView) -> GradientAttack:
        objective = Wanted() if policy.discrete else _Near()
        return GradientAttack(objective, allocation=self.allocation, steps=self.steps, draws=self.draws, random_start=False)

    def _planned(self, env: gym.Env[Any, Any], step: int, left: int, seed: int) -> Any:
        """The planned action of one episode: its number, or its values."""
        start, actions = self._plans.get(env, (step, ()))
        if step % self.every == 0 or not 0 <= step - start < len(actions):
            start, actions = self._plans[env] = step, self._plan(env, min(self.length, left), np.random.default_rng(seed))
        return actions[step - start]

    def _plan(self, env: gym.Env[Any, Any], length: int, rng: np.random.Generator) -> NDArray[Any]:
        """The best sequence of actions that the cross-entropy method finds, (length, ...)."""
        simulator, space = Simulator(env, rng), env.action_space
        proposal = _Numbers(space, length) if isinstance(space, spaces.Discrete) else _Values(space, length)
        closest, best, kept = np.inf, proposal.mode(), max(1, round(self.elite * self.samples))
        for _ in range(self.iterations):
            plans = proposal.sample(rng, self.samples)
            distances = np.array([self._distance(simulator.branch(), proposal.actions(plan)) for plan in plans])
            order = distances.argsort(kind="stable")
            if distances[order[0]] < closest:
                closest, best = distances[order[0]], plans[order[0]]
            proposal.fit(plans[order[:kept]])
        return best

    def _distance(self, env: gym.Env[Any, Any], actions: Any) -> float:
        """The least distance to the target on a plan's way; an environment that ends stays where it is."""
        target, weights = np.array(self.target), 1.0 if self.weights is None else np.array(self.weights)
        least = np.inf
        for action in actions:
            observation, _, terminated, truncated, _ = env.step(action)
            away = weights * (np.asarray(observation, dtype=np.float64).ravel() - target)
            least = min(least, float(np.sqrt(away @ away)))
            if terminated or truncated:
                break
        return least


class Simulator:
    """Copies of a running environment, one at a time: they start in its present state, and throw dice of their own.

    Args:
        env: the environment, which is never changed.
        rng: source of the copies' dice.
    """

    def __init__(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> None:
        self._env, self._inner, self._rng = env, env.unwrapped, rng
        self._shared = {id(part): part for part in (self._inner.spec,)}
        layer: Any = env
        while True:
            self._shared |= {id(space): space for space in (layer.action_space, layer.observation_space)}
            if layer is self._inner:
                break
            layer = layer.env
        self._rewound = _rewinder(self._inner)

    def branch(self) -> gym.Env[Any, Any]:
        """A copy to be stepped; it is of no use after the next one was taken.

        Raises:
            ValueError: if the environment cannot be copied.
        """
        # What `memo` holds is not copied but replaced: by itself, by the twin of an engine, by other dice.
        memo: dict[int, Any] = {**self._shared, **self._rewound()}
        dice, inner = getattr(self._inner, "_np_random", None), self._inner
        if dice is not None:
            memo[id(dice)] = np.random.default_rng(self._rng.integers(2**63))
        try:
            if isinstance(inner, EzPickle):  # would be made anew, not copied
                twin = memo[id(inner)] = object.__new__(type(inner))
                twin.__dict__.update(copy.deepcopy(inner.__dict__, memo))
            found: gym.Env[Any, Any] = copy.deepcopy(self._env, memo)
        except (TypeError, NotImplementedError, AttributeError) as error:
            raise ValueError(
                f"Enchanting plans in copies of the environment, but {self._env} cannot be copied: {error}"
            ) from error
        return found


def _rewinder(inner: Any) -> Callable[[], dict[int, Any]]:
    """Brings an engine's twin back to the environment's present state; what it takes the place of in a copy, by id."""
    if hasattr(inner, "model") and hasattr(inner, "data") and hasattr(inner, "do_simulation"):
        import mujoco  # type: ignore[import-untyped]

        data = mujoco.MjData(inner.model)
        shared = {id(part): part for part in (inner.model, getattr(inner, "mujoco_renderer", None))}

        def physics() -> dict[int, Any]:
            mujoco.mj_copyData(data, inner.model, inner.data)
            return {**shared, id(inner.data): data}

        return physics
    if hasattr(inner, "ale"):
        console, state = copy.deepcopy(inner).ale, inner.ale.cloneState()

        def emulator() -> dict[int, Any]:
            console.restoreState(state)
            return {id(inner.ale): console}

        return emulator
    return dict


class _Numbers:
    """Proposals of discrete actions: independent at every step."""

    def __init__(self, space: spaces.Discrete, length: int) -> None:
        self._first, self._shares = int(space.start), np.full((length, int(space.n)), 1 / int(space.n))

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Plans (n, length), counted from 0."""
        found: NDArray[np.int64] = (rng.random((n, len(self._shares), 1)) > self._shares.cumsum(1)[:, :-1]).sum(2)
        return found

    def fit(self, elite: NDArray[Any]) -> None:
        """Propose what is like the best plans; every action keeps a chance."""
        n, size = len(elite), self._shares.shape[1]
        self._shares = ((elite[:, :, None] == np.arange(size)).sum(0) + 1 / size) / (n + 1)

    def mode(self) -> NDArray[Any]:
        """The likeliest plan."""
        likeliest: NDArray[np.int64] = self._shares.argmax(1)
        return likeliest

    def actions(self, plan: NDArray[Any]) -> list[int]:
        """What the environment takes."""
        return [self._first + int(action) for action in plan]


class _Values:
    """Proposals of continuous actions: normal at every step, within their range."""

    def __init__(self, space: Any, length: int) -> None:
        self._space = space
        unit, shape = half_ranges(space), (length, *space.shape)
        with np.errstate(invalid="ignore"):
            middle = space.low.astype(np.float64) / 2 + space.high.astype(np.float64) / 2
        self._mean = np.broadcast_to(np.where(np.isfinite(middle), middle, 0.0), shape)
        self._std, self._least = np.broadcast_to(unit, shape), 1e-2 * unit

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Plans (n, length, *action)."""
        values = self._mean + self._std * rng.standard_normal((n, *self._mean.shape))
        found: NDArray[Any] = np.clip(values, self._space.low, self._space.high).astype(self._space.dtype)
        return found

    def fit(self, elite: NDArray[Any]) -> None:
        """Propose what is like the best plans."""
        self._mean, self._std = elite.mean(0), np.maximum(elite.std(0), self._least)

    def mode(self) -> NDArray[Any]:
        """The likeliest plan."""
        return self._mean.astype(self._space.dtype)

    def actions(self, plan: NDArray[Any]) -> NDArray[Any]:
        """What the environment takes."""
        return plan


def half_ranges(space: spaces.Box) -> Floats:
    """Half the range of every entry of an action, 1 where there is none."""
    half = space.high.astype(np.float64) / 2 - space.low.astype(np.float64) / 2
    return np.where(np.isfinite(half), half, 1.0)


@dataclass(frozen=True)
class _Near(Objective):
    """Minus half the squared distance of the mean action to the commanded one, in half ranges of the actions."""

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        assert context.command is not None
        assert isinstance(context.policy.action_space, spaces.Box)
        wanted = context.command.double().flatten(1)
        unit = torch.from_numpy(half_ranges(context.policy.action_space).ravel()).to(wanted.device)

        def gain(x: Tensor) -> Tensor:
            actions = answers(lambda part, y: part.policy.mean_action(part.observation(y), part.memory), x, context, noise)
            return -((actions.double().mean(1) - wanted) / unit).square().sum(1) / 2

        return gain
