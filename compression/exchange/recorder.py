"""What a rank remembers of its own gradients, m, on which a search of bit widths measures errors.

It is the decaying sum m = 0.8 m + g, or the mean of the gradients since a restart. Both are linear in g, so the average
of the ranks' m is the averaged gradient's m. It changes only when a step is settled.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Collectives

DECAY = 0.8


class Recorder:
    """Remembers m of every compressed layer on this rank. Float32, by layer name.

    `state` holds sums of gradients, and `weight` the same sums with 1 in place of every gradient: a layer whose weight
    is 0 was never seen.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers if layer.compressed}
        self.mean = False
        """Whether m is the mean of the gradients since the last restart."""
        self.state = LayerState({name: layer.numel for name, layer in self.layers.items()})
        self.weight = LayerState(dict.fromkeys(self.layers, 1))

    def restart(self) -> None:
        """Forget what was recorded: from now on m is the mean of the gradients. To be called between steps."""
        self.mean = True
        for state in (self.state, self.weight):
            state.load_state_dict({})

    def record(self, gradients: Gradients) -> None:
        """Take in this rank's own gradients of one step, before anything encodes them."""
        device = gradients.flat.device
        names = (self.layers.keys() & gradients.names) - (gradients.unused or frozenset()) - gradients.absent
        current, pending = self.state.allocate(device, names)
        weight, pending_weight = self.weight.allocate(device, names)
        decay = 1.0 if self.mean else DECAY
        for name, at in zip(gradients.names, gradients.offsets, strict=True):
            if name in names:
                span, count = self.state.span(name), self.state.spans[name]
                torch.add(gradients.flat[at : at + count], current[span], alpha=decay, out=pending[span])
                span = self.weight.span(name)
                torch.mul(weight[span], decay, out=pending_weight[span]).add_(1.0)

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        """Take over what a step recorded of all layers, or of some, where `applied`; else drop it."""
        self.state.settle(applied, layers)
        self.weight.settle(applied, layers)

    def averaged(self, collectives: Collectives) -> Mapping[str, Tensor]:
        """The ranks' mean of m, layer by layer, equal on all ranks. Every rank must call it.

        Raises ValueError, on all ranks alike, where no rank has seen a gradient of some layer, naming it.
        """
        if self.state.current is None or self.weight.current is None:
            raise ValueError("no gradient was recorded yet: the search needs at least one training step")
        mean, seen = self.state.current.clone(), self.weight.current.clone()
        if self.mean:
            for name in self.layers:
                mean[self.state.span(name)] /= seen[self.weight.span(name)].clamp_min(1.0)
        collectives.sum_(mean)
        collectives.sum_(seen)
        for name, weight in zip(self.layers, seen.tolist(), strict=True):
            if weight == 0:
                raise ValueError(
                    f"no finite gradient of {name} was recorded yet, on no rank: the search needs one of each "
                    "compressed layer; train further, or keep the layer out of what is compressed"
                )
        mean /= collectives.world_size
        return {name: mean[self.state.span(name)].view(layer.shape) for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """How m came about; m itself is in `state`."""
        return {"mean": self.mean, "weight": self.weight.state_dict()}

    def load_state_dict(self, sums: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The inverse, of the sums and of `state_dict`. Earlier code knew decaying sums, and of all layers alike."""
        self.state.load_state_dict(sums)
        self.mean = bool(state.get("mean", False))
        self.weight.load_state_dict(state.get("weight", {name: torch.ones(1) for name in sums}))
