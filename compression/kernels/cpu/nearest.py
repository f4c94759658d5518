"""The nearest levels of max-min for CPUs: encoding in numba, the same bits as the torch definition (`codecs.nearest`).

Records are those of max-min, whose kernels decode them; what nothing uses is the reference's.
"""

import numpy as np
from torch import Tensor

from ...plans import Plan
from ..protocols import Definition
from ..reference import buckets as reference
from ..reference.buckets import decode, expected_squared_error, recode
from . import buckets
from .scratch import scratch
from .threads import split

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]

FAMILIES = frozenset({"nearest"})


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
    if residual is not None:
        reference.encode(quantizer, plan, values, keys, wire, residual, pending)
        return
    columns = plan.position, plan.count, plan.bits, plan.wire_at

    def work(start: int, stop: int) -> None:
        buckets.encode_nearest(start, stop, *columns, values.numpy(), wire.numpy(), scratch(plan, False))

    split(plan.count, work)
