"""Hopper-v5: certified and attacked probability of a return of at least 1,000.

    python experiments/hopper.py [--workers 2]

PPO, trained and certified under Gaussian noise in normalised observation units. Hopper's reward has no sure lower bound (it may
be thrown backwards at any speed), so its mean cannot be certified; a threshold can. Writes
`experiments/results/hopper-ppo-sigma0.1/`.
"""

from one_policy import Settings, run

from robustrl.attacks import ActionDeviation, GradientAttack, LowValue, Spread

SETTINGS = Settings(
    policy="hopper-ppo-sigma0.1",
    budgets=(0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    episodes=2_000,
    success_at=1_000.0,
    attacks=(
        GradientAttack(ActionDeviation(), allocation=Spread(100)),
        GradientAttack(LowValue(), allocation=Spread(100)),
    ),
    attack_budgets=(0.2, 0.5, 1.0, 2.0),
    attack_episodes=100,
)

if __name__ == "__main__":
    run(SETTINGS, "python experiments/hopper.py", __doc__)
