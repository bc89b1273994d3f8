"""The commands that train: policies, denoisers before them, and students of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustrl.options import (
    Activation,
    Algo,
    EnvId,
    EnvKwargs,
    FrameStack,
    Horizon,
    Network,
    NoiseText,
    NormalizationFile,
    PolicyKwargs,
    Seed,
    Sigma,
    Target,
    Trust,
    open_model,
    parse_noise,
    parse_object,
    parse_training_attack,
    read_normalization,
)


def train(
    env: Annotated[str, typer.Option("--env", help="Gymnasium id.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    algo: Annotated[str, typer.Option(help="ppo, a2c, dqn, sac, td3, ddpg, recurrent_ppo, sa-ppo or sa-dqn.")] = "ppo",
    env_kwargs: EnvKwargs = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Learn and freeze a normalisation of observations; default the preset's.")
    ] = None,
    max_episode_steps: Horizon = None,
    timesteps: Annotated[int | None, typer.Option(help="Environment steps; default the preset's.")] = None,
    n_envs: Annotated[int | None, typer.Option(help="Environments side by side; default the preset's.")] = None,
    hyperparameters: Annotated[
        str | None, typer.Option(help="Keyword arguments of the algorithm as JSON, in place of the preset's.")
    ] = None,
    attack_name: Annotated[
        str | None,
        typer.Option(
            "--attack",
            help="Train any algorithm against an attack on every step within --epsilon: a name as for robustrl attack, or learned "
            "(ATLA: a rival that learns too; ppo, a2c, recurrent_ppo and sa-ppo).",
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="sa-ppo, sa-dqn, --attack: radius per step, in units of the (normalised) observations."),
    ] = None,
    kappa: Annotated[float | None, typer.Option(help="sa-ppo, sa-dqn: weight of the robustness term.")] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="sa-ppo, sa-dqn, --attack: norm of --epsilon, inf (the default), 2 or 1; --attack also 0."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="sa-ppo, sa-dqn: sgld or pgd (gradient ascent), fgsm-rs or n-fgsm (one step), ibp (an upper bound), or radial."
        ),
    ] = None,
    robust: Annotated[
        str | None,
        typer.Option(
            help="fgsm-rs, n-fgsm or pgd: ppo and dqn become sa-ppo and sa-dqn with this attack within --epsilon (required), and the weights "
            "are kept that do best under PGD. Not with --attack."
        ),
    ] = None,
    network: Network = None,
    activation: Activation = None,
    seed: Seed = 0,
    verbose: Annotated[int, typer.Option(help="SB3's verbosity.")] = 0,
) -> None:
    """Train a policy on noisy observations into a run directory."""
    from robustrl.envs.recipe import EnvRecipe
    from robustrl.training.train import train as run

    recipe = EnvRecipe.of(
        env,
        noise=parse_noise(sigma, noise),
        frame_stack=frame_stack,
        max_episode_steps=max_episode_steps,
        env_kwargs=parse_object("--env-kwargs", env_kwargs),
    )
    attacked = parse_training_attack(attack_name, recipe, norm, epsilon, normalize)
    term = {"epsilon": epsilon, "kappa": kappa, "norm": norm, "loss": loss}
    if attack_name is not None and not algo.startswith("sa"):
        term = {"kappa": kappa, "loss": loss}
    arguments = parse_object("--hyperparameters", hyperparameters) or {}
    run(
        recipe,
        out,
        algo=algo,
        timesteps=timesteps,
        seed=seed,
        n_envs=n_envs,
        normalize=normalize,
        hyperparameters=arguments | {name: value for name, value in term.items() if value is not None},
        **attacked,
        robust=robust,
        network=network,
        activation=activation,
        progress_bar=True,
        verbose=verbose,
    )
    against = {"robust": robust, "attack": attack_name, "epsilon": epsilon, "norm": norm}
    told = "".join(f", {name} {value}" for name, value in against.items() if value is not None)
    print(f"trained {algo} on {recipe.label}, noise {recipe.noise}{told}: {out / 'model.zip'}")
    if recipe.noise is not None:
        print(f"next: robustrl certify {out}")


def denoise(
    target: Target,
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    sigma: Sigma = None,
    noise: NoiseText = None,
    frame_stack: FrameStack = None,
    history: Annotated[
        int | None,
        typer.Option(help="Frames that the denoiser sees, if more than the policy takes."),
    ] = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    objective: Annotated[
        str,
        typer.Option(
            help="mse, stability, or query (stability through surrogates of a policy that is only asked for actions)."
        ),
    ] = "mse",
    rounds: Annotated[int, typer.Option(help="How often observations are gathered.")] = 1,
    observations: Annotated[int, typer.Option(help="Clean observations per round.")] = 20_000,
    clean_share: Annotated[
        float, typer.Option(help="Part of the observations that comes from the clean agent, not from the smoothed one.")
    ] = 0.0,
    updates: Annotated[int, typer.Option(help="Gradient steps per round.")] = 1_000,
    evaluate_episodes: Annotated[
        int, typer.Option(help="Smoothed episodes per candidate; that of the highest mean return is kept. 0: the last one.")
    ] = 200,
    seed: Seed = 0,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Train a denoiser for a policy that stays as it is, into a run directory that can be certified under the noise."""
    from dataclasses import replace

    from robustrl.training.denoise import denoise_run
    from robustrl.training.run_files import RunInfo

    changes = {
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    mechanism = parse_noise(sigma, noise)
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    if mechanism is not None:  # in place of the noise that the policy was trained under, if any
        recipe = replace(recipe, noise=mechanism)
    settings = {
        "objective": objective,
        "history": history,
        "rounds": rounds,
        "observations": observations,
        "clean_share": clean_share,
        "updates": updates,
        "evaluate_episodes": evaluate_episodes,
    }
    file = target / "model.zip" if target.is_dir() else target if target.exists() else target.with_suffix(".zip")
    denoise_run(file, model, recipe, out, seed=seed, progress_bar=True, **settings)
    print(f"denoised {target} on {recipe.label}, noise {recipe.noise}: {out}; the policy's weights are the same bit by bit")
    returns = RunInfo.load(out).denoiser["mean_returns"]
    if returns:
        after, best = max(returns, key=lambda row: row[1])
        print(
            f"mean return of {evaluate_episodes} smoothed episodes: {returns[0][1]:.4g} at first, {best:.4g} after {after} updates"
        )
    print(f"next: robustrl certify {out}")


def distil(
    target: Target,
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    env: EnvId = None,
    env_kwargs: EnvKwargs = None,
    algo: Algo = None,
    frame_stack: FrameStack = None,
    normalization: NormalizationFile = None,
    max_episode_steps: Horizon = None,
    network: Annotated[
        str,
        typer.Option(help="same as the teacher's, mlp (Stable-Baselines3's own), lipschitz-mlp or lipschitz-cnn (pictures)."),
    ] = "same",
    activation: Activation = None,
    epsilon: Annotated[float, typer.Option(help="Radius per step of the attack that the student learns under.")] = 0.1,
    norm: Annotated[str | None, typer.Option(help="Norm of --epsilon: inf (the default) or 2.")] = None,
    attack_name: Annotated[
        str, typer.Option("--attack", help="n-fgsm (reaches three times as far as --epsilon), fgsm-rs, pgd or none.")
    ] = "n-fgsm",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the teacher's scores; default 1 for logits, the median lead of the best action for action values."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="How often observations are gathered; by the teacher first, then by the student.")
    ] = 4,
    observations: Annotated[int, typer.Option(help="Observations per round.")] = 10_000,
    attacked_share: Annotated[float, typer.Option(help="Part of them from episodes in which the actor is attacked.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Passes over the observations per round, twice as many in the last one.")] = 5,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest; default 0.005, and 0.02 for Lipschitz networks.")
    ] = None,
    seed: Seed = 0,
    policy_kwargs: PolicyKwargs = None,
    trust: Trust = False,
) -> None:
    """Distil a dqn, ppo or a2c policy into a new network that does the same under attack, into a run directory."""
    from gymnasium import spaces

    from robustrl.training.distil import distil_run
    from robustrl.training.run_files import RunInfo
    from robustrl.training.supervised import Cloning

    changes = {
        "frame_stack": frame_stack,
        "normalization": read_normalization(normalization, trust),
        "max_episode_steps": max_episode_steps,
        "env_kwargs": parse_object("--env-kwargs", env_kwargs),
    }
    model, recipe = open_model(target, env, algo, changes, policy_kwargs, trust)
    settings = {
        "network": network,
        "activation": activation,
        "epsilon": epsilon,
        "norm": norm,
        "attack": attack_name,
        "temperature": temperature,
        "rounds": rounds,
        "observations": observations,
        "attacked_share": attacked_share,
        "epochs": epochs,
        "learning_rate": learning_rate,
    }
    distil_run(model, recipe, out, seed=seed, progress_bar=True, **settings)
    shares = RunInfo.load(out).hyperparameters["distilled"]["agreement"]
    print(f"distilled {target} on {recipe.label} with {attack_name}, epsilon {epsilon:g}: {out / 'model.zip'}")
    if shares:
        discrete = isinstance(recipe.action_space, spaces.Discrete)
        does = (
            "does what its teacher does" if discrete else f"acts within {Cloning().tolerance:g} of its teacher in every entry"
        )
        print("held-out observations on which it {}: {clean:.1%}, {pgd:.1%} under PGD".format(does, **shares[-1]))
    print(f"next: robustrl attack {out} --norm {norm or 'inf'} --epsilon {epsilon:g}")
