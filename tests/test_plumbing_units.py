"""Units, ledgers, seeds and files: what a second review found around the statistics, each closed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from toys import balancer

import robustrl as rrl
from robustrl.attacks import Attack, AttackContext
from robustrl.certify.episode import EpisodeCertificate
from robustrl.certify.returns import certify_success
from robustrl.envs.recipe import EnvRecipe
from robustrl.envs.units import covering_budgets
from robustrl.errors import BudgetExceededError, CertificateError, ChainError
from robustrl.policy import Normalization, PolicyView
from robustrl.rollouts.chunk import run_chunk
from robustrl.rollouts.collect import make_job
from robustrl.rollouts.streams import NoiseStreams
from robustrl.seeding import chunk_seeds, distinct_seeds

TIGHT = Normalization(np.zeros(4), np.full(4, 0.01), epsilon=1e-12)
NORMALIZED = EnvRecipe(env_id="CartPole-v1", max_episode_steps=30, noise=rrl.Gaussian(0.2), normalization=TIGHT)
RAW = replace(NORMALIZED, normalization=None)


def certified(recipe: EnvRecipe, budgets: Any, **options: Any) -> EpisodeCertificate:
    return rrl.certify_policy(balancer(), recipe, budgets, 40, **options)


# ------------------------------------------------------------------------------------------ what the budgets mean


def test_a_raw_threat_on_normalised_observations_verifies_and_covers_what_it_says(tmp_path: Path) -> None:
    certificate = certified(NORMALIZED, rrl.ThreatModel(2, episode=0.02, units="raw"))
    assert certificate.budgets == pytest.approx([0.2])  # one unit is a standard deviation of 0.1
    certificate.save(tmp_path / "c.json")
    assert rrl.verify_certificate(tmp_path / "c.json", balancer(), replay=1).bit_equal


@pytest.mark.parametrize("keep", [True, False])
def test_a_threat_whose_units_were_edited_is_found(keep: bool) -> None:
    certificate = certified(NORMALIZED, rrl.ThreatModel(2, episode=0.02, units="normalized"))
    rrl.verify_certificate(certificate, balancer(), replay=1)
    assert certificate.threat is not None
    forged = json.loads(json.dumps(certificate.threat))
    forged["converted_from"][0]["units"] = "raw"
    if not keep:
        del forged["in_frame_units"]
    lie = replace(certificate, threat=forged)
    with pytest.raises(CertificateError, match="field 'threat'"):
        rrl.verify_certificate(lie, balancer())
    with pytest.raises(CertificateError, match="its units are said to be 'raw'"):
        rrl.verify_certificate(replace(certificate, provenance={**certificate.provenance, "units": "raw"}))


def test_a_threat_whose_horizon_was_edited_is_found() -> None:
    certificate = certified(RAW, rrl.ThreatModel(2, step=0.01))
    assert certificate.threat is not None
    worse = {**certificate.threat["converted_from"][0], "step": 0.01 * 30**0.5}
    forged = {"converted_from": [worse], "in_frame_units": [worse], "horizon": 1, "n_features": 4}
    with pytest.raises(CertificateError, match="field 'threat'"):
        rrl.verify_certificate(replace(certificate, threat=forged))


def test_a_threat_whose_converted_form_was_edited_is_found() -> None:
    """The budgets still follow from what the caller asked for; what that is said to mean does not."""
    certificate = certified(NORMALIZED, rrl.ThreatModel(2, episode=0.02, units="raw"))
    forged = json.loads(json.dumps(certificate.threat))
    forged["in_frame_units"][0]["episode"] = 2.0
    with pytest.raises(CertificateError, match="field 'threat'"):
        rrl.verify_certificate(replace(certificate, threat=forged))


def test_units_that_only_the_environment_tells_need_the_environment() -> None:
    wrapped = replace(NORMALIZED, wrappers=(gym.Wrapper,))
    certificate = certified(wrapped, rrl.ThreatModel(2, episode=0.02, units="raw"), return_low=0.0)
    with pytest.raises(CertificateError, match="pass env="):
        rrl.verify_certificate(certificate)
    rrl.verify_certificate(certificate, env=wrapped)


def test_reports_state_the_units_of_their_budget() -> None:
    report = rrl.attack_policy(
        balancer(), NORMALIZED, rrl.attacks.MinimalFlip(draws=2), rrl.ThreatModel(2, episode=0.5, units="normalized"), 5
    )
    assert report.threat["units"] == "normalized"


def test_covering_budgets_need_noise() -> None:
    with pytest.raises(ValueError, match="without noise"):
        covering_budgets([rrl.ThreatModel(2, episode=1.0)], replace(RAW, noise=None))


def test_a_success_certificate_that_names_no_threshold_needs_one() -> None:
    bare = certify_success(40, 40, rrl.Gaussian(0.2), [0.0, 0.1])
    flip, threat = rrl.attacks.MinimalFlip(draws=2), rrl.ThreatModel(2, episode=0.1)
    with pytest.raises(ValueError, match="success_at must be given"):
        rrl.attack_policy(balancer(), RAW, flip, threat, 5, certificate=bare)
    assert rrl.attack_policy(balancer(), RAW, flip, threat, 5, certificate=bare, success_at=30).success_at == 30


# ------------------------------------------------------------------------------------------ attackers who cheat


class InPlace(Attack):
    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        frames += 5.0
        return frames


class Brainwash(Attack):
    def perturb(self, frames: Tensor, context: AttackContext) -> Tensor:
        assert context.memory is not None
        context.memory.fill_(100.0)
        context.clean_stack.fill_(100.0)
        context.seen_stack.fill_(100.0)
        return frames


def test_an_attack_that_writes_into_the_true_frames_is_charged() -> None:
    job = make_job(balancer(), RAW, chunk_size=3, attack=InPlace(), threat=rrl.ThreatModel(2, episode=0.1))
    with pytest.raises(BudgetExceededError):
        run_chunk(job, 0, 3)


def test_an_attack_cannot_write_into_what_the_agent_remembers() -> None:
    from sb3_contrib import RecurrentPPO

    view = RAW.view(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu"))
    attacked = make_job(view, RAW, chunk_size=4, attack=Brainwash(), threat=rrl.ThreatModel(2, episode=0.1))
    alone = make_job(view, RAW, chunk_size=4)
    assert np.array_equal(run_chunk(attacked, 0, 4).returns, run_chunk(alone, 0, 4).returns)


# ------------------------------------------------------------------------------------------ seeds, actions, numbers


def test_no_two_episodes_or_noise_streams_share_a_seed_of_32_bits() -> None:
    for stream in ("environment", "noise"):
        seeds = np.concatenate([distinct_seeds(getattr(chunk_seeds(0, chunk), stream), 64) for chunk in range(3000)])
        assert len(np.unique(seeds)) == len(seeds)
    first = distinct_seeds(chunk_seeds(0, 0).environment, 64)
    assert not np.intersect1d(first, distinct_seeds(chunk_seeds(1, 0).environment, 64)).size
    assert not np.intersect1d(first, distinct_seeds(chunk_seeds(0, 0).noise, 64)).size


def test_every_picture_gets_its_noise_from_a_generator_with_a_seed_of_its_own() -> None:
    seed, cpu = chunk_seeds(0, 3).noise, torch.device("cpu")
    frames = torch.zeros(5, 90, 90)
    seen = NoiseStreams(rrl.Gaussian(1.0), seed, 5, 1, cpu)(frames, np.arange(5))
    for own, picture in zip(distinct_seeds(seed, 5), seen, strict=True):
        assert torch.equal(picture, torch.randn(90, 90, generator=torch.Generator().manual_seed(int(own))))


def test_actions_stay_inside_the_environments_own_space() -> None:
    class Edge(gym.Env[Any, Any]):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.np_random.random(2).astype(np.float32), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            return np.zeros(2, np.float32), float(action[0]), True, False, {}

    wide = spaces.Box(-1.000009, 1.000009, (1,))
    push = nn.Linear(2, 1)
    nn.init.constant_(push.bias, 9.0)
    view = PolicyView.from_torch(push, kind="deterministic", observation_shape=(2,), action_space=wide)
    recipe = EnvRecipe(factory=Edge, max_episode_steps=2)
    assert run_chunk(make_job(view, recipe, chunk_size=2), 0, 2).returns.tolist() == [1.0, 1.0]


def test_a_normalisation_that_ends_in_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match="clip must be at most"):
        Normalization(np.zeros(4), np.zeros(4), epsilon=1e-300, clip=1e200)
    steep = replace(NORMALIZED, normalization=Normalization(np.zeros(4), np.zeros(4), epsilon=1e-300, clip=3e38))
    assert np.isfinite(run_chunk(make_job(balancer(), steep, chunk_size=2), 0, 2).returns).all()


def test_noise_on_a_dictionary_with_bytes_is_refused_by_the_recipe_too() -> None:
    class Mixed(gym.Env[Any, Any]):
        observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "img": spaces.Box(0, 255, (2,), np.uint8)})
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            return self.observation_space.sample(), 0.0, True, False, {}

    recipe = EnvRecipe(factory=Mixed, max_episode_steps=2, noise=rrl.Gaussian(0.1))
    with pytest.raises(ChainError, match="uint8"):
        recipe.horizon  # noqa: B018
    assert replace(recipe, noise=None).raw_space.shape == (4,)


def test_padding_with_zeros_and_a_normalisation_of_frames_after_the_noise_do_not_mix() -> None:
    recipe = replace(NORMALIZED, normalize="after_noise", frame_stack=2, stack_padding="zero")
    net = PolicyView.from_torch(nn.Linear(8, 2), kind="logits", observation_shape=(8,), n_frames=2)
    with pytest.raises(ValueError, match="stack_padding must be 'reset'"):
        recipe.view(net)
    replace(recipe, stack_padding="reset").view(net)


def test_layers_that_differ_in_a_number_only_have_other_fingerprints() -> None:
    def view(slope: float) -> PolicyView:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(slope), nn.Linear(3, 2))
        return PolicyView.from_torch(net, kind="q", observation_shape=(4,))

    assert view(0.01).fingerprint() == view(0.01).fingerprint() != view(5.0).fingerprint()


# ------------------------------------------------------------------------------------------ files of others


def test_a_run_file_imports_no_module_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_module.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = {**RAW.to_dict(), "env_id": "planted_module:CartPole-v1"}
    with pytest.raises(ValueError, match="importing runs its code"):
        EnvRecipe.from_dict(data)
    assert not (tmp_path / "ran").exists()
    assert EnvRecipe.from_dict(data, trust=True).horizon == 30
    assert (tmp_path / "ran").exists()
    assert "planted_module" in sys.modules
    assert EnvRecipe.from_dict(data).horizon == 30  # imported by now


def test_a_probability_is_no_return_below_the_environments_lowest() -> None:
    """One round of Pong returns -1 or 1; the certified probability of winning it is at least 0, whatever it returns."""
    certificate = certify_success(7, 10, rrl.Gaussian(0.05), [0.0])
    recipe = EnvRecipe(env_id="robustrl/PongOneRound-v0", noise=rrl.Gaussian(0.05))
    stated = certificate.with_provenance(recipe=recipe.to_dict(), success_at=1.0)
    assert rrl.known_return_bounds(recipe)[0] == -1
    rrl.verify_certificate(stated)
