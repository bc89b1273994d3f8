"""One view of any policy: batched, differentiable, from native observations.

`PolicyView` is what attacks, certificates and rollouts see of a policy, wherever it comes from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from robustrl.errors import check_count
from robustrl.policy.actions import ContinuousRule, Kind, action_rule, refuse_broken
from robustrl.policy.frames import fold_frames, frame_shape, holds_frames, stacked_shape
from robustrl.policy.normalization import Normalization

INFERENCE_BATCH = 1024
"""Most rows per forward pass in `act_blocked`: enough to amortise a kernel launch, few enough to stay in the cache."""


class PolicyView(nn.Module):
    """A batched, differentiable view of a policy.

    Args:
        actor: torch module mapping observations (n, *observation_shape) to scores (n, n_scores); a recurrent one maps
            (observations, memory) to (scores, memory).
        kind: what the scores are: "logits" (unnormalised log-probabilities) or "q" (action values) of discrete actions;
            "gaussian" (mean and log standard deviation, (n, 2 * size)), "squashed" (the same before a tanh) or
            "deterministic" (the action itself) for continuous ones.
        observation_shape: what the network takes, frame stack included.
        n_frames: frames in one observation.
        frame_shape: shape of one frame; default a guess from `observation_shape`.
        critic: optional module mapping observations to state values (n, 1) or (n,).
        q_critic: optional module mapping observations and actions (n, size) to action values (n,).
        exploration: probability of a uniformly random action when acting with deterministic=False ("q" only).
        action_space: the Box of a continuous policy.
        memory_shape: of one episode's memory of a recurrent policy; it starts as zeros.
        samples: whether acting with deterministic=False has a meaning.

    Build one with `from_sb3`, `from_torch` or `of`.
    """

    def __init__(
        self,
        actor: nn.Module,
        *,
        kind: Kind,
        observation_shape: tuple[int, ...],
        n_frames: int = 1,
        frame_shape: tuple[int, ...] | None = None,
        critic: nn.Module | None = None,
        q_critic: nn.Module | None = None,
        exploration: float = 0.0,
        action_space: spaces.Box | None = None,
        memory_shape: tuple[int, ...] | None = None,
        samples: bool = True,
    ) -> None:
        super().__init__()
        self.actor, self.critic, self.q_critic = actor, critic, q_critic
        self.observation_shape = tuple(int(size) for size in observation_shape)
        self.n_frames = check_count("n_frames", n_frames)
        self.frame_shape = _frame_shape(self.observation_shape, self.n_frames, frame_shape)
        self.memory_shape, self.samples = memory_shape, samples
        self.normalization: Normalization | None = None
        self.eval()
        with torch.no_grad():
            try:
                probe = self.scores(torch.zeros(1, *self.observation_shape, device=self.device), self.memory(1))
            except RuntimeError as error:
                raise ValueError(
                    f"the policy's network does not take observations of shape {self.observation_shape}: {error}"
                ) from None
        if not isinstance(probe, Tensor) or probe.ndim != 2 or probe.shape[0] != 1:
            raise ValueError("the policy's network must map (n, *observation_shape) to scores (n, n_scores)")
        self.kind: Kind = kind
        self.rule = action_rule(kind, int(probe.shape[1]), exploration=exploration, space=action_space)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        kind: Kind,
        observation_shape: tuple[int, ...],
        n_frames: int = 1,
        critic: nn.Module | None = None,
        q_critic: nn.Module | None = None,
        action_space: spaces.Box | None = None,
    ) -> PolicyView:
        """View any torch module; see the class for the arguments."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        return cls(
            module,
            kind=kind,
            observation_shape=observation_shape,
            n_frames=n_frames,
            critic=critic,
            q_critic=q_critic,
            action_space=action_space,
        )

    @classmethod
    def from_sb3(
        cls,
        model: Any,
        *,
        n_frames: int = 1,
        frame_space: spaces.Space[Any] | None = None,
        normalization: Normalization | None = None,
    ) -> PolicyView:
        """View a Stable-Baselines3 PPO, A2C, DQN, SAC, TD3 or DDPG model, or an sb3-contrib RecurrentPPO.

        Args:
            model: the SB3 model; its weights are shared, not copied.
            n_frames: frames stacked in one of its observations.
            frame_space: one frame as the environment gives it, a Box or a Dict of them; default what the model's own space
                says. Images with channels last are transposed as SB3 does; pixels in [0, 1] are not divided by 255 again.
            normalization: the frozen normalisation that its observations went through (wherever the noise is); needed if the
                model was trained with a VecNormalize, which is checked as far as the model still holds it.
        Raises:
            TypeError: for other algorithms or spaces.
            ValueError: if the model normalises observations with another VecNormalize.
        """
        from robustrl.policy.sb3 import networks_of, observation_shape

        parts = networks_of(model, frame_space=frame_space)
        if n_frames > 1 and isinstance(model.observation_space, spaces.Dict):
            raise ValueError(
                f"n_frames must be 1 for a model of dictionaries, got {n_frames}: a joint vector holds no frame stack"
            )
        live = model.get_vec_normalize_env()
        if live is not None and live.norm_obs and (normalization is None or Normalization.of(live) != normalization):
            raise ValueError(
                f"{type(model).__name__} sees observations through a VecNormalize, which is not the recipe's normalisation: "
                "pass normalization=Normalization.of(vec_normalize), or VecNormalize(make_vec_env(...)) as the environment"
            )
        frame = None if frame_space is None else observation_shape(frame_space, type(model).__name__)
        views: dict[str, nn.Module | None] = {"actor": parts.actor, "critic": parts.critic, "q_critic": parts.q_critic}
        shape = parts.observation_shape
        if frame is not None and len(frame) == len(shape) == 3 and not holds_frames(shape, frame, n_frames):
            transposed = (*shape[1:], shape[0])
            if frame[:2] == transposed[:2]:
                shape = transposed
                views = {name: None if part is None else _ChannelsFirst(part) for name, part in views.items()}
        actor, critic, q_critic = cast(nn.Module, views["actor"]), views["critic"], views["q_critic"]
        return cls(
            actor,
            kind=parts.kind,
            observation_shape=shape,
            n_frames=n_frames,
            frame_shape=frame,
            critic=critic,
            q_critic=q_critic,
            exploration=parts.exploration,
            action_space=parts.action_space,
            memory_shape=parts.memory_shape,
            samples=parts.samples,
        )

    @classmethod
    def of(
        cls,
        policy: Any,
        *,
        n_frames: int = 1,
        frame_space: spaces.Space[Any] | None = None,
        normalization: Normalization | None = None,
    ) -> PolicyView:
        """View a model, or return a view as it is after checking its frame count; see `from_sb3`."""
        if isinstance(policy, PolicyView):
            if policy.n_frames != n_frames:
                raise ValueError(f"the policy stacks {policy.n_frames} frame(s), but the environment recipe stacks {n_frames}")
            return policy
        return cls.from_sb3(policy, n_frames=n_frames, frame_space=frame_space, normalization=normalization)

    def after(self, normalization: Normalization) -> PolicyView:
        """This policy behind a frozen normalisation of every frame: what SB3's VecNormalize outside the noise does.

        A policy that has this normalisation already is returned as it is.

        Raises:
            ValueError: if the statistics fit neither frames nor observations, or the policy has another normalisation.
        """
        if self.normalization is not None:
            if self.normalization != normalization:
                raise ValueError("normalization must be the one that the policy has already, got another one")
            return self
        mean, scale = (torch.from_numpy(part).double() for part in (normalization.mean, normalization.scale))
        if mean.shape == self.frame_shape != self.observation_shape:
            copies = (1, self.n_frames, *self.frame_shape)
            mean, scale = (fold_frames(part.expand(copies), self.observation_shape)[0] for part in (mean, scale))
        if mean.shape != self.observation_shape:
            raise ValueError(
                f"normalization has statistics of shape {tuple(mean.shape)}, but the policy takes frames of shape "
                f"{self.frame_shape} and observations of shape {self.observation_shape}"
            )
        view = self._behind(lambda part: _Normalized(part, mean, scale, normalization.clip).to(self.device))
        view.normalization = normalization
        return view

    def denoised(self, denoiser: nn.Module, n_frames: int | None = None) -> PolicyView:
        """This policy behind a denoiser, which comes before a normalisation that the policy has already.

        Args:
            denoiser: torch module from stacks of noisy frames to observations (n, *observation_shape) of this policy. It is shared,
                moved to the policy's device and put into evaluation mode.
            n_frames: frames that the denoiser takes; default as many as the policy.
        Raises:
            ValueError: if it maps from or to another shape.
        """
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}")
        frames = self.n_frames if n_frames is None else check_count("n_frames", n_frames)
        shape = self.observation_shape if frames == self.n_frames else stacked_shape(self.frame_shape, frames)
        denoiser.to(self.device).eval()
        with torch.no_grad():
            try:
                found = tuple(denoiser(torch.zeros(1, *shape, device=self.device)).shape[1:])
            except RuntimeError as error:
                raise ValueError(f"denoiser does not take observations of shape {shape}: {error}") from None
        if found != self.observation_shape:
            raise ValueError(f"denoiser must give observations of shape {self.observation_shape}, it gives {found}")
        view = self._behind(lambda part: _Denoised(part, denoiser))
        view.observation_shape, view.n_frames = shape, frames
        return view

    def _behind(self, wrap: Callable[[nn.Module], nn.Module]) -> PolicyView:
        """A view of the same policy with something before its networks."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        for name in ("actor", "critic", "q_critic"):
            part = getattr(self, name)
            setattr(view, name, None if part is None else wrap(part))
        return view

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((p.device for p in self.actor.parameters()), torch.device("cpu"))

    @property
    def action_space(self) -> spaces.Discrete | spaces.Box:
        """What the policy chooses from."""
        return self.rule.space

    @property
    def discrete(self) -> bool:
        """Whether actions are discrete."""
        return isinstance(self.rule.space, spaces.Discrete)

    @property
    def n_actions(self) -> int:
        """Number of discrete actions.

        Raises:
            TypeError: if actions are continuous.
        """
        if not isinstance(self.rule.space, spaces.Discrete):
            raise TypeError(f"the policy's actions are continuous ({self.rule.space})")
        return int(self.rule.space.n)

    def memory(self, n: int) -> Tensor | None:
        """The memory of `n` episodes that start, (n, *memory_shape); None if the policy has none."""
        return None if self.memory_shape is None else torch.zeros(n, *self.memory_shape, device=self.device)

    def advance(self, observation: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores, and the memory after this observation."""
        if self.memory_shape is None:
            return self.actor(observation), None
        if memory is None:
            raise ValueError("memory must be given: the policy is recurrent; start with policy.memory(n)")
        scores, after = self.actor(observation, memory)
        return scores, after

    def scores(self, observation: Tensor, memory: Tensor | None = None) -> Tensor:
        """Scores (n, n_scores) of observations (n, *observation_shape), float; differentiable. A memory is not advanced."""
        return self.advance(observation, memory)[0]

    def mean_action(self, observation: Tensor, memory: Tensor | None = None) -> Tensor:
        """The greedy continuous action before clipping, environment units, (n, size); differentiable.

        Raises:
            TypeError: if actions are discrete.
        """
        if not isinstance(self.rule, ContinuousRule):
            raise TypeError("the policy's actions are discrete: use scores()")
        return self.rule.mean(self.scores(observation, memory))

    def value(self, observation: Tensor) -> Tensor:
        """State values, shape (n,): the critic's, max_a Q, or Q of the greedy action."""
        if self.kind == "q":
            return self.scores(observation).amax(-1)
        if self.critic is not None:
            return cast(Tensor, self.critic(observation)).reshape(len(observation))
        if self.q_critic is not None and isinstance(self.rule, ContinuousRule):
            return self.action_value(observation, self.mean_action(observation))
        raise ValueError("this policy has no critic: pass critic= to PolicyView.from_torch")

    def action_value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of continuous actions (n, size) in environment units, shape (n,)."""
        if self.q_critic is None:
            raise ValueError("this policy has no critic of actions: pass q_critic= to PolicyView.from_torch")
        return cast(Tensor, self.q_critic(observation, action)).reshape(len(observation))

    def distribution(self, observation: Tensor) -> torch.distributions.Categorical:
        """Action distribution of a policy given by logits."""
        if self.kind != "logits":
            raise ValueError("only logits define a distribution of discrete actions; use scores()")
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

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The random numbers that `n` sampled actions need, (n, m)."""
        return self.rule.draw(n, generator, self.device)

    def actions(self, scores: Tensor, *, deterministic: bool = True, draws: Tensor | None = None) -> Tensor:
        """Actions of given scores, as SB3's `predict` chooses them.

        Args:
            scores: (n, n_scores).
            deterministic: greedy; otherwise sample, or explore epsilon-greedily.
            draws: random numbers from `draw`, needed when not deterministic.
        Returns:
            int64 actions (n,), or float actions (n, size) clipped to the space.
        Raises:
            ValueError: if a score is NaN or inf.
        """
        refuse_broken(not torch.isfinite(scores).all())
        return self.rule.choose(scores, self._needed(draws, deterministic))

    def _needed(self, draws: Tensor | None, deterministic: bool) -> Tensor | None:
        if deterministic:
            return None
        if not self.samples:
            raise ValueError("deterministic must be True: state-dependent exploration (gSDE) is not a policy of one step")
        if draws is None:
            raise ValueError("draws must be given when deterministic=False")
        return draws

    def decide(
        self,
        stack: Tensor,
        memory: Tensor | None = None,
        *,
        batch: int,
        deterministic: bool = True,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Actions for any number of frame stacks, always in padded batches of exactly `batch` rows, and the new memory.

        A row's arithmetic on a CPU depends on the batch size in its last bits, but not on what the other rows hold; with a
        fixed batch size and place an episode's actions do not depend on the other episodes. (The place matters in the last
        bits for layers with a handful of outputs whose number of inputs is not a multiple of 4.) The actions stay on the
        device and are not checked yet: pass them to `received`. The layers must be in evaluation mode.
        """
        n = len(stack)
        check_count("batch", batch)
        draws = self._needed(draws, deterministic)
        if draws is not None and len(draws) != n:
            raise ValueError(f"draws must have {n} rows, got shape {tuple(draws.shape)}")
        with torch.inference_mode():
            observation = _padded(self.fold(stack), -n % batch)
            memories: Any = [None] * max(1, len(observation) // batch)
            if memory is not None:
                memories = torch.split(_padded(memory, -n % batch), batch)
            found = [self.advance(*rows) for rows in zip(torch.split(observation, batch), memories, strict=True)]
            actions = self.rule.choose(torch.cat([scores for scores, _ in found])[:n], draws)
            if self.memory_shape is None:
                return actions, None
            return actions, torch.cat([cast(Tensor, after) for _, after in found])[:n]

    def received(self, actions: Tensor) -> NDArray[Any]:
        """Actions as an environment's `step` takes them: (n,) int64, or (n, *shape); the one wait for the device.

        Raises:
            ValueError: if a score was NaN or inf.
        """
        return self.rule.deliver(actions.detach().cpu().numpy())

    def act_blocked(self, stack: Tensor, *, batch: int, deterministic: bool = True, draws: Tensor | None = None) -> Tensor:
        """`decide` for a policy at the start of its episodes, checked."""
        self.eval()  # training elsewhere may have switched the shared layers
        actions, _ = self.decide(stack, self.memory(len(stack)), batch=batch, deterministic=deterministic, draws=draws)
        self.received(actions)
        return actions

    def for_inference(self) -> PolicyView:
        """A frozen copy for rollouts, without gradients and critics; on a CPU its tanh layers run in numpy.

        numpy's vectorised tanh is several times faster than torch's (`benchmarks/bench_inference.py`) and agrees with it to
        the last bit or two.
        """
        view = copy.copy(self)
        view._modules = {"actor": copy.deepcopy(self.actor), "critic": None, "q_critic": None}
        view.eval().requires_grad_(False)
        if view.device.type == "cpu":
            view.actor = _with_numpy_tanh(view.actor)
        return view

    def fingerprint(self) -> str:
        """SHA-256 over the acting network's layers and weights and the decision rule's parameters."""
        rule = (self.kind, self.observation_shape, self.n_frames, getattr(self.rule, "exploration", 0.0))
        digest = hashlib.sha256(repr(rule + self.rule.parameters()).encode())
        for name, module in self.actor.named_modules():
            digest.update(f"{name}{type(module).__name__}{getattr(module, 'preprocessing', '')}".encode())
            if type(module) not in (nn.Linear, nn.Flatten):  # whose weights' shapes say it all
                digest.update(module.extra_repr().encode())
        for name, tensor in sorted(self.actor.state_dict().items()):
            array = tensor.detach().cpu().numpy()
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _frame_shape(observation: tuple[int, ...], n_frames: int, frame: tuple[int, ...] | None) -> tuple[int, ...]:
    if frame is None:
        return frame_shape(observation, n_frames)
    if not holds_frames(observation, frame, n_frames):
        hint = next(
            (
                f"; does it stack {k} frames? (frame_stack={k}, --frame-stack {k})"
                for k in range(1, 65)
                if holds_frames(observation, frame, k)
            ),
            "; is it the right environment?",
        )
        raise ValueError(
            f"the policy takes observations of shape {observation}, which {n_frames} frame(s) of shape {frame} do not make{hint}"
        )
    return frame


def _padded(rows: Tensor, padding: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(padding, *rows.shape[1:]))) if padding else rows


class _ChannelsFirst(nn.Module):
    """Images with channels last for a network that takes channels first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor, *rest: Tensor) -> Any:
        return self.network(observation.movedim(-1, 1), *rest)


class _Denoised(nn.Module):
    """A denoiser before a network."""

    def __init__(self, network: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.network, self.denoiser = network, denoiser

    def forward(self, observation: Tensor, *rest: Tensor) -> Any:
        return self.network(self.denoiser(observation), *rest)


class _Normalized(nn.Module):
    """A frozen normalisation before a network."""

    mean: Tensor
    scale: Tensor
    clip: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, scale: Tensor, clip: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("clip", torch.tensor(clip, dtype=torch.float64))

    def forward(self, observation: Tensor, *rest: Tensor) -> Any:
        scaled = (observation.double() - self.mean) / self.scale
        return self.network(torch.clamp(scaled, -self.clip, self.clip).float(), *rest)


class _NumpyTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:  # which numpy does not have
            return torch.tanh(x)
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
