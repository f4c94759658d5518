"""The quantizer of weights: codes without random numbers, the same whenever the same weights are encoded."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plans import Plan
from ..randomness import Draws
from .quantizers import MaxMin

HALF_WAY = 1 << 31  # of integers below 2^32


class Nearest(MaxMin, family="nearest"):
    """Uniform levels between each bucket's minimum and maximum, and of them the nearest to each value.

    No error is larger than half a step, (max - min) / (2^b - 1) / 2, up to the rounding of float32, and the mean square
    is half that of rounding at random. The error of a value is the same every time: of gradients it would add up, of
    weights that are kept exactly and encoded anew it does not. Levels are `MaxMin`'s, and so are records. Weights in
    8-bit blocks are what ZeRO++ gathers (Wang et al. 2023, arXiv:2306.10209, section 3.1).
    """

    def thresholds(self, draws: Draws, count: int) -> Tensor:
        return torch.full((), HALF_WAY, device=draws.first_M1.device)

    def decode_plan(
        self,
        plan: Plan,
        wire: Tensor,
        out: Tensor,
        factor: float = 1.0,
        accumulate: bool = False,
        keys: NDArray[Any] | None = None,
    ) -> None:
        MaxMin(self.bits, self.bucket_size).decode_plan(plan, wire, out, factor, accumulate)

    def expected_squared_errors(self, vectors_MK: Tensor) -> Tensor:
        scales = self.fit(vectors_MK)
        positions = self.positions(vectors_MK, scales).clamp(0, self.top)
        away = (positions - torch.floor(positions + 0.5)).double() * scales[:, 1:].double()
        return (away**2).sum(1)
