"""Robust Sarsa: action values of a policy for the attacks that minimise them, smooth enough for their gradients to mean something.

Zhang et al., "Robust deep reinforcement learning against adversarial perturbations on state observations" (NeurIPS 2020),
arXiv:2003.08938, section 3.5.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import check_choice, check_count, check_real
from robustrl.networks.bounds import interval_bounds
from robustrl.policy import PolicyView
from robustrl.rollouts.executor import one_thread
from robustrl.rollouts.progress import progress_bar as bar
from robustrl.seeding import integer_seed, torch_generator
from robustrl.training.objectives import set_rate

Successor = Literal["true", "shuffled"]


@dataclass(frozen=True)
class Transitions:
    """Steps of a policy, in any order: (s, a, r, s', a'), and whether s' has no value because the episode ended at it.

    Attributes:
        observations: (n, size), flat, as the policy sees them.
        actions: (n, size), as the environment received them; discrete ones as unit vectors.
        rewards: (n,).
        next_observations: (n, size).
        next_actions: (n, size), what the policy did there.
        ended: (n,), terminated; not truncated by a time limit.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    next_actions: Tensor
    ended: Tensor

    def __len__(self) -> int:
        return len(self.rewards)


class ActionValues(nn.Module):
    """Q(s, a) by a network of two tanh layers on the joined vector, in units of rewards.

    Args:
        n_inputs: entries of an observation and an action.
        width: of the hidden layers.
        n_actions: of a policy with discrete actions, whose values (n, n_actions) are then asked for with the observations alone.
    """

    scale: Tensor

    def __init__(self, n_inputs: int, width: int = 64, n_actions: int | None = None) -> None:
        super().__init__()
        self.n_actions = n_actions
        self.network = nn.Sequential(
            nn.Linear(n_inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        self.register_buffer("scale", torch.ones(()))

    def forward(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        if action is None:
            assert self.n_actions is not None
            each = torch.eye(self.n_actions, device=observation.device)
            return torch.stack([self(observation, row.expand(len(observation), -1)) for row in each], dim=1)
        joined = torch.cat((observation.flatten(1).float(), action.flatten(1).float()), dim=1)
        values: Tensor = self.network(joined).squeeze(1) * self.scale
        return values


def gather(policy: PolicyView, recipe: EnvRecipe, n: int, seed: int, *, n_envs: int = 8, progress: bool = False) -> Transitions:
    """`n` transitions of the policy in its environment, actions sampled: greedy ones would leave Q(s, .) undetermined.

    Truncated episodes go on in the bootstrap; the last step of every environment is left out, as its successor's action is unknown.

    Raises:
        TypeError: if the policy cannot sample, or has a memory.
    """
    if not policy.samples:
        raise TypeError("the policy must be able to sample actions: Robust Sarsa learns nothing from greedy ones")
    if policy.memory_shape is not None:
        raise TypeError("the policy must have no memory: its values are no function of the observation")
    # what is normalised after the noise is normalised by the view
    venv = make_vec_env(replace(recipe, normalization=None) if recipe.normalize == "after_noise" else recipe, n_envs, seed=seed)
    generator = torch_generator(np.random.SeedSequence(seed, spawn_key=(3,)), policy.device)
    rows: list[tuple[NDArray[Any], ...]] = []
    steps = -(-n // n_envs) + 1
    with closing(venv), bar("robust sarsa: data", steps, visible=progress) as advance:
        observations = venv.reset()
        for _ in range(steps):
            actions = _sampled(policy, observations, generator)
            after, rewards, dones, infos = venv.step(actions)
            successors, ended = np.array(after), np.array(dones)
            for slot in np.flatnonzero(dones):
                successors[slot] = infos[slot]["terminal_observation"]
                ended[slot] = not infos[slot].get("TimeLimit.truncated", False)
            rows.append((observations, actions, rewards, successors, ended, dones))
            observations = after
            advance(1)
    observed, acted, rewards, successors, ended, dones = (np.stack(parts) for parts in zip(*rows, strict=True))
    following = np.concatenate((acted[1:], acted[-1:]))
    n_actions = policy.n_actions if policy.discrete else None
    for step, slot in zip(*np.nonzero(dones & ~ended), strict=True):  # truncated: what would have been done there
        following[step, slot] = _sampled(policy, successors[step, slot][None], generator)[0]
    if n_actions is not None:
        acted, following = np.eye(n_actions)[acted], np.eye(n_actions)[following]
    parts = (observed, acted, rewards, successors, following, ended)
    flat = [torch.from_numpy(part[:-1].reshape((len(part) - 1) * n_envs, -1)[:n].astype(np.float32)) for part in parts]
    return Transitions(flat[0], flat[1], flat[2][:, 0], flat[3], flat[4], flat[5][:, 0].bool())


def _sampled(policy: PolicyView, observations: NDArray[Any], generator: torch.Generator) -> NDArray[Any]:
    seen = torch.from_numpy(np.array(observations, dtype=np.float32)).to(policy.device)
    with torch.no_grad():
        scores = policy.scores(seen)
        actions = policy.rule.choose(scores, policy.draw(len(seen), generator))
    return policy.received(actions)


def fit(
    data: Transitions,
    *,
    gamma: float = 0.99,
    epsilon: float = 0.02,
    regularisation: float = 0.1,
    successor: Successor = "true",
    epochs: int = 300,
    minibatches: int = 32,
    learning_rate: float = 3e-4,
    seed: int = 0,
    n_actions: int | None = None,
    progress: bool = False,
) -> ActionValues:
    """Fit action values to transitions by Sarsa, kept from changing much within `epsilon` of any (s, a).

    Args:
        data: transitions of one policy.
        gamma: discount.
        epsilon: radius (norm inf, of the joined vector) that the penalty is about; it grows from 0 in the middle third.
        regularisation: of the squared largest change of Q there, by interval bounds.
        successor: "true", or "shuffled" for what the authors' code does: it bootstraps from an unrelated transition, so that the values
            are little more than the next reward.
        epochs: passes over the data; in the last third the learning rate falls to 0.
        minibatches: per pass.
        learning_rate: of Adam.
        seed: of weights and batches.
        n_actions: of a policy with discrete actions.
        progress: show a bar with an ETA.
    """
    check_choice("successor", successor, ("true", "shuffled"))
    check_count("epochs", epochs)
    if not 0 <= check_real("gamma", gamma) < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    weights, order = np.random.SeedSequence(seed).spawn(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(weights))
        values = ActionValues(data.observations.shape[1] + data.actions.shape[1], n_actions=n_actions)
    generator = torch_generator(order)
    scale = float(data.rewards.abs().mean()) / (1 - gamma) or 1.0  # values of about 1
    rewards = data.rewards / scale
    pairs = torch.cat((data.observations, data.actions), dim=1)
    successors = torch.cat((data.next_observations, data.next_actions), dim=1)
    optimizer = torch.optim.Adam(values.parameters(), lr=learning_rate, eps=1e-5)
    network = values.network
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # about the mean value: only differences are left to learn
        last.bias.fill_(float(rewards.mean()) / (1 - gamma * (1 - float(data.ended.float().mean()))))
    with one_thread(), bar("robust sarsa: fit", epochs, visible=progress) as advance:
        for epoch in range(epochs):
            done = epoch / epochs
            set_rate(optimizer, learning_rate * min(1.0, 3 * (1 - done)))
            radius = epsilon * min(1.0, max(0.0, 3 * done - 1))
            for rows in torch.randperm(len(data), generator=generator).chunk(minibatches):
                following = rows if successor == "true" else rows.roll(-1)
                with torch.no_grad():
                    bootstrap = network(successors[rows] if successor == "true" else pairs[following]).squeeze(1)
                    target = rewards[rows] + gamma * torch.where(data.ended[rows], 0.0, bootstrap)
                found = network(pairs[rows]).squeeze(1)
                loss = nn.functional.smooth_l1_loss(found, target)
                if regularisation > 0 and radius > 0:
                    low, high = interval_bounds(network, pairs[rows] - radius, pairs[rows] + radius)
                    loss = (
                        loss + regularisation * torch.maximum(high.squeeze(1) - found, found - low.squeeze(1)).square().mean()
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            advance(1)
    if not torch.isfinite(loss):
        raise RuntimeError("the loss of Robust Sarsa is not finite: try a smaller learning_rate")
    values.scale.fill_(scale)
    return values.eval().requires_grad_(False)


def robust_sarsa(
    model: Any,
    env: Any,
    *,
    timesteps: int = 61_440,
    epochs: int = 300,
    seed: int = 0,
    progress_bar: bool = False,
    **options: Any,
) -> ActionValues:
    """Action values of a policy, for `attacks.LowValue(critic=...)`, `attacks.Targeted` and `attacks.Pattanaik`.

    With the defaults it takes about four minutes on one core, in proportion to `timesteps` times `epochs`. The suites take
    `epochs=100, learning_rate=1e-3`.

    Args:
        model: SB3 model or `PolicyView`.
        env: anything `EnvRecipe.of` takes, with the policy's normalisation and noise.
        timesteps: of data; the authors' 30 x 2048.
        epochs: passes over the data.
        seed: of data, weights and batches.
        progress_bar: show bars with an ETA, of data and of fitting.
        options: of `fit`; try several `epsilon` (.02 ... .3) and `regularisation` (.1 ... 10) and keep the strongest attack.
    Returns:
        a module (observations, actions) -> (n,), and for discrete actions also (observations) -> (n, n_actions).
    Raises:
        TypeError: for a policy that cannot sample.
    """
    recipe = EnvRecipe.of(env)
    policy = recipe.view(model)
    data = gather(policy, recipe, check_count("timesteps", timesteps), seed, progress=progress_bar)
    n_actions = policy.n_actions if policy.discrete else None
    return fit(data, epochs=epochs, seed=seed, n_actions=n_actions, progress=progress_bar, **options)
