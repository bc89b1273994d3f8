"""Attacking as a Markov decision process: the environment in which adversaries learn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor

from robustrl.attacks.attacker import Attacker
from robustrl.attacks.base import AttackContext
from robustrl.attacks.learned import Command, CommandedAttack, LearnedAttack, Perturbation
from robustrl.attacks.timing import Allocation, Uniform
from robustrl.envs.attack_core import attack_range
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import in_frame_units
from robustrl.errors import check_count
from robustrl.policy import Normalization, push_frame, start_stack
from robustrl.seeding import torch_generator
from robustrl.threat import ThreatModel


class _Duel:
    """Victims and their attacker, one episode per slot."""

    def __init__(
        self, recipe: EnvRecipe, victim: Any, threat: ThreatModel, settings: dict[str, Any], n: int, deterministic: bool
    ) -> None:
        self.n, self.deterministic, self._model, self._threat = n, deterministic, victim, threat
        self.orders = _Orders(**settings)
        self._enter(recipe)
        self.observation_space = self.orders.observation_space(self.victim, recipe.frame_stack)
        self.action_space = self.orders.action_space(self.victim)
        self._stack: Tensor | None = None
        self._memory: Tensor | None = None
        self._starting = np.ones(n, dtype=bool)

    def _enter(self, recipe: EnvRecipe) -> None:
        threat = in_frame_units(self._threat, recipe)
        self.recipe, self.victim = recipe, recipe.view(self._model)
        self.attacker = Attacker(
            self.orders,
            threat,
            self.victim,
            self.n,
            noise=recipe.noise,
            n_frames=recipe.frame_stack,
            padding=recipe.stack_padding,
            horizon=recipe.horizon,
            pixels=attack_range(recipe.frame_space, threat),
        )

    def renormalize(self, normalization: Normalization | None, normalize: Any) -> None:
        """Go on with other statistics; running episodes keep their ledgers."""
        before = self.attacker
        self._enter(replace(self.recipe, normalization=normalization, normalize=normalize))
        self.attacker.go_on(before)

    def seed(self, seed: int | None) -> None:
        """Restart attacker, noise and victim."""
        attacker, noise, actions = np.random.SeedSequence(seed).spawn(3)
        self.attacker.generator = torch_generator(attacker, self.victim.device)
        self._noise, self._actions = (torch_generator(part, self.victim.device) for part in (noise, actions))

    def situation(self, observations: Any, slots: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """What the adversary sees of observations that have arrived in these slots (default all), (n, size)."""
        rows = slice(None) if slots is None else torch.from_numpy(slots)
        seen = None if self._stack is None else self._stack[rows]
        context = self.attacker.context(self._frames(observations), slots, seen=seen)
        found: NDArray[Any] = self.orders.situation(context).cpu().numpy()
        return found

    def arrive(self, observations: Any, starting: NDArray[np.bool_]) -> NDArray[Any]:
        """The next observations of all slots, some of them first ones; what the adversary sees of them."""
        self.attacker.reset(np.flatnonzero(starting))
        self._starting, self._arrived = starting, self._frames(observations)
        return self.situation(observations)

    def respond(self, commands: NDArray[Any]) -> NDArray[Any]:
        """What the victims do, the attacker's commands carried out."""
        recipe, victim = self.recipe, self.victim
        first = torch.from_numpy(self._starting).to(victim.device)
        if self._memory is None:
            self._memory = victim.memory(self.n)
        else:
            self._memory = torch.where(first.reshape(-1, *(1,) * (self._memory.ndim - 1)), 0.0, self._memory)
        self.orders.given[:] = [torch.from_numpy(np.asarray(commands)).to(victim.device)]
        victim.eval()  # training elsewhere may have switched the shared layers
        with torch.enable_grad():
            delivered = self.attacker.deliver(self._arrived, seen=self._stack, memory=self._memory).detach()
        seen = (delivered if recipe.noise is None else recipe.noise.perturb(delivered, self._noise)).float()
        started = start_stack(seen, recipe.frame_stack, recipe.stack_padding)
        going_on = started if self._stack is None else push_frame(self._stack, seen)
        self._stack = torch.where(first.reshape(-1, *(1,) * (started.ndim - 1)), started, going_on)
        draws = None if self.deterministic else victim.draw(self.n, self._actions)
        actions, self._memory = victim.decide(
            self._stack, self._memory, batch=self.n, deterministic=self.deterministic, draws=draws
        )
        chosen, space = victim.received(actions), recipe.action_space
        return np.clip(chosen, space.low, space.high) if isinstance(space, spaces.Box) else chosen

    def _frames(self, observations: Any) -> Tensor:
        return torch.from_numpy(np.array(self.recipe.frames(np.asarray(observations)))).to(self.victim.device)


class AdversaryEnv(gym.Env[Any, Any]):
    """A victim in its environment, as an environment for its attacker: the reward is minus the victim's.

    Any algorithm of Stable-Baselines3 trains the adversary:

        env = AdversaryEnv("Hopper-v5", victim, ThreatModel(norm=inf, step=0.075, units="normalized"))
        adversary = PPO("MlpPolicy", env).learn(300_000)
        report = attack_policy(victim, "Hopper-v5", env.attack(adversary), env.threat)

    Observations are the true frames (all of a frame stack), and with an episode budget the parts of it and of the time that are left.
    The victim keeps its weights, its normalisation and its noise, which the adversary does not see; a model that still learns is
    followed.

    Args:
        env: where the victim acts: anything `EnvRecipe.of` takes, with its normalisation, noise and frame stack.
        victim: SB3 model or `PolicyView`.
        threat: the budget.
        command: what the adversary decides: `attacks.Perturbation()` (SA-RL), `attacks.ActionDirection()` or `attacks.TargetAction()`
            (PA-AD).
        allocation: what a step may cost of an episode budget; default the same at every step.
        chooses_when: let the adversary choose by one more number which part of that to spend.
        deterministic: the victim acts greedily, or samples.
        seed: of noise and victim until the first `reset(seed=...)`.
    """

    def __init__(
        self,
        env: Any,
        victim: Any,
        threat: ThreatModel,
        command: Command | None = None,
        *,
        allocation: Allocation | None = None,
        chooses_when: bool = False,
        deterministic: bool = True,
        seed: int | None = None,
    ) -> None:
        self.threat, recipe = threat, EnvRecipe.of(env)
        self.settings = _settings(threat, command, allocation, chooses_when)
        self._duel = _Duel(recipe, victim, threat, self.settings, 1, deterministic)
        self.observation_space, self.action_space = self._duel.observation_space, self._duel.action_space
        self._env = recipe.base_env(checked=False)
        self._duel.seed(seed)

    def attack(self, adversary: Any) -> LearnedAttack:
        """The attack of a trained adversary, for `attack_policy` and the attack wrappers."""
        return LearnedAttack(adversary=adversary, **self.settings)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._duel.seed(seed)
        observation, _ = self._env.reset(seed=seed, options=options)
        return self._duel.arrive(observation[None], np.ones(1, dtype=bool))[0], {"victim_reward": 0.0, "norm": 0.0}

    def step(self, action: Any) -> tuple[NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = self._env.step(self._duel.respond(np.asarray(action)[None])[0])
        info = {"victim_reward": float(reward), "norm": float(self._duel.attacker.norms[0])}
        situation = self._duel.arrive(observation[None], np.zeros(1, dtype=bool))[0]
        return situation, -float(reward), terminated, truncated, info

    def close(self) -> None:
        self._env.close()


class AdversaryVecEnv(VecEnvWrapper):
    """Many of `AdversaryEnv` side by side for Stable-Baselines3: victims and gradients are computed in batches.

    Args:
        n_envs: how many.
        options: see `AdversaryEnv`.
    """

    def __init__(
        self,
        env: Any,
        victim: Any,
        threat: ThreatModel,
        command: Command | None = None,
        n_envs: int = 8,
        *,
        allocation: Allocation | None = None,
        chooses_when: bool = False,
        deterministic: bool = True,
        seed: int | None = None,
    ) -> None:
        self.threat, recipe = threat, EnvRecipe.of(env)
        self.settings = _settings(threat, command, allocation, chooses_when)
        self._duel = _Duel(recipe, victim, threat, self.settings, check_count("n_envs", n_envs), deterministic)
        venv = DummyVecEnv([lambda: Monitor(recipe.base_env(checked=False))] * n_envs)
        super().__init__(venv, observation_space=self._duel.observation_space, action_space=self._duel.action_space)
        self.seed(seed)

    def attack(self, adversary: Any) -> LearnedAttack:
        """The attack of a trained adversary, for `attack_policy` and the attack wrappers."""
        return LearnedAttack(adversary=adversary, **self.settings)

    def describe(self) -> dict[str, Any]:
        """Plain data that identifies the game: the victim's weights as they are, environment, budget and what the adversary decides."""
        duel = self._duel
        orders = {key: value for key, value in duel.orders.to_dict().items() if key not in ("kind", "given")}
        facts = {"victim": duel.victim.fingerprint(), "recipe": duel.recipe.to_dict(), "threat": self.threat.to_dict()}
        return {**facts, "deterministic": duel.deterministic, **orders}

    def renormalize(self, recipe: EnvRecipe) -> None:
        """Go on with another normalisation, that of a recipe: of a victim that still learns one."""
        self._duel.renormalize(recipe.normalization, recipe.normalize)

    def seed(self, seed: int | None = None) -> Any:
        """Seed environments, attacker and victims."""
        self._duel.seed(seed)
        return self.venv.seed(seed)

    def reset(self) -> NDArray[Any]:
        return self._duel.arrive(self.venv.reset(), np.ones(self.num_envs, dtype=bool))

    def step_async(self, actions: NDArray[Any]) -> None:
        self.venv.step_async(self._duel.respond(actions))

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for slot in np.flatnonzero(dones).tolist():
            last = infos[slot]["terminal_observation"]
            infos[slot]["terminal_observation"] = self._duel.situation(last[None], np.array([slot]))[0]
        return self._duel.arrive(observations, dones), -rewards, dones, infos


def _settings(
    threat: ThreatModel, command: Command | None, allocation: Allocation | None, chooses_when: bool
) -> dict[str, Any]:
    return {
        "command": Perturbation() if command is None else command,
        "episode": threat.episode,
        "allocation": Uniform() if allocation is None else allocation,
        "chooses_when": chooses_when,
    }


@dataclass(frozen=True)
class _Orders(CommandedAttack):
    """An attack that does what it is told from outside."""

    given: list[Tensor] = field(default_factory=list)

    def decide(self, context: AttackContext) -> Tensor:
        return self.given[-1]
