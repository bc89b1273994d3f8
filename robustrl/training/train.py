"""Train an SB3 algorithm under noise, into a run directory."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from robustrl.attacks import ActionDeviation, Attack, GradientAttack, Margin, RandomNoise
from robustrl.envs.chain import check_replay
from robustrl.envs.hosts import set_victim
from robustrl.envs.recipe import EnvRecipe, make_vec_env, wrap_vec_env
from robustrl.envs.units import frame_units
from robustrl.errors import check_choice, check_count
from robustrl.files import write_atomically
from robustrl.policy import Normalization
from robustrl.policy.loading import ACTING_AS, algorithm_class, algorithm_name
from robustrl.rollouts.executor import build, one_thread
from robustrl.rollouts.progress import progress_bar as rollout_bar
from robustrl.threat import ThreatModel
from robustrl.training.architecture import architecture, warn_of_actions
from robustrl.training.presets import Preset, preset_for
from robustrl.training.run_files import RunInfo

if TYPE_CHECKING:
    from robustrl.training.robust.evaluation import Kept, RobustEvalCallback

OFF_POLICY = ("dqn", "sac", "td3", "ddpg", "sa_dqn")
ROBUST = {"epsilon", "kappa", "norm", "loss", "epsilon_schedule"}
"""What `SAPPO` and `SADQN` take beside PPO's and DQN's arguments."""
SOLVERS = ("fgsm-rs", "n-fgsm", "pgd")
EVALUATIONS = 20
"""Of a robust training, at equal distances; fewer if weights change less often."""
ACTIONS: dict[str, Any] = {
    "dqn": spaces.Discrete,
    "sa_dqn": spaces.Discrete,
    "sac": spaces.Box,
    "td3": spaces.Box,
    "ddpg": spaces.Box,
}


def train(
    env: Any,
    out: str | os.PathLike[str],
    *,
    algo: str = "ppo",
    timesteps: int | None = None,
    seed: int = 0,
    n_envs: int | None = None,
    normalize: bool | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    attack: Attack | Literal["learned"] | None = None,
    threat: ThreatModel | None = None,
    robust: str | None = None,
    network: str | None = None,
    activation: str | None = None,
    progress_bar: bool = False,
    verbose: int = 0,
) -> Any:
    """Train a policy on noisy observations and write a run directory.

    Nothing but `SB3Algorithm("MlpPolicy", make_vec_env(...), **hyperparameters).learn(timesteps)` with the environment's
    preset (and "CnnPolicy" for pictures, "MultiInputPolicy" for dictionaries, "MlpLstmPolicy" for RecurrentPPO); what it
    writes can be certified, attacked and verified by `robustrl`.

    Args:
        env: recipe with noise and horizon, or anything `EnvRecipe.of` takes.
        out: run directory; must not hold another model.
        algo: "ppo", "a2c", "dqn", "sac", "td3", "ddpg", "recurrent_ppo", or against attackers of the observations "sa_ppo" or "sa_dqn"
            (`robustrl.training.robust`).
        timesteps: environment steps; default the preset's.
        seed: of weights, environments and noise.
        n_envs: environments side by side; default the preset's, or 1.
        normalize: learn a normalisation of observations (and rewards) with SB3's VecNormalize inside the noise, and freeze
            it into the recipe afterwards; default the preset's. On-policy algorithms only: the replay buffer of the others
            would get clean observations. Noise and budgets are then in normalised units.
        hyperparameters: keyword arguments of the algorithm that replace the preset's.
        attack: adversarial training: every observation is attacked before the noise. "learned" is ATLA: an adversary that learns in turns
            with the agent, on-policy algorithms only. Certificates and reports are about the environment without it.
        threat: its budget; units="normalized" where the observations are.
        robust: "fgsm-rs", "n-fgsm" or "pgd": algo "ppo" becomes "sa_ppo" and "dqn" "sa_dqn", whose term this attack maximises within the
            hyper-parameter epsilon; and the weights are kept that have the best worst mean return of episodes without an attack and under
            PGD within epsilon, of up to 20 evaluations on the way. `model.zip` holds them, `model-last.zip` (and `normalization-last.npz`)
            what training ended with, written before the last evaluation. Needs epsilon among the hyper-parameters; excludes `attack`.
        network: "mlp", "lipschitz-mlp" or "lipschitz-cnn"; see `robustrl.training.architecture`.
        activation: NAME or NAME:SETTING, e.g. "swish:4"; see there.
        progress_bar: show a bar with an ETA.
        verbose: SB3's verbosity.
    Returns:
        the trained SB3 model.
    Raises:
        FileExistsError: if `out` already holds a model.
        ValueError: for unknown names or bad numbers.
    """
    from stable_baselines3.common.logger import configure

    recipe, algo = EnvRecipe.of(env), algorithm_name(algo)
    if robust is not None:
        if attack is not None:
            raise ValueError(
                "robust and attack exclude each other: train with a robustness term, or behind an attack (--attack)"
            )
        algo = _robust_algorithm(algo, check_choice("robust", robust, SOLVERS))
    kind, folder = _learner(algo), Path(out)
    if (folder / "model.zip").exists():
        raise FileExistsError(f"{folder} already holds a model; choose another --out, or delete it")
    wanted = ACTIONS.get(algo)
    if wanted is not None and not isinstance(recipe.action_space, wanted):
        raise ValueError(f"{algo} needs a {wanted.__name__} action space, but {recipe.label} takes {recipe.action_space}")
    preset = preset_for(recipe.env_id)
    steps = check_count("timesteps", preset.timesteps if timesteps is None else timesteps)
    given = dict(hyperparameters or {})
    arguments = {**preset.arguments(algo), **given} | ({} if robust is None else {"loss": robust})
    built = architecture(algo, network, activation)
    if twice := ", ".join(sorted(built.keys() & given.get("policy_kwargs", {}).keys())):
        raise ValueError(f"hyperparameters must not set {twice} in policy_kwargs beside network and activation, which do")
    if "loss" in given and robust is not None:
        raise ValueError("robust and the hyper-parameter loss exclude each other: both say what maximises the term")
    if robust is not None and "epsilon" not in given:
        raise ValueError("robust needs the hyper-parameter epsilon, the radius of its attack (--epsilon RADIUS)")
    if algo not in ACTING_AS and (odd := ", ".join(sorted(ROBUST & arguments.keys()))):
        raise ValueError(
            f"{odd}: only the algorithms sa_ppo and sa_dqn take this (--algo sa-ppo), got algo {algo}; "
            "or train any algorithm behind an attack: attack= and threat= (--attack NAME --epsilon RADIUS)"
        )
    if attack == "learned" and algo in OFF_POLICY:
        raise ValueError(
            f"attack 'learned' needs an algorithm with rollouts (ppo, a2c, recurrent_ppo, sa_ppo), got algo {algo}"
        )
    written = copy.deepcopy(arguments)  # SB3 writes into the policy_kwargs that it is given
    if "net_arch" in built:  # in place of the preset's
        written["policy_kwargs"] = {**written.get("policy_kwargs", {}), "net_arch": built["net_arch"]}
    written |= {name: value for name, value in (("network", network), ("activation", activation)) if value is not None}
    side_by_side = preset.env.get("n_envs", 1) if n_envs is None else n_envs
    learns = recipe.normalization is None and (preset.normalize if normalize is None else normalize)
    if (attack is None) != (threat is None):
        raise ValueError("attack and threat go together: got one without the other")
    start = RandomNoise() if attack == "learned" else attack
    venv, normalizer = _training_env(recipe, side_by_side, check_count("seed", seed, least=0), learns, start, threat)
    if algo in OFF_POLICY:
        check_replay(venv)
    name, policy_kwargs = policy_for(venv.observation_space, algo)
    if policy_kwargs or built:
        arguments["policy_kwargs"] = policy_kwargs | arguments.get("policy_kwargs", {}) | built
    warn_of_actions(network, recipe.action_space)
    # Networks this small only lose time to a second thread, and the weights would depend on the number of threads.
    with one_thread():
        model = kind(name, venv, seed=seed, verbose=verbose, **arguments)
        if attack is not None:
            set_victim(venv, model)
        folder.mkdir(parents=True, exist_ok=True)
        # A logger of our own writes into tb/ itself, so that the certificate joins the same TensorBoard run.
        model.set_logger(configure(os.fspath(folder / "tb"), (["stdout"] if verbose else []) + ["tensorboard"]))
        # SB3's own bar needs tqdm, which nothing else here does; this is the bar of certify and attack.
        with rollout_bar("train", steps, visible=progress_bar) as advance:
            callbacks: list[BaseCallback] = [_Advance(advance)]
            if attack == "learned" and threat is not None:
                callbacks.append(_adversary(recipe, threat, preset, side_by_side))
            watch = None if robust is None else _watch(recipe, model, normalizer is not None, steps, int(progress_bar))
            if watch is not None:
                callbacks.append(watch)
            model.learn(steps, callback=callbacks)
        if normalizer is not None:
            recipe = replace(recipe, normalization=Normalization.of(normalizer))
        if watch is not None:
            # Before an evaluation that takes a while: an interrupt must not cost the training.
            save_model(model, folder / "model-last.zip")
            if normalizer is not None and recipe.normalization is not None:
                recipe.normalization.save(folder / "normalization-last.npz")
            watch.evaluate()
            model.logger.dump(model.num_timesteps)
    if watch is not None and watch.kept is not None:
        written["robust"] = {
            "kept": "best",
            "timesteps": watch.kept.timesteps,
            "worst_mean_return": watch.kept.worst_mean_return,
        }
        recipe = _keep_best(model, recipe, watch.kept)
    if attack is not None and threat is not None:
        written["attack"] = {"attack": attack if isinstance(attack, str) else attack.to_dict(), "threat": threat.to_dict()}
    RunInfo(algo, recipe.to_dict(), int(seed), steps, written, dict(build())).save(folder)
    save_model(model, folder / "model.zip")  # last: a folder with a model is complete
    venv.close()
    return model


def _learner(algo: str) -> Any:
    if algo not in ACTING_AS:
        return algorithm_class(algo)
    from robustrl.training import robust

    return {"sa_ppo": robust.SAPPO, "sa_dqn": robust.SADQN}[algo]


def _robust_algorithm(algo: str, robust: str) -> str:
    """The algorithm with a robustness term that is based on another."""
    found = {base: name for name, base in ACTING_AS.items()}.get(algo, algo)
    if found not in ACTING_AS:
        raise ValueError(f"robust {robust!r} needs algo ppo, dqn, sa_ppo or sa_dqn, got {algo}; or train it behind an attack")
    return found


def _watch(recipe: EnvRecipe, model: Any, normalized: bool, steps: int, verbose: int) -> RobustEvalCallback:
    """Evaluations under the attack that the term is about."""
    from robustrl.training.robust import RobustEvalCallback
    from robustrl.training.robust.neighbourhood import check_epsilon

    threat = check_epsilon(model.epsilon, model.norm)
    if not isinstance(model.epsilon, ThreatModel):
        threat = replace(threat, units="normalized" if normalized else frame_units(recipe))
    attack = GradientAttack(Margin() if isinstance(recipe.action_space, spaces.Discrete) else ActionDeviation())
    # Any sooner and the weights would be those of the start.
    unchanged = model.learning_starts if hasattr(model, "learning_starts") else model.n_steps * model.n_envs
    every = max(steps // EVALUATIONS, unchanged + 1)
    return RobustEvalCallback(recipe, {"pgd": (attack, threat)}, every=every, seed=model.seed, verbose=verbose)


def _keep_best(model: Any, recipe: EnvRecipe, kept: Kept) -> EnvRecipe:
    """Give a model its best weights; returns the recipe with what normalised observations then."""
    model.policy.load_state_dict(kept.weights)
    return recipe if kept.normalization is None else replace(recipe, normalization=kept.normalization)


def policy_for(space: spaces.Space[Any], algo: str) -> tuple[str, dict[str, Any]]:
    """SB3's name of the policy for an observation space, and the policy_kwargs without which it would misread pixels."""
    kind = "MlpPolicy"
    if isinstance(space, spaces.Dict):
        kind = "MultiInputPolicy"
    elif len(space.shape or ()) == 3:
        kind = "CnnPolicy"
    pixels = {"normalize_images": False} if kind == "CnnPolicy" and space.dtype is not None and space.dtype.kind == "f" else {}
    return (kind if algo != "recurrent_ppo" else kind.replace("Policy", "LstmPolicy")), pixels


def _adversary(recipe: EnvRecipe, threat: ThreatModel, preset: Preset, n_envs: int) -> BaseCallback:
    """The other half of ATLA, with the hyper-parameters that the preset has for PPO."""
    from robustrl.training.robust import ATLA

    return ATLA(recipe, threat, n_envs=n_envs, **preset.ppo)


def _training_env(
    recipe: EnvRecipe, n_envs: int, seed: int, learns: bool, attack: Attack | None = None, threat: ThreatModel | None = None
) -> tuple[Any, Any]:
    """The vector environment of a recipe, and the VecNormalize inside its noise that still learns."""
    if not learns:
        return make_vec_env(recipe, n_envs, seed=seed, attack=attack, threat=threat), None
    from stable_baselines3.common.vec_env import VecNormalize

    normalizer = VecNormalize(make_vec_env(replace(recipe, noise=None, frame_stack=1), n_envs, seed=seed))
    venv = wrap_vec_env(normalizer, recipe, attack, threat)
    venv.seed(seed)
    return venv, normalizer


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
