"""An agent that is robust without chance: the majority action over all splits of its observation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import Env, spaces
from numpy.typing import NDArray

from robustrl.certify.classify import certified, provenance
from robustrl.certify.radius import RadiusCertificate
from robustrl.certify.splitting import Budget, Counts, SplittingVotes, certify_splitting
from robustrl.errors import check_count
from robustrl.noise import DeterministicSplitting
from robustrl.policy import Normalization, Padding, PolicyView


class DeterministicSplitAgent:
    """A policy whose action is the vote of all `mechanism.levels` noisy copies of an observation, and its exact radius.

    It is deterministic and has no memory. Attacks of l1 norm at most the radius that stay on the mechanism's grid change no
    action; there is no failure probability. An action costs `levels` rows of the network.

    Args:
        model: an SB3 model with discrete actions (PPO, A2C, DQN) or a `PolicyView`. Its layers are put into evaluation mode.
        mechanism: the splitting that the policy was trained with (`perturb` is what to train with), on observations of the
            model, frame stack included.
        observation_space: the environment's, where it differs from the model's: images with channels last, or pixels in
            [0, 1] for a model of byte images.
        normalization: frozen normalisation of every observation, outside the noise.
        batch_size: most noisy copies per forward pass.

    Attributes:
        votes: of the last `predict`: `votes.radius` (n,) in observation units, `votes.steps` in grid steps, `votes.counts`.

    Examples:
        >>> import gymnasium as gym, numpy as np, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> low, high = (-4.8, -4.0, -0.42, -4.0), (4.8, 4.0, 0.42, 4.0)
        >>> env = rrl.envs.quantise.QuantiseObservation(gym.make("CartPole-v1"), 255, low, high)
        >>> splitting = rrl.noise.DeterministicSplitting(64, 255, low, high)
        >>> agent = DeterministicSplitAgent(PPO("MlpPolicy", env), splitting)
        >>> action, radius = agent.predict_with_radius(env.reset(seed=0)[0])
    """

    def __init__(
        self,
        model: Any,
        mechanism: DeterministicSplitting,
        *,
        observation_space: spaces.Box | None = None,
        normalization: Normalization | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(mechanism, DeterministicSplitting):
            raise TypeError(f"mechanism must be a DeterministicSplitting, got {mechanism!r}")
        n_frames = model.n_frames if isinstance(model, PolicyView) else 1
        policy = PolicyView.of(model, n_frames=n_frames, frame_space=observation_space, normalization=normalization)
        if policy.memory_shape is not None or not policy.discrete:
            raise TypeError("model must have discrete actions and no memory: the proof is about a function of one observation")
        self.policy = policy if normalization is None else policy.after(normalization)
        self.mechanism = mechanism
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        self.votes: SplittingVotes | None = None

    def predict(
        self,
        observation: Any,
        state: None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.int64], None]:
        """SB3's `predict`, for one clean observation or a batch of them.

        Args:
            observation: on the grid, shape (n, *observation) or (*observation), any numeric dtype.
            state: ignored, as are the others: the agent has no memory and no chance.
            episode_start: ignored.
            deterministic: ignored.
        Returns:
            actions (n,) or a single one, and None.
        Raises:
            ValueError: if the observation is off the grid or of the wrong shape, or a score is NaN or inf.
        """
        shape = self.policy.observation_shape
        found = np.asarray(observation)
        single = found.shape == shape
        found = found[None] if single else found
        if found.shape[1:] != shape:
            raise ValueError(f"observation must have shape {shape} or (n, *{shape}), got {np.shape(observation)}")
        self.policy.eval()  # training elsewhere may have switched the shared layers
        x = torch.from_numpy(np.ascontiguousarray(found)).to(self.policy.device)
        self.votes = certify_splitting(self.policy, x, self.mechanism, batch_size=self.batch_size)
        actions = self.votes.prediction
        return (actions[0] if single else actions), None

    def predict_with_radius(self, observation: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Actions and their certified l1 radii, in observation units; see `predict`."""
        actions, _ = self.predict(observation)
        assert self.votes is not None
        return actions, self.votes.radius[0] if np.ndim(actions) == 0 else self.votes.radius


@dataclass(frozen=True)
class SplitEpisode:
    """One executed trajectory of a `DeterministicSplitAgent` and the attacks that cannot change it.

    Attributes:
        counts: votes per step and action, (T, K).
        rewards: (T,).
        mechanism: the splitting.
        n_frames: frames in one observation of the policy, as far as it knows.
        provenance: hashes of policy and observations (T, *observation), for certificates.
    """

    counts: Counts
    rewards: NDArray[np.float64]
    mechanism: DeterministicSplitting
    n_frames: int = 1
    provenance: dict[str, str] = field(default_factory=dict)

    def radius(self, budget: Budget = "episode", *, n_frames: int | None = None, padding: Padding = "reset") -> float:
        """l1 budget, in observation units, of attacks that change no action and no state of this trajectory.

        It holds with certainty for the same randomness of the environment, whatever the attacker knows; see
        `robustrl.certify.splitting.trajectory_radius`.
        """
        return self.certificate(budget, n_frames=n_frames, padding=padding).radius

    def certificate(
        self, budget: Budget = "episode", *, n_frames: int | None = None, padding: Padding = "reset"
    ) -> RadiusCertificate:
        """The same as a certificate of scope "trajectory", with the votes as its evidence; alpha is 0.

        Args:
            budget: what is bounded, every "step"'s frame or the whole "episode".
            n_frames: frames in one observation; default what the policy knows. A plain SB3 model does not know that its environment
                stacks frames: say it here.
            padding: how the first stack was filled.
        """
        frames = self.n_frames if n_frames is None else n_frames
        evidence = {"counts": self.counts.tolist(), "n_frames": frames, "padding": padding, "budget": budget}
        about: dict[str, Any] = {"scope": "trajectory", "noise": self.mechanism, "provenance": self.provenance}
        return certified("splitting-trajectory", evidence, alpha=0.0, norm=1, **about)


def play_episode(
    agent: DeterministicSplitAgent, env: Env[Any, Any], *, seed: int | None = None, max_steps: int = 100_000
) -> SplitEpisode:
    """Play one episode without attack.

    Args:
        agent: who plays.
        env: gives observations on the agent's grid.
        seed: of the environment.
        max_steps: of the episode.
    Raises:
        ValueError: if the episode is longer than `max_steps`: a part of a trajectory certifies nothing about the rest.
    """
    observation, _ = env.reset(seed=seed)
    seen, counts, rewards = [], [], []
    for _ in range(check_count("max_steps", max_steps)):
        action, _ = agent.predict(observation)
        assert agent.votes is not None
        seen.append(np.array(observation))
        observation, reward, terminated, truncated, _ = env.step(action)
        counts.append(agent.votes.counts[0])
        rewards.append(float(reward))
        if terminated or truncated:
            (origin,) = provenance(agent.policy, np.stack(seen)[None])
            return SplitEpisode(np.stack(counts), np.array(rewards), agent.mechanism, agent.policy.n_frames, origin)
    raise ValueError(f"max_steps must be at least the episode's length; it still runs after {max_steps} steps")
