"""Who acts."""

from robustrl.agents.attacked import AttackedAgent
from robustrl.agents.cloning import BehaviourCloning, FourierFeatures
from robustrl.agents.denoised import DenoisedAgent
from robustrl.agents.smoothed import SmoothedAgent
from robustrl.agents.split import DeterministicSplitAgent, SplitEpisode, play_episode
from robustrl.agents.voting import ActionInterval, MajorityVoteAgent, MedianAgent

__all__ = [
    "ActionInterval",
    "AttackedAgent",
    "BehaviourCloning",
    "DenoisedAgent",
    "DeterministicSplitAgent",
    "FourierFeatures",
    "MajorityVoteAgent",
    "MedianAgent",
    "SmoothedAgent",
    "SplitEpisode",
    "play_episode",
]
