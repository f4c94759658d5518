"""Random rotations of buckets, after which their values look normal whatever they were.

Twice: signs at random, then a Hadamard transform. Once is not enough where few values hold a bucket's norm: what comes
out has then a few magnitudes only, and rounding it is biased. Even twice it is a lattice where one value does, and a
small one beside it moves nothing over a threshold. So two stages of the first transform do not add and subtract pairs,
but turn them by random angles, at the cost of two products a value: outcomes become continuous.

Transforms are not scaled. A stage of stride h takes pairs of values that lie h apart, the first one in an even run of h
values: (a, b) becomes (a + b, a - b), and where it turns, (c a + s b, s a - c b), with c^2 + s^2 = 2. Twice the same
stage is the identity times 2, so that the way back is the same with all orders reversed.

Shapes: M buckets of L values each, L a power of two from SHORTEST up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...randomness import Draws

SHORTEST = 64  # values of a rotated bucket: with 32 and fewer, rounding is biased
TURNED = (16, 32)  # strides of the stages that turn, in the first transform
WORD = 32  # signs of a random word
ANGLES_AT = 1 << 31  # the index of a bucket's first angle, beyond that of its first signs


@dataclass(frozen=True)
class Rotations:
    """A rotation for each bucket: signs of both rounds, -1 or 1, and angles by stride, (c, s), [M, 1, 1] each."""

    signs_RML: Tensor
    angles: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def drawn(cls, draws: Draws, length: int) -> "Rotations":
        """The rotations that the streams of buckets say.

        Value i of the layer has bit i mod 32 of the words 2 (i div 32), in round one, and of the one after it, in
        round two. A bit that is set is a minus.
        """
        index = torch.arange(length, device=draws.first_M1.device)
        words = 2 * torch.div(draws.first_M1 + index, WORD, rounding_mode="floor")
        shift = (draws.first_M1 + index) % WORD
        signs = [1.0 - 2.0 * ((draws.random_bits(words + r) >> shift) & 1).to(torch.float32) for r in (0, 1)]
        at = 2 * torch.div(draws.first_M1, WORD, rounding_mode="floor") + ANGLES_AT
        angles = {stride: _turn(draws.random_bits(at + k)) for k, stride in enumerate(TURNED)}
        return cls(torch.stack(signs), angles)

    def forward(self, vectors_ML: Tensor) -> Tensor:
        """The rotated vectors times L: both transforms with the smallest stride first."""
        once = _transformed(vectors_ML * self.signs_RML[0], self.angles, ascending=True)
        return _transformed(once * self.signs_RML[1], {}, ascending=True)

    def back(self, rotated_ML: Tensor) -> Tensor:
        """The inverse rotation, times L: both transforms with the largest stride first."""
        once = _transformed(rotated_ML, {}, ascending=False) * self.signs_RML[1]
        return _transformed(once, self.angles, ascending=False) * self.signs_RML[0]


def padded_length(count: int) -> int:
    """The length at which so many values are rotated, zeros added: a power of two, SHORTEST at least."""
    return max(SHORTEST, 1 << max(count - 1, 0).bit_length())


def _turn(random_bits_M1: Tensor) -> tuple[Tensor, Tensor]:
    """(c, s) with c^2 + s^2 = 2, from a random u in [0, 1): square roots of 2 times the cosine and sine of an angle of
    45 to -45 degrees. Rational, so that every processor gets the same bits."""
    u = (random_bits_M1 >> 8).to(torch.float32) * 2.0**-24
    square = u * u
    c = ((1.0 + 2.0 * u) - square) / (1.0 + square)
    s = ((1.0 - 2.0 * u) - square) / (1.0 + square)
    return c.unsqueeze(2), s.unsqueeze(2)


def _transformed(vectors_ML: Tensor, angles: dict[int, tuple[Tensor, Tensor]], ascending: bool) -> Tensor:
    buckets, length = vectors_ML.shape
    strides = [1 << k for k in range(length.bit_length() - 1)]
    for stride in strides if ascending else reversed(strides):
        pairs = vectors_ML.reshape(buckets, -1, 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        if stride in angles:
            c, s = angles[stride]
            both = (c * a + s * b, s * a - c * b)
        else:
            both = (a + b, a - b)
        vectors_ML = torch.stack(both, dim=2).reshape(buckets, length)
    return vectors_ML
