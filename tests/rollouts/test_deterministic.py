"""Certificates of deterministic policies: real networks, files, replays, forgeries, and the command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from typer.testing import CliRunner

import robustrl as rrl
from robustrl.certify.deterministic import DeterministicCertificate, _confident
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.returns import certify_return
from robustrl.cli import app
from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import CertificateError, ChainError
from robustrl.policy import Normalization
from rollouts.brute import Maze, Streak, all_paths, linear, worst

SHORT = EnvRecipe("CartPole-v1", max_episode_steps=20)
BUDGETS = [0.0, 0.005, 0.05]


def network(seed: int = 0) -> DQN:
    return DQN(
        "MlpPolicy",
        gym.make("CartPole-v1"),
        policy_kwargs={
            "features_extractor_class": rrl.LipschitzMLP,
            "features_extractor_kwargs": {"widths": (16,)},
            "net_arch": [],
        },
        seed=seed,
        buffer_size=100,
        device="cpu",
    )


def maze() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Streak(Maze(1, noisy=True)), 5)


def certified(**settings: Any) -> DeterministicCertificate:
    return rrl.certify_deterministic(
        linear(1), maze, **({"budgets": [0.0, 0.3, 1.0], "episodes": 6, "reward_low": -1.5} | settings)
    )


def test_attacks_of_a_lipschitz_network_stay_above() -> None:
    model = network()
    found = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=10, nodes=500)
    assert found.n == 10
    for k, budget in enumerate(BUDGETS):
        threat = rrl.ThreatModel(2, step=budget)
        report = rrl.attack_policy(model, SHORT, rrl.attacks.ATTACKS["pgd"](), threat, 10, seed=0, engine="list")
        assert np.all(report.returns >= found.bounds[:, k])
        if budget == 0:
            assert np.array_equal(report.returns, found.bounds[:, 0])
    assert np.all(np.diff(found.values) <= 0)
    assert np.all(found.values <= found.mean_bound)


def test_values_hold_for_all_budgets_with_the_stated_confidence() -> None:
    """Groups of ten out of 500 episodes: at alpha = 0.3, no more than 30 % of them may say more than the mean of all."""
    trees = certified(episodes=500)
    assert np.ptp(trees.bounds[:, 0]) > 0
    statements = [_confident(trees.bounds[i : i + 10], trees.budgets, 0.3, trees.return_low) for i in range(0, 500, 10)]
    assert np.mean([np.any(values > trees.mean_bound) for values in statements]) <= 0.3
    assert np.all(_confident(trees.bounds, trees.budgets, 0.05, trees.return_low) > trees.mean_bound - 0.5)


def test_the_failure_probability_is_shared_by_the_budgets() -> None:
    bounds, budgets = np.random.default_rng(0).normal(size=(60, 1)).repeat(4, 1), np.array([0.0, 1.0, 0.5, 1.0])
    shared = certify_return(bounds[:, 0], rrl.Gaussian(1.0), 0.0, alpha=0.1 / 3, return_low=-9.0).values[0]
    assert _confident(bounds, budgets, 0.1, -9.0).tolist() == [shared] * 4
    better = bounds + np.array([0.0, 1.0, 0.0, 1.0])  # what holds at a larger budget holds at a smaller one
    assert np.ptp(_confident(better, budgets, 0.1, -9.0)) == 0


def test_threat_models_are_converted_into_the_units_of_frames() -> None:
    normalization = Normalization(np.zeros(4), np.full(4, 0.25), epsilon=1e-12)
    inside = replace(SHORT, normalization=normalization)
    outside = replace(inside, normalize="after_noise")
    raw, scaled = (rrl.ThreatModel(2, step=0.02, units=units) for units in ("raw", "normalized"))
    model = network()
    by = {
        (place, threat.units): rrl.certify_deterministic(model, recipe, [threat], episodes=6, nodes=300).bounds
        for place, recipe in (("in", inside), ("out", outside))
        for threat in (raw, scaled)
    }
    assert np.array_equal(by["in", "raw"], by["out", "raw"])
    assert np.array_equal(by["in", "normalized"], by["out", "normalized"])
    plain = rrl.certify_deterministic(model, inside, [0.04], episodes=6, nodes=300)
    assert np.array_equal(by["in", "raw"], plain.bounds)
    certificate = rrl.certify_deterministic(model, outside, scaled, episodes=2, nodes=50)
    rrl.verify_certificate(certificate, model)
    assert certificate.budgets == pytest.approx([0.01])
    assert certificate.threat is not None
    with pytest.raises(CertificateError, match="threat"):
        rrl.verify_certificate(replace(certificate, budgets=np.array([0.02]), mean_bound=certificate.mean_bound))


def test_stacked_frames_of_a_network_against_brute_force() -> None:
    """The units of a stack: costs are those of a whole observation, budgets those of single frames."""
    recipe, policy = EnvRecipe(factory=maze, frame_stack=2), linear(7, n_frames=2)
    assert LipschitzScores.of(policy).lipschitz == pytest.approx(1)
    found = rrl.certify_deterministic(policy, recipe, [0.2, 0.8], episodes=2, reward_low=-1.5)
    for seed, bounds in zip(found.evidence.seeds, found.bounds, strict=True):
        paths = all_paths(maze, int(seed), 5, policy, 2)
        assert bounds == pytest.approx([worst(paths, b, "step", lambda t: 0.5) for b in (0.2, 0.8)])


@pytest.mark.parametrize("method", ["tree", "prefix", "constancy"])
@pytest.mark.parametrize("per", ["step", "episode"])
def test_files_keep_everything(tmp_path: Path, method: str, per: str) -> None:
    found = certified(method=method, per=per)
    found.save(tmp_path / "c.json")
    again = rrl.Certificate.load(tmp_path / "c.json")
    assert again == found
    assert isinstance(again, DeterministicCertificate)
    assert np.array_equal(again.bounds, found.bounds)
    again.verify()
    result = rrl.verify_certificate(again, linear(1), env=maze, replay=3)
    assert len(result.replayed) == 3
    assert "same rewards" in str(result)
    found.plot(tmp_path / "c.png")
    assert found.table().count("\n") == 7
    assert method in found.table()


def test_the_same_seed_is_the_same_certificate() -> None:
    assert certified() == certified()
    assert certified() != certified(seed=1)


def again(found: DeterministicCertificate, **changes: Any) -> DeterministicCertificate:
    """What a forger makes of changed evidence or settings: everything else follows from it."""
    names = (
        "method",
        "accounting",
        "budgets",
        "alpha",
        "horizon",
        "reward_low",
        "return_low",
        "never_ends_early",
        "provenance",
    )
    settings = {name: getattr(found, name) for name in names} | {"evidence": found.evidence} | changes
    return DeterministicCertificate.of(settings.pop("evidence"), **settings)


def column(found: DeterministicCertificate, name: str, change: Any) -> Any:
    return found.evidence._replace(**{name: change(getattr(found.evidence, name).copy())})


def raised(values: Any, place: Any, value: Any) -> Any:
    values[place] = value
    return values


def test_honest_evidence_is_verified() -> None:
    rrl.verify_certificate(again(certified()), linear(1), env=maze, replay=6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("costs", lambda c: np.where(c > 0, c + 5, c)),
        ("rewards", lambda r: np.where(r != 0, r + 1, r)),
        ("actions", lambda a: (a + 1) % 3),
    ],
)
def test_forged_trees_are_found_by_a_replay(name: str, change: Any) -> None:
    found = certified()
    forged = again(found, evidence=column(found, name, change))
    forged.verify()
    with pytest.raises(CertificateError, match="costs|comes out differently"):
        rrl.verify_certificate(forged, linear(1), env=maze, replay=6)


def test_left_out_actions_are_found_by_a_replay() -> None:
    found = certified()
    keep = found.evidence.costs == 0
    cut = {name: getattr(found.evidence, name)[keep] for name in ("parents", "actions", "children", "rewards", "costs")}
    forged = again(found, evidence=found.evidence._replace(**cut))
    assert np.all(forged.bounds >= found.bounds)
    assert np.any(forged.bounds > found.bounds)
    with pytest.raises(CertificateError, match="costs"):
        rrl.verify_certificate(forged, linear(1), env=maze, replay=6)


def test_forged_statements_are_refused() -> None:
    model = network()
    found = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=4, nodes=100)
    rrl.verify_certificate(found, model)
    other = rrl.certify_deterministic(model, SHORT, BUDGETS, episodes=4, nodes=100, seed=1)
    forgeries = {
        "values": replace(found, values=found.values + 1),
        "mean_bound": replace(found, mean_bound=found.mean_bound + 1),
        "not_covered": replace(found, not_covered=found.not_covered[1:]),
        "episodes are not those of seed": again(found, evidence=other.evidence),
        "reward_low": again(found, reward_low=0.5, return_low=8.0, never_ends_early=False) and replace(found, reward_low=1.5),
        "return_low": again(found, return_low=9.0),
        "frame_stack": again(found, accounting=replace(found.accounting, frame_stack=2)),
        "recomputed|horizon|max_episode_steps": replace(found, horizon=19),
        "units": again(found, provenance=found.provenance | {"units": "normalized"}),
    }
    for words, forged in forgeries.items():
        with pytest.raises(CertificateError, match=words):
            rrl.verify_certificate(forged)
    with pytest.raises(CertificateError, match="another hash"):
        rrl.verify_certificate(found, network(1))


def test_edited_files_are_refused(tmp_path: Path) -> None:
    certified().save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    for old, new in (
        ('"per": "step"', '"per": "episode"'),
        ('"horizon": 5', '"horizon": 6'),
        ('"<f8"', '"<f4"'),
        ('"frame_stack": 1', '"frame_stack": 1.0'),
    ):
        assert old in text
        (tmp_path / "d.json").write_text(text.replace(old, new))
        with pytest.raises(CertificateError):
            rrl.Certificate.load(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budgets": [-0.1]}, ValueError, "budgets"),
        ({"budgets": [np.nan]}, ValueError, "budgets"),
        ({"budgets": [0.1, rrl.ThreatModel(2, step=0.1)]}, TypeError, "mixture"),
        ({"budgets": [rrl.ThreatModel(2, episode=0.1), rrl.ThreatModel(2, step=0.1)]}, ValueError, "one norm"),
        ({"budgets": rrl.ThreatModel(0, step=1)}, ValueError, "one norm"),
        ({"per": "day"}, ValueError, "per"),
        ({"norm": np.inf, "per": "episode"}, ValueError, "per must be 'step'"),
        ({"method": "guess"}, ValueError, "method"),
        ({"episodes": 0}, ValueError, "episodes"),
        ({"nodes": 0}, ValueError, "nodes"),
        ({"alpha": 0.7}, ValueError, "alpha"),
        ({"reward_low": np.nan}, ValueError, "reward_low"),
        ({"never_ends_early": 1}, TypeError, "never_ends_early"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        certified(**changes)


def test_networks_without_a_known_constant_are_refused() -> None:
    bare = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 3))
    with pytest.raises(TypeError, match="LayerNorm"):
        rrl.certify_deterministic(
            rrl.policy.PolicyView.from_torch(bare, kind="q", observation_shape=(2,)), maze, 0.1, reward_low=-1.5
        )


def test_the_command_writes_and_verifies(tmp_path: Path) -> None:
    model = network()
    model.save(tmp_path / "agent.zip")
    run = partial(CliRunner().invoke, app)
    where = [
        str(tmp_path / "agent.zip"),
        "--env",
        "CartPole-v1",
        "--max-episode-steps",
        "20",
        "--out",
        str(tmp_path / "out"),
        "--trust",
    ]
    result = run(["certify-deterministic", *where, "--epsilons", "0:0.02:3", "--episodes", "4", "--nodes", "60"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "states searched" in result.output
    assert "exhausted" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"deterministic.json", "deterministic.png", "tb"}
    file = str(tmp_path / "out" / "deterministic.json")
    checked = run(["verify", file, "--model", str(tmp_path / "agent.zip"), "--trust"])
    assert checked.exit_code == 0, checked.output + repr(checked.exception)
    assert "replayed" in checked.output
    both = run(
        ["certify-deterministic", str(tmp_path / "agent.zip"), "--env", "CartPole-v1", "--epsilons", "0", "--budgets", "1"]
    )
    assert "exclude each other" in str(both.exception)


def test_a_known_return_counts_where_the_search_is_cut_and_is_refused_if_an_episode_was_worse() -> None:
    cut = certified(nodes=3, budgets=[1.0])
    least = float(certified().bounds.min())
    assert cut.bounds.min() < least
    better = certified(nodes=3, budgets=[1.0], return_low=least)
    assert better.return_low == least == float(better.bounds.min())
    assert better.values[0] > cut.values[0]
    better.verify()
    with pytest.raises(ValueError, match=r"return_low = .* is no sure bound"):
        certified(return_low=least + 0.1)
    with pytest.raises(CertificateError, match="return_low"):
        replace(certified(), return_low=least + 0.1).verify()


def test_a_low_return_low_hides_no_forgery() -> None:
    """It makes the values worse, and no number's tolerance larger."""
    found = certified()
    low = again(found, return_low=-1e12)
    low.verify()
    for forged in (replace(low, mean_bound=low.mean_bound + 1e-3), replace(low, values=low.values * (1 - 1e-6))):
        with pytest.raises(CertificateError, match="recomputed from the evidence"):
            forged.verify()


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_environments_that_may_end_early_are_known(name: str) -> None:
    recipe = EnvRecipe(name, max_episode_steps=9)
    env = recipe.base_env()
    policy = linear(0, env.observation_space.shape[0], env.action_space.n)  # type: ignore[index,attr-defined]
    settings: dict[str, Any] = {"method": "prefix", "episodes": 2}
    with pytest.raises(ValueError, match="never_ends_early must be False"):
        rrl.certify_deterministic(policy, recipe, [0.3], **settings, never_ends_early=True)
    found = rrl.certify_deterministic(policy, recipe, [0.3], **settings)
    if found.evidence.times[found.evidence.ended].min(initial=9) == 9:
        with pytest.raises(CertificateError, match="never_ends_early must be False"):
            rrl.verify_certificate(again(found, never_ends_early=True))


def test_words_that_are_known_to_be_false_are_refused_at_once() -> None:
    for words in ({"return_low": 9.0}, {"reward_low": 1.5}):
        with pytest.raises(ValueError, match="may (return|pay) as little as"):
            rrl.certify_deterministic(network(), SHORT, [0.0], episodes=1, **words)  # type: ignore[arg-type]


def test_episodes_must_be_those_of_a_recorded_seed_and_count_once() -> None:
    found = certified()
    nameless = again(found, provenance={k: v for k, v in found.provenance.items() if k != "seed"})
    for given in ({"model": linear(1), "env": maze}, {"env": maze}):
        with pytest.raises(CertificateError, match="does not record the seed"):
            rrl.verify_certificate(nameless, **given)
    for seeds in (found.evidence.seeds * 0, found.evidence.seeds - 2**62):
        with pytest.raises(CertificateError, match="all different"):
            replace(found, evidence=found.evidence._replace(seeds=seeds)).verify()


@pytest.mark.parametrize("seed", ["abc", -1, None, 1.5, {"a": 1}, [1], True])
def test_odd_seeds_in_a_file_are_its_fault(seed: Any) -> None:
    found = certified()
    with pytest.raises(CertificateError, match="seed"):
        rrl.verify_certificate(replace(found, provenance=found.provenance | {"seed": seed}))


def once(bias: float, expensive: float) -> rrl.policy.PolicyView:
    """Costs at 0: nothing, `bias` and `expensive`."""
    layer = torch.nn.Linear(1, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0], [1 - 0.95 / expensive]]))
        layer.bias.copy_(torch.tensor([bias, 0.0, bias - 0.95]))
    return rrl.policy.PolicyView.from_torch(layer, kind="q", observation_shape=(1,))


class Once(gym.Env[Any, Any]):
    """One step, which action 0 is paid for."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,), np.float32), gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), float(action == 0), True, False, {}


def single() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Once(), 1)


@pytest.mark.parametrize("expensive", [1.0, 1000.0, 1e5])
def test_expensive_actions_hide_no_forged_cost_of_cheap_ones(expensive: float) -> None:
    policy = once(0.05, expensive)
    found = rrl.certify_deterministic(policy, single, [0.06, 0.9], episodes=3, reward_low=0)
    rrl.verify_certificate(found, policy, env=single, replay=3)
    for cost in (0.95, 0.0502):
        forged = again(found, evidence=column(found, "costs", lambda c, cost=cost: np.where(c > 0, cost, c)))
        with pytest.raises(CertificateError, match="action 1 costs"):
            rrl.verify_certificate(forged, policy, env=single, replay=3)


class Claimed(torch.nn.Linear):
    """A layer that states its own constant."""

    def lipschitz(self) -> float:
        return 2.0


def test_layers_that_are_taken_at_their_word_are_named() -> None:
    def policy(kind: type[torch.nn.Linear]) -> rrl.policy.PolicyView:
        torch.manual_seed(0)
        return rrl.policy.PolicyView.from_torch(kind(1, 3), kind="q", observation_shape=(1,))

    claimed, known = (
        rrl.certify_deterministic(policy(kind), single, [0.1], episodes=2, reward_low=0) for kind in (Claimed, torch.nn.Linear)
    )
    assert claimed.provenance["trusted"] == ["Claimed"]
    assert claimed.provenance["lipschitz"] == pytest.approx(2)
    assert "constants that Claimed claim" in claimed.table()
    assert known.provenance["trusted"] == []
    assert "claim" not in known.table()
    rrl.verify_certificate(claimed, policy(Claimed), env=single)
    silent = again(claimed, provenance=claimed.provenance | {"trusted": []})
    with pytest.raises(CertificateError, match="taken at their word"):
        rrl.verify_certificate(silent, policy(Claimed), env=single)


class Repeated(gym.Wrapper[Any, Any, Any, Any]):
    """Takes every action four times, outside of the time limit: a quarter of the steps are decisions."""

    def step(self, action: Any) -> Any:
        for _ in range(4):
            found = super().step(action)
        return found


class Idle(Once):
    """Never ends."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, False, {}


@pytest.mark.parametrize(("nodes", "method"), [(1, "tree"), (3, "tree"), (100, "tree"), (1, "prefix"), (1, "constancy")])
def test_clean_episodes_are_walked_to_their_end_where_none_may_end_early(nodes: int, method: str) -> None:
    def make(repeated: bool) -> gym.Env[Any, Any]:
        env = gym.wrappers.TimeLimit(Idle(), 12)
        return Repeated(env) if repeated else env

    settings: dict[str, Any] = {"nodes": nodes, "method": method, "episodes": 2, "reward_low": 1.0, "never_ends_early": True}
    with pytest.raises(ValueError, match="never_ends_early must be False"):
        rrl.certify_deterministic(once(0.0, 1.0), partial(make, True), [0.5], **settings)
    found = rrl.certify_deterministic(once(0.0, 1.0), partial(make, False), [0.5], **settings)
    assert found.bounds.tolist() == [[12.0]] * 2
    result = rrl.verify_certificate(found, once(0.0, 1.0), env=partial(make, False))
    assert len(result.replayed) == 2
    assert "no episode was replayed" not in str(result)
    assert "no episode was replayed" in str(rrl.verify_certificate(found, env=partial(make, False)))


def test_a_replay_notices_episodes_that_now_end_early() -> None:
    last = [99]

    class Stopping(Idle):
        def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
            self.time = 0
            return super().reset(**options)

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.time += 1
            return np.zeros(1, np.float32), 1.0, self.time == last[0], False, {}

    recipe = EnvRecipe(factory=lambda: gym.wrappers.TimeLimit(Stopping(), 12))
    settings: dict[str, Any] = {"nodes": 1, "episodes": 2, "reward_low": 1.0, "never_ends_early": True}
    found = rrl.certify_deterministic(once(0.0, 1.0), recipe, [0.5], **settings)
    rrl.verify_certificate(found, once(0.0, 1.0), env=recipe)
    last[0] = 7
    found = replace(found, provenance=found.provenance | {"versions": {}})  # another build: code is not compared
    with pytest.raises(CertificateError, match="differently after 7 steps"):
        rrl.verify_certificate(found, once(0.0, 1.0), env=recipe)


@pytest.mark.parametrize("method", ["tree", "prefix"])
def test_factories_must_make_a_new_environment_per_call(method: str) -> None:
    env = maze()
    with pytest.raises(ValueError, match="same environment twice"):
        rrl.certify_deterministic(linear(1), lambda: env, [0.1], method=method, episodes=1, reward_low=-1.5)


def test_costs_are_held_against_the_network_when_a_certificate_is_made() -> None:
    """Observations from outside of the environment: rewards repeat themselves, what the policy sees does not."""

    class Drifting(Idle):
        seen = 0

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            Drifting.seen += 1
            return np.full(1, 1.0 / Drifting.seen, np.float32), 1.0, False, False, {}

    with pytest.raises(ChainError, match="does not repeat itself"):
        rrl.certify_deterministic(
            once(0.0, 1.0), lambda: gym.wrappers.TimeLimit(Drifting(), 3), [2.0], episodes=2, reward_low=0
        )


@pytest.mark.parametrize("nodes", [1, 10, 60])
def test_a_tree_of_any_size_proves_no_less_than_the_prefix_and_all_of_the_clean_return(nodes: int) -> None:
    model, recipe = network(), EnvRecipe("CartPole-v1", max_episode_steps=60)
    common: dict[str, Any] = {"episodes": 4, "seed": 3}
    for per in ("step", "episode"):
        tree, prefix = (
            rrl.certify_deterministic(model, recipe, [0.0, 0.002, 0.05], per=per, method=method, nodes=nodes, **common)
            for method in ("tree", "prefix")
        )
        assert (tree.bounds >= prefix.bounds).all()
        assert (tree.bounds[:, 0] == prefix.bounds[:, 0]).all()
        assert tree.exhausted[:, 0].all()
