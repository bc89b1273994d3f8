"""Training against attackers that learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import VecNormalize

import robustrl as rrl
from robustrl.attacks import ActionDirection, GradientAttack, LearnedAttack, Margin, RandomNoise
from robustrl.envs import EnvRecipe, make_vec_env, set_victim
from robustrl.envs.hosts import as_learner_sees, attack_host
from robustrl.envs.recipe import wrap_vec_env
from robustrl.policy import Normalization, PolicyView
from robustrl.threat import ThreatModel
from robustrl.training.robust import ATLA, SAPPO

CARTPOLE, THREAT = EnvRecipe.of("CartPole-v1", max_episode_steps=100), ThreatModel(norm=math.inf, step=0.1)
SMALL = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "device": "cpu"}


def test_the_chain_puts_the_attack_between_normalisation_and_noise() -> None:
    recipe = EnvRecipe.of(CARTPOLE, noise=rrl.Gaussian(0.1), frame_stack=2)
    venv = make_vec_env(recipe, 2, attack=GradientAttack(Margin()), threat=THREAT, seed=0)
    assert " -> VecAttack -> NoiseObservation -> FrameStack" in str(rrl.check_chain(venv))
    model = PPO("MlpPolicy", venv, seed=0, **SMALL)
    set_victim(venv, model)
    model.learn(128)
    assert EnvRecipe.of(venv).to_dict() == recipe.to_dict()  # a certificate is about the environment without this attack
    with pytest.raises(ValueError, match="go together"):
        make_vec_env(CARTPOLE, attack=RandomNoise())
    with pytest.raises(ValueError, match="no attack in its chain"):
        set_victim(make_vec_env(CARTPOLE), model)


@pytest.mark.parametrize("command", [None, ActionDirection()])
@pytest.mark.parametrize("kind", [PPO, SAPPO])
def test_agent_and_adversary_learn_in_turns(kind: type[PPO], command: ActionDirection | None) -> None:
    venv = make_vec_env(CARTPOLE, 2, attack=RandomNoise(), threat=THREAT, seed=0)
    robust = {"epsilon": 0.1, "kappa": 0.1} if kind is SAPPO else {}
    model, game = kind("MlpPolicy", venv, seed=0, **SMALL, **robust), ATLA(CARTPOLE, THREAT, command, n_envs=2, **SMALL)
    model.learn(192, callback=game)
    assert game.adversary is not None
    assert game.adversary.num_timesteps == 192
    attack = attack_host(venv).core.attack
    assert isinstance(attack, LearnedAttack)
    assert attack.adversary.fingerprint() == PolicyView.of(game.adversary).fingerprint()  # as it is now, not as it was
    assert attack_host(venv).victim.fingerprint() == PolicyView.of(model).fingerprint()


def test_a_normalisation_that_still_learns_is_followed() -> None:
    threat = ThreatModel(norm=math.inf, step=0.1, units="normalized")
    normalizer = VecNormalize(make_vec_env(CARTPOLE, 2, seed=0))
    model = PPO("MlpPolicy", wrap_vec_env(normalizer, CARTPOLE, RandomNoise(), threat), seed=0, **SMALL)
    game = ATLA(CARTPOLE, threat, n_envs=2, **SMALL)
    model.learn(256, callback=game)
    followed = game._duels._duel.recipe.normalization
    assert followed is not None
    assert np.abs(followed.mean - normalizer.obs_rms.mean).max() < 0.2
    assert not np.array_equal(followed.mean, np.zeros(4))
    with pytest.raises(TypeError, match="needs a learner with rollouts"):
        DQN("MlpPolicy", make_vec_env(CARTPOLE)).learn(10, callback=ATLA(CARTPOLE, THREAT))


def test_a_normalisation_outside_the_attack_is_followed_on_its_side() -> None:
    venv = VecNormalize(make_vec_env(CARTPOLE, 2, attack=RandomNoise(), threat=THREAT, seed=0), norm_reward=False)
    model = PPO("MlpPolicy", venv, seed=0, **SMALL)
    game = ATLA(CARTPOLE, THREAT, n_envs=2, **SMALL)
    model.learn(192, callback=game)
    assert game._duels._duel.recipe.normalize == "after_noise"
    game._duels.renormalize(as_learner_sees(CARTPOLE, model))
    raw = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [1.0], [100.0], [1.0], [1.0]]
    )  # clipped too
    seen = torch.from_numpy(venv.normalize_obs(raw.numpy())).float()
    assert torch.allclose(
        game._duels._duel.victim.scores(raw), PolicyView.of(model, normalization=Normalization.of(venv)).scores(seen), atol=1e-5
    )
    assert torch.allclose(attack_host(venv).victim.scores(raw), game._duels._duel.victim.scores(raw), atol=1e-5)


def test_a_second_stretch_of_training_goes_on_with_the_same_adversary() -> None:
    venv = make_vec_env(CARTPOLE, 2, attack=RandomNoise(), threat=THREAT, seed=0)
    model, game = PPO("MlpPolicy", venv, seed=0, **SMALL), ATLA(CARTPOLE, THREAT, n_envs=2, **SMALL)
    model.learn(64, callback=game)
    duels = game._duels
    model.learn(64, callback=game, reset_num_timesteps=False)
    assert game._duels is duels
    assert game.adversary.num_timesteps == 128
    with pytest.raises(ValueError, match="goes with one learner"):
        PPO("MlpPolicy", make_vec_env(CARTPOLE, 2, attack=RandomNoise(), threat=THREAT), **SMALL).learn(64, callback=game)
    with pytest.raises(ValueError, match="threat must be that of the agent's VecAttack"):
        model.learn(64, callback=ATLA(CARTPOLE, ThreatModel(norm=math.inf, step=0.3)))


def test_the_adversary_meets_observations_as_they_are_and_the_agents_statistics_of_now() -> None:
    venv = VecNormalize(make_vec_env(CARTPOLE, 2, attack=RandomNoise(), threat=THREAT, seed=0), norm_reward=False)
    model, game = PPO("MlpPolicy", venv, seed=0, **SMALL), ATLA(CARTPOLE, THREAT, n_envs=2, **SMALL)
    model.learn(192, callback=game)
    assert not game.adversary.get_vec_normalize_env().norm_obs  # statistics that its attack would not have
    before = game._duels._duel.recipe.normalization
    model.learn(128, callback=game, reset_num_timesteps=False)
    assert not np.array_equal(before.mean, game._duels._duel.recipe.normalization.mean)
