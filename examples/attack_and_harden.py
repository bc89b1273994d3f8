"""Adversarial training: a CartPole agent that learns under attack, beside one that does not, against a suite of attackers.

    python examples/attack_and_harden.py            # about a minute

Both agents are Stable-Baselines3's PPO with the same preset. One of them learns behind a gradient attack of the same radius that both
are attacked with afterwards. The more attackers the second look has, the less the comparison depends on the one that was trained on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.attacks import GradientAttack, Margin
from robustrl.report.attack import attack_table, save_reports
from robustrl.suite import attack_suite


def main() -> None:
    """Train twice, attack both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=60_000)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--horizon", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("runs/attack_and_harden"))
    arguments = parser.parse_args()

    threat = rrl.ThreatModel(norm=math.inf, step=arguments.epsilon)
    test = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=arguments.horizon)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "hardened"):
        attacked = {"attack": GradientAttack(Margin(), steps=3), "threat": threat} if name == "hardened" else {}
        env = rrl.make_vec_env("CartPole-v1", 8, max_episode_steps=arguments.horizon, seed=0, **attacked)
        model = PPO("MlpPolicy", env, seed=0, **rrl.presets.cartpole.ppo)
        if attacked:
            rrl.envs.set_victim(env, model)  # the attacker follows the learner
        model.learn(arguments.timesteps).save(arguments.out / f"{name}.zip")

        reports = attack_suite(model, test, [threat], "fast", arguments.episodes)
        save_reports(arguments.out / f"{name}.json", reports)
        worst = min(reports, key=lambda report: report.mean)
        print(f"{name}\n{attack_table(reports)}\nmost harmful: {worst.label}, mean return {worst.mean:.1f}\n")


if __name__ == "__main__":
    main()
