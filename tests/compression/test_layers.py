"""Cuts and plans: every value has one owner, every byte one record."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.layers import DENSE, Layer, Segment, compressible, cut, layers_of, plan

sizes = st.integers(1, 5000)
bucket_sizes = st.sampled_from([-1, 1, 3, 64, 512, 10_000])
worlds = st.integers(1, 9)


@given(sizes, bucket_sizes, worlds, st.integers(0, 20))
def test_shares_partition_a_layer_at_bucket_boundaries(numel, bucket_size, world_size, first):
    shares = cut(numel, bucket_size, world_size, first)
    covered = sorted((start, stop) for start, stop in shares if start < stop)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == numel
    if bucket_size != -1:
        assert all(start % bucket_size == 0 for start, _ in covered)


@given(sizes, worlds, st.integers(0, 20))
def test_shares_differ_by_one_bucket_at_most(numel, world_size, first):
    buckets = [-(-(stop - start) // 64) for start, stop in cut(numel, 64, world_size, first)]
    assert max(buckets) - min(buckets) <= 1


@given(worlds, st.integers(0, 20))
def test_the_largest_share_begins_at_the_layers_index_mod_world(world_size, first):
    shares = cut(64, 64, world_size, first)
    assert shares[first % world_size] == (0, 64)


@settings(max_examples=50)
@given(st.lists(st.tuples(sizes, st.sampled_from([1, 3, 4, 8, DENSE])), min_size=1, max_size=5), bucket_sizes, worlds)
def test_a_plan_covers_every_value_and_every_byte_once(shape, bucket_size, world_size):
    layers = [Layer(i, f"layer{i}", (numel,), True) for i, (numel, _) in enumerate(shape)]
    starts = np.cumsum([0, *(layer.numel for layer in layers)])
    segments = [Segment(layer, int(at), int(at)) for layer, at in zip(layers, starts, strict=False)]
    shares = {layer.name: cut(layer.numel, bucket_size, world_size, layer.index) for layer in layers}
    bits = {layer.name: width for layer, (_, width) in zip(layers, shape, strict=True)}

    def record_bytes(count: int, width: int) -> int:
        return 8 + (count * width + 7) // 8

    whole = plan(segments, range(world_size), shares, bits, bucket_size, record_bytes)
    values = np.zeros(starts[-1], int)
    wire = np.zeros(whole.wire_bytes, int)
    for at, count, width, record in zip(whole.position, whole.count, whole.bits, whole.wire_at, strict=True):
        values[at : at + count] += 1
        wire[record : record + (4 * count if width == DENSE else record_bytes(int(count), int(width)))] += 1
    assert (values == 1).all()
    assert (wire == 1).all()
    assert whole.values == starts[-1]


@pytest.mark.parametrize(
    ("shape", "bucket_size", "expected"),
    [((64,), 8, False), ((8, 8), 64, True), ((8, 8), 65, False), ((2, 2), -1, True), ((), -1, False)],
)
def test_compressed_is_what_has_two_dimensions_and_a_whole_bucket(shape, bucket_size, expected):
    assert compressible(shape, bucket_size) is expected


def test_layers_keep_the_models_order():
    layers = layers_of([("b", (4, 4)), ("a", (3,))], 4)
    assert [(layer.index, layer.name, layer.numel) for layer in layers] == [(0, "b", 16), (1, "a", 3)]
