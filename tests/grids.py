"""A finite MDP as an environment whose observations can be confused exactly as its neighbour sets say."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from robustrl.mdp import TabularMDP
from robustrl.policy import PolicyView

SIZE = 4
GOAL, PITS = (3, 3), ((1, 2), (3, 0))
MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0))
CELLS = np.array([(row, column) for row in range(SIZE) for column in range(SIZE)])
NEIGHBOURS = np.abs(CELLS[:, None] - CELLS[None]).max(2) <= 1
"""What an attacker of norm inf and radius 1 can show: the cell and those around it, diagonals included."""


def grid(slip: float = 0.1, gamma: float = 0.9) -> TabularMDP:
    """Walk to the goal (+1) around the pits (-1), at a price per step; with probability `slip` a step goes elsewhere."""
    n = len(CELLS)
    successors, rewards = np.zeros((n, 4, 4), dtype=np.int64), np.full((n, 4, 4), -0.05)
    probabilities, terminal = np.full((n, 4, 4), slip / 3), np.zeros((n, 4, 4), dtype=bool)
    for s, cell in enumerate(CELLS):
        for a in range(4):
            probabilities[s, a, a] = 1 - slip
            for k, move in enumerate(MOVES):
                after = tuple(np.clip(cell + move, 0, SIZE - 1).tolist())
                successors[s, a, k] = after[0] * SIZE + after[1]
                if after == GOAL or after in PITS:
                    rewards[s, a, k], terminal[s, a, k] = (1.0 if after == GOAL else -1.0), True
    playable = np.array([tuple(cell) != GOAL and tuple(cell) not in PITS for cell in CELLS])
    return TabularMDP(successors, probabilities, rewards, terminal, gamma, playable / playable.sum())


class GridEnv(gym.Env[Any, Any]):
    """Plays a grid; observations are the coordinates of the cell."""

    observation_space = spaces.Box(0, SIZE - 1, (2,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(len(CELLS), p=self.mdp.start))
        return CELLS[self.state].astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        at = (self.state, int(action))
        k = int(self.np_random.choice(4, p=self.mdp.probabilities[at]))
        reward, ended = float(self.mdp.rewards[at][k]), bool(np.asarray(self.mdp.terminal)[at][k])
        self.state = int(self.mdp.successors[at][k])
        return CELLS[self.state].astype(np.float32), reward, ended, False, {}


class Nearest(nn.Module):
    """Action values of the nearest cell, smooth in between: every action that wins anywhere wins in a cell next to there."""

    def __init__(self, actions: np.ndarray, sharpness: float = 3.0) -> None:
        super().__init__()
        self.register_buffer("cells", torch.from_numpy(CELLS).double())
        self.register_buffer("votes", torch.eye(4, dtype=torch.float64)[torch.from_numpy(actions)])
        self.sharpness = sharpness

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        away = (observation.double()[:, None] - self.cells).square().sum(2)
        return (-self.sharpness * away).softmax(1) @ self.votes


def victim(actions: np.ndarray) -> PolicyView:
    """Acts as the table says, cell by cell."""
    return PolicyView.from_torch(Nearest(actions), kind="q", observation_shape=(2,))
