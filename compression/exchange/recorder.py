"""The running sum of a rank's own gradients, m = 0.8 m + g, that the bit-width search measures errors on.

m is linear in g, so the average of the ranks' m is the averaged gradient's m. It changes only when a step is
settled.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Collectives

DECAY = 0.8


class Recorder:
    """Remembers m of every compressed layer on this rank. Float32, by layer name."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers if layer.compressed}
        self.state = LayerState({name: layer.numel for name, layer in self.layers.items()})

    def record(self, gradients: Gradients) -> None:
        """Take in this rank's own gradients of one step, before anything encodes them."""
        current, pending = self.state.allocate(gradients.flat.device, self.layers.keys() & gradients.names)
        for name, at in zip(gradients.names, gradients.offsets, strict=True):
            if name in self.layers:
                span, count = self.state.span(name), self.state.spans[name]
                torch.add(gradients.flat[at : at + count], current[span], alpha=DECAY, out=pending[span])

    def averaged(self, collectives: Collectives) -> Mapping[str, Tensor]:
        """The ranks' mean of m, layer by layer, equal on all ranks. Every rank must call it."""
        if self.state.current is None:
            raise ValueError("no gradient was recorded yet: the search needs at least one training step")
        mean = self.state.current.clone()
        collectives.sum_(mean)
        mean /= collectives.world_size
        return {name: mean[self.state.span(name)].view(layer.shape) for name, layer in self.layers.items()}
