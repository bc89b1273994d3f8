"""run.json: plain data, checked when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Steps

from robustrl.envs.recipe import EnvRecipe
from robustrl.noise import Gaussian, Splitting
from robustrl.training.run_files import RunInfo


def info(**changes: Any) -> RunInfo:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=Gaussian((0.1, 0.2, 0.3, 0.4)), max_episode_steps=100, frame_stack=2)
    return RunInfo(**({"algo": "ppo", "recipe": recipe.to_dict(), "seed": 3, "timesteps": 100} | changes))


@pytest.mark.parametrize("noise", [None, Gaussian(0.2), Gaussian((0.1, 0.2, 0.3, 0.4)), Splitting(0.5, -1.0, 1.0)])
def test_the_environment_comes_back(tmp_path: Path, noise: Any) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=noise, max_episode_steps=77, frame_stack=3, stack_padding="zero")
    info(recipe=recipe.to_dict()).save(tmp_path)
    assert RunInfo.load(tmp_path).env == recipe
    assert RunInfo.load(tmp_path).self_contained


def test_hyperparameters_are_kept_as_text_where_they_are_no_plain_data(tmp_path: Path) -> None:
    info(hyperparameters={"n_steps": 8, "policy_kwargs": {"activation_fn": torch.nn.ReLU}}).save(tmp_path)
    found = RunInfo.load(tmp_path).hyperparameters
    assert found == {"n_steps": 8, "policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.ReLU'>"}}


def test_a_folder_without_one_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no run\.json"):
        RunInfo.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "{}", '{"schema": 1}', "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunInfo.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"algo": 3},
        {"recipe": "CartPole-v1"},
        {"recipe": None},
        {"seed": "x"},
        {"timesteps": None},
        {"hyperparameters": []},
        {"versions": 1},
        {"extra": 1},
    ],
)
def test_fields_of_the_wrong_kind_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    info().save(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_id": "Unheard-v0"}, "unknown environment id"),
        ({"noise": {"kind": "Pink"}}, "noise kind must be one of"),
        ({"frame_stack": 0}, "frame_stack must be an integer >= 1"),
        ({"wings": 2}, "not an environment recipe"),
        ({"wrappers": ["Own"]}, "pass the environment again"),
    ],
)
def test_an_environment_that_cannot_be_rebuilt_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    info(recipe={**info().recipe, **change}).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        _ = RunInfo.load(tmp_path).env


def test_factories_are_named_only(tmp_path: Path) -> None:
    recipe = EnvRecipe(factory=Steps, max_episode_steps=10, noise=Gaussian(0.1))
    info(recipe=recipe.to_dict()).save(tmp_path)
    found = RunInfo.load(tmp_path)
    assert found.recipe["factory"] == "Steps"
    assert not found.self_contained


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info().save(tmp_path)
    before = (tmp_path / "run.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        info(seed=9).save(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
