"""The arithmetic of the codecs, several times: `reference` (torch, clear), `cpu` (numba, fast), `cuda` (Triton, fast).

All give the same bits from the same inputs. Which one runs follows from where the tensors are.
"""

import functools
import os
import shutil
from importlib.util import find_spec
from types import ModuleType

import torch

from . import cpu, reference
from .cpu import sparse as sparse_cpu
from .reference import sparse as sparse_reference
from .reference.families import record_bytes

__all__ = ["for_device", "record_bytes", "sparse_for_device"]


def for_device(device: torch.device) -> ModuleType:
    """The fastest kernels for tensors on `device`; all share the signatures of `reference`.

    On GPUs that is `cuda` where Triton is installed and finds the C compiler that it links its kernels with, and
    `reference` elsewhere.
    """
    if device.type == "cpu":
        return cpu
    if device.type == "cuda" and _triton_runs():
        from . import cuda

        return cuda
    return reference


def sparse_for_device(device: torch.device) -> ModuleType:
    """The fastest sparse kernels for tensors on `device`; all share the signatures of `sparse_reference`."""
    return sparse_cpu if device.type == "cpu" else sparse_reference


@functools.cache
def _triton_runs() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and find_spec("triton") is not None
