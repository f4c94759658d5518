"""The table of backends, the synthetic one, and the word `digits`."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classification import data
from image_classification.data import digits
from image_classification.data.folders import list_splits
from tests.support.image_folders import options, same

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000


def test_the_backends_have_the_names_of_the_command_line():
    assert set(data.BACKENDS) == {"pytorch", "syntetic", "dali-gpu", "dali-cpu"}


@pytest.mark.parametrize("name", data.BACKENDS)
def test_a_backend_that_is_installed_serves_as_asked(name):
    assert data.resolve_backend(name) == (name, None)


def test_synthetic_is_the_same_as_syntetic():
    assert data.resolve_backend("synthetic") == ("syntetic", None)


def test_dali_on_the_cpu_is_the_default():
    assert data.resolve_backend(None) == ("dali-cpu", None)


def test_an_unknown_backend_is_an_error_with_the_choices():
    with pytest.raises(
        ValueError, match=r"^unknown data backend 'dali'; choose one of pytorch, syntetic, dali-gpu, dali-cpu$"
    ):
        data.resolve_backend("dali")


def test_without_dali_pytorch_serves_and_a_warning_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert data.resolve_backend(None) == (
        "pytorch",
        "NVIDIA DALI is not installed (nvidia-dali-cuda130): the slower pytorch backend loads the data",
    )
    assert data.resolve_backend("pytorch") == ("pytorch", None)


@pytest.mark.parametrize("name", ["dali-cpu", "dali-gpu"])
def test_dali_asked_for_and_not_installed_is_an_error_that_names_the_package(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    words = f"^data backend {name} needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130, or use"
    for ask in (lambda: data.resolve_backend(name), lambda: data.build(options(Path("x"), name))):
        with pytest.raises(ValueError, match=words):
            ask()


def synthetic(**changes):
    return data.build(options(Path("nowhere"), "synthetic", **changes))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(50, 300))
def test_the_synthetic_epoch_is_as_long_as_imagenet(world_size, batch_size):
    counts = []
    for rank in range(world_size):
        train, val = synthetic(rank=rank, world_size=world_size, batch_size=batch_size, image_size=1)
        assert len(train) == TRAIN_IMAGES // (world_size * batch_size)
        assert (train.num_images, val.num_images) == (TRAIN_IMAGES, VAL_IMAGES)
        counts.append(sum(len(labels) for _, labels in val.epoch(0)))
        assert len(val) == -(-counts[-1] // batch_size)
    assert sum(counts) == VAL_IMAGES


def first_batches(loader, count=6, epoch=0, start=0):
    return [batch for batch, _ in zip(loader.epoch(epoch, start), range(count), strict=False)]


def test_synthetic_batches_come_from_the_seed_and_the_rank_alone():
    runs = {
        (seed, rank): first_batches(synthetic(seed=seed, rank=rank, world_size=2)[0])
        for seed in (1, 2)
        for rank in (0, 1)
    }
    values = list(runs.values())
    assert not any(same(values[i], values[j]) for i in range(4) for j in range(i))
    state = torch.get_rng_state()
    assert same(first_batches(synthetic(seed=2, rank=1, world_size=2)[0]), runs[2, 1])
    assert torch.equal(torch.get_rng_state(), state)


def test_synthetic_batches_are_as_the_options_ask():
    train, _ = synthetic(image_size=5, batch_size=3, num_classes=2, memory_format=torch.channels_last)
    batches = first_batches(train)
    for images, labels in batches:
        assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (3, 3, 5, 5), torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.max() <= 1
    assert not torch.equal(batches[0][0], batches[1][0])
    assert same(first_batches(train, count=3, start=3), batches[3:])


def test_a_global_batch_beyond_the_synthetic_set_is_an_error():
    with pytest.raises(ValueError, match="has 1281167 images, fewer than one global batch of 1300000; use a smaller"):
        synthetic(batch_size=13, world_size=100_000, image_size=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradient-compression-trainer"


def write_little(folder: Path) -> None:
    (folder / "train").mkdir()


def test_the_word_digits_means_the_embedded_data_set_and_all_else_is_a_path(cache, monkeypatch):
    monkeypatch.setattr(digits, "_write", write_little)
    assert data.root("digits") == cache / "digits-v1"
    assert data.root("./digits") == Path("digits")
    assert data.root("some/folder") == Path("some/folder")


def test_without_xdg_cache_home_the_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(digits, "_write", write_little)
    assert data.root("digits") == tmp_path / ".cache" / "gradient-compression-trainer" / "digits-v1"


def test_digits_are_written_once(cache, monkeypatch):
    monkeypatch.setattr(digits, "_write", write_little)
    first = data.root("digits")
    monkeypatch.setattr(digits, "_write", None)
    assert data.root("digits") == first


def test_ranks_that_write_the_digits_at_once_agree_and_leave_nothing_behind(cache, monkeypatch):
    barrier = threading.Barrier(3)

    def together(folder: Path) -> None:
        write_little(folder)
        barrier.wait(900)

    monkeypatch.setattr(digits, "_write", together)
    roots: list[Path] = []
    ranks = [threading.Thread(target=lambda: roots.append(data.root("digits"))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert roots == [cache / "digits-v1"] * 3
    assert [path.name for path in cache.iterdir()] == ["digits-v1"]
    assert [path.name for path in roots[0].iterdir()] == ["train"]


def test_digits_that_cannot_be_written_are_no_half_data_set(cache, monkeypatch):
    def interrupted(folder: Path) -> None:
        write_little(folder)
        raise OSError("No space left on device")

    monkeypatch.setattr(digits, "_write", interrupted)
    with pytest.raises(OSError, match="No space left on device"):
        data.root("digits")
    assert list(cache.iterdir()) == []


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits._write(folder)
    return folder


def test_digits_are_split_with_a_fifth_of_every_digit_in_the_validation_set(digits_root):
    train, val = list_splits(digits_root, num_classes=10)
    assert train.classes == tuple("0123456789")
    assert (len(train), len(val)) == (1437, 360)
    for digit in range(10):
        counts = [(split.labels == digit).sum() for split in (train, val)]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.01)
    names = [{Path(name.decode()).name for name in split.names} for split in (train, val)]
    assert len(names[0] | names[1]) == 1797


def test_digits_look_like_the_data_sets_own(digits_root):
    from sklearn.datasets import load_digits

    source = load_digits()
    for path in sorted(digits_root.glob("*/*/*.png"))[::100]:
        image = Image.open(path)
        assert (image.size, image.mode, path.parent.name) == ((32, 32), "L", str(source.target[int(path.stem)]))
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), source.images[int(path.stem)].ravel())[0, 1] > 0.95


@pytest.mark.parametrize("backend", ["pytorch", "dali-cpu"])
def test_digits_load_on_every_folder_backend(digits_root, backend):
    train, val = data.build(options(digits_root, backend, batch_size=64))
    images, labels = next(train.epoch(0))
    assert (images.shape, len(train), len(labels.unique())) == ((64, 3, 32, 32), 22, 10)
    assert sum(len(labels) for _, labels in val.epoch(0)) == 360
    train.close()
    val.close()
