"""A frozen policy behind a denoiser: certified without training it again."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from torch import nn

from robustrl.agents.smoothed import SmoothedAgent
from robustrl.agents.voting import MajorityVoteAgent, MedianAgent
from robustrl.networks import Denoiser
from robustrl.noise import Noise
from robustrl.policy import Normalization, PolicyView


class DenoisedAgent(SmoothedAgent):
    """A frozen policy that sees every frame through fresh noise and every frame stack through a denoiser.

    frame -> (normalisation) -> noise -> frame stack -> denoiser -> policy: what follows the noise is part of the smoothed policy, so
    the certificates are the ordinary ones and hold for any denoiser. `certify_policy(agent.view, env, ...)` certifies the return
    of episodes, `agent.vote()` is the agent whose single actions are certified.

    Args:
        model: an SB3 model or a `PolicyView`; it must not be trained any more.
        denoiser: from `robustrl.training.denoise.denoise`, or any torch module from stacks of noisy frames to the policy's
            observations.
        noise: the mechanism.
        history: frames that the denoiser takes; default what it says itself, or as many as the policy.
        frame_stack, normalization, observation_space, options: as for `SmoothedAgent`.

    Examples:
        >>> import robustrl as rrl                                                          # doctest: +SKIP
        >>> from robustrl.training.denoise import denoise                                   # doctest: +SKIP
        >>> env = rrl.make_vec_env("CartPole-v1", noise=rrl.Gaussian(0.2))                  # doctest: +SKIP
        >>> agent = rrl.agents.DenoisedAgent(model, denoise(model, env), rrl.Gaussian(0.2)) # doctest: +SKIP
        >>> certificate = rrl.certify_policy(agent.view, env, [0.0, 0.2], frame_stack=agent.frame_stack)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        denoiser: nn.Module,
        noise: Noise,
        *,
        history: int | None = None,
        frame_stack: int = 1,
        normalization: Normalization | None = None,
        observation_space: spaces.Space[Any] | None = None,
        **options: Any,
    ) -> None:
        self._raw = PolicyView.of(model, n_frames=frame_stack, frame_space=observation_space, normalization=normalization)
        self._hash = self._raw.fingerprint()
        space = getattr(model, "observation_space", None) if observation_space is None else observation_space
        dictionary = isinstance(space, spaces.Dict)  # a view knows joint vectors only
        if history is None:
            history = denoiser.n_frames(frame_stack) if isinstance(denoiser, Denoiser) else frame_stack
        super().__init__(
            self._raw.denoised(denoiser, history),
            noise,
            frame_stack=history,
            normalization=normalization,
            observation_space=space if dictionary else observation_space,
            **options,
        )

    @property
    def view(self) -> PolicyView:
        """Denoiser and policy, for `certify_policy` and `attack_policy`.

        Raises:
            RuntimeError: if a weight of the policy is not what it was when the agent was made.
        """
        self.check_frozen()
        return self.policy

    def check_frozen(self) -> None:
        """Raise RuntimeError unless the policy's weights are, bit by bit, those it was given with."""
        if self._raw.fingerprint() != self._hash:
            raise RuntimeError("the policy was to stay frozen, but its weights changed since the agent was made")

    def vote(self, votes: int | None = None, *, seed: int | None = None) -> MajorityVoteAgent | MedianAgent:
        """The agent whose every action is the majority (or median) over noisy, then denoised copies of the observation.

        Args:
            votes: noisy copies per action; default the agent's.
            seed: of the noise.
        """
        if self.normalization is not None:
            raise ValueError("normalization must be None: a vote's noise is on the observation itself, normalise it beforehand")
        kind = MajorityVoteAgent if self.policy.discrete else MedianAgent
        return kind(self.view, self.noise, seed=seed, **({} if votes is None else {"votes": votes}))
