"""The beta/alpha that makes the optimum take a given number of bits a value.

E^alpha C^beta is a coarse tradeoff. Along uniform widths log E falls in a straight line with the width while
log C grows ever more slowly, so that the best of them is an end of the range (bang-bang). Layers that differ soften
that: turning beta/alpha moves the optimum in jumps, small or large. This module says where, and over what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .hulls import Walk, lower_hull, slope
from .tables import Tables


@dataclass(frozen=True)
class Breakpoint:
    """Above this beta/alpha the optimum takes `bits_a_value` bits a value, or fewer as it grows further.

    Infinite where no beta/alpha is enough, because some assignment has no error at all.
    """

    power: float
    bits_a_value: float


def ratio_for_bits(tables: Tables, bits_a_value: float) -> Breakpoint:
    """The least beta/alpha above which the optimum takes at most `bits_a_value` bits a value.

    Raises ValueError where even the cheapest assignment takes more.
    """
    return ratios_for_bits(tables, [bits_a_value])[0]


def ratios_for_bits(tables: Tables, averages: Sequence[float]) -> list[Breakpoint]:
    """The least beta/alpha for each of several averages, from one walk.

    The optimum is a corner of the hull of all (bytes, E), whatever the powers. Of those corners, the one with
    the least log E + (beta/alpha) log C lies on the lower left hull of the points (log C, log E), and the slopes of its
    edges are the values of -beta/alpha at which the optimum goes from one corner to the next. So the hull of a
    hull answers exactly, and the corners that it leaves out are averages that no powers reach.

    Raises ValueError where even the cheapest assignment takes more.
    """
    walk = Walk.of(tables)
    with np.errstate(divide="ignore"):
        log_error_P = np.log(walk.error_P).tolist()
    log_ratio_P = np.log((walk.nbytes_P + tables.dense_bytes) / (4 * tables.values)).tolist()
    corners = lower_hull(log_ratio_P, log_error_P)
    bits_C = (8 * walk.nbytes_P[corners] / sum(tables.numel)).tolist()
    points = []
    for average in averages:
        if average < bits_C[0]:
            raise ValueError(f"no beta/alpha takes fewer than the cheapest {bits_C[0]:g} bits a value, got {average:g}")
        corner = max(c for c, bits in enumerate(bits_C) if bits <= average)
        power = 0.0
        if corner < len(corners) - 1:
            power = -slope(log_ratio_P, log_error_P, *corners[corner : corner + 2])
        points.append(Breakpoint(power, bits_C[corner]))
    return points
