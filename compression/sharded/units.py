"""Units: the parameters of one FSDP module, which travel together, and how they lie in the buffers that do.

W ranks share a unit. A buffer of whole parameters is [W, S]: row r holds the piece of every parameter that rank r owns,
one after the other in the order of parameters, each padded with zeros to the longest piece of any rank. A rank's own
buffer is its row, [S]. All-gathers carry all parameters of a unit; reduce-scatters those that have a gradient.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Piece:
    """A rank's piece of a parameter: `shapes[r]` is that of rank r, which may hold nothing of it."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    trained: bool
    dim: int = 0
    """The dimension that the ranks cut."""

    def part(self, rank: int) -> str:
        """The name of a rank's piece, as a slice of the parameter's: "layer.weight[:, 4:8]"."""
        start = sum(shape[self.dim] for shape in self.shapes[:rank])
        return f"{self.name}[{':, ' * self.dim}{start}:{start + self.shapes[rank][self.dim]}]"

    @property
    def padded(self) -> int:
        """Values of a buffer's row that every rank's piece takes."""
        return max(self.values)

    @property
    def values(self) -> tuple[int, ...]:
        """Values of each rank's piece, [W]."""
        return tuple(int(torch.Size(shape).numel()) for shape in self.shapes)


@dataclass(frozen=True)
class Unit:
    """An FSDP module, and the pieces of its parameters: of those that no FSDP module inside it has.

    `given`: the modules that were given to `fully_shard` at once, by name, of which `module` is the first.
    """

    name: str
    module: FSDPModule
    pieces: tuple[Piece, ...]
    given: tuple[tuple[str, nn.Module], ...]
    arrived: set[str] = field(default_factory=set)
    """Parameters whose gradients are there, and have not travelled."""

    def travelling(self, values: int) -> tuple[Piece, ...]:
        """The pieces of a reduced buffer of so many values a rank, which is about to travel, in their order.

        Raises RuntimeError where the gradients that were seen are not those that FSDP hands over.
        """
        pieces = tuple(piece for piece in self.pieces if piece.name in self.arrived)
        self.arrived.clear()
        if sum(piece.padded for piece in pieces) != values:
            raise RuntimeError(
                f"FSDP reduces {values} values of {self.name or 'the root module'}, and the gradients that were seen "
                f"of it have {sum(piece.padded for piece in pieces)}; attach before the first forward, and leave "
                "set_reduce_scatter_unused_params off"
            )
        return pieces


def is_sharded(model: nn.Module) -> bool:
    """Whether some module of a model was given to `fully_shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def units_of(model: nn.Module) -> list[Unit]:
    """The units of a model, in the order of its modules; those without parameters are left out.

    Raises ValueError for what cannot be: trained parameters outside of any unit, or not sharded over one dimension.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given: dict[int, list[tuple[str, Any]]] = {}  # by the state that modules given at once share
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            given.setdefault(id(module._get_fsdp_state()), []).append((name, module))
    taken: set[int] = set()
    units = []
    for together in given.values():
        name, first = together[0]
        own = _in_order_of_buffers(first)
        taken.update(map(id, own))
        if pieces := tuple(_piece(names[id(each)], each) for each in own):
            units.append(Unit(name, first, pieces, tuple(together)))
    outside = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in taken]
    if outside:
        raise ValueError(
            f"parameter {outside[0]} is outside of any module that was given to fully_shard: its ranks would train it "
            "apart; give the whole model to fully_shard as well, and freeze what it ignores"
        )
    return units


def _in_order_of_buffers(module: FSDPModule) -> list[nn.Parameter]:
    """The parameters of an FSDP module in FSDP's own order, which is not the module's and nowhere public."""
    group = module._get_fsdp_state()._fsdp_param_group
    infos = [each._module_info for each in group.fsdp_params] if group is not None else []
    return [info.module.get_parameter(info.param_name) for info in infos]


def mesh_of(units: Iterable[Unit]) -> DeviceMesh:
    """The mesh of ranks over which all units are sharded. Raises ValueError where they are over several."""
    first, *others = (each.device_mesh for unit in units for each in unit.module.parameters())  # type: ignore[attr-defined]
    for mesh in others:
        if mesh != first:
            raise ValueError(
                f"the model's parameters are sharded over several meshes, {first} and {mesh}; shard all over one"
            )
    shared: DeviceMesh = first
    return shared


def watch(units: Iterable[Unit]) -> list[RemovableHandle]:
    """Note which parameters of the units get gradients, in `Unit.arrived`, until the handles are removed."""
    handles: list[RemovableHandle] = []
    for unit in units:
        names, hooked = {piece.name for piece in unit.pieces}, set[int]()
        for root, given in unit.given:
            for path, module in given.named_modules(prefix=root):
                watcher = _Watcher(unit.arrived, path, names, hooked, handles)
                handles.append(module.register_forward_pre_hook(watcher))
    return handles


class _Watcher:
    """A hook on one module's forward, when its parameters are whole: it hooks each of the unit's once."""

    def __init__(
        self, arrived: set[str], path: str, names: set[str], hooked: set[int], handles: list[RemovableHandle]
    ) -> None:
        self._arrived, self._path, self._names, self._hooked, self._handles = arrived, path, names, hooked, handles

    def __call__(self, module: nn.Module, args: Any) -> None:
        for name, parameter in self._whole(module):
            self._hooked.add(id(parameter))
            mark = _Mark(self._arrived, name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(mark))

    def _whole(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        # Of modules inside, too: attention takes its output's weights, and never calls the module that has them.
        for name, parameter in module.named_parameters(self._path):
            new = id(parameter) not in self._hooked and not isinstance(parameter, DTensor)
            if new and name in self._names and parameter.requires_grad:
                yield name, parameter


@dataclass(frozen=True)
class _Mark:
    arrived: set[str]
    name: str

    def __call__(self, parameter: Tensor) -> None:
        self.arrived.add(self.name)


def _piece(name: str, parameter: nn.Parameter) -> Piece:
    if not isinstance(parameter, DTensor):
        raise ValueError(f"parameter {name} of an FSDP module is not sharded now; reshard the module, and attach then")
    if parameter.device_mesh.ndim != 1 or not isinstance(placement := parameter.placements[0], Shard):
        raise ValueError(
            f"parameter {name} is placed as {parameter.placements} on a mesh of {parameter.device_mesh.ndim} "
            "dimensions, over one of which float32 travels before any hook; call fully_shard over the ranks of a host "
            "alone, a mesh of 1 dimension, and attach with groups=(inside, between)"
        )
    dim, ranks = placement.dim, parameter.device_mesh.size()
    whole, length = list(parameter.shape), -(-parameter.shape[dim] // ranks)
    shapes = []
    for rank in range(ranks):
        held = max(0, min(length, whole[dim] - rank * length))
        shapes.append((*whole[:dim], held, *whole[dim + 1 :]))
    return Piece(name, tuple(shapes), parameter.requires_grad, dim)
