"""What an attacker wants: functions of the newest frames that rise as the agent does worse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from gymnasium import spaces
from torch import Tensor

from robustrl.attacks.base import AttackContext, Described
from robustrl.attacks.expectation import answers
from robustrl.policy import PolicyView

Gain = Callable[[Tensor], Tensor]
"""Newest frames (n, *frame) -> what the attacker has of them, (n,); differentiable, larger is better for it."""


class Objective(Described, ABC):
    """What an attacker wants at one step; rows do not depend on each other.

    The victim's noise is averaged over: the same draws serve the clean situation and all that is compared with it.
    """

    def check(self, policy: PolicyView) -> None:
        """Raise ValueError if the objective has no meaning for this policy."""
        del policy

    @abstractmethod
    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        """The function to increase in this situation; what it needs of the true frames is computed here, once.

        Args:
            context: what the attacker knows; its clean stack ends with the true frames.
            noise: samples that stand for the unknown noise, (draws, *frame).
        """


@dataclass(frozen=True)
class ActionDeviation(Objective):
    """Maximal action difference (MAD): the policy's distance from what it does on the true frames.

    Continuous actions: half the squared distance of the greedy actions, in units of the policy's standard deviation if it
    has one. For Gaussian policies that is their Kullback-Leibler divergence, for squashed ones it is without the moves in
    the flat ends of the tanh, which no environment notices. Discrete actions: KL(clean || attacked); action values count as
    logits in units of their spread over the actions. Needs no critic. The gradient at the true frame vanishes (without frame
    stacks exactly, for continuous actions): an ascent has to start elsewhere.

    Source: Zhang et al. (NeurIPS 2020), arXiv:2003.08938.
    """

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        policy, clean = context.policy, _clean(_scores, context, noise)
        if policy.discrete:

            def distribution(scores: Tensor) -> Tensor:
                """Unnormalised log-probabilities of the mixture over the draws, (n, n_actions)."""
                return (scores / _temperature(policy, clean)).log_softmax(-1).logsumexp(1)

            before = distribution(clean)
            p = before.softmax(-1)
            return lambda x: (p * (before - distribution(_scores(x, context, noise)))).sum(-1)
        greedy, unit = _clean(_actions, context, noise).mean(1), _standard_deviation(policy, clean.mean(1))
        return lambda x: ((_actions(x, context, noise).mean(1) - greedy) / unit).square().sum(-1) / 2


@dataclass(frozen=True)
class LowValue(Objective):
    """Minimise the victim's own critic.

    Q(s, mean action at x) of the true observation s where there is a critic of actions (SAC, TD3, DDPG); the same with a
    softmax over the actions for action values (DQN), whose temperature is their spread. Where there are state values only
    (PPO, A2C) it is V(x) of the attacked observation, which knows nothing of the action and is weak by design.

    Source: Pattanaik et al. (AAMAS 2018), arXiv:1712.03632; Zhang et al. (NeurIPS 2020), arXiv:2003.08938.
    """

    def check(self, policy: PolicyView) -> None:
        if policy.kind == "q" or policy.q_critic is not None:
            return
        if policy.critic is None or policy.memory_shape is not None:
            raise ValueError(f"LowValue needs a critic, which this policy of kind {policy.kind!r} has not: use ActionDeviation")

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        policy = context.policy
        if policy.kind == "q":
            clean = _clean(_scores, context, noise)
            values, scale = clean.mean(1), _temperature(policy, clean)
            return lambda x: -((_scores(x, context, noise) / scale).softmax(-1).mean(1) * values).sum(-1)
        respond = _state_value if policy.q_critic is None else _action_value
        return lambda x: -answers(respond, x, context, noise).mean((1, 2))


@dataclass(frozen=True)
class Margin(Objective):
    """The best other action's mean score, less that of the action which is best on the true frames."""

    def check(self, policy: PolicyView) -> None:
        if not policy.discrete:
            raise ValueError(f"Margin compares discrete actions, the policy acts in {policy.action_space}: use ActionDeviation")
        if policy.n_actions < 2:
            raise ValueError("Margin needs a policy with at least 2 actions, got 1")

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        best = _clean(_scores, context, noise).mean(1).argmax(-1, keepdim=True)

        def margin(x: Tensor) -> Tensor:
            scores = _scores(x, context, noise).mean(1)
            return scores.scatter(1, best, -math.inf).amax(-1) - scores.gather(1, best).squeeze(1)

        return margin


def _clean(look: Callable[[Tensor, AttackContext, Tensor], Tensor], context: AttackContext, noise: Tensor) -> Tensor:
    """What there is to see under every draw, (n, draws, k), had nothing been attacked and the past been free of noise."""
    with torch.no_grad():
        return look(context.clean_stack[:, -1], replace(context, seen_stack=context.clean_stack), noise)


def _scores(x: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
    """(n, draws, n_scores), float64: divergences of policies that are nearly the same are lost in single precision."""
    return answers(AttackContext.scores, x, context, noise).double()


def _actions(x: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
    """Greedy actions (n, draws, size)."""
    return answers(_mean_action, x, context, noise)


def _temperature(policy: PolicyView, clean: Tensor) -> Tensor | float:
    """What scores (n, draws, n_actions) are divided by to be logits: for action values, the standard deviation over actions."""
    if policy.kind == "logits":
        return 1.0
    spread = clean.mean(1, keepdim=True).std(-1, unbiased=False, keepdim=True)
    return torch.where(spread > 0, spread, 1.0)


def _standard_deviation(policy: PolicyView, scores: Tensor) -> Tensor | float:
    """Of the actions (n, size), in the environment's units and before any squashing; 1 for a policy that has none."""
    if policy.kind == "deterministic":
        return 1.0
    deviation = scores.chunk(2, dim=-1)[1].exp()
    if policy.kind == "squashed":
        space = cast(spaces.Box, policy.action_space)
        deviation = deviation * torch.from_numpy((space.high - space.low).reshape(-1) / 2).to(deviation)
    return deviation


def _mean_action(context: AttackContext, frames: Tensor) -> Tensor:
    return context.policy.mean_action(context.observation(frames), context.memory)


def _action_value(context: AttackContext, frames: Tensor) -> Tensor:
    policy, true = context.policy, context.policy.fold(context.clean_stack).float()
    return policy.action_value(true, _mean_action(context, frames))


def _state_value(context: AttackContext, frames: Tensor) -> Tensor:
    return context.policy.value(context.observation(frames))
