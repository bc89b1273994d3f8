"""Who acts."""

from robustrl.agents.ase import (
    ASE,
    MBIE,
    EpsilonGreedy,
    QLearning,
    RMax,
    SafeActionMask,
    SafeEpsilonGreedy,
    SafeRMax,
    TabularAgent,
    UndirectedASE,
    UnsafeStateError,
)
from robustrl.agents.attacked import AttackedAgent
from robustrl.agents.cloning import BehaviourCloning, FourierFeatures
from robustrl.agents.denoised import DenoisedAgent
from robustrl.agents.smoothed import SmoothedAgent
from robustrl.agents.split import DeterministicSplitAgent, SplitEpisode, play_episode
from robustrl.agents.voting import ActionInterval, MajorityVoteAgent, MedianAgent

__all__ = [
    "ASE",
    "MBIE",
    "ActionInterval",
    "AttackedAgent",
    "BehaviourCloning",
    "DenoisedAgent",
    "DeterministicSplitAgent",
    "EpsilonGreedy",
    "FourierFeatures",
    "MajorityVoteAgent",
    "MedianAgent",
    "QLearning",
    "RMax",
    "SafeActionMask",
    "SafeEpsilonGreedy",
    "SafeRMax",
    "SmoothedAgent",
    "SplitEpisode",
    "TabularAgent",
    "UndirectedASE",
    "UnsafeStateError",
    "play_episode",
]
