"""An agent that plain Stable-Baselines3 trained, without a word of robustrl: how much of it can be certified?

    python examples/own_agent.py            # about a minute

Trains PPO on clean CartPole, saves it as any user would, loads the zip without its pickles, and certifies it under a little noise
that it never saw in training: little noise keeps the agent good, but protects little. Then it is attacked at one budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stable_baselines3 import PPO

import robustrl as rrl


def main() -> None:
    """Train, certify, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=50_000)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--attacked", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/own_agent"))
    arguments = parser.parse_args()

    PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(arguments.timesteps).save(arguments.out / "agent.zip")

    for sigma in (0.05, 0.1):
        env = rrl.EnvRecipe(env_id="CartPole-v1", max_episode_steps=200, noise=rrl.Gaussian(sigma))
        model = rrl.load_agent(arguments.out / "agent.zip", env, device="cpu")
        certificate = rrl.certify_policy(model, env, budgets=[0, 0.05, 0.1, 0.2], episodes=arguments.episodes)
        certificate.save(arguments.out / f"certificate-{sigma}.json")
        print(certificate.table(), end="\n\n")

    threat = rrl.ThreatModel(norm=2, episode=0.2)
    report = rrl.attack_policy(model, env, rrl.attacks.MinimalFlip(), threat, arguments.attacked, certificate=certificate)
    print(report.table())


if __name__ == "__main__":
    main()
