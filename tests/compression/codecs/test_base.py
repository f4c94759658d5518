"""Values as numbers of their own: float32 as it is, and bfloat16 as everybody rounds to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression.codecs.base import BFloat16, Float32, Floats

MOST = float(torch.finfo(torch.float32).max)
INFINITY = float("inf")
TIES = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2.0**-133 + 2.0**-134, 3 * 2.0**-134]
ODD = [0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, MOST, -MOST, INFINITY, -INFINITY, *TIES]
floats = st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False)), min_size=1, max_size=70)


def through(codec: Floats, values: Tensor) -> Tensor:
    return codec.decode(codec.encode(values[None]), len(values))[0]


@given(floats)
def test_numbers_are_rounded_as_torch_rounds_them(pattern: list[float]) -> None:
    values = torch.tensor(pattern)
    expected = values.to(torch.bfloat16)
    wire = BFloat16().encode(values[None])
    assert torch.equal(wire[0], expected.view(torch.uint8))
    assert torch.equal(through(BFloat16(), values).view(torch.int32), expected.float().view(torch.int32))


def test_of_two_numbers_as_near_the_even_one_is_taken() -> None:
    assert through(BFloat16(), torch.tensor(TIES[:3])).tolist() == [1.0, 1 + 2**-6, -1.0]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF])
def test_every_nan_travels_as_the_same(bits: int) -> None:
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert BFloat16().encode(nan[None]).tolist() == [[0xC0, 0x7F]]


@pytest.mark.parametrize(("codec", "nbytes"), [(Float32(), 4), (BFloat16(), 2)])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_messages_are_as_long_as_promised_and_go_where_they_are_asked_to(
    codec: Floats, nbytes: int, count: int
) -> None:
    values = torch.randn(3, count)
    wire = codec.encode(values)
    assert wire.shape == (3, codec.wire_bytes(count)) == (3, nbytes * count)
    memory, decoded = torch.empty_like(wire), torch.empty_like(values)
    assert codec.encode(values, out=memory) is memory
    assert codec.decode(memory, count, out=decoded) is decoded
    assert torch.equal(memory, wire)
    assert torch.equal(decoded, codec.decode(wire, count))
