"""One view of any policy: batched, differentiable, from native observations.

`PolicyView` is what attacks, certificates and rollouts see of a policy. Knowledge of Stable-Baselines3's internals lives
here alone (and, for its files, in `robustrl.policy.loading`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from robustrl.errors import check_choice, check_count, check_real
from robustrl.policy.frames import fold_frames, frame_shape

Kind = Literal["logits", "q"]

INFERENCE_BATCH = 1024
"""Most rows per forward pass in `act_blocked`: enough to amortise a kernel launch, few enough to stay in the cache."""


class PolicyView(nn.Module):
    """A batched, differentiable view of a policy with discrete actions.

    Args:
        actor: torch module mapping observations (n, *observation_shape) to scores (n, n_actions).
        kind: "logits" if the scores are unnormalised log-probabilities, "q" if they are action values.
        observation_shape: what the network takes, frame stack included.
        n_frames: frames in one observation.
        critic: optional module mapping observations to state values (n, 1) or (n,).
        exploration: probability of a uniformly random action when acting with deterministic=False ("q" only).

    Build one with `from_sb3`, `from_torch` or `of`.
    """

    def __init__(
        self,
        actor: nn.Module,
        *,
        kind: Kind,
        observation_shape: tuple[int, ...],
        n_frames: int = 1,
        critic: nn.Module | None = None,
        exploration: float = 0.0,
    ) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.kind: Kind = check_choice("kind", kind, ("logits", "q"))
        self.observation_shape = tuple(int(size) for size in observation_shape)
        self.n_frames = check_count("n_frames", n_frames)
        self.frame_shape = frame_shape(self.observation_shape, n_frames)
        self.exploration = check_real("exploration", exploration, allowed="a probability in [0, 1]")
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration must be a probability in [0, 1], got {exploration}")
        self.eval()
        with torch.no_grad():
            try:
                probe = actor(torch.zeros(1, *self.observation_shape, device=self.device))
            except RuntimeError as error:
                raise ValueError(
                    f"the policy's network does not take observations of shape {self.observation_shape}: {error}"
                ) from None
        if not isinstance(probe, Tensor) or probe.ndim != 2 or probe.shape[0] != 1:
            raise ValueError("the policy's network must map (n, *observation_shape) to scores (n, n_actions)")
        self.n_actions = int(probe.shape[1])

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        kind: Kind,
        observation_shape: tuple[int, ...],
        n_frames: int = 1,
        critic: nn.Module | None = None,
    ) -> PolicyView:
        """View any torch module; see the class for the arguments."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        return cls(module, kind=kind, observation_shape=observation_shape, n_frames=n_frames, critic=critic)

    @classmethod
    def from_sb3(cls, model: Any, *, n_frames: int = 1) -> PolicyView:
        """View a Stable-Baselines3 PPO, A2C or DQN model with a Box observation and a Discrete action space.

        Args:
            model: the SB3 model; its weights are shared, not copied.
            n_frames: frames stacked in one of its observations.
        Raises:
            TypeError: for other algorithms or spaces.
            ValueError: if the model normalises observations with a VecNormalize outside the view.
        """
        from stable_baselines3.common.base_class import BaseAlgorithm
        from stable_baselines3.common.policies import ActorCriticPolicy
        from stable_baselines3.dqn.policies import DQNPolicy

        if not isinstance(model, BaseAlgorithm):
            raise TypeError(f"model must be a Stable-Baselines3 model, got {type(model).__name__}")
        policy, name = model.policy, type(model).__name__
        if not isinstance(policy.observation_space, spaces.Box):
            raise TypeError(f"{name}: observations must be a Box space, got {policy.observation_space}")
        if not isinstance(policy.action_space, spaces.Discrete):
            raise TypeError(f"{name}: actions must be a Discrete space, got {policy.action_space}")
        normalizer = model.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            raise ValueError(
                f"{name} sees observations through VecNormalize, which a view would skip: train on make_vec_env(...) without it"
            )
        shape = policy.observation_space.shape
        if isinstance(policy, DQNPolicy):
            q_net = _Network(policy.q_net, policy.q_net.features_extractor, policy.q_net.q_net)
            exploration = getattr(model, "exploration_rate", 0.0)
            view = cls(q_net, kind="q", observation_shape=shape, n_frames=n_frames, exploration=exploration)
            return view._agreeing_with(policy.q_net, name)
        if isinstance(policy, ActorCriticPolicy):
            latent = policy.mlp_extractor
            actor = _Network(policy, policy.pi_features_extractor, latent.policy_net, policy.action_net)
            critic = _Network(policy, policy.vf_features_extractor, latent.value_net, policy.value_net)
            view = cls(actor, kind="logits", observation_shape=shape, n_frames=n_frames, critic=critic)
            return view._agreeing_with(lambda x: cast(Any, policy.get_distribution(x).distribution).logits, name)
        raise TypeError(f"no view for {name} with {type(policy).__name__}; supported are PPO, A2C and DQN, or from_torch(...)")

    def _agreeing_with(self, original: Callable[[Tensor], Tensor], name: str) -> PolicyView:
        """This view, after checking on a probe that the model's policy computes what the view assumes."""
        probe = torch.linspace(-1, 1, 3 * math.prod(self.observation_shape), device=self.device)
        with torch.no_grad():
            seen = self.scores(probe.reshape(3, *self.observation_shape))
            try:
                expected = original(probe.reshape(3, *self.observation_shape))
            except TypeError as error:
                raise TypeError(f"no view for {name}: its policy needs more than an observation ({error})") from None
        if self.kind == "logits":
            seen, expected = seen.log_softmax(-1), expected.log_softmax(-1)
        if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise TypeError(f"no view for {name}: its policy class computes something else than Stable-Baselines3's own")
        return self

    @classmethod
    def of(cls, policy: Any, *, n_frames: int = 1) -> PolicyView:
        """View a model, or return a view as it is after checking its frame count."""
        if isinstance(policy, PolicyView):
            if policy.n_frames != n_frames:
                raise ValueError(f"the policy stacks {policy.n_frames} frame(s), but the environment recipe stacks {n_frames}")
            return policy
        return cls.from_sb3(policy, n_frames=n_frames)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((p.device for p in self.actor.parameters()), torch.device("cpu"))

    def scores(self, observation: Tensor) -> Tensor:
        """Logits or action values; (n, *observation_shape) float -> (n, n_actions). Differentiable."""
        return cast(Tensor, self.actor(observation))

    def value(self, observation: Tensor) -> Tensor:
        """State values, shape (n,): the critic's, or max_a Q."""
        if self.kind == "q":
            return self.scores(observation).amax(-1)
        if self.critic is None:
            raise ValueError("this policy has no critic: pass critic= to PolicyView.from_torch")
        return cast(Tensor, self.critic(observation)).reshape(len(observation))

    def distribution(self, observation: Tensor) -> torch.distributions.Categorical:
        """Action distribution of a policy given by logits."""
        if self.kind != "logits":
            raise ValueError("action values define no distribution; use scores()")
        return torch.distributions.Categorical(logits=self.scores(observation))

    def fold(self, stack: Tensor, newest: Tensor | None = None) -> Tensor:
        """Network input of a frame stack, differentiable w.r.t. its newest frame.

        Args:
            stack: frames (n, n_frames, *frame).
            newest: frames (n, *frame) that replace the newest of the stack; default the stack's own.
        Returns:
            observations (n, *observation_shape).
        """
        if newest is not None:
            stack = torch.cat((stack[:, :-1], newest.unsqueeze(1)), dim=1)
        return fold_frames(stack, self.observation_shape)

    def actions(self, scores: Tensor, *, deterministic: bool = True, uniforms: Tensor | None = None) -> Tensor:
        """Actions of given scores, as SB3's `predict` chooses them.

        Args:
            scores: (n, n_actions).
            deterministic: greedy; otherwise sample (logits) or explore epsilon-greedily (q).
            uniforms: independent U[0, 1) draws (n, 2), needed when not deterministic.
        Returns:
            int64 actions (n,).
        Raises:
            ValueError: if a score is NaN or inf.
        """
        if not torch.isfinite(scores).all():
            raise ValueError("the policy's scores must be finite, got NaN or inf: weights or observations are broken")
        greedy = scores.argmax(-1)
        if deterministic:
            return greedy
        if uniforms is None:
            raise ValueError("uniforms must be given when deterministic=False")
        if self.kind == "q":
            random_action = (uniforms[:, 1] * self.n_actions).long().clamp_(max=self.n_actions - 1)
            return torch.where(uniforms[:, 0] < self.exploration, random_action, greedy)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        return (cumulative <= uniforms[:, :1].double()).sum(-1).clamp_(max=self.n_actions - 1)

    def act_blocked(self, stack: Tensor, *, batch: int, deterministic: bool = True, uniforms: Tensor | None = None) -> Tensor:
        """Actions for any number of frame stacks, always in padded batches of exactly `batch` rows.

        A row's arithmetic on a CPU depends on the batch size in its last bits, but not on what the other rows hold; with a
        fixed batch size and place an episode's actions do not depend on the other episodes. (The place matters in the last
        bits for layers with a handful of outputs whose number of inputs is not a multiple of 4.)
        """
        n = len(stack)
        check_count("batch", batch)
        if uniforms is not None and uniforms.shape != (n, 2):
            raise ValueError(f"uniforms must have shape ({n}, 2), got {tuple(uniforms.shape)}")
        self.eval()  # training elsewhere may have switched the shared layers
        observation = self.fold(stack)
        padding = -n % batch
        with torch.inference_mode():
            if padding:
                observation = torch.cat((observation, observation.new_zeros(padding, *self.observation_shape)))
            scores = torch.cat([self.scores(block) for block in torch.split(observation, batch)])[:n]
            return self.actions(scores, deterministic=deterministic, uniforms=uniforms)

    def for_inference(self) -> PolicyView:
        """A frozen copy for rollouts, without gradients; on a CPU its tanh layers run in numpy.

        numpy's vectorised tanh is several times faster than torch's (`benchmarks/bench_inference.py`) and agrees with it to
        the last bit or two.
        """
        view = copy.deepcopy(self).eval().requires_grad_(False)
        if view.device.type == "cpu":
            view.actor = _with_numpy_tanh(view.actor)
        return view

    def fingerprint(self) -> str:
        """SHA-256 over the acting network's layers and weights and the decision rule's parameters."""
        digest = hashlib.sha256(repr((self.kind, self.observation_shape, self.n_frames, self.exploration)).encode())
        for name, module in self.actor.named_modules():
            digest.update(f"{name}{type(module).__name__}{getattr(module, 'divide_by_255', '')}".encode())
        for name, tensor in sorted(self.actor.state_dict().items()):
            array = tensor.detach().cpu().numpy()
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class _Network(nn.Module):
    """Preprocessing, feature extractor and heads of an SB3 policy, without its optimizer, schedules and spaces."""

    def __init__(self, policy: Any, extractor: nn.Module, *heads: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.heads = nn.Sequential(*heads)
        space = policy.observation_space
        self.divide_by_255 = bool(policy.normalize_images) and _is_uint8_image(space)

    def forward(self, observation: Tensor) -> Tensor:
        x = observation.float()
        return cast(Tensor, self.heads(self.extractor(x / 255.0 if self.divide_by_255 else x)))


class _NumpyTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        array = x.numpy()
        return torch.from_numpy(np.tanh(array, out=array))


def _with_numpy_tanh(module: nn.Module) -> nn.Module:
    """Replace the tanh layers that directly follow a linear layer, whose output nobody else holds."""
    for parent in list(module.modules()):
        if isinstance(parent, nn.Sequential):
            for i in range(1, len(parent)):
                if type(parent[i]) is nn.Tanh and type(parent[i - 1]) is nn.Linear:
                    parent[i] = _NumpyTanh()
    return module


def _is_uint8_image(space: spaces.Box) -> bool:
    from stable_baselines3.common.preprocessing import is_image_space

    return is_image_space(space)
