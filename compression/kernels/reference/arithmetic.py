"""Arithmetic that the torch definitions of quantizers share, in an order that every kernel keeps.

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

import torch
from torch import Tensor

from ...limits import TINY

TREE = 512  # values that one tree of additions sums
INFINITY = 0x7F800000  # its bits
BFLOAT16_NAN = 0x7FC0  # the bits of the one that is sent
TERNARY_TILE = 2560  # codes that are packed together, five to a byte
FRACTION_BITS = 23  # of a position, when it is rounded: with 8 bits before the point it fits an int32
HISTOGRAM_BITS = 16  # of the number of bins that quantiles are taken from


def tree_sum(values_MK: Tensor) -> Tensor:
    """Sums over the last axis in one fixed order, so that every kernel gets the same bits: [M, K] -> [M].

    Blocks of 512 are each added up by halves (the second half onto the first, zero-padded to a power of two), then
    the block sums likewise. A sum that is zero is +0.0.
    """
    while values_MK.shape[1] > TREE:
        blocks = -(-values_MK.shape[1] // TREE)
        padded = torch.nn.functional.pad(values_MK, (0, blocks * TREE - values_MK.shape[1]))
        values_MK = _halve(padded.reshape(-1, TREE)).reshape(-1, blocks)
    return _halve(values_MK) + 0.0


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


def pack_ternary(codes_MK: Tensor) -> Tensor:
    """Codes 0 to 2 five to a byte, in base 3: [M, K] -> uint8 [M, ceil(K / 5)].

    Code i of each byte is taken from the i-th fifth of a tile, the lowest first.
    """
    tiles: list[Tensor] = []
    for codes in codes_MK.split(TERNARY_TILE, dim=1):
        fifths = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 5)).reshape(len(codes), 5, -1)
        tiles.append((fifths * 3 ** torch.arange(5, device=codes.device)[:, None]).sum(1).to(torch.uint8))
    return torch.cat(tiles, dim=1)


def unpack_ternary(packed_MB: Tensor, count: int) -> Tensor:
    """The inverse of `pack_ternary`: uint8 [M, B] -> int64 [M, count]."""
    tiles: list[Tensor] = []
    for packed in packed_MB.to(torch.int64).split(TERNARY_TILE // 5, dim=1):
        fifths = packed.unsqueeze(1) // 3 ** torch.arange(5, device=packed.device)[:, None] % 3
        tiles.append(fifths.reshape(len(packed), -1)[:, : count - TERNARY_TILE * len(tiles)])
    return torch.cat(tiles, dim=1)


def round_at_random(positions: Tensor, random_bits: Tensor) -> Tensor:
    """The code below each position, or the next with the chance of the fraction: floor(position + draw), int64.

    Summed in fixed point, so that a position on a code stays there whatever is drawn.
    """
    fixed = (positions * 2.0**FRACTION_BITS).to(torch.int64)
    return (fixed + (random_bits >> (32 - FRACTION_BITS))) >> FRACTION_BITS


def divided(values: Tensor, divisor: int) -> Tensor:
    """The quotient, correctly rounded: by a plain number, GPUs multiply by its rounded inverse."""
    return values / torch.full_like(values, divisor)


def nan_unless_finite(vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
    """The scales, NaN for buckets that hold a NaN or an infinity."""
    return torch.where(torch.isfinite(vectors_MK).all(1, keepdim=True), scales_MS, torch.nan)


def leading_power(vectors_MK: Tensor) -> Tensor:
    """The largest power of two that is no larger than the largest magnitude: [M, 1]. Dividing by it is exact."""
    largest = vectors_MK.abs().amax(1, keepdim=True)
    return (largest.view(torch.int32) & INFINITY).view(torch.float32).clamp_min(TINY)


def to_bfloat16(values: Tensor) -> Tensor:
    """The nearest bfloat16, of two the one whose last bit is zero; every NaN is the same.

    Written out, since what becomes of a NaN is otherwise the processor's business.
    """
    bits = values.contiguous().view(torch.int32)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(values.isnan(), BFLOAT16_NAN, upper).to(torch.int16).view(torch.bfloat16)


def floats_of(nbytes_MB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats that lie there: uint8 [M, B] -> float32 [M, K].

    Flattened first: torch refuses a [1, B] slice whose stride is odd.
    """
    return nbytes_MB.reshape(-1).view(dtype).to(torch.float32).reshape(nbytes_MB.shape[0], -1)


def ordered(bits: Tensor) -> Tensor:
    """Bits of float32 as integers of the same order; its own inverse. NaN lies beyond the infinities."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
