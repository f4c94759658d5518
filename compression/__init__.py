"""Gradient compression: tensors and ranks; no images, no models.

codec (arithmetic) x collectives (network) x averager (how ranks agree), three modules that do not know one another,
joined to a model's backward by an exchange.

    exchange = attach(ddp_model, "maxmin", bits=4, error_feedback=True)

Names are loaded when they are used: importing this package loads neither torch nor anything else that is heavy.
Python 3.14 has a package `compression` of its own, and parts of the standard library import from it. Where ours comes
first on the path, those find the standard library's modules (`compression.zstd` and what `gzip` wants) in here.
"""

import importlib
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

ARITHMETIC = 2
"""Version of what compressors compute of the same gradients and seed. CHANGELOG.md says what each changed."""

if TYPE_CHECKING:
    from .advice.advice import Advice
    from .advice.advisor import advise, on_paper
    from .advice.choices import Choice
    from .advice.measured import Measured
    from .advice.simulated import CLUSTER_KEYS, cluster_of
    from .advice.widths import step_by_widths
    from .averagers.observed import observe
    from .exchange.attached import Attached
    from .exchange.attachment import attach
    from .exchange.broken_barrier import BrokenBarrier
    from .exchange.exchange import Exchange
    from .exchange.recorder import Recorder
    from .exchange.report import Report
    from .exchange.tensors import Averaging, averaging
    from .layers import DENSE, Layer
    from .network.collectives import Collectives, Metered, Solo
    from .network.heartbeat import Watch
    from .network.launchers import HOROVODRUN, TORCHRUN, Launcher
    from .network.torch_distributed import TorchDistributed
    from .network.world import Failure, World, join_ranks, one_line
    from .registry import COMPRESSORS, Compressor, build, codec, with_bits, with_stale_updates
    from .replicas import first_difference
    from .routes import Mixed, mixed

_MODULE_OF = {
    "Advice": "advice.advice",
    "CLUSTER_KEYS": "advice.simulated",
    "Choice": "advice.choices",
    "Measured": "advice.measured",
    "advise": "advice.advisor",
    "cluster_of": "advice.simulated",
    "on_paper": "advice.advisor",
    "COMPRESSORS": "registry",
    "DENSE": "layers",
    "Attached": "exchange.attached",
    "Averaging": "exchange.tensors",
    "HOROVODRUN": "network.launchers",
    "TORCHRUN": "network.launchers",
    "BrokenBarrier": "exchange.broken_barrier",
    "Collectives": "network.collectives",
    "Compressor": "registry",
    "Exchange": "exchange.exchange",
    "Failure": "network.world",
    "Launcher": "network.launchers",
    "Layer": "layers",
    "Metered": "network.collectives",
    "Mixed": "routes",
    "Recorder": "exchange.recorder",
    "Report": "exchange.report",
    "Solo": "network.collectives",
    "TorchDistributed": "network.torch_distributed",
    "Watch": "network.heartbeat",
    "World": "network.world",
    "attach": "exchange.attachment",
    "averaging": "exchange.tensors",
    "build": "registry",
    "codec": "registry",
    "first_difference": "replicas",
    "join_ranks": "network.world",
    "mixed": "routes",
    "observe": "averagers.observed",
    "one_line": "network.world",
    "step_by_widths": "advice.widths",
    "with_bits": "registry",
    "with_stale_updates": "registry",
}

__all__ = [
    "CLUSTER_KEYS",
    "COMPRESSORS",
    "DENSE",
    "HOROVODRUN",
    "TORCHRUN",
    "Advice",
    "Attached",
    "Averaging",
    "BrokenBarrier",
    "Choice",
    "Collectives",
    "Compressor",
    "Exchange",
    "Failure",
    "Launcher",
    "Layer",
    "Measured",
    "Metered",
    "Mixed",
    "Recorder",
    "Report",
    "Solo",
    "TorchDistributed",
    "Watch",
    "World",
    "advise",
    "attach",
    "averaging",
    "build",
    "cluster_of",
    "codec",
    "first_difference",
    "join_ranks",
    "mixed",
    "observe",
    "on_paper",
    "one_line",
    "step_by_widths",
    "with_bits",
    "with_stale_updates",
]


if not TYPE_CHECKING:  # else every name, misspelled ones too, would be one of the package's

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            # Loaded as a submodule of the standard library's package, before ours took its place.
            if f"{__name__}.{name}" in sys.modules:
                return sys.modules[f"{__name__}.{name}"]
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


def _beside_the_standard_library(path: list[str]) -> None:
    """Let submodules be found in the standard library's package of this name too, where it has one.

    In that folder alone: `pkgutil.extend_path` would take every folder of this name on the path.
    """
    theirs = Path(sysconfig.get_path("stdlib"), "compression")
    if __name__ == "compression" and theirs.is_dir() and str(theirs) not in path:
        path.append(str(theirs))


_beside_the_standard_library(__path__)
