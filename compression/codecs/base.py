"""The protocol of codecs, and the codec that changes nothing."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
        """


@dataclass(frozen=True)
class Float32:
    """Values as they are, 4 bytes each."""

    def wire_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values_RN: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        wire_RB = values_RN.to(torch.float32).contiguous().view(torch.uint8)
        return wire_RB if out is None else out.copy_(wire_RB)

    def decode(self, wire_RB: Tensor, count: int, out: Tensor | None = None) -> Tensor:
        values_RN = wire_RB.contiguous().view(torch.float32)
        return values_RN if out is None else out.copy_(values_RN)
