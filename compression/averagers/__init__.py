"""Averagers: how ranks agree on the mean of their gradients.

An averager knows layers, a codec and collectives; it knows neither models nor the hooks that call it. Whatever it
does, every rank ends with the same bits.

What an averager remembers (residuals) belongs to one rank, is kept by layer, and changes only when a step is
settled: what a step computed is pending until it is known to be finite on every rank.

One file per way of agreeing:

| what travels | can the network add it? | averager | bytes sent per rank |
| --- | --- | --- | --- |
| float32, half | yes | Dense: all-reduce | 2 (W-1)/W x width x N |
| b-bit codes | no | TwoHop: exchange, decode and add, encode again, gather | 2 (W-1)/W x encoded |
| codes of any other kind | no | OneHop: one gather | (W-1) x encoded |
| (index, value) pairs | no, and the mean is denser | Gathered: one gather | (W-1) x encoded |
| P and Q of PowerSGD | yes | LowRank: two all-reduces | 2 (W-1)/W x 4 R (rows + cols) |

W ranks, N values, rank R.
"""

from compression.averagers.base import Averager, Begin, Gradients, Memory, Stateless
from compression.averagers.dense import Dense, Sanity
from compression.averagers.dgc import DeepGradientCompression
from compression.averagers.gathered import Gathered, Residual, RmsScore
from compression.averagers.low_rank import LowRank
from compression.averagers.one_hop import OneHop
from compression.averagers.random_share import RandomShare
from compression.averagers.statistics import Observing
from compression.averagers.two_hop import TwoHop
from compression.averagers.warm_up import WarmUp

__all__ = [
    "Averager",
    "Begin",
    "DeepGradientCompression",
    "Dense",
    "Gathered",
    "Gradients",
    "LowRank",
    "Memory",
    "Observing",
    "OneHop",
    "RandomShare",
    "Residual",
    "RmsScore",
    "Sanity",
    "Stateless",
    "TwoHop",
    "WarmUp",
]
