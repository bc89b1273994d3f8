"""The attacker's side of the threat model: what it may see, what it returns."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import torch
from torch import Tensor, nn

from robustrl.attacks.geometry import Pixels, per_row
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
        padding: how an episode's first stack is filled.
        generator: the attacker's own random stream.
        norm: the norm of the threat model.
        step: how many steps the episodes have had, int64 (n,). At their first one a frame stack with "reset" padding repeats the
            newest frame.
        steps_left: most steps they can still have, this one included, int64 (n,).
        remaining: episode budget left, float64 (n,), inf without one; None for as much as the allowance.
        memory: what a recurrent policy remembers (n, *memory_shape), or None.
        pixels: the range that attacked observations stay in, or None; see `geometry.Pixels`.
        scale: unit of every entry of a frame, float64 (*frame): norms are those of a perturbation divided by it; None for ones.
        slots: which episodes these are, int64 (n,); None for 0, ..., n - 1.
        command: what a learned attacker has decided, (n, ...), for the objectives that carry it out; None without one.
        environments: the true environments of attacks that plan in them (`Attack.needs_simulator`), one per row, to be copied and never
            changed; None for other attacks.
    """

    policy: PolicyView
    noise: Noise | None
    clean_stack: Tensor
    seen_stack: Tensor
    allowance: Tensor
    attackable: Tensor
    step: Tensor
    steps_left: Tensor
    padding: Padding
    generator: torch.Generator
    norm: float = 2
    remaining: Tensor | None = None
    memory: Tensor | None = None
    pixels: Pixels = None
    scale: Tensor | None = None
    slots: Tensor | None = None
    command: Tensor | None = None
    environments: tuple[gym.Env[Any, Any], ...] | None = None

    def observation(self, frames: Tensor) -> Tensor:
        """What the network would see if the newest frame were `frames` (n, *frame); float32, differentiable in them."""
        if self.padding == "zero" or self.policy.n_frames == 1:
            return self.policy.fold(self.seen_stack, frames).float()
        first, newest = per_row(self.first_step, self.seen_stack).bool(), frames.unsqueeze(1)
        past = torch.where(first, newest, self.seen_stack[:, :-1])
        return self.policy.fold(torch.cat((past, newest), dim=1)).float()

    @property
    def first_step(self) -> Tensor:
        """Which episodes start here, bool (n,)."""
        return self.step == 0

    def scores(self, frames: Tensor) -> Tensor:
        """The policy's scores (n, n_scores) if the newest frames were `frames`; differentiable in them."""
        return self.policy.scores(self.observation(frames), self.memory)

    def uniforms(self, size: int) -> Tensor:
        """Random numbers in (0, 1), float64 (n, size), that differ between episodes: none depends on which others still run.

        One number of the attacker's stream is the key of a counter-based generator. Source: the mixing function of SplitMix64,
        Steele, Lea, Flood (OOPSLA 2014).
        """
        key = torch.randint(2**62, (1,), generator=self.generator, device=self.generator.device).to(self.step.device)
        slots = torch.arange(len(self.step), device=self.step.device) if self.slots is None else self.slots
        z = (key + slots[:, None] * size + torch.arange(size, device=key.device)) * _signed(0x9E3779B97F4A7C15)
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
        return (_shifted(z ^ _shifted(z, 31), 11).double() + 0.5) * 2.0**-53

    def select(self, rows: Tensor) -> AttackContext:
        """The context of some of the episodes."""
        values = {**self.__dict__}
        if self.slots is None:
            values["slots"] = torch.arange(len(self.step), device=self.step.device)
        for name in ("clean_stack", "seen_stack", "memory", "allowance", "remaining", "step", "steps_left", "slots", "command"):
            values[name] = None if values[name] is None else values[name][rows]
        if self.environments is not None:
            values["environments"] = tuple(self.environments[row] for row in rows.tolist())
        return AttackContext(**values)


def _signed(word: int) -> int:
    return word - 2**64


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    shifted: Tensor = (words >> bits) & (2 ** (64 - bits) - 1)
    return shifted


class Described:
    """Something that reports and chunk folders are identified by: its name and its public attributes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the name and the attributes, nested where they describe themselves."""
        told = {key: _plain(value) for key, value in vars(self).items() if not key.startswith("_")}
        return {"kind": type(self).__name__, **told}


def _plain(value: object) -> Any:
    if isinstance(value, Described):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, nn.Module):
        return _fingerprint(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _fingerprint(module: nn.Module) -> str:
    """SHA-256 of a network's layers and weights."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().numpy()
        digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return f"{type(module).__name__} {digest.hexdigest()}"


class Attack(Described, ABC):
    """An observation attacker: true frames in, delivered frames out."""

    needs_policy: ClassVar[bool] = True
    """Whether it looks at the policy that it attacks."""
    needs_simulator: ClassVar[bool] = False
    """Whether it plans in copies of the running environments."""

    @property
    def asks(self) -> bool:
        """Whether it asks the policy what it would do, which takes the memory of a recurrent one."""
        return self.needs_policy

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

    def check_host(self, *, simulators: bool) -> None:
        """Raise ValueError if the attack plans in the environments and its host cannot give them (`simulators`)."""
        if self.needs_simulator and not simulators:
            raise ValueError(
                f"{type(self).__name__} plans in copies of the running environments, which cannot be had here: use attack_policy with "
                "engine='list', or an attack wrapper around a gymnasium.Env, a DummyVecEnv or a SyncVectorEnv"
            )
