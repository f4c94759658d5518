"""Averaging of tensors whenever a program asks for it: without a model, a backward or a step.

For outer steps of local SGD, for merging running averages, and for anything else that ranks hold and want the mean of.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..gradients import Gradients
from ..layers import Layer, layers_of
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives
from ..registry import Compressor
from .arguments import Group, arranged, compressor_of
from .binding import Binding
from .flat_gradient import FlatGradient
from .pipeline import Pipeline
from .report import Meter, Report


def averaging(
    named_tensors: Mapping[str, Tensor],
    compressor: Compressor | str,
    collectives: Collectives | None = None,
    seed: int = 0,
    *,
    group: dist.ProcessGroup | None = None,
    hierarchical: bool | None = None,
    ranks_per_host: int | None = None,
    groups: tuple[Group, Group] | None = None,
    mesh: DeviceMesh | None = None,
    verify_wire: bool = False,
    **options: Any,
) -> "Averaging":
    """Averages of these tensors over the ranks, through a compressor: `averaging(tensors, "maxmin", bits=4)`.

    Tensors of any shape, floating-point type and layout, by name, on one device, the same on all ranks. The ranks are
    those of `group`, by default of torch.distributed's world, or of the `collectives` that are given; without either a
    process is alone. The other arguments are those of `attach`.

    Raises ValueError, on all ranks alike, where their arguments differ, and for tensors that cannot be averaged.
    """
    compressor = compressor_of(compressor, options)
    tensors = dict(named_tensors)
    if not tensors:
        raise ValueError("there is nothing to average: no tensors were given")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_sparse:
            raise ValueError(
                f"{name} is of {tensor.dtype}, {tensor.layout}; dense tensors of floating-point numbers can be averaged"
            )
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {' and '.join(sorted(map(str, devices)))}; put them on one device")
    if collectives is None and dist.is_initialized():
        group = group or dist.group.WORLD
        if dist.get_rank(group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group; the ranks of a group alone average over it")
    arrangement = arranged(
        compressor,
        tensors,
        collectives,
        group,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        groups=groups,
        mesh=mesh,
        verify_wire=verify_wire,
        seed=seed,
    )
    return Averaging(tensors, compressor, arrangement, seed)


class Averaging:
    """Tensors that are averaged in place whenever `average_` is called, on all ranks.

    What the compressor remembers goes from call to call, as it does from step to step in training.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], compressor: Compressor, arrangement: Arrangement, seed: int
    ) -> None:
        self.tensors, self.arrangement = dict(tensors), arrangement
        shapes = ((name, tensor.shape or (1,)) for name, tensor in self.tensors.items())
        self.layers: tuple[Layer, ...] = layers_of(shapes, compressor.bucket_size)
        self.binding = Binding(compressor, self.layers, arrangement, seed)
        self.averager = self.binding.averager
        self.pipeline = Pipeline(self.averager, self.layers, next(iter(self.tensors.values())).device)
        self.meter = Meter(self.binding, self.pipeline)
        self.calls = 0
        self._flat = FlatGradient(self.layers)

    @torch.no_grad()
    def average_(self) -> bool:
        """Replace the tensors by their means over the ranks.

        Returns whether these are finite, equal on all ranks; where they are not, tensors and all that the compressor
        remembers stay as they are. Raises an exception of the network.
        """
        parts = [
            Gradients(tensor.to(torch.float32).reshape(-1), (name,), (0,)) for name, tensor in self.tensors.items()
        ]
        joined = self._flat.join(parts)
        self.pipeline.clear()
        self.meter.submitted()
        self.pipeline.submit(joined, self.calls).wait()
        self.pipeline.check()
        self.meter.arrived()
        finite = not torch.stack(list(self.pipeline.nonfinite.values())).any()
        self.averager.settle(finite)
        self.calls += 1
        if finite:
            self._flat.split(joined, parts)
            for tensor, part in zip(self.tensors.values(), parts, strict=True):
                tensor.copy_(part.flat.view(tensor.shape))
        return finite

    def report(self) -> Report:
        """Bytes and seconds since the last report; its steps are calls."""
        return self.meter.report(self.calls)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between calls."""
        return {"calls": self.calls, **self.binding.state_dict()}

    def gathered_state_dict(self) -> dict[str, Any]:
        """The states of all ranks, equal on all of them: one rank saves it, and each loads its own from it.

        Every rank calls it, between calls.
        """
        return self.binding.gathered(self.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, or of `gathered_state_dict`.

        Raises ValueError for the state of another rank, or of other tensors.
        """
        own = self.binding.own_state(state)
        self.binding.load_state_dict(own)
        loaded = int(own["calls"])
        self.meter.skip(loaded - self.calls)
        self.calls = loaded

    def close(self) -> None:
        """End the communication thread, and what was made for it. Calling it twice is harmless."""
        self.pipeline.close()
        self.arrangement.close(self.pipeline.failure is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
