"""Policy distillation under attack: a student that does on attacked observations what its teacher does on the true ones.

Rusu et al., "Policy Distillation" (ICLR 2016), arXiv:1511.06295, whose targets we take over; states are the student's own after the
first round, as in DAgger (Ross, Gordon, Bagnell, AISTATS 2011). Training is offline and supervised, `robustrl.training.supervised`:
minutes on a CPU, none of the instability of robust reinforcement learning, and any network will do, also one whose Lipschitz constant is
known. A student can be no better than its teacher where nobody attacks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustrl.attacks import ActionDeviation, GradientAttack, Margin
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import in_frame_units
from robustrl.errors import check_choice, check_count, check_probability
from robustrl.policy import PolicyView
from robustrl.policy.loading import algorithm_class
from robustrl.rollouts.executor import build, one_thread
from robustrl.seeding import integer_seed, torch_generator
from robustrl.threat import ThreatModel
from robustrl.training.architecture import NETWORKS, architecture, warn_of_actions
from robustrl.training.gathering import Stacks, gather
from robustrl.training.robust.neighbourhood import check_epsilon
from robustrl.training.run_files import RunInfo
from robustrl.training.supervised import Cloning, Distillation, Examples, InnerAttack, Loss, RobustFit, RobustTrainer
from robustrl.training.train import save_model

KINDS = ("q", "logits", "gaussian")
ROLLOUT = 3
"""Gradient steps of the attack that leads the actor astray while observations are gathered."""
BATCH = 1024


def distil(
    teacher: Any,
    env: Any,
    *,
    network: str = "same",
    activation: str | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
    epsilon: float | ThreatModel = 0.1,
    norm: float | str | None = None,
    attack: str | InnerAttack = "n-fgsm",
    loss: Loss | None = None,
    temperature: float | None = None,
    rounds: int = 4,
    observations: int = 10_000,
    attacked_share: float = 0.5,
    epochs: int = 5,
    learning_rate: float | None = None,
    on_round: Callable[[int, RobustFit], object] | None = None,
    seed: int = 0,
    progress_bar: bool = False,
    **trainer: Any,
) -> Any:
    """Distil an SB3 DQN, PPO or A2C policy into a new network that is robust.

    Args:
        teacher: SB3 model; its weights stay as they are.
        env: anything `EnvRecipe.of` takes; with noise, the student learns on noisy observations what the teacher does on clean ones.
        network: "same" as the teacher's, or "mlp", "lipschitz-mlp" or "lipschitz-cnn"; see `robustrl.training.architecture`.
        activation: NAME or NAME:SETTING, e.g. "swish"; see there.
        policy_kwargs: further settings of the network, e.g. {"net_arch": [64, 64]}.
        epsilon: radius per step, in the units in which frames meet noise and attacks, of a whole observation; or a `ThreatModel`.
        norm: of a plain epsilon: inf (the default) or 2.
        attack: what the student learns under: "n-fgsm", "fgsm-rs", "pgd", "none", or an `InnerAttack`. The first reaches three times as far
            as epsilon, and wants a smaller one than the others.
        loss: of the student's scores and the teacher's on the true observation; default `Distillation`, or mean squared error of
            continuous actions.
        temperature: of the default; in units of the teacher's scores; None for 1 with logits, and for action values the median lead
            of the best one.
        rounds: how often observations are gathered: by the teacher first, then by the student as it is by then. All are kept.
        observations: per round.
        attacked_share: part of them from episodes whose actor is attacked within epsilon, and gets where it else would not.
        epochs: passes over the observations per round, twice as many in the last one.
        learning_rate: the highest; default 0.005, and 0.02 for Lipschitz networks.
        on_round: called with the number of each round and what training found.
        seed: of weights, episodes and training.
        progress_bar: show bars with an ETA.
        trainer: further arguments of `RobustTrainer`, e.g. batch_size, gradalign or keep.
    Returns:
        a model of the teacher's algorithm, for acting (its replay buffer has length 1), that can be saved, attacked and certified as
        any. Of its action values only the differences mean anything. A critic is distilled too, without attacks.
    Raises:
        ValueError: for bad arguments, or a policy that does not fit the environment.
        TypeError: for other models and policies.
    """
    recipe, algo = EnvRecipe.of(env), algorithm_of(teacher)
    check_choice("network", network, ("same", *NETWORKS))
    check_count("rounds", rounds)
    check_count("observations", observations, least=2)
    share = float(check_probability("attacked_share", attacked_share))
    threat = check_epsilon(epsilon, norm)
    threat = in_frame_units(threat, recipe) if isinstance(epsilon, ThreatModel) else threat
    rate = learning_rate if learning_rate is not None else 0.02 if network.startswith("lipschitz") else 0.005
    settings = {"attack": attack, "epsilon": threat, "learning_rate": rate, **trainer}
    view = recipe.view(teacher)
    # Refuses what is out of range before anything is played.
    RobustTrainer(epochs=epochs, seed=check_count("seed", seed, least=0), **settings).region(view.observation_shape)
    roots = np.random.SeedSequence(seed).spawn(3 * rounds)
    if view.kind not in KINDS:
        raise TypeError(f"teacher must have action values, logits or Gaussian actions, got {view.kind!r}")
    warn_of_actions(network, recipe.action_space)
    model = student(teacher, network, activation, policy_kwargs, seed=seed)
    found, stacks = recipe.view(model), list[Stacks]()
    with one_thread():
        for done, (clean, misled, noise) in enumerate(zip(*[iter(roots)] * 3, strict=True)):
            actor, attacked = found if done else view, round(share * observations) if threat.step else 0
            if attacked < observations:
                stacks.append(gather(actor, recipe, observations - attacked, integer_seed(clean) >> 1))
            if attacked:
                assault = GradientAttack(Margin() if view.discrete else ActionDeviation(), steps=ROLLOUT)
                stacks.append(gather(actor, recipe, attacked, integer_seed(misled) >> 1, attack=assault, threat=threat))
            examples = _examples(view, recipe, Stacks.joined(stacks), torch_generator(noise, view.device))
            wanted = loss or _loss(view, examples, temperature)
            fitting = RobustTrainer(epochs=epochs * (2 if done == rounds - 1 else 1), seed=seed, **settings)
            fit = fitting.fit(_Greedy(found), examples, wanted, progress_bar=progress_bar)
            if on_round is not None:
                on_round(done, fit)
        if algo == "dqn":
            model.q_net_target.load_state_dict(model.q_net.state_dict())
        else:
            _distil_critic(model, found, view, examples, epochs=2 * epochs, seed=seed)
    model.policy.set_training_mode(False)
    return model


def algorithm_of(teacher: Any) -> str:
    """ "dqn", "ppo" or "a2c", also of algorithms that are based on them.

    Raises:
        TypeError: for other models.
    """
    from stable_baselines3 import A2C, DQN, PPO

    for name, kind in (("dqn", DQN), ("ppo", PPO), ("a2c", A2C)):
        if isinstance(teacher, kind):
            return name
    raise TypeError(f"teacher must be a Stable-Baselines3 DQN, PPO or A2C model, got {type(teacher).__name__}")


def student(
    teacher: Any,
    network: str = "same",
    activation: str | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Any:
    """An untrained model of a teacher's algorithm and spaces; see `distil` for the arguments."""
    algo = algorithm_of(teacher)
    kwargs = dict(teacher.policy_kwargs)
    if network != "same":
        kwargs = {name: value for name, value in kwargs.items() if name == "normalize_images"}
    kwargs |= architecture(algo, None if network == "same" else network, activation) | dict(policy_kwargs or {})
    light = {"buffer_size": 1} if algo == "dqn" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = algorithm_class(algo)(
            teacher.policy_class,
            None,
            gamma=teacher.gamma,
            policy_kwargs=copy.deepcopy(kwargs),
            device=teacher.device,
            _init_setup_model=False,
            **light,
        )
        model.observation_space, model.action_space, model.n_envs = teacher.observation_space, teacher.action_space, 1
        model._setup_model()
    model.seed = seed
    if hasattr(teacher.policy, "log_std"):
        model.policy.log_std.data.copy_(teacher.policy.log_std)
    return model


class _Greedy(nn.Module):
    """What is learned of a view: scores of discrete actions, or the mean of continuous ones."""

    def __init__(self, view: PolicyView) -> None:
        super().__init__()
        self.actor, self.discrete = view.actor, view.discrete

    def forward(self, observations: Tensor) -> Tensor:
        scores: Tensor = self.actor(observations)
        return scores if self.discrete else scores.chunk(2, dim=-1)[0]


def _examples(view: PolicyView, recipe: EnvRecipe, stacks: Stacks, generator: torch.Generator) -> Examples:
    """What the student will see, and the teacher's scores of what is true."""
    inputs = view.fold(stacks.frames.to(view.device))
    answer = _Greedy(view)
    with torch.no_grad():
        targets = torch.cat([answer(part) for part in torch.split(inputs, BATCH)])
    if recipe.noise is not None:
        _, inputs = stacks.pairs(torch.arange(len(stacks)), view, recipe.noise, recipe.stack_padding, generator)
    return Examples(inputs, targets, stacks.episodes)


def _loss(view: PolicyView, examples: Examples, temperature: float | None) -> Loss:
    if not view.discrete:
        return Cloning()
    if temperature is None:
        best, second = examples.targets.topk(2, dim=1).values.unbind(1)
        temperature = 1.0 if view.kind == "logits" else float((best - second).median().clamp_min(1e-6))
    return Distillation(temperature, view.kind)


def _distil_critic(model: Any, found: PolicyView, view: PolicyView, examples: Examples, *, epochs: int, seed: int) -> None:
    """The teacher's state values, by what the policy's own network does not share."""
    assert view.critic is not None
    assert found.critic is not None
    with torch.no_grad():
        values = torch.cat([view.critic(part).reshape(-1, 1) for part in torch.split(examples.inputs, BATCH)])
    mean, std = values.mean(), values.std().clamp_min(1e-6)
    shared = [parameter for parameter in found.actor.parameters() if parameter.requires_grad]
    try:
        for parameter in shared:
            parameter.requires_grad_(False)
        fitting = RobustTrainer("none", epsilon=0.0, epochs=epochs, seed=seed)
        fitting.fit(found.critic, Examples(examples.inputs, (values - mean) / std, examples.episodes), Cloning())
    finally:
        for parameter in shared:
            parameter.requires_grad_(True)
    with torch.no_grad():  # learned in units of its own, since Adam's steps are of one size
        head = model.policy.value_net
        head.weight.mul_(std)
        head.bias.mul_(std).add_(mean)


def distil_run(teacher: Any, env: Any, out: str | os.PathLike[str], *, seed: int = 0, **options: Any) -> Any:
    """`distil`, into a run directory that `certify`, `attack` and `verify` take.

    Args:
        teacher: SB3 model.
        env: anything `EnvRecipe.of` takes.
        out: run directory; must not hold another model.
        seed: of everything.
        options: of `distil`, recorded as plain data under "distilled" among the hyper-parameters; so is the share of held-out
            observations of each round on which the student does what the teacher does, clean and under PGD within epsilon; of
            continuous actions, up to the `tolerance` of `Cloning`.
    Raises:
        FileExistsError: if `out` already holds a model.
    """
    folder, recipe = Path(out), EnvRecipe.of(env)
    if (folder / "model.zip").exists():
        raise FileExistsError(f"{folder} already holds a model; choose another --out, or delete it")
    agreement: list[dict[str, float]] = []

    def note(_: int, fit: RobustFit) -> None:
        best = max(fit.history, key=lambda row: row.pgd, default=None)
        if best is not None:
            agreement.append({"clean": best.clean, "pgd": best.pgd})

    model = distil(teacher, recipe, seed=seed, on_round=note, **options)
    folder.mkdir(parents=True, exist_ok=True)
    record = {name: value for name, value in options.items() if name != "progress_bar"} | {"agreement": agreement}
    RunInfo(algorithm_of(teacher), recipe.to_dict(), seed, 0, {"distilled": record}, dict(build())).save(folder)
    save_model(model, folder / "model.zip")  # last: a folder with a model is complete
    return model
