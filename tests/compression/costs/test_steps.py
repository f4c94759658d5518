"""Steps: the overlap by hand, and what holds for every exchange."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import COMPRESSORS, build
from compression.costs import Cluster, CodecCosts, Compute, Costs, Parts, StepModel, Transfer, bound
from compression.layers import layers_of

COSTS = Costs(0.0, 0.0, 5e-5, 1e-9, 3e-10, {"codes": CodecCosts(2e-9, 4e-9)})
SHAPES = {"stem": (64, 48), "body": (256, 256), "head": (256, 100), "bias": (100,)}
IDLE = Compute(1.0, 10.0, 2.0, {}, contention=0.0)


def model(compute: Compute = IDLE) -> StepModel:
    return StepModel(COSTS, compute, Cluster(2), [])


def exposed(transfers: list[tuple[float, Parts]], overlaps: bool = False, contention: float = 0.0) -> float:
    compute = replace(IDLE, contention=contention)
    return model(compute).exposed([Transfer(*each) for each in transfers], overlaps)


def test_an_exchange_that_ends_before_backward_does_is_free() -> None:
    assert exposed([(2.0, Parts(1, 3, 0, 1)), (9.0, Parts(0, 1, 0, 0))]) == 0


def test_the_last_buffer_is_never_hidden() -> None:
    assert exposed([(2.0, Parts(1, 1, 0, 1)), (10.0, Parts(0.5, 2, 0, 0.25))]) == 2.75


def test_buffers_wait_for_those_before_them() -> None:
    """The first is through at 2 + 9 = 11, the second at 11 + 3."""
    assert exposed([(2.0, Parts(0, 9, 0, 0)), (10.0, Parts(0, 3, 0, 0))]) == 4


def test_backward_pays_for_the_processor_where_all_cores_are_taken() -> None:
    """The first exchange's 1 + 0.5 + 1 seconds of work delay the second buffer to 12.5, the second's do not delay it;
    but backward's own core has to do all of it."""
    transfers = [(2.0, Parts(1, 2, 0.5, 1)), (10.0, Parts(1, 2, 0.5, 1))]
    assert exposed(transfers, contention=1.0) == pytest.approx(12.5 + 4 - 10)
    assert exposed(transfers, contention=0.0) == pytest.approx(4)


def test_a_codec_hides_where_a_core_is_to_spare_and_does_not_where_none_is() -> None:
    early = [(1.0, Parts(2, 0, 0, 0))]
    assert exposed(early, contention=0.0) == 0
    assert exposed(early, contention=1.0) == 2


def test_buffers_overlap_where_averager_and_network_let_them() -> None:
    """GPUs' messages go by order: nothing overlaps there. Nor in two levels, where the way inside takes turns."""
    layers = layers_of(SHAPES.items(), build("maxmin").bucket_size)
    cluster = Cluster(2, 2)

    def overlaps(name: str, hierarchical: bool, **network: bool) -> bool:
        steps = StepModel(replace(COSTS, **network), IDLE, cluster, [layers])
        return steps.promise(bound(build(name), layers, cluster, hierarchical)).overlaps

    assert overlaps("maxmin", False)
    assert overlaps("maxmin", True)
    assert not overlaps("none", False)
    assert not overlaps("maxmin", False, overlaps=False)
    assert overlaps("maxmin", False, overlaps_inside=False)
    assert not overlaps("maxmin", True, overlaps_inside=False)
    assert not overlaps("maxmin", True, overlaps=False)


def test_buffers_that_overlap_encode_while_others_travel() -> None:
    """Encoded at 11 and 12, arrived at 14 and 17, decoded at 15 and 18; one at a time it would be 20."""
    transfers = [(10.0, Parts(1, 3, 0, 1)), (10.0, Parts(1, 3, 0, 1))]
    assert exposed(transfers, overlaps=True) == 8
    assert exposed(transfers, overlaps=False) == 10


def test_coding_is_one_threads_work_even_where_buffers_overlap() -> None:
    transfers = [(10.0, Parts(4, 1, 0, 4)), (10.0, Parts(4, 1, 0, 4))]
    assert exposed(transfers, overlaps=True) == 16


def test_a_step_is_its_own_work_and_what_is_not_hidden() -> None:
    layers = layers_of(SHAPES.items(), 512)
    compute = Compute(0.1, 0.2, 0.05, dict.fromkeys(SHAPES, 0.2), contention=1.0)
    found = StepModel(COSTS, compute, Cluster(2, link_mbit=8), [layers]).predict(
        bound(build("none"), layers, Cluster(2)), None
    )
    values = sum(layer.numel for layer in layers)
    network = 2 * 5e-5 + 4 * values * 1e-6  # two messages of half the gradient each, one byte a microsecond
    assert found.seconds == pytest.approx(0.35 + network + 0.0)
    assert (found.codec, found.network, found.host_bytes) == pytest.approx((0, network, 4 * values))


def test_a_buffer_is_ready_with_the_last_of_its_layers() -> None:
    layers = layers_of(SHAPES.items(), 512)
    compute = Compute(0, 1, 0, {"stem": 0.9, "body": 0.5, "head": 0.2, "bias": 0.1})
    assert compute.release(layers[1:]) == 0.5
    assert compute.release(layers) == 0.9


@pytest.mark.parametrize("values", [(-1, 1, 1), (1, math.nan, 1), (1, 1, math.inf)])
def test_times_that_cannot_be_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="times of a step are in seconds, 0 or more, got"):
        Compute(*values, {})


def test_a_contention_is_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1.5"):
        Compute(1, 1, 1, {}, contention=1.5)


seconds = st.floats(0, 100)


@st.composite
def transfers(draw: st.DrawFn) -> list[Transfer]:
    releases = sorted(draw(st.lists(st.floats(0, 10), min_size=1, max_size=6)))
    parts = [Parts(*draw(st.tuples(seconds, seconds, st.just(0.0), seconds))) for _ in releases]
    busy = [draw(st.floats(0, 1)) for _ in releases]
    return [Transfer(at, part._replace(processor=share * part.network))
            for at, part, share in zip(releases, parts, busy, strict=True)]  # fmt: skip


@given(transfers(), st.booleans(), st.floats(0, 1))
@settings(deadline=None)
def test_what_is_added_is_at_most_the_exchange_by_itself(each: list[Transfer], overlaps: bool, share: float) -> None:
    total = sum(part.encoding + part.network + part.decoding for _, part in each)
    added = model(replace(IDLE, contention=share)).exposed(each, overlaps)
    assert -1e-9 <= added <= total + 1e-9


@given(transfers(), st.booleans(), st.floats(0, 1), st.integers(0, 3), st.floats(0, 1))
@settings(deadline=None)
def test_less_work_or_contention_is_never_slower(
    each: list[Transfer], overlaps: bool, share: float, part: int, less: float
) -> None:
    def shortened(parts: Parts) -> Parts:
        smaller = Parts(*(value * (less if k == part else 1.0) for k, value in enumerate(parts)))
        return smaller._replace(processor=min(smaller.processor, smaller.network))

    after = [Transfer(at, shortened(parts)) for at, parts in each]
    before = model(replace(IDLE, contention=share)).exposed(each, overlaps)
    assert model(replace(IDLE, contention=share)).exposed(after, overlaps) <= before + 1e-9
    assert model(replace(IDLE, contention=share * less)).exposed(each, overlaps) <= before + 1e-9


@given(
    st.sampled_from(list(COMPRESSORS)),
    st.booleans(),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.floats(1e-2, 1e7), st.floats(1e-2, 1e7)),
    st.floats(0, 1),
    st.floats(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_more_bandwidth_is_never_slower_and_no_step_is_faster_than_its_own_work(
    name: str, hierarchical: bool, grid: tuple[int, int], rates: tuple[float, float], share: float, slower: float
) -> None:
    layers = layers_of(SHAPES.items(), 512)
    compute = Compute(1e-3, 2e-3, 1e-3, {name: 2e-3 * k / 4 for k, name in enumerate(reversed(SHAPES))}, share)
    costs = replace(COSTS, slower_sums=slower)
    at = StepModel(costs, compute, Cluster(*grid), [layers[2:], layers[:2]])
    promise = at.promise(bound(build(name), layers, Cluster(*grid), hierarchical))
    slow, fast = (
        at.on(Cluster(*grid, link_mbit=mbit)).predict(promise, "codes").seconds for mbit in sorted(rates)
    )
    assert compute.seconds - 1e-12 <= at.predict(promise, "codes").seconds <= fast + 1e-12
    assert fast <= slow + 1e-12
