"""Certify a classifier on a data set: the same certificates as for one step of a policy."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import time
import warnings
import zipfile
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robustrl.certify.classify import certified, check_noise, fingerprint
from robustrl.certify.lipschitz import LipschitzScores
from robustrl.certify.margins import NORMS
from robustrl.certify.methods import input_method
from robustrl.certify.radius import SAME, RadiusCertificate
from robustrl.certify.sampling import Smoothed
from robustrl.certify.storage import unique_keys
from robustrl.errors import (
    CertificateError,
    ChunkError,
    UnsafeModelError,
    check_alpha,
    check_choice,
    check_count,
    check_finite_array,
    check_positive,
)
from robustrl.files import write_atomically
from robustrl.noise import Noise, noise_from_dict
from robustrl.report.accuracy import HEADER, AccuracyReport, Row, read_rows
from robustrl.rollouts.identity import identity
from robustrl.rollouts.progress import progress_bar

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

EVIDENCE = "evidence.jsonl"
LARGEST = 2.0
"""Entries of scaled inputs are below this; those of forgotten ones are not."""
LONE = "a single array"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def certify_images(
    model: Any,
    images: ArrayLike,
    labels: ArrayLike,
    noise: Noise | None = None,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    alpha_total: float | None = None,
    method: str = "one-sided",
    norm: float | None = None,
    bounds: tuple[float, float] | None = None,
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
        noise: the mechanism; the classifier should have been trained under it. None for method "lipschitz".
        n0: noisy copies per input that choose the class.
        n: noisy copies per input that give the evidence.
        alpha: failure probability of each certificate.
        alpha_total: of all together, in place of `alpha`.
        method: see `Smoothed.certify`; or "lipschitz", for a module of known layers as it is: `LipschitzScores.of` says which.
        norm: of the radii; default the noise's own, 2 without noise.
        bounds: (low, high) that scores are clipped to, for method "values" alone.
        skip: certify every `skip`-th input.
        seed: of the noise; an input's draws depend on it and on the input's index alone.
        folder: where the log and the evidence go, input by input; a run that was interrupted goes on from them.
        device: where to compute; default where the model is.
        batch_size: most rows per forward pass.
        progress: show a bar with an ETA.
    Returns:
        AccuracyReport.
    Raises:
        ValueError: for inputs and labels that do not fit each other or the model, or bad numbers.
        TypeError: for inputs that are no floats, or a network without a known Lipschitz constant.
        ChunkError: if the folder holds another run.
    """
    found, y = np.asarray(images), np.asarray(labels)
    if found.dtype.kind != "f":
        raise TypeError(
            f"images must be floats in the units of the noise (or radius), got {found.dtype}: scale them first (load_images does)"
        )
    x = check_finite_array("images", found)
    if x.ndim < 2 or y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"images must be (N, *shape) and labels N integers >= 0, got shapes {x.shape} and {y.shape}")
    chosen = range(0, len(x), check_count("skip", skip))
    check_count("seed", seed, least=0)
    if (noise is None) != (method == "lipschitz"):
        raise ValueError(f"noise must be given for every method but 'lipschitz', which has none, got {noise} for {method!r}")
    exact = noise is None or input_method(method).exact
    if (method == "values") != (bounds is not None):
        raise ValueError(
            f"bounds must be given for method 'values' (--bounds LOW HIGH) and no other, got {bounds} for {method!r}"
        )
    level = 0.0 if exact else alpha if alpha_total is None else check_alpha(alpha_total, "alpha_total") / len(chosen)
    share = alpha if exact else level  # which exact methods do not look at
    if noise is None:
        network = LipschitzScores.of(model.to(device) if device is not None and isinstance(model, torch.nn.Module) else model)
        own, classes = check_choice("norm", 2 if norm is None else norm, NORMS), network.scores(found[:1]).shape[1]
    else:
        probe = Smoothed(model, noise, device=device)
        check_noise(noise, "input")
        own, classes = noise.norm if norm is None else norm, probe.tally(found[:1], 1).counts.shape[1]
    if y.max() >= classes:
        raise ValueError(f"labels must be below {classes}, the number of the model's classes, got {y.max()}")

    def certificate_of(i: int) -> RadiusCertificate:
        one = found[i : i + 1]
        if noise is None:
            return network.certificates(one, scope="input", norm=own)[0]
        function = Smoothed(model, noise, bounds=bounds, device=device, seed=_seed_of(seed, i), batch_size=batch_size)
        return function.certify(one, n0, n, share, method=method, norm=norm)[0]

    settings = {
        "noise": None if noise is None else noise.to_dict(),
        "n0": None if noise is None else n0,
        "n": None if noise is None else n,
        "alpha": level,
        "method": method,
        "norm": str(own),
        "bounds": None if bounds is None else list(bounds),
        "skip": skip,
        "seed": seed,
        "inputs": len(x),
        "model": fingerprint(model if noise is None else probe.function) or identity(model),
        "images": hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest(),
        "labels": _digest_of([int(y[i]) for i in chosen]),
    }
    log = _Log(folder, settings, chosen)
    with progress_bar("certify", len(chosen), visible=progress) as advance:
        advance(len(log.rows))
        for i in chosen[len(log.rows) :]:
            start = time.perf_counter()
            certificate = certificate_of(i)
            log.add(Row(i, int(y[i]), certificate.prediction, certificate.radius, time.perf_counter() - start), certificate)
            advance(1)
    return AccuracyReport(
        tuple(log.rows), own, f"{'no noise' if noise is None else noise.scale}, {method}, {'exact' if exact else f'n = {n}'}"
    )


def _digest_of(labels: list[int]) -> str:
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


class _Log:
    """Rows and evidence, on disk as far as they go."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any], chosen: range) -> None:
        self.rows: list[Row] = []
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, log = self.folder / "settings.json", self.folder / "log.tsv"
        if log.exists():
            with open(log, encoding="utf-8", newline="") as lines:
                self.rows = read_rows(lines)
        if self.rows and path.exists():
            before, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
            differs = sorted(name for name in now if before.get(name) != now[name])
            if differs:
                raise ChunkError(
                    f"{self.folder} holds another run's certificates (different {', '.join(differs)}); choose another folder, or "
                    "delete it"
                )
        write_atomically(path, json.dumps(settings, indent=1).encode())
        evidence = self.folder / EVIDENCE
        kept = evidence.read_text(encoding="utf-8").split("\n")[:-1] if evidence.exists() else []
        pairs = zip(self.rows, kept, chosen, strict=False)
        whole = list(takewhile(lambda each: each[0].idx == json.loads(each[1])["idx"] == each[2], pairs))
        self.rows = [row for row, _, _ in whole]
        write_atomically(evidence, "".join(line + "\n" for _, line, _ in whole).encode())
        write_atomically(log, "".join(f"{line}\n" for line in [HEADER, *(r.line() for r in self.rows)]).encode())

    def add(self, row: Row, certificate: RadiusCertificate) -> None:
        self.rows.append(row)
        if self.folder is None:
            return
        stated = {"idx": row.idx, "evidence": certificate.evidence}
        for name, line in ((EVIDENCE, json.dumps(stated)), ("log.tsv", row.line())):
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def verify_images(folder: str | os.PathLike[str]) -> AccuracyReport:
    """Recompute every radius of a folder that `certify_images` wrote from its evidence.

    Raises:
        CertificateError: naming the first input whose log or evidence was edited, or saying that inputs are missing.
        OSError: if a file is missing.
    """
    home = Path(folder)
    try:
        settings = json.loads((home / "settings.json").read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        noise, norm, method, alpha = (
            None if settings["noise"] is None else noise_from_dict(settings["noise"]),
            float(settings["norm"]),
            settings["method"],
            settings["alpha"],
        )
        chosen, n, n0 = range(0, settings["inputs"], settings["skip"]), settings["n"], settings["n0"]
        report = AccuracyReport.read_log(home / "log.tsv", norm)
        lines = (home / EVIDENCE).read_text(encoding="utf-8").splitlines()
        stated = [json.loads(line, object_pairs_hook=unique_keys) for line in lines]
        order = [one["idx"] for one in stated]
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"{home} holds no certificates of inputs that can be read: {error!r}") from None
    if [row.idx for row in report.rows] != list(chosen) or order != list(chosen):
        raise CertificateError(
            f"{home}: there must be one certificate for each of the inputs {list(chosen[:3])} ... of {chosen.stop}, in order; the log has "
            f"{len(report)}, the evidence {len(order)} (an interrupted run goes on when it is repeated)"
        )
    if _digest_of([row.label for row in report.rows]) != settings["labels"]:
        raise CertificateError(f"{home}: the labels are not those of the run")
    for row, one in zip(report.rows, stated, strict=True):
        try:
            evidence = dict(one["evidence"])
            fresh = certified(method, evidence, alpha=alpha, norm=norm, scope="input", noise=noise)
            drawn = evidence["n"] if "n" in evidence else 2 * evidence["n_pairs"] if "n_pairs" in evidence else n
            if evidence.get("bounds") != settings.get("bounds"):
                raise ValueError(f"its scores were clipped to other bounds than the run's {settings.get('bounds')}")
            chose = sum(evidence["selection"]) if "selection" in evidence else n0
            if drawn != n or chose != n0 or (noise is None and (n, n0) != (None, None)):
                raise ValueError(f"it has another number of copies than the run's {n0} and {n}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CertificateError(f"{home}: input {row.idx} cannot be recomputed from its evidence: {error!r}") from None
        if fresh.prediction != row.prediction or not math.isclose(fresh.radius, row.radius, rel_tol=SAME, abs_tol=0.0):
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
        scale: what inputs are divided by; default 255 for integers, 1 for floats (with a warning, if they are beyond [-2, 2]).
    Returns:
        inputs (N, *shape) float32, and labels (N,) int64.
    Raises:
        ValueError: if there is nothing of the kind, or pictures differ in size.
        FileNotFoundError: if there is no such file.
    """
    found = Path(path)
    if found.is_dir():
        x, y = _picture_folder(found)
    elif found.suffix == ".npz":
        x, y = _arrays(found, ("x", "images"), ("y", "labels"))
    elif found.suffix == ".npy":
        beside = found.with_name(f"{found.stem}_labels.npy")
        if not beside.exists():
            raise ValueError(f"labels of {found} must be in {beside}, which does not exist")
        (x,), (y,) = (_arrays(part, (LONE,)) for part in (found, beside))
    else:
        raise ValueError(f"path must be an .npz, an .npy, or a folder of pictures, got {os.fspath(path)!r}")
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "iu" or x.ndim < 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(
            f"{found} must hold inputs (N, *shape) and one integer label each, got {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    if scale is None and x.dtype.kind == "f" and np.abs(x).max() > LARGEST:
        warnings.warn(
            f"inputs of {found} reach {np.abs(x).max():g}, and the noise is in their units: pass scale= (--scale 255 for floats in 0 .. "
            "255, --scale 1 if they are meant)",
            stacklevel=2,
        )
    divisor = (255.0 if x.dtype.kind in "iu" else 1.0) if scale is None else check_positive("scale", scale)
    return (x / divisor).astype(np.float32), y.astype(np.int64)


def _arrays(path: Path, *wanted: tuple[str, ...]) -> list[NDArray[Any]]:
    """Arrays of an .npz, each under one of several names, or the `LONE` one of an .npy; ValueError if they are not there."""
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            data = {LONE: found} if isinstance(found, np.ndarray) else dict(found)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no arrays that can be read without pickle: {error}") from None
    names = [next((name for name in choice if name in data), None) for choice in wanted]
    if None in names:
        raise ValueError(f"{path} must hold {' and '.join(' or '.join(choice) for choice in wanted)}, got {sorted(data)}")
    return [data[str(name)] for name in names]


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
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{file} must have 8 bits per channel, got mode {picture.mode}: convert it, or use an .npz")
            pixels = np.asarray(picture.convert("L" if picture.mode in ("L", "1") else "RGB"))
        pictures.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"pictures in {folder} must have one size, got {sorted(shapes)[:3]}")
    return np.stack(pictures), np.array([label for _, label in files])


def load_classifier(
    model: str, weights: str | os.PathLike[str] | None = None, device: str = "cpu", *, trust: bool = False
) -> torch.nn.Module:
    """A torch module by name.

    Args:
        model: "package.module:callable", whose result is a torch module or a class of one; or a TorchScript file (.pt, .pth).
        weights: a state_dict, loaded without running code.
        device: where to put it.
        trust: load a TorchScript file: it is a program, and may do whatever one can.
    Raises:
        ValueError: if the name leads nowhere, or to something else.
        UnsafeModelError: for a TorchScript file without trust.
    """
    if Path(model).suffix in (".pt", ".pth"):
        if not trust:
            raise UnsafeModelError(f"{model} is a program: pass trust=True (--trust) if you trust its author")
        module: Any = torch.jit.load(model, map_location=device)  # type: ignore[no-untyped-call]
    else:
        home, _, name = model.partition(":")
        if not home or not name:
            raise ValueError(f"model must be package.module:callable, or a TorchScript file, got {model!r}")
        try:
            made = getattr(importlib.import_module(home), name)
            module = made if isinstance(made, torch.nn.Module) else made()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"model {model!r} cannot be imported and called without arguments: {error}") from None
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"model {model!r} must give a torch.nn.Module, got {type(module).__name__}")
    if weights is not None:
        try:
            module.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        except (RuntimeError, UnpicklingError, TypeError) as error:
            raise ValueError(f"weights {os.fspath(weights)} are no state_dict of {model!r}: {error}") from None
    return module.to(device).eval()
