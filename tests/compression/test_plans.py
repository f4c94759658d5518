"""Plans: every value has one owner, every byte one record."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.gradients import Gradients
from compression.layers import BFLOAT16, DENSE, Layer, shard
from compression.plans import PlanCache, Segment, mask_owner, plan, plan_of_messages, split_into_chunks

sizes = st.integers(1, 5000)
bucket_sizes = st.sampled_from([-1, 1, 3, 64, 512, 10_000])
worlds = st.integers(1, 9)


shapes = st.lists(st.tuples(sizes, st.sampled_from([1, 3, 4, 8, BFLOAT16, DENSE])), min_size=1, max_size=5)


def record_bytes(count: int, width: int) -> int:
    return 8 + (count * width + 7) // 8


def nbytes_of(count: int, width: int) -> int:
    return {DENSE: 4 * count, BFLOAT16: 2 * count}.get(width, record_bytes(count, width))


def planned(shape, bucket_size, world_size, owners):
    """A plan of layers side by side, (values, width) each."""
    layers = [Layer(i, f"layer{i}", (numel,), True) for i, (numel, _) in enumerate(shape)]
    starts = np.cumsum([0, *(layer.numel for layer in layers)])
    segments = [Segment(layer, int(at), int(at)) for layer, at in zip(layers, starts, strict=False)]
    shards = {layer.name: shard(layer.numel, bucket_size, world_size, layer.index) for layer in layers}
    bits = {layer.name: width for layer, (_, width) in zip(layers, shape, strict=True)}
    return plan(segments, owners, shards, bits, bucket_size, record_bytes)


@settings(max_examples=50)
@given(shapes, bucket_sizes, worlds)
def test_a_plan_covers_every_value_and_every_byte_once(shape, bucket_size, world_size):
    whole = planned(shape, bucket_size, world_size, range(world_size))
    total = sum(numel for numel, _ in shape)
    values = np.zeros(total, int)
    wire = np.zeros(whole.wire_bytes, int)
    for at, count, width, record in zip(whole.position, whole.count, whole.bits, whole.wire_at, strict=True):
        values[at : at + count] += 1
        wire[record : record + nbytes_of(int(count), int(width))] += 1
    assert (values == 1).all()
    assert (wire == 1).all()
    assert whole.values == total


@settings(max_examples=50)
@given(shapes, bucket_sizes, worlds, st.integers(1, 9))
def test_chunks_hold_every_record_of_a_plan_once_in_order(shape, bucket_size, world_size, count):
    whole = planned(shape, bucket_size, world_size, range(world_size))
    parts = split_into_chunks(whole, count)
    assert len(parts) == count
    assert [sum(sent) for sent in zip(*(part.message_bytes for part in parts), strict=True)] == [*whole.message_bytes]
    found = []
    for part in parts:
        records = zip(part.count.tolist(), part.bits.tolist(), strict=True)
        nbytes = [nbytes_of(count, width) for count, width in records]
        assert part.wire_at.tolist() == [sum(nbytes[:k]) for k in range(len(nbytes))]
        assert part.wire_bytes == sum(nbytes)
        assert part.values == part.count.sum()
        found += zip(part.position, part.count, part.bits, part.slot, part.element, part.state_at, strict=True)
    columns = (whole.position, whole.count, whole.bits, whole.slot, whole.element, whole.state_at)
    assert sorted(found) == sorted(zip(*columns, strict=True))


@settings(max_examples=50)
@given(shapes, bucket_sizes, worlds, st.integers(1, 9), st.data())
def test_the_plan_of_one_owner_is_cut_at_the_same_records(shape, bucket_size, world_size, count, data):
    owner = data.draw(st.integers(0, world_size - 1))
    of_all = split_into_chunks(planned(shape, bucket_size, world_size, range(world_size)), count)
    of_one = split_into_chunks(planned(shape, bucket_size, world_size, [owner]), count)
    assert [part.message_bytes[owner] for part in of_all] == [part.wire_bytes for part in of_one]
    for everyone, own in zip(of_all, of_one, strict=True):
        first = sum(everyone.message_bytes[:owner])
        mine = (everyone.wire_at >= first) & (everyone.wire_at < first + everyone.message_bytes[owner])
        assert everyone.position[mine].tolist() == own.position.tolist()


@settings(max_examples=50)
@given(shapes, bucket_sizes, worlds, st.data())
def test_what_is_left_without_an_owners_records_lies_where_it_did(shape, bucket_size, world_size, data):
    owner = data.draw(st.integers(0, world_size - 1))
    whole = planned(shape, bucket_size, world_size, range(world_size))
    others = mask_owner(whole, owner)
    columns = ("position", "count", "bits", "slot", "element", "state_at", "wire_at")
    start = sum(whole.message_bytes[:owner])
    inside = (start <= whole.wire_at) & (whole.wire_at < start + whole.message_bytes[owner])
    for column in columns:
        assert getattr(others, column).tolist() == getattr(whole, column)[~inside].tolist()
    assert others.message_bytes == whole.message_bytes
    assert others.values == others.count.sum()


@given(st.integers(0, 3), st.integers(0, 2000), st.sampled_from([None, -1, 64, 512]), st.integers(1, 8))
def test_messages_are_planned_as_layers_of_one_owner_are(rows, count, bucket_size, bits):
    layers = [Layer(row, str(row), (count,), True) for row in range(rows)]
    segments = [Segment(layer, row * count, row * count) for row, layer in enumerate(layers)]
    shards, widths = {layer.name: [(0, count)] for layer in layers}, {layer.name: bits for layer in layers}
    expected = plan(segments, [0], shards, widths, bucket_size, record_bytes)
    found = plan_of_messages(rows, count, bits, bucket_size, record_bytes)
    for name, column in vars(found).items():
        assert np.array_equal(column, getattr(expected, name)), name


def test_plans_of_ever_other_layers_are_not_kept_for_ever() -> None:
    cache: PlanCache[tuple[str, ...]] = PlanCache()
    for k in range(3 * PlanCache.LIMIT):
        gradients = Gradients(torch.empty(0), (f"layer{k}",), (0,))
        assert [cache.of(gradients, lambda made: made.names) for _ in range(2)] == [gradients.names] * 2
    assert 0 < len(cache) <= PlanCache.LIMIT
