"""An SB3-style agent that adds the smoothing noise itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from robustrl.envs.joint import as_batch, join, joint_box
from robustrl.errors import check_choice, check_count
from robustrl.noise import Noise
from robustrl.policy import Normalization, Padding, PolicyView, push_frame, start_stack
from robustrl.seeding import torch_generator


class SmoothedAgent:
    """A policy that sees every frame through fresh noise: the agent that an episode certificate is about.

    It takes *clean single frames* and owns both the noise and the frame stack, so it goes into an ordinary environment
    and into `stable_baselines3.common.evaluation.evaluate_policy`. One noise draw per frame and one action per step; a
    majority vote over many draws would be a different agent with a different certificate.

    Args:
        model: an SB3 model (PPO, A2C, DQN, SAC, TD3, DDPG, RecurrentPPO) or a `PolicyView`.
        noise: the mechanism.
        frame_stack: frames in one observation of the model.
        stack_padding: how an episode's first stack is filled.
        normalization: frozen normalisation of every frame before the noise.
        observation_space: the environment's, where it differs from the model's: images with channels last, or pixels in
            [0, 1] for a model of byte images. Dictionaries are joined key by key.
        seed: seed of the noise.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> agent = rrl.agents.SmoothedAgent(PPO("MlpPolicy", "CartPole-v1"), rrl.Gaussian(0.2))
        >>> observation, _ = gym.make("CartPole-v1").reset(seed=0)
        >>> action, state = agent.predict(observation, deterministic=True)
    """

    def __init__(
        self,
        model: Any,
        noise: Noise,
        *,
        frame_stack: int = 1,
        stack_padding: Padding = "reset",
        normalization: Normalization | None = None,
        observation_space: spaces.Space[Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {noise!r}")
        noise.require("episode")
        if normalization is not None and not isinstance(normalization, Normalization):
            raise TypeError(f"normalization must be a robustrl Normalization, got {normalization!r}; try Normalization.of(...)")
        self.space = getattr(model, "observation_space", None) if observation_space is None else observation_space
        self.policy = PolicyView.of(
            model,
            n_frames=check_count("frame_stack", frame_stack),
            frame_space=observation_space,
            normalization=normalization,
        )
        if observation_space is not None and joint_box(observation_space).shape != self.policy.frame_shape:
            raise ValueError(f"observation_space must hold frames of shape {self.policy.frame_shape}, got {observation_space}")
        if normalization is not None and normalization.mean.shape != self.policy.frame_shape:
            raise ValueError(
                f"normalization has statistics of shape {normalization.mean.shape}, but frames have {self.policy.frame_shape}"
            )
        self.noise, self.frame_stack, self.normalization = noise, frame_stack, normalization
        self.stack_padding: Padding = check_choice("stack_padding", stack_padding, ("reset", "zero"))
        self.set_random_seed(seed)

    def set_random_seed(self, seed: int | None) -> None:
        """Restart noise and action sampling."""
        noise, actions = np.random.SeedSequence(seed).spawn(2)
        self._noise_generator = torch_generator(noise, self.policy.device)
        self._action_generator = torch_generator(actions, self.policy.device)

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...]]:
        """SB3's `predict`, for one clean frame or a batch of them.

        Args:
            observation: clean frames, shape (n, *frame) or (*frame), or a dictionary of them.
            state: what the last call returned; it holds the frame stacks, and the memory of a recurrent policy. None at the
                start.
            episode_start: which episodes start with this frame, shape (n,); None for none (all, when `state` is None).
            deterministic: greedy action on the noisy observation, or sample.
        Returns:
            actions (n, ...) or a single one, and the new state.
        Raises:
            ValueError: if the shape of frames or state is wrong, or a frame is not finite.
        """
        frames, single = self.frames(observation)
        actions, after = self.respond(frames, state, episode_start, deterministic)
        return (actions[0] if single else actions), after

    def respond(
        self,
        frames: NDArray[Any],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...]]:
        """`predict` on frames (n, *frame) that are normalised already: actions (n, ...) and the new state."""
        tensor = torch.from_numpy(frames).to(self.policy.device)
        seen = self.noise.perturb(tensor, self._noise_generator).float()
        stack, memory = start_stack(seen, self.frame_stack, self.stack_padding), self.policy.memory(len(frames))
        if state is not None:
            given, needed = ([tuple(part.shape) for part in parts if part is not None] for parts in (state, (stack, memory)))
            if given != needed:
                raise ValueError(f"state holds arrays of shapes {given}, but the policy and this observation need {needed}")
            starts = np.atleast_1d(False if episode_start is None else episode_start).astype(bool)
            if episode_start is not None and starts.shape != (len(frames),):
                raise ValueError(f"episode_start must have shape ({len(frames)},), got {starts.shape}")
            going_on = torch.from_numpy(np.broadcast_to(~starts, len(frames)).copy()).to(seen.device)
            stack[going_on] = push_frame(torch.from_numpy(state[0]).to(seen.device), seen)[going_on]
            if memory is not None:
                memory[going_on] = torch.from_numpy(state[1]).to(seen.device)[going_on]
        draws = None if deterministic else self.policy.draw(len(frames), self._action_generator)
        self.policy.eval()  # training elsewhere may have switched the shared layers
        actions, memory = self.policy.decide(stack, memory, batch=len(frames), deterministic=deterministic, draws=draws)
        after = (stack,) if memory is None else (stack, memory)
        return self.policy.received(actions), tuple(part.cpu().numpy() for part in after)

    def frames(self, observation: Any) -> tuple[NDArray[Any], bool]:
        """Clean frames (n, *frame), normalised, and whether there was a single one."""
        shape = self.policy.frame_shape
        if isinstance(observation, dict):
            if not isinstance(self.space, spaces.Dict) or set(observation) != set(self.space):
                raise ValueError(f"observation must fit {self.space}, got the keys {sorted(observation)}")
            single = all(np.shape(observation[key]) == part.shape for key, part in self.space.items())
            batch = as_batch(observation) if single else observation
            rows = {len(np.atleast_1d(part)) for part in batch.values()}
            if len(rows) > 1 or any(np.shape(batch[key])[1:] != part.shape for key, part in self.space.items()):
                shapes = {key: np.shape(part) for key, part in observation.items()}
                raise ValueError(f"observation must fit {self.space}, or a batch of it, got shapes {shapes}")
            frames = join(batch, self.space)
        else:
            frames = np.array(observation)  # a copy: environments may hand out read-only or strided arrays
            single = frames.shape == shape
            frames = frames[None] if single else frames
        if frames.shape[1:] != shape:
            raise ValueError(f"observation must have shape {shape} or (n, *{shape}), got {frames.shape}")
        if not np.isfinite(frames).all():
            raise ValueError("observation must be finite, got NaN or inf")
        return (frames if self.normalization is None else self.normalization(frames)), single
