"""Promises of both folder backends about the batches that they read from files."""

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from image_classification import data
from image_classification.data.pillow import Flag
from image_classification.data.samples import Samples
from image_classification.torchvision_import import torchvision
from tests.support.image_folders import PHOTOS, options, pixels, same, write_folder

pytestmark = pytest.mark.filterwarnings("error")  # a warning is DALI failing on what it should decode

FOLDER_BACKENDS = ["pytorch", "dali-cpu"]
both = pytest.mark.parametrize("backend", FOLDER_BACKENDS)


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path, train=22, val=11)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    if not PHOTOS.exists():
        pytest.skip(f"the photographs are not there: {PHOTOS}")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(PHOTOS) as archive:
        archive.extractall(folder, filter="data")
    return folder / "photos"


def epochs(root, backend="pytorch", train=True, epoch=0, start=0, **changes):
    """All batches of one epoch."""
    loaders = data.build(options(root, backend, **changes))
    try:
        return list(loaders[0 if train else 1].epoch(epoch, start))
    finally:
        for loader in loaders:
            loader.close()


@both
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_are_normalized_images_and_labels(root, backend, memory_format):
    images, labels = epochs(root, backend, memory_format=memory_format)[0]
    assert (images.dtype, images.shape) == (torch.float32, (4, 3, 32, 32))
    assert (labels.dtype, labels.shape) == (torch.int64, (4,))
    assert images.is_contiguous(memory_format=memory_format)
    back = pixels(images)
    assert torch.allclose(back, back.round(), atol=1e-3)
    assert 0 <= back.min().round() <= back.max().round() <= 255


@both
def test_the_memory_format_changes_no_value(root, backend):
    assert same(epochs(root, backend), epochs(root, backend, memory_format=torch.channels_last))


@both
def test_the_number_of_workers_changes_nothing(root, backend):
    for train in (True, False):
        alone, one, three = (epochs(root, backend, train, workers=workers) for workers in (0, 1, 3))
        assert same(alone, one)
        assert same(alone, three)


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumed_in_the_middle_is_bit_exact(root, backend, workers):
    full = epochs(root, backend, epoch=3, workers=workers)
    assert len(full) == 5
    for start in (0, 2, 5):
        assert same(epochs(root, backend, epoch=3, start=start, workers=workers), full[start:])


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_early_leaves_no_trace_in_the_next(root, backend, workers):
    train, val = data.build(options(root, backend, workers=workers))
    next(train.epoch(0))
    assert same(list(train.epoch(1)), epochs(root, backend, epoch=1))
    train.close()
    val.close()


@both
def test_epochs_and_seeds_differ_and_repeat(root, backend):
    labels_and_images = {
        (seed, epoch): epochs(root, backend, epoch=epoch, seed=seed) for seed in (1, 2) for epoch in (0, 1)
    }
    runs = list(labels_and_images.values())
    assert not any(same(runs[i], runs[j]) for i in range(4) for j in range(i))
    assert same(epochs(root, backend, epoch=1, seed=2), labels_and_images[2, 1])


def test_the_same_image_shows_another_view_in_every_epoch(tmp_path):
    write_folder(tmp_path, train=1, val=1, classes=1)
    first, second = (epochs(tmp_path, epoch=epoch, batch_size=1)[0][0] for epoch in (0, 1))
    assert not torch.equal(first, second)


@both
def test_no_global_random_state_moves(root, backend):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 2):
        epochs(root, backend, workers=workers)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_global_seed_changes_no_batch(root):
    torch.manual_seed(1)
    first = epochs(root, workers=2)
    torch.manual_seed(2)
    assert same(epochs(root, workers=2), first)


@both
def test_all_ranks_together_read_what_one_would(root, backend):
    together = [
        epochs(root, backend, rank=rank, world_size=2, batch_size=2, train=train)
        for train in (True, False)
        for rank in (0, 1)
    ]
    alone = epochs(root, backend) + epochs(root, backend, train=False)
    shards = [torch.cat([images for images, _ in batches]) for batches in together]

    def bag(images: torch.Tensor) -> list[int]:
        return sorted(hash(image.numpy().tobytes()) for image in images)

    assert bag(torch.cat(shards)) == bag(torch.cat([images for images, _ in alone]))


@both
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_validation_shows_what_torchvisions_transforms_show(tmp_path, backend, suffix):
    write_folder(tmp_path, val=11, suffix=suffix)
    check_against_torchvision(tmp_path, backend, image_size=48)


@both
def test_photographs_look_as_torchvision_shows_them(photos, backend):
    check_against_torchvision(photos, backend, image_size=224)


def check_against_torchvision(root, backend, image_size):
    """Mean difference of each image at most 2/255, labels equal."""
    transforms = torchvision.transforms
    shorter = round(image_size * 256 / 224)
    transform = transforms.Compose(
        [
            transforms.Resize(shorter),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = torchvision.datasets.ImageFolder(root / "val", transform)
    batches = epochs(root, backend, train=False, image_size=image_size, training=False)
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.tensor(theirs.targets))
    expected = iter(theirs)
    for images, _ in batches:
        for image in images:
            assert (pixels(image) - pixels(next(expected)[0])).abs().mean() <= 2


def test_both_backends_show_the_same_crops_and_flips(root):
    ours, dalis = (epochs(root, backend, epoch=2) for backend in FOLDER_BACKENDS)
    for (images, labels), (others, other_labels) in zip(ours, dalis, strict=True):
        assert torch.equal(labels, other_labels)
        assert (pixels(images) - pixels(others)).abs().mean((1, 2, 3)).max() <= 2


def test_both_backends_show_the_same_crops_of_photographs(photos):
    changes = {"image_size": 224, "batch_size": 16, "world_size": 12}
    ours, dalis = (epochs(photos, backend, **changes) for backend in FOLDER_BACKENDS)
    for (images, labels), (others, other_labels) in zip(ours, dalis, strict=True):
        assert torch.equal(labels, other_labels)
        assert (pixels(images) - pixels(others)).abs().mean((1, 2, 3)).max() <= 2


@both
def test_no_flip_and_no_crop_show_the_whole_image_every_time(tmp_path, backend):
    write_folder(tmp_path, train=5, val=1, classes=1)
    whole = {"crop_scale": 1.0, "hflip": 0.0, "batch_size": 5, "image_size": 32}
    for path in (tmp_path / "train" / "class0").iterdir():
        picture = torchvision.datasets.folder.pil_loader(path)
        picture.resize((64, 64)).save(path)
    first, second = (epochs(tmp_path, backend, epoch=epoch, **whole)[0][0] for epoch in (0, 1))
    order = [[int(image.sum()) for image in images] for images in (first, second)]
    assert sorted(order[0]) == sorted(order[1])


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_process_and_no_thread(root, backend, workers):
    threads = set(threading.enumerate())
    train, val = data.build(options(root, backend, workers=workers))
    unfinished = train.epoch(0)
    next(unfinished)
    list(val.epoch(0))
    for _ in range(2):
        train.close()
        val.close()
    assert multiprocessing.active_children() == []
    for thread in set(threading.enumerate()) - threads:
        thread.join(900)  # a queue's feeder may still be on its way out
        assert not thread.is_alive()


def test_workers_live_from_epoch_to_epoch(root):
    train, val = data.build(options(root, workers=2))
    processes = []
    for epoch in (0, 1):
        list(train.epoch(epoch))
        processes.append({child.pid for child in multiprocessing.active_children()})
    assert len(processes[0]) == 2
    assert processes[0] == processes[1]
    train.close()
    val.close()


def _ask(begun, flag):
    begun.set()
    for _ in range(10**7):  # seconds, and not for ever, where nobody kills it
        flag.is_set()


def test_a_process_that_is_killed_as_it_asks_takes_no_lock_along():
    forking = multiprocessing.get_context("fork")
    flag = Flag()
    for _ in range(20):  # an Event does not survive the first few
        begun = Flag()
        asking = forking.Process(target=_ask, args=[begun, flag])
        asking.start()
        while not begun.is_set():
            assert asking.is_alive()
        asking.kill()
        asking.join()
        assert not flag.is_set()
    setting = forking.Process(target=flag.set)
    setting.start()
    setting.join(900)
    assert setting.exitcode == 0
    assert flag.is_set()


def test_a_loader_and_its_workers_share_a_flag(root):
    train, val = data.build(options(root, workers=1, batch_size=1))
    next(train.epoch(0))
    assert isinstance(train._reader._running._workers_done_event, Flag)
    train.close()
    val.close()


def test_a_worker_collects_nothing_that_the_program_let_go(root, monkeypatch):
    """What is destroyed there may wait for a thread that only the program has."""
    program, rendered = os.getpid(), Samples.rendered

    class Circle:
        def __init__(self):
            self.me = self

        def __del__(self):
            if os.getpid() != program:
                os._exit(1)

    def collected_and_rendered(*args):
        assert os.getpid() != program
        gc.collect()
        return rendered(*args)

    monkeypatch.setattr(Samples, "rendered", collected_and_rendered)
    train, val = data.build(options(root, workers=1, batch_size=1))
    gc.disable()  # in the program, which is to have the circle as it forks
    try:
        Circle()
        assert len(list(train.epoch(0))) == 22
    finally:
        gc.enable()
        train.close()
        val.close()


def test_a_killed_worker_is_an_error_that_says_what_to_do(root):
    train, val = data.build(options(root, workers=1, batch_size=1))
    handler = signal.getsignal(signal.SIGCHLD)
    batches = train.epoch(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError, match=r"^a data loader process died \(.*\), most often for want of memory .* `workers`"
    ):
        list(batches)
    train.close()
    val.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_died_between_epochs_is_the_same_error(root):
    train, val = data.build(options(root, workers=1, batch_size=1))
    list(train.epoch(0))
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    with pytest.raises(ChildProcessError, match=r"^a data loader process died \([^\n]*\), most often"):
        list(train.epoch(1))
    train.close()
    val.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_is_not_the_workers_business(root, number):
    train, val = data.build(options(root, workers=2, batch_size=1))
    batches = train.epoch(0)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert len(list(batches)) == 21
    train.close()
    val.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_stands_still_is_named_and_ended(root, monkeypatch):
    monkeypatch.setattr("image_classification.data.pillow.STANDSTILL_SECONDS", 2)
    train, val = data.build(options(root, workers=1, batch_size=1))
    batches = train.epoch(0)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    with pytest.raises(ChildProcessError, match=r"^the data loader's processes have sent nothing for 2 seconds: .*"):
        list(batches)
    train.close()
    val.close()
    assert multiprocessing.active_children() == []


PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from image_classification import data
from tests.support.image_folders import options
train, _ = data.build(options(Path(sys.argv[1]), workers=2, batch_size=1))
next(train.epoch(0))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(900)
"""


def test_workers_die_with_their_parent(root):
    with subprocess.Popen([sys.executable, "-c", PARENT, root], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 900
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.1)
