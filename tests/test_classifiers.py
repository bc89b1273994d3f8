"""Classifiers on data sets: certified, resumed, recomputed, from the library and the shell."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robustrl.classifiers import certify_images, load_classifier, load_images, verify_images
from robustrl.errors import CertificateError, ChunkError, UnsafeModelError
from robustrl.noise import DeterministicSplitting, Gaussian, Uniform
from robustrl.policy import PolicyView
from robustrl.report.accuracy import AccuracyReport, Row

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(12, 1, 2, 2)).astype(np.float32)
Y = (X.reshape(12, -1)[:, 0] > 0).astype(np.int64)


def sign() -> nn.Module:
    """Class 1 where the first pixel is positive."""
    linear = nn.Linear(4, 2)
    linear.weight.data = torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    linear.bias.data = torch.zeros(2)
    return nn.Sequential(nn.Flatten(), linear)


def certified(**options: Any) -> AccuracyReport:
    return certify_images(sign(), X, Y, Gaussian(0.3), **({"n": 2000} | options))


def test_radii_are_distances_to_the_boundary_from_below() -> None:
    report = certified()
    margins = np.abs(X.reshape(12, -1)[:, 0])
    for row in report.rows:
        assert row.prediction in (-1, row.label)
        assert row.radius < margins[row.idx]
        assert row.radius > min(margins[row.idx], 0.8) - 0.12 or row.prediction == -1


def test_an_inputs_certificate_depends_on_its_own_draws_alone() -> None:
    everything, few = certified(), certified(skip=3)
    assert [row.idx for row in few.rows] == [0, 3, 6, 9]
    assert [row.radius for row in few.rows] == [everything.rows[i].radius for i in (0, 3, 6, 9)]


def test_the_same_picture_twice_gets_noise_of_its_own(tmp_path: Path) -> None:
    certify_images(sign(), X[[1, 1, 1]], Y[[1, 1, 1]], Gaussian(1.0), n=5000, folder=tmp_path)
    counts = {json.loads(line)["evidence"]["count"] for line in (tmp_path / "evidence.jsonl").read_text().splitlines()}
    assert len(counts) > 1


@pytest.mark.parametrize("method", ["one-sided", "two-sided", "second-order", "dipole"])
def test_a_folder_recomputes_from_its_evidence(tmp_path: Path, method: str) -> None:
    report = certified(folder=tmp_path, method=method, norm=float("inf") if method == "one-sided" else None)
    assert [row[:4] for row in verify_images(tmp_path).rows] == [row[:4] for row in report.rows]


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [("log.tsv", "\t0.", "\t1."), ("evidence.jsonl", '"n": 2000', '"n": 1999'), ("evidence.jsonl", '"idx": 3', '"idx": 4')],
)
def test_edited_logs_and_evidence_do_not_verify(tmp_path: Path, file: str, before: str, after: str) -> None:
    certified(folder=tmp_path)
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after, 1))
    with pytest.raises(CertificateError, match="input"):
        verify_images(tmp_path)


@pytest.mark.parametrize("cut", ["log.tsv", "evidence.jsonl"])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path, cut: str) -> None:
    whole = certified(folder=tmp_path / "whole")
    certified(folder=tmp_path / "cut")
    lines = (tmp_path / "cut" / cut).read_text().splitlines(keepends=True)
    (tmp_path / "cut" / cut).write_text("".join(lines[:6]) + lines[6][:5])  # in the middle of a line
    again = certified(folder=tmp_path / "cut")
    assert [row[:4] for row in again.rows] == [row[:4] for row in whole.rows]
    assert (tmp_path / "cut" / "evidence.jsonl").read_text() == (tmp_path / "whole" / "evidence.jsonl").read_text()
    verify_images(tmp_path / "cut")


def test_another_run_does_not_go_on_from_a_folder(tmp_path: Path) -> None:
    certified(folder=tmp_path)
    for changes in ({"n": 3000}, {"alpha": 0.01}, {"seed": 1}, {"method": "dipole"}):
        with pytest.raises(ChunkError, match="another run"):
            certified(folder=tmp_path, **changes)
    others = {"model": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "images": X + 1e-3, "labels": 1 - Y}
    for name, value in others.items():
        arguments = {"model": sign(), "images": X, "labels": Y} | {name: value}
        with pytest.raises(ChunkError, match=f"different {name}"):
            certify_images(**arguments, noise=Gaussian(0.3), n=2000, folder=tmp_path)


def test_a_run_that_failed_at_once_does_not_block_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not take inputs of shape \(1, 1, 2\)"):
        certify_images(sign(), X[:, :, :1], Y, Gaussian(0.3), n=2000, folder=tmp_path)
    with pytest.raises(ValueError, match="norm must be"):
        certified(folder=tmp_path, norm=7)
    certified(folder=tmp_path)
    verify_images(tmp_path)


@pytest.mark.parametrize("lines", [[0, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 0, *range(1, 11)], [*range(12), 3]])
def test_a_choice_among_the_inputs_does_not_verify(tmp_path: Path, lines: list[int]) -> None:
    certified(folder=tmp_path)
    for name, first in (("log.tsv", 1), ("evidence.jsonl", 0)):
        text = (tmp_path / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(text[:first] + [text[first + i] for i in lines]))
    with pytest.raises(CertificateError, match="there must be one certificate for each"):
        verify_images(tmp_path)
    again = certified(folder=tmp_path)
    assert [row.idx for row in again.rows] == list(range(12))
    verify_images(tmp_path)


def test_other_labels_or_copies_than_the_runs_do_not_verify(tmp_path: Path) -> None:
    certified(folder=tmp_path)
    log, settings = (tmp_path / "log.tsv").read_text(), (tmp_path / "settings.json").read_text()
    row = next(line for line in log.splitlines()[1:] if line.split("\t")[4] == "1").split("\t")
    lie = [row[0], "7", row[2], row[3], "0", row[5]]
    (tmp_path / "log.tsv").write_text(log.replace("\t".join(row), "\t".join(lie)))
    with pytest.raises(CertificateError, match="labels"):
        verify_images(tmp_path)
    (tmp_path / "log.tsv").write_text(log)
    (tmp_path / "settings.json").write_text(settings.replace('"n": 2000', '"n": 9000'))
    with pytest.raises(CertificateError, match="number of copies"):
        verify_images(tmp_path)
    for broken in ("{}", "[]", "no"):
        (tmp_path / "settings.json").write_text(broken)
        with pytest.raises(CertificateError, match="holds no certificates"):
            verify_images(tmp_path)


def test_bounded_scores_of_a_data_set_verify_within_the_runs_bounds(tmp_path: Path) -> None:
    report = certified(folder=tmp_path, method="values", bounds=(-1.0, 1.0), n=5000)
    assert report.accuracy > 0
    assert [row[:4] for row in verify_images(tmp_path).rows] == [row[:4] for row in report.rows]
    with pytest.raises(ChunkError, match="different bounds"):
        certified(folder=tmp_path, method="values", bounds=(-2.0, 1.0), n=5000)
    text = (tmp_path / "evidence.jsonl").read_text()
    (tmp_path / "evidence.jsonl").write_text(text.replace('"bounds": [-1.0, 1.0]', '"bounds": [-1.0, 0.9]', 1))
    with pytest.raises(CertificateError, match="other bounds"):
        verify_images(tmp_path)


def test_a_policy_is_certified_on_a_data_set_too(tmp_path: Path) -> None:
    view = PolicyView.from_torch(nn.Linear(4, 2), kind="q", observation_shape=(4,))
    x = X.reshape(12, 4)
    certify_images(view, x, Y, Gaussian(0.3), n=100, folder=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["model"] == view.fingerprint()
    assert certify_images(lambda rows: view.scores(rows), x, Y, Gaussian(0.3), n=100).rows


def test_exact_votes_of_a_data_set_verify_too(tmp_path: Path) -> None:
    x = np.random.default_rng(1).integers(0, 5, size=(6, 1, 2, 2)) / 4
    noise = DeterministicSplitting(levels=9, quantisation=4)
    report = certify_images(sign(), x, Y[:6], noise, method="splitting", folder=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["alpha"] == 0
    assert [row[:4] for row in verify_images(tmp_path).rows] == [row[:4] for row in report.rows]


def test_abstaining_is_never_right() -> None:
    assert not Row(0, -1, -1, 0.0, 0.0).correct
    with pytest.raises(ValueError, match="labels N integers >= 0"):
        certify_images(sign(), X, Y - 1, Gaussian(0.3))


def test_a_program_is_loaded_from_a_file_only_with_trust(tmp_path: Path) -> None:
    torch.jit.script(sign()).save(str(tmp_path / "model.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(UnsafeModelError, match="trust"):
        load_classifier(str(tmp_path / "model.pt"))
    found = load_classifier(str(tmp_path / "model.pt"), trust=True)
    assert found(torch.zeros(2, 1, 2, 2)).shape == (2, 2)


def test_alpha_total_is_split_over_all_inputs(tmp_path: Path) -> None:
    certified(folder=tmp_path, alpha_total=0.12)
    assert json.loads((tmp_path / "settings.json").read_text())["alpha"] == pytest.approx(0.01)


# ------------------------------------------------------------------------------------------------ data and models


def test_inputs_come_from_npz_npy_and_folders_of_pictures(tmp_path: Path) -> None:
    bytes_ = GENERATOR.integers(0, 256, size=(6, 1, 5, 5), dtype=np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 1])
    np.savez(tmp_path / "a.npz", images=bytes_, labels=labels)
    np.save(tmp_path / "b.npy", bytes_)
    np.save(tmp_path / "b_labels.npy", labels)
    for name in ("cat", "dog"):
        (tmp_path / "c" / name).mkdir(parents=True)
    for i, (picture, label) in enumerate(zip(bytes_, labels, strict=True)):
        Image.fromarray(picture[0]).save(tmp_path / "c" / ("cat", "dog")[label] / f"{i}.png")
    for source in ("a.npz", "b.npy", "c"):
        x, y = load_images(tmp_path / source)
        assert x.dtype == np.float32
        assert np.array_equal(x, (bytes_ / 255).astype(np.float32))
        assert y.tolist() == labels.tolist()
    assert load_images(tmp_path / "a.npz", scale=1)[0].max() > 1


def test_forgotten_scales_are_warned_about(tmp_path: Path) -> None:
    for name, x in {"bytes": X * 0 + 255, "unit": X / 10}.items():
        np.savez(tmp_path / f"{name}.npz", x=x.astype(np.float32), y=Y)
    with pytest.warns(UserWarning, match="reach 255, .*--scale 255"):
        load_images(tmp_path / "bytes.npz")
    for name, scale in (("bytes", 255.0), ("bytes", 1.0), ("unit", None)):
        with warnings.catch_warnings(action="error"):
            load_images(tmp_path / f"{name}.npz", scale)


def test_coloured_pictures_have_their_channels_first(tmp_path: Path) -> None:
    (tmp_path / "c" / "x").mkdir(parents=True)
    Image.fromarray(GENERATOR.integers(0, 256, size=(4, 6, 3), dtype=np.uint8)).save(tmp_path / "c" / "x" / "0.png")
    assert load_images(tmp_path / "c")[0].shape == (1, 3, 4, 6)


def test_data_that_is_none_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels=X)
    np.savez(tmp_path / "b.npz", x=X, y=Y[:5])
    np.savez(tmp_path / "c.npz", x=X, y=Y.astype(float))
    np.save(tmp_path / "d.npy", X)
    np.savez(tmp_path / "h.npz", x=X, y=Y[0])
    np.savez(tmp_path / "i.npz", x=X[0, 0, 0, 0], y=Y[0])
    np.savez(tmp_path / "j.npz", x=np.array([{}]), y=Y[:1])
    (tmp_path / "k.npz").write_text("these are no arrays")
    (tmp_path / "l.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:200])
    (tmp_path / "m.npz").write_bytes((tmp_path / "d.npy").read_bytes())
    (tmp_path / "n.npy").write_text("")
    (tmp_path / "n_labels.npy").write_bytes((tmp_path / "b.npz").read_bytes())
    np.savez(tmp_path / "o.npz", x=X[:0], y=Y[:0])
    np.save(tmp_path / "p.npy", X)
    (tmp_path / "p_labels.npy").write_bytes((tmp_path / "b.npz").read_bytes())
    (tmp_path / "e").mkdir()
    (tmp_path / "f" / "x").mkdir(parents=True)
    for i in (4, 5):
        Image.fromarray(np.zeros((i, i), dtype=np.uint8)).save(tmp_path / "f" / "x" / f"{i}.png")
    for name, message in {
        "a.npz": "must hold x or images",
        "b.npz": "one integer label each",
        "c.npz": "one integer label each",
        "d.npy": "d_labels.npy, which does not exist",
        "h.npz": "one integer label each",
        "i.npz": "one integer label each",
        "j.npz": "holds no arrays that can be read",
        "k.npz": "holds no arrays that can be read",
        "l.npz": "holds no arrays that can be read",
        "m.npz": "must hold x or images and y or labels, got",
        "n.npy": "holds no arrays that can be read",
        "o.npz": "one integer label each",
        "p.npy": "p_labels.npy must hold a single array, got",
        "e": "found none",
        "f": "one size",
        "g.txt": "path must be",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": X[:3]}, "labels N integers"),
        ({"labels": Y.astype(float)}, "labels N integers"),
        ({"images": np.full((12, 4), np.nan)}, "images must be finite"),
        ({"method": "nonsense"}, "method must be"),
        ({"skip": 0}, "skip must be"),
        ({"alpha_total": 2.0}, "alpha_total must be"),
        ({"seed": -1}, "seed must be"),
        ({"labels": Y + 1}, "labels must be below 2, the number of the model's classes, got 2"),
        ({"noise": Gaussian(0.0)}, "sigma > 0"),
        ({"method": "sequential"}, "splitting, got 'sequential'"),
        ({"method": "values"}, "bounds must be given for method 'values'"),
        ({"bounds": (-1, 1)}, "and no other"),
        ({"method": "values", "bounds": (1, -1)}, "low < high"),
        ({"noise": None}, "noise must be given for every method but 'lipschitz'"),
        ({"method": "lipschitz"}, "noise must be given for every method but 'lipschitz', which has none"),
        ({"method": "lipschitz", "noise": None, "norm": 0}, "norm must be one of"),
        ({"method": "lipschitz", "noise": None, "bounds": (0, 1)}, "and no other"),
        ({"method": "lipschitz", "noise": None, "labels": Y + 1}, "labels must be below 2"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify_images(**({"model": sign(), "images": X, "labels": Y, "noise": Uniform(0.3)} | changes))


def test_networks_of_known_layers_are_certified_without_noise(tmp_path: Path) -> None:
    """The first pixel alone decides, so its size is the radius; in l-inf it is known only up to the diagonal."""
    report = certify_images(sign(), X, Y, method="lipschitz", folder=tmp_path)
    margins = np.abs(X.reshape(12, -1)[:, 0])
    assert [row.prediction for row in report.rows] == Y.tolist()
    np.testing.assert_allclose([row.radius for row in report.rows], margins, rtol=1e-5)
    assert [row[:4] for row in verify_images(tmp_path).rows] == [row[:4] for row in report.rows]
    again = certify_images(sign(), X, Y, method="lipschitz", folder=tmp_path)
    assert [row[:4] for row in again.rows] == [row[:4] for row in report.rows]
    flat = certify_images(sign(), X, Y, method="lipschitz", norm=float("inf"), skip=3)
    np.testing.assert_allclose([row.radius for row in flat.rows], margins[::3] / 2, rtol=1e-5)
    with pytest.raises(ChunkError, match="different"):
        certify_images(sign(), X, Y, method="lipschitz", norm=1, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("lipschitz", 0.5), ("scores", [9.0, 0.0]), ("rounding", 0.1), ("differences", [0.1, 0.1])]
)
def test_edited_evidence_without_noise_does_not_verify(tmp_path: Path, name: str, value: Any) -> None:
    certify_images(sign(), X, Y, method="lipschitz", folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    lines[4]["evidence"][name] = value
    (tmp_path / "evidence.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CertificateError, match="input 4"):
        verify_images(tmp_path)


def test_numbers_of_copies_mean_nothing_without_noise(tmp_path: Path) -> None:
    certify_images(sign(), X, Y, method="lipschitz", folder=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["n"], settings["n0"]) == (None, None)
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"n": 7}))
    with pytest.raises(CertificateError, match="number of copies"):
        verify_images(tmp_path)


def test_evidence_that_says_something_twice_is_found(tmp_path: Path) -> None:
    certify_images(sign(), X, Y, method="lipschitz", folder=tmp_path)
    path = tmp_path / "evidence.jsonl"
    path.write_text(path.read_text().replace('"lipschitz":', '"lipschitz": 1e-9, "lipschitz":', 1))
    with pytest.raises(CertificateError, match="twice"):
        verify_images(tmp_path)


def test_networks_without_a_known_constant_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="layer LayerNorm"):
        certify_images(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), X, Y, method="lipschitz", folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_number_is_no_noise() -> None:
    with pytest.raises(TypeError, match="noise must be a robustrl noise mechanism"):
        certify_images(sign(), X, Y, 0.3)  # type: ignore[arg-type]


def test_bytes_and_deep_pictures_are_not_taken_for_what_they_are_not(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be floats in the units of the noise"):
        certify_images(sign(), (X * 0).astype(np.uint8), Y, Gaussian(0.3))
    (tmp_path / "c" / "x").mkdir(parents=True)
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "c" / "x" / "0.png")
    with pytest.raises(ValueError, match="8 bits per channel"):
        load_images(tmp_path / "c")
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be"):
            load_images(tmp_path / "a.npz", scale)


def test_classifiers_are_found_by_name_and_take_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text("import torch\ndef small(): return torch.nn.Linear(4, 2)\nbroken = lambda: 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = nn.Linear(4, 2)
    torch.save(wanted.state_dict(), tmp_path / "weights.pt")
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="no state_dict"):
        load_classifier("my_networks:small", tmp_path / "wrong.pt")
    found = load_classifier("my_networks:small", tmp_path / "weights.pt")
    assert torch.equal(found.weight, wanted.weight)  # type: ignore[arg-type]
    assert not found.training
    for name, message in {
        "my_networks": "package.module:callable",
        "my_networks:none": "cannot be imported",
        "no_such_module:x": "cannot be imported",
        "my_networks:broken": "must give a torch.nn.Module",
        "torch.nn:Linear": "cannot be imported and called",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_classifier(name)


def test_the_shell_certifies_and_says_where_everything_is(tmp_path: Path) -> None:
    (tmp_path / "my_networks.py").write_text(
        "import torch\ndef small(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
    )
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    words = "certify-images my_networks:small data.npz --sigma 0.3 --n 500 --out runs"
    command = [str(Path(sys.executable).with_name("robustrl")), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ACR" in done.stdout
    for name in ("log.tsv", "evidence.jsonl", "accuracy.png"):
        assert (tmp_path / "runs" / name).exists()
    again = subprocess.run([command[0], "verify", "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert "verified: the radii of all 12 inputs" in again.stdout, again.stderr
