"""Randomness without state: every random number is a hash of where it is used.

A stream is named by (seed, step, layer, hop, rank); an element of it by its index in the layer. So the errors of
different ranks, hops and steps are independent and average out, every kernel draws the same numbers whatever its
order of work, no generator is saved or advanced, and a resumed run goes on exactly. Nothing here is
cryptographic.

The element hash is two rounds of xor-shift and multiply on 32 bits; it is written again in each kernel, and the tests
hold the copies equal. Its constants, 0x7feb352d and 0x735a2d97, are from the hash-prospector search
(github.com/skeeto/hash-prospector), of two different hashes: with either's own pair, elements whose distance is a
multiple of 4,096 or of 1,024 are correlated (r up to 0.05), and with these and shifts of 15 none were found to be.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def _splitmix64(state: Any) -> Any:
    """One step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16), of one number or of each in an array."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def stream_key(*parts: int) -> int:
    """A 64-bit key for the stream that `parts` name; order matters."""
    key: int = 0
    for part in parts:
        key = _splitmix64(key ^ (part & _MASK))
    return key


def stream_keys(seed: int, step: int, layers: NDArray[np.int64], hop: int, rank: int) -> NDArray[np.uint32]:
    """Keys of the streams of many layers. uint32 [L, 2]: the low and the high half of each layer's key."""
    keys = _splitmix64(layers.astype(np.uint64) ^ np.uint64(stream_key(seed, step, hop, rank)))
    return keys.view(np.uint32).reshape(-1, 2)  # little-endian, as the wire is


def random_bits(elements: torch.Tensor, key_low: torch.Tensor, key_high: torch.Tensor) -> torch.Tensor:
    """Random integers below 2^32, int64: the elements of the key's stream at these indices.

    All arguments are int64 tensors that broadcast against one another; the keys are halves below 2^32.
    """
    mask = 0xFFFFFFFF
    bits = (elements + key_low) & mask
    bits ^= bits >> 15
    bits = (bits * 0x7FEB352D) & mask
    bits ^= key_high
    bits ^= bits >> 15
    bits = (bits * 0x735A2D97) & mask
    return bits ^ (bits >> 15)


def uniform(elements: torch.Tensor, key_low: torch.Tensor, key_high: torch.Tensor) -> torch.Tensor:
    """Multiples of 2^-24 in [0, 1), float32, from the leading bits of `random_bits`."""
    return (random_bits(elements, key_low, key_high) >> 8).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Draws:
    """The streams of M buckets: the index of each one's first value, and the halves of its key. int64 [M, 1]."""

    first_M1: torch.Tensor
    low_M1: torch.Tensor
    high_M1: torch.Tensor

    def random_bits(self, elements: torch.Tensor) -> torch.Tensor:
        """The elements of each bucket's stream at these indices, [M, K] or [M, 1]."""
        return random_bits(elements, self.low_M1, self.high_M1)

    def of_values(self, count: int) -> torch.Tensor:
        """A random integer for each of `count` values of each bucket: [M, count]."""
        return self.random_bits(self.first_M1 + torch.arange(count, device=self.first_M1.device))
