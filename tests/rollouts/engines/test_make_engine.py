"""Which engine plays what."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import register, registry
from toys import Steps

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import ChainError
from robustrl.registration import register_envs
from robustrl.rollouts.engines import make_engine

register_envs()


class DoubleReward(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


def cartpole(**changes: Any) -> EnvRecipe:
    return EnvRecipe(env_id="CartPole-v1", **changes)


def test_auto_takes_the_native_engine_for_an_unwrapped_cartpole_alone() -> None:
    wrapped = cartpole(wrappers=(DoubleReward,))
    rewarded = cartpole(env_kwargs={"sutton_barto_reward": True})
    rendered = cartpole(env_kwargs={"render_mode": "rgb_array"})
    names = [make_engine(recipe).name for recipe in (cartpole(), wrapped, rewarded, rendered)]
    assert names == ["native", "list", "native", "list"]
    assert make_engine(cartpole(), "list").name == "list"
    assert make_engine(EnvRecipe(factory=lambda: gym.make("CartPole-v1"))).name == "list"


def test_auto_never_takes_an_optional_package() -> None:
    for env_id in ("MountainCar-v0", "Acrobot-v1", "robustrl/PongOneRound-v0"):
        assert make_engine(EnvRecipe(env_id=env_id)).name == "list"


def test_every_engine_can_be_asked_for_by_name() -> None:
    for name in ("native", "list", "envpool"):
        assert make_engine(cartpole(), name).name == name
    assert make_engine(EnvRecipe(env_id="robustrl/PongOneRound-v0"), "ale").name == "ale"


@pytest.mark.parametrize("engine", ["native", "envpool"])
@pytest.mark.parametrize(
    "changes",
    [
        {"kwargs": {"sutton_barto_reward": True}},
        {"additional_wrappers": (gym.wrappers.TimeAwareObservation.wrapper_spec(),)},
        {"entry_point": "toys:Steps"},
    ],
)
def test_a_changed_cartpole_is_not_taken_for_the_plain_one(
    engine: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = gym.spec("CartPole-v1")
    settings: dict[str, Any] = {
        "entry_point": spec.entry_point,
        "vector_entry_point": spec.vector_entry_point,
        "max_episode_steps": 50,
    }
    monkeypatch.delitem(registry, "CartPole-v1")
    register("CartPole-v1", **(settings | changes))
    with pytest.raises(ValueError, match=f"engine='{engine}' is not available for CartPole-v1"):
        make_engine(cartpole(), engine)
    assert make_engine(cartpole()).name == "list"


def test_a_cartpole_with_another_vector_environment_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point = gym.spec("CartPole-v1").entry_point
    monkeypatch.delitem(registry, "CartPole-v1")
    register("CartPole-v1", entry_point, vector_entry_point="toys:Steps", max_episode_steps=50)
    assert make_engine(cartpole()).name == "list"


def test_an_engine_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="engine='native' is not available for MountainCar-v0: only .*; use 'list'"):
        make_engine(EnvRecipe(env_id="MountainCar-v0"), "native")
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'native', 'list', 'envpool', 'ale', got 'fast'"):
        make_engine(cartpole(), "fast")


def test_an_environment_without_a_horizon_has_no_engine() -> None:
    with pytest.raises(ChainError, match="no finite horizon: pass max_episode_steps="):
        make_engine(EnvRecipe(factory=lambda: Steps(3)))
