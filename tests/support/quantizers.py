"""A quantizer that no kernel knows: its torch definition is all that there is of it."""

import torch
from torch import Tensor

import compression
from compression import kernels
from compression.codecs.quantizer import ScalarQuantizer, VariableWidth
from compression.registry import QuantizerOptions, Row
from tests.support.small_training import Trained, train


def takes(name: str, bucket_size: int) -> bool:
    """Whether a quantizer of the registry has buckets of that size."""
    try:
        compression.codec(name, bucket_size=bucket_size)
    except ValueError:
        return False
    return True


class MidRise(ScalarQuantizer, VariableWidth):
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


def train_mid_rise(device: str) -> tuple[Trained, str]:
    """A training with it, and the name of the kernels that served."""
    compression.COMPRESSORS[NAME] = ROW
    try:
        trained = train(NAME, 100, device, bits=4, error_feedback=True)
    finally:
        del compression.COMPRESSORS[NAME]
    return trained, getattr(kernels.for_device(torch.device(device), MidRise.family), "__name__", "")
