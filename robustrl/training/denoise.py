"""Train a denoiser for a policy that stays as it is: denoised smoothing.

Salman et al., "Denoised Smoothing: A Provable Defense for Pretrained Classifiers" (NeurIPS 2020), arXiv:2003.01908, for policies:
the data are the observations that the smoothed agent meets. No loss looks at returns, and a smaller one need not mean a better agent: of
the weights on the way, those are kept that the smoothed agent does best with.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import check_choice, check_count, check_positive, check_probability
from robustrl.files import write_atomically
from robustrl.networks import Denoiser, denoiser_for
from robustrl.noise import Gaussian, Noise
from robustrl.policy import PolicyView
from robustrl.policy.loading import ALGORITHMS
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.executor import build, one_thread
from robustrl.rollouts.progress import progress_bar as bar
from robustrl.seeding import integer_seed, torch_generator
from robustrl.training.gathering import Stacks, folded, gather
from robustrl.training.objectives import MSE, Objective, QueryOnly, Stability, set_rate
from robustrl.training.run_files import DENOISER, RunInfo

FIRST = 50
"""Updates before the first evaluation; the second comes after twice as many, and so on."""


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode inside; afterwards everything is as before, and the weights bit by bit.

    Raises:
        RuntimeError: if a weight changed.
    """
    layers = [(layer, layer.training) for module in modules for layer in module.modules()]
    parameters = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    try:
        for module in modules:
            module.eval().requires_grad_(False)
        yield
        for module, state in zip(modules, before, strict=True):
            for name, tensor in module.state_dict().items():
                if not torch.equal(tensor, state[name]):
                    raise RuntimeError(f"the policy was to stay frozen, but its {name} changed")
    finally:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
        for layer, flag in layers:
            layer.training = flag


def denoise(
    model: Any,
    env: Any,
    *,
    noise: Noise | None = None,
    objective: str | Objective = "mse",
    denoiser: Denoiser | None = None,
    history: int | None = None,
    sigmas: Sequence[float] | None = None,
    rounds: int = 1,
    observations: int = 20_000,
    clean_share: float = 0.0,
    updates: int = 1_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    evaluate_episodes: int = 200,
    on_candidate: Callable[[int, float, Denoiser], object] | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> Denoiser:
    """Train a denoiser for a frozen policy under the noise that it will be certified with.

    The policy and its normalisation stay as they are, bit for bit. `robustrl.agents.DenoisedAgent` puts the two together.

    Args:
        model: SB3 model or `PolicyView`, trained in whatever way.
        env: anything `EnvRecipe.of` takes.
        noise: if `env` does not say.
        objective: "mse", "stability", "query" (stability through surrogates that are fitted to queried actions), or an `Objective`.
        denoiser: what to train further, e.g. one that was trained for "mse", or of another size; default `denoiser_for` the data.
        history: frames that the denoiser sees, at least as many as the policy takes, which is the default. Certify with
            `frame_stack=history`.
        sigmas: noise levels to train for, one drawn per batch, instead of the recipe's Gaussian alone; use the result `at` one.
        rounds: how often data are gathered, by the smoothed agent behind the denoiser as it is by then. More of them narrow the data:
            a good agent's observations vary little, and the denoiser learns to show the policy little else.
        observations: clean observations per round; all rounds' are kept (in memory).
        clean_share: part of the observations that comes from the clean agent; it narrows the data too.
        updates: gradient steps of Adam per round.
        batch_size: observations per step.
        learning_rate: at the start; it falls to zero over all rounds.
        evaluate_episodes: smoothed episodes, the same for all, that every candidate plays greedily: the denoiser as it starts (the identity,
            unless `denoiser` is given), after 50, 100, 200, ... updates, and after each round. The highest mean return is kept.
            0 to keep the last weights, whatever their return.
        on_candidate: called with the updates so far, the mean return, and the denoiser, which must not be changed.
        seed: of rollouts, weights, batches, noise and evaluations, which have random numbers of their own: a certificate with any seed
            is as valid as for a policy that was not chosen.
        progress_bar: show a bar with an ETA.
    Returns:
        the denoiser, in evaluation mode, for the recipe's noise level.
    Warns:
        UserWarning: if no candidate did better than the denoiser as it started, which is then returned.
    Raises:
        ValueError: for bad arguments, or a policy that does not fit the environment.
        RuntimeError: if the loss is not finite.
    """
    recipe = EnvRecipe.of(env, noise=noise)
    if recipe.noise is None:
        raise ValueError("noise must be given: there is nothing to denoise; pass noise=, e.g. Gaussian(0.2) (--sigma 0.2)")
    check_count("rounds", rounds)
    check_count("observations", observations, least=2)
    share = float(check_probability("clean_share", clean_share))
    check_count("updates", updates)
    check_count("evaluate_episodes", evaluate_episodes, least=0)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    policy = recipe.view(model)
    job = make_job(policy, recipe, seed=seed)
    levels = _levels(recipe.noise, sigmas)
    loss_of = _objective(objective, policy)
    roots = np.random.SeedSequence(seed).spawn(2 * rounds + 3)
    noises, batches = torch_generator(roots[-2], policy.device), torch_generator(roots[-3])
    data: list[Stacks] = []
    n_frames = policy.n_frames if history is None else check_count("history", history, least=policy.n_frames)
    if denoiser is not None:
        policy.denoised(denoiser, n_frames)
    marks = {*(FIRST << i for i in range((rounds * updates).bit_length())), *range(updates, rounds * updates + 1, updates)}
    chain, root = replace(recipe, frame_stack=n_frames), integer_seed(roots[-1]) >> 1
    best = _Best(policy, chain, evaluate_episodes, root, job.engine, on_candidate)
    with one_thread(), frozen(policy, *loss_of.policies), bar("denoise", rounds * updates, visible=progress_bar) as advance:
        for done in range(rounds):
            smoothed = policy if denoiser is None else policy.denoised(denoiser, n_frames)
            clean_ones = math.ceil(observations * share)
            for actor, seen, n, origin in (
                (policy, replace(recipe, noise=None), clean_ones, roots[2 * done]),
                (smoothed, recipe, observations - clean_ones, roots[2 * done + 1]),
            ):
                if n:
                    data.append(gather(actor, seen, n, integer_seed(origin) >> 1, n_frames=n_frames, engine=job.engine))
            stacks = Stacks.joined(data)
            clean, noisy = stacks.pairs(torch.arange(len(stacks)), policy, recipe.noise, recipe.stack_padding, noises)
            if denoiser is None:
                inputs = folded(stacks.frames, policy)
                sigma = _level(recipe.noise, inputs, noisy.to(inputs.device))
                denoiser = denoiser_for(inputs, sigma, policy.observation_shape, seed=seed).to(policy.device)
            loss_of.prepare(torch.cat((clean, denoiser.newest(noisy))), seed)
            if done == 0:
                best.consider(denoiser, 0)
            optimizer = torch.optim.Adam(denoiser.parameters(), lr=learning_rate)
            for step in range(done * updates, (done + 1) * updates):
                denoiser.train()
                set_rate(optimizer, learning_rate * (1 - step / (rounds * updates)))
                rows = torch.randint(len(stacks), (batch_size,), generator=batches)
                level, mechanism = levels[int(torch.randint(len(levels), (1,), generator=batches))]
                clean, noisy = stacks.pairs(rows, policy, mechanism, recipe.stack_padding, noises)
                network = denoiser if level is None else denoiser.at(level)
                loss = loss_of(clean, network(noisy), batches)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance(1)
                if step + 1 in marks:
                    if not torch.isfinite(loss):
                        raise RuntimeError("the denoiser's loss is not finite: try a smaller learning_rate")
                    best.consider(denoiser, step + 1)
    assert denoiser is not None
    if evaluate_episodes:
        denoiser.load_state_dict(best.weights)
        if best.updates == 0:
            warnings.warn("no training raised the smoothed agent's mean return: the denoiser is as it started", stacklevel=2)
    return denoiser.eval()


@dataclass
class _Best:
    """The weights that the smoothed agent has done best with; the first of equals."""

    policy: PolicyView
    recipe: EnvRecipe
    episodes: int
    seed: int
    engine: str
    told: Callable[[int, float, Denoiser], object] | None
    value: float = -math.inf
    updates: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def consider(self, denoiser: Denoiser, updates: int) -> None:
        """Play the episodes, the same for every candidate."""
        if not self.episodes:
            return
        job = make_job(self.policy.denoised(denoiser, self.recipe.frame_stack), self.recipe, seed=self.seed, engine=self.engine)
        value = float(collect(job, self.episodes).returns.mean())
        if value > self.value:
            self.value, self.updates = value, updates
            self.weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        if self.told is not None:
            self.told(updates, value, denoiser)


def _levels(noise: Noise, sigmas: Sequence[float] | None) -> list[tuple[float | None, Noise]]:
    if sigmas is None:
        return [(None, noise)]
    if not sigmas:
        raise ValueError("sigmas must hold at least one noise level, got none")
    if not isinstance(noise, Gaussian) or isinstance(noise.sigma, tuple):
        raise ValueError(f"sigmas need Gaussian noise of a single sigma, got {noise}")
    return [(check_positive("sigmas", sigma), Gaussian(sigma)) for sigma in sigmas]


def _objective(objective: str | Objective, policy: PolicyView) -> Objective:
    if isinstance(objective, Objective):
        return objective
    name = check_choice("objective", objective, ("mse", "stability", "query"))
    return MSE() if name == "mse" else Stability(policy) if name == "stability" else QueryOnly(policy)


def _level(noise: Noise, clean: Tensor, noisy: Tensor) -> float:
    """Sigma of Gaussian noise; of any other its root mean square on the data."""
    if isinstance(noise, Gaussian) and isinstance(noise.sigma, float):
        return noise.sigma
    return float((noisy - clean).double().square().mean().sqrt())


def denoise_run(
    model_file: str | os.PathLike[str], model: Any, env: Any, out: str | os.PathLike[str], *, seed: int = 0, **options: Any
) -> Denoiser:
    """`denoise`, into a run directory that `certify`, `attack` and `verify` take: the model's file byte for byte, and a denoiser.

    Args:
        model_file: the SB3 zip.
        model: what was loaded from it.
        env: the recipe with the noise, and the frame stack that the policy itself takes.
        out: run directory; must not hold another model.
        seed: of everything.
        options: of `denoise`, recorded as plain data; so are the mean returns of the candidates, by number of updates.
    Raises:
        FileExistsError: if `out` already holds a model.
        TypeError: if the model is no SB3 model, or has a denoiser already.
    """
    folder, recipe = Path(out), EnvRecipe.of(env)
    if (folder / "model.zip").exists():
        raise FileExistsError(f"{folder} already holds a model; choose another --out, or delete it")
    name = type(model).__name__.lower()
    algo = next((known for known in ALGORITHMS if known.replace("_", "") == name), None)
    if algo is None:
        raise TypeError(
            f"model must be a Stable-Baselines3 model without a denoiser, got {type(model).__name__}; of a run with one, pass "
            "the run or zip that it was made from"
        )
    content = Path(model_file).read_bytes()
    returns: list[tuple[int, float]] = []
    denoiser = denoise(model, recipe, seed=seed, on_candidate=lambda done, found, _: returns.append((done, found)), **options)
    denoiser.save(folder / DENOISER)
    record = {"frame_stack": recipe.frame_stack} | {key: value for key, value in options.items() if key != "progress_bar"}
    record["mean_returns"] = returns
    recipe = replace(recipe, frame_stack=denoiser.n_frames(recipe.frame_stack))
    steps = int(getattr(model, "num_timesteps", 0))
    RunInfo(algo, recipe.to_dict(), seed, steps, versions=dict(build()), denoiser=record).save(folder)
    write_atomically(folder / "model.zip", content)  # last: a folder with a model is complete
    return denoiser
