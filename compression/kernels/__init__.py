"""The arithmetic of the codecs, several times: `reference` (torch, clear), `cpu` (numba, fast), `cuda` (Triton, fast).

All give the same bits from the same inputs. Which one runs follows from where the tensors are, and from whether it has
the quantizer: the fast ones are an optimization, and the reference serves where they list no such family.
"""

import functools
import os
import shutil
from importlib.util import find_spec

import torch

from . import cpu, reference
from .cpu import eden as eden_cpu
from .cpu import nearest as nearest_cpu
from .cpu import sparse as sparse_cpu
from .protocols import Definition, Kernels, SparseKernels
from .reference import sparse as sparse_reference

__all__ = ["Definition", "Kernels", "SparseKernels", "for_device", "sparse_for_device"]


def for_device(device: torch.device, family: str | None) -> Kernels:
    """The fastest kernels for tensors on `device` and quantizers of a family, None for one of no listed family.

    On GPUs that is `cuda` where Triton is installed and finds the C compiler that it links its kernels with, and
    `reference` elsewhere.
    """
    if device.type == "cpu":
        if family in cpu.FAMILIES:
            return cpu
        if family in eden_cpu.FAMILIES:
            return eden_cpu
        if family in nearest_cpu.FAMILIES:
            return nearest_cpu
    elif device.type == "cuda" and _triton_runs():
        from . import cuda
        from .cuda import eden as eden_cuda

        if family in cuda.FAMILIES:
            return cuda
        if family in eden_cuda.FAMILIES:
            return eden_cuda
    return reference


def sparse_for_device(device: torch.device) -> SparseKernels:
    """The fastest sparse kernels for tensors on `device`."""
    return sparse_cpu if device.type == "cpu" else sparse_reference


@functools.cache
def _triton_runs() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and find_spec("triton") is not None
