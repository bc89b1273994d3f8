"""Adaptive attackers against the bounds: simulations with the real mechanisms and wrappers, and exact dynamic programs.

What the certificates rest on, for Gaussian noise: the log-likelihood ratio of an attacked against a clean episode is
N(+mu^2/2, mu^2) for every adaptive attacker that spends exactly its budget, mu = B / sigma (Kumar, Levine, Feizi 2022).
For the l1 and l0 mechanisms: the attacked and the clean run differ with at most the mechanism's `shift`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from scipy import stats
from scipy.special import ndtr, ndtri
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from robustrl.envs import add_noise, check_chain
from robustrl.errors import ChainError
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.threat import Ledger, ThreatModel

Floats = np.ndarray


def _standard_error(p: float, n: int) -> float:
    return math.sqrt(max(p * (1 - p), 1 / n) / n)


# ----------------------------------------------------- the tight environment: equality of attack and certificate

TIGHT_STEPS, TIGHT_RUNS = 8, 100_000


def _tight_statistic(noise: Gaussian, budget: float, seed: int) -> Floats:
    """sum_t y_t / (sigma sqrt T) where every true frame is 0 and e_t = B / sqrt T: N(B / sigma, 1)."""
    generator, total = np.random.default_rng(seed), np.zeros(TIGHT_RUNS)
    e = np.full((TIGHT_RUNS, 1), budget / math.sqrt(TIGHT_STEPS))
    for _ in range(TIGHT_STEPS):
        total += noise.perturb(e, generator)[:, 0]
    return total / (noise.smallest * math.sqrt(TIGHT_STEPS))


@pytest.mark.parametrize(("p", "mu", "worst"), [(0.9, 1.0, 0.610856), (0.99, 2.0, 0.627919), (0.7, 0.5, 0.509733)])
def test_the_best_attack_on_the_tight_environment_attains_the_certificate(p: float, mu: float, worst: float) -> None:
    """Success means a statistic below its clean p-quantile; no certificate above `worst` can be true."""
    noise = Gaussian(0.4)
    attacked = float(np.mean(_tight_statistic(noise, 0.4 * mu, seed=1) <= ndtri(p)))
    clean = int(np.sum(_tight_statistic(noise, 0.0, seed=2) <= ndtri(p)))
    assert attacked == pytest.approx(worst, abs=4 * _standard_error(worst, TIGHT_RUNS))
    assert float(noise.lower(p, 0.4 * mu)) == pytest.approx(worst, abs=6e-7)
    sampled = stats.beta.ppf(1e-4, clean, TIGHT_RUNS - clean + 1)  # a lower confidence bound on p from clean runs
    assert float(noise.lower(sampled, 0.4 * mu)) <= attacked + 4 * _standard_error(attacked, TIGHT_RUNS)


@pytest.mark.parametrize(
    ("quantile", "worst"),
    [
        (lambda u: u, lambda mu: ndtr(-mu / math.sqrt(2))),  # Uniform(0, 1)
        (lambda u: np.exp(0.3 + 0.7 * ndtri(u)), lambda mu: math.exp(0.3 - 0.7 * mu + 0.7**2 / 2)),  # LogNormal(.3, .7)
    ],
    ids=["uniform", "lognormal"],
)
@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_the_best_attack_on_the_mean_attains_the_integrated_certificate(
    quantile: Any, worst: Callable[[float], float], mu: float
) -> None:
    """J = F^-1(Phi(-statistic)): W_mu = int lower(S(t)) dt, .239750 for Uniform(0, 1) and .856415 for LogNormal at mu = 1."""
    noise = Gaussian(0.4)
    returns = quantile(ndtr(-_tight_statistic(noise, 0.4 * mu, seed=3)))
    assert returns.mean() == pytest.approx(worst(mu), abs=4 * returns.std() / math.sqrt(TIGHT_RUNS))
    survival = (np.arange(1_000_000) + 0.5) / 1_000_000  # int lower(S) dt = int_0^1 lower(s) dQ(1 - s), by parts a mean over s
    levels = noise.lower(survival, 0.4 * mu)
    integrated = float(np.sum(np.diff(quantile(1 - survival[::-1])) * levels[::-1][1:]) + quantile(1 - survival[-1]))
    assert integrated == pytest.approx(worst(mu), rel=2e-3)


def test_closed_forms_of_the_worst_mean() -> None:
    assert ndtr(-1 / math.sqrt(2)) == pytest.approx(0.239750, abs=5e-7)
    assert math.exp(0.3 - 0.7 + 0.49 / 2) == pytest.approx(0.856415, abs=5e-7)


# -------------------------------------------------- the log-likelihood ratio of an adaptive attack, in real wrappers

STEPS, SIGMA, BUDGET = 5, 0.25, 0.4
MU = BUDGET / SIGMA
ROWS = 40


class Drift(gym.Env[Floats, np.int64]):
    """Two coordinates driven by the actions and by chance, and a dummy one that is always zero; STEPS actions long."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        super().reset(seed=seed)
        self._t, self._x = 0, np.zeros(3)
        return self._x.copy(), {}

    def step(self, action: Any) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self._t += 1
        self._x = self._x + np.append(self.np_random.normal(0, 0.02, 2) + 0.1 * (2 * int(action) - 1), 0.0)
        return self._x.copy(), 1.0, self._t == STEPS, False, {}


class Adversary:
    """Aims at the noise: along everything it has seen of past noise, and along the frame in front of it.

    Legal moves: it knows the true frames, its own perturbations and the past noisy observations (`shown`), not the noise
    of this step. It pads with the dummy coordinate, so that every episode spends exactly BUDGET.
    """

    def __init__(self, n: int) -> None:
        self.n, self.ledger = n, Ledger(ThreatModel(norm=2, episode=BUDGET), n)
        self.generator = np.random.default_rng(99)
        self.shown: Floats | None = None
        self.frames: list[Floats] = []
        self.deltas: list[Floats] = []

    def start(self) -> None:
        self.ledger.reset()
        self.frames, self.deltas, self.shown = [], [], None

    def __call__(self, frames: Floats) -> Floats:
        t = len(self.frames)
        direction = self.generator.standard_normal((self.n, 3)) * 0.3 + 2 * (frames - (self.frames[-1] if t else 0))
        if self.shown is not None:
            past = self.shown - self.frames[-1] - self.deltas[-1]
            direction += 3 * past
        direction[:, 2] = 0
        share = np.where(np.abs(direction[:, 0]) > np.abs(direction[:, 1]), 0.8, 0.3)  # how much depends on what it saw
        left = self.ledger.remaining
        e = direction / np.linalg.norm(direction, axis=1, keepdims=True) * (left * share)[:, None]
        if t == STEPS - 1:
            e[:, 2] = np.sqrt(np.maximum(left**2 - np.sum(e**2, axis=1), 0))
        delivered = frames + e
        self.ledger.charge(frames, delivered)
        self.frames.append(frames.copy())
        self.deltas.append(delivered - frames)
        return delivered


class SingleAttack(gym.Wrapper[Any, Any, Any, Any]):
    chain_role = "attack"

    def __init__(self, env: Any, adversary: Adversary) -> None:
        super().__init__(env)
        self.adversary = adversary

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        frame, info = self.env.reset(**kwargs)
        self.adversary.start()
        return self.adversary(frame[None].astype(np.float64))[0], info

    def step(self, action: Any) -> Any:
        frame, reward, terminated, truncated, info = self.env.step(action)
        return (frame if terminated else self.adversary(frame[None].astype(np.float64))[0]), reward, terminated, truncated, info


class VectorAttack(VectorWrapper[Any, Any, Any, Any, Any]):
    """Episodes of `Drift` end together, so all rows start and stop at once."""

    chain_role = "attack"

    def __init__(self, env: Any, adversary: Adversary) -> None:
        super().__init__(env)
        self.adversary, self.over = adversary, False

    def reset(self, **kwargs: Any) -> Any:
        frames, info = self.env.reset(**kwargs)
        self.adversary.start()
        self.over = False
        return self.adversary(frames), info

    def step(self, actions: Any) -> Any:
        frames, rewards, terminated, truncated, info = self.env.step(actions)
        if self.over or "final_obs" in info:  # these are first frames of new episodes
            self.adversary.start()
            frames, self.over = self.adversary(frames), False
        elif terminated.any():
            self.over = True
        else:
            frames = self.adversary(frames)
        return frames, rewards, terminated, truncated, info


class SB3Attack(VecEnvWrapper):
    chain_role = "attack"

    def __init__(self, venv: Any, adversary: Adversary) -> None:
        super().__init__(venv)
        self.adversary = adversary

    def reset(self) -> Any:
        self.adversary.start()
        return self.adversary(np.asarray(self.venv.reset()))

    def step_wait(self) -> Any:
        frames, rewards, dones, infos = self.venv.step_wait()
        if dones.any():
            self.adversary.start()
        return self.adversary(np.asarray(frames)), rewards, dones, infos


def _policy(shown: Floats) -> Floats:
    return (shown[:, 0] + shown[:, 1] > 0).astype(np.int64)


Episodes = Iterator[tuple[Floats, Floats, Floats]]
"""True frames o, perturbations e and shown frames y of batches of episodes, each (STEPS, n, 3)."""


def _play_single(episodes: int, wrap: Callable[[Any, Any], Any]) -> Episodes:
    adversary = Adversary(1)
    env = wrap(lambda inner: SingleAttack(inner, adversary), Drift())
    env.reset(seed=0)
    for _ in range(episodes):
        shown, y = env.reset()[0][None], []
        for _ in range(STEPS):
            y.append(shown.astype(np.float64))
            adversary.shown = y[-1]
            shown = env.step(int(_policy(shown)[0]))[0][None]
        yield np.array(adversary.frames), np.array(adversary.deltas), np.array(y)


def _play_vector(mode: AutoresetMode, episodes: int, wrap: Callable[[Any, Any], Any]) -> Episodes:
    adversary = Adversary(ROWS)
    env = wrap(lambda inner: VectorAttack(inner, adversary), SyncVectorEnv([Drift] * ROWS, autoreset_mode=mode))
    shown, _ = env.reset(seed=0)
    for _ in range(episodes // ROWS):
        y: list[Floats] = []
        for _ in range(STEPS):
            y.append(shown.astype(np.float64))
            adversary.shown = y[-1]
            log = np.array(adversary.frames), np.array(adversary.deltas)
            shown = env.step(_policy(shown))[0]
        yield *log, np.array(y)
        if mode == AutoresetMode.NEXT_STEP:
            shown = env.step(_policy(shown))[0]
        elif mode == AutoresetMode.DISABLED:
            shown = env.reset(options={"reset_mask": np.ones(ROWS, dtype=bool)})[0]


def _play_sb3(episodes: int, wrap: Callable[[Any, Any], Any]) -> Episodes:
    adversary = Adversary(ROWS)
    env = wrap(lambda inner: SB3Attack(inner, adversary), DummyVecEnv([Drift] * ROWS))
    env.seed(0)
    shown = env.reset()
    for _ in range(episodes // ROWS):
        y: list[Floats] = []
        for _ in range(STEPS):
            y.append(shown.astype(np.float64))
            adversary.shown = y[-1]
            log = np.array(adversary.frames), np.array(adversary.deltas)
            shown = env.step(_policy(shown))[0]
        yield *log, np.array(y)


HOSTS: dict[str, Callable[[int, Any], Episodes]] = {
    "single": _play_single,
    "vector, next-step autoreset": lambda n, wrap: _play_vector(AutoresetMode.NEXT_STEP, n, wrap),
    "vector, same-step autoreset": lambda n, wrap: _play_vector(AutoresetMode.SAME_STEP, n, wrap),
    "vector, no autoreset": lambda n, wrap: _play_vector(AutoresetMode.DISABLED, n, wrap),
    "Stable-Baselines3": _play_sb3,
}


def _right_order(attack: Callable[[Any], Any], env: Any, noise: Noise | None = None) -> Any:
    return add_noise(attack(env), noise or Gaussian(SIGMA), seed=5)


def _log_likelihood_ratios(batches: Episodes) -> Floats:
    ratios = []
    for o, e, y in batches:
        spent = np.sum(e**2, axis=(0, 2))
        assert np.allclose(spent, BUDGET**2, rtol=1e-9)  # in every single episode
        ratios.append(np.sum(e * (y - o), axis=(0, 2)) / SIGMA**2 - spent / (2 * SIGMA**2))
    return np.concatenate(ratios)


def _looks_right(ratios: Floats) -> bool:
    """Mean mu^2/2 and variance mu^2 within 4 standard errors, and the normal law."""
    n = len(ratios)
    mean_is_right = abs(ratios.mean() - MU**2 / 2) < 4 * MU / math.sqrt(n)
    variance_is_right = abs(ratios.var(ddof=1) - MU**2) < 4 * MU**2 * math.sqrt(2 / n)
    return bool(mean_is_right and variance_is_right and stats.kstest(ratios, stats.norm(MU**2 / 2, MU).cdf).pvalue > 1e-3)


@pytest.mark.parametrize("host", list(HOSTS))
def test_the_log_likelihood_ratio_of_an_adaptive_attack_is_normal_on_every_host(host: str) -> None:
    ratios = _log_likelihood_ratios(HOSTS[host](3000, _right_order))
    assert len(ratios) == 3000
    assert _looks_right(ratios)


class Reused(Gaussian):
    """A mechanism that draws once per episode and uses it again: the attacker reads it off y_1."""

    def perturb(self, x: Any, generator: Any) -> Any:
        state = generator.bit_generator.state
        y = super().perturb(x, generator)
        self.__dict__["uses"] = self.__dict__.get("uses", 0) + 1
        if self.__dict__["uses"] % 3:
            generator.bit_generator.state = state
        return y


class Weak(Gaussian):
    """Eight tenths of the noise that it claims."""

    def perturb(self, x: Any, generator: Any) -> Any:
        return x + 0.8 * (super().perturb(x, generator) - x)


MUTANTS: dict[str, Callable[[Any, Any], Any]] = {
    "reused noise": lambda attack, env: _right_order(attack, env, Reused(SIGMA)),
    "too little noise": lambda attack, env: _right_order(attack, env, Weak(SIGMA)),
    "another sigma": lambda attack, env: _right_order(attack, env, Gaussian(1.2 * SIGMA)),
    "per-feature sigma, largest counted": lambda attack, env: _right_order(attack, env, Gaussian((SIGMA / 2, SIGMA, SIGMA))),
    "attack outside the noise": lambda attack, env: attack(add_noise(env, Gaussian(SIGMA), seed=5)),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
@pytest.mark.parametrize("host", ["vector, same-step autoreset", "Stable-Baselines3"])
def test_the_log_likelihood_ratio_gives_broken_noise_away(host: str, mutant: str) -> None:
    assert not _looks_right(_log_likelihood_ratios(HOSTS[host](2000, MUTANTS[mutant])))


def test_the_wrong_order_is_refused_before_it_can_be_simulated() -> None:
    env = MUTANTS["attack outside the noise"](
        lambda inner: SingleAttack(inner, Adversary(1)), gym.wrappers.TimeLimit(Drift(), STEPS)
    )
    with pytest.raises(ChainError, match="attack outside the noise"):
        check_chain(env)
    assert check_chain(_right_order(lambda inner: SingleAttack(inner, Adversary(1)), gym.wrappers.TimeLimit(Drift(), STEPS)))


# --------------------------------------------------- the l1 and l0 mechanisms against attackers that watch and wait

RUNS = 60_000


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("noise", [Uniform(0.5), Splitting(0.5)], ids=["uniform", "splitting"])
def test_l1_attackers_are_noticed_at_most_as_often_as_certified(noise: Noise, adaptive: bool) -> None:
    """Five frames 1/2, success while every shown value could come from a clean frame: 1 - B / (2 lam) = .65 at B = .35.

    All budget at once is noticed with exactly B / (2 lam); spending it on several steps, by what was shown, with less.
    """
    generator, budget, steps = np.random.default_rng(7), 0.35, 5
    left, success = np.full((RUNS, 1), budget), np.ones(RUNS, dtype=bool)
    e = np.full((RUNS, 1), budget / steps if adaptive else budget)
    for _ in range(steps):
        e = np.minimum(e, left)
        left = left - e
        shown = noise.perturb(0.5 + e, generator)
        low, high = (0.0, 1.0) if isinstance(noise, Uniform) else (0.25, 0.75)
        success &= (shown[:, 0] >= low) & (shown[:, 0] < high)
        e = np.where(shown > 0.6, left, left / 2) if adaptive else left
    rate = float(success.mean())
    bound = float(noise.lower(1.0, budget))
    assert bound == pytest.approx(0.65)
    assert rate >= bound - 4 * _standard_error(bound, RUNS)
    if adaptive:
        assert rate < 0.72
    else:
        assert rate == pytest.approx(bound, abs=4 * _standard_error(bound, RUNS))


def test_a_reused_split_is_read_off_the_first_frame_and_stepped_over() -> None:
    """With one split per episode success falls to P(|s - 1/2| > B) = .3, far below the .65 of fresh splits: refused."""
    noise, generator, budget = Splitting(0.5), np.random.default_rng(8), 0.35
    s = generator.random((RUNS, 1))
    shown = noise.split(np.full((RUNS, 1), 0.5), s)
    read = np.where(shown >= 0.5, 2 * shown - 1, 2 * shown)
    e = np.where(read >= 0.5, read - 0.5 + 1e-9, read - 0.5 - 1e-9)
    e = np.where(np.abs(e) <= budget, e, 0.0)
    again = noise.split(0.5 + e, s)
    success = float(np.mean((again >= 0.25) & (again < 0.75)))
    assert success == pytest.approx(1 - 2 * budget, abs=4 * _standard_error(0.3, RUNS))
    assert success < float(noise.lower(1.0, budget)) - 0.3
    with pytest.raises(ValueError, match="fresh must be True"):
        Splitting(0.5, fresh=False)


@pytest.mark.parametrize("steps", [1, 4])
def test_laplace_attackers_stay_within_pure_differential_privacy(steps: int) -> None:
    """Success while every y_t <= c. One push by B <= c attains 1 - (1 - p) e^(B / b) exactly."""
    noise, generator, budget, c = Laplace(0.3), np.random.default_rng(9), 0.4, 0.9
    p = (1 - 0.5 * math.exp(-c / 0.3)) ** steps
    left, success = np.full((RUNS, 1), budget), np.ones(RUNS, dtype=bool)
    last = np.zeros((RUNS, 1))
    for t in range(steps):
        e = left if t == steps - 1 else np.where(last > 0.2, left, left / 4)
        left = left - e
        last = noise.perturb(e, generator)
        success &= last[:, 0] <= c
    bound = float(noise.lower(p, budget))
    assert success.mean() >= bound - 4 * _standard_error(bound, RUNS)
    if steps == 1:
        assert success.mean() == pytest.approx(bound, abs=4 * _standard_error(bound, RUNS))
        assert bound == pytest.approx(1 - (1 - p) * math.exp(budget / 0.3))


def test_ablation_attackers_are_seen_exactly_as_often_as_certified() -> None:
    """Whenever the frame before was dropped, the next one is altered; whoever alters 3 frames stays unseen with (1 - keep)^3."""
    noise, generator, steps, frames = Ablation(0.3, fill=-1.0), np.random.default_rng(10), 12, 3
    left, unseen = np.full(RUNS, frames), np.ones(RUNS, dtype=bool)
    dropped = np.ones(RUNS, dtype=bool)
    for t in range(steps):
        alter = (left > 0) & (dropped | (left >= steps - t))
        left = left - alter
        shown = noise.perturb(np.where(alter, 9.0, 0.0)[:, None], generator)[:, 0]
        unseen &= shown != 9.0
        dropped = shown == -1.0
    assert left.max() == 0
    bound = float(noise.lower(1.0, frames))
    assert bound == pytest.approx(0.7**3)
    assert unseen.mean() == pytest.approx(bound, abs=4 * _standard_error(bound, RUNS))


# ------------------------------------------------------------ exact optimal adversaries, by dynamic programming


@pytest.mark.parametrize(("p", "mu"), [(0.9, 1.0), (0.99, 2.0), (0.7, 0.5)])
def test_no_adaptive_adversary_of_the_tight_environment_beats_the_certificate_and_the_best_attains_it(
    p: float, mu: float
) -> None:
    """Three steps; dynamic programming over (sum so far, budget left, perturbation). Within 1e-3 of Neyman-Pearson."""
    steps, units = 3, 24
    threshold = ndtri(p) * math.sqrt(steps)
    sums = np.linspace(-9, 9 + mu, 500)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    unit = mu**2 / units
    spend = np.sqrt(unit * np.arange(units + 1))
    value = np.stack([ndtr(threshold - sums - spend[left]) for left in range(units + 1)])  # last step: everything, upwards
    for _ in range(steps - 1):
        before = value
        value = np.full_like(before, np.inf)
        for left in range(units + 1):
            for cost in range(left + 1):
                for e in {spend[cost], -spend[cost]}:
                    future = np.interp(sums[:, None] + e + nodes, sums, before[left - cost]) @ weights
                    value[left] = np.minimum(value[left], future)
    best = float(np.interp(0.0, sums, value[units]))
    bound = float(Gaussian(1.0).lower(p, mu))
    assert best == pytest.approx(bound, abs=1e-3)
    assert best >= bound - 2e-4  # what interpolation may cost


UNITS, STATES, WALK = 12, 5, 3


def _probability_right(noise: Noise, frame: float, e: float, threshold: float) -> float:
    """P(shown < threshold) when the true frame is `frame` and the attacker adds `e`."""
    if isinstance(noise, Gaussian):
        return float(ndtr((threshold - frame - e) / noise.smallest))
    if isinstance(noise, Uniform):
        return min(max((threshold - frame - e + noise.lam) / (2 * noise.lam), 0.0), 1.0)
    if isinstance(noise, Laplace):
        z = (threshold - frame - e) / noise.b
        return 0.5 * math.exp(z) if z < 0 else 1 - 0.5 * math.exp(-z)
    if isinstance(noise, Splitting):
        s = (np.arange(2000) + 0.5)[:, None] / 2000 * 2 * noise.lam
        return float(np.mean(noise.split(np.full_like(s, frame + e), s) < threshold))
    assert isinstance(noise, Ablation)
    return noise.keep * float(frame + e < threshold) + (1 - noise.keep) * float(noise.fill < threshold)


def _moves(noise: Noise, budget: float) -> list[tuple[int, float]]:
    """(cost in units of the budget, perturbation): energy for l2, length for l1, frames for l0."""
    if isinstance(noise, Ablation):
        return [(0, 0.0), *((UNITS // int(budget), e) for e in (-9.0, 9.0))] if budget else [(0, 0.0)]
    sizes = [budget * (math.sqrt(k / UNITS) if noise.norm == 2 else k / UNITS) for k in range(UNITS + 1)]
    return [(k, sign * size) for k, size in enumerate(sizes) for sign in (1, -1)]


Walk = tuple[list[int], Floats]
"""Cost of every move, and the probability of going right (step, state, move)."""


def _walk(noise: Noise, budget: float, thresholds: Floats, frames: Floats, slip: float) -> Walk:
    moves = _moves(noise, budget)
    right = np.array(
        [
            [[_probability_right(noise, frames[x], e, thresholds[t, x]) for _, e in moves] for x in range(STATES)]
            for t in range(WALK)
        ]
    )
    return [cost for cost, _ in moves], (1 - slip) * right + slip * (1 - right)


def _worst_value(walk: Walk, final: Floats) -> float:
    """Least expected `final[state]` after WALK steps from the middle, over all adversaries on the grid of budgets."""
    costs, right = walk
    value = np.repeat(final[:, None], UNITS + 1, axis=1)
    for t in reversed(range(WALK)):
        before, value = value, np.full((STATES, UNITS + 1), np.inf)
        for x in range(STATES):
            up, down = before[min(x + 1, STATES - 1)], before[max(x - 1, 0)]
            for cost, p in zip(costs, right[t, x], strict=True):
                left = UNITS + 1 - cost
                value[x, cost:] = np.minimum(value[x, cost:], p * up[:left] + (1 - p) * down[:left])
    return float(value[STATES // 2, UNITS])


MECHANISMS = [Gaussian(0.5), Uniform(0.8), Laplace(0.5), Splitting(0.6, low=-1, high=2), Ablation(0.4, fill=0.0)]


@pytest.mark.parametrize("noise", MECHANISMS, ids=lambda noise: type(noise).__name__)
def test_no_optimal_adversary_of_a_random_walk_gets_below_the_certificates(noise: Noise) -> None:
    """Random three-step walks with a threshold policy, solved exactly: success and mean both respect their bounds."""
    generator = np.random.default_rng(42)
    slack = 3e-3 if isinstance(noise, Splitting) else 1e-12  # splitting's probabilities are sums over a grid of offsets
    gaps, losses = [], []
    for _ in range(8):
        thresholds = generator.uniform(-0.3, 1.3, (WALK, STATES))
        frames, slip = generator.uniform(0, 1, STATES), float(generator.uniform(0, 0.2))
        rewards = np.sort(generator.uniform(-1, 3, STATES))
        clean_walk = _walk(noise, 0.0, thresholds, frames, slip)
        for budget in (1, 2, 3) if isinstance(noise, Ablation) else (0.15, 0.5):
            walk, survivals = _walk(noise, budget, thresholds, frames, slip), []
            for threshold in rewards[1:]:
                event = (rewards >= threshold).astype(np.float64)
                clean, worst = _worst_value(clean_walk, event), _worst_value(walk, event)
                bound = float(noise.lower(clean, budget))
                assert bound - slack <= worst <= clean + slack
                gaps += [worst - bound] if bound > 0.1 else []
                survivals.append(clean)
            mean_bound = rewards[0] + float(np.sum(np.diff(rewards) * noise.lower(survivals, budget)))
            mean_worst = _worst_value(walk, rewards)
            assert mean_worst >= mean_bound - 4 * slack
            losses.append(_worst_value(clean_walk, rewards) - mean_worst)
    assert min(gaps) < 0.04  # the adversaries come close: a bound that is more generous by this much would be caught
    assert np.median(losses) > 0.02  # and they do harm
