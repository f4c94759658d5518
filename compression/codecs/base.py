"""The protocol of codecs, and those that send every value as a number of its own."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..kernels.reference.arithmetic import to_bfloat16
from ..layers import BFLOAT16, DENSE


class Codec(Protocol):
    """A pure function between R messages of N floats and R messages of B bytes, B known without seeing the values.

    Finite values decode to finite ones. Where a value is not finite, some decoded value is not finite either.
    """

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values."""

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        """float32 [R, N] -> uint8 [R, B]; random numbers follow from `seed`, independent for each message."""

    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        """uint8 [R, B] -> float32 [R, count].

        The codecs of this package take `out` as well, in `encode` and here: fresh memory costs more than the decoding.
        One that sets `keyed` to True takes the `seed` of encoding here, too.
        """


def decoded(codec: Codec, wire_RB: Tensor, count: int, seed: int) -> Tensor:
    """What `codec.encode(values_RN, seed)` decodes to, whether or not decoding takes the seed."""
    if getattr(codec, "keyed", False):
        keyed: Any = codec
        values: Tensor = keyed.decode(wire_RB, count, seed=seed)
        return values
    return codec.decode(wire_RB, count)


def prepared(out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out` where it is given, else fresh memory. ValueError where `out` is not what a codec writes to."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {dtype}, {list(shape)}, on {device}, got "
            f"{'' if out.is_contiguous() else 'not contiguous, '}{out.dtype}, {list(out.shape)}, on {out.device}"
        )
    return out


class Floats:
    """Every value as a number of its own, of `dtype`; `width` is that of records in plans."""

    dtype: ClassVar[torch.dtype]
    width: ClassVar[int]

    def wire_bytes(self, count: int) -> int:
        return self.width // 8 * count

    def encode(self, values_RN: Tensor, seed: int = 0, out: Tensor | None = None) -> Tensor:
        wire_RB = self.rounded(values_RN.to(torch.float32)).contiguous().view(torch.uint8)
        if out is None:
            return wire_RB
        return prepared(out, (wire_RB.shape[0], wire_RB.shape[1]), torch.uint8, wire_RB.device).copy_(wire_RB)

    def decode(self, wire_RB: Tensor, count: int, out: Tensor | None = None) -> Tensor:
        values_RN = wire_RB.contiguous().view(self.dtype).to(torch.float32)
        if out is None:
            return values_RN
        shape = (values_RN.shape[0], values_RN.shape[1])
        return prepared(out, shape, torch.float32, values_RN.device).copy_(values_RN)

    def rounded(self, values: Tensor) -> Tensor:
        """Float32 as the numbers that travel."""
        return values


@dataclass(frozen=True)
class Float32(Floats):
    """Values as they are, 4 bytes each."""

    dtype: ClassVar[torch.dtype] = torch.float32
    width: ClassVar[int] = DENSE


FLOAT32 = Float32()


@dataclass(frozen=True)
class BFloat16(Floats):
    """Values rounded to the nearest bfloat16, 2 bytes each.

    Magnitudes above 3.39e38 become infinite, as rounding has it: such a step is skipped.
    """

    dtype: ClassVar[torch.dtype] = torch.bfloat16
    width: ClassVar[int] = BFLOAT16

    def rounded(self, values: Tensor) -> Tensor:
        return to_bfloat16(values)
