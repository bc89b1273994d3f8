from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustrl import files
from robustrl.certify.certificate import Certificate
from robustrl.certify.episode import EpisodeCertificate
from robustrl.certify.returns import METHODS, certify_quantile, certify_return, certify_success, episode_budget
from robustrl.certify.storage import digest
from robustrl.errors import CertificateError
from robustrl.noise import Ablation, Gaussian, Laplace, Splitting, Uniform
from robustrl.threat import ThreatModel

BUDGETS = [0.0, 0.25, 0.5, math.inf]


def sample(n: int = 120) -> np.ndarray:
    return np.random.default_rng(3).binomial(20, 0.8, n).astype(float)


def mean_certificate(**options: Any) -> EpisodeCertificate:
    options = {"return_low": 0, "return_high": 20, **options}
    return certify_return(sample(), Gaussian(0.5), BUDGETS, **options)


CERTIFICATES = {
    **{method: (lambda method=method: mean_certificate(method=method)) for method in METHODS},
    "pointwise": lambda: mean_certificate(simultaneous=False),
    "anytime": lambda: mean_certificate(method="betting", n_planned=500),
    "no upper bound": lambda: mean_certificate(return_high=None),
    "per feature": lambda: certify_return(sample(), Gaussian([0.1, 0.0, 0.3]), BUDGETS, return_low=0),
    "success": lambda: certify_success(70, 80, Laplace(0.5), BUDGETS),
    "quantile": lambda: certify_quantile(sample(), 0.5, Uniform(0.5), BUDGETS),
    "splitting": lambda: certify_return(sample(), Splitting(0.5), BUDGETS, return_low=0),
    "ablation": lambda: certify_return(sample(), Ablation(0.1), [0, 1, 2], return_low=0),
    "everything": lambda: dataclasses.replace(
        certify_return(sample(), Gaussian(0.5), [0.4], return_low=1),
        threat={
            "converted_from": [ThreatModel(norm=2, step=0.1, mask=(True, False)).to_dict()],
            "horizon": 16,
            "n_features": 2,
        },
    ).with_provenance(
        policy_hash="ab" * 32, seed=7, chunk_size=64, recipe={"id": "CartPole-v1", "stack": None}, versions=["1.0", 2.5]
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "certificate.json"


@pytest.mark.parametrize("name", CERTIFICATES)
def test_file_gives_the_same_certificate_back_and_it_recomputes(name: str, path: Path) -> None:
    certificate = CERTIFICATES[name]()
    certificate.save(path)
    for kind in (Certificate, EpisodeCertificate):
        loaded = kind.load(path)
        assert type(loaded) is EpisodeCertificate
        assert loaded == certificate
        assert hash(loaded) == hash(certificate)
    for field in dataclasses.fields(certificate):
        mine, theirs = getattr(certificate, field.name), getattr(loaded, field.name)
        assert np.array_equal(mine, theirs, equal_nan=True) if isinstance(mine, np.ndarray) else mine == theirs
    loaded.verify()
    assert os.listdir(path.parent) == [path.name]
    assert len(json.loads(path.read_text())["digest"]) == 64


def test_arrays_are_read_only_and_copies() -> None:
    returns = sample()
    certificate = certify_return(returns, Gaussian(0.5), BUDGETS, return_low=0)
    returns[0] = 0.0
    assert certificate.evidence[0] != 0.0
    for array in (certificate.budgets, certificate.values, certificate.plug_in, certificate.evidence):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.alpha = 0.5  # type: ignore[misc]


def test_different_certificates_are_not_equal() -> None:
    certificate = mean_certificate()
    assert certificate != certificate.with_provenance(seed=1)
    assert certificate != dataclasses.replace(certificate, alpha=0.04)
    assert certificate != "certificate"
    assert certificate.with_provenance(seed=1).with_provenance(device="cpu").provenance == {"seed": 1, "device": "cpu"}
    swapped = np.array(certificate.evidence)[::-1]
    assert certificate != dataclasses.replace(certificate, evidence=swapped)


# ---- edited files ------------------------------------------------------------------------------------------------


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(data, dict) and data:
        return [leaf for key in data for leaf in leaves(data[key], (*path, key))]
    if isinstance(data, list) and data:
        return [leaf for i, item in enumerate(data) for leaf in leaves(item, (*path, i))]
    return [path]


def edited(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    result = copy.deepcopy(document)
    target = result
    for key in path[:-1]:
        target = target[key]
    old = target[path[-1]]
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int):
        new = old + 1
    elif isinstance(old, float):
        new = float(np.nextafter(old, math.inf))
    elif isinstance(old, str):
        new = old[:-1] + ("0" if old[-1] != "0" else "1")
    else:
        new = 1.0
    target[path[-1]] = new
    return result


@pytest.mark.parametrize("name", ["everything", "anytime", "success", "quantile", "per feature"])
def test_any_edited_field_is_detected_down_to_the_last_bit(name: str, path: Path) -> None:
    CERTIFICATES[name]().save(path)
    document = json.loads(path.read_text())
    places = leaves(document)
    assert len(places) > 20
    for place in places:
        path.write_text(json.dumps(edited(document, place)))
        with pytest.raises(CertificateError, match=r"certificate\.json"):
            EpisodeCertificate.load(path)


def test_any_edited_character_of_the_evidence_is_detected(path: Path) -> None:
    mean_certificate().save(path)
    document = json.loads(path.read_text())
    data = document["evidence"]["data"]
    for i in range(len(data)):
        changed = copy.deepcopy(document)
        changed["evidence"]["data"] = data[:i] + ("A" if data[i] != "A" else "B") + data[i + 1 :]
        path.write_text(json.dumps(changed))
        with pytest.raises(CertificateError):
            EpisodeCertificate.load(path)


def forge(path: Path, **changes: Any) -> None:
    """Edit fields and recompute the digest, as a forger would."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**document, "digest": digest(document)}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("values", [20.0, 19.0, 18.0, 0.0]),
        ("plug_in", [20.0, 19.0, 18.0, 0.0]),
        ("alpha", 0.01),
        ("method", "band"),
        ("noise", {"kind": "Gaussian", "sigma": 1.0}),
        ("budgets", [0.0, 0.5, 1.0, "inf"]),
        ("return_low", -1.0),
        ("return_low", None),
        ("return_high", 25.0),
        ("simultaneous", False),
        ("not_covered", []),
    ],
)
def test_forged_digest_does_not_help(field: str, value: Any, path: Path) -> None:
    certificate = mean_certificate(alpha=0.05)
    certificate.save(path)
    forge(path, **{field: value})
    loaded = EpisodeCertificate.load(path)
    with pytest.raises(CertificateError, match=r"field|recomputed"):
        loaded.verify()


def test_forged_values_are_caught_for_every_statistic(path: Path) -> None:
    for name in ("paper", "dkw", "band", "betting", "hybrid", "anytime", "success", "quantile", "ablation"):
        certificate = CERTIFICATES[name]()
        higher = np.nan_to_num(certificate.values, nan=1.0) + 1e-6
        forged = dataclasses.replace(certificate, values=higher)
        forged.save(path)
        with pytest.raises(CertificateError, match="field 'values'"):
            EpisodeCertificate.load(path).verify()
        forged = dataclasses.replace(certificate, plug_in=np.nan_to_num(certificate.plug_in, nan=1.0) + 1e-6)
        with pytest.raises(CertificateError, match="field 'plug_in'"):
            forged.verify()


def test_forged_evidence_or_flags_are_caught(path: Path) -> None:
    certificate = mean_certificate(method="betting")
    with pytest.raises(CertificateError, match=r"field|recomputed"):
        dataclasses.replace(certificate, n_planned=1000).verify()
    with pytest.raises(CertificateError, match="plug_in"):
        dataclasses.replace(certificate, evidence=np.maximum(certificate.evidence, 15)).verify()
    with pytest.raises(CertificateError, match="cannot be recomputed"):
        dataclasses.replace(certificate, return_low=15.0).verify()
    band = mean_certificate(method="band")
    with pytest.raises(CertificateError, match="simultaneous"):
        dataclasses.replace(band, simultaneous=False).verify()
    with pytest.raises(CertificateError, match="field 'not_covered' leaves out: Attackers"):
        dataclasses.replace(band, not_covered=band.not_covered[1:]).verify()
    dataclasses.replace(band, not_covered=(*band.not_covered, "Broken cameras.")).verify()
    success = CERTIFICATES["success"]()
    with pytest.raises(CertificateError, match="cannot be recomputed"):
        dataclasses.replace(success, evidence=90).verify()
    with pytest.raises(CertificateError, match="method"):
        dataclasses.replace(success, method="bayes").verify()


# ---- damaged files -----------------------------------------------------------------------------------------------


def test_missing_and_unknown_fields_are_named(path: Path) -> None:
    mean_certificate().save(path)
    document = json.loads(path.read_text())
    for name in document:
        path.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        with pytest.raises(CertificateError, match=f"certificate\\.json: field '{name}'"):
            Certificate.load(path)
    for name in ("extra", "episodes"):
        path.write_text(json.dumps({**document, name: 1}))
        with pytest.raises(CertificateError, match=f"certificate\\.json: field '{name}' is not known"):
            Certificate.load(path)
    for name in ("encoding", "n", "sha256", "data"):
        inner = {key: value for key, value in document["evidence"].items() if key != name}
        path.write_text(json.dumps({**document, "evidence": inner}))
        with pytest.raises(CertificateError, match=f"field 'evidence\\.{name}' is missing"):
            Certificate.load(path)


WRONG: list[tuple[str, Any]] = [
    ("alpha", "0.05"),
    ("alpha", 1),
    ("alpha", 0.7),
    ("alpha", -0.1),
    ("noise", "Gaussian"),
    ("noise", {"kind": "Cauchy"}),
    ("noise", {"kind": ["Gaussian"]}),
    ("noise", {"kind": "Gaussian", "sigma": 0.5, "mean": 1.0}),
    ("noise", {"kind": "Gaussian", "sigma": 10**400}),
    ("not_covered", "nothing"),
    ("not_covered", [1]),
    ("threat", []),
    ("provenance", None),
    ("statistic", "median"),
    ("statistic", 1),
    ("statistic", "success"),
    ("statistic", "quantile"),
    ("budgets", []),
    ("budgets", [0.0, 0.25, 0.5]),
    ("budgets", [0.0, 0.25, 0.5, -1.0]),
    ("budgets", [0.0, 0.25, 0.5, None]),
    ("budgets", [0.0, 0.25, 0.5, True]),
    ("budgets", [0.0, 0.25, 0.5, [1.0]]),
    ("values", [1.0, 1.0, 1.0, None]),
    ("values", [1.0, 1.0, 1.0, "inf"]),
    ("values", [1.0]),
    ("values", "1"),
    ("plug_in", {"0": 1.0}),
    ("method", None),
    ("simultaneous", 1),
    ("anytime", "no"),
    ("anytime", True),
    ("n", 120.0),
    ("n", True),
    ("n", 119),
    ("n", 0),
    ("n_planned", 1.5),
    ("evidence", {"successes": 4}),
    ("evidence", []),
    ("quantile", 0.5),
    ("return_low", 0),
    ("return_low", "0"),
    ("return_high", [20.0]),
    ("schema", 2),
    ("schema", "1"),
    ("schema", True),
    ("kind", "UnknownCertificate"),
    ("kind", "Certificate"),
    ("kind", 1),
    ("digest", 7),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={value!r:.40}" for field, value in WRONG])
def test_mistyped_fields_are_refused_even_under_a_valid_digest(field: str, value: Any, path: Path) -> None:
    mean_certificate().save(path)
    if field == "digest":
        path.write_text(json.dumps({**json.loads(path.read_text()), "digest": value}))
    else:
        forge(path, **{field: value})
    with pytest.raises(CertificateError, match=r"certificate\.json") as caught:
        Certificate.load(path)
    assert field.rstrip("s") in str(caught.value) or field in ("statistic", "n")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str, path: Path) -> None:
    mean_certificate().save(path)
    path.write_text(path.read_text().replace('"alpha": 0.05', f'"alpha": {number}'))
    with pytest.raises(CertificateError, match=r"certificate\.json: .*not a number"):
        Certificate.load(path)


def test_truncated_files_are_refused(path: Path) -> None:
    mean_certificate().save(path)
    whole = path.read_bytes()
    for length in [0, 1, 10, len(whole) // 2, len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(CertificateError, match=r"certificate\.json: not a complete JSON file"):
            Certificate.load(path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"hello", b"[1, 2]", b"3", b"null", b"[" * 100_000, b"PK\x03\x04", b'{"schema": 1' + b"0" * 5000 + b"}"],
)
def test_other_files_are_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(CertificateError, match=r"certificate\.json"):
        Certificate.load(path)


def test_repeated_fields_are_refused(path: Path) -> None:
    mean_certificate().save(path)
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.05, "alpha": 0.01'))
    with pytest.raises(CertificateError, match="'alpha' occurs twice"):
        Certificate.load(path)


def test_missing_file_is_an_os_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Certificate.load(path)


@pytest.mark.parametrize(
    ("raw", "n"),
    [
        (zlib.compress(bytes(50_000_000)), 10),  # unpacks to 50 MB
        (zlib.compress(bytes(80))[:-3], 10),
        (zlib.compress(bytes(80)) + b"more", 10),
        (zlib.compress(bytes(72)), 10),
        (zlib.compress(bytes(80)), 10**12),
        (zlib.compress(bytes(80)), -1),
        (b"no zlib", 10),
    ],
    ids=["bomb", "cut off", "trailing", "short", "huge", "negative", "not packed"],
)
def test_evidence_that_does_not_unpack_to_n_returns_is_refused(raw: bytes, n: int, path: Path) -> None:
    mean_certificate().save(path)
    evidence = json.loads(path.read_text())["evidence"]
    forge(path, evidence={**evidence, "n": n, "data": base64.b64encode(raw).decode()})
    with pytest.raises(CertificateError, match=r"certificate\.json: field 'evidence\."):
        Certificate.load(path)


def test_packed_bomb_is_not_unpacked(path: Path) -> None:
    mean_certificate().save(path)
    evidence = json.loads(path.read_text())["evidence"]
    forge(path, evidence={**evidence, "data": base64.b64encode(zlib.compress(bytes(50_000_000))).decode()})
    tracemalloc.start()
    try:
        with pytest.raises(CertificateError, match="exactly 120 returns"):
            Certificate.load(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_evidence_with_other_returns_under_the_same_hash_is_refused(path: Path) -> None:
    mean_certificate().save(path)
    evidence = json.loads(path.read_text())["evidence"]
    other = base64.b64encode(zlib.compress(np.full(120, 20.0).astype("<f8").tobytes())).decode()
    forge(path, evidence={**evidence, "data": other})
    with pytest.raises(CertificateError, match=r"evidence\.sha256"):
        Certificate.load(path)


def test_other_kinds_of_certificate_are_refused_by_class(path: Path) -> None:
    mean_certificate().save(path)

    class StoneCertificate(EpisodeCertificate):
        pass

    try:
        with pytest.raises(CertificateError, match=r"field 'kind' must be one of \['StoneCertificate'\]"):
            StoneCertificate.load(path)
    finally:
        del Certificate.kinds["StoneCertificate"]


# ---- full disks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["replace", "fsync", "write"])
@pytest.mark.parametrize("output", ["save", "plot"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    failing: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / ("certificate.json" if output == "save" else "certificate.svg")
    certificate = mean_certificate()
    getattr(certificate, output)(target)
    before = target.read_bytes()

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    if failing == "write":

        def half_open(file: Any, mode: str) -> Any:
            stream = open(file, mode)  # noqa: SIM115
            write = stream.write
            wrapper = type("Stream", (), {"__enter__": lambda self: self, "__exit__": lambda self, *_: stream.close()})()
            wrapper.write = lambda data: (write(data[: len(data) // 2]), full())
            return wrapper

        monkeypatch.setattr(files, "open", half_open, raising=False)
    else:
        monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(OSError, match="No space"):
        getattr(certificate.with_provenance(seed=9), output)(target)
    monkeypatch.undo()
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == [target.name]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    certificate = mean_certificate()
    certificate.save(tmp_path / "new" / "folder" / "certificate.json")
    assert EpisodeCertificate.load(tmp_path / "new" / "folder" / "certificate.json") == certificate


# ---- reading it --------------------------------------------------------------------------------------------------


def test_value_at_rounds_the_budget_up() -> None:
    certificate = certify_return(sample(), Gaussian(0.5), [0.5, 0.0, 0.25], return_low=1)
    assert certificate.value_at(0) == certificate.values[1]
    assert certificate.value_at(0.1) == certificate.value_at(0.25) == certificate.values[2]
    assert certificate.value_at(0.250001) == certificate.values[0]
    assert certificate.value_at(0.51) == certificate.value_at(math.inf) == 1.0
    assert math.isnan(certify_quantile(sample(), 0.5, Gaussian(0.5), [0.0]).value_at(0.1))
    assert certify_success(5, 9, Gaussian(0.5), [0.0]).value_at(0.1) == 0.0
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="budget"):
            certificate.value_at(bad)


def test_table_says_what_it_holds() -> None:
    text = mean_certificate().table()
    assert all(
        part in text for part in ("mean return", "Gaussian(sigma=0.5)", "95%", "n = 120", "all budgets at once", "hybrid")
    )
    assert all(part in text for part in ("l2 budget", "certified", "plug-in", "estimate"))
    assert len(text.splitlines()) == 5 + len(BUDGETS)
    assert "taken as sure: every episode returns at least" in text
    assert "pointwise" in CERTIFICATES["pointwise"]().table()
    assert "stopped at will" in CERTIFICATES["anytime"]().table()
    assert "none" in CERTIFICATES["quantile"]().table()
    assert "0.5-quantile" in CERTIFICATES["quantile"]().table()
    assert "99.9%" in mean_certificate(alpha=0.001).table()


@pytest.mark.parametrize("name", ["hybrid", "success", "quantile", "ablation"])
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_plot_writes_a_file_without_a_display(name: str, suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"curve{suffix}"
    CERTIFICATES[name]().plot(target)
    start = target.read_bytes()[:5]
    assert start.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])


def test_plot_refuses_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffix"):
        mean_certificate().plot(tmp_path / "curve.docx")


def test_axes_are_labelled() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    mean_certificate().draw(axes)
    assert "budget (l2)" in axes.get_xlabel()
    assert "mean return" in axes.get_ylabel()
    assert "95%" in axes.get_legend().get_texts()[0].get_text()
    assert np.isfinite(axes.get_lines()[0].get_xdata()).all()


def test_limits_of_the_certificate_are_listed() -> None:
    plain = mean_certificate().not_covered
    assert len(plain) == 6
    assert any("features [1]" in sentence for sentence in CERTIFICATES["per feature"]().not_covered)
    assert not any("Stopping" in sentence for sentence in CERTIFICATES["anytime"]().not_covered)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"provenance": {"when": math.nan}}, ValueError),
        ({"provenance": {"when": {1, 2}}}, ValueError),
        ({"provenance": {1: "one"}}, ValueError),
        ({"provenance": ["seed"]}, TypeError),
        ({"threat": "l2"}, TypeError),
        ({"not_covered": "nothing"}, TypeError),
        ({"noise": "Gaussian"}, TypeError),
        ({"alpha": 0.6}, ValueError),
        ({"values": [1.0, math.nan, 1.0, 1.0]}, ValueError),
        ({"values": [1.0]}, ValueError),
        ({"budgets": [0.0, 0.1, 0.2, -0.1]}, ValueError),
        ({"evidence": [1.0]}, ValueError),
        ({"simultaneous": 1}, TypeError),
        ({"statistic": "quantile"}, ValueError),
    ],
    ids=str,
)
def test_nonsense_cannot_be_put_into_a_certificate(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        dataclasses.replace(mean_certificate(), **changes)


def test_a_huge_return_does_not_widen_the_tolerance_of_verify() -> None:
    returns = np.concatenate([np.random.default_rng(0).uniform(0, 1, 999), [1e12]])
    certificate = certify_return(returns, Gaussian(0.2), [0.0, 0.2], return_low=0)
    certificate.verify()
    with pytest.raises(CertificateError, match="values"):
        dataclasses.replace(certificate, values=certificate.values + 1e-3).verify()


def test_a_threat_must_stand_for_the_budgets() -> None:
    threat = ThreatModel(norm=math.inf, step=0.001)
    sizes = {"horizon": 200, "n_features": 4}
    budget = episode_budget(Gaussian(0.5), threat, **sizes)
    certificate = dataclasses.replace(
        certify_return(sample(), Gaussian(0.5), [budget], return_low=1), threat={"converted_from": [threat.to_dict()], **sizes}
    )
    certificate.verify()
    larger = {"converted_from": [ThreatModel(norm=math.inf, step=0.01).to_dict()], **sizes}
    for forged in (larger, {"converted_from": []}, {**larger, "horizon": 1}, {"norm": 2}):
        with pytest.raises(CertificateError, match="threat"):
            dataclasses.replace(certificate, threat=forged).verify()


def test_the_noise_must_be_the_recorded_environments() -> None:
    certificate = certify_return(sample(), Gaussian(0.5), [0.1], return_low=1).with_provenance(
        recipe={"noise": Gaussian(0.05).to_dict()}
    )
    with pytest.raises(CertificateError, match="noise"):
        certificate.verify()
