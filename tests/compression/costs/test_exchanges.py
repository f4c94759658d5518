"""Costs of exchanges: the model by hand, its fit, and a prediction for every compressor, flat and in two levels."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import COMPRESSORS, Solo, build
from compression.averagers import Hierarchical
from compression.costs import Cluster, CodecCosts, Costs, Load, Run, bound, in_buffers, load_of
from compression.layers import Layer, layers_of

SHAPES = {"conv": (64, 32, 3, 3), "norm": (64,), "fc": (100, 640), "bias": (100,)}
VALUES = sum(math.prod(shape) for shape in SHAPES.values())
TRUE = Costs(2e-3, 1e-4, 5e-5, 1e-9, 3e-10, {"codes": CodecCosts(2e-9, 4e-9), "sparse": CodecCosts(5e-9, 1e-9)})
NAMES = list(COMPRESSORS)


def layers(name: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Layer, ...]:
    return layers_of(shapes.items(), build(name).bucket_size)


def load(name: str, cluster: Cluster, hierarchical: bool = False) -> Load:
    own = layers(name)
    return load_of(bound(build(name), own, cluster, hierarchical), [own], cluster)


def test_a_ring_in_one_level_by_hand() -> None:
    """Three hosts of two: every rank passes on 2 x 5/6 of the gradient, in ten rounds; one of two crosses the link."""
    found = load("none", Cluster(3, 2))
    sent = 2 * 5 / 6 * 4 * VALUES
    assert found == pytest.approx(Load(10, 10, sent, VALUES, 0, link=sent, beside=sent, circulated=sent))


def test_two_hops_in_one_level_by_hand() -> None:
    """A rank's messages go to five others, four of which are on other hosts."""
    found = load("maxmin", Cluster(3, 2))
    sent = build("maxmin").averager(layers("maxmin"), Solo(), 0).bytes_sent(layers("maxmin"), 6)
    assert found == pytest.approx(Load(2, 10, sent, VALUES, sent, link=2 * sent * 4 / 5, beside=2 * sent / 5))


def test_two_levels_by_hand() -> None:
    """Two layers of 1,024 values in buckets of 512, cut into a half each; of 3 hosts one owns none of a half."""
    own = layers_of([("a", (2, 512)), ("b", (2, 512))], 512)
    cluster = Cluster(3, 2)
    found = load_of(bound(build("maxmin", bits=8), own, cluster, hierarchical=True), [[own[1]], [own[0]]], cluster)
    half = 512 + 8  # bytes of a bucket: codes and two scales
    sent = 2 * 2 * 2 / 3 * half  # two buffers, two hops
    assert found == pytest.approx(
        Load(4, 2 * 2 * 2 / 3, sent, 1024, sent, link=2 * sent, beside=0, meetings=4, copied=2 * 4 * 2048)
    )


def test_whole_layers_are_owned_by_one_rank_each_and_the_busiest_counts() -> None:
    found = load("powersgd", Cluster(3, 2), hierarchical=True)
    assert found.encoded == 100 * 640  # the larger layer alone: the other has the rest
    assert found.link > found.sent


def test_seconds_by_hand() -> None:
    cluster = Cluster(4, 2, link_mbit=8, latency=0.5, inside_mbit=80, inside_latency=0.25, ranks_per_core=3)
    run = Run(cluster, Load(6, 7, 1000, 10, 20, link=3e6, beside=1e6, meetings=2, copied=1e3), "codes")
    start, messages = 2e-3, 3 * (8 * 1e-4 + 7 * 5e-5) + 6 * 0.5 + 2 * 0.25
    link, copies, codec = 3.0, 2 * 1e3 / 10e6, 3 * (10 * 2e-9 + 20 * 4e-9)
    assert TRUE.seconds(run) == pytest.approx(start + messages + link + copies + codec)
    assert TRUE.seconds_of_messages(run) == pytest.approx(messages)


def test_bytes_take_as_long_as_the_slowest_of_processor_link_and_inside() -> None:
    def seconds(**limits: float) -> float:
        run = Run(Cluster(2, 2, **limits), Load(0, 0, 1e9, 0, 0, link=2e9, beside=1e9))
        return TRUE.seconds(run) - TRUE.start

    assert seconds() == pytest.approx(1.0)
    assert seconds(link_mbit=1e6, inside_mbit=1e6) == pytest.approx(1.0)
    assert seconds(link_mbit=1_000, inside_mbit=1e6) == pytest.approx(16.0)
    assert seconds(link_mbit=1_000, inside_mbit=100) == pytest.approx(80.0)


def test_a_round_of_one_host_alone_has_the_latency_inside() -> None:
    run = Run(Cluster(1, 4, latency=1.0, inside_latency=0.5), load("none", Cluster(1, 4)))
    assert run.load.link == 0
    assert TRUE.seconds_of_messages(run) == pytest.approx(6 * (0.5 + 1e-4 + 5e-5))


def test_a_codec_that_was_never_measured_is_not_free() -> None:
    with pytest.raises(ValueError, match=r"^the speed of 'atoms' is not known; fit .* take one of codes, sparse$"):
        TRUE.seconds(Run(Cluster(2), load("svd", Cluster(2)), "atoms"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hosts": 0}, "`hosts` is at least 1, got 0"),
        ({"hosts": 2, "ranks_per_core": 0.5}, "`ranks_per_core` is at least 1, got 0.5"),
        ({"hosts": 2, "link_mbit": 0}, "`link_mbit` is a rate above 0 in Mbit/s, got 0"),
        ({"hosts": 2, "inside_mbit": math.nan}, "`inside_mbit` is a rate above 0 in Mbit/s, got nan"),
        ({"hosts": 2, "latency": -1}, "`latency` is in seconds, 0 or more, got -1"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**values)  # type: ignore[arg-type]


def test_an_averager_of_other_hosts_is_refused() -> None:
    own = layers("maxmin")
    averager = bound(build("maxmin"), own, Cluster(2, 4), hierarchical=True)
    assert isinstance(averager, Hierarchical)
    with pytest.raises(ValueError, match="the averager has 4 ranks a host, and the cluster 2"):
        load_of(averager, [own], Cluster(4, 2))


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5)], ids=str)
def test_every_compressor_has_a_finite_prediction(name: str, hierarchical: bool, grid: tuple[int, int]) -> None:
    cluster = Cluster(*grid, link_mbit=1_000, inside_mbit=100_000)
    run = Run(cluster, load(name, cluster, hierarchical), "codes")
    assert TRUE.start < TRUE.seconds(run) < 10
    assert all(math.isfinite(term) and term >= 0 for term in run.load)
    assert (run.load.link == 0) == (name == "sanity" or cluster.hosts == 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (2, 8), (16, 4)], ids=str)
def test_two_levels_put_no_more_on_a_link_than_one(name: str, grid: tuple[int, int]) -> None:
    flat, levels = (load(name, Cluster(*grid), hierarchical) for hierarchical in (False, True))
    assert levels.link <= flat.link
    assert levels.messages <= flat.messages
    assert levels.rounds <= flat.rounds


@given(
    st.sampled_from(NAMES),
    st.booleans(),
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    st.sampled_from(["link_mbit", "inside_mbit"]),
    st.tuples(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9)),
)
@settings(deadline=None, max_examples=100)
def test_more_bandwidth_is_never_slower(
    name: str, hierarchical: bool, grid: tuple[int, int], limit: str, rates: tuple[float, float]
) -> None:
    found = load(name, Cluster(*grid), hierarchical)
    slow, fast = (TRUE.seconds(Run(Cluster(*grid, **{limit: mbit}), found, "codes")) for mbit in sorted(rates))
    assert fast <= slow
    assert TRUE.seconds(Run(Cluster(*grid), found, "codes")) <= fast


def synthetic_runs() -> Iterator[Run]:
    """A ring, codes and sparse gradients on two cores, flat and in two levels."""
    named = [("none", None), ("maxmin", "codes"), ("topk", "sparse")]
    grids = [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)]
    for (name, codec), grid, size in itertools.product(named, grids, (300, 2000)):
        cluster = Cluster(*grid, ranks_per_core=max(1.0, math.prod(grid) / 2))
        own = layers(name, {f"layer{k}": (size, size) for k in range(2)})
        averager = bound(build(name), own, cluster, hierarchical=grid[1] > 1)
        yield Run(cluster, load_of(averager, list(in_buffers(own)), cluster), codec)


def test_a_fit_finds_the_costs_that_made_the_runs() -> None:
    found = Costs.fit({run: TRUE.seconds(run) for run in synthetic_runs()})
    for name in ("start", "per_round", "per_message", "per_byte", "per_copied_byte"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name)), name
    assert found.codecs.keys() == TRUE.codecs.keys()
    for name, codec in found.codecs.items():
        assert dataclasses.astuple(codec) == pytest.approx(dataclasses.astuple(TRUE.codecs[name]))


def test_a_fit_has_no_cost_below_0() -> None:
    """Where more messages seem to take less time, they cost nothing."""
    runs = [Run(Cluster(2), Load(0, messages, 1e6, 0, 0, 1e6, 0)) for messages in (1, 100)]
    found = Costs.fit(dict(zip(runs, (2.0, 1.0), strict=True)))
    assert found.per_message == found.per_copied_byte == 0
    assert found.codecs == {}


def test_a_fit_takes_no_runs_over_limited_links() -> None:
    cluster = Cluster(2, link_mbit=1_000)
    with pytest.raises(ValueError, match="fitted to runs on networks without limits"):
        Costs.fit({Run(cluster, load("none", cluster)): 1.0})


def test_only_a_fit_needs_scipy() -> None:
    script = (
        "import sys; sys.modules['scipy'] = None\n"  # not to be imported
        "from compression.costs import Cluster, Costs, Load, Run\n"
        "run = Run(Cluster(2), Load(1, 1, 1, 1, 1, 1, 1))\n"
        "assert Costs(1, 0, 0, 0, 0, {}).seconds(run) == 1\n"
        "try: Costs.fit({run: 1.0})\n"
        "except ImportError: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3]).returncode == 7


def test_buffers_are_closed_at_the_limits_that_are_given() -> None:
    own = layers_of([(str(k), (256, 256)) for k in range(20)], 0)  # of a quarter of a MiB
    assert [len(buffer) for buffer in in_buffers(own)] == [4, 16]
    assert [len(buffer) for buffer in in_buffers(own, 2**21, 2**21)] == [8, 8, 4]
    assert [len(buffer) for buffer in in_buffers(own, 2**21)] == [4, 8, 8]
