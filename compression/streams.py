"""Phases of a job, and what keeps the streams of a GPU in order.

Nothing here knows what a job does.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Phases = Iterator[bool]
"""Of a job. Each but the last ends with whether another job may begin before the next one: what was sent travels
meanwhile. If not, only jobs that have said so go on in between."""


def run_all(phases: Phases) -> None:
    """Run phases to their end."""
    for _ in phases:
        pass


def device_future(device: torch.device) -> "torch.futures.Future[Any]":
    """A future that a job completes: on a GPU, waiting for it makes the waiter's stream wait for the job's."""
    devices: list[Any] | None = [device] if device.type == "cuda" else None
    return torch.futures.Future(devices=devices)


def record_stream(*tensors: object) -> None:
    """Keep the memory of tensors that another stream made, although it may let go of them, until this one is done."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor. A copy to a GPU is not waited for: it is made from pinned memory, which torch keeps until
    then."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
