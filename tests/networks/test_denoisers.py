"""Denoisers: they start as nothing, know their noise level, and travel as plain weights."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustrl.networks import Denoiser, DnCNN, ResidualMLP, denoiser_for, load_denoiser

BUILD: dict[str, Any] = {
    "vector": lambda: ResidualMLP((4,), 0.2, [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0], hidden=(8, 8)),
    "linear": lambda: ResidualMLP((4,), 0.2, hidden=()),
    "history": lambda: ResidualMLP((12,), 0.2, keep=4, hidden=(8,)),
    "dictionary": lambda: ResidualMLP((2, 6), 0.2, keep=3, hidden=(8,)),
    "pictures": lambda: DnCNN((3, 10, 12), 0.2, 0.5, 0.3, depth=3, width=8),
    "pictures with history": lambda: DnCNN((4, 10, 12), 0.2, 0.5, 0.3, keep=2, depth=3, width=8),
    "channels last": lambda: DnCNN((10, 12, 4), 0.2, 0.5, 0.3, keep=2, channels_last=True, depth=2, width=8),
}
NEWEST: dict[str, Any] = {
    "history": np.s_[:, -4:],
    "dictionary": np.s_[:, :, -3:],
    "pictures with history": np.s_[:, -2:],
    "channels last": np.s_[..., -2:],
}


def observations(denoiser: Denoiser, n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(seed))


def shaken(denoiser: Denoiser, seed: int = 0) -> Denoiser:
    """The same with random weights, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return denoiser.eval()


@pytest.fixture(params=BUILD)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_denoiser_hands_on_the_newest_frames_bit_by_bit(name: str, training: bool) -> None:
    denoiser = BUILD[name]().train(training)
    seen = observations(denoiser)
    assert torch.equal(denoiser(seen), seen[NEWEST.get(name, np.s_[:])])


def test_every_entry_of_the_input_reaches_the_output(name: str) -> None:
    """History would be useless otherwise."""
    denoiser = shaken(BUILD[name]())
    seen = observations(denoiser, 1).requires_grad_()
    denoiser(seen).square().sum().backward()
    assert seen.grad is not None
    assert (seen.grad != 0).double().mean() > 0.9


def test_rows_do_not_depend_on_each_other(name: str) -> None:
    denoiser = shaken(BUILD[name]())
    seen = observations(denoiser)
    assert torch.allclose(denoiser(seen)[2:3], denoiser(seen[2:3]), atol=1e-5)


def test_the_noise_level_conditions_the_network_and_weights_are_shared(name: str) -> None:
    denoiser = shaken(BUILD[name]())
    seen = observations(denoiser)
    before = denoiser(seen)
    other = denoiser.at(0.5)
    assert float(other.sigma) == 0.5
    assert not torch.allclose(other(seen), before)
    assert torch.equal(denoiser(seen), before)
    assert all(a is b for a, b in zip(other.parameters(), denoiser.parameters(), strict=True))


def test_log_sigma_itself_is_an_input() -> None:
    """Not only the scale of its inputs and outputs: at the mean the scaled input is 0 for every sigma."""
    denoiser = shaken(ResidualMLP((3,), 1.0, hidden=(8,)))
    seen = torch.zeros(1, 3)
    assert not torch.allclose(denoiser(seen), denoiser.at(2.0)(seen) / 2)


def test_inputs_are_standardised_for_data_and_noise_together() -> None:
    denoiser = ResidualMLP((2,), 4.0, [1.0, -2.0], [3.0, 0.0], hidden=())
    with torch.no_grad():
        denoiser.network[0].weight.copy_(torch.eye(2, 3))
    seen = torch.tensor([[6.0, 2.0]])
    assert torch.allclose(denoiser(seen), seen + 4 * torch.tensor([[(6 - 1) / 5, (2 + 2) / 4]]))


def test_saving_and_loading_gives_the_same_bits_without_pickles(name: str, tmp_path: Path) -> None:
    denoiser = shaken(BUILD[name]())
    if isinstance(denoiser, DnCNN):
        denoiser.train()(observations(denoiser))  # moves the running statistics
        denoiser.eval()
    denoiser.save(tmp_path / "d.pt")
    torch.load(tmp_path / "d.pt", weights_only=True)
    again, seen = load_denoiser(tmp_path / "d.pt"), observations(denoiser)
    assert type(again) is type(denoiser)
    assert not again.training
    assert again.n_frames(2) == denoiser.n_frames(2)
    assert torch.equal(again(seen), denoiser(seen))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code_and_names_a_broken_file(tmp_path: Path) -> None:
    path, sprung = tmp_path / "d.pt", tmp_path / "sprung"
    with pytest.raises(FileNotFoundError, match="no denoiser file"):
        load_denoiser(path)
    torch.save({"format": 1, "kind": Trap(sprung)}, path)
    with pytest.raises(ValueError, match="not a denoiser file"):
        load_denoiser(path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="not a denoiser file"):
        load_denoiser(path)
    assert not sprung.exists()
    ResidualMLP((4,), 0.2, hidden=(8,)).save(path)
    good = path.read_bytes()
    for damaged in (b"", good[: len(good) // 2], b"something else"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a denoiser file"):
            load_denoiser(path)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Sequential"},
        {"format": 2},
        {"settings": {"shape": [5], "keep": 5, "hidden": [8]}},
        {"settings": {"shape": [4], "keep": 4, "hidden": [8], "sigma": 1.0}},
        {"settings": None},
        {"state": {}},
        {"state": None},
    ],
)
def test_contradictory_files_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d.pt"
    ResidualMLP((4,), 0.2, hidden=(8,)).save(path)
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ValueError, match="not a denoiser file"):
        load_denoiser(path)


@pytest.mark.parametrize(("entry", "value"), [("network.0.weight", np.nan), ("mean", np.inf), ("sigma", 0.0), ("sigma", -1.0)])
def test_numbers_that_cannot_be_are_refused(entry: str, value: float, tmp_path: Path) -> None:
    denoiser = ResidualMLP((4,), 0.2, hidden=(8,))
    denoiser.state_dict()[entry].fill_(value)
    denoiser.save(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="not a denoiser file"):
        load_denoiser(tmp_path / "d.pt")


def test_weights_follow_the_seed_and_nothing_else() -> None:
    def first(seed: int) -> torch.Tensor:
        return ResidualMLP((4,), 0.2, hidden=(8,), seed=seed).network[0].weight

    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), first(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first(0), one)
    assert not torch.equal(first(1), one)


def test_a_denoiser_for_data_knows_their_kind_and_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1000, 6, generator=generator) * torch.arange(6) + 3
    denoiser = denoiser_for(vectors, 0.3, (2,), hidden=(8,))
    assert isinstance(denoiser, ResidualMLP)
    assert torch.allclose(denoiser.mean, vectors.mean(0), atol=1e-5)
    assert torch.allclose(denoiser.std, vectors.std(0, correction=0), atol=1e-5)
    assert float(denoiser.sigma) == pytest.approx(0.3)
    assert denoiser.keep == 2
    assert denoiser.n_frames(1) == 3
    pictures = denoiser_for(torch.rand(5, 4, 12, 10, generator=generator), 0.1, (2, 12, 10), depth=2, width=4)
    assert isinstance(pictures, DnCNN)
    assert (pictures.axis, pictures.keep) == (0, 2)
    last = denoiser_for(torch.rand(5, 12, 10, 6, generator=generator), 0.1, (12, 10, 3), depth=2, width=4)
    assert isinstance(last, DnCNN)
    assert (last.axis, last.keep) == (-1, 3)


def test_the_default_depth_and_width_are_those_of_the_paper() -> None:
    denoiser = DnCNN((3, 8, 8), 0.25)
    convolutions = [layer for layer in denoiser.modules() if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in denoiser.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert (len(convolutions), len(norms), convolutions[1].out_channels) == (17, 15, 64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResidualMLP((4,), 0.0), ValueError, "sigma"),
        (lambda: ResidualMLP((4,), np.nan), ValueError, "sigma"),
        (lambda: ResidualMLP((4,), "x"), TypeError, "sigma"),  # type: ignore[arg-type]
        (lambda: ResidualMLP((), 0.1), ValueError, "shape"),
        (lambda: ResidualMLP((0,), 0.1), ValueError, "shape"),
        (lambda: ResidualMLP((4,), 0.1, [1.0, 2.0]), ValueError, "mean"),
        (lambda: ResidualMLP((4,), 0.1, np.nan), ValueError, "mean"),
        (lambda: ResidualMLP((4,), 0.1, 0.0, -1.0), ValueError, "std"),
        (lambda: ResidualMLP((4,), 0.1, keep=5), ValueError, "keep"),
        (lambda: ResidualMLP((4,), 0.1, keep=0), ValueError, "keep"),
        (lambda: ResidualMLP((4,), 0.1, hidden=(0,)), ValueError, "hidden"),
        (lambda: ResidualMLP((4,), 0.1).at(-1), ValueError, "sigma"),
        (lambda: DnCNN((4, 4), 0.1), ValueError, "shape"),
        (lambda: DnCNN((1, 4, 4), 0.1, depth=1), ValueError, "depth"),
        (lambda: DnCNN((1, 4, 4), 0.1, width=0), ValueError, "width"),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
