"""One view of any policy, its frame stacks, frozen normalisation, and safe loading of SB3 files."""

from robustrl.policy.frames import Padding, fold_frames, frame_shape, holds_frames, push_frame, stacked_shape, start_stack
from robustrl.policy.normalization import Normalization
from robustrl.policy.view import INFERENCE_BATCH, PolicyView

__all__ = [
    "INFERENCE_BATCH",
    "Normalization",
    "Padding",
    "PolicyView",
    "fold_frames",
    "frame_shape",
    "holds_frames",
    "push_frame",
    "stacked_shape",
    "start_stack",
]
