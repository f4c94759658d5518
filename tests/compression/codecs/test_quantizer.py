"""A quantizer is its torch definition: kernels make it faster, and are no condition."""

import pytest
import torch

from compression import codec
from compression.codecs.base import decoded
from compression.codecs.eden import Eden
from compression.codecs.quantizers import MaxMin
from tests.support.quantizers import MidRise, train_mid_rise

CPU = torch.device("cpu")


def test_a_quantizer_that_no_kernel_knows_trains() -> None:
    trained, served_by = train_mid_rise("cpu")
    assert trained.last_loss < trained.first_loss / 2
    assert trained.ranks_agree
    assert trained.ratio < 0.3  # biases travel in float32
    assert served_by == "compression.kernels.reference"


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_its_codes_are_unbiased_and_its_error_is_the_expected_one(bits: int) -> None:
    quantizer, values = MidRise(bits, bucket_size=64), torch.linspace(-1, 2, 200)
    samples = torch.stack([quantizer.decode(quantizer.encode(values[None], seed), 200)[0] for seed in range(2000)])
    expected = quantizer.expected_squared_error(values)
    assert (samples - values).square().sum(1).mean().item() == pytest.approx(expected, rel=0.05)
    deviation = (samples.mean(0) - values).square().sum().sqrt()
    assert deviation < 4 * (expected / 2000) ** 0.5


def test_a_subclass_that_may_change_the_arithmetic_is_not_taken_for_its_base() -> None:
    class Doubled(MaxMin):
        def levels(self, scales_MS: torch.Tensor, codes_MK: torch.Tensor) -> torch.Tensor:
            return 2 * super().levels(scales_MS, codes_MK)

    values = torch.linspace(-1, 1, 600)[None]
    assert MaxMin(8).backend(CPU) == "cpu"
    assert Doubled(8).backend(CPU) == "reference"
    assert Eden(8).backend(CPU) == "cpu"
    plain, doubled = MaxMin(8), Doubled(8)
    assert torch.equal(doubled.decode(doubled.encode(values, 3), 600), 2 * plain.decode(plain.encode(values, 3), 600))


@pytest.mark.parametrize("name", ["maxmin", "quantile", "1bit", "terngrad", "topk"])
def test_what_is_encoded_or_decoded_goes_where_it_is_asked_to(name: str) -> None:
    coder, values = codec(name), torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    wire = torch.full((3, coder.wire_bytes(1000)), 255, dtype=torch.uint8)
    assert coder.encode(values, 5, out=wire).data_ptr() == wire.data_ptr()
    assert torch.equal(wire, coder.encode(values, 5))
    out = torch.full((3, 1000), 7.0)
    assert coder.decode(wire, 1000, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, coder.decode(wire, 1000))


@pytest.mark.parametrize("name", ["maxmin", "quantile", "topk", "svd"])
def test_memory_that_does_not_fit_is_refused_before_anything_is_written(name: str) -> None:
    options = {"rows": 20, "cols": 50, "rank": 2} if name == "svd" else {}
    coder, values = codec(name, **options), torch.ones(2, 1000)
    wire = coder.encode(values, 5)
    turned = torch.zeros(wire.shape[1], 2, dtype=torch.uint8).T
    for out in (torch.zeros(2, 10, dtype=torch.uint8), torch.zeros(wire.shape), turned):
        with pytest.raises(ValueError, match=r"out must be contiguous, torch.uint8, \[2, \d+\], on cpu, got "):
            coder.encode(values, 5, out=out)
        assert not out.any()
    for out in (torch.zeros(2, 100), torch.zeros(2, 1000, dtype=torch.float64), torch.zeros(1000, 2).T):
        with pytest.raises(ValueError, match=r"out must be contiguous, torch.float32, \[2, 1000\], on cpu, got "):
            coder.decode(wire, 1000, out=out)
        assert not out.any()


def test_a_family_is_named_among_the_bases() -> None:
    with pytest.raises(TypeError, match="Named names its family in its body; name it among the bases"):

        class Named(MaxMin):
            family = "maxmin"


@pytest.mark.parametrize("name", ["maxmin", "eden", "1bit"])
def test_float64_beyond_float32_is_cut_and_what_is_infinite_is_not(name: str) -> None:
    values = torch.full((2, 512), 1e300, dtype=torch.float64)
    values[1, 3] = torch.inf
    found = decoded(codec(name), codec(name).encode(values, 0), 512, 0)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
