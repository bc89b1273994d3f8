"""Who acts."""

from robustrl.agents.smoothed import SmoothedAgent
from robustrl.agents.voting import ActionInterval, MajorityVoteAgent, MedianAgent

__all__ = ["ActionInterval", "MajorityVoteAgent", "MedianAgent", "SmoothedAgent"]
