"""Shrink a run directory's model.zip to what acting needs: the weights stay, the optimizer's moments go.

python tools/without_optimizer.py zoo/pong-one-round-ppo-sigma0.05
"""

from __future__ import annotations

import argparse
from pathlib import Path

import robustrl as rrl
from robustrl.training.train import save_model


def main() -> None:
    """Load without pickles, forget the moments, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model = rrl.load_agent(folder, device="cpu")
    before = rrl.policy.PolicyView.from_sb3(model).fingerprint()
    model.policy.optimizer.state.clear()
    save_model(model, folder / "model.zip")
    if rrl.policy.PolicyView.from_sb3(rrl.load_agent(folder, device="cpu")).fingerprint() != before:
        raise SystemExit("the saved policy is another one")


if __name__ == "__main__":
    main()
