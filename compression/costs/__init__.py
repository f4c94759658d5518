"""Costs: seconds and bytes of an exchange of gradients on a cluster, and of a whole step around it.

`exchanges` adds up what averagers promise to send, `steps` says how much of that backward hides. Arithmetic; nothing is
sent or measured here. Benchmarks, the search and the advisor share it.
"""

from .exchanges import (
    FREE,
    Cluster,
    CodecCosts,
    Costs,
    Load,
    Parts,
    Run,
    bound,
    in_buffers,
    load_of,
)
from .steps import Compute, Prediction, Promise, StepModel, Transfer

__all__ = [
    "FREE",
    "Cluster",
    "CodecCosts",
    "Compute",
    "Costs",
    "Load",
    "Parts",
    "Prediction",
    "Promise",
    "Run",
    "StepModel",
    "Transfer",
    "bound",
    "in_buffers",
    "load_of",
]
