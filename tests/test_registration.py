"""Registered ids: there after one call, harmless after the second, and nothing heavy imported for them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium as gym
import pytest

from robustrl.registration import ENVIRONMENTS, register_envs


def test_registering_twice_changes_and_warns_of_nothing() -> None:
    register_envs()
    before = {env_id: gym.spec(env_id) for env_id in ENVIRONMENTS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
    assert all(gym.spec(env_id) is spec for env_id, spec in before.items())


def test_specs_of_two_ids_share_no_keyword_arguments() -> None:
    register_envs()
    gym.spec("robustrl/Freeway-v0").kwargs["difficulty"] = 1  # a user may write into a spec
    assert all(gym.spec(env_id).kwargs is not kwargs for env_id, (_, kwargs) in ENVIRONMENTS.items())


def test_registering_imports_no_emulator_and_no_learner() -> None:
    code = (
        "import sys; from robustrl.registration import register_envs; register_envs(); import gymnasium\n"
        "assert 'robustrl/Freeway-v0' in gymnasium.registry\n"
        "print(*[m for m in ('ale_py', 'cv2', 'torch', 'stable_baselines3', 'robustrl.envs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_make_atari_env_needs_no_registration_beforehand() -> None:
    code = "from robustrl.envs.atari import make_atari_env; print(make_atari_env('robustrl/Freeway-v0').recipe.horizon)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "250"
    assert done.stderr == ""  # ALE's banner included


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
@pytest.mark.parametrize("env_id", ["robustrl/Atari-v0", "robustrl/PongOneRound-v0", "robustrl/Freeway-v0"])
def test_without_an_emulator_the_error_names_the_extra(env_id: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustrl.envs.atari import make_atari_env

    register_envs()
    monkeypatch.setitem(sys.modules, missing, None)
    for make in (gym.make, make_atari_env):
        with pytest.raises(ImportError, match=rf"{missing}.*pip install 'robustrl\[atari\]'"):
            make(env_id)
    with pytest.raises(ImportError, match=r"robustrl\[atari\]"):
        make_atari_env("Pong")


@pytest.mark.parametrize(("env_id", "horizon"), [(env_id, horizon) for env_id, (horizon, _) in ENVIRONMENTS.items()])
def test_registered_environments_can_be_made(env_id: str, horizon: int) -> None:
    register_envs()
    env = gym.make(env_id)
    assert env.spec is not None
    assert env.spec.max_episode_steps == horizon
    assert env.observation_space == gym.spaces.Box(0.0, 1.0, (84, 84))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
