"""InvertedPendulum-v5: certified and attacked mean return, 1,000 steps.

    python experiments/inverted_pendulum.py [--workers 2]

PPO, trained and certified under Gaussian noise in normalised observation units; a return is the number of steps that the pole
stands. Writes `experiments/results/inverted-pendulum-ppo-sigma0.5/`.
"""

from one_policy import Settings, run

from robustrl.attacks import ActionDeviation, GradientAttack, Greedy, LowValue, Spread

SETTINGS = Settings(
    policy="inverted-pendulum-ppo-sigma0.5",
    budgets=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    episodes=1_000,
    success_at=None,
    attacks=(
        GradientAttack(ActionDeviation(), allocation=Greedy()),
        GradientAttack(ActionDeviation(), allocation=Spread(30)),
        GradientAttack(LowValue(), allocation=Spread(30)),
    ),
    attack_budgets=(1.0, 5.0, 10.0),
    attack_episodes=48,
)

if __name__ == "__main__":
    run(SETTINGS, "python experiments/inverted_pendulum.py", __doc__)
