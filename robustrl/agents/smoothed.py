"""An SB3-style agent that adds the smoothing noise itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustrl.errors import check_choice, check_count
from robustrl.noise import Noise
from robustrl.policy import Padding, PolicyView, push_frame, start_stack
from robustrl.seeding import torch_generator


class SmoothedAgent:
    """A policy that sees every frame through fresh noise: the agent that an episode certificate is about.

    It takes *clean single frames* and owns both the noise and the frame stack, so it goes into an ordinary environment
    and into `stable_baselines3.common.evaluation.evaluate_policy`. One noise draw per frame and one action per step; a
    majority vote over many draws would be a different agent with a different certificate.

    Args:
        model: an SB3 model (PPO, A2C, DQN) or a `PolicyView`.
        noise: the mechanism.
        frame_stack: frames in one observation of the model.
        stack_padding: how an episode's first stack is filled.
        seed: seed of the noise.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> agent = rrl.agents.SmoothedAgent(PPO("MlpPolicy", "CartPole-v1"), rrl.Gaussian(0.2))
        >>> observation, _ = gym.make("CartPole-v1").reset(seed=0)
        >>> action, state = agent.predict(observation, deterministic=True)
    """

    def __init__(
        self, model: Any, noise: Noise, *, frame_stack: int = 1, stack_padding: Padding = "reset", seed: int | None = None
    ) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {noise!r}")
        noise.require("episode")
        self.policy = PolicyView.of(model, n_frames=check_count("frame_stack", frame_stack))
        self.noise, self.frame_stack = noise, frame_stack
        self.stack_padding: Padding = check_choice("stack_padding", stack_padding, ("reset", "zero"))
        self.set_random_seed(seed)

    def set_random_seed(self, seed: int | None) -> None:
        """Restart noise and action sampling."""
        noise, actions = np.random.SeedSequence(seed).spawn(2)
        self._noise_generator = torch_generator(noise, self.policy.device)
        self._action_generator = torch_generator(actions, self.policy.device)

    def predict(
        self,
        observation: NDArray[Any],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...]]:
        """SB3's `predict`, for one clean frame or a batch of them.

        Args:
            observation: clean frames, shape (n, *frame) or (*frame).
            state: what the last call returned; it holds the frame stacks. None at the start.
            episode_start: which episodes start with this frame, shape (n,); None for none (all, when `state` is None).
            deterministic: greedy action on the noisy observation, or sample.
        Returns:
            actions (n,) or a scalar array, and the new state.
        Raises:
            ValueError: if the shape of frames or state is wrong, or a frame is not finite.
        """
        frames = np.array(observation)  # a copy: environments may hand out read-only or strided arrays
        single = frames.shape == self.policy.frame_shape
        if single:
            frames = frames[None]
        if frames.shape[1:] != self.policy.frame_shape:
            raise ValueError(
                f"observation must have shape {self.policy.frame_shape} or (n, *{self.policy.frame_shape}), got {frames.shape}"
            )
        if not np.isfinite(frames).all():
            raise ValueError("observation must be finite, got NaN or inf")
        tensor = torch.from_numpy(frames).to(self.policy.device)
        seen = self.noise.perturb(tensor, self._noise_generator).float()
        fresh = start_stack(seen, self.frame_stack, self.stack_padding)
        if state is None:
            stack = fresh
        else:
            if state[0].shape != tuple(fresh.shape):
                raise ValueError(
                    f"state holds frame stacks of shape {state[0].shape}, but the observation needs {tuple(fresh.shape)}"
                )
            stack = push_frame(torch.from_numpy(state[0]).to(seen.device), seen)
            if episode_start is not None:
                starts = np.atleast_1d(episode_start).astype(bool)
                if starts.shape != (len(frames),):
                    raise ValueError(f"episode_start must have shape ({len(frames)},), got {starts.shape}")
                stack[torch.from_numpy(starts)] = fresh[torch.from_numpy(starts)]
        uniforms = None
        if not deterministic:
            uniforms = torch.rand(len(frames), 2, generator=self._action_generator, device=seen.device)
        actions = self.policy.act_blocked(stack, batch=len(frames), deterministic=deterministic, uniforms=uniforms)
        result = actions.cpu().numpy()
        return (result[0] if single else result), (stack.cpu().numpy(),)
