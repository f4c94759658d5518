"""Images: from the bytes of a file to the pixels of a view, by Pillow."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from image_classification.data.views import View

# What the suffixes promise, under whichever of them it comes. Pillow would try some fifty formats, and start
# Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadImage(ValueError):
    """A file that does not decode to an image."""


@contextmanager
def _bad_image() -> Iterator[None]:
    """Any error of Pillow about bytes that are already in memory becomes BadImage."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def open_image(data: bytes) -> Image.Image:
    """Read the header: format, mode and size.

    Raises BadImage, also for a header that claims more pixels than Pillow takes for honest (179 million).
    """
    with _bad_image():
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def render(image: Image.Image, view: View, image_size: int) -> np.ndarray:
    """The view's pixels, uint8 [image_size, image_size, 3] in RGB. Raises BadImage where the data is damaged."""
    image.info.pop("transparency", None)  # Pillow warns that RGB drops it
    with _bad_image():
        rgb = image.convert("RGB")
    size = (image_size, image_size)
    shown = rgb.crop(view.box).resize(size, Image.Resampling.BILINEAR, box=view.region)
    return np.asarray(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown)
