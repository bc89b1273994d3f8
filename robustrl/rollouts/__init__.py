"""Episodes in, returns out: vectorised, seeded, resumable, parallel."""

from robustrl.rollouts.cluster import RayExecutor
from robustrl.rollouts.executor import Executor, LocalExecutor

__all__ = ["Executor", "LocalExecutor", "RayExecutor"]
