"""The command line: parses, calls `robustrl.api`, renders; no logic.

Heavy imports happen inside the commands, so that `robustrl --help` is quick.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from robustrl.noise import Noise

app = typer.Typer(
    name="robustrl",
    help="Train, certify, attack and verify reinforcement-learning policies whose observations may be tampered with.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[Path, typer.Argument(help="Run directory, or a plain SB3 zip.")]
EnvId = Annotated[str | None, typer.Option("--env", help="Gymnasium id; a run directory knows its own.")]
Algo = Annotated[str | None, typer.Option(help="ppo, a2c or dqn; default what the run or the file says.")]
Sigma = Annotated[
    float | None, typer.Option(help="Gaussian noise of this standard deviation; short for --noise gaussian:SIGMA.")
]
NoiseText = Annotated[
    str | None, typer.Option("--noise", help="gaussian:SIGMA, uniform:LAM, laplace:B, splitting:LAM,LOW,HIGH or ablation:KEEP.")
]
FrameStack = Annotated[int | None, typer.Option(help="Frames in one observation of the policy.")]
Horizon = Annotated[int | None, typer.Option("--max-episode-steps", help="Horizon; default the environment's own.")]
Seed = Annotated[int, typer.Option(help="Root of all randomness.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes; results do not depend on it.")]
Alpha = Annotated[float, typer.Option(help="Failure probability of everything that is stated.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results; default the run directory, or runs/<name of the zip>.")]
PolicyKwargs = Annotated[str | None, typer.Option(help="policy_kwargs of the model as JSON, where the file does not say.")]
Trust = Annotated[bool, typer.Option("--trust", help="Load the pickles in the model file: runs code stored in it.")]
Stochastic = Annotated[bool, typer.Option("--stochastic", help="Sample actions instead of taking the greedy one.")]


def _version(asked: bool) -> None:
    if asked:
        from robustrl import __version__

        print(f"robustrl {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    app_state["debug"] = debug


app_state: dict[str, bool] = {"debug": False}
INTERRUPTED = 130


@app.command()
def train(
    env: Annotated[str, typer.Option("--env", help="Gymnasium id.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    algo: Annotated[str, typer.Option(help="ppo, a2c or dqn.")] = "ppo",
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    max_episode_steps: Horizon = None,
    timesteps: Annotated[int | None, typer.Option(help="Environment steps; default the preset's.")] = None,
    n_envs: Annotated[int | None, typer.Option(help="Environments side by side; default the preset's.")] = None,
    seed: Seed = 0,
    verbose: Annotated[int, typer.Option(help="SB3's verbosity.")] = 0,
) -> None:
    """Train a policy on noisy observations into a run directory."""
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.training.train import train as run

    recipe = EnvRecipe.of(env, noise=_noise(sigma, noise), frame_stack=frame_stack, max_episode_steps=max_episode_steps)
    run(recipe, out, algo=algo, timesteps=timesteps, seed=seed, n_envs=n_envs, progress_bar=True, verbose=verbose)
    print(f"trained {algo} on {recipe.label}, noise {recipe.noise}: {out / 'model.zip'}")
    if recipe.noise is not None:
        print(f"next: robustrl certify {out}")


@app.command()
def certify(
    target: Target,
    env: EnvId = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    max_episode_steps: Horizon = None,
    episodes: Annotated[int, typer.Option(help="Number of episodes, fixed beforehand.")] = 10_000,
    budgets: Annotated[str, typer.Option(help="LOW:HIGH:COUNT, or numbers separated by commas.")] = "0:1:11",
    alpha: Alpha = 0.05,
    method: Annotated[str, typer.Option(help="hybrid, paper, dkw, band or betting.")] = "hybrid",
    success_at: Annotated[float | None, typer.Option(help="Certify the probability of a return of at least this.")] = None,
    quantile: Annotated[float | None, typer.Option(help="Certify this quantile of the return.")] = None,
    until: Annotated[str | None, typer.Option(help="VALUE@BUDGET: stop once VALUE is certified at BUDGET.")] = None,
    return_low: Annotated[float | None, typer.Option(help="Sure lower bound of the return.")] = None,
    return_high: Annotated[float | None, typer.Option(help="Sure upper bound of the return.")] = None,
    pointwise: Annotated[bool, typer.Option("--pointwise", help="Confidence for each budget on its own.")] = False,
    stochastic: Stochastic = False,
    seed: Seed = 0,
    workers: Workers = 1,
    chunk_size: Annotated[int | None, typer.Option(help="Episodes per chunk.")] = None,
    out: Out = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Certify a lower bound on the return under every attacker within a budget."""
    from robustrl.api import certify_policy
    from robustrl.report.tensorboard import log_certificate

    if success_at is not None and quantile is not None:
        raise ValueError("--success-at and --quantile exclude each other")
    model, recipe, folder = _open(target, env, algo, sigma, noise, frame_stack, max_episode_steps, out, policy_kwargs, trust)
    statistic = "success" if success_at is not None else "quantile" if quantile is not None else "mean"
    certificate = certify_policy(
        model,
        recipe,
        _budgets(budgets),
        episodes,
        alpha=alpha,
        method=method,
        statistic=statistic,
        success_at=success_at,
        quantile=quantile,
        return_low=return_low,
        return_high=return_high,
        simultaneous=not pointwise,
        until=None if until is None else _until(until),
        deterministic=not stochastic,
        seed=seed,
        n_workers=workers,
        chunk_size=chunk_size,
        out=folder / "chunks" / f"certify-seed{seed}{'-stochastic' if stochastic else ''}",
        progress_bar=True,
    )
    certificate.save(folder / "certificate.json")
    certificate.plot(folder / "certificate.png")
    log_certificate(folder / "tb", certificate, hparams=_hparams(target, recipe))
    print(certificate.table())
    print("not covered:", *certificate.not_covered, sep="\n  - ")
    print(f"certificate: {folder / 'certificate.json'}   figure: {folder / 'certificate.png'}   TensorBoard: {folder / 'tb'}")


@app.command()
def attack(
    target: Target,
    budget: Annotated[
        str, typer.Option(help="Episode budget(s) in l2, LOW:HIGH:COUNT or numbers separated by commas.")
    ] = "0.6",
    attack_name: Annotated[str, typer.Option("--attack", help="pgd (the paper's) or flip (minimal-norm flips).")] = "pgd",
    threshold: Annotated[float, typer.Option(help="Attack only towards actions whose score is this much lower.")] = 0.0,
    draws: Annotated[int, typer.Option(help="Noise samples the attacker averages over.")] = 128,
    episodes: Annotated[int, typer.Option(help="Number of episodes.")] = 200,
    env: EnvId = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    max_episode_steps: Horizon = None,
    return_high: Annotated[float | None, typer.Option(help="Sure upper bound of the return.")] = None,
    alpha: Alpha = 0.05,
    stochastic: Stochastic = False,
    seed: Seed = 1,
    workers: Workers = 1,
    out: Out = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Attack a policy adaptively with a whole-episode budget, and compare with its certificate if there is one."""
    from robustrl.api import attack_policy
    from robustrl.certify.certificate import EpisodeCertificate
    from robustrl.report.attack import attack_table, save_reports
    from robustrl.report.figures import certificate_figure, save_figure
    from robustrl.report.tensorboard import log_certificate
    from robustrl.threat import ThreatModel

    model, recipe, folder = _open(target, env, algo, sigma, noise, frame_stack, max_episode_steps, out, policy_kwargs, trust)
    attacker, path = _attack(attack_name, threshold, draws), folder / "certificate.json"
    certificate = EpisodeCertificate.load(path) if path.exists() else None
    if certificate is not None and certificate.statistic != "mean":
        certificate = None
    kind = "-stochastic" if stochastic else ""
    reports = [
        attack_policy(
            model,
            recipe,
            attacker,
            ThreatModel(norm=2, episode=float(b)),
            episodes,
            certificate=certificate,
            return_high=return_high,
            alpha=alpha,
            deterministic=not stochastic,
            seed=seed,
            n_workers=workers,
            out=folder / "chunks" / f"attack-{attack_name}-{b:.12g}-threshold{threshold:.12g}-draws{draws}-seed{seed}{kind}",
            progress_bar=True,
        )
        for b in _budgets(budget)
    ]
    save_reports(folder / "attack.json", reports)
    print(attack_table(reports))
    if certificate is not None:
        save_figure(certificate_figure(certificate, reports), folder / "certificate.png")
        log_certificate(folder / "tb", certificate, reports, hparams=_hparams(target, recipe))
        print(f"figure: {folder / 'certificate.png'}")
    print(f"report: {folder / 'attack.json'}")


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(help="Run directory or certificate file.")],
    model: Annotated[
        Path | None, typer.Option(help="Run directory or zip to replay episodes with; default the run beside it.")
    ] = None,
    replay: Annotated[int, typer.Option(help="Chunks to replay.")] = 2,
    algo: Algo = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Recompute a certificate from its evidence; with the model, replay random chunks of its episodes."""
    from robustrl.api import load_agent, verify_certificate

    if certificate.is_dir():
        certificate = certificate / "certificate.json"
    if not certificate.exists():
        raise FileNotFoundError(f"no certificate {certificate}")
    beside = certificate.parent
    if model is None and (beside / "model.zip").exists() and (beside / "run.json").exists():
        model = beside
    kwargs = _json(policy_kwargs)
    agent = None if model is None else load_agent(model, algo=algo, policy_kwargs=kwargs, trust=trust)
    result = verify_certificate(certificate, agent, replay=replay)
    print(f"verified: {result}")
    print(result.certificate.table() if hasattr(result.certificate, "table") else result.certificate)


@app.command()
def plot(
    target: Annotated[Path, typer.Argument(help="Run directory or certificate file.")],
    out: Annotated[
        Path | None, typer.Option(help="Figure to write (.png, .pdf, .svg); default certificate.png beside it.")
    ] = None,
) -> None:
    """Draw the certified curve, with the attacks stored beside it."""
    from robustrl.certify.certificate import EpisodeCertificate
    from robustrl.report.attack import load_reports
    from robustrl.report.figures import certificate_figure, save_figure

    path = target / "certificate.json" if target.is_dir() else target
    certificate = EpisodeCertificate.load(path)
    attacks = path.parent / "attack.json"
    reports = load_reports(attacks) if attacks.exists() and certificate.statistic == "mean" else []
    figure = out or path.parent / "certificate.png"
    save_figure(certificate_figure(certificate, reports), figure)
    print(f"figure: {figure}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    workers: Workers = 2,
    episodes: Annotated[int, typer.Option(help="Episodes to certify.")] = 10_000,
    attack_episodes: Annotated[int, typer.Option(help="Episodes per attacked budget.")] = 100,
    timesteps: Annotated[int | None, typer.Option(help="Training steps; default the preset's.")] = None,
) -> None:
    """Train, certify, attack and verify a smoothed CartPole agent; a few minutes."""
    if not (out / "model.zip").exists():
        print("1/4 training PPO on CartPole-v1 under Gaussian noise, sigma 0.2")
        train(env="CartPole-v1", out=out, sigma=0.2, max_episode_steps=200, timesteps=timesteps)
    else:
        print(f"1/4 {out} holds a trained model; using it")
    print(f"2/4 certifying {episodes} episodes")
    certify(out, episodes=episodes, workers=workers)
    print("3/4 attacking at 5 budgets")
    attack(out, budget="0.2:1:5", attack_name="flip", episodes=attack_episodes, workers=workers)
    print("4/4 verifying the certificate")
    verify(out / "certificate.json")
    for name in ("certificate.json", "certificate.png", "attack.json", "tb"):
        print(f"  {out / name}")


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit status 2."""
    if sys.argv[1:] == []:
        sys.argv.append("--help")
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED  # what newer typers return
    except Exception as error:
        if app_state["debug"]:
            raise
        # Typer brings a click of its own or uses the installed one; a usage error of either knows its message.
        text = error.format_message() if hasattr(error, "format_message") else f"{type(error).__name__}: {error}"
        _fail(" ".join(text.split()), 2)
    if status == INTERRUPTED:
        _fail("interrupted; certify and attack go on from their finished chunks when repeated, train starts again", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"robustrl: {message}", file=sys.stderr)
    sys.exit(status)


def _open(
    target: Path,
    env: str | None,
    algo: str | None,
    sigma: float | None,
    noise: str | None,
    frame_stack: int | None,
    max_episode_steps: int | None,
    out: Path | None,
    policy_kwargs: str | None,
    trust: bool,
) -> tuple[Any, Any, Path]:
    """Model, environment recipe and output folder of a run directory or zip."""
    from robustrl.api import load_agent
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.training.run_files import RunInfo

    if not target.exists():
        raise FileNotFoundError(f"no run directory or model file {target}")
    base: Any = env
    if target.is_dir() and env is None:
        base = RunInfo.load(target).env
    if base is None:
        raise ValueError("a plain model file needs --env (and --sigma or --noise)")
    recipe = EnvRecipe.of(base, noise=_noise(sigma, noise), frame_stack=frame_stack, max_episode_steps=max_episode_steps)
    model = load_agent(target, recipe, algo=algo, policy_kwargs=_json(policy_kwargs), trust=trust)
    return model, recipe, out or (target if target.is_dir() else Path("runs") / target.stem)


def _noise(sigma: float | None, text: str | None) -> Noise | None:
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
    numbers = [_number("--noise", part) for part in rest.split(",")]
    try:
        return kinds[name.lower()](*numbers)
    except TypeError:
        raise ValueError(f"--noise {text!r}: {name} does not take {len(numbers)} parameter(s)") from None


def _budgets(text: str) -> list[float]:
    import numpy as np

    parts = text.split(":")
    if len(parts) == 3:
        low, high = _number("--budgets", parts[0]), _number("--budgets", parts[1])
        if not math.isfinite(high - low) or not parts[2].isdecimal() or int(parts[2]) < 1:
            raise ValueError(f"--budgets must be LOW:HIGH:COUNT with finite bounds and an integer COUNT >= 1, got {text!r}")
        # rounded so that 0.6 reads 0.6 and not 0.6000000000000001
        return [float(f"{b:.12g}") for b in np.linspace(low, high, int(parts[2]))]
    if len(parts) != 1:
        raise ValueError(f"--budgets must be LOW:HIGH:COUNT or numbers separated by commas, got {text!r}")
    return [_number("--budgets", part) for part in text.split(",")]


def _until(text: str) -> tuple[float, float]:
    value, separator, budget = text.partition("@")
    if not separator:
        raise ValueError(f"--until must be VALUE@BUDGET, got {text!r}")
    return _number("--until", value), _number("--until", budget)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number") from None


def _json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--policy-kwargs must be a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"--policy-kwargs must be a JSON object, got {text!r}")
    return value


def _attack(name: str, threshold: float, draws: int) -> Any:
    from robustrl.attacks import MinimalFlip, SmoothedPGD

    kinds: dict[str, Any] = {"pgd": SmoothedPGD, "flip": MinimalFlip}
    if name not in kinds:
        raise ValueError(f"--attack must be one of {', '.join(kinds)}, got {name!r}")
    return kinds[name](threshold=threshold, draws=draws)


def _hparams(target: Path, recipe: Any) -> dict[str, Any]:
    from robustrl.training.run_files import RunInfo

    known = {"env": recipe.label, "noise": str(recipe.noise), "frame_stack": recipe.frame_stack, "horizon": recipe.horizon}
    if target.is_dir():
        run = RunInfo.load(target)
        known |= {"algo": run.algo, "seed": run.seed, "timesteps": run.timesteps, **run.hyperparameters}
    return known
