"""The batched core that every attack wrapper is a thin shell of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorWrapper
from numpy.typing import NDArray
from torch import Tensor, nn

from robustrl.attacks.attacker import Attacker
from robustrl.attacks.base import Attack
from robustrl.attacks.geometry import Pixels
from robustrl.attacks.integers import greedy, rounded
from robustrl.envs.chain import check_replay, find_horizon, layers_of
from robustrl.envs.joint import as_batch, first_row, join, joint_box, split
from robustrl.errors import ChainError, check_choice
from robustrl.noise import Noise
from robustrl.policy import Normalization, Padding, PolicyView
from robustrl.seeding import torch_generator
from robustrl.threat import ThreatModel

Delivery = Literal["float", "round", "greedy"]
INFO: dict[str, Any] = {"norm": 0.0, "eps_t": 0.0, "budget_spent": 0.0, "budget_left": 0.0, "attacked": False}
"""Keys of info["attack"], and what kind of number is behind each."""


class AttackCore:
    """Perturbs batches of observations, one slot per environment, within a budget.

    Args:
        env: the environment of any kind that is being wrapped, for its horizon and what lies inside.
        space: observation space of a single environment.
        n_slots: environments side by side.
        attack: the attacker.
        threat: its budget.
        victim: the policy that acts on the observations, a model or a `PolicyView`; may be set later.
        noise: what is added to the observations outside, which the attacker averages over.
        frame_stack, stack_padding: how frames are stacked outside.
        normalization: frozen normalisation outside.
        horizon: most steps of an episode; default the chain's time limit.
        bounds: "expand" makes a float space large enough for what is delivered, "clip" keeps observations inside it.
        delivery: how bytes are delivered: "float" (the space becomes float32), "round" (whole grey levels, towards the true ones) or
            "greedy" (what rounding leaves of the budget is spent on further levels).
        seed: of the attacker.
        record_clean: put the true observation into the infos too.
    """

    def __init__(
        self,
        env: Any,
        space: spaces.Space[Any],
        n_slots: int,
        attack: Attack,
        threat: ThreatModel,
        *,
        victim: Any = None,
        noise: Noise | None = None,
        frame_stack: int = 1,
        stack_padding: Padding = "reset",
        normalization: Normalization | None = None,
        horizon: int | None = None,
        bounds: Literal["expand", "clip"] = "expand",
        delivery: Delivery = "float",
        seed: int | None = None,
        record_clean: bool = False,
    ) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be a robustrl attack such as attacks.SmoothedPGD(), got {attack!r}")
        if not isinstance(threat, ThreatModel):
            raise TypeError(f"threat must be a ThreatModel, got {threat!r}")
        if not isinstance(space, spaces.Box | spaces.Dict):
            raise TypeError(f"an attack needs a Box observation space or a Dict of them, got {space}: nothing there has a norm")
        self._env, self.inner, self.n_slots, self.attack, self.noise = env, space, n_slots, attack, noise
        self.frame_stack, self.stack_padding, self.record_clean = frame_stack, stack_padding, record_clean
        self.normalization = normalization
        check_choice("bounds", bounds, ("expand", "clip"))
        self.delivery = check_choice("delivery", delivery, ("float", "round", "greedy"))
        box = joint_box(space)
        self.bytes = box.dtype == np.uint8
        kinds = {part.dtype for part in space.values()} if isinstance(space, spaces.Dict) else {box.dtype}
        if not self.bytes and any(kind is None or kind.kind != "f" for kind in kinds):
            raise TypeError(f"an attack needs observations of floats, or pictures of bytes (uint8), got {space}")
        self.horizon, normalized = _horizon(env) if horizon is None else horizon, _check_inside(env)
        self.given, self.threat = threat, _in_units_of(threat, box, normalized=normalized)
        whole = self.bytes and self.delivery != "float"
        if whole:
            self.threat = self.threat.in_whole_levels()
        self.pixels: Pixels = attack_range(space, self.threat, clip=bounds == "clip")
        scale = self.threat.scales(box.shape)
        spent = greedy(self.threat.norm, None if scale is None else torch.from_numpy(scale))
        self._quantise = None if not whole else rounded if self.delivery == "round" else spent
        self.space = self._outer(space)
        self.attacker: Attacker | None = None
        self._victim: PolicyView | None = None
        self._seed = seed
        if victim is not None:
            self.attach(victim)
        elif not attack.needs_policy:
            self._start()

    @property
    def victim(self) -> PolicyView | None:
        """Who acts on the observations."""
        return self._victim

    def attach(self, victim: Any, env: Any = None) -> None:
        """Say who acts on the observations: a model that may still learn, or a `PolicyView`.

        Raises:
            ChainError: if an off-policy learner would store clean observations, or frames are stacked otherwise than was said.
            TypeError: for a policy with a memory, if the attack asks it what it would do.
            ValueError: if policy and observations do not fit, or the attack cannot serve them.
        """
        if env is not None and hasattr(victim, "replay_buffer"):
            check_replay(env)
        box = joint_box(self.inner)
        if env is not None:
            _check_stack(env, box, self.frame_stack)
        frame_space = self.inner if isinstance(self.inner, spaces.Dict) else box
        live = victim.get_vec_normalize_env() if hasattr(victim, "get_vec_normalize_env") else None
        seen = self.normalization if live is None or not live.norm_obs else Normalization.of(live)
        view = PolicyView.of(victim, n_frames=self.frame_stack, frame_space=frame_space, normalization=seen)
        if self.normalization is not None:
            view = view.after(self.normalization)
        elif seen is not None and not _holds(self._env, live):
            if isinstance(self.inner, spaces.Dict) or self.frame_stack > 1:
                raise ChainError(
                    "a VecNormalize outside an attack on dictionaries or stacked frames cannot be followed: put it inside the attack, or "
                    "freeze it and pass make_vec_env(normalization=...)"
                )
            view = view.denoised(_Learning(live))
        if view.frame_shape != box.shape:
            raise ValueError(f"victim takes frames of shape {view.frame_shape}, but the attack's are {box.shape}")
        self._victim = view
        self._start()

    def use(self, attack: Attack) -> None:
        """Go on with another attack; episodes that are running keep their ledgers."""
        self.attack = attack
        if self._victim is not None or not attack.needs_policy:
            self._start()

    def _start(self) -> None:
        if self._victim is not None and self._victim.memory_shape is not None and self.attack.asks:
            raise TypeError(
                f"victim must have no memory, which {type(self.attack).__name__} would have to know: attack recurrent policies with "
                "attack_policy, or by AttackedAgent(SmoothedAgent(...), ...) in an environment without the wrapper"
            )
        before = self.attacker
        self.attacker = Attacker(
            self.attack,
            self.threat,
            self._victim,
            self.n_slots,
            noise=self.noise,
            n_frames=self.frame_stack,
            padding=self.stack_padding,
            horizon=self.horizon,
            pixels=self.pixels,
            quantise=self._quantise,
            environments=_simulators(self._env),
        )
        if before is None:
            self.seed(self._seed)
        else:
            self.attacker.go_on(before)

    def seed(self, seed: int | None) -> None:
        """Restart the attacker's random stream."""
        self._seed = seed
        if self.attacker is not None:
            root = np.random.SeedSequence(seed, spawn_key=(2,))
            self.attacker.generator = torch_generator(root, self.attacker.device)

    def reset(self, slots: NDArray[np.int64] | None = None) -> None:
        """New episodes begin in these slots (default all), before their first observations are attacked."""
        self._ready().reset(slots)

    def __call__(self, observations: Any, slots: NDArray[np.int64] | None = None) -> Any:
        """What is delivered for a batch of true observations of these slots (default all)."""
        attacker = self._ready()
        true = join(observations, self.inner)
        if self._victim is not None:
            self._victim.eval()  # training elsewhere may have switched the shared layers
        frames = torch.from_numpy(true.astype(np.float32) if self.bytes else np.array(true)).to(attacker.device)
        with torch.enable_grad():  # learners collect without
            delivered = attacker.deliver(frames, slots).detach().cpu().numpy()
        if self._quantise is not None:
            delivered = delivered.astype(np.uint8)
        return split(delivered, self.inner)

    def one(self, observation: Any, slot: int) -> Any:
        """What is delivered for a single observation."""
        return first_row(self(as_batch(observation), np.array([slot])))

    def info(self, slot: int, clean: Any = None) -> dict[str, Any]:
        """What `info` says of a slot's last observation."""
        found: dict[str, Any] = {"attack": {key: value[slot].item() for key, value in self.infos().items()}}
        return found | ({"clean_obs": clean} if self.record_clean else {})

    def infos(self) -> dict[str, NDArray[Any]]:
        """`info["attack"]` of all slots, arrays (n_slots,)."""
        attacker = self._ready()
        values = (attacker.norms, attacker.allowances, attacker.ledger.spent, attacker.ledger.remaining, attacker.norms > 0)
        return dict(zip(INFO, values, strict=True))

    def _ready(self) -> Attacker:
        if self.attacker is None:
            raise ValueError(
                f"victim must be given before the first reset: {type(self.attack).__name__} looks at the policy that it attacks; "
                "set .victim = model"
            )
        return self.attacker

    def _outer(self, space: spaces.Space[Any]) -> spaces.Space[Any]:
        if isinstance(space, spaces.Dict):
            return spaces.Dict([(key, self._outer(part)) for key, part in space.items()])
        assert isinstance(space, spaces.Box)
        if self.bytes:
            return spaces.Box(0, 255, space.shape, np.float32) if self.delivery == "float" else space
        if self.pixels is not None:
            return space
        largest = self.threat.covering()
        room = min(limit for limit in (largest.step, largest.episode) if limit is not None)
        with np.errstate(over="ignore"):
            low, high = space.low - np.float64(room), space.high + np.float64(room)
            dtype: Any = space.dtype
            return spaces.Box(np.nextafter(low.astype(dtype), -np.inf), np.nextafter(high.astype(dtype), np.inf), dtype=dtype)


class _Learning(nn.Module):
    """What a VecNormalize outside makes of observations, as it is at the time."""

    def __init__(self, normalizer: Any) -> None:
        super().__init__()
        self._normalizer = [normalizer]

    def forward(self, observations: Tensor) -> Tensor:
        (outside,) = self._normalizer
        mean, variance = (torch.as_tensor(part).to(observations) for part in (outside.obs_rms.mean, outside.obs_rms.var))
        scaled = (observations - mean) / torch.sqrt(variance + outside.epsilon)
        return scaled.clamp(-outside.clip_obs, outside.clip_obs)


def _holds(env: Any, wrapper: Any) -> bool:
    """Whether a wrapper is inside a chain."""
    return any(layer.env is wrapper for layer in layers_of(env, partly=True))


def _simulators(env: Any) -> Callable[[], Sequence[gym.Env[Any, Any]]] | None:
    """Where to find the single environments of a host, one per slot; None if they are out of reach."""
    if isinstance(env, gym.Env):
        return lambda: (env,)
    while not hasattr(env, "envs") and (hasattr(env, "venv") or isinstance(env, VectorWrapper)):
        env = env.venv if hasattr(env, "venv") else env.env
    members = getattr(env, "envs", None)
    return None if not members or not all(isinstance(member, gym.Env) for member in members) else lambda: members


def _horizon(env: Any) -> int | None:
    try:
        return find_horizon(layers_of(env))
    except ChainError:  # environments in other processes
        return getattr(getattr(env, "spec", None), "max_episode_steps", None)


def _check_stack(env: Any, frame: spaces.Box, told: int) -> None:
    """Raise ChainError if a chain stacks another number of frames than the attack inside was told."""
    stack = next((layer for layer in reversed(layers_of(env, partly=True)) if layer.role == "frame_stack"), None)
    if stack is None or stack.space.shape is None:  # a dictionary's stack is refused with the model
        return
    if (count := math.prod(stack.space.shape) // math.prod(frame.shape)) == told:
        return
    padding = "zero" if type(stack.env).__name__ == "VecFrameStack" else "reset"
    raise ChainError(
        f"{stack.name} stacks {count} frames outside an attack that was told of {told}: "
        f'add_attack(..., frame_stack={count}, stack_padding="{padding}")'
    )


def _check_inside(env: Any) -> bool:
    """Whether the observations are normalised inside; an error if they are noisy or attacked already."""
    layers = layers_of(env, partly=True)
    if any(layer.role == "noise" for layer in layers):
        raise ChainError(
            "attack outside the noise: the attacker would see the noise it is not allowed to see; the right order is environment -> "
            "attack -> noise -> frame stack"
        )
    if any(layer.role == "attack" for layer in layers):
        raise ChainError("two attacks in one chain: their budgets would add up; keep one")
    if any(layer.role == "frame_stack" for layer in layers):
        raise ChainError(
            "attack outside the frame stack: every frame would be attacked, and charged, several times; the right order is environment "
            "-> attack -> noise -> frame stack"
        )
    return any(layer.role == "normalize" and layer.changes_observations for layer in layers)


def _in_units_of(threat: ThreatModel, box: spaces.Box, *, normalized: bool) -> ThreatModel:
    """The same threat in the units of the observations, with units="raw"."""
    if box.dtype == np.uint8:
        own, others = "uint8", {"unit01": 255.0}
    elif normalized:
        own, others = "normalized", {}
    elif len(box.shape) > 1 and bool(np.all(box.high == 1)):
        own, others = "unit01", {"uint8": 1 / 255, "raw": 1.0}
    else:
        own, others = "raw", {}
    if threat.units == own or (threat.units == "raw" and own == "uint8"):
        return replace(threat, units="raw")
    if threat.units not in others:
        raise ValueError(f"threat.units must be {own!r} for these observations, got {threat.units!r}")
    return threat.times(others[threat.units], units="raw")


def attack_range(space: spaces.Space[Any], threat: ThreatModel, *, clip: bool = False) -> Pixels:
    """The range that attacked observations stay in: that of pictures and bytes; of vectors where asked for, or where norm 0 needs one.

    Args:
        space: of one observation, a Box or a Dict of them.
        threat: the budget.
        clip: whether vectors stay inside their space too.
    """
    parts = [cast(spaces.Box, part) for part in (space.values() if isinstance(space, spaces.Dict) else (space,))]
    held = [
        clip or part.dtype == np.uint8 or (part.is_bounded() and (len(part.shape) > 1 or threat.norm == 0)) for part in parts
    ]
    if not any(held):
        return None
    if len(parts) == 1 and not clip and (parts[0].low.min(), parts[0].high.min()) == (parts[0].low.max(), parts[0].high.max()):
        return float(parts[0].low.min()), float(parts[0].high.max())
    ends = []
    for name, nowhere in (("low", -np.inf), ("high", np.inf)):
        found = [
            getattr(part, name).astype(np.float64) if inside else np.full(part.shape, nowhere)
            for part, inside in zip(parts, held, strict=True)
        ]
        joint = found[0] if not isinstance(space, spaces.Dict) else np.concatenate([each.reshape(-1) for each in found])
        ends.append(torch.from_numpy(joint.astype(np.float64 if parts[0].dtype == np.float64 else np.float32)))
    return ends[0], ends[1]
