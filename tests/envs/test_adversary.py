"""Adversaries: their environment is the victim's with the sign of the reward turned, and they find what brute force finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from torch import nn
from toys import LinearRule, Steps

import robustrl as rrl
from robustrl.attacks import ActionDirection, AttackContext, Greedy, Perturbation, TargetAction
from robustrl.attacks.geometry import row_norms
from robustrl.attacks.learned import LearnedAttack
from robustrl.envs import AdversaryEnv, AdversaryVecEnv, EnvRecipe
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel
from robustrl.training.adversary import train_adversary

BALANCER = PolicyView.from_torch(
    LinearRule(torch.tensor([0.3, 0.5, 2.0, 1.0], dtype=torch.float64)), kind="q", observation_shape=(4,)
)
CARTPOLE = EnvRecipe.of("CartPole-v1", max_episode_steps=60)
STEP, EPISODE = ThreatModel(norm=math.inf, step=0.1), ThreatModel(norm=2, episode=0.5)


class Signs(gym.Env[Any, Any]):
    """Shows +-1, pays 1 for the action of that sign; ten steps."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float((self.sign > 0) == (action == 1))
        self.t += 1
        return self._look(), reward, self.t == 10, False, {}

    def _look(self) -> Any:
        self.sign = 1.0 if self.np_random.random() < 0.5 else -1.0
        return np.array([self.sign], dtype=np.float32)


SIGNS = EnvRecipe(factory=Signs, max_episode_steps=10)
READER = PolicyView.from_torch(LinearRule(torch.tensor([1.0], dtype=torch.float64)), kind="q", observation_shape=(1,))


@pytest.mark.parametrize("command", [Perturbation(), ActionDirection(), TargetAction(steps=2)])
@pytest.mark.parametrize("threat", [STEP, EPISODE, ThreatModel(norm=1, step=0.2)])
def test_the_checker_accepts_every_adversarys_environment(command: Any, threat: ThreatModel) -> None:
    check_env(AdversaryEnv(CARTPOLE, BALANCER, threat, command, seed=0))


@pytest.mark.parametrize("make", [AdversaryEnv, AdversaryVecEnv])
def test_rewards_are_those_of_the_victim_with_the_sign_turned(make: Any) -> None:
    options = {"n_envs": 1} if make is AdversaryVecEnv else {}
    env = make(CARTPOLE, BALANCER, STEP, seed=0, **options)
    if make is AdversaryVecEnv:
        env.seed(5)
        env.reset()
    else:
        env.reset(seed=5)
    total, done = 0.0, False
    while not done:
        if make is AdversaryVecEnv:
            _, rewards, dones, infos = env.step(np.zeros((1, 4), np.float32))
            reward, done, info = rewards[0], dones[0], infos[0]
        else:
            _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
            done = terminated or truncated
        total += reward
    assert total == -60  # the balancer keeps the pole up for all of its steps
    if make is AdversaryVecEnv:
        assert info["episode"]["r"] == 60


def test_one_environment_and_many_are_the_same_game() -> None:
    recipe = EnvRecipe.of("CartPole-v1", noise=rrl.Gaussian(0.1), max_episode_steps=30)
    one = AdversaryEnv(recipe, BALANCER, EPISODE, seed=0)
    many = AdversaryVecEnv(recipe, BALANCER, EPISODE, n_envs=1)
    many.seed(4)
    first, second = one.reset(seed=4)[0], many.reset()[0]
    rng = np.random.default_rng(0)
    for _ in range(25):
        assert np.array_equal(first, second)
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        first, reward, terminated, truncated, _ = one.step(action)
        following, rewards, _, infos = many.step(action[None])
        assert reward == rewards[0]
        if terminated or truncated:
            assert np.array_equal(infos[0]["terminal_observation"], first)
            break
        second = following[0]


def test_the_adversary_sees_what_is_left_of_budget_and_time() -> None:
    env = AdversaryEnv(EnvRecipe(factory=lambda: Steps(10), max_episode_steps=10), BALANCER, EPISODE, allocation=Greedy())
    situation, _ = env.reset(seed=0)
    assert situation.tolist() == [0, 0, 0, 0, 1, 1]
    situation, *_ = env.step(np.array([0.6, 0, 0, 0], np.float32))
    assert situation == pytest.approx([1, 1, 1, 1, 0.8, 0.9], abs=1e-6)  # sqrt(1 - .6^2), 9 of 10 steps


def test_the_adversary_may_choose_when_to_spend() -> None:
    recipe = EnvRecipe(factory=lambda: Steps(10), max_episode_steps=10)
    env = AdversaryEnv(recipe, BALANCER, EPISODE, allocation=Greedy(), chooses_when=True)
    assert env.action_space.shape == (5,)
    env.reset(seed=0)
    *_, info = env.step(np.array([1, 0, 0, 0, -1], np.float32))
    assert info["norm"] == 0
    *_, info = env.step(np.array([1, 0, 0, 0, 0], np.float32))
    assert info["norm"] == pytest.approx(0.25, rel=1e-5)


def test_a_learned_adversary_turns_every_sign() -> None:
    """The best perturbation is known: past zero on the other side, which costs the victim every reward."""
    threat = ThreatModel(norm=math.inf, step=1.5)
    env = AdversaryVecEnv(SIGNS, READER, threat, n_envs=8, seed=0)
    adversary = PPO("MlpPolicy", env, n_steps=64, batch_size=128, learning_rate=3e-3, seed=0, device="cpu", gamma=0.5)
    adversary.learn(6_000)
    report = rrl.attack_policy(READER, SIGNS, env.attack(adversary), threat, 50)
    assert report.clean_mean == 10
    assert report.mean <= 0.2
    with pytest.raises(ValueError, match="adversary acts in"):
        rrl.attack_policy(BALANCER, CARTPOLE, env.attack(adversary), STEP, 2)


class Wide(nn.Module):
    """A linear policy."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return observation.double() @ self.weights.T


WEIGHTS = torch.from_numpy(np.random.default_rng(7).normal(size=(3, 11)))


def situation(policy: PolicyView, frames: torch.Tensor, commands: torch.Tensor, radius: float, norm: float) -> AttackContext:
    n = len(frames)
    return AttackContext(
        policy=policy,
        noise=None,
        clean_stack=frames[:, None],
        seen_stack=frames[:, None],
        allowance=torch.full((n,), radius, dtype=torch.float64),
        attackable=torch.ones(frames.shape[1:]),
        step=torch.zeros(n, dtype=torch.int64),
        steps_left=torch.ones(n, dtype=torch.int64),
        padding="reset",
        generator=torch.Generator(),
        norm=norm,
        command=commands,
    )


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("steps", [1, 10])
def test_the_actor_pushes_actions_where_the_director_points(norm: float, steps: int) -> None:
    """Descending the objective, as the authors' MuJoCo code does, would make the cosine negative."""
    space = spaces.Box(-1, 1, (3,), np.float32)
    policy = PolicyView.from_torch(Wide(WEIGHTS), kind="deterministic", observation_shape=(11,), action_space=space)
    generator = torch.Generator().manual_seed(0)
    frames, commands = (torch.randn(200, size, generator=generator) for size in (11, 3))
    commands = commands.clamp(-1, 1)
    context = situation(policy, frames, commands, 0.1, norm)
    delivered = ActionDirection(steps=steps, weight=10.0).follow(frames, context, context.allowance)
    assert (row_norms(delivered.double() - frames.double(), norm) <= 0.1 * (1 + 1e-9)).all()
    change = (delivered.double() - frames.double()) @ WEIGHTS.T
    cosine = torch.cosine_similarity(change, commands.double())
    if steps == 1:
        gradient = commands.double() @ WEIGHTS
        best = gradient.sign() if norm == math.inf else gradient / gradient.norm(dim=1, keepdim=True)
        reachable = torch.cosine_similarity(best @ WEIGHTS.T, commands.double())
        assert (cosine >= 0.95 * reachable - 1e-6).all()
    else:
        assert cosine.mean() > 0.9


def test_the_director_points_in_half_ranges_of_the_actions() -> None:
    """Two entries that move alike, one with a hundredfold range: where it should point, only the narrow one is far off."""
    wide = spaces.Box(np.array([-1, -100], np.float32), np.array([1, 100], np.float32))
    policy = PolicyView.from_torch(
        Wide(torch.eye(2, dtype=torch.float64)), kind="deterministic", observation_shape=(2,), action_space=wide
    )
    frames, commands = torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]])
    context = situation(policy, frames, commands, 0.1, 2)
    (delivered,) = ActionDirection(weight=10.0).follow(frames, context, context.allowance)
    assert delivered[0] < -0.099  # the wide entry's change is a hundredth as large: nearly all goes into the narrow one
    assert abs(delivered[1]) < 0.01


def test_a_masked_command_still_fills_the_radius() -> None:
    policy = PolicyView.from_torch(Wide(WEIGHTS), kind="logits", observation_shape=(11,))
    frames, attackable = torch.zeros(1, 11), (torch.arange(11) < 2).float()
    context = replace(situation(policy, frames, torch.ones(1, 11), 0.1, 2), attackable=attackable)
    delivered = Perturbation().follow(frames, context, context.allowance)
    assert row_norms(delivered.double(), 2).item() == pytest.approx(0.1, rel=1e-5)
    assert not delivered[0, 2:].any()


def test_an_adversary_that_still_learns_decides_as_it_acts() -> None:
    """Layers that act otherwise in training, as dropout does, are switched before every decision."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    space = spaces.Box(-1, 1, (4,), np.float32)
    adversary = PolicyView.from_torch(network, kind="deterministic", observation_shape=(4,), action_space=space)
    attack = LearnedAttack(adversary=adversary)
    context = situation(BALANCER, torch.ones(1, 4), torch.zeros(1, 4), 0.1, 2)
    decided = attack.decide(context)
    network.train()
    assert torch.equal(attack.decide(context), decided)


def test_a_discrete_director_moves_probabilities_and_a_target_is_reached() -> None:
    policy = PolicyView.from_torch(Wide(WEIGHTS), kind="logits", observation_shape=(11,))
    frames = torch.randn(100, 11, generator=torch.Generator().manual_seed(1))
    commands = torch.tensor([[1.0, -1.0]]).expand(100, 2)
    context = situation(policy, frames, commands, 0.3, 2)
    delivered = ActionDirection().follow(frames, context, context.allowance)
    change = (policy.scores(delivered).softmax(-1) - policy.scores(frames).softmax(-1)).mean(0)
    assert change[0] > 0 > change[1]
    wanted = torch.randint(3, (100,), generator=torch.Generator().manual_seed(2))
    context = situation(policy, frames, wanted, 10.0, 2)
    assert (policy.scores(TargetAction().follow(frames, context, context.allowance)).argmax(1) == wanted).all()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="TargetAction needs discrete"):
        continuous = PolicyView.from_torch(
            Wide(WEIGHTS[:, :4]), kind="deterministic", observation_shape=(4,), action_space=spaces.Box(-1, 1, (3,), np.float32)
        )
        AdversaryEnv(EnvRecipe(factory=lambda: Steps(3), max_episode_steps=3), continuous, STEP, TargetAction())
    with pytest.raises(ValueError, match="chooses_when"):
        AdversaryEnv(CARTPOLE, BALANCER, EPISODE, TargetAction(), chooses_when=True)
    with pytest.raises(TypeError, match="command must be"):
        AdversaryEnv(CARTPOLE, BALANCER, STEP, "sa-rl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm 1, 2 or inf"):
        AdversaryEnv(CARTPOLE, BALANCER, ThreatModel(norm=0, step=2))
    attack = LearnedAttack(
        adversary=PolicyView.from_torch(
            nn.Linear(4, 4), kind="deterministic", observation_shape=(4,), action_space=spaces.Box(-1, 1, (4,), np.float32)
        )
    )
    with pytest.raises(ValueError, match="episode must be the threat's"):
        rrl.attack_policy(BALANCER, CARTPOLE, attack, EPISODE, 2)
    assert attack.to_dict()["adversary"] == attack.adversary.fingerprint()


def test_units_of_single_coordinates_bound_learned_perturbations() -> None:
    threat = ThreatModel(norm=2, step=0.1, scale=(1.0, 2.0, 4.0, 8.0))
    env = AdversaryEnv(CARTPOLE, BALANCER, threat, seed=0)
    env.reset(seed=0)
    for command in np.random.default_rng(0).uniform(-2, 2, (10, 4)).astype(np.float32):
        *_, info = env.step(command)
        assert 0.04 < info["norm"] <= 0.1 * (1 + 1e-9)


def test_a_recurrent_victim_forgets_with_every_episode_and_only_then() -> None:
    from sb3_contrib import RecurrentPPO

    short = EnvRecipe.of("CartPole-v1", max_episode_steps=5)
    victim = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu")
    env = AdversaryVecEnv(short, victim, STEP, n_envs=2, seed=0)
    env.reset()
    memories = []
    for _ in range(7):
        env.step(np.zeros((2, 4), np.float32))
        memories.append(env._duel._memory.clone())
    assert not torch.equal(memories[4], memories[3])
    # an episode's first memory follows from its frame alone
    env._duel._starting[:] = True
    env._duel.respond(np.zeros((2, 4), np.float32))
    once = env._duel._memory.clone()
    env._duel._starting[:] = True
    env._duel.respond(np.zeros((2, 4), np.float32))
    assert torch.equal(env._duel._memory, once)
    env._duel._starting[:] = False
    env._duel.respond(np.zeros((2, 4), np.float32))
    assert not torch.equal(env._duel._memory, once)


def test_a_normalisation_after_the_noise_is_followed_by_the_duel() -> None:
    """The victim behind new statistics is another one; running episodes keep what they have spent."""
    from robustrl.policy import Normalization

    def recipe(mean: float) -> EnvRecipe:
        return EnvRecipe.of(
            "CartPole-v1",
            max_episode_steps=50,
            normalization=Normalization(np.full(4, mean), np.ones(4)),
            normalize="after_noise",
        )

    env = AdversaryVecEnv(recipe(0.0), BALANCER, EPISODE, n_envs=1, seed=0, allocation=Greedy())
    env.reset()
    env.step(np.array([[0.4, 0, 0, 0]], np.float32))
    spent = env._duel.attacker.ledger.spent
    assert spent[0] > 0.1
    before = env._duel.victim.scores(torch.zeros(1, 4))
    env.renormalize(recipe(1.0))
    assert not torch.equal(env._duel.victim.scores(torch.zeros(1, 4)), before)
    assert np.array_equal(env._duel.attacker.ledger.spent, spent)


def test_the_learners_weights_stay_on_their_device_and_global_generators_as_they_were() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    attack = rrl.train_adversary(BALANCER, CARTPOLE, STEP, timesteps=64, n_envs=2, n_steps=16, batch_size=16)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert attack.adversary.device.type == "cpu"


def test_a_terminal_situation_says_what_is_left_to_its_own_slot() -> None:
    recipe = EnvRecipe(factory=lambda: Steps(1), max_episode_steps=10)
    env = AdversaryVecEnv(recipe, BALANCER, EPISODE, n_envs=2, seed=0, allocation=Greedy())
    env.reset()
    following, _, dones, infos = env.step(np.array([[0, 0, 0, 0], [0.6, 0, 0, 0]], np.float32))
    assert dones.all()
    assert infos[0]["terminal_observation"] == pytest.approx([1, 1, 1, 1, 1.0, 0.9], abs=1e-6)
    assert infos[1]["terminal_observation"] == pytest.approx([1, 1, 1, 1, 0.8, 0.9], abs=1e-6)
    assert following.tolist() == [[0, 0, 0, 0, 1, 1]] * 2


def test_an_episode_that_begins_beside_running_ones_leaves_their_budgets() -> None:
    env = AdversaryVecEnv(CARTPOLE, BALANCER, EPISODE, n_envs=2, seed=0, allocation=Greedy())
    env.reset()
    env.step(np.array([[0.6, 0, 0, 0]] * 2, np.float32))
    seen = env._duel.arrive(np.zeros((2, 4), np.float32), np.array([False, True]))
    assert seen[:, 4] == pytest.approx([0.8, 1.0], abs=1e-6)


@dataclass(frozen=True)
class Watching(Perturbation):
    """Keeps what its contexts say."""

    contexts: list[AttackContext] = field(default_factory=list)

    def follow(self, frames: torch.Tensor, context: AttackContext, radius: torch.Tensor) -> torch.Tensor:
        self.contexts.append(context)
        return super().follow(frames, context, radius)


def test_commands_are_carried_out_knowing_the_noise_and_the_stack_that_the_victim_saw() -> None:
    recipe = EnvRecipe(factory=lambda: Steps(3), max_episode_steps=3, noise=rrl.Gaussian(0.1), frame_stack=2)
    victim = PolicyView.from_torch(LinearRule(torch.ones(8, dtype=torch.float64)), kind="q", observation_shape=(8,), n_frames=2)
    command = Watching()
    env = AdversaryVecEnv(recipe, victim, STEP, command, n_envs=2, seed=0)
    env.reset()
    for t in range(6):
        before = env._duel._stack
        env.step(np.ones((2, 4), np.float32))
        (context, stack) = (command.contexts[-1], env._duel._stack)
        assert context.noise is recipe.noise
        assert 0.01 < (stack[:, 1] - t % 3 - 0.1).abs().mean() < 0.5  # the attacked frame with noise
        old = stack[:, 1] if t % 3 == 0 else before[:, 1]  # an episode's first stack is filled
        assert torch.equal(stack[:, 0], old)
        assert t % 3 == 0 or torch.equal(context.seen_stack[:, 0].float(), old)


def test_budgets_are_in_the_units_of_the_frames_and_pictures_stay_in_their_range() -> None:
    from robustrl.policy import Normalization

    normalization = Normalization(np.zeros(4), np.full(4, 4.0))
    env = AdversaryEnv(EnvRecipe.of(CARTPOLE, normalization=normalization), BALANCER, STEP, seed=0)
    env.reset(seed=0)
    assert env.step(np.ones(4, np.float32))[-1]["norm"] == pytest.approx(0.05, rel=1e-4)  # of standard deviations of 2

    class White(Steps):
        observation_space = spaces.Box(0, 1, (2, 2), np.float32)

        def reset(self, **options: Any) -> Any:
            return np.ones((2, 2), np.float32), super().reset(**options)[1]

    victim = PolicyView.from_torch(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), kind="q", observation_shape=(2, 2))
    env = AdversaryEnv(EnvRecipe(factory=lambda: White(3), max_episode_steps=3), victim, STEP, seed=0)
    env.reset(seed=0)
    env._duel.respond(np.array([[1, 1, 1, -1]], np.float32))
    assert env._duel._stack.flatten().tolist() == pytest.approx([1, 1, 1, 0.9], abs=1e-5)


def test_victims_act_within_their_space_and_sample_where_asked() -> None:
    class Pays(Steps):
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def step(self, action: Any) -> Any:
            return np.ones(4, np.float32), float(action[0]), False, False, {}

    strong = PolicyView.from_torch(
        Wide(torch.full((1, 4), 9.0, dtype=torch.float64)),
        kind="deterministic",
        observation_shape=(4,),
        action_space=Pays.action_space,
    )
    env = AdversaryEnv(EnvRecipe(factory=Pays, max_episode_steps=9), strong, STEP, seed=0)
    env.reset(seed=0)
    assert env.step(np.ones(4, np.float32))[1] == -1.0
    coin = PolicyView.from_torch(LinearRule(torch.zeros(4, dtype=torch.float64)), kind="logits", observation_shape=(4,))
    for deterministic in (True, False):
        many = AdversaryVecEnv(CARTPOLE, coin, STEP, n_envs=16, deterministic=deterministic, seed=0)
        many.reset()
        assert len(set(many._duel.respond(np.zeros((16, 4), np.float32)).tolist())) == (1 if deterministic else 2)


def test_a_trained_adversary_is_kept_under_a_path_of_any_kind(tmp_path: Path) -> None:
    common: dict[str, Any] = {"timesteps": 16, "n_envs": 2, "n_steps": 8, "batch_size": 16}
    attacks = [
        train_adversary(BALANCER, CARTPOLE, STEP, path=path, **common)
        for path in (str(tmp_path / "adversary.zip"), tmp_path / "adversary.zip")
    ]
    assert attacks[0].to_dict() == attacks[1].to_dict()
    assert {file.name for file in tmp_path.iterdir()} == {"adversary.zip", "adversary.json"}
