"""What all tests share."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # networks this small only lose time to a second thread
