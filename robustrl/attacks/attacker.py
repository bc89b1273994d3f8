"""An attack on running episodes, held to its budget: what rollouts, wrappers and agents are thin shells of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustrl.attacks.base import Attack, AttackContext
from robustrl.attacks.geometry import Pixels, per_row
from robustrl.errors import check_count
from robustrl.noise import Noise
from robustrl.policy import Padding, PolicyView, push_frame, start_stack
from robustrl.threat import Ledger, ThreatModel


class Attacker:
    """Episodes side by side, one per slot: their ledger, their true frame stacks, and how far they are.

    Args:
        attack: chooses the perturbations.
        threat: the budget, in the units of the frames (units="raw").
        policy: the victim; None for attacks that look at none. It is used as it is: pass a copy of one that is used elsewhere too.
        n_slots: episodes side by side.
        noise: what the victim adds to the frames that it receives.
        n_frames: frames in its stack.
        padding: how an episode's first stack is filled.
        horizon: most steps of an episode; needed with an episode budget.
        pixels: the range that attacked pictures stay in, or None.
        quantise: what (true frames, attacked frames) become before they are charged and delivered, e.g. whole grey levels.
        generator: the attacker's own random stream.
        environments: gives the true environments of all slots, for attacks that plan in them; None where the host has none.

    Attributes:
        ledger: budgets, one row per slot.
        norms: of every slot's last perturbation, float64 (n_slots,).
        allowances: what they might have measured, float64 (n_slots,).
    Raises:
        ValueError: if the attack cannot serve this victim, threat or host.
    """

    def __init__(
        self,
        attack: Attack,
        threat: ThreatModel,
        policy: PolicyView | None,
        n_slots: int,
        *,
        noise: Noise | None = None,
        n_frames: int = 1,
        padding: Padding = "reset",
        horizon: int | None = None,
        pixels: Pixels = None,
        quantise: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        environments: Callable[[], Sequence[gym.Env[Any, Any]]] | None = None,
    ) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be a robustrl attack such as attacks.SmoothedPGD(), got {attack!r}")
        if not isinstance(threat, ThreatModel):
            raise TypeError(f"threat must be a ThreatModel, got {threat!r}")
        if threat.units != "raw":
            raise ValueError(
                f"threat.units must be 'raw' here, got {threat.units!r}: give its radii in the units of the observations that are "
                "attacked (grey levels where they are bytes); attack_policy and the wrappers convert others"
            )
        if policy is None and attack.needs_policy:
            raise ValueError(f"policy must be given: {type(attack).__name__} looks at the policy that it attacks")
        if horizon is None and threat.episode is not None:
            raise ValueError("horizon must be given with an episode budget: attackers spread it over the steps that are left")
        if policy is not None or not attack.needs_policy:
            attack.check(cast(PolicyView, policy), threat, noise)
        attack.check_host(simulators=environments is not None)
        self.attack, self.policy, self.noise = attack, policy, noise
        self.n_frames, self.padding = check_count("n_frames", n_frames), padding
        self.quantise = quantise
        self._environments = environments if attack.needs_simulator else None
        self.horizon = 1 if horizon is None else check_count("horizon", horizon)
        self.ledger = Ledger(threat, n_slots)
        self.norms, self.allowances = np.zeros(n_slots), self.ledger.allowance
        self.device = torch.device("cpu") if policy is None else policy.device
        self.pixels = pixels
        if pixels is not None and isinstance(pixels[0], Tensor):
            self.pixels = cast(Pixels, tuple(end.to(self.device) for end in pixels))
        self.generator = torch.Generator(self.device) if generator is None else generator
        self._step = torch.zeros(n_slots, dtype=torch.int64, device=self.device)
        self._stacks: tuple[Tensor, Tensor] | None = None
        self._entries: tuple[Tensor, Tensor | None] | None = None

    def deliver(
        self,
        frames: Tensor,
        slots: NDArray[np.int64] | None = None,
        *,
        seen: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Attack the frames that have just arrived, and charge what is delivered.

        Args:
            frames: true frames (n, *frame).
            slots: whose they are, (n,), each at most once; default all.
            seen: the stacks that the agents saw a step ago, (n, k, *frame), if the host knows them, past noise included; default
                what was delivered.
            memory: of recurrent victims, (n, *memory_shape).
        Returns:
            delivered frames, (n, *frame).
        Raises:
            BudgetExceededError: if the attack delivers more than its threat model allows.
        """
        chosen = np.arange(len(self._step)) if slots is None else slots
        rows = torch.from_numpy(chosen).to(self.device)
        context = self.context(frames, chosen, seen=seen, memory=memory)
        # Copies: an attack that writes into what it is shown must not change what it is charged for.
        before, step = frames.cpu().numpy().copy(), self._step[rows]
        clean, delivered = self._stacks_like(frames)
        clean[rows] = context.clean_stack
        result = self.attack.perturb(frames.clone(), context)
        if self.quantise is not None:
            result = self.quantise(frames, result)
        if self.pixels is not None:  # whatever the attack knows of ranges
            low, high = self.pixels
            result = torch.maximum(torch.minimum(result, frames.clamp(min=high)), frames.clamp(max=low))
        self.allowances[chosen] = self.ledger.allowance[chosen]
        self.norms[chosen] = self.ledger.charge(before, result.cpu().numpy(), chosen)
        if seen is None:
            delivered[rows] = self._pushed(delivered[rows], result, step)
        self._step[rows] += 1
        return result

    def context(
        self,
        frames: Tensor,
        slots: NDArray[np.int64] | None = None,
        *,
        seen: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> AttackContext:
        """What the attacker knows when these frames have arrived; see `deliver`."""
        chosen = np.arange(len(self._step)) if slots is None else slots
        rows = torch.from_numpy(chosen).to(self.device)
        clean, delivered = self._stacks_like(frames)
        attackable, scale = self._entries_like(frames)
        step = self._step[rows]
        return AttackContext(
            policy=cast(PolicyView, self.policy),
            noise=self.noise,
            clean_stack=self._pushed(clean[rows], frames, step),
            seen_stack=self._pushed(delivered[rows] if seen is None else seen, frames, step),
            allowance=torch.from_numpy(self.ledger.allowance[chosen]).to(frames.device),
            attackable=attackable,
            step=step,
            steps_left=(self.horizon - step).clamp_min(1),
            padding=self.padding,
            generator=self.generator,
            norm=self.ledger.threat.norm,
            remaining=torch.from_numpy(self.ledger.remaining[chosen]).to(frames.device),
            memory=None if memory is None else memory.clone(),
            pixels=self.pixels,
            scale=scale,
            slots=rows,
            environments=self._running(chosen),
        )

    def go_on(self, before: Attacker) -> None:
        """Take over the running episodes of another attacker of as many slots: what they have spent, seen and lasted."""
        self.ledger.go_on(before.ledger)
        self._step, self._stacks, self.generator = before._step.to(self.device), before._stacks, before.generator
        self.norms, self.allowances = before.norms, before.allowances

    def reset(self, slots: NDArray[np.int64] | None = None) -> None:
        """Start new episodes in the given slots (default all)."""
        self.ledger.reset(slots)
        self._step[slice(None) if slots is None else torch.from_numpy(slots).to(self.device)] = 0

    def _running(self, slots: NDArray[np.int64]) -> tuple[gym.Env[Any, Any], ...] | None:
        if self._environments is None:
            return None
        everyone = self._environments()
        return tuple(everyone[slot] for slot in slots.tolist())

    def _stacks_like(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """True and delivered frame stacks of all slots."""
        if self._stacks is None:
            empty = torch.zeros(len(self._step), self.n_frames, *frames.shape[1:], dtype=frames.dtype, device=frames.device)
            self._stacks = empty, empty.clone()
        return self._stacks

    def _pushed(self, stack: Tensor, frames: Tensor, step: Tensor) -> Tensor:
        """Stacks with a new frame at the end; those of starting episodes are filled."""
        started = start_stack(frames, self.n_frames, self.padding)
        return torch.where(per_row(step == 0, started).bool(), started, push_frame(stack, frames))

    def _entries_like(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which entries of a frame may change, and their units; copied to the device once."""
        if self._entries is None:
            threat, shape = self.ledger.threat, tuple(frames.shape[1:])
            allowed: Any = threat.attackable(shape)
            scale = threat.scales(shape)
            attackable = torch.from_numpy(allowed.astype(np.float32)).to(frames.device)
            self._entries = attackable, None if scale is None else torch.from_numpy(scale).to(frames.device)
        return self._entries
