"""Reduce-scatters of FSDP2 in codes: what a unit's ranks send one another, where the shards themselves span hosts."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ReduceOp

from ..averagers import Averager
from ..exchange.arguments import check_equal
from ..exchange.binding import Binding
from ..exchange.hooks import OnBackward, OnEnd, Submit
from ..exchange.pipeline import cut_to
from ..gradients import Gradients
from ..layers import Layer, Pieces, compressible
from ..network.arrangement import Arrangement, arrange
from ..network.collectives import Collectives, Metered, Traffic
from ..network.inside import Levels
from ..network.torch_distributed import TorchDistributed
from ..registry import Compressor
from .exchange import ShardedExchange
from .gathering import Gathering
from .hooks import Backward, UnitHooks
from .units import Piece, Unit, parameters_of

_log = logging.getLogger(__name__)


class BindingOfPieces(Binding):
    """A binding whose layers are this rank's pieces of parameters, of which each rank averages its own."""

    def __init__(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        pieces: Mapping[str, Pieces],
        arrangement: Arrangement,
        seed: int,
        traffic: Traffic | None = None,
    ) -> None:
        self._pieces = pieces
        super().__init__(compressor, layers, arrangement, seed, traffic)

    @property
    def dense_bytes(self) -> float:
        ranks = self.collectives.world_size
        return (ranks - 1) / ranks * 4 * sum(sum(pieces.values) for pieces in self._pieces.values())

    def encoded_bytes_by(self, compressor: Compressor) -> dict[str, int]:
        """Raises ValueError: shards are averaged by one compressor, and there are no routes to choose."""
        raise ValueError(f"shards are averaged by one compressor, and {compressor.name} would be one of several")

    def _over_all(self, compressor: Compressor, network: Collectives, seed: int) -> Averager:
        return compressor.reduce_scatter(self.layers, self._pieces, network, seed)

    def _in_levels(self, compressor: Compressor, levels: Levels, seed: int) -> Averager:
        return compressor.hierarchical_reduce_scatter(self.layers, self._pieces, self.hosts.between, levels, seed)


def scattering(
    model: nn.Module,
    units: Sequence[Unit],
    pieces: Sequence[Piece],
    shards: DeviceMesh,
    device: torch.device,
    compressor: Compressor,
    seed: int,
    *,
    hierarchical: bool | None,
    ranks_per_host: int | None,
    verify_wire: bool,
    gather_bits: int | None = None,
) -> ShardedExchange:
    """The exchange of a model whose shards span all ranks: it reduce-scatters by the compressor's codes.

    With `gather_bits` it gathers parameters in codes as well. `pieces` are those of trained parameters, in the model's
    order. Raises ValueError, on all ranks alike, where the ranks' arguments differ, where there are no two levels, and
    for a compressor that averages no pieces.
    """
    if shards.size() != dist.get_world_size():
        raise ValueError(
            f"this model is sharded over {shards.size()} of {dist.get_world_size()} ranks, and nothing averages over "
            "the others; give groups=(inside, between), or a mesh of hosts x ranks"
        )
    if shards.size() == 1:
        raise ValueError("this model is sharded over one rank, and no gradient travels; start several ranks")
    ranks = TorchDistributed(shards.get_group())
    check_equal(
        ranks.collect,
        compressor,
        seed=seed,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        verify_wire=verify_wire,
        gather_bits=gather_bits,
        tensors=[(piece.name, piece.shapes) for piece in pieces],
        units=[(unit.name, [piece.name for piece in unit.pieces]) for unit in units],
    )
    compressor.check_reduce_scatter()
    parameters = parameters_of(model)
    layers = [
        Layer(
            index,
            piece.name,
            piece.shapes[ranks.rank],
            compressible(parameters[piece.name].shape, compressor.bucket_size),
        )
        for index, piece in enumerate(pieces)
    ]
    of_all = {piece.name: Pieces(piece.values, piece.padded) for piece in pieces}
    arrangement = arrange(
        ranks,
        dist.get_process_group_ranks(ranks.group),
        device,
        sum(each.padded for each in of_all.values()) * ranks.world_size,
        encodes=True,  # two levels send less in float32, too
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        verify_wire=verify_wire,
    )

    traffic = Traffic()
    everyone = Metered(arrangement.collectives, traffic, arrangement.hosts.of)

    def bind(compressor: Compressor, _: Traffic | None) -> Binding:
        return BindingOfPieces(compressor, layers, of_all, arrangement, seed, traffic)

    try:
        exchange = ShardedExchange(
            partial(ScatterHooks, model, units, ranks),
            {piece.name: parameters[piece.name] for piece in pieces},
            compressor,
            bind,
            device,
            everyone,
            _named(arrangement, ranks),
            {piece.name: f"{piece.name} but {piece.part(ranks.rank)}" for piece in pieces},
            frozenset(layer.name for layer in layers if layer.compressed),
        )
    except BaseException:
        arrangement.close(True)
        raise
    if gather_bits is not None:
        try:
            exchange.gathering = Gathering(units, gather_bits, ranks, device, arrangement)
        except BaseException:
            exchange.close()
            raise
    if ranks.rank == 0:
        _say_what_feedback_costs(exchange)
        _say_what_flat_costs(exchange)
    return exchange


class ScatterHooks(UnitHooks):
    """A reduce-scatter of its own for every unit of a model, on one of the `ranks` that share it."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], ranks: Collectives, begin: OnBackward, submit: Submit, end: OnEnd
    ) -> None:
        super().__init__(model, units, begin, end)
        self._before = [unit.group._reduce_scatter_comm for unit in units]
        for unit in units:
            comm: Any = ReduceScatter(unit, ranks, self._backward, submit)  # FSDP's base of these is private
            unit.module.set_custom_reduce_scatter(comm)

    def remove(self) -> None:
        super().remove()
        for unit, comm in zip(self._units, self._before, strict=True):
            unit.module.set_custom_reduce_scatter(comm)


class ReduceScatter:
    """What FSDP calls in place of its own reduce-scatter, of one unit (`FSDPModule.set_custom_reduce_scatter`).

    The mean is computed in float32, and the operation is a factor of it. What this rank gets is in the output before
    the call returns: FSDP adds it up, converts it or moves it to a CPU right after.
    """

    def __init__(self, unit: Unit, ranks: Collectives, backward: Backward, submit: Submit) -> None:
        self._unit, self._backward, self._submit = unit, backward, submit
        self._rank, self._world_size = ranks.rank, ranks.world_size

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Fill `output_tensor`, a row [S], from the rows of all ranks, `input_tensor` [W * S], which it overwrites.

        Raises ValueError for an operation that is neither a mean nor a sum.
        """
        row = output_tensor.numel()
        factor = _factor_of_mean(op, self._world_size)
        names, offsets, at = [], [], self._rank * row
        for piece in self._unit.travelling(row):
            names.append(piece.name)
            offsets.append(at)
            at += piece.padded
        self._backward.reduces()
        flat = input_tensor.view(-1).to(torch.float32)
        means = self._submit(Gradients(flat, tuple(names), tuple(offsets))).wait()
        own = means[self._rank * row : (self._rank + 1) * row]
        output_tensor.copy_(cut_to(own, output_tensor.dtype).mul_(factor))


def _factor_of_mean(op: Any, ranks: int) -> float:
    """What a mean over ranks is multiplied by to be what an operation asks for."""
    if op == ReduceOp.AVG:
        return 1.0
    if op == ReduceOp.SUM:
        return float(ranks)
    if op == ReduceOp.PREMUL_SUM:
        return float(ranks * op.factor)
    raise ValueError(f"gradients are averaged or added up, and FSDP asks for {op}; leave its reduction as it is")


def _named(arrangement: Arrangement, ranks: Collectives) -> str:
    """This rank, as states call it: what it remembers depends on all of this."""
    if arrangement.levels is None:
        return f"rank {ranks.rank} of {ranks.world_size}"
    inside, between = arrangement.levels
    return f"rank {inside.rank} of {inside.world_size} on host {between.rank} of {between.world_size}, in two levels"


def _say_what_feedback_costs(exchange: ShardedExchange) -> None:
    """One line where every rank remembers what it owes of the others' shards."""
    if values := sum(state.values for state in exchange.averager.states.values()):
        _log.warning(
            "error feedback keeps %.1f MB of residuals on every rank, for the shards of the others, however many share "
            "the model; without it each rank keeps none",
            4 * values / 1e6,
        )


def _say_what_flat_costs(exchange: ShardedExchange) -> None:
    """One line where several ranks of a host, averaging in one level, all put their bytes on its link."""
    hosts, ranks = exchange.hosts, exchange.collectives.world_size
    if exchange.levels is not None or hosts.count in (1, ranks):
        return
    sent = exchange.averager.sent(exchange.layers, ranks)
    flat = sum(sent.from_host(ranks, each) for each in hosts.sizes) / hosts.count
    once = sent.total * ranks / (ranks - 1) * (hosts.count - 1) / hosts.count
    need = ", which need as many ranks on each host," if hosts.ranks_per_host is None else ""
    _log.warning(
        f"gradients are reduce-scattered in one level over {hosts}: a host puts about {flat / 1e6:.1f} MB a step on "
        f"its link; in two levels{need} it would be {once / 1e6:.1f} MB"
    )
