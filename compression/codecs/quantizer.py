"""Quantizers: a few bits per value, and scales for every bucket of consecutive values.

A record is what one bucket becomes: its scales as float32, then its codes as one little-endian bit stream, padded
to a whole byte. A message is the records one after the other; nothing else travels.

A quantizer is defined in torch: from buckets to records, and back. One that rounds each value by itself
(`ScalarQuantizer`) is so by three functions: the scales of a bucket; the positions of its values on the axis of codes,
real numbers from 0 to the top code; the levels of the codes. Rounding a position at random to one of its two
neighbors, packing, projecting and the expected error follow from them, alike for all. That definition is enough to run
everywhere. Kernels that know the quantizer's family (`compression.kernels`) give the same bits faster.

All that round at random are unbiased: E[decode(encode(x))] = x for every x between the least and the largest level,
up to the rounding of float32 (a position among the codes is known to 2^-17 of a step at 8 bits). With error feedback
the decoded bucket is scaled into a projection (`ScalarQuantizer._project`), which the formulas of the
quantizers leave out.

Finite for every finite input; magnitudes and ranges beyond 3.4e38 are cut there. A bucket with a NaN or an infinity
decodes to NaN throughout.

Shapes: R messages, N values per message, B = wire_bytes(N); M buckets, K values per bucket, S scales per bucket.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..kernels.reference import arithmetic
from ..layers import bucket_length
from ..limits import HUGE, LIMIT, TINY
from ..plans import Plan, plan_of_messages
from ..randomness import Draws, stream_keys
from .base import prepared


class Quantizer(ABC):
    """A code of `bits` per value whose scales `bucket_size` consecutive values share; -1 makes the layer one bucket.

    A subclass says which `family` of the fast kernels it is, if any, among its bases: `family="maxmin"`.
    That is not inherited, since a subclass may change the arithmetic.
    """

    family: ClassVar[str | None] = None
    projects: ClassVar[bool] = True  # whether error feedback scales its code into a projection
    keyed: ClassVar[bool] = False  # whether decoding takes what encoding drew its random numbers from

    bits: int
    bucket_size: int

    def __init_subclass__(cls, family: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "family" in cls.__dict__:
            raise TypeError(f"{cls.__name__} names its family in its body; name it among the bases: family=...")
        cls.family = family

    def __post_init__(self) -> None:
        if self.bucket_size < 1 and self.bucket_size != -1:
            raise ValueError(
                f"{type(self).__name__} needs a bucket size of at least 1, or -1 for the whole layer, "
                f"got {self.bucket_size}"
            )

    # The torch definition

    @abstractmethod
    def encode_vectors(self, vectors_MK: Tensor, draws: Draws, contraction: bool) -> Tensor:
        """The records of buckets, uint8 [M, B]: unbiased, or projections of the buckets where it is a `contraction`."""

    @abstractmethod
    def decode_records(self, records_MB: Tensor, count: int, draws: Draws | None) -> Tensor:
        """The values of records of `count` values each, float32 [M, K]. `draws` are those of encoding, if `keyed`."""

    @abstractmethod
    def record_bytes(self, count: int, bits: int) -> int:
        """Exact length of the record of a bucket of `count` values at a width."""

    @abstractmethod
    def expected_squared_errors(self, vectors_MK: Tensor) -> Tensor:
        """E |v - decoded|^2 of each bucket, encoded without bias, in closed form: float64 [M]."""

    # Sizes

    @property
    def of_averages(self) -> "Quantizer":
        """The quantizer of averages of what this one has encoded: records and levels are the same."""
        return self

    @property
    def shard_bucket_size(self) -> int | None:
        """Values that share scales within one rank's shard of a layer; None where all of them do."""
        return self.bucket_size

    def with_bits(self, bits: int) -> Self:
        """The same quantizer at another width. Raises ValueError where it has none such."""
        if bits != self.bits:
            raise ValueError(f"{type(self).__name__} has one width and no other, got bits={bits}")
        return self

    def in_pieces(self, plan: Plan) -> Plan:
        """A plan as its kernels take it, buckets that are encoded in pieces cut into them."""
        return plan

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values, known without seeing them."""
        length = max(count, 1) if self.shard_bucket_size is None else bucket_length(count, self.bucket_size)
        full, rest = divmod(count, length)
        return full * self.record_bytes(length, self.bits) + (self.record_bytes(rest, self.bits) if rest else 0)

    # Messages

    def encode(self, values_RN: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """float32 [R, N] -> uint8 [R, B]; the rows draw independent random numbers from `seed`.

        Into `out` where it is given, contiguous and of that shape.
        """
        if values_RN.dtype == torch.float64:  # whose largest values would become infinite
            values_RN = torch.where(values_RN.isfinite(), values_RN.clamp(-LIMIT, LIMIT), values_RN)
        values_RN = values_RN.to(torch.float32).contiguous()
        rows, count = values_RN.shape
        plan = self._messages(rows, count)
        wire = prepared(out, (rows, self.wire_bytes(count)), torch.uint8, values_RN.device)
        self.encode_plan(plan, values_RN.view(-1), stream_keys(seed, 0, plan.layers, 0, 0), wire.view(-1))
        return wire

    def decode(self, wire_RB: Tensor, count: int, out: Tensor | None = None, seed: int | None = None) -> Tensor:
        """uint8 [R, B] -> float32 [R, count]. Into `out` where it is given, contiguous and of that shape.

        `seed` is what encoding took; only quantizers that are `keyed` need it. Raises ValueError for a message of
        another length, and where the seed is missing.
        """
        rows = wire_RB.shape[0]
        wire = wire_RB.reshape(-1)
        if len(wire) != rows * self.wire_bytes(count):
            raise ValueError(f"{count} values make a message of {self.wire_bytes(count)} bytes, got {wire_RB.shape[1]}")
        values = prepared(out, (rows, count), torch.float32, wire_RB.device)
        plan = self._messages(rows, count)
        keys = None if seed is None else stream_keys(seed, 0, plan.layers, 0, 0)
        self.decode_plan(plan, wire, values.view(-1), keys=keys)
        return values

    # Messages of many layers, of any widths, in one call: see `kernels.Kernels` for shapes

    def encode_plan(
        self,
        plan: Plan,
        values: Tensor,
        keys: NDArray[Any],
        wire: Tensor,
        residual: Tensor | None = None,
        pending: Tensor | None = None,
    ) -> None:
        """Write the records of all buckets of a plan; with error feedback, their errors to `pending`."""
        self._kernels(wire).encode(self, plan, values, keys, wire, residual, pending)

    def decode_plan(
        self,
        plan: Plan,
        wire: Tensor,
        out: Tensor,
        factor: float = 1.0,
        accumulate: bool = False,
        keys: NDArray[Any] | None = None,
    ) -> None:
        """Set `out` to factor x decoded, or add that to it. What is `keyed` needs the keys of encoding."""
        if self.keyed and keys is None:
            raise ValueError(f"{type(self).__name__} decodes with the seed, or the keys, that encoding took")
        self._kernels(wire).decode(self, plan, wire, out, factor, accumulate, keys)

    def recode_plan(
        self,
        plan: Plan,
        received: Tensor,
        values: Tensor,
        rank: int | None,
        factor: float,
        keys: NDArray[Any],
        wire: Tensor,
        residual: Tensor | None = None,
        pending: Tensor | None = None,
        senders: NDArray[Any] | None = None,
    ) -> None:
        """Add up all ranks' values of one shard, in rank order, times `factor`, and encode the sum.

        What is `keyed` needs the keys of each message.
        """
        self._kernels(wire).recode(self, plan, received, values, rank, factor, keys, wire, residual, pending, senders)

    def backend(self, device: torch.device) -> str:
        """The name of the kernels that serve on a device: reference, cpu or cuda."""
        name: str = getattr(kernels.for_device(device, self.family), "__name__", "")
        return name.removeprefix(f"{kernels.__name__}.").partition(".")[0]

    def _kernels(self, wire: Tensor) -> kernels.Kernels:
        return kernels.for_device(wire.device, self.family)

    def _messages(self, rows: int, count: int) -> Plan:
        return self.in_pieces(plan_of_messages(rows, count, self.bits, self.shard_bucket_size, self.record_bytes))


class ScalarQuantizer(Quantizer):
    """A quantizer that rounds every value by itself to one of the levels that its bucket's scales say.

    With error feedback the scales are those of a projection, unless it `projects` not.
    """

    @property
    @abstractmethod
    def top(self) -> int:
        """The largest code."""

    @abstractmethod
    def fit(self, vectors_MK: Tensor) -> Tensor:
        """The scales [M, S] of each bucket; all NaN where a value is not finite."""

    @abstractmethod
    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        """Positions of the values on the axis of codes, float32; 0 to top after clamping, never NaN."""

    @abstractmethod
    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        """The values that codes stand for."""

    def thresholds(self, draws: Draws, count: int) -> Tensor:
        """Integers below 2^32 that decide whether positions go up, [M, count] or one for all: random ones."""
        return draws.of_values(count)

    @property
    def scale_count(self) -> int:
        """Float32 scales of a record."""
        return 1

    def encode_vectors(self, vectors_MK: Tensor, draws: Draws, contraction: bool) -> Tensor:
        scales = self.fit(vectors_MK)
        positions = self.positions(vectors_MK, scales).clamp(0, self.top)
        codes = arithmetic.round_at_random(positions, self.thresholds(draws, vectors_MK.shape[1]))
        if contraction and self.projects:
            scales = self._project(vectors_MK, scales, codes)
        return torch.cat([scales.contiguous().view(torch.uint8), self.pack(codes)], dim=1)

    def decode_records(self, records_MB: Tensor, count: int, draws: Draws | None) -> Tensor:
        head = 4 * self.scale_count
        return self.levels(arithmetic.floats_of(records_MB[:, :head]), self.unpack(records_MB[:, head:], count))

    def expected_squared_errors(self, vectors_MK: Tensor) -> Tensor:
        """As `Quantizer.expected_squared_errors`.

        Rounding up a gap g with probability f has variance g^2 f (1 - f).
        """
        scales = self.fit(vectors_MK)
        positions = self.positions(vectors_MK, scales).clamp(0, self.top)
        lower = positions.floor()
        fraction = (positions - lower).double()
        upper = (lower.to(torch.int64) + 1).clamp_max(self.top)
        gap = self.levels(scales, upper).double() - self.levels(scales, lower.to(torch.int64)).double()
        return (gap**2 * fraction * (1 - fraction)).sum(1)

    def _project(self, vectors_MK: Tensor, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        """Scales times <v, Q> / |Q|^2: decoded, they give the projection of v on Q, never longer than v.

        Levels near the largest float32 are not made larger: neither they nor the steps towards them may overflow.
        """
        max_magnitude = self.max_magnitude(scales_MS)
        unit = 1.0 / max_magnitude
        q = self.levels(scales_MS, codes_MK) * unit
        length = arithmetic.tree_sum(q * q)
        bound = torch.where(max_magnitude > HUGE, 1.0, torch.inf)
        fraction = (arithmetic.tree_sum((vectors_MK * unit) * q) / length).unsqueeze(1).clamp(-bound, bound)
        return torch.where(length.unsqueeze(1) > 0, scales_MS * fraction, scales_MS)

    def max_magnitude(self, scales_MS: Tensor) -> Tensor:
        """The largest magnitude of any scale and any level, but no denormal number: [M, 1]."""
        return scales_MS.abs().amax(1, keepdim=True).clamp_min(TINY)

    def packed_bytes(self, count: int) -> int:
        """Exact length of `count` codes."""
        return -(-count * self.bits // 8)

    def pack(self, codes_MK: Tensor) -> Tensor:
        """int64 [M, K] -> uint8 [M, packed_bytes(K)]."""
        return arithmetic.pack(codes_MK, self.bits)

    def unpack(self, packed_MB: Tensor, count: int) -> Tensor:
        """The inverse of `pack`."""
        return arithmetic.unpack(packed_MB, count, self.bits)

    def record_bytes(self, count: int, bits: int) -> int:
        kind = self.with_bits(bits)
        return 4 * kind.scale_count + kind.packed_bytes(count)


@dataclass(frozen=True)
class VariableWidth(Quantizer):
    """A quantizer of any width from `min_bits` to 8, whose codes are unbiased."""

    min_bits: ClassVar[int] = 1

    bits: int
    bucket_size: int = 512

    def __post_init__(self) -> None:
        if not self.min_bits <= self.bits <= 8:
            name = type(self).__name__
            raise ValueError(f"{name} codes are {self.min_bits} to 8 bits wide, got bits={self.bits}")
        super().__post_init__()

    def with_bits(self, bits: int) -> Self:
        return self if bits == self.bits else replace(self, bits=bits)

    def expected_squared_error(self, values: Tensor, projected: bool = False) -> float:
        """E |v - decode(encode(v))|^2 over what is random, in closed form. `values`: float32, any shape.

        Where values are rounded to a neighbor without bias, the sum of (h - v) (v - l), its neighbors being l and h.

        With `projected`, that of the projection which error feedback encodes. It loses |v|^2 - <v, Q>^2 / |Q|^2 of a
        bucket, where E <v, Q> = n = |v|^2 and E |Q|^2 = n + q, q the unbiased code's error: q n / (q + n) with the
        means in place of the draws, within 3 % of what is measured in buckets of 512 gradients. Where a few values hold
        the norm, a bucket loses up to a seventh less.
        """
        flat = values.detach().to(torch.float32).reshape(-1)
        return self._kernels(flat).expected_squared_error(self, self._messages(1, len(flat)), flat, projected)

    def encoding_error(self, values: Tensor, seed: int, projected: bool = False) -> Tensor:
        """v - decode(encode(v)) of one draw of the rounding, float32 [N]; with `projected`, of the projection."""
        flat = values.detach().to(torch.float32).reshape(-1).contiguous()
        if not projected:
            return flat - self.decode(self.encode(flat[None], seed), len(flat), seed=seed)[0]
        plan, lost = self._messages(1, len(flat)), torch.zeros_like(flat)
        wire = torch.empty(self.wire_bytes(len(flat)), dtype=torch.uint8, device=flat.device)
        self.encode_plan(plan, flat, stream_keys(seed, 0, plan.layers, 0, 0), wire, torch.zeros_like(flat), lost)
        return lost
