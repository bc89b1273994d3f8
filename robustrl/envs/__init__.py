"""Gymnasium's side: noise and attack wrappers, the chain validator, recipes.

A wrapper has one name for its three hosts: `NoiseObservation` here wraps a `gymnasium.Env`,
`robustrl.envs.vector.NoiseObservation` a `gymnasium.vector.VectorEnv`, `robustrl.envs.sb3.NoiseObservation` an SB3 `VecEnv`;
`add_noise(env, noise)` picks the host. So do `AttackObservation` (`VecAttack` for SB3) and `add_attack(env, attack, threat)`.
"""

from robustrl.envs.adversary import AdversaryEnv, AdversaryVecEnv
from robustrl.envs.bounds import known_return_bounds
from robustrl.envs.chain import Chain, check_chain
from robustrl.envs.hosts import add_attack, add_noise, set_victim
from robustrl.envs.quantise import QuantiseObservation
from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.envs.single import AttackObservation, NoiseObservation

__all__ = [
    "AdversaryEnv",
    "AdversaryVecEnv",
    "AttackObservation",
    "Chain",
    "EnvRecipe",
    "NoiseObservation",
    "QuantiseObservation",
    "add_attack",
    "add_noise",
    "check_chain",
    "known_return_bounds",
    "make_vec_env",
    "set_victim",
]
