"""The families of quantizers, in torch: what is different from one to the other.

A family is three functions: the scales of a bucket; the positions of its values on the axis of codes, real numbers
from 0 to the top code; the levels that codes stand for. Rounding a position at random to one of its two neighbors,
projecting and the expected error follow from them, alike for all families (`reference.py`). The formats are described
where the codecs are defined (`compression/codecs`).

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...limits import LIMIT, TINY

TREE = 512  # values that one tree of additions sums
INFINITY = 0x7F800000  # its bits
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


class Family(ABC):
    """A family of quantizers. `projects` says whether error feedback scales its code into a projection."""

    projects = True

    def scales(self, bits: int) -> int:
        """How many float32 scales a record has."""
        return 1

    @abstractmethod
    def top(self, bits: int) -> int:
        """The largest code."""

    @abstractmethod
    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        """The scales [M, S] of each bucket; all NaN where a value is not finite."""

    @abstractmethod
    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        """Where the values lie on the axis of codes, as float32; 0 to top after clamping, never NaN."""

    @abstractmethod
    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        """What the codes stand for."""

    def max_magnitude(self, scales_MS: Tensor, bits: int) -> Tensor:
        """The largest magnitude of any scale and any level, but no denormal number: [M, 1]."""
        return scales_MS.abs().amax(1, keepdim=True).clamp_min(TINY)

    def packed_bytes(self, count: int, bits: int) -> int:
        return -(-count * bits // 8)

    def pack(self, codes_MK: Tensor, bits: int) -> Tensor:
        return pack(codes_MK, bits)

    def unpack(self, packed_MB: Tensor, count: int, bits: int) -> Tensor:
        return unpack(packed_MB, count, bits)


class MaxMin(Family):
    """Scales (min, u): level = min + u code."""

    def scales(self, bits: int) -> int:
        return 2

    def top(self, bits: int) -> int:
        return (1 << bits) - 1

    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        low, high = vectors_MK.aminmax(dim=1, keepdim=True)
        low, high = (each.clamp(-LIMIT, LIMIT) + 0.0 for each in (low, high))  # + 0.0: no negative zero
        unit = _over((high - low).clamp_max(LIMIT), self.top(bits))
        return _finite(vectors_MK, torch.cat([low, unit], dim=1))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        low, unit = scales_MS[:, :1], scales_MS[:, 1:]
        return torch.where(unit > 0, (vectors_MK - low) / unit, 0.0)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        return scales_MS[:, :1] + scales_MS[:, 1:] * codes_MK.to(torch.float32)

    def max_magnitude(self, scales_MS: Tensor, bits: int) -> Tensor:
        highest = scales_MS[:, :1] + scales_MS[:, 1:] * self.top(bits)
        return torch.maximum(super().max_magnitude(scales_MS, bits), highest.abs())


class NormUniform(Family):
    """One scale, the largest magnitude: level = (code - s) (norm / s), s = 2^(b-1) - 1."""

    def top(self, bits: int) -> int:
        return (1 << bits) - 2

    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        return _finite(vectors_MK, vectors_MK.abs().amax(1, keepdim=True).clamp_max(LIMIT))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        zero = self.top(bits) // 2
        unit = _over(scales_MS, zero)
        return torch.where(unit > 0, vectors_MK / unit, 0.0) + zero

    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        zero = self.top(bits) // 2
        return (codes_MK - zero).to(torch.float32) * _over(scales_MS, zero)


class Exponential(NormUniform):
    """One scale, the largest magnitude: levels norm x {0, 2^-(s-1), ..., 1/2, 1} of both signs, s = 2^(b-1) - 1.

    The bits of a float32, read as an integer, are its position among the powers of two: the exponent counts them, the
    mantissa is the way to the next one.
    """

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        zero = self.top(bits) // 2
        fraction = torch.where(scales_MS > 0, vectors_MK.abs() / scales_MS, 0.0)
        steps = (fraction.view(torch.int32) - ((127 - zero) << 23)).to(torch.float32) * 2.0**-23
        steps = torch.where(fraction < 2.0 ** (1 - zero), fraction * 2.0 ** (zero - 1), steps)
        return zero + torch.where(vectors_MK < 0, -steps, steps)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        zero = self.top(bits) // 2
        steps = codes_MK - zero
        power = ((steps.abs() + 127 - zero) << 23).to(torch.int32).view(torch.float32)
        power = torch.where(steps == 0, 0.0, power)
        return torch.where(steps < 0, -power, power) * scales_MS


class OneBit(Family):
    """Scales (mean of the others, mean of the negatives), in the order of the codes: 1 for a negative value.

    The decoded bucket is a projection already, on what is constant over the negatives and over the others: <v, Q> =
    |Q|^2.
    """

    projects = False

    def scales(self, bits: int) -> int:
        return 2

    def top(self, bits: int) -> int:
        return 1

    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        power = _power(vectors_MK)
        fractions, means = vectors_MK / power, []
        for members in (~(vectors_MK < 0), vectors_MK < 0):
            count = members.sum(1).clamp_min(1).to(torch.float32)
            means.append(tree_sum(fractions * members) / count * power[:, 0])
        return _finite(vectors_MK, torch.stack(means, dim=1).clamp(-LIMIT, LIMIT))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        return (vectors_MK < 0).to(torch.float32)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        return torch.where(codes_MK > 0, scales_MS[:, 1:], scales_MS[:, :1])


class TernGrad(NormUniform):
    """One scale, the largest magnitude but at most 2.5 root mean squares: level = (code - 1) scale.

    Five codes make a byte in base 3. Code i of each byte is taken from the i-th fifth of a tile, the lowest first.
    """

    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        power = _power(vectors_MK)
        fractions = vectors_MK / power
        mean = _over(tree_sum(fractions * fractions).unsqueeze(1), vectors_MK.shape[1])
        clipped = torch.minimum(super().fit(vectors_MK, bits), 2.5 * (mean.double().sqrt().float() * power))
        return _finite(vectors_MK, clipped)

    def packed_bytes(self, count: int, bits: int) -> int:
        return -(-count // 5)

    def pack(self, codes_MK: Tensor, bits: int) -> Tensor:
        tiles: list[Tensor] = []
        for codes in codes_MK.split(TERNARY_TILE, dim=1):
            fifths = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 5)).reshape(len(codes), 5, -1)
            tiles.append((fifths * 3 ** torch.arange(5, device=codes.device)[:, None]).sum(1).to(torch.uint8))
        return torch.cat(tiles, dim=1)

    def unpack(self, packed_MB: Tensor, count: int, bits: int) -> Tensor:
        tiles: list[Tensor] = []
        for packed in packed_MB.to(torch.int64).split(TERNARY_TILE // 5, dim=1):
            fifths = packed.unsqueeze(1) // 3 ** torch.arange(5, device=packed.device)[:, None] % 3
            tiles.append(fifths.reshape(len(packed), -1)[:, : count - TERNARY_TILE * len(tiles)])
        return torch.cat(tiles, dim=1)


class Quantile(Family):
    """A table of 2^b levels: the minimum, quantiles, the maximum.

    Quantile k / (2^b - 1) is taken from a histogram of at most 2^16 bins, equally wide in the order of floats (a
    bin is at most 1/128 of its values wide where both signs occur, and finer where the range is smaller): it is the
    lower edge of the bin that holds the value of rank floor(k (n - 1) / (2^b - 1)).
    """

    def scales(self, bits: int) -> int:
        return 1 << bits

    def top(self, bits: int) -> int:
        return (1 << bits) - 1

    def fit(self, vectors_MK: Tensor, bits: int) -> Tensor:
        top, count = self.top(bits), vectors_MK.shape[1]
        keys = ordered((vectors_MK + 0.0).view(torch.int32)).to(torch.int64)  # + 0.0: one zero
        first, last = keys.aminmax(dim=1, keepdim=True)
        bit_length = torch.frexp((last - first).to(torch.float64)).exponent
        shift = (bit_length - HISTOGRAM_BITS).clamp_min(0)
        bins = (keys - first) >> shift
        ranks = torch.arange(1, top, device=keys.device) * (count - 1) // top
        edges = first + (bins.sort(dim=1).values[:, ranks] << shift)
        table = torch.cat([first, edges, last], dim=1).to(torch.int32)
        return _finite(vectors_MK, ordered(table).view(torch.float32) + 0.0)

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor, bits: int) -> Tensor:
        lower = torch.searchsorted(scales_MS[:, 1:-1].contiguous(), vectors_MK, right=True)
        lower = torch.where(scales_MS[:, :1].isnan(), 0, lower)
        span = scales_MS[:, -1:] - scales_MS[:, :1]
        half = torch.where(span <= LIMIT, 1.0, 0.5)  # no difference of two levels overflows
        low = scales_MS.gather(1, lower) * half
        gap = scales_MS.gather(1, lower + 1) * half - low
        return lower + torch.where(gap > 0, (vectors_MK * half - low) / gap, 0.0)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor, bits: int) -> Tensor:
        return scales_MS.gather(1, codes_MK)


FAMILIES: dict[str, Family] = {
    "maxmin": MaxMin(),
    "norm_uniform": NormUniform(),
    "exponential": Exponential(),
    "1bit": OneBit(),
    "terngrad": TernGrad(),
    "quantile": Quantile(),
}


def _over(values: Tensor, divisor: int) -> Tensor:
    """The quotient, correctly rounded: by a plain number, GPUs multiply by its rounded inverse."""
    return values / torch.full_like(values, divisor)


def _finite(vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
    return torch.where(torch.isfinite(vectors_MK).all(1, keepdim=True), scales_MS, torch.nan)


def _power(vectors_MK: Tensor) -> Tensor:
    """The largest power of two that is no larger than the largest magnitude: [M, 1]. Dividing by it is exact."""
    largest = vectors_MK.abs().amax(1, keepdim=True)
    return (largest.view(torch.int32) & INFINITY).view(torch.float32).clamp_min(TINY)


def ordered(bits: Tensor) -> Tensor:
    """Bits of float32 as integers of the same order; its own inverse. NaN lies beyond the infinities."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def record_bytes(family: str, count: int, bits: int) -> int:
    """Exact length of the record of a bucket of `count` values at a width."""
    kind = FAMILIES[family]
    return 4 * kind.scales(bits) + kind.packed_bytes(count, bits)
