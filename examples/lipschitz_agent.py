"""A robust student of an agent that was never trained against anybody, and what is proven of it without noise.

    python examples/lipschitz_agent.py

The student of the zoo's CartPole DQN is an ordinary Stable-Baselines3 model whose network moves no further than its observation does. Takes about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import robustrl as rrl
from robustrl.attacks import GradientAttack, Margin

ZOO = Path(__file__).parents[1] / "zoo"
STEPS = 100


def main() -> None:
    """Distil, attack, certify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--observations", type=int, default=6_000)
    parser.add_argument("--out", type=Path, default=Path("runs/lipschitz_agent"))
    arguments = parser.parse_args()
    settings = {"rounds": arguments.rounds, "observations": arguments.observations, "progress_bar": True}
    env = rrl.EnvRecipe.of("CartPole-v1", max_episode_steps=STEPS)
    teacher = rrl.load_agent(ZOO / "cartpole-dqn-undefended", env)
    student = rrl.distil(teacher, env, network="lipschitz-mlp", epsilon=0.1, norm=2, **settings)

    threat = rrl.ThreatModel(norm=2, step=0.2)
    for name, model in (("teacher", teacher), ("student", student)):
        report = rrl.attack_policy(model, env, attack=GradientAttack(Margin()), threat=threat, episodes=20)
        print(f"{name}: mean return {report.mean:.1f} of {STEPS} with a perturbation of l2 norm .2 at every step")

    scores = rrl.LipschitzScores.of(student)
    observation = np.zeros((1, 4), dtype=np.float32)
    (action,), (radius,) = scores.radii(observation)
    print(f"upright and at rest: action {action}, whatever changes the observation by less than {radius:.3g}")

    certificate = rrl.certify_deterministic(student, env, [0.0, 0.001, 0.01, 0.05], episodes=10, nodes=500, progress_bar=True)
    print(certificate.table())
    arguments.out.mkdir(parents=True, exist_ok=True)
    certificate.save(arguments.out / "deterministic.json")
    print(rrl.verify_certificate(arguments.out / "deterministic.json", student, replay=2))


if __name__ == "__main__":
    main()
