"""Images and models: the networks, the data that feeds them, and the loop that trains them.

It knows nothing of compression, of the network between ranks, or of the command line.

Modules are loaded when they are used (`image_classification.training.train_epoch`): importing this package loads
nothing that is heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from image_classification import (
        allocator,
        atomic,
        checkpoints,
        copies,
        data,
        interruption,
        locks,
        logs,
        losses,
        models,
        open_files,
        optim,
        precision,
        reproducibility,
        schedules,
        training,
    )

__all__ = [
    "allocator",
    "atomic",
    "checkpoints",
    "copies",
    "data",
    "interruption",
    "locks",
    "logs",
    "losses",
    "models",
    "open_files",
    "optim",
    "precision",
    "reproducibility",
    "schedules",
    "training",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
