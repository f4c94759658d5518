"""Samples: one split as a function of (epoch, index), the same wherever and whenever it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from image_classification.data.folders import Split
from image_classification.data.images import BadImage, open_image, read_file, render
from image_classification.data.options import DataOptions
from image_classification.data.views import View, train_view, val_view

T = TypeVar("T")

# First word of every seed, so that the order of an epoch and the view of an image never share a stream.
_ORDER, _VIEW = 1, 2


@dataclass(frozen=True)
class Sample(Generic[T]):
    """Content that `load` made of a file, its label, and the undecodable files passed over on the way, with reasons.

    A sample that is left out has no content.
    """

    content: T | None
    label: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """The images of one split, in the order and the views that the options ask for.

    An undecodable file is an error that names it. With `skip_bad_images` a training sample shows the next file of
    the list that decodes in its place, with that file's label, so that every rank keeps its number of batches;
    a validation sample is left out, so that no image counts twice.
    """

    split: Split
    options: DataOptions
    train: bool

    def order(self, epoch: int) -> np.ndarray:
        """int64 [N]: the order in which all ranks together read the images."""
        if not self.train:
            return np.arange(len(self.split))
        return np.random.default_rng((_ORDER, self.options.seed, epoch)).permutation(len(self.split))

    def view(self, epoch: int, index: int, width: int, height: int) -> View:
        """View of sample `index` on an image of this size in this epoch."""
        if not self.train:
            return val_view(width, height, self.options.image_size)
        seed = (_VIEW, self.options.seed, epoch, index)
        return train_view(width, height, self.options.crop_scale, self.options.hflip, seed)

    def load(
        self, epoch: int, index: int, prepare: Callable[[bytes, Image.Image, View], T]
    ) -> Sample[T]:
        """Prepare sample `index`, from its file's bytes, opened image and view.

        Raises BadImage where the file does not decode, and bad images are not to be skipped, or none decodes. Raises
        OSError where the file cannot be read; that is never skipped, for it may not last.
        """
        skipped: list[str] = []
        for file in (*range(index, len(self.split)), *range(index)):
            path = self.split.path(file)
            try:
                data = read_file(path)
                image = open_image(data)
                content = prepare(data, image, self.view(epoch, index, *image.size))
            except BadImage as error:
                if not self.options.skip_bad_images:
                    raise BadImage(
                        f"{path} is not a readable image ({error}); replace or remove it, or pass `skip_bad_images`"
                    ) from error
                skipped.append(f"{path} ({error})")
                if not self.train:
                    return Sample(None, int(self.split.labels[file]), tuple(skipped))
            else:
                return Sample(content, int(self.split.labels[file]), tuple(skipped))
        raise BadImage(f"{self.split.folder} holds no readable image")

    def rendered(self, epoch: int, index: int) -> Sample[np.ndarray]:
        """Sample `index` as uint8 pixels [image_size, image_size, 3], by Pillow."""
        return self.load(epoch, index, lambda _, image, view: render(image, view, self.options.image_size))
