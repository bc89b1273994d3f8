"""Agents trained by plain Stable-Baselines3, with plain defaults, go through the command line as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_atari_env as sb3_atari
from stable_baselines3.common.env_util import make_vec_env as sb3_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

import robustrl as rrl
from robustrl import cli

AGENTS: dict[str, tuple[Any, str, int]] = {
    "ppo": (PPO, "CartPole-v1", 1),
    "a2c": (A2C, "CartPole-v1", 50),
    "dqn": (DQN, "CartPole-v1", 150),
    "sac": (SAC, "Pendulum-v1", 110),
    "td3": (TD3, "Pendulum-v1", 110),
    "ddpg": (DDPG, "Pendulum-v1", 110),
    "ppo-continuous": (PPO, "Pendulum-v1", 1),
    "recurrent": (RecurrentPPO, "CartPole-v1", 128),
}


def shell(*words: Any) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["robustrl", *map(str, words)])
        cli.main()
    assert stop.value.code in (0, None)


@pytest.mark.parametrize("name", AGENTS)
def test_a_plain_agent_is_certified_attacked_and_verified(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    algorithm, env, steps = AGENTS[name]
    model = algorithm("MlpLstmPolicy" if name == "recurrent" else "MlpPolicy", env, device="cpu")
    model.learn(steps).save("agent.zip")
    place = ("agent.zip", "--env", env, "--sigma", 0.1, "--max-episode-steps", 30)
    shell("certify", *place, "--episodes", 70, "--budgets", "0,0.05,0.1", "--workers", 1)
    shell("attack", *place, "--budget", "0.1", "--episodes", 6, "--draws", 4)
    shell("verify", "runs/agent/certificate.json", "--model", "agent.zip", "--replay", 1)
    certificate = rrl.EpisodeCertificate.load("runs/agent/certificate.json")
    (report,) = json.loads(Path("runs/agent/attack.json").read_text())["reports"]
    assert certificate.n == 70
    assert np.all(np.diff(certificate.values) <= 0)
    assert report["certified"] == certificate.value_at(0.1)
    assert report["attack"]["kind"] == ("SmoothedPGD" if env == "CartPole-v1" else "GradientAttack")


def test_an_agent_trained_through_vecnormalize_is_certified_with_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    venv = VecNormalize(sb3_vec_env("Pendulum-v1", n_envs=2))
    model = PPO("MlpPolicy", venv, n_steps=64, device="cpu").learn(128)
    model.save("agent.zip")
    venv.save("vecnormalize.pkl")
    rrl.Normalization.of(venv).save("normalization.npz")
    place = ("agent.zip", "--env", "Pendulum-v1", "--sigma", 0.2, "--max-episode-steps", 20)
    shell("certify", *place, "--normalization", "normalization.npz", "--episodes", 20, "--budgets", "0,0.1", "--out", "npz")
    shell(
        "certify",
        *place,
        "--normalization",
        "vecnormalize.pkl",
        "--trust",
        "--episodes",
        20,
        "--budgets",
        "0,0.1",
        "--out",
        "pkl",
    )
    npz, pickled = (rrl.EpisodeCertificate.load(f"{out}/certificate.json") for out in ("npz", "pkl"))
    assert np.array_equal(npz.evidence, pickled.evidence)
    assert npz.provenance["units"] == "normalized"
    shell("verify", "npz/certificate.json", "--model", "agent.zip")
    live = rrl.certify_policy(
        model,
        "Pendulum-v1",
        [0, 0.1],
        20,
        noise=rrl.Gaussian(0.2),
        normalization=rrl.Normalization.of(venv),
        max_episode_steps=20,
    )
    assert np.array_equal(live.evidence, npz.evidence)


def test_a_plain_atari_agent_on_bytes_is_certified_in_float_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gym.register_envs(ale_py)
    emulator = {"frameskip": 1, "repeat_action_probability": 0.0}
    venv = VecFrameStack(sb3_atari("ALE/Pong-v5", n_envs=1, seed=0, env_kwargs=emulator), n_stack=4)
    A2C("CnnPolicy", venv, device="cpu").save("agent.zip")
    place = ("agent.zip", "--env", "robustrl/Atari-v0", "--env-kwargs", '{"game": "pong", "repeat_action_probability": 0.0}')
    place += ("--frame-stack", "4", "--sigma", "0.05", "--max-episode-steps", "12")
    shell("certify", *place, "--episodes", 3, "--budgets", "0,0.1", "--return-low", -21)
    shell("attack", *place, "--budget", "0.2", "--episodes", 1, "--attack", "flip", "--draws", 2)
    certificate = rrl.EpisodeCertificate.load("runs/agent/certificate.json")
    assert certificate.provenance["units"] == "unit01"
