"""Arguments of `attach` and `averaging`, which all ranks give alike: from compressors and groups to an arrangement."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..network.arrangement import Arrangement, arrange
from ..network.collectives import Collectives, Solo
from ..network.torch_distributed import TorchDistributed
from ..registry import Compressor, build, with_messages

Group = Collectives | dist.ProcessGroup


def compressor_of(compressor: Compressor | str, options: dict[str, Any]) -> Compressor:
    """A compressor that was built, or the one of a name with its options. Raises ValueError for anything else."""
    if isinstance(compressor, str):
        return build(compressor, **options)
    if options or not isinstance(compressor, Compressor):
        raise ValueError(
            f"a compressor is a name with its options, or what build() returns, which has them already; got "
            f"{type(compressor).__name__}{' and ' + ', '.join(options) if options else ''}"
        )
    return compressor


def arranged(
    compressor: Compressor,
    tensors: Mapping[str, Tensor],
    collectives: Collectives | None,
    process_group: dist.ProcessGroup | None,
    *,
    hierarchical: bool | None,
    ranks_per_host: int | None,
    groups: tuple[Group, Group] | None,
    mesh: DeviceMesh | None,
    verify_wire: bool,
    **others: Any,
) -> Arrangement:
    """The networks for gradients of these tensors, by name, once all ranks are known to choose alike; see `arrange`.

    The ranks are those of the `collectives`; without them those of the process group, beside which groups of their own
    are made; without either, this process alone. `others` are arguments that have to be equal, too.

    Raises ValueError, on all ranks alike, where they do not choose alike, where there are no two levels, and where
    checksums are asked for and no message has one.
    """
    members: list[int] | None = None  # of process groups to be made
    if collectives is None and process_group is not None:
        members, collectives = dist.get_process_group_ranks(process_group), TorchDistributed(process_group)
    collectives = collectives or Solo()
    check_equal(
        collectives.collect,
        compressor,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        groups=groups is not None or mesh is not None,
        verify_wire=verify_wire,
        **others,
        tensors=[(name, tuple(tensor.shape)) for name, tensor in tensors.items()],
    )
    if verify_wire:
        check_messages(compressor)
    return arrange(
        collectives,
        members,
        next(iter(tensors.values())).device,
        sum(tensor.numel() for tensor in tensors.values()),
        compressor.encodes,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        groups=networks_of(groups, mesh),
        verify_wire=verify_wire,
    )


def check_messages(compressor: Compressor) -> None:
    """Raise ValueError where no message has a checksum."""
    if not compressor.sends_messages:
        raise ValueError(
            f"`verify_wire` puts checksums on messages, and what {compressor.name} sends the network itself adds up; "
            f"leave it out, or use {', '.join(with_messages())}"
        )


def check_equal(collect: Callable[[Any], list[Any]], compressor: Compressor, **others: Any) -> None:
    """Raise ValueError, on all ranks alike, where the compressor or another choice differs from rank 0's.

    `collect` gives every rank's value, in rank order, on every rank.
    """
    choices = {"compressor": compressor.name, **compressor.option_values, **others}
    first, *rest = collect(choices)
    for rank, theirs in enumerate(rest, start=1):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"all ranks choose alike, and {name} is {_shortened(first.get(name))} on rank 0 and "
                    f"{_shortened(theirs.get(name))} on rank {rank}; give all of them the same"
                )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def networks_of(groups: tuple[Group, Group] | None, mesh: DeviceMesh | None) -> tuple[Collectives, Collectives] | None:
    """(inside, between), given as they are or as the two dimensions of a mesh.

    Raises ValueError for both, and for a mesh that has not two dimensions.
    """
    if mesh is not None:
        if groups is not None:
            raise ValueError("groups and a mesh say the same; give one of them")
        if mesh.ndim != 2:
            raise ValueError(f"a mesh of hosts x ranks has 2 dimensions, got {mesh.ndim}; take a 2-D part of it")
        groups = (mesh.get_group(1), mesh.get_group(0))
    if groups is None:
        return None
    inside, between = (
        TorchDistributed(group) if isinstance(group, dist.ProcessGroup) else group for group in groups
    )
    return inside, between
