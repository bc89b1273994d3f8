"""The victim under noise that the attacker cannot see: its answers to fixed draws, in blocks of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustrl.attacks.base import AttackContext
from robustrl.attacks.geometry import NORMS
from robustrl.noise import Gaussian, Laplace, Noise, Uniform
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

BLOCK = 2**22
"""Most floats of network input per pass, copies for noise draws included; gradients and activations are a few times that."""

Respond = Callable[[AttackContext, Tensor], Tensor]
"""What of the victim is looked at: a context and its newest frames (n, *frame) -> (n, k)."""


def check_threat(
    name: str, policy: PolicyView, threat: ThreatModel, noise: Noise | None, norms: tuple[float, ...] = NORMS
) -> None:
    """What every attack under additive noise needs.

    Raises:
        ValueError: naming the attack, for another norm, units, mask, an infinite budget or another noise.
    """
    if threat.norm not in norms:
        allowed = ", ".join(f"{norm:g}" for norm in norms[:-1]) + f" or {norms[-1]:g}"
        raise ValueError(f"{name} needs another norm; threat.norm must be {allowed}, got {threat.norm}")
    if threat.units != "raw":
        raise ValueError(f"{name} attacks in raw units; got units={threat.units!r}")
    threat.attackable(policy.frame_shape)
    threat.scales(policy.frame_shape)
    if math.isinf(min(limit for limit in (threat.step, threat.episode) if limit is not None)):
        raise ValueError(f"{name} needs a finite budget, got step={threat.step}, episode={threat.episode}")
    if not isinstance(noise, Gaussian | Uniform | Laplace | None):
        raise ValueError(f"{name} needs additive noise, got {noise}")


def samples(
    noise: Noise | None, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draws of an additive mechanism, or a single zero without noise."""
    if noise is None:
        return torch.zeros((1, *shape[1:]), dtype=dtype, device=device)
    return noise.perturb(torch.zeros(shape, dtype=dtype, device=device), generator)


def rows_per_block(context: AttackContext, draws: int) -> int:
    """Rows that go through the network together, each with `draws` noisy copies."""
    return max(1, BLOCK // (draws * math.prod(context.policy.observation_shape)))


def answers(respond: Respond, frames: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
    """What the victim answers to every row under every noise draw; differentiable in `frames`.

    At most `BLOCK` floats of network input are alive at a time: where that takes several passes, their activations are
    forgotten and computed again for the gradient.

    Args:
        respond: what to look at.
        frames: newest frames (n, *frame), or whole frame stacks if `respond` takes them.
        context: of the same n episodes.
        noise: samples to add, (draws, *frame).
    Returns:
        (n, draws, k).
    """

    def block(x: Tensor, part: AttackContext, noise: Tensor) -> Tensor:
        copies = part.select(torch.arange(len(x), device=x.device).repeat_interleave(len(noise)))
        # cuDNN's recurrent layers have no gradient outside of training
        with nullcontext() if part.memory is None else torch.backends.cudnn.flags(enabled=False):
            return respond(copies, (x.unsqueeze(1) + noise).flatten(0, 1)).reshape(len(x), len(noise), -1)

    n_rows, n_draws = rows_per_block(context, len(noise)), rows_per_block(context, 1)
    if len(frames) <= n_rows and len(noise) <= n_draws:
        return block(frames, context, noise)
    rows = torch.split(torch.arange(len(frames), device=frames.device), n_rows)
    return torch.cat(
        [
            torch.cat([_forgetful(block, x, context.select(some), draws) for draws in torch.split(noise, n_draws)], dim=1)
            for some, x in zip(rows, torch.split(frames, n_rows), strict=True)
        ]
    )


def _forgetful(block: Callable[..., Tensor], *inputs: object) -> Tensor:
    result: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
