"""The kernels written out in torch: the fast ones are held against them, bit for bit.

Clear before fast. Works on any device, and the host waits for none. Buckets of equal length and width are stacked and
worked on together; what differs between quantizers is their own (`protocols.Definition`).

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

import numpy as np
import torch
from torch import Tensor

from ...layers import BFLOAT16
from ...plans import Plan
from ...randomness import Draws
from ...streams import on_device
from ..protocols import Definition
from .arithmetic import floats_of, to_bfloat16


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
        kind, draws = quantizer.with_bits(bits), _draws(plan, group, keys, values.device)
        records = kind.encode_vectors(vectors, draws, contraction=residual is not None)
        wire[at] = records
        if pending is not None:
            pending[state] = vectors - kind.decode_records(records, vectors.shape[1], draws)


def decode(
    quantizer: Definition,
    plan: Plan,
    wire: Tensor,
    out: Tensor,
    factor: float = 1.0,
    accumulate: bool = False,
    keys: np.ndarray | None = None,
) -> None:
    """As `Kernels.decode`."""
    scale = torch.tensor(factor, dtype=torch.float32)
    for group in _groups(plan):
        count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
        record = wire[_spans(plan.wire_at[group], _record_bytes(quantizer, plan, group), wire.device)]
        if bits >= BFLOAT16:
            values = floats_of(record, torch.bfloat16 if bits == BFLOAT16 else torch.float32)
        else:
            draws = None if keys is None else _draws(plan, group, keys, wire.device)
            values = quantizer.with_bits(bits).decode_records(record, count, draws)
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
    senders: np.ndarray | None = None,
) -> None:
    """As `Kernels.recode`."""
    own = values * torch.tensor(factor, dtype=torch.float32)
    total = torch.empty_like(values)
    messages = iter(zip(received, [None] * len(received) if senders is None else senders, strict=True))
    for turn in range(len(received) + (rank is not None)):
        if turn != rank:
            message, its_keys = next(messages)
            decode(quantizer, plan, message, total, factor, turn > 0, its_keys)
        else:
            total = total + own if turn > 0 else own
    encode(quantizer, plan, total, keys, wire, residual, pending)
    decode(quantizer, plan, wire, values, keys=keys)


def expected_squared_error(quantizer: Definition, plan: Plan, values: Tensor, projected: bool = False) -> float:
    """As `Kernels.expected_squared_error`."""
    total = 0.0
    for group in _groups(plan):
        vectors = values[_spans(plan.position[group], int(plan.count[group[0]]), values.device)]
        error_M = quantizer.with_bits(int(plan.bits[group[0]])).expected_squared_errors(vectors)
        if projected and quantizer.projects:
            square_M = vectors.double().square().sum(1)
            error_M = torch.where(error_M > 0, error_M * square_M / (error_M + square_M), 0.0)
        total += float(error_M.sum())
    return total


def _record_bytes(quantizer: Definition, plan: Plan, group: np.ndarray) -> int:
    count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
    return count * bits // 8 if bits >= BFLOAT16 else quantizer.record_bytes(count, bits)


def _draws(plan: Plan, group: np.ndarray, keys: np.ndarray, device: torch.device) -> Draws:
    """The streams of buckets of a plan."""
    halves = on_device(keys[plan.slot[group]].astype(np.int64), device)
    return Draws(on_device(plan.element[group], device)[:, None], halves[:, :1], halves[:, 1:])


def _groups(plan: Plan) -> list[np.ndarray]:
    """Indices of buckets, those of one length and width together."""
    shapes = np.stack([plan.count, plan.bits], axis=1)
    _, which = np.unique(shapes, axis=0, return_inverse=True)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)] if len(shapes) else []


def _spans(starts: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Indices of runs: [M] -> int64 [M, length]."""
    return on_device(starts, device)[:, None] + torch.arange(length, device=device)
