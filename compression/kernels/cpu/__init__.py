"""The kernels for CPUs: one fused pass per bucket in numba, the same bits as `reference.py`.

A bucket is read once into the first-level cache and leaves as a record. Every loop over values is one that LLVM
vectorizes: minima are taken over order-preserving integers, codes are packed eight at a time inside 64-bit words.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ...plans import Plan
from ..protocols import Definition
from . import buckets
from .families import FAMILIES
from .scratch import scratch
from .threads import split

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]


def encode(
    quantizer: Definition,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """As `reference.encode`."""
    recode(quantizer, plan, wire.new_empty(0, 0), values, None, 1.0, keys, wire, residual, pending)


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
) -> None:
    """As `reference.recode`, in blocks that never leave the cache between decoding and encoding."""
    summands = (received.numpy(), values.numpy(), -1 if rank is None else rank, np.float32(factor))
    tensors = (*summands, keys, wire.numpy(), *_remembered(residual, pending))
    _run(buckets.recode, quantizer, plan, *_columns(plan), *tensors)


def _run(kernel: Callable[..., Any], quantizer: Definition, plan: Plan, *arguments: Any) -> list[Any]:
    """What a kernel returns of each thread's buckets."""
    number = FAMILIES[str(quantizer.family)]

    def work(start: int, stop: int) -> Any:
        return kernel(number, start, stop, *arguments, scratch(plan, quantizer.family == "quantile"))

    return split(plan.count, work)


def _columns(plan: Plan) -> tuple[np.ndarray, ...]:
    return plan.position, plan.count, plan.bits, plan.wire_at, plan.slot, plan.element, plan.state_at


def _remembered(residual: Tensor | None, pending: Tensor | None) -> tuple[np.ndarray, np.ndarray, bool]:
    if residual is None or pending is None:
        nothing = np.empty(0, np.float32)
        return nothing, nothing, False
    return residual.numpy(), pending.numpy(), True


def decode(
    quantizer: Definition, plan: Plan, wire: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """As `reference.decode`."""
    tensors = (wire.numpy(), out.numpy(), np.float32(factor), accumulate, not accumulate)
    _run(buckets.decode, quantizer, plan, plan.position, plan.count, plan.bits, plan.wire_at, *tensors)


def expected_squared_error(quantizer: Definition, plan: Plan, values: Tensor) -> float:
    """As `reference.expected_squared_error`; sums of 512 in float32, the rest in float64."""
    return sum(_run(buckets.squared_error, quantizer, plan, plan.position, plan.count, plan.bits, values.numpy()))
