"""Learning against an adversary that learns: ATLA, as a callback of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from robustrl.attacks.learned import Command
from robustrl.envs.adversary import AdversaryVecEnv
from robustrl.envs.hosts import as_learner_sees, attack_host
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import check_count
from robustrl.seeding import integer_seed
from robustrl.threat import ThreatModel
from robustrl.training.adversary import untouched_generators


class ATLA(BaseCallback):
    """Alternating training with learned adversaries: between two rollouts of the agent its attacker learns from one of its own.

    The agent learns behind a `VecAttack`, whose attack becomes the adversary's:

        venv = make_vec_env("CartPole-v1", 8, attack=RandomNoise(), threat=threat)
        model = PPO("MlpPolicy", venv)
        model.learn(200_000, callback=ATLA("CartPole-v1", threat))

    With `SAPPO` in place of PPO it is the authors' ATLA with the state-adversarial regulariser.

    Args:
        env: where the agent acts, without attack: anything `EnvRecipe.of` takes. A VecNormalize of the agent's chain is followed.
        threat: the budget.
        command: what the adversary decides; default `attacks.Perturbation()` (PA-ATLA: `attacks.ActionDirection()`).
        rollouts: of the adversary between two of the agent.
        n_envs: the adversary's environments.
        options: of the adversary's PPO.

    Attributes:
        adversary: the attacker, a PPO model.

    Source: Zhang, Chen, Boning, Hsieh (ICLR 2021), arXiv:2101.08452.
    """

    def __init__(
        self,
        env: Any,
        threat: ThreatModel,
        command: Command | None = None,
        *,
        rollouts: int = 1,
        n_envs: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        self.recipe, self.threat, self.command = EnvRecipe.of(env), threat, command
        self.rollouts, self.n_envs = check_count("rollouts", rollouts), check_count("n_envs", n_envs)
        self.options: dict[str, Any] = {"n_steps": 512, "batch_size": 64, "device": "cpu", **options}
        self.adversary: PPO | None = None

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise TypeError(f"ATLA needs a learner with rollouts, such as PPO or SAPPO, got {type(self.model).__name__}")
        host = attack_host(self.training_env)
        if host.core.given != self.threat:
            raise ValueError(f"threat must be that of the agent's VecAttack, {host.core.given}, got {self.threat}")
        host.core.attach(self.model, self.training_env)
        if self.adversary is None:
            # another seed than the agent's, whose environments and exploration would be the same
            seed = integer_seed(np.random.SeedSequence(self.model.seed, spawn_key=(4,))) % 2**32
            recipe = as_learner_sees(self.recipe, self.model)
            self._duels = AdversaryVecEnv(recipe, self.model, self.threat, self.command, self.n_envs, seed=seed)
            # returns of any size: as the authors', rewards are scaled by the spread of discounted returns
            scaled = VecNormalize(self._duels, norm_obs=False, gamma=self.options.get("gamma", 0.99))
            with untouched_generators():
                self.adversary = PPO("MlpPolicy", scaled, seed=seed, **self.options)
            self._agent = self.model
        elif self.model is not self._agent:
            raise ValueError("an ATLA callback goes with one learner: its adversary plays against that one")
        host.core.use(self._duels.attack(self.adversary))

    def _on_rollout_start(self) -> None:
        assert self.adversary is not None
        self._duels.renormalize(as_learner_sees(self.recipe, self.model))
        steps = self.rollouts * self.adversary.n_steps * self.n_envs
        self.adversary.learn(steps, reset_num_timesteps=self.adversary.num_timesteps == 0)
        returns = [info["r"] for info in self.adversary.ep_info_buffer or ()]
        if returns:
            self.logger.record("atla/victim_return", sum(returns) / len(returns))

    def _on_step(self) -> bool:
        return True
