"""Victims whose best attack is known in closed form, and the situations that they are attacked in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn
from toys import LinearRule, Threshold

from robustrl.attacks import Attack, AttackContext
from robustrl.attacks.geometry import row_norms
from robustrl.noise import Noise
from robustrl.policy import Padding, PolicyView, push_frame, start_stack
from robustrl.threat import Ledger, ThreatModel

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
BIAS = 0.1


def linear(weights: Any = WEIGHTS, n_frames: int = 1) -> PolicyView:
    """Two actions whose scores differ by w . x + b."""
    return PolicyView.from_torch(LinearRule(weights, BIAS), kind="q", observation_shape=(len(weights),), n_frames=n_frames)


class Matrix(nn.Module):
    """x -> W x, row after row of float64 sums, with constants beside it: no batch size changes its bits."""

    def __init__(self, weights: Any, *constants: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64))
        self.constants = constants

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        flat = observation.flatten(1).double()
        columns = [(flat * row).sum(1) for row in self.weights]
        return torch.stack([*columns, *(torch.full_like(columns[0], value) for value in self.constants)], dim=1)


class LinearQ(nn.Module):
    """Q(s, a) = g . a + h . s."""

    def __init__(self, of_action: Any, of_state: Any) -> None:
        super().__init__()
        self.of_action, self.of_state = (torch.as_tensor(part, dtype=torch.float64) for part in (of_action, of_state))

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return (action.double() * self.of_action).sum(1) + (observation.flatten(1).double() * self.of_state).sum(1)


def actor(weights: Any, *, q_critic: nn.Module | None = None, std: tuple[float, ...] = (), n_frames: int = 1) -> PolicyView:
    """The action W x; a Gaussian policy if it has standard deviations."""
    n_actions, size = np.shape(weights)
    return PolicyView.from_torch(
        Matrix(weights, *np.log(std)),
        kind="gaussian" if std else "deterministic",
        observation_shape=(size,),
        n_frames=n_frames,
        q_critic=q_critic,
        action_space=spaces.Box(-np.inf, np.inf, (n_actions,), np.float32),
    )


def context(
    policy: PolicyView,
    frames: torch.Tensor,
    budget: Any,
    *,
    noise: Noise | None = None,
    seen: torch.Tensor | None = None,
    padding: Padding = "reset",
    seed: int = 0,
    mask: tuple[bool, ...] | None = None,
    step: int | None = None,
    steps_left: int = 1,
    **more: Any,
) -> AttackContext:
    """The first step of episodes, or a later one if `seen` holds the past frames (n, k - 1, *frame)."""
    stack = start_stack(frames, policy.n_frames, padding) if seen is None else torch.cat((seen, frames[:, None]), dim=1)
    allowance = torch.as_tensor(budget, dtype=torch.float64).expand(len(frames)).clone()
    return AttackContext(
        policy=policy,
        noise=noise,
        clean_stack=stack,
        seen_stack=stack.clone(),
        allowance=allowance,
        attackable=torch.ones(policy.frame_shape) if mask is None else torch.tensor(mask, dtype=torch.float32),
        step=torch.full((len(frames),), (0 if seen is None else 1) if step is None else step),
        steps_left=torch.full((len(frames),), steps_left),
        padding=padding,
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


def frames_of(n: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *(size or (4,)), generator=torch.Generator().manual_seed(seed))


def cost(frames: torch.Tensor, delivered: torch.Tensor, norm: float = 2) -> torch.Tensor:
    return row_norms(delivered.double() - frames.double(), norm)


def play(
    attack: Attack,
    policy: PolicyView,
    threat: ThreatModel,
    horizon: int,
    *,
    n: int = 5,
    frames: Callable[[int], torch.Tensor] | None = None,
) -> np.ndarray:
    """Attack `horizon` steps as a chunk of rollouts does; what the ledger charged, (horizon, n)."""
    ledger, charged, stack = Ledger(threat, n), [], None
    for t in range(horizon):
        now = frames_of(n, *policy.frame_shape, seed=t) if frames is None else frames(t)
        stack = start_stack(now, policy.n_frames) if stack is None else push_frame(stack, now)
        situation = AttackContext(
            policy=policy,
            noise=None,
            clean_stack=stack,
            seen_stack=stack,
            allowance=torch.from_numpy(ledger.allowance),
            attackable=torch.ones(policy.frame_shape),
            step=torch.full((n,), t),
            steps_left=torch.full((n,), horizon - t),
            padding="reset",
            generator=torch.Generator().manual_seed(t),
            norm=threat.norm,
            remaining=torch.from_numpy(ledger.remaining),
        )
        charged.append(ledger.charge(now.numpy(), attack.perturb(now, situation).numpy()))
    return np.array(charged)


class Push(Threshold):
    """A `Threshold` whose action is a number: the return is whether the last one is positive."""

    action_space: Any = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(action[0] > 0)
