"""The fast kernels give the reference's bits: codes, decoded values, residuals."""

import pytest
import torch

from compression import codec
from compression.kernels import cpu, reference
from compression.layers import DENSE, Layer, Plan, Segment, cut, plan
from compression.randomness import stream_keys

SIZES = (5000, 1, 513, 64, 4097)


def layout(widths: tuple[int, ...], bucket_size: int, world_size: int) -> Plan:
    layers = [Layer(index, f"layer{index}", (size,), True) for index, size in enumerate(SIZES)]
    starts = [sum(SIZES[:index]) for index in range(len(SIZES))]
    segments = [Segment(layer, at, at) for layer, at in zip(layers, starts, strict=True)]
    shares = {layer.name: cut(layer.numel, bucket_size, world_size, layer.index) for layer in layers}
    bits = {layer.name: width for layer, width in zip(layers, widths, strict=True)}
    return plan(segments, range(world_size), shares, bits, bucket_size, codec("maxmin").record_bytes)


@pytest.mark.parametrize("bucket_size", [512, 100, -1, 8, 1000, 3, 1])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("shift", [0, 3, 6])
def test_numba_and_torch_give_the_same_bits(bucket_size: int, world_size: int, feedback: bool, shift: int) -> None:
    widths = tuple(width if width == DENSE else (width + shift) % 8 + 1 for width in (3, 0, 2, DENSE, 7))
    where = layout(widths, bucket_size, world_size)
    generator = torch.Generator().manual_seed(bucket_size + shift)
    values, residual = torch.randn(2, where.values, generator=generator)
    values[7:11] = torch.tensor([0.0, -0.0, 3e38, 1e-42])
    keys = stream_keys(1, 2, where.layers, 0, 0)
    found = []
    for kernels in (reference, cpu):
        wire = torch.zeros(where.wire_bytes, dtype=torch.uint8)
        pending = torch.zeros(where.values)
        kernels.encode("maxmin", where, values, keys, wire, *((residual.clone(), pending) if feedback else ()))
        decoded = torch.ones(where.values)
        kernels.decode("maxmin", where, wire, decoded, 0.5, accumulate=True)
        found.append((wire, pending.view(torch.int32), decoded.view(torch.int32)))
    assert all(torch.equal(slow, fast) for slow, fast in zip(*found, strict=True))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_expected_error_is_the_same_and_is_what_happens(bits: int) -> None:
    quantizer = codec("maxmin", bits=bits, bucket_size=100)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(bits))
    expected = reference.expected_squared_error("maxmin", quantizer._plan(1, 5000), values)
    assert quantizer.expected_squared_error(values) == pytest.approx(expected, rel=1e-4)
    losses = torch.stack(
        [((quantizer.decode(quantizer.encode(values[None], seed), 5000)[0] - values) ** 2).sum() for seed in range(50)]
    )
    spread = float(losses.std()) / 50**0.5
    assert abs(float(losses.mean()) - expected) < 5 * spread  # 5 sigma


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 4097])
def test_a_message_is_exactly_as_long_as_promised(bits: int, count: int) -> None:
    quantizer = codec("maxmin", bits=bits)
    message = quantizer.encode(torch.randn(3, count), 0)
    assert message.shape == (3, quantizer.wire_bytes(count))
    assert quantizer.decode(message, count).shape == (3, count)


def test_a_bucket_with_a_nan_decodes_to_nan_and_the_others_do_not() -> None:
    values = torch.randn(1, 1024)
    values[0, 600] = float("nan")
    decoded = codec("maxmin").decode(codec("maxmin").encode(values, 0), 1024)[0]
    assert torch.isfinite(decoded[:512]).all()
    assert torch.isnan(decoded[512:]).all()


def test_a_width_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="MaxMin codes are 1 to 8 bits wide, got bits=9"):
        codec("maxmin", bits=9)
    with pytest.raises(ValueError, match="bucket size of at least 1, or -1 for the whole layer, got 0"):
        codec("maxmin", bucket_size=0)
