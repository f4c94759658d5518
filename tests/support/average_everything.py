"""A program for ranks of any launcher: average the same gradients with every compressor, and save what rank 0 gets.

    horovodrun -np 2 python average_everything.py OUT hvd        torchrun --nproc_per_node 2 average_everything.py OUT
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import compression
from compression.averagers import two_hop
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.launchers import HOROVODRUN, TORCHRUN
from compression.network.world import join_ranks

SHAPES = {"conv": (16, 8, 3, 3), "norm": (16,), "fc": (40, 64), "bias": (40,)}
STEPS = 3

two_hop.CHUNK_BYTES = 512  # so that several are under way at once


def every_compressor() -> dict[str, compression.Compressor]:
    """Each of the registry's; those that send bytes and nothing else also in bfloat16, which Horovod cannot add."""
    compressors = {}
    for name, row in compression.COMPRESSORS.items():
        options = {"bucket_size": 64} if "bucket_size" in row.takes else {}
        compressors[name] = compression.build(name, **options)
        if "dense_dtype" in row.takes and not row.all_reduces:
            compressors[f"{name}.bfloat16"] = compression.build(name, **options, dense_dtype="bfloat16")
    return compressors


def main(out: str, hvd: bool) -> None:
    layers = layers_of(SHAPES.items(), 64)
    ends = torch.tensor([0] + [layer.numel for layer in layers]).cumsum(0).tolist()
    averages: dict[str, torch.Tensor] = {}
    with join_ranks("cpu", launcher=HOROVODRUN if hvd else TORCHRUN) as ranks:
        network = ranks.gradients or ranks.control
        for name, compressor in every_compressor().items():
            averager = compressor.averager(layers, network, 7)
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(100 * step + ranks.rank)
                flat = torch.randn(ends[-1], generator=generator)
                averager.average_(Gradients(flat, tuple(SHAPES), tuple(ends[:-1])), step)
                averager.settle(True)
                averages[f"{name}.{step}"] = flat
        same = network.collect({name: bytes(flat.numpy().tobytes()) for name, flat in averages.items()})
        assert all(other == same[0] for other in same), "the ranks' averages differ"
        if ranks.rank == 0:
            torch.save(averages, out)


if __name__ == "__main__":
    main(sys.argv[1], "hvd" in sys.argv[2:])
