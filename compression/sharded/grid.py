"""Ranks of hosts x places, of which each knows two networks: the ranks of its host, and those of its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..network.collectives import Collectives


@dataclass(frozen=True)
class Grid:
    """All ranks, host by host, as far as agreements need them: R ranks on each of H hosts."""

    inside: Collectives
    between: Collectives

    def __str__(self) -> str:
        """This rank among them."""
        inside, between = self.inside, self.between
        return f"rank {inside.rank} of {inside.world_size} on host {between.rank} of {between.world_size}"

    def sum_(self, values: Tensor) -> None:
        """Add up over all ranks, in place."""
        self.inside.sum_(values)
        self.between.sum_(values)

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank."""
        return [each for host in self.between.collect(self.inside.collect(value)) for each in host]

    def fits(self, rank: int, ranks: Sequence[int]) -> bool:
        """Whether the networks are those of a grid whose ranks of this host are `ranks`; equal on all ranks.

        `rank` is this one's among all. Every rank calls it.
        """
        own = self.inside.collect(rank)
        hosts = self.between.collect(own)
        places = self.inside.collect(self.between.collect(rank))
        fits = own == list(ranks) and [list(place) for place in zip(*hosts, strict=False)] == places
        return all(self.collect(fits))
