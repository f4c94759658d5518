"""The kernels for GPUs, in Triton: the same bits as `reference`, in one launch per call.

A bucket is read from memory once (ternary codes: twice, from the first-level cache) and leaves as a record; layers of
all widths and dense ones go in the same launch. Nothing waits for the GPU but a plan's first use, which sends its
table there.

Quantiles need all values of a shard before any of its codes, and take four launches (`quantiles.py`). `reference`
encodes, in torch operations that are slower, buckets of more than 16,384 values, and quantiles with error feedback or
in more than 256 buckets. Decoding knows no such limits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...plans import Plan
from ...streams import on_device
from .. import reference
from ..protocols import Definition
from ..reference.arithmetic import HISTOGRAM_BITS
from ..reference.buckets import expected_squared_error
from . import buckets, quantiles
from .compiling import tell_of_compiling
from .pieces import Pieces, to_decode, to_encode

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]

FAMILIES = frozenset({"maxmin", "norm_uniform", "exponential", "1bit", "terngrad", "ternary", "quantile"})

DECODING_REGISTERS = 48  # of a thread: with more, fewer warps fit beside one another, and memory waits for them
NO_FMA = {"enable_fp_fusion": False}  # options to compile with: a product is rounded before it is added

tell_of_compiling()


def encode(
    quantizer: Definition,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """Encode as `reference.encode` does. All tensors are contiguous and on one device."""
    if quantizer.family == "quantile":
        if residual is None and len(plan.count) <= quantiles.MOST:
            _encode_quantiles(plan, values, keys, wire)
        else:
            reference.encode(quantizer, plan, values, keys, wire, residual, pending)
        return
    pieces = to_encode(plan, wire.device)
    if pieces.longer is not None:
        reference.encode(quantizer, pieces.longer, values, keys, wire, residual, pending)
    feedback = residual is not None and pending is not None
    states = (residual, pending) if feedback else (values, values)
    _launch(buckets.encode, pieces, mixed_keys(keys, wire.device), values, *states, wire, quantizer.family, feedback)


def _encode_quantiles(plan: Plan, values: Tensor, keys: np.ndarray, wire: Tensor) -> None:
    """The records of quantiles and of dense buckets, as `encode`."""
    pieces, device = to_decode(plan, wire.device), wire.device
    ends = on_device(np.tile(np.array([2**31 - 1, -(2**31)], np.int32), (len(plan.count), 1)), device)
    counts = torch.zeros(len(plan.count), 1 << HISTOGRAM_BITS, dtype=torch.int32, device=device)
    _launch(quantiles.extremes, pieces, values, ends)
    shifts = quantiles.shifts_of(ends)
    _launch(quantiles.histogram, pieces, values, ends, shifts, counts)
    tables = quantiles.tables_of(plan, ends, shifts, counts)
    _launch(quantiles.level_tables, pieces, tables, wire)
    _launch(quantiles.codes, pieces, mixed_keys(keys, device), values, tables, wire)


def mixed_keys(keys: np.ndarray, device: torch.device) -> Tensor:
    """Keys of layers, uint32 [slots, 2], as the kernels want them (`blocks._random_bits`)."""
    return on_device(np.stack([keys[:, 0], keys[:, 1] ^ (keys[:, 1] >> 15)], axis=1).view(np.int32), device)


def decode(
    quantizer: Definition,
    plan: Plan,
    wire: Tensor,
    out: Tensor,
    factor: float = 1.0,
    accumulate: bool = False,
    keys: np.ndarray | None = None,
) -> None:
    """Decode as `reference.decode` does. Both tensors are contiguous and on one device."""
    _launch(buckets.decode, to_decode(plan, wire.device), wire, out, factor, 1, -1, 0, quantizer.family, accumulate)


def recode(
    quantizer: Definition,
    plan: Plan,
    received: Tensor,
    values: Tensor,
    rank: int | None,
    factor: float,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
    senders: np.ndarray | None = None,
) -> None:
    """Recode as `reference.recode` does: one launch to add up any number of ranks, those of `encode`, one to decode."""
    own, ranks = (-1, len(received)) if rank is None else (rank, len(received) + 1)
    pieces = to_decode(plan, wire.device)
    _launch(buckets.decode, pieces, received, values, factor, ranks, own, received.stride(0), quantizer.family, False)
    encode(quantizer, plan, values, keys, wire, residual, pending)
    decode(quantizer, plan, wire, values)


def _launch(kernel: Any, pieces: Pieces, *arguments: object) -> None:
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
