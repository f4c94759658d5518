"""Reproducibility: where random numbers begin, and kernels that give the same bits every time."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, on every device, of numpy and of Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def use_deterministic_kernels() -> None:
    """Let torch use deterministic kernels only, and fail where an operation has none."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
