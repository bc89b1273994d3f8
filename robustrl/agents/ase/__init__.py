"""Safe exploration of finite environments, and what it is compared with. Every agent has the interface of Stable-Baselines3."""

from robustrl.agents.ase.ase import ASE, UndirectedASE
from robustrl.agents.ase.base import TabularAgent, UnsafeStateError
from robustrl.agents.ase.baselines import MBIE, EpsilonGreedy, QLearning, RMax, SafeEpsilonGreedy, SafeRMax
from robustrl.agents.ase.declaration import Declaration
from robustrl.agents.ase.knowledge import Knowledge
from robustrl.agents.ase.planner import Planner
from robustrl.agents.ase.shield import SafeActionMask

__all__ = [
    "ASE",
    "MBIE",
    "Declaration",
    "EpsilonGreedy",
    "Knowledge",
    "Planner",
    "QLearning",
    "RMax",
    "SafeActionMask",
    "SafeEpsilonGreedy",
    "SafeRMax",
    "TabularAgent",
    "UndirectedASE",
    "UnsafeStateError",
]
