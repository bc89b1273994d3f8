"""Continuous actions: a Hopper agent from the zoo, certified, attacked through its critic, verified.

    python examples/continuous_agent.py            # about a minute

The agent was trained with a normalisation of observations inside the noise, which its run directory holds; budgets are in
normalised units. Returns have no sure lower bound that is worth certifying against, so a quantile and a success probability are
certified: a return of at least 500 within 1000 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import robustrl as rrl
from robustrl.attacks import ActionDeviation, GradientAttack, LowValue, Spread
from robustrl.training.run_files import RunInfo

ZOO = Path(__file__).parent.parent / "zoo" / "hopper-ppo-sigma0.1"


def main() -> None:
    """Certify, attack, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ZOO)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--attacked", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/continuous_agent"))
    arguments = parser.parse_args()

    env = RunInfo.load(arguments.model).env
    model = rrl.load_agent(arguments.model, device="cpu")
    common = {"episodes": arguments.episodes, "n_workers": arguments.workers}

    certificate = rrl.certify_policy(model, env, [0, 0.02, 0.05, 0.1], statistic="success", success_at=500.0, **common)
    arguments.out.mkdir(parents=True, exist_ok=True)
    certificate.save(arguments.out / "certificate.json")
    print(certificate.table(), end="\n\n")
    print(rrl.certify_policy(model, env, [0, 0.02, 0.05], statistic="quantile", quantile=0.5, **common).table(), end="\n\n")

    threat = rrl.ThreatModel(norm=2, episode=0.1, units="normalized")
    for objective in (ActionDeviation(), LowValue()):
        attack = GradientAttack(objective, allocation=Spread(100), steps=3, draws=4)
        report = rrl.attack_policy(
            model, env, attack, threat, arguments.attacked, certificate=certificate, n_workers=arguments.workers
        )
        print(report.table(), end="\n\n")
    print(rrl.verify_certificate(certificate, model, replay=1))


if __name__ == "__main__":
    main()
