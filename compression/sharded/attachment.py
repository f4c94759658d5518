"""Attaching compression to a model that FSDP2 shards: which of its ranks average what."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..exchange.arguments import Group, check_equal, check_messages, networks_of
from ..exchange.binding import Binding
from ..layers import compressible, layers_of
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives, Metered, Traffic
from ..network.hosts import Hosts
from ..registry import Compressor
from .exchange import ShardedExchange
from .gathering import check_bits
from .grid import Grid
from .hooks import ShardedHooks
from .scatter import scattering
from .units import Piece, mesh_of, parameters_of, units_of

DEFAULTS: dict[str, Any] = {
    "collectives": None,
    "barrier_fraction": 1.0,
    "late_steps": 1,
    "record": False,
    "hierarchical": None,
    "ranks_per_host": None,
}
_LEVELS = ("hierarchical", "ranks_per_host")  # of use where the hosts of shards are found
_WHY_NOT = {
    "collectives": "its mesh, and groups, say which ranks average",
    "barrier_fraction": "FSDP waits for every average, and none can be late",
    "late_steps": "FSDP waits for every average, and none can be late",
    "record": "a rank averages pieces of layers, and a search measures whole ones",
    "hierarchical": "its mesh says which ranks share a host",
    "ranks_per_host": "its mesh says which ranks share a host",
}


def attach_sharded(
    model: nn.Module,
    compressor: Compressor,
    seed: int = 0,
    *,
    groups: tuple[Group, Group] | None = None,
    mesh: DeviceMesh | None = None,
    verify_wire: bool = False,
    gather_bits: int | None = None,
    **others: Any,
) -> ShardedExchange:
    """Average a sharded model's gradients through a compressor, from the next backward on.

    `groups` are this rank's (inside, between): the ranks over which `fully_shard` shards the model, those of its host,
    and the ranks that hold the same shards on the other hosts; or `mesh`, a DeviceMesh of hosts x ranks, has both. FSDP
    reduces gradients over the ranks inside, in float32 or as its policy says. The shards are averaged over the hosts
    by the compressor, as layers of their own: every rank's piece of a parameter is one, whose shape is the piece's.

    The first weights, and buffers, are those of the first host: they are broadcast from there. Error feedback and the
    like take N / R floats a rank, N values of the model on R ranks a host.

    Without either, the model's shards span all ranks, and FSDP's reduce-scatters go by the compressor's codes: each
    rank encodes the shards of others, and adds up its own in float32 (`averagers.ReduceScatter`). That takes
    quantizers whose codes are unbiased, and float32. Error feedback, where it is asked for, takes N (W - 1) / W floats
    a rank of W. Which ranks share a host is found; hosts of as many ranks each, two or more, average in two levels
    (`hierarchical`, `ranks_per_host`), else one line says what the hosts' links carry.

    With `gather_bits`, 4 to 8, all-gathers of parameters travel in codes there, too: see `gathering`.

    `others` are the other arguments of `attach`, most of which have no use here.

    Raises ValueError, on all ranks alike, where the ranks' arguments differ, where one of them has no use, and where
    the groups are not those of the model's shards. Attach before the model's first forward.
    """
    networks = networks_of(groups, mesh)
    for name, value in others.items():
        if value != DEFAULTS[name] and not (networks is None and name in _LEVELS):
            raise ValueError(f"`{name}` has no use for a sharded model: {_WHY_NOT[name]}; leave it out")
    if compressor.needs_full_gradient:
        raise ValueError(
            f"compressor {compressor.name} takes all gradients at once here, and those of a sharded model come module "
            "by module; leave out big_grad and clip, and clip what is averaged (clip_grad_norm_)"
        )
    if gather_bits is not None:
        check_bits(gather_bits)
        if networks is not None:
            raise ValueError(
                "gather_bits is for models whose shards span hosts: with groups or a mesh of hosts x ranks FSDP "
                "gathers parameters inside each host, and codes would lose precision and save nothing on a link; leave "
                "it out"
            )
    if networks is None:
        units = units_of(model)
        shards = mesh_of(units)
        pieces = _trained_pieces(model, {piece.name: piece for unit in units for piece in unit.pieces})
        device, levels = device_of(shards), {name: others.get(name) for name in _LEVELS}
        how: dict[str, Any] = {"verify_wire": verify_wire, "gather_bits": gather_bits, **levels}
        return scattering(model, units, pieces, shards, device, compressor, seed, **how)
    return _between_hosts(model, compressor, seed, *networks, verify_wire)


def _between_hosts(
    model: nn.Module,
    compressor: Compressor,
    seed: int,
    inside: Collectives,
    between: Collectives,
    verify_wire: bool,
) -> ShardedExchange:
    units = units_of(model)
    shards = mesh_of(units)
    if between.world_size == 1:
        raise ValueError(
            "the second of groups, between, has one rank, and nothing would be averaged over hosts; give the ranks "
            "that hold the same shards on other hosts"
        )
    if not Grid(inside, between).fits(dist.get_rank(), shards.mesh.flatten().tolist()):
        raise ValueError(
            f"groups are (inside, between): the ranks over which the model is sharded, {shards.size()} here, and those "
            f"that hold the same shards, in the order of hosts; got groups of {inside.world_size} and "
            f"{between.world_size}"
        )
    traffic = Traffic()
    everyone = Grid(inside, Metered(between, traffic))
    pieces = _trained_pieces(model, {piece.name: piece for unit in units for piece in unit.pieces})
    check_equal(
        everyone.collect,
        compressor,
        seed=seed,
        verify_wire=verify_wire,
        tensors=[(piece.name, piece.shapes) for piece in pieces],
        units=[(unit.name, [piece.name for piece in unit.pieces]) for unit in units],
    )
    if verify_wire:
        check_messages(compressor)
    broadcast(model, between)
    rank = inside.rank
    layers = layers_of([(piece.name, piece.shapes[rank]) for piece in pieces if piece.values[rank]],
                       compressor.bucket_size)  # fmt: skip
    arrangement = Arrangement(between, Hosts.separate(between.world_size), verify_wire=verify_wire)

    def bind(compressor: Compressor, _: Traffic | None) -> Binding:
        return Binding(compressor, layers, arrangement, seed + 2**32 * rank, traffic)

    parameters = parameters_of(model)
    return ShardedExchange(
        partial(ShardedHooks, model, units, rank),
        {piece.name: parameters[piece.name] for piece in pieces},
        compressor,
        bind,
        device_of(shards),
        everyone,
        str(everyone),
        {piece.name: piece.part(rank) for piece in pieces},
        frozenset(
            piece.name for piece in pieces
            if any(compressible(shape, compressor.bucket_size) for shape in piece.shapes)
        ),
        inside.world_size,
    )


def _trained_pieces(model: nn.Module, pieces: dict[str, Piece]) -> list[Piece]:
    """In the order of the model, which no grouping of modules changes. Raises ValueError where there are none."""
    trained = [pieces[name] for name, each in parameters_of(model).items() if each.requires_grad]
    if not trained:
        raise ValueError("nothing of this model is trained, no parameter requires grad: there is nothing to average")
    return trained


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device on which a mesh's ranks reduce gradients, wherever their shards are kept."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


@torch.no_grad()
def broadcast(model: nn.Module, replicas: Collectives) -> None:
    """Replace the weights and buffers of a model by those of the first replica of its shards.

    Raises ValueError where they are still to be made.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_meta:
            raise ValueError(f"{name} is on the meta device; make it, and attach then")
        local.copy_(replicas.broadcast(local.detach().cpu() if replicas.rank == 0 else None))
