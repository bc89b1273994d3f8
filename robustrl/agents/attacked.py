"""An agent whose observations are attacked on their way to it, for environments that cannot be wrapped."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.agents.smoothed import SmoothedAgent
from robustrl.agents.voting import VotingAgent
from robustrl.attacks.attacker import Attacker
from robustrl.attacks.base import Attack
from robustrl.attacks.geometry import Pixels
from robustrl.envs.attack_core import attack_range
from robustrl.policy import PolicyView
from robustrl.seeding import integer_seed, torch_generator
from robustrl.threat import ThreatModel


class AttackedAgent:
    """An agent behind an attacker, with SB3's `predict`: the attack without a wrapper around the environment.

    The attack comes before the agent's own noise, which the attacker averages over: the scores of the noisy copies of smoothed agents,
    the expected vote of majority-vote agents, the mean action of median agents. What a `SmoothedAgent` has seen so far is known to
    it, noise included.

    Args:
        agent: `SmoothedAgent`, `DenoisedAgent`, `MajorityVoteAgent`, `MedianAgent`, or an SB3 model without memory. Observations of a
            vote and of a model are attacked as a whole: frame stacks inside them count as one frame.
        attack: the attacker.
        threat: its budget, in the units in which the agent's noise acts (a `SmoothedAgent` normalises before it): units="raw".
        horizon: most steps of an episode; needed with an episode budget.
        pixels: the range that attacked pictures stay in; default that of a space of pictures or bytes, unless the agent
            normalises before its noise.
        seed: of the attacker.

    Attributes:
        attacker: its `ledger` says what the running episodes have spent.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> from stable_baselines3.common.evaluation import evaluate_policy
        >>> model = PPO("MlpPolicy", "CartPole-v1", seed=0)
        >>> agent = rrl.agents.AttackedAgent(model, rrl.attacks.MinimalFlip(), rrl.ThreatModel(norm=2, episode=0.2), horizon=500)
        >>> mean, std = evaluate_policy(agent, model.get_env(), n_eval_episodes=2, warn=False)
    """

    def __init__(
        self,
        agent: Any,
        attack: Attack,
        threat: ThreatModel,
        *,
        horizon: int | None = None,
        pixels: Pixels = None,
        seed: int | None = None,
    ) -> None:
        self.agent, self.attack, self.threat, self.horizon = agent, attack, threat, horizon
        space = getattr(agent, "space", None) or getattr(agent, "observation_space", None)
        if isinstance(agent, SmoothedAgent):
            view, noise = agent.policy, agent.noise
        elif isinstance(agent, VotingAgent):
            view, noise = agent.policy, agent.noise
            if view.n_frames > 1:
                raise ValueError(
                    "agent must vote on observations of one frame: which of a stack is attacked at a step is unknown here"
                )
        else:
            view, noise = PolicyView.of(agent), None
            if view.memory_shape is not None:
                raise TypeError(
                    "agent must have no memory: attack recurrent policies with attack_policy, or in a SmoothedAgent"
                )
            if isinstance(space, spaces.Dict):
                raise TypeError(
                    "agent must take arrays: put a model of dictionaries into a SmoothedAgent, or use attack_policy"
                )
        if pixels is None and isinstance(space, spaces.Box | spaces.Dict) and getattr(agent, "normalization", None) is None:
            pixels = attack_range(space, threat)
        # A frozen copy is differentiated: the user's model keeps its gradients and its training mode.
        self._victim = copy.deepcopy(view).eval().requires_grad_(False)
        self._noise, self._pixels = noise, pixels
        self._generator = torch_generator(np.random.SeedSequence(seed, spawn_key=(2,)), self._victim.device)
        self.attacker = self._attacker(1)

    def set_random_seed(self, seed: int | None) -> None:
        """Restart the attacker's random stream."""
        self._generator.manual_seed(integer_seed(np.random.SeedSequence(seed, spawn_key=(2,))))

    def predict(
        self, observation: Any, state: Any = None, episode_start: NDArray[Any] | None = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """SB3's `predict`, of the agent on attacked observations.

        Args:
            observation: true observation, or a batch of them, as the agent takes them. A batch's rows are episodes that go on from
                call to call.
            state: what the last call returned; None at the start.
            episode_start: which episodes start here, (n,); None for none (all at the first call, or if the batch has another size).
            deterministic: as the agent's.
        """
        agent, smoothed = self.agent, isinstance(self.agent, SmoothedAgent)
        frames, single = self._arrived(observation)
        n = len(frames)
        starts = np.broadcast_to(np.atleast_1d(state is None if episode_start is None else episode_start), n).astype(bool)
        if len(self.attacker.norms) != n:
            self.attacker = self._attacker(n)
        elif episode_start is not None or smoothed:  # other agents have no state that tells a first step
            self.attacker.reset(np.flatnonzero(starts))
        seen, memory = None, None
        if smoothed and state is not None:
            seen, memory, *_ = *(torch.from_numpy(part).to(self.attacker.device) for part in state), None
        if memory is not None:
            memory = memory * torch.from_numpy(~starts).to(memory).reshape(-1, *(1,) * (memory.ndim - 1))
        arrived = torch.from_numpy(np.array(frames, dtype=frames.dtype if frames.dtype.kind == "f" else np.float32))
        with torch.enable_grad():
            delivered = self.attacker.deliver(arrived.to(self.attacker.device), seen=seen, memory=memory)
        attacked = delivered.detach().cpu().numpy()
        if smoothed:
            actions, state = agent.respond(attacked, state, episode_start, deterministic)
        elif isinstance(agent, VotingAgent):
            actions = agent._vote(attacked)
        else:
            actions, state = agent.predict(attacked, state, episode_start, deterministic)
        return (actions[0] if single else actions), state

    def _arrived(self, observation: Any) -> tuple[NDArray[Any], bool]:
        """Frames (n, *frame) as the attack meets them, and whether there was a single one."""
        if isinstance(self.agent, SmoothedAgent):
            return self.agent.frames(observation)
        if isinstance(self.agent, VotingAgent):
            return self.agent._batch(observation)
        found, shape = np.asarray(observation), self._victim.observation_shape
        single = found.shape == shape
        if not single and found.shape[1:] != shape:
            raise ValueError(f"observation must have shape {shape} or (n, *{shape}), got {found.shape}")
        return (found[None] if single else found), single

    def _attacker(self, n: int) -> Attacker:
        return Attacker(
            self.attack,
            self.threat,
            self._victim,
            n,
            noise=self._noise,
            n_frames=self._victim.n_frames,
            padding=getattr(self.agent, "stack_padding", "reset"),
            horizon=self.horizon,
            pixels=self._pixels,
            generator=self._generator,
        )
