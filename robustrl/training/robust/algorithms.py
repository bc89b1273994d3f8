"""PPO and DQN with a robustness term: SB3's own `train`, to whose gradients one more is added.

Both of SB3's training loops fetch a minibatch from their buffer, compute a loss, call `optimizer.zero_grad()`, go backward, clip and
step. Here the minibatch is looked at on its way, and `zero_grad` leaves the gradient of kappa times the term behind instead of zero:
what is clipped and stepped along is the gradient of the sum. Without a term (kappa = 0) nothing of ours runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from robustrl.errors import check_choice, check_real, with_type
from robustrl.policy import PolicyView
from robustrl.seeding import torch_generator
from robustrl.threat import ThreatModel
from robustrl.training.robust.fast import Fast
from robustrl.training.robust.neighbourhood import IBP, Ascent, Neighbourhood, check_epsilon
from robustrl.training.robust.regularizers import Minibatch, Overlap, Regularizer, StateAdversarial, WorstSurrogate
from robustrl.training.robust.schedules import SCHEDULES, Schedule
from robustrl.training.robust.views import view_of
from robustrl.training.supervised.attacks import FGSMRS, NFGSM

STATE_ADVERSARIAL: Mapping[str, Regularizer] = {
    "sgld": StateAdversarial(Ascent(steps=10, rate=1.0, temperature=1e-5)),
    "pgd": StateAdversarial(Ascent(steps=10)),
    "fgsm-rs": StateAdversarial(Fast(FGSMRS())),
    "n-fgsm": StateAdversarial(Fast(NFGSM())),
    "ibp": StateAdversarial(IBP()),
}


@dataclass(frozen=True)
class _Tools:
    """What the term needs of a model; made when it is first needed, never saved."""

    of: Any
    policy: PolicyView
    around: Neighbourhood
    regularizer: Regularizer
    generator: torch.Generator


def _check_name(argument: str, value: object, known: Mapping[str, Any], else_: str) -> None:
    """Raise ValueError for an unknown name, TypeError for what is no name."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be {', '.join(map(repr, known))} or {else_}, got {with_type(value)}")
    check_choice(argument, value, tuple(known))


class _Robust(BaseAlgorithm):
    """What `SAPPO` and `SADQN` share; see there."""

    losses: ClassVar[Mapping[str, Regularizer]]
    _tools: _Tools | None = None
    _minibatch: Minibatch | None = None

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        epsilon: float | ThreatModel,
        kappa: float,
        norm: float | str | None,
        loss: str | Regularizer,
        epsilon_schedule: str | Schedule | Callable[[float], float],
        **kwargs: Any,
    ) -> None:
        check_epsilon(epsilon, norm)
        if check_real("kappa", kappa, allowed="a finite number >= 0") < 0:
            raise ValueError(f"kappa must be a finite number >= 0, got {kappa}")
        if not isinstance(loss, Regularizer):
            _check_name("loss", loss, self.losses, "a Regularizer of robustrl.training.robust such as Consistency(noise)")
        if not callable(epsilon_schedule):
            _check_name("epsilon_schedule", epsilon_schedule, SCHEDULES, "a Schedule of robustrl.training.robust or a function")
        self.epsilon, self.norm, self.kappa, self.loss = epsilon, norm, kappa, loss
        self.epsilon_schedule = epsilon_schedule
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()  # type: ignore[safe-super]
        if self.env is not None:  # a saved model may be loaded without one
            self._prepared()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_tools", "_minibatch"]

    def _prepared(self) -> _Tools:
        if self._tools is None or self._tools.of is not self.policy:
            around = Neighbourhood.of_learner(self, self.epsilon, self.norm)
            policy, regularizer = view_of(self), self.losses[self.loss] if isinstance(self.loss, str) else self.loss
            regularizer.check(policy)
            generator = torch_generator(np.random.SeedSequence(self.seed), self.device)
            self._tools = _Tools(self.policy, policy, around, regularizer, generator)
        return self._tools

    @contextmanager
    def _regularized(self) -> Iterator[None]:
        """Updates inside follow the gradient of the loss plus kappa times the term, on the minibatch seen last."""
        tools, schedule = self._prepared(), self.epsilon_schedule
        factor = (SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(self._current_progress_remaining)
        around = replace(tools.around, radius=factor * tools.around.radius)
        terms: list[Tensor] = []

        def penalized(zero_grad: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: Any, **kwargs: Any) -> None:
                zero_grad(*args, **kwargs)
                assert self._minibatch is not None
                with self._evaluating():
                    term = tools.regularizer.loss(tools.policy, self._minibatch, around, tools.generator)
                if term.requires_grad:
                    (self.kappa * term).backward()  # type: ignore[no-untyped-call]
                terms.append(term.detach())

            return wrapped

        with wrapped(self.policy.optimizer, "zero_grad", penalized):
            yield
        if terms:
            mean = torch.stack(terms).mean().item()
            if not math.isfinite(mean):
                raise RuntimeError(f"the robustness term became {mean}: try a smaller learning_rate, kappa or epsilon")
            self.logger.record("train/robust_loss", mean)
        self.logger.record("train/epsilon", around.radius)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The network that acts, without dropout and with frozen batch statistics."""
        self.policy.set_training_mode(False)
        try:
            yield
        finally:
            self.policy.set_training_mode(True)


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner` with one method wrapped, inside."""
    before = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class SAPPO(_Robust, PPO):
    """PPO whose policy shall not change within a neighbourhood of the observations: SA-PPO, RADIAL-PPO and others.

    The loss is PPO's plus kappa times a term. With kappa = 0 the weights are SB3's PPO's, bit by bit. Saved and loaded as any SB3
    model; `robustrl.load_agent` gives a plain PPO to certify and attack.

    Args:
        policy, env: as for PPO.
        args, kwargs: of PPO.
        epsilon: radius of the neighbourhood: a number, in the units that the network's observations have for the learner (normalised
            ones behind a VecNormalize, grey levels for byte images), or a `ThreatModel` with `step`.
        kappa: weight of the term. SA-PPO's authors use 0.1 for MuJoCo.
        norm: of a plain epsilon: inf (the default), 2 or 1.
        loss: "sgld" or "pgd" (largest change of the policy, by gradient ascent), "fgsm-rs" or "n-fgsm" (by a single step), "ibp" (an upper bound of it), "radial", or a
            `Regularizer`.
        epsilon_schedule: factor of epsilon, a function of SB3's `progress_remaining`; "linear" (the default: from 0 to 1 in the first
            three quarters of training), "smoothed", "constant", or e.g. `Smoothed(0.25, 0.9)`.
    Raises:
        ValueError: for bad arguments, or a policy or space for which the term has no meaning.

    Source: Zhang et al. (NeurIPS 2020), arXiv:2003.08938.
    """

    losses = {**STATE_ADVERSARIAL, "radial": WorstSurrogate()}  # noqa: RUF012  (a ClassVar, see the base)

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        epsilon: float | ThreatModel = 0.075,
        kappa: float = 0.1,
        norm: float | str | None = None,
        loss: str | Regularizer = "sgld",
        epsilon_schedule: str | Schedule | Callable[[float], float] = "linear",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            *args,
            epsilon=epsilon,
            kappa=kappa,
            norm=norm,
            loss=loss,
            epsilon_schedule=epsilon_schedule,
            **kwargs,
        )

    def train(self) -> None:
        """SB3's update, with the term."""
        if self.kappa == 0:
            return super().train()
        with wrapped(self.rollout_buffer, "get", self._looking), self._regularized():
            super().train()

    def _looking(self, get: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def looked_at(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for data in get(*args, **kwargs):
                advantages = data.advantages
                if self.normalize_advantage and len(advantages) > 1:
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                discrete = isinstance(self.action_space, spaces.Discrete)
                self._minibatch = Minibatch(
                    data.observations.float(),
                    data.actions.long().flatten() if discrete else data.actions,
                    advantages=advantages,
                    old_log_prob=data.old_log_prob,
                    clip_range=self.clip_range(self._current_progress_remaining),  # type: ignore[operator]
                )
                yield data

        return looked_at


class SADQN(_Robust, DQN):
    """DQN whose greedy action shall not change within a neighbourhood of the observations: SA-DQN, RADIAL-DQN and others.

    The loss is DQN's plus kappa times a term. With kappa = 0 the weights are SB3's DQN's, bit by bit. Saved and loaded as any SB3
    model; `robustrl.load_agent` gives a plain DQN to certify and attack.

    Args:
        policy, env: as for DQN.
        args, kwargs: of DQN.
        epsilon, norm, epsilon_schedule: as for `SAPPO`.
        kappa: weight of the term; SA-DQN's authors use 0.005 to 0.02 for Atari.
        loss: "sgld", "pgd" (the lead of another action, by gradient ascent), "fgsm-rs", "n-fgsm" (by a single step), "ibp" (an upper bound of it), "radial" (overlap of
            bounds), or a `Regularizer`.
    Raises:
        ValueError: for bad arguments, or a space for which the term has no meaning.

    Source: Zhang et al. (NeurIPS 2020), arXiv:2003.08938.
    """

    losses = {**STATE_ADVERSARIAL, "radial": Overlap()}  # noqa: RUF012  (a ClassVar, see the base)

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        epsilon: float | ThreatModel = 0.1,
        kappa: float = 0.02,
        norm: float | str | None = None,
        loss: str | Regularizer = "pgd",
        epsilon_schedule: str | Schedule | Callable[[float], float] = "linear",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            *args,
            epsilon=epsilon,
            kappa=kappa,
            norm=norm,
            loss=loss,
            epsilon_schedule=epsilon_schedule,
            **kwargs,
        )

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """SB3's update, with the term."""
        if self.kappa == 0:
            return super().train(gradient_steps, batch_size)
        with wrapped(self.replay_buffer, "sample", self._looking), self._regularized():
            super().train(gradient_steps, batch_size)

    def _looking(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            data = sample(*args, **kwargs)
            self._minibatch = Minibatch(
                data.observations.float(),
                data.actions.long().flatten(),
                target=lambda: self.q_net_target(data.observations).detach(),
            )
            return data

        return looked_at
