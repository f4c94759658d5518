"""Data: from a folder of images, or from nothing, to the batches of one rank.

A backend is one file and one row of BACKENDS. All of them read the same options and give the same `Loader`; the
folder backends give the same images, in the same order and views, from any number of workers and any start.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classification.rows import loaded

if TYPE_CHECKING:
    from image_classification.data.images import BadImage
    from image_classification.data.mixing import mixup, mixup_labels
    from image_classification.data.options import DataOptions, Loader

_MODULE_OF = {
    "BadImage": "images",
    "DataOptions": "options",
    "Loader": "options",
    "mixup": "mixing",
    "mixup_labels": "mixing",
}

__all__ = [
    "ALIASES",
    "BACKENDS",
    "DEFAULT_BACKEND",
    "BadImage",
    "DataOptions",
    "Loader",
    "build",
    "mixup",
    "mixup_labels",
    "resolve_backend",
    "root",
]

BACKENDS: dict[str, str | Callable[[DataOptions], tuple[Loader, Loader]]] = {
    "pytorch": "image_classification.data.pillow:build",
    "syntetic": "image_classification.data.synthetic:build",
    "dali-gpu": "image_classification.data.dali:build_gpu",
    "dali-cpu": "image_classification.data.dali:build_cpu",
}
"""Name -> builder of the train and the validation loader, or its name."""

ALIASES = {"synthetic": "syntetic"}

DEFAULT_BACKEND = "dali-cpu"

_DALI_PACKAGE = "nvidia-dali-cuda130"


def __getattr__(name: str) -> Any:
    """Names that need torch are loaded when they are used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def root(argument: str) -> Path:
    """The folder that the command line's DIR means: `digits` is the embedded data set, `./digits` a folder."""
    from image_classification.data.digits import digits_folder

    return digits_folder() if argument == "digits" else Path(argument)


def resolve_backend(requested: str | None) -> tuple[str, str | None]:
    """The backend that serves, and a warning where it is not the default one.

    `requested` is a name or an alias, or None for the best that serves. Raises ValueError for an unknown name, or a
    backend whose package is not installed.
    """
    name = DEFAULT_BACKEND if requested is None else ALIASES.get(requested, requested)
    if name not in BACKENDS:
        raise ValueError(f"unknown data backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if not name.startswith("dali") or _dali_is_installed():
        return name, None
    if requested is None:
        return "pytorch", f"NVIDIA DALI is not installed ({_DALI_PACKAGE}): the slower pytorch backend loads the data"
    raise ValueError(
        f"data backend {name} needs NVIDIA DALI, which is not installed: pip install {_DALI_PACKAGE}, or use pytorch"
    )


def _dali_is_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def build(options: DataOptions) -> tuple[Loader, Loader]:
    """The train and the validation loader of one rank.

    Raises ValueError where the folder or the backend is unfit.
    """
    name, _ = resolve_backend(options.backend)
    loaders: tuple[Loader, Loader] = loaded(BACKENDS[name])(options)
    return loaders
