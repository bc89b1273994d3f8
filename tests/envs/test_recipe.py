"""Environments as recipes: what travels, what is refused, and that the same recipe builds the same environment."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from numpy.testing import assert_array_equal
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize
from toys import balancer

from robustrl.envs import EnvRecipe, add_noise, make_vec_env, sb3
from robustrl.envs.recipe import find_spec
from robustrl.errors import ChainError
from robustrl.noise import Gaussian, Uniform
from robustrl.policy import Normalization
from robustrl.rollouts.collect import make_job

NOISE = Gaussian(0.2)


class Endless(gym.Env[np.ndarray, np.int64]):
    """No time limit of its own; the reward is 2, the frame the first entry of its generator."""

    observation_space: spaces.Space[Any] = spaces.Box(-1, 1, (3,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.random(3, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(3, dtype=np.float32), 2.0, False, False, {}


class Grey(Endless):
    observation_space = spaces.Box(0, 255, (8, 8, 1), np.uint8)


class TupleActions(Endless):
    action_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))


class Tripled(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return 3 * float(reward)


# ---------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    "recipe",
    [
        EnvRecipe(env_id="CartPole-v1"),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=5, stack_padding="zero", max_episode_steps=200),
        EnvRecipe(env_id="CartPole-v1", noise=Gaussian((0.1, 0.2, 0.0, 0.3)), env_kwargs={"sutton_barto_reward": True}),
        EnvRecipe(env_id="Acrobot-v1", noise=Uniform(0.1)),
    ],
    ids=lambda recipe: recipe.label,
)
def test_recipes_survive_a_round_trip_through_a_file(recipe: EnvRecipe) -> None:
    rebuilt = EnvRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert rebuilt.to_dict() == recipe.to_dict()
    assert rebuilt.fingerprint() == recipe.fingerprint()
    assert rebuilt.noise == recipe.noise
    assert rebuilt.horizon == recipe.horizon


def test_fingerprints_tell_recipes_apart_but_not_two_spellings_of_one() -> None:
    base = EnvRecipe(env_id="CartPole-v1", noise=NOISE)
    others = [
        EnvRecipe(env_id="MountainCar-v0", noise=NOISE),
        EnvRecipe(env_id="CartPole-v1", noise=Gaussian(0.3)),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=2),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=2, stack_padding="zero"),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, max_episode_steps=499),
        EnvRecipe(env_id="CartPole-v1", noise=NOISE, wrappers=(Tripled,)),
        EnvRecipe(env_id="CartPole-v1"),
    ]
    assert len({recipe.fingerprint() for recipe in [base, *others]}) == 8
    assert EnvRecipe(env_id="CartPole-v1", noise=NOISE, max_episode_steps=500).fingerprint() == base.fingerprint()


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_a_recipe_takes_everything_that_names_an_environment() -> None:
    spec = gym.spec("CartPole-v1")
    vec_env = make_vec_env("CartPole-v1", 2, noise=NOISE, frame_stack=3, max_episode_steps=50)
    assert EnvRecipe.of("CartPole-v1") == EnvRecipe(env_id="CartPole-v1")
    assert EnvRecipe.of(spec, noise=NOISE) == EnvRecipe(env_id="CartPole-v1", max_episode_steps=500, noise=NOISE)
    assert EnvRecipe.of(Endless, max_episode_steps=9).horizon == 9
    assert EnvRecipe.of(vec_env) == EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=3, max_episode_steps=50)
    assert EnvRecipe.of(VecMonitor(vec_env)) == EnvRecipe.of(vec_env)
    assert EnvRecipe.of(vec_env, noise=NOISE, max_episode_steps=20).horizon == 20
    recipe = EnvRecipe(env_id="CartPole-v1", frame_stack=4)
    assert EnvRecipe.of(recipe, noise=NOISE).frame_stack == 4


def test_facts_of_a_recipe_are_those_of_the_clean_environment() -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=NOISE, frame_stack=4)
    assert recipe.horizon == 500
    assert recipe.frame_space == gym.make("CartPole-v1").observation_space
    assert recipe.action_space == spaces.Discrete(2)
    assert recipe.label == "CartPole-v1"
    assert "Endless" in EnvRecipe(factory=Endless).label
    base = recipe.base_env()
    assert "NoiseObservation" not in str(base)


def test_wrappers_are_applied_innermost_first_outside_the_monitor() -> None:
    recipe = EnvRecipe(
        factory=Endless, max_episode_steps=4, wrappers=(Tripled, partial(wrappers.TransformReward, func=lambda r: r + 1))
    )
    env = recipe.base_env(inner=Monitor)
    env.reset()
    for _ in range(3):
        env.step(np.int64(0))
    _, reward, _, truncated, info = env.step(np.int64(0))
    assert reward == 2 * 3 + 1
    assert truncated
    assert info["episode"]["r"] == 4 * 2.0


def test_a_recipe_does_not_follow_later_changes_of_its_arguments() -> None:
    kwargs = {"sutton_barto_reward": True}
    recipe = EnvRecipe(env_id="CartPole-v1", env_kwargs=kwargs, wrappers=[Tripled])  # type: ignore[arg-type]
    before = recipe.fingerprint()
    kwargs["sutton_barto_reward"] = False
    assert recipe.env_kwargs == {"sutton_barto_reward": True}
    assert recipe.wrappers == (Tripled,)
    assert recipe.fingerprint() == before


def test_a_second_noise_is_refused_the_same_one_is_not() -> None:
    vec_env = make_vec_env("CartPole-v1", noise=NOISE)
    assert EnvRecipe.of(vec_env, noise=Gaussian(0.2)).noise == NOISE
    for env in (vec_env, EnvRecipe(env_id="CartPole-v1", noise=NOISE)):
        with pytest.raises(
            ChainError, match=r"two noises: the environment already adds Gaussian\(sigma=0.2\), noise=Gaussian\(sigma=0.3\)"
        ):
            EnvRecipe.of(env, noise=Gaussian(0.3))
    with pytest.raises(ChainError, match="two noise wrappers"):
        make_vec_env(lambda: add_noise(gym.make("CartPole-v1"), NOISE), noise=NOISE)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda env: VecNormalize(VecNormalize(env)), "VecNormalize"),
        (lambda env: VecFrameStack(env, 2), "VecFrameStack"),
        (lambda env: VecMonitor(VecFrameStack(env, 2)), "VecFrameStack"),
        (lambda env: sb3.NoiseObservation(env, NOISE), "NoiseObservation"),
    ],
)
def test_wrappers_around_make_vec_env_are_not_silently_left_out(wrap: Any, name: str) -> None:
    env = wrap(make_vec_env("CartPole-v1", noise=NOISE))
    with pytest.raises(ChainError, match=rf"^{name} wrapped around make_vec_env\(...\) is not in the recipe.*wrapper_class="):
        EnvRecipe.of(env)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_a_vec_normalize_around_make_vec_env_becomes_the_recipes_normalisation() -> None:
    """With the statistics of that moment, even if it goes on learning."""
    env = VecNormalize(make_vec_env("CartPole-v1", 2, noise=NOISE, seed=0))
    env.reset()
    env.step(np.zeros(2, dtype=np.int64))
    recipe = EnvRecipe.of(VecMonitor(env))
    assert recipe == EnvRecipe(env_id="CartPole-v1", noise=NOISE, normalization=Normalization.of(env), normalize="after_noise")
    env.step(np.zeros(2, dtype=np.int64))
    assert EnvRecipe.of(env) != recipe
    assert recipe.frame_space == recipe.raw_space
    for inner in (make_vec_env("CartPole-v1", normalization=Normalization.of(env)), VecNormalize(make_vec_env("CartPole-v1"))):
        with pytest.raises(ChainError, match=r"^VecNormalize wrapped around make_vec_env"):
            EnvRecipe.of(VecNormalize(inner))


class LosesLives(gym.Wrapper[Any, Any, Any, Any]):
    """As AtariPreprocessing does on request."""

    terminal_on_life_loss = True


class EpisodicLifeEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Named like Stable-Baselines3's, which needs an emulator."""


@pytest.mark.parametrize("wrapper", [LosesLives, EpisodicLifeEnv])
@pytest.mark.parametrize("noise", [None, NOISE])
def test_one_life_is_no_episode(wrapper: Any, noise: Any) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=noise, wrappers=(wrapper,))
    assert recipe.ends_with_a_life
    with pytest.raises(ChainError, match="^an episode of CartPole-v1 is one life, not a whole game: make it without"):
        make_job(balancer(), recipe)
    assert not EnvRecipe(env_id="CartPole-v1", noise=noise).ends_with_a_life
    make_job(balancer(), EnvRecipe(env_id="CartPole-v1", noise=noise, wrappers=(Untouched,)))


class Untouched(gym.Wrapper[Any, Any, Any, Any]):
    terminal_on_life_loss = False


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (partial(wrappers.FrameStackObservation, stack_size=4), "noise after frame stacking"),
        (wrappers.NormalizeObservation, "NormalizeObservation still updates its statistics"),
        (lambda env: add_noise(env, NOISE), "two noise wrappers"),
        (lambda env: Monitor(Tripled(env)), "Tripled changes rewards inside the return monitor"),
    ],
)
def test_a_recipe_whose_wrappers_break_the_proof_is_refused_wherever_it_goes(wrapper: Any, message: str) -> None:
    recipe = EnvRecipe(env_id="CartPole-v1", noise=NOISE, wrappers=(wrapper,))
    for use in (lambda: recipe.horizon, lambda: recipe.to_dict(), lambda: make_vec_env(recipe), lambda: recipe.frame_space):
        with pytest.raises(ChainError, match=message):
            use()
    with pytest.raises(ChainError, match=message):  # environments in other processes cannot be inspected, the recipe can
        make_vec_env(recipe, vec_env_cls=SubprocVecEnv)


@pytest.mark.parametrize("factory", [Endless, lambda: Endless()])
def test_factories_travel_but_cannot_be_rebuilt_from_files(factory: Any) -> None:
    recipe = EnvRecipe(factory=factory, max_episode_steps=10, noise=NOISE)
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert stored["env_id"] is None
    assert isinstance(stored["factory"], str)
    with pytest.raises(ValueError, match="used a factory or wrappers, which files cannot hold: pass the environment again"):
        EnvRecipe.from_dict(stored)


def test_wrappers_cannot_be_rebuilt_from_files() -> None:
    stored = EnvRecipe(env_id="CartPole-v1", wrappers=(Tripled,)).to_dict()
    assert stored["wrappers"] == ["Tripled"]
    with pytest.raises(ValueError, match="used a factory or wrappers"):
        EnvRecipe.from_dict(stored)


@pytest.mark.parametrize(
    "data", [{}, {"env_id": "CartPole-v1", "colour": "red"}, {"env_id": "CartPole-v1", "noise": {"kind": "Pink"}}]
)
def test_damaged_plain_data_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"recipe|noise kind"):
        EnvRecipe.from_dict(data)


def test_an_endless_environment_is_refused() -> None:
    with pytest.raises(ChainError, match="Endless has no finite horizon: pass max_episode_steps="):
        _ = EnvRecipe(factory=Endless).horizon
    with pytest.raises(ChainError, match="no finite horizon"):
        make_vec_env(Endless)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: EnvRecipe(), ValueError, "exactly one of env_id and factory"),
        (lambda: EnvRecipe(env_id="CartPole-v1", factory=Endless), ValueError, "exactly one of env_id and factory"),
        (lambda: EnvRecipe(env_id="CartPol-v1"), ValueError, "unknown environment id 'CartPol-v1'"),
        (lambda: EnvRecipe(env_id="no_such_module_here:CartPole-v1"), ValueError, "unknown environment id"),
        (lambda: EnvRecipe(env_id=3), TypeError, "env id must be a string"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", noise=0.2), TypeError, "^noise must be a robustrl noise mechanism"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", frame_stack=0), ValueError, "^frame_stack must be"),
        (lambda: EnvRecipe(env_id="CartPole-v1", frame_stack=2.0), TypeError, "^frame_stack must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", stack_padding="copy"), ValueError, "^stack_padding must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", max_episode_steps=0), ValueError, "^max_episode_steps must be"),
        (lambda: EnvRecipe(env_id="CartPole-v1", max_episode_steps=math.inf), TypeError, "^max_episode_steps must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", wrappers=("Tripled",)), TypeError, "^wrappers must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", wrappers=Tripled), TypeError, "^wrappers must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", env_kwargs=["a"]), TypeError, "^env_kwargs must be"),  # type: ignore[arg-type]
        (lambda: EnvRecipe(env_id="CartPole-v1", env_kwargs={"x": 1}).horizon, ValueError, "cannot be made with {'x': 1}"),
        (lambda: EnvRecipe(factory=lambda: 3).horizon, TypeError, "factory must return a gymnasium.Env, got int"),
        (lambda: EnvRecipe.of(3), TypeError, "^env must be an id, an EnvSpec, a zero-argument factory"),
        (lambda: EnvRecipe.of(gym.make("CartPole-v1")), TypeError, "^env must be an id"),
        (lambda: EnvRecipe.of(DummyVecEnv([Endless])), TypeError, "^env must be an id.*got DummyVecEnv"),
        (lambda: EnvRecipe.of(add_noise(gym.make("CartPole-v1"), NOISE).spec), ChainError, "lists wrappers"),
        (lambda: EnvRecipe(env_id="FrozenLake-v1").frame_space, TypeError, "FrozenLake-v1: observations must be a Box space"),
        (lambda: EnvRecipe(env_id="FrozenLake-v1", noise=NOISE).horizon, TypeError, "noise needs a Box observation space"),
        (
            lambda: EnvRecipe(factory=Grey, max_episode_steps=5, noise=NOISE).horizon,
            ChainError,
            "float observation space, got uint8",
        ),
        (lambda: make_vec_env("CartPole-v1", 0), ValueError, "^n_envs must be"),
        (lambda: make_vec_env("CartPole-v1", True), TypeError, "^n_envs must be"),
        (lambda: make_vec_env("CartPole-v1", noise="loud"), TypeError, "^noise must be"),  # type: ignore[arg-type]
        (lambda: make_vec_env("CartPole-v9"), ValueError, "unknown environment id"),
        (lambda: make_vec_env("CartPole-v1", frame_stack=-1), ValueError, "^frame_stack must be"),
        (lambda: make_vec_env(TupleActions, max_episode_steps=5), TypeError, "Stable-Baselines3 cannot act in Tuple"),
        (lambda: find_spec(None), TypeError, "env id must be a string"),  # type: ignore[arg-type]
    ],
)
def test_bad_recipes_are_refused_with_the_argument_at_fault(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


# ------------------------------------------------------------------------------------------------- make_vec_env


def test_the_chain_of_make_vec_env_is_environment_monitor_wrappers_noise_stack() -> None:
    env = make_vec_env("CartPole-v1", 2, noise=NOISE, frame_stack=3, wrapper_class=Tripled)
    assert isinstance(env, sb3.FrameStack)
    assert isinstance(env.venv, sb3.NoiseObservation)
    assert isinstance(env.venv.venv, DummyVecEnv)
    member: Any = env.venv.venv.envs[0]
    assert isinstance(member, Tripled)
    assert isinstance(member.env, Monitor)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (12,), np.float32)
    assert env.num_envs == 2
    plain = make_vec_env("CartPole-v1")
    assert isinstance(plain, DummyVecEnv)


def test_the_monitor_reports_the_environments_own_rewards() -> None:
    env = make_vec_env(Endless, noise=NOISE, max_episode_steps=3, wrapper_class=Tripled)
    env.reset()
    for _ in range(3):
        _, rewards, _, infos = env.step(np.zeros(1, dtype=np.int64))
    assert rewards[0] == 6.0
    assert infos[0]["episode"]["r"] == 6.0  # three steps of 2, not of 6


def test_a_wrapper_class_comes_on_top_of_the_recipes_own() -> None:
    env = make_vec_env(EnvRecipe(factory=Endless, max_episode_steps=3, wrappers=(Tripled,)), wrapper_class=Tripled)
    env.reset()
    assert env.step(np.zeros(1, dtype=np.int64))[1][0] == 18.0
    assert EnvRecipe.of(env).wrappers == (Tripled, Tripled)


def test_one_seed_repeats_everything_and_environments_differ_among_themselves() -> None:
    def run(seed: int) -> np.ndarray:
        env = make_vec_env("CartPole-v1", 3, noise=NOISE, seed=seed)
        frames = [env.reset()]
        frames += [env.step(np.array([env.action_space.sample() for _ in range(3)]))[0] for _ in range(40)]
        return np.array(frames)

    first = run(4)
    assert_array_equal(first, run(4))
    assert not np.array_equal(first, run(5))
    assert len(np.unique(first[0], axis=0)) == 3


def test_environments_in_other_processes_still_carry_a_usable_recipe() -> None:
    env = make_vec_env("CartPole-v1", 1, noise=NOISE, seed=0, vec_env_cls=partial(SubprocVecEnv, start_method="fork"))
    try:
        assert EnvRecipe.of(env) == EnvRecipe(env_id="CartPole-v1", noise=NOISE)
        with pytest.raises(ChainError, match="VecFrameStack wrapped around"):
            EnvRecipe.of(VecFrameStack(env, 2))
        assert env.reset().shape == (1, 4)
    finally:
        env.close()


def test_module_ids_import_their_module_as_gym_make_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someones_envs.py").write_text(
        "import gymnasium as gym\ngym.register('SomeonesCartPole-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv', max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = EnvRecipe(env_id="someones_envs:SomeonesCartPole-v0")
    assert recipe.horizon == 9
    with pytest.raises(ValueError, match="no_such_module"):
        EnvRecipe(env_id="no_such_module:CartPole-v1")
