"""Train an SB3 algorithm under noise, into a run directory."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gymnasium.spaces import Discrete
from stable_baselines3.common.callbacks import BaseCallback

from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import check_count
from robustrl.files import write_atomically
from robustrl.policy.loading import algorithm_class
from robustrl.rollouts.executor import one_thread
from robustrl.rollouts.progress import progress_bar as rollout_bar
from robustrl.training.presets import preset_for
from robustrl.training.run_files import LIBRARIES, RunInfo


def train(
    env: Any,
    out: str | os.PathLike[str],
    *,
    algo: str = "ppo",
    timesteps: int | None = None,
    seed: int = 0,
    n_envs: int | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    verbose: int = 0,
) -> Any:
    """Train a policy on noisy observations and write a run directory.

    Nothing but `SB3Algorithm("MlpPolicy", make_vec_env(...), **hyperparameters).learn(timesteps)` with the environment's
    preset; what it writes can be certified, attacked and verified by `robustrl`.

    Args:
        env: recipe with noise and horizon, or anything `EnvRecipe.of` takes.
        out: run directory; must not hold another model.
        algo: "ppo", "a2c" or "dqn".
        timesteps: environment steps; default the preset's.
        seed: of weights, environments and noise.
        n_envs: environments side by side; default the preset's, or 1.
        hyperparameters: keyword arguments of the algorithm that replace the preset's.
        progress_bar: show a bar with an ETA.
        verbose: SB3's verbosity.
    Returns:
        the trained SB3 model.
    Raises:
        FileExistsError: if `out` already holds a model.
        ValueError: for unknown names or bad numbers.
    """
    from stable_baselines3.common.logger import configure

    recipe = EnvRecipe.of(env)
    kind, folder = algorithm_class(algo), Path(out)
    if (folder / "model.zip").exists():
        raise FileExistsError(f"{folder} already holds a model; choose another --out, or delete it")
    if not isinstance(recipe.action_space, Discrete):
        raise ValueError(
            f"{recipe.label} takes {recipe.action_space}; only policies with a Discrete action space can be certified"
        )
    preset = preset_for(recipe.env_id)
    steps = check_count("timesteps", preset.timesteps if timesteps is None else timesteps)
    arguments = {**getattr(preset, algo), **(hyperparameters or {})}
    written = copy.deepcopy(arguments)  # SB3 writes into the policy_kwargs that it is given
    side_by_side = preset.env.get("n_envs", 1) if n_envs is None else n_envs
    venv = make_vec_env(recipe, side_by_side, seed=check_count("seed", seed, least=0))
    # Networks this small only lose time to a second thread, and the weights would depend on the number of threads.
    with one_thread():
        model = kind("MlpPolicy", venv, seed=seed, verbose=verbose, **arguments)
        folder.mkdir(parents=True, exist_ok=True)
        # A logger of our own writes into tb/ itself, so that the certificate joins the same TensorBoard run.
        model.set_logger(configure(os.fspath(folder / "tb"), (["stdout"] if verbose else []) + ["tensorboard"]))
        # SB3's own bar needs tqdm, which nothing else here does; this is the bar of certify and attack.
        with rollout_bar("train", steps, visible=progress_bar) as advance:
            model.learn(steps, callback=_Advance(advance))
    versions = {name: version(name) for name in LIBRARIES}
    RunInfo(algo, recipe.to_dict(), int(seed), steps, written, versions).save(folder)
    save_model(model, folder / "model.zip")  # last: a folder with a model is complete
    venv.close()
    return model


class _Advance(BaseCallback):
    """Tells a progress bar how many environment steps were made."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._advance = advance

    def _on_step(self) -> bool:
        self._advance(self.training_env.num_envs)
        return True


def save_model(model: Any, path: Path) -> None:
    """SB3's `save`, atomically."""
    import io

    buffer = io.BytesIO()
    model.save(buffer)
    write_atomically(path, buffer.getvalue())
