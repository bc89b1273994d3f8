"""MountainCarContinuous-v0: certified and attacked probability of reaching the goal within 999 steps.

    python experiments/mountain_car_continuous.py [--workers 2]

PPO with state-dependent exploration, trained and certified under Gaussian noise in normalised observation units. An episode
reaches the goal exactly if its return is positive (docs/results.md), so success is a return of at least 0.05. Writes
`experiments/results/mountain-car-continuous-ppo-sigma0.3/`.
"""

from one_policy import Settings, run

from robustrl.attacks import ActionDeviation, GradientAttack, Greedy, LowValue, Spread

SETTINGS = Settings(
    policy="mountain-car-continuous-ppo-sigma0.3",
    budgets=(0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05),
    episodes=10_000,
    success_at=0.05,
    attacks=(
        GradientAttack(ActionDeviation(), allocation=Spread(100)),
        GradientAttack(LowValue(), allocation=Spread(100)),
        GradientAttack(LowValue(), allocation=Greedy()),
    ),
    attack_budgets=(0.6, 2.0, 5.0, 10.0),
    attack_episodes=200,
)

if __name__ == "__main__":
    run(SETTINGS, "python experiments/mountain_car_continuous.py", __doc__)
