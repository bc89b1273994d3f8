"""The attacker's side of the threat model: what it may see, what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustrl.noise import Noise
from robustrl.policy import Padding, PolicyView
from robustrl.threat import ThreatModel


@dataclass(frozen=True)
class AttackContext:
    """What an attacker knows at one step, for `n` running episodes.

    It sees the policy, the true frames and everything the agent has seen so far, past noise included. It does not see
    the noise that this step's frame will get.

    Attributes:
        policy: the victim.
        noise: the victim's mechanism, or None for an undefended one.
        clean_stack: true frames (n, k, *frame), newest last.
        seen_stack: past frames as the agent saw them, attacked and noisy; the newest is still clean.
        allowance: largest norm of this step's perturbation, float64 (n,).
        attackable: 1 for entries of a frame that may be changed, else 0; shape (*frame).
        first_step: whether the episode starts here; then a frame stack with "reset" padding repeats the newest frame.
        padding: how an episode's first stack is filled.
        generator: the attacker's own random stream.
    """

    policy: PolicyView
    noise: Noise | None
    clean_stack: Tensor
    seen_stack: Tensor
    allowance: Tensor
    attackable: Tensor
    first_step: bool
    padding: Padding
    generator: torch.Generator

    def observation(self, frames: Tensor) -> Tensor:
        """What the network would see if the newest frame were `frames` (n, *frame); float32, differentiable in them."""
        if self.first_step and self.padding == "reset":
            stack = frames.unsqueeze(1).expand(self.seen_stack.shape)
            return self.policy.fold(stack).float()
        return self.policy.fold(self.seen_stack, frames).float()

    def select(self, rows: Tensor) -> AttackContext:
        """The context of some of the episodes."""
        values = {**self.__dict__}
        for name in ("clean_stack", "seen_stack", "allowance"):
            values[name] = values[name][rows]
        return AttackContext(**values)


class Attack(ABC):
    """An observation attacker: true frames in, delivered frames out."""

    @abstractmethod
    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        """Choose the frames that the agent receives instead of the true ones (before its noise).

        Args:
            frames: true frames (n, *frame).
            context: what the attacker knows.
        Returns:
            delivered frames, same shape and dtype; bit-identical to `frames` where nothing is spent.
        """

    def check(self, policy: PolicyView, threat: ThreatModel, noise: Noise | None) -> None:
        """Raise ValueError if the attack cannot serve this threat model, policy or noise; called before any work."""
        del policy, threat, noise

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports: the attack's name and its attributes."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else repr(value) for key, value in vars(self).items()
        }
        return {"kind": type(self).__name__, **plain}
