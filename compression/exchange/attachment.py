"""Attaching compression to a model: which exchange, over which network."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..network.collectives import Collectives, Solo
from ..network.torch_distributed import TorchDistributed
from ..registry import Compressor
from .attached import Attached
from .broken_barrier import BrokenBarrier
from .exchange import Exchange


def attach(
    model: nn.Module,
    compressor: Compressor,
    collectives: Collectives | None = None,
    seed: int = 0,
    *,
    barrier_fraction: float = 1.0,
    late_steps: int = 1,
    record: bool = False,
) -> Attached:
    """Average the model's gradients through a compressor, from the next backward on.

    A DDP model gets its communication hook (one per model) and, unless `collectives` are given, process groups of
    its own over the same ranks; their backend follows the model's device. Any other model gets hooks on its
    parameters, and is a world of one rank unless `collectives` are given. Close the exchange when done.
    `seed` must be equal on all ranks: it names the streams of random numbers, which differ by rank by themselves.

    With a `barrier_fraction` below 1 the exchange is a `BrokenBarrier`, whose late averages are applied `late_steps`
    steps later. Raises ValueError where the compressor cannot be late.

    With `record` the exchange's `recorder` remembers the running sum of gradients that a search of bit widths measures.
    """
    if isinstance(model, DistributedDataParallel) and collectives is None:
        collectives = TorchDistributed(*_groups(model))
    collectives = collectives or Solo()
    if barrier_fraction == 1.0:
        return Exchange(model, compressor, collectives, seed, record)
    return BrokenBarrier(model, compressor, collectives, seed, barrier_fraction, late_steps, record)


def _groups(model: DistributedDataParallel) -> list[dist.ProcessGroup]:
    """New groups over the model's ranks: for gloo, one for each direction of messages."""
    ranks = dist.get_process_group_ranks(model.process_group)
    on_gpus = next(model.parameters()).device.type == "cuda"
    return [dist.new_group(ranks) for _ in range(1 if on_gpus else 2)]
