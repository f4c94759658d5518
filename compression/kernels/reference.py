"""The kernels written out in torch: what the fast ones are held against, bit for bit.

Clear before fast. Works on any device. Buckets of equal length and width are stacked and worked on together; the
formats are described where the codecs are defined (`compression/codecs`).

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

import numpy as np
import torch
from torch import Tensor

from compression import randomness
from compression.layers import DENSE, Plan

# Ranges are kept below the largest float32 so that no level overflows by rounding.
LIMIT = 3.4e38
TINY = float(np.finfo(np.float32).tiny)
TREE = 512  # values that one tree of additions sums


def tree_sum(values_MK: Tensor) -> Tensor:
    """Sums over the last axis in one fixed order, so that every kernel gets the same bits: [M, K] -> [M].

    Blocks of 512 are each added up by halves (the second half onto the first, zero-padded to a power of two), then
    the block sums likewise.
    """
    while values_MK.shape[1] > TREE:
        blocks = -(-values_MK.shape[1] // TREE)
        padded = torch.nn.functional.pad(values_MK, (0, blocks * TREE - values_MK.shape[1]))
        values_MK = _halve(padded.reshape(-1, TREE)).reshape(-1, blocks)
    return _halve(values_MK)


def _halve(values_MK: Tensor) -> Tensor:
    width = 1 << max(values_MK.shape[1] - 1, 0).bit_length()
    values_MK = torch.nn.functional.pad(values_MK, (0, width - values_MK.shape[1]))
    while width > 1:
        width //= 2
        values_MK = values_MK[:, :width] + values_MK[:, width:]
    return values_MK[:, 0]


def pack(codes_MK: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits as one little-endian bit stream per bucket: [M, K] -> uint8 [M, ceil(K bits / 8)]."""
    buckets, count = codes_MK.shape
    spread = (codes_MK.to(torch.int64).unsqueeze(-1) >> torch.arange(bits, device=codes_MK.device)) & 1
    stream = spread.reshape(buckets, count * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(buckets, -1, 8)
    return (stream << torch.arange(8, device=codes_MK.device)).sum(-1).to(torch.uint8)


def unpack(packed_MB: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [M, B] -> int64 [M, count]."""
    stream = (packed_MB.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed_MB.device)) & 1
    stream = stream.reshape(packed_MB.shape[0], -1)[:, : count * bits].reshape(-1, count, bits)
    return (stream << torch.arange(bits, device=packed_MB.device)).sum(-1)


def encode(
    family: str,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """Write the records of all buckets of `plan` into `wire`.

    `values` float32 [plan.values], `keys` uint32 [slots, 2], `wire` uint8 [plan.wire_bytes]. With `residual` (what
    earlier encodings lost) and `pending` (float32 as well, addressed by `plan.memory_at`), values + residual is
    encoded as a contraction and what is lost now goes to `pending`.
    """
    for group in _groups(plan):
        at = _spans(plan.wire_at[group], _record_bytes(family, plan, group), wire.device)
        vectors = values[_spans(plan.position[group], int(plan.count[group[0]]), values.device)]
        bits = int(plan.bits[group[0]])
        if bits == DENSE:
            wire[at] = vectors.contiguous().view(torch.uint8).reshape(len(group), -1)
            continue
        if residual is not None:
            memory = _spans(plan.memory_at[group], vectors.shape[1], values.device)
            vectors = vectors + residual[memory]
        element = _spans(plan.element[group], vectors.shape[1], values.device)
        halves = torch.from_numpy(keys[plan.slot[group]].astype(np.int64)).to(values.device)
        draws = randomness.uniform(element, halves[:, :1], halves[:, 1:])
        coder = CODERS[family]
        scales, codes = coder.encode(vectors, bits, draws)
        if residual is not None:
            scales = project(vectors, coder.decode(scales, codes, bits), scales)
        record = torch.cat([scales.contiguous().view(torch.uint8), coder.pack(codes, bits)], dim=1)
        wire[at] = record
        if pending is not None:
            pending[memory] = vectors - coder.decode(scales, codes, bits)


def decode(
    family: str, plan: Plan, wire: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """Set `out` to factor x decoded for all buckets of `plan`, or add that to it."""
    scale = torch.tensor(factor, dtype=torch.float32)
    for group in _groups(plan):
        count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
        record = wire[_spans(plan.wire_at[group], _record_bytes(family, plan, group), wire.device)]
        if bits == DENSE:
            values = _floats(record)
        else:
            coder = CODERS[family]
            scales = _floats(record[:, : 4 * coder.scales])
            values = coder.decode(scales, coder.unpack(record[:, 4 * coder.scales :], count, bits), bits)
        at = _spans(plan.position[group], count, out.device)
        out[at] = out[at] + scale * values if accumulate else scale * values


def expected_squared_error(family: str, plan: Plan, values: Tensor) -> float:
    """E |v - decoded|^2 over the rounding, summed over all buckets. `values`: float32 [plan.values]."""
    total = 0.0
    for group in _groups(plan):
        vectors = values[_spans(plan.position[group], int(plan.count[group[0]]), values.device)]
        total += CODERS[family].expected_squared_error(vectors, int(plan.bits[group[0]]))
    return total


def project(vectors_MK: Tensor, decoded_MK: Tensor, scales_MS: Tensor) -> Tensor:
    """Scales times <v, Q> / |Q|^2: decoded, they give the projection of v on Q, never longer than v."""
    largest = scales_MS.abs().amax(1, keepdim=True)
    unit = 1.0 / largest.clamp_min(TINY)
    q = decoded_MK * unit
    length = tree_sum(q * q)
    share = tree_sum((vectors_MK * unit) * q) / torch.where(length > 0, length, 1.0)
    return scales_MS * torch.where(length > 0, share, 1.0).unsqueeze(1)


class MaxMin:
    """Scales (min, u) and codes of b bits: value = min + u code."""

    scales = 2
    pack = staticmethod(pack)
    unpack = staticmethod(unpack)

    @staticmethod
    def expected_squared_error(vectors_MK: Tensor, bits: int) -> float:
        """Sum of u^2 f (1 - f): the variance of rounding up with probability f."""
        low, high = vectors_MK.to(torch.float64).aminmax(dim=1, keepdim=True)
        unit = (high - low) / ((1 << bits) - 1)
        place = (vectors_MK - low) / torch.where(unit > 0, unit, 1.0)
        fraction = place - place.floor()
        return float((unit**2 * fraction * (1 - fraction)).sum())

    @staticmethod
    def encode(vectors_MK: Tensor, bits: int, draws_MK: Tensor) -> tuple[Tensor, Tensor]:
        low, high = vectors_MK.aminmax(dim=1, keepdim=True)
        finite = torch.isfinite(vectors_MK).all(1, keepdim=True)
        low, high = low.clamp_min(-LIMIT) + 0.0, high.clamp_max(LIMIT)  # + 0.0: no negative zero
        unit = (high - low).clamp_max(LIMIT) / ((1 << bits) - 1)
        position = (vectors_MK - low) / torch.where(unit > 0, unit, 1.0)
        floor = position.floor()
        codes = (floor + (draws_MK < position - floor)).clamp(0, (1 << bits) - 1)
        codes = torch.where(finite & (unit > 0), codes, 0.0).to(torch.int64)
        scales = torch.cat([low, unit], dim=1)
        return torch.where(finite, scales, torch.nan), codes

    @staticmethod
    def decode(scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        return scales_MS[:, :1] + scales_MS[:, 1:] * codes_MK.to(torch.float32)


CODERS = {"maxmin": MaxMin}


def _record_bytes(family: str, plan: Plan, group: np.ndarray) -> int:
    count, bits = int(plan.count[group[0]]), int(plan.bits[group[0]])
    return 4 * count if bits == DENSE else 4 * CODERS[family].scales + -(-count * bits // 8)


def _floats(nbytes_MB: Tensor) -> Tensor:
    """uint8 [M, 4 K] -> float32 [M, K]. Flattened first: torch refuses a [1, B] slice whose stride is odd."""
    return nbytes_MB.reshape(-1).view(torch.float32).reshape(nbytes_MB.shape[0], -1)


def _groups(plan: Plan) -> list[np.ndarray]:
    """Indices of buckets, those of one length and width together."""
    shapes = np.stack([plan.count, plan.bits], axis=1)
    _, which = np.unique(shapes, axis=0, return_inverse=True)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)] if len(shapes) else []


def _spans(starts: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Indices of runs: [M] -> int64 [M, length]."""
    return torch.from_numpy(starts).to(device)[:, None] + torch.arange(length, device=device)
