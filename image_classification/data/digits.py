"""The embedded data set: scikit-learn's handwritten digits as a folder of PNG files.

1,797 gray images of 8x8 pixels from the UCI repository (Alpaydin and Kaynak 1998), enlarged to 32x32.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from image_classification.atomic import appearing

_SIDE = 32
_BRIGHTEST = 16


def digits_folder() -> Path:
    """The data set's folder below the user's cache ($XDG_CACHE_HOME, else ~/.cache), written at first use.

    train/0 to train/9 hold 1,437 images, val/0 to val/9 hold 360: of each digit every fifth.

    Raises OSError where the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "gradient-compression-trainer" / "digits-v1"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with appearing(folder) as beside:
            _write(beside)
    return folder


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / _BRIGHTEST)).astype(np.uint8)
    for position, index in enumerate(np.argsort(digits.target, kind="stable").tolist()):
        split = "val" if position % 5 == 0 else "train"
        parent = folder / split / str(digits.target[index])
        parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[index]).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        image.save(parent / f"{index:04}.png")
