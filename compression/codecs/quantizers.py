"""The quantizers, each by its torch definition (`quantizer.py` says what follows from one).

Shapes: M buckets, K values per bucket, S scales per bucket.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.reference.arithmetic import (
    HISTOGRAM_BITS,
    divided,
    leading_power,
    nan_unless_finite,
    ordered,
    pack_ternary,
    tree_sum,
    unpack_ternary,
)
from ..layers import bucket_length
from ..limits import LIMIT
from .quantizer import ScalarQuantizer, VariableWidth


class MaxMin(ScalarQuantizer, VariableWidth, family="maxmin"):
    """Uniform levels between each bucket's minimum and maximum, rounded at random.

    u = (max - min) / (2^b - 1); code = floor((x - min) / u + U[0, 1)); value = min + u code. Rounding up with
    probability equal to the fraction makes it unbiased, with variance u^2 f (1 - f) at fraction f. After QSGD (Alistarh
    et al. 2017, arXiv:1610.02132), with a range per bucket in place of the norm. The scales are (min, u).
    """

    @property
    def scale_count(self) -> int:
        return 2

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, vectors_MK: Tensor) -> Tensor:
        low, high = vectors_MK.aminmax(dim=1, keepdim=True)
        low, high = (each.clamp(-LIMIT, LIMIT) + 0.0 for each in (low, high))  # + 0.0: no negative zero
        unit = divided((high - low).clamp_max(LIMIT), self.top)
        return nan_unless_finite(vectors_MK, torch.cat([low, unit], dim=1))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        low, unit = scales_MS[:, :1], scales_MS[:, 1:]
        return torch.where(unit > 0, (vectors_MK - low) / unit, 0.0)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        return scales_MS[:, :1] + scales_MS[:, 1:] * codes_MK.to(torch.float32)

    def max_magnitude(self, scales_MS: Tensor) -> Tensor:
        highest = scales_MS[:, :1] + scales_MS[:, 1:] * self.top
        return torch.maximum(super().max_magnitude(scales_MS), highest.abs())


class SignedLevels(ScalarQuantizer):
    """Uniform levels of both signs. One scale, the norm; level = (code - s) (norm / s), s = 2^(b-1) - 1."""

    @property
    def top(self) -> int:
        return (1 << self.bits) - 2

    @property
    def zero(self) -> int:
        """The code of zero, and so the number of levels on either side."""
        return self.top // 2

    def fit(self, vectors_MK: Tensor) -> Tensor:
        return nan_unless_finite(vectors_MK, vectors_MK.abs().amax(1, keepdim=True).clamp_max(LIMIT))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        unit = divided(scales_MS, self.zero)
        return torch.where(unit > 0, vectors_MK / unit, 0.0) + self.zero

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        return (codes_MK - self.zero).to(torch.float32) * divided(scales_MS, self.zero)


class NormUniform(SignedLevels, VariableWidth, family="norm_uniform"):
    """QSGD with the maximum norm: uniform levels on both sides of zero, rounded at random.

    s = 2^(b-1) - 1 levels a side; code = s + floor(s x / norm + U[0, 1)); value = (code - s) norm / s, so that zero
    stays exactly zero. Alistarh et al. 2017 (arXiv:1610.02132), section 3.1; theirs is the Euclidean norm, and signs
    and levels are coded in a varying number of bits.
    """

    min_bits = 2


class Exponential(SignedLevels, VariableWidth, family="exponential"):
    """NUQSGD with the maximum norm: levels that halve towards zero, rounded at random between neighbors.

    Levels 0, 2^-(s-1), ..., 1/4, 1/2, 1 times the norm, of both signs, s = 2^(b-1) - 1; the code is s plus the signed
    index of the level. Between zero and the least level it rounds at random as well, so that small values keep their
    mean. Ramezani-Kebrya et al. 2021 (JMLR 22:114), with the Euclidean norm and a varying number of bits.
    """

    min_bits = 2

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        # The bits of a float32, read as an integer, are its position among the powers of two: the exponent counts
        # them, the mantissa is the way to the next one.
        zero = self.zero
        fraction = torch.where(scales_MS > 0, vectors_MK.abs() / scales_MS, 0.0)
        steps = (fraction.view(torch.int32) - ((127 - zero) << 23)).to(torch.float32) * 2.0**-23
        steps = torch.where(fraction < 2.0 ** (1 - zero), fraction * 2.0 ** (zero - 1), steps)
        return zero + torch.where(vectors_MK < 0, -steps, steps)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        steps = codes_MK - self.zero
        power = ((steps.abs() + 127 - self.zero) << 23).to(torch.int32).view(torch.float32)
        power = torch.where(steps == 0, 0.0, power)
        return torch.where(steps < 0, -power, power) * scales_MS


class Quantile(ScalarQuantizer, VariableWidth, family="quantile"):
    """A table of 2^b levels: the minimum, quantiles, the maximum; rounded at random between neighbors.

    The table serves the whole shard of a layer that one rank owns and travels with it, in 4 x 2^b bytes; `bucket_size`
    only says where a layer may be cut between ranks.

    Quantile k / (2^b - 1) is taken from a histogram of at most 2^16 bins, equally wide in the order of floats (a
    bin is at most 1/128 of its values wide where both signs occur, and finer where the range is smaller): it is the
    lower edge of the bin that holds the value of rank floor(k (n - 1) / (2^b - 1)). Any table leaves the code unbiased.
    """

    @property
    def shard_bucket_size(self) -> int | None:
        return None

    @property
    def scale_count(self) -> int:
        return 1 << self.bits

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, vectors_MK: Tensor) -> Tensor:
        top, count = self.top, vectors_MK.shape[1]
        keys = ordered((vectors_MK + 0.0).view(torch.int32)).to(torch.int64)  # + 0.0: one zero
        first, last = keys.aminmax(dim=1, keepdim=True)
        bit_length = torch.frexp((last - first).to(torch.float64)).exponent
        shift = (bit_length - HISTOGRAM_BITS).clamp_min(0)
        bins = (keys - first) >> shift
        ranks = torch.arange(1, top, device=keys.device) * (count - 1) // top
        edges = first + (bins.sort(dim=1).values[:, ranks] << shift)
        table = torch.cat([first, edges, last], dim=1).to(torch.int32)
        return nan_unless_finite(vectors_MK, ordered(table).view(torch.float32) + 0.0)

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        lower = torch.searchsorted(scales_MS[:, 1:-1].contiguous(), vectors_MK, right=True)
        lower = torch.where(scales_MS[:, :1].isnan(), 0, lower)
        span = scales_MS[:, -1:] - scales_MS[:, :1]
        half = torch.where(span <= LIMIT, 1.0, 0.5)  # no difference of two levels overflows
        low = scales_MS.gather(1, lower) * half
        gap = scales_MS.gather(1, lower + 1) * half - low
        return lower + torch.where(gap > 0, (vectors_MK * half - low) / gap, 0.0)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        return scales_MS.gather(1, codes_MK)


@dataclass(frozen=True)
class OneBit(ScalarQuantizer, family="1bit"):
    """The sign of each value, and per bucket the mean of the negatives and the mean of the others.

    Deterministic and biased: it needs error feedback. The two means are the best that signs can do, the projection of
    the bucket on what is constant over the negatives and over the others: nothing is left to project. Seide et al.
    2014 (Interspeech), who take the means over each column of a weight matrix.

    The scales are (mean of the others, mean of the negatives), in the order of the codes: 1 for a negative value.
    """

    projects = False

    bits: int = field(default=1, init=False)
    bucket_size: int = 512

    @property
    def scale_count(self) -> int:
        return 2

    @property
    def top(self) -> int:
        return 1

    def fit(self, vectors_MK: Tensor) -> Tensor:
        power = leading_power(vectors_MK)
        fractions, means = vectors_MK / power, []
        for members in (~(vectors_MK < 0), vectors_MK < 0):
            count = members.sum(1).clamp_min(1).to(torch.float32)
            means.append(tree_sum(fractions * members) / count * power[:, 0])
        return nan_unless_finite(vectors_MK, torch.stack(means, dim=1).clamp(-LIMIT, LIMIT))

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        return (vectors_MK < 0).to(torch.float32)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        return torch.where(codes_MK > 0, scales_MS[:, 1:], scales_MS[:, :1])


@dataclass(frozen=True)
class Ternary(SignedLevels, family="ternary"):
    """Three values, s sign(x) with probability |x| / s and else 0, five to a byte. s is the largest magnitude."""

    bits: int = field(default=2, init=False)  # of a code, before five of them make a byte
    bucket_size: int = 512

    def packed_bytes(self, count: int) -> int:
        return -(-count // 5)

    def pack(self, codes_MK: Tensor) -> Tensor:
        return pack_ternary(codes_MK)

    def unpack(self, packed_MB: Tensor, count: int) -> Tensor:
        return unpack_ternary(packed_MB, count)


@dataclass(frozen=True)
class TernGrad(Ternary, family="terngrad"):
    """Three values, s sign(x) with probability |x| / s and else 0, five to a byte.

    s is the largest magnitude after clipping at 2.5 sigma: the root mean square of the bucket. Unbiased for the clipped
    values. Wen et al. 2017 (arXiv:1705.07878), who take s and sigma, the standard deviation, over each layer, and send
    averages as they are; here they are `Ternary`, without a second clipping.
    """

    @property
    def of_averages(self) -> Ternary:
        return Ternary(self.bucket_size)

    def fit(self, vectors_MK: Tensor) -> Tensor:
        power = leading_power(vectors_MK)
        fractions = vectors_MK / power
        mean = divided(tree_sum(fractions * fractions).unsqueeze(1), vectors_MK.shape[1])
        clipped = torch.minimum(super().fit(vectors_MK), 2.5 * (mean.double().sqrt().float() * power))
        return nan_unless_finite(vectors_MK, clipped)

    def bias_bound(self, values_RN: Tensor) -> Tensor:
        """What clipping takes from each value, which is the bias of its code: [R, N]."""
        length = bucket_length(values_RN.shape[1], self.bucket_size)
        return torch.cat([(part.abs() - self.fit(part)).clamp_min(0) for part in values_RN.split(length, 1)], dim=1)
