"""Random draws and array helpers, for numpy arrays and torch tensors alike."""

from __future__ import annotations

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
        fits = isinstance(generator, np.random.Generator)
    else:
        import torch

        fits = isinstance(generator, torch.Generator)
    if not fits:
        raise TypeError(f"generator must be of the frames' library ({type(x).__module__}), got {type(generator).__name__}")


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
        return generator.standard_normal(x.shape)
    import torch

    return torch.randn(x.shape, generator=generator, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def uniform(x: Any, generator: Any) -> Any:
    """U[0, 1) in double precision.

    The l1 proofs need draws that are continuous on the scale of the attack: single-precision ones lie on a grid of 2^-24,
    and an attacker could step across its points, in many entries, for next to nothing.
    """
    if isinstance(x, np.ndarray):
        return generator.random(x.shape)
    import torch

    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
    return torch.rand(x.shape, generator=generator, dtype=wide, device=x.device)


def rounded(y: Any, x: Frames) -> Frames:
    """`y` in the dtype of `x`: rounding after the noise is post-processing."""
    rounded: Frames = y.astype(x.dtype, copy=False) if isinstance(x, np.ndarray) else y.to(x.dtype)
    return rounded
