"""The networks inside Stable-Baselines3's policies, as plain modules for `PolicyView`.

Knowledge of SB3's internals lives here (and, for its files, in `robustrl.policy.loading`). Every network that is taken out
is compared with what SB3 itself computes before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from gymnasium import spaces
from torch import Tensor, nn

from robustrl.errors import refuse_altered
from robustrl.policy.actions import Kind


@dataclass(frozen=True)
class Networks:
    """What `PolicyView` needs of a policy.

    Attributes:
        actor: observations (n, *observation_shape) -> scores; a recurrent one also takes and returns a memory.
        kind: how scores become actions.
        observation_shape: as SB3's network takes it; a dictionary is one joint vector, keys in the space's order.
        critic: observations -> state values, or None.
        q_critic: observations and actions in the environment's units, (n, size) -> action values, or None.
        exploration: of an epsilon-greedy policy.
        action_space: of a continuous policy.
        memory_shape: of one row of a recurrent policy's memory, or None.
        samples: whether `deterministic=False` has a meaning here.
    """

    actor: nn.Module
    kind: Kind
    observation_shape: tuple[int, ...]
    critic: nn.Module | None = None
    q_critic: nn.Module | None = None
    exploration: float = 0.0
    action_space: spaces.Box | None = None
    memory_shape: tuple[int, ...] | None = None
    samples: bool = True


def networks_of(model: Any, *, frame_space: spaces.Space[Any] | None = None) -> Networks:
    """The networks of a PPO, A2C, DQN, SAC, TD3, DDPG or RecurrentPPO model; the weights are shared.

    Args:
        model: the SB3 model.
        frame_space: one frame as the environment gives it; default what the model's own space says. Its pixels may be in [0, 1]
            for a model of byte images, and images in its dictionaries may have channels last.
    Raises:
        TypeError: for other policies or spaces, and for hooks on the modules around the networks, which are taken out without them.
        ValueError: if a dictionary of frames does not fit the model's.
    """
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy

    if not isinstance(model, BaseAlgorithm):
        hint = "; pass agent.view, and frame_stack=agent.frame_stack" if hasattr(model, "check_frozen") else ""
        raise TypeError(f"model must be a Stable-Baselines3 model, got {type(model).__name__}{hint}")
    policy, name = model.policy, type(model).__name__
    shape = observation_shape(policy.observation_space, name)
    if not isinstance(policy.action_space, spaces.Discrete | spaces.Box):
        raise TypeError(f"{name}: actions must be a Discrete or a Box space, got {policy.action_space}")

    around = (getattr(policy, name, None) for name in ("q_net", "actor", "critic", "mlp_extractor"))
    try:
        for module in (policy, *(part for part in around if isinstance(part, nn.Module))):
            refuse_altered(module)
    except TypeError as error:
        raise TypeError(f"no view for {name}: {error}") from None
    entries = _entries(policy, frame_space)

    def network(extractor: nn.Module, *heads: nn.Module) -> _Network:
        return _Network(entries, extractor, *heads)

    checked = _Checked(policy, shape, name, entries)
    if isinstance(policy, DQNPolicy):
        q_net = network(policy.q_net.features_extractor, policy.q_net.q_net)
        checked(q_net, policy.q_net, discrete=True)
        return Networks(q_net, "q", shape, exploration=getattr(model, "exploration_rate", 0.0))
    if isinstance(policy, SACPolicy | TD3Policy):
        return _off_policy(policy, shape, network, checked)
    if isinstance(policy, ActorCriticPolicy):
        return _actor_critic(policy, shape, network, checked, name)
    raise TypeError(
        f"no view for {name} with {type(policy).__name__}; supported are PPO, A2C, DQN, SAC, TD3, DDPG and RecurrentPPO, "
        "or from_torch(...)"
    )


def observation_shape(space: spaces.Space[Any], name: str) -> tuple[int, ...]:
    """Shape of an observation as a view takes it; a dictionary is one joint vector."""
    if isinstance(space, spaces.Dict) and all(isinstance(part, spaces.Box) for part in space.values()):
        return (sum(math.prod(cast(spaces.Box, part).shape) for part in space.values()),)
    if not isinstance(space, spaces.Box):
        raise TypeError(f"{name}: observations must be a Box space or a Dict of them, got {space}")
    return space.shape


@dataclass(frozen=True)
class _Entry:
    """How one array of a model's observations is found in those of the view.

    Attributes:
        key: in a dictionary; None for the only array.
        shape: in the view's observations.
        channels_last: whether the model has the channels of this image first.
        unit: whether these are pixels in [0, 1] for a model of byte images.
        divide: whether SB3 divides what the model gets by 255.
    """

    key: str | None
    shape: tuple[int, ...]
    channels_last: bool
    unit: bool
    divide: bool

    def laid_out(self, part: Tensor) -> Tensor:
        """The rows of a joint vector that belong here, in the model's layout."""
        image = part.reshape(-1, *self.shape)
        return image.movedim(-1, 1) if self.channels_last else image

    def far(self, part: Tensor) -> Tensor:
        """Numbers in [-1, 1] spread over all pixels, or over vectors of up to 255."""
        return (part + 1) / 2 * (1.0 if self.unit else 255.0) if self.unit or self.divide else part * 255.0

    def scaled(self, part: Tensor) -> Tensor:
        """From the view's units to those of the features' network."""
        if self.unit == self.divide:
            return part
        return part * 255.0 if self.unit else part / 255.0


def _entries(policy: Any, frames: spaces.Space[Any] | None) -> tuple[_Entry, ...]:
    space = policy.observation_space
    if not isinstance(space, spaces.Dict):
        image = is_uint8_image(space)
        return (_Entry(None, space.shape, False, image and _has_unit_pixels(frames), image and policy.normalize_images),)
    if frames is None:
        frames = space
    elif not isinstance(frames, spaces.Dict):
        if any(is_uint8_image(part) for part in space.values()):
            raise ValueError(f"frame_space must be the environment's Dict, where images have their layout; got {frames}")
        frames = space  # vectors have one layout only
    if list(frames) != list(space):
        raise ValueError(f"the model takes dictionaries with the keys {list(space)}, the environment gives {list(frames)}")
    entries = []
    for key in space:
        part, given = cast(spaces.Box, space[key]), cast(spaces.Box, frames[key])
        image = is_uint8_image(part)
        channels_last = image and given.shape != part.shape and given.shape == (*part.shape[1:], part.shape[0])
        if given.shape != part.shape and not channels_last:
            raise ValueError(f"the model takes {key!r} of shape {part.shape}, the environment gives {given.shape}")
        unit = image and _has_unit_pixels(given)
        entries.append(_Entry(key, given.shape, channels_last, unit, image and policy.normalize_images))
    return tuple(entries)


def _has_unit_pixels(frames: spaces.Space[Any] | None) -> bool:
    picture = isinstance(frames, spaces.Box) and frames.dtype.kind == "f" and len(frames.shape) > 1
    return picture and bool((cast(spaces.Box, frames).high <= 1).all())


class _Network(nn.Module):
    """Preprocessing, feature extractor and heads of an SB3 policy, without its optimizer, schedules and spaces."""

    def __init__(self, entries: tuple[_Entry, ...], extractor: nn.Module, *heads: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.heads = nn.Sequential(*heads)
        self._entries = entries
        plain = entries[0].key is None and not entries[0].unit
        self.preprocessing = str(entries[0].divide) if plain else str(entries)
        """What else than layers and weights decides, for fingerprints."""

    def features(self, observation: Tensor) -> Tensor:
        x = observation.float()
        if self._entries[0].key is None:
            return cast(Tensor, self.extractor(self._entries[0].scaled(x)))
        parts = torch.split(x, [math.prod(entry.shape) for entry in self._entries], dim=1)
        pairs = zip(self._entries, parts, strict=True)
        return cast(Tensor, self.extractor({entry.key: entry.scaled(entry.laid_out(part)) for entry, part in pairs}))

    def forward(self, observation: Tensor) -> Tensor:
        return cast(Tensor, self.heads(self.features(observation)))


class _MeanAndStd(nn.Module):
    """A Gaussian policy's mean beside its log standard deviation, which is one parameter for all states."""

    def __init__(self, mean: nn.Module, log_std: nn.Parameter) -> None:
        super().__init__()
        self.mean, self.log_std = mean, log_std

    def forward(self, latent: Tensor) -> Tensor:
        mean = self.mean(latent)
        return torch.cat((mean, self.log_std.expand_as(mean)), dim=-1)


class _SquashedHead(nn.Module):
    """SAC's mean and log standard deviation before the tanh."""

    def __init__(self, mean: nn.Module, log_std: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.mean, self.log_std, self.limits = mean, log_std, (low, high)

    def extra_repr(self) -> str:
        return f"limits={self.limits}"

    def forward(self, latent: Tensor) -> Tensor:
        return torch.cat((self.mean(latent), self.log_std(latent).clamp(*self.limits)), dim=-1)


class _Unscale(nn.Module):
    """[-1, 1] -> [low, high], with SB3's arithmetic."""

    low: Tensor
    high: Tensor

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.register_buffer("low", torch.from_numpy(space.low.reshape(-1).copy()))
        self.register_buffer("high", torch.from_numpy(space.high.reshape(-1).copy()))

    def forward(self, scaled: Tensor) -> Tensor:
        return self.low + 0.5 * (scaled + 1.0) * (self.high - self.low)


class _Critic(nn.Module):
    """The lowest of the Q heads, for actions in the environment's units."""

    def __init__(self, network: _Network, heads: nn.ModuleList, unscale: _Unscale) -> None:
        super().__init__()
        self.network, self.q_networks, self.unscale = network, heads, unscale

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        low, high = self.unscale.low, self.unscale.high
        scaled = 2.0 * (action - low) / (high - low) - 1.0
        both = torch.cat((self.network.features(observation), scaled), dim=1)
        return torch.cat([head(both) for head in self.q_networks], dim=1).amin(1)


class _Recurrent(nn.Module):
    """RecurrentPPO's actor: (observation, memory) -> (scores, memory); memory (n, 2, layers, hidden) holds h and c."""

    def __init__(self, network: _Network, lstm: nn.LSTM) -> None:
        super().__init__()
        self.network, self.lstm = network, lstm

    def forward(self, observation: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = memory.movedim(0, 2).contiguous()
        output, state = self.lstm(self.network.features(observation).unsqueeze(0), (hidden, cell))
        return self.network.heads(output.squeeze(0)), torch.stack(state).movedim(2, 0)


def _off_policy(policy: Any, shape: tuple[int, ...], network: Callable[..., _Network], checked: _Checked) -> Networks:
    from stable_baselines3.sac import policies as sac

    actor, critic, space = policy.actor, policy.critic, policy.action_space
    unscale = _Unscale(space).to(policy.device)
    samples = True
    kind: Kind = "deterministic"
    if not isinstance(policy, sac.SACPolicy):
        heads: tuple[nn.Module, ...] = (actor.mu, unscale)
    elif actor.use_sde:
        heads, samples = (actor.latent_pi, actor.mu, nn.Tanh(), unscale), False
    else:
        heads, kind = (actor.latent_pi, _SquashedHead(actor.mu, actor.log_std, sac.LOG_STD_MIN, sac.LOG_STD_MAX)), "squashed"
    net = network(actor.features_extractor, *heads)

    def greedy(observation: Tensor) -> Tensor:
        scores: Tensor = net(observation)
        return scores if kind == "deterministic" else cast(Tensor, unscale(torch.tanh(scores.chunk(2, dim=-1)[0])))

    checked(greedy, lambda x: unscale(actor._predict(x, deterministic=True)))
    q_critic = _Critic(network(critic.features_extractor), nn.ModuleList(critic.q_networks), unscale)
    return Networks(net, kind, shape, q_critic=q_critic, action_space=space, samples=samples)


def _actor_critic(
    policy: Any, shape: tuple[int, ...], network: Callable[..., _Network], checked: _Checked, name: str
) -> Networks:
    from stable_baselines3.common.distributions import (
        CategoricalDistribution,
        DiagGaussianDistribution,
        StateDependentNoiseDistribution,
    )

    latent, distribution = policy.mlp_extractor, policy.action_dist
    space = policy.action_space if isinstance(policy.action_space, spaces.Box) else None
    head, samples = policy.action_net, True
    kind: Kind
    match distribution:
        case CategoricalDistribution():
            kind = "logits"
        case DiagGaussianDistribution():
            kind, head = "gaussian", _MeanAndStd(policy.action_net, policy.log_std)
        case StateDependentNoiseDistribution():  # its exploration is a matrix that is drawn now and then, not a noise per step
            squash = (nn.Tanh(), _Unscale(cast(spaces.Box, space))) if distribution.bijector is not None else ()
            kind, head, samples = "deterministic", nn.Sequential(policy.action_net, *squash), False
        case _:
            raise TypeError(f"no view for {name}: actions must be a Discrete or a Box space, got {policy.action_space}")
    heads = (head,) if kind != "deterministic" else tuple(head)
    actor = network(policy.pi_features_extractor, latent.policy_net, *heads)

    def statement(d: Any) -> Tensor:
        """What a distribution of SB3 says, in the form of our scores."""
        if kind == "logits":
            return cast(Tensor, d.distribution.logits)
        mode = d.mode()
        if kind == "gaussian":
            return torch.cat((mode, d.distribution.stddev.log()), dim=-1)
        return cast(Tensor, heads[-1](mode)) if len(heads) > 1 else cast(Tensor, mode)

    lstm = getattr(policy, "lstm_actor", None)
    if lstm is None:
        critic = network(policy.vf_features_extractor, latent.value_net, policy.value_net)
        discrete = kind == "logits"
        checked(actor, lambda x: statement(policy.get_distribution(x)), normalize=discrete, discrete=discrete)
        return Networks(actor, kind, shape, critic=critic, action_space=space, samples=samples)
    if lstm.bidirectional or lstm.batch_first or lstm.proj_size:
        raise TypeError(f"no view for {name}: its LSTM is bidirectional, batch-first or projected")
    memory = torch.linspace(-0.5, 0.5, 2 * lstm.num_layers * 3 * lstm.hidden_size, device=policy.device)
    memory = memory.reshape(2, lstm.num_layers, 3, lstm.hidden_size)
    recurrent, starts = _Recurrent(actor, lstm), torch.zeros(3, device=policy.device)
    checked(
        lambda x: recurrent(x, memory.movedim(2, 0))[0],
        lambda x: statement(policy.get_distribution(x, (memory[0], memory[1]), starts)[0]),
        normalize=kind == "logits",
    )
    memory_shape = (2, lstm.num_layers, lstm.hidden_size)
    return Networks(recurrent, kind, shape, action_space=space, memory_shape=memory_shape, samples=samples)


class _Checked:
    """Compares a network taken out of a policy with what the policy itself computes, on probes near 0 and as far as bytes go."""

    def __init__(self, policy: Any, shape: tuple[int, ...], name: str, entries: tuple[_Entry, ...]) -> None:
        self._policy, self._name, self._entries = policy, name, entries
        near = torch.linspace(-1, 1, 3 * math.prod(shape), device=policy.device).reshape(3, -1)
        parts = torch.split(near, [math.prod(entry.shape) for entry in entries], dim=1)
        far = torch.cat([entry.far(part) for entry, part in zip(entries, parts, strict=True)], dim=1)
        self._probes = [rows.reshape(3, *shape) for rows in (near, far)]

    def __call__(
        self,
        taken: Callable[[Tensor], Tensor],
        original: Callable[[Any], Tensor],
        *,
        normalize: bool = False,
        discrete: bool = False,
    ) -> None:
        was_training = self._policy.training
        self._policy.set_training_mode(False)
        try:
            with torch.no_grad():
                same = all(self._agree(probe, taken, original, normalize, discrete) for probe in self._probes)
        except TypeError as error:
            raise TypeError(f"no view for {self._name}: its policy needs more than an observation ({error})") from None
        finally:
            self._policy.set_training_mode(was_training)
        if not same:
            raise TypeError(f"no view for {self._name}: its policy class computes something else than Stable-Baselines3's own")

    def _agree(
        self,
        probe: Tensor,
        taken: Callable[[Tensor], Tensor],
        original: Callable[[Any], Tensor],
        normalize: bool,
        discrete: bool,
    ) -> bool:
        native = self._native(probe)
        seen, expected = taken(probe), original(native)
        if normalize:
            seen, expected = seen.log_softmax(-1), expected.log_softmax(-1)
        if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            return False
        if not discrete or seen.shape[1] == 1:
            return True
        best = seen.topk(2, dim=1)
        clear = best.values[:, 0] - best.values[:, 1] > 1e-3 * seen.abs().amax(1) + 1e-6  # NaN is not
        arrays = {key: part.cpu().numpy() for key, part in native.items()} if isinstance(native, dict) else native.cpu().numpy()
        actions = torch.as_tensor(self._policy.predict(arrays, deterministic=True)[0], device=seen.device)
        return bool((actions == best.indices[:, 0])[clear].all())

    def _native(self, probe: Tensor) -> Any:
        """A probe as the policy itself takes it."""
        parts = torch.split(probe.flatten(1), [math.prod(entry.shape) for entry in self._entries], dim=1)
        pairs = zip(self._entries, parts, strict=True)
        native = {entry.key: entry.laid_out(part) * (255.0 if entry.unit else 1.0) for entry, part in pairs}
        return native.get(None, native)


def is_uint8_image(space: spaces.Space[Any]) -> bool:
    """Whether SB3 divides observations of this space by 255."""
    from stable_baselines3.common.preprocessing import is_image_space

    return is_image_space(space)
