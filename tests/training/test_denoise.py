"""Training a denoiser for a frozen policy."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn
from toys import BALANCE, LinearRule, Steps, balancer, network_balancer

import robustrl as rrl
from robustrl import cli
from robustrl.networks import Denoiser, DnCNN, ResidualMLP, load_denoiser
from robustrl.policy import PolicyView
from robustrl.rollouts.chunk import Job
from robustrl.rollouts.collect import collect
from robustrl.training.denoise import Stacks, denoise, denoise_run, frozen, gather
from robustrl.training.objectives import MSE, Objective, QueryOnly, Stability, ask, fit_surrogate

MEAN = np.array([1.0, -2.0, 0.5])
MIX = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.0, -0.3, 0.2]])
COVARIANCE = MIX @ MIX.T
SIGMA = 0.4
SMALL: dict[str, Any] = {"rounds": 2, "observations": 300, "updates": 20, "evaluate_episodes": 0}


class Draws(gym.Env[Any, Any]):
    """Independent observations with the law N(MEAN, COVARIANCE)."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, pay: float = 0.0) -> None:
        self.pay = pay

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.draw(), self.pay * float(self.np_random.normal()) if self.pay else 0.0, False, False, {}

    def draw(self) -> Any:
        return (MEAN + MIX @ self.np_random.normal(size=3)).astype(np.float32)


def draws(sigma: float | None = SIGMA) -> rrl.EnvRecipe:
    return rrl.EnvRecipe(factory=Draws, max_episode_steps=100, noise=None if sigma is None else rrl.Gaussian(sigma))


def rule(*weights: float) -> PolicyView:
    return PolicyView.from_torch(LinearRule(weights), kind="logits", observation_shape=(len(weights),))


def cartpole(sigma: float = 0.2, n_frames: int = 1, horizon: int = 30) -> rrl.EnvRecipe:
    return rrl.EnvRecipe(env_id="CartPole-v1", noise=rrl.Gaussian(sigma), frame_stack=n_frames, max_episode_steps=horizon)


def linear_error(denoiser: Denoiser, sigma: float) -> float:
    """Exact mean squared error, per entry, of an affine denoiser A y + b on N(MEAN, COVARIANCE) + noise."""
    with torch.no_grad():
        b = denoiser(torch.zeros(1, 3)).double().numpy()[0]
        A = (denoiser(torch.eye(3)).double().numpy() - b).T
    bias = (A - np.eye(3)) @ MEAN + b
    return float(np.trace((A - np.eye(3)) @ COVARIANCE @ (A - np.eye(3)).T + sigma**2 * A @ A.T) + bias @ bias) / 3


def wiener_error(sigma: float) -> float:
    """Of the best denoiser there is: trace(C - C (C + sigma^2)^-1 C), per entry."""
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + sigma**2 * np.eye(3))
    return float(np.trace(COVARIANCE - gain @ COVARIANCE)) / 3


def test_a_linear_denoiser_reaches_the_wiener_filter() -> None:
    """Its exact error is within 2% of the optimum; below it, it cannot be."""
    start = ResidualMLP((3,), SIGMA, MEAN, np.sqrt(np.diag(COVARIANCE)), hidden=())
    assert linear_error(start, SIGMA) == pytest.approx(SIGMA**2, rel=1e-5)
    options: dict[str, Any] = {"rounds": 1, "observations": 4000, "updates": 800, "evaluate_episodes": 0}
    found = denoise(rule(1, 1, 1), draws(), denoiser=start, learning_rate=0.02, **options)
    assert found is start
    assert wiener_error(SIGMA) * (1 - 1e-6) <= linear_error(found, SIGMA) <= 1.02 * wiener_error(SIGMA)


def test_one_denoiser_serves_several_noise_levels() -> None:
    """Better at each of two levels than the identity, and than itself told of the other level."""
    start = ResidualMLP((3,), SIGMA, MEAN, np.sqrt(np.diag(COVARIANCE)), hidden=(32,))
    options: dict[str, Any] = {"rounds": 1, "observations": 4000, "updates": 800, "learning_rate": 0.01, "evaluate_episodes": 0}
    found = denoise(rule(1, 1, 1), draws(), denoiser=start, sigmas=(0.1, 0.8), **options)
    generator = torch.Generator().manual_seed(5)
    clean = torch.from_numpy(MEAN + np.random.default_rng(6).normal(size=(20_000, 3)) @ MIX.T).float()
    for sigma, other in ((0.1, 0.8), (0.8, 0.1)):
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            error, wrong = ((found.at(level)(noisy) - clean).square().mean().item() for level in (sigma, other))
        assert wiener_error(sigma) * 0.98 < error < 1.3 * wiener_error(sigma)
        assert error < 0.9 * wrong


def test_an_untrained_denoiser_leaves_the_certificate_as_it_is() -> None:
    env, policy = cartpole(horizon=50), network_balancer()
    plain = rrl.certify_policy(policy, env, [0.0, 0.2], 100, seed=3)
    for history in (1, 4):
        denoiser = ResidualMLP((4 * history,), 0.2, keep=4)
        chain = replace(env, frame_stack=history)
        found = rrl.certify_policy(policy.denoised(denoiser, history), chain, [0.0, 0.2], 100, seed=3)
        assert np.array_equal(found.evidence, plain.evidence)
        assert np.array_equal(found.values, plain.values)
        assert found.provenance["policy_hash"] != plain.provenance["policy_hash"]


def test_the_hash_covers_weights_and_noise_level_of_the_denoiser() -> None:
    policy, denoiser = network_balancer(), ResidualMLP((4,), 0.2, hidden=(8,))
    view = policy.denoised(denoiser)
    hashes = {policy.fingerprint(), view.fingerprint(), policy.denoised(denoiser.at(0.3)).fingerprint()}
    assert view.for_inference().actor is not view.actor
    with torch.no_grad():
        next(denoiser.parameters())[0, 0] += 1e-6
    assert len(hashes | {view.fingerprint()}) == 4


@pytest.mark.parametrize("objective", ["mse", "stability", "query"])
def test_the_policy_stays_as_it_is_bit_by_bit(objective: str) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0, policy_kwargs={"net_arch": [8]})
    model.policy.action_net.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    chosen = QueryOnly(PolicyView.from_sb3(model), updates=20) if objective == "query" else objective
    denoise(model, cartpole(), objective=chosen, **SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    frozen_ones = [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad]
    assert frozen_ones == ["action_net.bias"]
    assert all(parameter.grad is None for parameter in model.policy.parameters())


class Vandal(Objective):
    """Changes a weight of the policy while it trains."""

    def __init__(self, policy: PolicyView) -> None:
        self.weight = next(policy.parameters())

    def __call__(self, clean: torch.Tensor, denoised: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with torch.no_grad():
            self.weight[0, 0] = torch.nextafter(self.weight[0, 0], torch.tensor(9.0))
        return (denoised - clean).square().mean()


def test_a_policy_that_changes_is_noticed_to_the_last_bit() -> None:
    policy = network_balancer()
    with pytest.raises(RuntimeError, match="stay frozen"):
        denoise(policy, cartpole(), objective=Vandal(policy), **(SMALL | {"updates": 1, "rounds": 1}))
    assert all(parameter.requires_grad for parameter in policy.parameters())
    with frozen(policy):
        assert not any(parameter.requires_grad for parameter in policy.parameters())


def weights(denoiser: Denoiser) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def test_training_follows_its_seed_alone() -> None:
    policy = network_balancer()
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), weights(denoise(policy, cartpole(), seed=7, **SMALL))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(weights(denoise(policy, cartpole(), seed=7, **SMALL)), first)
    assert not torch.equal(weights(denoise(policy, cartpole(), seed=8, **SMALL)), first)


@pytest.mark.parametrize("objective", ["mse", "stability"])
def test_rewards_are_not_looked_at(objective: str) -> None:
    found = [
        weights(denoise(rule(1, 1, 1), replace(draws(), factory=factory), objective=objective, **SMALL))
        for factory in (Draws, lambda: Shuffled())
    ]
    assert torch.equal(*found)


class Pictures(gym.Env[Any, Any]):
    """Random pictures; no reward."""

    observation_space = spaces.Box(0, 1, (1, 6, 6), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.random((1, 6, 6), dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.random((1, 6, 6), dtype=np.float32), 0.0, False, False, {}


class Shuffled(Draws):
    """The same observations, other rewards."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, *rest = super().step(action)
        return observation, float(np.abs(observation).sum()), *rest  # type: ignore[return-value]


GENERATOR = torch.Generator().manual_seed(0)


def loss(objective: Objective, clean: Any, denoised: Any) -> float:
    return objective(torch.as_tensor(clean), torch.as_tensor(denoised), GENERATOR).item()


def continuous(bound: float = 1.0) -> PolicyView:
    """The action is the first entry of the observation."""
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0]]))
    space = spaces.Box(-bound, bound, (1,), np.float32)
    return PolicyView.from_torch(network, kind="deterministic", observation_shape=(2,), action_space=space)


def test_stability_is_zero_exactly_where_the_denoiser_keeps_what_the_policy_does() -> None:
    divergence = Stability(rule(1.0, 0.0), divergence=True)
    x = [[0.3, 0.0], [-2.0, 1.0]]
    assert loss(divergence, x, [[0.3, 9.0], [-2.0, -5.0]]) == 0  # what the policy does not look at may change
    assert loss(divergence, x, [[0.31, 0.0], [-2.0, 1.0]]) > 0
    # two actions with logits +-z/2: KL(Bernoulli(s(z)) || Bernoulli(s(z')))
    p, q = 1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(-0.5))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert loss(divergence, [[0.3, 0.0]], [[0.5, 0.0]]) == pytest.approx(expected, rel=1e-5)
    action = Stability(continuous())
    assert loss(action, [[0.5, 0.0], [3.0, 0.0]], [[0.5, 7.0], [1.5, 0.0]]) == 0  # 3 and 1.5 are both executed as 1
    assert loss(action, [[0.5, 0.0]], [[0.7, 0.0]]) == pytest.approx(0.04, rel=1e-5)
    assert loss(Stability(continuous(2.0)), [[0.5, 0.0]], [[0.7, 0.0]]) == pytest.approx(0.01, rel=1e-5)
    assert loss(action, [[3.0, 0.0]], [[-3.0, 0.0]]) == pytest.approx(4.0)


def test_stability_wants_the_clean_greedy_action() -> None:
    """Cross-entropy to it: -log of its probability; with a target, to the target's."""
    found = loss(Stability(rule(1.0, 0.0)), [[-0.1, 0.0]], [[0.5, 0.0]])
    assert found == pytest.approx(np.log(1 + np.exp(0.5)), rel=1e-6)
    other = loss(Stability(rule(1.0, 0.0), target=rule(-1.0, 0.0)), [[-0.1, 0.0]], [[0.5, 0.0]])
    assert other == pytest.approx(np.log(1 + np.exp(-0.5)), rel=1e-6)


def test_gradients_come_back_into_the_action_range() -> None:
    seen = torch.tensor([[-3.0, 0.0]], requires_grad=True)
    Stability(continuous())(torch.tensor([[0.0, 0.0]]), seen, GENERATOR).backward()  # type: ignore[no-untyped-call]
    assert seen.grad is not None
    assert seen.grad[0, 0] < 0


def test_every_surrogate_is_used() -> None:
    objective = Stability(rule(1.0, 0.0), rule(0.0, 1.0), target=rule(1.0, 0.0))
    found = {round(loss(objective, [[1.0, 0.0]], [[1.0, 2.0]]), 4) for _ in range(50)}
    assert found == {round(float(np.log1p(np.exp(-1.0))), 4), round(float(np.log1p(np.exp(-2.0))), 4)}


class BlackBox(nn.Module):
    """Answers, but cannot be differentiated and tells no more than its action."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        action = (observation.double() @ torch.tensor(BALANCE, dtype=torch.float64) > 0).long()
        return 1000.0 * nn.functional.one_hot(action, 2)


def test_query_access_needs_actions_alone() -> None:
    policy = PolicyView.from_torch(BlackBox(), kind="q", observation_shape=(4,))
    objective = QueryOnly(policy, n_surrogates=2, updates=300)
    denoiser = denoise(policy, cartpole(), objective=objective, **(SMALL | {"observations": 2000}))
    assert len(objective.policies) == 2
    assert not torch.equal(weights(denoiser), weights(ResidualMLP((4,), 0.2)))
    states = gather(policy, replace(cartpole(), noise=None), 1000, 5).frames[:, 0]
    for surrogate in objective.policies:
        assert (ask(surrogate, states) == ask(policy, states)).double().mean() > 0.9


def test_a_surrogate_of_a_continuous_policy_imitates_it() -> None:
    policy, generator = continuous(), torch.Generator().manual_seed(1)
    x = torch.randn(2000, 2, generator=generator)
    actions = ask(policy, x)
    surrogate = fit_surrogate(policy, x, actions, updates=800)
    assert surrogate.action_space == policy.action_space
    assert (ask(surrogate, x) - actions).square().mean() < 0.01 * actions.var()
    with pytest.raises(ValueError, match="actions must be as many"):
        fit_surrogate(policy, x, actions[:10])


@pytest.mark.parametrize("sigma", [None, 0.3])
def test_gathered_stacks_are_clean_consecutive_frames(sigma: float | None) -> None:
    """In an environment that counts its steps."""
    recipe = rrl.EnvRecipe(factory=lambda: Steps(9), max_episode_steps=20, noise=None if sigma is None else rrl.Gaussian(sigma))
    stacks = gather(balancer(2), replace(recipe, frame_stack=2), 150, 3, n_frames=4)
    assert stacks.frames.shape == (150, 4, 4)
    times = stacks.frames[:, :, 0]
    assert set(times[:, -1].tolist()) == set(range(9))
    expected = (times[:, -1:] - torch.arange(3, -1, -1)).clamp(min=0)
    assert torch.equal(times, expected)
    assert torch.equal(stacks.padding, (3 - times[:, -1]).clamp(min=0).long())
    again = gather(balancer(2), replace(recipe, frame_stack=2), 150, 3, n_frames=4)
    assert torch.equal(again.frames, stacks.frames)


class Named(Steps):
    """Its observation names the episode."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(**options)
        self.name = float(self.np_random.random())
        return observation + np.float32(self.name), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, *rest = super().step(action)
        return observation + np.float32(self.name), *rest  # type: ignore[return-value]


def test_stacks_hold_the_frames_of_one_episode_while_others_end() -> None:
    recipe = rrl.EnvRecipe(factory=lambda: Named(rate=0.2), max_episode_steps=40)
    names = gather(balancer(), recipe, 400, 3, n_frames=3).frames[:, :, 0] % 1
    assert len(set(names[:, 0].round(decimals=3).tolist())) > 20
    assert torch.allclose(names, names[:, :1].expand_as(names), atol=1e-4)


def test_a_surrogate_follows_its_seed_alone() -> None:
    policy, x = continuous(), torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    actions = ask(policy, x)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = fit_surrogate(policy, x, actions, updates=3, seed=5).fingerprint()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert fit_surrogate(policy, x, actions, updates=3, seed=5).fingerprint() == first
    assert fit_surrogate(policy, x, actions, updates=3, seed=6).fingerprint() != first


def test_data_come_from_the_clean_and_from_the_denoised_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them each, and the second sees its observations through noise and the denoiser as it is by then."""
    from robustrl.training import denoise as module

    calls: list[tuple[Any, ...]] = []

    def spy(policy: PolicyView, recipe: Any, n: int, seed: int, **rest: Any) -> Stacks:
        calls.append((policy.fingerprint(), recipe.noise, n, seed))
        return gather(policy, recipe, n, seed, **rest)

    monkeypatch.setattr(module, "gather", spy)
    raw = network_balancer()
    denoise(raw, cartpole(), rounds=3, observations=101, clean_share=0.5, updates=5, evaluate_episodes=0)
    hashes, noises, counts, seeds = zip(*calls, strict=True)
    assert noises == (None, rrl.Gaussian(0.2)) * 3
    assert counts == (51, 50) * 3
    assert len(set(seeds)) == 6
    assert {hashes[0], hashes[1], hashes[2], hashes[4]} == {raw.fingerprint()}
    assert len({hashes[1], hashes[3], hashes[5]}) == 3
    for share, actors in ((0.0, (rrl.Gaussian(0.2),)), (1.0, (None,)), (0.01, (None, rrl.Gaussian(0.2)))):
        calls.clear()
        denoise(raw, cartpole(), rounds=1, observations=100, clean_share=share, updates=1, evaluate_episodes=0)
        assert tuple(call[1] for call in calls) == actors
    assert [call[2] for call in calls] == [1, 99]


class TurnsBad(Objective):
    """The squared error for so many updates, minus ten times of it afterwards."""

    def __init__(self, good: int) -> None:
        self.left = good

    def __call__(self, clean: torch.Tensor, denoised: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.left -= 1
        return (denoised - clean).square().mean() * (1 if self.left >= 0 else -10)


class Evaluations:
    """What is evaluated: jobs, numbers of episodes, and mean returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from robustrl.training import denoise as module

        self.jobs: list[Job] = []
        self.means: list[float] = []
        self.hashes: list[str] = []
        self.counts: list[int] = []

        def spy(job: Job, episodes: int) -> Any:
            found = collect(job, episodes)
            self.jobs.append(job)
            self.counts.append(episodes)
            self.hashes.append(job.policy.fingerprint())
            self.means.append(float(found.returns.mean()))
            return found

        monkeypatch.setattr(module, "collect", spy)


def test_the_candidate_that_the_smoothed_agent_does_best_with_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are the untrained denoiser, those after 50, 100, 200, ... updates, and after each round; here one on the way is best."""
    done, policy, env = Evaluations(monkeypatch), balancer(gain=20.0), cartpole(0.3, horizon=200)
    told: list[tuple[int, float]] = []
    options: dict[str, Any] = {"history": 4, "rounds": 2, "observations": 500, "updates": 70, "evaluate_episodes": 40}

    def run() -> Denoiser:
        return denoise(policy, env, objective=TurnsBad(60), on_candidate=lambda n, mean, _: told.append((n, mean)), **options)

    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    found = run()
    assert not found.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row[0] for row in told] == [0, 50, 70, 100, 140]
    assert [row[1] for row in told] == done.means
    assert set(done.counts) == {40}
    best = int(np.argmax(done.means))
    assert 0 < best < 4
    assert policy.denoised(found, 4).fingerprint() == done.hashes[best] != done.hashes[-1]
    assert policy.denoised(run(), 4).fingerprint() == done.hashes[best]
    assert done.means[5:] == done.means[:5]
    # One set of noisy episodes for all, of random numbers that are not those of a certificate with the same seed.
    (chain,) = {job.recipe.label for job in done.jobs}
    assert chain == env.label
    assert {(job.recipe.noise, job.recipe.frame_stack, job.seed) for job in done.jobs} == {(env.noise, 4, done.jobs[0].seed)}
    assert done.jobs[0].seed > 2**32


def test_an_objective_that_makes_it_worse_leaves_the_denoiser_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    done, policy, env = Evaluations(monkeypatch), balancer(gain=20.0), cartpole(0.2, horizon=200)
    start = ResidualMLP((4,), 0.2)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    options: dict[str, Any] = {
        "objective": TurnsBad(0),
        "rounds": 1,
        "observations": 1000,
        "updates": 60,
        "learning_rate": 0.01,
    }
    with pytest.warns(UserWarning, match="as it started"):
        assert denoise(policy, env, denoiser=start, **options) is start
    assert done.means[0] > max(done.means[1:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())
    with warnings.catch_warnings(action="error"):
        fresh = denoise(policy, env, evaluate_episodes=0, **options)
    assert not torch.equal(weights(fresh), weights(start))
    assert len(done.means) == 3


def pictures() -> tuple[PolicyView, rrl.EnvRecipe, Denoiser]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    policy = PolicyView.from_torch(network, kind="logits", observation_shape=(1, 6, 6))
    env = rrl.EnvRecipe(factory=Pictures, max_episode_steps=5, noise=rrl.Gaussian(0.2))
    return policy, env, DnCNN((1, 6, 6), 0.2, 0.5, 0.3, depth=3, width=4)


def test_what_batch_normalisation_has_counted_is_kept_with_the_weights() -> None:
    """Of equal candidates the first stays: the environment pays nothing."""
    policy, env, start = pictures()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    with pytest.warns(UserWarning, match="as it started"):
        denoise(policy, env, denoiser=start, rounds=1, observations=50, updates=2, batch_size=8, evaluate_episodes=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_training_is_the_same_with_evaluations_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """They use random numbers of their own, and leave batch normalisation alone."""
    done = Evaluations(monkeypatch)
    vectors = (network_balancer(), cartpole(), ResidualMLP((4,), 0.2))
    for policy, env, start in (vectors, pictures()):
        last = denoise(policy, env, denoiser=copy.deepcopy(start), **SMALL)
        with pytest.warns(UserWarning, match="as it started"):
            denoise(policy, env, denoiser=start, **(SMALL | {"evaluate_episodes": 5}))
        assert policy.denoised(last).fingerprint() == done.hashes[-1]
    counted = [int(count) for name, count in last.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counted == [SMALL["rounds"] * SMALL["updates"]]


@pytest.mark.parametrize("fill", ["reset", "zero"])
def test_noise_is_per_frame_and_copies_of_a_first_frame_share_it(fill: Any) -> None:
    padding = torch.arange(4).repeat(500)
    frames = torch.randn(2000, 4, 3, generator=torch.Generator().manual_seed(0))
    for row in range(2000):
        frames[row, : padding[row]] = frames[row, padding[row]] if fill == "reset" else 0
    policy = rule(1, 1, 1)
    clean, noisy = Stacks(frames, padding, torch.arange(len(frames))).pairs(
        torch.arange(2000), policy, rrl.Gaussian(0.5), fill, torch.Generator().manual_seed(1)
    )
    assert torch.equal(clean, frames[:, -1])
    noise = noisy.reshape(2000, 4, 3) - frames
    for place in range(4):
        padded = place < padding
        if fill == "reset":
            copied = noisy.reshape(2000, 4, 3)[padded]
            assert torch.equal(copied[:, place], copied[torch.arange(len(copied)), padding[padded]])
        else:
            assert (noisy.reshape(2000, 4, 3)[padded][:, place] == 0).all()
        fresh = noise[~padded][:, place]
        assert fresh.std().item() == pytest.approx(0.5, rel=0.1)
        if place < 3:
            other = noise[padding == 0]
            assert abs(np.corrcoef(other[:, place].flatten(), other[:, place + 1].flatten())[0, 1]) < 0.1


def test_pictures_with_history_are_denoised() -> None:
    class Blinks(gym.Env[Any, Any]):
        observation_space = spaces.Box(0, 1, (12, 10), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            return self.draw(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.draw(), 0.0, False, False, {}

        def draw(self) -> Any:
            return np.full((12, 10), self.np_random.random(), np.float32)

    policy = PolicyView.from_torch(
        nn.Sequential(nn.Flatten(), nn.Linear(240, 2)), kind="logits", observation_shape=(2, 12, 10), n_frames=2
    )
    env = rrl.EnvRecipe(factory=Blinks, max_episode_steps=10, noise=rrl.Gaussian(0.2), frame_stack=2)
    options: dict[str, Any] = {"rounds": 1, "observations": 200, "batch_size": 32, "evaluate_episodes": 0}
    start = DnCNN((4, 12, 10), 0.2, 0.5, 0.3, keep=2, depth=3, width=8)
    denoiser = denoise(policy, env, denoiser=start, history=4, updates=150, learning_rate=0.01, **options)
    stacks = gather(policy, replace(env, noise=None), 100, 9, n_frames=4)
    clean, noisy = stacks.pairs(torch.arange(100), policy, rrl.Gaussian(0.2), "reset", GENERATOR)
    with torch.no_grad():
        assert (denoiser(noisy) - clean).square().mean() < 0.5 * 0.2**2
    view = policy.denoised(denoiser, 4)
    assert len(rrl.certify_policy(view, replace(env, frame_stack=4), [0.0], 5, return_low=0.0).evidence) == 5


def test_a_collapsed_policy_comes_back_without_being_trained_again() -> None:
    """A policy that balances from clean frames alone, under noise that ends its episodes early."""
    env = cartpole(0.3, horizon=200)
    policy = balancer(gain=20.0)
    denoiser = denoise(policy, env, history=4, observations=6000, updates=400, evaluate_episodes=50)
    chain = replace(env, frame_stack=4)
    raw = rrl.certify_policy(policy, env, [0.0, 0.2], 400)
    denoised = rrl.certify_policy(policy.denoised(denoiser, 4), chain, [0.0, 0.2], 400)
    assert denoised.values[0] > 1.3 * raw.values[0]
    assert denoised.values[1] > 1.3 * raw.values[1]


@pytest.fixture
def plain_zip(tmp_path: Path) -> Path:
    PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0, policy_kwargs={"net_arch": [8]}).save(tmp_path / "agent.zip")
    return tmp_path / "agent.zip"


def test_a_run_holds_the_model_byte_for_byte_and_loads_with_its_denoiser(plain_zip: Path, tmp_path: Path) -> None:
    env, out = cartpole(), tmp_path / "run"
    model = rrl.load_agent(plain_zip, env)
    denoiser = denoise_run(plain_zip, model, env, out, history=3, **SMALL)
    assert (out / "model.zip").read_bytes() == plain_zip.read_bytes()
    assert json.loads((out / "run.json").read_text())["recipe"]["frame_stack"] == 3
    view = rrl.load_agent(out)
    assert isinstance(view, PolicyView)
    assert view.fingerprint() == env.view(model).denoised(denoiser, 3).fingerprint()
    with pytest.raises(FileExistsError, match="already holds a model"):
        denoise_run(plain_zip, model, env, out, **SMALL)
    with pytest.raises(TypeError, match="got PolicyView; of a run with one, pass the run or zip that it was made from"):
        denoise_run(out / "model.zip", view, replace(env, frame_stack=3), tmp_path / "again", **SMALL)
    (out / "denoiser.pt").unlink()
    with pytest.raises(FileNotFoundError, match="denoiser"):
        rrl.load_agent(out)


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["robustrl", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_shell_denoises_certifies_attacks_and_verifies(
    plain_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    small = ("--rounds", 1, "--observations", 200, "--updates", 10, "--history", 2, "--evaluate-episodes", 3)
    env = ("--env", "CartPole-v1", "--sigma", 0.2, "--max-episode-steps", 30)
    status, text, error = call(capsys, monkeypatch, "denoise", plain_zip, *env, *small, "--out", out)
    assert (status, error) == (0, "")
    assert f"robustrl certify {out}" in text
    assert "mean return of 3 smoothed episodes: " in text
    for words in (
        ("certify", out, "--episodes", 40, "--chunk-size", 20, "--budgets", "0,0.2"),
        ("attack", out, "--episodes", 4, "--draws", 4, "--budget", 0.2),
        ("verify", out, "--model", out),
        ("verify", out),
    ):
        status, text, error = call(capsys, monkeypatch, *words)
        assert (status, error) == (0, ""), words
    assert "bit for bit" in text
    returns = json.loads((out / "run.json").read_text())["denoiser"]["mean_returns"]
    assert [updates for updates, _ in returns] == [0, 10]
    assert all(1 <= mean <= 30 for _, mean in returns)
    denoiser = load_denoiser(out / "denoiser.pt")
    with torch.no_grad():
        next(denoiser.parameters()).add_(1.0)
    denoiser.save(out / "denoiser.pt")
    status, _, error = call(capsys, monkeypatch, "verify", out)
    assert status == 2
    assert "another hash" in error


def test_the_noise_of_a_denoised_run_takes_the_place_of_the_trained_one(
    plain_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustrl.training.run_files import RunInfo

    source, out = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    (source / "model.zip").write_bytes(plain_zip.read_bytes())
    RunInfo("ppo", cartpole(0.1).to_dict(), 0, 0).save(source)
    small = ("--rounds", 1, "--observations", 200, "--updates", 10, "--seed", 5, "--clean-share", 0.2, "--evaluate-episodes", 0)
    status, _, error = call(capsys, monkeypatch, "denoise", source, "--sigma", 0.3, *small, "--out", out)
    assert (status, error) == (0, "")
    run = RunInfo.load(out)
    assert run.env.noise == rrl.Gaussian(0.3)
    assert (run.seed, run.denoiser["objective"], run.algo) == (5, "mse", "ppo")
    assert (run.denoiser["clean_share"], run.denoiser["evaluate_episodes"]) == (0.2, 0)
    assert RunInfo.load(source).denoiser == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "mae"}, ValueError, "objective"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"observations": 1}, ValueError, "observations"),
        ({"updates": 0.5}, TypeError, "updates"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate"),
        ({"seed": -1}, ValueError, "seed"),
        ({"clean_share": 1.5}, ValueError, "clean_share"),
        ({"clean_share": np.nan}, ValueError, "clean_share"),
        ({"evaluate_episodes": -1}, ValueError, "evaluate_episodes"),
        ({"evaluate_episodes": 0.5}, TypeError, "evaluate_episodes"),
        ({"history": 0}, ValueError, "history"),
        ({"sigmas": (0.1, -1.0)}, ValueError, "sigmas"),
        ({"sigmas": ()}, ValueError, "sigmas"),
        ({"denoiser": ResidualMLP((5,), 0.2)}, ValueError, "denoiser"),
        ({"denoiser": ResidualMLP((4,), 0.2), "history": 2}, ValueError, "denoiser"),
        ({"objective": Stability()}, ValueError, "policies"),
        ({"learning_rate": 1e30, "updates": 50}, RuntimeError, "not finite"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoise(network_balancer(), cartpole(), **(SMALL | options))


def test_what_cannot_be_denoised_is_named() -> None:
    with pytest.raises(ValueError, match="noise must be given"):
        denoise(network_balancer(), replace(cartpole(), noise=None))
    with pytest.raises(ValueError, match="sigmas need Gaussian"):
        denoise(network_balancer(), replace(cartpole(), noise=rrl.Uniform(0.2)), sigmas=(0.1,))
    with pytest.raises(ValueError, match="divergence"):
        Stability(continuous(), divergence=True)
    with pytest.raises(ValueError, match="divergence"):
        Stability(rule(1.0, 0.0), target=rule(1.0, 0.0), divergence=True)


def test_other_noises_are_denoised_too() -> None:
    """The level is then the root mean square of the noise."""
    found = denoise(network_balancer(), replace(cartpole(), noise=rrl.Uniform(0.3)), **(SMALL | {"observations": 3000}))
    assert float(found.sigma) == pytest.approx(0.3 / np.sqrt(3), rel=0.05)
    assert isinstance(MSE(), Objective)
