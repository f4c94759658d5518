"""Data: from a folder of images to the batches of one rank."""

from pathlib import Path

from image_classification.data.options import DataOptions, Loader

__all__ = ["BACKENDS", "DataOptions", "Loader", "build", "resolve_backend", "root"]

BACKENDS = ("pytorch", "syntetic", "dali-gpu", "dali-cpu")


def root(argument: str) -> Path:
    """The data folder that the command line's DIR means: `digits` is the embedded data set."""
    raise NotImplementedError


def resolve_backend(requested: str | None) -> tuple[str, str | None]:
    """The backend's name, and a warning where it is not the default one. None: the flag was not given."""
    raise NotImplementedError


def build(options: DataOptions) -> tuple[Loader, Loader]:
    """The train and the validation loader of one rank."""
    raise NotImplementedError
