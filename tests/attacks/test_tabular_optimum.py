"""Attackers against the exact optimum of a grid world: none gets below it, and those that learn find it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from grids import CELLS, NEIGHBOURS, GridEnv, grid, victim
from stable_baselines3 import PPO

import robustrl as rrl
from attacks.victims import context
from robustrl.attacks import ATTACKS, ActionDirection, Attack, Perturbation, TargetAction
from robustrl.attacks.tabular import worst_case
from robustrl.envs import AdversaryVecEnv, EnvRecipe
from robustrl.mdp import TabularMDP
from robustrl.threat import ThreatModel

MDP = grid()
VALUES, ACTIONS = MDP.solve()
VICTIM = victim(ACTIONS)
WORST = worst_case(MDP, ACTIONS, NEIGHBOURS)
CLEAN, LEAST = MDP.value(VALUES), MDP.value(WORST.values)
THREAT = ThreatModel(norm=math.inf, step=1.0)
RECIPE = EnvRecipe(factory=lambda: GridEnv(MDP), max_episode_steps=30)


def answered(attack: Attack, seed: int = 0) -> np.ndarray:
    """What the victim does in every cell under an attack, (16,)."""
    frames = torch.from_numpy(CELLS).float()
    delivered = attack.perturb(frames, context(VICTIM, frames, 1.0, norm=math.inf, steps_left=1, seed=seed))
    assert float((delivered - frames).abs().max()) <= 1
    found: np.ndarray = VICTIM.scores(delivered).argmax(1).numpy()
    return found


def value(attack: Attack, seed: int = 0) -> float:
    """The exact value of the victim under an attack that treats every visit of a cell alike."""
    return MDP.value(MDP.evaluate(answered(attack, seed)))


def test_the_grid_is_the_environment_and_the_victim_its_best_policy() -> None:
    frames = torch.from_numpy(CELLS).float()
    assert np.array_equal(VICTIM.scores(frames).argmax(1).numpy(), ACTIONS)
    assert CLEAN > 0.5
    assert LEAST < -0.6
    report = rrl.attack_policy(VICTIM, RECIPE, ATTACKS["random"](), ThreatModel(norm=math.inf, step=0.0), 600, seed=0)
    undiscounted = TabularMDP(MDP.successors, MDP.probabilities, MDP.rewards, MDP.terminal, 1.0, MDP.start)
    mean, spread = undiscounted.value(undiscounted.evaluate(ACTIONS)), report.returns.std() / math.sqrt(600)
    assert report.mean == pytest.approx(mean, abs=4 * spread)  # the horizon cuts off next to nothing


def test_everything_in_the_ball_is_confused_with_a_neighbour() -> None:
    """The ball is continuous, the neighbours are nine: no point of it makes the victim do what none of theirs does."""
    offsets = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2_000, 2))).float()
    for cell, near in zip(torch.from_numpy(CELLS).float(), NEIGHBOURS, strict=True):
        done = VICTIM.scores(cell + offsets).argmax(1).numpy()
        assert set(done.tolist()) == set(ACTIONS[near].tolist())


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_no_attack_of_the_gallery_is_worse_than_the_exact_worst_case(name: str) -> None:
    attack = ATTACKS[name]()
    try:
        attack.check(VICTIM, THREAT, None)
    except ValueError:
        assert name == "salt_and_pepper"  # norm 0 alone
        return
    for seed in range(3):
        under = MDP.evaluate(answered(attack, seed))
        assert (under >= WORST.values - 1e-9).all()
        assert MDP.value(under) <= CLEAN + 1e-9  # the victim's policy is optimal: nothing makes it better
    if name in ("margin", "pgd", "flip"):
        assert value(attack) <= CLEAN - 0.95 * (
            CLEAN - LEAST
        )  # with two actions to choose from, flipping is nearly all there is


def trained(command: Any, timesteps: int, n_envs: int, **options: Any) -> Attack:
    game = AdversaryVecEnv(RECIPE, VICTIM, THREAT, command, n_envs, seed=0)
    settings = {"batch_size": 512, "n_epochs": 20, "learning_rate": 3e-3, "gamma": MDP.gamma, "seed": 0, "device": "cpu"}
    return game.attack(PPO("MlpPolicy", game, **{**settings, **options}).learn(timesteps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "timesteps", "options"),
    [
        (Perturbation(), 45_056, {"n_envs": 64, "n_steps": 32, "ent_coef": 0.01, "gae_lambda": 0.9}),
        (TargetAction(steps=5), 16_384, {"n_envs": 32, "n_steps": 256, "ent_coef": 0.02}),
        (ActionDirection(steps=5), 12_288, {"n_envs": 32, "n_steps": 64, "ent_coef": 0.01}),
    ],
    ids=["SA-RL", "PA-AD, target", "PA-AD, direction"],
)
def test_adversaries_that_learn_reach_the_optimum(command: Any, timesteps: int, options: dict[str, Any]) -> None:
    """Within 5 % of the damage that can be done at all."""
    attack = trained(command, timesteps, **options)
    assert (MDP.evaluate(answered(attack)) >= WORST.values - 1e-9).all()
    assert CLEAN - value(attack) >= 0.95 * (CLEAN - LEAST)
