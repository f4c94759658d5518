"""Backend `syntetic`: random batches without a file, as long as ImageNet, to measure all but the loading."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from image_classification.data.options import DataOptions

TRAIN_IMAGES = 1_281_167
VAL_IMAGES = 50_000

_POOL = 4


class SyntheticLoader:
    """One rank's batches out of a small pool; see `Loader`.

    Batch i of every epoch is batch i mod 4 of the pool, so loading costs nothing: images are standard normal,
    labels uniform. The pool depends on the seed and the rank alone. Whoever gets a batch must not write into it.
    """

    def __init__(self, options: DataOptions, train: bool, pool: list[tuple[Tensor, Tensor]]) -> None:
        self.num_images = TRAIN_IMAGES if train else VAL_IMAGES
        self.global_batch = options.global_batch
        self.skipped: list[str] = []
        self._batch_size = options.batch_size
        self._pool = pool
        if train:
            self._share = self.num_images // options.global_batch * options.batch_size
        else:
            self._share = len(range(options.rank, self.num_images, options.world_size))

    def __len__(self) -> int:
        return -(-self._share // self._batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if not 0 <= start <= len(self):
            raise ValueError(f"an epoch has batches 0 to {len(self)}, cannot start at {start}")
        for batch in range(start, len(self)):
            images, labels = self._pool[batch % _POOL]
            rest = self._share - batch * self._batch_size
            yield images[:rest], labels[:rest]

    def fingerprint(self) -> dict[str, int | str]:
        return {}

    def close(self) -> None:
        pass


def build(options: DataOptions) -> tuple[SyntheticLoader, SyntheticLoader]:
    """The train loader, of 1,281,167 images, and the validation loader, of 50,000; they share one pool.

    Of the options, those of files do not apply: root, crop_scale, hflip, workers, skip_bad_images.
    """
    if options.training and options.global_batch > TRAIN_IMAGES:
        raise ValueError(f"the synthetic data set has {TRAIN_IMAGES} images, fewer than one global batch "
                         f"of {options.global_batch}; use a smaller `batch_size`")
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng((options.seed, options.rank)).integers(2**63))
    )
    pool = []
    for _ in range(_POOL):
        images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=generator)
        labels = torch.randint(options.num_classes, (options.batch_size,), generator=generator)
        on_device = images.to(options.device, memory_format=options.memory_format)
        pool.append((on_device, labels.to(options.device)))
    return SyntheticLoader(options, True, pool), SyntheticLoader(options, False, pool)
