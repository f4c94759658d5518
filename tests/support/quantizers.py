"""A quantizer that no kernel knows: its torch definition is all that there is of it."""

import torch
from torch import Tensor, nn

import compression
from compression import kernels
from compression.codecs.quantizer import VariableWidth
from compression.registry import QuantizerOptions, Row
from tests.support.threads import ThreadCollectives, run_ranks


class MidRise(VariableWidth):
    """2^b uniform levels between plus and minus the largest magnitude, none of them zero."""

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, vectors_MK: Tensor) -> Tensor:
        norm = vectors_MK.abs().amax(1, keepdim=True).clamp_max(1e38)
        return torch.where(vectors_MK.isfinite().all(1, keepdim=True), norm, torch.nan)

    def positions(self, vectors_MK: Tensor, scales_MS: Tensor) -> Tensor:
        return torch.where(scales_MS > 0, (vectors_MK / scales_MS + 1) * (self.top / 2), 0.0)

    def levels(self, scales_MS: Tensor, codes_MK: Tensor) -> Tensor:
        return (codes_MK.to(torch.float32) * (2 / self.top) - 1) * scales_MS


NAME = "mid_rise"
ROW = Row("uniform levels of both signs, without zero", QuantizerOptions, quantizer=MidRise)


def train(device: str) -> tuple[float, float, bool, float, str]:
    """2 ranks train: (first losses, last losses, whether the ranks end with the same bits, ratio, kernels)."""

    def rank_main(ranks: ThreadCollectives) -> tuple[float, float, Tensor, float]:
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
        for index, parameter in enumerate(model.parameters()):  # threads share torch's generator
            generator = torch.Generator().manual_seed(index)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
        exchange = compression.attach(model, compression.build(NAME, bits=4, error_feedback=True), ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = []
        for step in range(100):
            images = torch.randn(32, 20, generator=torch.Generator().manual_seed(2 * step + ranks.rank)).to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), images[:, :10].argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ratio = exchange.report().ratio
        exchange.close()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return sum(losses[:10]) / 10, sum(losses[-10:]) / 10, weights, ratio

    compression.COMPRESSORS[NAME] = ROW
    try:
        (first, last, weights, ratio), (_, _, others, _) = run_ranks(2, rank_main)
    finally:
        del compression.COMPRESSORS[NAME]
    served_by = kernels.for_device(torch.device(device), MidRise.family)
    return first, last, torch.equal(weights, others), ratio, getattr(served_by, "__name__", "")
