"""One episode, and how far an attacker would have to go at each of its steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustrl.agents.voting import MajorityVoteAgent
from robustrl.certify.classify import certified
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.methods import METHODS
from robustrl.certify.radius import ABSTAIN, SAME, RadiusCertificate
from robustrl.certify.storage import unique_keys
from robustrl.envs.recipe import EnvRecipe, make_vec_env
from robustrl.errors import CertificateError, check_alpha, check_count, check_finite_array, check_real
from robustrl.files import save_figure, write_atomically
from robustrl.noise import noise_from_dict
from robustrl.policy import PolicyView
from robustrl.rollouts.progress import progress_bar


@dataclass(frozen=True)
class RadiusTrace:
    """An episode with a certificate per step.

    Attributes:
        certificates: one per step; together they fail with probability at most `alpha`.
        actions: what was done, int64 (T,): the certified action, or the most frequent one where the certificate abstains.
        rewards: (T,).
        alpha: of the whole episode; it was split over the horizon, as its length is not known beforehand. 0 for "lipschitz".
        horizon: most steps the episode could have had.
        label: of the environment.
    """

    certificates: tuple[RadiusCertificate, ...]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    alpha: float
    horizon: int
    label: str

    @property
    def radii(self) -> NDArray[np.float64]:
        """Per step, 0 where the certificate abstains; (T,)."""
        return np.array([certificate.radius for certificate in self.certificates])

    def table(self) -> str:
        """The episode in a few lines."""
        radii, norm = self.radii, self.certificates[0].norm
        return "\n".join(
            [
                f"{self.label}: {len(radii)} steps, return {self.rewards.sum():.6g}, {self.certificates[0].method}",
                f"confidence {100 * (1 - self.alpha):.10g}% for all steps at once",
                f"l{norm:g} radius  min {radii.min():.4g}  median {np.median(radii):.4g}  max {radii.max():.4g}",
                f"steps without a certificate: {int((radii == 0).sum())}",
                "each radius is about its own step: an attacker may have changed the state before",
            ]
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the radius over the steps as .png, .pdf or .svg, atomically."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.2), layout="constrained")
        ax = figure.subplots()
        steps = np.arange(len(self.radii))
        for action in np.unique(self.actions):
            chosen = self.actions == action
            ax.plot(steps[chosen], self.radii[chosen], ".", markersize=5, label=f"action {action}")
        noise = self.certificates[0].noise
        ax.set_title(
            f"{self.label}, {'no noise' if noise is None else noise.scale}, {100 * (1 - self.alpha):g}% for all steps at once"
        )
        ax.set_xlabel("step")
        ax.set_ylabel(f"certified l{self.certificates[0].norm:g} radius")
        ax.set_ylim(bottom=-0.02 * float(self.radii.max() or 1))
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the numbers and the evidence of every step as JSON, atomically; `load` recomputes them."""
        first = self.certificates[0]
        document = {
            "environment": self.label,
            "alpha": self.alpha,
            "alpha_per_step": first.alpha,
            "horizon": self.horizon,
            "noise": None if first.noise is None else first.noise.to_dict(),
            "norm": first.norm,
            "method": first.method,
            "return": float(self.rewards.sum()),
            "not_covered": list(first.not_covered),
            "steps": [
                {
                    "action": int(action),
                    "reward": float(reward),
                    "prediction": c.prediction,
                    "radius": c.radius,
                    "evidence": c.evidence,
                }
                for action, reward, c in zip(self.actions, self.rewards, self.certificates, strict=True)
            ],
        }
        write_atomically(path, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RadiusTrace:
        """Read a trace, and recompute every step from its evidence.

        Raises:
            OSError: if the file cannot be read.
            CertificateError: if it is damaged, or a radius does not follow from its evidence.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
            noise = None if document["noise"] is None else noise_from_dict(document["noise"])
            steps, share, together = document["steps"], document["alpha_per_step"], document["alpha"]
            common: dict[str, Any] = {"alpha": share, "norm": document["norm"], "scope": "step", "noise": noise}
            certificates = tuple(certified(document["method"], step["evidence"], **common) for step in steps)
            actions = np.array([check_count("action", step["action"], least=0) for step in steps])
            rewards = check_finite_array("rewards", [step["reward"] for step in steps])
            stated = [(check_count("prediction", step["prediction"], least=ABSTAIN), step["radius"]) for step in steps]
            total, covered = check_real("return", document["return"]), set(document["not_covered"])
            together = METHODS[document["method"]].check_alpha(together) if noise is None else check_alpha(together)
            horizon = check_count("horizon", document["horizon"])
        except (KeyError, TypeError, ValueError) as error:
            raise CertificateError(f"{os.fspath(path)}: no trace that can be recomputed: {error!r}") from None
        for t, (certificate, (prediction, radius)) in enumerate(zip(certificates, stated, strict=True)):
            if prediction != certificate.prediction or not math.isclose(radius, certificate.radius, rel_tol=SAME):
                raise CertificateError(f"{os.fspath(path)}: step {t} does not follow from its evidence: {certificate!r}")
            if prediction not in (ABSTAIN, int(actions[t])):
                raise CertificateError(f"{os.fspath(path)}: step {t} certifies another action than was taken")
        if not math.isclose(total, float(rewards.sum()), rel_tol=SAME, abs_tol=SAME):
            raise CertificateError(f"{os.fspath(path)}: the return is {total}, but the rewards sum to {rewards.sum()}")
        if omitted := [sentence for c in certificates for sentence in c.not_covered if sentence not in covered]:
            raise CertificateError(f"{os.fspath(path)}: field 'not_covered' leaves out: {omitted[0]}")
        if len(steps) > horizon or share * horizon > together * (1 + SAME):
            raise CertificateError(
                f"{os.fspath(path)}: {len(steps)} of at most {horizon} steps at level {share} are not one statement at {together}"
            )
        return cls(certificates, actions, rewards, together, horizon, str(document["environment"]))


def radius_trace(
    agent: Any,
    env: Any,
    *,
    alpha: float = 0.05,
    n0: int = 100,
    n: int = 1000,
    method: str = "one-sided",
    seed: int = 0,
    progress: bool = False,
) -> RadiusTrace:
    """Play one clean episode and certify every action.

    Args:
        agent: who plays: a `MajorityVoteAgent`, whose noise is its own; with method "lipschitz" a policy that `LipschitzScores.of`
            takes, which plays greedily.
        env: id, factory, recipe, ...: anything `EnvRecipe.of` takes. Noise in the recipe is left out.
        alpha: failure probability of all steps together, split evenly over the horizon; "lipschitz" has none.
        n0: noisy copies per step that choose the action.
        n: noisy copies per step that give the evidence.
        method: see `MajorityVoteAgent.certify`; or "lipschitz".
        seed: of the environment.
        progress: show a bar.
    Raises:
        TypeError: for an agent that the method does not take.
        ValueError: for bad numbers, or an environment that does not fit.
    """
    recipe = replace(EnvRecipe.of(env), noise=None)
    if (method == "lipschitz") == isinstance(agent, MajorityVoteAgent):
        raise TypeError(f"agent must be a MajorityVoteAgent, or a policy for method 'lipschitz', got {type(agent).__name__}")
    if method == "lipschitz":
        judged, alpha = _greedy(recipe.view(agent)), 0.0
    else:
        judged = _voting(agent, check_alpha(alpha) / recipe.horizon, n0, n, method)
    venv = make_vec_env(recipe, 1, seed=seed)
    certificates, actions, rewards = [], [], []
    try:
        observation, done = venv.reset(), False
        with progress_bar("trace", recipe.horizon, visible=progress) as advance:
            while not done:
                certificate, action = judged(observation)
                observation, reward, dones, _ = venv.step(np.array([action]))
                certificates.append(certificate)
                actions.append(action)
                rewards.append(float(reward[0]))
                done = bool(dones[0])
                advance(1)
    finally:
        venv.close()
    return RadiusTrace(tuple(certificates), np.array(actions), np.array(rewards), alpha, recipe.horizon, recipe.label)


Judged = Callable[[Any], tuple[RadiusCertificate, int]]
"""From an observation (1, *shape) to a certificate and what is done."""


def _voting(agent: MajorityVoteAgent, alpha: float, n0: int, n: int, method: str) -> Judged:
    def judged(observation: Any) -> tuple[RadiusCertificate, int]:
        found = agent.certify(observation, alpha=alpha, n0=n0, n=n, method=method)[0]
        return found, int(agent.predict(observation)[0][0]) if found.abstained else found.prediction

    return judged


def _greedy(policy: PolicyView) -> Judged:
    scores = LipschitzScores.of(policy)

    def judged(observation: Any) -> tuple[RadiusCertificate, int]:
        with torch.inference_mode():
            actions = policy.actions(policy.scores(torch.as_tensor(observation, device=policy.device)))
        return scores.certificates(observation)[0], int(policy.received(actions)[0])

    return judged
