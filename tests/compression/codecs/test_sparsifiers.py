"""Top-k and random-k: which values travel, in how many bytes, and that every kernel agrees on it."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compression
from compression import sparse_plans as sparse
from compression.codecs.sparsifiers import RandomK, TopK
from compression.kernels.cpu import sparse as sparse_cpu
from compression.kernels.reference import sparse as sparse_reference
from compression.randomness import stream_keys

NAN, INFINITY = float("nan"), float("inf")
CPU = torch.device("cpu")
ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3e38, -3e38, INFINITY, -INFINITY, NAN]
RESNET50_SIZES = [4096, 9408, 16384, 32768, 36864, 65536, 131072, 147456, 262144, 524288, 589824, 1048576, 2048000]

odd_values = st.lists(
    st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=True), st.integers(-2, 2).map(float)),
    min_size=1,
    max_size=300,
)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def largest(values: list[float], kept: int) -> list[int]:
    """Indices of the largest magnitudes by sorting; NaN above infinity by payload, ties to the lower index."""
    keys = (np.array(values, np.float32).view(np.int32) & 0x7FFFFFFF).tolist()
    return sorted(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:kept])


@given(hundredths=st.integers(1, 100), hundreds=st.integers(1, 100))
def test_a_fraction_is_the_number_as_it_is_written(hundredths: int, hundreds: int) -> None:
    assert TopK(hundredths / 100).kept(100 * hundreds) == hundredths * hundreds
    assert RandomK(hundredths / 100).kept(100 * hundreds) == hundredths * hundreds


@settings(deadline=None, max_examples=60)
@given(values=odd_values, ratio=st.floats(1e-3, 1.0), data=st.data())
def test_the_kernels_agree_bit_for_bit_and_with_sorting(values: list[float], ratio: float, data: st.DataObject) -> None:
    """Three layers out of one buffer, in an order that is not the buffer's."""
    count = len(values)
    cuts = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    runs = [(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True) if b > a][::-1]
    at = np.array([a for a, _ in runs], np.int64)
    plan = TopK(ratio).plan([b - a for a, b in runs])
    vector = torch.tensor(values, dtype=torch.float32)

    indices = sparse_cpu.select(plan, vector, at)
    assert torch.equal(indices, sparse_reference.select(plan, vector, at))
    expected = [i for (a, b), k in zip(runs, plan.kept, strict=True) for i in largest(values[a:b], int(k))]
    assert indices.tolist() == expected

    wires = [torch.full((plan.wire_bytes,), fill, dtype=torch.uint8) for fill in (255, 0)]
    sparse_cpu.encode(plan, vector, at, indices, wires[0])
    sparse_reference.encode(plan, vector, at, indices, wires[1])
    assert torch.equal(*wires)

    outs = [torch.ones(count), torch.ones(count)]
    sparse_cpu.decode(plan, wires[0], outs[0], at, 0.25)
    sparse_reference.decode(plan, wires[0], outs[1], at, 0.25)
    assert same_bits(*outs)


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_what_is_selected_does_not_depend_on_the_threads(threads: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = [70_000, 3, 513, 1]
    values = torch.randn(sum(counts), generator=generator).mul(spread).exp().mul(10).round()  # with many ties
    at = np.cumsum(counts) - counts
    plan = TopK(0.01).plan(counts)
    assert torch.equal(sparse_cpu.select(plan, values, at), sparse_reference.select(plan, values, at))


@settings(deadline=None, max_examples=60)
@given(values=odd_values, ratio=st.floats(1e-3, 1.0))
def test_a_message_is_as_long_as_promised_and_decodes_to_the_largest_values(values: list[float], ratio: float) -> None:
    codec, count = TopK(ratio), len(values)
    vector = torch.tensor([values, values[::-1]], dtype=torch.float32)
    wire = codec.encode(vector)
    assert wire.shape == (2, codec.wire_bytes(count))
    decoded = codec.decode(wire, count)
    for row, out in zip(vector, decoded, strict=True):
        expected = torch.zeros(count)
        chosen = largest(row.tolist(), math.ceil(Fraction(str(ratio)) * count))
        expected[chosen] = row[chosen] + 0.0  # decoding adds to zero: no negative zero
        assert same_bits(out, expected)
    assert torch.equal(codec.decode(codec.encode(decoded), count).nan_to_num(), decoded.nan_to_num())


@given(count=st.integers(1, 10**9), ratio=st.floats(1e-6, 1.0))
def test_an_index_costs_at_most_its_width_in_a_block_and_three_bits(count: int, ratio: float) -> None:
    kept = TopK(ratio).kept(count)
    nbytes = sparse.record_bytes(count, kept) - 4 * kept
    assert nbytes <= (kept * (sparse.low_bits(count, kept) + 3)) / 8 + 2
    assert nbytes * 8 >= kept * math.log2(count / kept)  # less could not tell where the values lie


@pytest.mark.parametrize("count", RESNET50_SIZES)
def test_a_kept_value_costs_less_than_42_bits_on_the_layers_of_resnet50(count: int) -> None:
    codec = TopK(0.01)
    assert 8 * codec.wire_bytes(count) <= 42 * codec.kept(count)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=200), ratio=st.floats(1e-3, 1.0))
def test_top_k_is_a_contraction(values: list[float], ratio: float) -> None:
    codec, vector = TopK(ratio), torch.tensor([values], dtype=torch.float32)
    lost = vector.double() - codec.decode(codec.encode(vector), len(values))
    fraction = 1 - codec.kept(len(values)) / len(values)
    assert lost.square().sum() <= fraction * vector.double().square().sum() * (1 + 1e-12)


def test_what_is_not_finite_is_kept_before_everything_else() -> None:
    values = torch.full((1, 1000), 3e38)
    values[0, 700], values[0, 900] = NAN, -INFINITY
    kept = TopK(0.002).decode(TopK(0.002).encode(values), 1000)[0]
    assert kept.isnan().nonzero().tolist() == [[700]]
    assert kept.isinf().nonzero().tolist() == [[900]]


def test_half_precision_values_and_empty_messages_are_taken() -> None:
    values = torch.tensor([[1.0, -3.0, 2.0]], dtype=torch.float16)
    assert TopK(0.3).decode(TopK(0.3).encode(values), 3).tolist() == [[0.0, -3.0, 0.0]]
    assert TopK(0.3).decode(TopK(0.3).encode(torch.empty(2, 0)), 0).shape == (2, 0)


@pytest.mark.parametrize("kernels", [sparse_cpu, sparse_reference])
@pytest.mark.parametrize("byte", [0, 255])
def test_a_damaged_record_is_refused(kernels: object, byte: int) -> None:
    plan = TopK(0.1).plan([100])
    wire = torch.full((plan.wire_bytes,), byte, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a sparse record is damaged: it should hold 10 indices below 100"):
        kernels.decode(plan, wire, torch.zeros(100), np.zeros(1, np.int64))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernels", [sparse_cpu, sparse_reference])
def test_an_index_beyond_the_layer_is_refused(kernels: object) -> None:
    plan = TopK(0.1).plan([100])
    wire = torch.zeros(plan.wire_bytes, dtype=torch.uint8)
    sparse_cpu.encode(plan, torch.ones(100), np.zeros(1, np.int64), torch.arange(90, 100), wire)
    low = slice(40, 40 + 4)
    wire[low] = 255  # the last index becomes 103
    with pytest.raises(ValueError, match="damaged"):
        kernels.decode(plan, wire, torch.zeros(100), np.zeros(1, np.int64))  # type: ignore[attr-defined]


def test_the_host_waits_for_no_device() -> None:
    """Tensors without values, which nobody could wait for, stand for those of a GPU."""
    plan, at, device = TopK(0.1).plan([100, 50]), np.array([0, 100]), torch.device("meta")
    values, wire = torch.empty(150, device=device), torch.empty(plan.wire_bytes, dtype=torch.uint8, device=device)
    indices = sparse_reference.select(plan, values, at)
    assert indices.shape == (15,)
    sparse_reference.encode(plan, values, at, indices, wire)
    sparse_reference.decode(plan, wire, values, at)
    assert RandomK(0.1).positions(100, (1, 2), device).shape == (10,)
    with pytest.raises(RuntimeError, match="meta"):  # as all of it would, had it waited
        bool(values.sum() > 0)


@pytest.mark.parametrize("byte", [0, 255])
def test_a_damaged_record_makes_the_average_on_a_gpu_not_finite(byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = TopK(0.1).plan([100]), torch.zeros(100)
    wire = torch.full((plan.wire_bytes,), byte, dtype=torch.uint8)
    monkeypatch.setattr(sparse_reference, "HOST", "no device")
    sparse_reference.decode(plan, wire, out, np.zeros(1, np.int64))
    assert out.isnan().any()


def test_a_message_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1000 values make a message of 52 bytes, got 51"):
        TopK(0.01).decode(torch.zeros(1, 51, dtype=torch.uint8), 1000)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, NAN])
def test_fractions_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="TopK keeps a fraction of the values above 0 and at most 1, got ratio="):
        compression.codec("topk", ratio=ratio)
    with pytest.raises(ValueError, match="RandomK sends a fraction of the values above 0 and at most 1, got fraction="):
        RandomK(ratio)


@pytest.mark.parametrize(("fraction", "count", "kept"), [(0.07, 100, 7), (0.14, 100, 14), (0.07, 101, 8), (0.1, 30, 3)])
def test_a_fraction_is_the_number_that_was_written(fraction: float, count: int, kept: int) -> None:
    """In floats 0.07 x 100 is above 7, and its ceiling 8."""
    assert TopK(fraction).kept(count) == RandomK(fraction).kept(count) == kept


keys = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 5000), fraction=st.floats(1e-4, 1.0), key=keys)
def test_random_positions_are_as_many_as_promised_and_all_different(
    count: int, fraction: float, key: tuple[int, int]
) -> None:
    codec = RandomK(fraction)
    positions = codec.positions(count, key, CPU)
    assert len(positions) == codec.kept(count) == math.ceil(Fraction(str(fraction)) * count)
    assert len(set(positions.tolist())) == len(positions)
    assert 0 <= positions.min() <= positions.max() < count
    assert torch.equal(positions, codec.positions(count, key, CPU))


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.7), (37, 0.3), (64, 0.25)])
def test_every_position_is_drawn_equally_often(count: int, fraction: float) -> None:
    """A z-test per position: |z| > 4.5 has a chance of 7e-6, with 64 positions 4e-4 in all."""
    codec, trials = RandomK(fraction), 1000
    hits = torch.zeros(count)
    for step in range(trials):
        low, high = stream_keys(3, step, np.array([7]), 3, 0)[0].tolist()
        hits[codec.positions(count, (low, high), CPU)] += 1
    chance = codec.kept(count) / count
    z = (hits - trials * chance) / math.sqrt(trials * chance * (1 - chance))
    assert z.abs().max() < 4.5
