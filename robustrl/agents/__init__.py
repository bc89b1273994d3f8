"""Who acts."""

from robustrl.agents.smoothed import SmoothedAgent

__all__ = ["SmoothedAgent"]
