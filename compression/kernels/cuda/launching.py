"""Launches: how the kernels are started on all pieces of a plan, and how keys come to them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...streams import on_device
from . import buckets
from .pieces import Pieces

DECODING_REGISTERS = 48  # of a thread: with more, fewer warps fit beside one another, and memory waits for them
NO_FMA = {"enable_fp_fusion": False}  # options to compile with: a product is rounded before it is added


def launch(kernel: Any, pieces: Pieces, *arguments: object) -> None:
    """Run a kernel on all pieces, with 16 values a thread."""
    if pieces.count == 0:
        return
    with torch.cuda.device_of(pieces.table):
        kernel[(pieces.programs,)](
            pieces.table,
            pieces.count,
            *arguments,
            pieces.aligned,
            pieces.rows,
            pieces.width // 4,
            num_warps=pieces.warps,
            maxnreg=DECODING_REGISTERS if kernel is buckets.decode and pieces.rows == 1 else None,
            **NO_FMA,
        )


def mixed_keys(keys: np.ndarray, device: torch.device) -> Tensor:
    """Keys of layers, uint32 [slots, 2], as the kernels want them (`blocks.random_bits`)."""
    return on_device(np.stack([keys[:, 0], keys[:, 1] ^ (keys[:, 1] >> 15)], axis=1).view(np.int32), device)
