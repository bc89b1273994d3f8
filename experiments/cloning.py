"""Cloned CartPole: how many flipped demonstrations provably change nothing, and how many an attacker needs.

    python experiments/cloning.py        # a few minutes on one core

The demonstrator is a policy from `zoo/`; a fifth of the executed actions are random, so that the demonstrations cover more than
its own narrow path, but the labels are always its own. Settings were fixed beforehand on demonstrations of another policy.
Writes `experiments/results/cloning/`: `summary.md`, `radii.json` (every number behind it) and `radii.png`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from stable_baselines3.common.env_util import make_vec_env

import robustrl as rrl
from robustrl.agents.cloning import BehaviourCloning
from robustrl.certify.labels import LabelVote
from robustrl.files import save_figure, write_atomically

RESULTS = Path("experiments/results/cloning")


@dataclass(frozen=True)
class Settings:
    """Everything that a number in the results depends on.

    Attributes:
        policy: demonstrator, a folder in `zoo/`.
        demonstrations: labelled states.
        random_actions: share of executed actions that are random while demonstrating.
        noise: label noise q of the vote; 0 is the plain ridge classifier.
        states: certified states, drawn from episodes of the clone.
        episodes: of the clone, for its return and for whole trajectories.
        horizons: steps of a trajectory that are certified at once.
        seed: of environments and draws.
    """

    policy: str = "cartpole-ppo-sigma0.2"
    demonstrations: int = 2000
    random_actions: float = 0.2
    noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    states: int = 200
    episodes: int = 20
    horizons: tuple[int, ...] = (1, 10, 50, 200, 500)
    seed: int = 2020


def demonstrate(settings: Settings, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """States and the demonstrator's actions there, a random sample of ten times as many."""
    model, rng = rrl.load_agent(Path("zoo") / settings.policy, device="cpu"), np.random.default_rng(seed)
    env = make_vec_env("CartPole-v1", 10, seed=seed)
    observations, actions, seen = [], [], env.reset()
    for _ in range(settings.demonstrations):
        chosen, _ = model.predict(seen, deterministic=True)
        observations.append(seen.copy())
        actions.append(chosen)
        executed = np.where(rng.random(10) < settings.random_actions, rng.integers(2, size=10), chosen)
        seen, *_ = env.step(executed)
    kept = rng.permutation(10 * settings.demonstrations)[: settings.demonstrations]
    return np.concatenate(observations)[kept], np.concatenate(actions)[kept]


def play(agent: BehaviourCloning, episodes: int, seed: int) -> list[NDArray[Any]]:
    """The states of every episode; CartPole pays 1 per step, so their number is the return."""
    env = gym.make_vec("CartPole-v1", episodes, vectorization_mode="sync")
    seen, _ = env.reset(seed=seed)
    paths: list[list[NDArray[Any]]] = [[] for _ in range(episodes)]
    running = np.ones(episodes, dtype=bool)
    while running.any():
        for i in np.flatnonzero(running):
            paths[i].append(seen[i].copy())
        actions = np.zeros(episodes, dtype=np.int64)
        actions[running] = agent.predict(seen[running])[0]
        seen, _, terminated, truncated, _ = env.step(actions)
        running &= ~(terminated | truncated)
    return [np.array(path) for path in paths]


def flips_needed(agent: BehaviourCloning, state: NDArray[Any], labels: NDArray[np.int64]) -> int:
    """The label-flipping attack: flip the largest votes for the agent's action, as few as change what it does there."""
    weights = np.array(agent.evidence(state)["weights"])
    action = int(agent.predict(state)[0])
    order = np.argsort(-weights * (2 * (labels == action) - 1), kind="stable")
    low, high = 0, len(labels)
    while high - low > 1:  # more flips in this order never help the action
        flips = (low + high) // 2
        poisoned = labels.copy()
        poisoned[order[:flips]] = 1 - poisoned[order[:flips]]
        changed = LabelVote(poisoned, 2, agent.q).predict(weights[None])[0] != action
        low, high = (low, flips) if changed else (flips, high)
    return high


def measure(settings: Settings) -> dict[str, Any]:
    """Everything, as plain data."""
    env = gym.make("CartPole-v1")
    observations, labels = demonstrate(settings, settings.seed)
    held_out = demonstrate(settings, settings.seed + 1)
    rng = np.random.default_rng(settings.seed)
    results: dict[str, Any] = {"settings": asdict(settings), "noise": {}}
    for q in settings.noise:
        agent = BehaviourCloning(env.observation_space, env.action_space, q=q).learn(observations, labels)
        row: dict[str, Any] = {"agreement": float(np.mean(agent.predict(held_out[0][:1000])[0] == held_out[1][:1000]))}
        if q in (0.0, 0.3):
            paths = play(agent, settings.episodes, settings.seed + 2)
            row["returns"] = [len(path) for path in paths]
        if q == 0:
            visited = np.concatenate(paths)
            states = visited[rng.permutation(len(visited))[: settings.states]]
            radii = [agent.radius(path) for path in paths]
            row["trajectories"] = {h: [int(r[:h].min()) for r in radii] for h in settings.horizons}
        row["attack"] = [flips_needed(agent, state, labels) for state in states]
        for method in ("exact",) if q == 0 else ("exact", "neyman-pearson", "kl"):
            certified = agent.certify(states, method)  # type: ignore[arg-type]
            row[method] = certified.radius.tolist()
            violations = int(np.sum(certified.radius >= row["attack"]))
            if violations:
                raise SystemExit(f"the attack changed {violations} certified actions: certificate or attack is wrong")
        row["abstained"] = int(certified.abstained.sum())
        results["noise"][f"{q:g}"] = row
        print(f"q = {q:g}: " + ", ".join(f"{k} {np.median(v):g}" for k, v in row.items() if isinstance(v, list)), flush=True)
    return results


def summarise(results: dict[str, Any], settings: Settings) -> None:
    """`summary.md` and `radii.png`."""
    names = {
        "exact": "worst flips (exact)",
        "neyman-pearson": "Neyman-Pearson",
        "kl": "KL (the paper's)",
        "attack": "attack needs",
    }
    lines = [
        f"# Cloned CartPole: certified label flips among {settings.demonstrations:,} demonstrations",
        "",
        "Command: `python experiments/cloning.py`",
        "",
        f"At {settings.states} states that the clone visits (those of q = 0 for every q). Agreement: with the demonstrator, at "
        '1,000 of its other states. "Attack needs" is the number of flips with which the attack changed the action.',
        "",
        "| q | agreement | row | 10% | median | 90% | mean | share with at least 10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for q, row in results["noise"].items():
        for key, name in names.items():
            if key in row:
                flips = np.array(row[key])
                ten, middle, ninety = np.quantile(flips, [0.1, 0.5, 0.9])
                share = np.mean(flips >= 10)
                lines.append(
                    f"| {q} | {row['agreement']:.1%} | {name} | {ten:.0f} | {middle:.0f} | {ninety:.0f} | {flips.mean():.1f} | {share:.1%} |"
                )
    lines += ["", "Return of the clone (500 is the most), " + f"{settings.episodes} episodes:"]
    for q, row in results["noise"].items():
        if "returns" in row:
            lines.append(f"q = {q}: mean {np.mean(row['returns']):.1f}, smallest {min(row['returns'])}.")
    lines += [
        "",
        "Whole trajectories at q = 0: flips that change no action in the first steps of an episode (smallest radius on the way).",
        "",
        "| steps | smallest episode | median | largest |",
        "|---|---|---|---|",
    ]
    for horizon, radii in results["noise"]["0"]["trajectories"].items():
        lines.append(f"| {horizon} | {min(radii)} | {np.median(radii):g} | {max(radii)} |")
    write_atomically(RESULTS / "summary.md", ("\n".join(lines) + "\n").encode())

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    plain = np.array(results["noise"]["0"]["exact"])
    for ax, q in zip(axes, ("0.1", "0.3"), strict=True):
        row = results["noise"][q]
        curves = {f"attack, q = {q}": np.array(row["attack"]) - 1, "plain ridge, worst flips": plain}
        curves |= {f"q = {q}, {names[key]}": np.array(row[key]) for key in ("exact", "neyman-pearson", "kl")}
        for (label, flips), style in zip(curves.items(), ("r:", "k--", "C0-", "C1-", "C2-"), strict=True):
            grid = np.arange(0, 1 + max(plain.max(), flips.max()))
            width = 4 if style == "r:" else 1.5
            ax.plot(grid, [(flips >= r).mean() for r in grid], style, lw=width, label=label)
        ax.set(xscale="symlog", xlim=(0, None), xlabel="flipped demonstrations r", title=f"label noise q = {q}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("share of states whose action r flips cannot change")
    save_figure(figure, RESULTS / "radii.png")


def main() -> None:
    """Measure, then summarise."""
    settings = Settings()
    results = json.loads(json.dumps(measure(settings)))
    write_atomically(RESULTS / "radii.json", json.dumps(results, indent=1).encode())
    summarise(results, settings)
    print((RESULTS / "summary.md").read_text())


if __name__ == "__main__":
    main()
