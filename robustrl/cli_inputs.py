"""Commands about single inputs: steps of an episode, pictures of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustrl.options import (
    Algo,
    EnvId,
    EnvKwargs,
    FrameStack,
    Horizon,
    NoiseText,
    NormalizationFile,
    Out,
    PolicyKwargs,
    Seed,
    Sigma,
    Target,
    Trust,
    open_model,
    parse_noise,
    parse_number,
    parse_object,
    read_normalization,
)

METHOD_NAMES = (
    "one-sided, two-sided, second-order, second-order-pairs, dipole, splitting (for DeterministicSplitting noise), or lipschitz (without "
    "noise, for networks of layers with known Lipschitz constants)"
)
Copies = Annotated[int, typer.Option("--n", help="Noisy copies of each input that give the evidence.")]
ChoosingCopies = Annotated[int, typer.Option("--n0", help="Noisy copies of each input that choose the class.")]


def trace(
    target: Target,
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    alpha: Annotated[float, typer.Option(help="Failure probability of all steps together.")] = 0.05,
    n: Copies = 1000,
    n0: ChoosingCopies = 100,
    method: Annotated[str, typer.Option(help=f"{METHOD_NAMES}.")] = "one-sided",
    seed: Seed = 0,
    out: Out = None,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Play one episode by majority vote (lipschitz: greedily) and certify every action; writes trace.json and trace.png."""
    from dataclasses import replace

    from robustrl.agents import MajorityVoteAgent
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.rollouts.trace import radius_trace

    changes = {
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    folder = out or (target if target.is_dir() else Path("runs") / target.stem)
    if (folder / "trace.json").exists():
        raise FileExistsError(f"{folder} already holds a trace; choose another --out, or delete it")
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    recipe = EnvRecipe.of(recipe, noise=parse_noise(sigma, noise))  # a second noise is refused
    chosen = recipe.noise
    if method == "lipschitz":
        if chosen is not None:
            raise ValueError(f"--method lipschitz certifies a policy without noise, but this one acts under {chosen}")
    elif chosen is None:
        raise ValueError("--sigma or --noise must be given: the run has no noise of its own")
    agent = recipe.view(model) if chosen is None else MajorityVoteAgent(recipe.view(model), chosen, seed=seed)
    found = radius_trace(agent, replace(recipe, noise=None), alpha=alpha, n0=n0, n=n, method=method, seed=seed, progress=True)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / "trace.json")
    found.plot(folder / "trace.png")
    print(found.table())
    print(f"trace: {folder / 'trace.json'}, {folder / 'trace.png'}")


def certify_images(
    model: Annotated[str, typer.Argument(help="package.module:callable that gives a torch module, or a TorchScript file.")],
    data: Annotated[
        Path, typer.Argument(help=".npz (x, y), .npy beside <name>_labels.npy, or a folder of pictures per class.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for log.tsv, evidence.jsonl and accuracy.png.")],
    weights: Annotated[Path | None, typer.Option(help="state_dict of the module.")] = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    n: Copies = 100_000,
    n0: ChoosingCopies = 100,
    alpha: Annotated[float, typer.Option(help="Failure probability of each certificate.")] = 0.001,
    alpha_total: Annotated[float | None, typer.Option(help="Of all certificates together, in place of --alpha.")] = None,
    method: Annotated[str, typer.Option(help=f"{METHOD_NAMES}, or values (with --bounds).")] = "one-sided",
    bounds: Annotated[
        tuple[float, float] | None, typer.Option(help="LOW HIGH: the range that scores are clipped to, for --method values.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="1, 2 or inf; default the noise's own, 2 without noise.")] = None,
    scale: Annotated[float | None, typer.Option(help="Divide inputs by this; default 255 for integers, 1 for floats.")] = None,
    skip: Annotated[int, typer.Option(help="Certify every so many inputs.")] = 1,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    trust: Annotated[bool, typer.Option("--trust", help="Load a TorchScript file, which is a program.")] = False,
) -> None:
    """Certify a classifier on labelled inputs; goes on where it was interrupted."""
    import sys

    from robustrl.classifiers import certify_images as run
    from robustrl.classifiers import load_classifier, load_images

    chosen = parse_noise(sigma, noise)
    if chosen is None and method != "lipschitz":
        raise ValueError("--sigma or --noise must be given")
    sys.path.insert(0, "")  # a module beside the data, as Python itself finds it
    place = parse_device(device)
    x, y = load_images(data, scale)
    report = run(
        load_classifier(model, weights, place, trust=trust),
        x,
        y,
        chosen,
        n0=n0,
        n=n,
        alpha=alpha,
        alpha_total=alpha_total,
        method=method,
        bounds=bounds,
        norm=None if norm is None else parse_number("--norm", norm),
        skip=skip,
        seed=seed,
        folder=out,
        device=place,
        progress=True,
    )
    report.plot(out / "accuracy.png")
    print(report.table())
    print(f"log: {out / 'log.tsv'}, evidence: {out / 'evidence.jsonl'}, figure: {out / 'accuracy.png'}")


def parse_device(text: str) -> str:
    """A device that is there, "auto" resolved; a torch import, so not for start-up."""
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"--device must be cpu, cuda, cuda:N or auto, got {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: torch sees {torch.cuda.device_count()} CUDA device(s) here")
    return text
