"""SAPPO and SADQN: SB3's own weights without the term, the sum's gradient with it, saved and loaded as any model."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor

import robustrl as rrl
from robustrl import attacks
from robustrl.training.robust import (
    SADQN,
    SAPPO,
    Ascent,
    Consistency,
    Constant,
    Linear,
    Margin,
    Minibatch,
    Neighbourhood,
    Regularizer,
    StateAdversarial,
)

from .blank import Blank

PPO_QUICK: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}
DQN_QUICK: dict[str, Any] = {"learning_starts": 50, "batch_size": 16, "target_update_interval": 40, "seed": 3, "device": "cpu"}


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.state_dict().values()])


class Searching(Regularizer):
    """Does all that the state-adversarial loss does, and counts for nothing."""

    kinds = ("logits", "gaussian", "q")

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def loss(self, policy: Any, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
        self.modes.append(any(layer.training for layer in policy.modules()))
        return 0.0 * StateAdversarial(Ascent(3, temperature=1e-3)).loss(policy, batch, around, generator)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("options", [{"kappa": 0}, {"loss": Searching()}], ids=["kappa0", "zero-term"])
def test_without_a_term_the_weights_are_sb3s_ppos_bit_by_bit(env: str, options: dict[str, Any]) -> None:
    ours = SAPPO("MlpPolicy", env, **options, **PPO_QUICK).learn(256)
    theirs = PPO("MlpPolicy", env, **PPO_QUICK).learn(256)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("options", [{"kappa": 0}, {"loss": Searching()}], ids=["kappa0", "zero-term"])
def test_without_a_term_the_weights_are_sb3s_dqns_bit_by_bit(options: dict[str, Any]) -> None:
    ours = SADQN("MlpPolicy", "CartPole-v1", **options, **DQN_QUICK).learn(300)
    theirs = DQN("MlpPolicy", "CartPole-v1", **DQN_QUICK).learn(300)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_one_step_follows_the_gradient_of_ppos_loss_plus_kappa_times_the_term(env: str) -> None:
    """Plain gradient descent: the difference to PPO's step is the term's gradient, computed by hand on the rollout."""
    options = PPO_QUICK | {
        "batch_size": 64,
        "n_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
    }
    term = {"epsilon": 0.2, "kappa": 0.5, "loss": "ibp", "epsilon_schedule": "constant"}
    ours = SAPPO("MlpPolicy", env, **term, **options).learn(64)
    theirs = PPO("MlpPolicy", env, **options).learn(64)
    start = SAPPO("MlpPolicy", env, **term, **options)
    tools = start._prepared()
    rollout = torch.as_tensor(ours.rollout_buffer.observations)  # flat since the update
    loss = tools.regularizer.loss(tools.policy, Minibatch(rollout), tools.around, tools.generator)
    (0.5 * loss).backward()
    assert ours.logger.name_to_value["train/robust_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for mine, other, p in zip(ours.policy.parameters(), theirs.policy.parameters(), start.policy.parameters(), strict=True):
        expected = torch.zeros_like(p) if p.grad is None else -1e-2 * p.grad
        torch.testing.assert_close((mine - other).detach(), expected, rtol=1e-3, atol=1e-7)
    assert (weights(ours) - weights(theirs)).abs().max() > 1e-5


def test_one_step_follows_the_gradient_of_dqns_loss_plus_kappa_times_the_term() -> None:
    options = DQN_QUICK | {
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "train_freq": 60,
        "policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
    }
    term = {"epsilon": 0.2, "kappa": 0.5, "loss": "ibp", "epsilon_schedule": "constant"}
    ours = SADQN("MlpPolicy", "CartPole-v1", **term, **options).learn(60)
    theirs = DQN("MlpPolicy", "CartPole-v1", **options).learn(60)
    start = SADQN("MlpPolicy", "CartPole-v1", **term, **options)
    tools = start._prepared()
    assert ours._minibatch is not None
    (0.5 * tools.regularizer.loss(tools.policy, ours._minibatch, tools.around, tools.generator)).backward()
    triples = zip(ours.q_net.parameters(), theirs.q_net.parameters(), start.q_net.parameters(), strict=True)
    for mine, other, p in triples:
        torch.testing.assert_close((mine - other).detach(), -1e-2 * p.grad, rtol=1e-3, atol=1e-7)


def test_the_clipped_gradient_is_that_of_the_sum() -> None:
    options = PPO_QUICK | {
        "batch_size": 64,
        "n_epochs": 1,
        "learning_rate": 1.0,
        "max_grad_norm": 1e-3,
        "policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
    }
    model = SAPPO("MlpPolicy", "CartPole-v1", kappa=1e3, loss="ibp", epsilon_schedule="constant", **options)
    before = weights(model).clone()
    model.learn(64)
    assert torch.linalg.vector_norm(weights(model) - before).item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("kind", "options"), [(SAPPO, PPO_QUICK), (SADQN, DQN_QUICK)], ids=["sappo", "sadqn"])
def test_minibatches_are_what_the_learner_stores_and_the_policy_is_in_evaluation_mode(kind: Any, options: Any) -> None:
    term = Searching()
    venv = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), clip_obs=1.5)
    model = kind("MlpPolicy", venv, loss=term, **options).learn(200)
    assert term.modes
    assert not any(term.modes)
    assert model._minibatch is not None
    assert model._minibatch.observations.abs().max() <= 1.5
    assert model._minibatch.observations.std() > 0.3  # CartPole's raw ones are about 0.05
    assert "zero_grad" not in vars(model.policy.optimizer)
    assert not {"get", "sample"} & (vars(getattr(model, "rollout_buffer", model)).keys() | vars(model).keys())


def test_a_threat_model_behind_a_vec_normalize_is_in_normalised_units() -> None:
    def learner(**threat: Any) -> SAPPO:
        venv = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
        return SAPPO("MlpPolicy", venv, epsilon=rrl.ThreatModel(norm=2, step=0.3, **threat), **PPO_QUICK)

    assert learner(units="normalized")._prepared().around.radius == 0.3
    with pytest.raises(ValueError, match="epsilon is in units 'raw', but the learner's observations are in units 'normalized'"):
        learner()


def test_ppos_minibatch_has_advantages_as_the_loss_has_them() -> None:
    model = SAPPO("MlpPolicy", "CartPole-v1", loss=Searching(), **PPO_QUICK).learn(64)
    batch = model._minibatch
    assert batch is not None
    advantages, old_log_prob = batch.needed("advantages", "old_log_prob")
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std().item() == pytest.approx(1, rel=1e-4)
    assert (len(old_log_prob), batch.clip_range) == (32, 0.2)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (SAPPO("MlpPolicy", "Pendulum-v1", **{**PPO_QUICK, "seed": seed}).learn(128) for seed in (3, 3, 4))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_the_schedule_scales_the_radius_and_both_are_logged() -> None:
    seen: list[float] = []

    class Recording(Searching):
        def loss(self, policy: Any, batch: Minibatch, around: Neighbourhood, generator: torch.Generator) -> Tensor:
            seen.append(around.radius)
            return super().loss(policy, batch, around, generator)

    schedule = Linear(0.25, 0.75)
    model = SAPPO("MlpPolicy", "CartPole-v1", epsilon=0.4, epsilon_schedule=schedule, loss=Recording(), **PPO_QUICK).learn(256)
    # four rollouts, after 1/4, 2/4, 3/4 and all of training
    assert sorted(set(seen)) == pytest.approx([0.0, 0.2, 0.4])
    assert model.logger.name_to_value["train/epsilon"] == pytest.approx(0.4)
    assert model.logger.name_to_value["train/robust_loss"] == 0.0


@pytest.mark.parametrize("loss", ["sgld", "pgd", "ibp", "radial"])
@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize(("kind", "env"), [(SAPPO, "CartPole-v1"), (SAPPO, "Pendulum-v1"), (SADQN, "CartPole-v1")])
def test_every_loss_trains_under_every_norm(kind: Any, env: str, norm: str, loss: str) -> None:
    options = PPO_QUICK if kind is SAPPO else DQN_QUICK
    model = kind("MlpPolicy", env, epsilon=0.3, norm=norm, loss=loss, kappa=1.0, epsilon_schedule="constant", **options)
    before = weights(model).clone()
    model.learn(128)
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("loss", ["pgd", "ibp"])
@pytest.mark.parametrize("kind", [SAPPO, SADQN])
def test_pictures_are_trained_on_in_grey_levels(kind: Any, loss: str) -> None:
    env = Blank(spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Discrete(2))
    options = {"n_steps": 16, "batch_size": 8, "n_epochs": 1} if kind is SAPPO else {"learning_starts": 8, "buffer_size": 20}
    threat = rrl.ThreatModel(norm=math.inf, step=1 / 255, units="unit01")
    model = kind("CnnPolicy", env, epsilon=threat, loss=loss, epsilon_schedule="constant", device="cpu", seed=0, **options)
    model.learn(16)
    assert model.logger.name_to_value["train/epsilon"] == pytest.approx(1.0)
    assert model._minibatch is not None
    assert model._minibatch.observations.dtype == torch.float32
    assert model._minibatch.observations.max() > 200
    assert math.isfinite(model.logger.name_to_value["train/robust_loss"])


def test_a_term_that_trains_gets_smaller() -> None:
    """Nothing but the term: with a value of kappa that drowns everything else, the bound of the divergence falls."""
    model = SAPPO("MlpPolicy", "Pendulum-v1", kappa=1e4, loss="ibp", epsilon_schedule="constant", **PPO_QUICK)
    model.learn(64)
    first = model.logger.name_to_value["train/robust_loss"]
    model.learn(1024)
    assert model.logger.name_to_value["train/robust_loss"] < 0.5 * first


def test_saved_models_load_like_any_and_safely_as_plain_ones(tmp_path: Path) -> None:
    for kind, options, plain, loss in (
        (SAPPO, PPO_QUICK, PPO, "ibp"),
        (SADQN, DQN_QUICK, DQN, Margin()),
        (SAPPO, PPO_QUICK, PPO, Consistency(rrl.Gaussian(0.1))),
    ):
        model = kind("MlpPolicy", "CartPole-v1", epsilon=rrl.ThreatModel(norm=2, step=0.1), kappa=0.3, loss=loss, **options)
        model.learn(128).save(tmp_path / "model.zip")
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            assert not {"_tools", "_minibatch"} & json.loads(archive.read("data")).keys()
        again = kind.load(tmp_path / "model.zip", device="cpu")
        assert (again.kappa, again.epsilon, again.loss) == (0.3, rrl.ThreatModel(norm=2, step=0.1), loss)
        assert torch.equal(weights(again), weights(model))
        again.set_env(model.get_env())
        again.learn(128)
        assert not torch.equal(weights(again), weights(model))
        safe = rrl.load_agent(tmp_path / "model.zip", "CartPole-v1")
        assert type(safe) is plain
        assert torch.equal(weights(safe), weights(model))
        observation = model.get_env().observation_space.sample()
        assert safe.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]


def test_a_term_for_another_policy_is_the_policys_that_is_trained() -> None:
    """A policy that was put in place of the first one is the one whose term counts."""
    model = SAPPO("MlpPolicy", "CartPole-v1", **PPO_QUICK)
    other = SAPPO("MlpPolicy", "CartPole-v1", **{**PPO_QUICK, "seed": 9})
    model.policy = other.policy
    assert model._prepared().policy.actor.extractor is other.policy.pi_features_extractor


class Broken(Searching):
    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments) + math.nan


def test_a_term_that_is_not_finite_stops_training() -> None:
    with pytest.raises(RuntimeError, match="the robustness term became nan"):
        SADQN("MlpPolicy", "CartPole-v1", loss=Broken(), **DQN_QUICK).learn(200)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"kappa": -1.0}, "kappa must be a finite number >= 0"),
        ({"kappa": math.nan}, "kappa must be a finite number >= 0"),
        ({"norm": 3}, "norm must be one of"),
        ({"loss": "crown"}, "loss must be one of 'sgld', 'pgd', 'fgsm-rs', 'n-fgsm', 'ibp', 'radial'"),
        (
            {"loss": attacks.Margin()},
            r"loss must be .* or a Regularizer of robustrl\.training\.robust.*Margin\(\) of type robustrl\.attacks",
        ),
        (
            {"epsilon_schedule": rrl.Smoothed(torch.nn.Linear(4, 2), rrl.Gaussian(0.1))},
            r"a Schedule of robustrl\.training\.robust.* of type robustrl\.certify",
        ),
        ({"epsilon_schedule": "cosine"}, "epsilon_schedule must be one of 'linear', 'smoothed', 'constant'"),
        ({"loss": Margin()}, "loss Margin needs a policy whose scores are q"),
        ({"epsilon": rrl.ThreatModel(norm=2, step=1, units="normalized")}, "epsilon is in units 'normalized'"),
        ({"use_sde": True}, "loss StateAdversarial needs a policy whose scores are .* got 'deterministic'"),
    ],
)
def test_bad_arguments_are_refused_before_training(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        SAPPO("MlpPolicy", "Pendulum-v1", **options)


def test_schedules_may_be_any_function() -> None:
    model = SAPPO("MlpPolicy", "CartPole-v1", epsilon_schedule=lambda remaining: 0.5, **PPO_QUICK).learn(64)
    assert model.logger.name_to_value["train/epsilon"] == pytest.approx(0.075 / 2)
    assert SAPPO("MlpPolicy", "CartPole-v1", epsilon_schedule=Constant(), **PPO_QUICK).learn(64)
