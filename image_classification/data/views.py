"""Views: which part of an image a sample shows. Pure geometry; pixels are the backends' business.

Every backend realizes the same views, so all of them show the same crops, whoever decodes.
"""

import math
from dataclasses import dataclass

import numpy as np

_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class View:
    """Cut `box` out of the image, scale `region` of it to a square, then mirror it where `flip` is set.

    Both are (left, top, right, bottom) in pixels: `box` of the image, `region` of the box. Pixels outside the
    box do not exist; what lies outside the region still contributes to the pixels at its edge.
    """

    box: tuple[int, int, int, int]
    region: tuple[float, float, float, float]
    flip: bool


def train_view(width: int, height: int, crop_scale: float, hflip: float, seed: tuple[int, ...]) -> View:
    """A random resized crop and flip, drawn from `seed` alone (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    The crop's fraction of the area is uniform in [crop_scale, 1], its ratio log-uniform in [3/4, 4/3]. Where ten draws
    give no crop that fits, it is the largest central one of an allowed ratio.
    """
    random = np.random.default_rng(seed)
    flip = bool(random.random() < hflip)
    for fraction, ratio, across, down in random.random((_TRIES, 4)).tolist():
        area = width * height * (crop_scale + fraction * (1 - crop_scale))
        aspect = math.exp(math.log(_RATIOS[0]) + ratio * math.log(_RATIOS[1] / _RATIOS[0]))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(across * (width - crop_width + 1))
            top = int(down * (height - crop_height + 1))
            break
    else:
        crop_width = min(width, round(height * _RATIOS[1]))
        crop_height = min(height, round(width / _RATIOS[0]))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
    return View(box, (0, 0, crop_width, crop_height), flip)


def val_view(width: int, height: int, image_size: int) -> View:
    """The center of the image whose shorter side is resized to 256/224 of `image_size`.

    Resizing the central region alone gives the pixels of resizing all and cropping then, and costs no more for a
    long and narrow image. Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them.
    """
    shorter = round(image_size * 256 / 224)
    resized_width, resized_height = (shorter * side // min(width, height) for side in (width, height))
    left, top = round((resized_width - image_size) / 2), round((resized_height - image_size) / 2)
    across, down = width / resized_width, height / resized_height
    region = (left * across, top * down, (left + image_size) * across, (top + image_size) * down)
    return View((0, 0, width, height), region, flip=False)
