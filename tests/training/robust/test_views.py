"""Bounds of the views of SB3's policies: all their wrappers, never left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from torch import Tensor, nn

from robustrl.networks.bounds import ball_bounds, interval_bounds
from robustrl.policy import Normalization, PolicyView
from robustrl.training.robust.views import view_of

from .blank import Blank

VECTOR = spaces.Box(-2, 2, (5,), np.float32)
PIXELS = spaces.Box(0, 255, (2, 36, 36), np.uint8)
ARM = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32))


def model(kind: Any, observations: spaces.Space[Any], actions: spaces.Space[Any], **options: Any) -> Any:
    policy = "MlpPolicy" if observations is VECTOR else "CnnPolicy" if observations is PIXELS else "MultiInputPolicy"
    memory = {} if kind is PPO else {"buffer_size": 10}
    return kind(policy, Blank(observations, actions), seed=1, device="cpu", **memory, **options)


def holds(view: PolicyView, centre: Tensor, radius: float, rounding: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = ball_bounds(view, centre, radius)
    with torch.no_grad():
        for i in range(40):
            e = 2 * torch.rand(centre.shape, generator=generator) - 1
            scores = view.scores(centre + radius * (e.sign() if i % 2 else e) * (1 - 1e-6))
            assert (scores >= low).all()
            assert (scores <= high).all()
    with torch.no_grad():
        for end in ball_bounds(view, centre, 0.0):
            torch.testing.assert_close(end, view.scores(centre), rtol=1e-2, atol=rounding)


def test_squashed_deviations_are_clamped_where_sac_clamps_them() -> None:
    sac = model(SAC, VECTOR, ARM)
    with torch.no_grad():
        sac.policy.actor.log_std.weight.mul_(1000)
    view = PolicyView.from_sb3(sac)
    centre = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    for radius in (0.01, 1.0):
        low, high = ball_bounds(view, centre, radius)
        assert low[:, 2:].min() == -20
        assert high[:, 2:].max() == 2
        scores = view.scores(centre)
        assert (scores <= high).all()
        assert (scores >= low).all()


@pytest.mark.parametrize(
    ("kind", "actions", "options"),
    [
        (PPO, spaces.Discrete(3), {}),
        (PPO, ARM, {}),
        (PPO, ARM, {"use_sde": True}),
        (DQN, spaces.Discrete(3), {}),
        (SAC, ARM, {}),
        (TD3, ARM, {}),
    ],
    ids=["ppo", "gaussian", "gsde", "dqn", "sac", "td3"],
)
def test_a_vector_policys_scores_stay_in_their_bounds(kind: Any, actions: spaces.Space[Any], options: dict[str, Any]) -> None:
    view = PolicyView.from_sb3(model(kind, VECTOR, actions, **options))
    centre = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    for radius in (0.0, 0.1, 1.0):
        holds(view, centre, radius)


def test_a_picture_policys_scores_stay_in_their_bounds() -> None:
    view = PolicyView.from_sb3(model(DQN, PIXELS, spaces.Discrete(3)))
    centre = torch.randint(0, 256, (2, 2, 36, 36), generator=torch.Generator().manual_seed(3)).float()
    holds(view, centre, 1.0, rounding=0.2)
    low, high = ball_bounds(view, centre, 1.0, 2)
    box_low, box_high = ball_bounds(view, centre, 1.0)
    assert (low >= box_low).all()
    assert (high <= box_high).all()


def test_pixels_in_the_unit_interval_and_channels_last_are_seen_through() -> None:
    unit = spaces.Box(0, 1, (36, 36, 2), np.float32)
    view = PolicyView.from_sb3(model(DQN, PIXELS, spaces.Discrete(3)), frame_space=unit)
    holds(view, torch.rand(2, 36, 36, 2, generator=torch.Generator().manual_seed(3)), 1 / 255, rounding=0.2)


def test_a_normalisation_is_seen_through_with_its_clip() -> None:
    raw = PolicyView.from_sb3(model(PPO, VECTOR, ARM))
    view = raw.after(Normalization(np.arange(5.0), np.array([0.01, 1, 4, 100, 1e4]), clip=3.0))
    centre = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)) * 3
    holds(view, centre, 0.2)
    low, high = interval_bounds(view, torch.full((1, 5), 1e6), torch.full((1, 5), 2e6))
    assert (high - low).max() < 1e-3  # all of it is beyond the clip


def test_denoisers_memories_and_dictionaries_have_no_bounds() -> None:
    view = PolicyView.from_sb3(model(PPO, VECTOR, ARM)).denoised(nn.Linear(5, 5))
    with pytest.raises(ValueError, match="got _Denoised"):
        ball_bounds(view, torch.zeros(1, 5), 0.1)
    dictionaries = PolicyView.from_sb3(model(PPO, spaces.Dict({"a": VECTOR, "b": ARM}), ARM))
    with pytest.raises(ValueError, match="policy must take arrays"):
        ball_bounds(dictionaries, torch.zeros(1, 7), 0.1)
    from sb3_contrib import RecurrentPPO

    recurrent = RecurrentPPO("MlpLstmPolicy", Blank(VECTOR, ARM), device="cpu")
    with pytest.raises(ValueError, match="policy must have no memory"):
        ball_bounds(PolicyView.from_sb3(recurrent), torch.zeros(1, 5), 0.1)


def test_a_learners_view_takes_what_its_buffer_holds() -> None:
    """Behind a VecNormalize the network sees normalised observations; the view adds no second normalisation."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    venv = VecNormalize(DummyVecEnv([lambda: Blank(VECTOR, ARM)]))
    venv.obs_rms.mean[:] = 5.0
    learner = PPO("MlpPolicy", venv, seed=1, device="cpu")
    x = torch.randn(4, 5)
    with torch.no_grad():
        expected = learner.policy.get_distribution(x).mode()
        torch.testing.assert_close(view_of(learner).scores(x)[:, :2], expected)
