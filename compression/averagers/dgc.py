"""Deep gradient compression: top-k with momentum on each rank, before anything is sent."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..codecs.base import FLOAT32, Floats
from ..codecs.sparsifiers import TopK
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Collectives
from .top_k import TopKAverager, placed, spans

STAGES = 4  # of the ramp: 1/4, 1/16, 1/64, 1/256


class MomentumCorrection:
    """The sum of all velocities that were not sent: u = m u + g, v += u (Lin et al. 2018, section 3.1).

    With `nesterov`, v += g + m u. With `masking` (momentum factor masking, section 3.2) sent values are cleared in u as
    well as in v, so that stale momentum cannot carry on a value that is up to date.
    """

    def __init__(self, layers: Sequence[Layer], momentum: float, nesterov: bool = False, masking: bool = True) -> None:
        sizes = {layer.name: layer.numel for layer in layers if layer.compressed}
        self.momentum, self.nesterov, self.masking = momentum, nesterov, masking
        self.velocity, self.accumulated = LayerState(sizes), LayerState(sizes)
        self.states: Mapping[str, LayerState] = {"velocity": self.velocity, "accumulated": self.accumulated}

    def accumulate(self, gradients: Gradients) -> Gradients:
        u, new_u = self.velocity.allocate(gradients.flat.device, gradients.names)
        v, new_v = self.accumulated.allocate(gradients.flat.device, gradients.names)
        for gradient, span in spans(gradients, self.velocity):
            velocity = torch.mul(u[span], self.momentum, out=new_u[span]).add_(gradient)
            update = gradient.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            torch.add(v[span], update, out=new_v[span])
        return placed(new_v, gradients, self.accumulated)

    def clear_sent(self, positions: Tensor) -> None:
        for state in (self.accumulated, self.velocity) if self.masking else (self.accumulated,):
            assert state.pending is not None
            state.pending.index_fill_(0, positions, 0.0)


class DeepGradientCompression(TopKAverager):
    """Top-k of momentum that each rank keeps for itself (Lin et al. 2018, arXiv:1712.01887).

    It stands in for the momentum of the layers that it compresses, `without_momentum`: the optimizer's own must be
    off for them. The others travel as they are and keep it. Weight decay stays with the optimizer, so it is neither
    accumulated nor masked (the paper is silent on it).

    Over the first `ramp_steps` the fraction kept falls in four equal stages, to max(ratio, 1/4), 1/16, 1/64 and 1/256
    (section 3.3, where a stage is an epoch), and is `ratio` from then on.

    `clip` bounds the norm of each rank's own gradient, all layers together, by clip x W^1/2 before it is accumulated;
    the gradients must then come all at once. The paper (section 3.2, appendix C) has clip x W^-1/2 for gradients that
    its algorithm 1 has divided by W already, and ours are not: independent gradients of norms above the bound then have
    a mean of norm `clip`, on any number of ranks.
    """

    def __init__(
        self,
        ratio: float,
        layers: Sequence[Layer],
        collectives: Collectives,
        momentum: float,
        nesterov: bool = False,
        masking: bool = True,
        clip: float | None = None,
        ramp_steps: int = 0,
        global_top_k: bool = False,
        dense: Floats = FLOAT32,
    ) -> None:
        correction = MomentumCorrection(layers, momentum, nesterov, masking)
        super().__init__(TopK(ratio), layers, collectives, correction, global_top_k=global_top_k, dense=dense)
        self.ratio, self.ramp_steps, self.clip = ratio, ramp_steps, clip
        self.without_momentum = frozenset(layer.name for layer in layers if layer.compressed)

    def codec_at(self, step: int) -> TopK:
        return TopK(self.ratio_at(step))

    def ratio_at(self, step: int) -> float:
        """The fraction of values kept at a step."""
        if step >= self.ramp_steps:
            return self.ratio
        return max(self.ratio, 0.25 ** (1 + STAGES * step // self.ramp_steps))

    def average_(self, gradients: Gradients, step: int) -> None:
        if self.clip is not None:
            norm = torch.linalg.vector_norm(gradients.flat, dtype=torch.float64)
            limit = self.clip * math.sqrt(self.collectives.world_size)
            factor = (limit / norm).clamp(max=1.0).nan_to_num(nan=1.0)  # a NaN stays in its layer
            gradients.flat.mul_(factor.to(torch.float32))
        super().average_(gradients, step)
