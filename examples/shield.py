"""Learn a safe set, put it as a shield around MaskablePPO, and count accidents beside an unshielded PPO.

    python examples/shield.py [--explore 1500] [--train 4096] [--out runs/shield]        # needs sb3-contrib; half a minute

ASE explores two islands in lava (0 accidents), saves what it learnt, and its shield forbids every action that is not proven safe. A
deep learner then trains behind the shield for as long as it likes. The robust masks at the end are for an attacker who shifts what
the agent sees to a neighbouring cell, and for a world whose steps end where they did not before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

import robustrl as rrl
from robustrl.agents import ASE


class CountAccidents(gym.Wrapper):
    """How often info["cost"] was 1."""

    accidents = 0

    def step(self, action):
        *rest, info = self.env.step(action)
        self.accidents += info["cost"]
        return *rest, info

    def action_masks(self):
        return self.env.get_wrapper_attr("action_masks")()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--explore", type=int, default=1_500)
    parser.add_argument("--train", type=int, default=4_096)
    parser.add_argument("--out", type=Path, default=Path("runs/shield"))
    arguments = parser.parse_args()
    explore, train = arguments.explore, arguments.train
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    world = gym.make("robustrl/LavaIslands-v0", map="two_islands")
    explorer = ASE(world, seed=0).learn(explore)
    certificate = explorer.certificate()
    certificate.save(arguments.out / "certificate.json")
    explorer.save(arguments.out / "explorer.zip")
    print(certificate.table())
    print(f"accidents while exploring: {explorer.unsafe_visits}")

    shielded = CountAccidents(explorer.shield(gym.make("robustrl/LavaIslands-v0", map="two_islands")))
    MaskablePPO("MlpPolicy", shielded, n_steps=512, seed=0, device="cpu").learn(train)
    plain = CountAccidents(gym.make("robustrl/LavaIslands-v0", map="two_islands"))
    PPO("MlpPolicy", plain, n_steps=512, seed=0, device="cpu").learn(train)
    print(f"accidents in {train} steps of training: MaskablePPO behind the shield {shielded.accidents}, PPO {plain.accidents}")

    # An attacker may show the cell to the left or right of the true one: which actions are safe whichever is hidden?
    shield = explorer.shield(world)
    height, width = world.unwrapped.grid_shape
    row, column = np.divmod(np.arange(height * width), width)
    beside = (row[:, None] == row) & (np.abs(column[:, None] - column) <= 1)
    print(f"pairs allowed: {shield.safe.sum()}; whichever of three cells is shown: {shield.robust_mask(beside).sum()}")

    # A world in which every jump may fall a cell short: what can still be proven?
    islands, declared = rrl.envs.grid.lava_islands, world.unwrapped.outcomes
    extra = np.zeros_like(declared.candidates)
    for jump, course in enumerate(islands.COMPASS, start=4):
        extra[:, jump] = (course == islands.WINDOW).all(1) & declared.candidates[:, jump]
    print(f"pairs allowed if every jump may fall a cell short: {shield.inflate_support(extra).safe.sum()}")


if __name__ == "__main__":
    main()
