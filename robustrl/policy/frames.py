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


def stacked_shape(frame: tuple[int, ...], n_frames: int) -> tuple[int, ...]:
    """Shape of an observation of `n_frames` stacked frames, in the layout that Stable-Baselines3's networks take.

    Vectors and images with channels last are joined along the last axis, images with channels first along the first, plain
    (height, width) pictures become the channels of one image.

    Raises:
        ValueError: for frames without an axis.
    """
    match frame:
        case _ if n_frames == 1:
            return frame
        case ():
            raise ValueError("frame stacking needs observations with at least one axis")
        case (height, width):
            return (n_frames, height, width)
        case (channels, height, width) if channels < min(height, width):
            return (n_frames * channels, height, width)
        case _:
            return (*frame[:-1], n_frames * frame[-1])


def frame_shape(observation_shape: tuple[int, ...], n_frames: int) -> tuple[int, ...]:
    """A guess at the shape of one frame of a stacked observation: stacked on a new first axis, or along the last axis.

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


def holds_frames(observation_shape: tuple[int, ...], frame: tuple[int, ...], n_frames: int) -> bool:
    """Whether `fold_frames` can make such an observation of such frames."""
    if n_frames == 1:
        return frame == observation_shape
    joined_first = (n_frames * frame[0], *frame[1:]) if frame else ()
    joined_last = (*frame[:-1], n_frames * frame[-1]) if frame else ()
    return observation_shape in ((n_frames, *frame), joined_last) or (len(frame) > 2 and observation_shape == joined_first)


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
    """(n, k, *frame) -> (n, *observation_shape): frames on a new first axis, or joined along the last or the first axis."""
    n, k, *frame = stack.shape
    if not holds_frames(observation_shape, tuple(frame), k):
        raise ValueError(
            f"a stack of {k} frames of shape {tuple(frame)} does not fit observations of shape {observation_shape}"
        )
    if (k, *frame) == observation_shape:
        return stack
    if k > 1 and (*frame[:-1], k * frame[-1]) == observation_shape:
        moved: Array = np.moveaxis(stack, 1, -2) if isinstance(stack, np.ndarray) else stack.movedim(1, -2)
        return moved.reshape(n, *observation_shape)
    return stack.reshape(n, *observation_shape)
