"""Attaching compression to a model: which exchange, over which network."""

import logging
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ..layers import layers_of
from ..network.collectives import Collectives, Solo, Traffic
from ..registry import Compressor
from .arguments import Group, arranged, compressor_of
from .attached import Attached
from .binding import Binding
from .broken_barrier import BrokenBarrier
from .exchange import Exchange
from .hooks import hook
from .models import check_ranks, finds_unused, has_shards, trained_parameters, unwrapped

_log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    compressor: Compressor | str,
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
    verify_wire: bool = False,
    gather_bits: int | None = None,
    **options: Any,
) -> Attached:
    """Average the model's gradients through a compressor, from the next backward on.

    The compressor is one that was built, or a name, with its `options`: `attach(model, "maxmin", bits=4)`.

    A DDP model, whatever wraps it, gets its communication hook (one per model) and, unless `collectives` are given,
    process groups of its own over the same ranks; their backend follows the model's device. Any other model gets hooks
    on its parameters, and is a world of one rank unless `collectives` are given. Close the exchange when done, or use
    it in a `with` block. Compressor, `seed` and the like must be equal on all ranks; the streams of random numbers,
    which `seed` names, differ by rank by themselves.

    With a `barrier_fraction` below 1 the exchange is a `BrokenBarrier`, whose late averages are applied `late_steps`
    steps later.

    With `record` the exchange's `recorder` remembers the running sum of gradients that a search of bit widths measures.

    Where several hosts have as many ranks each, two or more, gradients are averaged in two levels: encoded between
    hosts, and added up as they are inside (`averagers.Hierarchical`). `hierarchical` True asks for that, and False for
    one level. Which ranks share a host is found (`network.hosts`); `ranks_per_host` takes each host as several of so
    many ranks. By hand, `groups` are this rank's (inside, between): the ranks of its host, and those of its place on
    each host; or `mesh`, a DeviceMesh of hosts x ranks, has both. What is given is the exchange's alone from then on:
    it is used on another thread.

    A model that FSDP2 shards (`fully_shard`) gets hooks on the gradients of every module that was given to it; see
    `sharded.attachment.attach_sharded`. With `gather_bits` its parameters travel in codes of so many bits, too.

    With `verify_wire` messages carry checksums (`network.verified`): one that arrives damaged raises an OSError that
    names its sender, where its average is waited for.

    Raises ValueError, on all ranks alike, where the ranks' arguments differ, where ranks would train apart, where there
    are no two levels, where the compressor cannot be late, and for parameters that no compressor takes.
    """
    compressor = compressor_of(compressor, options)
    model = unwrapped(model)
    if has_shards(model):
        from ..sharded.attachment import attach_sharded

        return attach_sharded(
            model,
            compressor,
            seed,
            groups=groups,
            mesh=mesh,
            verify_wire=verify_wire,
            gather_bits=gather_bits,
            collectives=collectives,
            barrier_fraction=barrier_fraction,
            late_steps=late_steps,
            record=record,
            hierarchical=hierarchical,
            ranks_per_host=ranks_per_host,
        )
    if gather_bits is not None:
        raise ValueError(
            "gather_bits encodes parameters where FSDP2 gathers them, and no module of this model was given to "
            "fully_shard: its ranks have them whole; leave it out"
        )
    if collectives is None:
        check_ranks(model)
    parameters = trained_parameters(model)
    if compressor.needs_full_gradient and finds_unused(model):
        raise ValueError(
            f"compressor {compressor.name} takes all gradients at once here, and DistributedDataParallel expects steps "
            "that do not use all parameters; make it without find_unused_parameters and static_graph, or leave out "
            "big_grad and clip"
        )
    if barrier_fraction != 1.0 and finds_unused(model):
        raise ValueError(
            "a broken barrier waits for layers by their last averages, and DistributedDataParallel expects steps "
            "that do not use all of them; make it without find_unused_parameters and static_graph, or wait for all"
        )
    arrangement = arranged(
        compressor,
        parameters,
        collectives,
        model.process_group if isinstance(model, DistributedDataParallel) else None,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        groups=groups,
        mesh=mesh,
        verify_wire=verify_wire,
        seed=seed,
        barrier_fraction=barrier_fraction,
        late_steps=late_steps,
        record=record,
    )
    shapes = [(name, parameter.shape) for name, parameter in parameters.items()]

    def bind(compressor: Compressor, traffic: Traffic | None) -> Binding:
        return Binding(compressor, layers_of(shapes, compressor.bucket_size), arrangement, seed, traffic)

    catch = partial(hook, model, parameters)
    try:
        exchange: Attached
        if barrier_fraction == 1.0:
            exchange = Exchange(catch, parameters, compressor, bind, record)
        else:
            exchange = BrokenBarrier(catch, parameters, compressor, bind, barrier_fraction, late_steps, record)
    except BaseException:
        arrangement.close(True)
        raise
    _say_what_flat_costs(exchange, compressor)
    return exchange


def _say_what_flat_costs(exchange: Attached, compressor: Compressor) -> None:
    """One line on rank 0 where several ranks of a host, averaging in one level, all put their bytes on its link."""
    hosts, world_size = exchange.hosts, exchange.collectives.world_size
    if exchange.levels is not None or exchange.collectives.rank != 0 or hosts.count in (1, world_size):
        return
    sent = exchange.averager.sent(exchange.layers, world_size)
    flat = sum(sent.from_host(world_size, ranks) for ranks in hosts.sizes) / hosts.count
    if not flat:
        return
    line = f"gradients are averaged in one level over {hosts}: a host puts about {flat / 1e6:.1f} MB a step on its link"
    if compressor.encodes:
        one_rank = compressor.averager(exchange.layers, Solo(), 0).sent(exchange.layers, hosts.count)
        need = ", which need as many ranks on each host," if hosts.ranks_per_host is None else ""
        line += f"; in two levels{need} it would be {one_rank.total / 1e6:.1f} MB"
    _log.warning(line)
