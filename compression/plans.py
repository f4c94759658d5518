"""Plans: where every quantization bucket of many layers lies, in memory and on the wire.

Arithmetic on sizes; no gradient is ever touched. The vocabulary is that of `layers`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .gradients import Gradients
from .layers import BFLOAT16, Ints, Layer, bucket_length

Planned = TypeVar("Planned")


class PlanCache(Generic[Planned]):
    """Plans of groups of layers, by their names and offsets. At most 64 are kept: steps that use other layers each time
    have no end of groups.
    """

    LIMIT = 64

    def __init__(self) -> None:
        self._plans: dict[tuple[tuple[str, ...], tuple[int, ...]], Planned] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        self._plans.clear()

    def of(self, gradients: Gradients, make: Callable[[Gradients], Planned]) -> Planned:
        """The plan of gradients that lie like these, made at the first time."""
        key = (gradients.names, gradients.offsets)
        if key not in self._plans:
            if len(self._plans) >= self.LIMIT:
                self._plans.clear()
            self._plans[key] = make(gradients)
        return self._plans[key]


@dataclass(frozen=True)
class Plan:
    """Positions of M buckets of many layers, in a flat buffer of values and on the wire. int64 [M] each.

    One plan drives one kernel call over all its buckets, whatever their layers, lengths and widths.
    """

    position: Ints  # of the first value, in the flat buffer
    count: Ints  # of values
    bits: Ints  # per value; DENSE is float32 as it is, BFLOAT16 its upper half, rounded
    wire_at: Ints  # byte offset of the record
    slot: Ints  # this layer's row of the stream keys
    element: Ints  # index, in the layer, of the first value
    state_at: Ints  # of the first value, in the state kept from step to step (residuals)
    layers: Ints  # [slots]: the layer index of each slot
    message_bytes: tuple[int, ...]  # length of each owner's message; the wire holds them one after the other
    values: int  # in all buckets

    @property
    def wire_bytes(self) -> int:
        return sum(self.message_bytes)

    @cached_property
    def longest(self) -> int:
        """The most values of one bucket."""
        return int(self.count.max(initial=0))

    @cached_property
    def dense(self) -> NDArray[np.bool_]:
        """The buckets that are not encoded, [M]."""
        mask: NDArray[np.bool_] = self.bits >= BFLOAT16
        return mask


@dataclass(frozen=True)
class Segment:
    """The offsets of a layer's first value: in the flat buffer, and in the state kept from step to step (residuals).

    Of a buffer that holds only a shard, both say where the layer's first value would lie, and may be negative.
    """

    layer: Layer
    offset: int
    state_offset: int


def plan(
    segments: Sequence[Segment],
    owners: Sequence[int],
    shards: Mapping[str, Sequence[tuple[int, int]]],
    bits: Mapping[str, int],
    bucket_size: int | None,
    record_bytes: Callable[[int, int], int],
) -> Plan:
    """The plan of all buckets of `segments` that belong to `owners`, one message per owner.

    `shards[name][rank]` is (start, stop) in a layer's values. A shard is cut into buckets of `bucket_size` values, or
    is one bucket where that is None. Within a message the records follow the order of `segments`.
    `record_bytes(count, bits)` is the format's; a record that is not encoded has only its values' bits.
    """
    rows: list[NDArray[np.int64]] = []
    message_bytes = []
    at = 0
    for owner in owners:
        message_start = at
        for slot, segment in enumerate(segments):
            start, stop = shards[segment.layer.name][owner]
            if start == stop:
                continue
            width = bits[segment.layer.name]
            length = stop - start if bucket_size is None else bucket_length(segment.layer.numel, bucket_size)
            element = np.arange(start, stop, length, dtype=np.int64)
            count = np.minimum(length, stop - element)
            first, last = (
                int(n) * width // 8 if width >= BFLOAT16 else record_bytes(int(n), width) for n in count[[0, -1]]
            )
            nbytes = np.full(len(count), first, np.int64)
            nbytes[-1] = last
            row = np.empty((7, len(count)), np.int64)
            row[0] = segment.offset + element
            row[1] = count
            row[2] = width
            row[3] = at + np.cumsum(nbytes) - nbytes
            row[4] = slot
            row[5] = element
            row[6] = segment.state_offset + element
            rows.append(row)
            at += int(nbytes.sum())
        message_bytes.append(at - message_start)
    table = np.concatenate(rows, axis=1) if rows else np.empty((7, 0), np.int64)
    positions, counts, bits_of, wire_at, slots, elements, state_at = (np.ascontiguousarray(column) for column in table)
    return Plan(
        positions,
        counts,
        bits_of,
        wire_at,
        slots,
        elements,
        state_at,
        layers=np.array([segment.layer.index for segment in segments], np.int64),
        message_bytes=tuple(message_bytes),
        values=int(counts.sum()),
    )


def plan_of_messages(
    rows: int, count: int, bits: int, bucket_size: int | None, record_bytes: Callable[[int, int], int]
) -> Plan:
    """The plan of `rows` messages of `count` values each, one after the other; each has a stream of its own.

    A message is cut into buckets of `bucket_size` values, or is one bucket where that is None.
    """
    length = max(count, 1) if bucket_size is None else bucket_length(count, bucket_size)
    element = np.tile(np.arange(0, count, length, dtype=np.int64), rows)
    counts = np.minimum(length, count - element)
    row = np.repeat(np.arange(rows, dtype=np.int64), len(counts) // max(rows, 1))
    sizes = {int(n): record_bytes(int(n), bits) for n in np.unique(counts)}
    nbytes = np.array([sizes[int(n)] for n in counts], np.int64)
    position = row * count + element
    return Plan(
        position,
        counts,
        np.full(len(counts), bits, np.int64),
        wire_at=np.cumsum(nbytes) - nbytes,
        slot=row,
        element=element,
        state_at=position,
        layers=np.arange(rows, dtype=np.int64),
        message_bytes=(int(nbytes.sum()),),
        values=rows * count,
    )


def split_into_chunks(whole: Plan, count: int, like: Plan | None = None) -> list[Plan]:
    """A plan cut into at most `count` plans, each with about as many bytes of every message, cut between records.

    Positions of values, and slots, stay as they are; a chunk's wire holds its own records only. The plan of
    all owners and that of one of them are cut at the same records, and so is one of other widths that is cut `like`
    the first.
    """
    edges = _edges(like or whole, count)
    return [_part(whole, edges[:, k : k + 2]) for k in range(count)]


def drop_message(whole: Plan, owner: int) -> Plan:
    """A plan but for the message of one owner, which becomes empty."""
    edges = _edges(whole, 1)
    edges[owner] = edges[owner, 0]
    return _part(whole, edges)


def mask_owner(whole: Plan, owner: int) -> Plan:
    """The buckets of a plan that are not one owner's, where they lie: the wire is that of all owners."""
    first, last = _edges(whole, 1)[owner]
    return select(whole, np.r_[:first, last : len(whole.count)])


def select(whole: Plan, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Plan:
    """The chosen buckets of a plan, by index or mask [M], where they lie: the wire stays that of all."""
    columns = ("position", "count", "bits", "wire_at", "slot", "element", "state_at")
    kept = {name: getattr(whole, name)[chosen] for name in columns}
    return replace(whole, **kept, values=int(kept["count"].sum()))


def in_pieces(whole: Plan, cut: Callable[[int, int], Sequence[tuple[int, int]]]) -> Plan:
    """A plan whose encoded buckets are cut: `cut(count, bits)` is the values and the bytes of each piece, in order.

    Pieces take the place of their bucket, in memory and on the wire.
    """
    shapes, which = np.unique(np.stack([whole.count, whole.bits], axis=1), axis=0, return_inverse=True)
    pieces = [((n, 0),) if bits >= BFLOAT16 else tuple(cut(n, bits)) for n, bits in shapes.tolist()]
    if all(len(each) == 1 for each in pieces):
        return whole
    lengths = np.array([len(each) for each in pieces], np.int64)
    parts = lengths[which]
    bucket = np.repeat(np.arange(len(parts)), parts)
    first = np.cumsum(parts) - parts
    row = (np.cumsum(lengths) - lengths)[which][bucket] + np.arange(len(bucket)) - first[bucket]
    values, nbytes = np.array([piece for each in pieces for piece in each], np.int64)[row].T
    ahead, bytes_ahead = (np.cumsum(each) - each for each in (values, nbytes))
    values_before, bytes_before = ahead - ahead[first][bucket], bytes_ahead - bytes_ahead[first][bucket]
    kept = select(whole, bucket)
    return replace(
        kept,
        position=kept.position + values_before,
        count=values,
        wire_at=kept.wire_at + bytes_before,
        element=kept.element + values_before,
        state_at=kept.state_at + values_before,
        values=whole.values,
    )


def by_owner(whole: Plan) -> Plan:
    """A plan with a slot for every layer of every owner, owner by owner, where they had one for each layer."""
    owner = np.searchsorted(np.cumsum(whole.message_bytes), whole.wire_at, side="right")
    layers = len(whole.layers)
    return replace(whole, slot=whole.slot + owner * layers, layers=np.tile(whole.layers, len(whole.message_bytes)))


def joined(plans: Sequence[Plan]) -> Plan:
    """Plans of the same layers as one: messages one after the other, values and states where they lie."""
    starts = np.cumsum([0, *(each.wire_bytes for each in plans[:-1])])
    columns = ("position", "count", "bits", "slot", "element", "state_at")
    return replace(
        plans[0],
        **{name: np.concatenate([getattr(each, name) for each in plans]) for name in columns},
        wire_at=np.concatenate([each.wire_at + start for each, start in zip(plans, starts, strict=True)]),
        message_bytes=tuple(nbytes for each in plans for nbytes in each.message_bytes),
        values=sum(each.values for each in plans),
    )


def spans(whole: Plan) -> list[tuple[int, int]]:
    """(start, stop) of the values of a plan's buckets, neighbors in one."""
    stops = whole.position + whole.count
    first = np.flatnonzero(np.r_[True, whole.position[1:] != stops[:-1]][: len(stops)])
    last = np.r_[first[1:] - 1, len(stops) - 1][: len(first)]
    return list(zip(whole.position[first].tolist(), stops[last].tolist(), strict=True))


def _edges(whole: Plan, count: int) -> Ints:
    """Records at which every message is cut into `count` parts, [owners, count + 1]: a part begins with a record."""
    ends = np.cumsum(whole.message_bytes, dtype=np.int64)
    starts = ends - whole.message_bytes
    targets = starts[:, None] + np.arange(count + 1) * (ends - starts)[:, None] // count
    return np.searchsorted(whole.wire_at, targets)


def _part(whole: Plan, edges: Ints) -> Plan:
    """The records from edges[o, 0] to below edges[o, 1] of every owner o."""
    at = np.append(whole.wire_at, whole.wire_bytes)[edges]
    rows = [np.arange(first, last) for first, last in edges]
    nbytes = np.diff(at, axis=1)[:, 0]
    shifts = at[:, 0] - (np.cumsum(nbytes) - nbytes)
    kept = select(whole, np.concatenate(rows))
    return replace(
        kept,
        wire_at=kept.wire_at - np.repeat(shifts, [len(each) for each in rows]),
        message_bytes=tuple(nbytes.tolist()),
    )
