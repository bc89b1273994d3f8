"""Robust Sarsa learns the values of the policy, which only true successors can teach."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.attacks import GradientAttack, LowValue, Pattanaik
from robustrl.networks.bounds import interval_bounds
from robustrl.policy import Normalization
from robustrl.training.robust_sarsa import Transitions, fit, gather, robust_sarsa

GAMMA = 0.9


def chain(n: int = 500) -> Transitions:
    """Two states; the action's sign chooses the next one; the reward is the number of the state, whatever is done. Every case `n` times."""
    cases = torch.tensor(list(itertools.product((0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)))).repeat(n, 1)
    state, action, following = cases.unbind(1)
    successor, never = (action > 0).float(), torch.zeros(len(cases), dtype=torch.bool)
    return Transitions(state[:, None], action[:, None], state, successor[:, None], following[:, None], never)


STATES, ACTIONS = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
EXACT = torch.tensor([s + GAMMA * ((a > 0) + GAMMA * 0.5 / (1 - GAMMA)) for s, a in ((0, -1), (0, 1), (1, -1), (1, 1))])
"""Q(s, a) = s + gamma V(s'), V(s) = s + gamma mean V, mean V = .5 / (1 - gamma) under random actions."""


def test_true_successors_give_the_values_and_shuffled_ones_cannot_rank_actions() -> None:
    options = {"gamma": GAMMA, "regularisation": 0.0, "epochs": 60, "minibatches": 16, "learning_rate": 3e-3}
    true = fit(chain(), **options)(STATES, ACTIONS)
    assert true.tolist() == pytest.approx(EXACT.tolist(), abs=0.05)
    assert (true[1::2] - true[::2]).tolist() == pytest.approx([GAMMA, GAMMA], abs=0.01)
    shuffled = fit(chain(), successor="shuffled", **options)(STATES, ACTIONS)
    assert (shuffled[1::2] - shuffled[::2]).abs().max() < 0.3 * GAMMA
    assert (shuffled[2:] - shuffled[:2]).tolist() == pytest.approx([1.0, 1.0], abs=0.3)  # rewards it does see


def test_the_penalty_keeps_values_from_changing_within_the_radius() -> None:
    options = {"gamma": GAMMA, "epochs": 30, "minibatches": 16, "learning_rate": 3e-3, "epsilon": 0.3}
    widths = []
    for regularisation in (0.0, 10.0):
        found = fit(chain(), regularisation=regularisation, **options)
        pairs = torch.cat((STATES, ACTIONS), dim=1)
        low, high = interval_bounds(found.network, pairs - 0.3, pairs + 0.3)
        widths.append(float((high - low).mean()))
    assert widths[1] < 0.5 * widths[0]


def test_the_end_of_an_episode_is_worth_nothing() -> None:
    data = chain()
    ended = Transitions(**{**vars(data), "ended": torch.ones(len(data), dtype=torch.bool)})
    found = fit(ended, gamma=GAMMA, regularisation=0.0, epochs=30, minibatches=16, learning_rate=3e-3)(STATES, ACTIONS)
    assert found.tolist() == pytest.approx([0, 0, 1, 1], abs=0.05)


def test_transitions_are_those_of_the_environment() -> None:
    """Pendulum: the next angle follows from the observation and the action; no episode ends but by its time limit."""
    model = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    data = gather(rrl.EnvRecipe.of("Pendulum-v1").view(model), rrl.EnvRecipe.of("Pendulum-v1"), 1_000, 0, n_envs=3)
    assert len(data) == 1_000
    assert not data.ended.any()
    cos, sin, speed = data.observations.double().T
    torque = data.actions[:, 0].double().clamp(-2, 2)
    faster = (speed + (15 * sin + 3 * torque) * 0.05).clamp(-8, 8)
    assert torch.allclose(faster, data.next_observations[:, 2].double(), atol=1e-4)
    angle = torch.atan2(sin, cos)
    assert torch.allclose(data.rewards.double(), -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), atol=1e-3)
    going_on = (data.observations[3:] == data.next_observations[:-3]).all(1)  # three environments in turn
    assert torch.equal(data.actions[3:][going_on], data.next_actions[:-3][going_on])
    assert going_on.sum() >= 990


def test_the_critic_goes_into_the_attack_and_its_random_numbers_are_its_own() -> None:
    model = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    critics = [robust_sarsa(model, "Pendulum-v1", timesteps=500, epochs=2, seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [critic.network[0].weight for critic in critics]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    report = rrl.attack_policy(
        model, "Pendulum-v1", GradientAttack(LowValue(critics[0])), rrl.ThreatModel(norm=math.inf, step=0.1), 2
    )
    assert np.isfinite(report.returns).all()


def test_observations_are_those_that_the_policy_and_the_attack_see() -> None:
    """A normalisation after the noise is the view's own: the critic gets what comes before it."""
    normalization = Normalization(np.full(3, 0.5), np.full(3, 4.0))
    recipe = rrl.EnvRecipe.of("Pendulum-v1", normalization=normalization, normalize="after_noise")
    data = gather(recipe.view(PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")), recipe, 300, 0)
    assert torch.allclose(data.observations[:, :2].square().sum(1), torch.ones(300), atol=1e-4)  # cos^2 + sin^2


def test_discrete_actions_have_a_value_each() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    critic = robust_sarsa(model, "CartPole-v1", timesteps=400, epochs=2)
    observations = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    values = critic(observations)
    assert values.shape == (5, 2)
    assert torch.equal(values[:, 1], critic(observations, torch.tensor([[0.0, 1.0]]).expand(5, 2)))
    for attack in (GradientAttack(LowValue(critic)), Pattanaik(critic=critic)):
        report = rrl.attack_policy(model, "CartPole-v1", attack, rrl.ThreatModel(norm=math.inf, step=0.1), 2)
        assert np.isfinite(report.returns).all()


def test_policies_it_cannot_learn_from_are_refused() -> None:
    gsde = PPO("MlpPolicy", "Pendulum-v1", use_sde=True, seed=0, device="cpu")
    with pytest.raises(TypeError, match="able to sample"):
        robust_sarsa(gsde, "Pendulum-v1")
    with pytest.raises(ValueError, match="gamma must be in"):
        fit(chain(10), gamma=1.0)
    with pytest.raises(ValueError, match="successor must be"):
        fit(chain(10), successor="next")  # type: ignore[arg-type]


def test_after_a_time_limit_the_policy_acts_where_the_episode_stopped() -> None:
    """With next to no exploration the successor's action is the mean there, not what began the next episode."""
    model = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    with torch.no_grad():
        model.policy.log_std.fill_(-9.0)
        model.policy.action_net.weight.mul_(100.0)
    recipe = rrl.EnvRecipe.of("Pendulum-v1", max_episode_steps=20)
    data = gather(recipe.view(model), recipe, 300, 0, n_envs=3)
    with torch.no_grad():
        means = model.policy.get_distribution(data.next_observations).distribution.mean.clamp(-2, 2)
    assert torch.allclose(data.next_actions, means, atol=0.01)


def test_progress_is_shown_of_data_and_of_fitting(capsys: pytest.CaptureFixture[str]) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    robust_sarsa(model, "CartPole-v1", timesteps=100, epochs=2)
    assert not capsys.readouterr().out
    robust_sarsa(model, "CartPole-v1", timesteps=100, epochs=2, progress_bar=True)
    shown = capsys.readouterr().out
    assert "robust sarsa: data" in shown
    assert "robust sarsa: fit" in shown
    assert " 2/2 " in shown
