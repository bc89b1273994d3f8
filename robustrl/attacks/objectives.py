"""What an attacker wants: functions of the newest frames that rise as the agent does worse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustrl.attacks.base import AttackContext, Described
from robustrl.attacks.expectation import answers
from robustrl.attacks.timing import standard_deviation
from robustrl.errors import check_positive, with_type
from robustrl.policy import PolicyView

Gain = Callable[[Tensor], Tensor]
"""Newest frames (n, *frame) -> what the attacker has of them, (n,); differentiable, larger is better for it."""


class Objective(Described, ABC):
    """What an attacker wants at one step; rows do not depend on each other.

    The victim's noise is averaged over: the same draws serve the clean situation and all that is compared with it.
    """

    differentiable: ClassVar[bool] = True
    """Whether there are gradients to follow; attacks by queries need none."""

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


def check_objective(objective: object, example: str) -> None:
    """Raise TypeError unless it is an objective."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an objective of robustrl.attacks such as {example}, got {with_type(objective)}")


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
            scale = temperature(policy, clean)
            before = _mixture(clean, scale)
            p = before.softmax(-1)
            return lambda x: (p * (before - _mixture(_scores(x, context, noise), scale))).sum(-1)
        greedy, unit = _clean(_actions, context, noise).mean(1), standard_deviation(policy, clean.mean(1))
        return lambda x: ((_actions(x, context, noise).mean(1) - greedy) / unit).square().sum(-1) / 2


@dataclass(frozen=True)
class LowValue(Objective):
    """Minimise a critic: the victim's own, or one that was fitted to it.

    Q(s, mean action at x) of the true observation s where there is a critic of actions (SAC, TD3, DDPG); the same with a
    softmax over the actions for action values (DQN), whose temperature is their spread. Where there are state values only
    (PPO, A2C) it is V(x) of the attacked observation, which knows nothing of the action and is weak by design.

    Args:
        critic: action values from outside, such as those of Robust Sarsa: a module from (observations, actions) to values (n,), or
            with discrete actions from observations to values (n, n_actions). It is not trained here; default the victim's own.

    Source: Pattanaik et al. (AAMAS 2018), arXiv:1712.03632; Zhang et al. (NeurIPS 2020), arXiv:2003.08938.
    """

    critic: nn.Module | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.critic, nn.Module | None):
            raise TypeError(f"critic must be a torch.nn.Module or None, got {type(self.critic).__name__}")

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        return found if self.critic is not None else {"kind": found["kind"]}

    def check(self, policy: PolicyView) -> None:
        if self.critic is not None or policy.kind == "q" or policy.q_critic is not None:
            return
        if policy.critic is None or policy.memory_shape is not None:
            raise ValueError(f"LowValue needs a critic, which this policy of kind {policy.kind!r} has not: use ActionDeviation")

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        policy = context.policy
        if policy.discrete and (policy.kind == "q" or self.critic is not None):
            clean = _clean(_scores, context, noise)
            values, scale = action_values(context, clean, self.critic), temperature(policy, clean)
            return lambda x: -((_scores(x, context, noise) / scale).softmax(-1).mean(1) * values).sum(-1)
        respond = _state_value if policy.q_critic is None and self.critic is None else partial(value_of_actions, self.critic)
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


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log of the probability of the action that is best on the true frames, averaged over the noise draws.

    Action values count as logits in units of their spread over the actions: plain ones saturate.
    """

    def check(self, policy: PolicyView) -> None:
        _check_discrete(self, policy)

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        clean = _clean(_scores, context, noise)
        best, scale = clean.mean(1).argmax(-1), temperature(context.policy, clean)
        columns = best[:, None, None].expand(-1, clean.shape[1], 1)
        return lambda x: -(_scores(x, context, noise) / scale).log_softmax(-1).gather(2, columns).mean((1, 2))


@dataclass(frozen=True)
class MinProbability(Objective):
    """-log of the probability that the victim still does what it does on the true frames.

    Discrete actions: of the mixture over the noise draws, so that with noise it counts the votes that an agent of many noisy copies
    loses, made smooth by a softmax. Continuous ones: the log-density of the clean greedy action, up to a constant; a policy
    without a standard deviation has one of 1.

    Source: for smoothed classifiers Salman et al. (NeurIPS 2019), arXiv:1906.04584.
    """

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        policy, clean = context.policy, _clean(_scores, context, noise)
        if policy.discrete:
            scale = temperature(policy, clean)
            best = clean.mean(1).argmax(-1, keepdim=True)
            return lambda x: -_mixture(_scores(x, context, noise), scale).log_softmax(-1).gather(1, best).squeeze(1)
        greedy = _clean(_actions, context, noise).mean(1)

        def surprise(x: Tensor) -> Tensor:
            scores = _scores(x, context, noise)
            unit = standard_deviation(policy, scores)
            log_unit = 0.0 if isinstance(unit, float) else unit.log()
            return (((_actions(x, context, noise) - greedy[:, None]) / unit).square() / 2 + log_unit).sum(-1).mean(1)

        return surprise


@dataclass(frozen=True)
class Targeted(Objective):
    """The mean score of the worst action, less the best other action's.

    The worst action has the least action value on the true frames: the critic's, or the victim's own. For a policy of logits without
    a critic it is the least likely action, which need not be a bad one.

    Args:
        critic: action values from outside, from observations to (n, n_actions).
    """

    critic: nn.Module | None = None

    def check(self, policy: PolicyView) -> None:
        _check_discrete(self, policy)

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        clean = _clean(_scores, context, noise)
        worst = action_values(context, clean, self.critic).argmin(-1, keepdim=True)

        def lead(x: Tensor) -> Tensor:
            scores = _scores(x, context, noise).mean(1)
            return scores.gather(1, worst).squeeze(1) - scores.scatter(1, worst, -math.inf).amax(-1)

        return lead


@dataclass(frozen=True)
class TowardsWorst(Objective):
    """Log-probability of the action with the least value on the true frames, averaged over the noise draws; see `Targeted`."""

    critic: nn.Module | None = None

    def check(self, policy: PolicyView) -> None:
        _check_discrete(self, policy)

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        clean = _clean(_scores, context, noise)
        worst = action_values(context, clean, self.critic).argmin(-1)[:, None, None].expand(-1, clean.shape[1], 1)
        scale = temperature(context.policy, clean)
        return lambda x: (_scores(x, context, noise) / scale).log_softmax(-1).gather(2, worst).mean((1, 2))


@dataclass(frozen=True)
class GreedyValue(Objective):
    """Minus what the victim's greedy action is worth on the true frames, averaged over the noise draws; see `LowValue`."""

    differentiable: ClassVar[bool] = False

    critic: nn.Module | None = None

    def check(self, policy: PolicyView) -> None:
        LowValue(self.critic).check(policy)

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        if not context.policy.discrete:
            return LowValue(self.critic).against(context, noise)
        values = action_values(context, _clean(_scores, context, noise), self.critic)
        return lambda x: -values.gather(1, _choices(x, context, noise).squeeze(-1).long()).mean(1)


@dataclass(frozen=True)
class Flips(Objective):
    """The share of noise draws under which the victim acts otherwise than it mostly does on the true frames.

    It needs nothing but actions, and has no gradient. Continuous actions: how far the mean action moves.
    """

    differentiable: ClassVar[bool] = False

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        clean = _clean(_choices, context, noise)
        if not context.policy.discrete:
            return lambda x: (_choices(x, context, noise).mean(1) - clean.mean(1)).norm(dim=-1)
        votes = clean.squeeze(-1).long()
        usual = functional.one_hot(votes, context.policy.n_actions).sum(1).argmax(-1)
        return lambda x: (_choices(x, context, noise).squeeze(-1) != usual[:, None]).double().mean(1)


@dataclass(frozen=True)
class Weighted(Objective):
    """A weighted sum of objectives.

    Args:
        terms: (weight, objective), weights > 0.

    Robust Sarsa with MAD, (1 - rho) Q - rho deviation, is `Weighted(((1 - rho, LowValue(critic)), (rho, ActionDeviation())))`.
    """

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms must be pairs (weight, objective), got none")
        for weight, objective in self.terms:
            check_positive("weight", weight)
            if not isinstance(objective, Objective):
                raise TypeError(
                    f"terms must be pairs (weight, objective) of objectives of robustrl.attacks, got {with_type(objective)}"
                )
            if not objective.differentiable:
                raise ValueError(f"terms must have gradients, got {objective!r}")

    def check(self, policy: PolicyView) -> None:
        for _, objective in self.terms:
            objective.check(policy)

    def against(self, context: AttackContext, noise: Tensor) -> Gain:
        gains = [(weight, objective.against(context, noise)) for weight, objective in self.terms]
        return lambda x: torch.stack([weight * gain(x) for weight, gain in gains]).sum(0)


def action_values(context: AttackContext, clean: Tensor, critic: nn.Module | None) -> Tensor:
    """Of discrete actions on the true observations, float64 (n, n_actions): a critic's, or the mean of clean scores (n, draws, ...)."""
    if critic is None:
        return clean.mean(1)
    with torch.no_grad():
        values: Tensor = critic(context.policy.fold(context.clean_stack).float()).double()
    if values.shape != (len(clean), context.policy.n_actions):
        raise ValueError(f"critic must give values (n, {context.policy.n_actions}), it gives {tuple(values.shape)}")
    return values


def value_of_actions(critic: nn.Module | None, context: AttackContext, frames: Tensor) -> Tensor:
    """Of continuous actions: what acting on `frames` is worth in the true state, (n,)."""
    policy, true = context.policy, context.policy.fold(context.clean_stack).float()
    action = _mean_action(context, frames)
    return policy.action_value(true, action) if critic is None else critic(true, action).reshape(len(action))


def temperature(policy: PolicyView, clean: Tensor) -> Tensor | float:
    """What scores (n, draws, n_actions) are divided by to be logits: for action values, the standard deviation over actions."""
    if policy.kind == "logits":
        return 1.0
    spread = clean.mean(1, keepdim=True).std(-1, unbiased=False, keepdim=True)
    return torch.where(spread > 0, spread, 1.0)


def _check_discrete(objective: Objective, policy: PolicyView) -> None:
    if not policy.discrete:
        raise ValueError(
            f"{type(objective).__name__} is about discrete actions, the policy acts in {policy.action_space}: use ActionDeviation"
        )


def _mixture(scores: Tensor, scale: Tensor | float) -> Tensor:
    """Unnormalised log-probabilities of the mixture over the draws, (n, n_actions)."""
    return (scores / scale).log_softmax(-1).logsumexp(1)


def _choices(x: Tensor, context: AttackContext, noise: Tensor) -> Tensor:
    """What the victim does under every draw, (n, draws, 1 or size)."""

    def act(part: AttackContext, frames: Tensor) -> Tensor:
        return part.policy.rule.choose(part.scores(frames), None).reshape(len(frames), -1).to(frames.dtype)

    with torch.no_grad():
        return answers(act, x, context, noise)


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


def _mean_action(context: AttackContext, frames: Tensor) -> Tensor:
    return context.policy.mean_action(context.observation(frames), context.memory)


def _state_value(context: AttackContext, frames: Tensor) -> Tensor:
    return context.policy.value(context.observation(frames))
