"""The artifacts: a bound together with the evidence that it can be recomputed from."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from robustrl.certify.storage import (
    SCHEMA,
    Fields,
    canonical,
    digest,
    plain_data,
    read_document,
)
from robustrl.errors import CertificateError
from robustrl.files import write_atomically

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate(ABC):
    """A bound, its evidence and its limits. Two certificates are equal if their files would be.

    Args:
        alpha: failure probability, in (0, 0.5]; 0 where nothing was sampled.
        not_covered: what the certificate does not cover, in sentences.
        threat: the threat model that the caller asked for (`ThreatModel.to_dict`), or None.
        provenance: plain data about the rollouts: policy hash, recipe, seed, engine, device, versions, ...
    """

    alpha: float
    not_covered: tuple[str, ...]
    threat: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    kinds: ClassVar[dict[str, type[Certificate]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Certificate.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        if type(self.not_covered) not in (tuple, list) or not all(isinstance(item, str) for item in self.not_covered):
            raise TypeError(f"not_covered must be sentences, got {self.not_covered!r}")
        object.__setattr__(self, "not_covered", tuple(self.not_covered))
        for name in ("threat", "provenance"):
            value = getattr(self, name)
            if value is not None or name == "provenance":
                if not isinstance(value, dict):
                    raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
                object.__setattr__(self, name, plain_data(name, value))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> str:
        document = self._document()
        document["evidence"] = {**document["evidence"], "data": None}  # compressors differ; the hash of the returns stays
        return canonical(document)

    @abstractmethod
    def _specific(self) -> dict[str, Any]:
        """The fields of the subclass as plain data."""

    @classmethod
    @abstractmethod
    def _from_specific(cls, fields: Fields, common: dict[str, Any]) -> Self:
        """The inverse of `_specific`."""

    @abstractmethod
    def verify(self) -> None:
        """Recompute the bound from the evidence; CertificateError names the first field that differs."""

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": type(self).__name__,
            "alpha": self.alpha,
            "not_covered": list(self.not_covered),
            "threat": self.threat,
            "provenance": self.provenance,
            **self._specific(),
        }

    def with_provenance(self, **items: Any) -> Self:
        """A copy with more plain data about where the evidence comes from."""
        return replace(self, provenance={**self.provenance, **items})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, atomically: a failure leaves the old file, if any, untouched.

        Raises:
            OSError: if the file cannot be written.
        """
        document = self._document()
        text = json.dumps({**document, "digest": digest(document)}, indent=1, allow_nan=False)
        write_atomically(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a certificate of this class (`Certificate.load`: of any class) and check it against its digest.

        Raises:
            OSError: if the file cannot be read.
            CertificateError: if a field is missing, unknown, of the wrong type or out of range, or the file was edited;
                the message names the file and the field.
        """
        import robustrl.certify.deterministic
        import robustrl.certify.episode
        import robustrl.certify.radius
        import robustrl.certify.safe_set  # noqa: F401  (all kinds register themselves)

        document = read_document(path)
        source = os.fspath(path)
        fields = Fields(source, document)
        fields.take("schema", int)
        name, stated = fields.take("kind", str), fields.take("digest", str)
        kind = Certificate.kinds.get(name)
        if kind is None or not issubclass(kind, cls):
            expected = sorted(key for key, value in Certificate.kinds.items() if issubclass(value, cls))
            raise fields.error("kind", f"must be one of {expected}, got {name!r}")
        common: dict[str, Any] = {"alpha": fields.take("alpha", float)}
        common["not_covered"] = tuple(fields.take("not_covered", list))
        common["threat"] = fields.take("threat", dict, type(None))
        common["provenance"] = fields.take("provenance", dict)
        try:
            certificate = kind._from_specific(fields, common)
        except CertificateError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise CertificateError(f"{source}: {error}") from None
        if stated != digest(document):
            raise fields.error("digest", "does not match the file: it was edited or damaged")
        return certificate
