"""Certificate files: strict JSON in, strict JSON out, nothing half written."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustrl.errors import CertificateError
from robustrl.noise import noise_from_dict

Floats = NDArray[np.float64]

SCHEMA = 1
ENCODING = "base64(zlib(float64 little-endian))"
MOST_RETURNS = 20_000_000
"""A file may unpack to 160 MB and no more, whatever it claims."""


def canonical(data: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces, shortest floats, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plain_data(name: str, value: Any) -> Any:
    """A deep copy of JSON data as reading it back would give it; ValueError for anything else, NaN included."""
    try:
        copy = json.loads(canonical(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain JSON data (text, finite numbers, lists, dicts): {error}") from None
    if not _text_keys(value):
        raise ValueError(f"{name} must be plain JSON data: a key is not text")
    return copy


def _text_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _text_keys(item) for key, item in value.items())
    return all(map(_text_keys, value)) if isinstance(value, list | tuple) else True


def digest(document: dict[str, Any]) -> str:
    """sha256 of everything but the digest itself."""
    return hashlib.sha256(canonical({key: value for key, value in document.items() if key != "digest"}).encode()).hexdigest()


def encode_floats(values: Floats) -> list[float | str | None]:
    """A list for JSON: inf as "inf", NaN as null."""
    return [None if math.isnan(x) else "inf" if x == math.inf else x for x in values.tolist()]


def encode_returns(returns: Floats) -> dict[str, Any]:
    """Returns in run order, exactly."""
    if returns.size > MOST_RETURNS:
        raise ValueError(f"returns must be at most {MOST_RETURNS} to be stored in a certificate, got {returns.size}")
    return {"encoding": ENCODING, "n": returns.size, **pack(returns.astype("<f8").tobytes(), 9)}


def pack(raw: bytes, level: int = 6) -> dict[str, str]:
    """Bytes as two fields of a document, for `Fields.unpack`."""
    packed = base64.b64encode(zlib.compress(raw, level)).decode("ascii")
    return {"sha256": hashlib.sha256(raw).hexdigest(), "data": packed}


class Fields:
    """The fields of a certificate file, taken one by one; every complaint names the file and the field."""

    def __init__(self, source: str, data: dict[str, Any], prefix: str = "") -> None:
        self._source, self._data, self._prefix = source, dict(data), prefix

    def error(self, name: str, problem: str) -> CertificateError:
        return CertificateError(f"{self._source}: field {self._prefix + name!r} {problem}")

    def take(self, name: str, *kinds: type) -> Any:
        """Remove and return a field of exactly one of `kinds`."""
        if name not in self._data:
            raise self.error(name, "is missing")
        value = self._data.pop(name)
        if type(value) not in kinds:
            allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise self.error(name, f"must be {allowed}, got {type(value).__name__}")
        return value

    def inner(self, name: str) -> Fields:
        """The fields of a field."""
        return Fields(self._source, self.take(name, dict), f"{self._prefix}{name}.")

    def floats(self, name: str, *, missing: bool = False) -> Floats:
        """A list of numbers, "inf" for infinity and, if allowed, null for NaN."""
        items = self.take(name, list)
        for item in items:
            if type(item) is not float and item != "inf" and not (missing and item is None):
                raise self.error(name, f"must hold numbers, got {item!r}")
        return np.array([math.nan if item is None else math.inf if item == "inf" else item for item in items], dtype=np.float64)

    def returns(self, name: str) -> Floats:
        """The inverse of `encode_returns`."""
        inner = self.inner(name)
        if inner.take("encoding", str) != ENCODING:
            raise inner.error("encoding", f"must be {ENCODING!r}")
        n = inner.take("n", int)
        if not 1 <= n <= MOST_RETURNS:
            raise inner.error("n", f"must lie in 1..{MOST_RETURNS}, got {n}")
        raw = inner.unpack(8 * n, f"{n} returns")
        inner.finish()
        return np.frombuffer(raw, dtype="<f8").astype(np.float64)

    def unpack(self, size: int, what: str) -> bytes:
        """The inverse of `pack`; never more than `size` bytes are unpacked."""
        expected, packed = self.take("sha256", str), self.take("data", str)
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(base64.b64decode(packed, validate=True), size + 1)
        except (zlib.error, binascii.Error, ValueError, OverflowError) as error:
            raise self.error("data", f"cannot be unpacked: {error}") from None
        if len(raw) != size or not unpacker.eof or unpacker.unused_data:
            raise self.error("data", f"does not hold exactly {what}")
        if hashlib.sha256(raw).hexdigest() != expected:
            raise self.error("sha256", f"does not match the {what.split()[-1]}")
        return raw

    def successes(self, name: str) -> int:
        """The success count that stands in for returns."""
        inner = Fields(self._source, self.take(name, dict), f"{self._prefix}{name}.")
        count: int = inner.take("successes", int)
        inner.finish()
        return count

    def noise(self, name: str, *, missing: bool = False) -> Any:
        """A noise mechanism or, if allowed, None."""
        data = self.take(name, dict, type(None)) if missing else self.take(name, dict)
        try:
            return None if data is None else noise_from_dict(data)
        except CertificateError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise self.error(name, f"is not a mechanism: {error}") from None

    def finish(self) -> None:
        """Refuse what nobody has taken."""
        if self._data:
            raise self.error(sorted(self._data)[0], "is not known")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file (`object_pairs_hook`); CertificateError if a key occurs twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise CertificateError(f"field {max(keys, key=keys.count)!r} occurs twice")
    return dict(pairs)


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a certificate file and check its schema version; the digest is for the caller, after the fields."""
    source = os.fspath(path)

    def constant(text: str) -> Any:
        raise CertificateError(f"{text} is not a number that a certificate may hold")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    try:
        document = json.loads(
            Path(path).read_bytes().decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=constant, parse_float=number
        )
    except CertificateError as error:
        raise CertificateError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"{source}: not a complete JSON file: {error}") from None
    if not isinstance(document, dict):
        raise CertificateError(f"{source}: a certificate is a JSON object, got {type(document).__name__}")
    if type(document.get("schema")) is not int or document["schema"] != SCHEMA:
        raise CertificateError(f"{source}: field 'schema' must be {SCHEMA}, got {document.get('schema')!r}")
    return document
