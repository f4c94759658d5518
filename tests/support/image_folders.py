"""Small ImageFolder trees for the tests of the data backends."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from image_classification.data import DataOptions

PHOTOS = Path(__file__).parents[2] / "../shared/data/photos.tar"


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colors, as in a photograph: JPEG keeps them, and a shifted or mirrored view shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, train: int = 12, val: int = 7, classes: int = 2, suffix: str = ".jpg") -> Path:
    """`train` and `val` images, dealt to the classes in turn, of many sizes and ratios."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            folder = root / split / f"class{index % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            size = 40 + 13 * (index % 5), 40 + 17 * (index % 4)
            picture(*size, seed=index).save(folder / f"{index:03}{suffix}", quality=95)
    return root


def options(root: Path, backend: str = "pytorch", **changes: object) -> DataOptions:
    """Small batches of small images, decoded in this process."""
    defaults = {"seed": 7, "image_size": 32, "batch_size": 4, "workers": 0, "num_classes": 10}
    return DataOptions(root, backend, **{**defaults, **changes})  # type: ignore[arg-type]


def same(first: list, second: list) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalized images, back in units of 1/255."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images * std + mean) * 255
