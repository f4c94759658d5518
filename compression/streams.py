"""The phases of a job, and the order of its work on the streams of a GPU.

Nothing here knows what a job does.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Meanwhile(Enum):
    """Work that the communication thread may do between a phase of a job and the next one, while messages travel."""

    OTHERS_BEGIN = "another job may begin"
    NONE_BEGINS = "only jobs that have let others begin go on: this one has collectives whose order counts"


@dataclass(frozen=True)
class Until:
    """Other jobs may begin and go on until `ready` is true, which never raises; only then comes the next phase."""

    ready: Callable[[], bool]


Phases = Iterator[Meanwhile | Until]
"""The phases of a job, each but the last of which ends by saying what may happen meanwhile."""

POLL_SECONDS = 1e-4


def run_all(phases: Phases) -> None:
    """Run phases to their end."""
    for meanwhile in phases:
        while isinstance(meanwhile, Until) and not meanwhile.ready():
            time.sleep(POLL_SECONDS)


def device_future(device: torch.device) -> "torch.futures.Future[Any]":
    """A future that a job completes: on a GPU, waiting for it makes the waiter's stream wait for the job's."""
    devices: list[Any] | None = [device] if device.type == "cuda" else None
    return torch.futures.Future(devices=devices)


def record_stream(*tensors: object) -> None:
    """Keep the memory of tensors that another stream made, even if that one lets go of them, until this one is done."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor. A copy to a GPU is not waited for: it is made from pinned memory, which torch keeps until
    then."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
