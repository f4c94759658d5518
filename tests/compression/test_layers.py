"""Layers: which are compressed, and how they are cut into shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.layers import compressible, layers_of, shard

sizes = st.integers(1, 5000)
bucket_sizes = st.sampled_from([-1, 1, 3, 64, 512, 10_000])
worlds = st.integers(1, 9)


@given(sizes, bucket_sizes, worlds, st.integers(0, 20))
def test_shards_partition_a_layer_at_bucket_boundaries(numel, bucket_size, world_size, first):
    shards = shard(numel, bucket_size, world_size, first)
    covered = sorted((start, stop) for start, stop in shards if start < stop)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == numel
    if bucket_size != -1:
        assert all(start % bucket_size == 0 for start, _ in covered)


@given(sizes, worlds, st.integers(0, 20))
def test_shards_differ_by_one_bucket_at_most(numel, world_size, first):
    buckets = [-(-(stop - start) // 64) for start, stop in shard(numel, 64, world_size, first)]
    assert max(buckets) - min(buckets) <= 1


@given(worlds, st.integers(0, 20))
def test_the_largest_shard_begins_at_the_layers_index_mod_world(world_size, first):
    shards = shard(64, 64, world_size, first)
    assert shards[first % world_size] == (0, 64)


@pytest.mark.parametrize(
    ("shape", "bucket_size", "expected"),
    [((64,), 8, False), ((8, 8), 64, True), ((8, 8), 65, False), ((2, 2), -1, True), ((), -1, False)],
)
def test_layers_of_two_dimensions_and_a_full_bucket_are_compressed(shape, bucket_size, expected):
    assert compressible(shape, bucket_size) is expected


def test_layers_keep_the_models_order():
    layers = layers_of([("b", (4, 4)), ("a", (3,))], 4)
    assert [(layer.index, layer.name, layer.numel) for layer in layers] == [(0, "b", 16), (1, "a", 3)]
