"""Wrappers for one `gymnasium.Env`."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsFloat

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from robustrl.attacks.base import Attack
from robustrl.envs.attack_core import AttackCore
from robustrl.envs.core import NoiseCore
from robustrl.noise import Noise
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel


class NoiseObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Add smoothing noise to every observation, once per arriving frame.

    The observation space becomes an unbounded float32 Box (or a Dict of them: the noise is that of their joint vector). The noise has a generator of its own: the environment's is
    never consumed, so the dynamics are those of the clean environment. Put frame stacks outside, attacks inside.

    Args:
        env: environment with a Box observation space of a floating dtype, or a Dict of them.
        noise: mechanism, e.g. `robustrl.Gaussian(0.2)`.
        seed: seed of the noise until the first `reset(seed=...)`.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> env = rrl.envs.NoiseObservation(gym.make("CartPole-v1"), rrl.Gaussian(0.2))
        >>> observation, info = env.reset(seed=1)
        >>> observation.dtype
        dtype('float32')
    """

    chain_role: ClassVar[str] = "noise"

    def __init__(self, env: gym.Env[Any, Any], noise: Noise, seed: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, noise=noise, seed=seed)
        gym.Wrapper.__init__(self, env)
        self.core = NoiseCore(noise, env.observation_space, seed)
        self.noise = noise
        self.observation_space = self.core.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.core.seed(seed)
        return self.core.one(observation), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.core.one(observation), reward, terminated, truncated, info


class AttackObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Attack every observation within a budget, before any noise; the environment itself is never touched.

    `info["attack"]` says at every step what was spent: "norm" of this step's perturbation, "eps_t" (what it might have been),
    "budget_spent" and "budget_left" of the episode, "attacked". The attacker has a random stream of its own. It does not see noise
    that is added outside. Put it inside noise and frame stack.

    Args:
        env: environment with a Box observation space of floats or bytes, or a Dict of them, whose budget is joint.
        attack: the attacker, e.g. `robustrl.attacks.GradientAttack()`.
        threat: its budget, in the observations' units.
        victim: the policy that acts on the observations, an SB3 model or a `PolicyView`. Attacks that look at no policy need none;
            for a model that is made later set `.victim = model` before the first reset.
        noise, frame_stack, stack_padding: what is added outside, if anything: attackers average over the noise.
        horizon: most steps of an episode; default the environment's time limit.
        bounds: "expand" (a larger observation space) or "clip" (observations stay inside the old one). Pictures always stay inside.
        delivery: of bytes: "float" (the space becomes float32), "round" (whole grey levels) or "greedy" (what rounding leaves of the
            budget is spent on further levels).
        seed: of the attacker until the first `reset(seed=...)`.
        record_clean: put the true observation into `info["clean_obs"]`.
    Raises:
        TypeError, ValueError: for spaces, units or budgets that make no sense.
        ChainError: if noise, a frame stack or another attack is inside.

    Examples:
        >>> import gymnasium as gym, robustrl as rrl
        >>> from stable_baselines3 import PPO
        >>> env = gym.make("CartPole-v1")
        >>> threat = rrl.ThreatModel(norm=2, step=0.1)
        >>> env = rrl.envs.AttackObservation(env, rrl.attacks.GradientAttack(), threat, victim=PPO("MlpPolicy", env))
        >>> observation, info = env.reset(seed=1)
        >>> info["attack"]["eps_t"]
        0.1
    """

    chain_role: ClassVar[str] = "attack"

    def __init__(
        self, env: gym.Env[Any, Any], attack: Attack, threat: ThreatModel, *, seed: int | None = None, **options: Any
    ) -> None:
        RecordConstructorArgs.__init__(self, attack=attack, threat=threat, seed=seed, _disable_deepcopy=True, **options)
        gym.Wrapper.__init__(self, env)
        self.core = AttackCore(env, env.observation_space, 1, attack, threat, seed=seed, **options)
        self.observation_space = self.core.space

    @property
    def victim(self) -> PolicyView | None:
        """Who acts on the observations."""
        return self.core.victim

    @victim.setter
    def victim(self, model: Any) -> None:
        self.core.attach(model, self)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.core.seed(seed)
        self.core.reset()
        return self._attacked(observation, info)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation, info = self._attacked(observation, info)
        return observation, reward, terminated, truncated, info

    def _attacked(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        delivered = self.core.one(observation, 0)
        return delivered, info | self.core.info(0, observation)


class RewardProbe(gym.Wrapper[Any, Any, Any, Any]):
    """Adds up the rewards of the environment inside reward-changing wrappers, so that returns are the true ones.

    A wrapper outside may step the environment several times per action, or not at all.
    """

    chain_role: ClassVar[str] = "monitor"
    _earned: float = 0.0

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._earned += float(reward)
        return observation, reward, terminated, truncated, info

    def take(self) -> float:
        """The rewards since the last call."""
        earned, self._earned = self._earned, 0.0
        return earned
