"""Random draws and array helpers, for numpy arrays and torch tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from robustrl.noise.base import Frames


def check_frames(x: Any, generator: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"noise needs frames as a numpy array or torch tensor, got {type(x).__name__}")
    if "float" not in str(x.dtype):
        raise ValueError(
            f"noise needs frames of a floating dtype, got {x.dtype}: integers would round and wrap around; "
            "convert and scale the observation first"
        )
    if x.ndim < 2:
        raise ValueError(f"noise needs a batch of frames (n, *frame), got shape {tuple(x.shape)}")
    if isinstance(x, np.ndarray):
        kind: type = np.random.Generator
    else:
        import torch

        kind = torch.Generator
    one_per_row = isinstance(generator, list)
    for one in generator if one_per_row else (generator,):
        if not isinstance(one, kind):
            raise TypeError(f"generator must be of the frames' library ({type(x).__module__}), got {type(one).__name__}")
    if one_per_row and len(generator) != len(x):
        raise ValueError(f"generator must be one, or a list of one per frame; got {len(generator)} for {len(x)} frames")


def namespace(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def like(value: Any, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.asarray(value, dtype=x.dtype)
    import torch

    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def standard_normal(x: Any, generator: Any) -> Any:
    """N(0, 1) in double precision for arrays, in at least single precision for tensors (doubles are slow on many GPUs)."""
    if isinstance(x, np.ndarray):
        return _filled(np.empty(x.shape), generator, lambda out, one: one.standard_normal(out=out))
    import torch

    drawn = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return _filled(drawn, generator, lambda out, one: out.normal_(generator=one))


def uniform(x: Any, generator: Any) -> Any:
    """U[0, 1) in double precision.

    The l1 proofs need draws that are continuous on the scale of the attack: single-precision ones lie on a grid of 2^-24,
    and an attacker could step across its points, in many entries, for next to nothing.
    """
    if isinstance(x, np.ndarray):
        return _filled(np.empty(x.shape), generator, lambda out, one: one.random(out=out))
    import torch

    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
    return _filled(x.new_empty(x.shape, dtype=wide), generator, lambda out, one: out.uniform_(generator=one))


BITS = 60
"""Of every random integer: 2^60 divides 2^64, so that both libraries' integers below it are exactly uniform."""


def integers(x: Any, generator: Any) -> Any:
    """Uniform integers in [0, 2^60), int64, in the shape of `x`."""
    if isinstance(x, np.ndarray):

        def fill(out: Any, one: Any) -> None:
            out[...] = one.integers(2**BITS, size=out.shape)

        return _filled(np.empty(x.shape, dtype=np.int64), generator, fill)
    import torch

    drawn = x.new_empty(x.shape, dtype=torch.int64)
    return _filled(drawn, generator, lambda out, one: out.random_(0, 2**BITS, generator=one))


def _filled(drawn: Any, generator: Any, fill: Callable[[Any, Any], Any]) -> Any:
    """`drawn`, filled by one generator, or row by row by one each."""
    if isinstance(generator, list):
        for row, one in zip(drawn, generator, strict=True):
            fill(row, one)
    else:
        fill(drawn, generator)
    return drawn


def rounded(y: Any, x: Frames) -> Frames:
    """`y` in the dtype of `x`: rounding after the noise is post-processing."""
    rounded: Frames = y.astype(x.dtype, copy=False) if isinstance(x, np.ndarray) else y.to(x.dtype)
    return rounded
