"""How a perturbation is chosen."""

from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.smoothed import FlipAttack, MinimalFlip, SmoothedPGD

__all__ = ["Attack", "AttackContext", "FlipAttack", "MinimalFlip", "SmoothedPGD"]
