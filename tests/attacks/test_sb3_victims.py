"""Real Stable-Baselines3 models with random weights: every attack gains on every row, within budget, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3

from attacks.victims import context, cost, frames_of
from robustrl.attacks import (
    ActionDeviation,
    AttackContext,
    FlipAttack,
    GradientAttack,
    Greedy,
    LowValue,
    Margin,
    MinimalFlip,
    Objective,
    SmoothedPGD,
)
from robustrl.attacks.expectation import samples
from robustrl.envs.recipe import EnvRecipe
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import run_chunk
from robustrl.rollouts.collect import make_job
from robustrl.threat import ThreatModel


class Pictures(gym.Env[Any, Any]):
    """Random pictures in [0, 1], two stacked on top of each other as channels."""

    observation_space = spaces.Box(0, 1, (2, 36, 36), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.random((2, 36, 36), dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.np_random.random((2, 36, 36), dtype=np.float32), float(action), self.t == 3, False, {}


def view(algorithm: Any, env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **policy_kwargs: Any) -> PolicyView:
    more = {} if algorithm in (PPO, RecurrentPPO) else {"buffer_size": 1}
    if algorithm is RecurrentPPO:
        policy_kwargs |= {"lstm_hidden_size": 8}
    return PolicyView.from_sb3(algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **more))


def pictures(algorithm: Any) -> PolicyView:
    return view(algorithm, Pictures(), "CnnPolicy", normalize_images=False)


VICTIMS: dict[str, tuple[Callable[[], PolicyView], list[Objective]]] = {
    "PPO": (lambda: view(PPO), [ActionDeviation(), LowValue()]),
    "SAC": (lambda: view(SAC), [ActionDeviation(), LowValue()]),
    "TD3": (lambda: view(TD3), [ActionDeviation(), LowValue()]),
    "DDPG": (lambda: view(DDPG), [ActionDeviation(), LowValue()]),
    "DQN": (lambda: view(DQN, "CartPole-v1"), [Margin(), ActionDeviation(), LowValue()]),
    "DQN on pictures": (lambda: pictures(DQN), [Margin(), ActionDeviation(), LowValue()]),
    "PPO on pictures": (lambda: pictures(PPO), [Margin(), ActionDeviation(), LowValue()]),
    "RecurrentPPO": (lambda: view(RecurrentPPO, policy="MlpLstmPolicy"), [ActionDeviation()]),
    "RecurrentPPO on CartPole": (lambda: view(RecurrentPPO, "CartPole-v1", "MlpLstmPolicy"), [Margin(), ActionDeviation()]),
}


@pytest.fixture(scope="module", params=VICTIMS, ids=VICTIMS)
def victim(request: pytest.FixtureRequest) -> tuple[PolicyView, list[Objective]]:
    make, objectives = VICTIMS[request.param]
    return make(), objectives


def situation(policy: PolicyView, x: torch.Tensor, norm: float, budgets: torch.Tensor) -> AttackContext:
    memory = None if policy.memory_shape is None else 0.3 * frames_of(len(x), *policy.memory_shape, seed=5)
    pixels = (0.0, 1.0) if len(policy.frame_shape) > 1 else None
    return context(policy, x, budgets, noise=Gaussian(0.05), norm=norm, memory=memory, pixels=pixels)


def frames_for(policy: PolicyView, n: int) -> torch.Tensor:
    if len(policy.frame_shape) > 1:
        return torch.rand(n, *policy.frame_shape, generator=torch.Generator().manual_seed(0))
    return frames_of(n, *policy.frame_shape)


def gains(objective: Objective, policy: PolicyView, x: torch.Tensor, delivered: torch.Tensor, norm: float, draws: int) -> Any:
    """What the objective gained, on the noise that the attack averaged over."""
    at = situation(policy, x, norm, torch.ones(len(x)))
    noise = samples(at.noise, (draws, *x.shape[1:]), at.generator, x.dtype, x.device)
    with torch.no_grad():
        gain = objective.against(at, noise)
        return gain(delivered) - gain(x)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_the_objective_gains_on_every_row_within_the_budget_to_the_last_bit(victim: Any, norm: float) -> None:
    policy, objectives = victim
    x = frames_for(policy, 6)
    size = {1: 0.02, 2: 0.1, math.inf: 0.1}[norm] * (1 if x.ndim == 2 else {1: 500, 2: 10, math.inf: 0.3}[norm])
    budgets = size * torch.linspace(0.5, 1, 6, dtype=torch.float64)
    for objective in objectives:
        attack = GradientAttack(objective, allocation=Greedy(), draws=4, steps=5)
        attack.check(policy, ThreatModel(norm=norm, step=1.0), Gaussian(0.05))
        delivered = attack.perturb(x, situation(policy, x, norm, budgets))
        assert bool((cost(x, delivered, norm) <= budgets).all())
        assert bool((gains(objective, policy, x, delivered, norm, 4) > 0).all())
        if x.ndim > 2:
            assert 0 <= float(delivered.min()) <= float(delivered.max()) <= 1


def test_rows_are_attacked_as_if_alone(victim: Any) -> None:
    policy, objectives = victim
    x, budgets = frames_for(policy, 4), torch.full((4,), 0.5, dtype=torch.float64)
    for objective in objectives:
        attack = GradientAttack(objective, allocation=Greedy(), draws=3, steps=3)
        everyone = situation(policy, x, 2, budgets)
        together = attack.perturb(x, everyone)
        for i in (1, 3):
            row = torch.tensor([i])
            alone = everyone.select(row)
            alone.generator.manual_seed(0)
            torch.testing.assert_close(together[row], attack.perturb(x[row], alone), rtol=0, atol=1e-3)


@pytest.mark.parametrize("attack", [SmoothedPGD(draws=4, step_size=0.2), MinimalFlip(draws=4)], ids=["pgd", "flip"])
@pytest.mark.parametrize("name", ["DQN on pictures", "PPO on pictures", "RecurrentPPO on CartPole"])
def test_flips_reach_pictures_and_recurrent_policies(name: str, attack: FlipAttack) -> None:
    policy = VICTIMS[name][0]()
    attack.check(policy, ThreatModel(norm=2, episode=1.0), Gaussian(0.05))
    x, budget = frames_for(policy, 4), torch.full((4,), 6.0, dtype=torch.float64)
    at = replace(situation(policy, x, 2, budget), noise=None)
    delivered = attack.perturb(x, at)
    with torch.no_grad():
        before, after = (policy.scores(at.observation(frames), at.memory).argmax(1) for frames in (x, delivered))
    spent = cost(x, delivered)
    assert bool((spent <= budget).all())
    assert bool((spent > 0).any())
    assert torch.equal(before != after, spent > 0)


@pytest.mark.parametrize(
    ("algorithm", "env", "objective"),
    [
        (SAC, "Pendulum-v1", LowValue()),
        (PPO, "Pendulum-v1", ActionDeviation()),
        (RecurrentPPO, "Pendulum-v1", ActionDeviation()),
        (DQN, "pictures", Margin()),
    ],
    ids=["SAC", "PPO", "RecurrentPPO", "DQN on pictures"],
)
def test_whole_episodes_of_real_models_stay_within_budget(algorithm: Any, env: str, objective: Objective) -> None:
    if env == "pictures":
        recipe = EnvRecipe(factory=Pictures, max_episode_steps=3, noise=Gaussian(0.1))
        model = algorithm("CnnPolicy", Pictures(), seed=0, buffer_size=1, policy_kwargs={"normalize_images": False})
    else:
        recipe = EnvRecipe(env_id=env, max_episode_steps=8, noise=Gaussian(0.1), frame_stack=1)
        more = {"buffer_size": 1} if algorithm is SAC else {}
        model = algorithm("MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy", env, seed=0, **more)
    for threat in (ThreatModel(norm=2, episode=0.5), ThreatModel(norm=math.inf, step=0.05), ThreatModel(norm=1, episode=0.5)):
        attack = GradientAttack(objective, steps=3, draws=2)
        job = make_job(recipe.view(model), recipe, chunk_size=3, attack=attack, threat=threat)
        episodes = run_chunk(job, 0, 3)
        limit = threat.step if threat.episode is None else threat.episode
        assert limit is not None
        assert (episodes.spent <= limit * (1 + 1e-9)).all()
        assert (episodes.spent > 0.5 * limit).all()
        assert job.describe()["attack"]["objective"] == {"kind": type(objective).__name__}
