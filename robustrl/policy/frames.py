"""Frame stacks: plain arrays of shape (n, k, *frame), oldest frame first, in numpy or torch."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustrl.errors import check_choice

Padding = Literal["reset", "zero"]
Array = TypeVar("Array", NDArray[Any], Tensor)


def frame_shape(observation_shape: tuple[int, ...], n_frames: int) -> tuple[int, ...]:
    """Shape of one frame of a stacked observation: stacked on a new first axis, or along the last axis as SB3 does.

    Raises:
        ValueError: if the observation cannot hold `n_frames` frames.
    """
    if n_frames == 1:
        return observation_shape
    if len(observation_shape) > 1 and observation_shape[0] == n_frames:
        return observation_shape[1:]
    if observation_shape and observation_shape[-1] % n_frames == 0:
        return (*observation_shape[:-1], observation_shape[-1] // n_frames)
    raise ValueError(f"observations of shape {observation_shape} cannot hold {n_frames} stacked frames")


def start_stack(frames: Array, n_frames: int, padding: Padding = "reset") -> Array:
    """Frame stacks at the start of episodes: (n, *frame) -> (n, n_frames, *frame).

    "reset" repeats the first (already noisy) frame, as Gymnasium does; "zero" fills with zeros, as SB3's VecFrameStack does.
    """
    check_choice("padding", padding, ("reset", "zero"))
    shape = (len(frames), n_frames, *frames.shape[1:])
    stack: Array
    if isinstance(frames, np.ndarray):
        stack = np.broadcast_to(frames[:, None], shape).copy()
    else:
        stack = frames.unsqueeze(1).expand(shape).clone()
    if padding == "zero":
        stack[:, :-1] = 0
    return stack


def push_frame(stack: Array, frames: Array) -> Array:
    """Drop the oldest frame, append the newest; (n, k, *frame), (n, *frame) -> (n, k, *frame)."""
    if isinstance(stack, np.ndarray):
        return np.concatenate((stack[:, 1:], frames[:, None]), axis=1)
    return torch.cat((stack[:, 1:], frames.unsqueeze(1)), dim=1)


def fold_frames(stack: Array, observation_shape: tuple[int, ...]) -> Array:
    """(n, k, *frame) -> (n, *observation_shape), in the layout that `frame_shape` recognises."""
    n, k, *frame = stack.shape
    if tuple(frame) == observation_shape and k == 1:
        return stack.reshape(n, *frame)
    if (k, *frame) == observation_shape:
        return stack
    if not frame or (*frame[:-1], k * frame[-1]) != observation_shape:
        raise ValueError(
            f"a stack of {k} frames of shape {tuple(frame)} does not fit observations of shape {observation_shape}"
        )
    if isinstance(stack, np.ndarray):
        return np.moveaxis(stack, 1, -2).reshape(n, *observation_shape)
    return stack.movedim(1, -2).reshape(n, *observation_shape)
