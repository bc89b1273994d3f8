"""One round of Pong in float pixels: certified and attacked probability of winning it.

    python experiments/pong_one_round.py [--workers 2]

PPO on four stacked pictures, trained for 100,000 decisions only: a weak player, whose win rate is in the results (sampling its actions). Trained and certified under Gaussian noise of sigma 0.05 in [0, 1] pixel units (12.75 grey levels), added to every picture before the
stack; budgets are l2 norms over a whole round in the same units. Writes
`experiments/results/pong-one-round-ppo-sigma0.05/`.
"""

from one_policy import Settings, run

from robustrl.attacks import GradientAttack, Margin, Spread

SETTINGS = Settings(
    policy="pong-one-round-ppo-sigma0.05",
    budgets=(0.0, 0.01, 0.02, 0.03, 0.05),
    episodes=2_000,
    success_at=1.0,
    attacks=(GradientAttack(Margin(), allocation=Spread(20), steps=2, draws=2),),
    attack_budgets=(0.05, 0.5),
    attack_episodes=100,
    deterministic=False,
)

if __name__ == "__main__":
    run(SETTINGS, "python experiments/pong_one_round.py", __doc__)
