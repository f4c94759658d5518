"""Quantizers: a few bits per value, and scales for every bucket of consecutive values.

A record is what one bucket becomes: its scales as float32, then its codes as one little-endian bit stream, padded
to a whole byte. A message is the records one after the other; nothing else travels.

Shapes: R messages, N values per message, B = wire_bytes(N).
"""

from abc import ABC
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compression import kernels
from compression.layers import Layer, Plan, Segment, bucket_length, plan
from compression.randomness import stream_keys


@dataclass(frozen=True)
class Quantizer(ABC):
    """What all quantizers share: the record format and the way to the kernels.

    `bits` per value; `bucket_size` consecutive values share their scales, -1 makes the whole message one bucket.
    A subclass names its kernel `family`, its number of `scales` and its least width.
    """

    family: ClassVar[str]
    scales: ClassVar[int]
    min_bits: ClassVar[int] = 1

    bits: int
    bucket_size: int = 512

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.min_bits <= self.bits <= 8:
            raise ValueError(f"{name} codes are {self.min_bits} to 8 bits wide, got bits={self.bits}")
        if self.bucket_size < 1 and self.bucket_size != -1:
            raise ValueError(
                f"{name} needs a bucket size of at least 1, or -1 for the whole layer, got {self.bucket_size}"
            )

    def with_bits(self, bits: int) -> Self:
        """The same quantizer at another width."""
        return replace(self, bits=bits)

    def record_bytes(self, count: int, bits: int) -> int:
        """Exact length of the record of a bucket of `count` values at a width."""
        return 4 * self.scales + (count * bits + 7) // 8

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values, known without seeing them."""
        full, rest = divmod(count, bucket_length(count, self.bucket_size))
        length = bucket_length(count, self.bucket_size)
        total = full * self.record_bytes(length, self.bits)
        return total + (self.record_bytes(rest, self.bits) if rest else 0)

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

    def expected_squared_error(self, values: Tensor) -> float:
        """E |v - decode(encode(v))|^2 over the rounding, in closed form. `values`: float32, any shape."""
        flat = values.detach().to(torch.float32).reshape(1, -1)
        layout = self._plan(1, flat.shape[1])
        return kernels.for_device(flat.device).expected_squared_error(self.family, layout, flat.view(-1))

    def _plan(self, rows: int, count: int) -> Plan:
        layers = [Layer(row, str(row), (count,), True) for row in range(rows)]
        segments = [Segment(layer, row * count, row * count) for row, layer in enumerate(layers)]
        shares = {layer.name: [(0, count)] for layer in layers}
        widths = dict.fromkeys(shares, self.bits)
        return plan(segments, [0], shares, widths, self.bucket_size, self.record_bytes)


@dataclass(frozen=True)
class MaxMin(Quantizer):
    """Uniform levels between each bucket's minimum and maximum, rounded at random.

    u = (max - min) / (2^b - 1); code = floor((x - min) / u + U[0, 1)); value = min + u code. Rounding up with
    probability equal to the fraction makes it unbiased: E[decode(encode(x))] = x, with variance u^2 f (1 - f) at
    fraction f. After QSGD (Alistarh et al. 2017, arXiv:1610.02132), with a range per bucket in place of the norm.

    Finite for every finite input: a range beyond 3.4e38 is cut there. A bucket with a NaN or an infinity decodes to
    NaN throughout.
    """

    family = "maxmin"
    scales = 2
