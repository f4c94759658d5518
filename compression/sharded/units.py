"""Units: the parameters of one FSDP module, which travel together, and how they lie in the buffers that do.

W ranks share a unit. A buffer of whole parameters is [W, S]: row r holds the piece of every parameter that rank r owns,
one after the other in the order of parameters, each padded with zeros to the longest piece of any rank. A rank's own
buffer is its row, [S]. All-gathers carry all parameters of a unit; reduce-scatters those that have a gradient.
"""

from collections.abc import Iterable
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

    `given`: the modules that were given to `fully_shard` at once, of which `module` is the first. `holders`: the module
    and the attribute that hold each piece, or now and then the whole parameter.
    """

    name: str
    module: FSDPModule
    pieces: tuple[Piece, ...]
    given: tuple[nn.Module, ...]
    holders: tuple[tuple[nn.Module, str], ...]
    arrived: set[str] = field(default_factory=set)
    """Parameters whose gradients are there, and have not travelled."""

    @property
    def title(self) -> str:
        """The module in words."""
        return self.name or "the root module"

    @property
    def group(self) -> Any:
        """FSDP's own record of the unit, of which nothing is public: its order of parameters, hooks and collectives."""
        return self.module._get_fsdp_state()._fsdp_param_group

    def travelling(self, values: int) -> tuple[Piece, ...]:
        """The pieces of a reduced buffer of so many values a rank, which is about to travel, in their order.

        No gradient is seen of a unit whose forward has another name (`register_fsdp_forward_method`): then those are
        all, if their number fits. Raises RuntimeError where the gradients that were seen are not those that FSDP hands
        over, and for a parameter that was frozen when the units were made.
        """
        pieces = tuple(piece for piece in self.pieces if piece.name in self.arrived)
        self.arrived.clear()
        if self.group.reduce_scatter_unused_params:
            raise RuntimeError(
                f"{self.title} reduces parameters that no step used, as set_reduce_scatter_unused_params has it, and "
                "what is owed of these would be paid; leave that off"
            )
        if not pieces:
            pieces = tuple(piece for piece in self.pieces if piece.trained)
        if late := [piece.name for piece in pieces if not piece.trained]:
            raise RuntimeError(f"{late[0]} was frozen when compression was attached; close that, and attach anew")
        if sum(piece.padded for piece in pieces) != values:
            raise RuntimeError(
                f"FSDP reduces {values} values of {self.title}, and the gradients that were seen of it have "
                f"{sum(piece.padded for piece in pieces)}; attach before the first forward"
            )
        return pieces


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, without the names of what wraps modules to compile or to checkpoint them."""
    named = dict(model.named_parameters())
    return {name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): named[name] for name in named}


def units_of(model: nn.Module) -> list[Unit]:
    """The units of a model, in the order of its modules; those without parameters are left out.

    Raises ValueError for what cannot be: trained parameters outside of any unit, or not sharded over one dimension.
    """
    parameters = parameters_of(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    given: dict[int, list[tuple[str, Any]]] = {}  # by the state that modules given at once share
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            given.setdefault(id(module._get_fsdp_state()), []).append((name, module))
    taken: set[int] = set()
    units = []
    for together in given.values():
        name, first = together[0]
        holders = _in_order_of_buffers(first)
        own = [module.get_parameter(attribute) for module, attribute in holders]
        taken.update(map(id, own))
        if pieces := tuple(_piece(names[id(each)], each) for each in own):
            units.append(Unit(name, first, pieces, tuple(module for _, module in together), tuple(holders)))
    outside = [name for name, each in parameters.items() if each.requires_grad and id(each) not in taken]
    if outside:
        raise ValueError(
            f"parameter {outside[0]} is outside of any module that was given to fully_shard: its ranks would train it "
            "apart; give the whole model to fully_shard as well, and freeze what it ignores"
        )
    return units


def _in_order_of_buffers(module: FSDPModule) -> list[tuple[nn.Module, str]]:
    """What holds the parameters of an FSDP module, in FSDP's own order: it is not the module's, and nowhere public."""
    state = module._get_fsdp_state()
    if len(state._fsdp_param_groups) > 1:
        raise ValueError(
            "a module's parameters are sharded over several meshes, as shard_placement_fn says, which FSDP's doors are "
            "not for; shard all of them over one"
        )
    group = state._fsdp_param_group
    infos = [each._module_info for each in group.fsdp_params] if group is not None else []
    return [(info.module, info.param_name) for info in infos]


def mesh_of(units: Iterable[Unit]) -> DeviceMesh:
    """The mesh of ranks over which all units are sharded. Raises ValueError where they are over several."""
    sharded: list[Any] = [holder.get_parameter(name) for unit in units for holder, name in unit.holders]
    meshes = [each.device_mesh for each in sharded]
    if not meshes:
        raise ValueError("no module that was given to fully_shard has parameters: there is nothing to average")
    first, *others = meshes
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
        watcher = _Watcher(unit, handles)
        modules = {id(module): module for module in (*unit.given, *(holder for holder, _ in unit.holders))}
        handles.extend(module.register_forward_pre_hook(watcher) for module in modules.values())
    return handles


class _Watcher:
    """A hook on forwards of a unit, when its parameters are whole: it hooks each of them once.

    All at the first forward of any of its modules: some are used without their own module's forward.
    """

    def __init__(self, unit: Unit, handles: list[RemovableHandle]) -> None:
        self._unit, self._handles = unit, handles
        self._hooked: set[int] = set()

    def __call__(self, module: nn.Module, args: Any) -> None:
        for piece, (holder, attribute) in zip(self._unit.pieces, self._unit.holders, strict=True):
            parameter = holder.get_parameter(attribute)
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                mark = _Mark(self._unit.arrived, piece.name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(mark))


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
