"""A network of one rank that stands for many: what they would send it has the right size, and is there at once.

On it an averager does all the work that it has among so many ranks, and nothing travels: its codec's time is measured
without any other rank. What it averages means nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..network.collectives import PostedExchange, PostedGather, part_of


@dataclass
class Echo:
    """Collectives of the first of `world_size` ranks. All others send what it sends, or zeros of another length.

    `first_sent` is the time, by `time.perf_counter`, at which something was first sent since `restart`.
    """

    world_size: int
    rank: int = 0
    first_sent: float | None = field(default=None, init=False)

    def restart(self) -> None:
        self.first_sent = None

    def sent(self) -> None:
        """Note that a message leaves now."""
        self.first_sent = time.perf_counter() if self.first_sent is None else self.first_sent

    def sum_(self, values: Tensor) -> None:
        self.sent()

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        posted = self.post_exchange(sizes, 0, messages.device)
        posted.send(messages)
        return posted.wait()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        self.sent()
        return torch.cat([message if size == len(message) else message.new_zeros(size) for size in sizes])

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return _Exchange(self, torch.zeros(self.world_size - 1, sizes[self.rank], dtype=torch.uint8, device=device))

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        return _Gather(self, messages, sizes)

    def matched_by_tag(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def broadcast(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.world_size


@dataclass
class _Exchange:
    echo: Echo
    received: Tensor

    def send(self, messages: Tensor) -> None:
        self.echo.sent()

    def wait(self) -> Tensor:
        return self.received


@dataclass
class _Gather:
    echo: Echo
    messages: Tensor
    sizes: Sequence[int]

    def send(self) -> None:
        self.echo.sent()
        own = part_of(self.messages, self.sizes, self.echo.rank).clone()
        for part in self.messages.split_with_sizes(list(self.sizes)):
            part.copy_(own) if len(part) == len(own) else part.zero_()

    def wait(self) -> Tensor:
        return self.messages
