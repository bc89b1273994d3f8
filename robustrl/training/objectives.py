"""What a denoiser is trained for: the observation itself, or what the policy does on it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustrl.errors import check_count, check_positive
from robustrl.policy import PolicyView
from robustrl.policy.actions import ContinuousRule


class Objective(ABC):
    """What a denoiser is trained for; no objective needs labels or rewards."""

    policies: tuple[PolicyView, ...] = ()
    """Networks that the loss differentiates through; they stay frozen."""

    def prepare(self, observations: Tensor, seed: int) -> None:  # noqa: B027  (most objectives need none)
        """Called when there are new data: observations (n, *shape), clean and noisy."""

    @abstractmethod
    def __call__(self, clean: Tensor, denoised: Tensor, generator: torch.Generator) -> Tensor:
        """The loss, a scalar, of denoised observations (n, *shape) and the clean ones they came from."""


class MSE(Objective):
    """Mean squared error of the observation, in its own units; knows nothing of the policy."""

    def __call__(self, clean: Tensor, denoised: Tensor, generator: torch.Generator) -> Tensor:
        return functional.mse_loss(denoised, clean)


class Stability(Objective):
    """The policy shall do on the denoised observation what it does on the clean one.

    Discrete actions: cross-entropy to the clean greedy action, or Kullback-Leibler divergence from the clean distribution. Continuous
    ones: mean squared error of the executed actions, in units of half their range.

    Args:
        policies: networks to differentiate through, one drawn per batch: the policy itself, or surrogates.
        target: whose greedy actions are wanted, asked for actions only; default the policy that was drawn.
        divergence: the Kullback-Leibler divergence instead, for policies given by logits and without `target`.
    """

    def __init__(self, *policies: PolicyView, target: PolicyView | None = None, divergence: bool = False) -> None:
        for policy in policies:
            if policy.memory_shape is not None:
                raise ValueError("policies must have no memory: use the objective MSE for a recurrent policy")
        if divergence and (target is not None or any(policy.kind != "logits" for policy in policies)):
            raise ValueError("divergence needs policies given by logits, and no target")
        self.policies, self.target, self.divergence = policies, target, divergence

    def __call__(self, clean: Tensor, denoised: Tensor, generator: torch.Generator) -> Tensor:
        if not self.policies:
            raise ValueError("policies must hold at least one policy")
        draw = int(torch.randint(len(self.policies), (1,), generator=generator, device=generator.device))
        policy = self.policies[draw]
        scores, rule = policy.scores(denoised), policy.rule
        with torch.no_grad():
            target = self.target or policy
            clean_scores = target.scores(clean)
            wanted = target.actions(clean_scores)
        if self.divergence:
            found, clean_logs = (functional.log_softmax(part, dim=-1) for part in (scores, clean_scores))
            return functional.kl_div(found, clean_logs, reduction="batchmean", log_target=True)
        if not isinstance(rule, ContinuousRule):
            return functional.cross_entropy(scores, wanted)
        low, high = rule.bounds(scores)
        mean = rule.mean(scores)
        # The environment clips: only what it executes counts, and yet there must be a way back into the range.
        executed = mean + (torch.clamp(mean, low, high) - mean).detach()
        half = torch.where(torch.isfinite(high - low), (high - low) / 2, 1.0)
        return ((executed - wanted) / half).square().mean()


class QueryOnly(Stability):
    """Stability for a policy that can be asked for actions but not differentiated: through surrogates that imitate it.

    Args:
        policy: asked for greedy actions only.
        n_surrogates: networks that are fitted to its answers.
        updates: gradient steps per surrogate, whenever there are new data.
    """

    def __init__(self, policy: PolicyView, *, n_surrogates: int = 3, updates: int = 2000) -> None:
        super().__init__(target=policy)
        self.n_surrogates = check_count("n_surrogates", n_surrogates)
        self.updates = check_count("updates", updates)
        if policy.memory_shape is not None:
            raise ValueError("policy must have no memory: use the objective MSE for a recurrent policy")

    def prepare(self, observations: Tensor, seed: int) -> None:
        assert self.target is not None
        actions = ask(self.target, observations)
        self.policies = tuple(
            fit_surrogate(self.target, observations, actions, updates=self.updates, seed=seed + i)
            for i in range(self.n_surrogates)
        )


def ask(policy: PolicyView, observations: Tensor, *, batch: int = 1024) -> Tensor:
    """A policy's greedy actions (n,) or (n, size) on observations (n, *shape): all that query access gives."""
    with torch.no_grad():
        return torch.cat([policy.actions(policy.scores(part)) for part in torch.split(observations, batch)])


def fit_surrogate(
    policy: PolicyView,
    observations: Tensor,
    actions: Tensor,
    *,
    network: nn.Module | None = None,
    updates: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> PolicyView:
    """A differentiable imitation of a policy, from (observation, action) queries.

    Args:
        policy: says which observations and actions there are; its networks are not used.
        observations: (n, *shape).
        actions: its answers, (n,) or (n, size).
        network: from observations to scores (n, number of actions) or (n, size); default two tanh layers of 64 on standardised,
            flattened observations.
        updates: gradient steps of Adam.
        batch_size: queries per step.
        learning_rate: at the start; it falls to zero.
        seed: of weights and batches.
    """
    if len(observations) != len(actions):
        raise ValueError(f"actions must be as many as observations ({len(observations)}), got {len(actions)}")
    size = policy.rule.n_scores if policy.discrete else actions[0].numel()
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _standard_network(observations, size)
    network.to(policy.device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=check_positive("learning_rate", learning_rate))
    for step in range(check_count("updates", updates)):
        set_rate(optimizer, learning_rate * (1 - step / updates))
        rows = torch.randint(len(observations), (batch_size,), generator=generator)
        scores, wanted = network(observations[rows]), actions[rows]
        loss = functional.cross_entropy(scores, wanted) if policy.discrete else functional.mse_loss(scores, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return PolicyView.from_torch(
        network.eval(),
        kind="logits" if policy.discrete else "deterministic",
        observation_shape=policy.observation_shape,
        n_frames=policy.n_frames,
        action_space=None if policy.discrete else policy.action_space,  # type: ignore[arg-type]
    )


def _standard_network(observations: Tensor, size: int) -> nn.Module:
    """Two tanh layers of 64 behind a standardisation that is folded into the first one."""
    flat = observations.flatten(1)
    mean, std = flat.mean(0), flat.std(0).clamp(min=1e-6)
    first = nn.Linear(flat.shape[1], 64)
    with torch.no_grad():
        first.weight.div_(std.cpu())
        first.bias.sub_(first.weight @ mean.cpu())
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, size))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
