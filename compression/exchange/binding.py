"""Bindings: a compressor bound to layers and ranks, and the state that is this rank's alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..averagers import Averager, Hierarchical
from ..layers import Layer
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives, Metered, Solo, Traffic
from ..network.inside import Levels
from ..network.verified import Verified
from ..registry import Compressor

Bind = Callable[[Compressor, Traffic | None], "Binding"]
"""(compressor, what has been counted so far) -> the compressor bound to one model's layers and ranks."""


class Binding:
    """An averager of these layers over an arrangement of ranks: of all of them, or in two levels.

    `collectives` are those of all ranks; they count the bytes of both levels.
    """

    def __init__(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        arrangement: Arrangement,
        seed: int,
        traffic: Traffic | None = None,
    ) -> None:
        """`traffic`: what has been counted so far, to be counted on."""
        self.layers, self.arrangement, self.hosts = layers, arrangement, arrangement.hosts
        self._bucket_size = compressor.bucket_size
        self.collectives = Metered(arrangement.collectives, traffic or Traffic(), self.hosts.of)
        self.averager: Averager
        if arrangement.levels is None:
            network = Verified(self.collectives) if arrangement.verify_wire else self.collectives
            self.averager = self._over_all(compressor, network, seed)
        else:
            inside, between = arrangement.levels
            metered = Metered(between, self.collectives.traffic)
            owners = self.hosts.between[inside.rank]
            levels = Levels(inside, Verified(metered, owners) if arrangement.verify_wire else metered)
            self.averager = self._in_levels(compressor, levels, seed)

    @property
    def dense_bytes(self) -> float:
        """Bytes that a rank would send for one step's averages in float32, by a ring."""
        ranks = self.collectives.world_size
        return 2 * (ranks - 1) / ranks * 4 * sum(layer.numel for layer in self.layers)

    def _over_all(self, compressor: Compressor, network: Collectives, seed: int) -> Averager:
        return compressor.averager(self.layers, network, seed)

    def _in_levels(self, compressor: Compressor, levels: Levels, seed: int) -> Averager:
        return compressor.hierarchical(self.layers, levels, seed)

    def encoded_bytes_by(self, compressor: Compressor) -> dict[str, int]:
        """Bytes of every layer by another compressor, as promised, in the unit of what a quantizer encodes.

        Of such bytes each of W ranks or hosts sends 2 (W - 1) / W, one rank alone counts as two. Messages that all
        gather weigh W / 2 times their own; half a byte is rounded up.
        """
        ranks = max(self.collectives.world_size, 2)
        averager: Averager
        if isinstance(self.averager, Hierarchical):
            levels, ownership = self.averager.levels, self.averager.ownership
            averager = Hierarchical(compressor.averager, self.layers, levels, 0, self._bucket_size, ownership)
            peers = ranks // levels.inside.world_size
        else:
            averager, peers = compressor.averager(self.layers, Solo(), 0), ranks
        scale = ranks / (2 * (peers - 1))
        halves = {layer.name: round(2 * scale * averager.bytes_sent([layer], ranks)) for layer in self.layers}
        return {name: -(-count // 2) for name, count in halves.items()}

    @property
    def position(self) -> dict[str, Any]:
        """What this rank's state depends on: `Arrangement.position`, and in two levels how layers have owners."""
        own = self.arrangement.position
        return own | {"ownership": self.averager.ownership} if isinstance(self.averager, Hierarchical) else own

    def state_dict(self) -> dict[str, Any]:
        """This rank's position, and the averager's state."""
        return {"position": self.position, "averager": self.averager.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError for another rank's state, and where it does not fit."""
        own = self.position
        position = state.get("position", own if self.arrangement.levels is None else None)  # older states have none
        remembers = any(values for values in state["averager"].values() if isinstance(values, Mapping))
        if remembers and position != own:
            raise ValueError(
                f"the state is that of {_described(position)}, and this is {_described(own)}: each rank remembers what "
                "it owes alone; save gathered_state_dict(), of which each rank takes its own"
            )
        self.averager.load_state_dict(state["averager"])

    def gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The states of all ranks, equal on all of them. Every rank calls it."""
        return {"every_rank": self.collectives.collect(state)}

    def own_state(self, state: Mapping[str, Any], ranks_alike: bool = True) -> Mapping[str, Any]:
        """This rank's of what `gathered` returned; any other state as it is.

        Where the ranks are others, any rank's has what all shared. Else raises ValueError where no rank had this one's
        position.
        """
        if "every_rank" not in state:
            return state
        states: Sequence[Mapping[str, Any]] = state["every_rank"]
        mine = [each for each in states if each["position"] == self.position] or ([] if ranks_alike else states)
        if not mine:
            raise ValueError(
                f"the state is that of {len(states)} ranks, none of which was {_described(self.position)}; start as "
                "many ranks on as many hosts"
            )
        return mine[0]


def _described(position: Mapping[str, int] | None) -> str:
    if position is None:
        return "a rank that averages in one level"
    if "place" not in position:
        return "rank {rank} of {ranks} that average in one level".format(**position)
    return "rank {number} at place {place} of {hosts} hosts x {ranks_per_host}, in two levels".format(**position)
