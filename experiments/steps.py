"""Single steps of policies: how far must an attacker move one observation to change the majority's action?

    python experiments/steps.py

CartPole (the policy trained under sigma 0.2): every step of one episode, all of them at 95 % together, as a trace; with the plain, the
two-sided and the second-order method. One round of Pong (trained under sigma 0.05, in [0, 1] pixel units): observations of four stacked
pictures from one round, labelled with the action of a vote of its own. Writes `experiments/results/steps/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import robustrl as rrl
from robustrl.agents import MajorityVoteAgent
from robustrl.envs.recipe import make_vec_env
from robustrl.report.accuracy import AccuracyReport, Row
from robustrl.rollouts.executor import one_thread
from robustrl.rollouts.trace import radius_trace
from robustrl.training.run_files import RunInfo

ZOO, OUT = Path(__file__).parent.parent / "zoo", Path(__file__).parent / "results" / "steps"
COPIES, PICTURES = 10_000, 60


def cartpole() -> list[str]:
    """Traces of the same environment seed with three methods."""
    folder = ZOO / "cartpole-ppo-sigma0.2"
    recipe = RunInfo.load(folder).env
    lines = ["| method | return | median radius | largest | steps without |", "|---|---|---|---|---|"]
    for method in ("one-sided", "two-sided", "second-order"):
        agent = MajorityVoteAgent(recipe.view(rrl.load_agent(folder, device="cpu")), rrl.Gaussian(0.2), seed=0)
        trace = radius_trace(agent, recipe, alpha=0.05, n=COPIES, method=method, seed=0)
        radii = trace.radii
        cells = (
            method,
            f"{trace.rewards.sum():g}",
            f"{np.median(radii):.4f}",
            f"{radii.max():.4f}",
            f"{int((radii == 0).sum())} of {len(radii)}",
        )
        lines.append("| " + " | ".join(cells) + " |")
        trace.save(OUT / f"cartpole-{method}.json")
        if method == "one-sided":
            trace.plot(OUT / "cartpole.png")
    return lines


def pong() -> list[str]:
    """Observations of one round, certified as a classifier's pictures are."""
    folder = ZOO / "pong-one-round-ppo-sigma0.05"
    recipe = RunInfo.load(folder).env
    agent = MajorityVoteAgent(recipe.view(rrl.load_agent(folder, device="cpu")), rrl.Gaussian(0.05), votes=100, seed=0)
    venv = make_vec_env(replace(recipe, noise=None), 1, seed=0)
    observation, seen, labels = venv.reset(), [], []
    for _ in range(PICTURES):
        action, _ = agent.predict(observation)
        seen.append(observation[0])
        labels.append(int(action[0]))
        observation, _, dones, _ = venv.step(action)
        if dones[0]:
            break
    venv.close()
    certificates = agent.certify(np.stack(seen), alpha=0.001, n=COPIES // 10)
    rows = tuple(Row(i, labels[i], c.prediction, c.radius, 0.0) for i, c in enumerate(certificates))
    report = AccuracyReport(rows, 2, "one round of Pong, Gaussian(sigma=0.05)")
    report.write_log(OUT / "pong.tsv")
    report.plot(OUT / "pong.png")
    (OUT / "pong.json").write_text(json.dumps([certificate.evidence for certificate in certificates]))
    return ["```", report.table([0, 0.01, 0.02, 0.05, 0.1]), "```"]


def main() -> None:
    """Certify and write."""
    OUT.mkdir(parents=True, exist_ok=True)
    with one_thread():
        text = [
            "# Single steps of policies",
            "",
            "Command: `python experiments/steps.py`",
            "",
            f"## CartPole, every step of an episode at 95% together, n = {COPIES} copies per step",
            "",
            *cartpole(),
            "",
            f"## Observations of one round of Pong, n = {COPIES // 10}, alpha = .001 each",
            "",
            *pong(),
            "",
        ]
    (OUT / "summary.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
