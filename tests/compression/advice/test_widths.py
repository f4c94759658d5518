"""Steps by widths: what a search for time takes is what the costs predict, at every uniform width."""

from dataclasses import replace

import pytest

from compression.advice.choices import Choice, choices
from compression.advice.measured import Measured
from compression.advice.prediction import Predictor
from compression.advice.widths import step_by_widths
from compression.costs import Cluster, CodecCosts, Compute, Costs, bound
from compression.layers import layers_of
from compression.registry import build
from search import Tables, Timeline, Wish, search

SHAPES = {"conv.weight": (64, 64, 3, 3), "norm.weight": (64,), "fc.weight": (1000, 512), "head.weight": (4000, 512)}
WIDTHS = (2, 3, 4, 8)  # whose speeds are measured


def measured_on(cluster: Cluster) -> Measured:
    codecs = {choice.codec: CodecCosts(2e-9, 1e-9) for choice in choices()}
    codecs |= {Choice(build("maxmin", bits=bits)).codec: CodecCosts(1e-9 * bits, 2e-9 / bits) for bits in WIDTHS}
    return Measured(
        shapes=SHAPES,
        buffers=(("head.weight",), ("fc.weight", "norm.weight"), ("conv.weight",)),
        compute=Compute(0.02, 0.05, 0.003, dict(zip(SHAPES, (0.049, 0.045, 0.02, 0.01), strict=True)), 0.5),
        cluster=cluster,
        costs=Costs(0.001, 2e-5, 1e-5, 1e-9, 1e-10, codecs),
        errors=dict.fromkeys(codecs, 0.1),
    )


def tables_of(measured: Measured, hierarchical: bool) -> Tables:
    """Encoded bytes as averagers have them, and errors that quarter with a bit."""
    compressor = build("maxmin")
    layers = layers_of(measured.shapes.items(), compressor.bucket_size)
    averager = bound(compressor, layers, measured.cluster)
    compressed = [layer for layer in layers if layer.compressed]
    nbytes = [averager.encoded_bytes_at(compressed, bits, measured.cluster.ranks) for bits in WIDTHS]
    return Tables(
        [layer.name for layer in compressed],
        WIDTHS,
        [[layer.numel / 4.0**bits for bits in WIDTHS] for layer in compressed],
        [list(row) for row in zip(*nbytes, strict=True)],
        0,
        sum(layer.numel for layer in layers),
        [layer.numel for layer in compressed],
    )


def nbytes_of(tables: Tables) -> dict[int, dict[str, int]]:
    return {
        width: dict(zip(tables.layers, tables.nbytes[:, column].tolist(), strict=True))
        for column, width in enumerate(tables.widths)
    }


@pytest.mark.parametrize("link_mbit", [10.0, 100.0, 10_000.0])
@pytest.mark.parametrize(("ranks", "hierarchical"), [(1, False), (2, False), (2, True)])
def test_a_uniform_width_takes_the_seconds_that_the_costs_predict(link_mbit, ranks, hierarchical):
    measured = measured_on(Cluster(2, ranks, link_mbit, latency=1e-4))
    tables = tables_of(measured, hierarchical)
    plain = step_by_widths(measured, build("maxmin", error_feedback=True), nbytes_of(tables), hierarchical)
    timeline = Timeline.from_json(plain)
    for bits in WIDTHS:
        choice = Choice(build("maxmin", bits=bits, error_feedback=True), hierarchical)
        predicted = Predictor(measured, measured.cluster).step(choice).seconds
        assert timeline.seconds(tables, (bits,) * len(tables.layers)) == pytest.approx(predicted, rel=1e-9)


def test_speeds_between_measured_widths_are_between_theirs():
    measured = measured_on(Cluster(2, link_mbit=1e6))
    nbytes = {bits: {name: 10_000 * bits for name in SHAPES if name != "norm.weight"} for bits in range(4, 9)}
    timeline = Timeline.from_json(step_by_widths(measured, build("maxmin"), nbytes))
    encoding_JK = timeline.a_byte[..., 0] * [10_000 * bits for bits in nbytes]
    assert (encoding_JK[:, 1:] > encoding_JK[:, :-1]).all()


def test_a_quantizer_whose_speed_is_not_known_is_refused():
    measured = measured_on(Cluster(2, link_mbit=100.0))
    unknown = replace(measured, costs=replace(measured.costs, codecs={}))
    with pytest.raises(ValueError, match="need the speed of maxmin, and none was measured"):
        step_by_widths(unknown, build("maxmin"), {4: {"fc.weight": 256_000}})


def test_a_search_for_time_is_not_slower_than_one_for_bytes():
    """And on a link that backward hides, it keeps the widest."""
    for link_mbit in (30.0, 1e7):
        measured = measured_on(Cluster(2, link_mbit=link_mbit))
        tables = tables_of(measured, False)
        timeline = Timeline.from_json(step_by_widths(measured, build("maxmin"), nbytes_of(tables)))
        by_time = search(tables, Wish.time(4), "exact", timeline=timeline)
        by_bytes = search(tables, Wish.error(4), "exact", timeline=timeline)
        seconds = [timeline.seconds(tables, each.installed) for each in (by_time, by_bytes)]
        assert seconds[0] <= seconds[1] * (1 + 1e-8)
        assert by_time.certified.gap < 1e-6
