"""Clusters that are not there, as users write them: "hosts=16 ranks=8 link=25gbit latency=50us"."""

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..costs import Cluster

CLUSTER_KEYS = {
    "hosts": "hosts, 1 or more",
    "ranks": "ranks of each host (default: 1)",
    "link": "rate of a host's link each way, as in 25gbit",
    "latency": "time of a message on its way between hosts, as in 50us (default: 0)",
    "inside": "rate at which all ranks of a host pass on bytes inside, as in 200gbit (default: never the slowest)",
    "inside_latency": "time of a message on its way inside a host (default: 0)",
}
"""What a description says of a cluster."""

RATES = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3, "tbit": 1e6}  # in Mbit/s
TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
MOST_RANKS = 2**16


def cluster_of(text: str) -> "Cluster":
    """The cluster of a description: words KEY=VALUE, with spaces or commas between them.

    Raises ValueError, one line, for a word that makes no sense, and where hosts or their link are missing.
    """
    from ..costs import FREE, Cluster  # loads torch, which the keys do not need

    given: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if not equals or key not in CLUSTER_KEYS:
            raise ValueError(f"a cluster is told as KEY=VALUE with the keys {', '.join(CLUSTER_KEYS)}, got {word!r}")
        if key in given:
            raise ValueError(f"a cluster has one {key}, got {given[key]!r} and {value!r}")
        given[key] = value
    if "hosts" not in given:
        raise ValueError(f"a cluster needs a number of hosts, as in 'hosts=4 link=1gbit', got {text!r}")
    hosts, ranks = (_count(key, given.get(key, "1")) for key in ("hosts", "ranks"))
    if hosts * ranks == 1:
        raise ValueError("nothing travels on one host of one rank; give more of hosts or ranks")
    if hosts * ranks > MOST_RANKS:
        raise ValueError(f"a cluster has at most {MOST_RANKS} ranks, got {hosts} x {ranks}")
    if hosts > 1 and "link" not in given:
        raise ValueError("several hosts are joined by links; give their rate, as in link=10gbit")
    for key in ("link", "latency"):
        if hosts == 1 and key in given:
            raise ValueError(f"one host has no link to others, and {key} would have no effect; leave it out")

    for key in ("inside", "inside_latency"):
        if ranks == 1 and key in given:
            raise ValueError(f"one rank of each host has no other inside, and {key} would have no effect; leave it out")

    def quantity(key: str, units: dict[str, float], default: float) -> float:
        return _quantity(key, given[key], units) if key in given else default

    return Cluster(
        hosts,
        ranks,
        link_mbit=quantity("link", RATES, FREE),
        latency=quantity("latency", TIMES, 0.0),
        inside_mbit=quantity("inside", RATES, FREE),
        inside_latency=quantity("inside_latency", TIMES, 0.0),
    )


def _count(key: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
        raise ValueError(f"{key} is a number of 1 or more, got {value!r}")
    return int(value)


def _quantity(key: str, value: str, units: dict[str, float]) -> float:
    """A number with a unit: rates are above 0, times may be 0."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z]+)", value.lower())
    example = "25gbit" if units is RATES else "50us"
    if match is None or match[2] not in units:
        raise ValueError(f"{key} is a number with a unit of {', '.join(units)}, as in {example}, got {value!r}")
    number = float(match[1]) * units[match[2]]
    least, most = (1e-3, 1e8) if units is RATES else (0.0, 60.0)
    if not math.isfinite(number) or not least <= number <= most:
        rule = "from 1kbit to 100tbit" if units is RATES else "from 0 to 60s"
        raise ValueError(f"{key} is {rule}, got {value!r}")
    return number
