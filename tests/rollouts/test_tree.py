"""The search against brute force over all action sequences, and against attacks."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import robustrl as rrl
from robustrl.attacks import ATTACKS
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.policy import PolicyView
from robustrl.rollouts.deterministic import certify_deterministic
from rollouts.brute import Maze, Streak, all_paths, linear, worst

HORIZON = 5
BUDGETS = [0.0, 0.1, 0.3, 0.6, 1.0, 2.0]


def maze(table: int, noisy: bool = False) -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Streak(Maze(table, noisy=noisy)), HORIZON)


@cache
def known_paths(table: int, seed: int) -> Any:
    return all_paths(partial(maze, table, True), seed, HORIZON, linear(table))


def weights(per: str, k: int, padding: str) -> Any:
    if per == "step":
        return lambda t: 1 / k
    return lambda t: 2 / (k * (k + 1)) if t < k and padding == "reset" else 1 / k


@pytest.mark.parametrize("per", ["step", "episode"])
@pytest.mark.parametrize(("k", "padding"), [(1, "reset"), (2, "reset"), (2, "zero"), (3, "reset")])
@pytest.mark.parametrize(("table", "noisy"), [(0, False), (1, True), (2, True)])
def test_bounds_are_the_worst_of_all_action_sequences(per: Any, k: int, padding: Any, table: int, noisy: bool) -> None:
    make, policy = partial(maze, table, noisy), linear(table + 10 * k, n_frames=k)
    recipe = EnvRecipe(factory=make, frame_stack=k, stack_padding=padding)
    found = certify_deterministic(policy, recipe, BUDGETS, per=per, episodes=3, reward_low=-1.5)
    assert found.exhausted.all()
    for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
        paths = all_paths(make, int(seed), HORIZON, policy, k, padding)
        assert bounds == pytest.approx([worst(paths, b, per, weights(per, k, padding)) for b in BUDGETS], abs=1e-12)
    found.verify()


@pytest.mark.parametrize("per", ["step", "episode"])
@pytest.mark.parametrize("nodes", [1, 2, 7, 30])
@pytest.mark.parametrize("method", ["tree", "prefix", "constancy"])
def test_a_search_that_is_cut_short_stays_below(per: Any, nodes: int, method: str) -> None:
    for table in range(3):
        make, policy = partial(maze, table, True), linear(table)
        found = certify_deterministic(policy, make, BUDGETS, per=per, episodes=2, nodes=nodes, method=method, reward_low=-1.5)
        for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
            paths = known_paths(table, int(seed))
            assert np.all(bounds <= np.array([worst(paths, b, per, weights(per, 1, "reset")) for b in BUDGETS]) + 1e-12)
            assert np.all(bounds >= -1.5 * HORIZON)


def test_methods_are_ordered_and_states_are_joined() -> None:
    policy, make = linear(3), partial(maze, 3)
    settings: dict[str, Any] = {"episodes": 4, "reward_low": -1.5}
    by = {m: certify_deterministic(policy, make, BUDGETS, method=m, **settings) for m in ("constancy", "prefix", "tree")}
    assert np.all(by["constancy"].bounds <= by["prefix"].bounds)
    assert np.all(by["prefix"].bounds <= by["tree"].bounds)
    tree = by["tree"].evidence
    assert len(tree.times) < len(tree.parents)  # more ways than states


def test_smaller_budgets_are_searched_first() -> None:
    """Where the whole tree is far larger than the cap, the clean episode and small budgets are still searched to the end."""
    policy, make = linear(5), partial(maze, 5, True)
    whole = certify_deterministic(policy, make, BUDGETS, episodes=8, reward_low=-1.5)
    sizes = np.diff(whole.evidence.roots, append=len(whole.evidence.times))
    cut = certify_deterministic(policy, make, BUDGETS, episodes=8, reward_low=-1.5, nodes=int(sizes.max() // 2))
    assert cut.exhausted[:, 0].all()
    assert not cut.exhausted.all()
    assert np.all(np.diff(cut.exhausted.astype(int), axis=1) <= 0)
    assert np.array_equal(cut.bounds[cut.exhausted], whole.bounds[cut.exhausted])


class Fork(gym.Env[Any, Any]):
    """Two actions that the policy scores alike: one earns 1, the other nothing."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), float(action == 0), True, False, {}


def fork(bias: float = 0.0, gap: float = 2.0) -> PolicyView:
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[gap], [0.0]]))
        layer.bias.copy_(torch.tensor([bias, 0.0]))
    return PolicyView.from_torch(layer, kind="q", observation_shape=(1,))


def limited_fork() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Fork(), 1)


def test_ties_are_the_attackers() -> None:
    found = certify_deterministic(fork(), limited_fork, [0.0], episodes=2, reward_low=0)
    assert found.bounds.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("per", ["step", "episode"])
def test_a_budget_that_is_just_enough_counts(per: Any) -> None:
    """Scores 1 and 0, rows 2 apart: the tie is at a distance of exactly 1/2."""
    found = certify_deterministic(fork(bias=1.0), limited_fork, [0.499, 0.5, 0.501], per=per, episodes=2, reward_low=0)
    assert found.bounds.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_norms_per_step() -> None:
    """Two coordinates of weight 1: the tie is at l2 distance 1/sqrt(2) and linf distance 1/2; l1 uses the l2 radius."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([1.0, 0.0]))

    class Plane(Fork):
        observation_space = spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return np.zeros(2, np.float32), float(action == 0), True, False, {}

    policy = PolicyView.from_torch(layer, kind="q", observation_shape=(2,))
    for norm, distance in ((2, 2**-0.5), (np.inf, 0.5), (1, 2**-0.5)):
        budgets = [distance * 0.999, distance * 1.001]
        found = certify_deterministic(
            policy, lambda: gym.wrappers.TimeLimit(Plane(), 1), budgets, norm=norm, episodes=1, reward_low=0
        )
        assert found.bounds.tolist() == [[1.0, 0.0]]


def balancer(weights: tuple[float, ...] = (0.05, 0.3, 3.0, 1.0)) -> PolicyView:
    layer, w = nn.Linear(4, 2, bias=False), torch.tensor(weights)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-w / 2, w / 2]))
    return PolicyView.from_torch(layer, kind="q", observation_shape=(4,))


def test_steps_to_come_are_worth_nothing_where_an_episode_may_end() -> None:
    """CartPole pays 1 per step: counting that for steps after a deviation would prove the clean return of 100."""
    found = certify_deterministic(
        balancer(), EnvRecipe("CartPole-v1", max_episode_steps=100), [0.02, 0.3], method="prefix", episodes=5
    )
    assert np.all(found.bounds[:, 1] < 100)
    assert np.all(found.bounds >= 8)  # what is known of CartPole
    for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
        assert bounds == pytest.approx([max(8, first_within(int(seed), budget)) for budget in (0.02, 0.3)])


def first_within(seed: int, budget: float) -> int:
    """The first step of a clean episode at which the balancer's decision can be changed."""
    env, w = gym.make("CartPole-v1", max_episode_steps=100), np.array([0.05, 0.3, 3.0, 1.0])
    frame, over, t = env.reset(seed=seed)[0], False, 0
    while not over and abs(w @ frame.astype(np.float64)) / np.linalg.norm(w) > budget:
        frame, _, terminated, truncated, _ = env.step(int(w @ frame > 0))
        over, t = terminated or truncated, t + 1
    return t


def test_a_good_controller_of_cartpole_is_close_to_the_other_action_nearly_always() -> None:
    """Distances to a linear controller's boundary over 20 episodes of 500 steps, which docs/methods/deterministic.md quotes."""
    w, radii = np.array([0.05, 0.3, 3.0, 1.0]), []
    env = gym.make("CartPole-v1")
    for seed in range(20):
        frame, over = env.reset(seed=seed)[0], False
        while not over:
            radii.append(abs(w @ frame.astype(np.float64)) / np.linalg.norm(w))
            frame, _, terminated, truncated, _ = env.step(int(w @ frame > 0))
            over = terminated or truncated
    assert len(radii) == 20 * 500
    assert np.quantile(radii, 0.5) == pytest.approx(0.036, abs=0.002)
    assert np.quantile(radii, 0.01) == pytest.approx(1.1e-4, rel=0.3)


@pytest.mark.parametrize("attack", ["pgd", "mad"])
def test_no_attack_crosses(attack: str) -> None:
    recipe = EnvRecipe("CartPole-v1", max_episode_steps=25)
    for per, budgets in (("step", [0.002, 0.01, 0.05]), ("episode", [0.02, 0.05, 0.2])):
        found = certify_deterministic(balancer(), recipe, budgets, per=per, episodes=8, nodes=300, seed=3)  # type: ignore[arg-type]
        for k, budget in enumerate(budgets):
            threat = rrl.ThreatModel(2, **{per: budget})
            report = rrl.attack_policy(balancer(), recipe, ATTACKS[attack](), threat, 8, seed=3, engine="list")
            assert np.all(report.returns >= found.bounds[:, k])


@pytest.mark.parametrize("per", ["step", "episode"])
def test_an_exhaustive_attacker_of_linear_scores_gets_exactly_the_bound(per: Any) -> None:
    """Two actions and linear scores: whoever pays the cost gets the action, so every path in the tree can be brought about."""
    recipe, budgets = EnvRecipe("CartPole-v1", max_episode_steps=14), [0.01, 0.03, 0.1]
    policy, rng = balancer(), np.random.default_rng(0)
    found = certify_deterministic(policy, recipe, budgets, per=per, episodes=3)
    assert found.exhausted.all()
    w = np.array([0.05, 0.3, 3.0, 1.0])
    for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
        for budget, bound in zip(budgets, bounds, strict=True):
            returns = []
            for trial in range(60):
                env = recipe.base_env()
                frame, total, spent, over = env.reset(seed=int(seed))[0], 0.0, 0.0, False
                push = rng.integers(2) if trial % 2 else None  # one direction all along, or at random
                while not over:
                    score = w @ frame.astype(np.float64)
                    need = abs(score) / np.linalg.norm(w) * (1 + 1e-5) + 1e-9
                    may = need <= budget if per == "step" else spent + need**2 <= budget**2
                    wanted = push if push is not None else rng.integers(2)
                    delivered = frame - np.sign(score) * need * w / np.linalg.norm(w) * (may and wanted != (score > 0))
                    spent += need**2 if may and wanted != (score > 0) else 0.0
                    action = int(w @ delivered > 0)
                    frame, reward, terminated, truncated, _ = env.step(action)
                    total, over = total + float(reward), terminated or truncated
                returns.append(total)
            assert min(returns) >= bound
            if budget == 0.1 and per == "step":
                assert min(returns) == bound


def test_rewards_are_the_environments_own() -> None:
    """A wrapper that makes rewards larger is no part of what is certified, and its state is copied with the rest."""
    wrapped = EnvRecipe(
        "CartPole-v1", wrappers=(lambda env: gym.wrappers.TransformReward(env, lambda r: 10 * float(r)),), max_episode_steps=12
    )
    bare = EnvRecipe("CartPole-v1", max_episode_steps=12)
    one, other = (certify_deterministic(balancer(), r, [0, 0.02, 0.1], reward_low=1.0, episodes=4) for r in (bare, wrapped))
    assert np.array_equal(np.maximum(other.bounds, 8), one.bounds)
    assert one.bounds[:, 0].tolist() == [12.0] * 4


class Forgetful(Fork):
    """Its rewards depend on how often the class was stepped, which no copy and no seed holds."""

    count = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Forgetful.count += 1
        return np.zeros(1, np.float32), float(Forgetful.count), True, False, {}


def test_state_outside_of_the_environment_is_noticed() -> None:
    with pytest.raises(ChainError, match="does not repeat itself"):
        certify_deterministic(fork(), lambda: gym.wrappers.TimeLimit(Forgetful(), 1), [0.0], episodes=2, reward_low=0)


class Undecided(Fork):
    """Rewards from the unseeded generator of its own action space."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), float(self.action_space.sample()), False, False, {}


def test_an_environment_that_samples_from_its_space_is_refused() -> None:
    with pytest.raises(ChainError, match="does not seed|repeat itself"):
        certify_deterministic(fork(), lambda: gym.wrappers.TimeLimit(Undecided(), 30), [1.0], episodes=2, reward_low=0)


def test_words_about_rewards_and_ends_are_held_against_the_environment() -> None:
    policy, make = linear(1), partial(maze, 1)
    with pytest.raises(ValueError, match=r"reward_low = 0\.5 is no sure bound"):
        certify_deterministic(policy, make, [2.0], reward_low=0.5)
    with pytest.raises(ValueError, match="never_ends_early must be False"):
        certify_deterministic(policy, make, [2.0], reward_low=-1.5, never_ends_early=True)
    with pytest.raises(ValueError, match="reward_low .*must be given"):
        certify_deterministic(policy, make, [2.0])


def test_steps_to_come_count_where_no_episode_ends_early() -> None:
    class Endless(Fork):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return np.zeros(1, np.float32), 1.0 + (action == 0), False, False, {}

    make = lambda: gym.wrappers.TimeLimit(Endless(), 6)  # noqa: E731
    found = {
        early: certify_deterministic(fork(), make, [0.0], episodes=1, method="prefix", reward_low=1.0, never_ends_early=early)
        for early in (False, True)
    }
    assert found[True].bounds.tolist() == [[6.0]]
    assert found[False].bounds.tolist() == [[0.0]]
