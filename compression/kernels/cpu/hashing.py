"""Random numbers: `randomness.random_bits`, compiled."""

import numpy as np

from .compiling import inlined


@inlined
def random_word(bits: np.uint32, high: np.uint32) -> np.uint32:
    """As `randomness.random_bits`, of an element to which the key's lower half has been added."""
    bits ^= bits >> np.uint32(15)
    bits = np.uint32(bits * np.uint32(0x7FEB352D))
    bits ^= high
    bits ^= bits >> np.uint32(15)
    bits = np.uint32(bits * np.uint32(0x735A2D97))
    return np.uint32(bits ^ (bits >> np.uint32(15)))
