"""Certify a classifier on a data set: the same certificates as for one step of a policy."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robustrl.certify.classify import certified
from robustrl.certify.radius import RadiusCertificate
from robustrl.certify.sampling import Smoothed
from robustrl.errors import CertificateError, ChunkError, check_alpha, check_count, check_finite_array
from robustrl.files import write_atomically
from robustrl.noise import Noise, noise_from_dict
from robustrl.report.accuracy import HEADER, AccuracyReport, Row, read_rows
from robustrl.rollouts.progress import progress_bar

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

EVIDENCE = "evidence.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def certify_images(
    model: Any,
    images: ArrayLike,
    labels: ArrayLike,
    noise: Noise,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    alpha_total: float | None = None,
    method: str = "one-sided",
    norm: float | None = None,
    skip: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    device: Any = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> AccuracyReport:
    """Certify a classifier's predictions on labelled inputs.

    Args:
        model: torch module, or any callable from inputs (rows, *shape) float32 to scores (rows, K).
        images: inputs (N, *shape), floats in the units of the noise.
        labels: classes (N,).
        noise: the mechanism; the classifier should have been trained under it.
        n0: noisy copies per input that choose the class.
        n: noisy copies per input that give the evidence.
        alpha: failure probability of each certificate.
        alpha_total: of all together, in place of `alpha`.
        method: see `Smoothed.certify`.
        norm: of the radii; default the noise's own.
        skip: certify every `skip`-th input.
        seed: of the noise; an input's draws depend on it and on the input's index alone.
        folder: where the log and the evidence go, input by input; a run that was interrupted goes on from them.
        device: where to compute; default where the model is.
        batch_size: most rows per forward pass.
        progress: show a bar with an ETA.
    Returns:
        AccuracyReport.
    Raises:
        ValueError: for inputs and labels that do not fit, or bad numbers.
        ChunkError: if the folder holds another run.
    """
    x, y = check_finite_array("images", images), np.asarray(labels)
    if x.ndim < 2 or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"images must be (N, *shape) and labels N integers, got shapes {x.shape} and {y.shape}")
    chosen = range(0, len(x), check_count("skip", skip))
    check_count("seed", seed, least=0)
    level = alpha if alpha_total is None else check_alpha(alpha_total, "alpha_total") / len(chosen)
    own = noise.norm if norm is None else norm
    settings = {
        "noise": noise.to_dict(),
        "n0": n0,
        "n": n,
        "alpha": level,
        "method": method,
        "norm": str(own),
        "skip": skip,
        "seed": seed,
    }
    log = _Log(folder, settings, len(x))
    with progress_bar("certify", len(chosen), visible=progress) as advance:
        advance(len(log.rows))
        for i in chosen[len(log.rows) :]:
            start = time.perf_counter()
            function = Smoothed(model, noise, device=device, seed=_seed_of(seed, i), batch_size=batch_size)
            certificate = function.certify(x[i : i + 1].astype(np.float32), n0, n, level, method=method, norm=norm)[0]
            log.add(Row(i, int(y[i]), certificate.prediction, certificate.radius, time.perf_counter() - start), certificate)
            advance(1)
    return AccuracyReport(tuple(log.rows), own, f"{noise.scale}, {method}, n = {n}")


class _Log:
    """Rows and evidence, on disk as far as they go."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any], size: int) -> None:
        self.rows: list[Row] = []
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stated = {**settings, "inputs": size}
        path = self.folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(stated)):
            raise ChunkError(
                f"{self.folder} holds another run's certificates ({path.name}); choose another folder, or delete it"
            )
        write_atomically(path, json.dumps(stated, indent=1).encode())
        if (self.folder / "log.tsv").exists():
            with open(self.folder / "log.tsv", encoding="utf-8", newline="") as lines:
                self.rows = read_rows(lines)
        evidence = self.folder / EVIDENCE
        kept = evidence.read_text(encoding="utf-8").split("\n")[:-1] if evidence.exists() else []
        self.rows = self.rows[: len(kept)]
        write_atomically(evidence, "".join(line + "\n" for line in kept[: len(self.rows)]).encode())
        write_atomically(
            self.folder / "log.tsv", "".join(f"{line}\n" for line in [HEADER, *(r.line() for r in self.rows)]).encode()
        )

    def add(self, row: Row, certificate: RadiusCertificate) -> None:
        self.rows.append(row)
        if self.folder is None:
            return
        stated = {"idx": row.idx, "prediction": certificate.prediction, "radius": certificate.radius, **certificate.evidence}
        for name, line in ((EVIDENCE, json.dumps(stated)), ("log.tsv", row.line())):
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def verify_images(folder: str | os.PathLike[str]) -> AccuracyReport:
    """Recompute every radius of a folder that `certify_images` wrote from its evidence.

    Raises:
        CertificateError: naming the first input whose log or evidence was edited.
        OSError: if a file is missing.
    """
    home = Path(folder)
    settings = json.loads((home / "settings.json").read_text(encoding="utf-8"))
    noise, norm = noise_from_dict(settings["noise"]), float(settings["norm"])
    report = AccuracyReport.read_log(home / "log.tsv", norm)
    lines = (home / EVIDENCE).read_text(encoding="utf-8").splitlines()
    if len(lines) != len(report):
        raise CertificateError(f"{home}: the log has {len(report)} inputs, the evidence {len(lines)}")
    for row, line in zip(report.rows, lines, strict=True):
        try:
            stated = json.loads(line)
            evidence = {key: value for key, value in stated.items() if key not in ("idx", "radius", "prediction")}
            if settings["method"] == "values":
                evidence["prediction"] = stated["prediction"]
            fresh = certified(settings["method"], evidence, alpha=settings["alpha"], norm=norm, scope="input", noise=noise)
        except (KeyError, TypeError, ValueError) as error:
            raise CertificateError(f"{home}: input {row.idx} cannot be recomputed from its evidence: {error!r}") from None
        same = math.isclose(fresh.radius, row.radius, rel_tol=1e-9, abs_tol=1e-13) and fresh.prediction == row.prediction
        if not same or stated["idx"] != row.idx or evidence["n" if "n" in evidence else "n_pairs"] < 1:
            raise CertificateError(
                f"{home}: input {row.idx} is said to be class {row.prediction} within {row.radius}; "
                f"its evidence gives class {fresh.prediction} within {fresh.radius}"
            )
    return report


def _seed_of(seed: int, index: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_images(path: str | os.PathLike[str], scale: float | None = None) -> tuple[Images, Labels]:
    """Labelled inputs from a file or folder.

    Args:
        path: an .npz with arrays x (or images) and y (or labels); an .npy of inputs beside one of labels called <name>_labels.npy; or
            a folder with one sub-folder of pictures per class, classes in the order of their names, channels first.
        scale: what inputs are divided by; default 255 for integers, 1 for floats.
    Returns:
        inputs (N, *shape) float32, and labels (N,) int64.
    Raises:
        ValueError: if there is nothing of the kind, or pictures differ in size.
    """
    found = Path(path)
    if found.is_dir():
        x, y = _picture_folder(found)
    elif found.suffix == ".npz":
        with np.load(found, allow_pickle=False) as data:
            names = [next((name for name in pair if name in data), None) for pair in (("x", "images"), ("y", "labels"))]
            if None in names:
                raise ValueError(f"{found} must hold arrays x (or images) and y (or labels), got {sorted(data.files)}")
            x, y = data[str(names[0])], data[str(names[1])]
    elif found.suffix == ".npy":
        beside = found.with_name(f"{found.stem}_labels.npy")
        if not beside.exists():
            raise ValueError(f"labels of {found} must be in {beside}, which does not exist")
        x, y = np.load(found, allow_pickle=False), np.load(beside, allow_pickle=False)
    else:
        raise ValueError(f"path must be an .npz, an .npy, or a folder of pictures, got {os.fspath(path)!r}")
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "iu" or len(x) != len(y) or y.ndim != 1:
        raise ValueError(
            f"{found} must hold numbers and one integer label each, got {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    divisor = (255.0 if x.dtype.kind in "iu" else 1.0) if scale is None else scale
    return (x / divisor).astype(np.float32), y.astype(np.int64)


def _picture_folder(folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    from PIL import Image

    classes = sorted(part for part in folder.iterdir() if part.is_dir())
    files = [
        (file, label)
        for label, part in enumerate(classes)
        for file in sorted(part.iterdir())
        if file.suffix.lower() in PICTURES
    ]
    if not files:
        raise ValueError(f"{folder} must hold one folder of pictures per class, found none")
    pictures = []
    for file, _ in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode in ("L", "1", "I;16") else "RGB"))
        pictures.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"pictures in {folder} must have one size, got {sorted(shapes)[:3]}")
    return np.stack(pictures), np.array([label for _, label in files])


def load_classifier(model: str, weights: str | os.PathLike[str] | None = None, device: str = "cpu") -> torch.nn.Module:
    """A torch module by name.

    Args:
        model: "package.module:callable", whose result is a torch module or a class of one; or a TorchScript file (.pt, .pth).
        weights: a state_dict, loaded without running code.
        device: where to put it.
    Raises:
        ValueError: if the name leads nowhere, or to something else.
    """
    if Path(model).suffix in (".pt", ".pth"):
        module: Any = torch.jit.load(model, map_location=device)  # type: ignore[no-untyped-call]
    else:
        home, _, name = model.partition(":")
        if not home or not name:
            raise ValueError(f"model must be package.module:callable, or a TorchScript file, got {model!r}")
        try:
            made = getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model {model!r} cannot be imported: {error}") from None
        module = made if isinstance(made, torch.nn.Module) else made()
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"model {model!r} must give a torch.nn.Module, got {type(module).__name__}")
    if weights is not None:
        module.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    return module.to(device).eval()
