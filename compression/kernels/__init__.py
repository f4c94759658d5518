"""The arithmetic of the codecs, several times: `reference` (torch, clear) and `cpu` (numba, fast).

All give the same bits from the same inputs. Which one runs follows from where the tensors are.
"""

from types import ModuleType

import torch

from compression.kernels import cpu, reference, sparse_cpu, sparse_reference
from compression.kernels.families import record_bytes

__all__ = ["for_device", "record_bytes", "sparse_for_device"]


def for_device(device: torch.device) -> ModuleType:
    """The fastest kernels for tensors on `device`; all share the signatures of `reference`."""
    return cpu if device.type == "cpu" else reference


def sparse_for_device(device: torch.device) -> ModuleType:
    """The fastest sparse kernels for tensors on `device`; all share the signatures of `sparse_reference`."""
    return sparse_cpu if device.type == "cpu" else sparse_reference
