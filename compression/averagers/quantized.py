"""The base of averagers whose messages are a quantizer's, each layer at a width of its own."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from ..codecs.base import FLOAT32, Floats
from ..codecs.quantizer import Quantizer
from ..layers import DENSE, Layer
from ..network.collectives import Collectives
from ..plans import Plan, Segment, plan
from .base import Averager

Shards = Mapping[str, Sequence[tuple[int, int]]]
"""(start, stop) of each rank's shard, by a layer's name."""


class Quantized(Averager):
    """Averages by a quantizer's codes.

    `widths` gives each compressed layer its own bits; missing ones take the codec's. DENSE stands for a layer that is
    not encoded, whatever it travels as (`dense`).
    """

    def __init__(
        self,
        codec: Quantizer,
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        dense: Floats = FLOAT32,
    ) -> None:
        self.codec, self.collectives, self.seed = codec, collectives, seed
        self.dense = dense
        self.layers = {layer.name: layer for layer in layers}
        self.widths: dict[str, int] = {layer.name: codec.bits if layer.compressed else DENSE for layer in layers}

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from now on; DENSE sends a layer without encoding it. Unnamed layers keep theirs."""
        for name, bits in widths.items():
            if name not in self.layers or not (self.layers[name].compressed or bits == DENSE):
                raise ValueError(f"{name} is not a compressed layer of this model")
            if bits != DENSE:
                self.codec.with_bits(bits)  # checks the range
        self.widths.update(widths)

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        kind = self.dense if bits == DENSE else self.codec.with_bits(bits)
        shards = self._shards(layers, world_size)
        return [sum(kind.wire_bytes(stop - start) for start, stop in shards[layer.name]) for layer in layers]

    @abstractmethod
    def _shards(self, layers: Sequence[Layer], world_size: int) -> Shards:
        """The shards of layers among so many ranks."""

    def _plan(
        self, segments: Sequence[Segment], owners: Sequence[int], shards: Shards, of_all: int | None = None
    ) -> Plan:
        """The plan of some owners' shards; with `of_all`, that is the width of every layer that is encoded."""
        dense, widths = self.dense.width, self.widths.items()
        bits = {name: dense if width == DENSE else of_all or width for name, width in widths}
        return plan(segments, owners, shards, bits, self.codec.shard_bucket_size, self.codec.record_bytes)
