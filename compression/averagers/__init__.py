"""Averagers: how ranks agree on the mean of their gradients.

An averager knows layers, a codec and collectives; it knows neither kernels nor models nor the hooks that call it.
Whatever it does, every rank ends with the same bits, of all values or of those that it owns.

An averager's state (residuals) belongs to one rank, is kept by layer, and changes only when a step is settled: the
state that a step computed is pending until it is known to be finite on every rank.

One file per way of agreeing:

| on the wire | can the network add it? | averager | bytes sent per rank |
| --- | --- | --- | --- |
| float32, half, bfloat16 | yes | Dense, RoundedDense: all-reduce | 2 (W-1)/W x width x N |
| b-bit codes | no | TwoHop: exchange, decode and add, encode again, gather | 2 (W-1)/W x encoded |
| codes of any other kind | no | OneHop: one gather | (W-1) x encoded |
| (index, value) pairs | no, and the mean is denser | TopKAverager: one gather | (W-1) x encoded |
| b-bit codes, of shards | no | ReduceScatter: exchange, decode and add | (W-1)/W x encoded |
| P and Q of PowerSGD | yes | PowerSGD: two all-reduces | 2 (W-1)/W x 4 R (rows + cols) |

`Routed` lets layers travel by several of them. `Hierarchical` puts any of them between hosts, to which a host's ranks
are one; `ReduceScatterInLevels` does so where each rank gets the averages that it owns and no others.

W ranks, N values, rank R.
"""

from .base import Averager, Averaging
from .dense import Dense, RoundedDense, Sanity
from .dgc import DeepGradientCompression
from .hierarchical import Hierarchical
from .observed import StatisticsAverager
from .one_hop import OneHop
from .powersgd import PowerSGD
from .random_k import RandomKAverager
from .reduce_scatter import ReduceScatter, ReduceScatterInLevels
from .routed import Routed, carried_over
from .top_k import Residual, RmsScore, TopKAverager
from .two_hop import TwoHop
from .warm_up import WarmUp

__all__ = [
    "Averager",
    "Averaging",
    "DeepGradientCompression",
    "Dense",
    "Hierarchical",
    "OneHop",
    "PowerSGD",
    "RandomKAverager",
    "ReduceScatter",
    "ReduceScatterInLevels",
    "Residual",
    "RmsScore",
    "RoundedDense",
    "Routed",
    "Sanity",
    "StatisticsAverager",
    "TopKAverager",
    "TwoHop",
    "WarmUp",
    "carried_over",
]
