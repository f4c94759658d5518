"""Layers, and how they are cut into shards. Arithmetic on sizes; no gradient is ever touched.

Vocabulary: a *layer* is one parameter of the model. A *bucket* is a run of `bucket_size` consecutive values of a
layer that share one set of scales (the last may be shorter). A *shard* is the part of a layer that one rank, its
*owner*, adds up over all ranks. A *record* is one bucket on the wire, a *message* all records for one owner.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

DENSE = 32  # the width of a layer that is not encoded, and of records that are float32 as they are
BFLOAT16 = 16  # the width of records that are values rounded to bfloat16; all codes are narrower


@dataclass(frozen=True)
class Layer:
    """A trainable parameter: its place in the model's order, its name, its shape, whether it is compressed."""

    index: int
    name: str
    shape: tuple[int, ...]
    compressed: bool

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Pieces:
    """A layer that ranks hold in pieces: the values of each rank's, [W], and how many each takes in a buffer's row."""

    values: tuple[int, ...]
    padded: int

    def of(self, ranks: Sequence[int]) -> "Pieces":
        """Those of some ranks, as they lie in rows that are no shorter."""
        return Pieces(tuple(self.values[rank] for rank in ranks), self.padded)


def compressible(shape: Sequence[int], bucket_size: int) -> bool:
    """Whether a layer is compressed: it has two or more dimensions and at least one full quantization bucket.

    Decided by shape, never by name: biases and batch-norm parameters have one dimension.
    """
    numel = int(np.prod(shape, dtype=np.int64))
    return len(shape) >= 2 and numel >= max(bucket_size, 1)


def layers_of(parameters: Iterable[tuple[str, Sequence[int]]], bucket_size: int) -> tuple[Layer, ...]:
    """Layers from (name, shape) pairs of the trainable parameters, in the model's order."""
    return tuple(
        Layer(index, name, tuple(shape), compressible(shape, bucket_size))
        for index, (name, shape) in enumerate(parameters)
    )


def bucket_length(numel: int, bucket_size: int) -> int:
    """Values in a full bucket: `bucket_size`, or the whole layer where it is -1."""
    return max(numel, 1) if bucket_size == -1 else bucket_size


def owned_slices(
    layers: Sequence[Layer], bucket_size: int, ranks_per_host: int, ownership: str
) -> dict[str, list[tuple[int, int]]]:
    """The slice of every layer that each place of a host owns: (start, stop) in values, [ranks_per_host] by name.

    `ownership` is "slices", cut as `shard` cuts, or "layers", whole ones, the next largest to whoever has least, or
    "one", all to the first place. It depends on sizes and `ranks_per_host` alone, so that what a rank remembers of its
    slices outlives any regrouping of layers.
    """
    if ownership == "slices" and bucket_size != -1:
        return {layer.name: shard(layer.numel, bucket_size, ranks_per_host, layer.index) for layer in layers}
    held = [0] * ranks_per_host
    owned = {layer.name: [(0, 0)] * ranks_per_host for layer in layers}
    for layer in sorted(layers, key=lambda layer: (-layer.numel, layer.index)):
        place = 0 if ownership == "one" else held.index(min(held))
        held[place] += layer.numel
        owned[layer.name][place] = (0, layer.numel)
    return owned


def shard(numel: int, bucket_size: int, world_size: int, first: int) -> list[tuple[int, int]]:
    """The shard of each rank: (start, stop) in values, `world_size` of them, together the whole layer.

    Cuts lie on bucket boundaries, the shards differ by one bucket at most, and the larger ones begin at rank
    `first` mod `world_size`, so that small layers spread over the ranks. Depends on nothing else, so that a
    rank's residual of its shard outlives any regrouping of layers.
    """
    length = bucket_length(numel, bucket_size)
    buckets = -(-numel // length)
    base, larger = divmod(buckets, world_size)
    shards = [(0, 0)] * world_size
    start = 0
    for turn in range(world_size):
        stop = start + (base + (turn < larger)) * length
        shards[(first + turn) % world_size] = (min(start, numel), min(stop, numel))
        start = stop
    return shards
