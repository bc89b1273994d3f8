"""What holds for every attack of the command line: budgets, identity without one, rows on their own, no waiting in the loop."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import network_balancer

from attacks.victims import LinearQ, actor, context, frames_of
from robustrl.attacks import ATTACKS, Attack, Flips, Geometric, GradientAttack, RandomNoise, Square, Transfer
from robustrl.attacks.attacker import Attacker
from robustrl.attacks.integers import greedy, rounded
from robustrl.noise import Gaussian
from robustrl.policy import PolicyView
from robustrl.threat import ThreatModel

NORMS = (0, 1, 2, math.inf)
BOX = (torch.full((4,), -1.0), torch.tensor([1.0, 0.5, 2.0, 1.0]))
SCALE = (0.5, 2.0, 4.0, 1.0)
CHEAP: dict[str, dict[str, Any]] = {
    "square": {"queries": 30},
    "decision": {"queries": 30},
    "nes": {"pairs": 8},
    "spsa": {"pairs": 8},
}
DISCRETE = PolicyView.from_torch(network_balancer(16).actor, kind="q", observation_shape=(4,))
CONTINUOUS = actor(frames_of(2, 4, seed=3), q_critic=LinearQ([1.0, 2.0], torch.ones(4)), std=(0.5, 2.0))
VICTIMS = {"discrete": DISCRETE, "continuous": CONTINUOUS}


def made(name: str) -> Attack:
    return ATTACKS[name](**CHEAP.get(name, {}))


def threat_of(norm: float, scale: Any = None) -> ThreatModel:
    return ThreatModel(norm, step=2.0 if norm == 0 else 0.3, scale=scale)


def cases() -> list[Any]:
    """Every attack with every norm and victim that it takes."""
    found = []
    for name in ATTACKS:
        for victim, view in VICTIMS.items():
            for norm in NORMS:
                try:
                    made(name).check(view, threat_of(norm), Gaussian(0.1))
                except ValueError:
                    continue
                found.append(pytest.param(name, view, norm, id=f"{name}-{victim}-{norm:g}"))
    return found


every_case = pytest.mark.parametrize(("name", "view", "norm"), cases())


def situation(view: PolicyView, x: torch.Tensor, norm: float, budget: Any = None, **more: Any) -> Any:
    budget = threat_of(norm).step if budget is None else budget
    return context(view, x, budget, noise=Gaussian(0.1), norm=norm, pixels=BOX if norm == 0 else None, **more)


def test_the_gallery_has_a_row_for_every_name_with_the_norms_that_it_takes() -> None:
    page = (Path(__file__).parents[2] / "docs/methods/attacks.md").read_text().split("## Gallery")[1].split("\n\n")[2]
    rows = {}
    for line in page.splitlines()[2:]:
        names, *_, norms, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= {name: {float(norm) for norm in norms.split(",")} for name in re.findall(r"`(\w+)`", names)}
    taken = [case.values for case in cases()]
    assert rows == {name: {norm for other, _, norm in taken if other == name} for name in ATTACKS}


def test_every_attack_takes_some_victim_and_says_which_norms_it_takes() -> None:
    taken = [case.values for case in cases()]
    assert {name for name, *_ in taken} == set(ATTACKS)
    assert {norm for name, _, norm in taken if name == "margin"} == set(NORMS)
    assert {norm for name, _, norm in taken if name == "salt_and_pepper"} == {0}


@every_case
def test_without_a_budget_frames_come_back_bit_for_bit(name: str, view: PolicyView, norm: float) -> None:
    x = 0.2 * frames_of(6)
    x[0, 0] = -0.0
    nothing = made(name).perturb(x, situation(view, x, norm, 0.0))
    assert torch.equal(nothing.view(torch.int32), x.view(torch.int32))
    budgets = torch.tensor([0.0, 2.0] * 3)
    some = made(name).perturb(x, situation(view, x, norm, budgets))
    assert torch.equal(some[::2].view(torch.int32), x[::2].view(torch.int32))


@every_case
@pytest.mark.parametrize("scale", [None, SCALE], ids=["ones", "scale"])
def test_one_step_through_the_attacker_stays_within_the_budget_and_under_the_mask(
    name: str, view: PolicyView, norm: float, scale: Any
) -> None:
    mask = (True, True, False, True)
    threat = ThreatModel(norm, step=threat_of(norm).step, mask=mask, scale=scale)
    attacker = Attacker(made(name), threat, view, 8, noise=Gaussian(0.1), pixels=BOX if norm == 0 else None)
    x = 0.2 * frames_of(8)
    before = x.clone()
    delivered = attacker.deliver(x)
    assert delivered.dtype == x.dtype
    assert torch.equal(x, before)
    delta = (delivered.double() - x.double()).numpy()
    assert not delta[:, 2].any()
    measured = delta if scale is None else delta / np.array(scale)
    norms = np.count_nonzero(measured, axis=1) if norm == 0 else np.linalg.norm(measured, norm, axis=1)
    np.testing.assert_allclose(attacker.norms, norms, rtol=1e-12)
    assert threat.step is not None
    assert norms.max() <= threat.step * (1 + 1e-9)


@every_case
def test_an_episode_is_attacked_as_if_alone(name: str, view: PolicyView, norm: float) -> None:
    """Also where slots differ: no episode's attack depends on which others still run."""
    x = 0.2 * frames_of(7)
    slots = torch.tensor([3, 0, 11, 5, 6, 1, 2])
    everyone = situation(view, x, norm, slots=slots)
    together = made(name).perturb(x, everyone)
    for i in range(7):
        alone = situation(view, x[i : i + 1], norm, slots=slots[i : i + 1])
        torch.testing.assert_close(made(name).perturb(x[i : i + 1], alone), together[i : i + 1], rtol=0, atol=2e-4)
        assert torch.equal(alone.generator.get_state(), everyone.generator.get_state())


@every_case
def test_an_attack_is_a_function_of_its_stream(name: str, view: PolicyView, norm: float) -> None:
    x = 0.2 * frames_of(5)
    one, again = (made(name).perturb(x, situation(view, x, norm)) for _ in range(2))
    assert torch.equal(one, again)
    assert made(name).to_dict() == made(name).to_dict()
    assert made(name).to_dict()["kind"] == type(made(name)).__name__


def spent_by_hand(clean: np.ndarray, delivered: np.ndarray, norm: float, scale: Any) -> np.ndarray:
    """Per step and slot, (T, n), in float64, from what the agent received."""
    delta = (delivered.astype(np.float64) - clean.astype(np.float64)).reshape(*clean.shape[:2], -1)
    delta = delta if scale is None else delta / np.array(scale)
    return np.count_nonzero(delta, axis=2) if norm == 0 else np.linalg.norm(delta, norm, axis=2)


AUDITED = [
    pytest.param(norm, limits, kind, id=f"l{norm:g}-{'+'.join(limits)}-{kind}")
    for norm in NORMS
    for limits in (("step",), ("episode",), ("step", "episode"))
    if norm != math.inf or limits == ("step",)
    for kind in ("float32", "float64", "scaled", "round", "greedy")
]


@pytest.mark.parametrize(("norm", "limits", "kind"), AUDITED)
def test_the_ledger_agrees_with_an_audit_of_everything_delivered(norm: float, limits: Any, kind: str) -> None:
    """300 steps of 2 to 8 running episodes, restarted at random: 1e4 random steps and more in all."""
    n, levels = 8, kind in ("round", "greedy")
    scale = SCALE if kind == "scaled" else None
    sizes = {"step": 2.0 if norm == 0 else 5.4 if levels else 0.1, "episode": 7.0 if norm == 0 else 31.0 if levels else 0.7}
    threat = ThreatModel(norm, **{name: sizes[name] for name in limits}, scale=scale)
    attacker = Attacker(
        RandomNoise(allocation=Geometric(0.4)),
        threat,
        None,
        n,
        horizon=40,
        pixels=(0.0, 255.0) if levels else (-9.0, 9.0) if norm == 0 else None,
        quantise={"round": rounded, "greedy": greedy(norm)}.get(kind),
        generator=torch.Generator().manual_seed(0),
    )
    rng = np.random.default_rng(int(norm) if norm < 9 else 9)
    q = {0: 1, 1: 1, 2: 2, math.inf: 1}[norm]
    totals, touched = np.zeros(n), 0
    for _ in range(300):
        restart = np.flatnonzero(rng.random(n) < 0.05)
        attacker.reset(restart)
        totals[restart] = 0
        running = np.flatnonzero(rng.random(n) < 0.7)
        frames = rng.integers(0, 256, (len(running), 4)).astype(np.float32) if levels else rng.normal(size=(len(running), 4))
        clean = torch.from_numpy(frames.astype(np.float64 if kind == "float64" else np.float32))
        delivered = attacker.deliver(clean, running)
        assert delivered.dtype == clean.dtype
        norms = spent_by_hand(clean.numpy()[None], delivered.numpy()[None], norm, scale)[0]
        touched += int((norms > 0).sum())
        if "step" in limits:
            assert (norms <= sizes["step"] * (1 + 1e-9)).all()
        if levels:
            assert bool((delivered == delivered.round()).all())
            assert float(delivered.min()) >= 0
            assert float(delivered.max()) <= 255
        totals[running] += (norms > 0) if norm == 0 else norms**q
        if "episode" in limits:
            assert (totals ** (1 / q) <= sizes["episode"] * (1 + 1e-9)).all()
        if norm != math.inf:
            np.testing.assert_allclose(attacker.ledger.spent, totals ** (1 / q), rtol=1e-9, atol=1e-12)
    assert touched > 100


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers brought to Python, and sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"))
        return func(*args, **(kwargs or {}))


LOOPS = [
    pytest.param(name, setting, values, norm, id=f"{name}-{setting}-{norm:g}")
    for names, setting, values in (
        (("mad", "margin", "ce", "votes", "targeted", "mi_fgsm", "momentum", "sgld", "nes"), "steps", (2, 22)),
        (("margin",), "restarts", (1, 6)),
        (("pattanaik",), "candidates", (3, 30)),
        (("square", "decision"), "queries", (3, 30)),
    )
    for name in names
    for norm in ((1, 2, math.inf) if name in CHEAP else NORMS)
]


@pytest.mark.parametrize(("name", "setting", "values", "norm"), LOOPS)
def test_no_loop_of_a_solver_waits_for_the_device(name: str, setting: str, values: tuple[int, int], norm: float) -> None:
    """20 iterations more, and no more waits than a delivery's few shrinks after the loop."""
    counts = []
    for value in values:
        attack, x = ATTACKS[name](**{setting: value}), 0.2 * frames_of(5)
        with Syncs() as syncs:
            attack.perturb(x, situation(DISCRETE, x, norm))
        counts.append(syncs.count)
    assert abs(counts[1] - counts[0]) <= 7
    assert max(counts) <= 12


def test_the_count_of_waits_sees_one() -> None:
    with Syncs() as syncs:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        bool(torch.ones(3).any())
    assert syncs.count == 3


def test_descriptions_tell_networks_apart_by_their_weights() -> None:
    surrogates = [network_balancer(8, seed=seed) for seed in (0, 0, 1)]
    texts = [Transfer(view, Square(Flips())).to_dict()["surrogate"] for view in surrogates]
    assert texts[0] == texts[1] != texts[2]
    assert Transfer(surrogates[0], GradientAttack()).to_dict()["attack"]["kind"] == "GradientAttack"
