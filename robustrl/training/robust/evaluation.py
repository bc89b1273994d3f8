"""Stop robust overfitting: keep the weights that are best against the worst attacker."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from robustrl.attacks.base import Attack
from robustrl.envs.hosts import as_learner_sees
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import in_frame_units
from robustrl.errors import check_count
from robustrl.files import write_atomically
from robustrl.policy import Normalization
from robustrl.rollouts.collect import collect, make_job
from robustrl.threat import ThreatModel
from robustrl.training.train import save_model


@dataclass(frozen=True)
class Kept:
    """The best of a training so far.

    Attributes:
        timesteps: environment steps by then.
        worst_mean_return: of all evaluations without and under attacks.
        weights: `state_dict` of the whole policy, target networks included.
        normalization: of the observations, learned by then; None if there was none.
    """

    timesteps: int
    worst_mean_return: float
    weights: dict[str, Tensor]
    normalization: Normalization | None


class RobustEvalCallback(BaseCallback):
    """Evaluate a learner without and under attacks, and keep its weights where the worst mean return is best.

    The episodes, attackers' random numbers included, are the same every time, so that differences are those of the weights. The best mean
    return was chosen for being high: measure the kept model again on other seeds (`attack_policy`).

    Args:
        env: where to evaluate: anything `EnvRecipe.of` takes. A VecNormalize of the learner's chain is taken over as it is then.
        attacks: attack and budget by name, e.g. `{"mad": (GradientAttack(), ThreatModel(norm=inf, step=0.1))}`.
        every: environment steps between evaluations; the first comes after that many.
        episodes: per attack.
        best: folder or zip file for the best weights; None to keep none. A folder gets `model.zip`, `best.json` and, of a learned
            normalisation, `normalization.npz`; it is no run directory: `load_agent("runs/best/model.zip")`.
        deterministic: greedy actions, or sampled ones.
        seed: of the episodes.
        verbose: 1 prints a line before every evaluation, which takes a while.

    Attributes:
        kept: the best weights themselves, in memory; None before the first evaluation.
        best_worst_case: the highest of the worst mean returns.
        history: (environment steps, mean return by name, "clean" among them) of every evaluation.

    Examples:
        >>> import math, robustrl as rrl                                                                       # doctest: +SKIP
        >>> suite = {"mad": (rrl.attacks.GradientAttack(), rrl.ThreatModel(norm=math.inf, step=0.1))}            # doctest: +SKIP
        >>> model.learn(100_000, callback=RobustEvalCallback("CartPole-v1", suite, best="runs/best"))            # doctest: +SKIP

    Source: the idea of Rice, Wong, Kolter, "Overfitting in adversarially robust deep learning" (ICML 2020), arXiv:2002.11569.
    """

    def __init__(
        self,
        env: Any,
        attacks: Mapping[str, tuple[Attack, ThreatModel]],
        *,
        every: int = 10_000,
        episodes: int = 20,
        best: str | os.PathLike[str] | None = None,
        deterministic: bool = True,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.recipe, self.attacks = EnvRecipe.of(env), dict(attacks)
        if "clean" in self.attacks:
            raise ValueError("attacks must not name one 'clean': that is the evaluation without an attack")
        self.every, self.episodes = check_count("every", every), check_count("episodes", episodes)
        self.best = None if best is None else Path(best)
        self.deterministic, self.seed = deterministic, check_count("seed", seed, least=0)
        self.kept: Kept | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self._due = self.every

    @property
    def best_worst_case(self) -> float:
        return -math.inf if self.kept is None else self.kept.worst_mean_return

    def _on_training_start(self) -> None:
        self._due = self.num_timesteps + self.every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._due:
            self._due = self.num_timesteps + self.every
            self.evaluate()
        return True

    def evaluate(self) -> dict[str, float]:
        """Mean returns by name; keeps the weights if the worst of them is the best so far."""
        if self.verbose:
            names = ", ".join(("clean", *self.attacks))
            print(f"step {self.num_timesteps}: evaluating {self.episodes} episodes each: {names}", flush=True)
        recipe = as_learner_sees(self.recipe, self.model)
        view, common = recipe.view(self.model), {"seed": self.seed, "deterministic": self.deterministic}
        means: dict[str, float] = {}
        for name, (attack, threat) in {"clean": (None, None), **self.attacks}.items():
            here = None if threat is None else in_frame_units(threat, recipe)
            job = make_job(view, recipe, attack=attack, threat=here, **common)  # type: ignore[arg-type]
            means[name] = float(collect(job, self.episodes).returns.mean())
            self.logger.record(f"robust_eval/{name}", means[name])
        worst = min(means.values())
        self.logger.record("robust_eval/worst", worst)
        self.history.append((self.num_timesteps, means))
        if worst > self.best_worst_case:
            weights = copy.deepcopy(self.model.policy.state_dict())
            self.kept = Kept(self.num_timesteps, worst, weights, recipe.normalization)
            if self.best is not None:
                self._write(self.best, self.kept)
        self.logger.record("robust_eval/best_worst_case", self.best_worst_case)
        return means

    def _write(self, best: Path, kept: Kept) -> None:
        path = best if best.suffix == ".zip" else best / "model.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kept.normalization is not None:
            kept.normalization.save(path.parent / "normalization.npz")
        steps = f'{{"timesteps": {kept.timesteps}, "worst_mean_return": {kept.worst_mean_return}}}'
        write_atomically(path.with_name("best.json"), steps.encode())
        save_model(self.model, path)
