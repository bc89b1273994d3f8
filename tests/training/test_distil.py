"""Students: ordinary models that do on attacked observations what their teachers do on true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC
from typer.testing import CliRunner

import robustrl as rrl
from robustrl.attacks import GradientAttack, Margin
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.cli import app
from robustrl.envs.recipe import EnvRecipe
from robustrl.networks.extractors import LipschitzMLP
from robustrl.noise import Gaussian
from robustrl.policy import Normalization, PolicyView
from robustrl.threat import ThreatModel
from robustrl.training.distil import algorithm_of, distil, distil_run, student
from robustrl.training.gathering import gather
from robustrl.training.robust import SADQN
from robustrl.training.run_files import RunInfo
from robustrl.training.supervised import RobustFit, RobustTrainer

RECIPE = EnvRecipe.of("CartPole-v1", max_episode_steps=50)
PENDULUM = EnvRecipe.of("Pendulum-v1", max_episode_steps=50)
QUICK: dict[str, Any] = {"rounds": 1, "observations": 200, "epochs": 1}
KINDS = {"dqn": DQN, "ppo": PPO, "a2c": A2C}


def teacher(algo: str = "dqn", env: str = "CartPole-v1", **kwargs: Any) -> Any:
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "seed": 1, "device": "cpu"} | kwargs
    return KINDS[algo]("MlpPolicy", env, **kwargs)


def bits(model: Any) -> str:
    return PolicyView.of(model).fingerprint()


@pytest.mark.parametrize("algo", list(KINDS))
@pytest.mark.parametrize("network", ["same", "lipschitz-mlp"])
def test_a_student_is_a_model_like_any_other_and_its_teacher_stays_as_it_is(tmp_path: Path, algo: str, network: str) -> None:
    model = teacher(algo)
    before = bits(model)
    learned = distil(model, RECIPE, network=network, epsilon=0.05, **QUICK)
    assert type(learned) is KINDS[algo]
    assert bits(model) == before != bits(learned)
    learned.save(tmp_path / "model.zip")
    loaded = rrl.load_agent(tmp_path / "model.zip", RECIPE)
    assert bits(loaded) == bits(learned)
    assert rrl.attack_policy(loaded, RECIPE, GradientAttack(Margin()), ThreatModel(norm=2, step=0.1), 5).mean > 0
    if network == "lipschitz-mlp":
        assert isinstance(
            learned.policy.q_net.features_extractor if algo == "dqn" else learned.policy.pi_features_extractor, LipschitzMLP
        )
        radii = LipschitzScores.of(RECIPE.view(learned)).radii(np.zeros((3, 4), dtype=np.float32) + 0.1)[1]
        assert (radii > 0).all()
    else:
        assert learned.policy.net_arch == model.policy.net_arch


def test_a_student_learns_what_its_teacher_does() -> None:
    model, found = teacher("dqn", seed=3), list[RobustFit]()
    learned = distil(
        model, RECIPE, network="mlp", activation="swish", epsilon=0.01, observations=2_000, rounds=2, epochs=6,
        on_round=lambda _, fit: found.append(fit),
    )  # fmt: skip
    assert len(found) == 2
    assert found[-1].history[-1].clean > 0.9
    seen = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).numpy() * 0.05
    acts = [m.predict(seen.astype(np.float32), deterministic=True)[0] for m in (model, learned)]
    assert (acts[0] == acts[1]).mean() > 0.85
    for name, weights in learned.q_net.state_dict().items():
        assert torch.equal(weights, learned.q_net_target.state_dict()[name])


def test_a_seed_decides_everything_and_nobody_elses_random_numbers_change() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = distil(teacher(), RECIPE, epsilon=0.05, seed=2, **QUICK)
    students = [bits(first), *(bits(distil(teacher(), RECIPE, epsilon=0.05, seed=seed, **QUICK)) for seed in (2, 3))]
    assert students[0] == students[1] != students[2]
    torch.manual_seed(5)
    student(teacher(seed=None), seed=7)
    model = teacher(seed=None)
    torch.manual_seed(5)
    student(model, seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_later_rounds_are_played_by_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustrl.training import distil as module

    actors: list[tuple[str, bool]] = []
    gather = module.gather

    def watched(actor: PolicyView, *args: Any, **kwargs: Any) -> Any:
        actors.append((actor.fingerprint(), "attack" in kwargs))
        return gather(actor, *args, **kwargs)

    monkeypatch.setattr(module, "gather", watched)
    model = teacher()
    sizes: list[int] = []
    distil(model, RECIPE, epsilon=0.05, **QUICK | {"rounds": 2}, on_round=lambda _, fit: sizes.append(len(fit.history)))
    original = RECIPE.view(model).fingerprint()
    assert [attacked for _, attacked in actors] == [False, True] * 2
    assert [fingerprint == original for fingerprint, _ in actors] == [True, True, False, False]
    assert sizes == [1, 2]
    actors.clear()
    distil(model, RECIPE, epsilon=0.05, attacked_share=0.0, **QUICK)
    assert [attacked for _, attacked in actors] == [False]


def test_a_critic_is_distilled_in_the_units_of_rewards() -> None:
    model = teacher("ppo", learning_rate=1e-3, n_steps=256)
    with torch.no_grad():
        model.policy.value_net.bias.add_(300.0)
        model.policy.value_net.weight.mul_(50.0)
    learned = distil(model, RECIPE, network="mlp", epsilon=0.05, rounds=1, observations=600, epochs=8)
    x = gather(RECIPE.view(model), RECIPE, 300, 9).frames[:, 0]
    with torch.no_grad():
        wanted, found = (RECIPE.view(m).critic(x).flatten() for m in (model, learned))
    assert (wanted - found).abs().mean() < 0.5 * wanted.std()
    assert all(parameter.requires_grad for parameter in learned.policy.parameters())


def test_continuous_actions_are_cloned_with_the_teachers_spread() -> None:
    model = teacher("ppo", env="Pendulum-v1")
    with torch.no_grad():
        model.policy.log_std.fill_(-0.7)
        model.policy.action_net.weight.mul_(100)
    learned = distil(model, PENDULUM, network="mlp", epsilon=0.02, rounds=1, observations=600, epochs=8)
    assert torch.equal(learned.policy.log_std, model.policy.log_std)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (PENDULUM.view(m).scores(x)[:, 0] for m in (model, learned))
    assert (wanted - found).square().mean() < 0.5 * wanted.var()


def test_a_student_of_a_smoothed_agent_learns_from_noisy_observations_in_the_recipes_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from robustrl.training import distil as module

    normalization = Normalization(np.zeros(4), np.array([4.0, 1.0, 0.25, 1.0]))
    recipe = EnvRecipe.of("CartPole-v1", max_episode_steps=50, normalization=normalization, noise=Gaussian(0.5))
    seen: list[Any] = []

    class Watched(RobustTrainer):
        def fit(self, module: Any, examples: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((self.epsilon, examples))
            return super().fit(module, examples, *args, **kwargs)

    monkeypatch.setattr(module, "RobustTrainer", Watched)
    model = teacher()
    distil(model, recipe, epsilon=ThreatModel(norm=2, step=0.05, units="raw"), **QUICK)
    (threat, examples), *_ = seen
    assert np.allclose(threat.scale, [0.5, 1.0, 2.0, 1.0], rtol=1e-6)
    assert examples.inputs[:, 0].std() == pytest.approx(0.5, rel=0.2)  # the cart itself moves far less
    assert not torch.allclose(examples.targets, recipe.view(model).scores(examples.inputs), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": "resnet"}, ValueError, "network must be one of .same., .mlp."),
        ({"rounds": 0}, ValueError, "rounds must be an integer >= 1"),
        ({"observations": 1}, ValueError, "observations must be an integer >= 2"),
        ({"attacked_share": 1.5}, ValueError, "attacked_share"),
        ({"attack": "carlini"}, ValueError, "attack must be one of"),
        ({"epsilon": -0.1}, ValueError, "epsilon must be"),
        ({"norm": 1}, ValueError, "norm must be"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be"),
        ({"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_played(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustrl.training.distil.gather", lambda *_, **__: pytest.fail("played"))
    with pytest.raises(error, match=message):
        distil(teacher(), RECIPE, **options)


def test_other_teachers_are_refused() -> None:
    with pytest.raises(TypeError, match="DQN, PPO or A2C model, got SAC"):
        distil(SAC("MlpPolicy", "Pendulum-v1", device="cpu"), PENDULUM)
    with pytest.raises(TypeError, match="action values, logits or Gaussian actions, got 'deterministic'"):
        distil(teacher("ppo", env="Pendulum-v1", use_sde=True), PENDULUM)
    assert algorithm_of(SADQN("MlpPolicy", "CartPole-v1", device="cpu")) == "dqn"


def test_a_run_directory_tells_how_the_student_was_made(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds a model"):
        (tmp_path / "model.zip").write_bytes(b"")
        distil_run(teacher(), RECIPE, tmp_path)
    options = {**QUICK, "epsilon": 0.05, "network": "lipschitz-mlp"}
    learned = distil_run(teacher(), RECIPE, tmp_path / "run", seed=4, **options)
    run = RunInfo.load(tmp_path / "run")
    assert (run.algo, run.seed, run.env) == ("dqn", 4, RECIPE)
    record = run.hyperparameters["distilled"]
    assert record.items() >= options.items()
    assert len(record["agreement"]) == 1
    assert 0 <= record["agreement"][0]["pgd"] <= record["agreement"][0]["clean"] <= 1
    assert bits(rrl.load_agent(tmp_path / "run")) == bits(learned)


def test_the_shell_distils_what_it_can_attack(tmp_path: Path) -> None:
    teacher().save(tmp_path / "teacher.zip")
    command = ["distil", tmp_path / "teacher.zip", "--env", "CartPole-v1", "--max-episode-steps", 50, "--out", tmp_path / "run"]
    command += ["--network", "lipschitz-mlp", "--activation", "maxmin", "--epsilon", 0.05, "--norm", 2]
    command += ["--rounds", 1, "--observations", 400, "--epochs", 1]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    assert "does what its teacher does" in done.output
    record = RunInfo.load(tmp_path / "run").hyperparameters["distilled"]
    assert (record["network"], record["norm"], record["epsilon"]) == ("lipschitz-mlp", "2", 0.05)
    attack = ["attack", tmp_path / "run", "--norm", "inf", "--epsilon", 0.05, "--episodes", 2]
    assert CliRunner().invoke(app, [str(part) for part in attack]).exit_code == 0


def test_the_shell_says_how_near_continuous_actions_are(tmp_path: Path) -> None:
    teacher("ppo", env="Pendulum-v1").save(tmp_path / "teacher.zip")
    command = ["distil", tmp_path / "teacher.zip", "--env", "Pendulum-v1", "--max-episode-steps", 50, "--out", tmp_path / "run"]
    command += ["--network", "mlp", "--epsilon", 0.05, "--rounds", 1, "--observations", 400, "--epochs", 1]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    assert "acts within 0.1 of its teacher in every entry" in " ".join(done.output.split())
