"""The command about certificates of deterministic policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustrl.options import (
    Algo,
    Alpha,
    EnvId,
    EnvKwargs,
    FrameStack,
    Horizon,
    NormalizationFile,
    Out,
    PolicyKwargs,
    Seed,
    Target,
    Trust,
    describe_run,
    open_model,
    parse_budgets,
    parse_number,
    parse_object,
    read_normalization,
)


def certify_deterministic(
    target: Target,
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    frame_stack: FrameStack = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    epsilons: Annotated[
        str | None,
        typer.Option(
            "--epsilons", "--epsilon", help="Radii per step, LOW:HIGH:COUNT or numbers separated by commas; default 0:0.1:11."
        ),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", "--budget", help="Budgets of a whole episode instead, the same way.")
    ] = None,
    norm: Annotated[str, typer.Option(help="1, 2 or inf (inf: per step only).")] = "2",
    method: Annotated[
        str,
        typer.Option(help="tree (search in copies of the environment), prefix or constancy (the clean episode alone)."),
    ] = "tree",
    episodes: Annotated[int, typer.Option(help="Number of episodes, fixed beforehand.")] = 100,
    nodes: Annotated[int, typer.Option(help="Most states that are searched of one episode.")] = 10_000,
    reward_low: Annotated[float | None, typer.Option(help="Sure lower bound of the reward of a step.")] = None,
    return_low: Annotated[float | None, typer.Option(help="Sure lower bound of the return of an episode.")] = None,
    never_ends_early: Annotated[
        bool, typer.Option("--never-ends-early", help="Every episode has all its steps, whatever happens.")
    ] = False,
    alpha: Alpha = 0.05,
    seed: Seed = 0,
    out: Out = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Certify the return of a policy without noise, from the Lipschitz constant of its network."""
    from robustrl.report.tensorboard import log_certificate
    from robustrl.rollouts.deterministic import certify_deterministic as run

    if epsilons is not None and budgets is not None:
        raise ValueError("--epsilons (per step) and --budgets (per episode) exclude each other")
    changes = {
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    folder = out or (target if target.is_dir() else Path("runs") / target.stem)
    certificate = run(
        model,
        recipe,
        parse_budgets(budgets or epsilons or "0:0.1:11"),
        per="step" if budgets is None else "episode",
        norm=parse_number("--norm", norm),
        method=method,
        episodes=episodes,
        alpha=alpha,
        nodes=nodes,
        reward_low=reward_low,
        return_low=return_low,
        never_ends_early=never_ends_early,
        seed=seed,
        progress_bar=True,
    )
    file = folder / "deterministic.json"
    certificate.save(file)
    certificate.plot(file.with_suffix(".png"))
    log_certificate(folder / "tb", certificate, hparams=describe_run(target, recipe), name="deterministic")
    print(certificate.table())
    print("not covered:", *certificate.not_covered, sep="\n  - ")
    print(f"certificate: {file}   figure: {file.with_suffix('.png')}   TensorBoard: {folder / 'tb'}")
