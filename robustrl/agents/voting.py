"""Agents whose every action is a vote over noisy copies of the observation.

They are other agents than `SmoothedAgent`, which draws one noise per step: here single actions are certified, there the return of
whole episodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.certify.quantiles import attacked_median_ranks
from robustrl.certify.radius import RadiusCertificate
from robustrl.certify.sampling import Smoothed
from robustrl.errors import check_alpha, check_budget, check_count
from robustrl.noise import Noise
from robustrl.policy import Normalization, PolicyView


class VotingAgent(ABC):
    """What the two share: a policy without memory, the noise on its whole observation, and SB3's `predict`.

    Args:
        model: an SB3 model or a `PolicyView`, without memory.
        noise: the mechanism, on observations of the model, frame stack included.
        votes: noisy copies per action.
        observation_space: the environment's, where it differs from the model's: images with channels last, or pixels in [0, 1]
            for a model of byte images.
        normalization: frozen normalisation of every observation, outside the noise.
        seed: of the noise.
    """

    def __init__(
        self,
        model: Any,
        noise: Noise,
        *,
        votes: int = 1000,
        observation_space: spaces.Box | None = None,
        normalization: Normalization | None = None,
        seed: int | None = None,
    ) -> None:
        n_frames = model.n_frames if isinstance(model, PolicyView) else 1
        policy = PolicyView.of(model, n_frames=n_frames, frame_space=observation_space, normalization=normalization)
        self.policy = policy if normalization is None else policy.after(normalization)
        self.votes = check_count("votes", votes)
        self.smoothed = Smoothed(self.policy, noise, seed=seed)
        self.smoothed.noise.require("step")

    @property
    def noise(self) -> Noise:
        """The mechanism."""
        return self.smoothed.noise

    def predict(
        self,
        observation: Any,
        state: None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], None]:
        """SB3's `predict`, for one clean observation or a batch of them.

        Args:
            observation: shape (n, *observation) or (*observation).
            state: ignored: the agent has no memory.
            episode_start: ignored.
            deterministic: ignored: the vote is over greedy actions.
        Returns:
            actions (n, ...) or a single one, and None.
        Raises:
            ValueError: if the observation has another shape, or is not finite.
        """
        found, single = self._batch(observation)
        actions = self._vote(found)
        return (actions[0] if single else actions), None

    @abstractmethod
    def _vote(self, observations: NDArray[Any]) -> NDArray[Any]:
        """Actions (n, ...) on clean observations."""

    def _batch(self, observation: Any) -> tuple[NDArray[Any], bool]:
        """Observations (n, *observation) in the precision they came in, and whether there was a single one."""
        found, shape = np.asarray(observation), self.policy.observation_shape
        single = found.shape == shape
        if not single and found.shape[1:] != shape:
            raise ValueError(f"observation must have shape {shape} or (n, *{shape}), got {found.shape}")
        found = found[None] if single else found
        return (found if found.dtype.kind == "f" else found.astype(np.float64)), single


class MajorityVoteAgent(VotingAgent):
    """A policy with discrete actions that does what most noisy copies of its observation say.

    Args:
        model, noise, options: see `VotingAgent`.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> agent = rrl.agents.MajorityVoteAgent(PPO("MlpPolicy", "CartPole-v1"), rrl.Gaussian(0.2), seed=0)
        >>> observation, _ = gym.make("CartPole-v1").reset(seed=0)
        >>> action, _ = agent.predict(observation)
        >>> radius = agent.certify(observation, n=1000, alpha=0.01)[0].radius
    """

    def __init__(self, model: Any, noise: Noise, **options: Any) -> None:
        super().__init__(model, noise, **options)
        if not self.policy.discrete:
            raise TypeError(f"model must have discrete actions, got {self.policy.action_space}: see MedianAgent")

    def _vote(self, observations: NDArray[Any]) -> NDArray[Any]:
        return self.smoothed.tally(observations, self.votes).top

    def certify(
        self,
        observation: Any,
        *,
        alpha: float = 0.001,
        n0: int = 100,
        n: int = 10_000,
        method: str = "one-sided",
        norm: float | None = None,
        alpha_total: float | None = None,
    ) -> list[RadiusCertificate]:
        """How far an attacker must move each observation before the majority's action changes.

        Args:
            observation: shape (n, *observation) or (*observation).
            alpha: failure probability of each certificate; divide by the number of steps for all of an episode's.
            n0: noisy copies that choose the action.
            n: noisy copies that give the evidence.
            method: "one-sided", "two-sided", "second-order", "second-order-pairs", "dipole" or "splitting"; see `Smoothed.certify`.
            norm: of the radius; default the noise's own.
            alpha_total: failure probability of all certificates together, in place of `alpha`.
        Returns:
            RadiusCertificate per observation, of scope "step". The action that it is about is the majority's over infinitely
            many copies.
        Raises:
            ValueError: for bad numbers, or a statement that has no proof, which it explains.
        """
        if method == "values":
            raise ValueError("method must be one that counts actions, got 'values': see certify_values")
        found, _ = self._batch(observation)
        options: dict[str, Any] = {"method": method, "norm": norm, "alpha_total": alpha_total}
        return self.smoothed.certify(found, n0, n, alpha, scope="step", **options)

    def certify_values(
        self,
        observation: Any,
        low: float,
        high: float,
        *,
        alpha: float = 0.001,
        n0: int = 100,
        n: int = 10_000,
        norm: float | None = None,
        alpha_total: float | None = None,
    ) -> list[RadiusCertificate]:
        """The same for the action of highest mean value over the noise, values clipped to [low, high].

        Args:
            observation: shape (n, *observation) or (*observation).
            low: values below count as this.
            high: values above count as this.
            alpha: failure probability of each certificate; it is split over all actions.
            n0: noisy copies that choose the action.
            n: noisy copies that give the evidence.
            norm: of the radius; default the noise's own.
            alpha_total: failure probability of all certificates together, in place of `alpha`.
        Raises:
            TypeError: if the policy's scores are no action values.
        Source: Wu et al., "CROP: Certifying Robust Policies for Reinforcement Learning through Functional Smoothing" (ICLR 2022),
            arXiv:2106.09292, local smoothing of action values; with the union bound over actions that it leaves out.
        """
        if self.policy.kind != "q":
            raise TypeError(f"the policy must give action values (DQN), its scores are {self.policy.kind}")
        found, _ = self._batch(observation)
        smoothed = Smoothed(self.policy, self.noise, bounds=(low, high), seed=self.smoothed.next_stream())
        options: dict[str, Any] = {"norm": norm, "alpha_total": alpha_total}
        return smoothed.certify(found, n0, n, alpha, method="values", scope="step", **options)


@dataclass(frozen=True)
class ActionInterval:
    """Where an attacked agent's actions lie.

    Attributes:
        low: lowest action, (n, size); the space's own bound where the samples say nothing.
        high: highest action, (n, size).
        budget: of the attack on the observation, in the norm of the noise.
        alpha: failure probability of each row, over samples and votes, all entries together.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    budget: float
    alpha: float


class MedianAgent(VotingAgent):
    """A policy with continuous actions whose every action is, entry by entry, the median over noisy copies of its observation.

    Args:
        model, noise, options: see `VotingAgent`.
        votes: noisy copies per action, an odd number.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import SAC
        >>> agent = rrl.agents.MedianAgent(SAC("MlpPolicy", "Pendulum-v1", buffer_size=100), rrl.Gaussian(0.1), seed=0)
        >>> observation, _ = gym.make("Pendulum-v1").reset(seed=0)
        >>> action, _ = agent.predict(observation)
        >>> interval = agent.interval(observation, budget=0.05)
    """

    def __init__(self, model: Any, noise: Noise, *, votes: int = 1001, **options: Any) -> None:
        super().__init__(model, noise, votes=votes, **options)
        if self.policy.discrete:
            raise TypeError(f"model must have continuous actions, got {self.policy.action_space}: see MajorityVoteAgent")
        if votes % 2 == 0:
            raise ValueError(f"votes must be odd, so that there is a middle one, got {votes}")

    def _vote(self, observations: NDArray[Any]) -> NDArray[Any]:
        outputs = self.smoothed.outputs(observations, self.votes)
        return self.policy.received(torch.median(outputs, dim=1).values)

    def interval(self, observation: Any, budget: float, *, alpha: float = 0.001, n: int = 10_000) -> ActionInterval:
        """Bounds for the action that the agent takes on an observation that an attacker moved by at most `budget`.

        Args:
            observation: clean, shape (n, *observation) or (*observation).
            budget: in the norm of the noise.
            alpha: failure probability of each row of the result, split over the entries of the action and their two sides.
            n: noisy copies.
        """
        found, _ = self._batch(observation)
        budget = float(check_budget("budget", budget))
        attacked = budget + max(self.smoothed.rounding(found, self.noise.norm))
        space = self.policy.action_space
        assert isinstance(space, spaces.Box)
        size = math.prod(space.shape)
        ranks = attacked_median_ranks(n, self.votes, self.noise, attacked, check_alpha(alpha) / size)
        ordered = self.smoothed.outputs(found, n).double().sort(dim=1).values.cpu().numpy()
        bounds = (
            np.broadcast_to(bound.reshape(-1).astype(np.float64), (len(found), size)) for bound in (space.low, space.high)
        )
        low, high = bounds
        found_low = low if ranks.low is None else np.clip(ordered[:, ranks.low - 1], low, high)
        found_high = high if ranks.high is None else np.clip(ordered[:, ranks.high - 1], low, high)
        return ActionInterval(found_low, found_high, budget, alpha)
