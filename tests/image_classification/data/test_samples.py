"""The images of each rank and batch, with a reader that reads nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classification import data
from image_classification.data.folders import Split
from image_classification.data.loader import FolderLoader, Pixels
from image_classification.data.samples import Samples
from tests.support.image_folders import options, write_folder

images = st.integers(1, 120)
worlds = st.integers(1, 7)
sizes = st.integers(1, 9)
few = settings(deadline=None, max_examples=60)


class Indices:
    """A reader whose labels are the samples' indices."""

    def __init__(self, samples: Samples, batches: int) -> None:
        pass

    def read(self, epoch, batches):
        for batch in batches:
            yield Pixels(torch.zeros(len(batch), 1, 1, 3, dtype=torch.uint8), torch.from_numpy(batch.copy()), ())

    def close(self) -> None:
        pass


def loader(count: int, train: bool, rank: int, world_size: int, batch_size: int, seed: int = 7) -> FolderLoader:
    split = Split(Path("x"), ("a",), np.array([b"a/b"] * count), np.zeros(count, dtype=np.int64))
    chosen = options(Path("x"), rank=rank, world_size=world_size, batch_size=batch_size, seed=seed)
    return FolderLoader(Samples(split, chosen, train), Indices)


def read(loader: FolderLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader.epoch(epoch, start)]


@few
@given(images, worlds, sizes)
def test_validation_gives_every_image_to_exactly_one_rank(count, world_size, batch_size):
    shards = [read(loader(count, False, rank, world_size, batch_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for batch in shard for index in batch) == list(range(count))


@few
@given(images, worlds, sizes, st.booleans())
def test_the_promised_number_of_batches_comes_and_only_the_last_one_may_be_partial(count, world_size, size, train):
    for rank in range(world_size):
        one = loader(count, train, rank, world_size, size)
        batches = read(one)
        assert len(batches) == len(one)
        assert all(len(batch) == size for batch in (batches if train else batches[:-1]))


@few
@given(images, worlds, sizes, st.integers(0, 3))
def test_training_reads_an_image_at_most_once_an_epoch_and_drops_less_than_a_global_batch(
    count, world_size, batch_size, epoch
):
    shards = [read(loader(count, True, rank, world_size, batch_size), epoch) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    seen = [index for shard in shards for batch in shard for index in batch]
    assert len(seen) == len(set(seen)) == count // (world_size * batch_size) * world_size * batch_size


@few
@given(st.integers(12, 120))
def test_a_step_reads_the_same_images_however_many_ranks_share_it(count):
    def steps(world_size: int) -> list[set[int]]:
        shards = [read(loader(count, True, rank, world_size, 12 // world_size)) for rank in range(world_size)]
        return [{index for batch in step for index in batch} for step in zip(*shards, strict=True)]

    assert steps(1) == steps(2) == steps(3) == steps(12)


@few
@given(images, sizes, st.booleans(), st.data())
def test_a_start_skips_the_first_batches_exactly(count, batch_size, train, draw):
    one = loader(count, train, 0, 1, batch_size)
    start = draw.draw(st.integers(0, len(one)))
    assert read(one, 2, start) == read(one, 2)[start:]


def test_the_order_changes_with_the_epoch_and_with_the_seed_alone():
    orders = {(seed, epoch): read(loader(100, True, 0, 1, 10, seed), epoch) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len({str(order) for order in orders.values()}) == len(orders)
    assert read(loader(100, True, 0, 1, 10, seed=2), 1) == orders[2, 1]


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_epoch_is_an_error(start):
    with pytest.raises(ValueError, match=f"an epoch has batches 0 to 3, cannot start at {start}"):
        loader(30, True, 0, 1, 10).epoch(0, start)


def test_a_new_epoch_ends_the_one_before_it():
    one = loader(30, True, 0, 1, 10)
    first = one.epoch(0)
    next(first)
    assert len(list(one.epoch(1))) == 3
    assert list(first) == []


@pytest.mark.parametrize("backend", ["pytorch", "dali-cpu"])
def test_less_than_one_global_batch_is_an_error_unless_nothing_trains(tmp_path, backend):
    write_folder(tmp_path, train=11)
    with pytest.raises(
        ValueError,
        match=r"/train holds 11 images, fewer than one global batch of 12 \(4 on each of 3 ranks\); use a smaller",
    ):
        data.build(options(tmp_path, backend, world_size=3))
    train, val = data.build(options(tmp_path, backend, world_size=3, training=False))
    assert (len(train), train.num_images, val.num_images, val.global_batch) == (0, 0, 7, 12)
    train.close()
    val.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size is 1 or more, got 0"),
        ({"image_size": 0}, "image_size is 1 or more, got 0"),
        ({"workers": -1}, "workers is 0 or more, got -1"),
        ({"seed": -1}, "seed is 0 or more, got -1"),
        ({"crop_scale": 0.0}, r"crop_scale is a fraction of the image's area in \(0, 1\], got 0.0"),
        ({"hflip": 1.5}, r"hflip is a probability in \[0, 1\], got 1.5"),
        ({"rank": 2, "world_size": 2}, r"rank lies in \[0, 2\), got 2"),
    ],
)
def test_an_option_out_of_range_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        options(Path("x"), **changes)
