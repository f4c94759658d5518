"""EDEN: a random rotation, the best levels for normal values, and one scale."""

import functools

import torch
from torch import Tensor

from ..kernels.reference.arithmetic import leading_power, nan_unless_finite, pack, tree_sum, unpack
from ..kernels.reference.normal import lloyd_max, unbiased_error
from ..kernels.reference.rotations import SHORTEST, Rotations, padded_length
from ..limits import LIMIT
from ..plans import Plan, in_pieces
from ..randomness import Draws
from .quantizer import VariableWidth

LONGEST = 8192  # values of a bucket


class Eden(VariableWidth, family="eden"):
    """Rotate each bucket at random, round to the Lloyd-Max levels of the normal distribution, scale without bias.

    Vargaftik et al. 2022 (EDEN, arXiv:2108.08842; at one bit DRIVE, arXiv:2105.08339). With R the rotation, v a bucket
    of L values and Q the levels nearest to Rv sqrt(L) / |v|, what is decoded is s R^-1 Q. The one scale of a record is
    s = |v|^2 / <Rv, Q>, which is unbiased over the rotations, and <Rv, Q> / |Q|^2 with error feedback, the projection,
    which is never longer than v. Nothing is rounded at random. The squared error is the same part of |v|^2 whatever
    the values are: 0.57, 0.133, 0.0355, 0.0095, 0.0025 and 4.1e-5 at 1, 2, 3, 4, 5 and 8 bits.

    The decoder needs the rotation, and so the seed that encoding took (`keyed`). Rotations of ranks, hops and steps are
    independent, so that errors average out. Zeros do not stay zeros.

    Differences: theirs is a rotation by any random orthogonal matrix in the proofs, and one round of signs and Hadamard
    transform in practice; here it is two rounds, with two stages that turn (`kernels.reference.rotations`). A bucket is
    a power of two of values. A layer's last bucket may be shorter, and is cut in pieces (`cut`).
    """

    keyed = True

    def __post_init__(self) -> None:
        if self.bucket_size not in (1 << k for k in range(SHORTEST.bit_length() - 1, LONGEST.bit_length())):
            raise ValueError(
                f"Eden rotates buckets of a power of two of values, from {SHORTEST}, below which rounding is biased, "
                f"to {LONGEST}, got {self.bucket_size}"
            )
        super().__post_init__()

    @property
    def magnitudes(self) -> Tensor:
        """The levels above zero: float32 [2^(bits - 1)], ascending."""
        return torch.from_numpy(lloyd_max(self.bits)[0]).to(torch.float32)

    @property
    def thresholds(self) -> Tensor:
        """The magnitudes from which on the next level is nearest: float32 [2^(bits - 1) - 1]."""
        return torch.from_numpy(lloyd_max(self.bits)[1]).to(torch.float32)

    # Sizes

    def record_bytes(self, count: int, bits: int) -> int:
        return sum(nbytes for _, nbytes in cut(count, bits))

    def in_pieces(self, plan: Plan) -> Plan:
        return in_pieces(plan, cut)

    # The torch definition

    def encode_vectors(self, vectors_MK: Tensor, draws: Draws, contraction: bool) -> Tensor:
        count = vectors_MK.shape[1]
        if is_exact(count, self.bits):
            return vectors_MK.contiguous().view(torch.uint8)
        power = leading_power(vectors_MK)
        fractions = torch.nn.functional.pad(vectors_MK / power, (0, padded_length(count) - count))
        length = fractions.shape[1]
        rotated = Rotations.drawn(draws, length).forward(fractions)  # times length
        square = tree_sum(fractions * fractions).unsqueeze(1)
        norm = (length * square).double().sqrt().float()
        unit = torch.where(norm > 0, 1.0 / norm, 0.0)
        normal = rotated * unit
        codes = torch.searchsorted(self.thresholds.to(normal.device), normal.abs().contiguous(), right=True)
        codes = torch.where(normal < 0, codes + (1 << (self.bits - 1)), codes)
        codes = torch.where(torch.isfinite(vectors_MK).all(1, keepdim=True), codes, 0)
        q = self._levels(codes)
        dot = tree_sum(rotated * q).unsqueeze(1)
        if contraction:
            scale = dot / (length * tree_sum(q * q).unsqueeze(1))
        else:
            scale = torch.where(dot > 0, length * square / dot, 0.0)
        scale = nan_unless_finite(vectors_MK, (scale * power).clamp_max(LIMIT))
        return torch.cat([scale.contiguous().view(torch.uint8), pack(codes, self.bits)], dim=1)

    def decode_records(self, records_MB: Tensor, count: int, draws: Draws | None) -> Tensor:
        if is_exact(count, self.bits):
            return records_MB.reshape(-1).view(torch.float32).reshape(len(records_MB), count)
        assert draws is not None, "decode_plan asks what is keyed for its keys"
        length = padded_length(count)
        scale = records_MB[:, :4].reshape(-1).view(torch.float32).reshape(-1, 1)
        q = self._levels(unpack(records_MB[:, 4:], length, self.bits))
        decoded = scale * Rotations.drawn(draws, length).back(q * (1.0 / length))
        return decoded[:, :count].clamp(-LIMIT, LIMIT)

    def _levels(self, codes_MK: Tensor) -> Tensor:
        magnitudes = self.magnitudes.to(codes_MK.device)
        return torch.cat([magnitudes, -magnitudes])[codes_MK]

    def expected_squared_errors(self, vectors_MK: Tensor) -> Tensor:
        count = vectors_MK.shape[1]
        if is_exact(count, self.bits):
            return torch.zeros(len(vectors_MK), dtype=torch.float64, device=vectors_MK.device)
        return unbiased_error(self.bits, padded_length(count)) * vectors_MK.double().square().sum(1)


def is_exact(count: int, bits: int) -> bool:
    """Whether a piece of so many values is sent as float32: where that is no longer than SHORTEST codes."""
    return count < SHORTEST and 4 * count <= _rotated_bytes(SHORTEST, bits)


@functools.cache
def cut(count: int, bits: int) -> tuple[tuple[int, int], ...]:
    """The pieces of a bucket, as (values, bytes): those that take the fewest bytes, of equals the fewest pieces.

    A piece is a power of two of values, or, as the last one, padded with zeros to one, or sent as float32. A bucket
    whose length is a power of two from SHORTEST up is one piece.
    """
    if is_exact(count, bits):
        return ((count, 4 * count),) if count else ()
    length = padded_length(count)
    padded = ((count, _rotated_bytes(length, bits)),)
    if count in (length, *range(SHORTEST)):
        return padded
    split = ((length // 2, _rotated_bytes(length // 2, bits)), *cut(count - length // 2, bits))
    return min(padded, split, key=lambda pieces: (sum(nbytes for _, nbytes in pieces), len(pieces)))


def _rotated_bytes(length: int, bits: int) -> int:
    return 4 + length * bits // 8
