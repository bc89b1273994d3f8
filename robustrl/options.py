"""What the shell's words mean: option types, and text turned into the library's objects.

Heavy imports happen inside the functions, so that `robustrl --help` is quick.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from robustrl.noise import Noise

Target = Annotated[Path, typer.Argument(help="Run directory, or a plain SB3 zip.")]
EnvId = Annotated[str | None, typer.Option("--env", help="Gymnasium id; a run directory knows its own.")]
EnvKwargs = Annotated[str | None, typer.Option(help="Keyword arguments of the environment as JSON.")]
Algo = Annotated[
    str | None, typer.Option(help="ppo, a2c, dqn, sac, td3, ddpg or recurrent_ppo; default what the run or the file says.")
]
Sigma = Annotated[
    float | None, typer.Option(help="Gaussian noise of this standard deviation; short for --noise gaussian:SIGMA.")
]
NoiseText = Annotated[
    str | None,
    typer.Option(
        "--noise",
        help="gaussian:SIGMA, uniform:LAM, laplace:B, splitting:LAM,LOW,HIGH, ablation:KEEP, deterministicsplitting:LEVELS,STEPS,LOW,HIGH, ...",
    ),
]
FrameStack = Annotated[int | None, typer.Option(help="Frames in one observation of the policy.")]
NormalizationFile = Annotated[
    Path | None,
    typer.Option(
        "--normalization",
        help="normalization.npz (or, with --trust, SB3's pickled VecNormalize) that the model was trained with; noise and budgets "
        "are then in normalised units.",
    ),
]
Horizon = Annotated[int | None, typer.Option("--max-episode-steps", help="Horizon; default the environment's own.")]
Seed = Annotated[int, typer.Option(help="Root of all randomness.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes; results do not depend on it.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Run on a Ray cluster: its address host:port, 'auto' for the running one, 'local' to start one here."
    ),
]
Engine = Annotated[
    str,
    typer.Option(help="auto, native, list, envpool or ale: how environments run side by side; part of what names an episode."),
]
Alpha = Annotated[float, typer.Option(help="Failure probability of everything that is stated.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results; default the run directory, or runs/<name of the zip>.")]
PolicyKwargs = Annotated[str | None, typer.Option(help="policy_kwargs of the model as JSON, where the file does not say.")]
Trust = Annotated[bool, typer.Option("--trust", help="Load the pickles in the model file: runs code stored in it.")]
Network = Annotated[
    str | None,
    typer.Option(
        help="mlp (Stable-Baselines3's own), lipschitz-mlp or lipschitz-cnn (pictures); the last two are certified without noise."
    ),
]
Activation = Annotated[
    str | None,
    typer.Option(
        help="NAME or NAME:SETTING: swish:BETA, softplus:BETA, gelu, mish, ..., relu, leaky_relu:SLOPE. Lipschitz networks take all of them, each divided "
        "by its largest slope, and maxmin and householder."
    ),
]
Stochastic = Annotated[bool, typer.Option("--stochastic", help="Sample actions instead of taking the greedy one.")]


def open_model(
    target: Path, env: str | None, algo: str | None, changes: dict[str, Any], policy_kwargs: str | None, trust: bool
) -> tuple[Any, Any]:
    """Model and environment recipe of a run directory or zip, with what the options change."""
    from robustrl.api import load_agent
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.training.run_files import RunInfo

    if not target.exists() and target.with_suffix(".zip").exists():
        target = target.with_suffix(".zip")  # SB3 leaves the suffix out too
    if not target.exists():
        raise FileNotFoundError(f"no run directory or model file {target}")
    base: Any = env
    if target.is_dir() and env is None:
        base = RunInfo.load(target).environment(trust=trust)
    if base is None:
        raise ValueError("a plain model file needs --env (and --sigma or --noise)")
    recipe = EnvRecipe.of(base, **changes)
    model = load_agent(target, recipe, algo=algo, policy_kwargs=parse_object("--policy-kwargs", policy_kwargs), trust=trust)
    return model, recipe


def read_normalization(path: Path | None, trust: bool) -> Any:
    from robustrl.policy import Normalization

    return None if path is None else Normalization.of(path, trust=trust)


def make_executor(address: str | None) -> Any:
    """A context: a cluster's executor, whose connection lasts over several runs, or None without an address."""
    if address is None:
        return nullcontext()
    from robustrl.rollouts.cluster import RayExecutor

    return RayExecutor(address)


def engine_suffix(engine: str) -> str:
    return "" if engine == "auto" else f"-{engine}"


def make_threats(norm: str, budgets: str | None, epsilon: float | None, units: Any) -> dict[str, Any]:
    """Threat models by what tells their folders apart: one per budget, all with the radius per step, or the radius alone."""
    from robustrl.threat import ThreatModel

    p = parse_number("--norm", norm)
    if p == math.inf and None not in (budgets, epsilon):
        raise ValueError("--budget and --epsilon are both the radius per step for norm inf: leave one out")
    if budgets is None and epsilon is not None:
        return {f"epsilon{epsilon:.12g}": ThreatModel(p, step=epsilon, units=units)}
    apart = "" if epsilon is None else f"-epsilon{epsilon:.12g}"
    return {
        f"{b:.12g}{apart}": ThreatModel(p, b if p == math.inf else epsilon, None if p == math.inf else b, units)
        for b in parse_budgets("0.6" if budgets is None else budgets)
    }


def parse_noise(sigma: float | None, text: str | None) -> Noise | None:
    from robustrl.noise import MECHANISMS, Gaussian

    if sigma is not None and text is not None:
        raise ValueError("--sigma and --noise exclude each other")
    if sigma is not None:
        return Gaussian(sigma)
    if text is None:
        return None
    name, _, rest = text.partition(":")
    kinds = {key.lower(): kind for key, kind in MECHANISMS.items()}
    if name.lower() not in kinds or not rest:
        raise ValueError(f"--noise must be KIND:PARAMETERS with KIND one of {', '.join(kinds)}, got {text!r}")
    numbers = [int(part) if part.strip().isdecimal() else parse_number("--noise", part) for part in rest.split(",")]
    try:
        return kinds[name.lower()](*numbers)
    except TypeError:
        raise ValueError(f"--noise {text!r}: {name} does not take {len(numbers)} parameter(s)") from None


def parse_budgets(text: str) -> list[float]:
    import numpy as np

    parts = text.split(":")
    if len(parts) == 3:
        low, high = parse_number("--budgets", parts[0]), parse_number("--budgets", parts[1])
        if not math.isfinite(high - low) or not parts[2].isdecimal() or int(parts[2]) < 1:
            raise ValueError(f"--budgets must be LOW:HIGH:COUNT with finite bounds and an integer COUNT >= 1, got {text!r}")
        # rounded so that 0.6 reads 0.6 and not 0.6000000000000001
        return [float(f"{b:.12g}") for b in np.linspace(low, high, int(parts[2]))]
    if len(parts) != 1:
        raise ValueError(f"--budgets must be LOW:HIGH:COUNT or numbers separated by commas, got {text!r}")
    return [parse_number("--budgets", part) for part in text.split(",")]


def parse_until(text: str) -> tuple[float, float]:
    value, separator, budget = text.partition("@")
    if not separator:
        raise ValueError(f"--until must be VALUE@BUDGET, got {text!r}")
    return parse_number("--until", value), parse_number("--until", budget)


def parse_number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number") from None


def parse_object(option: str, text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} must be a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text!r}")
    return value


def default_attack(recipe: Any) -> str:
    from gymnasium.spaces import Discrete

    return "pgd" if isinstance(recipe.action_space, Discrete) else "mad"


def make_attack(name: str, threshold: float | None = None, draws: int | None = None) -> Any:
    from robustrl.attacks import ATTACKS

    if name not in ATTACKS:
        raise ValueError(f"--attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    settings = {"threshold": threshold, "draws": draws}
    try:
        return ATTACKS[name](**{key: value for key, value in settings.items() if value is not None})
    except TypeError:
        given = " and ".join(f"--{key}" for key, value in settings.items() if value is not None)
        raise ValueError(f"the attack {name} takes no {given}") from None


def parse_training_attack(
    name: str | None, recipe: Any, norm: str | None, epsilon: float | None, normalize: bool | None
) -> dict[str, Any]:
    """What `train` is told of an attacker: none, one by name, or one that learns."""
    from robustrl.envs.units import frame_units
    from robustrl.threat import ThreatModel
    from robustrl.training.presets import preset_for

    if name is None:
        return {}
    if epsilon is None:
        raise ValueError("--attack needs --epsilon, the radius of every step")
    learns = preset_for(recipe.env_id).normalize if normalize is None else normalize
    units = "normalized" if learns and recipe.normalization is None else frame_units(recipe)
    threat = ThreatModel(parse_number("--norm", norm or "inf"), step=epsilon, units=units)
    return {"attack": name if name == "learned" else make_attack(name), "threat": threat}


def describe_run(target: Path, recipe: Any) -> dict[str, Any]:
    from robustrl.training.run_files import RunInfo

    known = {"env": recipe.label, "noise": str(recipe.noise), "frame_stack": recipe.frame_stack, "horizon": recipe.horizon}
    if target.is_dir():
        run = RunInfo.load(target)
        known |= {"algo": run.algo, "seed": run.seed, "timesteps": run.timesteps, **run.hyperparameters}
    return known
