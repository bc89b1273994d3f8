"""Training: SB3 under noise, into a complete run directory or none."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Pixels, Steps

from robustrl import presets
from robustrl.api import attack_policy, load_agent
from robustrl.attacks import ATTACKS, GradientAttack, Margin
from robustrl.envs.chain import layers_of
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.noise import Gaussian
from robustrl.policy import Normalization, PolicyView
from robustrl.policy.loading import load_model
from robustrl.rollouts.collect import collect, make_job
from robustrl.threat import ThreatModel
from robustrl.training import train as train_module
from robustrl.training.presets import Preset, preset_for
from robustrl.training.robust import SADQN, SAPPO
from robustrl.training.run_files import RunInfo
from robustrl.training.train import train

RECIPE = EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.2), max_episode_steps=100)
QUICK: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 32, "batch_size": 64, "n_epochs": 2},
    "a2c": {"n_steps": 8},
    "dqn": {"learning_starts": 32, "buffer_size": 200, "train_freq": (8, "step"), "gradient_steps": 1, "batch_size": 16},
}


def quick(out: Path, algo: str = "ppo", **options: Any) -> Any:
    settings = {"timesteps": 128, "n_envs": 2, "hyperparameters": QUICK.get(algo)}
    return train(options.pop("env", RECIPE), out, algo=algo, **(settings | options))


@pytest.mark.parametrize(("algo", "kind"), [("ppo", PPO), ("a2c", A2C), ("dqn", DQN)])
def test_a_run_directory_holds_what_is_needed_to_go_on(tmp_path: Path, algo: str, kind: Any) -> None:
    model = quick(tmp_path / "run", algo)
    assert type(model) is kind
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.zip", "run.json", "tb"]
    run = RunInfo.load(tmp_path / "run")
    assert (run.algo, run.seed, run.timesteps) == (algo, 0, 128)
    assert run.env == RECIPE
    assert run.hyperparameters.items() >= json.loads(json.dumps(QUICK[algo])).items()
    assert run.versions["torch"] == torch.__version__
    loaded = load_agent(tmp_path / "run")
    frames = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    assert np.array_equal(loaded.predict(frames, deterministic=True)[0], model.predict(frames, deterministic=True)[0])
    assert model.observation_space == model.get_env().observation_space
    assert model.get_env().recipe == RECIPE


def test_training_is_seen_through_noise(tmp_path: Path) -> None:
    """In `Steps` the true observation is a whole number."""
    env = EnvRecipe(factory=lambda: Steps(20, flat=True), max_episode_steps=20, noise=Gaussian(0.25))
    model = quick(tmp_path / "run", env=env)
    seen = model.rollout_buffer.observations.ravel()
    noise = (seen + 0.5) % 1 - 0.5
    assert noise.std() == pytest.approx(0.25, rel=0.2)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    prints = [PolicyView.of(quick(tmp_path / name, seed=seed)).fingerprint() for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_weights_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    prints = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            prints.append(PolicyView.of(quick(tmp_path / str(threads))).fingerprint())
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert prints[0] == prints[1]


def test_tensorboard_gets_sb3s_scalars_in_one_run(tmp_path: Path) -> None:
    quick(tmp_path / "run", timesteps=512)
    folders = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents*")}
    assert folders == {tmp_path / "run" / "tb"}
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    assert {"rollout/ep_rew_mean", "train/loss", "time/fps"} <= set(events.Tags()["scalars"])


def test_a_second_model_is_not_written_over_the_first(tmp_path: Path) -> None:
    quick(tmp_path)
    before = (tmp_path / "model.zip").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a model; choose another --out"):
        quick(tmp_path)
    assert (tmp_path / "model.zip").read_bytes() == before


@pytest.mark.parametrize("moment", ["learning", "saving", "replacing"])
def test_an_interrupted_run_leaves_no_half_written_model(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target, name = {"learning": (PPO, "learn"), "saving": (PPO, "save"), "replacing": (os, "replace")}[moment]
        patch.setattr(target, name, stop)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.part"))
    assert not (tmp_path / "run" / "model.zip").exists()
    quick(tmp_path / "run")  # and the folder can be used again
    assert load_agent(tmp_path / "run") is not None


def test_an_environment_from_a_factory_is_named_and_must_be_given_again(tmp_path: Path) -> None:
    env = EnvRecipe(factory=lambda: Steps(20, flat=True), max_episode_steps=20, noise=Gaussian(0.25))
    model = quick(tmp_path, env=env)
    assert not RunInfo.load(tmp_path).self_contained
    assert PolicyView.of(load_agent(tmp_path, env)).fingerprint() == PolicyView.of(model).fingerprint()
    assert load_agent(tmp_path) is not None  # acting needs no environment
    with pytest.raises(ValueError, match="pass the environment again"):
        _ = RunInfo.load(tmp_path).env


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"algo": "trpo"},
            ValueError,
            "algo must be one of ppo, a2c, dqn, sac, td3, ddpg, recurrent_ppo, sa_ppo, sa_dqn, got 'trpo'",
        ),
        ({"algo": "sac"}, ValueError, r"sac needs a Box action space, but CartPole-v1 takes Discrete\(2\)"),
        ({"algo": "dqn", "env": "Pendulum-v1"}, ValueError, "dqn needs a Discrete action space"),
        ({"timesteps": 0}, ValueError, "timesteps must be an integer >= 1, got 0"),
        ({"timesteps": 1.5}, TypeError, "timesteps must be an integer >= 1"),
        ({"n_envs": 0}, ValueError, "n_envs must be an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an integer >= 0"),
        ({"hyperparameters": {"n_steps": 8, "wings": 2}}, TypeError, "wings"),
        ({"algo": "sa-dqn", "env": "Pendulum-v1"}, ValueError, "sa_dqn needs a Discrete action space"),
        (
            {"hyperparameters": {"epsilon": 0.1, "kappa": 1}},
            ValueError,
            "epsilon, kappa: only the algorithms sa_ppo and sa_dqn take this .*, got algo ppo",
        ),
        ({"algo": "sa-ppo", "hyperparameters": {"kappa": -1}}, ValueError, "kappa must be a finite number >= 0"),
        ({"env": "Nothing-v0"}, ValueError, "unknown environment id"),
        ({"env": EnvRecipe(factory=lambda: Steps(3), noise=Gaussian(0.1))}, ChainError, "no finite horizon"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quick(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("algo", "kind", "plain"), [("sa-ppo", SAPPO, PPO), ("sa_dqn", SADQN, DQN)])
def test_robust_algorithms_are_trained_by_name_and_loaded_as_plain_ones(
    tmp_path: Path, algo: str, kind: Any, plain: Any
) -> None:
    name = algo.replace("-", "_")
    settings = {**QUICK[name.removeprefix("sa_")], "epsilon": 0.05, "kappa": 0.2, "norm": "2", "loss": "ibp"}
    model = quick(tmp_path / "run", algo, hyperparameters=settings)
    assert type(model) is kind
    assert (model.epsilon, model.kappa, model.norm, model.loss) == (0.05, 0.2, "2", "ibp")
    run = RunInfo.load(tmp_path / "run")
    assert run.algo == name
    assert run.hyperparameters.items() >= {"epsilon": 0.05, "kappa": 0.2, "norm": "2", "loss": "ibp"}.items()
    loaded = load_agent(tmp_path / "run")
    assert type(loaded) is plain
    assert type(load_model(tmp_path / "run" / "model.zip", algo=algo)) is plain
    assert PolicyView.of(loaded).fingerprint() == PolicyView.of(model).fingerprint()


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_presets_are_arguments_that_sb3_takes_and_cannot_change() -> None:
    before = repr(presets.cartpole)
    for algo, kind in (("ppo", PPO), ("a2c", A2C), ("dqn", DQN)):
        arguments = dict(getattr(presets.cartpole, algo))
        model = kind("MlpPolicy", "CartPole-v1", **arguments)
        model.policy_kwargs["optimizer_class"] = "spoilt"
        for name, value in arguments.items():
            if name not in ("policy_kwargs", "device", "train_freq"):
                assert getattr(model, name, None) == value or callable(getattr(model, name, None)), name
    assert repr(presets.cartpole) == before
    with pytest.raises(TypeError):
        presets.cartpole.ppo["n_steps"] = 1  # type: ignore[index]


def test_presets_of_robust_algorithms_come_on_top_of_the_plain_ones() -> None:
    assert presets.mujoco.arguments("sa_ppo") == {**presets.mujoco.ppo, "epsilon": 0.075, "kappa": 0.1}
    assert presets.cartpole.arguments("sa_dqn") == {**presets.cartpole.dqn, **presets.cartpole.sa_dqn}
    assert presets.cartpole.arguments("ppo") == dict(presets.cartpole.ppo)


def test_presets_belong_to_environments() -> None:
    assert preset_for("CartPole-v1") is preset_for("CartPole-v0") is presets.cartpole
    for other in (None, "Acrobot-v1", "robustrl/TextGrid-v0"):
        assert dict(preset_for(other).ppo) == dict(Preset().ppo) == {}


def test_hyperparameters_replace_the_presets(tmp_path: Path) -> None:
    model = quick(tmp_path, hyperparameters={**QUICK["ppo"], "learning_rate": 5e-4})
    assert model.learning_rate == 5e-4
    assert model.policy.net_arch == [64, 64]  # the rest is the preset's
    assert load_model(tmp_path / "model.zip").learning_rate == 5e-4


def test_a_model_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quick(tmp_path / "run")
    target = tmp_path / "model.zip"
    target.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        train_module.save_model(model, target)
    assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob("*.part"))


def test_a_progress_bar_needs_no_library_that_we_do_not_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.rich", None)
    train("CartPole-v1", tmp_path / "run", timesteps=64, hyperparameters={"n_steps": 4, "batch_size": 64}, progress_bar=True)
    assert "64/64" in capsys.readouterr().out


def test_a_normalisation_that_is_learned_is_inside_noise_and_frame_stack(tmp_path: Path) -> None:
    model = quick(tmp_path / "run", env=replace(RECIPE, frame_stack=2), normalize=True)
    layers, layer = [], model.get_env()
    while hasattr(layer, "venv"):
        layers.append(type(layer).__name__)
        layer = layer.venv
    assert layers == ["FrameStack", "NoiseObservation", "VecNormalize"]


@pytest.mark.parametrize("attack", ["learned", "margin"])
def test_adversarial_training_leaves_a_run_of_the_environment_without_attack(tmp_path: Path, attack: str) -> None:
    threat = ThreatModel(norm=math.inf, step=0.1)
    attacker: Any = attack if attack == "learned" else ATTACKS[attack]()
    hyperparameters = {"n_steps": 32, "batch_size": 64, "n_epochs": 1}
    preset = replace(preset_for("CartPole-v1"), ppo=hyperparameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "preset_for", lambda _: preset)
        model = quick(tmp_path / "run", attack=attacker, threat=threat, hyperparameters=None)
    chain = [layer.name for layer in layers_of(model.get_env())]
    assert chain[-2:] == ["VecAttack", "NoiseObservation"]
    run = RunInfo.load(tmp_path / "run")
    assert run.env == RECIPE
    assert run.hyperparameters["attack"]["threat"] == json.loads(json.dumps(threat.to_dict()))
    assert load_agent(tmp_path / "run").predict(np.zeros((1, 4), np.float32))[0].shape == (1,)
    with pytest.raises(ValueError, match="attack and threat go together"):
        quick(tmp_path / "other", attack=attacker)


def test_an_attack_is_met_inside_a_normalisation_that_learns(tmp_path: Path) -> None:
    threat = ThreatModel(norm=math.inf, step=0.1, units="normalized")
    model = quick(tmp_path / "run", attack=ATTACKS["margin"](), threat=threat, normalize=True)
    chain = [layer.name for layer in layers_of(model.get_env())]
    assert chain[-3:] == ["VecNormalize", "VecAttack", "NoiseObservation"]
    assert RunInfo.load(tmp_path / "run").env.normalization is not None
    with pytest.raises(ValueError, match="units must be 'normalized'"):
        quick(tmp_path / "other", attack=ATTACKS["margin"](), threat=ThreatModel(norm=math.inf, step=0.1), normalize=True)


def test_byte_pictures_are_attacked_in_whole_grey_levels_while_a_network_learns(tmp_path: Path) -> None:
    env = EnvRecipe(factory=Pixels, max_episode_steps=20)
    threat = ThreatModel(norm=math.inf, step=4)
    model = quick(tmp_path / "run", env=env, attack=ATTACKS["margin"](), threat=threat, n_envs=1, timesteps=64)
    assert model.observation_space.dtype == np.uint8
    assert load_model(tmp_path / "run" / "model.zip").observation_space.shape == model.observation_space.shape


@pytest.mark.parametrize(
    ("env", "algo", "attack", "message"),
    [
        ("Pendulum-v1", "ppo", ATTACKS["margin"](), "Margin compares discrete actions"),
        ("CartPole-v1", "dqn", "learned", "'learned' needs an algorithm with rollouts.*got algo dqn"),
        ("CartPole-v1", "recurrent_ppo", ATTACKS["margin"](), "victim must have no memory"),
    ],
)
def test_an_attack_that_cannot_serve_the_learner_leaves_no_folder(
    env: str, algo: str, attack: Any, message: str, tmp_path: Path
) -> None:
    threat = ThreatModel(norm=math.inf, step=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        quick(tmp_path / "run", env=env, algo=algo, attack=attack, threat=threat, normalize=False)
    assert not (tmp_path / "run").exists()


def test_a_robustness_option_without_its_algorithm_says_what_takes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epsilon.*sa_ppo.*sa-ppo.*--attack"):
        quick(tmp_path / "run", hyperparameters={"epsilon": 0.1})


@pytest.mark.parametrize(
    ("algo", "robust", "kind", "loaded", "network", "activation"),
    [
        ("ppo", "fgsm-rs", SAPPO, PPO, None, "swish:4"),
        ("dqn", "n-fgsm", SADQN, DQN, "lipschitz-mlp", "maxmin"),
        ("sa_ppo", "pgd", SAPPO, PPO, "lipschitz-mlp", None),
    ],
)
def test_robust_training_ends_with_the_weights_that_did_best_under_attack(
    tmp_path: Path, algo: str, robust: str, kind: Any, loaded: Any, network: str | None, activation: str | None
) -> None:
    hyperparameters = {**QUICK[algo.removeprefix("sa_")], "epsilon": 0.05, "learning_rate": 3e-3}
    options = {"robust": robust, "network": network, "activation": activation, "timesteps": 640}
    env = replace(RECIPE, noise=None, max_episode_steps=40)
    model = quick(tmp_path / "run", algo, env=env, hyperparameters=hyperparameters, **options)
    assert type(model) is kind
    assert model.loss == robust
    run = RunInfo.load(tmp_path / "run")
    assert run.algo == {"ppo": "sa_ppo", "dqn": "sa_dqn"}.get(algo, algo)
    assert run.hyperparameters.get("network") == network
    best, last = load_agent(tmp_path / "run"), load_model(tmp_path / "run" / "model-last.zip")
    assert type(best) is loaded
    assert PolicyView.of(best).fingerprint() == PolicyView.of(model).fingerprint()
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    worst = {row.step: row.value for row in events.Scalars("robust_eval/worst")}
    kept = run.hyperparameters["robust"]
    assert kept["worst_mean_return"] == pytest.approx(max(worst.values()))
    attack = GradientAttack(Margin()), ThreatModel(norm=math.inf, step=0.05)
    means = [min(attack_policy(each, env, *attack, 20, seed=0).mean, clean_mean(each, env)) for each in (best, last)]
    assert means[0] == pytest.approx(kept["worst_mean_return"])
    assert means[0] >= means[1]


def clean_mean(model: Any, env: EnvRecipe) -> float:
    return float(collect(make_job(env.view(model), env, seed=0), 20).returns.mean())


def test_the_best_weights_come_with_what_normalised_their_observations(tmp_path: Path) -> None:
    env = replace(RECIPE, noise=None, max_episode_steps=40)
    model = quick(
        tmp_path, env=env, normalize=True, timesteps=640, robust="fgsm-rs", hyperparameters={**QUICK["ppo"], "epsilon": 0.1}
    )
    run = RunInfo.load(tmp_path)
    kept, live = run.env.normalization, Normalization.of(model.get_vec_normalize_env())
    assert kept is not None
    assert (kept == live) == (run.hyperparameters["robust"]["timesteps"] == model.num_timesteps)
    assert Normalization.load(tmp_path / "normalization-last.npz") == live
    threat = ThreatModel(norm=math.inf, step=0.1, units="normalized")
    again = attack_policy(load_agent(tmp_path), run.env, GradientAttack(Margin()), threat, 20, seed=0).mean
    worst = run.hyperparameters["robust"]["worst_mean_return"]
    assert min(again, clean_mean(load_agent(tmp_path), run.env)) == pytest.approx(worst)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robust": "fgsm"}, "robust must be one of"),
        ({"robust": "pgd", "algo": "a2c"}, "robust 'pgd' needs algo ppo, dqn, sa_ppo or sa_dqn, got a2c"),
        ({"robust": "pgd", "hyperparameters": {"loss": "ibp"}}, "robust and the hyper-parameter loss exclude each other"),
        ({"robust": "pgd"}, "robust needs the hyper-parameter epsilon, .*--epsilon"),
        (
            {"robust": "pgd", "attack": "learned", "threat": ThreatModel(norm=math.inf, step=0.1)},
            "robust and attack exclude each other",
        ),
        ({"network": "resnet"}, "network must be one of"),
        ({"activation": "sine"}, "activation must be one of"),
        (
            {"network": "lipschitz-mlp", "hyperparameters": {"policy_kwargs": {"net_arch": [8]}}},
            "hyperparameters must not set net_arch in policy_kwargs beside network",
        ),
    ],
)
def test_what_robust_training_cannot_do_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_last_weights_survive_an_interrupt_of_the_last_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustrl.training.robust.RobustEvalCallback.evaluate", stop)
    settings = {**QUICK["ppo"], "epsilon": 0.1}
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path, robust="fgsm-rs", hyperparameters=settings, timesteps=32, normalize=True)
    assert type(load_model(tmp_path / "model-last.zip")) is PPO
    assert Normalization.load(tmp_path / "normalization-last.npz") is not None
    assert not (tmp_path / "model.zip").exists()


@pytest.mark.parametrize(("algo", "evaluations"), [("ppo", 1), ("dqn", 4)])
def test_weights_that_nothing_changed_are_not_evaluated_again_and_evaluations_are_announced(
    tmp_path: Path, algo: str, evaluations: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 steps per update of PPO, and 32 before the first of DQN; one more evaluation at the end."""
    settings = {**QUICK[algo], "epsilon": 0.1}
    env = replace(RECIPE, max_episode_steps=5)
    steps = {"ppo": 64, "dqn": 100}[algo]
    quick(tmp_path, algo, env=env, robust="fgsm-rs", hyperparameters=settings, timesteps=steps, progress_bar=True)
    assert capsys.readouterr().out.count("evaluating 20 episodes each: clean, pgd") == evaluations


def test_a_lipschitz_network_is_recorded_as_built(tmp_path: Path) -> None:
    model = quick(tmp_path, "dqn", network="lipschitz-mlp")
    assert RunInfo.load(tmp_path).hyperparameters["policy_kwargs"]["net_arch"] == model.policy.net_arch == []


def test_a_lipschitz_network_for_continuous_actions_warns_that_nothing_certifies_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="network lipschitz-mlp: certificates without noise take discrete actions only"):
        model = quick(tmp_path, "sac", env="Pendulum-v1", network="lipschitz-mlp", timesteps=4)
    assert type(model) is SAC
