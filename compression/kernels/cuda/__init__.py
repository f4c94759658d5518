"""The kernels for GPUs, in Triton: the same bits as `reference`, in one launch per call.

A bucket is read from memory once (ternary codes: twice, from the first-level cache) and leaves as a record; layers of
all widths and dense ones go in the same launch. Nothing waits for the GPU but a plan's first use, which sends its
table there.

Quantiles need all values of a shard before any of its codes, and take four launches (`quantiles.py`). `reference`
encodes, in torch operations that are slower, buckets of more than 16,384 values, and quantiles with error feedback or
in more than 256 buckets. Decoding knows no such limits.

EDEN has kernels of its own, with these signatures (`eden.py`): one launch for all rows of one length.
"""

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
from .launching import launch, mixed_keys
from .pieces import to_decode, to_encode

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]

FAMILIES = frozenset({"maxmin", "norm_uniform", "exponential", "1bit", "terngrad", "ternary", "quantile"})

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
    launch(buckets.encode, pieces, mixed_keys(keys, wire.device), values, *states, wire, quantizer.family, feedback)


def _encode_quantiles(plan: Plan, values: Tensor, keys: np.ndarray, wire: Tensor) -> None:
    """The records of quantiles and of dense buckets, as `encode`."""
    pieces, device = to_decode(plan, wire.device), wire.device
    ends = on_device(np.tile(np.array([2**31 - 1, -(2**31)], np.int32), (len(plan.count), 1)), device)
    counts = torch.zeros(len(plan.count), 1 << HISTOGRAM_BITS, dtype=torch.int32, device=device)
    launch(quantiles.extremes, pieces, values, ends)
    shifts = quantiles.shifts_of(ends)
    launch(quantiles.histogram, pieces, values, ends, shifts, counts)
    tables = quantiles.tables_of(plan, ends, shifts, counts)
    launch(quantiles.level_tables, pieces, tables, wire)
    launch(quantiles.codes, pieces, mixed_keys(keys, device), values, tables, wire)


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
    launch(buckets.decode, to_decode(plan, wire.device), wire, out, factor, 1, -1, 0, quantizer.family, accumulate)


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
    launch(buckets.decode, pieces, received, values, factor, ranks, own, received.stride(0), quantizer.family, False)
    encode(quantizer, plan, values, keys, wire, residual, pending)
    decode(quantizer, plan, wire, values)
