"""WocaR: a critic of the worst that an attacker can make of an action, learned beside PPO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.nn import functional

from robustrl.errors import check_count, check_positive, check_real
from robustrl.networks.bounds import propagate
from robustrl.seeding import torch_generator
from robustrl.threat import ThreatModel
from robustrl.training.robust.metrics import possible_actions
from robustrl.training.robust.neighbourhood import Neighbourhood, check_epsilon
from robustrl.training.robust.views import view_of


class WorstCaseCritic(BaseCallback):
    """Adds the worst-attack action value to PPO's advantages.

    A critic Q_low(s, a) learns r + gamma (1 - done) min over a' of Q_low(s', a'), where a' are the actions that IBP cannot exclude
    at s' under an attacker: all that may have the largest logit, or the box of a Gaussian policy's means (in the action space), which
    is searched by gradient descent. PPO's advantages become A + weight * std(A) * (Q_low - mean) / std(Q_low). It learns the
    attacked policy's value with no attacker in the environment; use it beside `SAPPO` or PPO.

    Args:
        epsilon: number in the units of the learner's observations, or a `ThreatModel` with `step`; from the start.
        norm: of a plain epsilon: inf (the default), 2 or 1.
        weight: at the end of training; it grows linearly from 0.
        hidden: widths of the critic's ReLU layers, on flattened observations.
        learning_rate: of Adam.
        epochs: passes over every rollout.
        batch_size: transitions per step.
        tau: of the target network's moving average.
        search: gradient steps to the worst action in a box.

    Source: Liang et al., "Efficient Adversarial Training without Attacking: Worst-Case-Aware Robust Reinforcement Learning"
        (NeurIPS 2022), arXiv:2210.05927; their weights end at 0.8 on Hopper.
    """

    model: PPO

    def __init__(
        self,
        epsilon: float | ThreatModel,
        *,
        norm: float | str | None = None,
        weight: float = 0.5,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 3e-4,
        epochs: int = 4,
        batch_size: int = 256,
        tau: float = 0.005,
        search: int = 10,
    ) -> None:
        super().__init__()
        check_epsilon(epsilon, norm)
        self.epsilon, self.norm, self.weight = epsilon, norm, check_real("weight", weight)
        self.hidden = tuple(check_count("hidden", width) for width in hidden)
        self.learning_rate, self.tau = check_positive("learning_rate", learning_rate), check_positive("tau", tau)
        self.epochs, self.search = check_count("epochs", epochs), check_count("search", search)
        self.batch_size = check_count("batch_size", batch_size)
        if weight < 0 or tau > 1:
            raise ValueError(f"weight must be >= 0 and tau at most 1, got {weight} and {tau}")

    def _on_training_start(self) -> None:
        model = self.model
        if not isinstance(model, PPO):
            raise TypeError(f"WorstCaseCritic belongs to PPO or SAPPO, got {type(model).__name__}")
        self._around = Neighbourhood.of_learner(model, self.epsilon, self.norm)
        self._policy = view_of(model)
        if self._policy.kind not in ("logits", "gaussian"):
            raise ValueError(f"WorstCaseCritic needs a categorical or Gaussian policy, got {self._policy.kind!r}")
        root = np.random.SeedSequence(model.seed, spawn_key=(1,))
        self._generator = torch_generator(root, model.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(root.generate_state(1)[0]))
            self._critic, self._target = self._network(), self._network()
        self._target.load_state_dict(self._critic.state_dict())
        self._optimizer = torch.optim.Adam(self._critic.parameters(), lr=self.learning_rate)

    def _network(self) -> nn.Sequential:
        size = int(np.prod(self._policy.observation_shape))
        space = self.model.action_space
        discrete = isinstance(space, spaces.Discrete)
        widths = [size if discrete else size + int(np.prod(space.shape or ())), *self.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        last = int(space.n) if isinstance(space, spaces.Discrete) else 1
        return nn.Sequential(*layers, nn.Linear(widths[-1], last)).to(self.model.device)

    def _values(self, critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        flat = observations.flatten(1)
        if self._policy.discrete:
            values: Tensor = critic(flat).gather(1, actions[:, None])
            return values[:, 0]
        values = critic(torch.cat((flat, actions), dim=1))
        return values[:, 0]

    def _worst(self, observations: Tensor) -> Tensor:
        """The target network's smallest value over the actions that are possible under attack, (n,)."""
        if self._policy.discrete:
            with torch.no_grad():
                values: Tensor = self._target(observations.flatten(1))
                return values.masked_fill(~possible_actions(self._policy, observations, self._around), torch.inf).amin(1)
        space = self.model.action_space
        assert isinstance(space, spaces.Box)
        ends = [torch.as_tensor(end.reshape(-1), device=observations.device) for end in (space.low, space.high)]
        with torch.no_grad():
            box = propagate(self._policy, self._around.region(observations)).box()
            low, high = (end.chunk(2, dim=-1)[0].clamp(*ends) for end in (box.low, box.high))
        draws = torch.rand(low.shape, generator=self._generator, device=low.device)
        actions = low + draws * (high - low)
        with torch.no_grad():
            found = [self._values(self._target, observations, end) for end in (low, high)]
        for _ in range(self.search):
            actions.requires_grad_()
            values = self._values(self._target, observations, actions)
            found.append(values.detach())
            (slope,) = torch.autograd.grad(values.sum(), actions)
            step = 2 * (high - low) / self.search
            actions = (actions.detach() - step * slope.sign()).clamp(low, high)
        with torch.no_grad():
            found.append(self._values(self._target, observations, actions))
        return torch.stack(found).amin(0)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer, model, device = self.model.rollout_buffer, self.model, self.model.device
        following_starts = np.asarray(model._last_episode_starts)[None]

        def rows(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values.reshape(-1, *values.shape[2:]), device=device).float()

        last = np.asarray(model._last_obs)[None].astype(buffer.observations.dtype)
        observations, following = rows(buffer.observations), rows(np.concatenate((buffer.observations[1:], last)))
        done = rows(np.concatenate((buffer.episode_starts[1:], following_starts)))
        rewards, actions = rows(buffer.rewards), rows(buffer.actions)
        actions = actions[:, 0].long() if self._policy.discrete else actions
        losses: list[float] = []
        model.policy.set_training_mode(False)
        for _ in range(self.epochs):
            for chosen in torch.split(torch.randperm(len(done), generator=self._generator, device=device), self.batch_size):
                wanted = rewards[chosen] + model.gamma * (1 - done[chosen]) * self._worst(following[chosen])
                loss = functional.mse_loss(self._values(self._critic, observations[chosen], actions[chosen]), wanted)
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                losses.append(loss.item())
                with torch.no_grad():
                    for slow, fast in zip(self._target.parameters(), self._critic.parameters(), strict=True):
                        slow.lerp_(fast, self.tau)
        with torch.no_grad():
            values = self._values(self._critic, observations, actions).cpu().numpy().reshape(buffer.advantages.shape)
        weight = self.weight * min(1.0, model.num_timesteps / model._total_timesteps)
        scale = buffer.advantages.std() / (values.std() + 1e-8)
        buffer.advantages += (weight * scale * (values - values.mean())).astype(buffer.advantages.dtype)
        self.logger.record("train/worst_case_loss", float(np.mean(losses)))
        self.logger.record("train/worst_case_value", float(values.mean()))
