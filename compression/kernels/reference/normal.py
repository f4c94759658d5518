"""Quantizers of normal values: levels of least squared error, from their definition.

Shapes: H = 2^(bits - 1) levels above zero; those below mirror them.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDEST = 8  # bits of a code
LEVELS = 1 << WIDEST
CELLS, CELLS_A_UNIT = 512, 64.0  # of magnitudes, for looking up the thresholds around them

_CONVERGED = 1e-11  # change of a level in the last step; rounding leaves 1e-12 at 8 bits
_STEPS = 100  # Newton's method takes 5 to 9
_POINTS = 1 << 16  # of an integral


@functools.cache
def lloyd_max(bits: int) -> tuple[Floats, Floats]:
    """The levels above zero, [H], and the thresholds between them, [H - 1], ascending.

    Each threshold lies midway between two levels, and each level is the mean of the values between its thresholds
    (Lloyd 1957, published 1982; Max 1960), which Newton's method finds. Raises RuntimeError where it fails to.
    """
    count = 1 << (bits - 1)
    # The density of good levels goes with the cube root of that of values: normal, sqrt(3) times as wide.
    levels = math.sqrt(3.0) * _quantiles((np.arange(count) + 0.5) / (2 * count) + 0.5)
    for _ in range(_STEPS):
        thresholds = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[0.0], thresholds, [math.inf]])
        density, weight = _density(edges), -np.diff(_tail(edges))
        mean = -np.diff(density) / weight
        # The derivatives of a mean by its thresholds, each of which follows two levels by a half.
        by_lower = density[:-1] * (mean - edges[:-1]) / weight
        by_upper = density[1:-1] * (thresholds - mean[:-1]) / weight[:-1]
        matrix = np.eye(count)
        matrix -= 0.5 * np.diag(np.append(by_upper, 0.0)) + 0.5 * np.diag(np.append(by_upper, 0.0)[:-1], 1)
        by_lower[0] = 0.0  # the threshold at zero stays there
        matrix -= 0.5 * np.diag(by_lower) + 0.5 * np.diag(by_lower[1:], -1)
        step = np.linalg.solve(matrix, mean - levels)
        levels = levels + step
        if np.abs(step).max() < _CONVERGED:
            return levels, (levels[1:] + levels[:-1]) / 2
    raise RuntimeError(f"the levels of {bits} bits did not converge in {_STEPS} steps")


@functools.cache
def tables() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    """Of all widths levels by code, thresholds, infinity behind them, and the number of thresholds below each cell.

    Each width has a row, [WIDEST + 1, LEVELS] or [WIDEST + 1, CELLS]. No two thresholds of one width lie in one cell.
    """
    levels = np.zeros((WIDEST + 1, LEVELS), np.float32)
    thresholds = np.full((WIDEST + 1, LEVELS), np.inf, np.float32)
    below = np.zeros((WIDEST + 1, CELLS), np.int32)
    for bits in range(1, WIDEST + 1):
        found = lloyd_max(bits)
        levels[bits, : 1 << bits] = np.concatenate([found[0], -found[0]])
        thresholds[bits, : len(found[1])] = found[1]
        below[bits] = np.searchsorted(thresholds[bits], np.arange(CELLS) / CELLS_A_UNIT, side="right")
    return levels, thresholds, below


@functools.cache
def unbiased_error(bits: int, length: int) -> float:
    """E |decoded - v|^2 / |v|^2 of a vector of `length` values that is rotated at random and scaled without bias.

    With x the rotated vector, |x|^2 = length, and Q its levels, that is E[|Q|^2 length / <x, Q>^2] - 1. Coordinates of
    the sphere have the density (1 - x^2 / length)^((length - 3) / 2), which tends to the normal one. Means over a
    vector are taken for their expectations, and their variances to first order.
    """
    levels, thresholds = lloyd_max(bits)
    x = np.linspace(0, math.sqrt(length), _POINTS, endpoint=False, dtype=np.float64) + math.sqrt(length) / (2 * _POINTS)
    density: Floats = np.exp(0.5 * (length - 3) * np.log1p(-(x * x) / length))
    density /= density.sum()
    q: Floats = levels[np.searchsorted(thresholds, x)]
    dot, square = float((density * x * q).sum()), float((density * q * q).sum())
    return float(square / dot**2 - 1 + _of_fluctuations(x, q, density, length))


def _of_fluctuations(x: Floats, q: Floats, density: Floats, length: int) -> float:
    """What the variances of <x, Q> / length and of |Q|^2 / length add to the mean of their quotient.

    On the sphere values vary together so that x^2 adds up to `length`: what follows x^2 does not count.
    """

    def centered(values: Floats) -> Floats:
        square = x * x
        values = values - (density * values).sum()
        slope = (density * values * square).sum() / (density * square * (square - 1)).sum()
        rest: Floats = values - slope * (square - (density * square).sum())
        return rest

    a, b = centered(x * q), centered(q * q)
    dot, square = (density * x * q).sum(), (density * q * q).sum()
    variance, covariance = (density * a * a).sum() / length, (density * a * b).sum() / length
    return float(3 * square * variance / dot**4 - 2 * covariance / dot**3)


def _density(x: Floats) -> Floats:
    normal: Floats = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return normal


def _tail(x: Floats) -> Floats:
    """The fraction of normal values above each number."""
    return np.array([0.5 * math.erfc(each / math.sqrt(2)) for each in x])


def _quantiles(fractions: Floats) -> Floats:
    """The numbers below which fractions of normal values lie, by bisection."""
    low, high = np.full(len(fractions), -10.0), np.full(len(fractions), 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = 1 - _tail(middle) > fractions
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
