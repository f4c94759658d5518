"""Nearest: no error above half a step, half the mean square of rounding at random, and the same codes every time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression.codecs.nearest import Nearest
from compression.codecs.quantizers import MaxMin
from compression.kernels import for_device, reference
from compression.layers import BFLOAT16, DENSE, Layer
from compression.plans import Plan, Segment, plan

MOST = float(torch.finfo(torch.float32).max)
ODD = [0.0, -0.0, 1e-45, -1e-40, 1.0, 3e38, -3e38, MOST, -MOST, float("inf"), float("nan")]
floats = st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=1, max_size=200)


def weights(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator) * torch.rand(count, generator=generator)


def through(quantizer: MaxMin, values: Tensor) -> Tensor:
    return quantizer.decode(quantizer.encode(values[None], seed=3), len(values))[0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("bucket_size", [512, 100, -1, 1])
def test_no_error_is_above_half_a_step(bits: int, bucket_size: int) -> None:
    values, quantizer = weights(1300), Nearest(bits, bucket_size)
    decoded = through(quantizer, values)
    for part, found in zip(*(each.split(bucket_size % 1301) for each in (values, decoded)), strict=True):
        step = (part.max() - part.min()) / quantizer.top
        assert (found - part).abs().max() <= step * (0.5 + 2**-16) + 1e-7


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mean_square_is_half_that_of_rounding_at_random_and_told_exactly(bits: int) -> None:
    values = weights(1 << 16)
    nearest, random = Nearest(bits), MaxMin(bits)
    lost = float((through(nearest, values) - values).square().sum())
    assert lost == pytest.approx(nearest.expected_squared_error(values), rel=1e-4)
    assert lost == pytest.approx(random.expected_squared_error(values) / 2, rel=0.02)


def test_values_on_a_level_stay_there_and_codes_depend_on_nothing_else() -> None:
    levels = torch.arange(256.0).repeat(2)
    assert torch.equal(through(Nearest(8), levels), levels)
    values = weights(1000)
    assert torch.equal(Nearest(8).encode(values[None], seed=1), Nearest(8).encode(values[None], seed=2))


def test_a_bucket_that_is_not_finite_decodes_to_nan() -> None:
    values = weights(1024)
    values[7] = torch.inf
    decoded = through(Nearest(8), values)
    assert decoded[:512].isnan().all()
    assert decoded[512:].isfinite().all()


def planned(bits: int, count: int) -> Plan:
    """A layer in codes, one in float32, one in bfloat16 and one in codes again."""
    layers = [Layer(index, str(index), (count,), True) for index in range(4)]
    segments = [Segment(layer, layer.index * count, 0) for layer in layers]
    widths = dict(zip("0123", (bits, DENSE, BFLOAT16, 9 - bits), strict=True))
    shards = {layer.name: [(0, count)] for layer in layers}
    return plan(segments, [0], shards, widths, 64, Nearest(bits).record_bytes)


@given(floats, st.integers(1, 8))
def test_numba_and_torch_give_the_same_bits(pattern: list[float], bits: int) -> None:
    layout, values = planned(bits, len(pattern)), torch.tensor(pattern).repeat(4)
    keys, wires = np.zeros((4, 2), np.uint32), []
    for kernels in (reference, for_device(torch.device("cpu"), Nearest.family)):
        wires.append(torch.zeros(layout.wire_bytes, dtype=torch.uint8))
        kernels.encode(Nearest(bits), layout, values, keys, wires[-1])
    assert torch.equal(*wires)
    slow, fast = torch.empty(2, 4 * len(pattern))
    reference.decode(Nearest(bits), layout, wires[0], slow)
    Nearest(bits).decode_plan(layout, wires[0], fast)
    assert torch.equal(slow.isnan(), fast.isnan())
    assert torch.equal(slow.nan_to_num(nan=0.0), fast.nan_to_num(nan=0.0))


def test_with_feedback_it_is_a_contraction_as_max_min_is() -> None:
    values, layout = weights(512), planned(4, 128)
    wire, pending = torch.empty(layout.wire_bytes, dtype=torch.uint8), torch.zeros(512)
    Nearest(4).encode_plan(layout, values, np.zeros((4, 2), np.uint32), wire, torch.zeros(512), pending)
    assert 0 < float(pending.square().sum()) < 0.05 * float(values.square().sum())
