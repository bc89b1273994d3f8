"""EnvPool: Gymnasium's environments where it is allowed, and refused where it is another one."""

from __future__ import annotations

import sys
from typing import Any

import envpool
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import registry
from scipy import stats

from robustrl.envs.recipe import EnvRecipe
from robustrl.rollouts.engines import EnvPoolEngine, make_engine
from robustrl.rollouts.engines import envpool as module
from robustrl.rollouts.engines.envpool import DIFFERENT, MUJOCO, SAME
from rollouts.engines.lockstep import compare

SEED = np.random.SeedSequence(3)
TOLERANCE = 1e-6
ALLOWED = [env_id for env_id in SAME if EnvPoolEngine.refusal(EnvRecipe(env_id=env_id)) is None]
CONTROL = [env_id for env_id, same in SAME.items() if same.newer is None]


def refusal(env_id: str, **changes: Any) -> str:
    with pytest.raises(ValueError, match=f"engine='envpool' is not available for {env_id}: .*; use 'list'") as caught:
        make_engine(EnvRecipe(env_id=env_id, **changes), "envpool")
    return str(caught.value)


def test_classic_control_is_allowed_and_mujoco_if_it_is_the_version_inside_envpool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CONTROL == ["CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1"]
    for installed in (MUJOCO, "4.0.0"):
        monkeypatch.setattr(module, "version", {"mujoco": installed}.get)
        allowed = [env_id for env_id in SAME if EnvPoolEngine.refusal(EnvRecipe(env_id=env_id)) is None]
        assert allowed == (list(SAME) if installed == MUJOCO else CONTROL)
    assert "EnvPool steps with MuJoCo 3.6.0 and Gymnasium with the installed 4.0.0" in refusal("Hopper-v5")


@pytest.mark.parametrize("env_id", ALLOWED)
def test_a_step_from_the_same_state_is_gymnasiums(env_id: str) -> None:
    """Frames, rewards and ends, until the last episode has ended or 200 steps are done."""
    worst = compare(env_id)
    assert worst.first <= TOLERANCE
    assert worst.frame <= TOLERANCE
    assert worst.reward <= TOLERANCE
    assert worst.finished == 0
    assert worst.steps > 50
    assert worst.ended > 0 or env_id in ("HalfCheetah-v5", "Swimmer-v5", "HumanoidStandup-v5"), "whose episodes are longer"


def test_the_reason_for_refusing_pendulum_is_real() -> None:
    assert compare("Pendulum-v1").frame > 1000 * TOLERANCE
    assert "speed before the clip" in refusal("Pendulum-v1")


@pytest.mark.skipif("Ant-v5" in ALLOWED, reason="the installed MuJoCo is EnvPool's own")
def test_the_reason_for_refusing_another_mujoco_is_real() -> None:
    assert compare("Ant-v5", slots=5, steps=50).frame > 1000 * TOLERANCE


def test_every_environment_that_was_not_compared_is_refused() -> None:
    shared = set(envpool.list_all_envs()) & set(gym.registry) - set(SAME)
    assert {"CartPole-v0", "Pendulum-v1", "Hopper-v4", "LunarLander-v3"} <= shared
    for env_id in shared:
        reason = EnvPoolEngine.refusal(EnvRecipe(env_id=env_id))
        assert reason is not None
        assert reason.startswith("EnvPool's is" if not gym.spec(env_id).kwargs else "it has registered environments only")
    assert not set(SAME) & set(DIFFERENT)


class Plain(gym.Wrapper[Any, Any, Any, Any]):
    """Changes nothing, but who knows."""


@pytest.mark.parametrize("changes", [{"wrappers": (Plain,)}, {"env_kwargs": {"sutton_barto_reward": True}}])
def test_an_environment_with_additions_is_refused(changes: dict[str, Any]) -> None:
    assert "registered environments only" in refusal("CartPole-v1", **changes)
    with pytest.raises(ValueError, match="registered environments only"):
        make_engine(EnvRecipe(factory=lambda: gym.make("CartPole-v1")), "envpool")


def test_an_id_that_was_given_to_another_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry, "Acrobot-v1", gym.envs.registration.EnvSpec("Acrobot-v1", "toys:Steps", max_episode_steps=10))
    assert "registered with toys:Steps" in refusal("Acrobot-v1")


def test_a_missing_or_another_envpool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envpool, "__version__", "1.3.0")
    assert "EnvPool 1.2.5 was compared with Gymnasium, not 1.3.0" in refusal("CartPole-v1")
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert "pip install 'robustrl[envpool]'" in refusal("CartPole-v1")
    assert make_engine(EnvRecipe(env_id="MountainCar-v0")).name == "list"


def test_a_seed_names_the_episode() -> None:
    """EnvPool draws from mt19937(seed), two words per double, low word first; CartPole starts uniform on (-.05, .05)."""
    frames, seeds = EnvPoolEngine(EnvRecipe(env_id="CartPole-v1")).start(50, SEED)
    assert (seeds > 2**31).any()  # those travel as negative numbers
    for frame, seed in zip(frames, seeds.tolist(), strict=True):
        generator = np.random.MT19937()
        generator._legacy_seeding(seed)
        low, high = generator.random_raw(8).reshape(4, 2).astype(np.float64).T
        np.testing.assert_allclose(frame, -0.05 + 0.1 * (low + high * 2.0**32) / 2.0**64, rtol=0, atol=1e-8)


@pytest.mark.parametrize("env_id", [i for i in SAME if i in (*ALLOWED, "InvertedPendulum-v5", "HalfCheetah-v5")])
def test_first_states_have_gymnasiums_law(env_id: str) -> None:
    """Two-sample Kolmogorov-Smirnov, coordinate by coordinate, with fixed seeds; which MuJoCo plays no part in it."""
    n = 2000 if env_id in CONTROL else 500
    frames, _ = EnvPoolEngine(EnvRecipe(env_id=env_id)).start(n, SEED)
    single = gym.make(env_id)
    own = np.stack([single.reset(seed=int(seed))[0] for seed in np.random.SeedSequence(4).generate_state(n)])
    frames, own = frames.round(9), own.round(9)  # some coordinates are constants, but for their last bits
    for ours, theirs in zip(frames.T, own.T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-2 / frames.shape[1]
    moving = own.std(axis=0) > 1e-9
    between = np.corrcoef(frames[:, moving].T) - np.corrcoef(own[:, moving].T)
    assert np.abs(between).max() < 5 * np.sqrt(2 / n)


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "HalfCheetah-v5"])
def test_the_horizon_is_the_recipes(env_id: str) -> None:
    recipe = EnvRecipe(env_id=env_id, max_episode_steps=7)
    engine = EnvPoolEngine(recipe)
    engine.start(3, SEED)
    actions = np.stack([np.zeros(recipe.action_space.shape or (), np.float32 if recipe.action_space.shape else np.int64)] * 3)
    assert [engine.step(actions).finished.tolist() for _ in range(7)] == [[False] * 3] * 6 + [[True] * 3]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come in the order of the slots, however many threads EnvPool has."""

    def told() -> list[np.ndarray]:
        engine, rng = EnvPoolEngine(EnvRecipe(env_id="MountainCar-v0")), np.random.default_rng(0)
        frames, _ = engine.start(40, SEED)
        history, n = [frames], 40
        for _ in range(15):
            history.append(engine.step(rng.integers(3, size=n)).frames)
            stays = rng.random(n) < 0.9
            engine.keep(stays)
            n = int(stays.sum())
        return history

    alone, make = told(), envpool.make_gymnasium
    monkeypatch.setattr(envpool, "make_gymnasium", lambda *a, **k: make(*a, **{**k, "num_threads": 4}))
    assert all(np.array_equal(one, other) for one, other in zip(alone, told(), strict=True))


def test_an_id_with_its_module_is_understood() -> None:
    frames, _ = EnvPoolEngine(EnvRecipe(env_id="gymnasium:CartPole-v1")).start(2, SEED)
    assert frames.shape == (2, 4)
