"""Gradient compression: tensors and ranks; no images, no models.

codec (arithmetic) x collectives (network) x averager (how ranks agree), three modules that do not know one another,
joined to a model's backward by an exchange.

    exchange = compression.attach(ddp_model, compression.build("maxmin", bits=4, error_feedback=True))
"""

from compression.attachment import attach
from compression.broken_barrier import BrokenBarrier
from compression.collectives import Collectives, Metered, Solo, TorchDistributed
from compression.exchange import Exchange, Report
from compression.layers import DENSE, Layer
from compression.recorder import Recorder
from compression.registry import COMPRESSORS, Compressor, build, can_be_late, codec, with_bits

__all__ = [
    "COMPRESSORS",
    "DENSE",
    "BrokenBarrier",
    "Collectives",
    "Compressor",
    "Exchange",
    "Layer",
    "Metered",
    "Recorder",
    "Report",
    "Solo",
    "TorchDistributed",
    "attach",
    "build",
    "can_be_late",
    "codec",
    "with_bits",
]
