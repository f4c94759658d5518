"""Clusters in words: what they mean, and one line for each that makes no sense."""

import math

import pytest

from compression.advice.simulated import CLUSTER_KEYS, cluster_of
from compression.costs import Cluster


def test_a_cluster_with_everything() -> None:
    text = "hosts=16 ranks=8 link=25gbit latency=50us inside=200gbit inside_latency=2.5us"
    found = cluster_of(text)
    assert (found.hosts, found.ranks_per_host, found.link_mbit, found.inside_mbit) == (16, 8, 25_000, 200_000)
    assert (found.latency, found.inside_latency) == pytest.approx((5e-5, 2.5e-6))
    assert set(CLUSTER_KEYS) == {word.partition("=")[0] for word in text.split()}


def test_what_is_left_out_takes_no_time() -> None:
    assert cluster_of("hosts=2, link=100MBit") == Cluster(2, 1, 100)


def test_one_host_of_several_ranks_has_no_link() -> None:
    assert cluster_of("hosts=1 ranks=8 inside=100gbit") == Cluster(1, 8, math.inf, 0, 100_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a number of hosts"),
        ("ranks=4", "needs a number of hosts"),
        ("hosts", "KEY=VALUE with the keys hosts, ranks, link, .* got 'hosts'"),
        ("nodes=4", "KEY=VALUE .* got 'nodes=4'"),
        ("hosts=0 link=1gbit", "hosts is a number of 1 or more, got '0'"),
        ("hosts=two link=1gbit", "hosts is a number of 1 or more, got 'two'"),
        ("hosts=1.5 link=1gbit", "hosts is a number of 1 or more, got '1.5'"),
        ("hosts=2 hosts=3 link=1gbit", "one hosts, got '2' and '3'"),
        ("hosts=2", "give their rate"),
        ("hosts=1", "nothing travels on one host of one rank"),
        ("hosts=1 ranks=2 link=1gbit", "link would have no effect"),
        ("hosts=2 link=1gbit inside=1gbit", "no other inside, and inside would have no effect; leave it out"),
        ("hosts=2 ranks=1 link=1gbit inside_latency=1us", "inside_latency would have no effect"),
        ("hosts=100000 ranks=8 link=1gbit", "at most 65536 ranks"),
        ("hosts=2 link=0mbit", "link is from 1kbit to 100tbit, got '0mbit'"),
        ("hosts=2 link=-1gbit", "link is a number with a unit"),
        ("hosts=2 link=25", "link is a number with a unit of kbit, mbit, gbit, tbit, as in 25gbit, got '25'"),
        ("hosts=2 link=nangbit", "link is a number with a unit"),
        ("hosts=2 link=25GB", "link is a number with a unit"),
        ("hosts=2 link=1gbit latency=50", "latency is a number with a unit of ns, us, ms, s"),
        ("hosts=2 link=1gbit latency=1e3s", "latency is a number with a unit"),
        ("hosts=2 link=1gbit latency=61s", "latency is from 0 to 60s"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        cluster_of(text)
    assert "\n" not in str(raised.value)
