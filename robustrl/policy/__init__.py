"""One view of any policy, its frame stacks, and safe loading of SB3 files."""

from robustrl.policy.frames import Padding, fold_frames, frame_shape, push_frame, start_stack
from robustrl.policy.view import INFERENCE_BATCH, PolicyView

__all__ = ["INFERENCE_BATCH", "Padding", "PolicyView", "fold_frames", "frame_shape", "push_frame", "start_stack"]
