"""Open Stable-Baselines3 files without running code that is stored in them.

An SB3 zip keeps spaces, schedules and classes as pickles. None of them is ever loaded here: they are rebuilt from the
environment, from the weights (`torch.load(weights_only=True)`) and from the plain text that SB3 stores beside each pickle,
matched against a list of known names. What cannot be rebuilt ends in an error that names the argument to pass.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from robustrl.errors import UnsafeModelError

ACTING_AS = {"sa_ppo": "ppo", "sa_dqn": "dqn"}
"""Algorithms of `robustrl.training.robust`, whose models act as those of SB3's."""

ALGORITHMS = ("ppo", "a2c", "dqn", "sac", "td3", "ddpg", "recurrent_ppo", *ACTING_AS)

_ACTIVATIONS = ("Tanh", "ReLU", "ELU", "LeakyReLU", "GELU", "SiLU", "Sigmoid", "Softplus", "Mish")
_OPTIMIZERS = ("Adam", "AdamW", "SGD", "RMSprop")
_CLASSES: dict[str, type] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (*(getattr(torch.nn, n) for n in _ACTIVATIONS), *(getattr(torch.optim, n) for n in _OPTIMIZERS))
}
_SB3_CLASSES = (
    "stable_baselines3.common.torch_layers.FlattenExtractor",
    "stable_baselines3.common.torch_layers.NatureCNN",
    "stable_baselines3.common.torch_layers.CombinedExtractor",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
    "robustrl.networks.extractors.LipschitzMLP",
    "robustrl.networks.extractors.LipschitzCNN",
)
"""Imported when a file names them."""
_RECIPE = re.compile(r"functools\.partial\(<class 'robustrl\.networks\.activations\.(SmoothActivation|LeakyReLU)'>, (.*)\)")
"""What `robustrl.networks.activation` returns, as text."""

_NO_BUFFER: dict[str, Any] = {
    "buffer_size": 1,
    "replay_buffer_class": None,
    "replay_buffer_kwargs": {},
    "optimize_memory_usage": False,
}
"""What acting needs of a replay buffer."""

_UNFIT = (
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    IndexError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
)
"""What building a network from contradictory text, or reading a damaged weights file, can end in."""


def algorithm_name(name: str) -> str:
    """An algorithm's name as run files have it; "sa-ppo" is "sa_ppo".

    Raises:
        ValueError: for an unknown name.
    """
    known = name.replace("-", "_") if isinstance(name, str) else name
    if known not in ALGORITHMS:
        raise ValueError(f"algo must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    return known


def algorithm_class(name: str) -> Any:
    """The SB3 or sb3-contrib class that acts for an algorithm, by its lower-case name.

    Raises:
        ValueError: for an unknown name, or where sb3-contrib is needed and not installed.
    """
    import stable_baselines3

    name = algorithm_name(name)
    name = ACTING_AS.get(name, name)
    if name != "recurrent_ppo":
        return getattr(stable_baselines3, name.upper())
    try:
        from sb3_contrib import RecurrentPPO
    except ImportError:
        raise ValueError("algo 'recurrent_ppo' needs sb3-contrib: pip install 'robustrl[contrib]'") from None
    return RecurrentPPO


def load_model(
    path: str | os.PathLike[str],
    *,
    algo: str | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    trust: bool = False,
    device: str = "auto",
) -> Any:
    """Load an SB3 PPO, A2C, DQN, SAC, TD3 or DDPG zip, or an sb3-contrib RecurrentPPO one, for acting.

    A replay buffer is not restored, and one of length 1 takes its place.

    Args:
        path: the zip.
        algo: "ppo", "a2c", "dqn", "sac", "td3", "ddpg", "recurrent_ppo", "sa_ppo" or "sa_dqn"; default what the file says.
        policy_kwargs: how the network is built; default what the file says, as far as it is plain text. Classes may be
            given by name, e.g. {"activation_fn": "ReLU"}.
        action_space: the environment's; default what the file says as text.
        trust: load the pickles in the file as SB3 does. Only for files whose origin you know: they run code.
        device: torch device, or "auto".
    Returns:
        the SB3 model.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an SB3 zip.
        UnsafeModelError: if something cannot be rebuilt without loading a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model file {path}")
    content = path.read_bytes()
    data = _read_data(path, content)
    kind = algorithm_class(algo or _guess_algorithm(path, data))
    light = copy.deepcopy({key: value for key, value in _NO_BUFFER.items() if key in data})  # SB3 writes into it
    if trust:
        return kind.load(io.BytesIO(content), device=device, custom_objects=light | _given(path, policy_kwargs))
    objects = _rebuild(path, data, kind, policy_kwargs, action_space) | light
    try:
        return kind.load(io.BytesIO(content), device=device, custom_objects=objects)
    except pickle.UnpicklingError as error:
        raise UnsafeModelError(
            f"{path}: a weights file holds more than tensors, loading refused ({_first_line(error)})"
        ) from None
    except _UNFIT as error:
        raise UnsafeModelError(
            f"{path}: the weights do not fit the network rebuilt as {kind.__name__} with policy_kwargs "
            f"{objects.get('policy_kwargs', data.get('policy_kwargs'))}; pass --algo / --policy-kwargs (algo=, policy_kwargs=), "
            f"or --trust for a file of your own ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_data(path: Path, content: bytes) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            data = json.loads(archive.read("data").decode())
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        KeyError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
        struct.error,
    ) as error:
        raise ValueError(f"{path} is not a Stable-Baselines3 model file ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a Stable-Baselines3 model file (its data is no object)")
    return data


def _guess_algorithm(path: Path, data: dict[str, Any]) -> str:
    """By the hyper-parameters that only one algorithm has."""
    policy_class = data.get("policy_class")
    module = str(policy_class.get("__module__", "")) if isinstance(policy_class, dict) else ""
    if module.startswith("sb3_contrib.") and "recurrent" not in module:
        raise UnsafeModelError(f"{path}: its policy is of {module}; supported algorithms are {', '.join(ALGORITHMS)}")
    if "policy_delay" in data:
        return "ddpg" if data["policy_delay"] == 1 and data.get("target_noise_clip") == 0 else "td3"
    if "target_entropy" in data:
        return "sac"
    if "exploration_rate" in data:
        return "dqn"
    if "clip_range" in data:
        return "recurrent_ppo" if "recurrent" in module else "ppo"
    if "gae_lambda" in data and "cg_max_steps" not in data:
        return "a2c"
    raise UnsafeModelError(
        f"{path}: which algorithm wrote it cannot be told; pass --algo (algo=), one of {', '.join(ALGORITHMS)}"
    )


def _rebuild(
    path: Path,
    data: dict[str, Any],
    kind: Any,
    policy_kwargs: dict[str, Any] | None,
    action_space: spaces.Space[Any] | None,
) -> dict[str, Any]:
    """A replacement for every pickled entry, so that SB3 loads none."""
    pickled = {key: entry for key, entry in data.items() if isinstance(entry, dict) and ":serialized:" in entry}
    objects: dict[str, Any] = dict.fromkeys(pickled)
    objects["observation_space"] = _observation_space(path, pickled.get("observation_space", {}))
    objects["action_space"] = _action_space(path, pickled.get("action_space", {}), action_space)
    objects["policy_class"] = _policy_class(path, kind, pickled.get("policy_class"))
    objects["env"] = None
    if policy_kwargs is not None:
        objects |= _given(path, policy_kwargs)
    elif "policy_kwargs" in pickled:
        text = {key: value for key, value in pickled["policy_kwargs"].items() if not key.startswith(":")}
        objects["policy_kwargs"] = {key: _known_text(path, key, value) for key, value in text.items()}
    for key in pickled.keys() & {"clip_range", "lr_schedule", "learning_rate"}:
        match = re.search(r"ConstantSchedule\(val=([-+.\de]+)\)", str(pickled[key].get("value_schedule", "")))
        if match is None and key == "learning_rate":
            warnings.warn(
                f"{path}: its learning-rate schedule is a pickle and was not loaded; the rate is 0 until you set one "
                "(acting is not affected)",
                stacklevel=4,
            )
        objects[key] = float(match.group(1)) if match else 0.0
    if "train_freq" in pickled:
        objects["train_freq"] = 1
    return objects


_DTYPES = ("float32", "float64", "uint8")
_DICT_ENTRY = re.compile(r"'([^']+)': Box\(([^()]*), \(([\d, ]*)\), (\w+)\)")


def _observation_space(path: Path, text: dict[str, Any]) -> spaces.Space[Any]:
    """The space from its text; bounds do not matter to a network, except that images are bytes."""
    inner = text.get("spaces")
    if isinstance(inner, str):
        entries = _DICT_ENTRY.findall(inner)
        known = all(dtype in _DTYPES for *_, dtype in entries)
        if entries and known and _DICT_ENTRY.sub("", inner).strip("{}, ") == "":
            # The keys' order is the order in which the network joins them.
            shapes = {key: [int(n) for n in numbers.replace(",", " ").split()] for key, _, numbers, _ in entries}
            return spaces.Dict([(key, _box(shapes[key], dtype, bounds)) for key, bounds, _, dtype in entries])
    shape, dtype = text.get("_shape"), text.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape) or dtype not in _DTYPES:
        raise UnsafeModelError(
            f"{path}: its observation space is no Box (or Dict of them) that can be rebuilt from text; pass --trust for a file of your own"
        )
    return _box(shape, str(dtype), f"{text.get('low', 0)}, {text.get('high', 255)}")


def _box(shape: list[int], dtype: str, bounds: str) -> spaces.Box:
    if dtype == "uint8":  # SB3 divides by 255 where the bounds are those of grey levels, and nowhere else
        grey = set(re.findall(r"\d+", bounds)) == {"0", "255"}
        return spaces.Box(0, 255 if grey else 254, tuple(shape), np.uint8)
    return spaces.Box(-np.inf, np.inf, tuple(shape), np.dtype(dtype).type)


def _action_space(path: Path, text: dict[str, Any], given: spaces.Space[Any] | None) -> spaces.Space[Any]:
    """The environment's own space where it agrees with the text, which has rounded bounds; else the text's."""
    try:
        if "n" in text and not text.get("_shape"):  # a MultiBinary space has an n and a shape
            return spaces.Discrete(int(text["n"]), start=int(text.get("start", 0)))
        shape = tuple(int(n) for n in text["_shape"])
        as_text = (shape, text["low"], text["high"])
        if isinstance(given, spaces.Box) and as_text == (given.shape, str(given.low), str(given.high)):
            return given  # numpy abbreviates long arrays with dots, which the text alone does not give back
        low, high = (_numbers(text[name]) for name in ("low", "high"))
        stated = spaces.Box(low.reshape(shape), high.reshape(shape), shape, np.dtype(text["dtype"]).type)
    except (KeyError, ValueError, TypeError, AssertionError, AttributeError):
        raise UnsafeModelError(
            f"{path}: its action space is no Discrete or Box that can be rebuilt from text; pass --trust for a file of your own"
        ) from None
    if not isinstance(given, spaces.Box) or given.shape != stated.shape:
        return stated
    return given if np.allclose(given.low, stated.low) and np.allclose(given.high, stated.high) else stated


def _numbers(text: str) -> Any:
    """An array as numpy prints it; long ones are abbreviated with dots, which is no number and refused."""
    return np.array([float(number) for number in text.replace("[", " ").replace("]", " ").split()], dtype=np.float32)


def _policy_class(path: Path, kind: Any, text: Any) -> Any:
    """The policy class among SB3's own whose module, documentation and constructor SB3 stored as text."""
    if isinstance(text, dict) and isinstance(text.get("__doc__"), str):
        for policy in kind.policy_aliases.values():
            # Two classes may share their documentation; Python 3.13 strips its indentation, which older versions keep.
            name = f"<function {policy.__init__.__qualname__} "
            same = policy.__module__ == text.get("__module__") and str(text.get("__init__", name)).startswith(name)
            if same and inspect.getdoc(policy) == inspect.cleandoc(text["__doc__"]):
                return policy
    raise UnsafeModelError(
        f"{path}: its policy class is not one of {kind.__name__}'s own; pass the right --algo, or --trust for a file of your own"
    )


def _known_text(path: Path, key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"<class '([\w.]+)'>", value)
    if match and match.group(1) in _CLASSES:
        return _CLASSES[match.group(1)]
    if match and match.group(1) in _SB3_CLASSES:
        module, _, name = match.group(1).rpartition(".")
        return getattr(importlib.import_module(module), name)
    recipe = _RECIPE.fullmatch(value)
    found = None if recipe is None else _activation(*recipe.groups())
    if found is not None:
        return found
    raise UnsafeModelError(
        f"{path}: policy_kwargs[{key!r}] = {value!r} is stored as a pickle and is not a known name; "
        "pass --policy-kwargs (policy_kwargs=), or --trust for a file of your own"
    )


def _activation(name: str, arguments: str) -> Any:
    """A recipe for an activation, or None unless its arguments are literals; what they mean is checked when it is used."""
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        values = [ast.literal_eval(value) for value in call.args]
    except (*_UNFIT, SyntaxError, RecursionError):
        return None
    kind = getattr(importlib.import_module("robustrl.networks.activations"), name)
    return functools.partial(kind, *values, **settings)


def _given(path: Path, policy_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The caller's policy_kwargs, with classes by name resolved, as SB3's `custom_objects`."""
    if policy_kwargs is None:
        return {}
    names = {name.rpartition(".")[2]: f"<class '{name}'>" for name in (*_CLASSES, *_SB3_CLASSES)}
    resolved = {
        key: _known_text(path, key, names.get(value.rpartition(".")[2], value)) if isinstance(value, str) else value
        for key, value in policy_kwargs.items()
    }
    return {"policy_kwargs": resolved}
