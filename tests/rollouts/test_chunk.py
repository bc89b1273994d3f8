"""A chunk: every slot one episode, the same one as if it had been alone."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from toys import LinearRule, Steps, balancer, network_balancer

from robustrl.attacks import AttackContext, MinimalFlip
from robustrl.attacks.base import Attack
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import BudgetExceededError
from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting
from robustrl.policy import PolicyView, push_frame, start_stack
from robustrl.rollouts.chunk import Episodes, Job, run_chunk
from robustrl.rollouts.collect import collect, make_job
from robustrl.rollouts.engines import NativeCartPole
from robustrl.rollouts.identity import identity
from robustrl.seeding import chunk_seeds, slot_seeds, torch_generator
from robustrl.threat import ThreatModel

NOISE = Gaussian(0.4)


def cartpole(n_frames: int = 1, noise: Noise | None = NOISE, horizon: int = 120) -> EnvRecipe:
    return EnvRecipe(env_id="CartPole-v1", noise=noise, max_episode_steps=horizon, frame_stack=n_frames)


def same(a: Episodes, b: Episodes) -> bool:
    return all(np.array_equal(a.arrays()[name], b.arrays()[name]) for name in a.arrays())


class AloneNative:
    """One slot of the native CartPole's starts, in an environment of its own."""

    def __init__(self, job: Job, chunk: int, n: int, slot: int) -> None:
        everybody = NativeCartPole(job.recipe)
        everybody.start(n, chunk_seeds(job.seed, chunk).environment)
        self.engine = NativeCartPole(job.recipe)
        self.engine.start(1, chunk_seeds(job.seed, chunk).environment)
        self.engine._env.state = everybody._env.state[:, [slot]].copy()
        self.first = self.engine._env.state.T.astype(np.float32)[0]

    def step(self, action: int) -> tuple[Any, float, bool]:
        step = self.engine.step(np.array([action]))
        return step.frames[0], float(step.rewards[0]), bool(step.finished[0])


class AloneListed:
    def __init__(self, job: Job, chunk: int, n: int, slot: int) -> None:
        self.env = job.recipe.base_env()
        self.first, _ = self.env.reset(seed=int(slot_seeds(chunk_seeds(job.seed, chunk).environment, n)[slot]))

    def step(self, action: int) -> tuple[Any, float, bool]:
        frame, reward, terminated, truncated, _ = self.env.step(action)
        return frame, float(reward), terminated or truncated


def alone(job: Job, chunk: int, n: int, slot: int) -> tuple[float, int]:
    """Return and length of one slot, stepped with nobody beside it; noise is drawn for all n slots at every step."""
    env = (AloneNative if job.engine == "native" else AloneListed)(job, chunk, n, slot)
    seeds, noise, policy = chunk_seeds(job.seed, chunk), job.recipe.noise, job.policy
    noises, uniforms = torch_generator(seeds.noise), torch_generator(seeds.policy)
    frame, total, length, stack = torch.from_numpy(env.first), 0.0, 0, None
    while True:
        if noise is not None:
            frame = frame + noise.perturb(torch.zeros(n, *frame.shape), noises)[slot]
        stack = start_stack(frame[None], job.recipe.frame_stack) if stack is None else push_frame(stack, frame[None])
        uniform = None if job.deterministic else torch.rand(n, 2, generator=uniforms)[[slot]]
        scores = policy.scores(policy.fold(stack))
        following, reward, ended = env.step(int(policy.actions(scores, deterministic=job.deterministic, draws=uniform)))
        frame, total, length = torch.from_numpy(following), total + reward, length + 1
        if ended:
            return total, length


@pytest.mark.parametrize("deterministic", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("n_frames", [1, 5])
@pytest.mark.parametrize("engine", ["native", "list"])
def test_every_slot_is_the_episode_it_would_have_been_alone(engine: str, n_frames: int, deterministic: bool) -> None:
    n, chunk = 24, 3
    job = make_job(balancer(n_frames), cartpole(n_frames), seed=5, chunk_size=n, engine=engine, deterministic=deterministic)
    together = run_chunk(job, chunk, n)
    assert len(set(together.lengths.tolist())) > 8  # slots end at many different steps
    for slot in range(n):
        assert (together.returns[slot], together.lengths[slot]) == alone(job, chunk, n, slot)


def test_an_undefended_slot_is_the_episode_it_would_have_been_alone() -> None:
    job = make_job(balancer(gain=0.3), cartpole(noise=None), chunk_size=16, deterministic=False)
    together = run_chunk(job, 0, 16)
    assert [(together.returns[s], together.lengths[s]) for s in range(16)] == [alone(job, 0, 16, s) for s in range(16)]


def never_compacted(job: Job, chunk: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunk with finished slots carried along to the end, their steps ignored."""
    seeds, policy = chunk_seeds(job.seed, chunk), job.policy.for_inference()
    engine, noises = NativeCartPole(job.recipe), torch_generator(seeds.noise)
    frames, _ = engine.start(n, seeds.environment)
    returns, lengths, running, stack = np.zeros(n), np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool), None
    assert job.recipe.noise is not None
    while running.any():
        seen = job.recipe.noise.perturb(torch.from_numpy(frames), noises)
        stack = start_stack(seen, 1) if stack is None else push_frame(stack, seen)
        step = engine.step(policy.act_blocked(stack, batch=job.chunk_size).numpy())
        returns[running] += step.rewards[running]
        lengths[running] += 1
        frames, running = step.frames, running & ~step.finished
    return returns, lengths


def test_dropping_finished_slots_changes_nothing_for_an_ordinary_network() -> None:
    job = make_job(network_balancer(), cartpole(), seed=2, chunk_size=300)
    returns, lengths = never_compacted(job, 1, 300)
    compacted = run_chunk(job, 1, 300)
    assert np.array_equal(compacted.returns, returns)
    assert np.array_equal(compacted.lengths, lengths)


class Noted(nn.Module):
    """Remembers what it was given, across the copies that rollouts make."""

    seen: ClassVar[list[torch.Tensor]] = []

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.seen.append(observation.clone())
        return self.rule(observation)


def noted(view: PolicyView) -> PolicyView:
    copy = PolicyView.from_torch(
        Noted(view.actor), kind="logits", observation_shape=view.observation_shape, n_frames=view.n_frames
    )
    Noted.seen.clear()
    return copy


def test_the_network_sees_batches_of_one_size_however_many_slots_still_run() -> None:
    """A row's last bits depend on the batch size: padding keeps it fixed."""
    job = make_job(noted(balancer()), cartpole(), chunk_size=20)
    run_chunk(job, 0, 20)
    whole = [len(x) for x in Noted.seen]
    Noted.seen.clear()
    run_chunk(job, 1, 7)
    assert set(whole) == {20} == {len(x) for x in Noted.seen}


def test_every_frame_gets_noise_once_and_the_stack_keeps_it() -> None:
    job = make_job(noted(balancer(3)), cartpole(3), chunk_size=1)
    run_chunk(job, 0, 1)
    stacks = [x.reshape(3, 4) for x in Noted.seen]
    assert len(stacks) > 5
    assert torch.equal(stacks[0][0], stacks[0][2])  # the first noisy frame fills the first stack
    for before, after in itertools.pairwise(stacks):
        assert torch.equal(before[1:], after[:2])
        assert not torch.equal(before[2], after[2])


def test_the_noise_that_is_added_has_the_stated_law() -> None:
    """`Steps` shows its step count, so that what is left after subtracting it is noise."""
    view = noted(PolicyView.from_torch(LinearRule(np.zeros(4)), kind="logits", observation_shape=(4,)))
    recipe = EnvRecipe(factory=lambda: Steps(50), max_episode_steps=50, noise=Gaussian(0.3))
    run_chunk(make_job(view, recipe, chunk_size=100), 0, 100)
    seen = torch.stack(Noted.seen).reshape(50, -1, 4)[:, :100]  # several padded batches per step
    noise = (seen - torch.arange(50)[:, None, None]).double().numpy() / 0.3
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    flat = noise.reshape(50, -1)
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / math.sqrt(noise.size)  # fresh at every step
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 4 / math.sqrt(noise.size)  # and in every slot


def geometric_job(rate: float, chunk_size: int, seed: int = 0) -> Job:
    view = PolicyView.from_torch(LinearRule(np.zeros(4)), kind="logits", observation_shape=(4,))
    recipe = EnvRecipe(factory=lambda: Steps(rate=rate, flat=True), max_episode_steps=400, noise=Gaussian(1.0))
    return make_job(view, recipe, chunk_size=chunk_size, seed=seed)


def test_short_episodes_do_not_crowd_out_long_ones() -> None:
    """Lengths are geometric with mean 10; stopping at the first N of N parallel streams to finish is visibly biased."""
    rate, n, streams = 0.1, 4000, 64
    returns = collect(geometric_job(rate, 1000), n).returns
    error = math.sqrt((1 - rate) / rate**2 / n)
    assert abs(returns.mean() - 1 / rate) < 4 * error

    first_finished = []
    rng = np.random.default_rng(0)
    while len(first_finished) < n:
        ends = rng.geometric(rate, (streams, streams)).cumsum(axis=1)
        lengths = np.diff(ends, axis=1, prepend=0)
        first_finished += lengths.ravel()[np.argsort(ends.ravel(), kind="stable")[:streams]].tolist()
    assert np.mean(first_finished) < 1 / rate - 10 * error


def test_a_chunk_holds_one_episode_per_slot_from_start_to_end() -> None:
    """`Steps` pays 1, 2, 3, ...: a second episode in a slot, or a missing step, would show in the sum."""
    view = PolicyView.from_torch(LinearRule(np.zeros(4)), kind="logits", observation_shape=(4,))
    recipe = EnvRecipe(factory=lambda: Steps(rate=0.2), max_episode_steps=300, noise=Gaussian(1.0))
    episodes = run_chunk(make_job(view, recipe, chunk_size=200), 0, 200)
    assert len(episodes) == 200
    assert np.array_equal(episodes.returns, episodes.lengths * (episodes.lengths + 1) / 2)
    assert len(np.unique(episodes.seeds)) == 200
    assert np.array_equal(episodes.spent, np.zeros(200))


def test_cartpoles_return_is_its_length() -> None:
    for engine in ("native", "list"):
        episodes = run_chunk(make_job(balancer(), cartpole(), chunk_size=20, engine=engine), 0, 20)
        assert np.array_equal(episodes.returns, episodes.lengths)
        assert episodes.lengths.max() <= 120


def test_both_engines_roll_out_the_same_law() -> None:
    means, errors = [], []
    for engine in ("native", "list"):
        returns = collect(make_job(balancer(), cartpole(), chunk_size=200, engine=engine), 400).returns
        means.append(returns.mean())
        errors.append(returns.std() / math.sqrt(returns.size))
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)


def test_chunks_and_seeds_name_different_episodes_and_repeat() -> None:
    job = make_job(balancer(), cartpole(), chunk_size=30)
    runs = {
        key: run_chunk(replace(job, seed=seed), chunk, 30)
        for key, (seed, chunk) in {"a": (0, 0), "b": (0, 1), "c": (1, 0)}.items()
    }
    assert same(runs["a"], run_chunk(job, 0, 30))
    for one, other in itertools.combinations(runs.values(), 2):
        assert not np.array_equal(one.returns, other.returns)
        assert not np.array_equal(one.seeds, other.seeds)


def test_starts_do_not_depend_on_the_noise() -> None:
    for engine in ("native", "list"):
        runs = [
            run_chunk(make_job(balancer(), cartpole(noise=noise), chunk_size=10, engine=engine), 0, 10)
            for noise in (None, NOISE, Ablation(0.5))
        ]
        assert all(np.array_equal(runs[0].seeds, other.seeds) for other in runs[1:])


@dataclass(frozen=True)
class Idle(Attack):
    """Draws from its stream and looks at everything, but changes nothing."""

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        torch.rand(100, generator=context.generator)
        context.policy.scores(context.observation(frames))
        return frames


@dataclass(frozen=True)
class Push(Attack):
    """Adds `size` to the first entry of every frame, whatever is left."""

    size: float

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        return frames + self.size * torch.eye(frames.shape[1])[0]


@pytest.mark.parametrize("attack", [Idle(), MinimalFlip(draws=4)], ids=["idle", "without budget"])
def test_an_attacker_that_spends_nothing_changes_no_bit(attack: Attack) -> None:
    clean = run_chunk(make_job(balancer(), cartpole(), chunk_size=20), 0, 20)
    threat = ThreatModel(norm=2, episode=0.0)
    attacked = run_chunk(make_job(balancer(), cartpole(), chunk_size=20, attack=attack, threat=threat), 0, 20)
    assert same(clean, attacked)


def test_starts_and_noise_do_not_depend_on_the_attack() -> None:
    view = noted(PolicyView.from_torch(LinearRule(np.zeros(4)), kind="logits", observation_shape=(4,)))
    recipe = EnvRecipe(factory=lambda: Steps(6), max_episode_steps=6, noise=NOISE)
    clean = run_chunk(make_job(view, recipe, chunk_size=5), 0, 5)
    quiet = torch.stack(Noted.seen)
    Noted.seen.clear()
    push = make_job(view, recipe, chunk_size=5, attack=Push(1.0), threat=ThreatModel(norm=2, step=1.0))
    attacked = run_chunk(push, 0, 5)
    assert np.array_equal(clean.seeds, attacked.seeds)
    pushed = torch.stack(Noted.seen) - quiet
    assert torch.allclose(pushed, torch.tensor([1.0, 0.0, 0.0, 0.0]).expand_as(pushed), rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Witness(Attack):
    """Writes down what it is shown."""

    shown: ClassVar[list[AttackContext]] = []

    def perturb(self, frames: torch.Tensor, context: AttackContext) -> torch.Tensor:
        self.shown.append(replace(context, seen_stack=context.seen_stack.clone(), clean_stack=context.clean_stack.clone()))
        return frames


def test_the_attacker_sees_true_frames_and_past_noise_but_not_this_steps() -> None:
    Witness.shown.clear()
    view = noted(PolicyView.from_torch(LinearRule(np.zeros(12)), kind="logits", observation_shape=(12,), n_frames=3))
    recipe = EnvRecipe(factory=lambda: Steps(5), max_episode_steps=5, noise=NOISE, frame_stack=3)
    run_chunk(make_job(view, recipe, chunk_size=2, attack=Witness(), threat=ThreatModel(norm=2, episode=1.0)), 0, 2)
    acted = [x.reshape(2, 3, 4) for x in Noted.seen]
    for t, context in enumerate(Witness.shown):
        assert (context.step == t).all()
        assert torch.equal(context.clean_stack[:, -1], torch.full((2, 4), float(t)))  # the true frame
        assert torch.equal(context.seen_stack[:, -1], torch.full((2, 4), float(t)))  # this step's noise is not in it
        assert not torch.equal(acted[t][:, -1], context.seen_stack[:, -1])
        if t:
            assert torch.equal(context.seen_stack[:, :-1], acted[t - 1][:, 1:])  # what the agent has already seen
        assert torch.equal(context.clean_stack[:, 0], torch.full((2, 4), float(max(t - 2, 0))))


def test_a_budget_holds_for_the_whole_episode_and_not_on_average() -> None:
    recipe = EnvRecipe(factory=lambda: Steps(4), max_episode_steps=4, noise=NOISE)
    view = PolicyView.from_torch(LinearRule(np.zeros(4)), kind="logits", observation_shape=(4,))

    def push(size: float, **limits: float) -> Episodes:
        return run_chunk(make_job(view, recipe, chunk_size=3, attack=Push(size), threat=ThreatModel(norm=2, **limits)), 0, 3)

    assert push(0.5, episode=1.0).spent == pytest.approx([1.0] * 3)  # four steps of 0.5
    with pytest.raises(BudgetExceededError, match=r"exceeds the allowance"):
        push(0.5, episode=0.99)
    with pytest.raises(BudgetExceededError, match=r"l2 norm 0\.5 in slot 0"):
        push(0.5, step=0.499, episode=10.0)
    with pytest.raises(ValueError, match="an attack returned NaN or inf"):
        push(math.nan, episode=1.0)


def test_an_attack_leaves_gradients_and_training_mode_of_the_model_alone() -> None:
    view = network_balancer()
    view.actor.train()
    job = make_job(view, cartpole(), chunk_size=6, attack=MinimalFlip(draws=4), threat=ThreatModel(norm=2, episode=1.0))
    before = view.fingerprint()
    assert run_chunk(job, 0, 6).spent.max() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in view.actor.parameters())
    assert all(module.training for module in view.actor.modules())
    assert view.fingerprint() == before


@pytest.mark.parametrize("noise", [Laplace(0.2), Ablation(0.7), Splitting(0.5, -5.0, 5.0), Gaussian((0.1, 0.2, 0.3, 0.4))])
def test_every_mechanism_rolls_out(noise: Noise) -> None:
    episodes = run_chunk(make_job(balancer(2), cartpole(2, noise), chunk_size=8), 0, 8)
    assert episodes.lengths.min() >= 8  # CartPole cannot end earlier


class Broken(gym.Wrapper[Any, Any, Any, Any]):
    """Spoils the third step."""

    def __init__(self, env: Any, what: str) -> None:
        super().__init__(env)
        self.what = what

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.env.unwrapped.t == 3:
            observation = np.full(4, np.nan, dtype=np.float32) if self.what == "observation" else observation
            reward = math.inf if self.what == "reward" else reward
        return observation, reward, terminated, truncated and self.what != "horizon", info


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("observation", "returned observations that are NaN or inf"),
        ("reward", "returned rewards that are NaN or inf"),
        ("horizon", "3 episodes still run after the horizon of 7 steps"),
    ],
)
def test_a_broken_environment_ends_in_a_clear_error(what: str, message: str) -> None:
    """A policy that takes NaN for an action would otherwise go unnoticed."""

    class Deaf(LinearRule):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nan_to_num(observation))

    view = PolicyView.from_torch(Deaf(np.ones(4)), kind="logits", observation_shape=(4,))
    recipe = EnvRecipe(
        factory=lambda: Broken(gym.wrappers.TimeLimit(Steps(50), 7), what), noise=None if what == "observation" else NOISE
    )
    with pytest.raises(ValueError, match=message):
        run_chunk(make_job(view, recipe, chunk_size=3), 0, 3)


def test_nan_in_the_first_observation_is_noticed() -> None:
    class Lost(Steps):
        def reset(self, **options: Any) -> Any:
            return np.full(4, np.nan, dtype=np.float32), super().reset(**options)[1]

    recipe = EnvRecipe(factory=lambda: Lost(5), max_episode_steps=5, noise=NOISE)
    with pytest.raises(ValueError, match="observations that are NaN or inf"):
        run_chunk(make_job(balancer(), recipe, chunk_size=2), 0, 2)


def test_a_job_is_identified_by_everything_its_episodes_depend_on() -> None:
    job = make_job(balancer(), cartpole(), chunk_size=20)
    threat = ThreatModel(norm=2, episode=0.5)
    others = [
        replace(job, seed=1),
        replace(job, chunk_size=21),
        replace(job, engine="list"),
        replace(job, deterministic=False),
        replace(job, policy=balancer(gain=11.0)),
        replace(job, recipe=cartpole(horizon=119)),
        replace(job, recipe=cartpole(noise=Gaussian(0.3))),
        replace(job, attack=MinimalFlip(), threat=threat),
        replace(job, attack=MinimalFlip(draws=64), threat=threat),
        replace(job, attack=MinimalFlip(), threat=ThreatModel(norm=2, episode=0.6)),
    ]
    prints = {job.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == len(others) + 1
    assert make_job(balancer(), cartpole(), chunk_size=20).fingerprint() == job.fingerprint()


def make_steps(length: int) -> gym.Env[Any, Any]:
    return Steps(length)


def test_factories_of_one_name_are_told_apart() -> None:
    def captured(length: int) -> Any:
        return lambda: Steps(length)

    def recursive() -> Any:
        return recursive if recursive else None

    factories = [
        *(functools.partial(make_steps, n) for n in (3, 4)),
        *(functools.partial(make_steps, length=n) for n in (3, 4)),
        *(captured(n) for n in (3, 4)),
        lambda: Steps(5),
        lambda: Steps(6),
        lambda: gym.make("CartPole-v1"),
        lambda: gym.make("CartPole-v0"),
        make_steps,
        Steps,
        recursive,
        Steps(3).reset,
    ]
    assert len({identity(factory) for factory in factories}) == len(factories)
    assert identity(captured(3)) == identity(captured(3))
    assert "0x" not in "".join(identity(factory) for factory in factories)  # no addresses: they change from run to run
    one, other = (
        make_job(balancer(), EnvRecipe(factory=functools.partial(make_steps, n), max_episode_steps=9, noise=NOISE))
        for n in (3, 4)
    )
    assert one.fingerprint() != other.fingerprint()


def test_identities_of_plain_data_ignore_the_order_of_sets_and_dicts() -> None:
    assert identity({"a": 1, "b": {2, 3}}) == identity({"b": {3, 2}, "a": 1})
    assert identity((1, "1", 1.0, True, None)) == "[1, '1', 1.0, True, None]"
