"""The fast kernels give the reference's bits: codes, decoded values, residuals."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compression import COMPRESSORS, codec, plans
from compression.kernels import Kernels, for_device, reference
from compression.layers import BFLOAT16, DENSE, Layer, shard
from compression.plans import Plan, Segment
from compression.randomness import stream_keys
from tests.support.quantizers import takes

SIZES = (5000, 1, 513, 64, 4097, 700)
QUANTIZERS = [name for name, row in COMPRESSORS.items() if row.quantizer is not None]
MOST = float(torch.finfo(torch.float32).max)
ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3e38, -3e38, MOST, -MOST, float("inf"), -float("inf"), float("nan")]


def with_buckets(*sizes: int) -> list[tuple[str, int]]:
    """Every quantizer with each of these sizes of buckets that it takes, and with 64, which all do."""
    return [(name, size) for name in QUANTIZERS for size in (*sizes, 64) if takes(name, size)]


def widths_of(name: str, shift: int) -> tuple[int, ...]:
    """Widths for the layers of SIZES: different ones where the quantizer has several, and two layers as floats."""
    row = COMPRESSORS[name]
    if not row.has_bits:
        return (codec(name).bits,) * 3 + (DENSE, codec(name).bits, BFLOAT16)
    spread = 9 - row.min_bits
    floats = {3: DENSE, 5: BFLOAT16}
    return tuple(floats.get(k, (3 * k + shift) % spread + row.min_bits) for k in range(len(SIZES)))


def planned(
    name: str, widths: tuple[int, ...], bucket_size: int, world_size: int, sizes: tuple[int, ...] = SIZES
) -> Plan:
    layers = [Layer(index, f"layer{index}", (size,), True) for index, size in enumerate(sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    segments = [Segment(layer, at, at) for layer, at in zip(layers, starts, strict=True)]
    shards = {layer.name: shard(layer.numel, bucket_size, world_size, layer.index) for layer in layers}
    bits = {layer.name: width for layer, width in zip(layers, widths, strict=True)}
    quantizer = codec(name, bucket_size=bucket_size)
    rules = (quantizer.shard_bucket_size, quantizer.record_bytes)
    return quantizer.in_pieces(plans.plan(segments, range(world_size), shards, bits, *rules))


def fast(name: str) -> Kernels:
    return for_device(torch.device("cpu"), codec(name).family)


def same_bits(name: str, plan: Plan, values: torch.Tensor, residual: torch.Tensor | None) -> None:
    keys = stream_keys(1, 2, plan.layers, 0, 0)
    found = []
    for kernels in (reference, fast(name)):
        wire = torch.zeros(plan.wire_bytes, dtype=torch.uint8)
        pending = torch.zeros(plan.values)
        states = (residual.clone(), pending) if residual is not None else ()
        kernels.encode(codec(name), plan, values, keys, wire, *states)
        decoded = torch.ones(plan.values)
        kernels.decode(codec(name), plan, wire, decoded, 0.5, accumulate=True, keys=keys)
        found.append((_comparable(wire), _comparable(pending), _comparable(decoded)))
    assert all(torch.equal(slow, fast) for slow, fast in zip(*found, strict=True))


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """Bits, every NaN alike: which of two NaN a sum keeps is the processor's business."""
    if values.dtype == torch.uint8:
        return values
    return torch.where(values.isnan(), 0x7FC00000, values.view(torch.int32))


@pytest.mark.parametrize(("name", "bucket_size"), with_buckets(512, 100, -1, 8, 1))
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("shift", [0, 4])
def test_numba_and_torch_give_the_same_bits(name: str, bucket_size: int, feedback: bool, shift: int) -> None:
    plan = planned(name, widths_of(name, shift), bucket_size, world_size=1 + 2 * (shift > 0))
    generator = torch.Generator().manual_seed(bucket_size + shift)
    values, residual = torch.randn(2, plan.values, generator=generator)
    values[7:11] = torch.tensor([0.0, -0.0, 3e38, 1e-42])
    same_bits(name, plan, values, residual if feedback else None)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("power", [-140, -126, -110, -103, -101, -100, -98, -30, 100, 125])
def test_whatever_their_size_the_bits_are_the_same(name: str, power: int) -> None:
    """Steps between codes may be denormal numbers, or become ones in fixed point."""
    plan = planned(name, widths_of(name, 1), 512, world_size=1)
    values = torch.randn(plan.values, generator=torch.Generator().manual_seed(1)).double() * 2.0**power
    same_bits(name, plan, values.float(), None)


@pytest.mark.parametrize(("name", "bucket_size"), with_buckets(512, 100, -1))
@pytest.mark.parametrize(("feedback", "rank"), [(False, None), (True, None), (False, 0), (True, 2), (False, 3)])
def test_sums_over_ranks_are_encoded_with_the_same_bits(
    name: str, bucket_size: int, feedback: bool, rank: int | None
) -> None:
    """The first layer is longer than what is decoded and encoded at a time."""
    plan = planned(name, widths_of(name, 2), bucket_size, 1, (70_000, *SIZES[1:]))
    values, residual = torch.randn(2, plan.values, generator=torch.Generator().manual_seed(bucket_size))
    received = torch.empty(3, plan.wire_bytes, dtype=torch.uint8)
    senders = np.stack([stream_keys(1, 2, plan.layers, 1, other) for other in range(3)])
    for other, message in enumerate(received):
        fast(name).encode(codec(name), plan, values.roll(other), senders[other], message)
    keys = stream_keys(1, 2, plan.layers, 2, 0)
    found = []
    for kernels in (reference, fast(name)):
        wire, pending = torch.zeros(plan.wire_bytes, dtype=torch.uint8), torch.zeros(plan.values)
        states, own_shard = (residual.clone(), pending) if feedback else (None, None), values.clone()
        summands = (received, own_shard, rank, 1 / 3)
        kernels.recode(codec(name).of_averages, plan, *summands, keys, wire, *states, senders)
        found.append((wire, pending, own_shard))
    decoded = torch.empty_like(values)
    reference.decode(codec(name), plan, wire, decoded, keys=keys)
    assert torch.equal(own_shard, decoded)
    assert all(torch.equal(slow, fast) for slow, fast in zip(*found, strict=True))


@pytest.mark.parametrize("name", QUANTIZERS)
@given(
    pattern=st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=1, max_size=60),
    shift=st.integers(0, 7),
    feedback=st.booleans(),
)
@example(pattern=[MOST], shift=0, feedback=False)
@example(pattern=[0.0, 3e38, 0.0, 0.0, 0.0, MOST, 0.0], shift=0, feedback=True)
@settings(deadline=None, max_examples=25)
def test_whatever_the_values_the_bits_are_the_same(
    name: str, pattern: list[float], shift: int, feedback: bool
) -> None:
    plan = planned(name, widths_of(name, shift), 64, world_size=2)
    values = torch.tensor(pattern, dtype=torch.float32).repeat(-(-plan.values // len(pattern)))[: plan.values]
    same_bits(name, plan, values, values.flip(0).nan_to_num(0.0, 1e30, -1e30) if feedback else None)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_reference_waits_for_no_device(name: str) -> None:
    """Tensors without values, which nobody could wait for, stand for those of a GPU."""
    plan, device = planned(name, widths_of(name, 1), 64, world_size=2), torch.device("meta")
    values, residual, pending = torch.empty(3, plan.values, device=device)
    wire = torch.empty(plan.wire_bytes, dtype=torch.uint8, device=device)
    keys = stream_keys(1, 2, plan.layers, 0, 0)
    reference.encode(codec(name), plan, values, keys, wire, residual, pending)
    reference.decode(codec(name), plan, wire, values, 0.5, accumulate=True, keys=keys)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if COMPRESSORS[name].has_bits])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_expected_error_is_the_same(name: str, bits: int) -> None:
    quantizer = codec(name, bits=bits, bucket_size=100 if takes(name, 100) else 128)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(bits))
    expected = reference.expected_squared_error(quantizer, quantizer._messages(1, 5000), values)
    assert quantizer.expected_squared_error(values) == pytest.approx(expected, rel=1e-4)
