"""Low rank: a layer as a matrix, and a few of the rank-one matrices that add up to it.

Rows are the layer's first dimension, columns all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..limits import LIMIT
from ..randomness import stream_key
from .base import Float32, prepared

EIGH_ERROR = 1e-7  # of eigenvalues in float32, in units of the largest


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) of a layer as a matrix."""
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


def gains(rows: int, cols: int, rank: int) -> bool:
    """Whether `rank` columns and as many rows are fewer values than the matrix itself."""
    return rank * (rows + cols) < rows * cols


@dataclass(frozen=True)
class SpectralAtoms:
    """`rank` of a matrix's singular vectors, drawn at random: spectral ATOMO (Wang et al. 2018, arXiv:1806.04090).

    The matrix is a sum of atoms sigma_i u_i v_i^T. Atom i is drawn with probability p_i proportional to sigma_i but at
    most 1, sum of p_i = rank (the paper's algorithm 1), and scaled by 1 / p_i: unbiased, with the least variance that
    so many atoms allow. Systematic sampling draws exactly `rank`, where the paper draws each atom on its own and sends
    as many as come out; atoms are orthogonal, so the variance is the same. Zeros stand for atoms that there are not.

    With `contraction`, for error feedback, atoms are drawn alike and not scaled: the projection on their span.

    u is an eigenvector of the smaller Gram matrix, and sigma v^T is u^T M itself: the atoms add up to M, however
    exact the eigenvalues are.

    A message is the short vectors, orthonormal, then the long ones with all scales in them: 4 rank (rows + cols) bytes.
    Where that is no less than float32, it is the matrix as it is. Finite for every finite matrix; a column of the
    result longer than the largest float is cut there. A matrix with a NaN or an infinity decodes to NaN throughout.
    """

    rows: int
    cols: int
    rank: int
    contraction: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"SpectralAtoms sends at least 1 atom of a matrix, got rank={self.rank}")

    @property
    def dense(self) -> bool:
        """Whether float32 is no longer than the atoms."""
        return not gains(self.rows, self.cols, self.rank)

    def wire_bytes(self, count: int) -> int:
        """Exact length of the message of a matrix; `count` must be rows x cols."""
        if count != self.rows * self.cols:
            raise ValueError(f"this codec is for {self.rows} x {self.cols} values, got {count}")
        return 4 * (count if self.dense else self.rank * (self.rows + self.cols))

    def encode(self, values_RN: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """float32 [R, N] -> uint8 [R, B]; the rows draw independent random numbers from `seed`.

        Into `out` where it is given, contiguous and of that shape.
        """
        values_RN = values_RN.to(torch.float32).contiguous()
        shape = (values_RN.shape[0], self.wire_bytes(values_RN.shape[1]))
        if self.dense:
            return Float32().encode(values_RN, seed, out)
        wire_RB = prepared(out, shape, torch.uint8, values_RN.device)
        for row, values in enumerate(values_RN):
            draw = (stream_key(seed, row) >> 24) * 2.0**-40
            short, long = self._atoms(values.view(self.rows, self.cols), draw)
            wire_RB[row] = torch.cat([short.reshape(-1), long.reshape(-1)]).view(torch.uint8)
        return wire_RB

    def decode(self, wire_RB: Tensor, count: int, out: Tensor | None = None) -> Tensor:
        """uint8 [R, B] -> float32 [R, count]. Into `out` where it is given, contiguous and of that shape."""
        messages = wire_RB.shape[0]
        if wire_RB.shape[1] != self.wire_bytes(count):
            raise ValueError(
                f"{count} values make a message of {self.wire_bytes(count)} bytes, got {wire_RB.shape[1]}"
            )
        if self.dense:
            return Float32().decode(wire_RB, count, out)
        floats = wire_RB.contiguous().view(torch.float32)
        side = min(self.rows, self.cols)
        short = floats[:, : self.rank * side].reshape(messages, self.rank, side)
        long = floats[:, self.rank * side :].reshape(messages, self.rank, -1)
        left, right = (short, long) if self.rows == side else (long, short)
        values = prepared(out, (messages, count), torch.float32, wire_RB.device)
        torch.bmm(left.mT, right, out=values.view(messages, self.rows, self.cols))
        return values

    def _atoms(self, matrix: Tensor, draw: float) -> tuple[Tensor, Tensor]:
        """The vectors of the atoms drawn: [rank, shorter side] and [rank, longer side]."""
        matrix = matrix if self.rows <= self.cols else matrix.T
        largest = matrix.abs().amax()
        usable = torch.isfinite(largest) & (largest > 0)
        unit = torch.where(usable, matrix / largest, 0.0)
        squares, vectors = torch.linalg.eigh(unit @ unit.T)
        least = EIGH_ERROR * squares[-1]  # every atom keeps a chance: a wrong one costs variance, none costs the mean
        sigma = torch.maximum(squares, least).to(torch.float64).sqrt().flip(0)
        chances = inclusion_probabilities(sigma, self.rank)
        drawn = systematic_sample(chances, self.rank, draw)
        short = vectors.T[len(sigma) - 1 - drawn]
        weights = torch.ones_like(chances) if self.contraction else torch.where(chances > 0, 1.0 / chances, 0.0)
        long = (short @ unit) * weights[drawn, None] * largest.to(torch.float64)
        long *= (LIMIT / long.square().sum(0).sqrt()).clamp_max(1.0)
        long = torch.where(usable | (largest == 0), long, torch.nan)
        return short, long.to(torch.float32)


def inclusion_probabilities(sigma: Tensor, total: int) -> Tensor:
    """min(1, c sigma_i) with c such that they add up to `total`; 0 where sigma is. float64, as `sigma`, which descends.

    The first k are 1; k is the least for which the next is at most 1 too. If `total` or fewer sigma are above 0,
    all of these are 1.
    """
    rest = sigma.flip(0).cumsum(0).flip(0)[:total]  # of the sum, from the k-th on
    left = total - torch.arange(len(rest), device=sigma.device)
    factor = torch.where(rest > 0, left / rest, 0.0)
    k = (factor * sigma[:total] <= 1.0 + 1e-12).to(torch.uint8).argmax()
    certain = torch.arange(len(sigma), device=sigma.device) < k
    return torch.where(certain, 1.0, (factor[k] * sigma).clamp_max(1.0))


def systematic_sample(chances: Tensor, count: int, draw: float) -> Tensor:
    """Different indices, `count` of them, each with its probability. int64 [count].

    The probabilities, at most 1, lie side by side on a line of length `count`; those that the points draw, draw + 1,
    ... hit are taken. `draw` is from [0, 1), a multiple of 2^-40, so that no point is rounded into its neighbor's
    place. On a shorter line the last index stands for the missing ones.
    """
    points = draw + torch.arange(count, dtype=torch.float64, device=chances.device)
    return torch.searchsorted(chances.cumsum(0), points, right=True).clamp_max(len(chances) - 1)
