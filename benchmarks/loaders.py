"""Images per second of the folder backends, on photographs.

    python benchmarks/loaders.py ARCHIVE_OR_FOLDER [--workers 2] [--batch-size 64] [--rounds 5]

Each reads the training images as training does: random resized crops of 224 pixels, flips, normalized float32. The
third row is DALI with its own reader and its own random crops: what it would take without our order, our views and
starts in the middle of an epoch. All take turns within one run; the first round warms up, the median of the others
counts.
"""

import argparse
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from image_classification import data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder that holds train/ and val/: `path` itself, or in an archive."""
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_file():
            with tarfile.open(path) as archive:
                archive.extractall(scratch, filter="data")
            path = next(Path(scratch).glob("**/train")).parent
        yield path


def epochs_of(loader: data.Loader) -> Callable[[], int]:
    """A function that reads one epoch and counts its images."""
    epoch = iter(range(sys.maxsize))
    return lambda: sum(len(labels) for _, labels in loader.epoch(next(epoch)))


def bare_dali(options: data.DataOptions, batches: int) -> Callable[[], int]:
    """The same with DALI's own reader."""
    dali: Any = import_module("nvidia.dali")

    @dali.pipeline_def(batch_size=options.batch_size, num_threads=options.workers, device_id=None, seed=options.seed)
    def pipeline() -> Any:
        files, labels = dali.fn.readers.file(file_root=str(options.root / "train"), random_shuffle=True)
        images = dali.fn.decoders.image_random_crop(files, random_area=(0.08, 1.0))
        images = dali.fn.resize(images, size=[options.image_size, options.image_size], antialias=True)
        mean, std = ([255 * value for value in channel] for channel in (MEAN, STD))
        flip = dali.fn.random.coin_flip()
        return dali.fn.crop_mirror_normalize(images, dtype=dali.types.FLOAT, mean=mean, std=std, mirror=flip), labels

    running = pipeline()
    running.build()
    return lambda: sum(len(running.run()[0]) for _ in range(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an ImageFolder tree, or a tar archive of one")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytorch, threads of DALI")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()

    with unpacked(flags.source) as root:
        loaders = []
        readers: dict[str, Callable[[], int]] = {}
        for backend in ("dali-cpu", "pytorch"):
            options = data.DataOptions(root, backend, 0, batch_size=flags.batch_size, workers=flags.workers)
            train, val = data.build(options)
            loaders += [train, val]
            readers[backend] = epochs_of(train)
        readers["DALI alone"] = bare_dali(options, len(train))

        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(flags.rounds + 1):
            for name, read in readers.items():
                began = time.perf_counter()
                images = read()
                speeds[name].append(images / (time.perf_counter() - began))
        for loader in loaders:
            loader.close()

    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
          f"DALI {version('nvidia-dali-cuda130')}, Pillow {version('pillow')}, Python {platform.python_version()}")
    print(f"{images} images an epoch, {flags.workers} workers, batches of {flags.batch_size}, {flags.rounds} rounds")
    for name, each in speeds.items():
        print(f"{name:12} {median(each[1:]):7.0f} images/s  ({min(each[1:]):.0f} to {max(each[1:]):.0f})")


if __name__ == "__main__":
    main()
