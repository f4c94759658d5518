"""The program with the small architecture, as torchrun starts it, and a rank that is killed at a moment of its own.

`python -m tests.support.restartable MOMENTS ...`: MOMENTS are words `MOMENT:RANK` with commas between them, one for
each start. From the start after the last one on, nobody is killed.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

import main
from compression.network import world
from image_classification import models
from tests.support.program import own_rank, strike_in_step, tiny


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(owner: Any, name: str) -> None:
    """This process is killed when it calls something for the first time."""

    def dead(*arguments: object, **options: object) -> None:
        die()

    patch.object(owner, name, dead).start()


MOMENTS: dict[str, Callable[[], None]] = {
    "rendezvous": lambda: die_in(world, "meet"),
    "joined": lambda: die_in(world.World, "replicate"),
    "step": lambda: strike_in_step([(2, None, die)]),
    "validation": lambda: die_in(main.Run, "_validate"),
    "save": lambda: die_in(torch, "save"),
}


if __name__ == "__main__":
    moments, *argv = sys.argv[1:]
    models.ARCHITECTURES["tiny"] = tiny
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(words := moments.split(",")) and words[start]:
        moment, rank = words[start].split(":")
        if int(rank) == own_rank():
            MOMENTS[moment]()
    sys.exit(main.main(argv))
