"""Images: from the bytes of a file to the pixels of a view, by Pillow."""

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from image_classification.data.views import View

# What the suffixes promise, under whichever of them it comes. Pillow would try some fifty formats, and start
# Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadImage(ValueError):
    """A file that does not decode to an image."""


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises BadImage for what is no file, as a pipe, whose end might never come; OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadImage("it is no regular file")
    return path.read_bytes()


@contextmanager
def _bad_image() -> Iterator[None]:
    """Any error of Pillow about bytes that are already in memory becomes BadImage."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # which names an address in memory
        raise BadImage(f"it is none of {', '.join(_FORMATS)}") from error
    except Exception as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def open_image(data: bytes) -> Image.Image:
    """Read the header: format, mode and size.

    Raises BadImage, also for a header that claims more pixels than Pillow takes for honest (179 million).
    """
    with _bad_image():
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def render(image: Image.Image, view: View, image_size: int) -> np.ndarray:
    """The view's pixels, uint8 [image_size, image_size, 3] in RGB.

    Raises BadImage where the data is damaged, and for integers or floats whose range no format fixes.
    """
    image.info.pop("transparency", None)  # Pillow warns that RGB drops it
    with _bad_image():
        rgb = _eight_bits(image).convert("RGB")
    size = (image_size, image_size)
    shown = rgb.crop(view.box).resize(size, Image.Resampling.BILINEAR, box=view.region)
    return np.asarray(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray values of more than 8 bits scaled to 8: Pillow would cut them off at 255. Other images as they are."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 0 to 65535, as PPM is read
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise BadImage(f"its pixels are {kind}, of which nothing says what is white; convert it to 8 or 16 bits")
    return image
