"""Quantizers: a few bits per value, and scales for every bucket of consecutive values.

A record is what one bucket becomes: its scales as float32, then its codes as one little-endian bit stream, padded
to a whole byte. A message is the records one after the other; nothing else travels.

All that round at random are unbiased: E[decode(encode(x))] = x for every x between the least and the largest level,
up to the rounding of float32 (a position among the codes is known to 2^-17 of a step at 8 bits). With error feedback
the decoded bucket is scaled into a projection (`kernels.reference.project`), which none of the formulas below say.

Finite for every finite input; magnitudes and ranges beyond 3.4e38 are cut there. A bucket with a NaN or an infinity
decodes to NaN throughout.

Shapes: R messages, N values per message, B = wire_bytes(N).
"""

from abc import ABC
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from .. import kernels
from ..layers import Layer, bucket_length
from ..plans import Plan, Segment, plan
from ..randomness import stream_keys


class Quantizer(ABC):
    """What all quantizers share: the record format and the way to the kernels.

    `bits` per value; `bucket_size` consecutive values share their scales, -1 makes the whole layer one bucket.
    A subclass names its kernel `family`.
    """

    family: ClassVar[str]

    bits: int
    bucket_size: int

    def __post_init__(self) -> None:
        if self.bucket_size < 1 and self.bucket_size != -1:
            raise ValueError(
                f"{type(self).__name__} needs a bucket size of at least 1, or -1 for the whole layer, "
                f"got {self.bucket_size}"
            )

    @property
    def shard_bucket_size(self) -> int | None:
        """Values that share scales, within what one rank owns of a layer; None where all of them do."""
        return self.bucket_size

    def with_bits(self, bits: int) -> Self:
        """The same quantizer at another width; ValueError where it has none such."""
        if bits != self.bits:
            raise ValueError(f"{type(self).__name__} has one width and no other, got bits={bits}")
        return self

    def record_bytes(self, count: int, bits: int) -> int:
        """Exact length of the record of a bucket of `count` values at a width."""
        return kernels.record_bytes(self.family, count, bits)

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values, known without seeing them."""
        length = max(count, 1) if self.shard_bucket_size is None else bucket_length(count, self.bucket_size)
        full, rest = divmod(count, length)
        return full * self.record_bytes(length, self.bits) + (self.record_bytes(rest, self.bits) if rest else 0)

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        """float32 [R, N] -> uint8 [R, B]; the rows draw independent random numbers from `seed`."""
        values_RN = values_RN.to(torch.float32).contiguous()
        rows, count = values_RN.shape
        layout = self._plan(rows, count)
        wire = torch.empty(layout.wire_bytes, dtype=torch.uint8, device=values_RN.device)
        keys = stream_keys(seed, 0, layout.layers, 0, 0)
        kernels.for_device(wire.device).encode(self.family, layout, values_RN.view(-1), keys, wire)
        return wire.view(rows, self.wire_bytes(count))

    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        """uint8 [R, B] -> float32 [R, count]."""
        rows = wire_RB.shape[0]
        out = torch.empty(rows * count, dtype=torch.float32, device=wire_RB.device)
        wire = wire_RB.reshape(-1)
        if len(wire) != rows * self.wire_bytes(count):
            raise ValueError(
                f"{count} values make a message of {self.wire_bytes(count)} bytes, got {wire_RB.shape[1]}"
            )
        kernels.for_device(wire.device).decode(self.family, self._plan(rows, count), wire, out)
        return out.view(rows, count)

    def _plan(self, rows: int, count: int) -> Plan:
        layers = [Layer(row, str(row), (count,), True) for row in range(rows)]
        segments = [Segment(layer, row * count, row * count) for row, layer in enumerate(layers)]
        shares = {layer.name: [(0, count)] for layer in layers}
        widths = dict.fromkeys(shares, self.bits)
        return plan(segments, [0], shares, widths, self.shard_bucket_size, self.record_bytes)


@dataclass(frozen=True)
class VariableWidth(Quantizer):
    """A quantizer of any width from `min_bits` to 8, whose codes are rounded at random and unbiased."""

    min_bits: ClassVar[int] = 1

    bits: int
    bucket_size: int = 512

    def __post_init__(self) -> None:
        if not self.min_bits <= self.bits <= 8:
            name = type(self).__name__
            raise ValueError(f"{name} codes are {self.min_bits} to 8 bits wide, got bits={self.bits}")
        super().__post_init__()

    def with_bits(self, bits: int) -> Self:
        return replace(self, bits=bits)

    def expected_squared_error(self, values: Tensor) -> float:
        """E |v - decode(encode(v))|^2 over the rounding, in closed form. `values`: float32, any shape.

        The sum of (h - v) (v - l), the variance of rounding v to its neighbors l and h without bias.
        """
        flat = values.detach().to(torch.float32).reshape(1, -1)
        layout = self._plan(1, flat.shape[1])
        return kernels.for_device(flat.device).expected_squared_error(self.family, layout, flat.view(-1))


class MaxMin(VariableWidth):
    """Uniform levels between each bucket's minimum and maximum, rounded at random.

    u = (max - min) / (2^b - 1); code = floor((x - min) / u + U[0, 1)); value = min + u code. Rounding up with
    probability equal to the fraction makes it unbiased, with variance u^2 f (1 - f) at fraction f. After QSGD (Alistarh
    et al. 2017, arXiv:1610.02132), with a range per bucket in place of the norm.
    """

    family = "maxmin"


class NormUniform(VariableWidth):
    """QSGD with the maximum norm: uniform levels on both sides of zero, rounded at random.

    s = 2^(b-1) - 1 levels a side; code = s + floor(s x / norm + U[0, 1)); value = (code - s) norm / s, so that zero
    stays exactly zero. Alistarh et al. 2017 (arXiv:1610.02132), section 3.1; theirs is the Euclidean norm, and signs
    and levels are coded in a varying number of bits.
    """

    family = "norm_uniform"
    min_bits = 2


class Exponential(VariableWidth):
    """NUQSGD with the maximum norm: levels that halve towards zero, rounded at random between neighbors.

    Levels 0, 2^-(s-1), ..., 1/4, 1/2, 1 times the norm, of both signs, s = 2^(b-1) - 1; the code is s plus the signed
    index of the level. Between zero and the least level it rounds at random as well, so that small values keep their
    mean. Ramezani-Kebrya et al. 2021 (JMLR 22:114), with the Euclidean norm and a varying number of bits.
    """

    family = "exponential"
    min_bits = 2


class Quantile(VariableWidth):
    """A table of 2^b levels at the quantiles of the values, rounded at random between neighbors.

    The end levels are the minimum and the maximum. The table serves the whole run of a layer that one rank owns and
    travels with it, in 4 x 2^b bytes; `bucket_size` only says where a layer may be cut between ranks. Quantiles are
    taken from a histogram (`kernels.families.Quantile` says how fine), which leaves the code unbiased.
    """

    family = "quantile"

    @property
    def shard_bucket_size(self) -> int | None:
        return None


@dataclass(frozen=True)
class OneBit(Quantizer):
    """The sign of each value, and per bucket the mean of the negatives and the mean of the others.

    Deterministic and biased: it needs error feedback. The two means are the best that signs can do, the projection of
    the bucket on what is constant over the negatives and over the others: nothing is left to project. Seide et al.
    2014 (Interspeech), who take the means over each column of a weight matrix.
    """

    family = "1bit"

    bits: int = field(default=1, init=False)
    bucket_size: int = 512


@dataclass(frozen=True)
class TernGrad(Quantizer):
    """Three values, s sign(x) with probability |x| / s and else 0, five to a byte.

    s is the largest magnitude after clipping at 2.5 sigma: the root mean square of the bucket. Unbiased for the clipped
    values. Wen et al. 2017 (arXiv:1705.07878), who take s and sigma, the standard deviation, over each layer.
    """

    family = "terngrad"

    bits: int = field(default=2, init=False)  # of a code, before five of them make a byte
    bucket_size: int = 512
