"""main.py with one compressor more, for comparison: `--compression-type bfloat16`, what a user would take instead.

Gradients are rounded to bfloat16 and added up by the network as such, so half of float32's bytes travel. torch's own
hook for that refuses gloo. It is no compressor of the program's, since the list of those is a contract.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from compression import COMPRESSORS, Collectives, Layer
from compression.averagers import Averager
from compression.averagers.base import Sent, all_reduced
from compression.gradients import Gradients
from compression.registry import DenseOptions, Row


class BFloat16(Averager):
    """All-reduce in bfloat16: 2 (W - 1) / W x 2 bytes a value."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def average_(self, gradients: Gradients, step: int) -> None:
        rounded = gradients.flat.mul_(1.0 / self.collectives.world_size).to(torch.bfloat16)
        self._encoded_bytes += rounded.nbytes
        self.collectives.sum_(rounded)
        gradients.flat.copy_(rounded)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return all_reduced(2 * sum(layer.numel for layer in layers), world_size)


def bfloat16(options: DenseOptions, layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
    return BFloat16(collectives)


if __name__ == "__main__":
    COMPRESSORS["bfloat16"] = Row("bfloat16 all-reduce", DenseOptions, bfloat16, stateless=True)
    from main import main

    sys.exit(main())
