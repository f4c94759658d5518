"""The kernels written out in torch: the fast ones are held against them, bit for bit.

Clear before fast. Works on any device, and the host waits for none. Buckets of equal length and width are stacked and
worked on together; what differs between quantizers is their own (`protocols.Definition`).

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

import numpy as np
import torch
from torch import Tensor

from ... import randomness
from ...layers import BFLOAT16
from ...limits import HUGE
from ...plans import Plan
from ...streams import on_device
from ..protocols import Definition
from .arithmetic import FRACTION_BITS, to_bfloat16, tree_sum


def encode(
    quantizer: Definition,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """As `Kernels.encode`."""
    for group in _groups(plan):
        at = _spans(plan.wire_at[group], _record_bytes(quantizer, plan, group), wire.device)
        vectors = values[_spans(plan.position[group], int(plan.count[group[0]]), values.device)]
        bits = int(plan.bits[group[0]])
        if bits >= BFLOAT16:
            floats = to_bfloat16(vectors) if bits == BFLOAT16 else vectors.contiguous()
            wire[at] = floats.view(torch.uint8).reshape(len(group), -1)
            continue
        if residual is not None:
            state = _spans(plan.state_at[group], vectors.shape[1], values.device)
            vectors = vectors + residual[state]
        element = _spans(plan.element[group], vectors.shape[1], values.device)
        halves = on_device(keys[plan.slot[group]].astype(np.int64), values.device)
        kind = quantizer.with_bits(bits)
        scales = kind.fit(vectors)
        codes = round_at_random(
            kind.positions(vectors, scales).clamp(0, kind.top),
            randomness.random_bits(element, halves[:, :1], halves[:, 1:]),
        )
        if residual is not None and kind.projects:
            scales = project(kind, vectors, scales, codes)
        wire[at] = torch.cat([scales.contiguous().view(torch.uint8), kind.pack(codes)], dim=1)
        if pending is not None:
            pending[state] = vectors - kind.levels(scales, codes)


def decode(
    quantizer: Definition, plan: Plan, wire: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """As `Kernels.decode`."""
    scale = torch.tensor(factor, dtype=torch.float32)
    for group in _groups(plan):
        count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
        record = wire[_spans(plan.wire_at[group], _record_bytes(quantizer, plan, group), wire.device)]
        if bits >= BFLOAT16:
            values = _floats(record, torch.bfloat16 if bits == BFLOAT16 else torch.float32)
        else:
            kind = quantizer.with_bits(bits)
            head = 4 * kind.scale_count
            values = kind.levels(_floats(record[:, :head]), kind.unpack(record[:, head:], count))
        at = _spans(plan.position[group], count, out.device)
        out[at] = out[at] + scale * values if accumulate else scale * values


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
    """As `Kernels.recode`."""
    own = values * torch.tensor(factor, dtype=torch.float32)
    total = torch.empty_like(values)
    messages = [*received]
    for turn in range(len(messages) + (rank is not None)):
        if turn != rank:
            decode(quantizer, plan, messages.pop(0), total, factor, accumulate=turn > 0)
        else:
            total = total + own if turn > 0 else own
    encode(quantizer, plan, total, keys, wire, residual, pending)
    decode(quantizer, plan, wire, values)


def expected_squared_error(quantizer: Definition, plan: Plan, values: Tensor, projected: bool = False) -> float:
    """As `Kernels.expected_squared_error`.

    Rounding up a gap g with probability f has variance g^2 f (1 - f).
    """
    total = 0.0
    for group in _groups(plan):
        vectors = values[_spans(plan.position[group], int(plan.count[group[0]]), values.device)]
        kind = quantizer.with_bits(int(plan.bits[group[0]]))
        scales = kind.fit(vectors)
        lower, fraction = _between(kind, vectors, scales)
        upper = (lower + 1).clamp_max(kind.top)
        gap = kind.levels(scales, upper).double() - kind.levels(scales, lower).double()
        error_M = (gap**2 * fraction.double() * (1 - fraction.double())).sum(1)
        if projected and kind.projects:
            square_M = vectors.double().square().sum(1)
            error_M = torch.where(error_M > 0, error_M * square_M / (error_M + square_M), 0.0)
        total += float(error_M.sum())
    return total


def project(kind: Definition, vectors_MK: Tensor, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
    """Scales times <v, Q> / |Q|^2: decoded, they give the projection of v on Q, never longer than v.

    Levels near the largest float32 are not made larger: neither they nor the steps towards them may overflow.
    """
    max_magnitude = kind.max_magnitude(scales_MS)
    unit = 1.0 / max_magnitude
    q = kind.levels(scales_MS, codes_MK) * unit
    length = tree_sum(q * q)
    bound = torch.where(max_magnitude > HUGE, 1.0, torch.inf)
    fraction = (tree_sum((vectors_MK * unit) * q) / length).unsqueeze(1).clamp(-bound, bound)
    return torch.where(length.unsqueeze(1) > 0, scales_MS * fraction, scales_MS)


def round_at_random(positions: Tensor, random_bits: Tensor) -> Tensor:
    """The code below each position, or the next with the chance of the fraction: floor(position + draw), int64.

    Summed in fixed point, so that a position on a code stays there whatever is drawn.
    """
    fixed = (positions * 2.0**FRACTION_BITS).to(torch.int64)
    return (fixed + (random_bits >> (32 - FRACTION_BITS))) >> FRACTION_BITS


def _between(kind: Definition, vectors_MK: Tensor, scales_MS: Tensor) -> tuple[Tensor, Tensor]:
    """The code below each value, as int64, and how far the value lies on the way to the next code, in [0, 1)."""
    positions = kind.positions(vectors_MK, scales_MS).clamp(0, kind.top)
    lower = positions.floor()
    return lower.to(torch.int64), positions - lower


def _record_bytes(quantizer: Definition, plan: Plan, group: np.ndarray) -> int:
    count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
    return count * bits // 8 if bits >= BFLOAT16 else quantizer.record_bytes(count, bits)


def _floats(nbytes_MB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats that lie there: uint8 [M, B] -> float32 [M, K].

    Flattened first: torch refuses a [1, B] slice whose stride is odd.
    """
    return nbytes_MB.reshape(-1).view(dtype).to(torch.float32).reshape(nbytes_MB.shape[0], -1)


def _groups(plan: Plan) -> list[np.ndarray]:
    """Indices of buckets, those of one length and width together."""
    shapes = np.stack([plan.count, plan.bits], axis=1)
    _, which = np.unique(shapes, axis=0, return_inverse=True)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)] if len(shapes) else []


def _spans(starts: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Indices of runs: [M] -> int64 [M, length]."""
    return on_device(starts, device)[:, None] + torch.arange(length, device=device)
