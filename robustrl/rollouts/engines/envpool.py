"""EnvPool's environments in C++, where they were found to be Gymnasium's.

Found step by step: Gymnasium's environment is put into EnvPool's state, both take the same action, and what they return is
compared. `docs/engines.md` has the figures, the tests repeat the comparison.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines.base import Step, plain_spec
from robustrl.seeding import slot_seeds

ENVPOOL = "1.2.5"
"""The EnvPool that was compared."""
MUJOCO = "3.6.0"
"""The MuJoCo inside it, whatever `mujoco` is installed."""


class Same(NamedTuple):
    """A registered environment that EnvPool has too."""

    entry_point: str
    """Gymnasium's."""
    error: float
    """Largest |difference| / (1 + |value|) of an observation or reward after one step from the same state."""
    newer: float | None = None
    """The same where Gymnasium steps with MuJoCo 4.0.0; None without MuJoCo."""


_CONTROL, _MUJOCO = "gymnasium.envs.classic_control.", "gymnasium.envs.mujoco."
SAME = {
    "CartPole-v1": Same(_CONTROL + "cartpole:CartPoleEnv", 8e-8),
    "MountainCar-v0": Same(_CONTROL + "mountain_car:MountainCarEnv", 6e-8),
    "MountainCarContinuous-v0": Same(_CONTROL + "continuous_mountain_car:Continuous_MountainCarEnv", 6e-8),
    "Acrobot-v1": Same(_CONTROL + "acrobot:AcrobotEnv", 6e-7),
    "InvertedPendulum-v5": Same(_MUJOCO + "inverted_pendulum_v5:InvertedPendulumEnv", 1e-15, 2e-6),
    "InvertedDoublePendulum-v5": Same(_MUJOCO + "inverted_double_pendulum_v5:InvertedDoublePendulumEnv", 5e-8, 2e-6),
    "Hopper-v5": Same(_MUJOCO + "hopper_v5:HopperEnv", 4e-8, 3e-6),
    "Walker2d-v5": Same(_MUJOCO + "walker2d_v5:Walker2dEnv", 4e-8, 2e-6),
    "HalfCheetah-v5": Same(_MUJOCO + "half_cheetah_v5:HalfCheetahEnv", 6e-8, 4e-6),
    "Swimmer-v5": Same(_MUJOCO + "swimmer_v5:SwimmerEnv", 3e-8, 7e-6),
    "Reacher-v5": Same(_MUJOCO + "reacher_v5:ReacherEnv", 6e-8, 1e-6),
    "Pusher-v5": Same(_MUJOCO + "pusher_v5:PusherEnv", 1e-7, 2e-4),
    "Ant-v5": Same(_MUJOCO + "ant_v5:AntEnv", 2e-7, 1.0),
    "Humanoid-v5": Same(_MUJOCO + "humanoid_v5:HumanoidEnv", 5e-8, 4e-2),
    "HumanoidStandup-v5": Same(_MUJOCO + "humanoidstandup_v5:HumanoidStandupEnv", 6e-8, 4e2),
}
DIFFERENT = {"Pendulum-v1": "it turns by the speed before the clip at 8, Gymnasium by the speed after it"}


class EnvPoolEngine:
    """EnvPool, stepped by environment ids: a slot that has ended is not stepped again, so its autoreset never comes.

    The environment's law is Gymnasium's, its episodes are not: EnvPool has random streams of its own. Rewards are float32.
    """

    name = "envpool"
    default_chunk = 256

    def __init__(self, recipe: EnvRecipe) -> None:
        self._recipe = recipe
        self._pool: Any = None
        self._running: NDArray[np.int32] = np.empty(0, dtype=np.int32)

    @classmethod
    def refusal(cls, recipe: EnvRecipe) -> str | None:
        """Why EnvPool's environment is another one than the recipe's; None if it is the same."""
        spec = plain_spec(recipe)
        if spec is None:
            return "it has registered environments only, without factory, wrappers or arguments"
        if spec.id in DIFFERENT:
            return f"EnvPool's is another environment: {DIFFERENT[spec.id]}"
        if spec.id not in SAME:
            return f"EnvPool's is not known to be the same: only these were compared: {', '.join(SAME)}"
        same = SAME[spec.id]
        if spec.entry_point != same.entry_point:
            return f"the id is registered with {spec.entry_point}, not with Gymnasium's own environment"
        try:
            import envpool
        except ImportError as error:
            return f"EnvPool is missing ({error}): pip install 'robustrl[envpool]'"
        if envpool.__version__ != ENVPOOL:
            return f"EnvPool {ENVPOOL} was compared with Gymnasium, not {envpool.__version__}"
        if same.newer is not None and version("mujoco") != MUJOCO:
            return (
                f"EnvPool steps with MuJoCo {MUJOCO} and Gymnasium with the installed {version('mujoco')}, which is another "
                f"environment (with 4.0.0, one step differs by up to {same.newer:.0e}); with mujoco=={MUJOCO} they are the same"
            )
        return None

    def start(self, n: int, seed: np.random.SeedSequence) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        import envpool

        assert self._recipe.env_id is not None
        seeds = slot_seeds(seed, n)
        self._running = np.arange(n, dtype=np.int32)
        # A new pool, because streams are seeded when it is made; one thread, because cores are for the workers.
        self._pool = envpool.make_gymnasium(
            self._recipe.env_id.rpartition(":")[2],
            num_envs=n,
            num_threads=1,
            env_seed=seeds.view(np.int32).tolist(),  # C++ reads them as unsigned again
            max_episode_steps=self._recipe.horizon,
        )
        with warnings.catch_warnings(action="ignore"):  # of Gymnasium, about the precision of EnvPool's bounds
            frames, _ = self._pool.reset()
        return frames, seeds.astype(np.uint64)

    def step(self, actions: NDArray[Any]) -> Step:
        frames, rewards, terminated, truncated, _ = self._pool.step(actions, self._running)
        return Step(frames, rewards.astype(np.float64), terminated | truncated)

    def keep(self, running: NDArray[np.bool_]) -> None:
        self._running = self._running[running]

    def close(self) -> None:
        self._pool = None
