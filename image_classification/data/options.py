"""Options that every data backend takes, and the loader that every one gives back."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class DataOptions:
    """One rank's view of a data set.

    `root` holds train/CLASS/* and val/CLASS/*. `crop_scale` is the least fraction of the area in a random crop, `hflip`
    the probability of a flip. `batch_size` is per rank. `workers` are loader processes, or DALI threads.
    `seed` is the same on every rank. `training=False` says that only the validation set will be read: the
    training set may then be missing, or smaller than one global batch. `validation=False` says that only the training
    set will be read. The loader of the other set has no batches, and one of them is read.
    """

    root: Path
    backend: str
    seed: int
    image_size: int = 224
    crop_scale: float = 0.08
    hflip: float = 0.5
    batch_size: int = 256
    workers: int = 5
    rank: int = 0
    world_size: int = 1
    num_classes: int = 1000
    memory_format: torch.memory_format = torch.contiguous_format
    device: torch.device = _CPU
    skip_bad_images: bool = False
    training: bool = True
    validation: bool = True

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "world_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, got {getattr(self, name)}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more, got {getattr(self, name)}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale is a fraction of the image's area in (0, 1], got {self.crop_scale}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is a probability in [0, 1], got {self.hflip}")
        if not (self.training or self.validation):
            raise ValueError("training and validation are both off, and no images are left to read")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank lies in [0, {self.world_size}), got {self.rank}")

    @property
    def global_batch(self) -> int:
        """Images that all ranks read in one step."""
        return self.batch_size * self.world_size


class Loader(Protocol):
    """The batches of one split on one rank.

    A train loader gives every rank the same number of full batches. A validation loader gives each image to
    exactly one rank: the last batch may be partial, and ranks may differ in their number of batches.
    """

    num_images: int
    """Images of the split, over all ranks."""
    global_batch: int
    """Images of a full step, over all ranks."""
    skipped: list[str]
    """Undecodable files that this rank has passed over, with reasons, as often as it met them; a reader empties it."""

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `start` on, exactly as if the first ones had been read.

        Images are float32 [B, 3, S, S], normalized; labels are int64 [B]; both are on the options' device.
        One iteration at a time: a new one ends the one before it.
        """
        ...

    def fingerprint(self) -> dict[str, int | str]:
        """What all ranks' copies of the data must have in common; nothing where there are none."""
        ...

    def close(self) -> None:
        """End all workers. The loader is of no use afterwards; closing twice is fine."""
        ...
