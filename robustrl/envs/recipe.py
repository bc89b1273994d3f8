"""An environment as a recipe: what travels to workers, into run files and into certificates."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from robustrl.attacks.base import Attack
from robustrl.envs.chain import check_chain, check_order, find_horizon
from robustrl.envs.core import NoiseCore
from robustrl.envs.joint import joint_box
from robustrl.envs.single import NoiseObservation, RewardProbe
from robustrl.errors import ChainError, check_choice, check_count
from robustrl.noise import Noise, noise_from_dict
from robustrl.policy import Normalization, Padding, PolicyView
from robustrl.threat import ThreatModel

NormalizePlace = Literal["before_noise", "after_noise"]


@dataclass(frozen=True)
class EnvRecipe:
    """Everything needed to build an environment anywhere.

    Args:
        env_id: registered Gymnasium id; or None if `factory` is given.
        factory: zero-argument callable that returns a `gymnasium.Env`; travels to local workers, cannot be stored in files.
        env_kwargs: keyword arguments of `gymnasium.make`.
        wrappers: callables applied to the environment, innermost first.
        max_episode_steps: horizon; default the registered one.
        noise: smoothing noise, added once per arriving frame, before the frame stack; None for an undefended agent.
        frame_stack: frames in one observation of the policy.
        stack_padding: "reset" (copies of the first frame) or "zero".
        normalization: frozen normalisation of every frame, or None.
        normalize: "before_noise" (noise and budgets are in normalised units) or "after_noise" (in raw units; the
            normalisation is then part of the policy, as with an SB3 VecNormalize around `make_vec_env`).

    Raises:
        ChainError: if the environment has no finite horizon.
        ValueError: for an unknown id or bad numbers.
    """

    env_id: str | None = None
    factory: Callable[[], gym.Env[Any, Any]] | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]], ...] = ()
    max_episode_steps: int | None = None
    noise: Noise | None = None
    frame_stack: int = 1
    stack_padding: Padding = "reset"
    normalization: Normalization | None = None
    normalize: NormalizePlace = "before_noise"

    def __post_init__(self) -> None:
        if (self.env_id is None) == (self.factory is None):
            raise ValueError("an environment recipe needs exactly one of env_id and factory")
        if self.noise is not None and not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {self.noise!r}")
        if not isinstance(self.env_kwargs, Mapping):
            raise TypeError(f"env_kwargs must be a mapping, got {type(self.env_kwargs).__name__}")
        object.__setattr__(self, "env_kwargs", dict(self.env_kwargs))
        if not isinstance(self.wrappers, tuple | list) or not all(callable(wrapper) for wrapper in self.wrappers):
            raise TypeError(f"wrappers must be a tuple of callables, got {self.wrappers!r}")
        object.__setattr__(self, "wrappers", tuple(self.wrappers))
        if self.max_episode_steps is not None:
            check_count("max_episode_steps", self.max_episode_steps)
        check_count("frame_stack", self.frame_stack)
        check_choice("stack_padding", self.stack_padding, ("reset", "zero"))
        if self.normalization is not None and not isinstance(self.normalization, Normalization):
            raise TypeError(
                f"normalization must be a robustrl Normalization, got {self.normalization!r}; try Normalization.of(...)"
            )
        check_choice("normalize", self.normalize, ("before_noise", "after_noise"))
        if self.env_id is not None:
            find_spec(self.env_id)

    @classmethod
    def of(cls, env: Any, *, noise: Noise | None = None, **changes: Any) -> EnvRecipe:
        """The recipe of an id, `EnvSpec`, factory, recipe, or of a vector environment made by `make_vec_env`.

        Args:
            env: what the user has.
            noise: noise to add; refused if the recipe already holds one.
            changes: further fields of the recipe that are not None replace the recipe's own.
        Raises:
            ChainError: for a second noise, or wrappers outside `make_vec_env` that the recipe does not know.
        """
        if isinstance(env, cls):
            recipe = env
        elif isinstance(env, str):
            recipe = cls(env_id=env)
        elif isinstance(env, EnvSpec):
            registered = find_spec(env.id)
            if env.entry_point != registered.entry_point:
                raise ValueError(
                    f"the spec of {env.id} was changed (another entry point than the registered one): register it under its own id"
                )
            if env.additional_wrappers:
                raise ChainError(f"the spec of {env.id} lists wrappers; pass them as wrappers= of an EnvRecipe instead")
            recipe = cls(env_id=env.id, env_kwargs=dict(env.kwargs), max_episode_steps=env.max_episode_steps)
        elif isinstance(getattr(env, "recipe", None), cls):
            recipe = _with_outer_layers(env)
        elif callable(env):
            recipe = cls(factory=env)
        else:
            raise TypeError(
                "env must be an id, an EnvSpec, a zero-argument factory, an EnvRecipe or a vector env from make_vec_env, "
                f"got {type(env).__name__}"
            )
        if noise is not None:
            if recipe.noise is not None and recipe.noise != noise:
                raise ChainError(f"two noises: the environment already adds {recipe.noise}, noise={noise} would come on top")
            changes["noise"] = noise
        return replace(recipe, **{name: value for name, value in changes.items() if value is not None})

    def base_env(
        self,
        inner: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] | None = None,
        *,
        flat: bool = True,
        checked: bool = True,
    ) -> gym.Env[Any, Any]:
        """A fresh environment without normalisation, noise and frame stack.

        Args:
            inner: wrapper applied before the recipe's own wrappers (a return monitor).
            flat: join dictionary observations into one vector, keys in the space's order.
            checked: let Gymnasium watch every step for mistakes in the environment, which takes a while.
        """
        if self.factory is not None:
            env = self.factory()
            if not isinstance(env, gym.Env):
                raise TypeError(f"the environment factory must return a gymnasium.Env, got {type(env).__name__}")
            if self.max_episode_steps is not None:
                env = gym.wrappers.TimeLimit(env, self.max_episode_steps)
        else:
            assert self.env_id is not None
            options = {} if checked else {"disable_env_checker": True}
            try:
                env = gym.make(self.env_id, max_episode_steps=self.max_episode_steps, **options, **self.env_kwargs)
            except (TypeError, gym.error.Error) as error:
                raise ValueError(f"environment {self.env_id!r} cannot be made with {dict(self.env_kwargs)}: {error}") from error
        if inner is not None:
            env = inner(env)
        for wrapper in self.wrappers:
            env = wrapper(env)
        if flat and isinstance(env.observation_space, spaces.Dict):
            env = gym.wrappers.FlattenObservation(env)
        return env

    @cached_property
    def _facts(self) -> _Facts:
        native = self.base_env(inner=RewardProbe, flat=False)
        env: gym.Env[Any, Any] = native
        try:
            if isinstance(native.observation_space, spaces.Dict):
                joint_box(native.observation_space)  # refuses entries that are no Box
                if self.noise is not None:
                    NoiseCore(self.noise, native.observation_space)  # and those of integers
                env = gym.wrappers.FlattenObservation(native)
            layers = check_order(env if self.noise is None else NoiseObservation(env, self.noise))
            horizon = find_horizon(layers)
            if horizon is None:
                raise ChainError(f"{self.label} has no finite horizon: pass max_episode_steps=")
            lives = any(layer.ends_with_a_life for layer in layers)
            return _Facts(horizon, native.observation_space, env.observation_space, env.action_space, lives)
        finally:
            env.close()

    @property
    def label(self) -> str:
        """Name for titles."""
        return self.env_id or str(getattr(self.factory, "__qualname__", type(self.factory).__name__))

    @property
    def horizon(self) -> int:
        """Most steps an episode can have."""
        return self._facts.horizon

    @property
    def raw_space(self) -> spaces.Box:
        """Space of one observation of the environment, before any normalisation; dictionaries joined into one vector.

        Raises:
            TypeError: if it is not a Box.
        """
        space = self._facts.raw_space
        if not isinstance(space, spaces.Box):
            raise TypeError(f"{self.label}: observations must be a Box space or a Dict of them, got {space}")
        return space

    @property
    def frame_space(self) -> spaces.Box:
        """Space of one clean frame, as attackers and noise meet it.

        Raises:
            TypeError: if it is not a Box.
            ValueError: if the normalisation has another shape.
        """
        space = self.raw_space
        if self.normalization is None or self.normalize == "after_noise":
            return space
        if self.normalization.mean.shape != space.shape:
            raise ValueError(
                f"normalization has statistics of shape {self.normalization.mean.shape}, but {self.label} gives {space.shape}"
            )
        clip = self.normalization.clip
        return spaces.Box(-clip, clip, space.shape, np.float32)

    @property
    def native_space(self) -> spaces.Space[Any]:
        """Observation space of the environment itself, dictionaries included."""
        return self._facts.native_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        """Action space of one environment."""
        return self._facts.action_space

    @property
    def ends_with_a_life(self) -> bool:
        """Whether an episode is one life of a game, not a whole game."""
        return self._facts.ends_with_a_life

    def frames(self, observations: NDArray[Any]) -> NDArray[Any]:
        """What attackers and noise meet of raw observations (n, *shape)."""
        if self.normalization is None or self.normalize == "after_noise":
            return observations
        return self.normalization(observations)

    def view(self, model: Any) -> PolicyView:
        """The view of a model that acts in this environment.

        Raises:
            TypeError: if there is no view for the model.
            ValueError: if model and environment do not fit.
        """
        after = self.normalization if self.normalize == "after_noise" else None
        if (
            after is not None
            and self.frame_stack > 1
            and self.stack_padding == "zero"
            and after.mean.shape == self.frame_space.shape
        ):
            raise ValueError(
                "stack_padding must be 'reset' with a normalisation of frames after the noise: padding with normalised zeros cannot "
                "be told from the padding with zeros that the agent was trained on"
            )
        # A dictionary's images have their layout in the native space alone.
        space = self.native_space if isinstance(self.native_space, spaces.Dict) else self.frame_space
        policy = PolicyView.of(model, n_frames=self.frame_stack, frame_space=space, normalization=self.normalization)
        return policy if after is None else policy.after(after)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for files. Factories and wrappers are named, not stored: such a recipe must be passed in again."""
        return {
            "env_id": self.env_id,
            "factory": None if self.factory is None else self.label,
            "env_kwargs": dict(self.env_kwargs),
            "wrappers": [getattr(w, "__qualname__", repr(w)) for w in self.wrappers],
            "max_episode_steps": self.horizon,
            "noise": None if self.noise is None else self.noise.to_dict(),
            "frame_stack": self.frame_stack,
            "stack_padding": self.stack_padding,
        } | ({} if self.normalization is None else {"normalization": self.normalization.to_dict(), "normalize": self.normalize})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, trust: bool = False) -> EnvRecipe:
        """Inverse of `to_dict`, for recipes without factory and wrappers.

        Args:
            data: plain data, whose author may be anybody.
            trust: import the module that a `module:id` names; without it, only modules that are imported already will do.
        Raises:
            ValueError: if fields are missing or unknown, the recipe named a factory or wrappers, or a module is not imported.
        """
        fields = dict(data)
        env_id = fields.get("env_id")
        module, _, _ = env_id.rpartition(":") if isinstance(env_id, str) else ("", "", "")
        if module and not trust and module not in sys.modules:
            raise ValueError(
                f"its id {env_id!r} names a module that is not imported here, and importing runs its code: pass the environment "
                "again (--env), or --trust (trust=True) for a file of your own"
            )
        if fields.pop("factory", None) is not None or fields.get("wrappers"):
            raise ValueError("this recipe used a factory or wrappers, which files cannot hold: pass the environment again")
        fields["wrappers"] = ()
        noise = fields.get("noise")
        fields["noise"] = None if noise is None else noise_from_dict(noise)
        if fields.get("normalization") is not None:
            fields["normalization"] = Normalization.from_dict(fields["normalization"])
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not an environment recipe: {error}") from None

    def fingerprint(self) -> str:
        """SHA-256 of `to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class _Facts:
    """What only an instance of the environment knows."""

    horizon: int
    native_space: spaces.Space[Any]
    raw_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    ends_with_a_life: bool


def _with_outer_layers(env: Any) -> EnvRecipe:
    """The recipe of a vector environment, with what SB3 wrappers around it add."""
    recipe: EnvRecipe = env.recipe
    layer, extra = env, []
    while layer is not env.recipe_env:
        match type(layer).__name__:
            case "VecMonitor" | "VecTransposeImage":  # the view transposes images as the model needs them
                pass
            case "VecNormalize" if not layer.norm_obs:  # rewards alone
                pass
            case "VecNormalize" if recipe.normalization is None:
                # A copy of the statistics as they are now: a certificate's do not change any more.
                recipe = replace(recipe, normalization=Normalization.of(layer), normalize="after_noise")
            case name:
                extra.append(name)
        layer = layer.venv
    if extra:
        raise ChainError(
            f"{', '.join(extra)} wrapped around make_vec_env(...) is not in the recipe, so it would be left out; "
            "pass wrapper_class= to make_vec_env, or keep it out of the certified chain"
        )
    return recipe


def find_spec(env_id: str) -> EnvSpec:
    """The registered spec of an id, importing `module:id` modules as Gymnasium does.

    Raises:
        ValueError: if it is unknown, with Gymnasium's own suggestion.
    """
    if not isinstance(env_id, str):
        raise TypeError(f"env id must be a string, got {type(env_id).__name__}")
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # gym.make does so, gym.spec does not
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        hint = "" if module else " An environment of your own: module:Id imports its module first."
        raise ValueError(f"unknown environment id {env_id!r}: {error}{hint}") from None


def make_vec_env(
    env_id: Any,
    n_envs: int = 1,
    *,
    noise: Noise | None = None,
    frame_stack: int | None = None,
    stack_padding: Padding | None = None,
    normalization: Normalization | None = None,
    max_episode_steps: int | None = None,
    seed: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    wrapper_class: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] | None = None,
    vec_env_cls: Any = None,
    attack: Attack | None = None,
    threat: ThreatModel | None = None,
    bounds: Literal["expand", "clip"] = "expand",
    delivery: Literal["float", "round", "greedy"] | None = None,
) -> Any:
    """An SB3 vector environment with noise and frame stack in the order that the certificate needs.

    SB3's `make_vec_env` with a few more arguments; the chain is environment -> Monitor -> wrappers -> normalisation -> attack -> noise ->
    frame stack. The result carries its `EnvRecipe` as `.recipe`, so `certify_policy(model, env)` needs nothing else.

    Args:
        env_id: anything `EnvRecipe.of` takes: id, EnvSpec, factory, recipe.
        n_envs: number of environments side by side.
        noise: smoothing noise, e.g. `robustrl.Gaussian(0.2)`; None for none.
        frame_stack: frames in one observation.
        stack_padding: how an episode's first stack is filled, "reset" or "zero".
        normalization: frozen normalisation inside the noise, whose units noise and budgets then have.
        max_episode_steps: horizon; default the registered one.
        seed: seeds environments, action spaces and noise.
        env_kwargs: keyword arguments of `gymnasium.make`.
        wrapper_class: wrapper applied to each environment, inside the noise.
        vec_env_cls: SB3 class to use; default `DummyVecEnv`.
        attack, threat: an attacker of every observation and its budget, for adversarial training; tell it who acts by
            `set_victim(env, model)`. The recipe, and with it any certificate, is that of the environment without it.
        bounds, delivery: of the attack, see `robustrl.envs.AttackObservation`. bounds="clip" keeps the observation space, so that a model
            of the clean environment can go on learning; bytes are delivered as "round" by default, as SB3's networks take them.
    Raises:
        ChainError: if the chain breaks the proof.
        ValueError: for an unknown id or bad numbers.
    """
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    recipe = EnvRecipe.of(
        env_id,
        noise=noise,
        frame_stack=frame_stack,
        stack_padding=stack_padding,
        normalization=normalization,
        max_episode_steps=max_episode_steps,
        env_kwargs=env_kwargs,
    )
    if wrapper_class is not None:
        recipe = replace(recipe, wrappers=(*recipe.wrappers, wrapper_class))
    check_count("n_envs", n_envs)
    if not isinstance(recipe.action_space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise TypeError(f"{recipe.label}: Stable-Baselines3 cannot act in {recipe.action_space}")
    venv: Any = (vec_env_cls or DummyVecEnv)([lambda: recipe.base_env(inner=Monitor, flat=False)] * n_envs)
    inspectable = isinstance(venv, DummyVecEnv)  # others ran the recipe's own check above, on an environment in this process
    venv = wrap_vec_env(venv, recipe, attack, threat, bounds=bounds, delivery=delivery)
    if seed is not None:
        venv.seed(seed)
        venv.action_space.seed(seed)
    if inspectable:
        check_chain(venv)
    venv.recipe = recipe
    venv.recipe_env = venv
    return venv


def wrap_vec_env(
    venv: Any,
    recipe: EnvRecipe,
    attack: Attack | None = None,
    threat: ThreatModel | None = None,
    *,
    bounds: Literal["expand", "clip"] = "expand",
    delivery: Literal["float", "round", "greedy"] | None = None,
) -> Any:
    """An SB3 vector environment inside the recipe's normalisation, noise and frame stack, in the order of the proof.

    Args:
        venv: without them.
        recipe: what is wrapped around it.
        attack, threat: an attacker between normalisation and noise, and its budget, or None.
        bounds, delivery: see `make_vec_env`.
    Raises:
        ValueError: for an attack without a threat, or a threat without an attack.
    """
    from robustrl.envs import sb3

    if (attack is None) != (threat is None):
        raise ValueError("attack and threat go together: got one without the other")
    places = {} if recipe.normalization is None else {recipe.normalize: recipe.normalization}
    if "before_noise" in places:
        venv = sb3.NormalizeObservation(venv, places["before_noise"])
    if attack is not None and threat is not None:
        outside: dict[str, Any] = {
            "noise": recipe.noise,
            "frame_stack": recipe.frame_stack,
            "stack_padding": recipe.stack_padding,
            "bounds": bounds,
            "delivery": delivery or ("round" if joint_box(venv.observation_space).dtype == np.uint8 else "float"),
        }
        venv = sb3.VecAttack(venv, attack, threat, horizon=recipe.horizon, normalization=places.get("after_noise"), **outside)
    if recipe.noise is not None:
        venv = sb3.NoiseObservation(venv, recipe.noise)
    if "after_noise" in places:
        venv = sb3.NormalizeObservation(venv, places["after_noise"])
    if recipe.frame_stack > 1:
        venv = sb3.FrameStack(venv, recipe.frame_stack, recipe.stack_padding)
    return venv
