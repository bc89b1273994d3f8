"""Frozen observation normalisation: SB3's `VecNormalize` as plain numbers."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.errors import UnsafeModelError, check_finite_array, check_positive, check_real
from robustrl.files import write_atomically


@dataclass(frozen=True, eq=False)
class Normalization:
    """clip((x - mean) / sqrt(var + epsilon), -clip, clip), with statistics that no longer change.

    Args:
        mean: shape of one observation.
        var: variance, the same shape, >= 0.
        epsilon: added to the variance.
        clip: largest absolute value of a normalised entry.

    Raises:
        ValueError: if a number is not finite, negative, or the shapes differ.
    """

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    epsilon: float = 1e-8
    clip: float = 10.0

    def __post_init__(self) -> None:
        mean, var = check_finite_array("mean", self.mean), check_finite_array("var", self.var)
        if mean.shape != var.shape:
            raise ValueError(f"mean and var must have the same shape, got {mean.shape} and {var.shape}")
        if np.any(var < 0):
            raise ValueError(f"var must be >= 0, got {var.min()}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "var", var)
        object.__setattr__(self, "epsilon", check_positive("epsilon", self.epsilon))
        object.__setattr__(self, "clip", check_positive("clip", self.clip))
        if self.clip > float(np.finfo(np.float32).max):
            raise ValueError(f"clip must be at most {float(np.finfo(np.float32).max):g}, got {self.clip}")

    @classmethod
    def of(cls, source: Any, *, trust: bool = False) -> Normalization:
        """From a `Normalization`, an SB3 `VecNormalize`, a `normalization.npz`, or (trusted) a pickled `VecNormalize`.

        Raises:
            UnsafeModelError: for a pickle without `trust=True`: loading one runs code stored in it.
            FileNotFoundError: if there is no such file.
            ValueError: if a file is damaged, or it does not normalise observations, or not all keys of a dictionary.
            TypeError: for anything else.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if path.suffix == ".npz":
                return cls.load(path)
            if not path.exists():
                raise FileNotFoundError(f"no normalisation file {path}")
            if not trust:
                raise UnsafeModelError(
                    f"{path} is a pickle, and loading it would run code stored in it: pass --trust (trust=True) for a file of "
                    "your own, or save normalization.npz with Normalization.of(vec_normalize).save(...)"
                )
            import cloudpickle

            try:
                source = cloudpickle.loads(path.read_bytes())
            except (pickle.UnpicklingError, EOFError, ImportError, AttributeError) as error:
                raise ValueError(f"{path} is not a normalisation file ({error})") from None
        statistics = getattr(source, "obs_rms", None)
        if not hasattr(source, "clip_obs"):
            raise TypeError(f"normalization must be a Normalization, a VecNormalize or a file, got {type(source).__name__}")
        if not source.norm_obs or statistics is None:
            raise ValueError("this VecNormalize does not normalise observations (norm_obs=False)")
        if isinstance(statistics, dict):
            keys = list(source.observation_space.spaces)
            if set(keys) != set(statistics):
                raise ValueError(f"every key must be normalised, got {sorted(statistics)} of {sorted(keys)}")
            mean, var = (np.concatenate([np.ravel(getattr(statistics[k], name)) for k in keys]) for name in ("mean", "var"))
        else:
            mean, var = statistics.mean, statistics.var
        return cls(mean, var, float(source.epsilon), float(source.clip_obs))

    @property
    def scale(self) -> NDArray[np.float64]:
        """Size of one normalised unit in raw units, shape of one observation."""
        return np.sqrt(self.var + self.epsilon)

    def __call__(self, observations: ArrayLike) -> NDArray[np.float32]:
        """Normalised float32 copies of (n, *observation), the same bits as SB3's."""
        scaled = (np.asarray(observations) - self.mean) / self.scale
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalization) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(
            ((self.mean + 0.0).tobytes(), (self.var + 0.0).tobytes(), self.epsilon, self.clip)
        )  # + 0.0: -0.0 and 0.0 are equal

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return {"mean": self.mean.tolist(), "var": self.var.tolist(), "epsilon": self.epsilon, "clip": self.clip}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Normalization:
        """Inverse of `to_dict`.

        Raises:
            ValueError: if it is no normalisation.
        """
        try:
            return cls(
                check_finite_array("mean", data["mean"]),
                check_finite_array("var", data["var"]),
                check_real("epsilon", data["epsilon"]),
                check_real("clip", data["clip"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a normalisation: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `normalization.npz`, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean, var=self.var, epsilon=self.epsilon, clip=self.clip)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Normalization:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(data["mean"], data["var"], float(data["epsilon"]), float(data["clip"]))
        except FileNotFoundError:
            raise FileNotFoundError(f"no normalisation file {path}") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a normalisation file ({error})") from None
