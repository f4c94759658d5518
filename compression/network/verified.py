"""Checksums of messages: what another rank sent is what arrives, or the run stops and names that rank."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .collectives import Around, Collectives, PostedExchange, PostedGather, Staged, part_of

CHECKSUM_BYTES = 4  # CRC-32, little-endian, after the message


class DamagedMessage(OSError):
    """A message whose checksum is not that of its bytes."""


@dataclass
class Verified(Staged, Around):
    """Puts a checksum behind every message of another `Collectives`, and holds what arrives against it.

    CRC-32 (ISO 3309) finds every burst of up to 32 flipped bits, and all but one in 4e9 of other damages. It guards
    exchanges and gathers. Sums are made on the way, by the network itself, and have none. On GPUs messages pass through
    the host's memory to be summed up. Empty messages are not sent, and have none either.

    `names` are the numbers by which errors call the ranks; where it is empty, their own.
    """

    inner: Collectives
    names: Sequence[int] = ()

    def sum_(self, values: Tensor) -> None:
        self.inner.sum_(values)

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return _Exchange(self, sizes, self.inner.post_exchange(_sealed_sizes(sizes), tag, device))

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        sealed = messages.new_empty(sum(_sealed_sizes(sizes)))
        return _Gather(self, sizes, messages, sealed, self.inner.post_gather(sealed, _sealed_sizes(sizes), tag))

    def opened(self, sealed: Tensor, sender: int) -> Tensor:
        """The message in a sealed one, in place. Raises DamagedMessage, which names the sender."""
        message, checksum = sealed[:-CHECKSUM_BYTES], sealed[-CHECKSUM_BYTES:]
        if len(sealed) and not torch.equal(_checksum(message), checksum.cpu()):
            sender, own = (self.names[rank] if self.names else rank for rank in (sender, self.rank))
            raise DamagedMessage(
                f"a message of {len(message)} bytes from rank {sender} arrived damaged at rank {own}: its checksum is "
                "not that of its bytes; look at the memory and the network of both hosts, and go on from the last "
                "checkpoint"
            )
        return message


@dataclass
class _Exchange:
    network: Verified
    sizes: Sequence[int]
    inner: PostedExchange

    def send(self, messages: Tensor) -> None:
        sizes = [size for rank, size in enumerate(self.sizes) if rank != self.network.rank]
        sealed = [part for message in messages.split_with_sizes(sizes) for part in _sealed(message)]
        self.inner.send(torch.cat(sealed) if sealed else messages)

    def wait(self) -> Tensor:
        own, rows = self.network.rank, self.inner.wait()
        opened = [self.network.opened(row, number + (number >= own)) for number, row in enumerate(rows)]
        return torch.stack(opened) if opened else rows.new_empty(0, self.sizes[own])


@dataclass
class _Gather:
    network: Verified
    sizes: Sequence[int]
    messages: Tensor
    sealed: Tensor
    inner: PostedGather

    def send(self) -> None:
        own = self.network.rank
        message = part_of(self.messages, self.sizes, own)
        part_of(self.sealed, _sealed_sizes(self.sizes), own).copy_(torch.cat(_sealed(message)))
        self.inner.send()

    def wait(self) -> Tensor:
        received = self.inner.wait().split_with_sizes(_sealed_sizes(self.sizes))
        return torch.cat([self.network.opened(sealed, rank) for rank, sealed in enumerate(received)])


def _checksum(message: Tensor) -> Tensor:
    """CRC-32 of uint8 [B]: uint8 [4], little-endian, on the host."""
    values: Any = message.cpu().contiguous().numpy()
    crc = zlib.crc32(values)
    return torch.frombuffer(bytearray(crc.to_bytes(CHECKSUM_BYTES, "little")), dtype=torch.uint8)


def _sealed(message: Tensor) -> list[Tensor]:
    """A message and its checksum; an empty one as it is."""
    return [message, _checksum(message).to(message.device)] if len(message) else [message]


def _sealed_sizes(sizes: Sequence[int]) -> list[int]:
    return [size + CHECKSUM_BYTES if size else 0 for size in sizes]
