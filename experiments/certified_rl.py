"""Certified reinforcement learning without and with noise: what is proven, and what the strongest attack leaves.

    python experiments/certified_rl.py [--only catch islands cartpole]

- catch: a ball falls through 9 rows, a paddle of 3 pixels must be below it in the end; +1 or -1. One channel of 10 x 9 pixels.
- islands: robustrl/LavaIslands-v0 on a map of 9 x 9 cells, with pictures of 3 x 36 x 36 pixels; steps slip with probability .1; +1 at
  the goal, -1 in lava; at most 20 steps.
- cartpole: 200 steps; the orthogonal student that `experiments/distillation.py` made of the zoo's DQN, and the zoo's DQN trained under noise.

Of catch and islands all states are known, so a network with Lipschitz constant 1 learns what is best in each by cross entropy with an
offset margin. The deterministic policy is certified by the prefix of the clean episode and by search of all that an attacker can bring
about ("tree"), and attacked by the fast attacks of `attack_suite`. The smoothed one is a plain network trained on noisy pictures, with the
noise of the certificate. Budgets are l2, of a whole episode. Writes `experiments/results/certified_rl/`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

import robustrl as rrl
from robustrl.envs.recipe import EnvRecipe
from robustrl.files import save_figure, write_atomically
from robustrl.networks import LipschitzCNN, LipschitzMLP, OrthogonalLinear
from robustrl.networks.extractors import LipschitzExtractor
from robustrl.policy import PolicyView
from robustrl.suite import attack_suite
from robustrl.training.supervised import CrossEntropy, Examples, RobustTrainer

HOME = Path(__file__).parent
OUT = HOME / "results" / "certified_rl"
ROWS, COLUMNS = 10, 9
ISLAND = """lllllllll
lsssssssl
lsassssll
lssssssll
lssslsssl
lsssssssl
llssssgsl
llssssssl
lllllllll"""
SLIP, SIDE = 0.1, 36
UPDATES, BATCH, NOISY = 600, 64, 8000
Pictures = NDArray[np.float32]


class Catch(gym.Env[Pictures, int]):
    """A ball falls; the paddle moves left, stays or moves right."""

    observation_space = spaces.Box(0, 1, (1, ROWS, COLUMNS), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Pictures, dict[str, Any]]:
        super().reset(seed=seed)
        self.ball, self.row, self.paddle = int(self.np_random.integers(COLUMNS)), 0, COLUMNS // 2
        return self.picture(self.ball, self.row, self.paddle), {}

    def step(self, action: int) -> tuple[Pictures, float, bool, bool, dict[str, Any]]:
        self.paddle = min(max(self.paddle + int(action) - 1, 1), COLUMNS - 2)
        self.row += 1
        over = self.row == ROWS - 1
        reward = (1.0 if abs(self.ball - self.paddle) <= 1 else -1.0) if over else 0.0
        return self.picture(self.ball, self.row, self.paddle), reward, over, False, {}

    @staticmethod
    def picture(ball: int, row: int, paddle: int) -> Pictures:
        found = np.zeros((1, ROWS, COLUMNS), np.float32)
        found[0, -1, paddle - 1 : paddle + 2] = 1.0
        found[0, row, ball] = 1.0
        return found


class Islands(gym.ObservationWrapper[Pictures, int, int]):
    """Small pictures of a grid world, (3, height, width), in place of the number of its state."""

    def __init__(self) -> None:
        super().__init__(gym.make("robustrl/LavaIslands-v0", map=ISLAND, slip=SLIP))
        self.observation_space = spaces.Box(0, 1, (3, SIDE, SIDE), np.float32)

    def observation(self, observation: int) -> Pictures:
        return picture_of_state(int(observation)).copy()


@cache
def picture_of_state(state: int) -> Pictures:
    """What a state looks like."""
    env: Any = gym.make("robustrl/LavaIslands-v0", map=ISLAND, slip=SLIP, render_mode="rgb_array")
    env.reset(seed=0)
    env.unwrapped.state = state
    whole = np.asarray(env.render(), dtype=np.float32) / 255
    cell = len(whole) // SIDE
    whole = whole[: SIDE * cell, : SIDE * cell]
    found: Pictures = whole.reshape(SIDE, cell, SIDE, cell, 3).mean((1, 3)).transpose(2, 0, 1).copy()
    return found


@dataclass(frozen=True)
class World:
    """What is needed of one world.

    Attributes:
        env: deterministic recipe.
        policy: with a known Lipschitz constant.
        smoothed: trained under noise.
        noise: of the smoothed one.
        budgets: l2, of an episode.
        rewards: least and largest of a step.
        returns: least and largest of an episode.
        episodes: searched, smoothed and attacked.
        nodes: most states of one episode's tree.
    """

    env: EnvRecipe
    policy: Any
    smoothed: Any
    noise: rrl.Gaussian
    budgets: NDArray[np.float64]
    rewards: tuple[float, float]
    returns: tuple[float, float]
    episodes: int
    nodes: int


def student(extractor: LipschitzExtractor, pictures: Pictures, actions: NDArray[np.int64], margin: float) -> PolicyView:
    """A network with constant 1 that takes the given actions."""
    module = nn.Sequential(extractor, OrthogonalLinear(extractor.features_dim, int(actions.max()) + 1))
    epochs = math.ceil(UPDATES * BATCH / len(pictures))
    trainer = RobustTrainer("none", margin, 2, epochs=epochs, batch_size=BATCH, learning_rate=0.1, hold_out=0)
    trainer.fit(module, Examples(torch.tensor(pictures), torch.tensor(actions)), CrossEntropy(temperature=0.25, margin=margin))
    return PolicyView.from_torch(module, kind="logits", observation_shape=pictures.shape[1:])


def plain(pictures: Pictures, actions: NDArray[np.int64], sigma: float) -> PolicyView:
    """A plain network that takes the given actions on noisy pictures."""
    copies = math.ceil(NOISY / len(pictures))
    inputs = torch.tensor(pictures).repeat(copies, 1, 1, 1)
    inputs = inputs + sigma * torch.randn(inputs.shape)
    hidden, outputs = 256, int(actions.max()) + 1
    module = nn.Sequential(
        *(nn.Flatten(), nn.Linear(inputs[0].numel(), hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)),
    )
    trainer = RobustTrainer("none", sigma, 2, epochs=15, learning_rate=1e-3, hold_out=0)
    trainer.fit(module, Examples(inputs, torch.tensor(actions).repeat(copies)))
    return PolicyView.from_torch(module, kind="logits", observation_shape=pictures.shape[1:])


def catch() -> World:
    """All balls, rows and paddles; towards the ball, and stay below it."""
    states = [(ball, row, paddle) for ball in range(COLUMNS) for row in range(ROWS - 1) for paddle in range(1, COLUMNS - 1)]
    pictures = np.stack([Catch.picture(*state) for state in states])
    actions = np.array([1 + np.sign(ball - paddle) for ball, _, paddle in states])
    sigma = 0.15
    return World(
        EnvRecipe.of(Catch, max_episode_steps=ROWS - 1),
        student(LipschitzMLP(Catch.observation_space, (128, 128)), pictures, actions, 0.3),
        plain(pictures, actions, sigma),
        rrl.Gaussian(sigma),
        np.linspace(0, 1, 11),
        (-1.0, 1.0),
        (-1.0, 1.0),
        200,
        20_000,
    )


def islands() -> World:
    """All living states with the actions of the discounted optimum."""
    env = Islands()
    world: Any = env.unwrapped
    best = world.mdp.solve()[1]
    alive = np.flatnonzero(world.outcomes.valid.any(1))
    pictures = np.stack([picture_of_state(int(state)) for state in alive])
    shape: dict[str, Any] = {"channels": (16, 32, 32), "strides": (4, 2, 2), "terms": 4, "normalizer": "reshapes"}
    sigma, actions = 0.2, np.asarray(best)[alive]
    return World(
        EnvRecipe.of(Islands, max_episode_steps=20),
        student(LipschitzCNN(env.observation_space, **shape), pictures, actions, 1.0),
        plain(pictures, actions, sigma),
        rrl.Gaussian(sigma),
        np.linspace(0, 2, 11),
        (-1.0, 1.0),
        (-1.0, 1.0),
        30,
        3_000,
    )


def cartpole() -> World:
    """The orthogonal student of the zoo's DQN, and its DQN that was trained under noise."""
    env, zoo = EnvRecipe.of("CartPole-v1", max_episode_steps=200), HOME.parent / "zoo"
    return World(
        env,
        rrl.load_agent(zoo / "students" / "cartpole-dqn-lipschitz", env),
        rrl.load_agent(zoo / "cartpole-dqn-sigma0.2", EnvRecipe.of(env, noise=rrl.Gaussian(0.2))),
        rrl.Gaussian(0.2),
        np.linspace(0, 0.5, 11),
        (1.0, 1.0),
        (0.0, 200.0),
        50,
        10_000,
    )


WORLDS = {"catch": catch, "islands": islands, "cartpole": cartpole}


def measure(name: str) -> dict[str, Any]:
    """Bounds and attacked returns of one world, by budget."""
    torch.manual_seed(0)
    world = WORLDS[name]()
    low, high = world.returns
    found: dict[str, Any] = {"budgets": world.budgets.tolist(), "sigma": world.noise.sigma}
    for method in ("prefix", "tree"):
        certificate = rrl.certify_deterministic(
            world.policy,
            world.env,
            world.budgets,
            per="episode",
            method=method,
            episodes=world.episodes,
            nodes=world.nodes,
            reward_low=world.rewards[0],
            return_low=low,
            seed=1,
            progress_bar=True,
        )
        print(certificate.table(), flush=True)
        found[method] = {
            "certified": certificate.values.tolist(),
            "mean of the episodes": certificate.mean_bound.tolist(),
            "exhausted": certificate.exhausted.mean(0).tolist(),
            "states": len(certificate.evidence.times),
        }
    noisy = EnvRecipe.of(world.env, noise=world.noise)
    options: dict[str, Any] = {"return_low": low, "return_high": high, "seed": 1, "progress_bar": True}
    smoothed = rrl.certify_policy(world.smoothed, noisy, world.budgets, 10_000, **options)
    print(smoothed.table(), flush=True)
    found["smoothed"] = {"certified": smoothed.values.tolist()}
    for label, model, env in (("attacked", world.policy, world.env), ("smoothed, attacked", world.smoothed, noisy)):
        found[label] = {}
        worst: list[Any] = [math.inf, ""]
        for budget in world.budgets[2::2]:
            threat = rrl.ThreatModel(norm=2, episode=float(budget))
            reports = attack_suite(model, env, threat, episodes=world.episodes, seed=2)
            # Whoever has more can do what somebody with less does.
            worst = min([worst, *([report.mean, report.label] for report in reports)])
            found[label][f"{budget:g}"] = worst
            print(f"{name}, {label}, {budget:g}: {worst[0]:.3g} ({worst[1]})", flush=True)
    return found


def figure(found: dict[str, dict[str, Any]]) -> None:
    """Bounds and attacks over budgets."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4 * len(found) + 1.5, 3.6), layout="constrained")
    axes = np.atleast_1d(drawing.subplots(1, len(found)))
    for ax, (name, one) in zip(axes, found.items(), strict=True):
        # Steps: a bound holds for smaller budgets too, an attack for larger ones.
        for color, label, width in (("C1", "prefix", 4), ("C0", "tree", 1.5), ("C2", "smoothed", 1.5)):
            style: dict[str, Any] = {"drawstyle": "steps-pre", "linewidth": width, "alpha": 0.5 if width > 2 else 1.0}
            ax.plot(
                one["budgets"], one[label]["certified"], "o-", markersize=3, color=color, label=f"certified, {label}", **style
            )
        for color, label in (("C0", "attacked"), ("C2", "smoothed, attacked")):
            points = [(float(budget), mean) for budget, (mean, _) in one[label].items()]
            ax.plot(*zip(*points, strict=True), "x--", color=color, label=label, drawstyle="steps-post")
        ax.set_title(f"{name}, sigma {one['sigma']:g}")
        ax.set_xlabel("l2 budget of an episode")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("return")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(drawing, OUT / "curves.png")


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """A table per world."""
    text = [
        "# Certified reinforcement learning, without and with noise",
        "",
        "Command: `python experiments/certified_rl.py`",
        "",
        "Returns under every attacker whose changes of the observations have an l2 norm of at most the budget over the whole episode.",
        'Certified with 95 % confidence, all budgets at once; "tree, mean" is certain for the episodes searched; "exhausted": episodes in',
        "which nothing worse can be left in the unsearched part. Attacked: the least mean return among the fast attacks, at this or a smaller budget.",
        "",
    ]
    for name, one in found.items():
        text += [
            f"**{name}**, noise of the smoothed policy {one['sigma']:g}, {one['tree']['states']} states searched",
            "",
            "| budget | prefix | tree | tree, mean | exhausted | attacked | smoothed | smoothed, attacked |",
            "|---" * 8 + "|",
        ]
        for i, budget in enumerate(one["budgets"]):
            cells = [f"{one[part]['certified'][i]:.3g}" for part in ("prefix", "tree")]
            cells += [f"{one['tree']['mean of the episodes'][i]:.3g}", f"{100 * one['tree']['exhausted'][i]:.0f} %"]
            worst = [one[label].get(f"{budget:g}") for label in ("attacked", "smoothed, attacked")]
            shown = ["" if w is None else f"{w[0]:.3g} ({w[1]})" for w in worst]
            text.append(
                "| " + " | ".join([f"{budget:g}", *cells, shown[0], f"{one['smoothed']['certified'][i]:.3g}", shown[1]]) + " |"
            )
        text.append("")
    return text


def main() -> None:
    """Certify, attack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(WORLDS), default=list(WORLDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    raw = OUT / "runs.json"
    found = json.loads(raw.read_text()) if raw.exists() else {}
    for name in arguments.only:
        found[name] = measure(name)
        write_atomically(raw, json.dumps(found, indent=1).encode())
    found = {name: found[name] for name in WORLDS if name in found}
    figure(found)
    text = "\n".join(summary(found))
    write_atomically(OUT / "summary.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
