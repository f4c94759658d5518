"""Attaching compression to a model: which exchange, over which network."""

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ..network.arrangement import Arrangement, hosts_of_levels, in_levels
from ..network.collectives import Collectives, Solo
from ..network.hosts import find_hosts
from ..network.inside import Levels
from ..network.shared_memory import inside_of
from ..network.torch_distributed import TorchDistributed
from ..registry import Compressor
from .attached import Attached
from .broken_barrier import BrokenBarrier
from .exchange import Exchange

Group = Collectives | dist.ProcessGroup

_log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    compressor: Compressor,
    collectives: Collectives | None = None,
    seed: int = 0,
    *,
    barrier_fraction: float = 1.0,
    late_steps: int = 1,
    record: bool = False,
    hierarchical: bool | None = None,
    ranks_per_host: int | None = None,
    groups: tuple[Group, Group] | None = None,
    mesh: DeviceMesh | None = None,
) -> Attached:
    """Average the model's gradients through a compressor, from the next backward on.

    A DDP model gets its communication hook (one per model) and, unless `collectives` are given, process groups of
    its own over the same ranks; their backend follows the model's device. Any other model gets hooks on its
    parameters, and is a world of one rank unless `collectives` are given. Close the exchange when done.
    `seed` must be equal on all ranks: it names the streams of random numbers, which differ by rank by themselves.

    With a `barrier_fraction` below 1 the exchange is a `BrokenBarrier`, whose late averages are applied `late_steps`
    steps later. Raises ValueError where the compressor cannot be late.

    With `record` the exchange's `recorder` remembers the running sum of gradients that a search of bit widths measures.

    Where several hosts have as many ranks each, two or more, gradients are averaged in two levels: encoded between
    hosts, and added up as they are inside (`averagers.Hierarchical`). `hierarchical` True asks for that, and False for
    one level. Which ranks share a host is found (`network.hosts`); `ranks_per_host` takes each host as several of so
    many ranks. By hand, `groups` are this rank's (inside, between): the ranks of its host, and those of its place on
    each host; or `mesh`, a DeviceMesh of hosts x ranks, has both. Raises ValueError where there are no two levels.
    """
    arrangement = _arranged(model, compressor, collectives, hierarchical, ranks_per_host, _networks_of(groups, mesh))
    if barrier_fraction == 1.0:
        exchange: Attached = Exchange(model, compressor, arrangement, seed, record)
    else:
        exchange = BrokenBarrier(model, compressor, arrangement, seed, barrier_fraction, late_steps, record)
    _say_what_flat_costs(exchange, compressor)
    return exchange


def _arranged(
    model: nn.Module,
    compressor: Compressor,
    collectives: Collectives | None,
    hierarchical: bool | None,
    ranks_per_host: int | None,
    groups: tuple[Collectives, Collectives] | None,
) -> Arrangement:
    """The networks that gradients travel over; every rank makes its process groups in the same order."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, values = parameters[0].device, sum(parameter.numel() for parameter in parameters)
    members: list[int] | None = None  # of process groups to be made
    if isinstance(model, DistributedDataParallel) and collectives is None:
        members = dist.get_process_group_ranks(model.process_group)
        collectives = TorchDistributed(model.process_group)
    collectives = collectives or Solo()

    if groups is not None:
        hosts, hierarchical = hosts_of_levels(collectives, *groups), hierarchical is not False
    else:
        hosts = find_hosts(collectives)
        hosts = hosts.split(ranks_per_host) if ranks_per_host is not None else hosts
    two_levels = in_levels(hierarchical, hosts, compressor.encodes)
    if two_levels and groups is None and members is None:
        if hierarchical:
            raise ValueError("the `collectives` are those of all ranks; give `groups`, (inside, between), too")
        two_levels = False

    rank = collectives.rank
    everyone = _new_network(members, device) if members else collectives
    if not two_levels:
        return Arrangement(everyone, hosts)
    if groups is None:
        assert members is not None
        host, place = hosts.inside[hosts.of[rank]], hosts.between[hosts.place(rank)]
        groups = (
            _new_network([members[other] for other in host], device),
            _new_network([members[other] for other in place], device),
        )
    inside = inside_of(groups[0], device, values)
    return Arrangement(everyone, hosts, Levels(inside, groups[1]), inside.close)


def _new_network(ranks: list[int], device: torch.device) -> TorchDistributed:
    """Groups of their own for some ranks: for gloo, one for each direction of messages. Only these ranks call it."""
    count = 1 if device.type == "cuda" else 2
    return TorchDistributed(*(dist.new_group(ranks, use_local_synchronization=True) for _ in range(count)))


def _networks_of(groups: tuple[Group, Group] | None, mesh: DeviceMesh | None) -> tuple[Collectives, Collectives] | None:
    """(inside, between), given as they are or as the two dimensions of a mesh.

    Raises ValueError for both, and for a mesh that has not two dimensions.
    """
    if mesh is not None:
        if groups is not None:
            raise ValueError("`groups` and `mesh` say the same; give one of them")
        if mesh.ndim != 2:
            raise ValueError(f"a `mesh` of hosts x ranks has 2 dimensions, got {mesh.ndim}; take a 2-D part of it")
        groups = (mesh.get_group(1), mesh.get_group(0))
    if groups is None:
        return None
    inside, between = (
        TorchDistributed(group) if isinstance(group, dist.ProcessGroup) else group for group in groups
    )
    return inside, between


def _say_what_flat_costs(exchange: Attached, compressor: Compressor) -> None:
    """One line on rank 0 where several ranks of a host, averaging in one level, all put their bytes on its link."""
    hosts, world_size = exchange.hosts, exchange.collectives.world_size
    if exchange.levels is not None or exchange.collectives.rank != 0 or hosts.count in (1, world_size):
        return
    ranks = world_size / hosts.count
    flat = exchange.averager.sent(exchange.layers, world_size).from_host(world_size, ranks)
    if not flat:
        return
    line = f"gradients are averaged in one level over {hosts}: a host puts about {flat / 1e6:.1f} MB a step on its link"
    if compressor.encodes:
        one_rank = compressor.averager(exchange.layers, Solo(), 0).sent(exchange.layers, hosts.count)
        need = ", which need as many ranks on each host," if hosts.ranks_per_host is None else ""
        line += f"; in two levels{need} it would be {one_rank.total / 1e6:.1f} MB"
    _log.warning(line)
