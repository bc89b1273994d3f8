"""The command line: parses, calls `robustrl.api`, renders; no logic.

Heavy imports happen inside the commands, so that `robustrl --help` is quick.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from robustrl import cli_deterministic, cli_exploration, cli_inputs, cli_training
from robustrl.options import (
    Algo,
    Alpha,
    Engine,
    EnvId,
    EnvKwargs,
    FrameStack,
    Horizon,
    NoiseText,
    NormalizationFile,
    Out,
    PolicyKwargs,
    Ray,
    Seed,
    Sigma,
    Stochastic,
    Target,
    Trust,
    Workers,
    default_attack,
    describe_run,
    engine_suffix,
    make_attack,
    make_executor,
    make_threats,
    open_model,
    parse_budgets,
    parse_noise,
    parse_object,
    parse_until,
    read_normalization,
)

app = typer.Typer(
    name="robustrl",
    help="Train, certify, attack and verify reinforcement-learning policies whose observations may be tampered with.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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

app.command()(cli_training.train)
app.command()(cli_training.denoise)
app.command()(cli_training.distil)


@app.command()
def certify(
    target: Target,
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    episodes: Annotated[int, typer.Option(help="Number of episodes, fixed beforehand.")] = 10_000,
    budgets: Annotated[
        str, typer.Option("--budgets", "--budget", help="LOW:HIGH:COUNT, or numbers separated by commas.")
    ] = "0:1:11",
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
    ray: Ray = None,
    engine: Engine = "auto",
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
    changes = {
        "noise": parse_noise(sigma, noise),
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    folder = out or (target if target.is_dir() else Path("runs") / target.stem)
    statistic = "success" if success_at is not None else "quantile" if quantile is not None else "mean"
    with make_executor(ray) as executor:
        certificate = certify_policy(
            model,
            recipe,
            parse_budgets(budgets),
            episodes,
            alpha=alpha,
            method=method,
            statistic=statistic,
            success_at=success_at,
            quantile=quantile,
            return_low=return_low,
            return_high=return_high,
            simultaneous=not pointwise,
            until=None if until is None else parse_until(until),
            deterministic=not stochastic,
            seed=seed,
            n_workers=workers,
            executor=executor,
            engine=engine,
            chunk_size=chunk_size,
            out=folder / "chunks" / f"certify-seed{seed}{'-stochastic' if stochastic else ''}{engine_suffix(engine)}",
            progress_bar=True,
        )
    certificate.save(folder / "certificate.json")
    certificate.plot(folder / "certificate.png")
    log_certificate(folder / "tb", certificate, hparams=describe_run(target, recipe))
    print(certificate.table())
    print("not covered:", *certificate.not_covered, sep="\n  - ")
    print(f"certificate: {folder / 'certificate.json'}   figure: {folder / 'certificate.png'}   TensorBoard: {folder / 'tb'}")


@app.command()
def attack(
    target: Target,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "--budgets",
            help="Episode budget(s) (radius per step for norm inf), LOW:HIGH:COUNT or numbers separated by commas; default 0.6, or none "
            "with --epsilon.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Radius per step in any norm, without --budget or on top of it (norm 0: entries of a frame)."),
    ] = None,
    attack_name: Annotated[
        str | None,
        typer.Option(
            "--attack",
            help="For discrete actions pgd (the paper's), flip (minimal-norm flips), margin or fgsm; mad (largest change of the action) or "
            "critic (lowest value) for any; square (by answers alone), random (noise) and more: docs/methods/attacks.md, "
            "robustrl.attacks.ATTACKS. Default pgd, or mad for continuous actions.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="fast or strong: many attacks in place of one; strong also trains adversaries (SA-RL, PA-AD, Robust Sarsa)."
        ),
    ] = None,
    adversary_timesteps: Annotated[
        int, typer.Option(help="--suite strong: training steps of each adversary, 0 for none.")
    ] = 100_000,
    norm: Annotated[str, typer.Option(help="Norm of the budget: 2, 1, 0 (altered frames) or inf.")] = "2",
    threshold: Annotated[
        float | None, typer.Option(help="pgd and flip: attack only towards actions whose score is this much lower.")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Noise samples the attacker averages over; default the attack's.")] = None,
    episodes: Annotated[int, typer.Option(help="Number of episodes.")] = 200,
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    return_high: Annotated[float | None, typer.Option(help="Sure upper bound of the return.")] = None,
    success_at: Annotated[
        float | None,
        typer.Option(help="Report the probability of a return of at least this; default what the certificate says."),
    ] = None,
    alpha: Alpha = 0.05,
    stochastic: Stochastic = False,
    seed: Seed = 1,
    workers: Workers = 1,
    ray: Ray = None,
    engine: Engine = "auto",
    out: Out = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Attack a policy adaptively, with a budget for the episode, a radius per step (--norm inf, --epsilon) or both.

    Compares with its certificate if there is one.
    """
    from dataclasses import replace

    from robustrl.api import attack_policy
    from robustrl.certify.episode import EpisodeCertificate
    from robustrl.envs.units import frame_units
    from robustrl.files import save_figure
    from robustrl.report.attack import attack_table, save_reports
    from robustrl.report.figures import certificate_figure, suite_figure
    from robustrl.report.tensorboard import log_attacks, log_certificate
    from robustrl.suite import attack_suite

    changes = {
        "noise": parse_noise(sigma, noise),
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    folder = out or (target if target.is_dir() else Path("runs") / target.stem)
    if suite is not None and (attack_name, threshold, draws) != (None, None, None):
        raise ValueError("--suite has attacks of its own: leave out --attack, --threshold and --draws")
    label = attack_name or default_attack(recipe)
    attacker, path = make_attack(label, threshold, draws), folder / "certificate.json"
    certificate = EpisodeCertificate.load(path) if path.exists() else None
    if certificate is not None and certificate.statistic == "quantile":
        certificate = None
    kind = ("-stochastic" if stochastic else "") + engine_suffix(engine)
    name = "-".join(f"{part}" for part in (attack_name or "default", f"norm{norm}", f"threshold{threshold}", f"draws{draws}"))
    with make_executor(ray) as executor:
        settings = {
            "certificate": certificate,
            "return_high": return_high,
            "success_at": success_at,
            "alpha": alpha,
            "deterministic": not stochastic,
            "seed": seed,
            "n_workers": workers,
            "executor": executor,
            "engine": engine,
        }
        threats = make_threats(norm, budget, epsilon, frame_units(recipe))
        chunks = folder / "chunks"
        if suite is None:
            reports = [
                replace(
                    attack_policy(
                        *(model, recipe, attacker, threat, episodes),
                        **settings,
                        out=chunks / f"attack-{name}-{limit}-seed{seed}{kind}",
                        progress_bar=True,
                    ),
                    label=label,
                )
                for limit, threat in threats.items()
            ]
        else:
            reports = []
            for limit, threat in threats.items():
                reports += attack_suite(
                    *(model, recipe, [threat], suite, episodes),
                    **settings,
                    adversary_timesteps=adversary_timesteps,
                    out=chunks / f"suite-norm{norm}-{limit}-seed{seed}{kind}",
                    on_report=lambda report: print(f"budget {report.budget:g}  {report.name}: {report.mean:.6g}", flush=True),
                    on_skip=lambda label, reason: print(f"  left out: {label} ({reason})", flush=True),
                )
    save_reports(folder / "attack.json", reports)
    print(attack_table(reports))
    if suite is not None:
        save_figure(suite_figure(reports, certificate, f"{recipe.label}, {suite} suite"), folder / "attacks.png")
        log_attacks(folder / "tb", reports)
        print(f"figure: {folder / 'attacks.png'}")
    if certificate is not None:
        save_figure(certificate_figure(certificate, reports), folder / "certificate.png")
        log_certificate(folder / "tb", certificate, reports, hparams=describe_run(target, recipe))
        print(f"figure: {folder / 'certificate.png'}")
    print(f"report: {folder / 'attack.json'}")


@app.command()
def verify(
    certificate: Annotated[
        Path, typer.Argument(help="Run directory, certificate file, trace.json, or folder of certify-images.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="Run directory or zip to replay episodes with; default the run beside it.")
    ] = None,
    replay: Annotated[int, typer.Option(help="Chunks to replay.")] = 2,
    algo: Algo = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Recompute a certificate from its evidence; with the model, replay random chunks of its episodes."""
    from robustrl.api import load_agent
    from robustrl.certify.certificate import Certificate
    from robustrl.certify.deterministic import DeterministicCertificate
    from robustrl.certify.episode import EpisodeCertificate
    from robustrl.classifiers import EVIDENCE, verify_images
    from robustrl.verification import verify_certificate

    if (certificate / EVIDENCE).exists():
        report = verify_images(certificate)
        print(f"verified: the radii of all {len(report)} inputs follow from their evidence\n{report.table()}")
        return
    if certificate.name == "trace.json":
        from robustrl.rollouts.trace import RadiusTrace

        print(f"verified: every step's radius follows from its evidence\n{RadiusTrace.load(certificate).table()}")
        return
    if certificate.is_dir():
        certificate = certificate / "certificate.json"
    if not certificate.exists():
        raise FileNotFoundError(f"no certificate {certificate}")
    beside = certificate.parent
    replayable = isinstance(Certificate.load(certificate), EpisodeCertificate | DeterministicCertificate)
    if replayable and model is None and (beside / "model.zip").exists() and (beside / "run.json").exists():
        model = beside
    kwargs = parse_object("--policy-kwargs", policy_kwargs)
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
    from robustrl.certify.episode import EpisodeCertificate
    from robustrl.files import save_figure
    from robustrl.report.attack import load_reports
    from robustrl.report.figures import certificate_figure

    path = target / "certificate.json" if target.is_dir() else target
    if not path.exists():
        raise FileNotFoundError(f"no certificate {path}: {_instead(path.parent)}")
    certificate = EpisodeCertificate.load(path)
    attacks = path.parent / "attack.json"
    reports = load_reports(attacks) if attacks.exists() and certificate.statistic != "quantile" else []
    figure = out or path.parent / "certificate.png"
    save_figure(certificate_figure(certificate, reports), figure)
    print(f"figure: {figure}")


def _instead(folder: Path) -> str:
    """What a folder without a certificate of episodes holds, and what to do with it."""
    known = {
        "log.tsv": "the folder holds certificates of inputs, which certify-images has drawn in accuracy.png",
        "trace.json": "the folder holds the trace of an episode, which trace has drawn in trace.png",
        "model.zip": f"the folder holds a model, run robustrl certify {folder} first",
    }
    return next((text for name, text in known.items() if (folder / name).exists()), "run robustrl certify first")


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
        cli_training.train(env="CartPole-v1", out=out, sigma=0.2, max_episode_steps=200, timesteps=timesteps)
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


app.command()(cli_deterministic.certify_deterministic)
app.command()(cli_inputs.trace)
app.command()(cli_inputs.certify_images)
app.command()(cli_exploration.explore)


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit status 2."""
    warnings.formatwarning = lambda message, *_, **__: f"robustrl: warning: {message}\n"
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
        _fail(
            "interrupted; certify, attack and certify-images go on where they were when repeated, others start again",
            INTERRUPTED,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"robustrl: {message}", file=sys.stderr)
    sys.exit(status)
