"""Worlds on grids that declare what is known of them, and their maps."""

from robustrl.envs.grid import maps
from robustrl.envs.grid.base import TabularEnv
from robustrl.envs.grid.lava_islands import LavaIslands
from robustrl.envs.grid.platformer import DiscretePlatformer
from robustrl.envs.grid.text_grid import TextGrid

__all__ = ["DiscretePlatformer", "LavaIslands", "TabularEnv", "TextGrid", "maps"]
