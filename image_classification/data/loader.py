"""The loader that all folder backends share: shards, batches and normalization.

How files become pixels is a reader's business.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from image_classification.data.folders import list_splits
from image_classification.data.options import DataOptions
from image_classification.data.samples import Sample, Samples

T = TypeVar("T")

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Pixels(NamedTuple):
    """A batch before normalization, and the undecodable files passed over on the way, with reasons."""

    images: Tensor
    """uint8 [B, S, S, 3]."""
    labels: Tensor
    """int64 [B]."""
    skipped: tuple[str, ...]


def assemble(samples: Sequence[Sample[T]], pixels_of: Callable[[list[T]], Tensor]) -> Pixels:
    """A batch from its loaded samples, but for those left out; `pixels_of` maps B contents to [B, S, S, 3]."""
    contents = [sample.content for sample in samples if sample.content is not None]
    labels = [sample.label for sample in samples if sample.content is not None]
    skipped = tuple(file for sample in samples for file in sample.skipped)
    images = pixels_of(contents) if contents else torch.empty(0)
    return Pixels(images, torch.tensor(labels, dtype=torch.int64), skipped)


def stack(rendered: Sequence[np.ndarray]) -> Tensor:
    """uint8 [S, S, 3] of each sample -> [B, S, S, 3]."""
    return torch.from_numpy(np.stack(rendered))


class Reader(Protocol):
    """Turns samples into pixels."""

    def read(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Pixels]:
        """One result for each batch of sample indices, in their order. It may be left before its end."""
        ...

    def close(self) -> None: ...


class FolderLoader:
    """One rank's batches of one split; see `Loader`.

    Rank r of W reads samples r, r + W, r + 2 W, ... of the epoch's order: the images of a step depend on the
    global batch alone, not on how many ranks share it.
    """

    def __init__(self, samples: Samples, make_reader: Callable[[Samples, int], Reader]) -> None:
        options = samples.options
        self.num_images = len(samples.split)
        self.global_batch = options.global_batch
        self.skipped: list[str] = []
        if samples.train:
            self._batches = self.num_images // self.global_batch
        else:
            images = len(range(options.rank, self.num_images, options.world_size))
            self._batches = -(-images // options.batch_size)
        self._samples = samples
        self._options = options
        self._reader = make_reader(samples, self._batches)
        self._mean = torch.tensor(_MEAN, device=options.device).mul(255).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=options.device).mul(255).view(1, 3, 1, 1)
        self._running: Generator[tuple[Tensor, Tensor], None, None] | None = None

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if not 0 <= start <= self._batches:
            raise ValueError(f"an epoch has batches 0 to {self._batches}, cannot start at {start}")
        self._stop()
        self._running = self._read(epoch, start)
        return self._running

    def _read(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        size = self._options.batch_size
        mine = self._samples.order(epoch)[self._options.rank :: self._options.world_size]
        batches = [mine[batch * size : (batch + 1) * size] for batch in range(start, self._batches)]
        for images, labels, skipped in self._reader.read(epoch, batches):
            self.skipped.extend(skipped)
            if len(labels):
                yield self._normalized(images), labels.to(self._options.device, non_blocking=True)

    def _normalized(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] on the device. Bytes travel there, a quarter of the floats."""
        if images.is_cuda:  # decoded there, on a stream that must not reuse this memory too early
            images.record_stream(torch.cuda.current_stream(images.device))
        channels_first = images.to(self._options.device, non_blocking=True).permute(0, 3, 1, 2)
        values = channels_first.to(torch.float32, memory_format=self._options.memory_format)
        return values.sub_(self._mean).div_(self._std)

    def fingerprint(self) -> dict[str, int | str]:
        return self._samples.split.fingerprint()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def close(self) -> None:
        self._stop()
        self._reader.close()


def build_folder_loaders(
    options: DataOptions, make_reader: Callable[[Samples, int], Reader]
) -> tuple[FolderLoader, FolderLoader]:
    """The train and the validation loader over `options.root`.

    `make_reader` gets the samples and the number of batches in an epoch, which may be 0.

    Raises ValueError as `list_splits` does, and for fewer training images than one global batch.
    """
    train, val = list_splits(
        options.root, options.num_classes, train=options.training, val=options.validation
    )
    if options.training and len(train) < options.global_batch:
        raise ValueError(
            f"{train.folder} holds {len(train)} images, fewer than one global batch of {options.global_batch} "
            f"({options.batch_size} on each of {options.world_size} ranks); use a smaller `batch_size`"
        )
    return (
        FolderLoader(Samples(train, options, train=True), make_reader),
        FolderLoader(Samples(val, options, train=False), make_reader),
    )
