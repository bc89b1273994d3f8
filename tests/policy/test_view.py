"""PolicyView: the same policy as Stable-Baselines3's, differentiable, batched, and honest about what it cannot see."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.testing import assert_array_equal
from scipy import stats
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from robustrl.envs import make_vec_env
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView, fold_frames, frame_shape, push_frame, start_stack


def _model(algorithm: Any, env: Any = None, **kwargs: Any) -> Any:
    env = gym.make("CartPole-v1") if env is None else env
    return algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [16, 16]}, device="cpu", seed=0, **kwargs)


def _observations(n: int, width: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def _linear(weight: list[list[float]], **kwargs: Any) -> PolicyView:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return PolicyView.from_torch(layer, kind=kwargs.pop("kind", "logits"), observation_shape=(len(weight[0]),), **kwargs)


# ------------------------------------------------------------------------------------------ agreement with SB3


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_view_agrees_with_the_model_it_views(algorithm: Any, frames: int) -> None:
    env = make_vec_env("CartPole-v1", noise=Gaussian(0.2), frame_stack=frames)
    model = _model(algorithm, env)
    view = PolicyView.from_sb3(model, n_frames=frames)
    x = 3 * _observations(500, 4 * frames)
    tensor = torch.from_numpy(x)
    with torch.no_grad():
        greedy = view.actions(view.scores(tensor)).numpy()
        values = view.value(tensor)
        if algorithm is DQN:
            expected_scores, expected_values = model.q_net(tensor), model.q_net(tensor).amax(1)
            scores = view.scores(tensor)
        else:
            expected_scores = model.policy.get_distribution(tensor).distribution.logits
            expected_values = model.policy.predict_values(tensor).squeeze(1)
            scores = view.distribution(tensor).logits
    assert torch.allclose(scores, expected_scores, atol=1e-6)
    assert torch.allclose(values, expected_values, atol=1e-6)
    assert_array_equal(greedy, model.predict(x, deterministic=True)[0])
    assert len(np.unique(greedy)) == 2
    assert view.n_actions == 2
    assert view.frame_shape == (4,)


def test_uint8_images_are_scaled_as_the_model_scales_them() -> None:
    class Picture(gym.Env[np.ndarray, np.int64]):
        observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        action_space = spaces.Discrete(3)

    model = PPO("CnnPolicy", DummyVecEnv([Picture]), device="cpu", seed=0, n_steps=8, batch_size=8)
    view = PolicyView.from_sb3(model)
    x = np.random.default_rng(0).integers(0, 256, (4, 1, 36, 36), dtype=np.uint8)
    with torch.no_grad():
        logits = view.distribution(torch.from_numpy(x).float()).logits
        expected = model.policy.get_distribution(torch.from_numpy(x)).distribution.logits
    assert torch.allclose(logits, expected, atol=1e-6)


def test_a_view_shares_the_weights_and_follows_training() -> None:
    model = _model(PPO)
    view = PolicyView.from_sb3(model)
    x = torch.from_numpy(_observations(5))
    before = view.scores(x)
    with torch.no_grad():
        model.policy.action_net.bias += torch.tensor([0.0, 1.0])
    assert torch.allclose(view.scores(x) - before, torch.tensor([0.0, 1.0]).expand(5, 2))


def test_layers_switched_to_training_elsewhere_act_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 3))
    view = PolicyView.from_torch(module, kind="logits", observation_shape=(4,))
    stack = torch.from_numpy(_observations(64))[:, None]
    before = view.act_blocked(stack, batch=16)
    module.train()
    assert torch.equal(view.act_blocked(stack, batch=16), before)
    assert torch.equal(view.for_inference().act_blocked(stack, batch=16), before)


def test_any_torch_module_can_be_viewed() -> None:
    view = _linear([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], critic=nn.Linear(2, 1))
    assert view.n_actions == 3
    assert torch.equal(view.actions(view.scores(torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, -2.0]]))), torch.tensor([0, 1, 2]))
    assert view.value(torch.zeros(5, 2)).shape == (5,)
    q = _linear([[1.0, 0.0], [0.0, 2.0]], kind="q")
    assert q.value(torch.tensor([[3.0, 1.0], [1.0, 4.0]])).tolist() == [3.0, 8.0]
    assert PolicyView.of(view) is view


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_gradients_reach_the_newest_frame_and_no_other(algorithm: Any) -> None:
    env = make_vec_env("CartPole-v1", noise=Gaussian(0.2), frame_stack=3)
    view = PolicyView.from_sb3(_model(algorithm, env), n_frames=3)
    past = torch.from_numpy(_observations(18)).reshape(6, 3, 4).requires_grad_(True)
    newest = torch.from_numpy(_observations(6, seed=1)).requires_grad_(True)
    scores = view.scores(view.fold(past, newest))
    gradient, past_gradient = torch.autograd.grad(scores[:, 0].sum() - scores[:, 1].sum(), (newest, past))
    assert torch.all(gradient.norm(dim=1) > 0)
    assert torch.all(past_gradient[:, :-1].norm(dim=2) > 0)  # the older frames matter ...
    assert torch.all(past_gradient[:, -1] == 0)  # ... and the replaced newest one does not
    constant = view.fold(past.detach(), newest)
    assert torch.autograd.grad(view.scores(constant).sum(), newest)[0].shape == (6, 4)

    e = torch.zeros(6, 4)  # a finite difference, so that the gradient is that of the newest frame and not of another one
    e[:, 2] = 1e-3
    with torch.no_grad():
        up, down = (view.scores(view.fold(past, newest + sign * e)) for sign in (1, -1))
    slope = ((up[:, 0] - up[:, 1]) - (down[:, 0] - down[:, 1])) / 2e-3
    assert torch.allclose(slope, gradient[:, 2], atol=2e-3)


# ----------------------------------------------------------------------------------------------------- actions


def test_a_stochastic_policy_samples_its_own_distribution() -> None:
    view = _linear([[1.0], [0.0], [-1.0], [-30.0]])
    n = 40_000
    draws = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    scores = view.scores(torch.ones(1, 1)).expand(n, 4)
    actions = view.actions(scores, deterministic=False, draws=draws)
    expected = scores[0].softmax(0).detach().numpy().astype(np.float64)
    counts = np.bincount(actions.numpy(), minlength=4)
    assert stats.chisquare(counts[:3], expected[:3] / expected[:3].sum() * counts[:3].sum()).pvalue > 1e-3
    assert counts[3] == 0


def test_actions_of_probability_zero_are_never_sampled() -> None:
    view = _linear([[1.0], [0.0], [-1.0]])
    scores = torch.tensor([[-1e9, 0.0, -1e9]]).expand(3, 3)
    draws = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1 - 2**-24, 0.0]])
    assert view.actions(scores, deterministic=False, draws=draws).tolist() == [1, 1, 1]


def test_an_exploring_q_policy_is_epsilon_greedy() -> None:
    module = nn.Linear(1, 3, bias=False)
    module.weight.data = torch.tensor([[0.0], [1.0], [0.5]])
    view = PolicyView(module, kind="q", observation_shape=(1,), exploration=0.3)
    n = 40_000
    scores = view.scores(torch.ones(1, 1)).expand(n, 3)
    draws = torch.rand(n, 2, generator=torch.Generator().manual_seed(1))
    counts = np.bincount(view.actions(scores, deterministic=False, draws=draws).numpy(), minlength=3)
    assert stats.chisquare(counts, np.array([0.1, 0.8, 0.1]) * n).pvalue > 1e-3
    assert torch.all(view.actions(scores) == 1)


def test_the_law_of_a_stochastic_view_is_that_of_predict() -> None:
    ppo, dqn = _model(PPO), _model(DQN, exploration_initial_eps=0.4)
    dqn.exploration_rate = 0.4
    x = _observations(1)
    for model in (ppo, dqn):
        view, n = PolicyView.from_sb3(model), 4000
        stack = torch.from_numpy(np.repeat(x, n, axis=0))[:, None]
        draws = torch.rand(n, 2, generator=torch.Generator().manual_seed(2))
        ours = int(view.act_blocked(stack, batch=500, deterministic=False, draws=draws).sum())
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - DQN.predict explores with numpy's global generator
        model.action_space.seed(0)
        if model is ppo:
            theirs = int(model.predict(np.repeat(x, n, axis=0), deterministic=False)[0].sum())
        else:
            theirs = sum(int(model.predict(x[0], deterministic=False)[0]) for _ in range(n))
        table = [[ours, n - ours], [theirs, n - theirs]]
        assert stats.fisher_exact(table).pvalue > 1e-3
        assert 0 < ours < n


def test_a_rows_action_depends_on_nobody_else_in_the_batch() -> None:
    """Any subset, in any order, alone or padded: the same scores bit for bit at a fixed batch size, for the usual widths."""
    plain = PolicyView.from_sb3(_model(PPO))
    seen: list[Tensor] = []
    original = plain.rule.choose

    def record(scores: Tensor, draws: Tensor | None) -> Tensor:
        seen.append(scores.clone())
        return original(scores, draws)

    plain.rule.choose = record  # type: ignore[method-assign]
    for view in (plain, plain.for_inference()):
        stack = torch.from_numpy(_observations(300))[:, None]
        draws = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
        everyone = view.act_blocked(stack, batch=64, deterministic=False, draws=draws)
        scores = seen.pop()
        generator = np.random.default_rng(0)
        for size in (1, 2, 7, 63, 64, 65, 200, 300):
            rows = torch.from_numpy(generator.permutation(300)[:size].copy())
            actions = view.act_blocked(stack[rows], batch=64, deterministic=False, draws=draws[rows])
            assert torch.equal(actions, everyone[rows])
            assert torch.equal(seen.pop(), scores[rows])
        assert view.act_blocked(stack[:0], batch=64).shape == (0,)


@pytest.mark.parametrize("widths", [(4, 64, 64, 2), (3, 7, 5), (6, 250, 3)])
def test_what_other_rows_hold_never_changes_a_rows_scores(widths: tuple[int, ...]) -> None:
    """At a fixed batch size and place, bit for bit; for odd layer widths too, where the place itself can matter."""
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    view = PolicyView.from_torch(nn.Sequential(*layers[:-1]), kind="logits", observation_shape=widths[:1])
    x, other = torch.from_numpy(_observations(64, widths[0])), torch.from_numpy(_observations(64, widths[0], seed=1))
    with torch.inference_mode():
        scores = view.scores(x)
        for i in range(0, 64, 5):
            mixed = other.clone()
            mixed[i] = x[i]
            assert torch.equal(view.scores(mixed)[i], scores[i])


def test_a_copy_for_inference_acts_alike_and_leaves_the_original_alone() -> None:
    model = _model(PPO)
    view = PolicyView.from_sb3(model)
    before = view.fingerprint()
    copy = view.for_inference()
    stack = torch.from_numpy(_observations(500))[:, None]
    with torch.no_grad():
        assert torch.allclose(copy.scores(stack[:, 0]), view.scores(stack[:, 0]), atol=1e-6)
    assert torch.equal(copy.act_blocked(stack, batch=128), view.act_blocked(stack, batch=128))
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in view.parameters())
    assert view.fingerprint() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_raise_instead_of_choosing_action_zero(value: float) -> None:
    model = _model(PPO)
    view = PolicyView.from_sb3(model)
    with torch.no_grad():
        model.policy.action_net.bias[0] = value
    with pytest.raises(ValueError, match="scores must be finite, got NaN or inf"):
        view.act_blocked(torch.zeros(3, 1, 4), batch=2)


def test_nan_observations_raise() -> None:
    view = _linear([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="scores must be finite"):
        view.act_blocked(torch.full((3, 1, 2), math.nan), batch=2)


# ------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_changes_with_one_weight_in_its_last_bit() -> None:
    model = _model(PPO)
    view = PolicyView.from_sb3(model)
    first = view.fingerprint()
    assert first == PolicyView.from_sb3(model).fingerprint() == view.fingerprint()
    weight = model.policy.mlp_extractor.policy_net[2].weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(10.0))
    assert view.fingerprint() != first


def test_the_fingerprint_covers_layers_and_decision_rule_but_not_the_critic() -> None:
    def view(activation: type[nn.Module] = nn.Tanh, kind: Any = "q", **kwargs: Any) -> PolicyView:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 2))
        return PolicyView(module, kind=kind, observation_shape=(4,), **kwargs)

    base = view().fingerprint()
    assert view().fingerprint() == base
    assert view(critic=nn.Linear(4, 1)).fingerprint() == base
    others = [view(nn.ReLU), view(kind="logits"), view(exploration=0.1), view(n_frames=2)]
    assert len({other.fingerprint() for other in others} | {base}) == 5


# -------------------------------------------------------------------------------------------------- frame stacks


@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize(
    ("frame", "observation"),
    [((4,), (12,)), ((4,), (3, 4)), ((6, 5), (3, 6, 5)), ((6, 5, 2), (6, 5, 6)), ((6, 5, 1), (6, 5, 3))],
)
def test_stacks_are_the_same_in_numpy_and_torch(padding: Any, frame: tuple[int, ...], observation: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    frames = generator.standard_normal((8, 2, *frame)).astype(np.float32)
    stack, tensor = start_stack(frames[0], 3, padding), start_stack(torch.from_numpy(frames[0]), 3, padding)
    assert np.all(stack[:, -1] == frames[0])
    assert np.all(stack[:, 0] == (0 if padding == "zero" else frames[0]))
    for new in frames[1:]:
        before = stack.copy()
        stack, tensor = push_frame(stack, new), push_frame(tensor, torch.from_numpy(new))
        assert_array_equal(stack[:, :-1], before[:, 1:])
        assert_array_equal(stack, tensor.numpy())
        folded = fold_frames(stack, observation)
        assert folded.shape == (2, *observation)
        assert_array_equal(folded, fold_frames(tensor, observation).numpy())
    assert frame_shape(observation, 3) == frame


def test_folding_puts_the_oldest_frame_first() -> None:
    stack = np.array([[[1, 2], [3, 4], [5, 6]]])
    assert_array_equal(fold_frames(stack, (6,)), [[1, 2, 3, 4, 5, 6]])
    assert_array_equal(fold_frames(stack, (3, 2)), stack)
    assert_array_equal(fold_frames(np.array([[[1, 2]]]), (2,)), [[1, 2]])


# ---------------------------------------------------------------------------------------------------- bad inputs


def test_discrete_observations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"PPO: observations must be a Box space or a Dict of them, got Discrete\(16\)"):
        PolicyView.from_sb3(_model(PPO, gym.make("FrozenLake-v1")))


def test_a_model_that_normalises_observations_outside_the_view_is_refused() -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    with pytest.raises(
        ValueError, match=r"PPO sees observations through a VecNormalize, .* pass normalization=Normalization.of\("
    ):
        PolicyView.from_sb3(_model(PPO, VecNormalize(env)))
    PolicyView.from_sb3(_model(PPO, VecNormalize(env, norm_obs=False)))  # normalised rewards do not matter


def test_policies_that_compute_something_else_are_refused() -> None:
    class Sharpened(ActorCriticPolicy):
        def get_distribution(self, obs: Any) -> Any:
            distribution = super().get_distribution(obs)
            return distribution.proba_distribution(7.0 * distribution.distribution.logits + torch.tensor([1.0, 0.0]))  # type: ignore[union-attr,operator]

    class Recurrent(ActorCriticPolicy):
        def get_distribution(self, obs: Any, lstm_states: Any, episode_starts: Any) -> Any:  # type: ignore[override]
            return super().get_distribution(obs)

    for policy, message in ((Sharpened, "computes something else"), (Recurrent, "needs more than an observation")):
        model = PPO(policy, gym.make("CartPole-v1"), device="cpu")
        with pytest.raises(TypeError, match=f"no view for PPO: its policy .*{message}"):
            PolicyView.from_sb3(model)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: PolicyView.from_sb3(nn.Linear(4, 2)), TypeError, "^model must be a Stable-Baselines3 model, got Linear"),
        (lambda: PolicyView.from_sb3("model.zip"), TypeError, "^model must be"),
        (lambda: PolicyView.of(None), TypeError, "^model must be"),
        (lambda: PolicyView.from_torch(lambda x: x, kind="q", observation_shape=(4,)), TypeError, "^module must be"),  # type: ignore[arg-type]
        (lambda: _linear([[1.0]], kind="softmax"), ValueError, "^kind must be one of 'logits', 'q'"),
        (lambda: _linear([[1.0]], n_frames=0), ValueError, "^n_frames must be"),
        (lambda: _linear([[1.0, 2.0, 3.0]], n_frames=2), ValueError, "cannot hold 2 stacked frames"),
        (
            lambda: PolicyView(nn.Linear(1, 2), kind="q", observation_shape=(1,), exploration=1.1),
            ValueError,
            "^exploration must be",
        ),
        (
            lambda: PolicyView(nn.Linear(1, 2), kind="q", observation_shape=(1,), exploration=math.nan),
            ValueError,
            "^exploration must be",
        ),
        (lambda: PolicyView(nn.Flatten(0), kind="q", observation_shape=(4,)), ValueError, "must map .* to scores"),
        (
            lambda: PolicyView.of(_linear([[1.0, 2.0]]), n_frames=2),
            ValueError,
            r"stacks 1 frame\(s\), but the environment recipe stacks 2",
        ),
        (lambda: _linear([[1.0]]).value(torch.zeros(1, 1)), ValueError, "pass critic="),
        (
            lambda: _linear([[1.0]], kind="q").distribution(torch.zeros(1, 1)),
            ValueError,
            "only logits define a distribution",
        ),
        (lambda: _linear([[1.0]]).actions(torch.zeros(1, 1), deterministic=False), ValueError, "^draws must be given"),
        (lambda: _linear([[1.0]]).act_blocked(torch.zeros(1, 1, 1), batch=0), ValueError, "^batch must be"),
        (
            lambda: _linear([[1.0]]).act_blocked(torch.zeros(3, 1, 1), batch=2, deterministic=False, draws=torch.rand(1, 2)),
            ValueError,
            r"^draws must have 3 rows, got shape \(1, 2\)",
        ),
        (lambda: start_stack(np.zeros((1, 2)), 2, "copy"), ValueError, "^padding must be"),  # type: ignore[arg-type]
        (lambda: fold_frames(np.zeros((1, 3, 2)), (7,)), ValueError, "stack of 3 frames of shape .* does not fit"),
    ],
)
def test_bad_arguments_are_refused_by_name(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()
